"""Contrastive losses: each positive against a softmax over negatives, and what became of that idea.

Every loss returns one value per anchor whose mean over the batch is the loss. A batch of n pairs as in SimCLR is 2 n
rows with labels 0 .. n - 1, twice. Anchors without a positive or without a negative have value 0 and no gradient,
unless the docstring says otherwise.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from toolkit.checks import require_positive, require_range, typed
from toolkit.metric_learning.common import (
    Embeddings,
    Labels,
    PerAnchor,
    Scalar,
    masked_logsumexp,
    masked_mean,
    pair_masks,
    require_finite,
    shared,
)
from toolkit.metric_learning.pooled import pooled_softplus
from toolkit.metric_learning.similarities import Measure, cosine, normalise, precomputed

__all__ = [
    "MultiHead",
    "adaptive_multi_head",
    "hard_contrastive",
    "hopfield",
    "info_loob",
    "look",
    "mw",
    "nt_xent",
    "simple_contrastive",
    "sup_con",
]


@typed
def nt_xent(
    embeddings: Embeddings, labels: Labels, temperature: Scalar = 0.1, similarity: Measure = cosine
) -> PerAnchor:
    """Normalised temperature-scaled cross-entropy: mean over positive pairs (i, p) of -log softmax of s_ip.

    Per pair -s_ip/τ + log(e^(s_ip/τ) + Σ_n e^(s_in/τ)) with n over the negatives of i: the other positives of i are in
    no denominator. τ = ``temperature`` > 0; a distance d enters as s = -d. With labels 0 .. n - 1 twice this is SimCLR.
    Raises ``ValueError`` for τ ≤ 0 or values that are not finite.

    Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", equation 1; before that
    Sohn 2016 and van den Oord et al. 2018 (InfoNCE).
    """
    logits = _logits(embeddings, temperature, similarity)
    positives, negatives = pair_masks(labels)
    return _over_pairs(_info_nce(logits, negatives), positives)


@typed
def sup_con(
    embeddings: Embeddings, labels: Labels, temperature: Scalar = 0.1, similarity: Measure = cosine
) -> PerAnchor:
    """Supervised contrastive loss L_out: mean over the positives p of i of -log(e^(s_ip/τ) / Σ_{a≠i} e^(s_ia/τ)).

    All positives are in the denominator, so at best it is the log of their number: the batch of one class is not
    without gradient here. The mean is over the anchors that have a positive; the others have value 0. τ =
    ``temperature`` > 0; a distance d enters as s = -d. Raises ``ValueError`` for τ ≤ 0 or values that are not finite.

    Khosla et al. 2020, "Supervised Contrastive Learning", equation 2.
    """
    logits = _logits(embeddings, temperature, similarity)
    positives, _ = pair_masks(labels)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_p = logits.masked_fill(itself, torch.finfo(logits.dtype).min / 2).log_softmax(-1)
    return shared(-masked_mean(log_p, positives), positives.any(-1).sum())


@typed
def hard_contrastive(
    embeddings: Embeddings,
    labels: Labels,
    temperature: Scalar = 0.5,
    share: Scalar = 0.1,
    similarity: Measure = cosine,
) -> PerAnchor:
    """:func:`nt_xent` whose denominators hold the hardest negatives only: the top ``share`` of each anchor's.

    ``share`` in (0, 1] of n negatives are the ⌈share · n⌉ most similar ones, and those that tie with the last of them;
    which they are is a constant for the gradient. share = 1 is :func:`nt_xent`. A large temperature then no longer
    means that all negatives count alike. Raises ``ValueError`` for τ ≤ 0, a share out of range, or values that are not
    finite.

    Wang & Liu 2021, "Understanding the Behaviour of Contrastive Loss" (hard contrastive loss).
    """
    logits = _logits(embeddings, temperature, similarity)
    positives, negatives = pair_masks(labels)
    return _over_pairs(_info_nce(logits, _hardest(logits, negatives, share)), positives)


@typed
def simple_contrastive(
    embeddings: Embeddings, labels: Labels, weight: Scalar = 1.0, share: Scalar = 1.0, similarity: Measure = cosine
) -> PerAnchor:
    """Mean over positive pairs (i, p) of -s_ip + λ · mean_n s_in: what is left of InfoNCE as its temperature grows.

    n are the hardest ``share`` of the negatives of i as in :func:`hard_contrastive` (all by default), λ = ``weight``
    ≥ 0. For n negatives τ (L_NT-Xent - log(n + 1)) → n/(n + 1) of this at λ = 1 as τ → ∞: all negatives are pushed
    alike. The paper writes the sum of the negatives: its λ is ours over their number. Raises ``ValueError`` for a λ or
    share out of range, or values that are not finite.

    Wang & Liu 2021, "Understanding the Behaviour of Contrastive Loss" (simple and hard simple contrastive loss).
    """
    require_range("weight", weight, 0, math.inf)
    closeness = _logits(embeddings, 1.0, similarity)
    positives, negatives = pair_masks(labels)
    push = weight * masked_mean(closeness, _hardest(closeness, negatives, share))
    return _over_pairs(push[:, None] - closeness, positives & negatives.any(-1)[:, None], positives)


@typed
def mw(embeddings: Embeddings, labels: Labels, temperature: Scalar = 0.1, similarity: Measure = cosine) -> PerAnchor:
    """Every positive pair against every negative pair of the batch: mean of log(1 + exp((s⁻ - s⁺)/τ)).

    Unlike InfoNCE, which never compares two anchors, it asks for one threshold that serves all. The share of
    comparisons lost, 1 - AUC of the batch, is at most this loss / log 2 (Lemma 2). The paper prints the sum over the
    negatives; this is the mean. τ = ``temperature`` > 0; a distance d enters as s = -d. If the batch has no positive or
    no negative pair all values are 0. Time and memory O(batch²): the double sum is expanded in Chebyshev polynomials,
    exact to rounding while the similarities span less than 100 τ, and to about 1e-8 at 200 τ. Raises ``ValueError`` for
    τ ≤ 0 or values that are not finite.

    "Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval" (2025), equation 3.
    """
    logits = _logits(embeddings, temperature, similarity)
    positives, negatives = pair_masks(labels)
    against_all = pooled_softplus(logits, positives, negatives) / negatives.sum().clamp_min(1)
    return _over_pairs(against_all, positives)


@typed
def info_loob(
    embeddings: Embeddings,
    labels: Labels,
    temperature: Scalar = 0.1,
    beta: Scalar | None = None,
    similarity: Measure = cosine,
) -> PerAnchor:
    """InfoLOOB: mean over positive pairs (i, p) of -s_ip/τ + log Σ_n e^(s_in/τ), the positive left out of the sum.

    Per pair L_NT-Xent = log(1 + e^(L_InfoLOOB)): its pull on a positive does not fade as the pair is matched, and it
    has no lower bound. τ = ``temperature`` > 0. (CLOOB's code multiplies the loss by τ.)

    With ``beta`` > 0 it is CLOOB. The two modalities are played by views: among the examples of a label the first,
    third, ... in the batch are the image, the second, fourth, ... the text (labels 0 .. n - 1 twice: first half,
    second half). An anchor is compared with the other modality only, after both have been replaced by what
    :func:`hopfield` retrieves for them from the anchor's modality. The mean over both modalities is half of the paper's
    sum. Raises ``ValueError`` for τ or β ≤ 0, values that are not finite, or β with precomputed similarities.

    Fürst et al. 2022, "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP".
    """
    positives, negatives = pair_masks(labels)
    if beta is None:
        logits = _logits(embeddings, temperature, similarity)
    else:
        require_positive("beta", beta)
        if similarity is precomputed:
            raise ValueError("similarity: expected one of embeddings, which retrieval needs, got precomputed")
        require_finite("embeddings", embeddings)
        text = (torch.tril(labels[:, None] == labels, -1).sum(-1) % 2).bool()
        unit = normalise(embeddings)
        of_image, of_text = (
            _logits(hopfield(unit, unit, beta, stored), temperature, similarity) for stored in (~text, text)
        )
        logits = torch.where(text[:, None], of_text, of_image)
        across = text[:, None] != text
        positives, negatives = positives & across, negatives & across
    rest = masked_logsumexp(logits, negatives)
    return _over_pairs(rest[:, None] - logits, positives & negatives.any(-1)[:, None], positives)


@typed
def hopfield(
    state: Float[Tensor, "states dim"],
    stored: Float[Tensor, "patterns dim"],
    beta: Scalar = 8.0,
    keep: Bool[Tensor, "patterns"] | None = None,
) -> Float[Tensor, "states dim"]:
    """What a modern Hopfield network retrieves: normalise(softmax(β state · storedᵀ) · stored), one row per state.

    β = ``beta`` > 0: small averages over all stored patterns, large picks the nearest. Of the patterns only those where
    ``keep`` is true are stored (all by default). Raises ``ValueError`` for β ≤ 0 or values that are not finite.

    Ramsauer et al. 2021, "Hopfield Networks is All You Need"; normalised as in Fürst et al. 2022 (CLOOB).
    """
    require_positive("beta", beta)
    require_finite("state", state)
    require_finite("stored", stored)
    match = beta * (state @ stored.mT)
    if keep is not None:
        match = match.masked_fill(~keep, torch.finfo(match.dtype).min / 2)
    return normalise(match.softmax(-1) @ stored)


@typed
def look(
    embeddings: Embeddings,
    labels: Labels,
    neighbours: int = 10,
    temperature: Scalar = 0.1,
    similarity: Measure = cosine,
) -> PerAnchor:
    """Leave-one-out nearest-neighbour classification: -log of the share of the own class among the k nearest.

    L_i = -log(Σ_{j in N, same label} e^(s_ij/τ) / Σ_{j in N} e^(s_ij/τ)), N the k = ``neighbours`` examples of the
    batch most similar to i, i left out, those that tie with the last of them, and the nearest positive in any case.
    Which they are is a constant for the gradient. If all of N is of the own class the value and the gradient are 0:
    nothing pulls the modes of a class together. k ≥ batch - 1 is the soft-neighbour (NCA) loss. The mean is over the
    anchors that have a positive. Raises ``ValueError`` for τ ≤ 0, k < 1, or values that are not finite.

    A reading of Feng et al. 2022, "Rethinking Supervised Pre-training for Better Downstream Transferring" (LOOK): k, τ,
    the rule for an anchor without a positive among its neighbours, and the batch in place of the paper's memory queue
    are not confirmed by the paper's text.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours: expected a whole number of at least 1, got {neighbours}")
    logits = _logits(embeddings, temperature, similarity)
    positives, negatives = pair_masks(labels)
    lowest = torch.finfo(logits.dtype).min
    others = logits.detach().masked_fill(~(positives | negatives), lowest)
    last = others.topk(min(neighbours, len(labels)), -1).values[:, -1:]
    nearest = others.masked_fill(~positives, lowest).amax(-1, keepdim=True)
    own = masked_logsumexp(logits, positives & (others >= torch.minimum(last, nearest)))
    rest = masked_logsumexp(logits, negatives & (others >= last))
    found = positives.any(-1)
    return shared(torch.where(found, F.softplus(rest - torch.where(found, own, 0), threshold=40), 0), found.sum())


@typed
def adaptive_multi_head(
    embeddings: Float[Tensor, "batch heads dim"],
    labels: Labels,
    temperatures: Float[Tensor, "heads batch batch"],
    beta: Scalar = 0.1,
    similarity: Measure = cosine,
) -> PerAnchor:
    """Sum over heads of :func:`nt_xent` with logits s_ij / t_ij plus β · mean_ij((d/2) log t_ij + 1/t_ij).

    ``temperatures`` holds t > 0 of each head and pair, anchor first; the mean is over all pairs i ≠ j and d is ``dim``.
    The second term, of weight β = ``beta`` ≥ 0, comes from a Gaussian likelihood with variance t and is least at
    t = 2/d. :class:`MultiHead` makes both inputs. Raises ``ValueError`` for t ≤ 0, β < 0, or values not finite.

    Wang et al. 2024, "Adaptive Multi-head Contrastive Learning" (AMCL). The contrastive term is a reading: the public
    code has no negatives in it, and the printed loss was not at hand.
    """
    require_range("beta", beta, 0, math.inf)
    require_finite("embeddings", embeddings)
    require_positive("temperatures", temperatures)
    positives, negatives = pair_masks(labels)
    sign = similarity.excess(0.0, 1.0)
    closeness = torch.stack([sign * similarity(head) for head in embeddings.unbind(1)])
    pairs = _info_nce(closeness / temperatures, negatives).sum(0)
    spread = (embeddings.shape[-1] / 2 * temperatures.log() + 1 / temperatures).sum(0)
    return _over_pairs(pairs, positives) + beta * masked_mean(spread, positives | negatives)


class MultiHead(nn.Module):
    """An embedding net with several projection heads and a temperature for each pair and head (AMCL).

    ``model(x)`` gives ``(batch, heads · dim)``, the heads' unit vectors side by side, for retrieval: their cosine is
    the mean of the heads' cosines. ``model(x, pairs=True)`` gives ``(embeddings, temperatures)`` of shapes ``(batch,
    heads, dim)`` and ``(heads, batch, batch)`` for :func:`adaptive_multi_head`; ``return_features=True`` gives
    ``(model(x), net(x))``. Temperature of head h: low + (high - low) σ(MLP_h([z_i, z_j])), z unit vectors; memory
    O(batch² · hidden).

    Args:
        net: maps a batch to ``(batch, width)``, for instance an ``MLP`` with ``classes=width``.
        width: outputs of the net, that is inputs of the heads (each a ReLU and a linear map).
        heads: number of projection heads.
        dim: dimension of each head's embedding.
        hidden: width of the temperature MLPs.
        low, high: range of the temperatures, 0 < low < high.
    """

    def __init__(
        self,
        net: nn.Module,
        width: int,
        heads: int = 3,
        dim: int = 32,
        hidden: int = 32,
        low: float = 1e-5,
        high: float = 2.0,
    ):
        super().__init__()
        for name, value in {"width": width, "heads": heads, "dim": dim, "hidden": hidden}.items():
            if value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
        if not 0 < low < high:
            raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
        self.net, self.low, self.high = net, low, high
        self.heads = nn.ModuleList(nn.Linear(width, dim) for _ in range(heads))
        self.anchor = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(heads))  # together one layer on [z_i, z_j]
        self.other = nn.ModuleList(nn.Linear(dim, hidden, bias=False) for _ in range(heads))
        self.score = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(heads))

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False, pairs: bool = False):
        features = self.net(x) if key is None else self.net(x, key=key)
        unit = [normalise(head(features.relu())) for head in self.heads]
        if pairs:
            parts = zip(unit, self.anchor, self.other, self.score, strict=True)
            scores = [score((a(z)[:, None] + b(z)).relu())[..., 0] for z, a, b, score in parts]
            return torch.stack(unit, 1), self.low + (self.high - self.low) * torch.stack(scores).sigmoid()
        return (torch.cat(unit, 1), features) if return_features else torch.cat(unit, 1)


def _logits(embeddings: Tensor, temperature: Scalar, similarity: Measure) -> Tensor:
    """Similarities (or negative distances) of all pairs over the temperature."""
    require_finite("embeddings", embeddings)
    require_positive("temperature", temperature)
    return similarity(embeddings) * (similarity.excess(0.0, 1.0) / temperature)


def _info_nce(logits: Tensor, negatives: Tensor) -> Tensor:
    """-log(e^z_ij / (e^z_ij + Σ_n e^z_in)) of each pair (i, j); tables with any leading dimensions."""
    rest = masked_logsumexp(logits, negatives)
    return F.softplus(rest[..., None] - logits, threshold=40)


def _over_pairs(values: Tensor, counted: Tensor, positives: Tensor | None = None) -> Tensor:
    """Per anchor the sum of ``values`` where ``counted``, scaled so that the batch mean is the mean over positives."""
    totals = torch.where(counted, values, 0).sum(-1)
    return shared(totals, (counted if positives is None else positives).sum())


def _hardest(closeness: Tensor, negatives: Tensor, share: Scalar) -> Tensor:
    """Mask of the top ``share`` of each row's negatives, at least one, with those that tie with the last."""
    require_positive("share", share)
    require_range("share", share, 0, 1)
    count = (share * negatives.sum(-1, keepdim=True) - 1e-4).ceil().long().clamp(1, negatives.shape[-1])
    ranked = closeness.detach().masked_fill(~negatives, torch.finfo(closeness.dtype).min)
    ranked = ranked.sort(-1, descending=True).values
    return negatives & (closeness.detach() >= ranked.gather(1, count - 1))
