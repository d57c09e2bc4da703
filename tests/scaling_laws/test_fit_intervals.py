"""Bootstrap against refits by scipy, profiles against brute force, and both against a planted truth."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from scipy.stats import t

from toolkit import random
from toolkit.scaling_laws.fit_intervals import _counts, bootstrap, coverage, profile_intervals
from toolkit.scaling_laws.fitting import CHINCHILLA, POWER_LAW, fit_law

TRUTH = {"E": 1.82, "A_N": 480.0, "A_D": 2100.0, "alpha_N": 0.348, "alpha_D": 0.366}
LINE = {"E": 2.0, "A_N": 30.0, "alpha_N": 0.25}
X = torch.logspace(4, 9, 40, dtype=torch.float64)
Y = (2 + 30 * X**-0.25) * (0.01 * random.normal(random.key(21), (40,), torch.float64)).exp()


def sweep(points=96):
    u = random.uniform(random.key(22), (2, points), torch.float64)
    return {"N": 10 ** (7.5 + 2.7 * u[0]), "D": 10 ** (9 + 3 * u[1])}


def line(objective="log_squares"):
    return fit_law({"N": X}, Y, POWER_LAW, objective=objective, outliers="keep")


def loss(x, weights, delta=math.inf):
    r = np.log((np.exp(x[0]) + np.exp(x[1] - x[2] * np.log(X.numpy()))) / Y.numpy())
    clipped = np.clip(r, -delta, delta)
    return float(weights @ (clipped * (r - 0.5 * clipped)))


def vector(fit):
    p = fit.parameters
    return np.array([math.log(p["E"]), math.log(p["A_N"]), p["alpha_N"]])


@pytest.mark.parametrize(("objective", "delta"), [("log_squares", math.inf), ("log_huber", 1e-3)])
def test_bootstrap_refits_are_those_of_scipy(objective, delta):
    fit = line(objective)
    drawn = bootstrap(fit, 300, seed=5)
    assert drawn.converged == 1
    counts = _counts(random.key(5), 300, 40).numpy()
    assert (counts.sum(1) == 40).all()
    start = vector(fit)
    for i in range(0, 300, 20):
        mine = np.array(
            [math.log(drawn.parameters["E"][i]), math.log(drawn.parameters["A_N"][i]), drawn.parameters["alpha_N"][i]]
        )
        theirs = minimize(loss, start, (counts[i], delta), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15,
                          "maxiter": 4000})  # fmt: skip
        assert loss(mine, counts[i], delta) <= theirs.fun * (1 + 1e-9)
        if delta > 1:
            np.testing.assert_allclose(mine, theirs.x, rtol=2e-4)


def test_bootstrap_interval_is_the_percentile_interval_of_refits_by_scipy():
    fit = line()
    rng = np.random.default_rng(0)
    counts = rng.multinomial(40, np.full(40, 1 / 40), 400).astype(float)
    theirs = np.array([minimize(loss, vector(fit), (w,), method="BFGS").x for w in counts])
    mine = bootstrap(fit, 4000, seed=1).intervals(fit.parameters)
    for name, values in (("E", np.exp(theirs[:, 0])), ("alpha_N", theirs[:, 2])):
        low, high = np.quantile(values, [0.025, 0.975])
        assert mine[name].low == pytest.approx(low, abs=0.12 * (high - low))
        assert mine[name].high == pytest.approx(high, abs=0.12 * (high - low))
        assert mine[name].low < mine[name].estimate < mine[name].high
    again = bootstrap(fit, 50, seed=1).parameters["E"]
    assert torch.equal(again, bootstrap(fit, 50, seed=1).parameters["E"])
    assert not torch.equal(again, bootstrap(fit, 50, seed=2).parameters["E"])


def test_profile_ends_are_those_of_brute_force():
    fit = line()
    least = loss(vector(fit), np.ones(40))
    allowed = least * t.ppf(0.975, 37) ** 2 / 37

    def rise(value, column):
        free = [k for k in range(3) if k != column]

        def part(x):
            full = np.empty(3)
            full[column], full[free] = value, x
            return loss(full, np.ones(40))

        found = minimize(part, vector(fit)[free], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-16})
        return found.fun - least - allowed

    best = vector(fit)
    for column, name in enumerate(("E", "A_N", "alpha_N")):
        mine = profile_intervals(fit, names=(name,))[name]
        back = math.log if column < 2 else float
        for end, way in ((mine.low, -1), (mine.high, 1)):
            spread = abs(back(end) - best[column])
            theirs = brentq(rise, best[column] + way * 0.5 * spread, best[column] + way * 1.6 * spread, (column,))
            assert back(end) == pytest.approx(theirs, abs=2e-3 * spread)
    wide, narrow = profile_intervals(fit, 0.99)["E"], profile_intervals(fit, 0.8)["E"]
    assert wide.low < narrow.low < fit.parameters["E"] < narrow.high < wide.high


def test_a_side_that_the_data_do_not_close_is_open():
    x = torch.logspace(6, 6.5, 12, dtype=torch.float64)
    y = (1.5 + 30 * x**-0.2) * (0.01 * random.normal(random.key(23), (12,), torch.float64)).exp()
    fit = fit_law({"N": x}, y, POWER_LAW, objective="log_squares", outliers="keep")
    found = profile_intervals(fit)
    assert found["E"].low == 0
    short = fit_law({"N": x[:5]}, y[:5], POWER_LAW, objective="log_squares", outliers="keep")
    assert profile_intervals(short, 0.99)["alpha_N"].high == 4


@pytest.mark.parametrize("objective", ["log_squares", "log_huber", "squares"])
def test_profile_intervals_cover_a_planted_truth(objective):
    """400 repetitions: 95 % is 380, give or take 3 standard deviations of 4.4 (a little more for Huber's scale)."""
    found = coverage(TRUTH, sweep(), CHINCHILLA, objective=objective, noise=0.01, repetitions=400)
    assert set(found) == set(TRUTH)
    slack = 0.045 if objective == "log_huber" else 0.033
    for name, covered in found.items():
        assert covered.shape == (400,)
        assert abs(float(covered.mean()) - 0.95) <= slack, (name, float(covered.mean()))
    half = coverage(TRUTH, sweep(), CHINCHILLA, objective=objective, noise=0.01, level=0.5, repetitions=400)
    for name, covered in half.items():
        assert abs(float(covered.mean()) - 0.5) <= 0.09, (name, float(covered.mean()))


def test_coverage_by_profile_is_membership_in_the_interval():
    sizes = {"N": X}
    found = coverage(LINE, sizes, POWER_LAW, objective="log_squares", repetitions=6, level=0.6, seed=4)
    draws = random.normal(random.key(4, 0), (6, 40), torch.float64)
    truth = 2 + 30 * X**-0.25
    for i in range(6):
        fit = fit_law(sizes, truth * (0.01 * draws[i]).exp(), POWER_LAW, objective="log_squares", outliers="keep")
        for name, interval in profile_intervals(fit, 0.6).items():
            assert bool(found[name][i]) == (interval.low <= LINE[name] <= interval.high)


def test_bootstrap_intervals_cover_a_planted_truth():
    options: dict[str, Any] = {"objective": "log_squares", "method": "bootstrap", "repetitions": 100, "resamples": 100}
    for name, covered in coverage(LINE, {"N": X}, POWER_LAW, **options).items():
        assert 0.85 <= float(covered.mean()) <= 0.99, (name, float(covered.mean()))


def test_bad_input_is_refused():
    fit = line()
    for call, message in (
        (lambda: bootstrap(fit, 1), "resamples"),
        (lambda: profile_intervals(fit, 1.0), "level"),
        (lambda: profile_intervals(fit, names=("B",)), "names: expected some of E, A_N, alpha_N, got B"),
        (lambda: coverage(LINE, {"N": X}, POWER_LAW, objective="squares", noise=0.0), "noise"),
        (lambda: coverage(LINE, {"N": X}, POWER_LAW, objective="squares", repetitions=1), "repetitions"),
        (lambda: coverage(LINE | {"E": 0.0}, {"N": X}, POWER_LAW, objective="squares"), "parameters"),
        (lambda: bootstrap(fit, 9).intervals(fit.parameters, 0.0), "level"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
