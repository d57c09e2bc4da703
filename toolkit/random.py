"""Random numbers that depend only on a key, never on what was drawn before.

A key is one int64 tensor. The same key gives the same numbers on every device, in any order, under ``vmap`` and in a
fleet of any size: this is what makes member *i* of a fleet independent of its neighbours. The generator is SplitMix64
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") run in counter mode.
"""

import math

import torch
from torch import Tensor

from toolkit.sorting import ascending

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)
_SLOT_BITS = 20  # one width for all sizes up to a million: the order of the first slots is the same in longer rows


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MULTIPLIER_1)  # in place on new tensors: memory is what this waits for
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MULTIPLIER_2)
    return _shift(x, 31).bitwise_xor_(x)


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from ``key`` and an integer (or an int64 tensor that broadcasts against it)."""
    if not isinstance(data, Tensor):
        data = torch.full((), int(data), dtype=torch.int64, device=key.device)  # filled there: nothing waits for a copy
    return _mix(key ^ _mix(data * _GOLDEN + 1))


def key(seed: int, *path: int, device: str | torch.device = "cpu") -> Tensor:
    """The key of ``seed``, narrowed by any number of integers: ``key(0, member, epoch)``. Shape ``()``, int64."""
    result = _mix(torch.tensor(seed, dtype=torch.int64, device=device) + _GOLDEN)
    for data in path:
        result = fold_in(result, data)
    return result


def bits(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform int64 values (all 64 bits random) of shape ``key.shape + shape``."""
    counter = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64, device=key.device).reshape(shape)
    return _mix(key.reshape(key.shape + (1,) * len(shape)) + counter * _GOLDEN)


def uniform(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform values strictly inside (0, 1), of shape ``key.shape + shape``; 23 random bits (52 in float64).

    Raises ``ValueError`` for other types, in which the values next to 1 would be rounded to 1.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    count = 52 if dtype == torch.float64 else 23
    return (_shift(bits(key, shape), 64 - count).to(dtype) + 0.5) * 2.0**-count


def normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values of shape ``key.shape + shape`` (inverse distribution function of :func:`uniform`)."""
    return math.sqrt(2) * torch.erfinv(2 * uniform(key, shape, dtype) - 1)


def symmetric_beta(key: Tensor, count: int, alpha: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``count`` values of Beta(alpha, alpha), exact and without rejection.

    If t is Student's t with 2 alpha degrees of freedom, (1 + t / sqrt(2 alpha + t^2)) / 2 is Beta(alpha, alpha); t
    comes from two uniforms by the polar method (Bailey 1994).
    """
    first, second = uniform(key, (2, count), dtype)
    log_radius = first.log() / alpha
    outer, inner = -torch.expm1(log_radius), log_radius.exp()
    cosine = torch.cos(2 * math.pi * second)
    return (1 + cosine * outer.sqrt() / (inner + outer * cosine.square()).sqrt()) / 2


def shuffled_slots(key: Tensor, size: int, counts: Tensor | None = None) -> Tensor:
    """Random permutations of 0 .. ``size`` - 1, of shape ``key.shape + (size,)``.

    With ``counts`` (broadcastable to ``key.shape``) the first ``counts`` entries of a row are a permutation of
    0 .. ``counts`` - 1, which does not depend on ``size``, and the rest of the row is padding. Slot numbers ride in the
    low bits of the sorted values, so ties cannot occur and every device gives the same order.
    """
    width = max(_SLOT_BITS, (size - 1).bit_length())
    slots = torch.arange(size, dtype=torch.int64, device=key.device)
    packed = (bits(key, (size,)) & (-1 << width)) | slots
    if counts is not None:
        packed = torch.where(slots < counts[..., None], packed, slots | (torch.iinfo(torch.int64).max & (-1 << width)))
    return ascending(packed) & ((1 << width) - 1)


def permutation(key: Tensor, size: int) -> Tensor:
    """A random permutation of 0 .. ``size`` - 1 for each key: shape ``key.shape + (size,)``."""
    return shuffled_slots(key, size)


def dropout(x: Tensor, rate: float | Tensor, key: Tensor) -> Tensor:
    """Inverted dropout: each entry is kept with probability 1 - ``rate`` and divided by it. ``rate`` in [0, 1)."""
    keep = uniform(key, tuple(x.shape)) >= rate
    return torch.where(keep, x / (1 - rate), torch.zeros((), dtype=x.dtype, device=x.device))
