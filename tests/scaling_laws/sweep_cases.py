"""Functions that sweeps run in other processes, in a module that is quick to import there."""

from typing import Any

import torch

from toolkit.random import key, normal


def numbers(width: int, seeds: int, scale: float) -> dict[str, Any]:
    """Several rows from one call, with this project's random numbers."""
    values = scale * normal(key(width), (seeds,), torch.float64)
    return {"width": width, "seed": torch.arange(seeds), "value": values, "kind": "even" if width % 4 == 0 else "odd"}


def broken(width: int) -> dict[str, Any]:
    if width == 2:
        raise ArithmeticError("no")
    return {"width": width}
