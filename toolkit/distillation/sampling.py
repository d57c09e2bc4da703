"""Few steps from noise to data: samplers of a teacher and of its students, and their distance from the truth.

Times, noise levels, fields and conditions are those of :mod:`toolkit.diffusion`. A *field* is any ε̂(x, t, condition).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.diffusion import (
    LAST,
    Mixture,
    alpha_sigma,
    ddim,
    epsilon_field,
    epsilon_to_denoised,
    guided,
    mmd,
    noised,
    probability_flow,
    sliced_wasserstein,
)
from toolkit.fleet import Fleet

__all__ = [
    "few_steps",
    "gaussian_flow",
    "jump",
    "mode_gap",
    "quality_by_steps",
    "quality_floor",
    "sample_quality",
    "teacher_samples",
]

Points = Float[Tensor, "*batch dim"]
Time = float | int | Float[Tensor, "..."]
Field = Callable[[Tensor, Any, Any], Tensor]
Measure = Literal["sliced_wasserstein", "mmd"]
_TRUTH, _SECOND, _START = 201, 202, 203  # what a key's numbers are for


@typed
def jump(x: Points, epsilon: Points, t: Time, s: Time) -> Points:
    """x_s = α_s x̂_0 + σ_s ε̂ with x̂_0 = (x - σ_t ε̂) / α_t: from time t < 1 to time s in one step of DDIM.

    For s = t it is x, for s = 0 the denoised point. t and s are one number or one per point. Source: Song, Meng & Ermon
    2021, "Denoising Diffusion Implicit Models".
    """
    return noised(epsilon_to_denoised(x, epsilon, t), epsilon, s)


@typed
def gaussian_flow(
    x: Points, t: Time, s: Time, mean: Float[Tensor, "dim"], deviation: float | int | Float[Tensor, ""]
) -> Points:
    """Where the probability flow of Gaussian data N(m, d² I) takes a point from time t to time s, in closed form.

    x_s = α_s m + (v_s / v_t)^½ (x - α_t m), v = α² d² + σ². With s = 0 it is the exact consistency map, which a student
    should learn: m + d (x - α m) / v^½. t and s are one number or one per point. Source of the equation: Song et al.
    2021, "Score-Based Generative Modeling through Stochastic Differential Equations". Raises ``ValueError`` for d ≤ 0.
    """
    require_positive("deviation", deviation)

    def levels(time: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha_sigma(torch.as_tensor(time, dtype=x.dtype, device=x.device)[..., None])
        return alpha * mean, ((alpha * deviation).square() + sigma.square()).sqrt()

    (centre, spread), (goal, wide) = levels(t), levels(s)
    return goal + wide / spread * (x - centre)


@typed
def teacher_samples(
    teacher: Any,
    start: Float[Tensor, "*members batch dim"],
    condition: Any = None,
    *,
    steps: int,
    method: Literal["ddim", "heun"] = "ddim",
    guidance: Any = 1.0,
) -> Float[Tensor, "... batch dim"]:
    """Samples of a teacher on its probability flow, in ``steps`` equal steps: one Euler step of DDIM each, or Heun's.

    ``teacher`` is a :class:`Mixture` (exact), a fleet of ``ScoreNet`` or a field. The error falls as steps⁻¹ (``ddim``,
    one evaluation a step) or as steps⁻² (``heun``, two). Shapes and errors are those of :func:`toolkit.diffusion.ddim`
    and :func:`toolkit.diffusion.probability_flow`.
    """
    model = teacher.epsilon if isinstance(teacher, Mixture) else teacher
    sampler = ddim if method == "ddim" else probability_flow
    return sampler(model, start, condition, steps=steps, guidance=guidance)


@torch.no_grad()
@typed
def few_steps(
    student: Any,
    start: Float[Tensor, "*members batch dim"],
    condition: Any = None,
    *,
    steps: int = 1,
    eta: float | int = 0.0,
    guidance: Any = 1.0,
    seed: int = 0,
) -> Float[Tensor, "... batch dim"]:
    """Samples of a consistency student: in each of ``steps`` steps from t to s, jump to (1 - η) s, then add noise to s.

    η = 0 is deterministic (DDIM with the student's field); η = 1 is multistep consistency sampling: to time 0 and back.
    The noise from time u to s is ε (σ_s² - (α_s / α_u)² σ_u²)^½, beside x α_s / α_u; it depends only on ``seed`` and is
    the same for all members. One evaluation a step. ``student`` is a fleet of ``ScoreNet``, a :class:`Mixture` or a
    field; shapes are those of :func:`toolkit.diffusion.ddim`. Sources: Song et al. 2023, "Consistency Models"; Wang et
    al. 2025, "Target-Driven Distillation" (η = 0.2). Raises ``ValueError`` for fewer than 1 step or η outside 0 to 1.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    require_range("eta", eta, 0, 1)
    field: Field = student.epsilon if isinstance(student, Mixture) else student
    field = guided(epsilon_field(student) if isinstance(student, Fleet) else field, guidance)
    x = start
    for i, (t, s) in enumerate(pairwise(torch.linspace(LAST, 0, steps + 1, dtype=torch.float64).tolist())):
        epsilon = field(x, t, condition)
        x = jump(x.expand_as(epsilon), epsilon, t, (1 - eta) * s)
        if eta > 0 and s > 0:
            noise = random.normal(random.key(seed, i, device=x.device), tuple(x.shape[-2:]), x.dtype)
            alpha, sigma = alpha_sigma(torch.tensor([s, (1 - eta) * s], dtype=x.dtype, device=x.device))
            ratio = alpha[0] / alpha[1]
            x = ratio * x + (sigma[0].square() - (ratio * sigma[1]).square()).clamp_min(0).sqrt() * noise
    return x


@typed
def sample_quality(
    samples: Float[Tensor, "members n dim"] | Float[Tensor, "n dim"],
    truth: Mixture,
    measure: Measure = "sliced_wasserstein",
    *,
    bandwidth: float = 0.5,
    condition: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "members"]:
    """Distance of each member's samples to as many points drawn from the true density, ``(members,)``.

    Sliced Wasserstein-2 in the points' units, or the unbiased MMD² with ``bandwidth`` (around 0 for a perfect sampler).
    All members are compared with the same points. Finite samples of the truth itself are not at distance 0: see
    :func:`quality_floor`. Raises ``ValueError`` for samples that are not finite.
    """
    if not bool(samples.isfinite().all()):
        raise ValueError("samples: expected finite points, got some that are not")
    rows = samples if samples.ndim == 3 else samples[None]
    real = truth.sample(rows.shape[1], condition=condition, seed=_seed(seed, _TRUTH))[0].to(rows)
    return torch.stack([_distance(row, real, measure, bandwidth) for row in rows])


@typed
def quality_floor(
    truth: Mixture,
    count: int,
    measure: Measure = "sliced_wasserstein",
    *,
    repeats: int = 16,
    bandwidth: float = 0.5,
    condition: int | None = None,
    seed: int = 0,
) -> Float[Tensor, "{repeats}"]:
    """What :func:`sample_quality` gives for ``count`` points of the truth itself, ``repeats`` times: the floor."""
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    seeds = [_seed(seed, _SECOND, i) for i in range(repeats)]
    drawn = torch.stack([truth.sample(count, condition=condition, seed=one)[0] for one in seeds])
    return sample_quality(drawn, truth, measure, bandwidth=bandwidth, condition=condition, seed=seed)


def quality_by_steps(
    draw: Callable[[Tensor, int], Tensor],
    truth: Mixture,
    steps: Sequence[int],
    *,
    count: int = 1000,
    measure: Measure = "sliced_wasserstein",
    bandwidth: float = 0.5,
    condition: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """:func:`sample_quality` against the number of steps, ``(len(steps), members)``.

    ``draw(start, steps)`` makes samples ``(members, count, dim)`` or ``(count, dim)`` from noise ``(count, dim)``,
    which is the same for all numbers of steps, as are the points of the truth. Raises ``ValueError`` without steps.
    """
    if not len(steps):
        raise ValueError("steps: expected at least one number of steps, got none")
    key = random.key(_seed(seed, _START), device=truth.means.device)
    start = random.normal(key, (count, truth.means.shape[1]), dtype)
    options: dict[str, Any] = {"bandwidth": bandwidth, "condition": condition, "seed": seed}
    return torch.stack([sample_quality(draw(start, number), truth, measure, **options) for number in steps])


@typed
def mode_gap(
    samples: Float[Tensor, "members n dim"] | Float[Tensor, "n dim"], truth: Mixture
) -> Float[Tensor, "members"]:
    """½ Σ_c |share of class c among the samples - its weight|, ``(members,)``: 0 if no class is missed or preferred.

    A sample counts for the classes by their posterior probability at that point. A sampler that drops classes of weight
    w in all and keeps the others in proportion has the gap w; 1 is the most.
    """
    rows = samples if samples.ndim == 3 else samples[None]
    shares = torch.stack([truth.posterior(row).mean(0) for row in rows])
    own = torch.nn.functional.one_hot(truth.classes.long(), truth.classes_count).to(shares)
    return (shares - truth.weights.to(shares) @ own).abs().sum(-1) / 2


def _seed(seed: int, *path: int) -> int:
    return int(random.key(seed, *path))


def _distance(x: Tensor, y: Tensor, measure: Measure, bandwidth: float) -> Tensor:
    return sliced_wasserstein(x, y) if measure == "sliced_wasserstein" else mmd(x, y, bandwidth)
