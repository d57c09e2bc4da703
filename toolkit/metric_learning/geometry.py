"""The shape of an embedding: how near positives are, how evenly points spread, how far classes have collapsed.

Every measure is one number of one embedding ``(items, dim)``; put the members and epochs of a fleet in front with
``vmap`` (labels shared).
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import readable, require_labels, require_positive, typed
from toolkit.metric_learning.common import Scalar, masked_logsumexp, masked_mean, pair_masks, require_finite
from toolkit.metric_learning.similarities import cosine

__all__ = ["CollapseMeasures", "alignment", "collapse_measures", "fisher_ratio", "tolerance", "uniformity"]


class CollapseMeasures(NamedTuple):
    """Neural collapse: all are 0 when it is complete. Scalars, or with the leading dimensions that ``vmap`` adds."""

    nc1: Float[Tensor, ""]
    nc1_ratio: Float[Tensor, ""]
    nc2: Float[Tensor, ""]
    nc2_weights: Float[Tensor, ""]
    nc3: Float[Tensor, ""]
    nc3_product: Float[Tensor, ""]
    nc4: Float[Tensor, ""]


def _square_distances(embeddings: Tensor) -> Tensor:
    """|f(x) - f(y)|² of the rows scaled to length 1, by 2 - 2 cos."""
    return (2 - 2 * cosine(embeddings, embeddings)).clamp_min(0)


@typed
def alignment(
    embeddings: Float[Tensor, "items dim"], labels: Int[Tensor, "items"], power: Scalar = 2
) -> Float[Tensor, ""]:
    """Mean of |f(x) - f(y)|^power over the pairs of one class, f scaled to length 1: 0 when each class is one point.

    Two views of one image are two items with one label. 0 without such a pair. Raises ``ValueError`` for embeddings
    that are not finite and a ``power`` that is not above 0. Source: Wang & Isola 2020, "Understanding Contrastive
    Representation Learning through Alignment and Uniformity on the Hypersphere", section 4.2.
    """
    require_finite("embeddings", embeddings)
    require_positive("power", power)
    square = _square_distances(embeddings)
    apart = square > 0
    lengths = torch.where(apart, torch.where(apart, square, 1) ** (power / 2), 0)
    return masked_mean(lengths.reshape(-1), pair_masks(labels)[0].reshape(-1))


@typed
def uniformity(embeddings: Float[Tensor, "items dim"], scale: Scalar = 2) -> Float[Tensor, ""]:
    """log of the mean of exp(-scale |f(x) - f(y)|²) over all pairs of two items, f scaled to length 1.

    Lower is more evenly spread; 0 when all items are one point (and for fewer than two items), at least -4 ``scale``.
    Raises ``ValueError`` for embeddings that are not finite and a ``scale`` that is not above 0. Source: Wang & Isola
    2020, section 4.2; Wang & Liu 2021, "Understanding the Behaviour of Contrastive Loss", with scale 2.
    """
    require_finite("embeddings", embeddings)
    require_positive("scale", scale)
    items = len(embeddings)
    if items < 2:
        return 0 * embeddings.sum()
    others = ~torch.eye(items, dtype=torch.bool, device=embeddings.device)
    exponents = (-scale * _square_distances(embeddings)).reshape(-1)
    count = torch.tensor(items * (items - 1), dtype=embeddings.dtype, device=embeddings.device)
    return masked_logsumexp(exponents, others.reshape(-1)) - count.log()


@typed
def tolerance(embeddings: Float[Tensor, "items dim"], labels: Int[Tensor, "items"]) -> Float[Tensor, ""]:
    """Mean over all pairs of two items of f(x)·f(y) [same class], f scaled to length 1: does a class stay together?

    As the mean is over all pairs, the most it can be is the share of same-class pairs; it equals that share times
    (1 - alignment / 2). 0 for fewer than two items. Raises ``ValueError`` for embeddings that are not finite.
    Source: Wang & Liu 2021, "Understanding the Behaviour of Contrastive Loss", section 3.4.
    """
    require_finite("embeddings", embeddings)
    positive, items = pair_masks(labels)[0], len(labels)
    return torch.where(positive, cosine(embeddings, embeddings), 0).sum() / max(1, items * (items - 1))


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """Membership ``(items, classes)``, float64."""
    return (index[:, None] == torch.arange(classes, device=index.device)).double()


@typed
def fisher_ratio(
    features: Float[Tensor, "items dim"], labels: Int[Tensor, "items"], classes: int | None = None
) -> Float[Tensor, ""]:
    """Fisher discriminant ratio tr(S_W⁻¹ S_B): how far the classes lie apart, measured in their own spread.

    S_W = Σ (h - m_y)(h - m_y)ᵀ over the items, S_B = Σ_c n_c (m_c - m)(m_c - m)ᵀ with m the mean of all items; float64,
    unchanged by any invertible affine map of the features. Computed as Σ (1/λ - 1) over the spectrum λ of S_W where
    S_T = S_W + S_B is scaled to the identity. Directions without any variance (constant dimensions among them) are
    dropped. +∞ where classes differ in a direction in which no class varies: always so with hardly more items than
    dimensions. 0 when nothing varies. A measure, not a loss: no gradient.

    ``classes``: the number of classes, needed under ``vmap`` if labels differ between the members. Raises
    ``ValueError`` for features that are not finite and labels outside 0 .. ``classes`` - 1.
    Source: Fisher 1936; as a measure of features Hasegawa & Sato 2023, "Exploring Weight Balancing on Long-Tailed
    Recognition Problem".
    """
    require_finite("features", features)
    if classes is not None:
        require_labels("labels", labels, classes)
        index = labels
    elif readable(labels):
        present, index = labels.unique(return_inverse=True)
        classes = len(present)
    else:
        raise ValueError("classes: expected the number of classes, which labels under vmap do not tell, got None")
    table = features.detach().double()
    table = table - table.mean(0)
    spread = (table**2).sum(0).sqrt()
    noise = 1e-12 * (len(table) ** 0.5) * features.detach().double().abs().amax(0)  # what centring a constant leaves
    varies = spread > noise
    table = torch.where(varies, table / torch.where(varies, spread, 1), 0)
    member = _one_hot(index, classes)
    means = (member.mT @ table) / member.sum(0).clamp_min(1)[:, None]
    inside = table - member @ means
    values, directions = torch.linalg.eigh(table.mT @ table)
    kept = values > 1e-12 * values.amax().clamp_min(1e-300)
    scale = torch.where(kept, torch.where(kept, values, 1).rsqrt(), 0)
    white = (inside @ directions) * scale
    # A dropped direction gets the eigenvalue 1, whose share 1/λ - 1 is 0.
    shares = torch.linalg.eigvalsh(white.mT @ white + torch.diag(1 - kept.double()))
    shares = shares.clamp_max(1)
    return torch.where(shares > 1e-12, 1 / shares.clamp_min(1e-12) - 1, torch.inf).sum()


def _distance(gram: Tensor, target: Tensor) -> Tensor:
    """|A/|A| - T/|T||, Frobenius norms; 1 where A is 0."""
    return torch.linalg.matrix_norm(_unit(gram) - _unit(target))


def _unit(matrix: Tensor) -> Tensor:
    square = (matrix * matrix).sum((-2, -1), keepdim=True)
    return matrix * torch.where(square > 0, square, 1).rsqrt()


@typed
def collapse_measures(
    features: Float[Tensor, "items dim"],
    labels: Int[Tensor, "items"],
    weights: Float[Tensor, "classes dim"],
    bias: Float[Tensor, "classes"] | None = None,
    target: Literal["simplex", "identity"] | Float[Tensor, "classes"] | Float[Tensor, "2 classes"] = "simplex",
) -> CollapseMeasures:
    """Neural collapse NC1 to NC4 of last-layer features h under the classifier ``weights`` (and ``bias``).

    With class means m_c, their mean m (every class counts the same), K classes, Σ_W = the mean over items of
    (h - m_y)(h - m_y)ᵀ, Σ_B = (1/K) Σ_c (m_c - m)(m_c - m)ᵀ, M the means in rows (less m, if the target is "simplex"):

    - ``nc1`` = tr(Σ_W Σ_B⁺) / K and ``nc1_ratio`` = tr Σ_W / tr Σ_B: items have shrunk to their class mean. +∞ where
      all class means coincide; Σ_B⁺ drops directions in which they do not differ;
    - ``nc2``, ``nc2_weights``: | G/|G| - T/|T| | for the Gram matrices G = M Mᵀ and W Wᵀ: the angles and lengths;
    - ``nc3`` = | W/|W| - M/|M| |: classifier and means are one; ``nc3_product``: distance of W Mᵀ from its target;
    - ``nc4``: the share of items for which the classifier and the nearest class mean disagree.

    Target Gram T: "simplex" I - 11ᵀ/K (bias or centred features), "identity" (no bias, balanced squared error) or a
    diagonal for imbalanced classes: squared lengths ``(classes,)`` of means and weights alike, or ``(2, classes)`` of
    means, then weights; the product's target is then the root of their product. |·| are Frobenius norms: only
    proportions count. Float64 inside. A measure, not a loss: no gradient.

    Raises ``ValueError`` for features or weights that are not finite, labels outside 0 .. classes - 1, a class
    without items, and a target with negative values. Source: Papyan, Han & Donoho 2020, "Prevalence of Neural
    Collapse", section 3; ratio form: Tirer, Huang & Niles-Weed 2023, "Perturbation Analysis of Neural Collapse";
    targets without a bias: Dang et al. 2023, "Neural Collapse in Deep Linear Networks".
    """
    require_finite("features", features)
    require_finite("weights", weights)
    classes = len(weights)
    require_labels("labels", labels, classes)
    table, rows = features.detach().double(), weights.detach().double()
    member = _one_hot(labels, classes)
    sizes = member.sum(0)
    if readable(sizes) and not bool((sizes > 0).all()):
        raise ValueError(f"labels: expected items of every class, got none of {int((sizes == 0).sum())} classes")
    means = (member.mT @ table) / sizes.clamp_min(1)[:, None]
    inside = table - member @ means
    apart = means - means.mean(0)
    between = (apart * apart).sum()
    flat = torch.finfo(torch.float64).eps * (means * means).sum()  # what is left of equal means
    separate = between > 4 * flat
    # Σ_B⁺ = K Mᵀ (G⁺)² M with the Gram matrix G = M Mᵀ, so tr(Σ_W Σ_B⁺) / K is the mean of |G⁺ M (h - m_y)|².
    inverse = torch.linalg.pinv(apart @ apart.mT, hermitian=True, rtol=1e-13)
    nc1 = ((inside @ apart.mT @ inverse) ** 2).sum() / max(1, len(table))
    ratio = (inside * inside).sum() / max(1, len(table)) / (torch.where(separate, between, 1) / classes)
    ones = torch.ones(classes, dtype=torch.float64, device=table.device)
    if isinstance(target, str):
        shape = torch.diag(ones) - (1 / classes if target == "simplex" else 0)
        wanted = [shape, shape, shape]
    else:
        if readable(target) and not bool((target >= 0).all()):
            raise ValueError(f"target: expected squared lengths of at least 0, got {target.min().item()}")
        squares = target.double().expand(2, classes)
        wanted = [torch.diag(squares[0]), torch.diag(squares[1]), torch.diag((squares[0] * squares[1]).sqrt())]
    centred = apart if isinstance(target, str) and target == "simplex" else means
    logits = table @ rows.mT + (0 if bias is None else bias.detach().double())
    distance = (means * means).sum(-1) - 2 * (table @ means.mT)
    disagree = logits.argmax(-1) != torch.where(sizes > 0, distance, torch.inf).argmin(-1)
    measures = CollapseMeasures(
        torch.where(separate, nc1, torch.inf),
        torch.where(separate, ratio, torch.inf),
        _distance(centred @ centred.mT, wanted[0]),
        _distance(rows @ rows.mT, wanted[1]),
        torch.linalg.matrix_norm(_unit(rows) - _unit(centred)),
        _distance(rows @ centred.mT, wanted[2]),
        disagree.double().mean(),
    )
    return CollapseMeasures(*(value.to(features.dtype) for value in measures))
