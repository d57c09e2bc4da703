"""Teachers that know no more than the student: its own past, its pseudo-labels, an untrained net, a worse net."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_labels, require_positive, require_probabilities, require_range, typed
from toolkit.distillation.levels import soft_cross_entropy
from toolkit.distillation.logits import Scalar, kd, label_mask
from toolkit.distillation.students import distil
from toolkit.fleet import Fleet, grid, train
from toolkit.fleet.members import Build
from toolkit.fleet.store import as_fields

__all__ = [
    "DeepMLP",
    "TraineeMentor",
    "linear_probe",
    "near_teacher",
    "noisy_student",
    "progressive_weight",
    "pseudo_weights",
    "train_from_random_teacher",
    "train_ps_kd",
    "trainee_mentor",
]


@typed
def progressive_weight(progress: Scalar, epochs: int, final: Scalar = 0.8) -> Float[Tensor, ""]:
    """α_t = α_T (t + 1) / epochs in epoch t = ⌊progress · epochs⌋: what a student's own past counts, 0 in the first.

    α_T = ``final`` in [0, 1] is that of the last epoch; in the first (t = 0) there is no past, and the target is the
    label. ``progress`` in [0, 1). Raises ``ValueError`` for fewer than 1 epoch or values out of range. Source: Kim et
    al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets".
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    require_range("progress", progress, 0, 1)
    require_range("final", final, 0, 1)
    done = torch.as_tensor(progress)
    epoch = (done * epochs + 1e-4).floor()  # a step that begins an epoch is not rounded into the one before
    return torch.where(epoch > 0, final * (epoch + 1) / epochs, 0)


@typed
def train_ps_kd(
    build: Build, data: Any, classes: int, *, finals: Sequence[float | int], seeds: int, epochs: int, **options: Any
) -> Fleet:
    """Self-distillation PS-KD: cross-entropy to (1 - α_t) label + α_t (own probabilities of an epoch ago).

    Each member writes its probabilities of the examples it sees to ``memory["previous"]`` ``(examples, classes)`` and
    reads them an epoch later; α_t is :func:`progressive_weight` with α_T from ``finals`` (0 is plain cross-entropy, 0.8
    the paper's). Members are ordered as by ``grid(seeds, final=finals)``; ``options`` go to
    :func:`toolkit.fleet.train`. Raises ``ValueError`` for labels out of range, α_T outside [0, 1] or fewer than 1
    epoch. Source: Kim et al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets".
    """
    fields = as_fields(data)
    require_labels("labels", fields["y"], classes)
    for final in finals:
        progressive_weight(0.0, epochs, final)
    nothing = fields["x"].new_full((len(fields["y"]), classes), 1 / classes)

    def loss(model, batch, hyper):
        logits = model(batch.x)
        alpha = progressive_weight(batch.progress, epochs, hyper.final).to(logits.dtype)
        values = soft_cross_entropy(logits, batch.previous, batch.y, weight=alpha)
        return values, {"previous": logits.detach().softmax(-1)}

    memory = {"previous": nothing}
    return train(build, loss, data, epochs=epochs, memory=memory, **grid(seeds, final=finals), **options)


@typed
def pseudo_weights(
    probabilities: Float[Tensor, "examples classes"], per_class: int, threshold: float | int = 0.3
) -> Float[Tensor, "examples"]:
    """How often each unlabelled example counts in training: the surest ones of each predicted class, classes balanced.

    Examples whose largest probability exceeds ``threshold`` are kept, of each predicted class the ``per_class`` surest
    (the first of equal ones); where there are fewer they are repeated, so that they count ``per_class`` together.
    Weight 0 is left out. Raises ``ValueError`` for ``per_class`` < 1, a threshold outside [0, 1] or values that are no
    probabilities. Source: Xie et al. 2020, "Self-training with Noisy Student improves ImageNet classification".
    """
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    require_range("threshold", threshold, 0, 1)
    require_probabilities("probabilities", probabilities)
    sure, guess = probabilities.max(-1)
    order = sure.argsort(descending=True, stable=True)
    candidate = label_mask(guess, probabilities.shape[-1]) & (sure > threshold)[:, None]
    rank = candidate[order].long().cumsum(0)[order.argsort()]
    kept = candidate & (rank <= per_class)
    return (kept.to(probabilities.dtype) * per_class / kept.sum(0).clamp_min(1)).sum(-1)


@typed
def noisy_student(
    builds: Sequence[Build],
    data: Any,
    unlabelled: Float[Tensor, "examples ..."],
    classes: int,
    *,
    noises: Sequence[float | int],
    seeds: int,
    per_class: int,
    threshold: float | int = 0.3,
    **options: Any,
) -> list[Fleet]:
    """Self-training: a teacher on few labels, then students of it and of each other on labels and pseudo-labels.

    ``builds[0]`` makes the teacher, each further build the students of one round, equal or larger; the students of a
    round are the teachers of the next. Pseudo-labels are the teacher's probabilities of the clean ``unlabelled``, with
    :func:`pseudo_weights`. The student sees noisy inputs: noise ν drops input values with probability ν and adds
    Gaussian noise of deviation ν (the originals' dropout, stochastic depth and RandAugment are for large images).
    Members are ordered as by ``grid(seeds, noise=noises)``; members of one seed begin with the same teacher, which is
    trained without noise. ``options`` (``steps``, ``batch``, ...) go to :func:`toolkit.fleet.train` for each round.
    Returns the fleets: teacher, first students, and so on. Raises ``ValueError`` for no build, noise outside [0, 1),
    labels out of range, or as :func:`pseudo_weights` does. Source: Xie et al. 2020, "Self-training with Noisy Student
    improves ImageNet classification".
    """
    fields = as_fields(data)
    require_labels("labels", fields["y"], classes)
    if not builds:
        raise ValueError("builds: expected at least one, got none")
    if wrong := [noise for noise in noises if not 0 <= noise < 1]:
        raise ValueError(f"noises: expected values in [0, 1), got {wrong[0]}")
    settings = grid(seeds, noise=noises)
    fleets = [train(builds[0], _cross_entropy, data, **settings, **options)]
    x = torch.cat([fields["x"], unlabelled])
    known = label_mask(fields["y"], classes).to(x.dtype)

    def loss(model, batch, hyper):
        kept = random.dropout(batch.x, hyper.noise, random.fold_in(batch.key, 0))
        seen = kept + hyper.noise * random.normal(random.fold_in(batch.key, 1), tuple(batch.x.shape), batch.x.dtype)
        return -(batch.target * model(seen).log_softmax(-1)).sum(-1)

    for build in builds[1:]:
        guesses = fleets[-1].probabilities(unlabelled).to(x.device)
        weights = torch.stack([pseudo_weights(p, per_class, threshold) for p in guesses])
        target = torch.cat([known.expand(len(guesses), -1, -1), guesses], 1)
        weights = torch.cat([weights.new_ones(len(weights), len(known)), weights], 1)
        scale = weights / weights.mean(1, keepdim=True)  # so that a step is as large whatever is left out
        fleets.append(
            train(build, loss, {"x": x}, member_data={"target": target}, weights=scale, **settings, **options)
        )
    return fleets


def _cross_entropy(model: Any, batch: Any, hyper: Any) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


@typed
def near_teacher(
    teacher: Float[Tensor, "members size"], other: Float[Tensor, "members size"], alpha: Float[Tensor, "members"]
) -> Float[Tensor, "members size"]:
    """((1 - α) teacher + α other) / √((1 - α)² + α²): a student's initial parameters, from the teacher's (α = 0) on.

    Where both are random and independent with mean 0 the variance is the same for every α. Raises ``ValueError`` for α
    outside [0, 1]. Source: Sarnthein et al. 2023, "Random Teachers are Good Teachers" (the root as we recall it; the
    code that was read mixes without).
    """
    for value in (alpha.min(), alpha.max()) if len(alpha) else ():
        require_range("alpha", value, 0, 1)
    rest = 1 - alpha
    return (rest[:, None] * teacher + alpha[:, None] * other) / (rest.square() + alpha.square()).sqrt()[:, None]


@typed
def train_from_random_teacher(
    build: Build, x: Float[Tensor, "examples ..."], *, alphas: Sequence[float | int], seeds: int, **options: Any
) -> Fleet:
    """Students that imitate an untrained net of their own kind, without a label: cross-entropy between softmaxes.

    Each seed has its own random teacher, whose outputs are computed once; students begin at :func:`near_teacher` for
    each α. At α = 0 the student is its teacher and
    there is nothing to learn: the gradient is 0 up to rounding (in the original the two differ in how they normalise).
    Members are ordered as by ``grid(seeds, alpha=alphas)``. Snapshot 0 is the initial state, its measure of comparison.
    ``build`` makes a net with many outputs; ``options`` go to :func:`toolkit.fleet.train`. Raises ``ValueError`` for α
    outside [0, 1]. Source: Sarnthein et al. 2023, "Random Teachers are Good Teachers".
    """
    settings = grid(seeds, alpha=alphas)
    seed = options.pop("seed", 0)
    data = {"x": x, "y": torch.zeros(len(x), dtype=torch.int64)}
    quiet = {name: options[name] for name in ("device",) if name in options} | {"progress": False, "steps": 0}
    teacher, other = (
        train(build, _cross_entropy, data, streams=settings["streams"], seed=s, **quiet)
        for s in (seed, seed + 1_000_003)
    )
    alpha = settings["hyper"]["alpha"].to(teacher.parameters)
    start = replace(teacher, parameters=near_teacher(teacher.parameters, other.parameters, alpha))
    outputs = teacher.logits(x)
    return distil(build, _imitate, data, outputs, start=start, seed=seed, **settings, **options)


def _imitate(logits: Tensor, teacher: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
    return kd(logits, teacher, labels, temperature=1.0, weight=1.0)  # alpha only tells the members apart


@typed
def linear_probe(
    features: Float[Tensor, "*members examples dim"],
    labels: Int[Tensor, "examples"],
    test_features: Float[Tensor, "*members test dim"],
    test_labels: Int[Tensor, "test"],
    classes: int,
    penalty: float | int = 1e-2,
) -> Float[Tensor, "*members"]:
    """Share of test examples that a linear classifier on frozen features gets right: how much of the class they tell.

    Ridge regression of centred one-hot labels on features that are standardised on the training examples, with the
    ``penalty`` > 0 per example, in closed form. Raises ``ValueError`` for a penalty not above 0 or labels out of range.
    """
    require_positive("penalty", penalty)
    require_labels("labels", labels, classes)
    require_labels("test_labels", test_labels, classes)
    mean = features.mean(-2, keepdim=True)
    size = features.std(-2, keepdim=True, correction=0)
    size = torch.where(size > 0, size, 1)
    inputs, tests = (features - mean) / size, (test_features - mean) / size
    target = label_mask(labels, classes).to(features.dtype)
    gram = inputs.mT @ inputs + penalty * len(labels) * torch.eye(inputs.shape[-1]).to(inputs)
    scores = tests @ torch.linalg.solve(gram, inputs.mT @ (target - target.mean(0))) + target.mean(0)
    return (scores.argmax(-1) == test_labels).to(features.dtype).mean(-1)


class DeepMLP(nn.Module):
    """Fully connected net of equal layers, with or without skips: h ← h + W relu(h), or h ← W relu(h), ``depth`` times.

    A linear map to ``width`` comes first, a ReLU and a linear head last. ``model(x, return_features=True)`` gives
    ``(logits, features)``. Both kinds have the same parameters, and one initial state for the same random stream.
    """

    def __init__(self, inputs: int, width: int, depth: int, classes: int, skip: bool):
        super().__init__()
        for name, value in (("inputs", inputs), ("width", width), ("depth", depth), ("classes", classes)):
            if value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
        self.skip = skip
        self.first = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        h = self.first(x.flatten(1))
        for layer in self.layers:
            h = h + layer(h.relu()) if self.skip else layer(h.relu())
        h = h.relu()
        return (self.head(h), h) if return_features else self.head(h)


class TraineeMentor(NamedTuple):
    """Test accuracies of ``students`` (depths, without or with skips, CE or KD or KD from the worse teacher, seeds).

    And of the ``teachers`` (good or worse, seeds).
    """

    students: Tensor
    teachers: Tensor


def trainee_mentor(
    data: Any,
    test: Any,
    classes: int,
    *,
    depths: Sequence[int],
    width: int,
    seeds: int,
    steps: int,
    worse_steps: int,
    temperature: float | int = 4.0,
    weight: float | int = 0.9,
    **options: Any,
) -> TraineeMentor:
    """Depth × skip × {cross-entropy, KD, KD from a worse teacher}: what a teacher is worth to nets hard to train.

    Teachers have skips and the least depth of ``depths``; the worse one is the same after ``worse_steps`` of ``steps``
    steps. Students of one seed learn from the teacher of that seed and share batches and initial state. ``data`` and
    ``test`` have fields ``x`` and ``y``; ``options`` go to :func:`toolkit.fleet.train`. Raises ``ValueError`` for no
    depth or ``worse_steps`` outside 1 .. steps - 1.

    Source: Jha et al. 2020, "On the Demystification of Knowledge Distillation: A Residual Network Perspective"
    (temperature and weight are its; depth and width of a small net are ours).
    """
    if not depths:
        raise ValueError("depths: expected at least one, got none")
    if not 1 <= worse_steps < steps:
        raise ValueError(f"worse_steps: expected a number from 1 to {steps - 1}, got {worse_steps}")
    fields, held = as_fields(data), as_fields(test)
    inputs = fields["x"][0].numel()

    def build(depth: int, skip: bool) -> Build:
        return lambda: DeepMLP(inputs, width, depth, classes, skip)

    def accuracy(fleet: Fleet) -> Tensor:
        return (fleet.logits(held["x"]).argmax(-1).to(held["y"].device) == held["y"]).double().mean(-1)

    start = build(min(depths), True)
    good = train(start, _cross_entropy, data, members=seeds, steps=steps, snapshots=[worse_steps], **options)
    teachers = [good, good.at(worse_steps)]
    outputs = [teacher.logits(fields["x"]) for teacher in teachers]
    table = torch.cat([outputs[0], outputs[0], outputs[1]])
    settings = grid(seeds, weight=[0.0, weight, weight])
    found = []
    for depth in depths:
        for skip in (False, True):
            loss = partial(kd, temperature=temperature)
            fleet = distil(build(depth, skip), loss, data, table, steps=steps, **settings, **options)
            found.append(accuracy(fleet).view(3, seeds))
    return TraineeMentor(
        torch.stack(found).view(len(depths), 2, 3, seeds), torch.stack([accuracy(teacher) for teacher in teachers])
    )
