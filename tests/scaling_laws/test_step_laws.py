"""Laws of steps against limits, units, finite differences, brute-force sums, identities and published curves."""

import math
from typing import Any

import pytest
import torch
from law_cases import B, N, S, check_derivatives, check_vmap, doubles

from toolkit import random
from toolkit.scaling_laws.constants import Annealing, KaplanSteps, MultiPower
from toolkit.scaling_laws.frontiers import steps_to_loss
from toolkit.scaling_laws.size_laws import kaplan
from toolkit.scaling_laws.step_laws import (
    annealing_areas,
    annealing_law,
    critical_batch,
    kaplan_steps,
    kaplan_trajectory,
    log_diffusion,
    minimum_cost,
    multi_power_law,
)

STEPS = KaplanSteps(6.5e13, 0.077, 2.1e3, 0.76, 2e8, 0.21)
ANNEALING = Annealing(2.782, 0.600, 0.448, 0.938, 0.998)
MULTI = MultiPower(2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644)
SCHEDULE = 3e-4 * torch.cat([torch.linspace(0.1, 1, 20), torch.ones(20), torch.linspace(0.95, 0.1, 20)]).double()
RATES = SCHEDULE * 1e4  # areas of order 1, so that finite differences are accurate

LAWS: dict[str, Any] = {
    "kaplan_steps": (lambda law, n, s: kaplan_steps(n, s, law), STEPS, (N, S)),
    "critical_batch": (lambda law, x: critical_batch(x, law), STEPS, (doubles(2.0, 3.0, 4.0),)),
    "minimum_cost": (lambda law, s, b: minimum_cost(s, b, law[0].expand_as(s))[1], (2e6,), (S, B)),
    "kaplan_trajectory": (lambda law, n, s, b: kaplan_trajectory(n, s, b, law), STEPS, (N, S, B)),
    "log_diffusion": (lambda law, t: log_diffusion(t, law[0], law[1]), (2.0, 3.0), (S,)),
    "annealing_law": (lambda law, x: annealing_law(RATES * x, law)[9::10], ANNEALING, (doubles(1.0),)),
    "multi_power_law": (lambda law, x: multi_power_law(RATES * x, law)[9::10], MULTI, (doubles(1.0),)),
}


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_those_of_finite_differences(name):
    check_derivatives(*LAWS[name])


@pytest.mark.parametrize("name", LAWS)
def test_vmap_over_constants_and_single_precision(name):
    call, law, args = LAWS[name]
    check_vmap(call, law, args, elementwise=not name.startswith(("annealing", "multi")))  # those are of whole schedules


def test_limits():
    """Endless steps leave the law of size, an endless size that of steps."""
    huge = doubles(1e60)
    torch.testing.assert_close(kaplan_steps(N, huge, STEPS), kaplan(N, 6.5e13, 0.077))
    torch.testing.assert_close(kaplan_steps(huge * 1e200, S, STEPS), (2.1e3 / S) ** 0.76, rtol=1e-8, atol=1e-8)


def test_units_of_steps_and_rates_are_the_callers():
    k = 1e3
    in_k = STEPS._replace(n_c=STEPS.n_c / k, s_c=STEPS.s_c / k, b_star=STEPS.b_star / k)
    torch.testing.assert_close(
        kaplan_trajectory(N / k, S / k, B / k, in_k), kaplan_trajectory(N, S, B, STEPS), rtol=1e-13, atol=0
    )
    areas, finer = annealing_areas(SCHEDULE, 0.9), annealing_areas(SCHEDULE * k, 0.9)
    for area, more in zip(areas, finer, strict=True):
        torch.testing.assert_close(more, area * k, rtol=1e-12, atol=1e-12)


def test_at_the_critical_batch_steps_and_tokens_are_twice_their_least():
    loss = doubles(2.5, 3.0, 3.5)
    critical = critical_batch(loss, STEPS)
    s_min, e_min = minimum_cost(S, critical, critical)
    torch.testing.assert_close(S, 2 * s_min, rtol=1e-14, atol=0)
    torch.testing.assert_close(S * critical, 2 * e_min, rtol=1e-14, atol=0)
    s_min, e_min = minimum_cost(S, B, critical)
    torch.testing.assert_close((S / s_min - 1) * (B * S / e_min - 1), torch.ones_like(S))
    torch.testing.assert_close(e_min / s_min, critical)
    assert critical_batch(doubles(1.0), STEPS).item() == 2e8
    fewer, more = critical_batch(doubles(4.0, 2.0), STEPS)
    assert (more / fewer).item() == pytest.approx(2 ** (1 / 0.21))


def test_the_trajectory_inverts_steps_to_loss():
    n, batch = N[:, None, None], B[:, None]
    loss = (STEPS.n_c / n) ** STEPS.a_n + doubles(1e-3, 0.05, 1.0, 6.0)
    steps = steps_to_loss(loss, n, batch, STEPS)
    torch.testing.assert_close(kaplan_trajectory(n, steps, batch, STEPS), loss.expand_as(steps), rtol=1e-13, atol=0)
    endless = kaplan_trajectory(N, S, doubles(1e60), STEPS)
    torch.testing.assert_close(endless, kaplan_steps(N, S, STEPS), rtol=1e-12, atol=0)
    critical = critical_batch(kaplan_trajectory(N, S, B, STEPS), STEPS)
    s_min, _ = minimum_cost(S, B, critical)  # the two other laws put together give the trajectory
    torch.testing.assert_close(kaplan_trajectory(N, S, B, STEPS), kaplan_steps(N, s_min, STEPS), rtol=1e-12, atol=0)


def test_constants_are_recovered_step_by_step():
    """Losses with 0.5% noise: a_N from asymptotes, a_B from steps and tokens, a_S from the rest, each within 3 SE."""

    def slope(x, y):
        x = x - x.mean()
        b = (x * y).sum() / x.square().sum()
        residual = y - y.mean() - b * x
        return b, (residual.square().sum() / (len(x) - 2) / x.square().sum()).sqrt()

    def noise(seed, count):
        return 1 + 0.005 * random.normal(random.key(seed), (count,), torch.float64)

    n = torch.logspace(6, 8, 12, dtype=torch.float64)
    b, error = slope(n.log(), (kaplan(n, 6.5e13, 0.077) * noise(1, 12)).log())
    assert abs(-b - 0.077) < 3 * error < 0.01
    levels = torch.linspace(3.6, 6.0, 8, dtype=torch.float64)
    batches = torch.logspace(5, 7, 10, dtype=torch.float64)
    critical = []
    for i, level in enumerate(levels):
        steps = steps_to_loss(level, doubles(1e8), batches, STEPS) * noise(10 + i, 10)
        x = 1 / (steps * batches)
        least = slope(x, 1 / steps)[0]  # 1/S = 1/S_min - (E_min/S_min)/E
        critical.append(-least)
    b, error = slope(levels.log(), torch.stack(critical).log())
    assert abs(-b - 1 / 0.21) < 3 * error < 0.8
    s = torch.logspace(2, 4, 20, dtype=torch.float64)
    rest = (kaplan_steps(doubles(1e8), s, STEPS) - kaplan(doubles(1e8), 6.5e13, 0.077)) * noise(3, 20)
    b, error = slope(s.log(), rest.log())
    assert abs(-b - 0.76) < 3 * error < 0.01


# Learning-rate schedules


def loop_areas(lr, decay, warmup=0):
    forward = annealing = momentum = 0.0
    areas = []
    for i, rate in enumerate(lr.tolist()):
        drop = lr[i - 1].item() - rate if i >= max(1, warmup) else 0.0
        momentum = decay * momentum + drop
        forward, annealing = forward + rate, annealing + momentum
        areas.append((forward, annealing))
    return torch.tensor(areas, dtype=torch.float64).T


@pytest.mark.parametrize("warmup", [0, 1, 15, 20, 60])
@pytest.mark.parametrize("decay", [0.5, 0.99, 1.0])
def test_areas_are_those_of_a_loop(decay, warmup):
    forward, annealing = annealing_areas(RATES, decay, warmup)
    expected = loop_areas(RATES, decay, warmup)
    torch.testing.assert_close(forward, expected[0])
    torch.testing.assert_close(annealing, expected[1])


def test_areas_in_closed_form():
    lr = torch.ones(1000, dtype=torch.float64)
    lr[100:] = 0.1
    assert annealing_areas(lr, 0.999)[1][999].item() == pytest.approx(0.9 * (1 - 0.999**900) / 0.001, rel=1e-12)
    assert annealing_areas(lr, 0.999)[1][999].item() == pytest.approx(534.252, abs=5e-4)
    forward, annealing = annealing_areas(torch.full((50,), 0.3, dtype=torch.float64), 0.99)
    torch.testing.assert_close(forward, 0.3 * torch.arange(1, 51).double())
    assert not annealing.any()
    linear = 1 - 0.01 * torch.arange(51).double()
    s, decay = torch.arange(51).double(), 0.99
    closed = 0.01 * (s / (1 - decay) - decay * (1 - decay**s) / (1 - decay) ** 2)
    torch.testing.assert_close(annealing_areas(linear, decay)[1], closed, rtol=1e-9, atol=1e-12)
    assert closed[50].item() == pytest.approx(10.895601, abs=5e-7)
    forward, annealing = annealing_areas(linear, 1.0)
    torch.testing.assert_close(annealing, s * linear[0] - (forward - linear[0]))


def test_the_annealing_law_is_linear_in_three_constants():
    forward, annealing = annealing_areas(RATES, 0.9)
    design = torch.stack([torch.ones_like(forward), forward**-0.448, -annealing], 1)
    curve = annealing_law(RATES, Annealing(2.7, 0.6, 0.448, 0.94, 0.9))
    solution = torch.linalg.lstsq(design, curve[:, None]).solution[:, 0]
    torch.testing.assert_close(solution, doubles(2.7, 0.6, 0.94))


def loop_multi_power(lr, law, t, warmup=0):
    total, gained = sum(lr[: t + 1]), 0.0
    for k in range(max(1, warmup), t + 1):
        x = law.rate * lr[k] ** -law.gamma * sum(lr[k : t + 1])
        gained += (lr[k - 1] - lr[k]) * (1 - (x + 1) ** -law.beta)
    return law.floor + law.scale * total**-law.alpha - law.gain * gained


@pytest.mark.parametrize("warmup", [0, 7])
def test_the_multi_power_law_is_that_of_a_loop(warmup):
    at = torch.tensor([0, 5, 19, 41, 59])
    expected = doubles(*(loop_multi_power(SCHEDULE.tolist(), MULTI, t, warmup) for t in at.tolist()))
    torch.testing.assert_close(multi_power_law(SCHEDULE, MULTI, at, warmup), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(multi_power_law(SCHEDULE, MULTI, None, warmup)[at], expected, rtol=1e-10, atol=0)


# Some of the published losses of a 100M model (github.com/thu-yao-01-luo/MultiPowerLaw, MIT), held out from both fits.
REAL_STEPS = torch.tensor([2560, 4352, 6144, 7936, 9664, 11456, 13248, 15040])
REAL_LOSSES = doubles(3.6507, 3.3891, 3.2797, 3.2169, 3.1106, 3.0930, 3.0810, 3.0718)
TWO_STAGES = torch.full((16000,), 3e-4, dtype=torch.float64)
TWO_STAGES[:2160] = torch.linspace(0, 3e-4, 2160, dtype=torch.float64)
TWO_STAGES[8000:] = 3e-5


def test_both_schedule_laws_predict_a_real_run():
    """Published constants of the multi-power law; without the rises of the warm-up it is off by more than 0.1."""
    errors = multi_power_law(TWO_STAGES, MULTI, REAL_STEPS) - REAL_LOSSES
    assert errors.abs().mean() < 0.006
    without = multi_power_law(TWO_STAGES, MULTI, REAL_STEPS, warmup=2160) - REAL_LOSSES
    assert without.mean() < -0.1
    errors = annealing_law(TWO_STAGES, ANNEALING, warmup=2160)[REAL_STEPS] - REAL_LOSSES
    assert errors.abs().mean() < 0.008


def test_log_diffusion_is_recovered():
    t = torch.arange(1, 2000).double()
    curve = log_diffusion(t, 2.0, 3.0)
    design = torch.stack([torch.ones_like(t), t.log()], 1)
    torch.testing.assert_close(torch.linalg.lstsq(design, curve[:, None]).solution[:, 0], doubles(2, 3))
    assert (curve[1] - curve[0]).item() == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: kaplan_steps(N, S * 0, STEPS), "s_min"),
        (lambda: critical_batch(doubles(-2.0), STEPS), "loss"),
        (lambda: minimum_cost(S, B, B * 0), "critical"),
        (lambda: kaplan_trajectory(N, S, -B, STEPS), "batch"),
        (lambda: annealing_areas(SCHEDULE, 1.1), "decay"),
        (lambda: annealing_areas(-SCHEDULE, 0.9), "lr"),
        (lambda: annealing_areas(SCHEDULE, 0.9, 61), "warmup"),
        (lambda: annealing_law(SCHEDULE, ANNEALING._replace(scale=0.0)), "scale"),
        (lambda: multi_power_law(SCHEDULE, MULTI, torch.tensor([60])), "at"),
        (lambda: multi_power_law(SCHEDULE, MULTI._replace(rate=0.0)), "rate"),
        (lambda: log_diffusion(doubles(0.0), 1.0, 1.0), "t"),
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
