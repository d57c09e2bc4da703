"""Losses between features: hints, attention, relations among examples, norm and direction; and training with hints.

The teacher's features are computed once and passed as fields of the data, so that a fleet of students shares them.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.store import as_fields

__all__ = [
    "LayeredMLP",
    "attention_transfer",
    "class_directions",
    "hint",
    "norm_and_direction",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "train_fitnets",
]


class LayeredMLP(nn.Module):
    """Fully connected ReLU net without skips that can return each of its hidden layers.

    ``model(x)`` gives logits, ``model(x, return_features=True)`` adds the last hidden layer, and
    ``model(x, return_layers=True)`` gives ``(logits, layers)``: the outputs of the hidden layers before their ReLU,
    each ``(batch, width)``. With ``hint=(layer, width)`` there is a linear ``regressor`` from hidden layer ``layer``
    (0 is the first; negative numbers count from the last), after its ReLU, to a teacher's ``width``:
    ``model(x, return_hint=True)`` gives ``(logits, regressed)``.

    ``gain`` draws the weights with variance gain² / (inputs of the layer) and sets biases to 0: √2 keeps signals alive
    through any depth, smaller gains let them fade (default: torch's own initial state, a gain of about 0.58).
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        classes: int,
        hint: tuple[int, int] | None = None,
        gain: float | None = None,
    ):
        super().__init__()
        widths = [inputs, *hidden]
        if len(widths) < 2 or min(widths) < 1 or classes < 1:
            raise ValueError(f"hidden: expected at least one layer and sizes of at least 1, got {widths} to {classes}")
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.head = nn.Linear(widths[-1], classes)
        if gain is not None:
            require_positive("gain", gain)
            for name, values in self.layers.named_parameters():
                nn.init.normal_(values, std=gain * values.shape[-1] ** -0.5 if name.endswith("weight") else 0.0)
        if hint is not None:
            guided, width = hint
            if not -len(hidden) <= guided < len(hidden) or width < 1:
                raise ValueError(f"hint: expected one of {len(hidden)} layers and a width of at least 1, got {hint}")
            self.guided = guided % len(hidden)
            self.regressor = nn.Linear(hidden[guided], width)

    def forward(
        self, x: Tensor, return_features: bool = False, return_layers: bool = False, return_hint: bool = False
    ) -> Any:
        x, outputs = x.flatten(1), []
        for layer in self.layers:
            outputs.append(layer(x))
            x = outputs[-1].relu()
        logits = self.head(x)
        if return_hint:
            return logits, self.regressor(outputs[self.guided].relu())
        if return_layers:
            return logits, tuple(outputs)
        return (logits, x) if return_features else logits


def _root(square: Tensor) -> Tensor:
    """Square root with gradient 0 at 0: an example may be in a batch twice."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def _over(value: Tensor, norm: Tensor) -> Tensor:
    """``value / norm``, 0 where the norm is 0."""
    return torch.where(norm > 0, value / torch.where(norm > 0, norm, 1), 0)


def _direction(x: Tensor) -> Tensor:
    return _over(x, _root(x.square().sum(-1, keepdim=True)))


@typed
def hint(student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, "batch"]:
    """½ ‖u - r‖² per example: the student's middle layer, mapped to the teacher's width by a regressor, is the hint.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (the half and the sum over features as we recall
    them).
    """
    return (student - teacher).square().sum(1) / 2


@typed
def attention_transfer(
    student: Float[Tensor, "batch channels *places"],
    teacher: Float[Tensor, "batch teacher_channels *places"],
    power: float = 2.0,
) -> Float[Tensor, "batch"]:
    """‖a_s/‖a_s‖ - a_t/‖a_t‖‖² per example, where a map a = Σ_channels |h|^power says how much each place is used.

    The nets need as many places as each other, not as many channels; the order and the signs of the channels and the
    scale of the features do not matter. Between 0 and 2. Raises ``ValueError`` for features without places or a
    power not above 0. Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention" (public code squares
    the distance and averages it over places; here it is summed).
    """
    if student.ndim < 3:
        raise ValueError(f"student: expected (batch, channels, places ...), got shape {tuple(student.shape)}")
    require_positive("power", power)
    first, second = (_direction(h.abs().pow(power).sum(1).flatten(1)) for h in (student, teacher))
    return (first - second).square().sum(1)


def _require_batch(name: str, x: Tensor, least: int) -> None:
    if len(x) < least:
        raise ValueError(f"{name}: expected at least {least} examples, got {len(x)}")


def _huber(difference: Tensor) -> Tensor:
    """½ d² up to 1, |d| - ½ beyond."""
    size = difference.abs()
    return torch.where(size < 1, size.square() / 2, size - 0.5)


@typed
def rkd_distance(
    student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch teacher_width"]
) -> Float[Tensor, "batch"]:
    """Huber distance of the two nets' tables of pairwise distances, each divided by its mean over pairs.

    Entry i is the mean over j ≠ i, so that the mean of the result is the mean over pairs. Rotating, shifting or scaling
    either net's features changes nothing. Raises ``ValueError`` for fewer than 2 examples. Source: Park et al. 2019,
    "Relational Knowledge Distillation" (public code counts the pairs of an example with itself too, a factor of
    1 - 1/batch; its weight for this loss is 25).
    """
    n = len(student)
    _require_batch("student", student, 2)

    def table(x: Tensor) -> Tensor:  # by inner products of centred features: no table of batch² differences
        x = x - x.mean(0)
        products = x @ x.mT
        lengths = products.diagonal(dim1=-2, dim2=-1)
        distances = _root((lengths[:, None] + lengths[None] - 2 * products).clamp_min(0))
        return _over(distances, distances.sum() / (n * (n - 1)))

    return _huber(table(student) - table(teacher)).sum(1) / (n - 1)


@typed
def rkd_angle(
    student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch teacher_width"]
) -> Float[Tensor, "batch"]:
    """Huber distance of the cosines of the angles that all triples of examples make in the two nets.

    Entry i is the mean over the pairs j ≠ k of others, seen from i; the angle at an example that coincides with
    another counts as a right one. Rotating, shifting or scaling either net's features changes nothing. Memory:
    batch³. Raises ``ValueError`` for fewer than 3 examples. Source: Park et al. 2019, "Relational Knowledge
    Distillation" (public code counts the degenerate triples too, a factor of (1 - 1/batch)(1 - 2/batch); its weight
    for this loss is 50).
    """
    n = len(student)
    _require_batch("student", student, 3)

    def cosines(x: Tensor) -> Tensor:
        towards = _direction(x[None] - x[:, None])
        return towards @ towards.mT

    apart = 1 - torch.eye(n, dtype=student.dtype, device=student.device)
    return (_huber(cosines(student) - cosines(teacher)) * apart).sum((1, 2)) / ((n - 1) * (n - 2))


@typed
def similarity_preserving(
    student: Float[Tensor, "batch *features"], teacher: Float[Tensor, "batch *teacher_features"]
) -> Float[Tensor, "batch"]:
    """Squared distance of the two nets' tables of inner products, with rows of length 1; the mean is ‖G_s - G_t‖²/n².

    G = normalised rows of H Hᵀ, H of shape (n, features); entry i is the sum over row i divided by n. Rotation and one
    common scale of either net's features change nothing; a shift does. Source: Tung & Mori 2019,
    "Similarity-Preserving Knowledge Distillation".
    """

    def table(x: Tensor) -> Tensor:
        x = x.flatten(1)
        return _direction(x @ x.mT)

    return (table(student) - table(teacher)).square().sum(1) / len(student)


@typed
def class_directions(
    features: Float[Tensor, "examples width"], labels: Int[Tensor, "examples"], classes: int
) -> Float[Tensor, "classes width"]:
    """Unit vectors e_c towards the mean of the teacher's features of each class, for :func:`norm_and_direction`.

    Raises ``ValueError`` for labels out of range, no examples, or a class without a direction (without examples, or
    with mean 0).
    """
    require_labels("labels", labels, classes)
    member = F.one_hot(labels.long(), classes).to(features.dtype)
    means = member.mT @ features / member.sum(0).clamp_min(1)[:, None]
    norms = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    require_positive("features", norms)
    return means / norms


@typed
def norm_and_direction(
    student: Float[Tensor, "batch width"],
    teacher: Float[Tensor, "batch width"],
    directions: Float[Tensor, "classes width"],
    labels: Int[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    """ND loss 1 - ⟨s, e_y⟩ / max(‖s‖, ‖t‖): long features in the direction of the teacher's class mean.

    0 for a student feature along e_y that is at least as long as the teacher's, 1 - ‖s‖/‖t‖ for a shorter one, 1
    across, 2 for the opposite direction; beyond the teacher's length only direction counts. ``student`` is already
    projected to the teacher's width; ``directions`` are :func:`class_directions`. Features that are both 0 give 1.
    Source: Wang et al. 2023, "Improving Knowledge Distillation via Regularizing Feature Norm and Direction" (there
    added to cross-entropy and KD at temperature 4, all with weight 1 on CIFAR).
    """
    require_labels("labels", labels, len(directions))
    along = (student * directions[labels]).sum(1)
    longer = torch.maximum(student.square().sum(1), teacher.square().sum(1))
    return 1 - _over(along, _root(longer))


@typed
def train_fitnets(
    data: Any,
    teacher_logits: Float[Tensor, "examples classes"],
    teacher_hint: Float[Tensor, "examples width"],
    *,
    hidden: Sequence[int],
    guided: int,
    seeds: int,
    steps: tuple[int, int],
    stages: int = 2,
    hint_weight: float = 100.0,
    temperature: float = 3.0,
    kd_weights: tuple[float, float] = (4.0, 1.0),
    batch: int = 64,
    **options: Any,
) -> Fleet:
    """Train ``seeds`` thin, deep students with hints from a teacher's middle layer, in two stages or in one.

    ``stages=2``, the paper's: for ``steps[0]`` steps only :func:`hint` between hidden layer ``guided`` of the student,
    through its regressor, and ``teacher_hint`` (what lies above gets no gradient and stays as it is); then for
    ``steps[1]`` steps cross-entropy + λ T² KL(teacher ‖ student) at ``temperature`` T on the whole net, with λ going
    linearly from ``kd_weights[0]`` to ``kd_weights[1]``. ``stages=1``: ``sum(steps)`` steps on cross-entropy +
    ``hint_weight`` × the mean squared difference of the features, no KD, as in the mdistiller code. ``stages=0``: the
    control, ``sum(steps)`` steps of stage 2's loss from the initial state. The same streams in all of them: students
    are paired. ``data`` has fields ``x`` and ``y``; ``options`` go to :func:`toolkit.fleet.train`
    (``optimiser``: default Adam at 2e-3, the same in both stages).

    Raises ``ValueError`` for other ``stages``, a temperature not above 0, negative weights and fewer than 1 seed.
    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (constants as we recall them; T² is Hinton's).
    """
    if stages not in (0, 1, 2):
        raise ValueError(f"stages: expected 0, 1 or 2, got {stages}")
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    require_positive("temperature", temperature)
    for name, weight in (("hint_weight", hint_weight), ("kd_weights", min(kd_weights))):
        require_range(name, weight, 0, float("inf"))
    fields = as_fields(data)
    inputs, classes, width = fields["x"][0].numel(), teacher_logits.shape[1], teacher_hint.shape[1]
    fields |= {"teacher_logits": teacher_logits, "teacher_hint": teacher_hint}

    def build() -> LayeredMLP:
        return LayeredMLP(inputs, hidden, classes, hint=(guided, width)).to(teacher_logits.dtype)

    def hints(model, batch, hyper):
        return hint(model(batch.x, return_hint=True)[1], batch.teacher_hint)

    def whole(model, batch, hyper):
        logits = model(batch.x)
        weight = kd_weights[0] + (kd_weights[1] - kd_weights[0]) * batch.progress
        soft = (batch.teacher_logits / temperature).log_softmax(1)
        kd = (soft.exp() * (soft - (logits / temperature).log_softmax(1))).sum(1) * temperature**2
        return F.cross_entropy(logits, batch.y, reduction="none") + weight * kd

    def both(model, batch, hyper):
        logits, regressed = model(batch.x, return_hint=True)
        return F.cross_entropy(logits, batch.y, reduction="none") + hint_weight * 2 / width * hint(
            regressed, batch.teacher_hint
        )

    settings: dict[str, Any] = {"members": seeds, "batch": batch, "optimiser": Adam(lr=2e-3)} | options
    if stages != 2:
        return train(build, both if stages else whole, fields, steps=sum(steps), **settings)
    first = train(build, hints, fields, steps=steps[0], **settings)
    return train(build, whole, fields, steps=steps[1], start=first, **settings)
