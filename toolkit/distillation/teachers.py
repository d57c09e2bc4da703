"""Several teachers for one student: averaged, with the easy ones dropped, specialists, tolerant and tough ones.

Every teacher is run once; its outputs are data that a fleet of students shares.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.distillation.logits import Labels, Logits, Scalar, require_floor, require_teacher
from toolkit.fleet import Fleet, grid, train
from toolkit.fleet.members import Build
from toolkit.fleet.store import as_fields

__all__ = [
    "LadderMLP",
    "assisted",
    "averaged",
    "concentrate",
    "drop_teachers",
    "ink_points",
    "smooth_points",
    "specialist_logits",
    "train_assisted",
    "train_specialists",
    "train_unic",
    "unic_distance",
]


@typed
def averaged(
    teachers: Float[Tensor, "teachers examples classes"], temperature: float | int = 4.0
) -> Float[Tensor, "examples classes"]:
    """Logits T log(mean_t softmax(z_t / T)): one teacher whose probabilities at temperature T are the teachers' mean.

    The mean over teachers of KL(p_t ‖ p_s) is KL(mean p_t ‖ p_s) plus what the student cannot change, so that a student
    of all teachers is a student of this one; T = ``temperature`` > 0 must be the student's. Raises ``ValueError`` for
    T ≤ 0, no teacher or logits that are not finite. Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a
    Neural Network" (ensembles).
    """
    require_positive("temperature", temperature)
    if len(teachers) == 0:
        raise ValueError("teachers: expected at least one, got none")
    require_teacher(teachers)
    return temperature * ((teachers / temperature).log_softmax(-1).logsumexp(0) - math.log(len(teachers)))


@typed
def unic_distance(
    student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch width"]
) -> Float[Tensor, "batch"]:
    """½ (1 - cos(s, t)) + ½ mean_d h(s_d - t_d), h(d) = ½ d² up to |d| = 1 and |d| - ½ beyond; no unit.

    0 where both agree. A row of zeros has cosine 0 with everything. Source: Sariyildiz et al. 2024, "UNIC: Universal
    Classification Models via Multi-teacher Distillation".
    """
    cosine = F.cosine_similarity(student, teacher, dim=-1, eps=torch.finfo(student.dtype).tiny ** 0.5)
    size = (student - teacher).abs()
    return (1 - cosine) / 2 + torch.where(size < 1, size.square() / 2, size - 0.5).mean(-1) / 2


@typed
def drop_teachers(
    losses: Float[Tensor, "teachers batch"], key: Int[Tensor, ""], rate: Scalar = 0.5
) -> Float[Tensor, "teachers batch"]:
    """Weights that sum to 1 over the teachers of each example: the one with the largest loss stays, others by chance.

    Any other teacher is dropped with probability ``rate`` in [0, 1], for each example on its own; those that stay get
    equal weights. ``rate`` 0 is the mean over teachers, 1 the worst teacher alone. Of equal losses the first is the
    largest. Depends on ``key`` alone, and is constant for gradients. Raises ``ValueError`` for ``rate`` outside [0, 1]
    or no teacher. Source: Sariyildiz et al. 2024, "UNIC: Universal Classification Models via Multi-teacher
    Distillation".
    """
    require_range("rate", rate, 0, 1)
    if len(losses) == 0:
        raise ValueError("losses: expected at least one teacher, got none")
    worst = torch.arange(len(losses), device=losses.device)[:, None] == losses.detach().argmax(0)
    kept = (worst | (random.uniform(key, tuple(losses.shape)) > rate)).to(losses.dtype)
    return kept / kept.sum(0)


class LadderMLP(nn.Module):
    """Fully connected ReLU student with a ladder of projectors, for features of several teachers.

    The prediction of teacher t's features is the sum over hidden layers of a projector of that layer (two linear maps
    with a ReLU between, ``projector`` wide); without ``ladder`` only the last layer has one. The projectors serve
    training only: what is kept are the features, the last hidden layer. ``model(x)`` gives a tuple of predictions, one
    ``(batch, width)`` for each of ``teachers`` (their widths); ``return_features=True`` gives ``(predictions,
    features)``.

    Source: Sariyildiz et al. 2024, "UNIC: Universal Classification Models via Multi-teacher Distillation" (there the
    projector of the last block is wider than the others).
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], teachers: Sequence[int], projector: int = 16, ladder: bool = True
    ):
        super().__init__()
        widths = [inputs, *hidden]
        if len(widths) < 2 or not teachers or min(*widths, *teachers, projector) < 1:
            raise ValueError(
                f"hidden: expected a layer, a teacher and sizes of at least 1, got {widths} to {list(teachers)}"
            )
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.first = 0 if ladder else len(hidden) - 1
        self.projectors = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Linear(width, projector), nn.ReLU(), nn.Linear(projector, teacher))
                for width in hidden[self.first :]
            )
            for teacher in teachers
        )

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        x, rungs = x.flatten(1), []
        for layer in self.layers:
            x = layer(x).relu()
            rungs.append(x)
        rungs = rungs[self.first :]
        predictions = tuple(self._climb(ladder, rungs) for ladder in self.projectors)
        return (predictions, x) if return_features else predictions

    @staticmethod
    def _climb(ladder: Any, rungs: Sequence[Tensor]) -> Tensor:
        return torch.stack([project(h) for project, h in zip(ladder, rungs, strict=True)]).sum(0)


@typed
def train_unic(
    build: Build,
    x: Float[Tensor, "examples ..."],
    teachers: Sequence[Float[Tensor, "_ _"]],
    *,
    rates: Sequence[float | int],
    seeds: int,
    **options: Any,
) -> Fleet:
    """Students of the features of several teachers, without labels: Σ_t w_t :func:`unic_distance`, by dropping rate.

    ``build`` makes a :class:`LadderMLP`; ``teachers`` holds each one's features of ``x``, which are standardised
    (mean 0, deviation 1 in each dimension; the original keeps running averages, here the data are known). The weights
    are those of :func:`drop_teachers`. Members are ordered as by ``grid(seeds, rate=rates)``; ``options`` go to
    :func:`toolkit.fleet.train`. Raises ``ValueError`` for no teacher, features of another length, that are not finite,
    or rates outside [0, 1]. Source: Sariyildiz et al. 2024, "UNIC: Universal Classification Models via Multi-teacher
    Distillation".
    """
    if not teachers:
        raise ValueError("teachers: expected at least one, got none")
    for value in teachers:
        if len(value) != len(x):
            raise ValueError(f"teachers: expected features of {len(x)} examples, got {len(value)}")
        require_teacher(value)
    for rate in rates:
        require_range("rates", rate, 0, 1)
    fields = {f"teacher_{i}": _standardised(value.detach()) for i, value in enumerate(teachers)}

    def loss(model, batch, hyper):
        parts = [unic_distance(p, batch[name]) for p, name in zip(model(batch.x), fields, strict=True)]
        losses = torch.stack(parts)
        return (drop_teachers(losses, batch.key, hyper.rate) * losses).sum(0)

    return train(build, loss, {"x": x} | fields, **grid(seeds, rate=rates), **options)


def _standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    size = centred.square().mean(0).sqrt()
    return centred / torch.where(size > 0, size, 1)


def _require_groups(groups: Tensor, labels: Tensor) -> int:
    """The number of groups, after a check that ``groups`` has one for each class."""
    require_labels("labels", labels, len(groups))
    count = int(groups.max()) + 1 if len(groups) else 0
    if count == 0 or sorted(set(groups.tolist())) != list(range(count)):
        raise ValueError(f"groups: expected for each class one of the groups 0, 1, ... without gap, got {groups}")
    return count


@typed
def train_specialists(build: Build, data: Any, groups: Int[Tensor, "classes"], **options: Any) -> Fleet:
    """One net per group of classes, trained by cross-entropy on the examples of its group alone, as one fleet.

    ``groups[c]`` is the group of class c, 0, 1, ...; member g has seen no other classes, and its logits of them mean
    nothing. ``options`` go to :func:`toolkit.fleet.train`. Raises ``ValueError`` for groups with a gap or labels out of
    range. Source: Gao et al. 2017, "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN".
    """
    labels = as_fields(data)["y"]
    count = _require_groups(groups, labels)
    subsets = groups[labels] == torch.arange(count)[:, None]

    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    return train(build, loss, data, subsets=subsets, **options)


@typed
def specialist_logits(
    teachers: Float[Tensor, "groups examples classes"],
    labels: Int[Tensor, "examples"],
    groups: Int[Tensor, "classes"],
) -> Float[Tensor, "examples classes"]:
    """Of each example the logits of the specialist for its class: the teacher that :func:`concentrate` wants.

    Raises ``ValueError`` for groups with a gap, another number of teachers or labels out of range. Source: Gao et al.
    2017, "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN".
    """
    if (count := _require_groups(groups, labels)) != len(teachers):
        raise ValueError(f"teachers: expected one for each of {count} groups, got {len(teachers)}")
    return teachers[groups[labels], torch.arange(len(labels), device=labels.device)]


@typed
def concentrate(
    logits: Logits,
    teacher: Logits,
    labels: Labels,
    groups: Int[Tensor, "classes"],
    weight: Scalar = 1.0,
    pace: Scalar = 0.0,
) -> Float[Tensor, "batch"]:
    """CE + w v_g H(p_t, p_s | g): cross-entropy, and that with the specialist's probabilities within the group g.

    Both nets are renormalised to the classes of the label's group. v_g is the pace of the group in this batch: its
    error e_g = mean of 1 - p_s[y] over its examples, to the power γ = ``pace`` ≥ 0, over the mean of the same among the
    groups that occur (v = 1 for γ = 0, and where no group has an error): the larger γ, the more a student listens to
    the teachers of what it cannot do yet. v is constant for gradients. w = ``weight`` ≥ 0. Raises ``ValueError`` for
    negative w or γ, or labels out of range.

    Source: Gao et al. 2017, "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN". That the pace
    follows the errors is from its abstract; the power and the error within a batch are our choice.
    """
    require_floor("weight", weight)
    require_floor("pace", pace)
    require_labels("labels", labels, logits.shape[-1])
    groups = groups.to(labels.device)
    own = groups[labels]
    inside = groups == own[:, None]
    away = torch.finfo(logits.dtype).min / 4
    wanted = torch.where(inside, teacher, away).softmax(-1)
    found = torch.where(inside, logits, away).log_softmax(-1)
    soft = -torch.where(inside, wanted * found, 0).sum(-1)
    hard = F.cross_entropy(logits, labels, reduction="none")

    error = -torch.expm1(-hard.detach())
    same = (own[:, None] == own).to(logits.dtype)  # a mean over groups is a mean over examples by 1 / group's size
    size = same.sum(-1)
    strength = ((same @ error) / size).clamp_min(torch.finfo(logits.dtype).tiny) ** pace
    mean = (strength / size).sum() / (1 / size).sum()
    return hard + weight * strength / mean * soft


@typed
def smooth_points(
    points: Float[Tensor, "examples coordinates"], components: int
) -> Float[Tensor, "examples coordinates"]:
    """The points' projection on their first principal components: plausible shapes, without the detail of each.

    All components give back the points, none their mean; of all shapes in as many dimensions these are the nearest in
    squared distance. Raises ``ValueError`` for a number outside 0 .. coordinates. Source: Fard & Mahoor 2022, "Facial
    Landmark Points Detection Using Knowledge Distillation-Based Neural Networks" (an active shape model makes the
    targets of the tolerant teacher).
    """
    if not 0 <= components <= points.shape[1]:
        raise ValueError(f"components: expected a number from 0 to {points.shape[1]}, got {components}")
    mean = points.mean(0)
    axes = torch.linalg.svd(points - mean, full_matrices=False).Vh[:components]
    return mean + (points - mean) @ axes.mT @ axes


@typed
def ink_points(images: Float[Tensor, "examples 1 height width"]) -> Float[Tensor, "examples 8"]:
    """Landmarks of drawings: the centre of the ink in each quarter of the image, as (row, column) pairs.

    In [-1, 1] from the first to the last pixel of the image; a quarter without ink has its own centre. For images of
    even sides; raises ``ValueError`` for others.
    """
    height, width = images.shape[2:]
    if height % 2 or width % 2 or 0 in (height, width):
        raise ValueError(f"images: expected even height and width, got {height} and {width}")
    rows, columns = (torch.linspace(-1, 1, size).to(images) for size in (height, width))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    found = []
    for half in (slice(0, height // 2), slice(height // 2, height)):
        for side in (slice(0, width // 2), slice(width // 2, width)):
            ink, where = images[:, 0, half, side].flatten(1), place[:, half, side].flatten(1)
            total = ink.sum(1, keepdim=True)
            found.append(torch.where(total > 0, ink @ where.mT / torch.where(total > 0, total, 1), where.mean(1)))
    return torch.cat(found, 1)


@typed
def assisted(
    predicted: Float[Tensor, "batch coordinates"],
    points: Float[Tensor, "batch coordinates"],
    teachers: Float[Tensor, "teachers batch coordinates"],
    weights: Float[Tensor, "teachers"],
) -> Float[Tensor, "batch"]:
    """Mean over coordinates of (s - y)² + Σ_t w_t a_t |s - t|: regression with teachers that may help, not mislead.

    a_t = 1 where teacher t and the truth y = ``points`` lie on the same side of the prediction s, else 0; so no
    teacher ever pulls away from the truth, and a teacher far off pulls no harder than one that is near. In squared
    units of ``points``. Raises ``ValueError`` for negative weights.

    Source: Fard & Mahoor 2022, "Facial Landmark Points Detection Using Knowledge Distillation-Based Neural Networks":
    a tough teacher, trained on exact points, and a tolerant one, trained on smooth ones, each with an assistive loss
    beside the main one. The formula is our reading: the text was not at hand.
    """
    require_floor("weights", weights.min() if len(weights) else 0.0)
    helps = (teachers - predicted).sign() * (points - predicted).sign() > 0
    assist = torch.where(helps, (predicted - teachers).abs(), 0)
    return ((predicted - points).square() + (weights[:, None, None] * assist).sum(0)).mean(-1)


@typed
def train_assisted(
    build: Build,
    x: Float[Tensor, "examples ..."],
    points: Float[Tensor, "examples coordinates"],
    tolerant: Float[Tensor, "examples coordinates"],
    tough: Float[Tensor, "examples coordinates"],
    *,
    weights: Sequence[tuple[float | int, float | int]],
    seeds: int,
    **options: Any,
) -> Fleet:
    """Students that regress ``points`` by :func:`assisted`, for pairs of weights (of the tolerant, of the tough).

    ``tolerant`` and ``tough`` hold the two teachers' predictions for ``x``; (0, 0) is no teacher. Members are ordered
    by pair, seeds fastest, paired across pairs; ``options`` go to :func:`toolkit.fleet.train`. Raises ``ValueError``
    for negative weights, none at all, or teachers that are not finite. Source: Fard & Mahoor 2022, "Facial Landmark
    Points Detection Using Knowledge Distillation-Based Neural Networks".
    """
    if not weights:
        raise ValueError("weights: expected at least one pair, got none")
    for value in (tolerant, tough):
        require_teacher(value)
    for part in (part for pair in weights for part in pair):
        require_floor("weights", part)
    table = torch.tensor(weights, dtype=torch.float32).repeat_interleave(seeds, 0)

    def loss(model, batch, hyper):
        teachers = torch.stack([batch.tolerant, batch.tough])
        pair = torch.stack([hyper.tolerant_weight, hyper.tough_weight]).to(teachers.dtype)
        return assisted(model(batch.x), batch.y, teachers, pair)

    return train(
        build,
        loss,
        {"x": x, "y": points, "tolerant": tolerant.detach(), "tough": tough.detach()},
        hyper={"tolerant_weight": table[:, 0], "tough_weight": table[:, 1]},
        streams=torch.arange(seeds).repeat(len(weights)),
        **options,
    )
