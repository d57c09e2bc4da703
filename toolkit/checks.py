"""Argument checks that every room shares: shapes at run time, and values that must be probabilities.

Signatures carry shapes in jaxtyping's notation; :func:`typed` has beartype check them on every call, so a wrong shape
is an error that names the argument. Values are checked only where a value can be read: under ``torch.func`` transforms
and on their inner tensors nothing is read, so the same function still vmaps, differentiates and compiles.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable)
_BLOCK = 1 << 18  # values that are checked at a time


_checking = True


@contextmanager
def unchecked() -> Iterator[None]:
    """Shapes are not checked inside: for a loop whose first round was checked and whose other rounds are alike."""
    global _checking
    before, _checking = _checking, False
    try:
        yield
    finally:
        _checking = before


def typed(function: _Function) -> _Function:
    """Check the shapes and types that ``function``'s signature states, on every call.

    The checker is made when the function is first called: making all of them would double the time of an import.
    """

    @cache
    def checked() -> Callable[..., Any]:
        from beartype import beartype
        from jaxtyping import jaxtyped

        return jaxtyped(typechecker=beartype)(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (checked() if _checking else function)(*args, **kwargs)

    return cast(_Function, call)


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values: false inside ``vmap``, ``grad`` and ``torch.compile``."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or tensor.device.type == "meta"
    )


def require_probabilities(name: str, values: Tensor) -> None:
    """Raise ``ValueError`` unless ``values`` are probabilities.

    A vector ``(batch,)`` holds probabilities of one event and must lie in [0, 1]; in ``(..., classes)`` with two or
    more dimensions each row must also sum to 1. Does nothing where values cannot be read (see :func:`readable`).
    """
    if not readable(values) or values.numel() == 0:
        return
    values = values.detach()
    half = values.dtype in (torch.float16, torch.bfloat16)
    tolerance = 1e-6 if values.dtype == torch.float64 else 2e-3 if half else 1e-4
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values
    ones = rows.new_ones(rows.shape[-1])
    ranges = []  # block by block, so that each value is read from memory once
    for block in rows.split(max(1, _BLOCK * len(rows) // rows.numel())):
        sums = block @ ones if values.ndim > 1 else block
        ranges.append(torch.stack([*block.aminmax(), *sums.aminmax()]))
    bounds = torch.stack(ranges)
    (low, _, least, _), (_, high, _, most) = bounds.amin(0).tolist(), bounds.amax(0).tolist()
    if not (low >= -tolerance and high <= 1 + tolerance):
        raise ValueError(
            f"{name}: expected probabilities in [0, 1], got values from {low:.4g} to {high:.4g}; "
            "logits become probabilities with softmax"
        )
    worst = max(1 - least, most - 1)
    if values.ndim > 1 and not worst <= 10 * tolerance:
        raise ValueError(f"{name}: expected rows that sum to 1, got a row whose sum is off by {worst:.4g}")


def require_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless the integer ``labels`` lie in 0 .. ``classes`` - 1 (nothing where unreadable)."""
    if not readable(labels) or labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name}: expected class indices from 0 to {classes - 1}, got values from {low.item()} to {high.item()}"
        )


def require_positive(name: str, value: float | Tensor) -> None:
    """Raise ``ValueError`` unless a Python number (or a readable tensor) is greater than 0 everywhere."""
    if isinstance(value, Tensor):
        if readable(value) and not bool((value > 0).all()):
            raise ValueError(f"{name}: expected values greater than 0, got {value.min().item()}")
    elif not value > 0:
        raise ValueError(f"{name}: expected a number greater than 0, got {value}")


def require_range(name: str, value: float | Tensor, low: float, high: float) -> None:
    """Raise ``ValueError`` unless low ≤ value ≤ high (nothing where the value of a tensor cannot be read)."""
    if isinstance(value, Tensor):
        if not readable(value):
            return
        value = value.item()
    if not low <= value <= high:
        bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name}: expected a number {bound}, got {value}")
