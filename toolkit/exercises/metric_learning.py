"""Exercises of the metric-learning lab.

Each solution is written for reading: one formula, plain torch, one anchor, query or batch at a time.
"""

import math

import torch
from torch import Tensor

from toolkit import random
from toolkit.exercises import Exercise

__all__ = [
    "average_precision",
    "error_rates",
    "info_nce",
    "pair_gradient",
    "recall",
    "simplex",
    "spread",
    "triplet_hinge",
]

_POINTS = random.normal(random.key(25), (8, 2))
_SPACE = random.normal(random.key(1), (6, 3))
_CLASSES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])
_HALVES = torch.tensor([[1.0, 0.0], [0.98, 0.17], [0.97, 0.22], [-1.0, 0.0]]), torch.tensor([0, 1, 1, 0])


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def recall_by_hand(embeddings: Tensor, labels: Tensor) -> float:
    """Recall@1 by cosine similarity of embeddings (batch, dim) with labels (batch,)."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T).fill_diagonal_(-math.inf)
    found = labels[similarity.argmax(dim=1)] == labels
    partners = (labels[:, None] == labels).sum(dim=1) - 1
    return found[partners > 0].float().mean().item()


def _found(similarity: Tensor, y: Tensor, itself: float = -math.inf) -> Tensor:
    """Whether each query's most similar item shares its class; ``itself`` is the query's similarity to itself."""
    diagonal = torch.eye(len(y), dtype=torch.bool)
    return (y[similarity.masked_fill(diagonal, itself).argmax(1)] == y).float()


def _counted(y: Tensor) -> Tensor:
    return (y[:, None] == y).sum(1) > 1


recall = Exercise(
    "recall",
    "Compute Recall@1: the share of queries whose nearest neighbour, by cosine similarity, is of their class. Every "
    "item is a query and looks among all the others. A query whose class has no other member is left out.",
    recall_by_hand,
    [(_POINTS, _CLASSES), (_POINTS.flip(0), _CLASSES), (_SPACE, _CLASSES[2:]), _HALVES],
    {
        "finds itself": (
            lambda x, y: _found(_unit(x) @ _unit(x).T, y, 1.0)[_counted(y)].mean(),
            "Every query finds itself, its cosine being 1, so the recall is 1 for any embedding. Put the diagonal out "
            "of reach before you look for the largest.",
        ),
        "diagonal zero": (
            lambda x, y: _found(_unit(x) @ _unit(x).T, y, 0.0)[_counted(y)].mean(),
            "You set the diagonal to 0. Where all other cosines are negative the query still finds itself: use -inf.",
        ),
        "farthest": (
            lambda x, y: _found(-_unit(x) @ _unit(x).T, y)[_counted(y)].mean(),
            "You take the smallest cosine, which is the farthest item. A similarity is large for neighbours: argmax.",
        ),
        "not normalised": (
            lambda x, y: _found(x @ x.T, y)[_counted(y)].mean(),
            "Your products grow with the lengths, so long vectors are everybody's neighbours: scale the rows to "
            "length 1 first.",
        ),
        "distance of raw vectors": (
            lambda x, y: _found(-(x[:, None] - x).norm(dim=2), y)[_counted(y)].mean(),
            "You take the Euclidean distance of the embeddings as they are. It ranks as the cosine does only once the "
            "rows have length 1.",
        ),
        "lonely queries": (
            lambda x, y: _found(_unit(x) @ _unit(x).T, y).mean(),
            "You count queries that cannot succeed, being alone in their class: leave them out of the mean.",
        ),
    },
)


def hinge_of_triplet(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> float:
    """Triplet loss of one anchor, positive and negative, all of shape (dim,), by Euclidean distance."""
    to_positive = (anchor - positive).norm()
    to_negative = (anchor - negative).norm()
    return (to_positive - to_negative + margin).clamp(min=0).item()


_TRIPLETS = random.normal(random.key(23), (4, 3, 3))


def _gap(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    return (a - p).norm() - (a - n).norm()


triplet_hinge = Exercise(
    "triplet-hinge",
    "Write the triplet loss with Euclidean distances: it is 0 once the negative is farther from the anchor than the "
    "positive by at least the margin, and otherwise what is missing to that.",
    hinge_of_triplet,
    [(*triplet, 0.5) for triplet in _TRIPLETS] + [(*_TRIPLETS[0].flip(0), 1.0)],
    {
        "margin subtracted": (
            lambda a, p, n, m: (_gap(a, p, n) - m).relu(),
            "You subtract the margin, so a triplet in the wrong order by less than it is forgiven. It is added: the "
            "negative must be farther by that much.",
        ),
        "swapped": (
            lambda a, p, n, m: (m - _gap(a, p, n)).relu(),
            "Positive and negative have changed places: your loss falls when the negative comes nearer.",
        ),
        "no hinge": (
            lambda a, p, n, m: _gap(a, p, n) + m,
            "Your loss becomes negative for a triplet that is in order. It must stop at 0, or easy triplets would "
            "outweigh the others.",
        ),
        "squared": (
            lambda a, p, n, m: ((a - p).square().sum() - (a - n).square().sum() + m).relu(),
            "You compare squared distances, in which the margin has another meaning: take the distances.",
        ),
        "margin outside": (
            lambda a, p, n, m: _gap(a, p, n).relu() + m,
            "You add the margin after the hinge, so no triplet ever reaches 0: add it before.",
        ),
        "positive to negative": (
            lambda a, p, n, m: ((a - p).norm() - (p - n).norm() + m).relu(),
            "You measure the negative from the positive. Both distances start at the anchor.",
        ),
    },
)


def loss_of_anchor(embeddings: Tensor, anchor: int, positive: int, temperature: float) -> float:
    """InfoNCE of one anchor and its positive, two rows of embeddings (batch, dim); all other rows are negatives."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    logits = unit @ unit[anchor] / temperature
    others = torch.arange(len(unit)) != anchor
    return (logits[others].logsumexp(dim=0) - logits[positive]).item()


def _cosines(x: Tensor, anchor: int) -> Tensor:
    return _unit(x) @ _unit(x)[anchor]


def _without(s: Tensor, *rows: int) -> Tensor:
    """``s`` without these entries."""
    kept = torch.ones(len(s), dtype=torch.bool)
    kept[list(rows)] = False
    return s[kept]


info_nce = Exercise(
    "info-nce",
    "Write the loss of one anchor $i$ with its positive $p$ (InfoNCE, NT-Xent): "
    "$-\\log \\frac{\\exp(s_{ip} / \\tau)}{\\sum_{j \\ne i} \\exp(s_{ij} / \\tau)}$ with cosine similarities $s$.",
    loss_of_anchor,
    [(_POINTS, 0, 1, 0.5), (_POINTS[2:], 4, 2, 0.2), (_SPACE, 5, 0, 0.5), (_SPACE[:4], 1, 3, 2.0)],
    {
        "itself": (
            lambda x, i, p, t: (_cosines(x, i) / t).logsumexp(0) - _cosines(x, i)[p] / t,
            "The anchor itself is in your denominator, with a cosine of 1 that nothing can change: leave it out.",
        ),
        "positive missing": (
            lambda x, i, p, t: (_without(_cosines(x, i), i, p) / t).logsumexp(0) - _cosines(x, i)[p] / t,
            "Your denominator holds the negatives only. The positive is one of its terms, so the loss stays above 0.",
        ),
        "no temperature above": (
            lambda x, i, p, t: (_without(_cosines(x, i), i) / t).logsumexp(0) - _cosines(x, i)[p],
            "The positive's similarity in the numerator is not divided by the temperature.",
        ),
        "no temperature below": (
            lambda x, i, p, t: _without(_cosines(x, i), i).logsumexp(0) - _cosines(x, i)[p] / t,
            "The similarities in the denominator are not divided by the temperature.",
        ),
        "no temperature": (
            lambda x, i, p, t: _without(_cosines(x, i), i).logsumexp(0) - _cosines(x, i)[p],
            "You use no temperature: divide every similarity by it.",
        ),
        "multiplied": (
            lambda x, i, p, t: (_without(_cosines(x, i), i) * t).logsumexp(0) - _cosines(x, i)[p] * t,
            "You multiply by the temperature. A small one must sharpen the softmax: divide by it.",
        ),
        "log of the mean": (
            lambda x, i, p, t: (_without(_cosines(x, i), i) / t).exp().mean().log() - _cosines(x, i)[p] / t,
            "Your denominator is a mean: a loss lower by the log of its number of terms. InfoNCE has the sum.",
        ),
        "mean of the logs": (
            lambda x, i, p, t: (_without(_cosines(x, i), i) / t).mean() - _cosines(x, i)[p] / t,
            "You average the logits, so all negatives count alike. Sum their exponentials, then take the log.",
        ),
        "not normalised": (
            lambda x, i, p, t: (_without(x @ x[i], i) / t).logsumexp(0) - x[p] @ x[i] / t,
            "You use inner products, which can fall without end by making vectors longer: scale the rows to length 1.",
        ),
        "sign": (
            lambda x, i, p, t: _cosines(x, i)[p] / t - (_without(_cosines(x, i), i) / t).logsumexp(0),
            "This is the log of the probability. The loss is minus that.",
        ),
    },
)


def uniformity_by_hand(embeddings: Tensor, scale: float) -> float:
    """Uniformity of embeddings (batch, dim): the log of a mean over all pairs of two different rows."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    square = ((unit[:, None] - unit) ** 2).sum(dim=2)
    different = ~torch.eye(len(unit), dtype=torch.bool)
    return (-scale * square[different]).exp().mean().log().item()


def _squares(x: Tensor) -> Tensor:
    """Squared distances of the pairs i < j."""
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x[i] - x[j]).square().sum(1)


spread = Exercise(
    "spread",
    "How evenly do embeddings cover the sphere? Scale them to length 1, $u_i$, and compute the uniformity "
    "$\\log \\mathrm{mean}_{i \\ne j} \\exp(-t \\, |u_i - u_j|^2)$ with $t$ the scale.",
    uniformity_by_hand,
    [(_SPACE, 2.0), (_SPACE[:3], 0.7), (_POINTS[:4], 3.0)],
    {
        "mean outside": (
            lambda x, t: (-t * _squares(_unit(x))).mean(),
            "You take the log of each term before the mean, which leaves the mean squared distance. The mean comes "
            "first: pairs that are close then count most.",
        ),
        "no scale": (
            lambda x, t: (-_squares(_unit(x))).exp().mean().log(),
            "The scale t is missing from the exponent.",
        ),
        "not squared": (
            lambda x, t: (-t * _squares(_unit(x)).sqrt()).exp().mean().log(),
            "Your exponent holds the distance. The potential is Gaussian: square it.",
        ),
        "with itself": (
            lambda x, t: (-t * (_unit(x)[:, None] - _unit(x)).square().sum(2)).exp().mean().log(),
            "Your mean includes each row with itself, a term of 1 that no embedding can lower: leave the diagonal out.",
        ),
        "not normalised": (
            lambda x, t: (-t * _squares(x)).exp().mean().log(),
            "You measure the embeddings as they are, so longer vectors look more evenly spread: scale to length 1.",
        ),
        "sign": (
            lambda x, t: (t * _squares(_unit(x))).exp().mean().log(),
            "The minus sign of the exponent is missing: terms must be large for pairs that are close.",
        ),
        "sum": (
            lambda x, t: math.log(2) + (-t * _squares(_unit(x))).exp().sum().log(),
            "You take the log of the sum over ordered pairs, which grows with the batch: divide by their number.",
        ),
    },
)


def map_at_r_of_query(hits: Tensor) -> float:
    """MAP@R of one query: hits (others,), nearest first, are 1.0 for its class and 0.0 for the rest; R is their sum."""
    relevant = int(hits.sum())
    first = hits[:relevant]
    precision = first.cumsum(dim=0) / torch.arange(1, relevant + 1)
    return ((precision * first).sum() / relevant).item()


def _first(h: Tensor) -> Tensor:
    return h[: int(h.sum())]


def _precision(h: Tensor) -> Tensor:
    return h.cumsum(0) / torch.arange(1, len(h) + 1)


average_precision = Exercise(
    "average-precision",
    "All other items are ranked by similarity to a query, and $R$ of them are of its class. Compute MAP@R: "
    "$\\frac{1}{R} \\sum_{i \\le R} P(i) \\, [\\text{the } i\\text{-th is a hit}]$, where $P(i)$ is the share of hits "
    "among the first $i$.",
    map_at_r_of_query,
    [
        (torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]),),
        (torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]),),
        (torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]),),
    ],
    {
        "divided by hits": (
            lambda h: (_precision(h) * h)[: len(_first(h))].sum() / _first(h).sum(),
            "You divide by the hits among the first R, so missing ones cost nothing: divide by R.",
        ),
        "all ranks": (
            lambda h: (_precision(h) * h).sum() / h.sum(),
            "You go down the whole ranking. That is the plain average precision; MAP@R stops at rank R.",
        ),
        "precision at R": (
            lambda h: _first(h).mean(),
            "This is the R-precision P(R), which does not care where among the first R the hits stand.",
        ),
        "every rank": (
            lambda h: _precision(_first(h)).mean(),
            "You average P(i) over every rank. Only ranks that hold a hit count; the others add 0.",
        ),
        "divided by all": (
            lambda h: (_precision(h) * h)[: len(_first(h))].sum() / len(h),
            "You divide by the number of all items: a perfect ranking must give 1. Divide by R.",
        ),
        "sum": (
            lambda h: (_precision(h) * h)[: len(_first(h))].sum(),
            "The sum is right. Divide it by R, so that a perfect ranking gives 1.",
        ),
    },
)


def rates_at_threshold(scores: Tensor, same: Tensor, threshold: float) -> tuple[float, float]:
    """False accept and false reject rate of pairs with scores (pairs,); same (pairs,) tells pairs of one class."""
    accepted = scores >= threshold
    far = accepted[~same].double().mean()
    frr = (~accepted)[same].double().mean()
    return far.item(), frr.item()


_SAME = torch.tensor([True, False, False, True, False, True, False, False, True, False])
_SCORES = torch.tensor([0.75, 0.2, 0.5, 0.5, 0.62, 0.9, -0.1, 0.05, 0.81, 0.33])


def _counts(s: Tensor, same: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Number of false accepts and of false rejects."""
    return ((s >= t) & ~same).sum(), ((s < t) & same).sum()


def _rates(s: Tensor, same: Tensor, t: float) -> tuple[Tensor, Tensor]:
    accepts, rejects = _counts(s, same, t)
    return accepts / (~same).sum(), rejects / same.sum()


error_rates = Exercise(
    "error-rates",
    "A pair is accepted as one class when its score is at least the threshold. Give two rates: false accepts (FAR), "
    "the share of the different-class pairs that are accepted, and false rejects (FRR), the share of the same-class "
    "pairs that are refused.",
    rates_at_threshold,
    [(_SCORES, _SAME, 0.5), (_SCORES, _SAME, 0.78), (_SCORES[:7], _SAME[:7], 0.62)],
    {
        "swapped": (
            lambda s, same, t: _rates(s, same, t)[::-1],
            "The two have changed places: give the false accept rate first.",
        ),
        "of all pairs": (
            lambda s, same, t: tuple(count / len(s) for count in _counts(s, same, t)),
            "You divide by the number of all pairs, so the rates change with the mixture: divide the false accepts by "
            "the different-class pairs, the false rejects by the same-class pairs.",
        ),
        "of the accepted": (
            lambda s, same, t: (
                _counts(s, same, t)[0] / (s >= t).sum(),
                _counts(s, same, t)[1] / (s < t).sum(),
            ),
            "You divide by the pairs accepted and refused. FAR and FRR are shares of the different-class and of the "
            "same-class pairs.",
        ),
        "denominators swapped": (
            lambda s, same, t: (_counts(s, same, t)[0] / same.sum(), _counts(s, same, t)[1] / (~same).sum()),
            "The denominators have changed places: false accepts are made on pairs of different classes.",
        ),
        "other direction": (
            lambda s, same, t: ((s <= t)[~same].float().mean(), (s > t)[same].float().mean()),
            "You accept pairs below the threshold, as with a distance. A score is large for pairs that look alike.",
        ),
        "strictly above": (
            lambda s, same, t: ((s > t)[~same].float().mean(), (s <= t)[same].float().mean()),
            "A pair whose score equals the threshold is accepted: use >=.",
        ),
        "true accepts": (
            lambda s, same, t: (_rates(s, same, t)[0], 1 - _rates(s, same, t)[1]),
            "Your second number is the share of same-class pairs accepted (TAR). The false reject rate is 1 - TAR.",
        ),
    },
)


def gradient_of_pairs(similarities: Tensor, positive: int, temperature: float) -> Tensor:
    """Derivatives (others,) of an anchor's InfoNCE by its similarities (others,), one of which is the positive's."""
    gradient = (similarities / temperature).softmax(dim=0)
    gradient[positive] -= 1
    return gradient / temperature


_SIMILARITIES = random.uniform(random.key(3), (3, 5)) * 1.6 - 0.8


def _target(s: Tensor, p: int) -> Tensor:
    return (torch.arange(len(s)) == p).to(s.dtype)


def _softmax_of_negatives(s: Tensor, p: int, t: float) -> Tensor:
    return (s / t).masked_fill(_target(s, p) > 0, -math.inf).softmax(0)


pair_gradient = Exercise(
    "pair-gradient",
    "A loss pulls and pushes pairs through its derivatives by their similarities. For one anchor's "
    "$L = -s_p / \\tau + \\log \\sum_j \\exp(s_j / \\tau)$, the positive $p$ being one of the $j$, give "
    "$\\partial L / \\partial s_j$ for every $j$, by hand and not by autograd.",
    gradient_of_pairs,
    [(_SIMILARITIES[0], 2, 0.5), (_SIMILARITIES[1], 0, 0.2), (_SIMILARITIES[2, :3], 1, 2.0)],
    {
        "factor": (
            lambda s, p, t: (s / t).softmax(0) - _target(s, p),
            "The differences are right; the factor 1 / τ of the chain rule is missing. It is why a small temperature "
            "makes large gradients.",
        ),
        "plain softmax": (
            lambda s, p, t: (s.softmax(0) - _target(s, p)) / t,
            "Your probabilities are softmax(s). They must be those of the loss: softmax(s / τ).",
        ),
        "sign": (
            lambda s, p, t: (_target(s, p) - (s / t).softmax(0)) / t,
            "The sign is turned: a more similar negative raises the loss, a more similar positive lowers it.",
        ),
        "no positive": (
            lambda s, p, t: (s / t).softmax(0) / t,
            "The positive stands in the numerator too: its derivative has another term, -1 / τ.",
        ),
        "negatives only": (
            lambda s, p, t: (_softmax_of_negatives(s, p, t) - _target(s, p)) / t,
            "Your softmax is over the negatives. The sum in the loss runs over all j, the positive included.",
        ),
        "weights": (
            lambda s, p, t: ((s / t).softmax(0) - _target(s, p)).abs() / t,
            "These are the weights, the derivatives without their signs. Keep the sign: the positive's is negative.",
        ),
        "multiplied": (
            lambda s, p, t: ((s * t).softmax(0) - _target(s, p)) * t,
            "You multiply by the temperature: the loss divides by it, and so does its derivative.",
        ),
    },
)


def simplex_frame(directions: Tensor) -> Tensor:
    """Unit vectors (classes, dim), as far apart as can be, made of orthonormal directions (classes, dim)."""
    centred = directions - directions.mean(dim=0)
    return centred / centred.norm(dim=1, keepdim=True)


def _directions(path: int, classes: int, dim: int) -> Tensor:
    """Orthonormal rows: the first ones of a random reflection."""
    across = random.normal(random.key(4, path), (dim,))
    return (torch.eye(dim) - 2 * torch.outer(across, across) / (across @ across))[:classes]


def _centred(d: Tensor) -> Tensor:
    return d - d.mean(0)


simplex = Exercise(
    "simplex",
    "Class means that have collapsed form a simplex: $K$ unit vectors of which any two have cosine "
    "$-\\frac{1}{K - 1}$; no $K$ vectors are farther apart. Make one of $K$ orthonormal directions: take one and the "
    "same vector from all of them, then scale each to length 1.",
    simplex_frame,
    [(_directions(0, 3, 4),), (_directions(1, 4, 4),), (_directions(2, 2, 3),)],
    {
        "orthogonal": (
            lambda d: d,
            "Your vectors are orthogonal. They can be farther apart: a cosine below 0 for every two, -1 / (K - 1).",
        ),
        "not normalised": (
            _centred,
            "Your vectors are centred but shorter than 1, with squared length 1 - 1 / K: scale them to length 1.",
        ),
        "squared length": (
            lambda d: _centred(d) / _centred(d).square().sum(1, keepdim=True),
            "You divide by the squared length, K / (K - 1) in place of its root: the vectors come out too long.",
        ),
        "scaled together": (
            lambda d: _centred(d) / _centred(d).norm(),
            "You divide by the norm of the whole matrix. Each row is to have length 1: take the norm over dim=1.",
        ),
        "row's own mean": (
            lambda d: _unit(d - d.mean(1, keepdim=True)),
            "You take from each row the mean of its own entries. The centre is the mean vector, over the rows: dim=0.",
        ),
        "factor upside down": (
            lambda d: _centred(d) * math.sqrt(1 - 1 / len(d)),
            "Your factor is upside down: the centred vectors are too short, so multiply by the root of K / (K - 1).",
        ),
    },
)
