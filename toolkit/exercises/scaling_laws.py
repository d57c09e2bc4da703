"""Exercises of the scaling-laws lab.

Each solution is written for reading: one formula, plain torch, one law, schedule or budget at a time.
"""

import math

import torch
from torch import Tensor

from toolkit import random
from toolkit.exercises import Exercise

__all__ = ["annealing_area", "critical_batch", "effective_data", "exponent_with_floor", "huber_on_logs"]
__all__ += ["mup_adam_factors", "optimal_size", "percentile_interval"]


def exponent_of_three(losses: Tensor, ratio: float) -> float:
    """Exponent a of L = E + A x^-a from the losses (3,) at x, ratio · x and ratio² · x; E and A are unknown."""
    first = losses[0] - losses[1]
    second = losses[1] - losses[2]
    return (first / second).log().item() / math.log(ratio)


def _three(floor: float, scale: float, exponent: float, ratio: float) -> tuple[Tensor, float]:
    return floor + scale * ratio ** (-exponent * torch.arange(3.0)), ratio


exponent_with_floor = Exercise(
    "exponent-with-floor",
    "A loss falls as $L(x) = E + A x^{-a}$ towards a floor $E$ that nobody knows. Three losses in a geometric row, "
    "$L_0, L_1, L_2$ at $x, r x, r^2 x$, give the exponent: each difference has lost $E$, and the next one is smaller "
    "by $r^{-a}$, so $a = \\log \\frac{L_0 - L_1}{L_1 - L_2} / \\log r$.",
    exponent_of_three,
    [_three(1.69, 1.3, 0.34, 10.0), _three(0.5, 2.0, 0.5, 2.0), _three(0.2, 4.0, 1.2, 3.0)],
    {
        "floor ignored": (
            lambda y, r: (y[0] / y[2]).log() / (2 * math.log(r)),
            "You fit a line to log L. The floor bends it, so the line comes out too flat: take differences first.",
        ),
        "two points": (
            lambda y, r: (y[0] / y[1]).log() / math.log(r),
            "Two losses know nothing of the floor: your slope is right for E = 0 alone. Three unknowns, three losses.",
        ),
        "last is the floor": (
            lambda y, r: ((y[0] - y[2]) / (y[1] - y[2])).log() / math.log(r),
            "You take the last loss for the floor. The curve goes on falling below it, so your exponent is too steep.",
        ),
        "sign": (
            lambda y, r: ((y[1] - y[2]) / (y[0] - y[1])).log() / math.log(r),
            "The ratio is upside down. The minus stands in x^-a already: a is positive where the loss falls.",
        ),
        "no base": (
            lambda y, r: ((y[0] - y[1]) / (y[1] - y[2])).log(),
            "This is a · log r: divide by log r, or the exponent depends on how far apart the three sizes are.",
        ),
    },
)


def size_for_budget(budget: float, size_scale: float, alpha: float, data_scale: float, beta: float) -> float:
    """Parameters N of least loss E + A N^-α + B D^-β when 6 N D = budget; A and B are the scales."""
    shift = (alpha * size_scale / (beta * data_scale)) ** (1 / (alpha + beta))
    return shift * (budget / 6) ** (beta / (alpha + beta))


def _size(c: float, a: float, alpha: float, b: float, beta: float, share: float | None = None) -> float:
    power = beta / (alpha + beta) if share is None else share
    return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * c**power


optimal_size = Exercise(
    "optimal-size",
    "Chinchilla's law is $L(N, D) = E + A N^{-\\alpha} + B D^{-\\beta}$ for $N$ parameters and $D$ tokens, and "
    "training costs $C = 6 N D$ FLOPs. At the best split, one percent more of either gains as much: $\\alpha A "
    "N^{-\\alpha} = \\beta B D^{-\\beta}$. So $N = G (C / 6)^{\\beta / (\\alpha + \\beta)}$ with "
    "$G = (\\frac{\\alpha A}{\\beta B})^{1 / (\\alpha + \\beta)}$. Compute it.",
    size_for_budget,
    [(5.76e23, 406.4, 0.34, 410.7, 0.28), (1e12, 20.0, 0.3, 90.0, 0.5), (3e9, 8.0, 0.6, 5.0, 0.4)],
    {
        "no six": (
            lambda c, a, p, b, q: _size(c, a, p, b, q),
            "The 6 is missing: a parameter costs 6 FLOPs per token, 2 forward and 4 backward, so N D = C / 6.",
        ),
        "exponents swapped": (
            lambda c, a, p, b, q: _size(c / 6, a, p, b, q, p / (p + q)),
            "α / (α + β) is the power of the tokens. N grows with β / (α + β): the faster data pay off, the more "
            "compute is left for the size.",
        ),
        "all compute to size": (
            lambda c, a, p, b, q: _size(c / 6, a, p, b, q, 1.0),
            "Your size grows as fast as the budget, and the tokens not at all: their term B D^-β then never falls.",
        ),
        "scales swapped": (
            lambda c, a, p, b, q: _size(c / 6, b, p, a, q),
            "A and B have changed places. A large A says that size matters, so it makes N larger.",
        ),
        "tokens": (
            lambda c, a, p, b, q: c / 6 / _size(c / 6, a, p, b, q),
            "This is D, the number of tokens. G stands in N as it is and in D as 1 / G.",
        ),
        "equal terms": (
            lambda c, a, p, b, q: (a / b) ** (1 / (p + q)) * (c / 6) ** (q / (p + q)),
            "You make both terms equal. At the minimum their slopes are: each brings down its exponent as a factor.",
        ),
    },
)


def huber_of_logs(predicted: Tensor, losses: Tensor, delta: float) -> float:
    """Sum over (points,) of Huber's loss of log predicted - log losses, of width delta."""
    size = (predicted.log() - losses.log()).abs()
    small = size**2 / 2
    large = delta * (size - delta / 2)
    return torch.where(size <= delta, small, large).sum().item()


_LOSSES = 2 + random.uniform(random.key(80), (3, 6))
_PREDICTED = _LOSSES * (0.4 * random.normal(random.key(81), (3, 6))).exp()


def _huber(r: Tensor, delta: float, shift: float = 0.5) -> Tensor:
    return torch.where(r.abs() <= delta, r.square() / 2, delta * (r.abs() - shift * delta))


huber_on_logs = Exercise(
    "huber-on-logs",
    "Chinchilla's fit minimises $\\sum_i \\rho(\\log p_i - \\log L_i)$ over predictions $p$ and losses $L$, where "
    "$\\rho(r) = r^2 / 2$ for $|r| \\le \\delta$ and $\\delta (|r| - \\delta / 2)$ beyond: quadratic for small "
    "residuals, linear for outliers. Compute the sum.",
    huber_of_logs,
    [(p, y, d) for p, y, d in zip(_PREDICTED, _LOSSES, (0.3, 0.1, 0.5), strict=True)],
    {
        "raw losses": (
            lambda p, y, d: _huber(p - y, d).sum(),
            "Your residuals are p - L. Those of logarithms are relative, so small and large models count alike.",
        ),
        "squares": (
            lambda p, y, d: (p / y).log().square().sum() / 2,
            "Your loss is quadratic everywhere, so one run that diverged bends the whole fit: linear beyond δ.",
        ),
        "absolute": (
            lambda p, y, d: (p / y).log().abs().sum(),
            "You sum |r|. It is robust, but its corner at 0 stops a smooth minimiser: r² / 2 within δ, slope δ beyond.",
        ),
        "jump": (
            lambda p, y, d: _huber((p / y).log(), d, 0.0).sum(),
            "Your linear branch is δ |r|, which jumps at |r| = δ from δ² / 2 to δ². It needs the - δ² / 2.",
        ),
        "mean": (
            lambda p, y, d: _huber((p / y).log(), d).mean(),
            "This is the mean. Its minimum is the same, but so small a number can make a minimiser stop too soon: sum.",
        ),
    },
)


def batch_of_two_runs(steps: Tensor, examples: Tensor) -> float:
    """Critical batch size, in examples, from the steps (2,) and examples (2,) that two runs took to one loss."""
    fewer_steps = 1 / steps[0] - 1 / steps[1]
    more_examples = 1 / examples[0] - 1 / examples[1]
    return -(fewer_steps / more_examples).item()


def _runs(critical: float, least: float, *batches: float) -> tuple[Tensor, Tensor]:
    batch = torch.tensor(batches)
    return least * (1 + critical / batch), least * (batch + critical)


critical_batch = Exercise(
    "critical-batch",
    "With larger batches a run needs fewer steps $S$ but more examples $E$ to reach the same loss: "
    "$(S / S_{\\min} - 1)(E / E_{\\min} - 1) = 1$. Multiplied out, this is the line $\\frac{1}{S} = "
    "\\frac{1}{S_{\\min}} - \\frac{E_{\\min}}{S_{\\min}} \\frac{1}{E}$, and minus its slope is the critical batch "
    "$E_{\\min} / S_{\\min}$. Draw it through two runs.",
    batch_of_two_runs,
    [_runs(100.0, 200.0, 16.0, 256.0), _runs(30.0, 50.0, 120.0, 40.0), _runs(64.0, 10.0, 4.0, 32.0)],
    {
        "mean batch": (
            lambda s, e: (e / s).log().mean().exp(),
            "This is the geometric mean of the two batches. It is your choice of runs, not a property of the problem.",
        ),
        "steps only": (
            lambda s, e: s.max() / s.min(),
            "A ratio of steps has no unit. The critical batch is in examples: it trades examples for steps.",
        ),
        "turned": (
            lambda s, e: -(1 / e[0] - 1 / e[1]) / (1 / s[0] - 1 / s[1]),
            "You have S_min / E_min, 1 over the critical batch: the change of 1 / S goes above, that of 1 / E below.",
        ),
        "no reciprocals": (
            lambda s, e: -(e[0] - e[1]) / (s[0] - s[1]),
            "You draw the line through S and E. They lie on a hyperbola; the line is one of 1 / S against 1 / E.",
        ),
        "seen for least": (
            lambda s, e: e.min() / s.min(),
            "You take the least of these two runs for the least possible. No run reaches S_min or E_min.",
        ),
    },
)


def area_of_annealing(rates: Tensor, decay: float) -> float:
    """Annealing area S2 at the end of a schedule of rates (steps,), with memory decay λ."""
    momentum, area = 0.0, 0.0
    for before, after in zip(rates[:-1].tolist(), rates[1:].tolist(), strict=True):
        momentum = decay * momentum + (before - after)
        area += momentum
    return area


_WARM = torch.cat([torch.linspace(0.2, 1, 5), torch.ones(4), torch.linspace(0.9, 0.1, 6)])
_COSINE = 0.55 + 0.45 * torch.linspace(0, math.pi, 12).cos()
_AGAIN = torch.cat([_COSINE[::2], _COSINE[1::2]])


def _area(drops: Tensor, decay: float) -> Tensor:
    """The sum of the momenta: each drop times 1 + λ + λ² + ... over the steps left to it."""
    return (drops * (decay ** torch.arange(float(len(drops)))).cumsum(0).flip(0)).sum()


annealing_area = Exercise(
    "annealing-area",
    "A loss curve depends on how far the learning rate $\\eta$ has fallen, and how long ago. Its annealing area is "
    "$S_2 = \\sum_i m_i$ with $m_0 = 0$ and $m_i = \\lambda m_{i-1} + (\\eta_{i-1} - \\eta_i)$: a drop is positive, a "
    "rise negative. Compute $S_2$ after the last step.",
    area_of_annealing,
    [(_WARM, 0.9), (_COSINE, 0.5), (_AGAIN, 0.8)],
    {
        "sign": (
            lambda y, d: _area(y.diff(), d),
            "The sign is turned: annealing lowers the loss, so a drop counts as positive, the earlier rate first.",
        ),
        "rises count": (
            lambda y, d: _area(y.diff().abs(), d),
            "You take absolute values, so a warm-up looks like annealing. A rise undoes a drop: keep its sign.",
        ),
        "last momentum": (
            lambda y, d: -(y.diff() * (d ** torch.arange(float(len(y) - 1))).flip(0)).sum(),
            "This is the last momentum m. S2 is an area: add up the momenta of all steps.",
        ),
        "one step of memory": (
            lambda y, d: -y.diff().sum() - d * y.diff()[:-1].sum(),
            "Your memory reaches one step back, as if λ were applied once. Each m builds on the last m, not on the "
            "last drop.",
        ),
        "forward area": (
            lambda y, d: y.sum(),
            "This is the forward area S1, the sum of the rates. S2 is made of their drops.",
        ),
    },
)


def adam_factors(width: int, base: int, depth: int) -> Tensor:
    """Adam's learning-rate factors (depth + 1,) in muP: the input layer, depth - 1 hidden ones and the readout."""
    factors = torch.ones(depth + 1)
    factors[1:-1] = base / width
    return factors


def _ends(ends: float, inner: float, depth: int) -> list[float]:
    return [ends, *[inner] * (depth - 1), ends]


mup_adam_factors = Exercise(
    "mup-adam-factors",
    "A learning rate tuned at width $N_0$ should serve width $N = m N_0$. A step of Adam changes every weight by about "
    "the rate, and the changes of a layer's inputs add up. The input layer's inputs stay as many: factor 1. A hidden "
    "layer has $m$ times as many: factor $\\frac{1}{m}$. So has the readout, but muP already multiplies its output by "
    "$\\frac{1}{m}$: factor 1. List the factors of the input layer, `depth - 1` hidden layers and the readout.",
    adam_factors,
    [(256, 64, 3), (32, 64, 2), (1000, 100, 4)],
    {
        "standard": (
            lambda n, base, k: _ends(1.0, 1.0, k),
            "One rate for all is the standard parameterisation: hidden features then move more, the wider the network, "
            "and the best rate falls with the width.",
        ),
        "all layers": (
            lambda n, base, k: _ends(base / n, base / n, k),
            "You scale every layer. The input layer's fan-in does not grow: it would stop learning as width grows.",
        ),
        "readout too": (
            lambda n, base, k: [*_ends(1.0, base / n, k)[:-1], base / n],
            "You scale the readout's rate on top of its multiplier 1 / m: it would learn too slowly by a factor m.",
        ),
        "of SGD": (
            lambda n, base, k: _ends(n / base, 1.0, k),
            "These are SGD's factors. Its step is as large as the gradient, which itself changes with the width; "
            "Adam's is not.",
        ),
        "root": (
            lambda n, base, k: _ends(1.0, math.sqrt(base / n), k),
            "Your factor is the root of 1 / m, as for random changes. Those of a step all point the same way, so they "
            "add up like m.",
        ),
    },
)


def worth_of_tokens(tokens: float, unique: float, r_d: float) -> float:
    """Effective number D' of tokens that were drawn from unique different ones."""
    seen = min(unique, tokens)
    repeats = tokens / seen - 1
    return seen + seen * r_d * (1 - math.exp(-repeats / r_d))


def _worth(u: float, r: float, h: float) -> float:
    return u + u * h * (1 - math.exp(-r / h))


effective_data = Exercise(
    "effective-data",
    "Training on $D$ tokens drawn from $U$ different ones repeats some. With $U_D = \\min(U, D)$ and $R = D / U_D - 1$ "
    "repeats, the tokens are worth $D' = U_D + U_D \\, r_d \\, (1 - e^{-R / r_d})$ new ones: early repeats almost as "
    "much as new data, all of them together no more than $r_d U_D$. Compute $D'$.",
    worth_of_tokens,
    [(40.0, 10.0, 15.4), (300.0, 5.0, 15.4), (30.0, 80.0, 6.0), (14.0, 2.0, 4.0)],
    {
        "epochs": (
            lambda d, u, h: _worth(min(u, d), d / min(u, d), h),
            "You count the first pass as a repeat: a single epoch would be worth more than its tokens. R = D / U - 1.",
        ),
        "all new": (
            lambda d, u, h: d,
            "You count every repeat as new data. That is near the truth for about 4 epochs, and wrong beyond.",
        ),
        "only unique": (
            lambda d, u, h: min(u, d),
            "You count repeats for nothing. A second pass still teaches a model a lot.",
        ),
        "linear": (
            lambda d, u, h: min(u, d) * (1 + min(d / min(u, d) - 1, h) * (1 - min(d / min(u, d) - 1, h) / (2 * h))),
            "Your repeats lose worth along a line, until one after r_d of them is worth nothing. They fade "
            "exponentially.",
        ),
        "tokens not seen": (
            lambda d, u, h: _worth(u, d / u - 1, h),
            "Where D < U you count tokens that were never read, and R is negative: U_D is the smaller of both.",
        ),
    },
)


def interval_of_exponent(sizes: Tensor, losses: Tensor, draws: Tensor, level: float) -> tuple[float, float]:
    """Percentile interval of a in L = A x^-a; a row of draws (resamples, points) has the points of one resample."""
    x = sizes.log()[draws]
    y = losses.log()[draws]
    x = x - x.mean(dim=1, keepdim=True)
    exponents = -(x * y).sum(dim=1) / (x**2).sum(dim=1)
    tail = (1 - level) / 2
    return exponents.quantile(tail).item(), exponents.quantile(1 - tail).item()


_SIZES = 10 ** torch.linspace(1, 4, 9)
_NOISY = 5 * _SIZES ** torch.tensor([[-0.1], [-0.35], [-0.6]]) * (0.2 * random.normal(random.key(82), (3, 9))).exp()
_DRAWS = (random.uniform(random.key(83), (3, 60, 9)) * 9).long().clamp(max=8)


def _exponents(x: Tensor, y: Tensor) -> Tensor:
    x = x.log() - x.log().mean(-1, keepdim=True)
    return -(x * y.log()).sum(-1) / x.square().sum(-1)


def _between(values: Tensor, low: float, high: float) -> Tensor:
    return torch.stack([values.quantile(low), values.quantile(high)])


percentile_interval = Exercise(
    "percentile-interval",
    "How sure is an exponent? A bootstrap fits $\\log L = c - a \\log x$ by least squares to resamples of the points; "
    "row $b$ of `draws` has the indices of the points of resample $b$. The interval goes from the quantile $\\frac{1 - "
    "\\text{level}}{2}$ of the exponents $a$ to the quantile $\\frac{1 + \\text{level}}{2}$.",
    interval_of_exponent,
    [(_SIZES, y, i, level) for y, i, level in zip(_NOISY, _DRAWS, (0.9, 0.8, 0.5), strict=True)],
    {
        "standard error": (
            lambda x, y, i, p: (
                _exponents(x[i], y[i]).mean()
                + torch.tensor([-1.96, 1.96]) * _exponents(x[i], y[i]).std() / math.sqrt(len(i))
            ),
            "This is how well you know the mean of the resamples: draw more, and it shrinks to nothing. The points "
            "stay as few: take quantiles.",
        ),
        "extremes": (
            lambda x, y, i, p: _between(_exponents(x[i], y[i]), 0, 1),
            "You go from the least to the largest exponent, whatever the level: more resamples only widen it.",
        ),
        "one-sided": (
            lambda x, y, i, p: _between(_exponents(x[i], y[i]), 0, p),
            "You cut one end only. Half of 1 - level goes off at each.",
        ),
        "both tails at each end": (
            lambda x, y, i, p: _between(_exponents(x[i], y[i]), 1 - p, p),
            "You cut 1 - level at each end, so the interval holds less than the level. Half of it goes off at each.",
        ),
        "pairs torn": (
            lambda x, y, i, p: _between(_exponents(x.expand(i.shape), y[i]), (1 - p) / 2, (1 + p) / 2),
            "You resample the losses and not their sizes, so each loss meets a size it does not belong to, and the "
            "exponents scatter around 0: draw pairs.",
        ),
    },
)
