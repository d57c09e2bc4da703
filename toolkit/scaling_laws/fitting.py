"""Fits of laws L = E + Σ_j A_j Π_v x_v^-alpha_v (power law with offset, Chinchilla, bivariate) to their true minimum.

The objective and what is done about outliers move exponents, so both must be said. Sizes are centred in logs and losses
divided by their geometric mean before a fit: the Hessian of the law as written has a condition number near 10^11.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit import random
from toolkit.checks import require_positive, typed
from toolkit.scaling_laws.least_squares import (
    Objective,
    Problem,
    Solution,
    levenberg_marquardt,
    predictions,
    residuals,
    variable_projection,
)

__all__ = ["BIVARIATE", "CHINCHILLA", "POWER_LAW", "Fit", "Terms", "fit_law"]

Terms = tuple[tuple[str, ...], ...]
Outliers = Literal["keep", "drop_highest", "drop_residuals"]
Method = Literal["projection", "starts"]

POWER_LAW: Terms = (("N",),)
CHINCHILLA: Terms = (("N",), ("D",))
BIVARIATE: Terms = (("N", "D"),)

_GRID = {1: 96, 2: 24, 3: 10}


@dataclass(frozen=True)
class Scale:
    """How named parameters and the solver's are related: log sizes minus ``centre``, losses over ``unit``."""

    terms: Terms
    offset: bool
    centre: Tensor  # (sizes,)
    unit: Tensor  # ()

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(name for term in self.terms for name in term)

    @property
    def names(self) -> tuple[str, ...]:
        """E (where there is one), A of each term, alpha of each size."""
        amplitudes = tuple("A_" + "_".join(term) for term in self.terms)
        return ("E",) * self.offset + amplitudes + tuple(f"alpha_{name}" for name in self.sizes)

    @property
    def term(self) -> tuple[int, ...]:
        return tuple(j for j, term in enumerate(self.terms) for _ in term)

    def _shift(self, exponents: Tensor) -> Tensor:
        """Σ alpha · centre of each term."""
        product = exponents * self.centre
        groups = [[k for k, of in enumerate(self.term) if of == j] for j in range(len(self.terms))]
        return torch.stack([product[..., group].sum(-1) for group in groups], -1)

    def named(self, theta: Tensor) -> Tensor:
        """The solver's (..., parameters) in the law's own units, in the order of ``names``."""
        first, m = int(self.offset), int(self.offset) + len(self.terms)
        linear, exponents = theta[..., :m] * self.unit, theta[..., m:]
        return torch.cat([linear[..., :first], linear[..., first:] * self._shift(exponents).exp(), exponents], -1)

    def theta(self, values: Tensor) -> Tensor:
        """The inverse of ``named``."""
        first, m = int(self.offset), int(self.offset) + len(self.terms)
        linear, exponents = values[..., :m] / self.unit, values[..., m:]
        return torch.cat([linear[..., :first], linear[..., first:] * (-self._shift(exponents)).exp(), exponents], -1)


@dataclass(frozen=True)
class Fit:
    """A fitted law. ``parameters`` by name, in the units of the losses and sizes; ``objective_value`` is the minimum
    of Σ w ρ(r); ``gradient_norm`` the largest entry of its projected gradient (losses over their geometric mean,
    centred log sizes); ``converged`` whether the residuals are orthogonal to every free column of the Jacobian
    (cosine at most 1e-7); ``at_bounds`` the parameters that sit on a bound."""

    parameters: dict[str, float]
    objective_value: float
    gradient_norm: float
    converged: bool
    at_bounds: tuple[str, ...]
    objective: str
    outliers: str
    delta: float
    points: int
    terms: Terms
    bounds: tuple[float, float]
    kept: Tensor = field(repr=False)  # (points given,), bool
    problem: Problem = field(repr=False)
    scale: Scale = field(repr=False)
    theta: Tensor = field(repr=False)  # (parameters,)

    def predict(self, sizes: Mapping[str, Tensor]) -> Tensor:
        """Losses at ``sizes``, which broadcast against each other. Raises ``ValueError`` for a size that is missing
        or not positive."""
        total = torch.full((), self.parameters.get("E", 0.0), dtype=torch.float64, device=self.theta.device)
        for term in self.terms:
            part = torch.full_like(total, self.parameters["A_" + "_".join(term)])
            for name in term:
                part = part * as_size(sizes, name, total.device) ** -self.parameters[f"alpha_{name}"]
            total = total + part
        return total

    def residuals(self) -> Tensor:
        """The objective's residuals at the points kept: log p - log L, or p - L with "squares"."""
        r = residuals(self.problem, predictions(self.problem, self.theta[None]))[0]
        return r * self.scale.unit if self.objective == "squares" else r


def as_size(sizes: Mapping[str, Tensor], name: str, device: torch.device) -> Tensor:
    """One size as float64; ``ValueError`` unless it is there, finite and positive."""
    if name not in sizes:
        raise ValueError(f"sizes: expected {name!r} among them, got {', '.join(map(repr, sizes)) or 'none'}")
    value = torch.as_tensor(sizes[name]).to(device, torch.float64)
    if not bool((value.isfinite() & (value > 0)).all()):
        raise ValueError(f"sizes[{name!r}]: expected finite values greater than 0, got {value.min().item()}")
    return value


def _check_terms(terms: Sequence[Sequence[str]]) -> Terms:
    given = tuple(tuple(term) for term in terms)
    names = [name for term in given for name in term]
    if not given or not all(given) or len(set(names)) != len(names) or any(isinstance(term, str) for term in terms):
        raise ValueError(f"terms: expected groups of size names, each name once, got {terms!r}")
    return given


def prepare(
    sizes: Mapping[str, Tensor],
    losses: Tensor,
    terms: Sequence[Sequence[str]],
    offset: bool,
    objective: str,
    delta: float,
    keep: Tensor | None = None,
) -> tuple[Problem, Scale]:
    """The checked, centred problem of the points that are kept."""
    given = _check_terms(terms)
    require_positive("delta", delta)
    y = losses.to(torch.float64)
    if not bool(y.isfinite().all() & (y > 0).all()):
        bad = int((~(y.isfinite() & (y > 0))).nonzero()[0, 0])
        raise ValueError(f"losses: expected finite values greater than 0, got {losses[bad].item()} at index {bad}")
    keep = torch.ones_like(y, dtype=torch.bool) if keep is None else keep
    parameters = int(offset) + len(given) + sum(map(len, given))
    if int(keep.sum()) <= parameters:
        raise ValueError(f"losses: expected more points than the {parameters} parameters, got {int(keep.sum())}")
    logs = []
    for name in (name for term in given for name in term):
        value = as_size(sizes, name, y.device)
        if value.shape != y.shape:
            raise ValueError(f"sizes[{name!r}]: expected one value per loss ({len(y)}), got shape {tuple(value.shape)}")
        different = len(value[keep].unique())
        if different < 2 + offset:
            form = "a power law with offset" if offset else "a power law"
            raise ValueError(
                f"sizes[{name!r}]: expected at least {2 + offset} different values for {form}, got {different}"
            )
        logs.append(value[keep].log())
    z = torch.stack(logs)
    centre, unit = z.mean(1), y[keep].log().mean().exp()
    scale = Scale(given, offset, centre, unit)
    width = delta if objective == "log_huber" else math.inf
    data = (z - centre[:, None], y[keep] / unit, torch.ones_like(y[keep]))
    return Problem(*data, scale.term, offset, objective, width), scale


def _project(problem: Problem, bounds: tuple[float, float]) -> Tensor:
    """The best candidates of variable projection on a grid of exponents, as rows of theta."""
    sizes = len(problem.term)
    low, high = max(bounds[0], 1e-2), max(min(bounds[1], 2.5), 2e-2)
    per = _GRID.get(sizes, 6)
    axis = torch.logspace(math.log10(low), math.log10(high), per, dtype=torch.float64, device=problem.losses.device)
    grid = torch.cartesian_prod(*[axis] * sizes).reshape(-1, sizes)
    linear, value = variable_projection(problem, grid, sweeps=4)
    some = value.topk(min(64, len(value)), largest=False).indices
    linear, value = variable_projection(problem, grid[some], linear[some], 8)
    best = value.topk(min(8, len(value)), largest=False).indices
    return torch.cat([linear[best], grid[some][best]], 1)


def _starts(problem: Problem, bounds: tuple[float, float], count: int, seed: int) -> Tensor:
    """Random starts: exponents uniform in logs, linear parameters too, from e^-4 to e mean losses."""
    m = problem.linear
    u = random.uniform(random.key(seed, device=problem.losses.device), (count, m + len(problem.term)), torch.float64)
    low, high = max(bounds[0], 2e-2), min(bounds[1], 2.5)
    exponents = (math.log(low) + u[:, m:] * math.log(high / low)).exp()
    return torch.cat([(5 * u[:, :m] - 4).exp(), exponents], 1)


def _minimum(
    problem: Problem, bounds: tuple[float, float], method: str, starts: int, seed: int
) -> tuple[Solution, Tensor]:
    begin = _project(problem, bounds) if method == "projection" else _starts(problem, bounds, starts, seed)
    found = levenberg_marquardt(problem, begin, bounds)
    value = torch.where(found.value.isfinite(), found.value, math.inf)
    return found, value.argmin()


@typed
def fit_law(
    sizes: Mapping[str, Tensor],
    losses: Float[Tensor, "points"],
    terms: Sequence[Sequence[str]],
    *,
    objective: Objective,
    outliers: Outliers,
    drop: int = 0,
    delta: float = 1e-3,
    offset: bool = True,
    bounds: tuple[float, float] = (0.0, 4.0),
    method: Method = "projection",
    starts: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit L = E + Σ_j A_j Π_v x_v^-alpha_v, with E and A_j ≥ 0 and alpha_v within ``bounds``, at its global minimum.

    ``terms`` groups the names of ``sizes`` (one value per loss each): ``(("N",),)`` is a power law with offset,
    ``(("N",), ("D",))`` the Chinchilla law, ``(("N", "D"),)`` the bivariate one. ``offset=False`` leaves E out.

    ``objective`` is a sum over points: "log_huber" Σ ρ(log p - log L) with Huber's ρ of width ``delta`` (1e-3 in
    Hoffmann et al. 2022), "log_squares" Σ ½ (log p - log L)², "squares" Σ ½ (p - L)². ``outliers``: "keep" all
    points; "drop_highest" leaves out the ``drop`` highest losses (as Besiroglu et al. 2024 do with 5);
    "drop_residuals" fits, leaves out the ``drop`` largest absolute residuals and fits again, once.

    ``method="projection"`` solves the linear parameters on a grid of exponents and polishes the best with
    Levenberg-Marquardt; "starts" runs Levenberg-Marquardt from ``starts`` random points drawn from ``seed``.
    Computes in float64 on the device of ``losses``.

    Raises ``ValueError`` for as few points as parameters, a loss or size that is NaN or not positive, a size with
    fewer than 3 different values (2 without offset), or a ``drop`` that contradicts ``outliers``.
    Source: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models"; Besiroglu et al. 2024, "Chinchilla
    Scaling: A Replication Attempt"; non-negative projection as in public code for the latter data.
    """
    if (drop > 0) != (outliers != "keep") or drop < 0:
        raise ValueError(
            f'drop: expected 0 with outliers="keep" and at least 1 otherwise, got {drop} with {outliers!r}'
        )
    if drop >= len(losses):
        raise ValueError(f"drop: expected fewer than the {len(losses)} points, got {drop}")
    if not 0 <= bounds[0] < bounds[1]:
        raise ValueError(f"bounds: expected 0 <= low < high, got {bounds}")
    if starts < 1:
        raise ValueError(f"starts: expected at least 1, got {starts}")
    keep = torch.ones_like(losses, dtype=torch.bool)
    if outliers == "drop_highest":
        keep[losses.topk(drop).indices] = False
    problem, scale = prepare(sizes, losses, terms, offset, objective, delta, keep)
    found, best = _minimum(problem, bounds, method, starts, seed)
    if outliers == "drop_residuals":
        r = residuals(problem, predictions(problem, found.theta[best][None]))[0]
        keep[r.abs().topk(drop).indices] = False
        problem, scale = prepare(sizes, losses, terms, offset, objective, delta, keep)
        found, best = _minimum(problem, bounds, method, starts, seed)
    return _as_fit(found, best, problem, scale, keep, bounds, outliers, delta)


def _as_fit(
    found: Solution,
    best: Tensor,
    problem: Problem,
    scale: Scale,
    keep: Bool[Tensor, "points"],
    bounds: tuple[float, float],
    outliers: str,
    delta: float,
) -> Fit:
    theta = found.theta[best]
    values = scale.named(theta).tolist()
    m = problem.linear
    stuck = [value <= 0 for value in values[:m]] + [value <= bounds[0] or value >= bounds[1] for value in values[m:]]
    unit = float(scale.unit) ** 2 if problem.objective == "squares" else 1.0
    return Fit(
        parameters=dict(zip(scale.names, values, strict=True)),
        objective_value=unit * float(found.value[best]),
        gradient_norm=unit * float(found.gradient[best]),
        converged=bool(found.converged[best]),
        at_bounds=tuple(name for name, at in zip(scale.names, stuck, strict=True) if at),
        objective=problem.objective,
        outliers=outliers,
        delta=delta,
        points=int(keep.sum()),
        terms=scale.terms,
        bounds=bounds,
        kept=keep,
        problem=problem,
        scale=scale,
        theta=theta,
    )
