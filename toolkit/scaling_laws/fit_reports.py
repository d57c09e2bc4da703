"""What a fitted law can and cannot tell: identifiability in words, residual diagnostics, hold-out extrapolation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit.checks import typed
from toolkit.scaling_laws.fit_intervals import profile_intervals
from toolkit.scaling_laws.fitting import Fit, fit_law
from toolkit.scaling_laws.least_squares import jacobian

__all__ = ["Extrapolation", "Identifiability", "Residuals", "extrapolation_score", "identifiability", "residual_report"]

_VAGUE = 10.0  # an amplitude known to less than this factor either way is called unknown


@dataclass(frozen=True)
class Identifiability:
    """``condition``: of Jᵀ W J in log-parameters, columns of J being d log p / d log of E and A and d log p / d alpha;
    ``condition_centred``: the same in the solver's centred coordinates with columns of length 1. ``flat``: the
    direction in which the fit is least determined, as the change of each log-amplitude and exponent that moves log
    losses by a root mean square of ``flat_effect``, with its largest entry 0.1 in absolute value (10 %, or 0.1 in an
    exponent). ``unknown``: parameters that the data do not determine. ``words``: all of it in sentences."""

    condition: float
    condition_centred: float
    flat: dict[str, float]
    flat_effect: float
    unknown: tuple[str, ...]
    words: str

    def __str__(self) -> str:
        return self.words


def _log_jacobian(fit: Fit) -> tuple[Tensor, Tensor]:
    """d log p / d (log E, log A, alpha) in the law's own coordinates and in centred ones, (points, parameters)."""
    theta = fit.theta[None]
    columns, p, _ = jacobian(fit.problem, theta)
    m, first = fit.problem.linear, int(fit.problem.offset)
    centred = (columns[0] / p).T
    scaled = torch.cat([centred[:, :m] * theta[0, :m], centred[:, m:]], 1)
    own = scaled.clone()
    for k, j in enumerate(fit.problem.term):  # log A = log c + alpha · centre: alpha moves at fixed A
        own[:, m + k] -= fit.scale.centre[k] * scaled[:, first + j]
    return own, centred


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float((values[0] / values[-1]).square()) if float(values[-1]) > 0 else math.inf


@typed
def identifiability(fit: Fit, level: float = 0.95) -> Identifiability:
    """Which parameters of ``fit`` these sizes and losses determine, and along which direction the valley is flat.

    A parameter is called unknown when its profile interval at ``level`` reaches 0 or has an open end, when an amplitude
    A is not known to a factor of 10 either way, or when the parameter sits on a bound (conventions of this lab).
    Source for the two condition numbers: the 5-parameter Chinchilla law as written has a Hessian with condition near
    10^11 (public analyses of Besiroglu et al. 2024); here in logs, which removes units.
    """
    own, centred = _log_jacobian(fit)
    lengths = centred.norm(dim=0).clamp_min(1e-280)
    _, _, rows = torch.linalg.svd(own, full_matrices=False)
    flat = rows[-1] * 0.1 / rows[-1].abs().max()
    effect = float((own @ flat).square().mean().sqrt())
    ranges = profile_intervals(fit, level)
    unknown, words = [], []
    spans = {
        name: float((logs.max() - logs.min()) / math.log(10))
        for name, logs in zip(fit.scale.sizes, fit.problem.logs, strict=True)
    }
    reach = ", ".join(f"{name} spans {span:.1f} decades" for name, span in spans.items())
    for name, found in ranges.items():
        low, high, value = found.low, found.high, found.estimate
        vague = name.startswith("A_") and (low <= value / _VAGUE or high >= value * _VAGUE)
        open_end = low <= 0 or math.isinf(high) or (name.startswith("alpha_") and high >= fit.bounds[1])
        if not (vague or open_end or name in fit.at_bounds):
            continue
        unknown.append(name)
        at = f"the fit puts it on its bound, {value:.3g}" if name in fit.at_bounds else f"the fit says {value:.3g}"
        words.append(
            f"{name} cannot be told from these sizes: {at}, and everything from {low:.3g} to {high:.3g} "
            f"fits as well at {100 * level:g} % ({reach})."
        )
    if not words:
        words.append(f"Every parameter is determined by these sizes at {100 * level:g} % ({reach}).")
    moves = [
        f"{name} by {100 * change:+.2g} %" if not name.startswith("alpha_") else f"{name} by {change:+.2g}"
        for name, change in zip(fit.scale.names, flat.tolist(), strict=True)
        if abs(change) >= 1e-3
    ]
    scatter = float(_log_residuals(fit).square().mean().sqrt())
    words.append(
        f"Flattest direction: moving {', '.join(moves)} together changes the predicted losses by {100 * effect:.2g} % "
        f"(root mean square), against a scatter of {100 * scatter:.2g} %."
    )
    conditions = _condition(own), _condition(centred / lengths)
    words.append(f"Condition number {conditions[0]:.1e} as written, {conditions[1]:.1e} centred.")
    return Identifiability(
        *conditions, dict(zip(fit.scale.names, flat.tolist(), strict=True)), effect, tuple(unknown), " ".join(words)
    )


def _log_residuals(fit: Fit) -> Tensor:
    _, p, _ = jacobian(fit.problem, fit.theta[None])
    return (p[0] / fit.problem.losses).log()


class Residuals(NamedTuple):
    """``log``: log p - log L at the kept points; ``rms`` and ``spread`` (1.4826 · median absolute value) of it; ``r2``
    of log losses; ``tails``: share beyond 3 spreads (0.0027 for normal ones); ``bend``: for each size the t value of
    the squared log size in a regression of the residuals on the squared log sizes and the fit's own Jacobian: beyond
    ±2 the law bends where the losses do not."""

    log: Tensor
    rms: float
    spread: float
    r2: float
    tails: float
    bend: dict[str, float]


@typed
def residual_report(fit: Fit) -> Residuals:
    """Residual diagnostics of ``fit`` in logs, whatever its objective: scatter, tails, and curvature left over."""
    r = _log_residuals(fit)
    y = fit.problem.losses.log()
    spread = 1.4826 * float(r.abs().median())
    _, centred = _log_jacobian(fit)
    bends = {}
    for name, logs in zip(fit.scale.sizes, fit.problem.logs, strict=True):
        square = logs.square()
        basis = torch.linalg.qr(centred / centred.norm(dim=0).clamp_min(1e-280))[0]
        rest = square - basis @ (basis.T @ square)
        left = r - basis @ (basis.T @ r)
        slope = (rest @ left) / (rest @ rest).clamp_min(1e-280)
        freedom = max(1, len(r) - centred.shape[1] - 1)
        error = ((left - slope * rest).square().sum() / freedom / (rest @ rest).clamp_min(1e-280)).sqrt()
        bends[name] = float(slope / error.clamp_min(1e-280))
    return Residuals(
        r,
        float(r.square().mean().sqrt()),
        spread,
        1 - float(r.square().sum() / (y - y.mean()).square().sum()),
        float((r.abs() > 3 * spread).double().mean()),
        bends,
    )


class Extrapolation(NamedTuple):
    """Errors of log p - log L: ``inside`` on the points fitted and ``outside`` on those held out (root mean squares),
    ``bias`` their mean outside (above 0: too pessimistic); ``fit`` is the law fitted to the rest."""

    inside: float
    outside: float
    bias: float
    fit: Fit


@typed
def extrapolation_score(
    sizes: Mapping[str, Tensor],
    losses: Float[Tensor, "points"],
    terms: Sequence[Sequence[str]],
    held_out: Bool[Tensor, "points"],
    **options: Any,
) -> Extrapolation:
    """Fit without the points ``held_out`` (say, the largest runs) and score the prediction of their losses.

    ``options`` are those of :func:`fit_law`; its policy on outliers applies to the points fitted, never to those held
    out. Raises ``ValueError`` where nothing is held out, and as :func:`fit_law` for what remains.
    """
    if not bool(held_out.any()):
        raise ValueError("held_out: expected at least one point, got none")
    if not bool((losses[held_out].isfinite() & (losses[held_out] > 0)).all()):
        raise ValueError("losses: expected finite values greater than 0 among the points held out")
    fit = fit_law({name: value[~held_out] for name, value in sizes.items()}, losses[~held_out], terms, **options)
    outside = fit.predict({name: value[held_out] for name, value in sizes.items()}).log()
    error = outside - losses[held_out].to(torch.float64).log()
    inside = float(_log_residuals(fit).square().mean().sqrt())
    return Extrapolation(inside, float(error.square().mean().sqrt()), float(error.mean()), fit)
