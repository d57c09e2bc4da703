"""Mixtures against counting, training against a loop without repetition, formulas against planted answers."""

import functools
import itertools
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.schedules import linear, warmup
from toolkit.scaling_laws.corpora import (
    ByteMLP,
    byte_loss,
    byte_transformer,
    markov_source,
    nats_per_byte,
    plain_loss,
    windows,
)
from toolkit.scaling_laws.repeats import (
    InOrder,
    attention_maps,
    balanced_size,
    copy_gain,
    copy_test,
    dropout_ridge,
    effective_size,
    epoch_sweep,
    mixture_order,
    prefix_matching,
    ratio_regret,
    recovery,
    repeat_sweep,
    speed_up,
)

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
    with pytest.raises(ValueError, match="subsets"):
        InOrder().check(None, torch.ones(1, 10, dtype=torch.bool), 10)


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


def test_the_effective_size_inverts_the_law():
    size = torch.tensor([1e3, 5e4, 2e6], dtype=torch.float64)
    loss = 1.7 + (300 / size) ** 0.4
    torch.testing.assert_close(effective_size(loss, 1.7, 300.0, 0.4), size, rtol=1e-10, atol=0)
    half = 1.7 + (300 / (size / 2)) ** 0.4
    torch.testing.assert_close(effective_size(half, 1.7, 300.0, 0.4) / size, torch.full_like(size, 0.5))


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


def test_one_epoch_wins_over_many_and_the_training_loss_shows_why():
    sweep = epoch_sweep(DATA, FRESH, 8, 32, (1, 32), (0.0, 0.3), 2, total=4096, batch=64, times=4)
    final = sweep.curves[..., -1].mean(2)
    assert final[1, 0] > final[0, 0] + 0.1
    assert sweep.train[1, 0].mean() < final[1, 0] - 0.3  # many passes: learnt by heart
    assert abs(sweep.train[0, 0].mean() - final[0, 0]) < 0.05
    cost = sweep.degradation()
    assert cost[0, 0].eq(0).all()
    assert recovery(cost[1, 1], cost[1, 0]).mean() > 0.1
    assert sweep.steps[-1] == 64


def test_in_one_epoch_the_batch_before_its_update_is_an_unbiased_test():
    """The mean of (training loss of step s - held-out loss after s - 1 steps) over seeds is within 2.5 errors of 0."""
    moments, members = (0, 4, 12, 20), 24
    fleet = train(
        functools.partial(ByteMLP, 8, 2, 16),
        plain_loss,
        DATA,
        members=members,
        steps=24,
        batch=64,
        snapshots=moments,
        optimiser=Adam(lr=0.03),
        progress=False,
    )
    gaps = [fleet.history[:, s].double() - nats_per_byte(fleet.at(s), FRESH) for s in moments]
    gap = torch.stack(gaps).mean(0)
    assert gap.mean().abs() < 2.5 * gap.std() / members**0.5
    again = train(
        functools.partial(ByteMLP, 8, 2, 16), plain_loss, DATA, subsets=torch.arange(len(DATA["y"]))[None] < 128,
        steps=200, batch=64, snapshots=[199], optimiser=Adam(lr=0.03), progress=False,
    )  # fmt: skip
    assert again.history[0, 199] < nats_per_byte(again.at(199), FRESH)[0] - 0.3


def test_dropout_at_rate_0_and_dropout_that_never_starts_change_nothing():
    options: dict[str, Any] = {"total": 1024, "batch": 64, "times": 2}
    plain = epoch_sweep(DATA, FRESH, 8, 16, (1, 4), (0.0,), 2, **options)
    sweep = epoch_sweep(DATA, FRESH, 8, 16, (1, 4), (0.0, 0.4), 2, **options)
    never = epoch_sweep(DATA, FRESH, 8, 16, (1, 4), (0.0, 0.4), 2, late=1.0, **options)
    torch.testing.assert_close(sweep.curves[:, :1], plain.curves, rtol=0, atol=2e-5)
    assert torch.equal(never.curves[:, 1], never.curves[:, 0])
    assert (sweep.curves[:, 1] - sweep.curves[:, 0]).abs().min() > 1e-5
    late = epoch_sweep(DATA, FRESH, 8, 16, (1, 4), (0.0, 0.4), 2, late=0.5, **options)
    first = late.steps < 8
    assert torch.equal(late.curves[:, 1][..., first], late.curves[:, 0][..., first])
    assert (late.curves[:, 1, :, -1] - late.curves[:, 0, :, -1]).abs().min() > 1e-5


def test_recovery():
    got = recovery(torch.tensor([0.0, 0.2, 0.5]), torch.tensor([0.4, 0.4, 0.4]))
    torch.testing.assert_close(got, torch.tensor([1.0, 0.5, -0.25]))


def test_dropout_on_inputs_is_a_ridge_by_all_masks():
    """The expected squared error over all 2^3 masks is flat at the closed form."""
    x = random.normal(random.key(1), (9, 3), torch.float64)
    y = random.normal(random.key(2), (9,), torch.float64)
    rate = 0.3

    def expected(w):
        total = 0.0
        for mask in itertools.product((0.0, 1.0), repeat=3):
            kept = torch.tensor(mask, dtype=torch.float64)
            chance = math.prod(0.7 if bit else 0.3 for bit in mask)
            total = total + chance * (y - (x * kept / 0.7) @ w).square().sum()
        return total

    w = dropout_ridge(x, y, rate)
    assert torch.func.grad(expected)(w).abs().max() < 1e-12
    torch.testing.assert_close(dropout_ridge(x, y, 0.0), torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    assert (w - dropout_ridge(x, y, 0.0)).abs().max() > 1e-2


def test_the_speed_up_of_two_power_laws_is_the_ratio_of_their_scales():
    cost = torch.logspace(1, 4, 9, dtype=torch.float64)
    new = torch.logspace(0.5, 4.5, 14, dtype=torch.float64)
    got = speed_up(cost, (700 / cost) ** 0.3, new, (200 / new) ** 0.3)
    assert got == pytest.approx(700 / 200, rel=1e-12)
    assert speed_up(cost, (200 / cost) ** 0.3, new, (400 / new) ** 0.3) == pytest.approx(0.5, rel=1e-12)
    overfit = torch.tensor([3.0, 2.0, 2.5], dtype=torch.float64)  # the best is in the middle
    line = torch.tensor([4.0, 1.0], dtype=torch.float64)
    ends = torch.tensor([1.0, 16.0], dtype=torch.float64)
    assert speed_up(torch.tensor([10.0, 20.0, 40.0]).double(), overfit, ends, line) == pytest.approx(5.0, rel=1e-12)
    assert speed_up(cost, torch.full_like(cost, 0.01), ends, line).isnan()
    assert speed_up(ends, line, ends, line / 8) == pytest.approx(16.0)


def test_the_balanced_size_and_the_regret_of_a_fixed_ratio():
    size, tokens = balanced_size(1e6, 2e7)
    assert size * tokens == pytest.approx(2e13)
    assert tokens / size == pytest.approx(5.0)
    assert ratio_regret(40.0, 0.5, 40.0 * 5**0.5, 0.5, 1e9) == pytest.approx(0, abs=1e-15)  # (B / A)^(1/a) = 5
    a, b, c, d, compute = 40.0, 0.5, 300.0, 0.4, 1e9
    grid = torch.logspace(1, 8, 200_001, dtype=torch.float64)
    least = float((a * grid**-b + c * (compute / grid) ** -d).min())
    size = (compute / 5) ** 0.5
    assert ratio_regret(a, b, c, d, compute) == pytest.approx(a * size**-b + c * (5 * size) ** -d - least, abs=1e-8)
    assert ratio_regret(a, b, c, d, compute) > 0.01


def test_bad_input():
    x = torch.ones(3, 2)
    up = torch.tensor([1.0, 2.0])
    for name, call in (
        ("share", lambda: mixture_order(10, 1.5, 1)),
        ("share", lambda: mixture_order(10, 0.25, 1)),
        ("repeats", lambda: mixture_order(100, 0.1, 3)),
        ("repeats", lambda: mixture_order(100, 0.1, 0)),
        ("total", lambda: repeat_sweep(DATA, FRESH, 8, total=10**6)),
        ("total", lambda: repeat_sweep(DATA, FRESH, 8, total=100)),
        ("seeds", lambda: repeat_sweep(DATA, FRESH, 8, total=1024, seeds=0)),
        ("loss", lambda: effective_size(torch.tensor(1.0), 1.0, 2.0, 0.5)),
        ("scale", lambda: effective_size(torch.tensor(2.0), 1.0, 0.0, 0.5)),
        ("exponent", lambda: effective_size(torch.tensor(2.0), 1.0, 1.0, -0.5)),
        ("nats", lambda: copy_gain(torch.ones(2, 4))),
        ("blocks", lambda: copy_test(None, torch.ones(2, 1))),  # type: ignore[arg-type]  # refused before use
        ("attention", lambda: prefix_matching(torch.ones(3, 3))),
        ("total", lambda: epoch_sweep(DATA, FRESH, 8, total=100)),
        ("epochs", lambda: epoch_sweep(DATA, FRESH, 8, epochs=(3,), total=1024)),
        ("rates", lambda: epoch_sweep(DATA, FRESH, 8, rates=(1.0,), total=1024)),
        ("late", lambda: epoch_sweep(DATA, FRESH, 8, late=2.0, total=1024)),
        ("times", lambda: epoch_sweep(DATA, FRESH, 8, times=9, total=1024)),
        ("seeds", lambda: epoch_sweep(DATA, FRESH, 8, seeds=0, total=1024)),
        ("plain", lambda: recovery(up, up * 0)),
        ("rate", lambda: dropout_ridge(x, x[:, 0], 1.0)),
        ("new_cost", lambda: speed_up(up, up, up.flip(0), up)),
        ("cost", lambda: speed_up(up[:1], up[:1], up, up)),
        ("loss", lambda: speed_up(up, -up, up, up)),
        ("ratio", lambda: balanced_size(1.0, 1.0, 0.0)),
        ("compute", lambda: ratio_regret(1.0, 1.0, 1.0, 1.0, 0.0)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    assert byte_loss(torch.zeros(1, 4), torch.tensor([1])).item() == pytest.approx(math.log(4))
