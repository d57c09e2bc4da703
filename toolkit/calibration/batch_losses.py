"""Training losses with a term that couples the examples of a batch, and mixup, which mixes them.

As in :mod:`toolkit.calibration.losses` each loss returns ``(batch,)``: the batch's term is added to every example, so
the trainer's mean is the loss of the paper. All of them work under ``vmap`` and ``vmap(grad)``.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.calibration.losses import cross_entropy, log_softmax
from toolkit.calibration.smooth import mmce
from toolkit.checks import require_labels, require_positive, require_probabilities, require_range, typed

__all__ = ["anyloss", "mdca", "mixup", "mmce_regularised", "soft_dice"]

Scalar = float | int | Float[Tensor, ""]
Targets = Int[Tensor, "batch"] | Float[Tensor, "batch classes"]


@typed
def mmce_regularised(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], weight: Scalar = 2.0
) -> Float[Tensor, "batch"]:
    """Cross-entropy plus λ · MMCE of the batch's top-label confidences, λ = ``weight`` ≥ 0.

    The unweighted form of Kumar, Sarawagi & Jain 2018, "Trainable Calibration Measures for Neural Networks from Kernel
    Mean Embeddings": the square root of the kernel statistic of :func:`toolkit.calibration.smooth.mmce`. Gradients
    reach the logits through the confidences; which class is on top is a constant. Raises ``ValueError`` for labels
    out of range.
    """
    require_range("weight", weight, 0, math.inf)
    return cross_entropy(logits, labels) + weight * mmce(log_softmax(logits).exp(), labels)


@typed
def mdca(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], weight: Scalar = 1.0
) -> Float[Tensor, "batch"]:
    """Cross-entropy plus β · (1/K) Σ_k | mean_i p_ik − mean_i 1[y_i = k] |, β = ``weight``.

    The second term is the gap between the mean probability and the frequency of each class in the batch. Hebbalaguppe
    et al. 2022, "A Stitch in Time Saves Nine: A Train-Time Regularizing Loss for Improved Neural Network Calibration"
    (MDCA), equation 5. Raises ``ValueError`` for labels out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_range("weight", weight, 0, math.inf)
    log_p = log_softmax(logits)
    gap = log_p.exp().mean(0) - _one_hot(labels, logits).mean(0)
    return cross_entropy(logits, labels) + weight * gap.abs().mean()


@typed
def anyloss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    metric: Literal["accuracy", "f_beta", "g_mean", "balanced_accuracy"] = "f_beta",
    beta: Scalar = 1.0,
    amplifier: Scalar = 73.0,
    positive: int | None = None,
) -> Float[Tensor, "batch"]:
    """One minus a classification metric of the batch, made differentiable by the amplifier A(p) = σ(L (p − 1/2)).

    A turns each class's probability into a nearly hard decision ŷ (L = ``amplifier``; 73 sends .45 and .55 to about
    .025 and .975); the confusion matrix is then made of sums over the batch such as TP = Σ y ŷ. ``f_beta`` weighs
    recall by ``beta``; ``g_mean`` is √(sensitivity · specificity); ``balanced_accuracy`` their mean.

    Convention for many classes: macro one-vs-rest. The metric is the plain mean over the classes for which the batch
    defines it: all for accuracy, those that occur for ``f_beta``, those that occur but do not fill the batch for the
    other two (if there is none, the loss is 1, with zero gradient). ``positive`` names one class to use alone, the
    paper's binary form. Han, Moniz & Chawla 2024, "AnyLoss: Transforming Classification Metrics into Loss Functions",
    equations 2 to 9. Raises ``ValueError`` for an unknown metric, L ≤ 0, or labels out of range.
    """
    classes = logits.shape[-1]
    require_labels("labels", labels, classes)
    require_positive("amplifier", amplifier)
    require_positive("beta", beta)
    if positive is not None and not 0 <= positive < classes:
        raise ValueError(f"positive: expected a class index from 0 to {classes - 1}, got {positive}")
    lean = amplifier * (log_softmax(logits).exp() - 0.5)
    yes, no, target = torch.sigmoid(lean), torch.sigmoid(-lean), _one_hot(labels, logits)
    true_positive, true_negative = (target * yes).sum(0), ((1 - target) * no).sum(0)
    positives, negatives = target.sum(0), (1 - target).sum(0)
    sensitivity, specificity = true_positive / positives.clamp_min(1), true_negative / negatives.clamp_min(1)
    if metric == "accuracy":
        value, defined = (true_positive + true_negative) / len(labels), torch.ones_like(positives)
    elif metric == "f_beta":
        value = (1 + beta**2) * true_positive / (beta**2 * positives + yes.sum(0))
        defined = (positives > 0).to(value.dtype)
    else:
        defined = ((positives > 0) & (negatives > 0)).to(lean.dtype)
        if metric == "g_mean":
            product = sensitivity * specificity
            value = torch.where(defined > 0, product, 1.0).clamp_min(torch.finfo(lean.dtype).tiny).sqrt()
        else:
            value = (sensitivity + specificity) / 2
    if positive is not None:
        defined = defined * (torch.arange(classes, device=logits.device) == positive)
    score = (value * defined).sum() / defined.sum().clamp_min(1)
    return (1 - score).expand(len(labels))


@typed
def soft_dice(
    logits: Float[Tensor, "batch classes"], labels: Targets, smoothing: Scalar = 1.0, focus: Scalar = 0.0
) -> Float[Tensor, "batch"]:
    """Mean over classes of 1 − (2 Σ_i a_ik t_ik + γ) / (Σ_i a_ik² + Σ_i t_ik² + γ), sums over the batch.

    t are one-hot or soft targets and a = (1 − p)^α p, with γ = ``smoothing`` ≥ 0 and α = ``focus`` ≥ 0. At α = 0 the
    loss is 0 exactly where p = t, soft targets included; for hard targets it is a soft 1 − F1. α > 0 is the
    self-adjusting form: examples already predicted with certainty lose their weight, and so the loss stays above 0.
    Li et al. 2020, "Dice Loss for Data-imbalanced NLP Tasks", set-level form. Raises ``ValueError`` for labels out of
    range, soft labels that are no probabilities, or a negative γ or α.
    """
    require_range("smoothing", smoothing, 0, math.inf)
    require_range("focus", focus, 0, math.inf)
    log_p = log_softmax(logits)
    tiny = torch.finfo(logits.dtype).tiny
    if labels.is_floating_point():
        require_probabilities("labels", labels)
        target = labels
    else:
        require_labels("labels", labels, logits.shape[-1])
        target = _one_hot(labels, logits)
    weighed = (-torch.expm1(log_p)).clamp_min(tiny) ** focus * log_p.exp()
    overlap = (weighed * target).sum(0)
    sizes = weighed.square().sum(0) + target.square().sum(0)
    return (1 - (2 * overlap + smoothing) / (sizes + smoothing).clamp_min(tiny)).mean().expand(len(labels))


@typed
def mixup(
    inputs: Float[Tensor, "batch ..."],
    labels: Int[Tensor, "batch"],
    key: Int[Tensor, ""],
    alpha: Scalar,
    classes: int,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch classes"]]:
    """Mix each example with a random partner: λ x_i + (1 − λ) x_j, and their one-hot targets alike.

    λ ~ Beta(α, α) afresh for each example, α = ``alpha`` > 0; partners are a random permutation of the batch. The same
    ``key`` gives the same mixture. Returns the mixed inputs, shaped as given, and soft targets ``(batch, classes)`` for
    :func:`toolkit.calibration.losses.cross_entropy`. Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"
    (its code draws one λ per batch); for calibration Thulasidasan et al. 2019. Raises ``ValueError`` for α ≤ 0 or
    labels out of range.
    """
    require_labels("labels", labels, classes)
    require_positive("alpha", alpha)
    share = random.symmetric_beta(random.fold_in(key, 0), len(labels), alpha, inputs.dtype)
    partner = random.permutation(random.fold_in(key, 1), len(labels))
    one_hot = _one_hot(labels, inputs.new_empty(classes))
    wide = share.reshape(-1, *[1] * (inputs.ndim - 1))
    return (
        wide * inputs + (1 - wide) * inputs[partner],
        share[:, None] * one_hot + (1 - share[:, None]) * one_hot[partner],
    )


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """One-hot rows as wide as the last dimension of ``like``, in its dtype."""
    return (labels[:, None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)
