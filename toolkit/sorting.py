"""Sorting along the last axis, without gradient: by NumPy, several times faster, where it can read the values."""

import torch
from torch import Tensor

from toolkit.checks import readable

_TYPES = (torch.float32, torch.float64, torch.int64)


def _in_numpy(values: Tensor) -> bool:
    return values.device.type == "cpu" and readable(values) and values.dtype in _TYPES


def ascending(values: Tensor) -> Tensor:
    """``values`` in ascending order."""
    values = values.detach()
    if not _in_numpy(values):
        return values.sort(-1).values
    import numpy as np  # here: torch alone does without it

    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def ascending_order(values: Tensor) -> Tensor:
    """Indices that put ``values`` in ascending order; equal values in any order."""
    values = values.detach()
    if not _in_numpy(values):
        return values.argsort(-1)
    import numpy as np

    return torch.from_numpy(np.argsort(values.numpy(), axis=-1))
