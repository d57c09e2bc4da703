"""Samplers against closed-form flows, their orders and limits; measures against shifts and counts that are known."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from toolkit.diffusion import LAST, Mixture, ScoreNet, alpha_sigma, ddim, noised, probability_flow
from toolkit.distillation.sampling import (
    few_steps,
    gaussian_flow,
    jump,
    mode_gap,
    quality_by_steps,
    quality_floor,
    sample_quality,
    teacher_samples,
)
from toolkit.fleet import Fleet
from toolkit.random import key, normal

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
GAUSSIAN = Mixture(MEAN[None], torch.tensor([0.5]).double(), torch.ones(1).double(), torch.zeros(1, dtype=torch.int64))
MIX = Mixture(
    means=torch.tensor([[1.2, 0.3], [-0.9, 0.8], [-0.2, -1.3], [0.5, 1.4]], dtype=torch.float64),
    deviations=torch.tensor([0.3, 0.2, 0.4, 0.25], dtype=torch.float64),
    weights=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64),
    classes=torch.tensor([0, 1, 2, 0]),
)
START = normal(key(1), (400, 2), torch.float64)


def test_the_flow_of_a_gaussian_is_what_a_fine_solver_finds():
    for since, until in ((LAST, 0.0), (0.8, 0.3)):
        solved = probability_flow(GAUSSIAN.epsilon, START, steps=500, since=since, until=until)
        torch.testing.assert_close(gaussian_flow(START, since, until, MEAN, 0.5), solved, rtol=0, atol=2e-5)


def test_the_flow_of_a_gaussian_composes_and_carries_the_density():
    t, s, u = 0.9, 0.5, 0.0
    half = gaussian_flow(START, t, s, MEAN, 0.5)
    torch.testing.assert_close(gaussian_flow(half, s, u, MEAN, 0.5), gaussian_flow(START, t, u, MEAN, 0.5))
    torch.testing.assert_close(gaussian_flow(START, t, t, MEAN, 0.5), START)
    times = torch.linspace(0.1, 0.9, len(START), dtype=torch.float64)
    each = gaussian_flow(START, times, 0.0, MEAN, 0.5)
    torch.testing.assert_close(each[7], gaussian_flow(START[7], float(times[7]), 0.0, MEAN, 0.5))
    alpha, sigma = alpha_sigma(torch.tensor(t).double())  # the factor is the root of the ratio of the densities
    ratio = GAUSSIAN.log_density(START, t) - GAUSSIAN.log_density(gaussian_flow(START, t, 0.0, MEAN, 0.5), 0.0)
    wanted = 2 * math.log(0.5) - ((alpha * 0.5) ** 2 + sigma**2).log()
    torch.testing.assert_close(ratio, wanted.expand(len(START)))


def test_a_jump_is_a_step_of_ddim_and_keeps_points_where_they_are():
    epsilon = MIX.epsilon(START, 0.8)
    found = ddim(MIX.epsilon, START, steps=1, since=0.8, until=0.3)
    torch.testing.assert_close(jump(START, epsilon, 0.8, 0.3), found)
    torch.testing.assert_close(jump(START, epsilon, 0.8, 0.8), START)
    noise = normal(key(2), (400, 2), torch.float64)
    torch.testing.assert_close(jump(noised(START, noise, 0.8), noise, 0.8, 0.2), noised(START, noise, 0.2))


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2)])
def test_the_order_of_a_sampler(method, order):
    exact = gaussian_flow(START, LAST, 0.0, MEAN, 0.5)
    errors = [
        (teacher_samples(GAUSSIAN, START, steps=n, method=method) - exact).square().mean().sqrt() for n in (30, 60, 120)
    ]
    slopes = [float(torch.log2(a / b)) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.12)


def test_a_sampler_takes_a_fleet():
    fleet = Fleet.of([ScoreNet(2, 3, (8,)) for _ in range(2)], lambda: ScoreNet(2, 3, (8,)))
    start = START[:20].float()
    pairs: list[tuple[Any, Any]] = [("ddim", ddim), ("heun", probability_flow)]
    for method, sampler in pairs:
        found = teacher_samples(fleet, start, 1, steps=3, method=method, guidance=2.0)
        assert found.shape == (2, 20, 2)
        torch.testing.assert_close(found, sampler(fleet, start, 1, steps=3, guidance=2.0))
    torch.testing.assert_close(few_steps(fleet, start, 1, steps=3), ddim(fleet, start, 1, steps=3))
    noisy = few_steps(fleet, start, 1, steps=3, eta=0.5, seed=4)
    torch.testing.assert_close(noisy, few_steps(fleet, start, 1, steps=3, eta=0.5, seed=4))
    assert not torch.equal(noisy, few_steps(fleet, start, 1, steps=3, eta=0.5, seed=5))


def exact_student(x, t, condition):
    """ε̂ whose jump to time 0 is the exact consistency map of the Gaussian."""
    alpha, sigma = alpha_sigma(torch.as_tensor(t, dtype=x.dtype))
    return (x - alpha * gaussian_flow(x, t, 0.0, MEAN, 0.5)) / sigma


def test_without_new_noise_the_steps_are_those_of_ddim():
    torch.testing.assert_close(few_steps(MIX, START, 2, steps=5), ddim(MIX.epsilon, START, 2, steps=5))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_multistep_consistency_sampling_keeps_the_density(steps):
    """With the exact map every step begins and ends in the data's density, so any number of steps gives it."""
    start = normal(key(3), (40_000, 2), torch.float64)
    found = few_steps(exact_student, start, steps=steps, eta=1.0)
    torch.testing.assert_close(found.mean(0), MEAN, rtol=0, atol=0.011)  # 4 standard errors and α(LAST) · MEAN · d
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.5).double(), rtol=0, atol=0.008)
    if steps == 1:
        torch.testing.assert_close(found, gaussian_flow(start, LAST, 0.0, MEAN, 0.5))


def test_some_noise_brings_the_level_back_to_the_next_time():
    """With a field of zeros x only shrinks: x_s = α_s / α_t x, and the noise's variance is what is missing at s."""
    zero = torch.zeros(60_000, 2, dtype=torch.float64)
    found = few_steps(lambda x, t, c: torch.zeros_like(x), zero, steps=2, eta=0.4)
    middle, early = LAST / 2, 0.6 * LAST / 2
    alpha, sigma = alpha_sigma(torch.tensor([middle, early], dtype=torch.float64))
    variance = sigma[0] ** 2 - (alpha[0] / alpha[1] * sigma[1]) ** 2
    wanted = (variance.sqrt() / alpha[0]).expand(2)
    torch.testing.assert_close(found.std(0), wanted, rtol=0.012, atol=0)
    x, y = noised(START, START, early), noised(START, START, middle)
    torch.testing.assert_close(alpha[0] / alpha[1] * (x - sigma[1] * START), y - sigma[0] * START)


def test_quality_of_a_shift_and_of_the_truth():
    count = 2000
    floor = quality_floor(MIX, count, repeats=6)
    assert floor.shape == (6,)
    assert 0 < float(floor.max()) < 0.12
    assert len(set(floor.tolist())) == 6
    x = MIX.sample(count, seed=8)[0]
    shifted = torch.stack([x, x + torch.tensor([3.0, 4.0], dtype=torch.float64)])
    near, far = sample_quality(shifted, MIX).tolist()
    assert near < 0.12
    assert far == pytest.approx(5 / math.sqrt(2), rel=0.12)  # |shift| / √dim up to the drawn directions
    free, worse = sample_quality(shifted, MIX, "mmd").tolist()
    assert abs(free) < 4e-3
    assert worse > 0.2
    only = MIX.sample(count, condition=2, seed=9)[0]
    assert float(sample_quality(only, MIX, condition=2)) < 0.1 < float(sample_quality(only, MIX)) / 2


def test_quality_against_steps():
    steps = (1, 2, 4, 16)
    found = quality_by_steps(
        lambda start, n: teacher_samples(MIX, start, steps=n), MIX, steps, count=2000, dtype=torch.float64
    )
    assert found.shape == (4, 1)
    assert found[:, 0].diff().max() < 0  # more steps are better
    assert found[0] > 5 * quality_floor(MIX, 2000).mean()
    heun = quality_by_steps(
        lambda start, n: teacher_samples(MIX, start, steps=n, method="heun"), MIX, (8,), count=2000, dtype=torch.float64
    )
    assert float(heun) < float(found[3])  # at the same number of evaluations


def test_mode_gap():
    x, y = MIX.sample(20_000)
    assert float(mode_gap(x, MIX)) < 0.015
    without = torch.stack([MIX.without(1).sample(5000)[0], MIX.without(2).sample(5000)[0]])
    torch.testing.assert_close(mode_gap(without, MIX), torch.tensor([0.3, 0.2]).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(mode_gap(x[y == 2], MIX), torch.tensor([0.8], dtype=torch.float64), rtol=0, atol=0.01)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="steps"):
        few_steps(MIX, START, steps=0)
    with pytest.raises(ValueError, match="eta"):
        few_steps(MIX, START, steps=1, eta=1.5)
    with pytest.raises(ValueError, match="deviation"):
        gaussian_flow(START, 0.5, 0.0, MEAN, 0.0)
    with pytest.raises(ValueError, match="samples"):
        sample_quality(START * float("nan"), MIX)
    with pytest.raises(ValueError, match="steps"):
        quality_by_steps(lambda start, n: start, MIX, ())
    with pytest.raises(ValueError, match="repeats"):
        quality_floor(MIX, 10, repeats=0)
