"""Scaling laws as pure functions: loss from model size, data, steps, batch size or a learning-rate schedule.

Units are the caller's and must agree with the constants': parameters for sizes, tokens for data and batch sizes, steps
for updates, nats per token for losses. The constants of a law are a named tuple of numbers or tensors. Everything
broadcasts, differentiates and runs under ``torch.vmap``, over the constants too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import readable, require_positive, require_range, typed

__all__ = [
    "Annealing",
    "Bivariate",
    "Chinchilla",
    "DataConstrained",
    "KaplanData",
    "KaplanSteps",
    "MultiPower",
    "PowerLaw",
    "StoredBits",
    "annealing_areas",
    "annealing_law",
    "bivariate",
    "capacity_limit",
    "chinchilla",
    "critical_batch",
    "data_constrained",
    "kaplan",
    "kaplan_data",
    "kaplan_steps",
    "kaplan_trajectory",
    "log_diffusion",
    "minimum_cost",
    "multi_power_law",
    "power_law",
    "stored_bits",
]

_HALVINGS = 60
_Number = float | int | Tensor


class PowerLaw(NamedTuple):
    """L = ``floor`` + ``scale`` x^-``exponent``; ``scale`` is in loss · unit of x to the ``exponent``."""

    floor: _Number
    scale: _Number
    exponent: _Number


class KaplanData(NamedTuple):
    """Constants of L(N, D): ``n_c`` parameters, ``d_c`` tokens, exponents ``a_n`` and ``a_d``."""

    n_c: _Number
    a_n: _Number
    d_c: _Number
    a_d: _Number


class KaplanSteps(NamedTuple):
    """Constants of L(N, S): ``n_c`` parameters, ``s_c`` steps; ``b_star`` tokens, at a loss of 1; three exponents."""

    n_c: _Number
    a_n: _Number
    s_c: _Number
    a_s: _Number
    b_star: _Number
    a_b: _Number


class Chinchilla(NamedTuple):
    """Constants of L = ``floor`` + ``size_scale`` N^-``alpha`` + ``data_scale`` D^-``beta`` (E, A, B, α, β)."""

    floor: _Number
    size_scale: _Number
    data_scale: _Number
    alpha: _Number
    beta: _Number


class DataConstrained(NamedTuple):
    """Constants of :class:`Chinchilla`, and the worth of repeated data (``r_d``) and excess size (``r_n``)."""

    floor: _Number
    size_scale: _Number
    data_scale: _Number
    alpha: _Number
    beta: _Number
    r_n: _Number
    r_d: _Number


class Bivariate(NamedTuple):
    """Constants of L = ``floor`` + ``scale`` N_e^-``p_e`` N_d^-``p_d``: encoder and decoder parameters."""

    floor: _Number
    scale: _Number
    p_e: _Number
    p_d: _Number


class Annealing(NamedTuple):
    """Constants of L = ``floor`` + ``scale`` S1^-``exponent`` - ``gain`` S2; ``decay`` is λ, per step, within S2."""

    floor: _Number
    scale: _Number
    exponent: _Number
    gain: _Number
    decay: _Number


class MultiPower(NamedTuple):
    """Constants L0, A, α, B, C, β, γ of :func:`multi_power_law`."""

    floor: _Number
    scale: _Number
    alpha: _Number
    gain: _Number
    rate: _Number
    beta: _Number
    gamma: _Number


def _positive(**values: _Number) -> None:
    for name, value in values.items():
        require_positive(name, value)


def _constants(law: Sequence[_Number], free: tuple[str, ...] = ("floor",)) -> None:
    """All constants but ``free`` are positive."""
    _positive(**{name: value for name, value in law._asdict().items() if name not in free})  # type: ignore[attr-defined]  # a named tuple


@typed
def power_law(x: Float[Tensor, "*#shape"], law: PowerLaw) -> Float[Tensor, "..."]:
    """L(x) = floor + scale · x^-exponent for any resource x > 0 (parameters, tokens, examples, FLOPs).

    Tends to the floor for x → ∞. Raises ``ValueError`` for x, a scale or an exponent that is not positive. Source:
    Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically".
    """
    _positive(x=x)
    _constants(law)
    return law.floor + law.scale * x**-law.exponent


@typed
def kaplan(x: Float[Tensor, "*#shape"], x_c: _Number, exponent: _Number) -> Float[Tensor, "..."]:
    """L(x) = (x_c / x)^exponent: the loss when x alone is scarce; x_c is the x at which the loss would be 1.

    Published for non-embedding parameters N (8.8e13, 0.076), tokens D (5.4e13, 0.095) and least compute C (3.1e8
    PF-days, 0.050). Raises ``ValueError`` for what is not positive. Source: Kaplan et al. 2020, "Scaling Laws for
    Neural Language Models".
    """
    _positive(x=x, x_c=x_c, exponent=exponent)
    return (x_c / x) ** exponent


@typed
def kaplan_data(n: Float[Tensor, "*#shape"], d: Float[Tensor, "*#shape"], law: KaplanData) -> Float[Tensor, "..."]:
    """L(N, D) = [(N_c/N)^(a_N/a_D) + D_c/D]^a_D: :func:`kaplan` in N for D → ∞, and in D for N → ∞.

    Overfitting depends on N^(a_N/a_D)/D alone. Raises ``ValueError`` for what is not positive. Source: Kaplan et al.
    2020, "Scaling Laws for Neural Language Models".
    """
    _positive(n=n, d=d)
    _constants(law)
    return ((law.n_c / n) ** (law.a_n / law.a_d) + law.d_c / d) ** law.a_d


@typed
def kaplan_steps(
    n: Float[Tensor, "*#shape"], s_min: Float[Tensor, "*#shape"], law: KaplanSteps
) -> Float[Tensor, "..."]:
    """L(N, S_min) = (N_c/N)^a_N + (S_c/S_min)^a_S after S_min steps of a batch far above the critical one.

    Raises ``ValueError`` for what is not positive. Sources: Kaplan et al. 2020, "Scaling Laws for Neural Language
    Models"; Su et al. 2024, "Unraveling the Mystery of Scaling Laws".
    """
    _positive(n=n, s_min=s_min)
    _constants(law)
    return (law.n_c / n) ** law.a_n + (law.s_c / s_min) ** law.a_s


def _critical(loss: Tensor, law: KaplanSteps) -> Tensor:
    return law.b_star * loss ** (-1 / law.a_b)


@typed
def critical_batch(loss: Float[Tensor, "*#shape"], law: KaplanSteps) -> Float[Tensor, "..."]:
    """B_crit(L) = b_star / L^(1/a_B) tokens: the batch at which steps and tokens are both twice their least.

    Raises ``ValueError`` for what is not positive. Sources: McCandlish et al. 2018, "An Empirical Model of Large-Batch
    Training"; Kaplan et al. 2020, "Scaling Laws for Neural Language Models".
    """
    _positive(loss=loss)
    _constants(law)
    return _critical(loss, law)


@typed
def minimum_cost(
    steps: Float[Tensor, "*#shape"], batch: Float[Tensor, "*#shape"], critical: Float[Tensor, "*#shape"]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(S_min, E_min) of a run of S steps at batch B: S_min = S/(1 + B_crit/B), E_min = BS/(1 + B/B_crit) tokens.

    The least steps (B → ∞) and the least tokens (B → 0) with which the same loss can be reached; they satisfy
    (S/S_min - 1)(BS/E_min - 1) = 1 and E_min/S_min = B_crit. Raises ``ValueError`` for what is not positive. Source:
    McCandlish et al. 2018, "An Empirical Model of Large-Batch Training".
    """
    _positive(steps=steps, batch=batch, critical=critical)
    return steps / (1 + critical / batch), batch * steps / (1 + batch / critical)


@typed
def kaplan_trajectory(
    n: Float[Tensor, "*#shape"], steps: Float[Tensor, "*#shape"], batch: Float[Tensor, "*#shape"], law: KaplanSteps
) -> Float[Tensor, "..."]:
    """The loss after S steps at batch B: the root L of :func:`steps_to_loss` = S, which falls strictly in L.

    Bisection on the logarithm of the excess x = L - (N_c/N)^a_N between its values for B_crit = 0 and for the B_crit of
    x = 0, which enclose the root; one Newton step gives the last digits and the exact gradient. Raises ``ValueError``
    for what is not positive. Source: Su et al. 2024, "Unraveling the Mystery of Scaling Laws".
    """
    _positive(n=n, steps=steps, batch=batch)
    _constants(law)
    limit = (law.n_c / n) ** law.a_n

    def logarithms(u: Tensor) -> tuple[Tensor, Tensor]:
        """log(steps to excess e^u) - log S, and its slope in u."""
        loss = limit + u.exp()
        ratio = _critical(loss, law) / batch
        value = torch.log(law.s_c * torch.ones_like(loss)) - u / law.a_s + torch.log1p(ratio) - torch.log(steps)
        return value, -1 / law.a_s - u.exp() / loss / law.a_b * ratio / (1 + ratio)

    low = law.a_s * torch.log(law.s_c / steps)
    low = low + 0 * (limit + batch)  # the shape of all arguments
    high = low + law.a_s * torch.log1p(_critical(limit, law) / batch)
    low, high = low.detach(), high.detach()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = logarithms(middle)[0] > 0
        low, high = torch.where(above, middle, low).detach(), torch.where(above, high, middle).detach()
    u = (low + high) / 2
    value, slope = logarithms(u)
    return limit + (u - value / slope.detach()).exp()


@typed
def chinchilla(n: Float[Tensor, "*#shape"], d: Float[Tensor, "*#shape"], law: Chinchilla) -> Float[Tensor, "..."]:
    """L(N, D) = E + A/N^α + B/D^β for N parameters and D tokens, each seen once.

    Raises ``ValueError`` for what is not positive. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large
    Language Models".
    """
    _positive(n=n, d=d)
    _constants(law)
    return law.floor + law.size_scale * n**-law.alpha + law.data_scale * d**-law.beta


def _worth(total: Tensor, unique: Tensor, star: _Number) -> Tensor:
    """U + U R* (1 - e^(-R/R*)) with R = total/U - 1."""
    return unique - unique * star * torch.expm1(-(total / unique - 1) / star)


@typed
def data_constrained(
    n: Float[Tensor, "*#shape"], d: Float[Tensor, "*#shape"], unique: Float[Tensor, "*#shape"], law: DataConstrained
) -> Float[Tensor, "..."]:
    """:func:`chinchilla` at the effective N' and D' when D tokens are drawn from ``unique`` different ones.

    U_D = min(unique, D), R_D = D/U_D - 1, D' = U_D + U_D r_d (1 - e^(-R_D/r_d)); U_N = min(N_opt(U_D), N) where
    N_opt(D) = (αA/βB)^(1/α) D^(β/α) is the compute-optimal size for D tokens, and N' likewise with r_n. A first repeat
    is worth as much as new data, all of them together r_d times ``unique``. The published r_d = 15.4 and r_n = 5.3 are
    weakly identified. Raises ``ValueError`` for what is not positive. Source: Muennighoff et al. 2023, "Scaling
    Data-Constrained Language Models".
    """
    _positive(n=n, d=d, unique=unique)
    _constants(law)
    fresh = torch.minimum(unique, d)
    best = (law.alpha * law.size_scale / (law.beta * law.data_scale)) ** (1 / law.alpha) * fresh ** (
        law.beta / law.alpha
    )
    size = _worth(n, torch.minimum(best, n), law.r_n)
    data = _worth(d, fresh, law.r_d)
    return law.floor + law.size_scale * size**-law.alpha + law.data_scale * data**-law.beta


@typed
def bivariate(
    encoder: Float[Tensor, "*#shape"], decoder: Float[Tensor, "*#shape"], law: Bivariate
) -> Float[Tensor, "..."]:
    """L = floor + scale · N_e^-p_e · N_d^-p_d, for the parameters of an encoder and of a decoder.

    Reference sizes are folded into ``scale``. Raises ``ValueError`` for what is not positive. Source: Ghorbani et al.
    2021, "Scaling Laws for Neural Machine Translation" (the form is a reading of the paper).
    """
    _positive(encoder=encoder, decoder=decoder)
    _constants(law)
    return law.floor + law.scale * encoder**-law.p_e * decoder**-law.p_d


def _areas(lr: Tensor, drops: Tensor, decay: _Number) -> Tensor:
    """Cumulative sum of m_i = λ m_(i-1) + drop_i, by doubling: step k adds what is 2^k steps older."""
    momentum, shift = drops, 1
    while shift < len(lr):
        older = torch.nn.functional.pad(momentum, (shift, 0))[: len(lr)]
        momentum = momentum + decay**shift * older
        shift *= 2
    return momentum.cumsum(0)


def _drops(lr: Tensor, warmup: int) -> Tensor:
    """η_(i-1) - η_i, 0 for the first step and for those of the warm-up."""
    if not 0 <= warmup <= len(lr):
        raise ValueError(f"warmup: expected a number of steps from 0 to {len(lr)}, got {warmup}")
    if readable(lr) and not bool((lr >= 0).all()):
        raise ValueError(f"lr: expected rates of at least 0, got {lr.min().item()}")
    first = max(1, warmup)
    return torch.cat([lr.new_zeros(min(first, len(lr))), lr[first - 1 : -1] - lr[first:]])


@typed
def annealing_areas(
    lr: Float[Tensor, "steps"], decay: _Number, warmup: int = 0
) -> tuple[Float[Tensor, "steps"], Float[Tensor, "steps"]]:
    """(S1, S2) after each step of a schedule: forward area S1 = Σ η_i and annealing area S2 = Σ m_i, m_0 = 0.

    m_i = λ m_(i-1) + (η_(i-1) - η_i), so S2(s) = Σ_k (η_(k-1) - η_k)(1 - λ^(s-k+1))/(1 - λ): a drop counts more the
    longer it lies back, up to 1/(1 - λ) steps. ``lr[i]`` is the rate of step i; the first step has no drop. A rise
    counts against S2; with ``warmup`` = w the first w steps count in S1 alone, as the paper seems to have it (a
    reading). Both areas have the unit of the learning rate times steps. Raises ``ValueError`` for λ = ``decay`` outside
    [0, 1], negative rates or a warm-up longer than the schedule. Source: Tissue et al. 2024, "Scaling Law with Learning
    Rate Annealing".
    """
    if not isinstance(decay, Tensor) or readable(decay):
        require_range("decay", decay, 0, 1)
    return lr.cumsum(0), _areas(lr, _drops(lr, warmup), decay)


@typed
def annealing_law(lr: Float[Tensor, "steps"], law: Annealing, warmup: int = 0) -> Float[Tensor, "steps"]:
    """L(s) = floor + scale · S1^-exponent - gain · S2 after each step of a schedule (see :func:`annealing_areas`).

    Linear in floor, scale and gain. Infinite while S1 is 0. Raises ``ValueError`` for a scale, exponent or λ that is
    not positive, and as :func:`annealing_areas`.
    Source: Tissue et al. 2024, "Scaling Law with Learning Rate Annealing".
    """
    _constants(law, ("floor", "gain"))
    forward, annealing = annealing_areas(lr, law.decay, warmup)
    return law.floor + law.scale * forward**-law.exponent - law.gain * annealing


@typed
def multi_power_law(
    lr: Float[Tensor, "steps"], law: MultiPower, at: Int[Tensor, "points"] | None = None, warmup: int = 0
) -> Float[Tensor, "..."]:
    """L(t) = floor + scale · S(t)^-α - gain · Σ_(k≤t) (η_(k-1) - η_k) G(η_k^-γ S_k(t)), G(x) = 1 - (1 + rate · x)^-β.

    S(t) = Σ_(i≤t) η_i, S_k(t) = Σ_(k≤i≤t) η_i; a drop pays off along a power law of its own, faster at a low rate. The
    rises of the warm-up belong to the sum (``warmup`` = 0), for the published constants too. ``at`` (default: all)
    picks the steps t, from 0; memory is points × steps. Raises ``ValueError`` for constants that are not positive
    (floor and gain may be anything), negative rates, or steps out of range. Source: Luo et al. 2025, "A Multi-Power Law
    for Loss Curve Prediction Across Learning Rate Schedules".
    """
    _constants(law, ("floor", "gain"))
    drops, total = _drops(lr, warmup), lr.cumsum(0)
    at = torch.arange(len(lr), device=lr.device) if at is None else at
    if readable(at) and at.numel() and not (at.min() >= 0 and at.max() < len(lr)):
        raise ValueError(f"at: expected steps from 0 to {len(lr) - 1}, got {at.min().item()} to {at.max().item()}")
    since = (total[at][:, None] - (total - lr)).clamp(min=0)
    speed = lr.clamp(min=torch.finfo(lr.dtype).tiny) ** -law.gamma
    gained = -torch.expm1(-law.beta * torch.log1p(law.rate * speed * since))
    gained = torch.where(torch.arange(len(lr), device=lr.device) <= at[:, None], gained, 0)
    return law.floor + law.scale * total[at] ** -law.alpha - law.gain * gained @ drops


class StoredBits(NamedTuple):
    """Bits that a model provably stores about the ``names`` and about their ``values``: the sum is its knowledge."""

    names: Tensor
    values: Tensor


@typed
def stored_bits(
    name_loss: Float[Tensor, "*#shape"],
    value_loss: Float[Tensor, "*#shape"],
    *,
    names: _Number,
    pool: _Number,
    diversity: _Number,
    attributes: _Number = 1,
    chunks: _Number = 1,
) -> StoredBits:
    """Bits stored: N log2(N_0 / e^p1) about names and N K log2(D^C / e^p2) about values (a lower bound).

    ``name_loss`` p1 and ``value_loss`` p2 are mean cross-entropies in nats of a whole name and of one attribute's whole
    value given the name; N = ``names`` were drawn from N_0 = ``pool``, each with K ``attributes`` of C ``chunks``, each
    one of D = ``diversity`` strings. A model that guesses has 0 bits; one worse than guessing has negative ones: clip
    at 0 and show both. The (small) part of learning the strings themselves is left out. Raises ``ValueError`` for
    counts that are not positive. Source: Allen-Zhu & Li 2024, "Physics of Language Models: Part 3.3" (formulas are a
    reading; about 2 bits per parameter after 1,000 exposures).
    """
    _positive(names=names, pool=pool, diversity=diversity, attributes=attributes, chunks=chunks)
    like = name_loss + value_loss
    about_values = names * attributes * (chunks * _log(diversity, like) - value_loss) / math.log(2)
    return StoredBits(names * (_log(pool, like) - name_loss) / math.log(2), about_values)


def _log(value: _Number, like: Tensor) -> Tensor:
    value = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    return value.log().to(like)


@typed
def capacity_limit(
    *, names: _Number, pool: _Number, diversity: _Number, attributes: _Number = 1, chunks: _Number = 1
) -> Float[Tensor, "..."]:
    """N log2(N_0/N) + N K C log2 D: the :func:`stored_bits` of a perfect memory, which no model exceeds.

    Even a perfect memory pays p1 = ln N for which of the N names comes. Divided by the number of parameters it is the
    greatest ratio that an experiment can show. float64; arguments, errors and source as :func:`stored_bits`.
    """
    _positive(names=names)
    zero = torch.zeros((), dtype=torch.float64, device=names.device if isinstance(names, Tensor) else None)
    kinds = {"names": names, "pool": pool, "diversity": diversity, "attributes": attributes, "chunks": chunks}
    return sum(stored_bits(_log(names, zero), zero, **kinds), zero)


@typed
def log_diffusion(t: Float[Tensor, "*#shape"], offset: _Number, rate: _Number) -> Float[Tensor, "..."]:
    """|w_t - w_0| = offset + rate · ln t: distance from the initial weights after t steps at a high learning rate.

    Ultra-slow diffusion, as of a walk in a random potential: each doubling of t adds rate · ln 2. ``offset`` is the
    distance at t = 1. Raises ``ValueError`` for t that is not positive. Source: Hoffer et al. 2017, "Train longer,
    generalize better" (the form is a reading).
    """
    _positive(t=t)
    return offset + rate * torch.log(t)
