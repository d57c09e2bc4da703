"""Contrastive distillation inside one batch: of whole features, of windows of feature maps, and across tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from toolkit.checks import require_positive, require_range, typed
from toolkit.distillation.features import class_directions
from toolkit.fleet import Fleet, train
from toolkit.fleet.store import as_fields

__all__ = ["PatchNet", "crd", "csd", "multi_scale_crd", "nearest_class_mean", "train_next_task"]


class PatchNet(nn.Module):
    """A small net with a feature map: one two-layer ReLU net for all patches of an image, their mean, a linear head.

    Patches of ``patch`` × ``patch`` pixels do not overlap; where a patch lies is a learnt shift of its first layer.
    ``model(x)`` gives logits, ``model(x, return_features=True)`` adds the mean ``(batch, width)``, and
    ``model(x, return_map=True)`` gives ``(logits, map)`` with a map ``(batch, width, height, width)``, one place per
    patch. As the head is linear, it classifies a single place as well. With ``project`` there is a linear ``projector``
    from ``width`` to a teacher's ``project`` channels, and the map (not the logits) goes through it.
    """

    def __init__(self, size: int, patch: int, width: int, classes: int, channels: int = 1, project: int | None = None):
        super().__init__()
        if patch < 1 or size < patch or size % patch:
            raise ValueError(f"patch: expected a divisor of size {size}, got {patch}")
        self.size, self.patch = size, patch
        self.embed = nn.Linear(channels * patch * patch, width)
        self.position = nn.Parameter(torch.zeros((size // patch) ** 2, width))
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)
        self.projector = nn.Identity() if project is None else nn.Linear(width, project)

    def forward(self, x: Tensor, return_features: bool = False, return_map: bool = False) -> Any:
        side = self.size // self.patch
        patches = x.reshape(len(x), -1, side, self.patch, side, self.patch).permute(0, 2, 4, 1, 3, 5)
        places = self.mix((self.embed(patches.flatten(3).flatten(1, 2)) + self.position).relu()).relu()
        features = places.mean(1)
        logits = self.head(features)
        if return_map:
            return logits, self.projector(places).mT.unflatten(2, (side, side))
        return (logits, features) if return_features else logits


def _similarities(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    return F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).mT / temperature


@typed
def crd(
    student: Float[Tensor, "batch width"],
    teacher: Float[Tensor, "batch width"],
    temperature: float | Tensor = 0.1,
) -> Float[Tensor, "batch"]:
    """Contrastive distillation in one batch: which of the teacher's features is this example's?

    -log exp(s_i·t_i/T) / Σ_j exp(s_i·t_j/T) with features of length 1: InfoNCE. log(batch) where the student says
    nothing; log(batch) minus the mean bounds the mutual information of the two nets' features from below. ``student``
    is already projected to the teacher's width. Raises ``ValueError`` for fewer than 2 examples and a temperature not
    above 0. Source: Tian et al. 2020, "Contrastive Representation Distillation"; there negatives come from a memory
    of the whole data set, through a binary form of the loss, and both nets are anchors: the in-batch form with the
    student as anchor is a reading.
    """
    if len(student) < 2:
        raise ValueError(f"student: expected at least 2 examples, got {len(student)}")
    require_positive("temperature", temperature)
    scores = _similarities(student, teacher, temperature)
    return scores.logsumexp(1) - scores.diagonal()


def _windows(x: Tensor, scale: int) -> Tensor:
    """Means of scale × scale windows, ``(windows, batch, channels)``."""
    batch, channels, height, width = x.shape
    cells = x.reshape(batch, channels, scale, height // scale, scale, width // scale).mean((3, 5))
    return cells.flatten(2).permute(2, 0, 1)


@typed
def multi_scale_crd(
    student: Float[Tensor, "batch channels height width"],
    teacher: Float[Tensor, "batch channels teacher_height teacher_width"],
    head: Float[Tensor, "classes channels"],
    bias: Float[Tensor, "classes"],
    scales: Sequence[int] = (1, 2),
    temperature: float | Tensor = 0.1,
    complementary: float = 1.0,
    feature_weight: float = 0.0,
) -> Float[Tensor, "batch"]:
    """:func:`crd` of windows of the last feature map, at several scales, with windows told apart by the teacher.

    At scale k the map is averaged in k × k windows; each window is contrasted with the same window of the batch's other
    examples. A window of the teacher whose own prediction, by the teacher's linear ``head``, is the teacher's for the
    whole image is consistent and has weight 1; the others have weight ``complementary``. Mean over the windows of a
    scale and over scales. ``feature_weight`` adds the same contrast between channels (which of the teacher's channels
    is this one, over the batch), equally for each example. With ``scales=(1,)`` this is ``crd`` of the averaged maps.

    ``student`` is already projected to the teacher's channels; all scales must divide all heights and widths. Raises
    ``ValueError`` where they do not, for no scales, negative weights, a temperature not above 0 and too few examples.
    Source: "Contrastive Representation Distillation via Multi-Scale Feature Decoupling"; its scales, temperature and
    weights and how the two kinds of windows enter are not confirmed: this is a reading.
    """
    sizes = (*student.shape[2:], *teacher.shape[2:])
    if not scales or any(scale < 1 or size % scale for scale in scales for size in sizes):
        raise ValueError(f"scales: expected divisors of {sorted(set(sizes))}, at least one, got {list(scales)}")
    require_range("complementary", complementary, 0, float("inf"))
    require_range("feature_weight", feature_weight, 0, float("inf"))
    contrast = torch.vmap(lambda s, t: crd(s, t, temperature))
    whole = (teacher.mean((2, 3)) @ head.mT + bias).argmax(1)
    total = student.new_zeros(len(student))
    for scale in scales:
        s, t = _windows(student, scale), _windows(teacher, scale)
        weight = torch.where((t @ head.mT + bias).argmax(2) == whole, 1.0, complementary).to(s.dtype)
        total = total + (contrast(s, t) * weight).mean(0)
        if feature_weight:
            total = total + feature_weight * contrast(s.mT, t.mT).mean()
    return total / len(scales)


@typed
def csd(
    student: Float[Tensor, "batch width"],
    teacher: Float[Tensor, "batch width"],
    labels: Int[Tensor, "batch"],
    temperature: float | Tensor = 0.07,
) -> Float[Tensor, "batch"]:
    """Contrastive supervised distillation: the student's features are drawn to the teacher's of the same class.

    Mean over the examples p of i's class, i included, of -log exp(s_i·t_p/T) / Σ_j exp(s_i·t_j/T), features of length
    1. With all labels different it is :func:`crd`; with one label in the batch, the mean over p is over everything.
    Raises ``ValueError`` for fewer than 2 examples and a temperature not above 0. Source: Barletti et al. 2022,
    "Contrastive Supervised Distillation for Continual Representation Learning" (T = 0.07; that an example is among
    its own positives is a reading).
    """
    if len(student) < 2:
        raise ValueError(f"student: expected at least 2 examples, got {len(student)}")
    require_positive("temperature", temperature)
    scores = _similarities(student, teacher, temperature)
    same = (labels[:, None] == labels[None]).to(scores.dtype)
    return scores.logsumexp(1) - (scores * same).sum(1) / same.sum(1)


@typed
def train_next_task(
    first: Fleet,
    data: Any,
    known: Bool[Tensor, "classes"],
    *,
    hyper: Mapping[str, Tensor],
    kd_temperature: float = 2.0,
    **options: Any,
) -> Fleet:
    """Go on to a second task from ``first``, a fleet trained on the classes ``known``; each member is its own teacher.

    Loss: cross-entropy + ``hyper["csd"]`` × :func:`csd` + ``hyper["kd"]`` × T² KL(teacher ‖ student) over the known
    classes' logits + ``hyper["features"]`` × (1 - cosine of the two features), one value of each per member; with all
    at 0 it is plain fine-tuning. ``data`` holds the examples of the new classes and the few of the old ones that are
    still at hand; the teachers' features and logits of all of it are computed once. ``options`` go to
    :func:`toolkit.fleet.train`.

    Raises ``ValueError`` unless ``hyper`` has exactly the three names and at least one class is known, and for a
    temperature not above 0. Source: Barletti et al. 2022, "Contrastive Supervised Distillation for Continual
    Representation Learning" (weights 1 and 1, KD at T = 2; old examples from a memory).
    """
    if set(hyper) != {"csd", "kd", "features"}:
        raise ValueError(f"hyper: expected csd, kd and features, got {sorted(hyper)}")
    if not bool(known.any()):
        raise ValueError("known: expected at least one class that the first task had, got none")
    require_positive("kd_temperature", kd_temperature)
    fields = as_fields(data)
    logits, features = first.evaluate(lambda model, batch, _: model(batch.x, return_features=True), {"x": fields["x"]})
    if logits.shape[-1] != len(known):
        raise ValueError(f"known: expected {logits.shape[-1]} entries, one per class, got {len(known)}")
    known = known.to(logits.device)

    def loss(model, batch, hyper):
        now, student = model(batch.x, return_features=True)
        old = (batch.teacher_logits.masked_fill(~known, float("-inf")) / kd_temperature).softmax(1)
        new = (now.masked_fill(~known, torch.finfo(now.dtype).min / 2) / kd_temperature).log_softmax(1)
        kd = (torch.xlogy(old, old) - torch.where(known, old * new, 0)).sum(1) * kd_temperature**2
        value = F.cross_entropy(now, batch.y, reduction="none") + hyper.kd * kd
        value = value + hyper.csd * csd(student, batch.teacher_features, batch.y)
        return value + hyper.features * (1 - F.cosine_similarity(student, batch.teacher_features))

    own = {"teacher_logits": logits, "teacher_features": features}
    return train(first.build, loss, fields, start=first, member_data=own, hyper=hyper, **options)


@typed
def nearest_class_mean(
    gallery: Float[Tensor, "gallery width"],
    gallery_labels: Int[Tensor, "gallery"],
    queries: Float[Tensor, "queries width"],
    labels: Int[Tensor, "queries"],
    classes: int,
) -> Float[Tensor, ""]:
    """Share of ``queries`` whose nearest class mean of the ``gallery`` (by cosine) is their own class.

    Computing the gallery with the first task's net and the queries with the second's asks whether the new features
    can be compared with what was stored before. Raises ``ValueError`` as :func:`class_directions` does.
    """
    directions = class_directions(gallery, gallery_labels, classes)
    return ((queries @ directions.mT).argmax(1) == labels).to(queries.dtype).mean()
