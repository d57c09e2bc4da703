"""How uncertain is a predicted number? Training objectives, measures, and a task in which the answer is known.

A net gives a mean and a spread (a standard deviation, in the unit of the target). It may learn the spread from one
answer per input (heteroscedastic), from several annotators' answers (divergence), or, as a second net, from the errors
that a trained one made on held-out data (direct uncertainty prediction). All three are from Zerva, Glushkova, Rei &
Martins 2022, "Disentangling Uncertainty in Machine Translation Evaluation". Its code sums over the batch where we leave
the mean to the trainer, and has no ``eps``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, typed
from toolkit.fleet import Adam, Fleet, cosine, grid, train
from toolkit.models import MLP

__all__ = [
    "RegressionTask",
    "Regressors",
    "SpreadParts",
    "error_correlation",
    "error_prediction",
    "gaussian_kl",
    "heteroscedastic",
    "interval_coverage",
    "noisy_gap_task",
    "noisy_gap_truth",
    "spread_decomposition",
    "train_regressors",
]

_RANGE = (-2.0, 2.0)
_FLOOR = 0.01  # least predicted error of the second nets
_OBJECTIVES = ("base", "hts", "kl")
_Kind = Literal["hts", "squared", "absolute"]


class RegressionTask(NamedTuple):
    """Inputs, several annotators' answers to each, and the truth: an answer to x is N(mean(x), spread(x)²)."""

    x: Float[Tensor, "n 1"]
    answers: Float[Tensor, "n annotators"]
    mean: Float[Tensor, "n"]
    spread: Float[Tensor, "n"]


class SpreadParts(NamedTuple):
    """Standard deviations in the unit of the target; ``total``² = ``aleatoric``² + ``epistemic``²."""

    total: Float[Tensor, "batch"]
    aleatoric: Float[Tensor, "batch"]
    epistemic: Float[Tensor, "batch"]


class Predictions(NamedTuple):
    """Predicted mean and standard deviation of every seed at every point, in the unit of the target."""

    mean: Float[Tensor, "seeds points"]
    spread: Float[Tensor, "seeds points"]


# --- objectives -------------------------------------------------------------------------------------------------------


def _half_ratio(squared_error: Tensor, spread: Tensor, eps: float) -> Tensor:
    variance = spread.square() + eps
    return 0.5 * squared_error / variance + 0.5 * variance.log()


def _check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps: expected a variance of at least 0, got {eps}")


@typed
def heteroscedastic(
    mean: Float[Tensor, "batch"], spread: Float[Tensor, "batch"], targets: Float[Tensor, "batch"], eps: float = 1e-6
) -> Float[Tensor, "batch"]:
    """(y - μ)² / 2v + log(v) / 2 with v = s² + ``eps``: a Gaussian's negative log-likelihood less log(2π) / 2, in nats.

    The spread s enters squared, so its sign does not matter. A constant v is best at the mean squared error (value
    1/2 + log(v) / 2), and the slope in log v is (1 - (y - μ)² / v) / 2. Raises ``ValueError`` for a negative ``eps``.

    Source: Zerva et al. 2022, "Disentangling Uncertainty in Machine Translation Evaluation" (HTS); Kendall & Gal 2017,
    "What uncertainties do we need in Bayesian deep learning for computer vision?".
    """
    _check_eps(eps)
    return _half_ratio((targets - mean).square(), spread, eps)


@typed
def gaussian_kl(
    mean: Float[Tensor, "batch"],
    spread: Float[Tensor, "batch"],
    target_mean: Float[Tensor, "batch"],
    target_spread: Float[Tensor, "batch"],
    eps: float = 1e-6,
) -> Float[Tensor, "batch"]:
    """KL(N(m*, v*) ‖ N(μ, v)) = log(v / v*) / 2 + (v* + (m* - μ)²) / 2v - 1/2, in nats; v = s² + ``eps``, v* alike.

    m* and s* are the mean and the standard deviation of the annotators' answers to the example. It is the mean of
    :func:`heteroscedastic` over y ~ N(m*, v*) less log(v*) / 2 + 1/2: training on it is heteroscedastic training with
    every annotator's answer. For that s* must divide by the number A of annotators; with A - 1 the scatter of m* is
    counted twice and v comes out (1 + 1/A) times too large. Raises ``ValueError`` for a negative ``eps``.

    Source: Zerva et al. 2022, "Disentangling Uncertainty in Machine Translation Evaluation" (KL).
    """
    _check_eps(eps)
    target_variance = target_spread.square() + eps
    expected = target_variance + (target_mean - mean).square()
    return _half_ratio(expected, spread, eps) - 0.5 * target_variance.log() - 0.5


@typed
def error_prediction(
    predicted: Float[Tensor, "batch"], errors: Float[Tensor, "batch"], kind: _Kind = "hts", eps: float = 1e-6
) -> Float[Tensor, "batch"]:
    """Loss of a predicted error u against the error e that another, trained model made: direct uncertainty prediction.

    ``hts`` e² / 2u² + log(u²) / 2 (u² + ``eps`` for u²), ``squared`` (e² - u²)², ``absolute`` |e - |u||. As a constant,
    u is best at the root mean square of e for the first two and at the median of |e| for the third, which for Gaussian
    errors is 0.674 standard deviations. ``squared`` has the unit of e to the fourth power: it sees little but the
    largest errors. The errors must be from data that the other model was not fitted to. Only e² or |e| is used. Raises
    ``ValueError`` for an unknown ``kind`` or a negative ``eps``.

    Source: Zerva et al. 2022, "Disentangling Uncertainty in Machine Translation Evaluation" (DUP).
    """
    _check_eps(eps)
    if kind == "hts":
        return _half_ratio(errors.square(), predicted, eps)
    if kind == "squared":
        return (errors.square() - predicted.square()).square()
    return (errors.abs() - predicted.abs()).abs()


# --- measures ---------------------------------------------------------------------------------------------------------


@typed
def spread_decomposition(means: Float[Tensor, "members batch"], spreads: Float[Tensor, "members batch"]) -> SpreadParts:
    """Standard deviation of an equal mixture of the members' Gaussians, and its two parts (unit of the target).

    aleatoric² = (1/M) Σ_m s_m², what the members expect; epistemic² = (1/M) Σ_m (μ_m - μ̄)², where they disagree;
    total² is the sum, the law of total variance. Raises ``ValueError`` for no members.

    Source: Lakshminarayanan, Pritzel & Blundell 2017, "Simple and scalable predictive uncertainty estimation using deep
    ensembles" (the mixture's variance).
    """
    if means.shape[0] == 0:
        raise ValueError("means: expected at least one member, got none")
    aleatoric = spreads.square().mean(0)
    epistemic = (means - means.mean(0)).square().mean(0)
    return SpreadParts((aleatoric + epistemic).sqrt(), aleatoric.sqrt(), epistemic.sqrt())


@typed
def interval_coverage(
    mean: Float[Tensor, "batch"],
    spread: Float[Tensor, "batch"],
    targets: Float[Tensor, "batch"],
    levels: Float[Tensor, "levels"],
) -> Float[Tensor, "levels"]:
    """Share of targets in the central interval μ ± z s that a Gaussian fills with probability ``level``.

    z = Φ⁻¹((1 + level) / 2); a calibrated forecast covers its level: above it the spread is too wide, below too
    narrow. ``spread`` is at least 0. Raises ``ValueError`` for levels outside (0, 1) or no targets.

    Source: Kuleshov, Fenner & Ermon 2018, "Accurate uncertainties for deep learning using calibrated regression".
    """
    if targets.shape[0] == 0:
        raise ValueError("targets: expected at least one, got none")
    if readable(levels) and not bool(((levels > 0) & (levels < 1)).all()):
        raise ValueError(f"levels: expected probabilities in (0, 1), got {levels.tolist()}")
    half = torch.special.ndtri((1 + levels) / 2)[:, None] * spread
    return ((targets - mean).abs() <= half).to(mean.dtype).mean(-1)


@typed
def error_correlation(errors: Float[Tensor, "batch"], uncertainty: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    """Pearson's correlation of absolute error and predicted uncertainty, in [-1, 1]; 0 where either is constant.

    Even the true spread does not reach 1: a Gaussian's absolute error scatters about 0.798 s by 0.603 s.
    Raises ``ValueError`` for fewer than two values.

    Source: Zerva et al. 2022, "Disentangling Uncertainty in Machine Translation Evaluation" (its UPS).
    """
    if errors.shape[0] < 2:
        raise ValueError(f"errors: expected at least 2 values, got {errors.shape[0]}")
    size = errors.abs()
    a, b = size - size.mean(), uncertainty - uncertainty.mean()
    rounding = 8 * torch.finfo(a.dtype).eps
    varies = (a.abs().amax() > rounding * size.amax()) & (b.abs().amax() > rounding * uncertainty.abs().amax())
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(varies, (a * b).sum(), torch.zeros_like(scale)) / torch.where(varies, scale, 1)


# --- a task with a noisy region and a gap -----------------------------------------------------------------------------


@typed
def noisy_gap_truth(x: Float[Tensor, "n 1"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The true mean sin 2x + 0.3 x and the true spread 0.05 + 0.45 exp(-((x + 1) / 0.35)²) of an answer to x."""
    x = x[:, 0]
    return torch.sin(2 * x) + 0.3 * x, 0.05 + 0.45 * torch.exp(-((x + 1) / 0.35).square())


@typed
def noisy_gap_task(
    n: int, seed: int, annotators: int = 4, gap: tuple[float, float] | None = (0.3, 1.3)
) -> RegressionTask:
    """``n`` inputs, uniform on [-2, 2] outside the ``gap``, and ``annotators`` independent answers to each.

    Answers are noisy about x = -1, where more data does not help, and smooth elsewhere (:func:`noisy_gap_truth`); in
    the gap there are no inputs at all, and only more data would help. ``gap=None`` covers everything. Float32; a larger
    ``n`` with the same seed only appends. Raises ``ValueError`` for sizes below 1 or a gap that is not inside [-2, 2].

    Source: the two kinds of uncertainty that Zerva et al. 2022, "Disentangling Uncertainty in Machine Translation
    Evaluation", tell apart, in one dimension; the task is ours.
    """
    for name, value in (("n", n), ("annotators", annotators)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    low, high = _RANGE
    left, right = (low, low) if gap is None else gap
    if not low <= left <= right < high:
        raise ValueError(f"gap: expected (left, right) with {low} <= left <= right < {high}, got {gap}")
    place = low + (high - low - (right - left)) * random.uniform(random.key(seed, 0), (n,), torch.float64)
    x = (place + (right - left) * (place >= left))[:, None]
    mean, spread = noisy_gap_truth(x)
    noise = random.normal(random.key(seed, 1), (n, annotators), torch.float64)
    answers = mean[:, None] + spread[:, None] * noise
    return RegressionTask(x.float(), answers.float(), mean.float(), spread.float())


# --- the experiment ---------------------------------------------------------------------------------------------------


def _first_spread(outputs: Tensor) -> Tensor:
    """Not the square of an output: where it changes its sign the spread is 0, and a net cannot get past that."""
    return F.softplus(outputs[..., 1])


def _second_spread(outputs: Tensor) -> Tensor:
    """Not softplus: its slope vanishes as the spread does, and ``squared`` and ``absolute`` stay where it does."""
    return outputs[..., 0].abs() + _FLOOR


@dataclass(frozen=True)
class Regressors:
    """The trained fleets of :func:`train_regressors`; ``predict`` asks all of them."""

    first: Fleet
    second: Fleet
    seeds: int
    names: tuple[str, ...]
    residual: Tensor

    def predict(self, x: Tensor) -> dict[str, Predictions]:
        """Method → mean and spread, both ``(seeds, points)``, at the inputs ``x`` ``(points, 1)``.

        ``base``, ``hts``, ``kl``, and ``dup_<kind>_<held-out set>`` (whose mean is the base's), on the device of ``x``.
        """
        outputs = self.first.logits(x, chunk=len(self.first)).to(x.device)
        outputs = outputs.unflatten(0, (len(_OBJECTIVES), self.seeds))
        means, spreads = outputs[..., 0], _first_spread(outputs)
        found = {name: Predictions(means[i], spreads[i]) for i, name in enumerate(_OBJECTIVES)}
        found["base"] = Predictions(means[0], self.residual.to(x.device)[:, None].expand_as(means[0]))
        inputs = _second_inputs(self.first[: self.seeds], x).repeat(len(self.names), 1, 1)
        predicted = self.second.evaluate(
            lambda model, batch, hyper: _second_spread(model(batch.x)),
            {},
            member_data={"x": inputs},
            chunk=len(self.second),
        ).to(x.device)
        for name, spread in zip(self.names, predicted.unflatten(0, (len(self.names), self.seeds)), strict=True):
            found[name] = Predictions(means[0], spread)
        return found


def _second_inputs(base: Fleet, x: Tensor) -> Tensor:
    """What the second net reads: the base's features and its prediction, ``(seeds, n, width + 1)``."""

    def read(model, batch, hyper):
        outputs, features = model(batch.x, return_features=True)
        return torch.cat([features, outputs[:, :1]], -1)

    return base.evaluate(read, {"x": x}, chunk=len(base))


def _first_loss(model, batch, hyper):
    outputs = model(batch.x)
    mean, spread = outputs[:, 0], _first_spread(outputs)
    squared = 0.5 * (batch.y - mean).square()
    values = (
        squared,
        heteroscedastic(mean, spread, batch.y),
        gaussian_kl(mean, spread, batch.answer_mean, batch.answer_spread),
    )
    return sum((hyper.objective == i).to(mean.dtype) * value for i, value in enumerate(values))


def _second_loss(model, batch, hyper):
    predicted = _second_spread(model(batch.x))
    values = (error_prediction(predicted, batch.error, kind) for kind in get_args(_Kind))
    return sum((hyper.kind == i).to(predicted.dtype) * value for i, value in enumerate(values))


def train_regressors(
    task: RegressionTask,
    held_out: Mapping[str, RegressionTask],
    seeds: int = 8,
    *,
    kinds: Sequence[_Kind] = ("hts", "squared", "absolute"),
    hidden: Sequence[int] = (32, 32),
    steps: int = 300,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
    device: str = "auto",
) -> Regressors:
    """Train every way to predict a spread, with ``seeds`` seeds each: two calls of ``train``.

    The first fleet: ``base`` (squared error; its spread is constant, the root mean square of its training residuals)
    and ``hts`` see one answer per input, ``kl`` the mean and spread of all annotators. The second fleet: for each
    held-out set and each of ``kinds`` (see :func:`error_prediction`), nets that read the base's features and prediction
    and predict the size of its error there. Methods of one seed share initial weights and batches, so they are paired.

    The paper squares the raw output. In one dimension ``hts`` then hardly learns even the mean (the spread is 0 where
    the output changes its sign), so that the first nets' spread is a softplus, the second's 0.01 plus the
    output's size.
    Raises ``ValueError`` for no held-out set, sets of different sizes and unknown or repeated ``kinds``.

    Source: Zerva et al. 2022, "Disentangling Uncertainty in Machine Translation Evaluation".
    """
    sizes = {len(other.x) for other in held_out.values()}
    if len(sizes) != 1:
        raise ValueError(f"held_out: expected one or more sets of one size, got sizes {sorted(sizes)}")
    known = get_args(_Kind)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(known):
        raise ValueError(f"kinds: expected different ones of {known}, got {tuple(kinds)}")
    options: dict[str, Any] = {"batch": batch, "schedule": cosine(), "seed": seed, "device": device, "progress": False}
    y = task.answers[:, 0]
    data = {
        "x": task.x,
        "y": y,
        "answer_mean": task.answers.mean(1),
        "answer_spread": task.answers.std(1, correction=0),
    }
    first = train(
        lambda: MLP(1, hidden, 2),
        _first_loss,
        data,
        steps=steps,
        optimiser=Adam(lr),
        **grid(seeds, objective=range(len(_OBJECTIVES))),
        **options,
    )
    base = first[:seeds]

    def predict(x: Tensor) -> Tensor:
        return base.logits(x, chunk=seeds)[..., 0]

    residual = (y.to(first.device) - predict(task.x)).square().mean(1).sqrt()
    inputs, errors = [], []
    for other in held_out.values():
        inputs.append(_second_inputs(base, other.x))
        errors.append(other.answers[:, 0].to(first.device) - predict(other.x))
    copies = len(kinds)  # members are ordered held-out set, kind, seed
    second = train(
        lambda: MLP(hidden[-1] + 1, hidden, 1),
        _second_loss,
        {"x": inputs[0][0]},
        member_data={
            "x": torch.cat([part.repeat(copies, 1, 1) for part in inputs]),
            "error": torch.cat([part.repeat(copies, 1) for part in errors]),
        },
        steps=steps,
        optimiser=Adam(lr / 2),
        hyper={"kind": torch.tensor([known.index(k) for k in kinds] * len(held_out)).float().repeat_interleave(seeds)},
        streams=torch.arange(seeds).repeat(copies * len(held_out)),
        **options,
    )
    names = tuple(f"dup_{kind}_{name}" for name, kind in product(held_out, kinds))
    return Regressors(first, second, seeds, names, residual)
