"""Many small fits of one law at once: non-negative variable projection and a batched Levenberg-Marquardt.

The law is p = E + Σ_j c_j Π_v exp(-a_v z_v) with z_v the (centred) log of size v, which belongs to one term j. The fit
minimises F = Σ_i w_i ρ(r_i) with ρ Huber's function of width delta (½ r² up to |r| = delta, straight beyond) and
r = log p - log L ("log_huber"; "log_squares" where delta is infinite) or r = p - L ("squares"). A row of ``theta`` is
(E, c_1, ..., a_1, ...), and every row of a batch is a fit of its own: another start, other weights, other losses.
"""

import math
from itertools import product
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit.checks import typed

__all__ = ["Objective", "Problem", "Solution", "levenberg_marquardt", "nonnegative", "variable_projection"]

Objective = Literal["log_huber", "log_squares", "squares"]

_BLOCK = 2048  # fits that are advanced together on a CPU: memory is bounded, and each block has one slow tail
_ROUNDED = 1e-7  # cosine at which a fit whose objective has stopped falling is at its minimum
_EXACT = 1e-26  # mean squared residual below which a fit is exact


class Problem(NamedTuple):
    """Data and objective of a batch of fits; a tensor without a leading batch dimension is shared by all of them."""

    logs: Tensor  # (sizes, points) or (batch, sizes, points)
    losses: Tensor  # (points,) or (batch, points)
    weights: Tensor  # (points,) or (batch, points)
    term: tuple[int, ...]  # for each size the term it belongs to, 0 .. terms - 1
    offset: bool  # whether there is an E
    objective: str
    delta: float

    @property
    def linear(self) -> int:
        """How many linear parameters there are."""
        return int(self.offset) + max(self.term) + 1

    def members(self, index: Tensor | slice, batch: int) -> "Problem":
        """The problem of some rows of a batch."""
        logs, losses, weights = (
            value.expand(batch, *value.shape)[index] if value.ndim == dims else value[index]
            for value, dims in ((self.logs, 2), (self.losses, 1), (self.weights, 1))
        )
        return self._replace(logs=logs, losses=losses, weights=weights)


class Solution(NamedTuple):
    """Minima of a batch of fits: ``gradient`` is the largest entry of the projected gradient, ``cosine`` the largest
    cosine between residuals and a free column of the Jacobian (0 at a minimum whatever the units)."""

    theta: Tensor  # (batch, parameters)
    value: Tensor  # (batch,)
    gradient: Tensor  # (batch,)
    cosine: Tensor  # (batch,)
    converged: Tensor  # (batch,), bool


class _Local(NamedTuple):
    value: Tensor
    gradient: Tensor
    hessian: Tensor
    gauss: Tensor
    residual: Tensor  # Σ w ψ(r) r


def powers(problem: Problem, exponents: Tensor) -> list[Tensor]:
    """The product of powers of each term, (batch, points) each."""
    result = []
    for j in range(max(problem.term) + 1):
        terms = [exponents[:, k, None] * problem.logs[..., k, :] for k, of in enumerate(problem.term) if of == j]
        result.append(torch.stack(terms).sum(0).neg().exp() if len(terms) > 1 else terms[0].neg().exp())
    return result


def residuals(problem: Problem, p: Tensor) -> Tensor:
    """log p - log L, or p - L with objective "squares"."""
    return p - problem.losses if problem.objective == "squares" else (p / problem.losses).log()


def huber(problem: Problem, r: Tensor) -> Tensor:
    """ρ(r), per point and without weights."""
    clipped = r.clamp(-problem.delta, problem.delta)
    return clipped * (r - 0.5 * clipped)


def predictions(problem: Problem, theta: Tensor) -> Tensor:
    """p at every point, (batch, points)."""
    m = problem.linear
    terms = powers(problem, theta[:, m:])
    first = int(problem.offset)
    p = torch.stack([theta[:, first + j, None] * u for j, u in enumerate(terms)]).sum(0)
    return p + theta[:, :1] if problem.offset else p


def jacobian(problem: Problem, theta: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dp/dtheta of shape (batch, parameters, points), p, and the products of powers."""
    m, first = problem.linear, int(problem.offset)
    terms = powers(problem, theta[:, m:])
    scaled = [theta[:, first + j, None] * u for j, u in enumerate(terms)]
    slopes = [-problem.logs[..., k, :] * scaled[j] for k, j in enumerate(problem.term)]
    p = scaled[0]
    for other in scaled[1:]:
        p = p + other
    if problem.offset:
        p = p + theta[:, :1]
    ones = [torch.ones_like(p)] if problem.offset else []
    return torch.stack(ones + terms + slopes, 1), p, terms


def _local(problem: Problem, theta: Tensor) -> _Local:
    """Objective, gradient, exact Hessian and the positive Hessian that reweighted least squares would use."""
    columns, p, terms = jacobian(problem, theta)
    r = residuals(problem, p)
    w, delta = problem.weights, problem.delta
    psi = r.clamp(-delta, delta)
    value = (w * psi * (r - 0.5 * psi)).sum(-1)
    pull = w * psi
    robust = w if math.isinf(delta) else w * delta / r.abs().clamp_min(delta)
    curved = w.expand_as(r) if math.isinf(delta) else w * (r.abs() <= delta)
    residual = (pull * r).sum(-1)
    if problem.objective != "squares":
        columns, curved, along = columns / p[:, None], curved - pull, pull / p
    else:
        along = pull
    gradient = (columns @ pull[..., None])[..., 0]
    gauss = (columns * robust[..., None, :].expand_as(columns)) @ columns.mT
    hessian = (columns * curved[..., None, :]) @ columns.mT
    m, first = problem.linear, int(problem.offset)
    for k, j in enumerate(problem.term):  # second derivatives of p itself
        bent = -along * terms[j] * problem.logs[..., k, :]
        cross = bent.sum(-1)
        hessian[:, first + j, m + k] += cross
        hessian[:, m + k, first + j] += cross
        for other, of in enumerate(problem.term):
            if of == j:
                twice = (bent * problem.logs[..., other, :]).sum(-1)
                hessian[:, m + k, m + other] -= theta[:, first + j] * twice
    return _Local(value, gradient, hessian, gauss, residual)


def _steps(local: _Local, damping: Tensor, blocked: Tensor) -> Tensor:
    """Damped Newton steps of the free parameters; where the Hessian is not positive, damped Gauss-Newton steps."""
    size = local.gauss.diagonal(dim1=-2, dim2=-1)
    size = size.clamp_min(1e-14 * size.amax(-1, keepdim=True).clamp_min(1e-280))
    unit = size.rsqrt()  # both matrices with the Gauss-Newton diagonal at 1: rounding sees no units
    both = torch.stack([local.hessian, local.gauss]) * unit[:, :, None] * unit[:, None, :]
    free = ~blocked
    both = both * (free[:, :, None] & free[:, None, :])
    both = both + torch.diag_embed(blocked.to(both.dtype) + damping[:, None])
    both[1] += torch.diag_embed(torch.full_like(size, 1e-13))
    factor, failed = torch.linalg.cholesky_ex(both)
    chosen = torch.where((failed[0] > 0)[:, None, None], factor[1], factor[0])
    right = torch.where(blocked, 0.0, local.gradient) * unit
    return -torch.cholesky_solve(right[..., None], chosen)[..., 0] * unit


def _blocked(theta: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor, fixed: Tensor) -> Tensor:
    """Parameters that may not move: fixed ones, and those at a bound which the gradient pushes against."""
    return fixed | ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))


def _measure(problem: Problem, theta: Tensor, local: _Local, blocked: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry of the projected gradient, and the largest cosine (0 for an exact fit)."""
    gradient = torch.where(blocked, 0.0, local.gradient).abs()
    size = local.gauss.diagonal(dim1=-2, dim2=-1).clamp_min(1e-280).sqrt()
    exact = local.residual <= _EXACT * problem.weights.sum(-1)
    cosine = (gradient / size).amax(-1) / local.residual.clamp_min(1e-280).sqrt()
    return gradient.amax(-1), torch.where(exact, 0.0, cosine)


def _solve(
    problem: Problem, theta: Tensor, lower: Tensor, upper: Tensor, fixed: Tensor, steps: int, tolerance: float
) -> Solution:
    batch = len(theta)
    names = (theta, *(theta.new_zeros(batch) for _ in range(3)))
    result = [value.clone() for value in names]
    active = torch.arange(batch, device=theta.device)
    damping, still = theta.new_full((batch,), 1e-3), theta.new_zeros(batch)
    local = _local(problem, theta)
    for step in range(steps + 1):
        blocked = _blocked(theta, local.gradient, lower, upper, fixed)
        gradient, cosine = _measure(problem, theta, local, blocked)
        done = (
            (cosine <= tolerance)
            | ((still >= 3) & (cosine <= _ROUNDED))
            | (damping > 1e10)
            | ~local.value.isfinite()
            | (step == steps)
        )
        if bool(done.any()):
            for store, value in zip(result, (theta, local.value, gradient, cosine), strict=True):
                store[active[done]] = value[done]
            go = (~done).nonzero()[:, 0]
            if not len(go):
                break
            problem = problem.members(go, len(theta))
            active, theta, damping, still = (v[go] for v in (active, theta, damping, still))
            blocked, fixed = blocked[go], fixed[go]
            local = _Local(*(value[go] for value in local))
        trial = (theta + _steps(local, damping, blocked)).clamp(lower, upper)
        trial = torch.where(fixed, theta, trial)
        there = _local(problem, trial)
        better = there.value <= local.value
        still = torch.where(there.value < local.value * (1 - 1e-14), 0.0, still + 1)
        damping = torch.where(better, damping / 8, (damping * 5).clamp_min(1e-6))
        theta = torch.where(better[:, None], trial, theta)
        local = _Local(
            *(
                torch.where(better.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
                for new, old in zip(there, local, strict=True)
            )
        )
    at, value, gradient, cosine = result
    return Solution(at, value, gradient, cosine, cosine <= max(tolerance, _ROUNDED))


@typed
def levenberg_marquardt(
    problem: Problem,
    theta: Float[Tensor, "batch parameters"],
    bounds: tuple[float, float],
    *,
    fixed: Bool[Tensor, "batch parameters"] | None = None,
    steps: int = 200,
    tolerance: float = 1e-9,
) -> Solution:
    """Minimise every row of ``theta`` at once, with linear parameters ≥ 0 and exponents within ``bounds``.

    Step: (H + damping · diag G) s = -g, with the exact Hessian H of the Huber objective, so that the end is quadratic,
    and with G = Jᵀ diag(w min(1, delta/|r|)) J in its place where that sum is not positive definite. A step that does
    not lower the objective is refused and damped more (Marquardt 1963, "An Algorithm for Least-Squares Estimation of
    Nonlinear Parameters"; bounds by projection, Bertsekas 1982, "Projected Newton Methods"). A row ends when every free
    column of the Jacobian makes a cosine of at most ``tolerance`` with the weighted residuals. ``fixed`` parameters
    stay where they are. Float64 on the device of ``theta``; rows never influence one another.
    """
    low, high = bounds
    m = problem.linear
    lower, upper = theta.new_full((theta.shape[1],), low), theta.new_full((theta.shape[1],), high)
    lower[:m], upper[:m] = 0.0, math.inf
    if fixed is None:
        fixed = torch.zeros_like(theta, dtype=torch.bool)
    theta = torch.where(fixed, theta, theta.clamp(lower, upper))
    block = _BLOCK if theta.device.type == "cpu" else 1 << 16
    parts = []
    for start in range(0, len(theta), block):
        rows = slice(start, start + block)
        part = problem.members(rows, len(theta))
        parts.append(_solve(part, theta[rows], lower, upper, fixed[rows], steps, tolerance))
    return Solution(*(torch.cat(values) for values in zip(*parts, strict=True)))


@typed
def nonnegative(gram: Float[Tensor, "batch n n"], right: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
    """Exact minimiser of ½ xᵀ gram x - rightᵀ x over x ≥ 0, for the few unknowns of a law: all active sets are tried.

    The minimiser solves the equations of its own free set, so the best solution that is ≥ 0 is the answer.
    """
    n = gram.shape[-1]
    free = torch.tensor(list(product((True, False), repeat=n))[:-1], device=gram.device)
    unit = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-280).rsqrt()
    scaled, target = gram * unit[:, :, None] * unit[:, None, :], right * unit
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    some = torch.where(free[:, :, None] & free[:, None, :], scaled[:, None], eye) + 1e-14 * eye
    factor = torch.linalg.cholesky_ex(some)[0]
    wanted = torch.where(free, target[:, None], 0.0)
    x = torch.cholesky_solve(wanted[..., None], factor)[..., 0]
    value = -(x * wanted).sum(-1)
    allowed = (x >= 0).all(-1) & x.isfinite().all(-1)
    best = torch.where(allowed, value, math.inf).argmin(-1)
    x = x[torch.arange(len(x), device=x.device), best] * unit
    return torch.where(allowed.any(-1, keepdim=True), x, 0.0)


@typed
def variable_projection(
    problem: Problem,
    exponents: Float[Tensor, "grid sizes"],
    linear: Float[Tensor, "grid linear"] | None = None,
    sweeps: int = 12,
) -> tuple[Float[Tensor, "grid linear"], Float[Tensor, "grid"]]:
    """For each row of exponents the best linear parameters ≥ 0, and the objective there.

    With "squares" one exact solve (Golub & Pereyra 1973, "The Differentiation of Pseudo-Inverses and Nonlinear Least
    Squares Problems Whose Variables Separate"). Else reweighted: weights w min(1, delta/|r|) / (p m) with
    m = (p - L) / (log p - log L) turn the linear equations Σ weight (p - L) u = 0 into the stationary equations
    Σ w ψ(r) u / p = 0 of the Huber objective in logs, so that a fixed point of the ``sweeps`` is its exact minimum.
    ``linear`` are values to begin the sweeps at (default: p = L).
    """
    terms = powers(problem, exponents)
    columns = torch.stack(([torch.ones_like(terms[0])] if problem.offset else []) + terms, 1)
    y, w = problem.losses, problem.weights
    weight = w if problem.objective == "squares" else w / y.square()
    found = linear
    for sweep in range(1 if problem.objective == "squares" else max(1, sweeps)):
        if found is not None and (linear is not None or sweep):
            p = (found[:, None] @ columns)[:, 0]
            r = residuals(problem, p)
            mean = torch.where(r.abs() < 1e-7, y * (1 + 0.5 * r), (p - y) / torch.where(r.abs() < 1e-7, 1.0, r))
            robust = w if math.isinf(problem.delta) else w * problem.delta / r.abs().clamp_min(problem.delta)
            weight = robust / (p * mean)
        weighted = columns * weight[..., None, :]
        found = nonnegative(weighted @ columns.mT, (weighted @ y.expand_as(terms[0])[..., None])[..., 0])
    assert found is not None
    r = residuals(problem, (found[:, None] @ columns)[:, 0])
    return found, (w * huber(problem, r)).sum(-1)
