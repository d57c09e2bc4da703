"""What a scaling law says about a budget: the compute-optimal frontier, its inverse questions, crossings, envelopes.

Compute is C = 6 N D FLOPs for N parameters and D tokens. Functions of tensors as in :mod:`toolkit.scaling_laws.laws`:
they broadcast and run under ``torch.vmap``, so a bootstrap over a law's constants is one call. What cannot be reached
is infinite, what does not exist is NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import readable, typed
from toolkit.scaling_laws.laws import (
    Bivariate,
    Chinchilla,
    KaplanSteps,
    PowerLaw,
    _constants,
    _Number,
    _positive,
    chinchilla,
    critical_batch,
)

__all__ = [
    "Crossover",
    "Envelope",
    "Exponents",
    "Frontier",
    "KaplanFrontier",
    "bivariate_split",
    "budget_to_loss",
    "compute_optimal",
    "compute_optimal_numeric",
    "crossover",
    "frontier_exponents",
    "isoflop",
    "kaplan_frontier",
    "lower_envelope",
    "one_epoch",
    "speed_up",
    "steps_to_loss",
    "tokens_to_loss",
]

_FLOPS = 6.0  # per parameter and token: 2 forward, 4 backward
_GRID, _ZOOMS = 65, 7
_HALVINGS = 80
_ROWS = 128  # points whose slopes to all others are in memory at a time

Loss = Callable[[Tensor, Tensor], Tensor]


class Exponents(NamedTuple):
    """N ~ C^``size``, D ~ C^``data``, L - E ~ C^-``loss`` along the frontier."""

    size: Tensor
    data: Tensor
    loss: Tensor


class Frontier(NamedTuple):
    """The best ``size`` (parameters), ``data`` (tokens) and ``loss`` for each budget."""

    size: Tensor
    data: Tensor
    loss: Tensor


class KaplanFrontier(NamedTuple):
    """Best ``size`` (parameters), least ``steps``, critical ``batch`` (tokens) and ``loss`` for each budget."""

    size: Tensor
    steps: Tensor
    batch: Tensor
    loss: Tensor


class Envelope(NamedTuple):
    """Where the curves touch their common lower hull, and the laws of the touching points.

    ``touching`` (curves, points) marks them, ``compute`` and ``loss`` (curves,) are their means on each curve (of
    log C and L), NaN on a curve without any; N_opt ~ C^``size_exponent``, L - floor ~ C^-``loss_exponent``.
    """

    touching: Tensor
    compute: Tensor
    loss: Tensor
    size_exponent: Tensor
    loss_exponent: Tensor


class Crossover(NamedTuple):
    """Up to two crossings ``at`` (..., 2), in ascending order, NaN where there is none, and the loss there."""

    at: Tensor
    loss: Tensor


def _like(value: _Number, like: Tensor) -> Tensor:
    """As a tensor of the same dtype and device."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=like.dtype, device=like.device)


@typed
def frontier_exponents(law: Chinchilla) -> Exponents:
    """N ~ C^(β/(α+β)), D ~ C^(α/(α+β)), L - E ~ C^(-αβ/(α+β)).

    float64 where the law holds numbers. Raises ``ValueError`` for constants that are not positive. Source: Hoffmann et
    al. 2022, "Training Compute-Optimal Large Language Models".
    """
    _constants(law)
    alpha, beta = _like(law.alpha, torch.zeros((), dtype=torch.float64)), law.beta
    return Exponents(beta / (alpha + beta), alpha / (alpha + beta), alpha * beta / (alpha + beta))


@typed
def compute_optimal(budget: Float[Tensor, "*#shape"], law: Chinchilla) -> Frontier:
    """Least L(N, D) with 6 N D = C: N = G (C/6)^(β/(α+β)), D = G⁻¹ (C/6)^(α/(α+β)), G = (αA/βB)^(1/(α+β)).

    There αA/N^α = βB/D^β. Raises ``ValueError`` for what is not positive. Source: Hoffmann et al. 2022, "Training
    Compute-Optimal Large Language Models".
    """
    _positive(budget=budget)
    _constants(law)
    work, total = budget / _FLOPS, law.alpha + law.beta
    shift = (law.alpha * law.size_scale / (law.beta * law.data_scale)) ** (1 / total)
    size = shift * work ** (law.beta / total)
    return Frontier(size, work / size, chinchilla(size, work / size, law))


@typed
def budget_to_loss(loss: Float[Tensor, "*#shape"], law: Chinchilla) -> Float[Tensor, "..."]:
    """The least C = 6 N D FLOPs with which a loss can be reached, the inverse of :func:`compute_optimal`'s loss.

    L - E = K (C/6)^(-αβ/(α+β)) with K = (1 + α/β) A G^-α. Infinite for L ≤ E. Raises ``ValueError`` for constants that
    are not positive. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models".
    """
    _constants(law)
    total, excess = law.alpha + law.beta, loss - law.floor
    shift = (law.alpha * law.size_scale / (law.beta * law.data_scale)) ** (1 / total)
    scale = (1 + law.alpha / law.beta) * law.size_scale * shift**-law.alpha
    power = -total / (law.alpha * law.beta)
    return torch.where(excess > 0, _FLOPS * (torch.where(excess > 0, excess, 1) / scale) ** power, math.inf)


@typed
def tokens_to_loss(
    loss: Float[Tensor, "*#shape"], n: Float[Tensor, "*#shape"], law: Chinchilla
) -> Float[Tensor, "..."]:
    """D = (B / (L - E - A/N^α))^(1/β) tokens with which N parameters reach a loss; infinite where they never do.

    Raises ``ValueError`` for what is not positive. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large
    Language Models".
    """
    _positive(n=n)
    _constants(law)
    excess = loss - law.floor - law.size_scale * n**-law.alpha
    tokens = (law.data_scale / torch.where(excess > 0, excess, 1)) ** (1 / law.beta)
    return torch.where(excess > 0, tokens, math.inf)


@typed
def steps_to_loss(
    loss: Float[Tensor, "*#shape"], n: Float[Tensor, "*#shape"], batch: Float[Tensor, "*#shape"], law: KaplanSteps
) -> Float[Tensor, "..."]:
    """S = S_c (L - (N_c/N)^a_N)^(-1/a_S) · (1 + B_crit(L)/B) steps to reach a loss; BS is then the number of tokens.

    Infinite for a loss that N parameters cannot reach. Raises ``ValueError`` for what is not positive. Source: Su et
    al. 2024, "Unraveling the Mystery of Scaling Laws" (constants of the paper not confirmed; the forms are Kaplan's).
    """
    _positive(n=n, batch=batch)
    excess = loss - (law.n_c / n) ** law.a_n
    ratio = 1 + critical_batch(loss, law) / batch
    least = law.s_c * torch.where(excess > 0, excess, 1) ** (-1 / law.a_s)
    return torch.where(excess > 0, least * ratio, math.inf)


@typed
def isoflop(budget: Float[Tensor, "budgets"], n: Float[Tensor, "sizes"], loss: Loss) -> Float[Tensor, "budgets sizes"]:
    """loss(N, D = C/(6N)) for each budget and size: the valleys whose bottoms are the frontier.

    ``loss`` is any law of two tensors (N, D). Raises ``ValueError`` for what is not positive. Source: Hoffmann et al.
    2022, "Training Compute-Optimal Large Language Models" (approach 2).
    """
    _positive(budget=budget, n=n)
    data = budget[:, None] / (_FLOPS * n)
    return loss(n.expand_as(data), data)


@typed
def compute_optimal_numeric(
    budget: Float[Tensor, "*shape"], loss: Loss, low: float = 1.0, high: float = 1e15
) -> Frontier:
    """The N in [low, high] of least loss(N, D = C/(6N)), for any law of two tensors that has a single valley.

    A grid in log N, then finer ones around its best point: exact to about the square root of the precision in N (flat
    there), and fully in the loss. ``loss`` must be elementwise; it is given (..., grid). Raises ``ValueError`` for a
    budget that is not positive or an empty range.
    """
    _positive(budget=budget, low=low)
    if not low < high < math.inf:
        raise ValueError(f"high: expected a finite size above low = {low}, got {high}")
    steps = torch.linspace(0, 1, _GRID, dtype=budget.dtype, device=budget.device)
    start, width = torch.full_like(budget, math.log(low)), math.log(high / low)
    work = budget / _FLOPS
    best = start
    for _ in range(_ZOOMS):
        grid = start[..., None] + width * steps
        size = grid.exp()
        best = grid.gather(-1, loss(size, work[..., None] / size).argmin(-1, keepdim=True))[..., 0]
        width = width * 4 / (_GRID - 1)
        start = (best - width / 2).clamp(math.log(low), math.log(high) - width)
    size = best.exp()
    return Frontier(size, work / size, loss(size, work / size))


@typed
def kaplan_frontier(budget: Float[Tensor, "*#shape"], law: KaplanSteps) -> KaplanFrontier:
    """The best use of C = 6 N B_crit S_min FLOPs, the least compute, under L(N, S_min) and B_crit(L).

    At a fixed loss N S_min is least where L = (1 + a_N/a_S)(N_c/N)^a_N; then everything is a power of C:
    L ~ C^-a_C, N ~ C^(a_C/a_N), B ~ C^(a_C/a_B), S ~ C^(a_C/a_S) with 1/a_C = 1/a_N + 1/a_S + 1/a_B. A run at
    B = B_crit takes twice the steps, and twice this compute. Raises ``ValueError`` for what is not positive. Sources:
    Kaplan et al. 2020, "Scaling Laws for Neural Language Models"; Su et al. 2024, "Unraveling the Mystery of Scaling
    Laws".
    """
    _positive(budget=budget)
    _constants(law)
    ratio = law.a_n / law.a_s

    def cost(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = law.n_c * ((1 + ratio) / loss) ** (1 / law.a_n)
        steps = law.s_c * (loss * (ratio / (1 + ratio))) ** (-1 / law.a_s)
        return size, steps, critical_batch(loss, law)

    logs = [torch.log(value) for value in cost(torch.ones_like(budget))]  # at a loss of 1
    exponent = 1 / (1 / law.a_n + 1 / law.a_s + 1 / law.a_b)
    loss = torch.exp(exponent * (math.log(_FLOPS) + logs[0] + logs[1] + logs[2] - torch.log(budget)))
    return KaplanFrontier(*cost(loss), loss)


@typed
def crossover(first: PowerLaw, second: PowerLaw, low: float, high: float) -> Crossover:
    """The x in [low, high] at which two power laws meet: x* = (A_1/A_2)^(1/(a_1 - a_2)) for a shared floor, else roots.

    The difference E_1 - E_2 + A_1 x^-a_1 - A_2 x^-a_2 has one extremum, at (a_1 A_1/(a_2 A_2))^(1/(a_1 - a_2)): at most
    one root lies on each side of it, found by bisection in log x. Constants may be tensors that broadcast (one law per
    bootstrap resample, say): the share of NaN is the share without a crossing. Raises ``ValueError`` for an empty range
    and for scales or exponents that are not positive. Which recipes cross is the question of "Rethinking Conventional
    Wisdom in Machine Learning: From Generalization to Scaling" (Xiao 2024); fits and their crossing are a reading.
    """
    _positive(low=low)
    if not low < high < math.inf:
        raise ValueError(f"high: expected a finite number above low = {low}, got {high}")
    _constants(first)
    _constants(second)
    like = next(
        (value for value in (*first, *second) if isinstance(value, Tensor)), torch.zeros((), dtype=torch.double)
    )
    values = torch.broadcast_tensors(*(_like(value, like) for value in (*first, *second)))
    e_1, a_1, p_1, e_2, a_2, p_2 = (value[..., None] for value in values)

    def difference(u: Tensor) -> Tensor:
        return e_1 - e_2 + a_1 * torch.exp(-p_1 * u) - a_2 * torch.exp(-p_2 * u)

    bottom, top = math.log(low), math.log(high)
    turn = torch.log(p_1 * a_1 / (p_2 * a_2)) / (p_1 - p_2)
    turn = torch.where(p_1 == p_2, top, turn).clamp(bottom, top)
    left = torch.cat([torch.full_like(turn, bottom), turn], -1)
    right = torch.cat([turn, torch.full_like(turn, top)], -1)
    rising = difference(right) > difference(left)
    exists = (difference(right) > 0) != (difference(left) > 0)
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        before = (difference(middle) > 0) != rising
        left, right = torch.where(before, middle, left), torch.where(before, right, middle)
    shared = torch.log(a_1 / a_2) / torch.where(p_1 == p_2, math.nan, p_1 - p_2)
    inside = (shared >= bottom) & (shared <= top)
    shared = torch.cat([torch.where(inside, shared, math.nan), torch.full_like(shared, math.nan)], -1)
    u = torch.where(e_1 == e_2, shared, torch.where(exists, (left + right) / 2, math.nan))
    u = torch.where(u[..., :1].isnan(), u.flip(-1), u)  # a single crossing comes first
    return Crossover(u.exp(), e_1 + a_1 * torch.exp(-p_1 * u))


def _slope(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Least squares over the points of weight 1; the others may be NaN."""
    x, y = torch.where(weight, x, 0), torch.where(weight, y, 0)
    centre = torch.where(weight, x - x.sum() / weight.sum(), 0)
    return (centre * y).sum() / centre.square().sum()


def _on_lower_hull(x: Tensor, y: Tensor) -> Tensor:
    """Whether each point is on the lower convex hull: no slope from its left exceeds one to its right."""
    on = []
    for x_i, y_i in zip(x[:, None].split(_ROWS), y[:, None].split(_ROWS), strict=True):
        run = x - x_i
        slope = (y - y_i) / torch.where(run == 0, 1, run)
        before = torch.where(run < 0, slope, -math.inf).amax(1)
        after = torch.where(run > 0, slope, math.inf).amin(1)
        on.append((before <= after) & ((run != 0) | (y >= y_i)).all(1))
    return torch.cat(on)


@typed
def lower_envelope(
    compute: Float[Tensor, "curves points"],
    loss: Float[Tensor, "curves points"],
    sizes: Float[Tensor, "curves"],
    floor: _Number = 0.0,
) -> Envelope:
    """The lower convex hull of many learning curves in (log C, L), and N_opt(C) through the points on it.

    One row per size: its compute (FLOPs, ascending) and loss along a run. The hull does not depend on
    the floor. The first and the last point of each run, and all of the
    smallest and of the largest size, touch for want of neighbours and do not count. Least squares through the touching
    points' means give the exponents; ``floor`` is subtracted from the loss for ``loss_exponent`` alone. The work is
    (curves · points)². Raises ``ValueError`` for fewer than 4 sizes or 3 points, for what is not positive or finite,
    and for fewer than 2 sizes that touch. Source: Henighan et al. 2020, "Scaling Laws for Autoregressive Generative
    Modeling" (N_opt ~ C^0.7 there; the hull is a reading).
    """
    if len(sizes) < 4 or compute.shape[1] < 3:
        raise ValueError(f"compute: expected at least 4 sizes of 3 points, got {tuple(compute.shape)}")
    _positive(compute=compute, loss=loss, sizes=sizes)
    x = compute.log()
    if readable(x + loss) and not bool((x + loss).isfinite().all()):
        raise ValueError("loss: expected finite losses and compute, got an infinite one")
    touching = _on_lower_hull(x.reshape(-1), loss.reshape(-1)).reshape(x.shape)
    middle = (sizes > sizes.min()) & (sizes < sizes.max())
    place = torch.arange(x.shape[1], device=x.device)
    touching = touching & middle[:, None] & (place > 0) & (place < x.shape[1] - 1)
    count = touching.sum(1)
    if readable(count) and (count > 0).sum() < 2:
        raise ValueError(f"loss: expected at least 2 sizes that touch the hull, got {int((count > 0).sum())}")
    log_compute = torch.where(touching, x, 0).sum(1) / count  # NaN where nothing touches
    least = torch.where(touching, loss, 0).sum(1) / count
    excess = (least - floor).log()
    return Envelope(
        touching,
        log_compute.exp(),
        least,
        _slope(log_compute, sizes.log(), count > 0),
        -_slope(log_compute, excess, count > 0),
    )


@typed
def bivariate_split(
    total: Float[Tensor, "*#shape"], law: Bivariate
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(N_e, N_d) of least :func:`bivariate` loss with N_e + N_d = ``total``: N_e = total · p_e/(p_e + p_d).

    The share is the same at every size, and the excess loss falls as total^-(p_e + p_d). Raises ``ValueError`` for
    what is not positive. Derived from the law of Ghorbani et al. 2021, "Scaling Laws for Neural Machine Translation".
    """
    _positive(total=total)
    _constants(law)
    return total * (law.p_e / (law.p_e + law.p_d)), total * (law.p_d / (law.p_e + law.p_d))


@typed
def one_epoch(
    parameters: Float[Tensor, "*#shape"], tokens: Float[Tensor, "*#shape"], ratio: _Number = 5.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(P', T') = (√(PT/r), √(rPT)): the model and data of a single epoch for the compute PT, r = ``ratio`` tokens each.

    The rule of about 5 tokens processed per parameter; it is optimal at every budget only if the loss falls with the
    same exponent in both (T/P = (B/A)^(1/α) for :func:`chinchilla` with α = β). Raises ``ValueError`` for what is not
    positive. Source: Komatsuzaki 2019, "One Epoch Is All You Need" (the rule is a reading).
    """
    _positive(parameters=parameters, tokens=tokens, ratio=ratio)
    work = parameters * tokens
    return (work / ratio) ** 0.5, (work * ratio) ** 0.5


@typed
def speed_up(
    cost: Float[Tensor, "points"],
    loss: Float[Tensor, "points"],
    new_cost: Float[Tensor, "new_points"],
    new_loss: Float[Tensor, "new_points"],
) -> Float[Tensor, ""]:
    """Cost at which the baseline first has its own least test loss, over the cost at which the new run reaches it.

    Costs ascend; the new curve's running least is interpolated in logarithms of both. NaN if the new run never gets
    there; its first cost if it begins there. Raises ``ValueError`` for what is not positive. Source: Komatsuzaki 2019,
    "One Epoch Is All You Need".
    """
    _positive(cost=cost, loss=loss, new_cost=new_cost, new_loss=new_loss)
    for name, values in (("cost", cost), ("new_cost", new_cost)):
        if readable(values) and not bool((values[1:] > values[:-1]).all()):
            raise ValueError(f"{name}: expected ascending costs, got a step down or a repeat")
    target, own = loss.min(), cost.gather(0, loss.argmin(keepdim=True))[0]
    best, places = new_loss.cummin(0).values.log(), new_cost.log()
    reached = best <= target.log()
    after = reached.int().argmax(keepdim=True)
    before = (after - 1).clamp(min=0)
    top, bottom, right, left = (
        v.gather(0, i)[0] for v, i in ((best, before), (best, after), (places, after), (places, before))
    )
    share = ((top - target.log()) / torch.where(top > bottom, top - bottom, 1)).clamp(0, 1)
    return torch.where(reached.any(), own / torch.exp(left + share * (right - left)), math.nan)
