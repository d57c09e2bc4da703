"""One epoch against many: training on planted text, formulas against masks, grids and planted power laws."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from law_cases import doubles
from torch.func import vmap

from toolkit import random
from toolkit.fleet import Adam, train
from toolkit.scaling_laws.constants import Chinchilla
from toolkit.scaling_laws.corpora import ByteMLP, markov_source, nats_per_byte, plain_loss, windows
from toolkit.scaling_laws.epochs import dropout_ridge, epoch_sweep, one_epoch, ratio_regret, recovery, speed_up
from toolkit.scaling_laws.frontiers import compute_optimal
from toolkit.scaling_laws.size_laws import chinchilla

SOURCE = markov_source(8, 1.0, 2.0)
DATA, FRESH = windows(SOURCE.sample(100, 62, 1), 2), windows(SOURCE.sample(40, 62, 2), 2)


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


def test_one_epoch():
    p, t = doubles(1e8, 1e6), doubles(1e9, 1e9)
    size, tokens = one_epoch(p, t)
    torch.testing.assert_close(size * tokens, p * t)
    torch.testing.assert_close(tokens / size, doubles(5, 5))
    law = Chinchilla(1.5, 300.0, 300.0 * 5**0.4, 0.4, 0.4)  # of which 5 tokens per parameter is the optimum
    best = compute_optimal(6 * p * t, law)
    torch.testing.assert_close(size, best.size)
    off = law._replace(data_scale=300.0 * 20**0.4)  # there it is 20
    regret = chinchilla(*one_epoch(p, t), off) - compute_optimal(6 * p * t, off).loss
    torch.testing.assert_close(one_epoch(p, t, 20.0)[0], compute_optimal(6 * p * t, off).size)
    assert (regret > 0.001).all()


def test_the_regret_of_a_fixed_ratio():
    """0 where (B/A)^(1/a) is the ratio; else against the least of a dense grid of sizes for the same product."""
    even = Chinchilla(0.0, 40.0, 40.0 * 5**0.5, 0.5, 0.5)
    assert ratio_regret(doubles(1e4), doubles(1e5), even).item() == pytest.approx(0, abs=1e-15)
    a, b, c, d, product = 40.0, 0.5, 300.0, 0.4, 1e9
    grid = torch.logspace(1, 8, 200_001, dtype=torch.float64)
    least = float((a * grid**-b + c * (product / grid) ** -d).min())
    size = (product / 5) ** 0.5
    regret = ratio_regret(doubles(1e3), doubles(1e6), Chinchilla(1.7, a, c, b, d)).item()
    assert regret == pytest.approx(a * size**-b + c * (5 * size) ** -d - least, abs=1e-8)
    assert regret > 0.01


def test_speed_up_of_two_power_laws():
    """t = (c/L)^(1/b): the ratio of costs is (c1/c2)^(1/b), wherever the points of the new curve lie."""
    cost, new_cost = torch.logspace(2, 5, 30, dtype=torch.float64), torch.logspace(1, 6, 17, dtype=torch.float64)
    slow, fast = 9.0 * cost**-0.3, 6.0 * new_cost**-0.3
    assert speed_up(cost, slow, new_cost, fast).item() == pytest.approx((9 / 6) ** (1 / 0.3), rel=1e-12)
    overfits = torch.cat([slow, slow[-1:] * 2])  # what comes after the best does not count
    longer = torch.cat([cost, doubles(1e7)])
    assert speed_up(longer, overfits, new_cost, fast).item() == pytest.approx(1.5 ** (1 / 0.3), rel=1e-12)
    assert speed_up(cost, slow, new_cost, fast + 1).isnan()
    assert speed_up(cost, slow, cost, slow).item() == pytest.approx(1)
    assert speed_up(cost, slow, new_cost, fast * 1e-6).item() == pytest.approx(1e5 / 10)
    many = vmap(lambda scale: speed_up(cost, slow, new_cost, scale * new_cost**-0.3))(doubles(6.0, 4.0))
    torch.testing.assert_close(many, (9 / doubles(6.0, 4.0)) ** (1 / 0.3))


def test_the_speed_up_of_a_run_that_overfits_and_of_straight_lines():
    cost = torch.logspace(1, 4, 9, dtype=torch.float64)
    new = torch.logspace(0.5, 4.5, 14, dtype=torch.float64)
    assert speed_up(cost, (200 / cost) ** 0.3, new, (400 / new) ** 0.3).item() == pytest.approx(0.5, rel=1e-12)
    ends, line = doubles(1.0, 16.0), doubles(4.0, 1.0)
    overfit = doubles(3.0, 2.0, 2.5)  # the best is in the middle
    assert speed_up(doubles(10.0, 20.0, 40.0), overfit, ends, line).item() == pytest.approx(5.0, rel=1e-12)
    assert speed_up(cost, torch.full_like(cost, 0.01), ends, line).isnan()
    assert speed_up(ends, line, ends, line / 8).item() == pytest.approx(16.0)


def test_bad_input():
    x, one = torch.ones(3, 2), doubles(1.0)
    up = torch.tensor([1.0, 2.0])
    law = Chinchilla(1.0, 1.0, 1.0, 0.5, 0.5)
    for name, call in (
        ("total", lambda: epoch_sweep(DATA, FRESH, 8, total=100)),
        ("epochs", lambda: epoch_sweep(DATA, FRESH, 8, epochs=(3,), total=1024)),
        ("rates", lambda: epoch_sweep(DATA, FRESH, 8, rates=(1.0,), total=1024)),
        ("late", lambda: epoch_sweep(DATA, FRESH, 8, late=2.0, total=1024)),
        ("times", lambda: epoch_sweep(DATA, FRESH, 8, times=9, total=1024)),
        ("seeds", lambda: epoch_sweep(DATA, FRESH, 8, seeds=0, total=1024)),
        ("plain", lambda: recovery(up, up * 0)),
        ("rate", lambda: dropout_ridge(x, x[:, 0], 1.0)),
        ("new_cost", lambda: speed_up(up, up, up.flip(0), up)),
        ("cost", lambda: speed_up(up.flip(0), up, up, up)),
        ("loss", lambda: speed_up(up, -up, up, up)),
        ("new_loss", lambda: speed_up(up, up, up, -up)),
        ("ratio", lambda: one_epoch(one, one, -5.0)),
        ("tokens", lambda: one_epoch(one, -one)),
        ("alpha", lambda: ratio_regret(one, one, law._replace(alpha=0.0))),
        ("ratio", lambda: ratio_regret(one, one, law, 0.0)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            call()
