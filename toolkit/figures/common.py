"""What still and live figures share: colours, and arrays checked before they are drawn."""

from typing import Any

import numpy as np

from toolkit.intervals import interval

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#777777"
MARKERS = "osD^vPX*"


def as_numpy(name: str, values: Any, ndim: int | None = None) -> np.ndarray:
    """A list, array or tensor as a float64 array of ``ndim`` dimensions."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension{'s' * (ndim > 1)}, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one value, got shape {array.shape}")
    return array


def finite(name: str, array: np.ndarray) -> np.ndarray:
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {array.size} values are not finite")
    return array


def same_length(name: str, array: np.ndarray, length: int, other: str) -> None:
    if len(array) != length:
        raise ValueError(f"{name}: expected {length} entries as in {other}, got {len(array)}")


def require_labels(**labels: str) -> None:
    for name, text in labels.items():
        if not text.strip():
            raise ValueError(f"{name}: expected the quantity and its unit, got nothing")


def checked_bins(confidence: Any, accuracy: Any, low: Any, high: Any, count: Any) -> tuple[np.ndarray, ...]:
    """The filled bins of a reliability diagram, checked: confidence, accuracy, low, high, share of the examples."""
    names = ("confidence", "accuracy", "low", "high", "count")
    arrays = [
        as_numpy(name, values, 1) for name, values in zip(names, (confidence, accuracy, low, high, count), strict=True)
    ]
    for name, array in zip(names, arrays, strict=True):
        same_length(name, array, len(arrays[0]), "confidence")
    sizes = finite("count", arrays[4])
    if (sizes < 0).any() or sizes.sum() == 0:
        raise ValueError(
            f"count: expected numbers of examples, at least one above 0, got {sizes.min():g} to {sizes.max():g}"
        )
    full = sizes > 0
    for name, array in zip(names[:4], arrays[:4], strict=True):
        values = finite(name, array[full])
        if values.min() < -1e-6 or values.max() > 1 + 1e-6:
            raise ValueError(f"{name}: expected values in [0, 1], got {values.min():.4g} to {values.max():.4g}")
    if (arrays[2][full] > arrays[1][full] + 1e-6).any() or (arrays[3][full] < arrays[1][full] - 1e-6).any():
        raise ValueError("low, high: expected low <= accuracy <= high in every bin that holds examples")
    return (*(np.where(full, array, np.nan) for array in arrays[:4]), sizes / sizes.sum())


def mean_band(x: Any, values_by_member: Any, level: float) -> tuple[np.ndarray, ...]:
    """x, and mean, low and high over members at each x."""
    positions = finite("x", as_numpy("x", x, 1))
    values = finite("values_by_member", as_numpy("values_by_member", values_by_member, 2))
    if values.shape[1] != len(positions):
        raise ValueError(f"values_by_member: expected shape (members, {len(positions)}) as in x, got {values.shape}")
    rows = [interval(column, level) for column in values.T]
    return (positions, *(np.array([getattr(row, key) for row in rows]) for key in ("estimate", "low", "high")))
