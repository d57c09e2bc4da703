"""Exercises of the uncertainty lab, the second half of the calibration lab.

Each solution is written for reading: one formula, plain torch, a few examples.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from toolkit import random
from toolkit.exercises import Exercise

__all__ = ["annotator_kl", "exact_score", "label_metric", "level_shift", "mask_law", "missing_inputs", "sum_node"]


def annotator_divergence(mean: Tensor, spread: Tensor, target_mean: Tensor, target_spread: Tensor) -> Tensor:
    """KL(annotators' normal || predicted normal) (batch,), in nats; means and standard deviations have shape (batch,).

    The annotators' are target_mean and target_spread.
    """
    variance, target_variance = spread**2, target_spread**2
    bias = target_mean - mean
    return 0.5 * (variance / target_variance).log() + (target_variance + bias**2) / (2 * variance) - 0.5


_MEANS = random.normal(random.key(200), (2, 2, 4))
_SPREADS = 0.4 + random.uniform(random.key(201), (2, 2, 4))


def _normal_kl(bias: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (variance / target).log() + (target + bias**2) / (2 * variance) - 0.5


annotator_kl = Exercise(
    "annotator-kl",
    "Several people rate each example, with mean $m^*$ and standard deviation $s^*$; a net predicts $m$ and $s$. Zerva "
    "et al. 2022 train it on $\\mathrm{KL}(N(m^*, s^{*2}) \\,\\|\\, N(m, s^2)) = \\frac12 \\log\\frac{s^2}{s^{*2}} + "
    "\\frac{s^{*2} + (m^* - m)^2}{2 s^2} - \\frac12$. Compute it for each example: all four arguments and the result "
    "have shape (batch,).",
    annotator_divergence,
    [(_MEANS[i, 0], _SPREADS[i, 0], _MEANS[i, 1], _SPREADS[i, 1]) for i in range(2)],
    {
        "turned": (
            lambda m, s, n, t: _normal_kl(m - n, t**2, s**2),
            "You compute KL(predicted ‖ annotators). There the best spread is the annotators' however far off the mean "
            "is; the right one widens with the net's own error, to s² = s*² + (m* - m)².",
        ),
        "no bias": (
            lambda m, s, n, t: _normal_kl(0 * m, s**2, t**2),
            "The term (m* - m)² is missing: any mean costs the same, so the net learns none, and its spread does not "
            "know how wrong it is.",
        ),
        "spreads as variances": (
            lambda m, s, n, t: _normal_kl(n - m, s, t),
            "You put standard deviations where variances belong. The divergence then depends on the unit of the "
            "ratings, and no longer describes these two normals: square both spreads.",
        ),
        "constant missing": (
            lambda m, s, n, t: _normal_kl(n - m, s**2, t**2) + 0.5,
            "The constant -1/2 is missing: a perfect prediction would cost 1/2. Gradients are the same, but a "
            "divergence is 0 between equals.",
        ),
    },
)


def exact_mean_levels(density: Tensor, mean: Tensor) -> Tensor:
    """Labels (batch, levels) that sum to 1 and have this mean (batch,), from a normal density read at 1 .. K."""
    levels = density.shape[1]
    values, centre = torch.arange(1, levels + 1), (levels + 1) / 2
    total, first = density.sum(dim=1), (density * values).sum(dim=1)
    alpha = (mean - centre) / (first - centre * total)
    beta = (1 - alpha * total) / levels
    return alpha[:, None] * density + beta[:, None]


def _at_levels(mean: Tensor, spread: Tensor, levels: int) -> Tensor:
    return torch.distributions.Normal(mean[:, None], spread[:, None]).log_prob(torch.arange(1, levels + 1)).exp()


def _parts(density: Tensor, first: int = 1) -> tuple[Tensor, Tensor, int]:
    """Sum, mean times sum, and number of levels."""
    count = density.shape[1]
    return density.sum(1, keepdim=True), (density * (torch.arange(count) + first)).sum(1, keepdim=True), count


def _from_zero(density: Tensor, mean: Tensor) -> Tensor:
    total, first, count = _parts(density, 0)
    alpha = (mean[:, None] - (count - 1) / 2) / (first - (count - 1) / 2 * total)
    return alpha * density + (1 - alpha * total) / count


def _whole_beta(density: Tensor, mean: Tensor) -> Tensor:
    total, first, count = _parts(density)
    alpha = (mean[:, None] - (count + 1) / 2) / (first - (count + 1) / 2 * total)
    return alpha * density + (1 - alpha * total)


_RATED = [
    (torch.tensor([2.2, 3.7, 2.4]), torch.tensor([0.3, 0.4, 0.35]), 5),
    (torch.tensor([2.3, 4.6]), torch.tensor([0.35, 0.3]), 6),
]

level_shift = Exercise(
    "level-shift",
    "A rating on the levels $1, \\dots, K$ becomes a label $p_k$, the normal density at $k$. Its sum $A = \\sum_k p_k$ "
    "is not 1 and its mean $B = \\sum_k k\\,p_k$ is not $\\mu$, so You et al. 2025 (DeQA-Score) take "
    "$\\alpha p_k + \\beta$ with $\\alpha = \\frac{\\mu - c}{B - c A}$, $\\beta = \\frac{1 - \\alpha A}{K}$, "
    "$c = \\frac{K + 1}{2}$. Do this for densities (batch, levels) and means $\\mu \\ne c$ of shape (batch,); negative "
    "values need no care here.",
    exact_mean_levels,
    [(_at_levels(*rated), rated[0]) for rated in _RATED],
    {
        "divided by the sum": (
            lambda p, m: p / p.sum(1, keepdim=True),
            "You divide by the sum, and leave the mean where the grid puts it: of a narrow rating of 2.2 nearly all "
            "falls on level 2, and the net learns a score of about 2.",
        ),
        "constant only": (
            lambda p, m: p + (1 - p.sum(1, keepdim=True)) / p.shape[1],
            "You only add a constant. The sum is 1, but one number cannot set two things: the mean needs α as well.",
        ),
        "scaled to the mean": (
            lambda p, m: p * m[:, None] / _parts(p)[1],
            "You scale until Σ k p_k = μ; but then the sum is not 1, so these are no probabilities and Σ k p_k is no "
            "mean. It takes a factor and a constant.",
        ),
        "levels from 0": (
            _from_zero,
            "You count the levels from 0, while μ counts from 1: every label's mean comes out one level too high.",
        ),
        "beta not shared": (
            _whole_beta,
            "Each of the K levels gets all that is lacking in the sum: divide 1 - αA by K.",
        ),
    },
)


def central_label(probabilities: Tensor, distances: Tensor) -> Tensor:
    """The label with the least expected squared distance, an index (batch,) into all labels.

    probabilities (batch, observed); distances (labels, observed), from every label to those seen in training.
    """
    cost = probabilities @ (distances**2).T
    return cost.argmin(dim=1)


def _of_observed(p: Tensor, d: Tensor) -> Tensor:
    seen = d.argmin(0)
    return seen[(p @ d[seen].square().T).argmin(1)]


def _peaked(seed: int, observed: int) -> Tensor:
    return (1.5 * random.normal(random.key(seed), (8, observed))).softmax(1)


_LINE = (torch.arange(9)[:, None] - torch.tensor([1, 4, 8])).abs().float()
_TURN = (torch.arange(10)[:, None] - torch.tensor([7, 0, 4])).abs().float()
_RING = torch.minimum(_TURN, 10 - _TURN)
_PLANE = random.normal(random.key(203), (12, 2))

label_metric = Exercise(
    "label-metric",
    "A net saw only some labels in training, and gives probabilities $p_k$ to those. If distances $d$ between all "
    "labels are known, Roberts et al. 2023 (Loki) predict the Fréchet mean $\\hat y = \\arg\\min_y \\sum_k p_k\\, "
    "d(y, y_k)^2$ among all labels, seen or not. Give its index for each row of probabilities (batch, observed), with "
    "distances (labels, observed).",
    central_label,
    [
        (_peaked(204, 3), _LINE),
        (_peaked(205, 3), _RING),
        (_peaked(206, 4), torch.cdist(_PLANE, _PLANE[[2, 11, 5, 8]], compute_mode="donot_use_mm_for_euclid_dist")),
    ],
    {
        "not squared": (
            lambda p, d: (p @ d.T).argmin(1),
            "Your distances are not squared, so you get a median. On a line that is always a label that was seen: "
            "what lies between two seen labels is never predicted.",
        ),
        "seen labels only": (
            _of_observed,
            "You search among the labels that were seen, so an unseen one can never be predicted, which was the "
            "purpose. The minimum is over all rows of the distances.",
        ),
        "most probable": (
            lambda p, d: d.argmin(0)[p.argmax(1)],
            "You take the most probable label and leave the distances out. Half 1 and half 8 on a line is neither 1 "
            "nor 8.",
        ),
        "column number": (
            lambda p, d: p.argmax(1),
            "You return the column of the largest probability. A column counts seen labels, the answer counts all "
            "labels; and the distances must have their say.",
        ),
    },
)


def gap_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer (batch, units) of x (batch, inputs), where NaN is missing; weight (units, inputs), bias (units,).

    Missing inputs are left out, together with their share of the bias.
    """
    observed = ~x.isnan()
    share = observed.to(x.dtype).mean(dim=1, keepdim=True)
    return x.masked_fill(~observed, 0) @ weight.T + share * bias


def _seen(x: Tensor) -> Tensor:
    return (~x.isnan()).float().mean(1, keepdim=True)


_TABLE = random.normal(random.key(207), (2, 4, 5))
_HIDDEN = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
_WEIGHT, _BIAS = random.normal(random.key(208), (3, 5)), torch.tensor([1.5, -0.8, 0.6])

missing_inputs = Exercise(
    "missing-inputs",
    "Of $p$ inputs $q$ are observed and the others are NaN. PROMISSING (Kia et al. 2022) guesses nothing: a unit is "
    "$\\sum_{i\\ \\mathrm{observed}} w_i x_i + \\frac{q}{p}\\, b$, as if each missing input cancelled its share of the "
    "bias. Write the layer for x (batch, inputs), weight (units, inputs) and bias (units,).",
    gap_linear,
    [
        (_TABLE[0].masked_fill(_HIDDEN, math.nan), _WEIGHT, _BIAS),
        (_TABLE[1, :, :4], _WEIGHT[:, 1:], _BIAS),
        (_TABLE[1].masked_fill(_HIDDEN.roll(1, 1), math.nan), _WEIGHT[:2], _BIAS[1:]),
    ],
    {
        "zero imputation": (
            lambda x, w, b: x.nan_to_num() @ w.T + b,
            "You put 0 for what is missing and keep all of b: with nothing observed the unit still says b, as sure as "
            "ever. The bias counts with the share q / p.",
        ),
        "rescaled": (
            lambda x, w, b: x.nan_to_num() @ w.T / _seen(x) + b,
            "You scale the sum up by p / q, as dropout does: one observed input of many then speaks for all of them, "
            "and none gives 0 / 0. The sum stays as it is, the bias shrinks.",
        ),
        "no bias": (
            lambda x, w, b: x.nan_to_num() @ w.T,
            "The bias is missing: with everything observed this must be the plain linear layer.",
        ),
        "NaN": (
            lambda x, w, b: x @ w.T + b,
            "NaN times a weight is NaN, and so is every unit of an example with one gap: leave missing inputs out.",
        ),
        "missing share": (
            lambda x, w, b: x.nan_to_num() @ w.T + (1 - _seen(x)) * b,
            "You weight the bias by the share that is missing. With nothing observed the unit must say nothing, 0; "
            "yours says b.",
        ),
    },
)


def data_set_score(x: Tensor, data: Tensor, sigma: float) -> Tensor:
    """The score of a data set (n, dim) under normal noise of deviation sigma, at points x (batch, dim)."""
    squared = ((x[:, None] - data) ** 2).sum(dim=2)
    weights = (-squared / (2 * sigma**2)).softmax(dim=1)
    return (weights @ data - x) / sigma**2


def _apart(x: Tensor, data: Tensor) -> Tensor:
    return (x[:, None] - data).square().sum(2)


_CLOUD, _POINTS = random.normal(random.key(209), (2, 6, 3)), random.normal(random.key(210), (2, 4, 3))

exact_score = Exercise(
    "exact-score",
    "A data set with normal noise of deviation $\\sigma$ is a mixture of $n$ normals, so its score is known exactly: "
    "$\\nabla \\log p_\\sigma(x) = \\frac{1}{\\sigma^2} (\\sum_j w_j x_j - x)$ with "
    "$w_j \\propto \\exp(-\\frac{|x - x_j|^2}{2 \\sigma^2})$. Nets that detect novelty by the length of the score "
    "(Mahmood et al. 2021) learn it. Compute it for points x (batch, dim), data (n, dim) and a number sigma.",
    data_set_score,
    [(_POINTS[0], _CLOUD[0], 0.6), (_POINTS[1, :, :2], _CLOUD[1, :, :2], 1.5), (3 * _POINTS[1], _CLOUD[1, :4], 0.8)],
    {
        "nearest point": (
            lambda x, d, s: (d[_apart(x, d).argmin(1)] - x) / s**2,
            "You go to the nearest point only. That is the limit of little noise; at larger σ all points within reach "
            "pull, and the score has no jumps.",
        ),
        "no half": (
            lambda x, d, s: ((-_apart(x, d) / s**2).softmax(1) @ d - x) / s**2,
            "The exponent lacks the factor 1/2: your weights are those of noise σ / √2, and what you get is half the "
            "score of that noise.",
        ),
        "sigma once": (
            lambda x, d, s: ((-_apart(x, d) / (2 * s**2)).softmax(1) @ d - x) / s,
            "You divide by σ. The score has the unit 1 / distance, so it takes σ²; what you have is σ times the score: "
            "at σ = 0.01 it is 100 times too short.",
        ),
        "over the batch": (
            lambda x, d, s: ((-_apart(x, d) / (2 * s**2)).softmax(0) @ d - x) / s**2,
            "Your weights sum to 1 over the points x: normalise over the data, or a point's score depends on what else "
            "is in the batch.",
        ),
    },
)


def dropout_variance(weights: Tensor, means: Tensor, variances: Tensor, rate: float) -> Tensor:
    """Variance (batch,) of a sum node whose edges are each dropped with probability rate.

    weights (children,); means and variances (batch, children) are those of the children, which are uncorrelated.
    """
    keep = 1 - rate
    return keep * (weights**2 * (variances + rate * means**2)).sum(dim=1)


_MIXED = random.normal(random.key(211), (2, 4)).softmax(1)
_CHILDREN = 0.5 + 2 * random.uniform(random.key(212), (2, 2, 3, 4))

sum_node = Exercise(
    "sum-node",
    "A sum node of a circuit is $S = \\sum_j z_j w_j C_j$, where dropout keeps each edge ($z_j = 1$) with probability "
    "$q = 1 - p$. Children of means $E_j$ and variances $V_j$ give $\\mathrm{Var}\\,S = q \\sum_j w_j^2 (V_j + p\\, "
    "E_j^2)$, with which Ventola et al. 2023 replace sampling by one pass. Compute it from weights (children,), means "
    "and variances (batch, children) and the rate $p$.",
    dropout_variance,
    [(_MIXED[0], *_CHILDREN[0], 0.2), (3 * _MIXED[1], *_CHILDREN[1], 0.35), (2 * _MIXED[1], *_CHILDREN[0], 0.0)],
    {
        "no p E²": (
            lambda w, e, v, p: (1 - p) * (w**2 * v).sum(1),
            "The term p E² is missing: the mask itself varies, even where the children do not. Leaves have no "
            "variance, so without it every node above has none either.",
        ),
        "w not squared": (
            lambda w, e, v, p: (1 - p) * (w * (v + p * e**2)).sum(1),
            "The weights are not squared. Var(w C) = w² Var(C): n equal edges must average the noise down to 1 / n.",
        ),
        "no q": (
            lambda w, e, v, p: (w**2 * (v + p * e**2)).sum(1),
            "The factor q is missing: an edge that is dropped contributes nothing, and if nearly all are, the "
            "variance must go to 0.",
        ),
        "second moment": (
            lambda w, e, v, p: (1 - p) * (w**2 * (v + e**2)).sum(1),
            "V + E² is the second moment. Subtracting the squared mean, (q E)², leaves q (V + p E²); yours does not "
            "come back to V without dropout.",
        ),
        "p for q": (
            lambda w, e, v, p: p * (w**2 * (v + (1 - p) * e**2)).sum(1),
            "You take the rate for the probability to keep an edge. Without dropout, p = 0, your node never varies, "
            "whatever its children do.",
        ),
    },
)


def mask_log_chance(logits: Tensor, masks: Tensor) -> Tensor:
    """Log-probability (batch,), in nats, of masks of 0 and 1 (batch, units), from logits (batch, units)."""
    on = torch.nn.functional.logsigmoid(logits)
    off = torch.nn.functional.logsigmoid(-logits)
    return (masks * on + (1 - masks) * off).sum(dim=1)


def _taken_twice(a: Tensor, z: Tensor) -> Tensor:
    taken = z * a.sigmoid() + (1 - z) * (1 - a.sigmoid())
    return (z * taken.log() + (1 - z) * (1 - taken).log()).sum(1)


_LOGITS = 1.5 * random.normal(random.key(213), (2, 4, 5))
_MASKS = (random.uniform(random.key(214), (2, 4, 5)) < 0.5).float()

mask_law = Exercise(
    "mask-law",
    "GFlowOut (Liu et al. 2023) draws dropout masks $z$ from a net that gives unit $b$ a logit $a_b$: it is on with "
    "probability $\\sigma(a_b)$. Give the log-probability of each mask, $\\sum_b z_b \\log \\sigma(a_b) + (1 - z_b) "
    "\\log(1 - \\sigma(a_b))$, for logits and masks (batch, units). Logits may be large: $1 - \\sigma(a)$ is "
    "$\\sigma(-a)$, and torch has `torch.nn.functional.logsigmoid`.",
    mask_log_chance,
    [(_LOGITS[0], _MASKS[0]), (_LOGITS[1, :, :3], _MASKS[1, :, :3]), (_LOGITS[1] + 30 * (1 - _MASKS[1]), _MASKS[1])],
    {
        "taken twice": (
            _taken_twice,
            "This is the published code: it puts the probability of what was drawn, already 1 - σ for a unit that is "
            "off, into the formula once more. Both choices then cost log σ, and the law does not sum to 1.",
        ),
        "on only": (
            lambda a, z: (z * logsigmoid(a)).sum(1),
            "You count only the units that are on. Off is a choice too, with log(1 - σ): yours makes the empty mask "
            "certain, whatever the logits.",
        ),
        "probability": (
            lambda a, z: (z * logsigmoid(a) + (1 - z) * logsigmoid(-a)).sum(1).exp(),
            "This is the probability. Trajectory balance adds logarithms, and a product over hundreds of units is 0 "
            "in single precision.",
        ),
        "log of 1 - p": (
            lambda a, z: (z * a.sigmoid().log() + (1 - z) * (1 - a.sigmoid()).log()).sum(1),
            "The formula is right, but 1 - σ(a) is 0 in single precision for logits above 17: the logarithm is "
            "infinite, and so is the loss. Use logsigmoid(-a).",
        ),
    },
)
