"""Closed forms against a second solver, their limits, published numbers and simulations; crossings and best ridges."""

import math

import pytest
import torch
from scipy.optimize import brentq, minimize_scalar

from toolkit.scaling_laws.ridge_theory import (
    Spectrum,
    optimal_ridge,
    overfitting_ratio,
    power_law_spectrum,
    ridge_crossover,
    ridge_risk,
    simulate_ridge,
)

FINITE = power_law_spectrum(1.5, 1.6, modes=600, tails=False)
INFINITE = power_law_spectrum(2, 1.3)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kernel(spectrum: Spectrum, n: float, ridge: float, noise: float) -> tuple[float, float, float]:
    """The kernel's formula, solved by scipy."""
    lam, power = spectrum.eigenvalues, spectrum.power

    def gap(log_kappa):
        kappa = math.exp(log_kappa)
        return float((lam / (lam + kappa)).sum()) + ridge / kappa - n

    kappa = math.exp(brentq(gap, -30, 30, xtol=1e-14))
    learnt = lam / (lam + kappa)
    test = n / (n - learnt.square().sum()) * (((1 - learnt).square() * power).sum() + noise)
    return float(test), float((ridge / n / kappa) ** 2 * test), kappa


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.4, 30.0])
def test_kernel_risk_is_the_formula_solved_by_another_solver(ridge):
    n = tensor(3, 40, 250.5)
    found = ridge_risk(FINITE, n, ridge, 0.05)
    expected = tensor(*(value for size in n.tolist() for value in kernel(FINITE, size, ridge, 0.05))).view(3, 3)
    torch.testing.assert_close(torch.stack(tuple(found), 1), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("n", "k", "ridge"), [(80, 120, 0.02), (120, 60, 0.05), (100, 100, 0.1), (30, 300, 0.0)])
def test_both_implicit_equations_hold(n, k, ridge):
    """z and q from κ and γ as they come back: n = z + δ/κ, k = z + kκ/γ, and the risk as it stands in the paper."""
    risk = ridge_risk(FINITE, n, ridge, 0.05, k)
    lam, v2, kappa = FINITE.eigenvalues, FINITE.power, float(risk.effective)
    z = n - ridge / kappa
    gamma = k * kappa / (k - z)
    share = lam / (lam + gamma)
    assert float(share.sum()) == pytest.approx(z, rel=1e-9)
    q = float(share.square().sum())
    bias = ((gamma / (lam + gamma) - kappa * lam / (lam + gamma) ** 2 * k / (k - q)) * v2).sum() + 0.05
    assert float(risk.test) == pytest.approx(float(bias / (1 - (q * (k - 2 * z) + z * z) / (n * (k - q)))), rel=1e-9)
    assert float(risk.train) == pytest.approx((ridge / (n * kappa)) ** 2 * float(risk.test), rel=1e-9, abs=1e-20)


def test_published_random_feature_risks():
    k, n, ridge = tensor(120, 60, 100), tensor(80, 120, 100), tensor(0.02, 0.05, 0.1)
    risk = ridge_risk(FINITE, n, ridge, 0.05, k)
    torch.testing.assert_close(risk.test, tensor(0.5136, 0.4928, 0.3951), rtol=0, atol=5.1e-5)
    torch.testing.assert_close(risk.train, tensor(0.00872, 0.1508, 0.0659), rtol=0, atol=5.1e-5)


def test_a_small_ridge_peaks_where_there_are_as_many_features_as_samples():
    wide = power_law_spectrum(1.5, 1.6, modes=2000, tails=False)
    found = ridge_risk(wide, 64, 1e-4, 0.05, tensor(16, 32, 60, 64, 68, 128, 512)).test
    torch.testing.assert_close(found, tensor(0.90, 0.93, 4.77, 10.23, 4.78, 0.64, 0.37), rtol=0, atol=5.1e-3)


def test_many_features_are_the_kernel_and_many_samples_learn_all_features():
    kernel_risk, many = ridge_risk(FINITE, 100, 0.1, 0.05), ridge_risk(FINITE, 100, 0.1, 0.05, 1e9)
    torch.testing.assert_close(tuple(many), tuple(kernel_risk), rtol=1e-6, atol=0)
    nearer = [float(ridge_risk(FINITE, 100, 0.1, 0.05, k).test / kernel_risk.test - 1) for k in (1e3, 1e4)]
    assert 8 < nearer[0] / nearer[1] < 12  # the rest falls as 1/k
    k = 50.0
    gamma = math.exp(
        brentq(lambda u: float((FINITE.eigenvalues / (FINITE.eigenvalues + math.exp(u))).sum()) - k, -30, 9)
    )
    limit = float((gamma / (FINITE.eigenvalues + gamma) * FINITE.power).sum() + 0.05)
    for ridge in (0.0, 0.1):
        assert float(ridge_risk(FINITE, 1e9, ridge, 0.05, k).test) == pytest.approx(limit, rel=1e-6)


def test_no_ridge_is_the_limit_of_a_small_one():
    k = tensor(40, 300, math.inf)
    for bare, small in zip(ridge_risk(FINITE, 100, 0, 0.05, k), ridge_risk(FINITE, 100, 1e-9, 0.05, k), strict=True):
        torch.testing.assert_close(bare, small, rtol=1e-4, atol=1e-9)
    fewer = power_law_spectrum(1.5, 1.6, modes=20, tails=False)
    ordinary = ridge_risk(fewer, 100, 0, 0.05)  # least squares: noise · n / (n - modes)
    torch.testing.assert_close(ordinary.test, torch.tensor(0.05 * 100 / 80, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(ordinary.train, torch.tensor(0.05 * 80 / 100, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("n", "k", "ridge"), [(80, 120, 0.02), (120, 60, 0.05), (100, 100, 0.1)])
def test_simulated_random_features_agree_within_standard_errors(n, k, ridge):
    seeds = 40
    risk = ridge_risk(FINITE, n, ridge, 0.05, k)
    found = simulate_ridge(FINITE, n, tensor(ridge), seeds, 0.05, k, seed=3)
    for values, expected in zip(found, risk, strict=False):
        standard = float(values.std()) / seeds**0.5
        assert abs(float(values.mean() - expected)) < 3 * standard + 0.01 * float(expected)
        assert standard < 0.07 * float(expected)


def test_simulated_kernels_with_both_tails_agree_within_standard_errors():
    seeds, n, ridges = 60, 60, tensor(0.0, 0.05, 1.0)
    cut = power_law_spectrum(1.5, 1.6, modes=800)
    tests, trains = simulate_ridge(cut, n, ridges, seeds, noise=0.1, seed=1)
    risk = ridge_risk(power_law_spectrum(1.5, 1.6), n, ridges, 0.1)
    for found, expected in ((tests, risk.test), (trains, risk.train)):
        error = (found.mean(0) - expected).abs()
        assert bool((error <= 3 * found.std(0) / seeds**0.5 + 0.01 * expected).all()), (found.mean(0), expected)
    assert bool((trains[:, 0] < 1e-20).all())


def test_simulation_is_ridge_regression():
    """One seed by hand: primal normal equations, and the mean squared errors on drawn new samples."""
    from toolkit import random

    small = power_law_spectrum(1.2, 1.5, modes=12, tails=False)
    tests, trains = simulate_ridge(small, 30, tensor(0.3, 2.0), 2, noise=0.2, features=8, seed=5)
    own = random.fold_in(random.key(5), 1)
    x = random.normal(random.fold_in(own, 0), (30, 12), torch.float64)
    y = x @ small.power.sqrt() + 0.2**0.5 * random.normal(random.fold_in(own, 1), (30,), torch.float64)
    maps = random.normal(random.fold_in(own, 2), (8, 12), torch.float64) * small.eigenvalues.sqrt() / 8**0.5
    for j, ridge in enumerate((0.3, 2.0)):
        z = x @ maps.mT
        theta = torch.linalg.solve(z.mT @ z + ridge * torch.eye(8).double(), z.mT @ y)
        assert float(trains[1, j]) == pytest.approx(float((y - z @ theta).square().mean()), rel=1e-9)
        fresh = random.normal(random.key(9), (200_000, 12), torch.float64)
        error = (fresh @ (maps.mT @ theta - small.power.sqrt())).square().mean() + 0.2
        assert float(tests[1, j]) == pytest.approx(float(error), rel=0.02)


def test_seeds_do_not_depend_on_their_number_and_run_on_each_device(device):
    cut = power_law_spectrum(1.5, 1.6, modes=50, device=device)
    one = simulate_ridge(cut, 20, tensor(0.1), 3, seed=2)
    more = simulate_ridge(cut, 20, tensor(0.1), 5, seed=2)
    for few, many in zip(one, more, strict=True):
        assert few.device.type == device
        torch.testing.assert_close(few, many[:3], rtol=1e-9, atol=0)
    assert ridge_risk(cut, 20, 0.1, 0.0, 30).test.device.type == device


def test_an_infinite_spectrum_is_that_of_many_modes_with_both_tails():
    wide = power_law_spectrum(2, 1.3, modes=300_000)
    n, k = tensor(5, 100), tensor(50, math.inf)
    found, expected = ridge_risk(INFINITE, n, 0.3, 0.1, k), ridge_risk(wide, n, 0.3, 0.1, k)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-7, atol=0)
    total = float(INFINITE.counts @ INFINITE.eigenvalues) + INFINITE.eigenvalue_tail
    assert total == pytest.approx(math.pi**2 / 6, rel=1e-8)
    power = float(INFINITE.counts @ INFINITE.power) + INFINITE.power_tail
    assert power == pytest.approx(3.931949211809, rel=1e-7)  # ζ(1.3)


def test_best_risk_falls_in_samples_and_features():
    sizes = tensor(16, 32, 64, 128, 256)
    _, risk = optimal_ridge(FINITE, sizes[:, None], 0.05, sizes)
    steps = [float(risk.test.diff(dim=axis).max()) for axis in (0, 1)]
    assert max(steps) == pytest.approx(-0.034, abs=1e-3)
    _, kernel_risk = optimal_ridge(FINITE, sizes, 0.05)
    assert bool((kernel_risk.test < risk.test[:, -1]).all())


@pytest.mark.parametrize(("n", "k", "noise"), [(50, 80, 0.05), (50, 30, 0.3), (80, math.inf, 0.5)])
def test_the_best_ridge_is_scipys(n, k, noise):
    ridge, risk = optimal_ridge(FINITE, n, noise, k)

    def cost(log_ridge):
        return float(ridge_risk(FINITE, n, math.exp(log_ridge), noise, k).test)

    best = minimize_scalar(cost, bounds=(-12, 4), method="bounded", options={"xatol": 1e-9})
    assert float(ridge) == pytest.approx(math.exp(best.x), rel=1e-4)
    assert float(risk.test) == pytest.approx(best.fun, rel=1e-9)
    again = ridge_risk(FINITE, n, ridge, noise, k)
    torch.testing.assert_close(tuple(risk), tuple(again), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("alpha", "beta", "ratio"), [(1.8, 1.4, 0.1276), (2.0, 1.3, 0.2900), (1.5, 1.4, 0.0204)])
def test_overfitting_is_obligatory_to_a_known_degree(alpha, beta, ratio):
    _, risk = optimal_ridge(power_law_spectrum(alpha, beta), tensor(30, 3000))
    found = risk.train / risk.test
    expected = overfitting_ratio(alpha, beta)
    assert float(expected) == pytest.approx(((alpha - beta) / ((alpha - 1) * beta)) ** 2, rel=1e-9)
    assert float(expected) == pytest.approx(ratio, abs=1.01e-4)
    assert float(found[1]) == pytest.approx(ratio, abs=5.1e-5)
    assert float(found[0]) == pytest.approx(float(expected), rel=0.04)


def test_a_spectrum_without_its_tails_misleads():
    """At 3,000 samples even 100,000 modes are too few; with both tails they are enough."""
    right = float(overfitting_ratio(1.5, 1.4))
    ratios = []
    for tails in (True, False):
        _, risk = optimal_ridge(power_law_spectrum(1.5, 1.4, modes=100_000, tails=tails), 3000, points=16)
        ratios.append(float(risk.train / risk.test))
    assert ratios[0] == pytest.approx(right, rel=0.02)
    assert abs(ratios[1] / right - 1) > 0.2


def test_zero_ridge_is_best_exactly_where_noise_is_low():
    alpha, beta = 1.5, 1.9
    edge = (beta - alpha) / (alpha - 1)
    below, above = (float(overfitting_ratio(alpha, beta, s * edge)) for s in (0.99, 1.01))
    assert below == 0
    assert above > 0
    spectrum, n = power_law_spectrum(alpha, beta), 3000
    bias = float(ridge_risk(spectrum, n, 0.0).test) / alpha  # E without noise is the bias sum times n/(n - q) = α
    ridge, risk = optimal_ridge(spectrum, n, tensor(0.9, 1.1, 3.0) * edge * bias)
    assert float(ridge[0]) == 0
    assert bool((ridge[1:] > 0).all())
    expected = float(overfitting_ratio(alpha, beta, 3.0 * edge))
    assert float(risk.train[2] / risk.test[2]) == pytest.approx(expected, rel=0.01)


def test_crossing_of_two_ridges():
    n = tensor(4, 16, 64, 256, 1024)
    ratio = ridge_risk(INFINITE, n, 1.0).test / ridge_risk(INFINITE, n, 0.0).test
    torch.testing.assert_close(ratio, tensor(0.823, 0.838, 0.922, 1.068, 1.275), rtol=0, atol=5.1e-4)
    crossing = ridge_crossover(INFINITE, tensor(1.0, 0.3), 0.0, 4, 5000)
    torch.testing.assert_close(crossing, tensor(143.85, 480.65), rtol=0, atol=5.1e-3)
    assert float(crossing[1] / crossing[0]) == pytest.approx(0.3 ** (-1 / (2 - 1)), rel=0.01)
    assert math.isnan(float(ridge_crossover(INFINITE, 1.0, 0.0, 200, 5000)))


def test_simulated_ridges_cross_where_theory_says():
    """Paired over seeds: the crossing of the mean risks, by a line in log n, with a bootstrap interval."""
    seeds, sizes = 30, (64, 128, 256)
    cut = power_law_spectrum(2, 1.3, modes=800)
    tests = torch.stack(
        [simulate_ridge(cut, n, tensor(1.0, 0.0), seeds, seed=n)[0] for n in sizes]
    )  # size, seed, ridge
    draws = torch.randint(seeds, (500, seeds), generator=torch.Generator().manual_seed(0))
    means = tests[:, draws].mean(2)  # size, draw, ridge
    log_ratio = (means[..., 0] / means[..., 1]).log()
    log_n = tensor(*sizes).log()[:, None]
    centred = log_n - log_n.mean()
    slope = (centred * log_ratio).sum(0) / centred.square().sum()
    crossing = (log_n.mean() - log_ratio.mean(0) / slope).exp()
    low, high = crossing.quantile(tensor(0.025, 0.975)).tolist()
    assert low < 143.85 < high
    assert high / low < 2


def test_bad_settings():
    with pytest.raises(ValueError, match=r"alpha.*greater than 1.*got 1"):
        power_law_spectrum(1, 1.3)
    with pytest.raises(ValueError, match=r"beta.*got 0\.9"):
        power_law_spectrum(2, 0.9)
    with pytest.raises(ValueError, match=r"modes.*got 0"):
        power_law_spectrum(2, 1.3, modes=0)
    for name, given in (("samples", 0), ("samples", math.inf), ("ridge", -1), ("noise", math.nan), ("features", 0)):
        with pytest.raises(ValueError, match=rf"{name}: expected"):
            ridge_risk(FINITE, **({"samples": 10, "ridge": 0.1} | {name: given}))
    with pytest.raises(ValueError, match=r"spectrum\.eigenvalues"):
        ridge_risk(FINITE._replace(eigenvalues=-FINITE.eigenvalues), 10, 0.1)
    with pytest.raises(ValueError, match=r"spectrum\.power.*float64"):
        ridge_risk(FINITE._replace(power=FINITE.power.float()), 10, 0.1)
    with pytest.raises(ValueError, match=r"three vectors"):
        ridge_risk(FINITE._replace(counts=FINITE.counts[1:]), 10, 0.1)
    with pytest.raises(ValueError, match=r"beta: expected"):
        overfitting_ratio(1.5, 4.0)
    with pytest.raises(ValueError, match=r"alpha: expected"):
        overfitting_ratio(1.0, 1.5)
    with pytest.raises(ValueError, match=r"noise_to_bias: expected"):
        overfitting_ratio(2.0, 1.5, -1.0)
    with pytest.raises(ValueError, match=r"low, high"):
        ridge_crossover(INFINITE, 1.0, 0.0, 10, 5)
    with pytest.raises(ValueError, match=r"points"):
        optimal_ridge(FINITE, 10, points=2)
    with pytest.raises(ValueError, match=r"single modes"):
        simulate_ridge(INFINITE, 10, tensor(0.1), 2)
    with pytest.raises(ValueError, match=r"tails=False"):
        simulate_ridge(power_law_spectrum(2, 1.3, modes=20), 10, tensor(0.1), 2, features=5)
    with pytest.raises(ValueError, match=r"seeds.*got 0"):
        simulate_ridge(FINITE, 10, tensor(0.1), 0)
    with pytest.raises(ValueError, match=r"ridges: expected"):
        simulate_ridge(FINITE, 10, tensor(-0.1), 2)
