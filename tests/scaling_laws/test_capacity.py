"""Bits against tables and models that know everything or nothing; a small transformer that learns some people."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from law_cases import check_derivatives, check_vmap
from torch import nn

from toolkit.fleet import Adam, Fleet, train
from toolkit.models import ByteTransformer
from toolkit.scaling_laws.capacity import (
    biographies,
    biography_loss,
    knowledge,
    quantised,
    stored_bits,
)

PEOPLE = biographies(24, seed=1, attributes=3, values=5, chunks=2, letters=3, alphabet=6)
LN2 = math.log(2)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Table(nn.Module):
    """Reads the answer off the whole list of people; ``sharpness`` 0 is a uniform model of names and values."""

    def __init__(self, people=PEOPLE, sharpness=0.0):
        super().__init__()
        self.scale = nn.Parameter(number(sharpness))
        self.people = people

    def forward(self, x):
        symbols = self.people.symbols
        length = x.shape[1]
        same = (x[:, None] == symbols[None, :, :length]).long().cumprod(-1)
        after = torch.nn.functional.one_hot(symbols[:, 1 : length + 1], self.people.alphabet_size)
        counts = torch.einsum("bpt,pts->bts", same.double(), after.double())
        place = torch.arange(length)[:, None]
        size = torch.where(place < self.people.letters, self.people.alphabet, self.people.values)
        allowed = torch.arange(self.people.alphabet_size) < size
        flat = torch.where(allowed, 0.0, -1e9)
        table = counts.clamp_min(1e-300).log().clamp_min(-1e3)
        return flat + self.scale * table


def test_people_are_as_described():
    symbols = PEOPLE.symbols
    assert symbols.shape == (24, 10)
    assert bool((symbols[:, 0] == 6).all())
    assert PEOPLE.alphabet_size == 7
    assert PEOPLE.names == 216
    assert len(symbols[:, 1:4].unique(dim=0)) == 24
    assert symbols[:, 1:4].max() == 5
    assert symbols[:, 4:].max() == 4
    more = biographies(50, seed=1, attributes=3, values=5, chunks=2, letters=3, alphabet=6)
    assert torch.equal(more.symbols[:24], symbols)
    everybody = biographies(8, seed=2, attributes=1, letters=3, alphabet=2)
    assert len(everybody.symbols[:, 1:4].unique(dim=0)) == 8
    mixed = PEOPLE.shuffled(3).symbols
    assert torch.equal(mixed[:, :4], symbols[:, :4])
    assert not torch.equal(mixed, symbols)
    for first in (4, 6, 8):
        pairs = [sorted(s[:, first : first + 2].tolist()) for s in (mixed, symbols)]
        assert pairs[0] == pairs[1]
    large = biographies(20000, seed=4)
    shares = large.symbols[:, 5:].flatten().bincount() / 80000
    torch.testing.assert_close(shares, torch.full((32,), 1 / 32), rtol=0, atol=0.004)


def test_bits_of_nothing_and_of_a_table():
    for model, expected in ((Table(), (0.0, 0.0)), (Table(sharpness=1.0), (24 * math.log2(9), 144 * math.log2(5)))):
        fleet = Fleet.of([model], lambda: Table())
        found = knowledge(fleet, PEOPLE)
        assert found.names.item() == pytest.approx(expected[0], abs=1e-6)
        assert found.values.item() == pytest.approx(expected[1], abs=1e-6)
        assert found.most.item() == pytest.approx(24 * math.log2(9) + 144 * math.log2(5), abs=1e-9)
    assert found.total.item() == pytest.approx(found.most.item(), abs=1e-6)


def test_bits_of_those_who_are_known():
    known = torch.zeros(2, 24, dtype=torch.bool)
    known[0, :5], known[1] = True, True
    found = knowledge(Fleet.of([Table(sharpness=1.0)] * 2, lambda: Table()), PEOPLE, known)
    assert found.values.tolist() == pytest.approx([30 * math.log2(5), 144 * math.log2(5)], abs=1e-6)
    assert found.most[0].item() == pytest.approx(5 * math.log2(216 / 5) + 30 * math.log2(5), abs=1e-9)
    assert found.names[0] < 5 * math.log2(216 / 5)  # it spends probability on those it was not asked about


FACTS: dict[str, Any] = {"people": 1000, "names": 2**20, "attributes": 4, "values": 32, "chunks": 2}


def test_bits_of_guessing_and_of_perfect_memory():
    guess = stored_bits(number(math.log(2**20)), number(2 * math.log(32)), **FACTS)
    assert guess.names.item() == pytest.approx(0, abs=1e-9)
    assert guess.values.item() == pytest.approx(0, abs=1e-9)
    perfect = stored_bits(number(math.log(1000)), number(0.0), **FACTS)
    assert perfect.names.item() == pytest.approx(1000 * math.log2(2**20 / 1000))
    assert perfect.values.item() == pytest.approx(1000 * 4 * 2 * 5)
    for found in (guess, perfect):
        assert found.most.item() == pytest.approx((perfect.names + perfect.values).item())
    worse = stored_bits(number(math.log(1000)), number(2 * math.log(32) + 1), **FACTS)
    assert worse.values.item() == pytest.approx(-4000 / LN2)  # affine, -N K / ln 2 per nat
    assert worse.total.item() == pytest.approx(perfect.names.item())


def test_bits_of_a_biography():
    """A person is one of 400 · 400 · 1000 names with 47.59 bits of facts; a name alone is 27.25 bits."""
    names, zero = 400 * 400 * 1000, number(0.0)
    options: dict[str, Any] = {"attributes": 1, "values": 2 * (12 * 28 * 200) * 200 * 300 * 100 * 263}
    assert stored_bits(zero, zero, people=1, names=names, **options).most.item() == pytest.approx(74.84, abs=0.01)
    everybody = stored_bits(zero, zero, people=names, names=names, **options)
    assert everybody.most.item() / names == pytest.approx(47.59, abs=5e-3)


def test_bits_are_affine_and_additive():
    options: dict[str, Any] = {"people": 50, "names": 1000, "values": 8}
    base = stored_bits(number(3.0), number(1.0), attributes=4, **options)
    more = stored_bits(number(3.5), number(1.2), attributes=4, **options)
    assert (more.names - base.names).item() == pytest.approx(-50 * 0.5 / LN2, abs=1e-9)
    assert (more.values - base.values).item() == pytest.approx(-50 * 4 * 0.2 / LN2, abs=1e-9)
    parts = [stored_bits(number(3.0), number(p), attributes=1, **options).values for p in (0.4, 1.0, 1.0, 1.6)]
    assert torch.stack(parts).sum().item() == pytest.approx(base.values.item(), abs=1e-9)
    published = stored_bits(number(0.0), number(0.0), people=1, names=400 * 400 * 1000, attributes=1, values=2)
    assert published.names.item() == pytest.approx(27.25, abs=5e-3)


BITS: tuple[Any, Any, Any] = (
    lambda law, p: sum(stored_bits(p, p / 3, people=law[0], names=law[1], attributes=law[2], values=law[3])),
    (1000.0, 2.0**20, 3.0, 32.0),
    (torch.tensor([3.0, 7.0], dtype=torch.float64),),
)


def test_bits_as_a_law_of_their_counts():
    check_derivatives(*BITS)
    check_vmap(*BITS)


def build():
    return ByteTransformer(7, 17, width=16, depth=1)


SMALL = biographies(48, seed=5, attributes=4, values=16, letters=3, alphabet=16)


@cache
def learned() -> tuple[Fleet, torch.Tensor]:
    known = torch.arange(48) < torch.tensor([[12], [48]])
    options: dict[str, Any] = {"batch": 24, "optimiser": Adam(lr=1e-2), "progress": False, "device": "cpu"}
    return train(build, biography_loss, SMALL, steps=400, subsets=known, **options), known


def test_a_small_transformer_learns_and_never_more_than_all():
    fleet, known = learned()
    found = knowledge(fleet, SMALL, known)
    assert bool((found.total <= found.most).all())
    assert found.total[0] > 0.95 * found.most[0]
    assert found.total[1] > 0.6 * found.most[1]
    assert found.total[1] > found.total[0]
    before = train(build, biography_loss, SMALL, steps=0, members=2, progress=False, device="cpu")
    assert bool((knowledge(before, SMALL, known).total < 0.1 * found.most).all())
    dealt = knowledge(fleet, SMALL.shuffled(6), known)
    assert bool((dealt.values < 0).all())
    torch.testing.assert_close(dealt.names, found.names)
    torch.testing.assert_close(dealt.total, dealt.names.clamp_min(0))


def test_rounding_is_to_the_nearest_level_of_each_matrix():
    fleet, known = learned()
    for bits, levels in ((8, 255), (4, 15), (2, 3)):
        rounded = quantised(fleet, bits)
        before, after = (f.layout.views(f.parameters) for f in (fleet, rounded))
        for name, view in after.items():
            if view.ndim == 2:
                assert torch.equal(view, before[name])
                continue
            for member in range(2):
                old, new = before[name][member], view[member]
                unit = old.abs().max() / (levels // 2)
                assert len(new.unique()) <= levels
                assert (new - old).abs().max() <= unit / 2 * 1.0001
                torch.testing.assert_close(new / unit, (new / unit).round(), rtol=0, atol=1e-3)
    bits8, bits2 = (knowledge(quantised(fleet, b), SMALL, known).total for b in (8, 2))
    full = knowledge(fleet, SMALL, known).total
    assert bool((bits8 > 0.98 * full).all())
    assert bool((bits2 < 0.5 * full).all())


def test_rounding_of_zeros():
    zero = Fleet(build, torch.zeros(1, Fleet.of([build()], build).layout.size))
    assert torch.equal(quantised(zero, 8).parameters, zero.parameters)


def test_bad_input():
    for name, options in (("people", {"people": 0}), ("values", {"values": 1}), ("letters", {"letters": 0})):
        with pytest.raises(ValueError, match=name):
            biographies(**{"people": 5, "seed": 0} | options)
    with pytest.raises(ValueError, match="letters"):
        biographies(9, seed=0, letters=3, alphabet=2)
    with pytest.raises(ValueError, match="letters"):
        biographies(9, seed=0, letters=8)
    wrong: tuple[tuple[str, dict[str, Any]], ...] = (
        ("people", {"people": 0}),
        ("people", {"people": 2**20 + 1}),
        ("names", {"names": 0}),
        ("attributes", {"attributes": 0}),
        ("values", {"values": 1}),
        ("chunks", {"chunks": 0}),
        ("name_nats", {"name_nats": number(-1.0)}),
        ("value_nats", {"value_nats": number(math.nan)}),
    )
    for name, changed in wrong:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            stored_bits(**{"name_nats": number(1.0), "value_nats": number(1.0)} | FACTS | changed)
    fleet = Fleet.of([build()], build)
    with pytest.raises(ValueError, match="known"):
        knowledge(fleet, SMALL, torch.zeros(1, 48, dtype=torch.bool))
    with pytest.raises(ValueError, match="bits"):
        quantised(fleet, 1)
