"""Did the features forget, or only the last layer? Similarity of features, linear probes and transfer.

All take stacked features ``(*members, examples, dim)``. What they give is to be held against the same numbers of
retrained models: a feature that a retrained model has as well, because other classes need it, was not left over.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.unlearning.attacks import require_numbers

__all__ = ["Probe", "forget_gap", "linear_cka", "probe_accuracy", "ridge_probe", "transfer_accuracy"]


@typed
def linear_cka(
    x: Float[Tensor, "*#members examples dim_x"],
    y: Float[Tensor, "*#members examples dim_y"],
    *,
    unbiased: bool = False,
) -> Float[Tensor, "..."]:
    """Linear centred kernel alignment of two sets of features of the same examples, one value per member.

    ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with centred columns and Frobenius norms, in [0, 1]; invariant to rotation, shift and one
    common scale of each side, not to a scale per feature. With fewer examples than features it nears 1 even for
    unrelated features. ``unbiased`` replaces each inner product by the U-statistic of HSIC, whose expectation for
    independent features is 0 (so the ratio may be negative); it needs 4 examples. Computed in float64 without any
    examples × examples table. Features that do not vary give NaN.

    Raises ``ValueError`` for values that are not finite and too few examples. Sources: Kornblith et al. 2019,
    "Similarity of Neural Network Representations Revisited"; Song et al. 2012, "Feature Selection via Dependence
    Maximization" (the U-statistic).
    """
    n = x.shape[-2]
    if n < (4 if unbiased else 2):
        raise ValueError(f"x: expected at least {4 if unbiased else 2} examples, got {n}")
    require_numbers("x", x, finite=True)
    require_numbers("y", y, finite=True)
    first, second = (values.double() - values.double().mean(-2, keepdim=True) for values in (x, y))

    def product(a: Tensor, b: Tensor) -> Tensor:
        """Inner product of the Gram matrices a aᵀ and b bᵀ: all of it, or the U-statistic of their off-diagonals."""
        whole = (a.mT @ b).square().sum((-2, -1))
        if not unbiased:
            return whole
        norm_a, norm_b = a.square().sum(-1), b.square().sum(-1)  # diagonals; rows off the diagonal sum to -norm
        both, sums = (norm_a * norm_b).sum(-1), norm_a.sum(-1) * norm_b.sum(-1)
        return whole - both + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * both

    return (product(first, second) / (product(first, first) * product(second, second)).sqrt()).to(x.dtype)


class Probe(NamedTuple):
    """A linear map from features to one score per class, one for each member."""

    weights: Float[Tensor, "*members dim classes"]
    bias: Float[Tensor, "*members classes"]

    def scores(self, features: Float[Tensor, "*members examples dim"]) -> Tensor:
        """``(*members, examples, classes)``; the largest is the prediction."""
        return features @ self.weights + self.bias[..., None, :]


@typed
def ridge_probe(
    features: Float[Tensor, "*members examples dim"],
    labels: Int[Tensor, "examples"],
    classes: int,
    penalty: float | Float[Tensor, "*#members"] = 1e-3,
) -> Probe:
    """Ridge regression of one-hot labels on features, in closed form: no learning rate and no early stopping to choose.

    Minimises mean ‖e_y - Wᵀ h - b‖² + λ v ‖W‖² with an unpenalised intercept, v the mean variance of the features: the
    predictions do not depend on a rotation, shift or common scale of the features, so that ``penalty`` λ means the same
    for each member. Features that do not vary predict the class shares. Raises ``ValueError`` for values that are not
    finite, labels out of range, no examples and a penalty not above 0. Sources: Hoerl & Kennard 1970, "Ridge
    Regression"; Alain & Bengio 2016, "Understanding Intermediate Layers Using Linear Classifier Probes".
    """
    _require_features("features", features, "labels", labels)
    require_labels("labels", labels, classes)
    require_positive("penalty", penalty)
    h, targets = features.double(), F.one_hot(labels.long(), classes).double()
    centre, shares = h.mean(-2, keepdim=True), targets.mean(0)
    h = h - centre
    covariance = h.mT @ h / len(labels)
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    strength = torch.as_tensor(penalty, dtype=torch.float64, device=h.device) * variance
    strength = torch.where(variance > 0, strength, 1)
    eye = torch.eye(h.shape[-1], dtype=torch.float64, device=h.device)
    weights = torch.linalg.solve(covariance + strength[..., None, None] * eye, h.mT @ (targets - shares) / len(labels))
    bias = shares - (centre @ weights).squeeze(-2)
    return Probe(weights.to(features.dtype), bias.to(features.dtype))


@typed
def probe_accuracy(
    probe: Probe, features: Float[Tensor, "*members examples dim"], labels: Int[Tensor, "examples"]
) -> Float[Tensor, "*members"]:
    """Share of examples whose class has the probe's largest score, float64 per member.

    Use examples that the probe was not fitted to. Far above the same fleet's own accuracy on the forget set: shallow
    forgetting. Raises ``ValueError`` for values that are not finite, no examples, and labels without a score.
    """
    _require_features("features", features, "labels", labels)
    require_labels("labels", labels, probe.bias.shape[-1])
    return (probe.scores(features).argmax(-1) == labels).double().mean(-1)


@typed
def transfer_accuracy(
    features: Float[Tensor, "*members examples dim"],
    labels: Int[Tensor, "examples"],
    test_features: Float[Tensor, "*members tests dim"],
    test_labels: Int[Tensor, "tests"],
    *,
    neighbours: int = 5,
) -> Float[Tensor, "*members"]:
    """Accuracy of k nearest neighbours (cosine) on a task that the features were not trained for, float64 per member.

    Majority vote over ``neighbours``; of tied classes the one with the nearest neighbour. Class numbers are free.
    Transfer is damaged when it is below the retrained fleet's band, and nothing was forgotten when it stays at the
    original's. Raises ``ValueError`` for values that are not finite, no examples and ``neighbours`` beyond them.
    Source: Kim et al. 2025, "Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation
    Protocols", whose k and measure are not confirmed.
    """
    _require_features("features", features, "labels", labels)
    _require_features("test_features", test_features, "test_labels", test_labels)
    require_range("neighbours", neighbours, 1, len(labels))
    names, classes = labels.unique(return_inverse=True)
    near = F.normalize(test_features, dim=-1) @ F.normalize(features, dim=-1).mT
    nearest = classes[near.topk(neighbours, dim=-1).indices]
    rank = torch.arange(1, neighbours + 1, dtype=torch.float64, device=features.device)
    worth = 1 + 0.5 * torch.exp2(-rank)  # what is added sums to less than 1: it decides only ties
    votes = (F.one_hot(nearest, len(names)) * worth[:, None]).sum(-2)
    return (names[votes.argmax(-1)] == test_labels).double().mean(-1)


@typed
def forget_gap(
    original: float | Float[Tensor, "..."], unlearned: float | Float[Tensor, "..."], chance: float
) -> Float[Tensor, "..."]:
    """Forget gap ratio (A_original - A_unlearned) / (A_original - chance): 0 nothing forgotten, 1 forgotten to
    chance; float64.

    Compare it on the examples that were unlearned, on unseen ones of the same task and on sibling tasks: forgetting
    that does not generalise is near 1 only on the first. Not defined (±∞ or NaN) where the original is at ``chance``.
    Raises ``ValueError`` for a chance outside [0, 1). Source: Zhang et al. 2024, "Unforgettable Generalization in
    Language Models".
    """
    if not 0 <= chance < 1:
        raise ValueError(f"chance: expected a number in [0, 1), got {chance}")
    before, after = (torch.as_tensor(value, dtype=torch.float64) for value in (original, unlearned))
    return (before - after) / (before - chance)


def _require_features(name: str, features: Tensor, label_name: str, labels: Tensor) -> None:
    if len(labels) == 0:
        raise ValueError(f"{label_name}: expected at least one example, got none")
    require_numbers(name, features, finite=True)
