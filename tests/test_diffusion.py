"""Diffusion against exact densities, closed-form flows, brute force, and the mixture that it should give back."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from toolkit import diffusion as d
from toolkit.fleet import Adam, Fleet, cosine, train
from toolkit.fleet.members import Fields
from toolkit.models import MLP
from toolkit.random import fold_in, key, normal

MIX = d.Mixture(
    means=torch.tensor([[1.2, 0.3], [-0.9, 0.8], [-0.2, -1.3], [0.5, 1.4]], dtype=torch.float64),
    deviations=torch.tensor([0.3, 0.2, 0.4, 0.25], dtype=torch.float64),
    weights=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64),
    classes=torch.tensor([0, 1, 2, 0]),
)
FIELDS = ("means", "deviations", "weights", "classes")
X = normal(key(3), (7, 2), torch.float64)
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def reference(t: float, condition: int) -> MixtureSameFamily:
    """The noised mixture made of torch's distributions."""
    alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    own = (MIX.classes == condition) | (condition < 0)
    scale = (alpha**2 * MIX.deviations[own] ** 2 + sigma**2).sqrt()[:, None].expand(-1, 2)
    return MixtureSameFamily(Categorical(MIX.weights[own]), Independent(Normal(alpha * MIX.means[own], scale), 1))


def net() -> d.ScoreNet:
    return d.ScoreNet(2, 3, (48, 48))


def fit(members: int = 2, steps: int = 400) -> Fleet:
    x, y = MIX.sample(3000)
    data = {"x": x.float(), "y": y}
    hyper = {"drop": torch.full((members,), 0.4)}
    return train(
        net,
        d.denoising_loss,
        data,
        members=members,
        steps=steps,
        batch=128,
        optimiser=Adam(5e-3),
        schedule=cosine(),
        hyper=hyper,
        progress=False,
    )


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return fit()


@pytest.mark.parametrize("condition", [-1, 0, 2])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_density_and_score_are_those_of_torch_and_autograd(t, condition):
    x = X.clone().requires_grad_()
    wanted = reference(t, condition).log_prob(x)
    slope = torch.autograd.grad(wanted.sum(), x)[0]
    torch.testing.assert_close(MIX.log_density(X, t, condition), wanted.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(MIX.score(X, t, condition), slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(MIX.epsilon(X, t, condition), -math.sin(math.pi * t / 2) * slope)


def test_each_point_has_its_own_time_and_condition():
    conditions = torch.tensor([0, 1, 2, -1, 0, 1, -1])
    found = MIX.score(X, TIMES, conditions)
    for i, (x, t, c) in enumerate(zip(X, TIMES, conditions, strict=True)):
        torch.testing.assert_close(found[i], MIX.score(x, float(t), int(c)))
    torch.testing.assert_close(MIX.score(torch.stack([X, X]), TIMES, conditions)[1], found)
    torch.testing.assert_close(torch.vmap(MIX.score)(X, TIMES, conditions), found)


@pytest.mark.parametrize("t", [0.0, 0.5])
def test_posterior_is_bayes_rule(t):
    own = torch.stack([MIX.weights[MIX.classes == c].sum() * reference(t, c).log_prob(X).exp() for c in range(3)], 1)
    torch.testing.assert_close(MIX.posterior(X, t), own / own.sum(1, keepdim=True))


def test_samples_have_the_moments_and_shares_of_the_mixture():
    x, y = MIX.sample(20_000, seed=1)
    torch.testing.assert_close(
        y.bincount() / len(y), torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.015
    )  # 4 standard errors
    for c in range(3):
        part, truth = x[y == c], reference(0.0, c)
        torch.testing.assert_close(part.mean(0), truth.mean, rtol=0, atol=0.035)
        torch.testing.assert_close(part.var(0), truth.variance, rtol=0.06, atol=0)
    x, y = MIX.sample(500, condition=2)
    assert bool((y == 2).all())
    torch.testing.assert_close(x.std(0), torch.full((2,), 0.4, dtype=x.dtype), rtol=0.12, atol=0)
    assert torch.equal(MIX.sample(5, condition=torch.tensor([2, 0, 1, 2, 1]))[1], torch.tensor([2, 0, 1, 2, 1]))


def test_without_a_class():
    rest = MIX.without(0)
    torch.testing.assert_close(rest.weights, torch.tensor([0, 0.6, 0.4, 0], dtype=torch.float64))
    assert not bool((rest.sample(500)[1] == 0).any())
    x = X.clone().requires_grad_()
    torch.testing.assert_close(
        rest.score(X, 0.4), torch.autograd.grad(rest.log_density(x, 0.4).sum(), x)[0], rtol=1e-9, atol=1e-9
    )
    assert rest.posterior(X).shape == (7, 3)
    assert bool((rest.posterior(X)[:, 0] == 0).all())
    with pytest.raises(ValueError, match="condition"):
        rest.score(X, 0.1, 0)


def test_conversions():
    noise = normal(key(4), (7, 2), torch.float64)
    alpha, sigma = d.alpha_sigma(TIMES)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    x = d.noised(X, noise, TIMES)
    torch.testing.assert_close(d.epsilon_to_denoised(x, noise, TIMES), X)
    torch.testing.assert_close(d.denoised_to_epsilon(x, X, TIMES), noise)
    score = MIX.score(x, TIMES)
    torch.testing.assert_close(d.epsilon_to_score(d.score_to_epsilon(score, TIMES), TIMES), score)
    assert math.cos(d.LAST * math.pi / 2) == pytest.approx(1 / 256)


def test_the_denoised_point_of_a_gaussian_is_its_posterior_mean():
    s, t = 0.5, 0.4
    one = d.Mixture(MIX.means[:1], torch.tensor([s]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    wanted = (alpha * s**2 * X + sigma**2 * MIX.means[0]) / (alpha**2 * s**2 + sigma**2)
    torch.testing.assert_close(d.epsilon_to_denoised(X, one.epsilon(X, t), t), wanted)


def test_flows_of_a_gaussian_have_a_closed_form():
    """x_0 = m + s (x_t - α m) / √(α² s² + σ²): DDIM comes near it with the steps, Heun's rule with their square."""
    s, m = 0.3, MIX.means[0]
    one = d.Mixture(m[None], torch.tensor([s]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    alpha, sigma = math.cos(math.pi * d.LAST / 2), math.sin(math.pi * d.LAST / 2)
    wanted = m + s * (X - alpha * m) / math.sqrt(alpha**2 * s**2 + sigma**2)
    for sampler, order, size in ((d.ddim, 1, 0.04), (d.probability_flow, 2, 0.01)):
        coarse, fine = (float((sampler(one.epsilon, X, steps=n) - wanted).abs().max()) for n in (40, 80))
        assert coarse < size
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    middle = d.probability_flow(one.epsilon, X, steps=200, until=0.5)
    both = d.probability_flow(one.epsilon, middle, steps=200, since=0.5)
    torch.testing.assert_close(both, wanted, rtol=0, atol=1e-3)


def test_ddim_steps():
    noise = normal(key(4), (7, 2), torch.float64)

    def same(x, t, condition):
        return noise

    start = d.noised(X, noise, 0.8)
    for steps in (1, 3):  # where the noise is known, any number of steps lies on the path
        path = d.ddim(same, start, since=0.8, until=0.2, steps=steps, path=True)
        assert path.shape == (steps + 1, 7, 2)
        torch.testing.assert_close(path[0], start)
        torch.testing.assert_close(path[-1], d.noised(X, noise, 0.2))
        torch.testing.assert_close(d.ddim(same, start, since=0.8, steps=steps), X)
    found = d.ddim(MIX.epsilon, X, 1, since=0.7, until=0.4, steps=1)  # a turn by the angle between the times
    epsilon, turn = MIX.epsilon(X, 0.7, 1), (0.4 - 0.7) * math.pi / 2
    alpha, sigma = math.cos(0.35 * math.pi), math.sin(0.35 * math.pi)
    velocity = (epsilon - sigma * X) / alpha
    torch.testing.assert_close(found, math.cos(turn) * X + math.sin(turn) * velocity)


@pytest.mark.parametrize("sampler", [d.ddim, d.probability_flow])
@pytest.mark.parametrize("condition", [None, 0])
def test_the_exact_score_gives_the_mixture_back(sampler, condition):
    rounds, count = 16, 400
    start = normal(fold_in(key(8), torch.arange(rounds)), (count, 2), torch.float64)
    found = sampler(MIX.epsilon, start, condition, steps=60)
    truths, others = (
        [MIX.sample(count, condition=condition, seed=first + i)[0] for i in range(rounds)] for first in (0, 100)
    )
    for distance in (d.sliced_wasserstein, lambda a, b: d.mmd(a, b, 0.5)):
        floor, reached, shifted = (
            torch.stack([distance(a, b) for a, b in zip(truths, samples, strict=True)])
            for samples in (others, list(found), list(found + 0.2))
        )
        error = math.sqrt(float(floor.var() + reached.var()) / rounds)
        assert abs(float(reached.mean() - floor.mean())) < 4 * error
        assert float(shifted.mean() - floor.mean()) > 6 * error


def test_guidance(fleet):
    start, w = normal(key(5), (6, 2)), torch.tensor([0.0, 3.0])
    field = d.epsilon_field(fleet)
    free, own = field(start, 0.4, None), field(start, 0.4, 1)
    steered = d.guided(field, w)(start, 0.4, 1)
    torch.testing.assert_close(steered[0], free[0])
    torch.testing.assert_close(steered[1], 3 * own[1] - 2 * free[1])
    torch.testing.assert_close(d.guided(field, 1.0)(start, 0.4, 1), own)
    for sampler in (d.ddim, d.probability_flow):
        together = sampler(fleet, start, 1, steps=4, guidance=w)
        torch.testing.assert_close(together[1], sampler(fleet[1:], start, 1, steps=4, guidance=3.0)[0])
        torch.testing.assert_close(together[0], sampler(fleet[:1], start, steps=4)[0])


def test_the_field_of_a_fleet_is_its_members(fleet):
    start = normal(key(5), (2, 6, 2))
    t, condition = torch.linspace(0.1, 0.9, 6), torch.tensor([[0, 1, 2, -1, 0, 1], [2, 2, -1, 1, 0, 0]])
    found = d.epsilon_field(fleet)(start, t, condition)
    for i in range(2):
        torch.testing.assert_close(found[i], fleet[i](start[i], t, condition[i]).detach(), rtol=1e-4, atol=1e-5)
    member: Any = fleet[0]
    x = start[0]
    unconditional = member(x, t, torch.full((6,), d.NULL))
    torch.testing.assert_close(member(x, t), unconditional)
    assert float((member(x, t, 0) - unconditional).detach().abs().max()) > 0.1


def test_training_brings_epsilon_near_the_exact_one(fleet):
    x, y = MIX.sample(2000, seed=7)
    noise = normal(key(9), (2000, 2), torch.float64)
    fresh = fit(steps=0)
    cases: list[tuple[float, Any, float]] = [(0.3, y, 10), (0.6, y, 10), (0.3, d.NULL, 2), (0.6, d.NULL, 1.5)]
    for t, condition, factor in cases:
        points = d.noised(x, noise, t)
        exact = MIX.epsilon(points, t, condition).float()
        before, after = (
            (d.epsilon_field(f)(points.float(), t, condition) - exact).square().mean((1, 2)) for f in (fresh, fleet)
        )
        assert bool((after * factor < before).all()), (t, factor, before, after)


def test_a_class_that_was_not_seen_is_answered_like_no_condition():
    x, y = MIX.sample(600)
    seen = (y != 1).expand(2, -1)
    fleet = train(net, d.denoising_loss, {"x": x.float(), "y": y}, members=2, steps=20, subsets=seen, progress=False)
    field, points = d.epsilon_field(fleet), X.float()
    assert torch.equal(field(points, 0.3, 1), field(points, 0.3, d.NULL))
    assert not torch.equal(field(points, 0.3, 0), field(points, 0.3, d.NULL))


def test_the_loss_asks_for_the_noise_that_was_added():
    x, y = normal(key(1), (500, 5), torch.float64), torch.arange(500) % 4
    seen: dict[str, torch.Tensor] = {}

    def knows_the_data(noisy, t, condition):
        seen.update(t=t, condition=condition)
        return d.denoised_to_epsilon(noisy, x, t)

    def call(model, **hyper):
        return d.denoising_loss(model, Fields(x=x, y=y, key=key(2)), Fields(hyper))

    assert float(call(knows_the_data).max()) < 1e-15
    assert 0.18 < float((seen["condition"] == d.NULL).double().mean()) < 0.32
    assert bool(((seen["condition"] == y) | (seen["condition"] == d.NULL)).all())
    assert 0 < float(seen["t"].min()) < 0.02
    assert d.LAST - 0.02 < float(seen["t"].max()) < d.LAST
    call(knows_the_data, drop=0.0)
    assert torch.equal(seen["condition"], y)
    call(knows_the_data, drop=1.0)
    assert bool((seen["condition"] == d.NULL).all())
    values = call(lambda noisy, t, condition: torch.zeros_like(noisy))
    assert values.shape == (500,)
    assert float(values.mean()) == pytest.approx(1, abs=0.12)  # mean square of standard normal noise


def test_the_net_takes_glyphs():
    fleet = train(
        lambda: d.ScoreNet(64, 10, (16,)),
        d.denoising_loss,
        {"x": normal(key(0), (20, 64)), "y": torch.arange(20) % 10},
        members=2,
        steps=2,
        batch=8,
        progress=False,
    )
    assert d.ddim(fleet, normal(key(1), (3, 64)), torch.tensor([1, 2, 3]), steps=2).shape == (2, 3, 64)


def test_mmd_is_the_sum_over_pairs():
    for dim in (2, 9):
        x, y = normal(key(1), (6, dim), torch.float64), normal(key(2), (5, dim), torch.float64) + 0.7
        k = lambda a, b: math.exp(-float((a - b).square().sum()) / (2 * 0.8**2))  # noqa: E731
        within = [sum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
        wanted = sum(within) - 2 * sum(k(a, b) for a in x for b in y) / 30
        assert float(d.mmd(x, y, 0.8)) == pytest.approx(wanted, abs=1e-12)


def test_mmd_has_no_bias():
    draws = normal(fold_in(key(0), torch.arange(4000)), (2, 4, 2), torch.float64)
    values = torch.vmap(lambda z: d.mmd(z[0], z[1]))(draws)
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(4000)


def test_sliced_wasserstein_is_the_best_matching_in_each_direction():
    x, y = normal(key(1), (5, 3), torch.float64), normal(key(2), (5, 3), torch.float64)
    axes = torch.nn.functional.normalize(normal(key(6), (4, 3), torch.float64), dim=1)
    orders = [list(order) for order in itertools.permutations(range(5))]
    squares = [min(float(((x - y[o]) @ axis).square().mean()) for o in orders) for axis in axes]
    wanted = math.sqrt(sum(squares) / 4)
    assert float(d.sliced_wasserstein(x, y, projections=4, seed=6)) == pytest.approx(wanted)
    longer = y.repeat_interleave(3, 0)[:9]  # three points of y three times
    found = d.sliced_wasserstein(x, y[:3], projections=4, seed=6)
    repeated = d.sliced_wasserstein(x.repeat_interleave(9, 0), longer.repeat_interleave(5, 0), projections=4, seed=6)
    assert float(found) == pytest.approx(float(repeated))


def test_sliced_wasserstein_of_a_shift():
    x, shift = normal(key(1), (40, 2), torch.float64), torch.tensor([0.6, -0.8], dtype=torch.float64)
    assert float(d.sliced_wasserstein(x, x + shift, projections=20_000)) == pytest.approx(math.sqrt(0.5), rel=0.01)
    assert float(d.sliced_wasserstein(x, x[torch.randperm(40)])) == 0
    together = torch.vmap(lambda z: d.sliced_wasserstein(z, x))(torch.stack([x + shift, 2 * x]))
    torch.testing.assert_close(together[1], d.sliced_wasserstein(2 * x, x))


def test_errors_name_the_argument(fleet):
    parts: Any = (MIX.means, MIX.deviations, MIX.weights, MIX.classes)
    for i, name, bad in (
        (0, "means", torch.ones(4)),
        (1, "deviations", torch.ones(3)),
        (1, "deviations", -MIX.deviations),
        (2, "weights", 2 * MIX.weights),
        (3, "classes", torch.ones(4)),
    ):
        with pytest.raises(ValueError, match=name):
            d.Mixture(**dict(zip(FIELDS, (*parts[:i], bad, *parts[i + 1 :]), strict=True)))
    noise = normal(key(0), (4, 2))
    other = train(lambda: MLP(2, (), 2), lambda m, b, h: m(b.x).sum(-1), {"x": noise}, members=1, steps=0)
    for name, call in {
        "count": lambda: MIX.sample(0),
        "condition": lambda: MIX.score(X, 0.1, 7),
        "erased": lambda: MIX.without(5),
        "x": lambda: MIX.score(X[:, :1], 0.1),
        "dim": lambda: d.ScoreNet(0, 3),
        "hidden": lambda: d.ScoreNet(2, 3, ()),
        "steps": lambda: d.ddim(fleet, noise, steps=0),
        "since": lambda: d.ddim(fleet, noise, since=1.0),
        "until": lambda: d.probability_flow(fleet, noise, since=0.5, until=0.6),
        "points": lambda: d.sliced_wasserstein(noise, noise[:0]),
        "projections": lambda: d.sliced_wasserstein(noise, noise, projections=0),
        "bandwidth": lambda: d.mmd(noise, noise, 0.0),
        "x and y": lambda: d.mmd(noise, noise[:1]),
        "fleet": lambda: d.epsilon_field(other),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(ValueError, match="x: expected points"):
        d.ddim(fleet, torch.zeros(3, 4, 2))
