"""What a scaling law says about a budget: the compute-optimal frontier, its inverse questions, the best split.

Compute is C = 6 N D FLOPs for N parameters and D tokens. Functions of tensors as in
:mod:`toolkit.scaling_laws.size_laws`: they broadcast and run under ``torch.vmap``, so a bootstrap over a law's
constants is one call. What cannot be reached is infinite.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import typed
from toolkit.scaling_laws.constants import (
    Bivariate,
    Chinchilla,
    KaplanSteps,
    as_like,
    require_all_positive,
    require_constants,
)
from toolkit.scaling_laws.size_laws import chinchilla
from toolkit.scaling_laws.step_laws import critical_batch

__all__ = [
    "Exponents",
    "Frontier",
    "KaplanFrontier",
    "bivariate_split",
    "budget_to_loss",
    "compute_optimal",
    "compute_optimal_numeric",
    "frontier_exponents",
    "isoflop",
    "kaplan_frontier",
    "steps_to_loss",
    "tokens_to_loss",
]

FLOPS = 6.0  # per parameter and token: 2 forward, 4 backward
_GRID, _ZOOMS = 65, 7

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


@typed
def frontier_exponents(law: Chinchilla) -> Exponents:
    """N ~ C^(β/(α+β)), D ~ C^(α/(α+β)), L - E ~ C^(-αβ/(α+β)).

    float64 where the law holds numbers. Raises ``ValueError`` for constants that are not positive. Source: Hoffmann et
    al. 2022, "Training Compute-Optimal Large Language Models".
    """
    require_constants(law)
    alpha, beta = as_like(law.alpha, torch.zeros((), dtype=torch.float64)), law.beta
    return Exponents(beta / (alpha + beta), alpha / (alpha + beta), alpha * beta / (alpha + beta))


@typed
def compute_optimal(budget: Float[Tensor, "*#shape"], law: Chinchilla) -> Frontier:
    """Least L(N, D) with 6 N D = C: N = G (C/6)^(β/(α+β)), D = G⁻¹ (C/6)^(α/(α+β)), G = (αA/βB)^(1/(α+β)).

    There αA/N^α = βB/D^β. Raises ``ValueError`` for what is not positive. Source: Hoffmann et al. 2022, "Training
    Compute-Optimal Large Language Models".
    """
    require_all_positive(budget=budget)
    require_constants(law)
    work, total = budget / FLOPS, law.alpha + law.beta
    shift = (law.alpha * law.size_scale / (law.beta * law.data_scale)) ** (1 / total)
    size = shift * work ** (law.beta / total)
    return Frontier(size, work / size, chinchilla(size, work / size, law))


@typed
def budget_to_loss(loss: Float[Tensor, "*#shape"], law: Chinchilla) -> Float[Tensor, "..."]:
    """The least C = 6 N D FLOPs with which a loss can be reached, the inverse of :func:`compute_optimal`'s loss.

    L - E = K (C/6)^(-αβ/(α+β)) with K = (1 + α/β) A G^-α. Infinite for L ≤ E. Raises ``ValueError`` for constants that
    are not positive. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models".
    """
    require_constants(law)
    total, excess = law.alpha + law.beta, loss - law.floor
    shift = (law.alpha * law.size_scale / (law.beta * law.data_scale)) ** (1 / total)
    scale = (1 + law.alpha / law.beta) * law.size_scale * shift**-law.alpha
    power = -total / (law.alpha * law.beta)
    return torch.where(excess > 0, FLOPS * (torch.where(excess > 0, excess, 1) / scale) ** power, math.inf)


@typed
def tokens_to_loss(
    loss: Float[Tensor, "*#shape"], n: Float[Tensor, "*#shape"], law: Chinchilla
) -> Float[Tensor, "..."]:
    """D = (B / (L - E - A/N^α))^(1/β) tokens with which N parameters reach a loss; infinite where they never do.

    Raises ``ValueError`` for what is not positive. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large
    Language Models".
    """
    require_all_positive(n=n)
    require_constants(law)
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
    require_all_positive(n=n, batch=batch)
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
    require_all_positive(budget=budget, n=n)
    data = budget[:, None] / (FLOPS * n)
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
    require_all_positive(budget=budget, low=low)
    if not low < high < math.inf:
        raise ValueError(f"high: expected a finite size above low = {low}, got {high}")
    steps = torch.linspace(0, 1, _GRID, dtype=budget.dtype, device=budget.device)
    start, width = torch.full_like(budget, math.log(low)), math.log(high / low)
    work = budget / FLOPS
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
    require_all_positive(budget=budget)
    require_constants(law)
    ratio = law.a_n / law.a_s

    def cost(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = law.n_c * ((1 + ratio) / loss) ** (1 / law.a_n)
        steps = law.s_c * (loss * (ratio / (1 + ratio))) ** (-1 / law.a_s)
        return size, steps, critical_batch(loss, law)

    logs = [torch.log(value) for value in cost(torch.ones_like(budget))]  # at a loss of 1
    exponent = 1 / (1 / law.a_n + 1 / law.a_s + 1 / law.a_b)
    loss = torch.exp(exponent * (math.log(FLOPS) + logs[0] + logs[1] + logs[2] - torch.log(budget)))
    return KaplanFrontier(*cost(loss), loss)


@typed
def bivariate_split(
    total: Float[Tensor, "*#shape"], law: Bivariate
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(N_e, N_d) of least :func:`bivariate` loss with N_e + N_d = ``total``: N_e = total · p_e/(p_e + p_d).

    The share is the same at every size, and the excess loss falls as total^-(p_e + p_d). Raises ``ValueError`` for
    what is not positive. Derived from the law of Ghorbani et al. 2021, "Scaling Laws for Neural Machine Translation".
    """
    require_all_positive(total=total)
    require_constants(law)
    return total * (law.p_e / (law.p_e + law.p_d)), total * (law.p_d / (law.p_e + law.p_d))
