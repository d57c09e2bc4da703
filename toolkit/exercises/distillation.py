"""Exercises of the distillation lab.

Each solution is written for reading: one formula, plain torch, a few examples. Mistakes of public code to be put right
are in :mod:`toolkit.exercises.museum_distillation`.
"""

import math

import torch
from torch import Tensor

from toolkit import random
from toolkit.exercises import Exercise

__all__ = ["consistency_point", "correlation", "dark_knowledge", "decoupled", "equal_compute", "kd_loss"]
__all__ += ["norm_and_direction", "plackett_luce"]


def softened_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) at temperature T of each example (batch,), in nats, from logits (batch, classes)."""
    log_t = (teacher / temperature).log_softmax(dim=1)
    log_s = (student / temperature).log_softmax(dim=1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=1)


_LOGITS = 2 * random.normal(random.key(100), (3, 2, 4, 5)) + torch.tensor([1.0, -2.0])[:, None, None]


def _kl(t: Tensor, s: Tensor) -> Tensor:
    return (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)


kd_loss = Exercise(
    "kd-loss",
    "Hinton's loss compares softened probabilities $p^T = \\mathrm{softmax}(z / T)$ of teacher and student: "
    "$T^2 \\, \\mathrm{KL}(p_t^T \\,\\|\\, p_s^T) = T^2 \\sum_k p_{t,k}^T \\log(p_{t,k}^T / p_{s,k}^T)$. The gradient "
    "shrinks as $T^{-2}$, and $T^2$ restores it. Compute the loss of each example.",
    softened_loss,
    [(*_LOGITS[0], 4.0), (*_LOGITS[1, :, :3], 2.0), (*_LOGITS[2, :, :, :3], 3.0)],
    {
        "no T²": (
            lambda s, t, h: _kl(t / h, s / h),
            "The factor T² is missing: at T = 4 the teacher would have a 16th of its say beside the cross-entropy.",
        ),
        "turned": (
            lambda s, t, h: h**2 * _kl(s / h, t / h),
            "You compute KL(student ‖ teacher), which forgives a student that leaves out classes the teacher sees. "
            "The teacher's probabilities do the weighting.",
        ),
        "student at 1": (
            lambda s, t, h: h**2 * _kl(t / h, s),
            "Only the teacher is softened, so a student that copies it is still wrong: divide both logits by T.",
        ),
        "teacher at 1": (
            lambda s, t, h: h**2 * _kl(t, s / h),
            "Only the student is softened. The teacher's small probabilities, its dark knowledge, show only when its "
            "logits are divided by T too.",
        ),
        "mean over classes": (
            lambda s, t, h: h**2 * _kl(t / h, s / h) / t.shape[1],
            "You average over the classes. A divergence is a sum: with 100 classes yours is 100 times too small.",
        ),
        "cross-entropy": (
            lambda s, t, h: -(h**2) * ((t / h).softmax(1) * (s / h).log_softmax(1)).sum(1),
            "This is the cross-entropy. Its gradient is the same, but a perfect copy does not reach 0: take the "
            "teacher's entropy away.",
        ),
    },
)


def gradient_limit(student: Tensor, teacher: Tensor) -> Tensor:
    """Gradient (batch, classes) of each example's KD loss by the student's logits (batch, classes) as T grows."""
    s = student - student.mean(dim=1, keepdim=True)
    t = teacher - teacher.mean(dim=1, keepdim=True)
    return (s - t) / student.shape[1]


def _centred(z: Tensor, dim: int = 1) -> Tensor:
    return z - z.mean(dim, keepdim=True)


dark_knowledge = Exercise(
    "dark-knowledge",
    "The gradient of $T^2 \\, \\mathrm{KL}(p_t^T \\,\\|\\, p_s^T)$ by the student's logits is $T (p_s^T - p_t^T)$. At "
    "high temperature $p_k^T \\approx \\frac{1}{K} (1 + \\frac{z_k - \\bar z}{T})$ for $K$ classes, where $\\bar z$ is "
    "the mean of an example's logits. Write the limit for $T \\to \\infty$: what distillation then matches.",
    gradient_limit,
    [tuple(_LOGITS[0]), tuple(_LOGITS[1, :, :3]), tuple(_LOGITS[2, :, :, :3])],
    {
        "not centred": (
            lambda s, t: (s - t) / s.shape[1],
            "You match the logits themselves. A constant added to all of them changes no probability: centre them.",
        ),
        "no 1/K": (
            lambda s, t: _centred(s) - _centred(t),
            "1 / K is missing: every probability is near 1 / K, and what moves it is smaller by the same factor.",
        ),
        "sign": (
            lambda s, t: (_centred(t) - _centred(s)) / s.shape[1],
            "This is minus the gradient, the way a step of descent goes. Where the student's logit is too high the "
            "loss rises with it.",
        ),
        "over the batch": (
            lambda s, t: (_centred(s, 0) - _centred(t, 0)) / s.shape[1],
            "You centre each class over the batch. The softmax knows one example: take the mean of its own logits.",
        ),
        "mean square": (
            lambda s, t: 2 * (_centred(s) - _centred(t)) / s.shape[1],
            "This is the gradient of the mean squared difference, twice as large: KD tends to half of that.",
        ),
    },
)


def decoupled_parts(teacher: Tensor, student: Tensor, label: int) -> Tensor:
    """TCKD, NCKD and KD (3,), in nats, of one example from its probabilities (classes,)."""
    other = torch.arange(len(teacher)) != label
    p, q = teacher[label], student[label]
    target = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    rest_p = teacher[other] / (1 - p)
    rest_q = student[other] / (1 - q)
    rest = (rest_p * (rest_p / rest_q).log()).sum()
    return torch.stack([target, rest, target + (1 - p) * rest])


def _parts(t: Tensor, s: Tensor, y: int) -> tuple[Tensor, Tensor]:
    own, binary = torch.arange(len(t)) == y, [torch.stack([x[y], 1 - x[y]]) for x in (t, s)]
    within = [x[~own] / x[~own].sum() for x in (t, s)]
    return (binary[0] * (binary[0] / binary[1]).log()).sum(), (within[0] * (within[0] / within[1]).log()).sum()


def _joined(target: Tensor, rest: Tensor, weight: Tensor | float) -> Tensor:
    return torch.stack([target, rest, target + weight * rest])


def _bare(t: Tensor, s: Tensor, y: int) -> Tensor:
    """The terms of the classes other than the label, without renormalising."""
    return (t * (t / s).log()).sum() - t[y] * (t[y] / s[y]).log()


decoupled = Exercise(
    "decoupled",
    "KD has two parts. TCKD is the KL between $(p_y, 1 - p_y)$ of teacher and student, the label against the rest; "
    "NCKD is the KL between their probabilities of the other classes, rescaled to the sum 1, $p_k / (1 - p_y)$. "
    "Together $\\mathrm{KD} = \\mathrm{TCKD} + (1 - p_y) \\, \\mathrm{NCKD}$ with the teacher's $p_y$: a sure teacher "
    "hides what it knows of the rest. From both rows of probabilities compute TCKD, NCKD and KD.",
    decoupled_parts,
    [(*_LOGITS[i, :, i].softmax(-1), y) for i, y in enumerate((2, 0, 4))],
    {
        "student's weight": (
            lambda t, s, y: _joined(*_parts(t, s, y), 1 - s[y]),
            "NCKD is weighted by the student's 1 - p. KL takes its weights from its first argument, the teacher.",
        ),
        "weight p": (
            lambda t, s, y: _joined(*_parts(t, s, y), t[y]),
            "Your weight of NCKD is p, as if a sure teacher said most about the rest. It has 1 - p left for it.",
        ),
        "equal weights": (
            lambda t, s, y: _joined(*_parts(t, s, y), 1.0),
            "You add both with weight 1. That is decoupled distillation with α = β = 1; plain KD is not.",
        ),
        "not renormalised": (
            lambda t, s, y: _joined(_parts(t, s, y)[0], _bare(t, s, y), 1 - t[y]),
            "Your other classes do not sum to 1, so NCKD still knows how sure each net is of the label: divide by "
            "1 - p, each by its own.",
        ),
        "half of TCKD": (
            lambda t, s, y: _joined(t[y] * (t[y] / s[y]).log(), _parts(t, s, y)[1], 1 - t[y]),
            "TCKD has two terms, for the label and for all the rest together: the second is missing.",
        ),
    },
)


def ranking_likelihood(scores: Tensor, order: Tensor) -> Tensor:
    """Log-probability of choosing the classes in this order (classes,), best first, given their scores (classes,)."""
    chosen = scores[order]
    terms = [chosen[k] - chosen[k:].logsumexp(dim=0) for k in range(len(chosen))]
    return torch.stack(terms).sum()


_SCORES = 1.5 * random.normal(random.key(101), (3, 6))
_ORDERS = torch.tensor([[3, 0, 4, 1, 5, 2], [1, 2, 0, 5, 3, 4], [2, 4, 1, 0, 3, 5]])


def _ranked(chosen: Tensor) -> Tensor:
    return (chosen - chosen.flip(0).logcumsumexp(0).flip(0)).sum()


plackett_luce = Exercise(
    "plackett-luce",
    "Choose a class with probability $\\mathrm{softmax}(s)$, then one of those that are left, and so on: the ranking "
    "$\\pi$ has the log-probability $\\sum_k (s_{\\pi_k} - \\log \\sum_{l \\ge k} e^{s_{\\pi_l}})$ after Plackett and "
    "Luce. `order` lists the classes from the first choice to the last. Compute it.",
    ranking_likelihood,
    [*zip(_SCORES, _ORDERS, strict=True), (_SCORES[0, :4], torch.tensor([2, 3, 1, 0]))],
    {
        "all classes": (
            lambda s, order: (s[order] - s.logsumexp(0)).sum(),
            "You divide by the sum over all classes at each step, which is the same for every ranking. What has been "
            "chosen cannot be chosen again: sum over those left.",
        ),
        "ascending": (
            lambda s, order: _ranked(s[order.flip(0)]),
            "You choose the last class first. Each sum runs from place k to the end of the ranking.",
        ),
        "ranks": (
            lambda s, order: _ranked(s[order.argsort()]),
            "You read `order` as the place of each class. Its entry k is the class in place k.",
        ),
        "first choice": (
            lambda s, order: s.log_softmax(0)[order[0]],
            "This is minus the cross-entropy of the first class. The order of the rest is what a ranking adds.",
        ),
        "sign": (
            lambda s, order: -_ranked(s[order]),
            "This is the loss, minus the log-probability. A log-probability is never above 0.",
        ),
    },
)


def correlation_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation (batch,) between the two nets' probabilities (batch, classes) of each example."""
    s = student - student.mean(dim=1, keepdim=True)
    t = teacher - teacher.mean(dim=1, keepdim=True)
    return 1 - (s * t).sum(dim=1) / (s.norm(dim=1) * t.norm(dim=1))


_ROWS = _LOGITS.softmax(-1)


def _cosine(s: Tensor, t: Tensor, dim: int = 1) -> Tensor:
    return (s * t).sum(dim) / (s.norm(dim=dim) * t.norm(dim=dim))


correlation = Exercise(
    "correlation",
    "DIST asks a student to agree with a strong teacher only up to shift and scale: "
    "$1 - \\frac{\\sum_k (p_k - \\bar p)(q_k - \\bar q)}{\\| p - \\bar p \\| \\, \\| q - \\bar q \\|}$ for the "
    "probabilities $p$, $q$ that student and teacher give to one example, $\\bar p$ and $\\bar q$ their means over the "
    "classes. Compute it for each example.",
    correlation_distances,
    [tuple(_ROWS[0]), tuple(_ROWS[1, :, :3]), tuple(_LOGITS[2, :, :, :4].softmax(-1))],
    {
        "cosine": (
            lambda s, t: 1 - _cosine(s, t),
            "This is the cosine: the means are missing. Two rows of positive numbers always look alike to it.",
        ),
        "covariance": (
            lambda s, t: 1 - (_centred(s) * _centred(t)).mean(1),
            "This is the covariance, which grows with the spread of both rows. Divide by both lengths, or a student "
            "must be as sure as its teacher.",
        ),
        "over the batch": (
            lambda s, t: 1 - _cosine(_centred(s, 0), _centred(t, 0), 0),
            "You correlate the examples of each class. DIST has that term too; this one is over an example's classes.",
        ),
        "n and n - 1": (
            lambda s, t: 1 - (_centred(s) * _centred(t)).mean(1) / (s.std(1) * t.std(1)),
            "Your covariance divides by n, torch's `std` by n - 1: a perfect student would not reach 0.",
        ),
    },
)


def long_and_aligned(student: Tensor, teacher: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """ND loss (batch,) of features (batch, width), from the teacher's mean feature (classes, width) of each class."""
    directions = means / means.norm(dim=1, keepdim=True)
    along = (student * directions[labels]).sum(dim=1)
    longer = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
    return 1 - along / longer


_SIZES = torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None]
_FEATURES = random.normal(random.key(102), (3, 2, 4, 5)) * torch.stack([_SIZES, _SIZES.flip(0)])
_MEANS = 2 * random.normal(random.key(103), (3, 3, 5))
_LABELS = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 2], [2, 0, 0, 1]])


def _off(s: Tensor, way: Tensor, size: Tensor) -> Tensor:
    return 1 - (s * way).sum(1) / size


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


norm_and_direction = Exercise(
    "norm-and-direction",
    "The ND loss wants a student's feature $s$ to be as long as the teacher's, $t$, and to point where the teacher's "
    "mean feature $m_y$ of the label's class points: $1 - \\frac{\\langle s, e_y \\rangle}{\\max(\\|s\\|, \\|t\\|)}$ "
    "with $e_y = m_y / \\|m_y\\|$. Compute it for each example.",
    long_and_aligned,
    [(*f, m, y) for f, m, y in zip(_FEATURES, _MEANS, _LABELS, strict=True)],
    {
        "student's length": (
            lambda s, t, m, y: _off(s, _unit(m)[y], s.norm(dim=1)),
            "Without the maximum this is 1 - cosine: direction counts, but a short feature costs nothing.",
        ),
        "teacher's length": (
            lambda s, t, m, y: _off(s, _unit(m)[y], t.norm(dim=1)),
            "You divide by the teacher's length alone, so the loss falls without end as the student's feature grows.",
        ),
        "teacher's feature": (
            lambda s, t, m, y: _off(s, _unit(t), torch.maximum(s.norm(dim=1), t.norm(dim=1))),
            "Your direction is that of the teacher's feature of this example, with all its noise. The loss takes that "
            "of its class.",
        ),
        "mean as it is": (
            lambda s, t, m, y: _off(s, m[y], torch.maximum(s.norm(dim=1), t.norm(dim=1))),
            "Divide the class mean by its length: classes with long means would count more, and below 0.",
        ),
    },
)


def gaussian_consistency(x: Tensor, t: float, mean: float, deviation: float) -> Tensor:
    """Data points (points,) at which the flow through x (points,) at time t ends, for data N(mean, deviation²)."""
    alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    spread = math.sqrt((alpha * deviation) ** 2 + sigma**2)
    return mean + deviation / spread * (x - alpha * mean)


_POINTS = 2 * random.normal(random.key(104), (3, 6))


def _led(x: Tensor, t: float, m: float, d: float, *, power: float = 1, shrunk: bool = True, own: bool = True) -> Tensor:
    """m + (d / √v)^power (x - α m), without α or without the data's part of v."""
    alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    spread = math.hypot(alpha * d, sigma) if own else sigma
    return m + (d / spread) ** power * (x - (alpha if shrunk else 1) * m)


consistency_point = Exercise(
    "consistency-point",
    "Noise turns data $x_0 \\sim N(m, d^2)$ into $x_t = \\alpha x_0 + \\sigma \\varepsilon \\sim N(\\alpha m, v)$ with "
    "$v = \\alpha^2 d^2 + \\sigma^2$, $\\alpha = \\cos \\frac{\\pi t}{2}$, $\\sigma = \\sin \\frac{\\pi t}{2}$. The "
    "probability flow keeps every point at the same number of standard deviations from the mean, so from $x$ at time "
    "$t$ it leads to $m + \\frac{d}{\\sqrt v} (x - \\alpha m)$ at time 0, as a consistency model should. Compute it.",
    gaussian_consistency,
    [(_POINTS[0], 0.5, 1.5, 0.6), (_POINTS[1], 0.8, -2.0, 1.3), (_POINTS[2], 0.2, 3.0, 0.4)],
    {
        "denoised mean": (
            lambda x, t, m, d: m + math.cos(math.pi * t / 2) * (_led(x, t, m, d, power=2) - m),
            "This is the mean of all data points that noise may have brought to x: what a net that predicts noise "
            "knows. Means spread too little; the flow leads to one point.",
        ),
        "squared": (
            lambda x, t, m, d: _led(x, t, m, d, power=2),
            "Your factor is the ratio of the variances. Distances scale like standard deviations: take its root.",
        ),
        "mean not subtracted": (
            lambda x, t, m, d: m + _led(x, t, 0, d),
            "Before it is scaled, x must be measured from the mean at time t: subtract α m.",
        ),
        "mean of the data": (
            lambda x, t, m, d: _led(x, t, m, d, shrunk=False),
            "You subtract m. By time t the mean has shrunk to α m.",
        ),
        "noise only": (
            lambda x, t, m, d: _led(x, t, m, d, own=False),
            "Your spread at time t is σ, that of the noise. The data are spread too: v = α² d² + σ².",
        ),
    },
)


def steps_with_teacher(steps: int, batch: int, student: int, teacher: int, examples: int, cached: bool) -> int:
    """Whole steps of a student with a teacher for the operations of so many steps without; sizes are in weights.

    With cached outputs the teacher sees each of the examples once, before training; else each batch as it comes.
    """
    alone = 6 * student * batch
    if cached:
        return (steps * alone - 2 * teacher * examples) // alone
    return steps * alone // (alone + 2 * teacher * batch)


def _afford(steps: int, alone: float, each: float = 0, once: float = 0) -> int:
    return int((steps * alone - once) // (alone + each))


equal_compute = Exercise(
    "equal-compute",
    "A forward pass takes 2 operations per weight and example, the backward pass 4 more. Training a student therefore "
    "takes 6 per weight and example, its frozen teacher 2. How many whole steps may a student take with a teacher, so "
    "that it needs no more operations than `steps` steps without? If the teacher's outputs are `cached`, it runs once "
    "over all `examples` before training, else on every batch.",
    steps_with_teacher,
    [
        (1000, 64, 200_000, 300_000, 20_000, False),
        (3000, 32, 200_000, 900_000, 10_000, True),
        (500, 100, 50_000, 1_000_000, 20_000, False),
        (900, 16, 70_000, 70_000, 4_000, True),
    ],
    {
        "teacher free": (
            lambda n, b, s, t, x, cached: n,
            "You give the student all the steps, but the teacher's operations count as well. Compared so, distillation "
            "looks cheaper than it is.",
        ),
        "teacher like student": (
            lambda n, b, s, t, x, cached: _afford(n, 6 * s * b, *((0, 6 * t * x) if cached else (6 * t * b, 0))),
            "You count as much per weight for the teacher as for the student. A frozen teacher has no backward pass: "
            "2 operations, not 6.",
        ),
        "cache not used": (
            lambda n, b, s, t, x, cached: _afford(n, 6 * s * b, 2 * t * b),
            "The teacher runs at every step, cached or not. Cached outputs are paid for once, whatever the steps.",
        ),
        "cache free": (
            lambda n, b, s, t, x, cached: n if cached else _afford(n, 6 * s * b, 2 * t * b),
            "Cached outputs have to be computed once: take away 2 operations per weight of the teacher and example.",
        ),
        "all steps charged": (
            lambda n, b, s, t, x, cached: _afford(n, 6 * s * b, 0, 2 * t * (x if cached else n * b)),
            "You pay for a teacher at all `steps` steps. The student takes fewer, and so does its teacher: divide the "
            "budget by the cost of a step of both.",
        ),
    },
)
