"""The bug museum of the unlearning lab: mistakes in public code on which published numbers rest, to be put right.

Each prompt tells what the public code did; the solution is what its paper says. Among the misconceptions of each is the
public version, whose message says what became of the numbers.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from toolkit import random
from toolkit.exercises import Exercise

__all__ = [
    "bad_teacher_loss",
    "duck_target",
    "histogram_klom",
    "laf_loss",
    "masked_sgd",
    "modified_entropy",
    "scar_shrinkage",
    "scrub_step",
]


def klom_of_example(unlearned: Tensor, oracle: Tensor, bins: int) -> float:
    """KLoM of one example, in nats, of its margins (models,) under unlearned and (oracles,) under retrained models."""
    low, high = min(unlearned.min(), oracle.min()).item(), max(unlearned.max(), oracle.max()).item()
    p = torch.histc(unlearned, bins, low, high) / len(unlearned)
    q = torch.histc(oracle, bins, low, high) / len(oracle)
    q = torch.where(p > 0, q.clamp(min=1e-5), q)
    q = q / q.sum()
    return p.xlogy(p / q)[p > 0].sum().item()


_MARGINS = random.normal(random.key(40), (3, 2, 12))


def _divergence(p: Tensor, q: Tensor, floor: float = 1e-5) -> Tensor:
    """KL of two histograms, of counts or shares."""
    p, q = p / p.sum(), q / q.sum()
    q = torch.where(p > 0, q.clamp(min=floor), q)
    return p.xlogy(p / (q / q.sum()))[p > 0].sum()


def _histograms(u: Tensor, o: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    both = torch.cat([u, o])
    low, high = both.min().item(), both.max().item()
    return torch.histc(u, bins, low, high), torch.histc(o, bins, low, high)


def _half_open(u: Tensor, o: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Histograms that lose what is on the last edge."""
    both = torch.cat([u, o])
    low, high = both.min().item(), both.max().item()
    return torch.histc(u[u < high], bins, low, high), torch.histc(o[o < high], bins, low, high)


histogram_klom = Exercise(
    "histogram-klom",
    "KLoM compares the margins that many unlearned models give one example with those of retrained ones: "
    "$\\mathrm{KL}(p \\,\\|\\, q)$ between the histograms $p$ (unlearned) and $q$ (retrained) over equal bins that "
    "span both. Where $p > 0$, raise $q$ to at least $10^{-5}$; then scale $q$ to the sum 1. EasyDUB's code sorts "
    "margins into bins $[a, b)$, so the largest of all lies in none and is lost: close the last bin.",
    klom_of_example,
    [(_MARGINS[0, 0], _MARGINS[0, 1], 4), (_MARGINS[1, 0] + 0.8, _MARGINS[1, 1], 6), (*_MARGINS[2, :, :7], 3)],
    {
        "drops the largest": (
            lambda u, o, bins: _divergence(*_half_open(u, o, bins)),
            "This is EasyDUB's histogram: 99 of 100 models are counted. The lost one is the most extreme margin of the "
            "fleet that lies higher, so values computed with it are off just where the two differ. Close the last bin.",
        ),
        "direction": (
            lambda u, o, bins: _divergence(*_histograms(u, o, bins)[::-1]),
            "You compute KL(retrained ‖ unlearned). The public code, and so every published number, has the unlearned "
            "models first.",
        ),
        "no floor": (
            lambda u, o, bins: _divergence(*_histograms(u, o, bins), floor=0),
            "One unlearned model where no retrained one is makes this infinite. Raise q to 1e-5 where p > 0.",
        ),
        "own ranges": (
            lambda u, o, bins: _divergence(torch.histc(u, bins), torch.histc(o, bins)),
            "Each of your histograms has its own range, so a shift of all margins is not seen: bins must be shared.",
        ),
        "bits": (
            lambda u, o, bins: _divergence(*_histograms(u, o, bins)) / math.log(2),
            "This is KLoM in bits. Use the natural logarithm.",
        ),
    },
)


def masked_step(
    parameters: Tensor, gradient: Tensor, velocity: Tensor, mask: Tensor, rate: float, momentum: float, decay: float
) -> Tensor:
    """Parameters and velocity, as (2, size), after one SGD step that moves only where mask is True."""
    slope = gradient + decay * parameters
    velocity = torch.where(mask, momentum * velocity + slope, 0)
    return torch.stack([torch.where(mask, parameters - rate * velocity, parameters), velocity])


_VECTORS = random.normal(random.key(41), (3, 3, 6))
_SALIENT = random.uniform(random.key(42), (3, 6)) < 0.5


def _sgd(w: Tensor, g: Tensor, v: Tensor, rate: float, momentum: float, decay: float) -> Tensor:
    v = momentum * v + g + decay * w
    return torch.stack([w - rate * v, v])


masked_sgd = Exercise(
    "masked-sgd",
    "SalUn may move only salient parameters, those where the mask is True. One step of SGD with weight decay "
    "$\\lambda$ and momentum $\\mu$ is $v \\leftarrow \\mu v + g + \\lambda \\theta$, "
    "$\\theta \\leftarrow \\theta - \\eta v$. Until February 2026 the public code set $g$ to 0 outside the mask and "
    "left the rest to the optimiser. Write a step that leaves the other parameters exactly as they are, velocity 0.",
    masked_step,
    [
        (*_VECTORS[0], _SALIENT[0], 0.5, 0.9, 0.3),
        (*_VECTORS[1], _SALIENT[1], 0.2, 0.5, 0.6),
        (_VECTORS[2, 0], _VECTORS[2, 1], torch.zeros(6), _SALIENT[2], 0.5, 0.9, 0.5),
    ],
    {
        "gradient only": (
            lambda w, g, v, mask, rate, mu, decay: _sgd(w, g * mask, v, rate, mu, decay),
            "This is SalUn's code until February 2026: weight decay and momentum go on moving what the mask protects. "
            "All its numbers before belong to a method that also shrinks every weight.",
        ),
        "gradient and decay": (
            lambda w, g, v, mask, rate, mu, decay: _sgd(w, (g + decay * w) * mask, v, rate, mu, 0.0),
            "Gradient and decay are masked, but a velocity from before still carries protected parameters along.",
        ),
        "gradient and velocity": (
            lambda w, g, v, mask, rate, mu, decay: _sgd(w, g * mask, v * mask, rate, mu, decay),
            "Gradient and velocity are masked, but weight decay still pulls the protected parameters to 0.",
        ),
        "velocity kept": (
            lambda w, g, v, mask, rate, mu, decay: torch.where(
                torch.stack([mask, torch.ones_like(mask)]),
                _sgd(w, g, v, rate, mu, decay),
                torch.stack([w, v]),
            ),
            "The parameters are right, but the velocity outside the mask goes on growing: set it to 0.",
        ),
        "mask turned": (
            lambda w, g, v, mask, rate, mu, decay: torch.where(
                mask, torch.stack([w, 0 * v]), _sgd(w, g, v, rate, mu, decay)
            ),
            "You move what is outside the mask. True marks the salient parameters, which may move.",
        ),
        "no decay": (
            lambda w, g, v, mask, rate, mu, decay: _sgd(w, g * mask, v * mask, rate, mu, 0.0),
            "Nothing leaks, but the salient parameters must decay as in plain SGD: add λθ to their gradient.",
        ),
    },
)


def entropy_by_hand(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Modified entropy (batch,) of probabilities (batch, classes) and labels (batch,), in nats."""
    rows = torch.arange(len(labels))
    own = probabilities[rows, labels]
    terms = -probabilities * (1 - probabilities).log()
    terms[rows, labels] = -(1 - own) * own.log()
    return terms.sum(dim=1)


_PROBABILITIES = (2 * random.normal(random.key(43), (3, 5, 4))).softmax(-1)
_LABELS = torch.tensor([2, 0, 1, 1, 3])


def _entropy_with(p: Tensor, own: Tensor, log_other: Tensor) -> Tensor:
    """Minus (1 - p) log p where ``own`` and p times ``log_other`` elsewhere, summed over the classes."""
    return -torch.where(own, (1 - p) * p.log(), p * log_other).sum(1)


def _own(p: Tensor, y: Tensor) -> Tensor:
    return one_hot(y, p.shape[1]).bool()


def _columns(p: Tensor, y: Tensor) -> Tensor:
    """True in the whole column of every class that is a label of the batch."""
    return _own(p, y).any(0).expand(p.shape)


modified_entropy = Exercise(
    "modified-entropy",
    "A membership attack scores each example with the modified entropy "
    "$-(1 - p_y) \\log p_y - \\sum_{k \\ne y} p_k \\log(1 - p_k)$: small for a confident right answer, large for a "
    "confident wrong one. SalUn's code has `[:, labels]` where each row's own label is meant, and "
    "$\\log p_k$ for $\\log(1 - p_k)$. Write the right one.",
    entropy_by_hand,
    [(_PROBABILITIES[0], _LABELS), (_PROBABILITIES[1, :2], _LABELS[:2]), (_PROBABILITIES[2, :1], _LABELS[4:])],
    {
        "both public mistakes": (
            lambda p, y: _entropy_with(p, _columns(p, y), p.log()),
            "This is SalUn's m_entropy: values from twice to over 100 times off that change with the rest of the "
            "batch. Only the attack by confidence was reported, so no table is wrong; one made with this would be.",
        ),
        "whole columns": (
            lambda p, y: _entropy_with(p, _columns(p, y), (1 - p).log()),
            "`[:, labels]` takes the columns of all labels for every row, so an example's score depends on its batch. "
            "Pair each row with its label: [rows, labels].",
        ),
        "log p": (
            lambda p, y: _entropy_with(p, _own(p, y), p.log()),
            "The other classes have log p in place of log(1 - p), which is near 0 for a class that is predicted "
            "surely and wrongly: there it should add most, and it adds nothing.",
        ),
        "plain entropy": (
            lambda p, y: -p.xlogy(p).sum(1),
            "This is the plain entropy. It does not look at the label, so sure and wrong looks like sure and right.",
        ),
        "own class twice": (
            lambda p, y: _entropy_with(p, _own(p, y), (1 - p).log()) - (p * (1 - p).log() * _own(p, y).float()).sum(1),
            "Your sum over the other classes includes the label's own: leave it out.",
        ),
        "sign": (
            lambda p, y: -_entropy_with(p, _own(p, y), (1 - p).log()),
            "The sign is turned: the modified entropy is at least 0, as every log here is negative.",
        ),
    },
)


def nearest_other_class(features: Tensor, labels: Tensor, centroids: Tensor, classes: Tensor) -> Tensor:
    """Class (batch,) of the centroid nearest to each of the features (batch, dim), but never the example's own label.

    Row i of centroids (kept, dim) belongs to class number classes[i]; features and labels are those to be forgotten.
    """
    near = features / features.norm(dim=1, keepdim=True) @ (centroids / centroids.norm(dim=1, keepdim=True)).T
    near[classes == labels[:, None]] = -math.inf
    return classes[near.argmax(dim=1)]


_FEATURES = random.normal(random.key(44), (3, 8, 3))
_CENTROIDS = random.normal(random.key(45), (5, 3)) * torch.tensor([[1.0], [3.0], [0.5], [2.0], [1.0]])
_THIRD = torch.full((8,), 2)


def _cosines(x: Tensor, m: Tensor) -> Tensor:
    return (x / x.norm(dim=1, keepdim=True)) @ (m / m.norm(dim=1, keepdim=True)).T


def _without(near: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    return near.masked_fill(classes == y[:, None], -math.inf)


duck_target = Exercise(
    "duck-target",
    "DUCK pulls each example to be forgotten towards the class, other than its own, whose mean feature is nearest by "
    "cosine. A class that is removed altogether has no mean, so row $i$ of the means need not be class $i$: that is "
    "what `classes` is for. DUCK's code compares the row's number with the label. Give the number of the right class.",
    nearest_other_class,
    [
        (_FEATURES[0], _THIRD, _CENTROIDS[[0, 1, 3, 4]], torch.tensor([0, 1, 3, 4])),
        (_FEATURES[1], torch.arange(8) % 5, _CENTROIDS, torch.arange(5)),
        (_FEATURES[2], torch.arange(8) % 2, _CENTROIDS[2:], torch.tensor([2, 3, 4])),
    ],
    {
        "row for class": (
            lambda x, y, m, c: c[_without(_cosines(x, m), y, torch.arange(len(c))).argmax(1)],
            "This is DUCK's code. With class c removed, row c is class c + 1, and every example nearest to it is sent "
            "to its second choice: class-removal results from it have pulled these examples to the wrong place.",
        ),
        "row returned": (
            lambda x, y, m, c: _without(_cosines(x, m), y, c).argmax(1),
            "You return the row among the centroids. Rows and class numbers differ once a class is gone: classes[row].",
        ),
        "own class": (
            lambda x, y, m, c: c[_cosines(x, m).argmax(1)],
            "Examples may stay with their own class, if it is there, and then nothing is forgotten: leave it out.",
        ),
        "farthest": (
            lambda x, y, m, c: c[_without(-_cosines(x, m), y, c).argmax(1)],
            "You take the smallest cosine, which is the farthest centroid. The nearest one costs the net least.",
        ),
        "Euclidean": (
            lambda x, y, m, c: c[_without(-(x[:, None] - m).norm(dim=2), y, c).argmax(1)],
            "You measure the Euclidean distance, for which lengths count too. DUCK compares directions: cosines.",
        ),
        "not normalised": (
            lambda x, y, m, c: c[_without(x @ m.T, y, c).argmax(1)],
            "Inner products favour long centroids: divide by the lengths.",
        ),
    },
)


def teaching_loss(student: Tensor, competent: Tensor, incompetent: Tensor, forgotten: Tensor) -> float:
    """Mean over a batch of KL(teacher || student) in nats, of logits (batch, classes); forgotten (batch,) is bool."""
    teacher = torch.where(forgotten[:, None], incompetent, competent).log_softmax(dim=1)
    terms = teacher.exp() * (teacher - student.log_softmax(dim=1))
    return terms.sum(dim=1).mean().item()


_NETS = 2 * random.normal(random.key(46), (3, 3, 6, 5))
_FORGOTTEN = torch.tensor([True, False, False, True, True, False])


def _taught(s: Tensor, a: Tensor, b: Tensor, forgotten: Tensor) -> Tensor:
    """The terms (batch, classes) of KL with teacher b where forgotten, a elsewhere."""
    teacher = torch.where(forgotten[:, None], b, a).log_softmax(1)
    return teacher.exp() * (teacher - s.log_softmax(1))


bad_teacher_loss = Exercise(
    "bad-teacher-loss",
    "Bad teaching distils from two teachers: the original net on examples to be kept, an untrained one on "
    "those to be forgotten. Write the mean over the batch of "
    "$\\mathrm{KL}(\\text{teacher} \\,\\|\\, \\text{student}) = \\sum_k t_k \\log(t_k / s_k)$. The public code calls "
    "`kl_div(student, teacher)` with its default reduction, a mean over batch and classes.",
    teaching_loss,
    [(*_NETS[0], _FORGOTTEN), (*_NETS[1, :, :4, :3], _FORGOTTEN[:4]), (*_NETS[2, :, :2], _FORGOTTEN[:2])],
    {
        "mean over classes": (
            lambda s, a, b, f: _taught(s, a, b, f).mean(),
            "This is the code of bad teaching: its loss is smaller than the paper's by the number of classes. Adam "
            "hides it; with SGD, or beside another term, teaching is 10 times too weak on CIFAR-10 and 100 times on "
            "CIFAR-100, and weights tuned on one do not fit the other. Sum over the classes, then average.",
        ),
        "summed": (
            lambda s, a, b, f: _taught(s, a, b, f).sum(),
            "You sum over the batch too, so the loss grows with the batch: average over the examples.",
        ),
        "student first": (
            lambda s, a, b, f: _taught(torch.where(f[:, None], b, a), s, s, f).sum(1).mean(),
            "You compute KL(student ‖ teacher), which forgives a student that ignores some of the teacher's classes. "
            "The teacher's probabilities do the weighting.",
        ),
        "teachers swapped": (
            lambda s, a, b, f: _taught(s, b, a, f).sum(1).mean(),
            "Your teachers have changed places: the untrained one teaches what is to be forgotten.",
        ),
        "one teacher": (
            lambda s, a, b, f: _taught(s, a, a, f).sum(1).mean(),
            "The original net teaches everything: a student that copies it forgets nothing.",
        ),
        "cross-entropy": (
            lambda s, a, b, f: -(torch.where(f[:, None], b, a).softmax(1) * s.log_softmax(1)).sum(1).mean(),
            "This is the cross-entropy. The gradient is the same, but a perfect student does not reach 0: take away "
            "the teacher's entropy.",
        ),
    },
)


def extractor_loss(features: Tensor, forgotten: Tensor) -> float:
    """LAF's extractor loss of features (examples, dim), each part modelled by its own mean; forgotten is bool."""
    kept, lost = features[~forgotten], features[forgotten]
    error_kept = (kept - kept.mean(dim=0)).square().sum(dim=1)
    error_lost = (lost - lost.mean(dim=0)).square().sum(dim=1)
    loss = (error_kept / (error_kept + 1)).exp().sum() - (error_lost / (error_lost + 1)).exp().sum()
    return loss.item()


_REPRESENTED = random.normal(random.key(47), (3, 8, 2))
_LOST = torch.tensor([False, True, False, False, True, True, False, False])


def _bounded(x: Tensor, centre: Tensor) -> Tensor:
    error = (x - centre.mean(0)).square().sum(1)
    return error / (error + 1)


laf_loss = Exercise(
    "laf-loss",
    "LAF forgets without labels. One model of the remaining features and one of the features to be forgotten "
    "reconstruct them with squared errors $M$ and $M_f$; the extractor lowers "
    "$\\sum_{\\text{kept}} e^{M / (M + 1)} - \\sum_{\\text{forgotten}} e^{M_f / (M_f + 1)}$, so what is kept stays "
    "predictable and what is forgotten does not. Take the simplest model, one that reconstructs every feature as the "
    "mean of its data. LAF's notebook fits the first model to all data; write the loss with the remaining data only.",
    extractor_loss,
    [
        (_REPRESENTED[0] + 2 * _LOST[:, None], _LOST),
        (_REPRESENTED[1] + 1.5 * ~_LOST[:, None], _LOST),
        (_REPRESENTED[2, :5], _LOST[:5]),
    ],
    {
        "all data": (
            lambda x, f: _bounded(x[~f], x).exp().sum() - _bounded(x[f], x[f]).exp().sum(),
            "This is LAF's notebook: its model of the remaining data has seen the forgotten data too, so kept features "
            "are drawn to what the forgotten ones helped to fix. It may be meant as an approximation for small forget "
            "sets, but its numbers are not those of the method as written.",
        ),
        "one model": (
            lambda x, f: _bounded(x[~f], x[~f]).exp().sum() - _bounded(x[f], x[~f]).exp().sum(),
            "You measure the forgotten features by the model of the kept ones: they have a model of their own.",
        ),
        "sign": (
            lambda x, f: _bounded(x[f], x[f]).exp().sum() - _bounded(x[~f], x[~f]).exp().sum(),
            "The sign is turned: minimising this would scatter what is to be kept.",
        ),
        "added": (
            lambda x, f: _bounded(x[~f], x[~f]).exp().sum() + _bounded(x[f], x[f]).exp().sum(),
            "You add both parts, so the forgotten features become more predictable: take theirs away.",
        ),
        "no exponential": (
            lambda x, f: _bounded(x[~f], x[~f]).sum() - _bounded(x[f], x[f]).sum(),
            "The exponential is missing: the loss is made of exp(M / (M + 1)).",
        ),
    },
)


def shrunk_correlation(covariance: Tensor, diagonal: float, others: float) -> Tensor:
    """Correlations (dim, dim) of a covariance (dim, dim) after one shrinkage."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    mean_diagonal = covariance.diagonal().mean()
    mean_others = covariance[eye == 0].mean()
    shrunk = covariance + diagonal * mean_diagonal * eye + others * mean_others * (1 - eye)
    deviation = shrunk.diagonal().sqrt()
    return shrunk / torch.outer(deviation, deviation)


_FACTORS = random.normal(random.key(48), (3, 4, 9))
_COVARIANCES = _FACTORS @ _FACTORS.mT / 9 + 0.5


def _shrunk(s: Tensor, a: float, b: float) -> Tensor:
    eye = torch.eye(len(s), dtype=s.dtype)
    return s + a * s.diagonal().mean() * eye + b * s[eye == 0].mean() * (1 - eye)


def _correlation(s: Tensor) -> Tensor:
    return s / s.diagonal().sqrt().outer(s.diagonal().sqrt())


scar_shrinkage = Exercise(
    "scar-shrinkage",
    "SCAR measures distances to a class with the covariance $S$ of its features. Few examples make $S$ singular, so it "
    "is shrunk: add $\\gamma_1$ times the mean of its diagonal to the diagonal, and $\\gamma_2$ times the mean of the "
    "other entries to these. Then make it a correlation, $S_{ij} / \\sqrt{S_{ii} S_{jj}}$. SCAR's code shrinks "
    "twice in a row, which its README does not say: shrink once.",
    shrunk_correlation,
    [(_COVARIANCES[0], 3.0, 3.0), (_COVARIANCES[1], 1.0, 0.5), (_COVARIANCES[2, :3, :3], 0.2, 1.0)],
    {
        "twice": (
            lambda s, a, b: _correlation(_shrunk(_shrunk(s, a, b), a, b)),
            "This is SCAR's code: γ is really (1 + γ)² - 1, 15 where 3 is reported. Distances then hardly know the "
            "classes' shapes, and who follows the paper gets other targets for the examples.",
        ),
        "not shrunk": (
            lambda s, a, b: _correlation(s),
            "This is the correlation of S as it is: it has not been shrunk, and with few examples cannot be inverted.",
        ),
        "covariance": (
            _shrunk,
            "This is the shrunk covariance. Divide row and column i by the standard deviation, the root of entry ii.",
        ),
        "variances": (
            lambda s, a, b: _shrunk(s, a, b) / _shrunk(s, a, b).diagonal().outer(_shrunk(s, a, b).diagonal()),
            "You divide by the variances. A correlation is divided by standard deviations: its diagonal is 1.",
        ),
        "correlation first": (
            lambda s, a, b: _shrunk(_correlation(s), a, b),
            "You shrink the correlation, so the diagonal ends above 1: shrink the covariance first.",
        ),
        "mean of all": (
            lambda s, a, b: _correlation(
                s + a * s.diagonal().mean() * torch.eye(len(s)) + b * s.mean() * (1 - torch.eye(len(s)))
            ),
            "Your second mean includes the diagonal: it is over the other entries.",
        ),
    },
)


def distilled_step(student: Tensor, teacher: Tensor, x: Tensor, rate: float, forgotten: bool) -> Tensor:
    """Weights (2, features, classes) of student and teacher after one SGD step on the mean KL(teacher || student) on x.

    The logits are x @ weights. A batch that is forgotten climbs the KL, another one descends it.
    """
    gap = (x @ student).softmax(dim=1) - (x @ teacher).softmax(dim=1)
    slope = x.T @ gap / len(x)
    return torch.stack([student - rate * (-slope if forgotten else slope), teacher])


_WEIGHTS = 2 * random.normal(random.key(49), (3, 2, 3, 4))
_INPUTS = random.normal(random.key(50), (3, 5, 3))


def _pulled(s: Tensor, t: Tensor, x: Tensor, rate: float, forgotten: bool) -> Tensor:
    """The student's change."""
    slope = x.T @ ((x @ s).softmax(1) - (x @ t).softmax(1)) / len(x)
    return rate * slope * (1 if forgotten else -1)


def _pushed(s: Tensor, t: Tensor, x: Tensor, rate: float, forgotten: bool) -> Tensor:
    """The change that the same step would make to the teacher."""
    log_s, log_t = (x @ s).log_softmax(1), (x @ t).log_softmax(1)
    ratio = log_t - log_s
    slope = x.T @ (log_t.exp() * (ratio - (log_t.exp() * ratio).sum(1, keepdim=True))) / len(x)
    return rate * slope * (1 if forgotten else -1)


scrub_step = Exercise(
    "scrub-step",
    "SCRUB distils a student from the original net, its teacher: on examples to be kept the student moves towards the "
    "teacher, on those to be forgotten away from it. EasyDUB's version gives its optimiser the teacher's parameters. "
    "Write one step of SGD for two linear nets and return the weights of both. The gradient of the mean KL by the "
    "student's weights is $X^\\top (s - t) / n$, where $s$ and $t$ are the probabilities of student and teacher.",
    distilled_step,
    [
        (*_WEIGHTS[0], _INPUTS[0], 1.0, False),
        (*_WEIGHTS[1], _INPUTS[1], 1.0, True),
        (*_WEIGHTS[2], _INPUTS[2, :2], 0.5, False),
    ],
    {
        "nothing moves": (
            lambda s, t, *rest: torch.stack([s, t]),
            "This is EasyDUB's scrub: the gradients reach the student, the optimiser holds the teacher, whose are "
            'empty, and nothing ever moves. A row "SCRUB" made with it is the original model under another name.',
        ),
        "teacher moves": (
            lambda s, t, *rest: torch.stack([s, t + _pushed(s, t, *rest)]),
            "The teacher learns from the student. It is what the student is measured against and stays as it is.",
        ),
        "teacher gets the step": (
            lambda s, t, *rest: torch.stack([s, t + _pulled(s, t, *rest)]),
            "You apply the student's step to the teacher: the right gradient, the wrong parameters.",
        ),
        "both move": (
            lambda s, t, *rest: torch.stack([s + _pulled(s, t, *rest), t + _pushed(s, t, *rest)]),
            "Student and teacher both move, so kept examples lose what the original model knew: freeze the teacher.",
        ),
        "always descends": (
            lambda s, t, x, rate, f: torch.stack([s + _pulled(s, t, x, rate, False), t]),
            "Your student copies the teacher on the forgotten examples as well: climb there.",
        ),
        "sign": (
            lambda s, t, x, rate, f: torch.stack([s + _pulled(s, t, x, rate, not f), t]),
            "The sign is turned: the student leaves the teacher on what it should keep.",
        ),
        "summed": (
            lambda s, t, x, rate, f: torch.stack([s + _pulled(s, t, x, rate * len(x), f), t]),
            "Your gradient is summed over the examples: the loss is their mean.",
        ),
    },
)
