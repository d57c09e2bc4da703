"""A source against its eigenvector, counts and Shannon; windows against slices; models and sweeps against loops."""

import functools
import math
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.schedules import linear, warmup
from toolkit.scaling_laws.corpora import (
    ALPHABET,
    ByteMLP,
    MarkovSource,
    byte_loss,
    byte_sweep,
    byte_transformer,
    markov_source,
    nats_per_byte,
    plain_loss,
    sequences,
    unicode_names,
    windows,
)

SOURCE = markov_source(6, 1.0, 1.5, seed=3)
TEXT = SOURCE.sample(40, 60, seed=1)


def test_the_stationary_state_is_the_eigenvector_of_the_chain_of_pairs():
    p, size = SOURCE.transition.numpy(), 6
    chain = np.zeros((size**2, size**2))
    for a in range(size):
        for b in range(size):
            chain[a * size + b, b * size : (b + 1) * size] = p[a, b]
    values, vectors = np.linalg.eig(chain.T)
    leading = vectors[:, np.argmax(values.real)].real
    pairs = (leading / leading.sum()).reshape(size, size)
    np.testing.assert_allclose(SOURCE.stationary.numpy(), pairs, rtol=0, atol=1e-13)
    triples = pairs[..., None] * p
    difference = -(triples * np.log(triples)).sum() + (pairs * np.log(pairs)).sum()  # H(3 bytes) - H(2 bytes)
    assert SOURCE.entropy_rate == pytest.approx(difference, abs=1e-12)


def test_without_spread_bytes_are_independent_and_the_entropy_is_that_of_a_zipf_law():
    zipf = 1 / np.arange(1, 9) ** 1.3
    zipf /= zipf.sum()
    source = markov_source(8, 1.3, 0.0)
    assert source.entropy_rate == pytest.approx(-(zipf * np.log(zipf)).sum(), abs=1e-13)
    np.testing.assert_allclose(source.stationary.numpy(), np.outer(zipf, zipf), rtol=0, atol=1e-14)
    assert markov_source(16, 0.0, 0.0).entropy_rate == pytest.approx(math.log(16), abs=1e-13)


def test_a_sample_has_the_frequencies_of_the_source_from_the_first_byte_on():
    rows = 40_000
    text = SOURCE.sample(rows, 6, seed=5)
    for begin in (0, 4):
        counts = torch.bincount(text[:, begin] * 6 + text[:, begin + 1], minlength=36) / rows
        error = (SOURCE.stationary.flatten() * (1 - SOURCE.stationary.flatten()) / rows).sqrt()
        assert ((counts - SOURCE.stationary.flatten()).abs() / error).max() < 4.5
    nats = -SOURCE.transition[text[:, 2], text[:, 3], text[:, 4]].log()
    assert abs(nats.mean() - SOURCE.entropy_rate) < 4 * nats.std() / rows**0.5
    table = torch.zeros(216).index_add(0, text[:, 0] * 36 + text[:, 1] * 6 + text[:, 2], torch.ones(rows)).view(6, 6, 6)
    frequent = table.sum(-1) > 1000
    shares = table[frequent] / table[frequent].sum(-1, keepdim=True)
    assert (shares - SOURCE.transition[frequent]).abs().max() < 0.06
    assert torch.equal(SOURCE.sample(5, 9, seed=2), SOURCE.sample(5, 9, seed=2))
    assert not torch.equal(SOURCE.sample(5, 9, seed=2), SOURCE.sample(5, 9, seed=3))


def test_the_names_are_those_of_unicode_and_seeds_only_order_the_lines():
    text = unicode_names(None)
    lines = "".join(ALPHABET[i] for i in text.tolist()).split("\n")
    assert len(text) == 354_744
    assert len(lines) == 12_887
    assert lines[:3] == ["SPACE", "EXCLAMATION MARK", "QUOTATION MARK"]
    assert "GREEK SMALL LETTER ALPHA" in lines
    assert set(lines[:-1]) <= {unicodedata.name(chr(code), "") for code in range(0x110000)}
    mixed = "".join(ALPHABET[i] for i in unicode_names(4).tolist()).split("\n")
    assert sorted(mixed) == sorted(lines)
    assert mixed != lines
    assert torch.equal(unicode_names(4), unicode_names(4))


def test_windows_and_sequences_are_slices():
    data, pieces = windows(TEXT, 3), sequences(TEXT, 7)
    expected = [(row[i : i + 3], row[i + 3]) for row in TEXT for i in range(57)]
    assert torch.equal(data["x"], torch.stack([x for x, _ in expected]))
    assert torch.equal(data["y"], torch.stack([y for _, y in expected]))
    cut = [(row[i : i + 7], row[i + 1 : i + 8]) for row in TEXT for i in range(0, 53, 7)]
    assert torch.equal(pieces["x"], torch.stack([x for x, _ in cut]))
    assert torch.equal(pieces["y"], torch.stack([y for _, y in cut]))
    assert torch.equal(windows(TEXT[0], 3)["y"], TEXT[0, 3:])


def test_the_loss_is_cross_entropy_and_the_mean_over_windows_is_exact():
    logits = random.normal(random.key(1), (5, 7, 6), torch.float64)
    y = TEXT[:5, :7]
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(5, 7)
    torch.testing.assert_close(byte_loss(logits, y), expected.mean(1), rtol=0, atol=1e-13)
    torch.testing.assert_close(byte_loss(logits[:, 0], y[:, 0]), expected[:, 0], rtol=0, atol=1e-13)
    torch.manual_seed(0)
    data = windows(TEXT, 3)
    models = [ByteMLP(6, 3, 4), ByteMLP(6, 3, 4)]
    fleet = Fleet.of(models, lambda: ByteMLP(6, 3, 4))
    means = torch.stack([F.cross_entropy(model(data["x"]), data["y"]) for model in models]).double()
    torch.testing.assert_close(nats_per_byte(fleet, data, rows=100), means, rtol=0, atol=1e-5)


def test_the_byte_mlp_is_written_out_and_dropout_has_the_right_mean():
    torch.manual_seed(0)
    model = ByteMLP(6, 3, 16, 2).double()
    x = TEXT[:4, :3]
    rows = torch.stack([torch.cat([model.embed.weight[i] for i in row]) for row in x])
    hidden = (rows @ model.hidden.weight.T + model.hidden.bias).clamp_min(0)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)
    assert torch.equal(model(x, key=random.key(1)), model(x))
    drawn = torch.stack([model(x, key=random.key(i), rate=0.4) for i in range(1000)])
    assert not torch.equal(drawn[0], drawn[1])
    error = drawn.std(0) / 1000**0.5
    assert ((drawn.mean(0) - model(x)).abs() / error).max() < 4.5


def test_a_sweep_is_its_members_trained_alone_on_nested_data():
    data, fresh = windows(TEXT, 2), windows(SOURCE.sample(20, 60, seed=9), 2)
    sweep = byte_sweep(data, fresh, 6, (4, 8), (64, 256), 2, batch=32, lr=0.03)
    assert sweep.losses.shape == (2, 2, 2)
    assert sweep.parameters.tolist() == [6 * 12 + 25 * w + 6 * w + 6 for w in (4, 8)]
    assert sweep.tokens.tolist() == [64, 256]
    order = random.permutation(random.fold_in(random.key(0, 1), torch.tensor([1])), len(data["y"]))[0]
    alone = train(
        functools.partial(ByteMLP, 6, 2, 8),
        plain_loss,
        data,
        subsets=torch.zeros(1, len(data["y"]), dtype=torch.bool).index_fill(1, order[:256], True),
        streams=torch.tensor([1]),
        steps=8,
        batch=32,
        optimiser=Adam(lr=0.03 * 2**0.5),
        schedule=warmup(0.05, linear()),
        progress=False,
    )
    torch.testing.assert_close(sweep.losses[1, 1, 1], nats_per_byte(alone, fresh)[0], rtol=0, atol=1e-4)
    size, tokens, loss = sweep.points()
    assert (size[1], tokens[1]) == (sweep.parameters[0], 256)
    assert loss[1] == sweep.losses[0, 1].mean()


def test_more_data_and_more_width_help_and_none_is_below_the_entropy():
    source = markov_source(8, 1.0, 1.5)
    data, fresh = windows(source.sample(200, 62, 1), 2), windows(source.sample(60, 62, 2), 2)
    loss = byte_sweep(data, fresh, 8, (2, 16), (512, 8192), 2, batch=64).losses.mean(2)
    assert loss[1, 1] < loss[0, 1] - 0.05
    assert loss[1, 1] < loss[1, 0] - 0.1
    assert loss.min() > source.entropy_rate


def test_a_transformer_sweep_counts_bytes():
    data = sequences(TEXT, 15)
    sweep = byte_sweep(data, data, 6, (8, 16), (16, 64), 1, model="transformer", batch=16)
    assert sweep.tokens.tolist() == [16 * 15, 64 * 15]
    assert sweep.losses[1, 1] < math.log(6)
    model, x = byte_transformer(6, 15, 8), data["x"][:2]
    changed = torch.cat([x[:, :9], (x[:, 9:] + 1) % 6], 1)
    assert model(x).shape == (2, 15, 6)
    torch.testing.assert_close(model(changed)[:, :9], model(x)[:, :9])


def test_bad_input():
    data = windows(TEXT, 2)
    for name, call in (
        ("transition", lambda: MarkovSource(torch.full((2, 2, 2), 0.4, dtype=torch.float64))),
        ("transition", lambda: MarkovSource(torch.full((2, 2, 2), 0.5))),
        ("symbols", lambda: markov_source(1)),
        ("exponent", lambda: markov_source(4, -1.0)),
        ("spread", lambda: markov_source(4, 1.0, -1.0)),
        ("length", lambda: SOURCE.sample(3, 2)),
        ("context", lambda: windows(TEXT, 60)),
        ("context", lambda: sequences(TEXT, 0)),
        ("width", lambda: ByteMLP(6, 2, 0)),
        ("width", lambda: byte_transformer(6, 5, 12)),
        ("data", lambda: nats_per_byte(None, {"y": data["y"][:0]})),  # type: ignore[arg-type]  # refused before use
        ("widths", lambda: byte_sweep(data, data, 6, (4,))),
        ("widths", lambda: byte_sweep(data, data, 6, (8, 4))),
        ("sizes", lambda: byte_sweep(data, data, 6, (4, 8), (512, 4096))),
        ("sizes", lambda: byte_sweep(data, data, 6, (4, 8), (64, 512))),
        ("seeds", lambda: byte_sweep(data, data, 6, (4, 8), (256, 512), 0)),
        ("model", lambda: byte_sweep(data, data, 6, (4, 8), (256, 512), model="rnn")),
        ("lr", lambda: byte_sweep(data, data, 6, (4, 8), (256, 512), lr=0.0)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
