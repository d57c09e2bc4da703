"""Losses of approximate unlearning, one value per example: ``(batch,)``, in nats unless stated otherwise.

``forgotten`` marks the examples of a batch that are to be forgotten; the others are to be kept. All are pure and work
under ``vmap`` and ``vmap(grad)``. Averages over an empty part do not occur: whoever trains on the values weights the
two parts (:mod:`toolkit.unlearning.approximate` takes as many examples of each).
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.random import uniform

__all__ = [
    "bad_teaching",
    "distillation",
    "l1_norm",
    "logit_matching",
    "neg_grad",
    "random_label_loss",
    "scrub_loss",
    "toward_target",
]

Logits = Float[Tensor, "batch classes"]
Labels = Int[Tensor, "batch"]
Part = Bool[Tensor, "batch"]
Values = Float[Tensor, "batch"]
Scalar = float | int | Float[Tensor, ""]


@typed
def distillation(logits: Logits, teacher: Logits, temperature: Scalar = 1.0) -> Values:
    """T² KL(softmax(teacher / T) ‖ softmax(logits / T)): how far the student is from its teacher.

    The factor T² keeps the size of the gradient when T = ``temperature`` > 0 changes. It is a sum over the classes:
    ``torch.nn.functional.kl_div`` with its default reduction divides by their number too. Source: Hinton, Vinyals &
    Dean 2015, "Distilling the Knowledge in a Neural Network". Raises ``ValueError`` for a temperature of 0 or less.
    """
    require_positive("temperature", temperature)
    wanted = (teacher / temperature).log_softmax(-1)
    return temperature**2 * (wanted.exp() * (wanted - (logits / temperature).log_softmax(-1))).sum(-1)


@typed
def bad_teaching(
    logits: Logits, teacher: Logits, incompetent: Logits, forgotten: Float[Tensor, "batch"], temperature: Scalar = 1.0
) -> Values:
    """T² KL((1 - l) p_full + l p_random ‖ p): the competent teacher where l = 0, an untrained one where l = 1.

    l = ``forgotten`` in [0, 1] per example, p = softmax(· / T), probabilities (not logits) are mixed. Source: Chundawat
    et al. 2023, "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent Teacher"; the
    factor T² is ours (their T is 1). Raises ``ValueError`` for a temperature of 0 or less.
    """
    require_positive("temperature", temperature)
    share = forgotten[:, None]
    full, random = ((x / temperature).softmax(-1) for x in (teacher, incompetent))
    wanted = (1 - share) * full + share * random
    return temperature**2 * (wanted.xlogy(wanted) - wanted * (logits / temperature).log_softmax(-1)).sum(-1)


@typed
def random_label_loss(logits: Logits, key: Int[Tensor, ""]) -> Values:
    """Cross-entropy -log p[y'] with labels y' drawn uniformly over all classes from ``key``, the true one among them.

    With a new key for each batch its expectation is the cross-entropy of the uniform distribution, -mean_k log p[k].
    Source: Golatkar, Achille & Soatto 2020, "Eternal Sunshine of the Spotless Net" (as a baseline); Zhang et al. 2024,
    "Unforgettable Generalization in Language Models".
    """
    classes = logits.shape[-1]
    drawn = (uniform(key, (len(logits),), torch.float64) * classes).long().clamp_max(classes - 1)
    return F.cross_entropy(logits, drawn, reduction="none")


@typed
def neg_grad(logits: Logits, labels: Labels, forgotten: Part, beta: Scalar = 0.95) -> Values:
    """β · CE where the example is kept, -(1 - β) · CE where it is forgotten: descent and ascent at once.

    β = ``beta`` in [0, 1]: 1 is fine-tuning on the kept examples, 0 gradient ascent. Source: Kurmanji et al. 2023,
    "Towards Unbounded Machine Unlearning" (there called NegGrad+). Raises ``ValueError`` for β or labels out of range.
    """
    require_range("beta", beta, 0, 1)
    require_labels("labels", labels, logits.shape[-1])
    return F.cross_entropy(logits, labels, reduction="none") * torch.where(forgotten, beta - 1, beta)


@typed
def scrub_loss(
    logits: Logits,
    teacher: Logits,
    labels: Labels,
    forgotten: Part,
    ascend: Bool[Tensor, ""],
    alpha: Scalar = 0.1,
    gamma: Scalar = 0.99,
    temperature: Scalar = 4.0,
) -> Values:
    """In an ascent step -D on forgotten examples, in another one γ CE + α D on kept ones; the rest are 0.

    D = :func:`distillation` from the original model with T = ``temperature`` (T² included); ``ascend`` says which kind
    of step this is. Source: Kurmanji et al. 2023, "Towards Unbounded Machine Unlearning" (SCRUB). Raises ``ValueError``
    for a temperature of 0 or less, a negative α or γ, or labels out of range.
    """
    require_range("alpha", alpha, 0, math.inf)
    require_range("gamma", gamma, 0, math.inf)
    require_labels("labels", labels, logits.shape[-1])
    away = distillation(logits, teacher, temperature)
    keep = gamma * F.cross_entropy(logits, labels, reduction="none") + alpha * away
    return torch.where(forgotten, -away * ascend, keep * ~ascend)


@typed
def toward_target(features: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"]) -> Values:
    """Cosine distance 1 - cos(features, target), from 0 to 2 (no unit); 1 where either is 0.

    Source: Cotogni et al. 2023, "DUCK: Distance-based Unlearning via Centroid Kinematics", where the target is the
    nearest centroid of another class.
    """
    return 1 - F.cosine_similarity(features, target, dim=-1)


@typed
def logit_matching(logits: Logits, targets: Logits) -> Values:
    """Σ_k (logit_k - target_k)², in squared logits: regression on the outputs that a retrained model has.

    Source: Georgiev et al. 2024, "Attribute-to-Delete: Machine Unlearning via Datamodel Matching" (oracle matching).
    """
    return (logits - targets).square().sum(-1)


def l1_norm(parameters: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """‖θ‖₁ = Σ |θ_j| over all parameters of one model, to be added to its loss; the slope at 0 is 0.

    Source: Jia et al. 2023, "Model Sparsity Can Simplify Machine Unlearning".
    """
    return torch.stack([value.abs().sum() for value in parameters.values()]).sum()
