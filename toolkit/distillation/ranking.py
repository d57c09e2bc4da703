"""Distillation of an order and of correlations: what is left of the teacher when its probabilities are not copied.

Values are per example ``(batch,)``, pure and safe under ``vmap`` and ``vmap(grad)``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import require_labels, require_positive, typed
from toolkit.distillation.logits import Labels, Logits, Scalar, label_mask, require_floor

__all__ = ["correlation_distance", "dist", "order_agreement", "plackett_luce", "pld"]


@typed
def plackett_luce(
    logits: Logits, order: Int[Tensor, "batch classes"], weights: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch"]:
    """Σ_k w_k (log Σ_{l ≥ k} exp s_{π_l} - s_{π_k}): weighted -log probability of choosing classes in this order.

    π = ``order`` has one permutation of the classes per example; w_k = ``weights[:, k]`` ≥ 0 is the weight of the k-th
    choice (not of class k). All weight on the first choice is cross-entropy; equal weights are ListMLE. Convex in the
    logits, unchanged when they are shifted, and the last choice, which is none, has value 0. Raises ``ValueError`` for
    indices out of range.

    Xia et al. 2008, "Listwise Approach to Learning to Rank"; the weights as in Lan et al. 2014, "Position-Aware
    ListMLE".
    """
    require_labels("order", order, logits.shape[-1])
    chosen = logits.gather(-1, order)
    left = chosen.flip(-1).logcumsumexp(-1).flip(-1)
    return (weights * (left - chosen)).sum(-1)


@typed
def pld(logits: Logits, teacher: Logits, labels: Labels, temperature: Scalar = 1.0) -> Float[Tensor, "batch"]:
    """:func:`plackett_luce` for the label first and then the other classes as the teacher ranks them, in nats.

    The k-th choice weighs what the teacher gives to it, softmax(teacher / T)[π_k], T = ``temperature`` > 0 (1 best on
    ImageNet, 4 on CIFAR-100 in the paper); equal logits are taken in the order of their classes. It takes the place of
    the cross-entropy, so there is no mixing weight: a sure teacher gives cross-entropy by itself. The gradient is
    Σ_k w_k (softmax over what is left at k - one-hot of π_k). Raises ``ValueError`` for T ≤ 0 or labels out of range.

    Bassam, Zhu & Bian 2025, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation".
    """
    require_positive("temperature", temperature)
    require_labels("labels", labels, logits.shape[-1])
    first = label_mask(labels, logits.shape[-1])
    order = teacher.masked_fill(first, torch.inf).argsort(dim=-1, descending=True, stable=True)
    return plackett_luce(logits, order, (teacher / temperature).softmax(-1).gather(-1, order))


@typed
def correlation_distance(x: Float[Tensor, "*rows n"], y: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """1 - ρ(x, y) along the last axis, ρ Pearson's correlation: from 0 to 2, no unit.

    0 where x = a y + b with a > 0. Where one is constant (up to rounding) ρ counts as 0, without a gradient. Raises
    ``ValueError`` for fewer than 2 values.
    """
    if x.shape[-1] < 2:
        raise ValueError(f"x: expected at least 2 values to correlate, got {x.shape[-1]}")
    (x, flat_x), (y, flat_y) = _centred(x), _centred(y)
    flat = flat_x | flat_y
    norms = [torch.where(flat, 1, z.square().sum(-1)).sqrt() for z in (x, y)]
    return 1 - torch.where(flat, 0, (x * y).sum(-1)) / (norms[0] * norms[1])


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Without its mean, at a scale at which squares are safe, and whether nothing but rounding is left."""
    centred = x - x.mean(-1, keepdim=True)
    largest, size = centred.detach().abs().amax(-1), x.detach().abs().amax(-1)
    flat = largest <= 8 * torch.finfo(x.dtype).eps * size
    return centred / torch.where(flat, 1, largest)[..., None], flat


@typed
def dist(
    logits: Logits,
    teacher: Logits,
    labels: Labels,
    temperature: Scalar = 4.0,
    beta: Scalar = 2.0,
    gamma: Scalar = 2.0,
    label_weight: Scalar = 1.0,
) -> Float[Tensor, "batch"]:
    """c CE + T² (β (1 - ρ of the example) + γ mean over classes of (1 - ρ of the class)), ρ Pearson's correlation.

    Correlated are the student's and the teacher's probabilities at temperature T = ``temperature`` > 0: between the
    classes of one example (weight β), and between the examples of the batch for one class (γ; one number, which every
    example gets, so that the mean over the batch is the loss). Any a p + b with a > 0 is as good as p: a student need
    not be as sure as its teacher. c = ``label_weight``. Raises ``ValueError`` for T ≤ 0, negative weights, one class,
    a batch of one, or labels out of range.

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher"; the factor T² is that of its code.
    """
    require_positive("temperature", temperature)
    for name, value in (("beta", beta), ("gamma", gamma), ("label_weight", label_weight)):
        require_floor(name, value)
    require_labels("labels", labels, logits.shape[-1])
    if min(logits.shape) < 2:
        raise ValueError(f"logits: expected at least 2 examples and 2 classes, got shape {tuple(logits.shape)}")
    p, q = ((z / temperature).softmax(-1) for z in (logits, teacher))
    relations = beta * correlation_distance(p, q) + gamma * correlation_distance(p.mT, q.mT).mean()
    return label_weight * F.cross_entropy(logits, labels, reduction="none") + temperature**2 * relations


@typed
def order_agreement(logits: Logits, teacher: Logits, labels: Labels) -> Float[Tensor, "batch"]:
    """Spearman's rank correlation of the two nets' logits over the classes other than the label, from -1 to 1.

    What a student knows of the teacher's ranking beyond the answer; about 0 for a student that knows nothing of it.
    Equal logits are ranked in the order of their classes. Raises ``ValueError`` for fewer than 3 classes or labels out
    of range.
    """
    others = logits.shape[-1] - 1
    if others < 2:
        raise ValueError(f"logits: expected at least 3 classes, got {others + 1}")
    require_labels("labels", labels, others + 1)
    own = label_mask(labels, others + 1)
    ranks = [z.masked_fill(own, -torch.inf).argsort(dim=-1, stable=True).argsort(-1) for z in (logits, teacher)]
    return 1 - 6 * (ranks[0] - ranks[1]).square().sum(-1).to(logits.dtype) / (others * (others**2 - 1))
