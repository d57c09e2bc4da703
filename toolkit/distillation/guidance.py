"""A net that does not train alone, led by the representations of another: layerwise CKA guidance."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import require_range, typed
from toolkit.fleet import Fleet, grid, train
from toolkit.fleet.members import Build
from toolkit.fleet.store import as_fields

__all__ = ["guide_layers", "layerwise_cka", "misalignment", "train_guided"]


def _unit(x: Tensor) -> Tensor:
    """Centred columns, all of it at Frobenius norm 1: deep nets' features may be too small to be squared twice."""
    x = x - x.mean(-2, keepdim=True)
    x = x / x.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x / x.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()


@typed
def layerwise_cka(
    target: Float[Tensor, "*#members batch width"], guide: Float[Tensor, "*#members batch guide_width"]
) -> Float[Tensor, "..."]:
    """Linear centred kernel alignment of two layers on one mini-batch: how similar they see the same examples.

    CKA = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) with centred columns and Frobenius norms, in [0, 1]: the cosine of the two centred
    Gram matrices. Rotation, shift and one scale for all features leave it as it is, so that widths need not agree.
    Independent features of width p still have about p / (batch - 1 + p): with few examples and wide layers there is
    little left to gain. A layer that does not vary has 0. Raises ``ValueError`` for fewer than 3 examples (two are
    always aligned). Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited".
    """
    if target.shape[-2] < 3:
        raise ValueError(f"target: expected at least 3 examples, got {target.shape[-2]}")
    x, y = _unit(target), _unit(guide)

    def size(product: Tensor) -> Tensor:
        return product.square().sum((-2, -1)).clamp_min(torch.finfo(product.dtype).tiny).sqrt()

    return (y.mT @ x).square().sum((-2, -1)) / (size(x.mT @ x) * size(y.mT @ y))


def guide_layers(guide: int, target: int) -> dict[int, int]:
    """Which layer of the guide leads which layer of the target: ``{target layer: guide layer}``, numbered from 0.

    Guide layer i of G leads target layer min(round(i (T - 1) / (G - 1)), T - 1), so that first meets first and last
    meets last; where the guide has more layers than the target, the later of those that meet the same one leads. Raises
    ``ValueError`` for fewer than 2 guide layers or no target layer. Source: the code of Subramaniam et al. 2024,
    "Training the Untrainable: Introducing Inductive Bias via Representational Alignment".
    """
    if guide < 2:
        raise ValueError(f"guide: expected at least 2 layers, got {guide}")
    if target < 1:
        raise ValueError(f"target: expected at least 1 layer, got {target}")
    return {min(round(i * (target - 1) / (guide - 1)), target - 1): i for i in range(guide)}


@typed
def misalignment(
    target: Sequence[Float[Tensor, "batch *_"]], guide: Sequence[Float[Tensor, "batch *_"]]
) -> Float[Tensor, ""]:
    """Σ (1 - :func:`layerwise_cka`) over the pairs of :func:`guide_layers`, activations flattened; one mini-batch.

    The guide's activations are constants: it is never changed. 0 where each led layer is its guide's up to rotation,
    shift and scale. Raises ``ValueError`` as those functions do. Source: Subramaniam et al. 2024, "Training the
    Untrainable: Introducing Inductive Bias via Representational Alignment".
    """
    pairs = guide_layers(len(guide), len(target)).items()
    return torch.stack([1 - layerwise_cka(target[t].flatten(1), guide[g].detach().flatten(1)) for t, g in pairs]).sum()


@typed
def train_guided(
    build: Build,
    data: Any,
    guide: Sequence[Float[Tensor, "examples *_"]],
    *,
    alphas: Sequence[float],
    seeds: int,
    until: float = 1.0,
    **options: Any,
) -> Fleet:
    """Train ``seeds`` nets per strength α: cross-entropy + α × :func:`misalignment` by a net's activations on ``data``.

    ``guide`` holds the layers of one frozen net, trained or as it was initialised, computed once for the examples of
    ``data`` (fields ``x`` and ``y``); rows in another order are the control that breaks the alignment. ``build`` makes
    nets with ``return_layers``, such as ``LayeredMLP``. Members are ordered as by ``grid(seeds, alpha=alphas)``;
    α = 0 is the net alone, and members of one seed share initial state and batches. Guidance stops at the share
    ``until`` of the training. ``options`` (``steps``, ``batch``, ...) go to :func:`toolkit.fleet.train`.

    Raises ``ValueError`` for negative strengths, ``until`` outside [0, 1], fewer than 2 guide layers or layers of other
    lengths than the data. Source: Subramaniam et al. 2024, "Training the Untrainable: Introducing Inductive Bias via
    Representational Alignment" (α = 1; that guidance may stop early is as we recall the paper).
    """
    fields = as_fields(data)
    require_range("alphas", min(alphas, default=0.0), 0, float("inf"))
    require_range("until", until, 0, 1)
    if wrong := [len(layer) for layer in guide if len(layer) != len(fields["x"])]:
        raise ValueError(f"guide: expected activations of {len(fields['x'])} examples, got {wrong[0]}")
    guide_layers(len(guide), 1)
    led = {f"guide_{i}": layer.detach() for i, layer in enumerate(guide)}

    def loss(model, batch, hyper):
        logits, layers = model(batch.x, return_layers=True)
        alpha = torch.where(batch.progress < until, hyper.alpha, 0)
        lead = misalignment(layers, [batch[name] for name in led])
        return F.cross_entropy(logits, batch.y, reduction="none") + alpha * lead

    return train(build, loss, fields | led, **grid(seeds, alpha=alphas), **options)
