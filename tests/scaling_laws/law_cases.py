"""Checks that every law must pass, and values that their tests share."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


N, D = doubles(1e6, 3e7, 1e9), doubles(2e8, 5e9, 4e10)
S, B = doubles(3e3, 2e4, 1e5), doubles(1e5, 1e6, 3e7)


def constants(law: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A law's numbers as tensors."""
    tensors = [torch.tensor(float(value), dtype=dtype) for value in law]
    return type(law)(*tensors) if hasattr(law, "_fields") else tuple(tensors)


def kind_of(law: Any) -> Any:
    return type(law) if hasattr(law, "_fields") else lambda *values: values


def check_derivatives(call: Any, law: Any, args: tuple[Tensor, ...]) -> None:
    """In the logarithm of each argument and constant, so that one step suits 1e-1 and 1e13."""
    kind = kind_of(law)
    logs = [torch.tensor(math.log(value), dtype=torch.float64, requires_grad=True) for value in law]
    inputs = [x.log().requires_grad_() for x in args]

    def value(*tensors: Tensor) -> Tensor:
        return call(kind(*(t.exp() for t in tensors[: len(logs)])), *(t.exp() for t in tensors[len(logs) :]))

    assert torch.autograd.gradcheck(value, (*logs, *inputs), eps=1e-5, atol=1e-7, rtol=2e-5)


def check_vmap(call: Any, law: Any, args: tuple[Tensor, ...], elementwise: bool = True) -> None:
    """Over the constants; and where a law acts element by element, over its arguments, and in float32."""
    single = constants(law)
    plain = call(single, *args)
    stacked = [torch.stack([value, value * 0.9]) for value in single]
    kind = kind_of(law)
    both = vmap(lambda *values: call(kind(*values), *args))(*stacked)
    torch.testing.assert_close(both[0], plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(both[1], call(kind(*(v[1] for v in stacked)), *args), rtol=1e-12, atol=0)
    if elementwise:
        torch.testing.assert_close(vmap(lambda *x: call(single, *x))(*args), plain, rtol=1e-12, atol=0)
        half = call(constants(law, torch.float32), *(x.float() for x in args))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), plain, rtol=2e-4, atol=0)
