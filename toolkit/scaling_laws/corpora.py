"""Byte corpora that need no network, and byte-level language models over widths, data sizes and seeds.

Two sources: a Markov chain of order 2 whose entropy is known exactly, and the names of Unicode 3.2, which Python keeps
unchanged in every version. Losses are in nats per byte throughout.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.schedules import linear, warmup
from toolkit.models import ByteTransformer

__all__ = [
    "ALPHABET",
    "ByteMLP",
    "ByteSweep",
    "MarkovSource",
    "byte_loss",
    "byte_sweep",
    "byte_transformer",
    "markov_source",
    "nats_per_byte",
    "sequences",
    "unicode_names",
    "windows",
]

ALPHABET = "\n -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # the bytes of unicode_names, in the order of their numbers
_NAMES_SHA256 = "ed37fef8051fddf454cedf9f4af417f90536e22f741f8822f2e7a77fbb57fe51"
_ALGORITHMIC = ("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLLABLE")  # names that are counted, not written
_SAME = 1e-15
_ROWS = 2048  # windows that are evaluated at a time


@dataclass(frozen=True, eq=False)
class MarkovSource:
    """A stationary source of order 2: ``transition[a, b, c]`` = p(next = c | the two before are a, b).

    ``stationary`` ``(symbols, symbols)`` is the frequency of each pair in an endless text: the fixed point of
    μ(b, c) = Σ_a μ(a, b) p(c | a, b). All in float64. Raises ``ValueError`` for another shape, values that are not
    positive, or rows that do not sum to 1.
    """

    transition: Tensor

    def __post_init__(self) -> None:
        p = self.transition
        if p.ndim != 3 or len(set(p.shape)) != 1 or p.dtype != torch.float64:
            raise ValueError(f"transition: expected float64 (s, s, s), got {p.dtype} of shape {tuple(p.shape)}")
        if not bool((p > 0).all()) or float((p.sum(-1) - 1).abs().max()) > 1e-12:
            raise ValueError("transition: expected positive probabilities in rows that sum to 1, got others")

    @property
    def symbols(self) -> int:
        return len(self.transition)

    @functools.cached_property
    def stationary(self) -> Tensor:
        pairs = torch.full_like(self.transition[0], self.symbols**-2)
        for _ in range(10_000):
            before, pairs = pairs, torch.einsum("ab,abc->bc", pairs, self.transition)
            if float((pairs - before).abs().max()) < _SAME:
                break
        return pairs / pairs.sum()

    @property
    def entropy_rate(self) -> float:
        """H = -Σ_ab μ(a, b) Σ_c p(c | a, b) ln p(c | a, b), nats per byte: no model has less loss on fresh text."""
        return float(-(self.stationary[..., None] * self.transition * self.transition.log()).sum())

    def sample(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """``rows`` independent texts ``(rows, length)``, int64, each from its first byte on in the stationary state."""
        if rows < 1 or length < 3:
            raise ValueError(f"length: expected at least 1 row of 3 bytes, got {rows} of {length}")
        size, chance = self.symbols, random.uniform(random.key(seed), (length, rows), torch.float64)
        first = torch.searchsorted(self.stationary.flatten().cumsum(0), chance[0]).clamp_max(size**2 - 1)
        text, steps = [first // size, first % size], self.transition.flatten(0, 1).cumsum(-1)
        for step in range(2, length):
            heights = steps[text[-2] * size + text[-1]]
            text.append((heights < chance[step, :, None]).sum(-1).clamp_max(size - 1))
        return torch.stack(text, 1)


@typed
def markov_source(symbols: int = 16, exponent: float = 1.0, spread: float = 2.0, seed: int = 0) -> MarkovSource:
    """p(c | a, b) ∝ (c + 1)^-exponent · exp(spread · g_abc) with independent normal g.

    The factor in c makes byte frequencies, and so those of the contexts (pairs), fall as a power of their rank: rare
    contexts go on being learnt as data grow. ``spread`` is how much a context tells; at 0 bytes are independent and
    the entropy is that of a Zipf law. An own construction in the spirit of Michaud et al. 2023, "The Quantization Model
    of Neural Scaling". Raises ``ValueError`` for fewer than 2 or more than 256 symbols, or negative arguments.
    """
    require_range("symbols", symbols, 2, 256)
    require_range("exponent", exponent, 0, math.inf)
    require_range("spread", spread, 0, 100)
    noise = random.normal(random.key(seed), (symbols,) * 3, torch.float64)
    ranks = torch.arange(1, symbols + 1, dtype=torch.float64)
    return MarkovSource((spread * noise - exponent * ranks.log()).softmax(-1))


@typed
def unicode_names(seed: int | None = 0) -> Int[Tensor, "length"]:
    """354,744 bytes of English: the 12,886 character names of Unicode 3.2, one on a line, as places in ``ALPHABET``.

    Python keeps that version (``unicodedata.ucd_3_2_0``) beside its current one for internet domain names, so the text
    is the same everywhere; a SHA-256 makes sure. Names that are only counted (ideographs, Hangul syllables) are left
    out. The lines are in random order, which ``seed`` picks (``None``: that of the code points), so that the end of
    the text can be held out: it has no line in common with the start. Raises ``RuntimeError`` if the text is another.
    """
    lines = _lines()
    order = range(len(lines)) if seed is None else random.permutation(random.key(seed), len(lines)).tolist()
    place = {letter: number for number, letter in enumerate(ALPHABET)}
    return torch.tensor([place[letter] for number in order for letter in lines[number]])


@functools.cache
def _lines() -> tuple[str, ...]:
    import unicodedata

    named = (unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(0x110000))
    lines = tuple(f"{name}\n" for name in named if name and not name.startswith(_ALGORITHMIC))
    found = hashlib.sha256("".join(lines).encode()).hexdigest()
    if found != _NAMES_SHA256:
        raise RuntimeError(f"unicodedata.ucd_3_2_0: expected names with SHA-256 {_NAMES_SHA256}, got {found}")
    return lines


@typed
def windows(text: Int[Tensor, "*rows length"], context: int) -> dict[str, Tensor]:
    """Every byte with the ``context`` bytes before it: ``x`` ``(n, context)``, ``y`` ``(n,)``, in the text's order.

    For a model of one next byte (:class:`ByteMLP`). Windows do not cross from one row of ``text`` to the next. Raises
    ``ValueError`` if a row is not longer than the context.
    """
    parts = _parts(text, context, 1)
    return {"x": parts[:, :-1].contiguous(), "y": parts[:, -1].contiguous()}


@typed
def sequences(text: Int[Tensor, "*rows length"], context: int) -> dict[str, Tensor]:
    """The text cut into pieces, each byte asked for once: ``x`` ``(n, context)`` and the next bytes ``y``, as long.

    For a model that answers at every position (:func:`byte_transformer`). What is left at a row's end is dropped.
    Raises ``ValueError`` if a row is not longer than the context.
    """
    parts = _parts(text, context, context)
    return {"x": parts[:, :-1].contiguous(), "y": parts[:, 1:].contiguous()}


def _parts(text: Tensor, context: int, step: int) -> Tensor:
    if context < 1 or text.shape[-1] <= context:
        raise ValueError(f"context: expected from 1 to {text.shape[-1] - 1} (length of a row - 1), got {context}")
    return text.unfold(-1, context + 1, step).reshape(-1, context + 1)


class ByteMLP(nn.Module):
    """The next byte from the ``context`` bytes before: embedded, one hidden ReLU layer, logits ``(batch, symbols)``.

    The model of Bengio et al. 2003, "A neural probabilistic language model", without its direct connections.
    ``model(x, key=key, rate=rate)`` drops hidden values at ``rate``, which may be a tensor: one rate for each member
    of a fleet, or one that changes with time. Raises ``ValueError`` for a size below 1.
    """

    def __init__(self, symbols: int, context: int, width: int, embed: int = 12):
        super().__init__()
        for name, value in (("symbols", symbols), ("context", context), ("width", width), ("embed", embed)):
            require_range(name, value, 1, math.inf)
        self.embed = nn.Embedding(symbols, embed)
        self.hidden = nn.Linear(context * embed, width)
        self.head = nn.Linear(width, symbols)
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, x: Tensor, key: Tensor | None = None, rate: float | Tensor = 0.0, return_features: bool = False):
        features = self.hidden(self.embed(x).flatten(1)).relu()
        if key is not None:
            features = random.dropout(features, rate, key)
        logits = self.head(features)
        return (logits, features) if return_features else logits


def byte_transformer(symbols: int, context: int, width: int) -> ByteTransformer:
    """The smallest setting that can copy from afar: two causal blocks, heads of 8 values.

    For :func:`sequences`. Raises ``ValueError`` unless ``width`` is a multiple of 8.
    """
    if width < 8 or width % 8:
        raise ValueError(f"width: expected a multiple of 8, got {width}")
    return ByteTransformer(context, symbols, width, depth=2, heads=width // 8)


@typed
def byte_loss(
    logits: Float[Tensor, "batch *length symbols"], y: Int[Tensor, "batch *length"]
) -> Float[Tensor, "batch"]:
    """-ln p(next byte), nats per byte, averaged over the positions where an example has several."""
    first = logits.movedim(-1, 0)  # classes first: sums then run over contiguous memory
    values = first.logsumexp(0) - first.gather(0, y[None])[0]
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def nats_per_byte(fleet: Fleet, data: dict[str, Tensor], rows: int = _ROWS) -> Tensor:
    """Mean loss of every member on all of ``data``, ``(members,)`` in float64; dropout is off.

    ``rows`` windows are held at a time. Raises ``ValueError`` for empty data.
    """
    if len(data["y"]) == 0:
        raise ValueError("data: expected at least one window, got none")
    total = torch.zeros(len(fleet), dtype=torch.float64, device=fleet.device)
    for x, y in zip(data["x"].split(rows), data["y"].split(rows), strict=True):
        values = fleet.evaluate(lambda model, batch, hyper: byte_loss(model(batch.x), batch.y), {"x": x, "y": y})
        total += values.double().sum(1)
    return total / len(data["y"])


@dataclass(frozen=True, eq=False)
class ByteSweep:
    """Held-out losses of models over widths, data sizes and seeds.

    - ``parameters`` ``(widths,)``: all trained numbers of a model, embeddings and biases counted.
    - ``tokens`` ``(sizes,)``: bytes that were predicted in training, each once if ``epochs`` is 1.
    - ``losses`` ``(widths, sizes, seeds)``: nats per byte on held-out text, float64.
    """

    widths: tuple[int, ...]
    parameters: Tensor
    tokens: Tensor
    losses: Tensor

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters, tokens and loss (mean over seeds) of every cell, each ``(widths · sizes,)`` in float64."""
        mean = self.losses.mean(2)
        size, tokens = self.parameters.double()[:, None], self.tokens.double()[None]
        return size.expand_as(mean).flatten(), tokens.expand_as(mean).flatten(), mean.flatten()


def byte_adam(lr: float, width: int) -> Adam:
    """Adam at ``lr`` · (16 / width)^½: one rate for all widths would bend the law of size."""
    return Adam(lr=lr * (16 / width) ** 0.5)


def require_total(total: int, batch: int, windows: int) -> None:
    """Raise ``ValueError`` unless ``total`` draws are whole batches and no more than there are ``windows``."""
    if total > windows or total % batch:
        raise ValueError(f"total: expected a multiple of {batch} (batch), at most {windows} windows, got {total}")


def byte_sweep(
    data: dict[str, Tensor],
    held_out: dict[str, Tensor],
    symbols: int,
    widths: Sequence[int] = (4, 8, 16, 32),
    sizes: Sequence[int] = (4096, 8192, 16384, 32768),
    seeds: int = 2,
    *,
    model: str = "mlp",
    epochs: float = 1,
    batch: int = 128,
    lr: float = 4e-2,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> ByteSweep:
    """Train every width on every data size: one fleet for each width, whose members are sizes and seeds.

    A member of size D sees D windows of ``data``, drawn at random once for each seed and nested: a larger size holds
    the smaller ones. It passes over them ``epochs`` times, with Adam, a warm-up of 5 % and a linear decay to 0. The
    learning rate is that of :func:`byte_adam`. ``model`` is
    ``"mlp"`` (:class:`ByteMLP` on :func:`windows`) or ``"transformer"`` (on :func:`sequences`); sizes count rows.

    Raises ``ValueError`` for fewer than two widths or sizes, sizes that do not rise, hold less than a batch or exceed
    the data, another model, or fewer than 1 seed.
    """
    n, context = data["x"].shape
    if len(widths) < 2 or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths: expected at least 2 that rise, got {tuple(widths)}")
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < batch or sizes[-1] > n:
        raise ValueError(f"sizes: expected at least 2 that rise from {batch} (batch) to {n} (data), got {tuple(sizes)}")
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if model not in ("mlp", "transformer"):
        raise ValueError(f"model: expected 'mlp' or 'transformer', got {model!r}")
    require_positive("lr", lr)
    streams = torch.arange(seeds).repeat(len(sizes))
    rank = random.permutation(random.fold_in(random.key(seed, 1), torch.arange(seeds)), n).argsort(1)
    subsets = (rank < torch.tensor(sizes)[:, None, None]).flatten(0, 1)
    losses, parameters = [], []
    for width in widths:
        fleet = train(
            functools.partial(ByteMLP if model == "mlp" else byte_transformer, symbols, context, width),
            plain_loss,
            {"x": data["x"], "y": data["y"]},
            subsets=subsets,
            streams=streams,
            epochs=epochs,
            batch=batch,
            optimiser=byte_adam(lr, width),
            schedule=warmup(0.05, linear()),
            seed=seed,
            device=device,
            progress=progress,
        )
        losses.append(nats_per_byte(fleet, held_out).view(len(sizes), seeds).cpu())
        parameters.append(fleet.layout.size)
    tokens = torch.tensor(sizes) * (data["y"][0].numel())
    return ByteSweep(tuple(widths), torch.tensor(parameters), tokens, torch.stack(losses))


def plain_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """:func:`byte_loss` as :func:`toolkit.fleet.train` calls it."""
    return byte_loss(model(batch.x), batch.y)
