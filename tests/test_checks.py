"""Shape checks on every call, switched off where a loop has made them once; ranges."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from toolkit.checks import require_range, typed, unchecked


@typed
def total(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch"]:
    """Row sums."""
    return x.sum(1)


def test_a_wrong_shape_names_the_argument() -> None:
    assert total.__doc__ == "Row sums."
    assert total(torch.ones(2, 3)).tolist() == [3, 3]
    with pytest.raises(TypeCheckError, match="'x'"):
        total(torch.ones(2, 3, 4))


def test_unchecked_lets_it_pass_and_ends_with_its_block() -> None:
    with unchecked():
        assert total(torch.ones(2, 3, 4)).shape == (2, 4)
        with unchecked():
            pass
        total(torch.ones(2, 3, 4))
    with pytest.raises(TypeCheckError):
        total(torch.ones(2, 3, 4))
    with pytest.raises(ZeroDivisionError), unchecked():
        raise ZeroDivisionError
    with pytest.raises(TypeCheckError):
        total(torch.ones(2, 3, 4))


@pytest.mark.parametrize("value", [-0.1, 1.1, torch.tensor(2.0), float("nan")])
def test_a_number_out_of_range(value) -> None:
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1, got"):
        require_range("share", value, 0, 1)
    require_range("share", 0.5, 0, 1)


def test_a_value_under_vmap_is_not_looked_at() -> None:
    def one(value: Tensor) -> Tensor:
        require_range("share", value, 0, 1)
        return value

    assert torch.vmap(one)(torch.tensor([5.0])).tolist() == [5.0]
