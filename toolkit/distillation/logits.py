"""Distillation from logits, one value per example: the whole objective, cross-entropy included, in nats.

Every loss is called ``loss(logits, teacher, labels, ...)`` with the logits of both nets; it is pure and works under
``vmap`` and ``vmap(grad)``. Labels are class indices, or rows of class probabilities where inputs were mixed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import readable, require_labels, require_positive, require_probabilities, require_range, typed

__all__ = ["DecoupledTerms", "decoupled_terms", "dkd", "kd", "standardised_kd"]

Logits = Float[Tensor, "batch classes"]
Labels = Int[Tensor, "batch"]
Targets = Labels | Logits
Values = Float[Tensor, "batch"]
Scalar = float | int | Float[Tensor, ""]


def require_targets(labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` are class indices ``(batch,)`` or probabilities ``(batch, classes)``."""
    if labels.ndim == 2:
        require_probabilities("labels", labels)
    else:
        require_labels("labels", labels, classes)


def label_mask(labels: Tensor, classes: int) -> Tensor:
    """Whether each class is the label, ``(batch, classes)``; unlike ``one_hot`` under ``vmap(grad)`` too."""
    return labels[..., None] == torch.arange(classes, device=labels.device)


def require_floor(name: str, value: Scalar) -> None:
    """Raise ``ValueError`` for a negative weight, or one that is not a number."""
    require_range(name, value, 0, float("inf"))


@typed
def kd(
    logits: Logits, teacher: Logits, labels: Targets, temperature: Scalar = 4.0, weight: Scalar = 0.9
) -> Float[Tensor, "batch"]:
    """(1 - w) CE(labels, p) + w T² KL(softmax(teacher / T) ‖ softmax(logits / T)), T = ``temperature`` > 0.

    w = ``weight`` in [0, 1]: 0 is cross-entropy, 1 sees no label. The gradient of the second term in the logits is
    T (p_s - p_t) at temperature T; for T → ∞ it becomes the difference of the centred logits over the number of
    classes, with an error of order 1/T: T² keeps its size. Raises ``ValueError`` for T ≤ 0, w outside [0, 1] or labels
    out of range.

    Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network".
    """
    require_positive("temperature", temperature)
    require_range("weight", weight, 0, 1)
    require_targets(labels, logits.shape[-1])
    soft = divergence(teacher / temperature, logits / temperature)
    return (1 - weight) * F.cross_entropy(logits, labels, reduction="none") + weight * temperature**2 * soft


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) along the last axis."""
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)


class DecoupledTerms(NamedTuple):
    """Per example ``target`` (TCKD, label against the rest) and ``rest`` (NCKD, within the rest), in nats."""

    target: Tensor
    rest: Tensor


@typed
def decoupled_terms(logits: Logits, teacher: Logits, labels: Labels, temperature: Scalar = 4.0) -> DecoupledTerms:
    """The two parts of KL(p_t ‖ p_s) at temperature T = ``temperature`` > 0, without the factor T².

    TCKD compares (p_y, 1 - p_y), NCKD the classes other than the label y, renormalised:
    KL = TCKD + (1 - p_t[y]) NCKD. In log-space throughout: probabilities that round to 0 or 1 do no harm. With two
    classes NCKD is 0. Raises ``ValueError`` for T ≤ 0, one class or labels out of range.

    Zhao et al. 2022, "Decoupled Knowledge Distillation".
    """
    require_positive("temperature", temperature)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"logits: expected at least 2 classes, got {classes}")
    require_labels("labels", labels, classes)
    own = label_mask(labels, classes)
    (label_t, others_t, within_t), (label_s, others_s, within_s) = (
        _split(z / temperature, own) for z in (teacher, logits)
    )
    target = label_t.exp() * (label_t - label_s) + others_t.exp() * (others_t - others_s)
    rest = torch.where(own, 0, within_t.exp() * (within_t - within_s)).sum(-1)
    return DecoupledTerms(target, rest)


def _split(z: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the label, of all others together, and within the others (those at the label are void)."""
    others = z.masked_fill(own, torch.finfo(z.dtype).min / 4)
    every, pooled = z.logsumexp(-1), others.logsumexp(-1)
    return torch.where(own, z, 0).sum(-1) - every, pooled - every, others - pooled[..., None]


@typed
def dkd(
    logits: Logits,
    teacher: Logits,
    labels: Labels,
    temperature: Scalar = 4.0,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    label_weight: Scalar = 1.0,
    progress: Scalar = 1.0,
    warm_up: Scalar = 1 / 12,
) -> Float[Tensor, "batch"]:
    """c CE + r T² (α TCKD + β NCKD): :func:`decoupled_terms` with weights of their own.

    In plain KD, NCKD has weight 1 - p_t[y], next to nothing where the teacher is sure. c = ``label_weight``;
    r = min(progress / ``warm_up``, 1) grows at the start of training (20 of 240 epochs in the original code), with
    ``progress`` in [0, 1]. The defaults are those for CIFAR-100. Raises ``ValueError`` for T ≤ 0, ``warm_up`` ≤ 0,
    negative weights, progress outside [0, 1], one class or labels out of range.

    Zhao et al. 2022, "Decoupled Knowledge Distillation".
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("label_weight", label_weight)):
        require_floor(name, value)
    require_range("progress", progress, 0, 1)
    require_positive("warm_up", warm_up)
    target, rest = decoupled_terms(logits, teacher, labels, temperature)
    ramp = torch.as_tensor(progress / warm_up, dtype=logits.dtype, device=logits.device).clamp_max(1)
    soft = ramp * temperature**2 * (alpha * target + beta * rest)
    return label_weight * F.cross_entropy(logits, labels, reduction="none") + soft


@typed
def standardised_kd(
    logits: Logits, teacher: Logits, labels: Targets, temperature: Scalar = 1.0, weight: Scalar = 0.9
) -> Float[Tensor, "batch"]:
    """(1 - w) CE(labels, softmax ẑ_s) + w KL(softmax(ẑ_t / T) ‖ softmax(ẑ_s / T)), ẑ = z / std(z) of each example.

    The student is free to have logits of another size than the teacher's: scaling either (or shifting it) changes
    nothing. There is no factor T². The cross-entropy sees ẑ_s too, so that it cannot be 0; std divides by classes - 1
    (a reading). Logits that are all equal count as 0. w = ``weight`` in [0, 1], T = ``temperature`` > 0 (1 in the
    paper on mixup, whose labels are rows of probabilities). Raises ``ValueError`` for T ≤ 0, w outside [0, 1], one
    class or labels out of range.

    Choi et al. 2023, "Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study"; with a
    temperature Sun et al. 2024, "Logit Standardization in Knowledge Distillation", whose cross-entropy is of the
    plain logits.
    """
    require_positive("temperature", temperature)
    require_range("weight", weight, 0, 1)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"logits: expected at least 2 classes, got {classes}")
    require_targets(labels, classes)
    own, wanted = _standardised(logits), _standardised(teacher)
    hard = F.cross_entropy(own, labels, reduction="none")
    return (1 - weight) * hard + weight * divergence(wanted / temperature, own / temperature)


def _standardised(z: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (z.shape[-1] - 1)
    floor = (16 * torch.finfo(z.dtype).eps * z.detach().abs().amax(-1, keepdim=True)).square()
    flat = variance <= floor  # equal up to rounding
    return torch.where(flat, 0, centred) / torch.where(flat, 1, variance).sqrt()


def require_teacher(teacher: Tensor) -> None:
    """Raise ``ValueError`` unless the teacher's outputs are numbers (nothing where unreadable)."""
    if readable(teacher) and not bool(teacher.isfinite().all()):
        raise ValueError("teacher: expected finite values, got some that are not")
