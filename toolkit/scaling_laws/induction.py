"""Does a transformer copy? A block of bytes written twice, and the attention heads that look where it came before."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import typed
from toolkit.fleet import Fleet
from toolkit.models import ByteTransformer

__all__ = [
    "attention_maps",
    "copy_gain",
    "copy_test",
    "prefix_matching",
]


@typed
def copy_gain(nats: Float[Tensor, "batch positions"]) -> Float[Tensor, "batch"]:
    """Mean loss of the second copy of a block minus that of the first; negative if the model copies.

    ``nats`` holds the losses of bytes 1 .. 2m - 1 of a block of m bytes written twice. Compared are the same bytes,
    1 .. m - 1 of each copy. Source: Hernandez et al. 2022 (copying a paragraph). Raises ``ValueError`` for an even
    number of positions, or fewer than 3.
    """
    positions = nats.shape[1]
    if positions < 3 or positions % 2 == 0:
        raise ValueError(f"nats: expected 2m - 1 positions for a block of m >= 2 bytes, got {positions}")
    m = (positions + 1) // 2
    return nats[:, m:].mean(1) - nats[:, : m - 1].mean(1)


def copy_test(fleet: Fleet, blocks: Tensor) -> Tensor:
    """:func:`copy_gain` of byte transformers on ``blocks`` ``(n, m)``, each written twice: mean for each member.

    Raises ``ValueError`` for blocks of fewer than 2 bytes. Source: Hernandez et al. 2022, "Scaling Laws and
    Interpretability of Learning from Repeated Data" (copying a paragraph).
    """
    if blocks.ndim != 2 or blocks.shape[1] < 2:
        raise ValueError(f"blocks: expected (n, m) with m of at least 2, got {tuple(blocks.shape)}")
    text = torch.cat([blocks, blocks], 1)

    def gain(model: Any, batch: Any, hyper: Any) -> Tensor:
        logits = model(batch.x)
        values = logits.logsumexp(-1) - logits.gather(-1, batch.y[..., None])[..., 0]
        return copy_gain(values).mean()

    return fleet.evaluate(gain, {"x": text[:, :-1], "y": text[:, 1:]}, chunk=4)


@typed
def prefix_matching(attention: Float[Tensor, "*heads length length"]) -> Float[Tensor, "*heads"]:
    """How much each head looks, from the second copy of a block of m bytes, at the byte after the same place before.

    The mean over positions i = m .. 2m - 1 of the attention from i to i - m + 1 (Olsson et al. 2022, "In-context
    Learning and Induction Heads"): 1 for a perfect induction head, mean 1/(i + 1) if attention is uniform. Raises
    ``ValueError`` for an odd length.
    """
    length = attention.shape[-1]
    if length < 2 or length % 2:
        raise ValueError(f"attention: expected an even length (a block twice), got {length}")
    m = length // 2
    return attention.diagonal(1 - m, -2, -1)[..., 1:].mean(-1) if m > 1 else attention[..., 1, 1]


def attention_maps(model: ByteTransformer, x: Tensor) -> Tensor:
    """Attention ``(depth, batch, heads, length, length)`` of one model (``fleet[i]``): rows look at columns."""
    maps: list[Tensor] = []
    with torch.no_grad():
        h = model.embed(x) + model.position.weight[: x.shape[1]]
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in cast(list[Any], model.blocks):
            parts = block.qkv(block.norm1(h)).view(*x.shape, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
            scores = parts[0] @ parts[1].mT * parts.shape[-1] ** -0.5
            maps.append(scores.masked_fill(future, float("-inf")).softmax(-1))
            h = block(h)
    return torch.stack(maps)
