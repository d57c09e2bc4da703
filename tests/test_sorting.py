"""Sorts agree with torch's, for every type and under vmap."""

import pytest
import torch

from toolkit.sorting import ascending, ascending_order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.int32])
def test_as_torch_sorts(dtype) -> None:
    values = torch.randint(-50, 50, (3, 4, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.sort(-1).values
    assert torch.equal(ascending(values), expected)
    assert torch.equal(values.gather(-1, ascending_order(values)), expected)
    assert torch.equal(torch.vmap(ascending)(values), expected)
    assert torch.equal(values.gather(-1, torch.vmap(ascending_order)(values)), expected)


def test_no_gradient_flows() -> None:
    values = torch.rand(5, requires_grad=True)
    assert not ascending(values).requires_grad
    assert ascending_order(values).dtype == torch.int64
