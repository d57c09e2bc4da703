"""The solver against autograd, scipy's NNLS, scipy's optimisers and stationarity."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls

from toolkit import random
from toolkit.scaling_laws import least_squares
from toolkit.scaling_laws.least_squares import (
    Problem,
    huber,
    levenberg_marquardt,
    nonnegative,
    predictions,
    residuals,
    variable_projection,
)

POINTS, BOUNDS = 60, (0.0, 4.0)
LOGS = 4 * random.uniform(random.key(1), (2, POINTS), torch.float64) - 2
TRUE = torch.tensor([[0.6, 0.25, 0.2, 0.35, 0.5]], dtype=torch.float64)
NOISE = random.normal(random.key(2), (8, POINTS), torch.float64)
WEIGHTS = 0.5 + random.uniform(random.key(3), (POINTS,), torch.float64)
CASES = [("log_huber", 5e-3), ("log_squares", math.inf), ("squares", math.inf)]


def problem(objective="log_huber", delta=5e-3, term=(0, 1), offset=True, noise=0.01):
    empty = Problem(LOGS, LOGS[0], WEIGHTS, term, offset, objective, delta)
    theta = TRUE if max(term) else TRUE[:, [0, 1, 3, 4]]
    losses = predictions(empty, theta if offset else theta[:, 1:])[0] * (noise * NOISE[0]).exp()
    return empty._replace(losses=losses)


def value(given, theta):
    return (given.weights * huber(given, residuals(given, predictions(given, theta)))).sum(-1)


@pytest.mark.parametrize(("objective", "delta"), CASES)
@pytest.mark.parametrize(("term", "offset"), [((0, 1), True), ((0, 0), True), ((0, 1), False)])
def test_gradient_and_hessian_are_those_of_autograd(objective, delta, term, offset):
    given = problem(objective, delta, term, offset)
    theta = random.uniform(random.key(4), (3, given.linear + 2), torch.float64) + 0.1
    found = least_squares._local(given, theta)
    for i, row in enumerate(theta):

        def scalar(x):
            return value(given, x[None])[0]

        torch.testing.assert_close(found.value[i], scalar(row), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradient[i], torch.func.grad(scalar)(row), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.hessian[i], torch.func.hessian(scalar)(row), rtol=1e-10, atol=1e-12)


def test_non_negative_least_squares_is_scipys():
    active = 0
    for i in range(40):
        a = random.normal(random.key(5, i), (9, 4), torch.float64)
        b = random.normal(random.key(6, i), (9,), torch.float64)
        x = nonnegative((a.mT @ a)[None], (a.mT @ b)[None])[0]
        torch.testing.assert_close(x, torch.from_numpy(nnls(a.numpy(), b.numpy())[0]), rtol=1e-9, atol=1e-11)
        active += int((x == 0).any())
    assert active > 20  # bounds mattered


@pytest.mark.parametrize(("objective", "delta"), CASES)
def test_projection_reaches_the_minimum_over_linear_parameters(objective, delta):
    given = problem(objective, delta)
    grid = torch.tensor([[0.35, 0.5], [0.8, 0.3], [1.5, 1.5]], dtype=torch.float64)
    linear, best = variable_projection(given, grid, sweeps=3000)
    for i, exponents in enumerate(grid):

        def scalar(c, exponents=exponents):
            return value(given, torch.cat([c, exponents])[None])[0]

        assert torch.allclose(best[i], scalar(linear[i]), rtol=1e-12)
        slope = torch.func.grad(scalar)(linear[i])
        assert torch.where(linear[i] > 0, slope.abs(), (-slope).clamp_min(0)).max() < 1e-6 * (1 + float(best[i]))
        again = minimize(
            lambda c, scalar=scalar: float(scalar(torch.from_numpy(c))), linear[i].numpy(), method="Nelder-Mead"
        )
        assert float(best[i]) <= again.fun + 1e-10


@pytest.mark.parametrize(("objective", "delta"), CASES)
@pytest.mark.parametrize("term", [(0, 1), (0, 0)])
def test_no_optimiser_of_scipy_finds_less(objective, delta, term):
    given = problem(objective, delta, term)
    m = given.linear
    starts = torch.cat([random.uniform(random.key(7), (30, m + 2), torch.float64) + 0.05], 0)
    found = levenberg_marquardt(given, starts, BOUNDS)
    best = found.value.min()
    assert bool(found.converged[found.value.argmin()])
    z, y, w = LOGS.numpy(), given.losses.numpy(), WEIGHTS.numpy()

    def scipy_value(x):
        c, a = np.exp(x[:m]), x[m:]
        each = [np.exp(-sum(a[k] * z[k] for k in range(2) if term[k] == j)) for j in range(m - 1)]
        p = c[0] + sum(c[1 + j] * each[j] for j in range(m - 1))
        r = p - y if objective == "squares" else np.log(p / y)
        rho = np.where(np.abs(r) <= delta, 0.5 * r**2, delta * np.abs(r) - 0.5 * delta**2 if delta < 1 else 0.5 * r**2)
        return float(w @ rho)

    at = found.theta[found.value.argmin()].numpy()
    others = []
    for i in range(3):
        x = np.concatenate([np.log(starts[i, :m].numpy()), starts[i, m:].numpy()])
        others.append(minimize(scipy_value, x, method="L-BFGS-B").fun)
    assert abs(scipy_value(np.concatenate([np.log(at[:m]), at[m:]])) - float(best)) < 1e-12
    assert min(others) >= float(best) - 1e-12
    assert min(others) <= 1.02 * float(best)  # it did look at the same valley


def test_rows_of_a_batch_are_fits_alone_and_blocks_do_not_matter(monkeypatch):
    losses = predictions(problem(), TRUE) * (0.01 * NOISE).exp()
    given = problem()._replace(losses=losses, weights=WEIGHTS * (NOISE > -1))
    found = levenberg_marquardt(given, TRUE.expand(8, -1).contiguous(), BOUNDS)
    assert bool(found.converged.all())
    assert float(found.cosine.max()) <= 1e-7
    for i in range(8):
        alone = levenberg_marquardt(given.members(slice(i, i + 1), 8), TRUE, BOUNDS)
        torch.testing.assert_close(alone.theta[0], found.theta[i], rtol=1e-7, atol=0)
    monkeypatch.setattr(least_squares, "_BLOCK", 3)
    again = levenberg_marquardt(given, TRUE.expand(8, -1).contiguous(), BOUNDS)
    torch.testing.assert_close(again.theta, found.theta, rtol=1e-7, atol=0)


def test_bounds_hold_and_fixed_parameters_stay():
    given = problem()
    bounds = (0.0, 0.3)  # below the planted exponents
    found = levenberg_marquardt(given, TRUE, bounds)
    slope = least_squares._local(given, found.theta).gradient[0]
    assert float(found.theta[0, 4]) == 0.3
    assert float(slope[4]) < -1e-4  # it pushes against the bound
    assert bool(found.converged.all())
    assert float(slope[:4].abs().max()) < 1e-8
    assert 0 < float(found.theta[0, 3]) < 0.3
    held = torch.tensor([[True, False, False, False, False]])
    fixed = levenberg_marquardt(given, TRUE * torch.tensor([0.9, 1, 1, 1, 1], dtype=torch.float64), BOUNDS, fixed=held)
    assert float(fixed.theta[0, 0]) == pytest.approx(0.54, abs=1e-15)
    assert float(fixed.value[0]) > float(levenberg_marquardt(given, TRUE, BOUNDS).value[0])
    assert bool(fixed.converged.all())


def test_an_exact_law_is_found_exactly():
    given = problem(noise=0.0)
    found = levenberg_marquardt(given, TRUE * 1.3, BOUNDS)
    torch.testing.assert_close(found.theta, TRUE, rtol=1e-8, atol=0)
    assert bool(found.converged.all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_gpu_agrees():
    given = problem()
    at = given._replace(**{name: getattr(given, name).cuda() for name in ("logs", "losses", "weights")})
    here, there = levenberg_marquardt(given, TRUE, BOUNDS), levenberg_marquardt(at, TRUE.cuda(), BOUNDS)
    torch.testing.assert_close(there.theta.cpu(), here.theta, rtol=1e-7, atol=0)
