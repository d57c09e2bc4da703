"""Copying and prefix matching against planted losses and heads, attention maps against the model's own output."""

import functools
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from toolkit.fleet import Fleet
from toolkit.scaling_laws.corpora import byte_transformer, markov_source
from toolkit.scaling_laws.induction import attention_maps, copy_gain, copy_test, prefix_matching

SOURCE = markov_source(8, 1.0, 2.0)


def test_copying_compares_the_same_bytes():
    nats = torch.tensor([[1.0, 2.0, 100.0, 0.25, 0.75], [3.0, 3.0, 0.0, 3.0, 3.0]])
    assert copy_gain(nats).tolist() == [-1.0, 0.0]
    torch.manual_seed(0)
    build = functools.partial(byte_transformer, 8, 9, 8)
    models = [build(), build()]
    blocks = SOURCE.sample(6, 5, 4)
    text = torch.cat([blocks, blocks], 1)
    expected = []
    for model in models:
        values = F.cross_entropy(model(text[:, :-1]).mT, text[:, 1:], reduction="none").detach()
        first, second = values[:, [0, 1, 2, 3]], values[:, [5, 6, 7, 8]]
        expected.append((second - first).mean())
    torch.testing.assert_close(copy_test(Fleet.of(models, build), blocks), torch.stack(expected), rtol=0, atol=1e-5)


def test_prefix_matching_of_an_induction_head_is_1_and_of_uniform_attention_known():
    m = 5
    perfect = torch.zeros(2 * m, 2 * m, dtype=torch.float64)
    for i in range(2 * m):
        perfect[i, i - m + 1 if i >= m else 0] = 1
    uniform = torch.ones(2 * m, 2 * m, dtype=torch.float64).tril()
    uniform /= uniform.sum(1, keepdim=True)
    scores = prefix_matching(torch.stack([perfect, uniform]))
    assert scores[0] == 1
    assert scores[1] == pytest.approx(sum(1 / (i + 1) for i in range(m, 2 * m)) / m, abs=1e-15)
    with_itself = torch.eye(2 * m, dtype=torch.float64)
    assert prefix_matching(with_itself) == 0
    assert prefix_matching(torch.tensor([[1.0, 0.0], [0.25, 0.75]])) == 0.75  # a block of one byte


def test_attention_maps_rebuild_the_models_own_output():
    torch.manual_seed(0)
    model = byte_transformer(8, 6, 16)
    x = SOURCE.sample(3, 6, 7)
    maps = attention_maps(model, x)
    assert maps.shape == (2, 3, 2, 6, 6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 2, 6))
    assert maps.triu(1).eq(0).all()
    block = cast(Any, model.blocks[0])
    h = model.embed(x) + model.position.weight
    value = F.linear(block.norm1(h), block.qkv.weight[32:], block.qkv.bias[32:]).view(3, 6, 2, 8)
    mixed = torch.einsum("bhij,bjhd->bihd", maps[0], value).flatten(2)
    after = h + block.out(mixed)
    after = after + block.down(F.gelu(block.up(block.norm2(after))))
    torch.testing.assert_close(after, block(h))


def test_bad_input():
    for name, call in (
        ("nats", lambda: copy_gain(torch.ones(2, 4))),
        ("blocks", lambda: copy_test(None, torch.ones(2, 1))),  # type: ignore[arg-type]  # refused before use
        ("attention", lambda: prefix_matching(torch.ones(3, 3))),
    ):
        with pytest.raises(ValueError, match=name):
            call()
