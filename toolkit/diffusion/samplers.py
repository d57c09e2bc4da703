"""From noise to data: guidance, DDIM and the probability-flow equation."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toolkit.checks import require_range
from toolkit.diffusion.nets import epsilon_field
from toolkit.diffusion.noising import LAST, NULL, Condition, Field, epsilon_to_denoised, levels, noised
from toolkit.fleet import Fleet


def guided(field: Field, weight: Any) -> Field:
    """Classifier-free guidance: ε̂(null) + w (ε̂(c) - ε̂(null)); w = 1 is the field itself, w = 0 has no condition.

    w is one number or one per member. Source: Ho & Salimans 2022 (whose weight is w - 1).
    """
    if not isinstance(weight, Tensor) and weight == 1:
        return field

    def steered(x: Tensor, t: Any, condition: Any = None) -> Tensor:
        free = field(x, t, NULL)
        w = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
        return free + (w[:, None, None] if w.ndim else w) * (field(x, t, condition) - free)

    return steered


def _prepare(model: Any, start: Tensor, steps: int, guidance: Any, since: float, until: float) -> tuple[Field, Tensor]:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    require_range("since", since, 0, 1 - 1e-6)
    require_range("until", until, 0, since)
    field = guided(epsilon_field(model) if isinstance(model, Fleet) else model, guidance)
    return field, torch.linspace(since, until, steps + 1, dtype=start.dtype, device=start.device)


@torch.no_grad()
def ddim(
    model: Fleet | Field,
    start: Tensor,
    condition: Condition = None,
    *,
    steps: int = 30,
    guidance: Any = 1.0,
    since: float = LAST,
    until: float = 0.0,
    path: bool = False,
) -> Tensor:
    """Deterministic sampling: x_s = α_s x̂_0(x_t) + σ_s ε̂(x_t), ``steps`` equal steps of t from ``since`` to ``until``.

    Args:
        model: a fleet of :class:`ScoreNet`, or a field.
        start: normal noise ``(batch, dim)``, for a fleet the same for all members, or ``(members, batch, dim)``.
        condition: one number, ``(batch,)`` or ``(members, batch)``.
        guidance: weight of :func:`guided`, one number or one per member.
        path: return the states at all steps, ``(steps + 1, ...)``, the start first.

    Returns points ``(members, batch, dim)`` for a fleet, of the shape of ``start`` for a field. Source: Song, Meng &
    Ermon 2021, "Denoising Diffusion Implicit Models" (η = 0). Raises ``ValueError`` unless 0 ≤ until ≤ since < 1.
    """
    field, times = _prepare(model, start, steps, guidance, since, until)
    states = [start]
    for t, s in pairwise(times):
        epsilon = field(states[-1], t, condition)
        now = states[-1].expand_as(epsilon)
        states = [*states, noised(epsilon_to_denoised(now, epsilon, t), epsilon, s)]
    states[0] = states[0].expand_as(states[-1])
    return torch.stack(states) if path else states[-1]


@torch.no_grad()
def probability_flow(
    model: Fleet | Field,
    start: Tensor,
    condition: Condition = None,
    *,
    steps: int = 30,
    guidance: Any = 1.0,
    since: float = LAST,
    until: float = 0.0,
) -> Tensor:
    """The probability-flow equation dx/dt = π/2 · v, v = (ε̂ - σ x) / α = α ε̂ - σ x̂_0, by Heun's rule.

    Two evaluations per step, error of order steps⁻² (:func:`ddim` has one, and order steps⁻¹). Arguments and result
    are those of :func:`ddim`. Sources: Song et al. 2021, "Score-Based Generative Modeling through Stochastic
    Differential Equations"; Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
    """
    field, times = _prepare(model, start, steps, guidance, since, until)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        epsilon, (alpha, sigma) = field(x, t, condition), levels(x, t)
        return (epsilon - sigma * x) / alpha * (math.pi / 2)

    x = start
    for t, s in pairwise(times):
        first = slope(x, t)
        x = x + (s - t) / 2 * (first + slope(x + (s - t) * first, s))
    return x
