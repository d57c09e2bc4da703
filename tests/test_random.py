import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from toolkit import random

MASK = (1 << 64) - 1
DRAWS = settings(derandomize=True, deadline=None, max_examples=25)


def splitmix64(state, count):
    """The published generator (Steele, Lea & Flood 2014; Vigna's C code), in Python's own integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


def test_the_reference_generator_gives_its_published_values():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(1, 9))
@DRAWS
def test_bits_are_splitmix64(seed, count):
    expected = [signed(value) for value in splitmix64(seed & MASK, count)]
    assert random.bits(torch.tensor(seed), (count,)).tolist() == expected


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-(1 << 63), (1 << 63) - 1))
@DRAWS
def test_keys_are_mixed_from_seed_and_path(seed, data):
    start = splitmix64(seed & MASK, 1)[0]
    assert random.key(seed).item() == signed(start)
    # fold_in: mix(key ^ mix(data * golden + 1)), where mix(x) is SplitMix64's output for the state before x
    golden = 0x9E3779B97F4A7C15
    inner = splitmix64((data * golden + 1 - golden) & MASK, 1)[0]
    outer = splitmix64(((start ^ inner) - golden) & MASK, 1)[0]
    assert random.key(seed, data).item() == signed(outer)
    assert random.fold_in(random.key(seed), torch.tensor(data)).item() == signed(outer)


FIXED = {
    "key": 5525477928837362950,
    "bits": [-6411193824288604561, -5511663747979980962],
    "uniform": [0.6524484753608704, 0.7012121081352234, 0.38712412118911743],
    "uniform64": [0.6524484863740322, 0.7012121095215252],
    "permutation": [9, 0, 3, 1, 6, 4, 5, 7, 8, 2],
    "normal": [0.391939, 0.52789, -0.286822],
}


def test_numbers_stay_what_they_are():
    key = random.key(0)
    assert key.item() == -2152535657050944081
    assert key.dtype == torch.int64
    assert key.shape == ()
    assert random.key(1, 2, 3).item() == FIXED["key"]
    assert random.bits(key, (2,)).tolist() == FIXED["bits"]
    assert random.uniform(key, (3,)).tolist() == FIXED["uniform"]
    assert random.uniform(key, (2,), torch.float64).tolist() == FIXED["uniform64"]
    assert random.permutation(key, 10).tolist() == FIXED["permutation"]
    torch.testing.assert_close(random.normal(key, (3,)), torch.tensor(FIXED["normal"]), rtol=1e-5, atol=1e-6)


def test_shapes_and_paths():
    four: Any = np.int64(4)
    keys = random.fold_in(random.key(3), torch.arange(6).view(2, 3))
    assert random.bits(keys, (4, 5)).shape == (2, 3, 4, 5)
    assert random.uniform(keys, ()).shape == (2, 3)
    assert random.normal(keys, (7,), torch.float64).dtype == torch.float64
    assert random.permutation(keys, 5).shape == (2, 3, 5)
    assert random.key(3, 4).item() == keys[1, 1].item()
    assert random.key(3, 4, 5).item() == random.fold_in(keys[1, 1], 5).item()
    assert random.key(3, 4, 5) != random.key(3, 5, 4)
    assert random.fold_in(random.key(3), four).item() == keys[1, 1].item()
    wide = random.uniform(keys[0, 0], (4, 5))
    assert torch.equal(wide.flatten(), random.uniform(keys[0, 0], (20,)))
    assert torch.equal(wide.flatten()[:7], random.uniform(keys[0, 0], (7,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform_and_inside(dtype):
    count = 40_000
    along = random.uniform(random.key(1), (count,), dtype)
    across = random.uniform(random.fold_in(random.key(1), torch.arange(count)), (), dtype)
    for values in (along, across):
        assert values.dtype == dtype
        assert values.min() > 0
        assert values.max() < 1
        assert stats.kstest(values.double().numpy(), "uniform").pvalue > 0.01
        pairs = torch.stack([values[:-1], values[1:]]).double()
        assert torch.corrcoef(pairs)[0, 1].abs() < 4 / math.sqrt(count)
        cells = (values[:-1:2] * 16).long() * 16 + (values[1::2] * 16).long()
        assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 0.01
    assert torch.corrcoef(torch.stack([along, across]).double())[0, 1].abs() < 4 / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_ends_are_never_reached(dtype, monkeypatch):
    for value in (0, -1):  # no bit set, all bits set
        monkeypatch.setattr(random, "bits", lambda key, shape, value=value: torch.full(shape, value))
        result = random.uniform(random.key(0), (1,), dtype)
        assert 0 < result < 1
        assert random.normal(random.key(0), (1,), dtype).isfinite().all()


def test_keys_of_neighbours_share_nothing():
    near = random.fold_in(random.key(0), torch.arange(2000))
    assert len(near.unique()) == 2000
    blocks = random.uniform(near, (50,)).double()
    correlations = torch.corrcoef(blocks[:100])
    off = correlations[~torch.eye(100, dtype=torch.bool)]
    assert off.abs().max() < 6 / math.sqrt(50)
    assert abs(off.mean()) < 0.01
    flips = random.fold_in(random.key(0), torch.tensor(5)) ^ random.fold_in(random.key(0), torch.tensor(4))
    assert 16 < bin(int(flips) & MASK).count("1") < 48
    seeds = torch.stack([random.key(seed) for seed in range(-500, 500)])
    assert len(torch.cat([seeds, near]).unique()) == 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_normal(dtype):
    values = random.normal(random.key(2), (40_000,), dtype)
    assert values.dtype == dtype
    assert stats.kstest(values.double().numpy(), "norm").pvalue > 0.01
    uniform = random.uniform(random.key(2), (40_000,), dtype)
    expected = torch.from_numpy(stats.norm.ppf(uniform.double().numpy()))
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)


def test_everything_is_the_same_under_vmap():
    keys = random.fold_in(random.key(7), torch.arange(5))
    counts = torch.tensor([1, 4, 9, 10, 3])
    for function in (
        lambda key: random.bits(key, (3, 2)),
        lambda key: random.uniform(key, (3,)),
        lambda key: random.normal(key, (3,), torch.float64),
        lambda key: random.permutation(key, 11),
        lambda key: random.fold_in(key, 3),
        lambda key: random.dropout(torch.ones(4), 0.5, key),
    ):
        assert torch.equal(torch.vmap(function)(keys), torch.stack([function(key) for key in keys]))
    batched = random.shuffled_slots(keys, 10, counts)
    mapped = torch.vmap(lambda key, count: random.shuffled_slots(key, 10, count))(keys, counts)
    assert torch.equal(batched, mapped)


@given(st.integers(0, 1000), st.integers(1, 200))
@DRAWS
def test_a_permutation_has_each_number_once(seed, size):
    rows = random.permutation(random.fold_in(random.key(seed), torch.arange(3)), size)
    assert torch.equal(rows.sort(-1).values, torch.arange(size).expand(3, size))


@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 300))
@DRAWS
def test_the_first_slots_are_a_permutation_of_their_own(seed, counts, extra):
    keys = random.fold_in(random.key(seed), torch.arange(len(counts)))
    rows = random.shuffled_slots(keys, max(counts) + extra, torch.tensor(counts))
    for row, count, key in zip(rows, counts, keys, strict=True):
        assert torch.equal(row[:count].sort().values, torch.arange(count))
        assert torch.equal(row[:count], random.permutation(key, count))
        assert torch.equal(row.sort().values, torch.arange(len(row)))


@pytest.mark.parametrize("shift", range(0, 54, 3))
def test_even_near_ties_do_not_depend_on_the_row(shift, monkeypatch):
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.arange(shape[0], 0, -1) % 10 << shift)
    short = random.shuffled_slots(random.key(0), 10)
    assert torch.equal(random.shuffled_slots(random.key(0), 500, torch.tensor(10))[:10], short)
    assert torch.equal(short.sort().values, torch.arange(10))


def test_permutations_are_unbiased():
    rows = random.permutation(random.fold_in(random.key(0), torch.arange(24_000)), 4)
    names = {order: number for number, order in enumerate(permutations(range(4)))}
    counts = [0] * 24
    for row in rows.tolist():
        counts[names[tuple(row)]] += 1
    assert stats.chisquare(counts).pvalue > 0.01
    keys = random.fold_in(random.key(1), torch.arange(24_000))
    padded = random.shuffled_slots(keys, 9, torch.full((24_000,), 4))[:, :4]
    table = torch.bincount(padded[:, 0] * 4 + padded[:, 3], minlength=16).view(4, 4)
    assert table.diagonal().sum() == 0
    assert stats.chisquare(table[~torch.eye(4, dtype=torch.bool)].numpy()).pvalue > 0.01


def test_a_million_slots_still_make_a_permutation():
    size = (1 << 20) + 3
    assert torch.equal(random.permutation(random.key(0), size).sort().values, torch.arange(size))


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.8, torch.tensor(0.5)])
def test_dropout_keeps_the_expected_value(rate):
    x = torch.full((40_000,), 3.0, dtype=torch.float64)
    dropped = random.dropout(x, rate, random.key(4))
    kept = dropped != 0
    assert dropped.dtype == torch.float64
    torch.testing.assert_close(dropped[kept], (x / (1 - rate))[kept])
    share = 1 - float(rate)
    assert abs(kept.double().mean() - share) <= 4 * math.sqrt(share * (1 - share) / len(x))
    assert torch.equal(dropped, random.dropout(x, rate, random.key(4)))
    if float(rate):
        assert not torch.equal(dropped, random.dropout(x, rate, random.key(5)))


def test_dropout_passes_gradients_of_what_it_keeps():
    x = torch.arange(1.0, 9.0, requires_grad=True)
    dropped = random.dropout(x, 0.5, random.key(4))
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(dropped != 0, 2.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_types_are_refused(dtype):
    for draw in (random.uniform, random.normal):
        with pytest.raises(ValueError, match=r"^dtype: expected torch.float32 or torch.float64"):
            draw(random.key(0), (3,), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: run on a machine with one")
def test_a_gpu_gives_the_same_numbers():
    here = random.fold_in(random.key(3), torch.arange(4))
    there = random.fold_in(random.key(3, device="cuda"), torch.arange(4, device="cuda"))
    assert torch.equal(random.bits(here, (50,)), random.bits(there, (50,)).cpu())
    assert torch.equal(random.uniform(here, (50,)), random.uniform(there, (50,)).cpu())
    assert torch.equal(random.permutation(here, 50), random.permutation(there, 50).cpu())


@pytest.mark.parametrize("alpha", [0.4, 1.6, 5.0])
def test_symmetric_beta_has_its_law(alpha):
    values = random.symmetric_beta(random.key(3), 4000, alpha, torch.float64)
    assert stats.kstest(values.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    keys = random.fold_in(random.key(3), torch.arange(3))
    one_by_one = torch.stack([random.symmetric_beta(key, 5, alpha) for key in keys])
    assert torch.equal(torch.vmap(lambda key: random.symmetric_beta(key, 5, alpha))(keys), one_by_one)
