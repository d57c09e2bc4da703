"""Fits of planted laws: the truth is recovered, the minimum is the true one, and what moves exponents does so."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from toolkit import random
from toolkit.scaling_laws.fitting import BIVARIATE, CHINCHILLA, POWER_LAW, fit_law

TRUTH = {"E": 1.82, "A_N": 480.0, "A_D": 2100.0, "alpha_N": 0.348, "alpha_D": 0.366}
U = random.uniform(random.key(11), (2, 240), torch.float64)
N = 10 ** (7.5 + 2.7 * U[0])
D = (10 ** (18 + 4 * U[1]) / (6 * N)).clamp(2e8, 2e12)
SIZES = {"N": N, "D": D}
CLEAN = 1.82 + 480 * N**-0.348 + 2100 * D**-0.366
LOSSES = CLEAN * (0.008 * random.normal(random.key(12), (240,), torch.float64)).exp()
OBJECTIVES = ("log_huber", "log_squares", "squares")


def fit(losses=LOSSES, sizes=SIZES, terms=CHINCHILLA, objective="log_huber", outliers="keep", **options):
    return fit_law(sizes, losses, terms, objective=objective, outliers=outliers, **options)


def objective_of(x, objective, delta=1e-3):
    """Written again from the formula, in (log A, log B, log E, alpha, beta) and NumPy."""
    n, d, y = N.numpy(), D.numpy(), LOSSES.numpy()
    p = np.exp(x[0]) * n ** -x[3] + np.exp(x[1]) * d ** -x[4] + np.exp(x[2])
    r = p - y if objective == "squares" else np.log(p) - np.log(y)
    if objective != "log_huber":
        return 0.5 * (r**2).sum()
    small = np.abs(r) <= delta
    return np.where(small, 0.5 * r**2, delta * (np.abs(r) - delta / 2)).sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_laws_are_recovered(objective):
    found = fit(CLEAN, objective=objective)
    assert found.converged
    for name, value in TRUTH.items():
        assert found.parameters[name] == pytest.approx(value, rel=1e-6)
    n = torch.logspace(6, 9, 9, dtype=torch.float64)
    one = fit(2 + 30 * n**-0.2, {"N": n}, POWER_LAW, objective)
    assert one.parameters == pytest.approx({"E": 2, "A_N": 30, "alpha_N": 0.2}, rel=1e-5)
    bare = fit(30 * n**-0.2, {"N": n}, POWER_LAW, objective, offset=False)
    assert bare.parameters == pytest.approx({"A_N": 30, "alpha_N": 0.2}, rel=1e-7)
    two = fit(0.5 + 90 * N**-0.18 * D**-0.31, SIZES, BIVARIATE, objective)
    assert two.parameters == pytest.approx({"E": 0.5, "A_N_D": 90, "alpha_N": 0.18, "alpha_D": 0.31}, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_start_of_scipy_ends_lower(objective):
    found = fit(objective=objective)
    p = found.parameters
    x = np.array([math.log(p["A_N"]), math.log(p["A_D"]), math.log(p["E"]), p["alpha_N"], p["alpha_D"]])
    assert objective_of(x, objective) == pytest.approx(found.objective_value, rel=1e-9)
    assert found.converged
    assert found.gradient_norm < 1e-8
    grid = list(itertools.product((3, 8), (3, 8), (-0.5, 0.5), (0.2, 0.6), (0.2, 0.6)))[::4]
    reached = [minimize(objective_of, g, (objective,), method="L-BFGS-B").fun for g in [*grid, x * 1.01, x * 0.99]]
    assert min(reached) >= found.objective_value * (1 - 1e-10)
    assert min(reached) <= found.objective_value * 1.05
    polished = minimize(objective_of, x + 1e-4, (objective,), method="Nelder-Mead", options={"maxiter": 3000})
    assert polished.fun >= found.objective_value * (1 - 1e-10)


def test_both_methods_and_another_unit_find_one_minimum():
    found, other = fit(), fit(method="starts", starts=60, seed=3)
    assert other.objective_value == pytest.approx(found.objective_value, rel=1e-11)
    assert other.parameters == pytest.approx(found.parameters, rel=1e-6)
    torch.testing.assert_close(found.scale.theta(found.scale.named(found.theta)), found.theta, rtol=1e-12, atol=0)
    units = fit(LOSSES / math.log(2), {"N": N / 1e6, "D": D / 1e9})  # bits, millions and billions
    assert units.objective_value == pytest.approx(found.objective_value, rel=1e-11)
    assert units.parameters["E"] * math.log(2) == pytest.approx(found.parameters["E"], rel=1e-6)
    scaled = units.parameters["A_N"] * math.log(2) * 1e6 ** units.parameters["alpha_N"]
    assert scaled == pytest.approx(found.parameters["A_N"], rel=1e-5)
    single = fit_law(SIZES, LOSSES.float(), CHINCHILLA, objective="log_huber", outliers="keep")
    assert single.theta.dtype == torch.float64
    assert single.parameters == pytest.approx(found.parameters, rel=1e-2)


def test_prediction_and_residuals():
    found = fit(CLEAN)
    grid = found.predict({"N": torch.tensor([[1e8], [1e9]]), "D": torch.tensor([1e9, 1e10, 1e11])})
    assert grid.shape == (2, 3)
    assert float(grid[1, 2]) == pytest.approx(1.82 + 480 * 1e9**-0.348 + 2100 * 1e11**-0.366, rel=1e-7)
    noisy = fit()
    expected = noisy.predict(SIZES).log() - LOSSES.log()
    torch.testing.assert_close(noisy.residuals(), expected, rtol=0, atol=1e-12)
    straight = fit(objective="squares")
    torch.testing.assert_close(straight.residuals(), straight.predict(SIZES) - LOSSES, rtol=0, atol=1e-12)
    assert straight.objective_value == pytest.approx(0.5 * float(straight.residuals().square().sum()), rel=1e-10)
    with pytest.raises(ValueError, match=r"sizes\['N'\]: expected finite"):
        found.predict({"N": torch.tensor([0.0]), "D": torch.tensor([1e9])})
    with pytest.raises(ValueError, match="sizes: expected 'D'"):
        found.predict({"N": torch.tensor([1.0])})


def test_outliers_and_objective_move_exponents_and_policies_leave_out_what_they_say():
    """As on the public Chinchilla data, where five points move B sixfold and the choice of objective moves beta."""
    worst = D.argsort()[:5]  # the shortest runs, far above the law
    spoiled = LOSSES.clone()
    spoiled[worst] = spoiled.max() * torch.linspace(1.3, 1.6, 5, dtype=torch.float64)
    clean, kept = fit(), fit(spoiled, objective="log_squares")
    assert kept.parameters["alpha_D"] > clean.parameters["alpha_D"] + 0.05
    robust = fit(spoiled)
    shift = abs(robust.parameters["alpha_D"] - clean.parameters["alpha_D"])
    assert shift < kept.parameters["alpha_D"] - clean.parameters["alpha_D"]
    for policy in ("drop_highest", "drop_residuals"):
        dropped = fit(spoiled, outliers=policy, drop=5)
        assert sorted((~dropped.kept).nonzero()[:, 0].tolist()) == sorted(worst.tolist())
        assert dropped.points == 235
        keep = dropped.kept
        alone = fit(LOSSES[keep], {"N": N[keep], "D": D[keep]})
        assert dropped.parameters == pytest.approx(alone.parameters, rel=1e-6)


def test_a_floor_that_is_not_there_sits_at_its_bound():
    n = torch.logspace(6, 9, 12, dtype=torch.float64)
    bent = 30 * n**-0.2 * (-0.01 * (n.log() - n.log().mean()).square()).exp()  # falls ever faster: wants E < 0
    found = fit(bent, {"N": n}, POWER_LAW)
    assert found.parameters["E"] == 0
    assert "E" in found.at_bounds
    assert found.converged
    bare = fit(bent, {"N": n}, POWER_LAW, offset=False)
    assert found.objective_value == pytest.approx(bare.objective_value, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": LOSSES[:5], "sizes": {"N": N[:5], "D": D[:5]}}, "losses: expected more points than the 5"),
        ({"losses": torch.where(torch.arange(240) == 7, math.nan, LOSSES)}, "losses: expected .* nan at index 7"),
        ({"losses": LOSSES - LOSSES[3]}, "losses: expected finite values greater than 0"),
        ({"losses": torch.where(torch.arange(240) == 2, math.inf, LOSSES)}, "inf at index 2"),
        ({"sizes": {"N": torch.full_like(N, 1e8), "D": D}}, r"sizes\['N'\]: expected at least 3 different .* got 1"),
        ({"sizes": {"N": -N, "D": D}}, r"sizes\['N'\]: expected finite values greater than 0"),
        ({"sizes": {"N": N, "D": D[:9]}}, r"sizes\['D'\]: expected one value per loss"),
        ({"sizes": {"N": N}}, "sizes: expected 'D'"),
        ({"terms": (("N",), ("N",))}, "terms: expected groups"),
        ({"terms": ()}, "terms: expected groups"),
        ({"terms": ("N", "D")}, "terms: expected groups"),
        ({"outliers": "drop_highest"}, "drop: expected 0 with"),
        ({"drop": 3}, "drop: expected 0 with"),
        ({"outliers": "drop_highest", "drop": 236}, "losses: expected more points"),
        ({"outliers": "drop_highest", "drop": 1000}, "drop: expected"),
        ({"outliers": "drop_residuals", "drop": 1000}, "drop: expected"),
        ({"delta": 0.0}, "delta: expected"),
        ({"bounds": (0.5, 0.1)}, "bounds: expected"),
        ({"starts": 0}, "starts: expected"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit(**change)
