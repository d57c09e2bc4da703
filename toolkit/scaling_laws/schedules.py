"""Learning-rate schedules and what theory says of them: refined from gradients, by power law, without an end.

A :data:`~toolkit.fleet.schedules.Schedule` maps progress in [0, 1) to a factor; a tensor ``(steps,)`` of factors
becomes one with :func:`from_factors`. Linear decay, cosine and warm-up themselves are those of :mod:`toolkit.fleet`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.fleet import Step, Wrapper, cosine, stable_decay, warmup
from toolkit.fleet.schedules import Schedule

__all__ = [
    "NormRecorder",
    "OwnSchedules",
    "fit_power_schedule",
    "from_factors",
    "infinite",
    "last_iterate_bound",
    "power_rates",
    "refined_schedule",
    "replay_mask",
    "rewarm",
    "wsd",
]


@typed
def from_factors(factors: Float[Tensor, "steps"]) -> Schedule:
    """The schedule that takes ``factors[t]`` at step t of ``len(factors)`` (the nearest one where a run is longer)."""
    steps = len(factors)
    if steps == 0:
        raise ValueError("factors: expected at least one step, got none")

    def factor(t: Tensor) -> Tensor:
        return factors.to(t)[(t * steps).round().long().clamp(0, steps - 1)]

    return factor


@dataclass(frozen=True)
class NormRecorder(Wrapper):
    """An optimiser that also writes down ``inner``'s gradient norms: ``fleet.state["norms"]``, ``(members, steps)``.

    ``order`` is 2 for SGD or 1 for Adam, as :func:`refined_schedule` needs them. Steps beyond ``steps`` are not kept.
    """

    steps: int
    order: Literal[1, 2] = 2

    own = ("norms",)

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        return {"norms": parameters.new_zeros(len(parameters), self.steps), **super().initial(parameters)}

    def take(self, step: Step) -> None:
        if step.number < self.steps:
            step.state["norms"][:, step.number] = step.gradient.norm(self.order, dim=1)
        super().take(step)


@dataclass(frozen=True)
class OwnSchedules(Wrapper):
    """An optimiser that gives each member a schedule of its own: learning rate times ``factors`` ``(members, steps)``.

    Many schedules train as one fleet; beyond the last step the last factor holds. Train with the default, constant
    ``schedule``. Raises ``ValueError`` for factors that are negative or not finite, or not one row for each member.
    """

    factors: Tensor = field(repr=False)

    own = ("factors",)

    def __post_init__(self) -> None:
        if self.factors.ndim != 2 or self.factors.shape[1] == 0:
            raise ValueError(f"factors: expected (members, steps), got shape {tuple(self.factors.shape)}")
        if not bool((self.factors.isfinite() & (self.factors >= 0)).all()):
            raise ValueError(f"factors: expected finite values of at least 0, got {self.factors.min().item()} and up")

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        if len(parameters) != len(self.factors):
            raise ValueError(f"factors: expected {len(parameters)} rows, one for each member, got {len(self.factors)}")
        return {"factors": self.factors.to(parameters).clone(), **super().initial(parameters)}

    def take(self, step: Step) -> None:
        factors = step.state["factors"]
        super().take(step._replace(rate=step.rate * factors[:, min(step.number, factors.shape[1] - 1), None]))


@typed
def refined_schedule(
    norms: Float[Tensor, "*batch steps"], order: Literal[1, 2] = 2, smooth: float = 0.1
) -> Float[Tensor, "*batch steps"]:
    """The schedule that gradient norms of an earlier run ask for, as factors with maximum 1.

    η_t ∝ w_t Σ_{p>t} w_p, with w = 1/G² of ℓ₂ norms (``order`` 2, SGD) or 1/G of ℓ₁ norms (``order`` 1, Adam). With
    constant norms it is linear decay; norms that fall early make a warm-up, norms that grow late a steeper end. The
    norms are first smoothed by a running median of 2·⌊smooth·T⌋ + 1 steps; the end is mirrored (last value included,
    a reading), the beginning repeats its first value. ``smooth=0`` takes them as they are. The norms' scale does
    not matter.

    Source: Defazio et al. 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement" (algorithm 1
    and its published code). Raises ``ValueError`` for fewer than 2 steps, norms that are not positive and finite, and
    ``smooth`` outside [0, ½).
    """
    steps = norms.shape[-1]
    if steps < 2:
        raise ValueError(f"norms: expected at least 2 steps, got {steps}")
    if not 0 <= smooth < 0.5:
        raise ValueError(f"smooth: expected a share in [0, 0.5), got {smooth}")
    require_positive("norms", norms)
    if readable(norms) and not bool(norms.isfinite().all()):
        raise ValueError("norms: expected finite values, got infinite ones")
    if reach := math.floor(smooth * steps):
        mirrored = norms.flip(-1)[..., :reach]
        padded = torch.cat([norms[..., :1].expand(*norms.shape[:-1], reach), norms, mirrored], -1)
        norms = padded.unfold(-1, 2 * reach + 1, 1).median(-1).values
    norms = norms / norms.amin(-1, keepdim=True)
    weights = norms.reciprocal() ** order
    later = F.pad(weights[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    factors = weights * later
    return factors / factors.amax(-1, keepdim=True)


@typed
def last_iterate_bound(
    factors: Float[Tensor, "*batch steps"],
    gradient: float | int | Float[Tensor, "*batch steps"] = 1.0,
    distance: float | int = 1.0,
    scaled: bool = True,
) -> Float[Tensor, "*batch"]:
    """Worst-case suboptimality of the last iterate of SGD on a convex function, for step sizes η = ``factors``.

    B(η) = D²/(2S₁) + Σ_t G_t²η_t²/(2S₁) + ½ Σ_{k<T} η_k/(S_{k+1}S_k) Σ_{t≥k} G_t²η_t²,  S_k = Σ_{t≥k} η_t

    with gradient norms G = ``gradient`` and D = ``distance`` from the start to the minimiser. ``scaled`` takes the
    multiple of η for which B is least, so that only the shape counts. Units: G·D, that is of the loss. Steps of size 0
    at the end do nothing and are left out. √T·B tends to 2 for linear decay at G = D = 1, while for a constant rate it
    grows like √log T.

    Source: Defazio et al. 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement". Raises
    ``ValueError`` for negative factors, factors that are all 0 and a distance that is not positive.
    """
    require_positive("distance", distance)
    if readable(factors) and not bool((factors >= 0).all() and (factors.sum(-1) > 0).all()):
        raise ValueError("factors: expected values of at least 0, not all 0")
    squares = (gradient * factors).square()
    tail, energy = (v.flip(-1).cumsum(-1).flip(-1) for v in (factors, squares))
    following = tail[..., 1:]
    safe = torch.where(following > 0, following * tail[..., :-1], 1)
    terms = torch.where(following > 0, factors[..., :-1] * energy[..., :-1] / safe, 0)
    start = distance**2 / (2 * tail[..., 0])
    noise = energy[..., 0] / (2 * tail[..., 0]) + terms.sum(-1) / 2
    return 2 * (start * noise).sqrt() if scaled else start + noise


def wsd(warm: float = 0.05, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: a linear rise over ``warm`` of the run, 1, a linear fall to ``final`` over ``decay``.

    Source: Hu et al. 2024, "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies". Raises ``ValueError`` unless the shares are in [0, 1] and leave each other room.
    """
    if not (warm >= 0 and decay >= 0 and warm + decay <= 1):
        raise ValueError(f"warm, decay: expected shares of at least 0 with a sum of at most 1, got {warm} and {decay}")
    return warmup(warm, stable_decay(min(1.0, decay / max(1 - warm, 1e-12)), final))


@typed
def power_rates(
    steps: int,
    batch: float | int,
    length: float | int,
    *,
    a: float = 4.6,
    b: float = -0.51,
    highest: float = 0.02,
    warm: float = 0.0,
    decay: float = 0.1,
    final: float = 0.1,
) -> Float[Tensor, "steps"]:
    """The power scheduler's learning rates, ``(steps,)`` in float64: min(highest, batch · a · T^b), then a decay.

    T = (t + 1) · ``batch`` · ``length`` counts the tokens seen by the end of step t; ``batch`` is in sequences of
    ``length`` tokens. Neither the number of steps nor that of tokens has to be known ahead: longer runs share their
    beginning. ``warm`` is the share of steps with a linear rise, ``decay`` that of an exponential fall by the factor
    ``final`` at the end (the published decay is 10 % of the run; its final value is this function's reading, as are
    the constants, which were fitted with muP).

    Source: Shen et al. 2024, "Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler". Raises
    ``ValueError`` for numbers that are not positive and for shares outside [0, 1].
    """
    for name, value in (("steps", steps), ("batch", batch), ("length", length), ("a", a), ("highest", highest)):
        require_positive(name, value)
    for name, value in (("warm", warm), ("decay", decay), ("warm + decay", warm + decay)):
        require_range(name, value, 0, 1)
    require_positive("final", final)
    step = torch.arange(steps, dtype=torch.float64)
    rates = (batch * a * ((step + 1) * batch * length) ** b).clamp_max(highest)
    first, last = round(warm * steps), round(decay * steps)
    if first:
        rates = torch.where(step < first, rates[min(first, steps - 1)] * (step + 1) / (first + 1), rates)
    if last:
        rates = rates * final ** ((step - (steps - 1 - last)) / last).clamp_min(0)
    return rates


class PowerFit(NamedTuple):
    """Best rate of every run ``(runs,)``, and the law batch · a · T^b through them."""

    best: Tensor
    a: Tensor
    b: Tensor


@typed
def fit_power_schedule(
    rates: Float[Tensor, "rates"],
    losses: Float[Tensor, "runs rates"],
    batch: Float[Tensor, "runs"],
    tokens: Float[Tensor, "runs"],
) -> PowerFit:
    """The constants of the power scheduler from grids of learning rates: one row of ``losses`` for each (batch, T).

    The best rate of a run is the vertex of the parabola in log rate through its lowest loss and the two beside it (the
    lowest itself where it is at the edge or the three are not convex). Then log(best / batch) = log a + b log T by
    least squares. Source: Shen et al. 2024, "Power Scheduler". Raises ``ValueError`` for fewer than 3 rates, values
    that are not positive, losses that are NaN, and a single number of tokens.
    """
    if len(rates) < 3:
        raise ValueError(f"rates: expected at least 3, got {len(rates)}")
    for name, value in (("rates", rates), ("batch", batch), ("tokens", tokens)):
        require_positive(name, value)
    if bool(losses.isnan().any()):
        raise ValueError("losses: expected numbers (infinity for a run that diverged), got NaN")
    if bool((tokens == tokens[:1]).all()):
        raise ValueError("tokens: expected at least two different numbers of tokens, got one")
    order = rates.argsort()
    x, y = rates[order].log(), losses[:, order]
    lowest = y.argmin(1)
    middle = lowest.clamp(1, len(rates) - 2)
    left, centre, right = (y.gather(1, (middle + i)[:, None])[:, 0] for i in (-1, 0, 1))
    before, after = x[middle] - x[middle - 1], x[middle + 1] - x[middle]
    down, up = (centre - left) / before, (right - centre) / after
    vertex = x[middle] - (down * after + up * before) / (2 * (up - down))
    usable = (middle == lowest) & (up > down) & vertex.isfinite()
    best = torch.where(usable, vertex, x[lowest])
    design = torch.stack([torch.ones_like(tokens), tokens.log()], 1)
    solution = torch.linalg.lstsq(design, (best - batch.log())[:, None]).solution[:, 0]
    return PowerFit(best.exp(), solution[0].exp(), solution[1])


def rewarm(warm: float = 0.01, low: float = 0.1) -> Schedule:
    """Re-warming for a second data set: linear from ``low`` to 1 over ``warm`` of the run, then a cosine to ``low``.

    ``low`` is the least rate over the highest, where the first training ended. Source: Ibrahim et al. 2024, "Simple and
    Scalable Strategies to Continually Pre-train Large Language Models". Raises ``ValueError`` outside [0, 1].
    """
    rising = warmup(warm, cosine(low))
    return lambda t: torch.where(t < warm, low + (1 - low) * rising(t), rising(t))


def infinite(
    warm: float = 0.05,
    cooled: float = 0.15,
    anneal: float = 0.8,
    *,
    plateau: float = 0.55,
    final: float = 0.1,
    cooldown: Literal["cosine", "linear", "inverse_sqrt"] = "inverse_sqrt",
    alpha: float = 10.0,
) -> Schedule:
    """A schedule without an end: warm-up, cool-down to a plateau, the plateau, and an anneal only when one wants it.

    Factor t/``warm``; then from 1 to ``plateau`` until ``cooled``; constant until ``anneal``; then geometric,
    plateau · (final/plateau)^{(t - anneal)/(1 - anneal)}. The inverse square root falls as 1 + (plateau - 1) h(x)/h(1),
    h(x) = (1 + alpha x)^-½ - 1. Training on new data resumes from the plateau, with no re-warming. ``anneal=1`` leaves
    the last phase out.

    Source: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models"; the
    default shares follow public code for its follow-up. Raises ``ValueError`` unless 0 ≤ warm ≤ cooled ≤ anneal ≤ 1
    and plateau and final are in (0, 1].
    """
    if not 0 <= warm <= cooled <= anneal <= 1:
        raise ValueError(
            f"warm, cooled, anneal: expected 0 ≤ warm ≤ cooled ≤ anneal ≤ 1, got {warm}, {cooled}, {anneal}"
        )
    for name, value in (("plateau", plateau), ("final", final)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a factor in (0, 1], got {value}")
    require_positive("alpha", alpha)
    if cooldown not in ("cosine", "linear", "inverse_sqrt"):
        raise ValueError(f"cooldown: expected 'cosine', 'linear' or 'inverse_sqrt', got {cooldown!r}")

    def factor(t: Tensor) -> Tensor:
        x = ((t - warm) / max(cooled - warm, 1e-12)).clamp(0, 1)
        if cooldown == "linear":
            share = x
        elif cooldown == "cosine":
            share = (1 - torch.cos(math.pi * x)) / 2
        else:
            share = ((1 + alpha * x).rsqrt() - 1) / ((1 + alpha) ** -0.5 - 1)
        end = ((t - anneal) / max(1 - anneal, 1e-12)).clamp(0, 1)
        value = (1 + (plateau - 1) * share) * (final / plateau) ** end
        return torch.where(t < warm, t / max(warm, 1e-12), value)

    return factor


@typed
def replay_mask(count: int, share: float | int) -> Bool[Tensor, "count"]:
    """Which of ``count`` sequences are replayed from the old data: evenly spread, exactly ⌊share·count + ½⌋ of them.

    Replay takes the place of new data, so that compute is the same for every share. Source: Ibrahim et al. 2024,
    "Simple and Scalable Strategies to Continually Pre-train Large Language Models". Raises ``ValueError`` for a
    negative count or a share outside [0, 1].
    """
    require_range("count", count, 0, math.inf)
    require_range("share", share, 0, 1)
    seen = (torch.arange(count + 1, dtype=torch.float64) * share + 0.5).floor()
    return seen.diff() > 0
