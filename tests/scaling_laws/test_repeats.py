"""Mixtures against counting, training against a loop without repetition."""

import functools
import math

import pytest
import torch

from toolkit import random
from toolkit.fleet import Adam, train
from toolkit.fleet.samplers import InOrder
from toolkit.fleet.schedules import linear, warmup
from toolkit.scaling_laws.corpora import (
    ByteMLP,
    byte_loss,
    markov_source,
    nats_per_byte,
    plain_loss,
    windows,
)
from toolkit.scaling_laws.repeats import mixture_order, repeat_sweep

SOURCE = markov_source(8, 1.0, 2.0)
DATA, FRESH = windows(SOURCE.sample(100, 62, 1), 2), windows(SOURCE.sample(40, 62, 2), 2)


@pytest.mark.parametrize(("share", "repeats"), [(0.1, 1), (0.1, 20), (0.3, 600), (0.5, 8), (1.0, 4)])
def test_every_token_of_a_mixture_is_accounted_for(share, repeats):
    total = 2000
    order = mixture_order(total, share, repeats, seed=1)
    again, size = round(share * total), round(share * total) // repeats
    counts = torch.bincount(order)
    assert len(counts) == total - again + size
    assert counts[: total - again].eq(1).all()
    assert counts[total - again :].eq(repeats).all()
    assert again == repeats * size
    mixed = order >= total - again
    assert order[~mixed].tolist() == list(range(total - again))
    for end in (1, 7, 500, 1333, 2000):
        assert int(mixed[:end].sum()) == math.floor(end * again / total)
    passes = order[mixed].view(repeats, size)
    assert (passes.sort(1).values == torch.arange(total - again, total - again + size)).all()
    if repeats > 1 and size > 10:
        assert not torch.equal(passes[0], passes[1])


def test_without_repetition_the_order_is_that_of_the_data():
    assert torch.equal(mixture_order(50, 0.0, 1), torch.arange(50))
    assert torch.equal(mixture_order(50, 0.0, 1, seed=7), torch.arange(50))


def test_share_0_trains_bit_for_bit_as_plain_data_in_order():
    sweep = repeat_sweep(DATA, FRESH, 8, (8,), (1,), 2, share=0.0, total=512, batch=64)
    for i in range(2):
        order = random.permutation(random.fold_in(random.key(0, 2), torch.arange(2)), len(DATA["y"]))[i, :512]
        alone = train(
            functools.partial(ByteMLP, 8, 2, 8),
            plain_loss,
            {"x": DATA["x"][order], "y": DATA["y"][order]},
            streams=torch.tensor([i]),
            steps=8,
            batch=64,
            sampler=InOrder(),
            optimiser=Adam(lr=4e-2 * 2**0.5),
            schedule=warmup(0.05, linear()),
            progress=False,
        )
        torch.testing.assert_close(sweep.held_out[0, 0, i], nats_per_byte(alone, FRESH)[0], rtol=0, atol=2e-5)


def test_examples_come_in_order_and_from_the_start_again():
    plan = InOrder().plan(torch.zeros(3, dtype=torch.int64), 1, 4, 4, 10, None, None)
    assert plan[:, 0].tolist() == [[4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]]
    assert (plan == plan[:, :1]).all()
    half = torch.arange(10) % 2 == torch.tensor([[0], [1], [0]])
    own = InOrder().plan(torch.zeros(3, dtype=torch.int64), 1, 3, 4, 10, None, half)
    assert own[:, 0].tolist() == [[8, 0, 2, 4], [6, 8, 0, 2]]
    assert torch.equal(own[:, 1], own[:, 0] + 1)


def test_repetition_is_learnt_by_heart_hurts_and_hurts_most_in_the_middle():
    sweep = repeat_sweep(DATA, FRESH, 8, (32,), (1, 32, 2048), 2, total=4096, batch=64)
    held, own, cost = sweep.held_out[0].mean(1), sweep.repeated[0].mean(1), sweep.degradation()[0].mean(1)
    assert abs(own[0] - held[0]) < 0.05  # seen once: as good as new
    assert own[1] < held[1] - 0.3
    assert own[2] < own[1]
    assert cost[0] == 0
    assert cost[1] > 0.05
    assert cost[1] > cost[2] > 0
    torch.testing.assert_close(sweep.degradation(), sweep.held_out - sweep.held_out[:, :1], rtol=0, atol=0)


def test_bad_input():
    for name, call in (
        ("share", lambda: mixture_order(10, 1.5, 1)),
        ("share", lambda: mixture_order(10, 0.25, 1)),
        ("repeats", lambda: mixture_order(100, 0.1, 3)),
        ("repeats", lambda: mixture_order(100, 0.1, 0)),
        ("total", lambda: repeat_sweep(DATA, FRESH, 8, total=10**6)),
        ("total", lambda: repeat_sweep(DATA, FRESH, 8, total=100)),
        ("seeds", lambda: repeat_sweep(DATA, FRESH, 8, total=1024, seeds=0)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    assert byte_loss(torch.zeros(1, 4), torch.tensor([1])).item() == pytest.approx(math.log(4))
