"""How many bits of knowledge a language model stores: made-up people, what the model knows of them, and rounding.

Allen-Zhu & Li 2024, "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws".
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import readable, require_range, typed
from toolkit.fleet import Fleet
from toolkit.scaling_laws.constants import Number, as_like

__all__ = ["Biographies", "Stored", "biographies", "biography_loss", "knowledge", "quantised", "stored_bits"]

_MOST_NAMES = 1 << 22


@dataclass(frozen=True, eq=False)
class Biographies:
    """People as rows of symbols: a start symbol, the letters of the name, then the values of the attributes in order.

    - ``symbols``: int64 ``(people, 1 + letters + attributes · chunks)``; the start symbol is ``alphabet_size`` - 1.
    - ``letters``, ``alphabet``: a name is ``letters`` symbols below ``alphabet``: alphabet^letters names are possible.
    - ``attributes``, ``chunks``, ``values``: each attribute is ``chunks`` symbols, each one of ``values``.
    """

    symbols: Tensor
    letters: int
    alphabet: int
    attributes: int
    chunks: int
    values: int

    @property
    def alphabet_size(self) -> int:
        """Symbols in all, with the one that starts a row."""
        return max(self.alphabet, self.values) + 1

    @property
    def names(self) -> int:
        """N0, the number of possible names."""
        return self.alphabet**self.letters

    def __len__(self) -> int:
        return len(self.symbols)

    def as_dict(self) -> dict[str, Tensor]:
        """The field ``x`` for :func:`toolkit.fleet.train`."""
        return {"x": self.symbols}

    def shuffled(self, seed: int) -> "Biographies":
        """The same people with each attribute's values dealt out among them anew."""
        order = random.permutation(random.fold_in(random.key(seed), torch.arange(self.attributes)), len(self))
        parts = [self.symbols[:, : 1 + self.letters]]
        for i, row in enumerate(order):
            first = 1 + self.letters + i * self.chunks
            parts.append(self.symbols[row, first : first + self.chunks])
        return replace(self, symbols=torch.cat(parts, 1))


def biographies(
    people: int, seed: int, attributes: int = 4, values: int = 32, chunks: int = 1, letters: int = 4, alphabet: int = 32
) -> Biographies:
    """``people`` with different names, drawn at random from alphabet^letters, and uniform values of each attribute.

    More people with the same seed only append. Raises ``ValueError`` for sizes below 1 (``values`` and ``alphabet``
    below 2), more people than names, or more than 2²² possible names. Source: the data set bioD of Allen-Zhu & Li 2024,
    "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws", with values of one symbol each (their
    length L = 1, and all symbols used), so that there is no dictionary of values to be learnt.
    """
    sizes = {"people": (people, 1), "attributes": (attributes, 1), "chunks": (chunks, 1), "letters": (letters, 1)}
    for name, (value, least) in (sizes | {"values": (values, 2), "alphabet": (alphabet, 2)}).items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    names = alphabet**letters
    if not people <= names <= _MOST_NAMES:
        raise ValueError(f"letters: expected from {people} (people) to {_MOST_NAMES} names, got {names}")
    drawn = random.permutation(random.key(seed, 0), names)[:people]
    spelt = [drawn // alphabet**i % alphabet for i in reversed(range(letters))]
    facts = random.bits(random.key(seed, 1), (people, attributes * chunks)) % values
    start = torch.full_like(drawn, max(alphabet, values))
    symbols = torch.cat([torch.stack([start, *spelt], 1), facts], 1)
    return Biographies(symbols, letters, alphabet, attributes, chunks, values)


def biography_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """Mean cross-entropy (nats a symbol) ``(batch,)`` of each person's row, every symbol from those before it.

    For models that map symbols ``(batch, length)`` to logits ``(batch, length, symbols)``, as ``ByteTransformer``.
    """
    return _nats(model, batch.x).mean(1)


def _nats(model: Any, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none")


class Stored(NamedTuple):
    """Bits, a lower bound on what is stored: of names, of values, and the most that the same people could give."""

    names: Tensor
    values: Tensor
    most: Tensor

    @property
    def total(self) -> Tensor:
        """Names and values together, each counted as at least 0."""
        return self.names.clamp_min(0) + self.values.clamp_min(0)


@typed
def stored_bits(
    name_nats: Float[Tensor, "*#members"],
    value_nats: Float[Tensor, "*#members"],
    *,
    people: Number,
    names: Number,
    attributes: Number,
    values: Number,
    chunks: Number = 1,
) -> Stored:
    """Bits of knowledge N log₂(N0 / e^p1) + N K log₂(D^C / e^p2), as the parts of names and of values.

    p1 = ``name_nats`` is the mean cross-entropy of a whole name, p2 = ``value_nats`` that of one attribute's C
    ``chunks`` given the name, both in nats; N ``people``, N0 ``names``, K ``attributes``, D ``values``. A model that
    knows nothing (p1 = ln N0, p2 = C ln D) has 0 bits, a table of the people (p1 = ln N, p2 = 0) has the most,
    N log₂(N0 / N) + N K C log₂ D. Parts below 0 (confidently wrong) are given as they are. Numbers and tensors
    broadcast; safe under ``torch.vmap``. Raises ``ValueError`` for counts below 1, fewer than 2 values, more people
    than names, or negative nats. Source: Allen-Zhu & Li 2024, "Physics of Language Models: Part 3.3, Knowledge Capacity
    Scaling Laws" (the formula is a reading; the term for a dictionary of values is left out, as the values here are
    single symbols).
    """
    like = name_nats + value_nats
    zero = torch.zeros((), dtype=torch.float64, device=like.device)
    n, pool, k, kinds, parts = (as_like(value, zero).to(zero) for value in (people, names, attributes, values, chunks))
    for name, value, least in (
        ("people", n, 1),
        ("names", pool, 1),
        ("attributes", k, 1),
        ("values", kinds, 2),
        ("chunks", parts, 1),
        ("name_nats", name_nats, 0),
        ("value_nats", value_nats, 0),
    ):
        require_range(name, value.amin(), least, math.inf)
    if readable(n) and readable(pool) and bool((n > pool).any()):
        raise ValueError(f"people: expected at most as many as names, got {people} and {names}")
    told = n * k * parts * kinds.log2()
    return Stored(
        (n * pool.log2() - n * name_nats / math.log(2)).to(like),
        (told - n * k * value_nats / math.log(2)).to(like),
        (n * (pool.log2() - n.log2()) + told + zero * like).to(like),
    )


def knowledge(trained: Fleet, people: Biographies, known: Bool[Tensor, "members people"] | None = None) -> Stored:
    """What each member stores of the people it has seen: :func:`stored_bits` of its cross-entropies, ``(members,)``.

    ``known`` says whom each member was trained on (its ``subsets``; default: all). Divide by the number of parameters,
    ``fleet.layout.size``, for the capacity ratio; embeddings count (as in the paper: a reading). As distinct names have
    a mean of at least ln N nats under any model, no ratio exceeds that of ``most``. Raises ``ValueError`` for a mask of
    another shape or a member that knows nobody. Source: Allen-Zhu & Li 2024, "Physics of Language Models: Part 3.3,
    Knowledge Capacity Scaling Laws": about 2 bits a parameter after 1,000 exposures, about 1 (a reading) after 100.
    """
    shape = (len(trained), len(people))
    seen = torch.ones(shape, dtype=torch.bool) if known is None else known
    if seen.shape != shape or not bool(seen.any(1).all()):
        raise ValueError(f"known: expected a mask {shape} with somebody in each row, got {tuple(seen.shape)}")
    seen = seen.to(trained.device)
    nats = trained.evaluate(lambda model, batch, hyper: _nats(model, batch.x), people).double()
    share = (seen / seen.sum(1, keepdim=True, dtype=torch.float64))[:, None]
    means = (share @ nats)[:, 0]
    return stored_bits(
        means[:, : people.letters].sum(1),
        means[:, people.letters :].sum(1) / people.attributes,
        people=seen.sum(1),
        names=people.names,
        attributes=people.attributes,
        values=people.values,
        chunks=people.chunks,
    )


def quantised(trained: Fleet, bits: int) -> Fleet:
    """The fleet with every matrix W rounded to the nearest of 2^bits - 1 levels s · {-q, ..., q}, q = 2^(bits-1) - 1.

    s = max|W| / q, one for each matrix of each member; vectors (biases, norms) stay as they are. Raises ``ValueError``
    for fewer than 2 or more than 16 bits. Source: the int8 and int4 models of Allen-Zhu & Li 2024, "Physics of Language
    Models: Part 3.3, Knowledge Capacity Scaling Laws" (there with another quantiser; plain rounding is a reading).
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits: expected from 2 to 16, got {bits}")
    top = 2 ** (bits - 1) - 1
    parts = []
    for view in trained.layout.views(trained.parameters).values():
        flat = view.flatten(1)
        if view.ndim > 2:
            unit = flat.abs().amax(1, keepdim=True) / top
            flat = (flat / torch.where(unit > 0, unit, 1)).round().clamp(-top, top) * unit
        parts.append(flat)
    return replace(trained, parameters=torch.cat(parts, 1), state={}, snapshots={})
