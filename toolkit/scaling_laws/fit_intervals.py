"""How sure a fitted law is: bootstrap and profile intervals, and how often they cover a truth that was planted."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import require_positive, typed
from toolkit.intervals import Interval
from toolkit.scaling_laws.fitting import Fit, Scale, prepare
from toolkit.scaling_laws.least_squares import (
    Objective,
    Problem,
    Solution,
    levenberg_marquardt,
    predictions,
    residuals,
)

__all__ = ["Bootstrap", "bootstrap", "coverage", "profile_intervals"]

_ROUNDS = 40
_ROWS = 1 << 13  # refits of resamples that are held in memory together


class Bootstrap(NamedTuple):
    """``parameters``: for each name the (resamples,) estimates; ``converged``: the share of refits at a minimum."""

    parameters: dict[str, Tensor]
    converged: float
    points: int

    def intervals(self, estimates: Mapping[str, float], level: float = 0.95) -> dict[str, Interval]:
        """Percentile intervals, around ``estimates`` (the parameters of the fit)."""
        _check_level(level)
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        return {
            name: Interval(
                estimates[name], float(ends[0]), float(ends[1]), self.points, level, "bootstrap (percentile)"
            )
            for name, values in self.parameters.items()
            for ends in (values.quantile(tails.to(values.device)),)
        }


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")


def _counts(key: Tensor, resamples: int, points: int) -> Tensor:
    """Multinomial counts (..., resamples, points): how often each point is drawn in ``points`` draws."""
    drawn = (random.uniform(key, (resamples, points), torch.float64) * points).long().clamp_max(points - 1)
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(-1, drawn, ones)


@typed
def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0) -> Bootstrap:
    """Refit resampled points (with replacement, their multinomial counts as weights), all at once, each from the fit.

    Points are taken as independent. A refit finds the minimum that the fit leads to, at a bound where need be: an E of
    0 in many resamples says that the data do not determine E. Raises ``ValueError`` for fewer than 2 resamples.
    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    if resamples < 2:
        raise ValueError(f"resamples: expected at least 2, got {resamples}")
    weights = _counts(random.key(seed, device=fit.theta.device), resamples, fit.points)
    found = levenberg_marquardt(
        fit.problem._replace(weights=weights), fit.theta.expand(resamples, -1).contiguous(), fit.bounds
    )
    values = fit.scale.named(found.theta)
    return Bootstrap(
        dict(zip(fit.scale.names, values.unbind(1), strict=True)), float(found.converged.double().mean()), fit.points
    )


def _allowance(problem: Problem, theta: Tensor, value: Tensor, level: float) -> Tensor:
    """How far the objective may rise above its minimum, (batch,).

    Squares: s² F / 2 with s² = 2 min / (n - p) and F the quantile of F(1, n - p), exact for a linear model. Huber: half
    the quantile times Σψ² / (n - p) over the mean of ψ' (Schrader & Hettmansperger 1980); with delta far below the
    scatter few points carry ψ', so its mean is estimated from a wider window.
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    r = residuals(problem, predictions(problem, theta))
    n, p = r.shape[1], theta.shape[1]
    quantile = float(stdtrit(n - p, (1 + level) / 2)) ** 2
    if math.isinf(problem.delta):
        return value * quantile / (n - p)
    clipped = r.clamp(-problem.delta, problem.delta)
    spread = 1.4826 * r.abs().median(-1).values
    window = (1.06 * spread * n**-0.2).clamp_min(problem.delta)
    inside = (r.abs() <= window[:, None]).double().mean(-1) * problem.delta / window
    inside = torch.where(window > problem.delta, inside, (r.abs() <= problem.delta).double().mean(-1))
    return 0.5 * quantile * clipped.square().sum(-1) / (n - p) / inside.clamp_min(1 / n)


def _uncentred(problem: Problem, scale: Scale, name: str) -> tuple[Problem, Scale]:
    """For an amplitude: the problem whose linear parameter is that amplitude itself (its sizes are not centred)."""
    if not name.startswith("A_"):
        return problem, scale
    j = ["A_" + "_".join(term) for term in scale.terms].index(name)
    mine = torch.tensor([of == j for of in scale.term], device=scale.centre.device)
    logs = problem.logs + torch.where(mine, scale.centre, 0.0)[:, None]
    centre = torch.where(mine, 0.0, scale.centre)
    return problem._replace(logs=logs), Scale(scale.terms, scale.offset, centre, scale.unit)


def _profile(problem: Problem, theta: Tensor, column: Tensor, values: Tensor, bounds: tuple[float, float]) -> Solution:
    """theta (batch, parameters) refitted with the parameter ``column`` (batch,) of each row held at ``values``."""
    fixed = torch.arange(theta.shape[1], device=theta.device) == column[:, None]
    held = torch.where(fixed, values[:, None], theta)
    return levenberg_marquardt(problem, held, bounds, fixed=fixed)


@typed
def profile_intervals(fit: Fit, level: float = 0.95, names: Sequence[str] | None = None) -> dict[str, Interval]:
    """For each parameter the values at which the best refit of the others stays below the threshold of the objective.

    {v: min F(θ | θ_k = v) - min F ≤ allowance}, with the allowance t² min F / (n - p) for squared residuals (Student's
    t; Bates & Watts 1988, "Nonlinear Regression Analysis") and its robust form for Huber's (Schrader & Hettmansperger
    1980, "Robust Analysis of Variance Based Upon a Likelihood Ratio Criterion"; our estimate of its scale). A side that
    never reaches the threshold ends at 0, at the bound of an exponent or at infinity: the data do not close it.

    Raises ``ValueError`` for a name that the law lacks or a level outside (0, 1).
    """
    _check_level(level)
    wanted = fit.scale.names if names is None else tuple(names)
    if unknown := [name for name in wanted if name not in fit.scale.names]:
        raise ValueError(f"names: expected some of {', '.join(fit.scale.names)}, got {unknown[0]}")
    found = levenberg_marquardt(fit.problem, fit.theta[None], fit.bounds)
    allowed = _allowance(fit.problem, found.theta, found.value, level)
    low, high = _ends(fit, wanted, found.value, allowed)
    return {
        name: Interval(fit.parameters[name], start, end, fit.points, level, "profile likelihood")
        for name, start, end in zip(wanted, low, high, strict=True)
    }


def _ends(fit: Fit, names: Sequence[str], least: Tensor, allowed: Tensor) -> tuple[list[float], list[float]]:
    """Both ends for all names at once: the square root of the rise is nearly straight, so false position is quick."""
    named = torch.tensor(list(fit.parameters.values()), dtype=torch.float64, device=fit.theta.device)
    views = [_uncentred(fit.problem, fit.scale, name) for name in names for _ in range(2)]
    column = torch.tensor([fit.scale.names.index(name) for name in names], device=named.device).repeat_interleave(2)
    rows = torch.arange(len(column), device=named.device)
    problem = fit.problem._replace(logs=torch.stack([view.logs for view, _ in views]))
    theta = torch.stack([scale.theta(named) for _, scale in views])
    best, linear = theta[rows, column], column < problem.linear
    floor = torch.where(linear, 0.0, fit.bounds[0])
    ceiling = torch.where(linear, math.inf, fit.bounds[1])
    spread = torch.tensor([name.startswith("A_") for name in names], device=named.device).repeat_interleave(2)
    spread = spread & (best > 0)  # amplitudes move by factors
    side = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=named.device).repeat(len(names))
    step = torch.where(best > 0, best, 1.0)

    def at(t: Tensor) -> Tensor:
        moved = torch.where(spread, best * (side * t).exp(), best + side * t * step)
        return torch.minimum(torch.maximum(moved, floor), ceiling)

    near, far = torch.zeros_like(best), torch.full_like(best, 0.02)
    rise_near, rise_far = torch.zeros_like(best), torch.zeros_like(best)
    closed = torch.zeros_like(best, dtype=torch.bool)
    for _ in range(_ROUNDS):
        inner = near + (far - near) * ((1 - rise_near) / (rise_far - rise_near).clamp_min(1e-9)).clamp(0.02, 0.98)
        t = torch.where(closed, inner, far)
        solved = _profile(problem, theta, column, at(t), fit.bounds)
        rise = ((solved.value - least) / allowed).clamp_min(0.0).sqrt()
        inside = rise <= 1
        theta = torch.where(inside[:, None], solved.theta, theta)
        ended = inside & ((at(t) <= floor) | (at(t) >= ceiling))
        closed = closed | ~inside
        near, rise_near = torch.where(inside, t, near), torch.where(inside, rise, rise_near)
        grown = torch.where(closed, far, far * (1.2 / rise.clamp_min(1e-9)).clamp(1.5, 8.0))
        far, rise_far = torch.where(inside, grown, t), torch.where(inside, rise_far, rise)
        if bool((ended | (closed & ((1 - rise_near < 1e-4) | (far - near < 1e-9)))).all()):
            break
    limit = torch.where(side > 0, ceiling, floor)
    ends = torch.where(closed, at(near), limit) * torch.where(linear, fit.scale.unit, 1.0)
    return ends[0::2].tolist(), ends[1::2].tolist()


@typed
def coverage(
    parameters: Mapping[str, float],
    sizes: Mapping[str, Float[Tensor, "points"]],
    terms: Sequence[Sequence[str]],
    *,
    objective: Objective,
    noise: float = 0.01,
    repetitions: int = 400,
    level: float = 0.95,
    method: Literal["profile", "bootstrap"] = "profile",
    resamples: int = 200,
    delta: float = 1e-3,
    offset: bool = True,
    bounds: tuple[float, float] = (0.0, 4.0),
    seed: int = 0,
) -> dict[str, Float[Tensor, "repetitions"]]:
    """Whether the interval of each repetition covers the planted value: 1 or 0 per repetition, for each parameter.

    Losses are the law at ``parameters`` times exp(``noise`` · standard normal), drawn anew in each repetition; all
    repetitions are fitted at once, from the truth (the shortest way to the minimum that it belongs to). A profile
    interval covers the truth when the refit that holds the parameter there stays within the allowance: no end is
    searched for. Means over repetitions are to be compared with ``level``.

    Raises ``ValueError`` for a parameter that is missing or not positive, noise ≤ 0 or fewer than 2 repetitions.
    """
    _check_level(level)
    require_positive("noise", noise)
    if repetitions < 2 or resamples < 2:
        raise ValueError(f"repetitions, resamples: expected at least 2 of each, got {repetitions} and {resamples}")
    some = next(iter(sizes.values()))
    ones = torch.ones_like(some, dtype=torch.float64)
    problem, scale = prepare(sizes, ones, terms, offset, objective, delta)
    if missing := [name for name in scale.names if not parameters.get(name, 0.0) > 0]:
        raise ValueError(f"parameters: expected a value greater than 0 for {missing[0]}, got {parameters!r}")
    named = torch.tensor([parameters[name] for name in scale.names], dtype=torch.float64, device=some.device)
    truth = scale.theta(named)
    clean = predictions(problem, truth[None])
    unit = clean.log().mean().exp()
    scale = Scale(scale.terms, offset, scale.centre, unit)
    truth = scale.theta(named)
    draws = random.normal(random.key(seed, 0, device=some.device), (repetitions, clean.shape[1]), torch.float64)
    problem = problem._replace(losses=clean / unit * (noise * draws).exp())
    found = levenberg_marquardt(problem, truth.expand(repetitions, -1).contiguous(), bounds)
    if method == "bootstrap":
        return _bootstrap_coverage(problem, scale, found.theta, named, bounds, resamples, level, seed)
    allowed = _allowance(problem, found.theta, found.value, level)
    covered = {}
    for name in scale.names:
        other, moved = _uncentred(problem, scale, name)
        column = scale.names.index(name)
        start = moved.theta(scale.named(found.theta))
        values = moved.theta(named)[column].expand(repetitions)
        held = _profile(other, start, torch.full_like(values, column, dtype=torch.int64), values, bounds)
        covered[name] = (held.value <= found.value + allowed).double()
    return covered


def _bootstrap_coverage(
    problem: Problem,
    scale: Scale,
    theta: Tensor,
    named: Tensor,
    bounds: tuple[float, float],
    resamples: int,
    level: float,
    seed: int,
) -> dict[str, Tensor]:
    repetitions, points = problem.losses.shape
    rows = []
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=theta.device)
    for some in torch.arange(repetitions, device=theta.device).split(max(1, _ROWS // resamples)):
        keys = random.fold_in(random.key(seed, 1, device=theta.device), some)
        weights = _counts(keys, resamples, points).flatten(0, 1)
        losses = problem.losses[some].repeat_interleave(resamples, 0)
        starts = theta[some].repeat_interleave(resamples, 0)
        found = levenberg_marquardt(problem._replace(losses=losses, weights=weights), starts, bounds)
        values = scale.named(found.theta).reshape(len(some), resamples, -1)
        low, high = values.quantile(tails, 1)
        rows.append(((low <= named) & (named <= high)).double())
    return dict(zip(scale.names, torch.cat(rows).unbind(1), strict=True))
