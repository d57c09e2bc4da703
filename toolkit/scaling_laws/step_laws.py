"""Laws of training steps as pure functions: loss from steps, batch size or a learning-rate schedule, and diffusion.

Units are the caller's and must agree with the constants': steps for updates, tokens for batch sizes, nats per token for
losses. As the laws of :mod:`toolkit.scaling_laws.size_laws` they broadcast, differentiate and run under ``torch.vmap``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import readable, require_range, typed
from toolkit.scaling_laws.constants import (
    Annealing,
    KaplanSteps,
    MultiPower,
    Number,
    require_all_positive,
    require_constants,
)

__all__ = [
    "annealing_areas",
    "annealing_law",
    "critical_batch",
    "kaplan_steps",
    "kaplan_trajectory",
    "log_diffusion",
    "minimum_cost",
    "multi_power_law",
]

_HALVINGS = 60


@typed
def kaplan_steps(
    n: Float[Tensor, "*#shape"], s_min: Float[Tensor, "*#shape"], law: KaplanSteps
) -> Float[Tensor, "..."]:
    """L(N, S_min) = (N_c/N)^a_N + (S_c/S_min)^a_S after S_min steps of a batch far above the critical one.

    Raises ``ValueError`` for what is not positive. Sources: Kaplan et al. 2020, "Scaling Laws for Neural Language
    Models"; Su et al. 2024, "Unraveling the Mystery of Scaling Laws".
    """
    require_all_positive(n=n, s_min=s_min)
    require_constants(law)
    return (law.n_c / n) ** law.a_n + (law.s_c / s_min) ** law.a_s


def _critical(loss: Tensor, law: KaplanSteps) -> Tensor:
    return law.b_star * loss ** (-1 / law.a_b)


@typed
def critical_batch(loss: Float[Tensor, "*#shape"], law: KaplanSteps) -> Float[Tensor, "..."]:
    """B_crit(L) = b_star / L^(1/a_B) tokens: the batch at which steps and tokens are both twice their least.

    Raises ``ValueError`` for what is not positive. Sources: McCandlish et al. 2018, "An Empirical Model of Large-Batch
    Training"; Kaplan et al. 2020, "Scaling Laws for Neural Language Models".
    """
    require_all_positive(loss=loss)
    require_constants(law)
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
    require_all_positive(steps=steps, batch=batch, critical=critical)
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
    require_all_positive(n=n, steps=steps, batch=batch)
    require_constants(law)
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


def _areas(lr: Tensor, drops: Tensor, decay: Number) -> Tensor:
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
    lr: Float[Tensor, "steps"], decay: Number, warmup: int = 0
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
    require_constants(law, ("floor", "gain"))
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
    require_constants(law, ("floor", "gain"))
    drops, total = _drops(lr, warmup), lr.cumsum(0)
    at = torch.arange(len(lr), device=lr.device) if at is None else at
    if readable(at) and at.numel() and not (at.min() >= 0 and at.max() < len(lr)):
        raise ValueError(f"at: expected steps from 0 to {len(lr) - 1}, got {at.min().item()} to {at.max().item()}")
    since = (total[at][:, None] - (total - lr)).clamp(min=0)
    speed = lr.clamp(min=torch.finfo(lr.dtype).tiny) ** -law.gamma
    gained = -torch.expm1(-law.beta * torch.log1p(law.rate * speed * since))
    gained = torch.where(torch.arange(len(lr), device=lr.device) <= at[:, None], gained, 0)
    return law.floor + law.scale * total[at] ** -law.alpha - law.gain * gained @ drops


@typed
def log_diffusion(t: Float[Tensor, "*#shape"], offset: Number, rate: Number) -> Float[Tensor, "..."]:
    """|w_t - w_0| = offset + rate · ln t: distance from the initial weights after t steps at a high learning rate.

    Ultra-slow diffusion, as of a walk in a random potential: each doubling of t adds rate · ln 2. ``offset`` is the
    distance at t = 1. Raises ``ValueError`` for t that is not positive. Source: Hoffer et al. 2017, "Train longer,
    generalize better" (the form is a reading).
    """
    require_all_positive(t=t)
    return offset + rate * torch.log(t)
