"""Consistency distillation: a student that goes from any noisy point to the end of its path in one step.

The student is a :class:`~toolkit.diffusion.ScoreNet`; its map to time s is the DDIM jump with its ε̂, which for s = 0 is
f(x, t) = α x - σ net(x, t): f(x, 0) = x holds by form, with c_skip = α and c_out = -σ. So a student is sampled by
:func:`~toolkit.distillation.sampling.few_steps`, may start from its teacher, and its class rows take conditions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.diffusion import LAST, NULL, Mixture, ScoreNet, alpha_sigma, guided, noised
from toolkit.distillation.sampling import Field, jump
from toolkit.fleet import Fleet, train
from toolkit.fleet.members import Build, fresh

__all__ = [
    "consistency_loss",
    "distil_consistency",
    "heun_step",
    "pseudo_huber",
    "retuned",
    "target_mask",
]

Loss = Callable[[Any, Any, Any], Tensor]
Points = Float[Tensor, "*batch dim"]
Time = float | int | Float[Tensor, "..."]


@typed
def pseudo_huber(
    found: Float[Tensor, "*batch dim"], wanted: Float[Tensor, "*batch dim"], c: float = 1e-3
) -> Float[Tensor, "*batch"]:
    """(|found - wanted|² + c²)^½ - c for each point: the distance if it is large, its square / 2c if it is small.

    Source: Song & Dhariwal 2024, "Improved Techniques for Training Consistency Models". Raises
    ``ValueError`` for c ≤ 0.
    """
    require_positive("c", c)
    return ((found - wanted).square().sum(-1) + c * c).sqrt() - c


@typed
def heun_step(field: Any, x: Points, t: Time, s: Time, condition: Any = None) -> Points:
    """One step of Heun's rule on the probability flow of ``field`` from t to s, which are one number or one per point.

    dx/dt = π/2 · (ε̂ - σ x) / α; the error of one step is of order (t - s)³. Source: Karras et al. 2022, "Elucidating
    the Design Space of Diffusion-Based Generative Models".
    """
    t, s = (torch.as_tensor(time, dtype=x.dtype, device=x.device) for time in (t, s))

    def slope(point: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(time[..., None])
        return (field(point, time, condition) - sigma * point) / alpha * (torch.pi / 2)

    step, first = (s - t)[..., None], slope(x, t)
    return x + step / 2 * (first + slope(x + step * first, s))


@typed
def target_mask(
    intervals: int, targets: Sequence[int] = (), window: float = 0.26
) -> Bool[Tensor, "{intervals} {intervals}"]:
    """Which times a student at time n of ``intervals`` may be sent to: row n - 1, column s < n.

    Without ``targets`` only s = 0: consistency distillation. With them s is in the union of the equidistant schedules
    of so many steps, round(j · intervals / k) for k in ``targets``, not further than ``window`` · intervals below n; a
    row without any has the next one below n. Source: Wang et al. 2025, "Target-Driven Distillation: Consistency
    Distillation with Target Timestep Selection and Decoupled Guidance" (50 intervals, targets 4 to 8, window 0.26).
    Raises ``ValueError`` for fewer than 1 interval, targets outside 1 to ``intervals`` or a window outside 0 to 1.
    """
    require_positive("intervals", intervals)
    require_range("window", window, 0, 1)
    for k in targets:
        require_range("targets", k, 1, intervals)
    times = sorted({round(j * intervals / k) for k in targets for j in range(k)} | {0})
    mask = torch.zeros(intervals, intervals, dtype=torch.bool)
    for n in range(1, intervals + 1):
        below = [s for s in times if s < n] if targets else [0]
        near = [s for s in below if n - s <= window * intervals + 1e-9] if targets else below
        mask[n - 1, near or below[-1:]] = True
    return mask


@typed
def consistency_loss(
    teacher: Mixture | None = None,
    *,
    intervals: int = 50,
    targets: Sequence[int] = (),
    window: float = 0.26,
    eta: float = 0.3,
    c: float = 1e-3,
) -> Loss:
    """The loss of a consistency student for :func:`toolkit.fleet.train`, per example ``(batch,)``.

    Times are LAST · n / intervals with n uniform in 1 .. intervals. x_n is data with noise, x̂ the teacher's point one
    interval earlier on the same path (one :func:`heun_step`), and
    pseudo_huber(f(x_n, n → s), stop-gradient of f'(x̂, n - 1 → s)), where f jumps with the student's ε̂. The time s is
    drawn from the row of :func:`target_mask` and, with targets, multiplied by 1 - η U, U uniform (our reading; the
    public code rounds the product down to one of 1000 times). At n - 1 = s the second f is x̂ itself: what is known at
    the end of a path spreads to its beginning.

    Fields: ``x`` ``(batch, dim)`` and classes ``y``. The teacher is the exact mixture, or else the reference
    ``teacher``, a fleet of ``ScoreNet``; f' is the reference ``target`` where there is one (an average of the
    student), else the student itself. ``hyper.guidance`` is the teacher's weight of :func:`toolkit.diffusion.guided`
    (none: 1), ``hyper.drop`` the share of examples without condition (none: 0.25), for which guidance has no effect.
    Sources: Song et al. 2023, "Consistency Models"; Wang et al. 2025, "Target-Driven Distillation". Raises
    ``ValueError`` for η outside 0 to 1 or c ≤ 0, and as :func:`target_mask`.
    """
    require_range("eta", eta, 0, 1)
    require_positive("c", c)
    mask, shrink = target_mask(intervals, targets, window), eta if targets else 0.0

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        x, count, allowed = batch.x, len(batch.x), mask.to(batch.x.device)
        noise = random.normal(random.fold_in(batch.key, 0), tuple(x.shape), x.dtype)
        moment, choice, share, chance = random.uniform(random.fold_in(batch.key, 1), (4, count), x.dtype)
        condition = torch.where(chance < hyper.get("drop", 0.25), NULL, batch.y)
        n = (moment * intervals).long().clamp_max(intervals - 1) + 1
        row = allowed[n - 1]
        chosen = (row.cumsum(-1) <= (choice * row.sum(-1))[:, None].floor()).sum(-1)
        t, before, s = (LAST / intervals * index.to(x.dtype) for index in (n, n - 1, chosen))
        s = s * (1 - shrink * share)
        start = noised(x, noise, t)
        with torch.no_grad():
            field = field_of(teacher, batch)
            field = guided(field, hyper.guidance) if "guidance" in hyper else field
            moved = heun_step(field, start, t, before, condition)
            aim = batch.get("target", model)
            wanted = jump(moved, aim(moved, t=before, condition=condition), before, s)
        return pseudo_huber(jump(start, model(start, t=t, condition=condition), t, s), wanted, c)

    return loss


@typed
def distil_consistency(
    teacher: Mixture | Fleet,
    data: Any,
    build: Build,
    *,
    steps: int = 600,
    ema: float | None = None,
    every: int = 5,
    intervals: int = 50,
    targets: Sequence[int] = (),
    window: float = 0.26,
    eta: float = 0.3,
    c: float = 1e-3,
    **options: Any,
) -> Fleet:
    """A fleet of students (``build`` makes a ``ScoreNet``), trained with :func:`consistency_loss`.

    ``data`` has fields ``x`` and ``y``; a teacher that is a fleet has one member for each student. ``options`` go to
    :func:`toolkit.fleet.train` (``members``, ``hyper``, ``start=teacher``, ``optimiser``, ...). Without ``ema`` the
    target is the student itself behind a stop-gradient; with it, the average θ' ← μ θ' + (1 - μ) θ, where μ = ema per
    step. The average moves each ``every`` steps, by as much as so many steps give a student that stands still.
    Members differ in their seeds, so a fleet shows the spread of the method.

    Raises ``ValueError`` for ``ema`` outside 0 to 1, fewer than 1 step or ``every`` below 1, and for options that this
    function sets itself. Source: Song et al. 2023, "Consistency Models" (consistency distillation).
    """
    require_positive("steps", steps)
    require_positive("every", every)
    if taken := sorted({"references", "resume", "until", "epochs"} & set(options)):
        raise ValueError(f"{taken[0]}: expected none, distil_consistency sets it, got one")
    if not isinstance(fresh(build), ScoreNet):
        raise ValueError(f"build: expected a ScoreNet, got {type(fresh(build)).__name__}")
    exact = teacher if isinstance(teacher, Mixture) else None
    loss = consistency_loss(exact, intervals=intervals, targets=targets, window=window, eta=eta, c=c)
    references = {} if isinstance(teacher, Mixture) else {"teacher": teacher}
    options = {"batch": 128, "progress": False, **options}
    if ema is None:
        return train(build, loss, data, steps=steps, references=references, **options)
    require_range("ema", ema, 0, 1)
    fleet = train(build, loss, data, steps=steps, until=0, references=references, **options)
    options.pop("start", None)
    average = fleet.parameters.clone()
    for done in range(0, steps, every):
        aims = references | {"target": Fleet(build, average)}
        until = min(done + every, steps)
        fleet = train(build, loss, data, steps=steps, until=until, references=aims, resume=fleet, **options)
        keep = ema ** (until - done)
        average = keep * average + (1 - keep) * fleet.parameters
    return fleet


@typed
def retuned(field: Any, trained: float, wanted: float) -> Field:
    """A student's field with other guidance: distilled from a teacher of weight ``trained``, now as of ``wanted``.

    The student has learned ε̂(null) + w' (ε̂(c) - ε̂(null)) for a condition and ε̂(null) without one, so guiding it
    with w / w' gives the weight w; w = 1 takes the guidance out. Exact for a student that is exact at one step's
    distance. ``field`` is that of :func:`toolkit.diffusion.epsilon_field`. Source: Wang et al. 2025, "Target-Driven
    Distillation" (decoupled guidance). Raises ``ValueError`` for ``trained`` ≤ 0.
    """
    require_positive("trained", trained)
    return guided(field, wanted / trained)


def field_of(teacher: Mixture | None, batch: Any) -> Field:
    """The teacher's field inside a loss: the mixture's, or that of the reference ``teacher``."""
    if teacher is not None:
        return teacher.epsilon

    def field(x: Tensor, t: Any, condition: Any = None) -> Tensor:
        return batch.teacher(x, t=t, condition=condition)

    return field
