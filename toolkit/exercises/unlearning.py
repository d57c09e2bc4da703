"""Exercises of the unlearning lab; mistakes of public code to be put right are in :mod:`toolkit.exercises.museum`.

Each solution is written for reading: one formula, plain torch, one model or one example at a time.
"""

import math

import torch
from torch import Tensor

from toolkit import random
from toolkit.exercises import Exercise

__all__ = ["deletions", "left_out", "likelihood_ratio", "npo_weight", "oracle_pass", "per_example_auc", "ridge_newton"]
__all__ += ["unlearning_score"]


def newton_without(theta: Tensor, x: Tensor, y: Tensor, penalty: float, forget: Tensor) -> Tensor:
    """Ridge weights (features,) after one Newton step from theta on the data without the rows marked in forget."""
    kept, targets = x[~forget], y[~forget]
    gradient = kept.T @ (kept @ theta - targets) + penalty * theta
    hessian = kept.T @ kept + penalty * torch.eye(len(theta))
    return theta - torch.linalg.solve(hessian, gradient)


_X = random.normal(random.key(60), (3, 9, 3))
_Y = random.normal(random.key(61), (3, 9))
_FORGET = torch.arange(9) < 3
_PENALTIES = (1.0, 0.2, 3.0)


def _fitted(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)


def _slope(w: Tensor, x: Tensor, y: Tensor, penalty: float) -> Tensor:
    return x.T @ (x @ w - y) + penalty * w


def _bent(x: Tensor, penalty: float, slope: Tensor) -> Tensor:
    """Inverse Hessian times a slope."""
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), slope)


ridge_newton = Exercise(
    "ridge-newton",
    "Ridge regression minimises $F(\\theta) = \\frac{1}{2} \\sum_i (y_i - x_i^\\top \\theta)^2 + \\frac{\\lambda}{2} "
    "|\\theta|^2$. Make it forget with one Newton step from the weights `theta` of all data: $\\theta - H_r^{-1} "
    "\\nabla F_r(\\theta)$, both of the retained examples' $F_r$. As $F_r$ is quadratic, this is retraining, to the "
    "last digit.",
    newton_without,
    [(_fitted(x, y, p), x, y, p, _FORGET) for x, y, p in zip(_X, _Y, _PENALTIES, strict=True)],
    {
        "influence": (
            lambda w, x, y, p, f: w - _bent(x, p, _slope(w, x[~f], y[~f], p)),
            "Your Hessian is that of all data. This is influence: cheap, as it is known from training, but it goes "
            "too short a way where forgotten examples have leverage. Use the retained examples' Hessian.",
        ),
        "slope of all data": (
            lambda w, x, y, p, f: w - _bent(x[~f], p, _slope(w, x, y, p)),
            "Your gradient is that of all data, which is 0 at theta: nothing is forgotten. Leave the forget set out.",
        ),
        "slope without penalty": (
            lambda w, x, y, p, f: w - _bent(x[~f], p, _slope(w, x[~f], y[~f], 0)),
            "The gradient lacks the penalty's λθ, so the step ends at weights that no retraining gives.",
        ),
        "Hessian without penalty": (
            lambda w, x, y, p, f: w - _bent(x[~f], 0, _slope(w, x[~f], y[~f], p)),
            "The Hessian lacks the penalty's λI.",
        ),
        "sign": (
            lambda w, x, y, p, f: w + _bent(x[~f], p, _slope(w, x[~f], y[~f], p)),
            "The sign is turned: you learn the forget set a second time. Newton's step is minus H⁻¹∇F.",
        ),
        "forget set's own": (
            lambda w, x, y, p, f: w - _bent(x[f], p, _slope(w, x[f], y[f], p)),
            "This is a step to the best fit of the forget set: forget marks what must not count.",
        ),
    },
)


def left_out_residuals(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Residuals (examples,) of ridge models that were each fitted without the example; penalty is λ."""
    hat = x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T)
    return (y - hat @ y) / (1 - hat.diagonal())


def _leverage(x: Tensor, p: float) -> Tensor:
    return (x * _bent(x, p, x.T).T).sum(1)


def _residual(x: Tensor, y: Tensor, p: float) -> Tensor:
    return y - x @ _fitted(x, y, p)


left_out = Exercise(
    "left-out",
    "What would a ridge model say of an example it had never seen? No retraining is needed: with the hat matrix "
    "$H = X (X^\\top X + \\lambda I)^{-1} X^\\top$ and the residuals $e = y - H y$ of the model of all data, the "
    "residual of the model without example $i$ is $e_i / (1 - h_i)$, where $h_i = H_{ii}$ is the leverage. "
    "Compute it for every $i$.",
    left_out_residuals,
    [(x, y, p) for x, y, p in zip(_X, _Y, _PENALTIES, strict=True)],
    {
        "plain": (
            _residual,
            "These are the residuals of the model that has seen the examples. Its own errors look smaller than they "
            "are, by 1 - h.",
        ),
        "multiplied": (
            lambda x, y, p: _residual(x, y, p) * (1 - _leverage(x, p)),
            "You multiply by 1 - h. An example that is left out is fitted worse: divide.",
        ),
        "first order": (
            lambda x, y, p: _residual(x, y, p) * (1 + _leverage(x, p)),
            "This is e (1 + h), what influence predicts: the first terms of e (1 + h + h² + ...). Points of high "
            "leverage, which matter most, are underestimated most.",
        ),
        "squared": (
            lambda x, y, p: _residual(x, y, p) / (1 - _leverage(x, p)).square(),
            "You divide by (1 - h)². One factor turns the residual of all data into that of the rest.",
        ),
        "no penalty": (
            lambda x, y, p: _residual(x, y, 0) / (1 - _leverage(x, 0)),
            "Your hat matrix has no λ: these are the residuals of ordinary least squares.",
        ),
        "mean leverage": (
            lambda x, y, p: _residual(x, y, p) / (1 - _leverage(x, p).mean()),
            "You divide by 1 minus the mean leverage, as generalised cross-validation does: each has its own h.",
        ),
    },
)


def log_ratio(margin: Tensor, unlearned: Tensor, retrained: Tensor) -> Tensor:
    """U-LiRA's scores (targets,) of one example's margin (targets,), from its margins (models,) under both fleets."""
    scores = []
    for margins in (unlearned, retrained):
        mean, deviation = margins.mean(), margins.std()
        scores.append(-(((margin - mean) / deviation) ** 2) / 2 - deviation.log())
    return scores[0] - scores[1]


_TARGETS = random.normal(random.key(62), (3, 5))
_UNLEARNED = 0.6 * random.normal(random.key(63), (3, 6)) + 0.7
_RETRAINED = 1.2 * random.normal(random.key(64), (3, 6)) - 0.4


def _density(m: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return -((m - mean) / deviation).square() / 2 - deviation.log()


def _ratio(m: Tensor, u: Tensor, r: Tensor) -> Tensor:
    return _density(m, u.mean(), u.std()) - _density(m, r.mean(), r.std())


likelihood_ratio = Exercise(
    "likelihood-ratio",
    "Did this model once learn $x$ and unlearn it, or never see it? U-LiRA fits a Gaussian to the margins of $x$ under "
    "models that unlearned it and another under models retrained without it, with variances over $n - 1$. The score "
    "of a target is $\\log \\mathcal{N}(m; \\mu_u, \\sigma_u^2) - \\log \\mathcal{N}(m; \\mu_r, \\sigma_r^2)$.",
    log_ratio,
    [(m, u, r) for m, u, r in zip(_TARGETS, _UNLEARNED, _RETRAINED, strict=True)],
    {
        "no log deviation": (
            lambda m, u, r: _ratio(m, u, r) + u.std().log() - r.std().log(),
            "The terms -log σ are missing. They do not cancel where the two fleets scatter differently.",
        ),
        "variance for deviation": (
            lambda m, u, r: _density(m, u.mean(), u.var()) - _density(m, r.mean(), r.var()),
            "You use the variance as if it were σ: take its root.",
        ),
        "over n": (
            lambda m, u, r: _density(m, u.mean(), u.std(correction=0)) - _density(m, r.mean(), r.std(correction=0)),
            "Your variances divide by n. They come from few models: divide by n - 1.",
        ),
        "turned": (
            lambda m, u, r: -_ratio(m, u, r),
            "The score is turned: it must be large for a model that looks as if it had unlearned x.",
        ),
        "not logged": (
            lambda m, u, r: _ratio(m, u, r).exp(),
            "This is the ratio of the densities. The score is its log, a difference.",
        ),
        "one side": (
            lambda m, u, r: -_density(m, r.mean(), r.std()),
            "You only ask how unlikely the margin is under retraining. The attack compares two explanations.",
        ),
        "pooled": (
            lambda m, u, r: (
                _density(m, u.mean(), torch.cat([u - u.mean(), r - r.mean()]).std())
                - _density(m, r.mean(), torch.cat([u - u.mean(), r - r.mean()]).std())
            ),
            "Both of your Gaussians have one common deviation. Each fleet has its own.",
        ),
    },
)


def auc_of_each(unlearned: Tensor, retrained: Tensor) -> Tensor:
    """AUC (examples,) of scores (unlearned models, examples) against scores (retrained models, examples)."""
    wins = (unlearned[:, None] > retrained).double()
    ties = (unlearned[:, None] == retrained).double()
    return (wins + ties / 2).mean(dim=(0, 1))


def _steps(path: int, models: int, examples: int) -> Tensor:
    """Scores on a coarse grid, so that ties occur; examples differ in their level."""
    noise = random.normal(random.key(65, path), (models, examples))
    return (2 * (noise + torch.arange(examples))).round() / 2


def _compared(u: Tensor, r: Tensor, tie: float = 0.5) -> Tensor:
    gap = u[:, None] - r
    return ((gap > 0).double() + tie * (gap == 0)).mean((0, 1))


per_example_auc = Exercise(
    "per-example-auc",
    "The attack is judged example by example: over pairs of an unlearned and a retrained model, its AUC is the share "
    "in which the unlearned one has the higher score, ties counting one half. Compute it for each example.",
    auc_of_each,
    [
        (_steps(0, 4, 3) + 0.5, _steps(1, 5, 3)),
        (_steps(2, 6, 4), _steps(3, 3, 4)),
        (_steps(4, 3, 2) - 0.5, _steps(5, 4, 2)),
    ],
    {
        "population": (
            lambda u, r: _compared(u.flatten()[:, None], r.flatten()[:, None])[0],
            "One AUC over all examples: the population attack. Examples differ in level by far more than unlearning "
            "shifts them, so a model that leaks each of them a little looks private.",
        ),
        "per model": (
            lambda u, r: torch.stack([_compared(scores[:, None], r.mean(0)[:, None])[0] for scores in u]),
            "You compare examples within a model. Compare models on one example.",
        ),
        "ties lost": (
            lambda u, r: _compared(u, r, 0),
            "A tie is no loss: two equal fleets would get less than 1/2. Count one half.",
        ),
        "ties won": (
            lambda u, r: _compared(u, r, 1),
            "A tie is no win: two equal fleets would get more than 1/2. Count one half.",
        ),
        "turned": (
            lambda u, r: _compared(r, u),
            "You count the pairs that the retrained model wins.",
        ),
        "folded": (
            lambda u, r: (_compared(u, r) - 0.5).abs() + 0.5,
            "You fold values below 1/2 up. Then exact unlearning, which scatters around 1/2, seems to leak.",
        ),
    },
)


def score_of_unlearning(forget: float, test: float, original_test: float, removed_class: bool) -> float:
    """AUS of accuracies in [0, 1] on the forget set and on test data, the latter also of the original model."""
    gap = forget if removed_class else abs(forget - test)
    return (1 - (original_test - test)) / (1 + gap)


def _aus(f: float, t: float, o: float, gap: float) -> float:
    return (1 - (o - t)) / (1 + gap)


unlearning_score = Exercise(
    "unlearning-score",
    "The adaptive unlearning score is $\\frac{1 - (A_{\\text{original}} - A_{\\text{test}})}{1 + \\Delta}$. A random "
    "forget set should be treated like test data, so $\\Delta = |A_{\\text{forget}} - A_{\\text{test}}|$; of a "
    "removed class nothing should be known, so $\\Delta = A_{\\text{forget}}$.",
    score_of_unlearning,
    [(0.95, 0.8, 0.85, False), (0.1, 0.78, 0.85, True), (0.6, 0.9, 0.86, False), (0.97, 0.82, 0.8, True)],
    {
        "always the difference": (
            lambda f, t, o, c: _aus(f, t, o, abs(f - t)),
            "You compare a removed class with the test data too: a model that still knows the class as well as any "
            "other gets the best score.",
        ),
        "always the accuracy": (
            lambda f, t, o, c: _aus(f, t, o, f),
            "You ask for accuracy 0 on a random forget set. A retrained model has its test accuracy there: less is "
            "over-forgetting.",
        ),
        "signed difference": (
            lambda f, t, o, c: _aus(f, t, o, f if c else f - t),
            "Your difference keeps its sign, so forgetting too much raises the score: take the absolute value.",
        ),
        "swapped tests": (
            lambda f, t, o, c: (1 - (t - o)) / (1 + (f if c else abs(f - t))),
            "The sign of the loss is turned: test accuracy that was lost must lower the score.",
        ),
        "absolute loss": (
            lambda f, t, o, c: (1 - abs(o - t)) / (1 + (f if c else abs(f - t))),
            "You punish test accuracy that was gained. By its definition the score can exceed 1 then.",
        ),
        "product": (
            lambda f, t, o, c: (1 - (o - t)) * (1 - (f if c else abs(f - t))),
            "You multiply by 1 - Δ, as the tug of war does. AUS divides by 1 + Δ.",
        ),
    },
)


def expected_requests(shards: int, slices: int, sequences: int) -> float:
    """Mean number of uniform deletion requests until no model is left; sequences is at most slices."""
    parts = shards * slices
    return parts * sum(1 / k for k in range(1, shards * sequences + 1))


def _harmonic(k: int) -> float:
    return sum(1 / i for i in range(1, k + 1))


deletions = Exercise(
    "deletions",
    "S3T cuts the data into $m$ shards of $L$ slices and trains $B \\le L$ sequences per shard, each beginning with "
    "another slice. A request hits each of the $m L$ slices alike and ends the sequence that began with it. While $k$ "
    "of the $m B$ first slices are untouched, the next of them is hit with probability $k / (m L)$. How many requests "
    "does it take on average until all are hit? SISA is the case $B = 1$.",
    expected_requests,
    [(5, 6, 1), (5, 6, 3), (3, 4, 2), (2, 8, 8)],
    {
        "every slice": (
            lambda m, slices, b: m * slices * _harmonic(m * slices),
            "You wait until every slice is hit. Only the mB slices with which a sequence begins end it.",
        ),
        "one sequence": (
            lambda m, slices, b: m * slices * _harmonic(m),
            "This is SISA's number. With B sequences a shard lives until all their B first slices are hit.",
        ),
        "per shard": (
            lambda m, slices, b: m * slices * _harmonic(b),
            "You wait for one shard to end, while requests go to all: all m shards have to end.",
        ),
        "B times": (
            lambda m, slices, b: b * m * slices * _harmonic(m),
            "You let each sequence last as long as SISA's. They wear out at the same time, so more sequences buy only "
            "a logarithm.",
        ),
        "logarithm": (
            lambda m, slices, b: m * slices * math.log(m * b),
            "ln(mB) is the harmonic number for large mB, less 0.58: sum 1/k itself.",
        ),
        "probabilities": (
            lambda m, slices, b: _harmonic(m * b),
            "Waiting for something of probability k / (mL) takes mL / k requests on average: the factor mL is missing.",
        ),
        "first hit": (
            lambda m, slices, b: slices / b,
            "This is the time until the first sequence ends, mL / (mB). Add the times for all the others.",
        ),
    },
)


def weight_of_npo(log_p: Tensor, log_reference: Tensor, beta: float) -> Tensor:
    """NPO's weights (batch,) relative to gradient ascent, of log-probabilities (batch,) now and originally."""
    return 2 * torch.sigmoid(beta * (log_p - log_reference))


_LOG_P = -4 * random.uniform(random.key(66), (3, 5))
_LOG_REFERENCE = -2 * random.uniform(random.key(67), (3, 5))

npo_weight = Exercise(
    "npo-weight",
    "Gradient ascent lowers the log-probability $\\log p$ of what is to be forgotten without end. NPO minimises "
    "$-\\frac{2}{\\beta} \\log \\sigma(-\\beta (\\log p - \\log p_{\\text{original}}))$ instead. Give its derivative "
    "by $\\log p$: the factor by which each example's ascent is weighted, 1 at the start and 0 once it is forgotten.",
    weight_of_npo,
    [
        (_LOG_P[0], _LOG_REFERENCE[0], 0.5),
        (_LOG_P[1], _LOG_REFERENCE[1], 2.0),
        (_LOG_P[2] - 3, _LOG_REFERENCE[2], 1.3),
    ],
    {
        "ascent": (
            lambda p, o, b: torch.ones_like(p),
            "A constant 1 is gradient ascent, the limit β → 0: it never stops, and the model breaks.",
        ),
        "inside turned": (
            lambda p, o, b: 2 * (b * (o - p)).sigmoid(),
            "Your weight grows as p falls, so what is already forgotten is pushed hardest: the derivative of log σ(-u) "
            "is -σ(u).",
        ),
        "half": (
            lambda p, o, b: (b * (p - o)).sigmoid(),
            "At the start this is 1/2. The loss has the factor 2 / β so that NPO begins as gradient ascent.",
        ),
        "not divided": (
            lambda p, o, b: 2 * b * (b * (p - o)).sigmoid(),
            "The chain rule's β cancels the 1 / β of the loss.",
        ),
        "divided": (
            lambda p, o, b: 2 / b * (b * (p - o)).sigmoid(),
            "You have kept the 1 / β; the chain rule brings a β that cancels it.",
        ),
        "no temperature": (
            lambda p, o, b: 2 * (p - o).sigmoid(),
            "The β inside the sigmoid is missing: it says how soon an example counts as forgotten.",
        ),
        "sign": (
            lambda p, o, b: -2 * (b * (p - o)).sigmoid(),
            "The sign is turned: the loss rises with p, so its derivative is positive.",
        ),
        "loss": (
            lambda p, o, b: -2 / b * torch.nn.functional.logsigmoid(-b * (p - o)),
            "This is the loss. Give its derivative by log p.",
        ),
    },
)


def inside_oracle_band(values: Tensor, oracle: Tensor, level: float) -> Tensor:
    """Whether each of values (models,) lies in the band of retrained models' values (oracles,)."""
    n = len(oracle)
    k = math.floor((1 - level) / 2 * (n + 1) + 1e-9)
    ordered = oracle.sort().values
    return (values >= ordered[k - 1]) & (values <= ordered[n - k])


_ORACLES = (
    random.normal(random.key(68), (19,)),
    random.normal(random.key(69), (39,)).exp(),
    0.7 + 0.1 * random.uniform(random.key(70), (24,)),
)


def _candidates(oracle: Tensor) -> Tensor:
    """Values all over the range and beyond it, the retrained models' own among them."""
    spread = oracle.std()
    grid = torch.linspace((oracle.min() - 2 * spread).item(), (oracle.max() + 2 * spread).item(), 121)
    return torch.cat([grid, oracle])


def _rank(oracle: Tensor, level: float) -> int:
    return math.floor((1 - level) / 2 * (len(oracle) + 1) + 1e-9)


def _within(v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (v >= low) & (v <= high)


oracle_pass = Exercise(
    "oracle-pass",
    "An unlearned model passes if a retrained one could have given its value: if it lies in "
    "$[o_{(k)}, o_{(n + 1 - k)}]$, ends included, where $o_{(1)} \\le \\dots \\le o_{(n)}$ are the values of $n$ "
    "retrained models and $k = \\lfloor \\frac{1 - \\text{level}}{2} (n + 1) \\rfloor$. A retrained model then passes "
    "with at least the level's probability, whatever the distribution. Add $10^{-9}$ before you round down: "
    "0.1 · 20 may be a hair below 2.",
    inside_oracle_band,
    [(_candidates(o), o, level) for o, level in zip(_ORACLES, (0.8, 0.8, 0.6), strict=True)],
    {
        "standard error": (
            lambda v, o, level: (v - o.mean()).abs() <= 1.96 * o.std() / math.sqrt(len(o)),
            "This is the interval of the oracle's mean. It shrinks as you train more oracles, until not even a "
            "retrained model passes. The question is where one more model lies.",
        ),
        "two deviations": (
            lambda v, o, level: (v - o.mean()).abs() <= 1.96 * o.std(),
            "Mean ± 1.96 deviations holds 95 % of a Gaussian, whatever the level, and with known deviation: use ranks.",
        ),
        "whole range": (
            lambda v, o, level: _within(v, o.min(), o.max()),
            "You pass whatever lies between the smallest and the largest: the more oracles, the easier it gets.",
        ),
        "one-sided": (
            lambda v, o, level: v <= o.sort().values[len(o) - _rank(o, level)],
            "You have no lower end. A model beyond it has over-forgotten and gives away what it was told to forget.",
        ),
        "other side": (
            lambda v, o, level: v >= o.sort().values[_rank(o, level) - 1],
            "You have no upper end. A value above all retrained models' is no success: nobody asked for more.",
        ),
        "ends out": (
            lambda v, o, level: (
                (v > o.sort().values[_rank(o, level) - 1]) & (v < o.sort().values[len(o) - _rank(o, level)])
            ),
            "You leave out the ends. They belong to the band, or retrained models pass too rarely.",
        ),
        "both tails at each end": (
            lambda v, o, level: _within(
                v, o.sort().values[2 * _rank(o, level) - 1], o.sort().values[-2 * _rank(o, level)]
            ),
            "You cut (1 - level) at each end. It is shared between both: half of it each.",
        ),
        "index from 1": (
            lambda v, o, level: _within(v, o.sort().values[_rank(o, level)], o.sort().values[-_rank(o, level)]),
            "Ranks begin at 1 and indices at 0: the k-th smallest is at index k - 1.",
        ),
    },
)
