"""Rows of the benchmark for fits of scaling laws: 240 synthetic points with known truth, in float64."""

import itertools
import logging
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from toolkit.scaling_laws.fit_intervals import bootstrap
from toolkit.scaling_laws.fitting import CHINCHILLA, Fit, fit_law

TRUTH = {"E": 1.82, "A_N": 480.0, "A_D": 2100.0, "alpha_N": 0.348, "alpha_D": 0.366}
DELTA = 1e-3
Data = tuple[np.ndarray, np.ndarray, np.ndarray]
STARTS, TIMED_STARTS = 4500, 90
RESAMPLES, TIMED_RESAMPLES = 1000, 100


class Row(NamedTuple):
    """``peer`` does one part in ``times`` of its task: its seconds are to be multiplied by ``times``."""

    task: str
    ours: Callable[[], Any]
    peer_name: str
    peer: Callable[[], Any]
    goal: float
    times: int = 1


def synthetic(points: int = 240, noise: float = 0.006, seed: int = 0) -> Data:
    """Sizes as in a sweep over compute, and losses of the truth with the heavy tails of real runs (Student's t, 3)."""
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7.5, 10.2, points)
    d = np.clip(10 ** rng.uniform(18, 22, points) / (6 * n), 2e8, 2e12)
    clean = TRUTH["E"] + TRUTH["A_N"] * n ** -TRUTH["alpha_N"] + TRUTH["A_D"] * d ** -TRUTH["alpha_D"]
    return n, d, clean * np.exp(noise * rng.standard_t(3, points))


class Objective:
    """Value and analytic gradient of the Huber objective in (a, b, e, alpha, beta), A = exp(a) and so on."""

    def __init__(self, n: np.ndarray, d: np.ndarray, losses: np.ndarray, weights: np.ndarray | None = None) -> None:
        self.log_n, self.log_d, self.log_l = np.log(n), np.log(d), np.log(losses)
        self.weights = np.ones_like(n) if weights is None else weights

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        first, second = x[0] - x[3] * self.log_n, x[1] - x[4] * self.log_d
        top = np.maximum(np.maximum(first, second), x[2])
        u, v, w = np.exp(first - top), np.exp(second - top), np.exp(x[2] - top)
        total = u + v + w
        r = np.log(total) + top - self.log_l
        psi = np.clip(r, -DELTA, DELTA)
        pull = self.weights * psi / total
        u, v = pull * u, pull * v
        gradient = np.array([u.sum(), v.sum(), (pull * w).sum(), -(u @ self.log_n), -(v @ self.log_d)])
        return float(self.weights @ (psi * (r - 0.5 * psi))), gradient


def starting_points() -> np.ndarray:
    """The grid of 4,500 starts of Besiroglu et al. 2024."""
    exponents, floors, logs = np.arange(0, 2.5, 0.5), np.arange(-1, 1.5, 0.5), np.arange(0, 30, 5.0)
    return np.array(list(itertools.product(logs, logs, floors, exponents, exponents)))


def lbfgs(objective: Objective, starts: np.ndarray) -> float:
    from scipy.optimize import minimize

    return min(minimize(objective, x, jac=True, method="L-BFGS-B").fun for x in starts)


def bfgs(data: Data, weights: np.ndarray, warm: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    return np.array([minimize(Objective(*data, w), warm, jac=True, method="BFGS").fun for w in weights])


def ours(data: Data) -> Fit:
    n, d, losses = (torch.from_numpy(values) for values in data)
    return fit_law({"N": n, "D": d}, losses, CHINCHILLA, objective="log_huber", outliers="keep", delta=DELTA)


def as_vector(fit: Fit) -> np.ndarray:
    """(a, b, e, alpha, beta) of a fit."""
    p = fit.parameters
    return np.array([np.log(p["A_N"]), np.log(p["A_D"]), np.log(p["E"]), p["alpha_N"], p["alpha_D"]])


def log_huber(y_true: np.ndarray, y_pred: np.ndarray) -> np.ndarray:
    """Our objective for the package, whose own has delta = 1."""
    r = np.abs(np.log(np.maximum(y_pred, 1e-300)) - np.log(y_true))
    return np.where(r <= DELTA, 0.5 * r**2, DELTA * (r - 0.5 * DELTA))


def package(data: Data) -> Callable[[], dict[str, float]]:
    """The PyPI package in this process, on a 4 x 4 x 4 x 4 x 4 grid of starts around the truth."""
    import pandas
    from chinchilla import Chinchilla

    n, d, losses = data
    grid = {
        "E": np.linspace(1.1, 2.0, 4),
        "a": np.linspace(1, 10, 4),
        "b": np.linspace(1, 10, 4),
        "alpha": np.linspace(0.1, 0.7, 4),
        "beta": np.linspace(0.1, 0.7, 4),
    }
    folder = tempfile.mkdtemp()
    law = Chinchilla(folder, param_grid=grid, loss_fn=log_huber, log_level=logging.CRITICAL)
    law.database.df = pandas.DataFrame({"C": 6 * n * d, "N": n, "D": d, "loss": losses})
    law.visualizer.optim = lambda *args, **kwargs: None  # no picture: only the fit is timed

    def run() -> dict[str, float]:
        law.fit(parallel=False)
        return law.get_params()

    return run


def rows() -> list[Row]:
    """The rows; equal minima are asserted first, and what the peers reached is printed."""
    data = synthetic()
    fit = ours(data)
    objective = Objective(*data)
    value, gradient = objective(as_vector(fit))
    assert fit.converged
    assert abs(value - fit.objective_value) <= 1e-12
    assert np.abs(gradient).max() <= 1e-7, gradient
    grid = starting_points()
    assert len(grid) == STARTS
    sample = grid[np.random.default_rng(1).choice(STARTS, TIMED_STARTS, replace=False)]
    reached = lbfgs(objective, sample)
    print(f"fits: minimum ours {value:.12g}, L-BFGS-B from {TIMED_STARTS} starts {reached:.12g}", file=sys.stderr)
    assert value <= reached + 1e-12
    rng = np.random.default_rng(2)
    counts = rng.multinomial(len(data[0]), np.full(len(data[0]), 1 / len(data[0])), TIMED_RESAMPLES).astype(float)
    table = [
        Row(
            "5-parameter fit at its true minimum, 240 points",
            partial(ours, data),
            f"scipy L-BFGS-B, 4,500 starts ({TIMED_STARTS} timed)",
            partial(lbfgs, objective, sample),
            50,
            STARTS // TIMED_STARTS,
        ),
        Row(
            "1,000 bootstrap refits, 240 points",
            partial(bootstrap, fit, RESAMPLES),
            f"scipy BFGS, warm ({TIMED_RESAMPLES} timed)",
            partial(bfgs, data, counts, as_vector(fit)),
            5,
            RESAMPLES // TIMED_RESAMPLES,
        ),
    ]
    try:
        peer = package(data)
    except ImportError as error:
        print(f"left out: chinchilla ({error})", file=sys.stderr)
    else:
        name = "PyPI chinchilla, 1,024 starts"
        table.append(Row("5-parameter fit at its true minimum, 240 points", partial(ours, data), name, peer, 100))
    return table
