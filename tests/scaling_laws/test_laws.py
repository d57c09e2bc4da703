"""Laws against limits, units, finite differences, brute-force sums, identities and published curves."""

import math
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from toolkit import random
from toolkit.scaling_laws.frontiers import steps_to_loss
from toolkit.scaling_laws.laws import (
    Annealing,
    Bivariate,
    Chinchilla,
    DataConstrained,
    KaplanData,
    KaplanSteps,
    MultiPower,
    PowerLaw,
    annealing_areas,
    annealing_law,
    bivariate,
    capacity_limit,
    chinchilla,
    critical_batch,
    data_constrained,
    kaplan,
    kaplan_data,
    kaplan_steps,
    kaplan_trajectory,
    log_diffusion,
    minimum_cost,
    multi_power_law,
    power_law,
    stored_bits,
)

POWER = PowerLaw(1.7, 40.0, 0.3)
DATA = KaplanData(6.4e13, 0.076, 1.8e13, 0.103)
STEPS = KaplanSteps(6.5e13, 0.077, 2.1e3, 0.76, 2e8, 0.21)
CHINCHILLA = Chinchilla(1.8172, 477.8, 2143.0, 0.3473, 0.3672)
CONSTRAINED = DataConstrained(
    math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596, 5.309743, 15.387756
)
BIVARIATE = Bivariate(1.4, 300.0, 0.18, 0.31)
ANNEALING = Annealing(2.782, 0.600, 0.448, 0.938, 0.998)
MULTI = MultiPower(2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


N, D = doubles(1e6, 3e7, 1e9), doubles(2e8, 5e9, 4e10)
S, B = doubles(3e3, 2e4, 1e5), doubles(1e5, 1e6, 3e7)
SCHEDULE = 3e-4 * torch.cat([torch.linspace(0.1, 1, 20), torch.ones(20), torch.linspace(0.95, 0.1, 20)]).double()
RATES = SCHEDULE * 1e4  # areas of order 1, so that finite differences are accurate

LAWS: dict[str, Any] = {
    "power_law": (lambda law, x: power_law(x, law), POWER, (N,)),
    "kaplan": (lambda law, x: kaplan(x, law[0], law[1]), (8.8e13, 0.076), (N,)),
    "kaplan_data": (lambda law, n, d: kaplan_data(n, d, law), DATA, (N, D)),
    "kaplan_steps": (lambda law, n, s: kaplan_steps(n, s, law), STEPS, (N, S)),
    "critical_batch": (lambda law, x: critical_batch(x, law), STEPS, (doubles(2.0, 3.0, 4.0),)),
    "minimum_cost": (lambda law, s, b: minimum_cost(s, b, law[0].expand_as(s))[1], (2e6,), (S, B)),
    "kaplan_trajectory": (lambda law, n, s, b: kaplan_trajectory(n, s, b, law), STEPS, (N, S, B)),
    "chinchilla": (lambda law, n, d: chinchilla(n, d, law), CHINCHILLA, (N, D)),
    "data_constrained": (
        lambda law, n, d: data_constrained(n, d, torch.full_like(d, 1e9), law),
        CONSTRAINED,
        (doubles(1e6, 3e7, 1e11), D),
    ),
    "bivariate": (lambda law, n, d: bivariate(n, d, law), BIVARIATE, (N, D)),
    "log_diffusion": (lambda law, t: log_diffusion(t, law[0], law[1]), (2.0, 3.0), (S,)),
    "annealing_law": (lambda law, x: annealing_law(RATES * x, law)[9::10], ANNEALING, (doubles(1.0),)),
    "multi_power_law": (lambda law, x: multi_power_law(RATES * x, law)[9::10], MULTI, (doubles(1.0),)),
    "stored_bits": (
        lambda law, p: sum(stored_bits(p, p / 3, names=law[0], pool=law[1], diversity=law[2])),
        (1000.0, 2.0**20, 32.0),
        (doubles(3.0, 7.0),),
    ),
}


def constants(law, dtype=torch.float64):
    tensors = [torch.tensor(float(value), dtype=dtype) for value in law]
    return type(law)(*tensors) if hasattr(law, "_fields") else tuple(tensors)


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_those_of_finite_differences(name):
    """In the logarithm of each argument and constant, so that one step suits 1e-1 and 1e13."""
    call, law, args = LAWS[name]
    kind = type(law) if hasattr(law, "_fields") else lambda *values: values
    logs = [torch.tensor(math.log(value), dtype=torch.float64, requires_grad=True) for value in law]
    inputs = [x.log().requires_grad_() for x in args]

    def value(*tensors):
        return call(kind(*(t.exp() for t in tensors[: len(logs)])), *(t.exp() for t in tensors[len(logs) :]))

    assert torch.autograd.gradcheck(value, (*logs, *inputs), eps=1e-5, atol=1e-7, rtol=2e-5)


@pytest.mark.parametrize("name", LAWS)
def test_vmap_over_constants_and_single_precision(name):
    call, law, args = LAWS[name]
    single = constants(law)
    plain = call(single, *args)
    stacked = [torch.stack([value, value * 0.9]) for value in single]
    kind = type(law) if hasattr(law, "_fields") else lambda *values: values
    both = vmap(lambda *values: call(kind(*values), *args))(*stacked)
    torch.testing.assert_close(both[0], plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(both[1], call(kind(*(v[1] for v in stacked)), *args), rtol=1e-12, atol=0)
    if not name.startswith(("annealing", "multi")):  # element by element, but for the two laws of whole schedules
        torch.testing.assert_close(vmap(lambda *x: call(single, *x))(*args), plain, rtol=1e-12, atol=0)
        half = call(constants(law, torch.float32), *(x.float() for x in args))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), plain, rtol=2e-4, atol=0)


def test_limits():
    huge = doubles(1e60)
    assert power_law(huge, POWER).item() == pytest.approx(1.7, abs=1e-14)
    torch.testing.assert_close(kaplan_data(N, huge, DATA), kaplan(N, 6.4e13, 0.076), rtol=1e-4, atol=0)
    torch.testing.assert_close(kaplan_data(huge * 1e60, D, DATA), kaplan(D, 1.8e13, 0.103))
    torch.testing.assert_close(kaplan_steps(N, huge, STEPS), kaplan(N, 6.5e13, 0.077))
    torch.testing.assert_close(kaplan_steps(huge * 1e200, S, STEPS), (2.1e3 / S) ** 0.76, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(chinchilla(N, huge, CHINCHILLA), 1.8172 + 477.8 / N**0.3473)
    torch.testing.assert_close(chinchilla(huge, D, CHINCHILLA), 1.8172 + 2143.0 / D**0.3672)
    assert bivariate(huge, huge, BIVARIATE).item() == pytest.approx(1.4, abs=1e-14)
    assert kaplan(doubles(8.8e13), 8.8e13, 0.076).item() == 1


def test_published_points():
    """Kaplan's one-variable laws at a billion parameters, Epoch's floor, by hand with logarithms."""
    assert kaplan(doubles(1e9), 8.8e13, 0.076).item() == pytest.approx(math.exp(0.076 * math.log(88000)), rel=1e-14)
    by_hand = 1.8172 + 477.8 * math.exp(-0.3473 * math.log(70e9)) + 2143 * math.exp(-0.3672 * math.log(1.4e12))
    assert chinchilla(doubles(70e9), doubles(1.4e12), CHINCHILLA).item() == pytest.approx(by_hand, rel=1e-14)


def test_units_are_the_callers():
    """Counting in thousands with constants in thousands leaves the loss alone; nats to bits scales floor and scales."""
    k, e = 1e3, CHINCHILLA
    other = e._replace(size_scale=e.size_scale * k**-e.alpha, data_scale=e.data_scale * k**-e.beta)
    torch.testing.assert_close(chinchilla(N / k, D / k, other), chinchilla(N, D, e), rtol=1e-13, atol=0)
    bits = e._replace(
        floor=e.floor / math.log(2), size_scale=e.size_scale / math.log(2), data_scale=e.data_scale / math.log(2)
    )
    torch.testing.assert_close(chinchilla(N, D, bits), chinchilla(N, D, e) / math.log(2), rtol=1e-13, atol=0)
    scaled = DATA._replace(n_c=DATA.n_c / k, d_c=DATA.d_c / k)
    torch.testing.assert_close(kaplan_data(N / k, D / k, scaled), kaplan_data(N, D, DATA), rtol=1e-13, atol=0)
    in_k = STEPS._replace(n_c=STEPS.n_c / k, s_c=STEPS.s_c / k, b_star=STEPS.b_star / k)
    torch.testing.assert_close(
        kaplan_trajectory(N / k, S / k, B / k, in_k), kaplan_trajectory(N, S, B, STEPS), rtol=1e-13, atol=0
    )
    c = CONSTRAINED
    per_k = c._replace(size_scale=c.size_scale * k**-c.alpha, data_scale=c.data_scale * k**-c.beta)
    unique, big = torch.full_like(D, 1e9), doubles(1e6, 3e7, 1e11)
    torch.testing.assert_close(
        data_constrained(big / k, D / k, unique / k, per_k), data_constrained(big, D, unique, c), rtol=1e-13, atol=0
    )
    areas, finer = annealing_areas(SCHEDULE, 0.9), annealing_areas(SCHEDULE * k, 0.9)
    for area, more in zip(areas, finer, strict=True):
        torch.testing.assert_close(more, area * k, rtol=1e-12, atol=1e-12)


# Batch sizes and steps


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


# Repeated data


def test_repeats():
    """New data is Chinchilla's; a first repeat is worth as much, all of them at most r_d times the unique data."""
    small = doubles(1e4, 1e5, 1e6)
    plain = Chinchilla(*CONSTRAINED[:5])
    enough = doubles(1e15)
    torch.testing.assert_close(data_constrained(small, D, enough, CONSTRAINED), chinchilla(small, D, plain))
    unique = doubles(1e8)
    limit = data_constrained(small, unique * 1e6, unique, CONSTRAINED)
    torch.testing.assert_close(limit, chinchilla(small, unique * (1 + 15.387756), plain))
    four = data_constrained(small, unique * 4, unique, CONSTRAINED)
    torch.testing.assert_close(
        four, chinchilla(small, unique * (1 + 15.387756 * (1 - math.exp(-3 / 15.387756))), plain)
    )
    used = CONSTRAINED._replace(r_d=1e12, r_n=1e12)  # nothing decays
    big = doubles(1e12)
    torch.testing.assert_close(data_constrained(big, D, unique, used), chinchilla(big, D, plain), rtol=1e-8, atol=0)

    def of_data(d):
        return data_constrained(doubles(1e5)[0], d, unique[0], CONSTRAINED)

    def of_fresh(d):
        return chinchilla(doubles(1e5)[0], d, plain)

    just = unique[0] * (1 + 1e-9)
    assert grad(of_data)(just).item() == pytest.approx(grad(of_fresh)(just).item(), rel=1e-6)


def test_excess_size():
    """Sizes beyond the compute-optimal one for the unique data are worth at most r_n times as much."""
    plain, unique = Chinchilla(*CONSTRAINED[:5]), doubles(1e8)
    best = (math.exp(6.255414) / math.exp(7.3049974)) ** (1 / 0.3526596) * unique  # α = β
    marginal = [0.3526596 * scale * x**-0.3526596 for scale, x in ((plain[1], best), (plain[2], unique))]
    torch.testing.assert_close(*marginal)  # αA/N^α = βB/D^β there
    below = data_constrained(best / 2, unique, unique, CONSTRAINED)
    torch.testing.assert_close(below, chinchilla(best / 2, unique, plain))
    endless = data_constrained(best * 1e9, unique, unique, CONSTRAINED)
    torch.testing.assert_close(endless, chinchilla(best * (1 + 5.309743), unique, plain))


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


# Bits, diffusion, translation


def test_bits_of_guessing_and_of_perfect_memory():
    facts = {"names": 1000, "pool": 2**20, "diversity": 32, "attributes": 4, "chunks": 2}
    guess = stored_bits(doubles(math.log(2**20)), doubles(2 * math.log(32)), **facts)
    torch.testing.assert_close(guess.names, doubles(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(guess.values, doubles(0), atol=1e-9, rtol=0)
    perfect = stored_bits(doubles(math.log(1000)), doubles(0), **facts)
    assert perfect.names.item() == pytest.approx(1000 * math.log2(2**20 / 1000))
    assert perfect.values.item() == pytest.approx(1000 * 4 * 2 * 5)
    assert capacity_limit(**facts).item() == pytest.approx((perfect.names + perfect.values).item())
    worse = stored_bits(doubles(math.log(1000)), doubles(2 * math.log(32) + 1), **facts)
    assert worse.values.item() == pytest.approx(-4000 / math.log(2))  # affine, -N K / ln 2 per nat
    single = stored_bits(doubles(1.0), doubles(1.0), **facts | {"attributes": 1})
    assert stored_bits(doubles(1.0), doubles(1.0), **facts).values.item() == pytest.approx(4 * single.values.item())


def test_bits_of_a_biography():
    """A person is one of 400 · 400 · 1000 names with 47.59 bits of facts; a name alone is 27.25 bits."""
    names = 400 * 400 * 1000
    facts = 2 * (12 * 28 * 200) * 200 * 300 * 100 * 263
    assert capacity_limit(names=1, pool=names, diversity=facts).item() == pytest.approx(27.25 + 47.59, abs=0.01)
    assert capacity_limit(names=names, pool=names, diversity=facts).item() / names == pytest.approx(47.59, abs=5e-3)


def test_log_diffusion_is_recovered():
    t = torch.arange(1, 2000).double()
    curve = log_diffusion(t, 2.0, 3.0)
    design = torch.stack([torch.ones_like(t), t.log()], 1)
    torch.testing.assert_close(torch.linalg.lstsq(design, curve[:, None]).solution[:, 0], doubles(2, 3))
    assert (curve[1] - curve[0]).item() == pytest.approx(3 * math.log(2))


def test_encoder_and_decoder():
    """Log-excess is additive; scaling one side keeps floor and slope; a law in the sum of both fits worse."""
    encoder, decoder = torch.meshgrid(doubles(1e7, 4e7, 3e8), doubles(2e7, 1e8, 9e8), indexing="ij")
    excess = (bivariate(encoder, decoder, BIVARIATE) - 1.4).log()
    mixed = excess[1:, 1:] - excess[1:, :-1] - excess[:-1, 1:] + excess[:-1, :-1]
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), atol=1e-12, rtol=0)
    alone = power_law(encoder[:, 1], PowerLaw(1.4, 300.0 * 1e8**-0.31, 0.18))
    torch.testing.assert_close(bivariate(encoder, decoder, BIVARIATE)[:, 1], alone)
    ones, noisy = torch.ones(9).double(), excess.flatten() + 0.003 * random.normal(random.key(4), (9,), torch.float64)

    def residual(*columns):
        design = torch.stack([ones, *(c.flatten().log() for c in columns)], 1)
        return (design @ torch.linalg.lstsq(design, noisy[:, None]).solution - noisy[:, None]).square().sum()

    full = residual(encoder, decoder)
    assert (residual(encoder + decoder) - full) / (full / 6) > 13.7  # the 1% point of F(1, 6)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: power_law(doubles(1.0, 0.0), POWER), "x"),
        (lambda: power_law(doubles(math.nan), POWER), "x"),
        (lambda: power_law(N, POWER._replace(exponent=-0.1)), "exponent"),
        (lambda: power_law(N, POWER._replace(scale=doubles(-1.0))), "scale"),
        (lambda: kaplan(N, -1.0, 0.1), "x_c"),
        (lambda: kaplan_data(N, -D, DATA), "d"),
        (lambda: kaplan_steps(N, S * 0, STEPS), "s_min"),
        (lambda: critical_batch(doubles(-2.0), STEPS), "loss"),
        (lambda: minimum_cost(S, B, B * 0), "critical"),
        (lambda: kaplan_trajectory(N, S, -B, STEPS), "batch"),
        (lambda: chinchilla(-N, D, CHINCHILLA), "n"),
        (lambda: chinchilla(N, D, CHINCHILLA._replace(beta=0.0)), "beta"),
        (lambda: data_constrained(N, D, D * 0, CONSTRAINED), "unique"),
        (lambda: bivariate(N, D, BIVARIATE._replace(p_d=-1.0)), "p_d"),
        (lambda: annealing_areas(SCHEDULE, 1.1), "decay"),
        (lambda: annealing_areas(-SCHEDULE, 0.9), "lr"),
        (lambda: annealing_areas(SCHEDULE, 0.9, 61), "warmup"),
        (lambda: annealing_law(SCHEDULE, ANNEALING._replace(scale=0.0)), "scale"),
        (lambda: multi_power_law(SCHEDULE, MULTI, torch.tensor([60])), "at"),
        (lambda: multi_power_law(SCHEDULE, MULTI._replace(rate=0.0)), "rate"),
        (lambda: stored_bits(doubles(1.0), doubles(1.0), names=0, pool=5, diversity=2), "names"),
        (lambda: capacity_limit(names=5, pool=9, diversity=0), "diversity"),
        (lambda: log_diffusion(doubles(0.0), 1.0, 1.0), "t"),
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
