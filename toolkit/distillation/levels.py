"""Three levels of what a teacher says, as target tensors: universe, class relations, instance.

Each function takes the teacher's probabilities ``(examples, classes)`` and the labels, and returns targets of the same
shape that keep one level and wipe out the rest; :func:`soft_cross_entropy` trains on any of them. How the paper's three
effects become targets is a reading of it; that the targets nest is tested.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import require_labels, require_positive, require_probabilities, require_range, typed
from toolkit.distillation.logits import Labels, Logits, Scalar, label_mask

__all__ = [
    "class_targets",
    "gradient_ratio",
    "instance_targets",
    "soft_cross_entropy",
    "top_targets",
    "universe_targets",
]

Probabilities = Float[Tensor, "examples classes"]
ExampleLabels = Int[Tensor, "examples"]


def _require(teacher: Tensor, labels: Tensor) -> int:
    classes = teacher.shape[-1]
    if len(teacher) == 0 or classes < 2:
        raise ValueError(f"teacher: expected at least 1 example and 2 classes, got shape {tuple(teacher.shape)}")
    require_probabilities("teacher", teacher)
    require_labels("labels", labels, classes)
    return classes


def _spread(on_label: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``on_label`` (examples,) on the label, the rest in equal parts on the other classes."""
    own = label_mask(labels, classes)
    return torch.where(own, on_label[:, None], (1 - on_label[:, None]) / (classes - 1))


def _confidence(teacher: Tensor, labels: Tensor) -> Tensor:
    return teacher.gather(-1, labels[:, None])[:, 0]


@typed
def universe_targets(teacher: Probabilities, labels: ExampleLabels) -> Float[Tensor, "examples classes"]:
    """Label smoothing that is as strong as the teacher on average: one number of it is left.

    p̄ = mean over all examples of the teacher's probability of the label goes to the label, 1 - p̄ in equal parts to
    the others (label smoothing with ε = (1 - p̄) C / (C - 1)). Of all targets of this form it has the smallest KL from
    the teacher. Raises ``ValueError`` for values that are no probabilities, no example, one class or labels out of
    range.

    Tang et al. 2020, "Understanding and Improving Knowledge Distillation" (universe level).
    """
    classes = _require(teacher, labels)
    return _spread(_confidence(teacher, labels).mean().expand(len(teacher)), labels, classes)


@typed
def class_targets(teacher: Probabilities, labels: ExampleLabels) -> Float[Tensor, "examples classes"]:
    """The teacher's mean over the examples of the same label: which classes are like which, nothing of the example.

    Of all targets that depend on the label alone it has the smallest KL from the teacher. Raises ``ValueError`` as
    :func:`universe_targets` does.

    Tang et al. 2020, "Understanding and Improving Knowledge Distillation" (domain level; there the relations come from
    the last layer's weights or the top k probabilities, for which see :func:`top_targets`).
    """
    classes = _require(teacher, labels)
    member = label_mask(labels, classes).to(teacher.dtype)
    return ((member.mT @ teacher) / member.sum(0).clamp_min(1)[:, None])[labels]


@typed
def instance_targets(teacher: Probabilities, labels: ExampleLabels) -> Float[Tensor, "examples classes"]:
    """The teacher's own probability of the label for each example, the rest in equal parts on the other classes.

    How hard each example is, and no relation between classes (KD-pt in the paper): the gradient at the label is that
    of the full teacher, see :func:`gradient_ratio`. Raises ``ValueError`` as :func:`universe_targets` does.

    Tang et al. 2020, "Understanding and Improving Knowledge Distillation" (instance level).
    """
    classes = _require(teacher, labels)
    return _spread(_confidence(teacher, labels), labels, classes)


@typed
def top_targets(teacher: Probabilities, k: int) -> Float[Tensor, "examples classes"]:
    """The ``k`` largest probabilities of each example as they are, the others replaced by their mean.

    k = C or C - 1 is the teacher itself. Of equal probabilities the first class counts as the larger. Raises
    ``ValueError`` for k outside 1 .. C or values that are no probabilities.

    Tang et al. 2020, "Understanding and Improving Knowledge Distillation" (KD-topk).
    """
    classes = teacher.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k: expected a number from 1 to {classes}, got {k}")
    require_probabilities("teacher", teacher)
    kept = teacher.argsort(dim=-1, descending=True, stable=True).argsort(-1) < k
    rest = torch.where(kept, 0, teacher).sum(-1, keepdim=True) / max(classes - k, 1)
    return torch.where(kept, teacher, rest)


@typed
def soft_cross_entropy(
    logits: Logits, targets: Logits, labels: Labels, temperature: Scalar = 1.0, weight: Scalar = 1.0
) -> Float[Tensor, "batch"]:
    """(1 - w) CE(labels, p) - w Σ_c targets_c log p_c, with ``targets`` probabilities, in nats.

    w = ``weight`` in [0, 1]. The gradient of the second term in the logits is p - targets. With T = ``temperature`` > 0
    the second term is T² times that of softmax(logits / T), for targets made at this temperature. Raises ``ValueError``
    for T ≤ 0, w outside [0, 1], targets that are no probabilities or labels out of range.
    """
    require_range("weight", weight, 0, 1)
    require_positive("temperature", temperature)
    require_probabilities("targets", targets)
    require_labels("labels", labels, logits.shape[-1])
    soft = -(temperature**2) * (targets * (logits / temperature).log_softmax(-1)).sum(-1)
    return (1 - weight) * F.cross_entropy(logits, labels, reduction="none") + weight * soft


@typed
def gradient_ratio(logits: Logits, teacher: Probabilities, labels: Labels) -> Float[Tensor, "batch"]:
    """(p_t - p_s) / (1 - p_s) at the label: what distillation makes of the gradient of cross-entropy there, no unit.

    Exactly (∂KL / ∂z_y) / (∂CE / ∂z_y) at temperature 1, with p_s = softmax(logits)[y] and p_t = ``teacher``'s
    probability of y: below 0 where the student is surer than its teacher, 1 where the teacher is certain. NaN where
    1 - p_s rounds to 0. Raises ``ValueError`` for values that are no probabilities or labels out of range.

    Tang et al. 2020, "Understanding and Improving Knowledge Distillation".
    """
    _require(teacher, labels)
    own = label_mask(labels, logits.shape[-1])
    p = logits.softmax(-1)
    rest = torch.where(own, 0, p).sum(-1)  # not 1 - p, which loses its digits where the student is sure
    short = rest - (1 - _confidence(teacher, labels))
    return torch.where(rest > 0, short / rest, torch.nan)
