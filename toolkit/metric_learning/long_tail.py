"""Long tails: what to do about classes with few examples, in the loss, in the classifier's lengths, or at test time.

Training with weight decay leaves a classifier whose rows are longer the more examples their class had. Everything here
undoes that at one place or another. How well features separate is
:func:`toolkit.metric_learning.geometry.fisher_ratio`.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import require_positive, require_probabilities, require_range, typed
from toolkit.metric_learning.common import Scalar, require_finite
from toolkit.random import normal

__all__ = [
    "additive_adjustment",
    "class_balanced_weights",
    "etf_head",
    "max_norm",
    "multiplicative_adjustment",
    "norm_limit",
    "tau_normalise",
]


@typed
def class_balanced_weights(
    counts: Float[Tensor, "classes"] | Int[Tensor, "classes"], beta: Scalar = 0.9999
) -> Float[Tensor, "classes"]:
    """w_k = (1 - β) / (1 - β^n_k), scaled to the sum K: weights for each example's loss, by its class of n_k examples.

    The mean over a batch of w_y · loss is taken as it is, not divided by the sum of the weights. β in [0, 1]: 0 gives
    all weights 1, 1 (the limit) weights in proportion to 1/n_k; between them 1/(1-β) is the number of examples from
    which on more of them add little. Float64 inside; the type is that of ``counts``, the default type for integers.
    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples". Raises
    ``ValueError`` for counts that are not greater than 0 and β outside [0, 1].
    """
    require_positive("counts", counts)
    require_range("beta", beta, 0, 1)
    sizes = counts.double()
    ratio = torch.as_tensor(beta, dtype=torch.float64, device=counts.device)
    below = ratio < 1
    effective = torch.where(below, -torch.expm1(sizes * torch.where(below, ratio, 0.5).log()), sizes)
    weights = len(counts) / effective / (1 / effective).sum()
    return weights.to(counts.dtype if counts.is_floating_point() else torch.get_default_dtype())


@typed
def etf_head(
    key: Int[Tensor, ""], classes: int, dim: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "{classes} {dim}"]:
    """Fixed classifier rows at the corners of a simplex, randomly turned: √(K/(K-1)) (I - 11ᵀ/K) Uᵀ, K classes.

    Rows have length 1, cosines -1/(K-1) and sum 0 (a simplex equiangular tight frame): no class is favoured, whatever
    the data. Uᵀ U = I, uniformly distributed, a function of ``key`` alone; as the rows span K - 1 directions, ``dim``
    may be K - 1. Keep it out of the optimiser. Source: Hasegawa & Sato 2023, "Exploring Weight Balancing on
    Long-Tailed Recognition Problem", after Yang et al. 2022, "Inducing Neural Collapse in Imbalanced Learning". Raises
    ``ValueError`` for fewer than two classes, ``dim`` < classes - 1, and types other than float32 and float64.
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if dim < classes - 1:
        raise ValueError(f"dim: expected at least {classes - 1} for {classes} classes, got {dim}")
    frame, upper = torch.linalg.qr(normal(key, (dim, classes - 1), dtype))
    frame = frame * torch.where(upper.diagonal() < 0, -1, 1)  # makes the distribution uniform
    # An orthonormal basis of the vectors with sum 0 (Helmert): column j is (1, ..., 1, -j, 0, ..., 0), j ones.
    row = torch.arange(classes, device=key.device)[:, None]
    column = torch.arange(1, classes, device=key.device)
    basis = torch.where(row < column, 1.0, torch.where(row == column, -column, 0)).to(dtype)
    basis = basis / (column * (column + 1)).to(dtype).sqrt()
    return math.sqrt(classes / (classes - 1)) * basis @ frame.mT


@typed
def norm_limit(weights: Float[Tensor, "classes dim"], share: Scalar = 0.1) -> Float[Tensor, ""]:
    """min + ``share`` · (max - min) of the row lengths: a limit for :func:`max_norm`.

    Set once, when the classifier's training starts. Source: code of Alshammari et al. 2022, "Long-Tailed Recognition
    via Weight Balancing". Raises ``ValueError`` for weights that are not finite and ``share`` outside [0, 1].
    """
    require_finite("weights", weights)
    require_range("share", share, 0, 1)
    lengths = _lengths(weights)
    return lengths.amin() + share * (lengths.amax() - lengths.amin())


@typed
def max_norm(weights: Float[Tensor, "classes dim"], limit: Scalar) -> Float[Tensor, "classes dim"]:
    """Rows longer than ``limit`` are scaled to it, others stay: the nearest weights within the limit.

    Applied after each step it is projected gradient descent. Source: Alshammari et al. 2022, "Long-Tailed Recognition
    via Weight Balancing". Raises ``ValueError`` for weights that are not finite and a limit ≤ 0.
    """
    require_finite("weights", weights)
    require_positive("limit", limit)
    lengths = _lengths(weights)[:, None]
    long = lengths > limit
    return torch.where(long, weights * (limit / torch.where(long, lengths, 1)), weights)


@typed
def tau_normalise(weights: Float[Tensor, "classes dim"], tau: Scalar = 1.0) -> Float[Tensor, "classes dim"]:
    """w_k / |w_k|^τ after training: τ = 0 changes nothing, 1 makes all rows equally long, above 1 the tail longer.

    A row of zeros stays. Source: Kang et al. 2020, "Decoupling Representation and Classifier for Long-Tailed
    Recognition". Raises ``ValueError`` for weights that are not finite and a negative τ.
    """
    require_finite("weights", weights)
    require_range("tau", tau, 0, math.inf)
    lengths = _lengths(weights)[:, None]
    return weights / torch.where(lengths > 0, lengths, 1) ** tau


@typed
def additive_adjustment(
    logits: Float[Tensor, "*batch classes"], priors: Float[Tensor, "classes"], tau: Scalar = 1.0
) -> Float[Tensor, "*batch classes"]:
    """z_k - τ log π_k at test time: with τ = 1 and true posteriors, the posterior under equal priors, exactly.

    π = ``priors``, the training shares. With + in place of -, a negative ``tau``, during training it is the balanced
    softmax. Source: Menon et al. 2021, "Long-Tail Learning via Logit Adjustment". Raises ``ValueError`` for
    logits that are not finite and priors that are not probabilities above 0.
    """
    _require_priors(logits, priors)
    return logits - tau * priors.log()


@typed
def multiplicative_adjustment(
    logits: Float[Tensor, "*batch classes"], priors: Float[Tensor, "classes"], tau: Scalar = 0.65
) -> Float[Tensor, "*batch classes"]:
    """z_k · π_k^-τ at test time: as if the classifier's row k were longer by π_k^-τ (without bias).

    A logit of 0 stays 0, and a negative one is pushed down: among negative logits the rare classes lose. Source:
    Hasegawa & Sato 2023, "Exploring Weight Balancing on Long-Tailed Recognition Problem", after Kim & Kim 2020,
    "Adjusting Decision Boundary for Class Imbalanced Learning". Raises ``ValueError`` for logits that are not finite
    and priors that are not probabilities above 0.
    """
    _require_priors(logits, priors)
    return logits * priors**-tau


def _lengths(weights: Tensor) -> Tensor:
    """Row lengths, with gradient 0 at rows of zeros."""
    square = (weights * weights).sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def _require_priors(logits: Tensor, priors: Tensor) -> None:
    require_finite("logits", logits)
    require_positive("priors", priors)
    require_probabilities("priors", priors[None])
