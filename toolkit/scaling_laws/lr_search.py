"""Learning rates searched while training: short trials, their exponential forecasts, and a Gaussian process."""

import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import readable, require_positive, typed
from toolkit.fleet import SGD, Adam, Fleet, train
from toolkit.fleet.chunks import Loss
from toolkit.fleet.members import Build
from toolkit.fleet.optimisers import Optimiser

__all__ = ["AutoRates", "auto_rates", "forecast_loss", "gaussian_process"]


@typed
def gaussian_process(
    x: Float[Tensor, "points"],
    y: Float[Tensor, "points"],
    query: Float[Tensor, "queries"],
    length: float | Float[Tensor, ""] = 1.0,
    noise: float | Float[Tensor, ""] = 1e-3,
) -> tuple[Float[Tensor, "queries"], Float[Tensor, "queries"]]:
    """Mean and standard deviation of a Gaussian process at ``query``, given values ``y`` at ``x``.

    Kernel exp(-(x - x')²/(2 length²)) plus ``noise``² on the diagonal, for y standardised to mean 0 and deviation 1;
    the results are in y's units. x is a logarithm of learning rates, ``length`` in the same units. vmap-safe. Source:
    Rasmussen & Williams 2006, "Gaussian Processes for Machine Learning", algorithm 2.1. Raises ``ValueError`` for no
    points and for a length or noise that is not positive.
    """
    if len(x) == 0:
        raise ValueError("x: expected at least one point, got none")
    require_positive("length", length)
    require_positive("noise", noise)

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return torch.exp(-((one[:, None] - other) ** 2) / (2 * length**2))

    centre = y.mean()
    spread = (y - centre).square().mean().sqrt()
    spread = torch.where(spread > 0, spread, 1)
    root = torch.linalg.cholesky(kernel(x, x) + noise**2 * torch.eye(len(x), dtype=x.dtype, device=x.device))
    cross = kernel(x, query)
    weights = torch.cholesky_solve(((y - centre) / spread)[:, None], root)
    half = torch.linalg.solve_triangular(root, cross, upper=False)
    deviation = (1 - half.square().sum(0)).clamp_min(0).sqrt()
    return centre + spread * (cross.mT @ weights)[:, 0], spread * deviation


@typed
def forecast_loss(
    losses: Float[Tensor, "*batch steps"], ahead: Float[Tensor, "moments"] | float | int, rates: int = 64
) -> tuple[Float[Tensor, "*batch moments"], Float[Tensor, "*batch 3"]]:
    """The loss at later moments, from a·exp(-r·t) + c fitted to the steps t = 0, 1, ... seen; also (a, r, c).

    Least squares: a and c exactly for each decay rate r, and r by a grid of ``rates`` values (time constants from a
    third of a step to thirty times the series), narrowed around the best until it is known to float precision.
    Outliers should be dropped or smoothed before. A series that curves upwards gets the best falling exponential.

    Source: Jin et al. 2021, "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", whose
    code searches log r by the Nelder-Mead method. Raises ``ValueError`` for fewer than 4 steps or losses that are not
    finite.
    """
    steps = losses.shape[-1]
    if steps < 4:
        raise ValueError(f"losses: expected at least 4 steps, got {steps}")
    if readable(losses) and not bool(losses.isfinite().all()):
        raise ValueError("losses: expected finite values, got others")
    if rates < 4:
        raise ValueError(f"rates: expected at least 4, got {rates}")
    y = losses.double()
    time = torch.arange(steps, dtype=torch.float64, device=y.device)
    moments = torch.as_tensor(ahead, dtype=torch.float64, device=y.device).reshape(-1)
    centre = y.mean(-1, keepdim=True)

    def solve(rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual, a and c for decay rates ``(*batch, candidates)``."""
        wave = torch.exp(-rate[..., None] * time)
        middle = wave.mean(-1, keepdim=True)
        wave = wave - middle
        a = (wave * (y - centre)[..., None, :]).sum(-1) / wave.square().sum(-1)
        a = a.clamp_min(0)
        residual = ((y - centre)[..., None, :] - a[..., None] * wave).square().sum(-1)
        return residual, a, centre - a * middle[..., 0]

    low = torch.full(y.shape[:-1], -math.log(30.0 * steps), dtype=torch.float64, device=y.device)
    high = torch.full_like(low, math.log(3.0))
    share = torch.linspace(0, 1, rates, dtype=torch.float64, device=y.device)
    for _ in range(9):
        grid = low[..., None] + (high - low)[..., None] * share
        residual = solve(grid.exp())[0]
        best = grid.gather(-1, residual.argmin(-1, keepdim=True))[..., 0]
        width = (high - low) / (rates - 1)
        low, high = best - width, best + width
    rate = best.exp()[..., None]
    _, a, c = solve(rate)
    return (
        (a * torch.exp(-rate * moments) + c).to(losses.dtype),
        torch.cat([a, rate, c], -1).to(losses.dtype),
    )


class AutoRates(NamedTuple):
    """What :func:`auto_rates` found: the trained fleet, the rates it chose, all it tried, and its forecasts.

    ``chosen`` ``(stages, members)``; ``tried`` and ``forecast`` ``(stages, members, candidates)``; ``searched`` is
    the number of steps that a member spent on candidates that were thrown away.
    """

    fleet: Fleet
    chosen: Tensor
    tried: Tensor
    forecast: Tensor
    searched: int


def auto_rates(
    build: Build,
    loss: Loss,
    data: Any,
    *,
    stages: int = 4,
    stage: int = 200,
    candidates: int = 10,
    bounds: tuple[float, float] = (1e-4, 1.0),
    optimiser: Optimiser | None = None,
    kappa: float = 1000.0,
    length: float = 1.0,
    window: int = 5,
    **options: Any,
) -> AutoRates:
    """Train with a learning rate that is searched anew for each stage of ``stage`` steps, for each member by itself.

    From one and the same state, each of ``candidates`` rates trains for stage/candidates steps; :func:`forecast_loss`
    of the losses (smoothed by a running median of ``window``) tells what it would reach at the stage's end. The next
    candidate minimises mean - ``kappa``·deviation of a :func:`gaussian_process` over log rate (``length`` in units of
    log rate); the first is the middle of ``bounds``. A large kappa explores only. Then the fleet goes back to the
    state, bit for bit, and trains the whole stage at the rate with the least forecast: the search costs as much again.
    A candidate whose loss rises is forecast at its last value, one that diverges worse than all others.

    ``options`` go to :func:`toolkit.fleet.train` (``members``, ``batch``, ...). Source: Jin et al. 2021, "AutoLRS:
    Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly" (without its growing stages, its splines
    against outliers and its validation phase). Raises ``ValueError`` for bounds that are not 0 < low < high, stages
    too short to forecast from, and options that this function sets itself.
    """
    low, high = bounds
    if not 0 < low < high:
        raise ValueError(f"bounds: expected 0 < low < high, got {bounds}")
    if stages < 1 or candidates < 1:
        raise ValueError(f"stages, candidates: expected at least 1 of each, got {stages} and {candidates}")
    if (trial := stage // candidates) < 4:
        raise ValueError(f"stage: expected at least 4 steps for each of {candidates} candidates, got {stage}")
    if taken := sorted({"steps", "epochs", "until", "resume", "schedule"} & set(options)):
        raise ValueError(f"{taken[0]}: expected none, which the search sets itself, got one")
    inner: Any = optimiser or SGD()
    if not isinstance(inner, Adam | SGD):
        raise ValueError(f"optimiser: expected Adam, AdamW or SGD, got {type(inner).__name__}")
    options |= {"steps": stages * stage}

    def advance(fleet: Fleet, rates: Tensor, until: int) -> Fleet:
        own = options | {"start": None, "members": len(fleet)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "non-finite loss", RuntimeWarning)
            return train(build, loss, data, optimiser=replace(inner, lr=rates), resume=fleet, until=until, **own)

    fleet = train(build, loss, data, optimiser=inner, until=0, **options)
    grid = torch.linspace(math.log(low), math.log(high), 101, dtype=torch.float64)
    chosen, tried, forecasts = [], [], []
    for number in range(stages):
        begin = number * stage
        points = grid[50].expand(len(fleet), 1)
        values = torch.zeros(len(fleet), 0, dtype=torch.float64)
        for turn in range(candidates):
            part = advance(fleet, points[:, turn].exp(), begin + trial)
            seen = part.history[:, begin : begin + trial].double().cpu()
            values = torch.cat([values, _forecasts(seen, stage, window)], 1)
            if turn + 1 < candidates:
                new = [_next(x, y, grid, length, kappa) for x, y in zip(points, values, strict=True)]
                points = torch.cat([points, torch.stack(new)[:, None]], 1)
        best = points.gather(1, values.argmin(1, keepdim=True))[:, 0].exp()
        fleet = advance(fleet, best, begin + stage)
        chosen.append(best)
        tried.append(points.exp())
        forecasts.append(values)
    return AutoRates(
        fleet, torch.stack(chosen), torch.stack(tried), torch.stack(forecasts), stages * candidates * trial
    )


def _forecasts(seen: Tensor, stage: int, window: int) -> Tensor:
    """Forecast at the stage's end, ``(members, 1)``; infinite for a member whose series broke off."""
    broken = ~seen.isfinite().all(1)
    series = torch.where(broken[:, None], 0.0, seen)
    if (reach := min(window, seen.shape[1]) // 2) > 0:
        padded = F.pad(series[:, None], (reach, reach), mode="replicate")[:, 0]
        series = padded.unfold(1, 2 * reach + 1, 1).median(-1).values
    value = forecast_loss(series, float(stage - 1))[0]
    value = torch.where(series[:, -1:] > series[:, :1], series[:, -1:], value)
    return torch.where(broken[:, None], float("inf"), value)


def _next(x: Tensor, y: Tensor, grid: Tensor, length: float, kappa: float) -> Tensor:
    """The point of the grid, not asked before, with the least lower confidence bound."""
    finite = y[y.isfinite()]
    worst = finite.max() + finite.max().abs() if len(finite) else torch.zeros((), dtype=y.dtype)
    mean, deviation = gaussian_process(x, torch.where(y.isfinite(), y, worst), grid, length)
    asked = (grid[:, None] - x).abs().amin(1) < 1e-9
    return grid[torch.where(asked, float("inf"), mean - kappa * deviation).argmin()]
