"""Neural collapse where the end is known in closed form: deep linear nets on free features, and near-collapse.

With squared error and weight decay, the best features of a class are one point, class means are orthogonal, and their
lengths follow from the sizes of the classes. Measure how far training has come with
:func:`toolkit.metric_learning.geometry.collapse_measures`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit.checks import readable, require_labels, require_positive, require_range, typed
from toolkit.metric_learning.common import Scalar, require_finite

__all__ = [
    "CollapsedSolution",
    "DeepLinear",
    "NearCollapse",
    "central_path",
    "collapsed_solution",
    "near_collapse",
    "regularised_error",
    "within_class_shrinkage",
]

_NEWTON = 12  # steps: the error squares in each, from at most 1/2


class CollapsedSolution(NamedTuple):
    """The global minimum of a deep linear net with free features, class by class; squared lengths, not lengths."""

    predictions: Float[Tensor, "classes"]  # a_k: the net maps features of class k to a_k e_k; 0 = minority collapse
    feature_squares: Float[Tensor, "classes"]  # |h_k|²
    weight_squares: Float[Tensor, "classes"]  # |w_k|², rows of the product of all layers
    layer_squares: Float[Tensor, "layers classes"]  # squared singular values of each layer
    loss: Float[Tensor, ""]


class NearCollapse(NamedTuple):
    """The minimum of the near-collapse model."""

    weights: Float[Tensor, "classes dim"]
    features: Float[Tensor, "items dim"]
    loss: Float[Tensor, ""]


class DeepLinear(nn.Module):
    """Free features and linear layers: every item has a feature vector h of its own, the net gives W_M … W_1 h.

    The features stand for a network that could fit anything, so what is left is what the loss and the decay want.
    ``model(x)`` takes item indices ``(batch,)``, or one-hot rows ``(batch, items)``, and gives ``(batch, classes)``.
    Train it with :func:`regularised_error` and no decay in the optimiser; the parameter ``features`` is (items, width).

    Args:
        items: number of training items.
        classes: number of logits.
        width: dimensions of the features and of every layer between, at least ``classes`` for the closed form.
        layers: M ≥ 1, the last of which is ``head``.
        bias: whether the last layer has a bias.
    """

    def __init__(self, items: int, classes: int, width: int, layers: int = 1, bias: bool = False):
        super().__init__()
        for name, value in (("items", items), ("classes", classes), ("width", width), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
        self.features = nn.Parameter(torch.randn(items, width) / math.sqrt(width))
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers - 1))
        self.head = nn.Linear(width, classes, bias=bias)

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False):
        """Logits, or (logits, input of ``head``). ``key`` is taken for the convention's sake: nothing here is random.

        Raises ``ValueError`` unless x is ``(batch,)`` of integers or ``(batch, items)`` of numbers.
        """
        if x.ndim == 1 and not x.is_floating_point():
            h = self.features[x]
        elif x.ndim == 2 and x.shape[1] == len(self.features):
            h = x.to(self.features.dtype) @ self.features
        else:
            expected = f"indices (batch,) or one-hot rows (batch, {len(self.features)})"
            raise ValueError(f"x: expected {expected}, got {x.dtype} of shape {tuple(x.shape)}")
        for layer in self.layers:
            h = layer(h)
        logits = self.head(h)
        return (logits, h) if return_features else logits


@typed
def regularised_error(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    parameters: Mapping[str, Tensor],
    weight_decay: Scalar | Float[Tensor, "layers"],
    feature_decay: Scalar,
) -> Float[Tensor, "batch"]:
    """½ |z - e_y|² per item, plus Σ_j (l_j/2) |W_j|² + (l_H/2) |H|² of a :class:`DeepLinear` (in every item's value).

    The mean over all items is the objective whose minimum :func:`collapsed_solution` gives, so train on full batches.
    ``parameters`` are the model's tensors by name; l_j = ``weight_decay``, one number or one per layer, the head last;
    l_H = ``feature_decay``. A bias is not decayed. Source: Dang et al. 2023, "Neural Collapse in Deep Linear Networks:
    From Balanced to Imbalanced Data". Raises ``ValueError`` for labels out of range, and as many decays as
    there are not layers.
    """
    require_labels("labels", labels, logits.shape[-1])
    depth = sum(name.startswith("layers.") for name in parameters)
    layers = [parameters[f"layers.{i}.weight"] for i in range(depth)] + [parameters["head.weight"]]
    squares = torch.stack([(layer * layer).sum() for layer in layers])
    if isinstance(weight_decay, Tensor) and weight_decay.ndim == 1 and len(weight_decay) != len(layers):
        raise ValueError(f"weight_decay: expected one value or {len(layers)}, got {len(weight_decay)}")
    penalty = (weight_decay * squares).sum() + feature_decay * (parameters["features"] ** 2).sum()
    return ((logits - _one_hot(labels, logits.shape[-1], logits.dtype)) ** 2).sum(-1) / 2 + penalty / 2


@typed
def collapsed_solution(
    counts: Float[Tensor, "classes"] | Int[Tensor, "classes"],
    weight_decays: Float[Tensor, "layers"],
    feature_decay: Scalar,
) -> CollapsedSolution:
    """Global minimum of (1/2N) |W_M … W_1 H - Y|² + Σ_j (l_j/2) |W_j|² + (l_H/2) |H|², class sizes n_k, N = Σ n_k.

    Features of a class are one vector h_k; those of different classes are orthogonal, as are the rows w_k of the
    product, parallel to h_k; the prediction is a_k e_k. With c_k = (n_k l_H Π l_j)^(1/(M+1)), a_k minimises
    (n_k/2N)(a-1)² + (M+1)/2 · c_k a^(2/(M+1)); balance gives l_j s_j² = n_k l_H |h_k|² = c_k a_k^(2/(M+1)) for layer
    j's singular value s_j. M = 1: a_k = max(0, 1 - N √(l_W l_H / n_k)), lost if n_k ≤ N² l_W l_H. M > 1: a_k falls to
    (M-1)/M, then at once to 0, when c_k N / n_k exceeds ((M-1)/M)^((M-1)/(M+1)) / M; the start a = 0 is always a local
    minimum. a_k is found by Newton's method from 1, which descends to it. Differentiable; every width must be at least
    the number of classes.

    With a free last bias and classes of one size, the same a holds in the classes - 1 directions of a simplex, and the
    prediction is 1/K + a (e_k - 1/K) (not what ``loss`` counts, which is for no bias).
    Source: Dang et al. 2023, "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data"; formulas
    derived again, jump included. Raises ``ValueError`` for counts and decays that are not greater than 0.
    """
    require_positive("counts", counts)
    require_positive("weight_decays", weight_decays)
    require_positive("feature_decay", feature_decay)
    depth = len(weight_decays)
    if depth < 1:
        raise ValueError("weight_decays: expected one value per layer, got none")
    sizes = counts.to(weight_decays.dtype)
    total = sizes.sum()
    power = (depth - 1) / (depth + 1)
    cost = (sizes * feature_decay * weight_decays.prod()) ** (1 / (depth + 1))
    strength = cost * total / sizes  # a solves a^power (1 - a) = strength
    lowest = (depth - 1) / depth
    learned = strength < lowest**power / depth
    wanted = torch.where(learned, strength, 0)
    a = torch.ones_like(sizes)
    for _ in range(_NEWTON):
        a = a - (a**power * (1 - a) - wanted) / (a ** (power - 1) * (power * (1 - a) - a))
        a = a.clamp_min(lowest + torch.finfo(a.dtype).tiny)
    a = torch.where(learned, a, 1)
    share = torch.where(learned, cost * a ** (2 / (depth + 1)), 0)
    a = torch.where(learned, a, 0)
    layers = share / weight_decays[:, None]
    loss = (sizes / (2 * total) * (a - 1) ** 2 + (depth + 1) / 2 * share).sum()
    return CollapsedSolution(a, share / (sizes * feature_decay), layers.prod(0), layers, loss)


@typed
def near_collapse(
    features: Float[Tensor, "items dim"],
    labels: Int[Tensor, "items"],
    classes: int,
    weight_decay: Scalar,
    feature_decay: Scalar,
    proximity: Scalar,
    iterations: int = 300,
) -> NearCollapse:
    """Free features that stay near given ones H⁰: |W H - Y|²/2N + λ_W |W|²/2K + λ_H |H|²/2N + μ |H - H⁰|²/2N, least.

    Starting from H⁰ the two closed forms alternate ``iterations`` times: W = Y Hᵀ (H Hᵀ + (N/K) λ_W I)⁻¹ and
    H = (Wᵀ W + (λ_H + μ) I)⁻¹ (Wᵀ Y + μ H⁰), N items, K classes, one item per column. The loss never rises; a step
    costs dim³, whatever the number of items. μ = ``proximity`` → ∞ keeps H⁰; μ = 0 is the model of
    :func:`collapsed_solution` with one layer, l_W = λ_W / K and l_H = λ_H / N. Float64 inside. Source: Tirer, Huang &
    Niles-Weed 2023, "Perturbation Analysis of Neural Collapse", for balanced classes; the objective's
    normalisation is a reading that is not confirmed, and classes of other sizes are an extension.

    Raises ``ValueError`` for features that are not finite, labels outside 0 .. classes - 1, ``weight_decay`` ≤ 0, a
    negative ``feature_decay`` or ``proximity``, both of them 0, and fewer than one iteration.
    """
    require_finite("features", features)
    require_labels("labels", labels, classes)
    require_positive("weight_decay", weight_decay)
    _require_pull(feature_decay, proximity)
    require_positive("iterations", iterations)
    start = features.double()
    items = len(features)
    target = _one_hot(labels, classes, torch.float64)
    ridge = items / classes * weight_decay
    shrink = feature_decay + proximity
    sizes, sums, gram = target.sum(0), target.mT @ start, start.mT @ start
    unit = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    weights = torch.linalg.solve(gram + ridge * unit, sums.mT).mT
    for _ in range(iterations):  # in terms of Y Hᵀ and H Hᵀ, which need no items
        inverse = torch.linalg.inv(weights.mT @ weights + shrink * unit)
        mixed = weights.mT @ (proximity * sums)
        square = weights.mT @ (sizes[:, None] * weights) + mixed + mixed.mT + proximity**2 * gram
        square = inverse @ square @ inverse
        cross = (sizes[:, None] * weights + proximity * sums) @ inverse
        weights = torch.linalg.solve(square + ridge * unit, cross.mT).mT
    inverse = torch.linalg.inv(weights.mT @ weights + shrink * unit)
    moved = (target @ weights + proximity * start) @ inverse
    error = ((moved @ weights.mT - target) ** 2).sum() + feature_decay * (moved**2).sum()
    loss = error + proximity * ((moved - start) ** 2).sum() + ridge * (weights**2).sum()
    return NearCollapse(*(value.to(features.dtype) for value in (weights, moved, loss / (2 * items))))


@typed
def within_class_shrinkage(
    weights: Float[Tensor, "classes dim"], feature_decay: Scalar, proximity: Scalar
) -> Float[Tensor, "dim dim"]:
    """A = μ (Wᵀ W + (λ_H + μ) I)⁻¹: how :func:`near_collapse` shrinks what differs inside a class, exactly.

    At its minimum h - m_y = A (h⁰ - m⁰_y) for every item, hence Σ_W = A Σ_W⁰ A: a direction with singular value s of W
    shrinks by μ / (s² + λ_H + μ), one that W does not see by μ / (λ_H + μ). Holds for any W after the feature step.
    Raises ``ValueError`` for weights that are not finite, a negative ``feature_decay`` or ``proximity``, and both 0.
    Derived for the model of Tirer, Huang & Niles-Weed 2023, "Perturbation Analysis of Neural Collapse".
    """
    require_finite("weights", weights)
    _require_pull(feature_decay, proximity)
    unit = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    return proximity * torch.linalg.inv(weights.mT @ weights + (feature_decay + proximity) * unit)


@typed
def central_path(
    features: Float[Tensor, "items dim"],
    labels: Int[Tensor, "items"],
    classes: int,
    weight_decay: Scalar,
    feature_decay: Scalar,
) -> Float[Tensor, "items dim"]:
    """dH/dt = -(Wᵀ (W H - Y) + λ_H H), the flow of free features whose classifier W = W*(H) is always the best one.

    W*(H) = Y Hᵀ (H Hᵀ + (N/K) λ_W I)⁻¹; it is N times minus the gradient of the loss of :func:`near_collapse` at μ = 0.
    Along it the within-class part relative to the between-class part (NC1 as a ratio of traces) only falls. Take small
    steps: ``features + 0.02 * central_path(features, ...)``. One item per row here. Source: Tirer, Huang & Niles-Weed
    2023, "Perturbation Analysis of Neural Collapse", on the central path of Han, Papyan & Donoho 2022, "Neural Collapse
    Under MSE Loss". Raises ``ValueError`` for features that are not finite, labels outside 0 .. classes - 1,
    ``weight_decay`` ≤ 0 and a negative ``feature_decay``.
    """
    require_finite("features", features)
    require_labels("labels", labels, classes)
    require_positive("weight_decay", weight_decay)
    require_range("feature_decay", feature_decay, 0, math.inf)
    target = _one_hot(labels, classes, features.dtype)
    unit = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    ridge = len(features) / classes * weight_decay
    weights = torch.linalg.solve(features.mT @ features + ridge * unit, features.mT @ target).mT
    return (target - features @ weights.mT) @ weights - feature_decay * features


def _one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)


def _require_pull(feature_decay: Scalar, proximity: Scalar) -> None:
    require_range("feature_decay", feature_decay, 0, math.inf)
    require_range("proximity", proximity, 0, math.inf)
    total = feature_decay + proximity
    if not isinstance(total, Tensor) or readable(total):
        require_positive("feature_decay + proximity", total)
