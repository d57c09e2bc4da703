"""Schedules against closed forms, the worst-case bound against sums in plain loops and published values."""

import math
from typing import Any

import pytest
import torch

from toolkit import random
from toolkit.fleet import SGD, Adam, AdamW, cosine, linear, train
from toolkit.models import MLP
from toolkit.scaling_laws.schedules import (
    NormRecorder,
    OwnSchedules,
    fit_power_schedule,
    from_factors,
    infinite,
    last_iterate_bound,
    power_rates,
    refined_schedule,
    replay_mask,
    rewarm,
    wsd,
)

T = torch.arange(1000, dtype=torch.float64) / 1000


@pytest.mark.parametrize("steps", [1, 3, 7, 100, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_taken_one_by_one(steps, dtype):
    factors = torch.arange(steps, dtype=torch.float64)
    progress = torch.arange(steps, dtype=dtype) / steps
    assert torch.equal(from_factors(factors)(progress), factors.to(dtype))
    assert torch.equal(torch.vmap(from_factors(factors))(progress), factors.to(dtype))


def test_recorded_norms_are_those_of_the_gradient():
    """With SGD at rate 1 a step is the gradient: norms of the snapshots' differences; training is not changed."""
    x = random.normal(random.key(1), (20, 3))
    data, build = {"x": x, "y": x.sum(1, keepdim=True)}, lambda: MLP(3, (4,), 1)
    options: dict[str, Any] = {"members": 2, "steps": 6, "batch": 5, "progress": False, "device": "cpu"}
    options["snapshots"] = range(7)

    def loss(model, batch, hyper):
        return (model(batch.x) - batch.y).square().mean(1)

    for order in (1, 2):
        recorded = train(build, loss, data, optimiser=NormRecorder(SGD(lr=0.25), 6, order), **options)
        moved = torch.stack([recorded.snapshots[t + 1] - recorded.snapshots[t] for t in range(6)], 1) / 0.25
        torch.testing.assert_close(recorded.state["norms"], moved.norm(order, dim=2), rtol=1e-4, atol=1e-5)
    for inner in (SGD(lr=0.1, momentum=0.9), Adam()):
        short = train(build, loss, data, optimiser=NormRecorder(inner, 4), **options)
        assert torch.equal(short.parameters, train(build, loss, data, optimiser=inner, **options).parameters)
        assert short.state["norms"].shape == (2, 4)


def test_schedules_of_ones_own_are_those_of_the_engine():
    """Every member trains as in a fleet of its own with that schedule, in chunks too; weight decay follows the rate."""
    x = random.normal(random.key(1), (20, 3))
    data, build = {"x": x, "y": x.sum(1, keepdim=True)}, lambda: MLP(3, (4,), 1)
    options: dict[str, Any] = {"steps": 8, "batch": 5, "progress": False, "device": "cpu"}

    def loss(model, batch, hyper):
        return (model(batch.x) - batch.y).square().mean(1)

    schedules = (linear(), cosine(), wsd())
    factors = torch.stack([s(torch.arange(8) / 8) for s in schedules])
    for inner in (SGD(lr=0.1, momentum=0.9, weight_decay=0.1), AdamW(lr=0.1, weight_decay=0.1)):
        for chunk in (None, 2):
            together = train(
                build, loss, data, members=3, chunk=chunk, optimiser=OwnSchedules(inner, factors), **options
            )
            for i, schedule in enumerate(schedules):
                alone = train(build, loss, data, members=3, optimiser=inner, schedule=schedule, **options)
                torch.testing.assert_close(together.parameters[i], alone.parameters[i], rtol=1e-5, atol=1e-6)
    longer = train(build, loss, data, members=2, optimiser=OwnSchedules(SGD(lr=0.1), factors[:2, :4]), **options)
    held = torch.cat([factors[:2, :4], factors[:2, 3:4].expand(-1, 4)], 1)
    same = train(build, loss, data, members=2, optimiser=OwnSchedules(SGD(lr=0.1), held), **options)
    assert torch.equal(longer.parameters, same.parameters)
    with pytest.raises(ValueError, match="factors: expected 2 rows"):
        train(build, loss, data, members=2, optimiser=OwnSchedules(SGD(lr=0.1), factors), **options)
    for bad in (factors[0], -factors, factors * float("nan")):
        with pytest.raises(ValueError, match="factors: expected"):
            OwnSchedules(SGD(lr=0.1), bad)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_constant_norms_give_linear_decay(order, smooth):
    norms = torch.full((2, 50), 3.0).double() * torch.tensor([1.0, 1e-6]).double()[:, None]
    expected = (49 - torch.arange(50).double()) / 49
    found = refined_schedule(norms, order, smooth)
    torch.testing.assert_close(found, expected.expand(2, 50), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2])
def test_refined_schedule_by_loops(order):
    norms = random.uniform(random.key(2), (30,), torch.float64) + 0.2
    weights = [float(g) ** -order for g in norms]
    raw = [weights[t] * sum(weights[t + 1 :]) for t in range(30)]
    expected = torch.tensor(raw).double() / max(raw)
    found = refined_schedule(norms, order, 0.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(refined_schedule(7e3 * norms, order, 0.0), found)
    total = (sum(weights) ** 2 - sum(w * w for w in weights)) / 2 / max(raw)
    assert float(found.sum()) == pytest.approx(total)
    torch.testing.assert_close(
        torch.vmap(lambda v: refined_schedule(v, order))(norms[None])[0], refined_schedule(norms, order)
    )


def test_running_median_removes_spikes_and_mirrors_the_end():
    norms = torch.ones(40).double()
    norms[17] = 100
    expected = (39 - torch.arange(40).double()) / 39
    torch.testing.assert_close(refined_schedule(norms), expected)
    assert not torch.allclose(refined_schedule(norms, 2, 0.0), expected, atol=1e-3)
    norms = torch.arange(1.0, 21).double()  # windows of 5; the last is (18, 19, 20, 20, 19)
    expected = torch.cat([norms[:-1], norms[-2:-1]])
    torch.testing.assert_close(refined_schedule(norms, 2, 0.1), refined_schedule(expected, 2, 0.0))


def test_norms_that_fall_early_make_a_warm_up():
    norms = 1 + 9 * torch.exp(-torch.arange(200).double() / 10)
    factors = refined_schedule(norms, 2, 0.0)
    peak = int(factors.argmax())
    assert 10 < peak < 60
    assert factors[0] < 0.05
    assert (factors[: peak + 1].diff() > 0).all()
    assert (factors[peak:].diff() < 0).all()
    assert factors[-1] == 0


def bound_by_loops(factors, norms, distance):
    eta, squares = factors.tolist(), [(g * e) ** 2 for g, e in zip(norms.tolist(), factors.tolist(), strict=True)]
    tails = [sum(eta[t:]) for t in range(len(eta))]
    value = distance**2 / (2 * tails[0]) + sum(squares) / (2 * tails[0])
    for k in range(len(eta) - 1):
        value += 0.5 * eta[k] / (tails[k + 1] * tails[k]) * sum(squares[k:])
    return value


def test_bound_by_loops():
    factors = random.uniform(random.key(3), (2, 12), torch.float64)
    norms = 1 + random.uniform(random.key(4), (2, 12), torch.float64)
    expected = [bound_by_loops(f, g, 1.7) for f, g in zip(factors, norms, strict=True)]
    found = last_iterate_bound(factors, norms, 1.7, scaled=False)
    assert found.tolist() == pytest.approx(expected)
    ended = torch.cat([factors, torch.zeros(2, 3)], 1)
    torch.testing.assert_close(
        last_iterate_bound(ended, 1.0, 1.7, scaled=False), last_iterate_bound(factors, 1.0, 1.7, scaled=False)
    )
    scales = torch.linspace(0.01, 4, 4000, dtype=torch.float64)
    least = last_iterate_bound(scales[:, None] * factors[0], norms[:1].expand(4000, 12), 1.7, scaled=False).min()
    torch.testing.assert_close(last_iterate_bound(factors, norms, 1.7)[0], least, rtol=1e-5, atol=0)


def test_bound_of_known_schedules():
    """sqrt(T) B at T = 1000: linear 2.006, cosine 2.063, 1/sqrt(t) 2.570, constant 2.913 and growing like log T."""
    root = 1000**0.5
    curves = [linear()(T), cosine()(T), (torch.arange(1000).double() + 1).rsqrt(), torch.ones(1000).double()]
    found = [root * float(last_iterate_bound(curve)) for curve in curves]
    assert found == pytest.approx([2.006, 2.063, 2.570, 2.913], abs=2e-3)
    flat = [steps**0.5 * float(last_iterate_bound(torch.ones(steps))) for steps in (1000, 10_000, 100_000)]
    squares = [value**2 for value in flat]  # (1 + 1 + log T) for large T
    assert squares[1] - squares[0] == pytest.approx(math.log(10), rel=0.01)
    assert squares[2] - squares[1] == pytest.approx(math.log(10), rel=0.01)
    late = torch.arange(100_000).double() / 100_000
    assert 100_000**0.5 * float(last_iterate_bound(1 - late)) == pytest.approx(2, abs=2e-4)


def test_bound_holds_on_the_absolute_value():
    """Noise-free subgradient descent on |x| from many starts, linear decay with the best scale: last iterate below."""
    factors = 1 - torch.arange(300).double() / 300
    bound = last_iterate_bound(factors)
    energy = last_iterate_bound(factors, scaled=False) - 1 / (2 * factors.sum())
    scale = (1 / (2 * factors.sum()) / energy).sqrt()
    torch.testing.assert_close(last_iterate_bound(scale * factors, scaled=False), bound)
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    for factor in scale * factors:
        x = x - factor * x.sign()
    assert x.abs().max() <= bound
    assert x.abs().max() <= 1 / 300**0.5


def test_wsd_phases():
    factor = wsd(0.1, 0.3, 0.2)
    points = torch.tensor([0.0, 0.05, 0.1, 0.4, 0.7, 0.85, 1.0]).double()
    expected = torch.tensor([0, 0.5, 1, 1, 1, 0.6, 0.2]).double()
    torch.testing.assert_close(factor(points), expected)
    torch.testing.assert_close(wsd(0.0, 1.0)(T), 1 - T)


def test_power_rates():
    a, b, length = 4.6, -0.51, 2048
    rates = power_rates(1000, 1024, length, highest=0.02, decay=0.0)
    tokens = (torch.arange(1000).double() + 1) * 1024 * length
    torch.testing.assert_close(rates, (1024 * a * tokens**b).clamp_max(0.02))
    assert float(1024 * a * 1e12**b) == pytest.approx(3.6e-3, rel=0.02)
    # the clamp ends at T* = (highest / (batch a))^(1/b), 3.4e10 tokens
    end = (0.02 / (1024 * a)) ** (1 / b)
    assert end == pytest.approx(3.4e10, rel=0.02)
    long = power_rates(20_000, 1024, length, decay=0.0)
    first = int((long < 0.02).long().argmax())
    assert first == math.floor(end / (1024 * length))
    # doubling the batch doubles the rate at the same number of tokens
    free = {size: power_rates(2000 // size, size, 1, highest=1e9, decay=0.0) for size in (1, 2)}
    torch.testing.assert_close(free[2], 2 * free[1][1::2])
    # the sum over steps between two numbers of tokens does not depend on the batch: an integral
    totals = [
        float(power_rates(400_000 // size, size, 1, highest=1e9, decay=0.0)[4000 // size :].sum()) for size in (1, 4, 8)
    ]
    assert totals == pytest.approx([a * (400_000 ** (1 + b) - 4000 ** (1 + b)) / (1 + b)] * 3, rel=2e-3)


def test_power_rates_with_warm_up_and_decay():
    plain = power_rates(200, 8, 16, highest=0.5, decay=0.0)
    shaped = power_rates(200, 8, 16, highest=0.5, warm=0.1, decay=0.25, final=0.01)
    torch.testing.assert_close(shaped[20:150], plain[20:150])
    torch.testing.assert_close(shaped[:20], plain[20] * (torch.arange(20) + 1) / 21)
    fall = shaped[150:] / plain[150:]
    torch.testing.assert_close(fall[1:] / fall[:-1], torch.full((49,), 0.01 ** (1 / 50)).double())
    assert float(fall[-1]) == pytest.approx(0.01)


def test_planted_power_law_is_recovered():
    """Parabolas in log rate around batch a T^b, on a grid that is not centred on any; one run never converged."""
    batch = torch.tensor([8.0, 32, 8, 32, 128]).double()
    tokens = torch.tensor([1e5, 1e5, 1e6, 4e6, 1e7]).double()
    best = batch * 4.6 * tokens**-0.51
    rates = torch.logspace(-4, 1.3, 23, dtype=torch.float64)
    losses = 2 + 0.3 * (rates.log() - best[:, None].log()).square()
    losses = torch.where(rates > 6 * best[:, None], float("inf"), losses)
    shuffle = random.permutation(random.key(7), 23)
    fit = fit_power_schedule(rates[shuffle], losses[:, shuffle], batch, tokens)
    torch.testing.assert_close(fit.best, best, rtol=1e-9, atol=0)
    assert (float(fit.a), float(fit.b)) == pytest.approx((4.6, -0.51), rel=1e-8)
    edge = fit_power_schedule(rates[:3], losses[:, :3], batch, tokens)
    torch.testing.assert_close(edge.best, rates[2].expand(5))


def test_rewarming():
    factor = rewarm(0.1, 0.25)
    points = torch.tensor([0.0, 0.05, 0.1, 0.55, 1.0]).double()
    torch.testing.assert_close(factor(points), torch.tensor([0.25, 0.625, 1, 0.625, 0.25]).double())
    torch.testing.assert_close(rewarm(0.0, 0.3)(T), cosine(0.3)(T))


@pytest.mark.parametrize("cooldown", ["cosine", "linear", "inverse_sqrt"])
@pytest.mark.parametrize("alpha", [0.5, 10.0])
def test_infinite_schedule(cooldown, alpha):
    factor = infinite(plateau=0.55, final=0.1, cooldown=cooldown, alpha=alpha)
    for joint in (0.05, 0.15, 0.8):
        points = torch.tensor([joint - 1e-14, joint, joint + 1e-14]).double()
        assert factor(points).diff().abs().max() < 1e-12
    known = factor(torch.tensor([0.025, 0.05, 0.15, 0.5, 0.8, 1.0]).double())
    torch.testing.assert_close(known, torch.tensor([0.5, 1, 0.55, 0.55, 0.55, 0.1]).double())
    anneal = factor(torch.linspace(0.8, 1, 21).double())
    torch.testing.assert_close(
        anneal[1:] / anneal[:-1], torch.full((20,), (0.1 / 0.55) ** 0.05).double(), rtol=1e-6, atol=0
    )
    half = float(factor(torch.tensor(0.1).double()))
    share = {"linear": 0.5, "cosine": 0.5, "inverse_sqrt": (1 - (1 + alpha / 2) ** -0.5) / (1 - (1 + alpha) ** -0.5)}
    assert half == pytest.approx(1 - 0.45 * share[cooldown])
    quarter = float(factor(torch.tensor(0.075).double()))
    assert cooldown != "cosine" or quarter == pytest.approx(1 - 0.45 * (1 - math.cos(math.pi / 4)) / 2)
    endless = infinite(anneal=1.0, plateau=0.55, cooldown=cooldown)
    torch.testing.assert_close(endless(torch.tensor([0.5, 0.999]).double()), torch.full((2,), 0.55).double())


@pytest.mark.parametrize("count", [0, 1, 7, 100, 1000])
@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.25, 0.5, 1 / 3, 1.0])
def test_replay_is_exact_and_even(count, share):
    mask = replay_mask(count, share)
    assert mask.shape == (count,)
    assert int(mask.sum()) == math.floor(share * count + 0.5)
    running = mask.cumsum(0) - share * torch.arange(1, count + 1)
    assert count == 0 or running.abs().max() <= 0.5 + 1e-9


def test_replay_reaches_the_minimiser_of_the_mixture():
    """Two quadratics: gradient descent on replayed data ends where (1 - p) L2 + p L1 is least, at p c1 + (1 - p) c2."""
    h1, c1, h2, c2 = 2.0, -1.0, 1.0, 3.0
    mask = replay_mask(4000, 0.25).double()
    x = torch.tensor(c1).double()
    for replay in mask.tolist():
        x = x - 1e-2 * (replay * h1 * (x - c1) + (1 - replay) * h2 * (x - c2))
    expected = (0.25 * h1 * c1 + 0.75 * h2 * c2) / (0.25 * h1 + 0.75 * h2)
    assert float(x) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_factors(torch.ones(0)), "factors: expected at least one"),
        (lambda: refined_schedule(torch.ones(1)), "norms: expected at least 2"),
        (lambda: refined_schedule(torch.tensor([1.0, 0.0])), "norms: expected values greater"),
        (lambda: refined_schedule(torch.tensor([1.0, float("nan")])), "norms: expected"),
        (lambda: refined_schedule(torch.tensor([1.0, float("inf")])), "norms: expected finite"),
        (lambda: refined_schedule(torch.ones(9), 2, 0.5), "smooth: expected a share"),
        (lambda: last_iterate_bound(torch.zeros(3)), "factors: expected values of at least 0"),
        (lambda: last_iterate_bound(torch.tensor([1.0, -1e-3])), "factors: expected values of at least 0"),
        (lambda: last_iterate_bound(torch.ones(3), 1.0, 0.0), "distance: expected"),
        (lambda: wsd(0.6, 0.5), "warm, decay: expected shares"),
        (lambda: power_rates(10, 0, 4), "batch: expected a number greater"),
        (lambda: power_rates(10, 4, 4, warm=0.6, decay=0.5), r"warm \+ decay: expected"),
        (lambda: fit_power_schedule(torch.ones(2), torch.ones(2, 2), torch.ones(2), torch.ones(2)), "rates: expected"),
        (lambda: fit_power_schedule(torch.ones(3), torch.ones(2, 3), torch.ones(2), torch.ones(2)), "tokens: expected"),
        (lambda: infinite(0.2, 0.1), "warm, cooled, anneal"),
        (lambda: infinite(plateau=0.0), "plateau: expected"),
        (lambda: infinite(cooldown="sine"), "cooldown: expected"),  # type: ignore[arg-type]  # what is refused
        (lambda: replay_mask(5, 1.2), "share: expected"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
