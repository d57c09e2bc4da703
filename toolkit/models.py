"""Small networks. Each maps a batch to logits, can return its penultimate features, and is a plain ``nn.Module``.

The calling convention is the same everywhere: ``model(x)`` gives logits ``(batch, classes)``;
``model(x, return_features=True)`` gives ``(logits, features)`` with ``logits = model.head(features)``;
``model(x, key=key)`` switches dropout on, with masks that depend only on the key (see :mod:`toolkit.random`).
There is no train or eval mode: a model is a pure function of its parameters, its input and the key.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.random import dropout, fold_in

__all__ = ["MLP", "ByteTransformer", "ConvNet", "PatchMixer"]


def _output(model: Any, features: Tensor, return_features: bool) -> Tensor | tuple[Tensor, Tensor]:
    logits = model.head(features)
    return (logits, features) if return_features else logits


def _check_rate(rate: float) -> float:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: expected a rate in [0, 1), got {rate}")
    return rate


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")


class MLP(nn.Module):
    """Fully connected ReLU net: x is flattened, then ``hidden`` layers, then a linear head.

    Args:
        inputs: number of input values per example, for instance 64 for 8×8 digits.
        hidden: widths of the hidden layers, for instance ``(64,)``; empty for a linear model.
        classes: number of logits (of coordinates, where the net makes embeddings).
        dropout: rate used after each hidden layer when the model is called with a ``key``.
        proxies: rows of a table ``proxies`` ``(proxies, classes)`` that is learnt along with the net: points among
            the embeddings, for losses that compare with one point for each class. Such losses look at directions;
            at a length of about 0.1 the points turn faster than the net at the same learning rate, as they should.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], classes: int, dropout: float = 0.0, proxies: int | None = None
    ):
        super().__init__()
        _check_sizes(inputs=inputs, classes=classes, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        widths = [inputs, *hidden]
        self.inputs, self.dropout = inputs, _check_rate(dropout)
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.head = nn.Linear(widths[-1], classes)
        if proxies is not None:
            _check_sizes(proxies=proxies)
            self.proxies = nn.Parameter(torch.randn(proxies, classes) * 0.1 * classes**-0.5)

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False):
        x = x.flatten(1)
        if x.shape[1] != self.inputs:
            raise ValueError(f"x: expected {self.inputs} values per example, got {x.shape[1]}")
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            if key is not None and self.dropout:
                x = dropout(x, self.dropout, fold_in(key, i))
        return _output(self, x, return_features)


class ConvNet(nn.Module):
    """Two 3×3 convolutions (the second with stride 2), average pooling to 2×2, one hidden layer and a linear head.

    Args:
        channels: channels of the input image (1 for grey).
        widths: channels of the two convolutions.
        classes: number of logits.
        dropout: rate on the features when the model is called with a ``key``.
    """

    def __init__(self, channels: int = 1, widths: tuple[int, int] = (8, 16), classes: int = 10, dropout: float = 0.0):
        super().__init__()
        _check_sizes(channels=channels, classes=classes, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        self.channels, self.dropout = channels, _check_rate(dropout)
        self.convolution1 = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.convolution2 = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1)
        self.mix = nn.Linear(widths[1] * 4, widths[1] * 4)
        self.head = nn.Linear(widths[1] * 4, classes)

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False):
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected images (batch, {self.channels}, height, width), got shape {tuple(x.shape)}")
        x = self.convolution1(x).relu()
        x = self.convolution2(x).relu()
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        x = self.mix(x).relu()
        if key is not None and self.dropout:
            x = dropout(x, self.dropout, key)
        return _output(self, x, return_features)


class _MixerBlock(nn.Module):
    def __init__(self, patches: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens1, self.tokens2 = nn.Linear(patches, 2 * patches), nn.Linear(2 * patches, patches)
        self.channels1, self.channels2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens2(F.gelu(self.tokens1(self.norm1(x).mT))).mT
        return x + self.channels2(F.gelu(self.channels1(self.norm2(x))))


class PatchMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021): patches are tokens; blocks mix over tokens, then over channels.

    Args:
        size: height and width of the (square) image in pixels, a multiple of ``patch``.
        patch: height and width of a patch in pixels.
        channels: channels of the input image.
        width: channels of a token.
        depth: number of blocks.
        classes: number of logits.
        dropout: rate on the pooled features when the model is called with a ``key``.
    """

    def __init__(
        self,
        size: int,
        patch: int = 4,
        channels: int = 1,
        width: int = 32,
        depth: int = 2,
        classes: int = 10,
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_sizes(size=size, patch=patch, channels=channels, width=width, depth=depth, classes=classes)
        if size % patch:
            raise ValueError(f"patch: expected a divisor of size {size}, got {patch}")
        self.size, self.patch, self.channels, self.dropout = size, patch, channels, _check_rate(dropout)
        self.embed = nn.Linear(channels * patch * patch, width)
        self.blocks = nn.ModuleList(_MixerBlock((size // patch) ** 2, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False):
        if x.shape[1:] != (self.channels, self.size, self.size):
            expected = f"(batch, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"x: expected images {expected}, got shape {tuple(x.shape)}")
        patches = x.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        x = self.embed(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).mean(1)
        if key is not None and self.dropout:
            x = dropout(x, self.dropout, key)
        return _output(self, x, return_features)


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteTransformer(nn.Module):
    """Causal pre-norm transformer over bytes: from ``(batch, length)`` int64 to logits ``(batch, length, symbols)``.

    The logits at position t depend on the bytes 0 .. t only. Features have shape ``(batch, length, width)``.

    Args:
        length: longest sequence, in bytes.
        symbols: alphabet size (256 for bytes).
        width: model width, a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        dropout: rate on the final features when the model is called with a ``key``.
    """

    def __init__(
        self, length: int, symbols: int = 256, width: int = 32, depth: int = 2, heads: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        _check_sizes(length=length, symbols=symbols, width=width, depth=depth, heads=heads)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        self.length, self.dropout = length, _check_rate(dropout)
        self.embed, self.position = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False):
        if x.ndim != 2 or x.shape[1] > self.length:
            raise ValueError(f"x: expected bytes (batch, length <= {self.length}), got shape {tuple(x.shape)}")
        x = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if key is not None and self.dropout:
            x = dropout(x, self.dropout, key)
        return _output(self, x, return_features)
