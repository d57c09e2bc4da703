"""One-step generators: a net that maps noise to data at once, taught by a teacher's score and by no data.

A :class:`OneStep` holds a generator and the score net of its own samples (the *fake* score), trained together. The
teacher is an exact :class:`~toolkit.diffusion.Mixture` or a fleet of ``ScoreNet`` with one member for each student.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.diffusion import LAST, Mixture, ScoreNet, alpha_sigma, noised
from toolkit.distillation.consistency import field_of
from toolkit.fleet import Fleet, train
from toolkit.fleet.members import Build, fresh

__all__ = [
    "OneStep",
    "backtrack",
    "degradation_path",
    "distil_one_step",
    "em_distillation_loss",
    "one_step_samples",
    "score_distillation_loss",
]

Loss = Callable[[Any, Any, Any], Tensor]
_LATENT = 211  # what a key's numbers are for


class OneStep(nn.Module):
    """Generator x = g(z), z standard normal of the data's dimension, and the fake score net, in one module.

    ``model(z)`` gives samples ``(batch, dim)``; ``model(x, t=t)`` the fake score net's ε̂ ``(batch, dim)``; with
    ``jacobian=True`` there is ``(samples, J)``, J = ∂x/∂z ``(batch, dim, dim)``: a loss is run where ``torch.func.vjp``
    is not allowed.

    Args:
        score: a new score net; for a teacher that is a fleet, of the teacher's architecture.
        hidden: widths of the generator's hidden layers.
    """

    def __init__(self, score: ScoreNet, hidden: Sequence[int] = (64, 64)):
        super().__init__()
        require_positive("hidden", len(hidden))
        self.dim, self.score = score.dim, score
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([score.dim, *hidden, score.dim]))

    def forward(self, x: Tensor, t: Any = None, jacobian: bool = False) -> Any:
        if t is not None:
            return self.score(x, t)
        layers: list[Any] = list(self.layers)
        slopes = torch.eye(self.dim, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)  # (batch, z, hidden)
        for layer in layers[:-1]:
            x = layer(x)
            gate = x.sigmoid()
            if jacobian:
                slopes = (slopes @ layer.weight.mT) * (gate * (1 + x * (1 - gate)))[:, None]
            x = x * gate
        x = layers[-1](x)
        return (x, (slopes @ layers[-1].weight.mT).mT) if jacobian else x


@typed
def one_step_samples(fleet: Fleet, count: int, seed: int = 0) -> Float[Tensor, "members {count} dim"]:
    """``count`` samples of each generator, one evaluation each; they depend on ``seed`` and the member's stream."""
    require_positive("count", count)
    module, dtype = _checked(fleet), fleet.parameters.dtype

    def made(model: Any, batch: Any, hyper: Any) -> Tensor:
        return model(random.normal(random.fold_in(batch.key, _LATENT), (count, module.dim), dtype))

    return fleet.evaluate(made, {}, seed=seed)


@typed
def score_distillation_loss(teacher: Mixture | None = None, *, earliest: float = 0.02) -> Loss:
    """Score distillation, the baseline: loss of a :class:`OneStep` for :func:`toolkit.fleet.train`, ``(batch,)``.

    x = g(z), y = α x + σ ε, t uniform in (``earliest``, LAST). The generator's gradient on x is
    σ² (∇ log p_fake,t(y) - ∇ log p_teacher,t(y)) = σ (ε̂_teacher - ε̂_fake): with the exact fake score, that of
    E_t [(σ² / α) KL(fake_t | teacher_t)], which prefers a few modes. In the same step the fake score net is trained by
    |ε̂_fake(y) - ε|² / dim on y. The value is the sum of the surrogate ½ |g(z) - stop-gradient(g(z) - gradient)|² and
    this, so its size means little. ``batch.index`` counts the examples, their fields are not read. The teacher is the
    mixture or the reference ``teacher``. Sources: Wang et al. 2023, "ProlificDreamer: High-Fidelity and Diverse
    Text-to-3D Generation with Variational Score Distillation"; Luo et al. 2023, "Diff-Instruct".
    """
    require_range("earliest", earliest, 0, LAST)

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        x, y, noise, t = _drawn(model, batch, earliest)
        with torch.no_grad():
            sigma = alpha_sigma(t)[1][:, None]
            wanted = x - sigma * (field_of(teacher, batch)(y, t, None) - model(y, t=t))
        return (x - wanted).square().sum(-1) / 2 + (model(y, t=t) - noise).square().mean(-1)

    return loss


@typed
def em_distillation_loss(
    teacher: Mixture | None = None,
    *,
    langevin: int = 8,
    noise_step: float = 0.4,
    latent_step: float = 0.1,
    earliest: float = 0.02,
) -> Loss:
    """EM distillation: as :func:`score_distillation_loss`, but with samples that Langevin steps have corrected.

    E-step, ``langevin`` steps from ε and z of the prior, on the log density
    log p_teacher,t(y) - log p_fake,t(y) + log N(ε) + log N(z) with y = α g(z) + σ ε: with γ = ``noise_step``,
    δ = ``latent_step`` and gap = ∇ log p_teacher,t(y) - ∇ log p_fake,t(y),
    ε ← ε + γ²/2 (σ gap - ε) + γ n,  z ← z + δ²/2 (α Jᵀ gap - z) + δ n', J = ∂g/∂z. M-step: the value
    |α g(z_K) - stop-gradient(α g(z_K) + σ (ε_K - η_K))|² / 2α, in which η_K, the same chain of ε without gap, cancels
    the noise. One step with δ = 0 is score distillation times γ²/2. More steps bring the samples toward the
    teacher's density, so that the objective tends from the mode-seeking KL to maximum likelihood.

    The step sizes and the form of η are a reading: the sources consulted give neither. Source: Xie et al. 2024, "EM
    Distillation for One-step Diffusion Models". Raises ``ValueError`` for fewer than 1 Langevin step or step sizes
    outside 0 to 1 (γ not 0).
    """
    require_positive("langevin", langevin)
    require_positive("noise_step", noise_step)
    require_range("noise_step", noise_step, 0, 1)
    require_range("latent_step", latent_step, 0, 1)
    require_range("earliest", earliest, 0, LAST)

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        _, y, noise, t = _drawn(model, batch, earliest)
        field, (alpha, sigma) = field_of(teacher, batch), (level[:, None] for level in alpha_sigma(t))
        z, eps, free = _latent(model, batch), noise, noise
        with torch.no_grad():
            for i in range(langevin):
                made, slopes = model(z, jacobian=True)
                point = alpha * made + sigma * eps
                gap = (model(point, t=t) - field(point, t, None)) / sigma
                n, m = random.normal(random.fold_in(batch.key, 10 + i), (2, *z.shape), z.dtype)
                eps = eps + noise_step**2 / 2 * (sigma * gap - eps) + noise_step * n
                free = free - noise_step**2 / 2 * free + noise_step * n
                z = z + latent_step**2 / 2 * (alpha * (gap[:, None] @ slopes)[:, 0] - z) + latent_step * m
            z, shift = z.detach(), (sigma * (eps - free)).detach()
        found = alpha * model(z)
        fit = (found - found.detach() - shift).square().sum(-1) / (2 * alpha[:, 0])
        return fit + (model(y, t=t) - noise).square().mean(-1)

    return loss


@typed
def distil_one_step(
    teacher: Mixture | Fleet,
    build: Build,
    *,
    method: Literal["score", "em"] = "score",
    steps: int = 600,
    warm_up: int = 200,
    batch: int = 128,
    settings: dict[str, Any] | None = None,
    start: Fleet | None = None,
    **options: Any,
) -> Fleet:
    """A fleet of :class:`OneStep` (``build`` makes one), trained by score or EM distillation, without data.

    First ``warm_up`` steps fit the fake score net to the untrained generator (at whose samples the generator stays),
    unless there is a ``start`` from an earlier call. ``settings`` go to the loss of the method, ``options`` to
    :func:`toolkit.fleet.train` (``members``, ``seed``, ``optimiser``, ``schedule``, ...). With the same seed, runs of
    the two methods are paired. Raises ``ValueError`` for a ``build`` of something else, and as the losses.
    Sources: Wang et al. 2023, "ProlificDreamer" (score); Xie et al. 2024, "EM Distillation for One-step Diffusion
    Models".
    """
    if not isinstance(fresh(build), OneStep):
        raise ValueError(f"build: expected a OneStep, got {type(fresh(build)).__name__}")
    exact = teacher if isinstance(teacher, Mixture) else None
    make = score_distillation_loss if method == "score" else em_distillation_loss
    loss = make(exact, **(settings or {}))
    references = {} if isinstance(teacher, Mixture) else {"teacher": teacher}
    options = {"progress": False, **options}
    slots = {"slot": torch.arange(batch)}
    if start is None:
        if references:
            options["members"] = len(next(iter(references.values())))
        warm = {k: v for k, v in options.items() if k not in ("snapshots", "until")}
        start = train(build, _fake_loss, slots, steps=warm_up, batch=batch, **warm)
        options.pop("members", None)
    return train(build, loss, slots, steps=steps, batch=batch, references=references, start=start, **options)


@typed
def degradation_path(
    teacher: Fleet, student: Fleet, *, nodes: int = 4, steps: int = 200, batch: int = 128, **options: Any
) -> tuple[Fleet, ...]:
    """The way from the teacher's density to the student's: the teacher, then it in ``nodes`` stages of fine-tuning.

    Each of the ``steps`` of denoising training takes new samples of ``student`` (a fleet of :class:`OneStep` with one
    member for each of the teacher's). The last node is the score net of the untrained student. ``options`` go to
    :func:`toolkit.fleet.train`. Source: Zhang et al. 2025, "Distribution Backtracking Builds A Faster Convergence
    Trajectory for Diffusion Distillation" (stage 1). Raises ``ValueError`` for more nodes than steps, or fleets of
    other nets or of different sizes.
    """
    dim = _checked(student, teacher).dim
    require_positive("nodes", nodes)
    require_range("nodes", nodes, 1, steps)
    at = [round(steps * (i + 1) / nodes) for i in range(nodes)]

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        z = random.normal(random.fold_in(batch.key, 2), (len(batch.index), dim), teacher.parameters.dtype)
        with torch.no_grad():
            x = batch.student(z)
        noise, t = _noise(batch, x, 0.0)
        return (model(noised(x, noise, t), t=t) - noise).square().mean(-1)

    slots = {"slot": torch.arange(batch)}
    fixed: dict[str, Any] = {"start": teacher, "references": {"student": student}, "snapshots": at, "steps": steps}
    options = {"progress": False, "streams": teacher.streams, "device": teacher.device, **options}
    fitted = train(teacher.build, loss, slots, batch=batch, **options, **fixed)
    return teacher, *(fitted.at(step) for step in at)


@typed
def backtrack(
    path: Sequence[Fleet], student: Fleet, *, stages: int | None = None, steps: int = 100, **options: Any
) -> tuple[Fleet, ...]:
    """Distribution backtracking: score distillation from the nodes of a :func:`degradation_path`, last to first.

    The fake score net starts as the path's last node, which fits the student. Stage i of ``stages`` (default: one
    for each other node) has ``steps`` steps against node -2 - i, and against the teacher when the path is used up. So
    ``backtrack([path[0], path[-1]], student, stages=n)`` is the baseline with the endpoint only, at equal cost.
    ``options`` go to :func:`distil_one_step`. Returns the student after each stage, the untrained one first.

    Source: Zhang et al. 2025, "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion
    Distillation" (stage 2; equal shares of the steps are our reading). Raises ``ValueError`` for a path of fewer than
    two nodes, or stages fewer than its other nodes.
    """
    if len(path) < 2:
        raise ValueError(f"path: expected at least two nodes, the teacher first, got {len(path)}")
    stages = len(path) - 1 if stages is None else stages
    if stages < len(path) - 1:
        raise ValueError(f"stages: expected at least {len(path) - 1}, one for each node but the last, got {stages}")
    _checked(student, path[-1])
    students = [_with_score(student, path[-1])]
    options = {"streams": student.streams, "device": student.device, **options}
    seed = options.pop("seed", 0)
    for i in range(stages):
        own = int(random.key(seed, i)) & (1 << 31) - 1
        teacher = path[max(len(path) - 2 - i, 0)]
        fleet = distil_one_step(teacher, student.build, steps=steps, start=students[-1], seed=own, **options)
        students.append(fleet)
    return tuple(students)


def _latent(model: Any, batch: Any) -> Tensor:
    weight = model.parameters["layers.0.weight"]
    return random.normal(random.fold_in(batch.key, 2), (len(batch.index), weight.shape[-1]), weight.dtype)


def _noise(batch: Any, x: Tensor, earliest: float) -> tuple[Tensor, Tensor]:
    noise = random.normal(random.fold_in(batch.key, 0), tuple(x.shape), x.dtype)
    share = random.uniform(random.fold_in(batch.key, 1), (len(x),), x.dtype)
    return noise, earliest + (LAST - earliest) * share


def _drawn(model: Any, batch: Any, earliest: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples, with gradient; the same noised, without; the noise and its times."""
    x = model(_latent(model, batch))
    noise, t = _noise(batch, x, earliest)
    return x, noised(x.detach(), noise, t), noise, t


def _fake_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """Denoising on the generator's samples: moves the fake score net only."""
    _, y, noise, t = _drawn(model, batch, 0.0)
    return (model(y, t=t) - noise).square().mean(-1)


def _checked(student: Fleet, score: Fleet | None = None) -> OneStep:
    module = fresh(student.build)
    if not isinstance(module, OneStep):
        raise ValueError(f"student: expected a fleet of OneStep, got one of {type(module).__name__}")
    if score is not None:
        if len(score) != len(student):
            raise ValueError(f"student: expected {len(score)} members, one for each of the teacher, got {len(student)}")
        if {f"score.{name}" for name in score.layout.names} - set(student.layout.names):
            raise ValueError("teacher: expected a fleet of the architecture of the student's score net, got another")
    return module


def _with_score(student: Fleet, score: Fleet) -> Fleet:
    """The student with this fake score net."""
    rows = student.parameters.clone()
    views = student.layout.views(rows)
    for name, values in score.layout.views(score.parameters).items():
        views[f"score.{name}"].copy_(values)
    return replace(student, parameters=rows)
