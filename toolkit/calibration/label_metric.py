"""Labels with geometry: predict the label that is nearest *on average*, under a metric on all labels, seen or not.

A classifier gives probabilities to the labels it was trained on. If distances between all labels are known, its Fréchet
mean can be a label of which it never saw an example: half-way between two angles lies a third.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.calibration.losses import cross_entropy
from toolkit.checks import readable, require_labels, require_probabilities, typed
from toolkit.data import digits, splits
from toolkit.fleet import Adam, train
from toolkit.models import MLP

__all__ = [
    "UnseenLabelStudy",
    "frechet_cost",
    "frechet_mean",
    "graph_metric",
    "predictable_labels",
    "squared_distance",
    "unseen_label_study",
]


@typed
def graph_metric(lengths: Float[Tensor, "labels labels"]) -> Float[Tensor, "labels labels"]:
    """Shortest-path distances between the nodes of a graph, one node per label.

    ``lengths[i, j]`` > 0 is the length of the edge from i to j, 0 (or infinite) where there is none; the graph is
    undirected and connected. A path graph gives labels on a line, a ring labels on a circle. Floyd-Warshall, O(n³).
    Raises ``ValueError`` for negative or NaN lengths, a matrix that is not symmetric, or a graph in pieces.
    """
    if readable(lengths):
        if not bool((lengths >= 0).all()):
            raise ValueError(f"lengths: expected numbers of at least 0, got {lengths.min().item()}")
        if not torch.equal(lengths, lengths.T):
            raise ValueError("lengths: expected a symmetric matrix, got one that differs from its transpose")
    distances = torch.where(lengths > 0, lengths, math.inf)
    eye = torch.eye(len(lengths), dtype=torch.bool, device=lengths.device)
    distances = torch.where(eye, 0.0, distances)
    for node in range(len(lengths)):
        distances = torch.minimum(distances, distances[:, node, None] + distances[None, node])
    if readable(distances) and not bool(distances.isfinite().all()):
        raise ValueError("lengths: expected a connected graph, got one in pieces")
    return distances


@typed
def frechet_cost(
    probabilities: Float[Tensor, "batch observed"], distances: Float[Tensor, "labels observed"]
) -> Float[Tensor, "batch labels"]:
    """Σ_k p_k d(y, y_k)² for every label y: the expected squared distance to a label drawn from p.

    ``distances`` are those of all labels (rows) to the observed ones (columns), in any unit; the cost is in its square.
    Linear in p. Raises ``ValueError`` for values that are not probabilities. Source: Roberts et al. 2023,
    "Geometry-Aware Adaptation for Pretrained Models" (Loki).
    """
    require_probabilities("probabilities", probabilities)
    return probabilities @ distances.square().T


@typed
def frechet_mean(
    probabilities: Float[Tensor, "batch observed"], distances: Float[Tensor, "labels observed"]
) -> Int[Tensor, "batch"]:
    """The label argmin_y Σ_k p_k d(y, y_k)² among *all* labels, observed in training or not (of equals the first).

    With d = 1 between any two different labels that are all observed it is the argmax of p; on a line it is the label
    nearest to the expected position. Arguments and errors as :func:`frechet_cost`. Source: Roberts et al. 2023,
    "Geometry-Aware Adaptation for Pretrained Models" (Loki), its prediction rule.
    """
    cost = frechet_cost(probabilities, distances)
    return (cost == cost.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1)


@typed
def squared_distance(
    predicted: Int[Tensor, "batch"], labels: Int[Tensor, "batch"], distances: Float[Tensor, "labels labels"]
) -> Float[Tensor, "batch"]:
    """d(ŷ, y)² of each example, in the squared unit of ``distances``; its mean is the label distance error.

    Raises ``ValueError`` for labels out of range. Source: Roberts et al. 2023, "Geometry-Aware Adaptation for
    Pretrained Models" (mean squared distances).
    """
    for name, values in (("predicted", predicted), ("labels", labels)):
        require_labels(name, values, len(distances))
    return distances[predicted, labels].square()


@typed
def predictable_labels(
    distances: Float[Tensor, "labels labels"], observed: Bool[Tensor, "labels"]
) -> Bool[Tensor, "labels"]:
    """Which labels some probability vector over the ``observed`` ones makes a Fréchet mean (ties count): their locus.

    Label y is in it if Σ_k p_k (d(y, y_k)² - d(z, y_k)²) ≤ 0 for all z has a solution p on the simplex: one linear
    programme per label. The leaves of a tree suffice for all its labels, two opposite corners for a grid with
    city-block distances; under the complete graph's metric every label must be observed. Outside ``vmap`` only. Raises
    ``ValueError`` where nothing is observed.

    Source: Roberts et al. 2023, "Geometry-Aware Adaptation for Pretrained Models" (locus of the Fréchet mean; which
    sets suffice was checked here by enumeration).
    """
    from scipy.optimize import linprog

    if not bool(observed.any()):
        raise ValueError("observed: expected at least one observed label, got none")
    squared = distances.detach().double().cpu()[:, observed.cpu()].square()
    squared = squared / squared.max().clamp_min(torch.finfo(squared.dtype).tiny)
    count, seen = squared.shape
    found = []
    for own in squared:
        # the least t with sum_k p_k (d² of this label - d² of z) <= t for every z: 0 where the label is a mean
        table = torch.cat([own - squared, -torch.ones(count, 1, dtype=torch.float64)], 1).numpy()
        result = linprog(
            [0.0] * seen + [1.0],
            A_ub=table,
            b_ub=[0.0] * count,
            A_eq=[[1.0] * seen + [0.0]],
            b_eq=[1.0],
            bounds=[(0, None)] * (seen + 1),
        )
        found.append(bool(result.fun <= 1e-9))
    return torch.tensor(found, device=observed.device)


class UnseenLabelStudy(NamedTuple):
    """Mean squared label distances, in squared steps between neighbouring labels, by temperature and seed.

    ``mean_unseen_accuracy`` is the share of digits at unseen angles whose angle the Fréchet mean hits.
    """

    temperatures: Float[Tensor, "temperatures"]
    argmax_unseen: Float[Tensor, "seeds"]
    mean_unseen: Float[Tensor, "temperatures seeds"]
    argmax_seen: Float[Tensor, "seeds"]
    mean_seen: Float[Tensor, "temperatures seeds"]
    mean_unseen_accuracy: Float[Tensor, "temperatures seeds"]


def _turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Images turned by an angle each, on a wider canvas."""
    wide = F.pad(x, [2] * 4)
    angle = torch.deg2rad(degrees).to(x.dtype)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turns = torch.stack([torch.stack([cos, sin, zero], 1), torch.stack([-sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turns, list(wide.shape), align_corners=False)
    return F.grid_sample(wide, grid, align_corners=False)


@typed
def unseen_label_study(
    *,
    geometry: Literal["line", "circle"] = "line",
    labels: int = 13,
    every: int = 3,
    temperatures: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0),
    classes: tuple[int, ...] = (3, 4, 7),
    seeds: int = 4,
    steps: int = 200,
    hidden: tuple[int, ...] = (64,),
    seed: int = 0,
) -> UnseenLabelStudy:
    """By which angle was this digit turned? Nets are trained on every ``every``-th of ``labels`` angles, tested on all.

    On the ``line`` angles go from 0 to 180 degrees, on the ``circle`` round it; neighbouring labels are at distance 1.
    ``seeds`` nets learn digits of ``classes`` at the observed angles; then the argmax is compared with the Fréchet mean
    under the metric at each temperature of the softmax. Errors on test digits at unseen and at seen angles. Source:
    Roberts et al. 2023, "Geometry-Aware Adaptation for Pretrained Models" (the task is ours). Raises ``ValueError``
    where ``every`` leaves fewer than two labels observed or none unseen.
    """
    if not 2 <= every < labels:
        raise ValueError(f"every: expected a number from 2 to {labels - 1} (labels - 1), got {every}")
    edges = torch.diag(torch.ones(labels - 1), 1)
    if geometry == "circle":
        edges[0, -1] = 1.0
    distances = graph_metric(edges + edges.T)
    angles = torch.arange(labels) * (360.0 / labels if geometry == "circle" else 180.0 / (labels - 1))
    observed = torch.arange(0, labels, every)
    everything = digits()
    parts = splits(everything.subset((everything.y[:, None] == torch.tensor(classes)).any(1)), seed, (0.7, 0.0, 0.3))

    def turned(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        label = which.repeat_interleave(len(x))
        return _turned(x.repeat(len(which), 1, 1, 1), angles[label]).flatten(1), label

    x, y = turned(parts.train.x, observed)
    fleet = train(
        lambda: MLP(x.shape[1], hidden, len(observed)),
        lambda model, batch, hyper: cross_entropy(model(batch.x), batch.y),
        {"x": x, "y": y // every},
        members=seeds,
        steps=steps,
        optimiser=Adam(lr=3e-3),
        seed=seed,
        device="cpu",
        progress=False,
    )
    x, y = turned(parts.test.x, torch.arange(labels))
    logits = fleet.logits(x)
    unseen = y % every != 0

    def error(predicted: Tensor, where: Tensor) -> Tensor:
        return torch.stack([squared_distance(row[where], y[where], distances).mean() for row in predicted])

    top = observed[logits.argmax(-1)]
    means = []
    for temperature in temperatures:
        p = (logits / temperature).softmax(-1)
        means.append(torch.stack([frechet_mean(row, distances[:, observed]) for row in p]))
    return UnseenLabelStudy(
        torch.tensor(temperatures),
        error(top, unseen),
        torch.stack([error(mean, unseen) for mean in means]),
        error(top, ~unseen),
        torch.stack([error(mean, ~unseen) for mean in means]),
        torch.stack([(mean == y)[:, unseen].float().mean(1) for mean in means]),
    )
