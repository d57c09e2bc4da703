"""What the losses share: which pairs are positive and negative, and sums over some of them."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.checks import readable, typed

Scalar = float | int | Float[Tensor, ""]
Embeddings = Float[Tensor, "batch dim"]
Labels = Int[Tensor, "batch"]
PerAnchor = Float[Tensor, "batch"]


def require_finite(name: str, values: Tensor) -> None:
    """Raise ``ValueError`` if ``values`` hold NaN or infinity (nothing where they cannot be read)."""
    if readable(values) and not bool(values.detach().sum().isfinite()) and not bool(values.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got {int((~values.isfinite()).sum())} that are not")


@typed
def pair_masks(labels: Int[Tensor, "batch"]) -> tuple[Bool[Tensor, "batch batch"], Bool[Tensor, "batch batch"]]:
    """Positives (same label, another example) and negatives (another label) of each anchor, one row each."""
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same


def masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """log Σ exp over the last dimension where ``mask`` is true.

    Where it is true nowhere: about the lowest finite number, with gradient 0, so that ``softplus`` and ``exp`` of it
    are 0 and nothing is NaN.
    """
    number = torch.finfo(values.dtype)
    values = values.masked_fill(~mask, number.min / 2)
    top = values.detach().amax(-1, keepdim=True)
    floor = math.log(number.tiny) / 2  # less than that adds nothing, and exp of what underflows is ten times slower
    return (values - top).clamp_min(floor).exp().sum(-1).log() + top[..., 0]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension where ``mask`` is true; 0 where it is true nowhere."""
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp_min(1)


def shared(totals: Tensor, count: Tensor) -> Tensor:
    """Values per anchor ``(batch,)`` whose mean is Σ totals / count: for losses averaged over pairs, not over anchors.

    0 when ``count`` is 0.
    """
    return totals * len(totals) / count.clamp_min(1)
