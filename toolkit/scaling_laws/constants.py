"""The constants of scaling laws: a named tuple of numbers or tensors for each law, and their checks.

Units are the caller's and must agree with those of sizes, data and losses (see :mod:`toolkit.scaling_laws.size_laws`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.checks import require_positive

__all__ = [
    "Annealing",
    "Bivariate",
    "Chinchilla",
    "DataConstrained",
    "KaplanData",
    "KaplanSteps",
    "MultiPower",
    "PowerLaw",
]

Number = float | int | Tensor


class PowerLaw(NamedTuple):
    """L = ``floor`` + ``scale`` x^-``exponent``; ``scale`` is in loss · unit of x to the ``exponent``."""

    floor: Number
    scale: Number
    exponent: Number


class KaplanData(NamedTuple):
    """Constants of L(N, D): ``n_c`` parameters, ``d_c`` tokens, exponents ``a_n`` and ``a_d``."""

    n_c: Number
    a_n: Number
    d_c: Number
    a_d: Number


class KaplanSteps(NamedTuple):
    """Constants of L(N, S): ``n_c`` parameters, ``s_c`` steps; ``b_star`` tokens, at a loss of 1; three exponents."""

    n_c: Number
    a_n: Number
    s_c: Number
    a_s: Number
    b_star: Number
    a_b: Number


class Chinchilla(NamedTuple):
    """Constants of L = ``floor`` + ``size_scale`` N^-``alpha`` + ``data_scale`` D^-``beta`` (E, A, B, α, β)."""

    floor: Number
    size_scale: Number
    data_scale: Number
    alpha: Number
    beta: Number


class DataConstrained(NamedTuple):
    """Constants of :class:`Chinchilla`, and the worth of repeated data (``r_d``) and excess size (``r_n``)."""

    floor: Number
    size_scale: Number
    data_scale: Number
    alpha: Number
    beta: Number
    r_n: Number
    r_d: Number


class Bivariate(NamedTuple):
    """Constants of L = ``floor`` + ``scale`` N_e^-``p_e`` N_d^-``p_d``: encoder and decoder parameters."""

    floor: Number
    scale: Number
    p_e: Number
    p_d: Number


class Annealing(NamedTuple):
    """Constants of L = ``floor`` + ``scale`` S1^-``exponent`` - ``gain`` S2; ``decay`` is λ, per step, within S2."""

    floor: Number
    scale: Number
    exponent: Number
    gain: Number
    decay: Number


class MultiPower(NamedTuple):
    """Constants L0, A, α, B, C, β, γ of :func:`multi_power_law`."""

    floor: Number
    scale: Number
    alpha: Number
    gain: Number
    rate: Number
    beta: Number
    gamma: Number


def require_all_positive(**values: Number) -> None:
    """Raise ``ValueError``, naming the argument, unless each of ``values`` is greater than 0 everywhere."""
    for name, value in values.items():
        require_positive(name, value)


def require_constants(law: Sequence[Number], free: tuple[str, ...] = ("floor",)) -> None:
    """Raise ``ValueError`` unless all constants of a law but those that are ``free`` are greater than 0."""
    named = law._asdict()  # type: ignore[attr-defined]  # a named tuple
    require_all_positive(**{name: value for name, value in named.items() if name not in free})


def as_like(value: Number, other: Tensor) -> Tensor:
    """A number as a tensor of the dtype and device of ``other``; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=other.dtype, device=other.device)
