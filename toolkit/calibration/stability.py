"""How accurate is a model on a test set without labels? Predictions that dropout moves little are a sign of accuracy.

The answer with all features is compared with the answer after dropout at the features; the mean agreement over a test
set is its stability. Over many shifted sets it goes along with accuracy, and a line fitted on sets with known accuracy
estimates that of others.
"""

from itertools import combinations
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit import random
from toolkit.calibration.ensembles import mc_dropout
from toolkit.calibration.losses import cross_entropy
from toolkit.checks import readable, require_probabilities, typed
from toolkit.data import CORRUPTIONS, corrupt, digits, splits
from toolkit.fleet import Adam, train
from toolkit.models import MLP

__all__ = [
    "AccuracyLine",
    "StabilityStudy",
    "accuracy_line",
    "box_iou",
    "matched_box_stability",
    "prediction_overlap",
    "stability_study",
]


def _require_boxes(name: str, boxes: Tensor) -> None:
    if readable(boxes) and not bool((boxes[:, 2:] >= boxes[:, :2]).all()):
        raise ValueError(f"{name}: expected corners (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got others")


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes "... 4" that broadcast; 0 where both are empty."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    shared = sides.clamp_min(0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1.0), 0.0)


@typed
def box_iou(first: Float[Tensor, "batch 4"], second: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch"]:
    """Intersection over union of box i of ``first`` and box i of ``second``, in [0, 1] (0 where both are empty).

    Boxes are corners (x0, y0, x1, y1) in any unit; ``ValueError`` where x1 < x0 or y1 < y0.
    """
    _require_boxes("first", first)
    _require_boxes("second", second)
    return _iou(first, second)


@typed
def matched_box_stability(boxes: Float[Tensor, "n 4"], dropped: Float[Tensor, "m 4"]) -> Float[Tensor, ""]:
    """Mean IoU of an image's boxes with those after dropout, paired one to one so that the sum of IoUs is largest.

    The mean is over the min(n, m) pairs (a reading: what is left over is not counted). The score of a test set is the
    mean over its images. Outside ``vmap`` only. Raises ``ValueError`` for an empty set of boxes or corners the wrong
    way round. Source: Yang et al. 2024, "Bounding Box Stability against Feature Dropout Reflects Detector
    Generalization across Environments" (BoS).
    """
    from scipy.optimize import linear_sum_assignment

    for name, values in (("boxes", boxes), ("dropped", dropped)):
        if len(values) == 0:
            raise ValueError(f"{name}: expected at least one box, got none")
        _require_boxes(name, values)
    table = _iou(boxes[:, None], dropped[None])
    rows, columns = linear_sum_assignment(table.detach().cpu().numpy(), maximize=True)
    return table[torch.from_numpy(rows), torch.from_numpy(columns)].mean()


@typed
def prediction_overlap(
    first: Float[Tensor, "batch classes"], second: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch"]:
    """Σ_k min(p_k, q_k) / Σ_k max(p_k, q_k) of two predicted distributions, in [0, 1]: the IoU of a classifier.

    With one-hot rows 1 for equal classes and 0 for others; in general (1 - t) / (1 + t), t the total variation
    distance. Raises ``ValueError`` for values that are not probabilities. The transfer of BoS from boxes to classes is
    ours.
    """
    require_probabilities("first", first)
    require_probabilities("second", second)
    return torch.minimum(first, second).sum(-1) / torch.maximum(first, second).sum(-1)


class AccuracyLine(NamedTuple):
    """accuracy ≈ intercept + slope · score, its correlation r, and for each set the estimate of the *others'* line."""

    slope: Float[Tensor, ""]
    intercept: Float[Tensor, ""]
    correlation: Float[Tensor, ""]
    left_out: Float[Tensor, "sets"]


@typed
def accuracy_line(scores: Float[Tensor, "sets"], accuracies: Float[Tensor, "sets"]) -> AccuracyLine:
    """Least-squares line from a label-free score of a test set to its accuracy, with leave-one-out estimates.

    The estimate for set i by the line through the other sets is y_i - e_i / (1 - h_i), e_i the residual and h_i =
    1/n + (x_i - x̄)² / Σ_j (x_j - x̄)² (no refitting). RMSE of the method: √ of the mean of (left_out - accuracies)².
    Where all accuracies are equal the correlation is 0. Raises ``ValueError`` for fewer than three sets and for scores
    such that without one set the others are all equal. Source: Yang et al. 2024, "Bounding Box Stability against
    Feature Dropout Reflects Detector Generalization across Environments" (a straight line and leave-one-out are our
    reading of how they estimate accuracy).
    """
    count = len(scores)
    if count < 3:
        raise ValueError(f"scores: expected at least 3 test sets, got {count}")
    x, y = scores.double() - scores.double().mean(), accuracies.double() - accuracies.double().mean()
    spread = x.square().sum()
    leverage = 1 / count + x.square() / spread.clamp_min(torch.finfo(x.dtype).tiny)
    if readable(leverage) and not (spread > 0 and leverage.max() < 1 - 1e-9):
        raise ValueError("scores: expected scores that differ, also without any one of them, got equal ones")
    slope = (x * y).sum() / spread
    size = (spread * y.square().sum()).sqrt()
    correlation = torch.where(size > 0, (x * y).sum() / torch.where(size > 0, size, 1.0), 0.0)
    left_out = accuracies.double() - (y - slope * x) / (1 - leverage)
    intercept = accuracies.double().mean() - slope * scores.double().mean()
    kind = scores.dtype
    return AccuracyLine(slope.to(kind), intercept.to(kind), correlation.to(kind), left_out.to(kind))


class StabilityStudy(NamedTuple):
    """Accuracy and label-free scores of every test set and seed, all in [0, 1]; ``hides`` marks the first kind of set.

    ``agreement`` is the share of dropout passes that give the same class, ``overlap`` the mean
    :func:`prediction_overlap` of their probabilities, ``confidence`` the mean largest probability without dropout.
    """

    names: tuple[str, ...]
    hides: Bool[Tensor, "sets"]
    accuracy: Float[Tensor, "sets seeds"]
    agreement: Float[Tensor, "sets seeds"]
    overlap: Float[Tensor, "sets seeds"]
    confidence: Float[Tensor, "sets seeds"]


def _shifted(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Test images with parts of them hidden (one or two kinds of it), then turned and moved ones."""
    keys = {kind: random.key(seed, number) for number, kind in enumerate(CORRUPTIONS)}
    hiding = [kind for kind in CORRUPTIONS if kind != "rotation"]
    sets = {"clean": x}
    for kind in hiding:
        sets |= {f"{kind} {severity}": corrupt(x, kind, severity, keys[kind]) for severity in range(1, 6)}
    for first, second in combinations(hiding, 2):
        for severity in range(1, 5):
            once = corrupt(x, first, severity, keys[first]).clamp(0, 1)  # a blurred white may round up
            sets[f"{first} + {second} {severity}"] = corrupt(once, second, severity, keys[second])
    sets |= {f"rotation {severity}": corrupt(x, "rotation", severity, keys["rotation"]) for severity in range(1, 6)}
    moves = {"down": (1, 0), "right": (0, 1), "up": (-1, 0), "left": (0, -1)}
    return sets | {f"moved {name}": x.roll(move, (2, 3)) for name, move in moves.items()}


def stability_study(
    *,
    rate: float = 0.15,
    samples: int = 4,
    examples: int = 200,
    seeds: int = 4,
    steps: int = 200,
    hidden: tuple[int, ...] = (64,),
    seed: int = 0,
) -> StabilityStudy:
    """Digit classifiers on 37 test sets: 28 that hide evidence (``hides``), 9 that turn or move the digits.

    Nets are trained without dropout; their hidden units are dropped at ``rate`` in ``samples`` passes over each set of
    ``examples`` digits. Hidden evidence makes a net both wrong and unstable, so :func:`accuracy_line` works; a turned
    digit looks like another one, to which the net holds on: stable and wrong. Confidence is the baseline. Source: Yang
    et al. 2024, "Bounding Box Stability against Feature Dropout Reflects Detector Generalization across Environments"
    (there detectors and boxes; classes, sizes and sets are ours). Raises ``ValueError`` for a rate outside [0, 1) or
    fewer than one pass.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    parts = splits(digits(), seed, (0.5, 0.0, 0.5))
    chosen = random.permutation(random.key(seed, 9), len(parts.test))[:examples]
    sets = _shifted(parts.test.x[chosen], seed)
    fleet = train(
        lambda: MLP(64, hidden, 10, dropout=rate),
        lambda model, batch, hyper: cross_entropy(model(batch.x), batch.y),
        {"x": parts.train.x.flatten(1), "y": parts.train.y},
        members=seeds,
        steps=steps,
        optimiser=Adam(lr=3e-3),
        seed=seed,
        device="cpu",
        progress=False,
    )
    names = tuple(sets)
    inputs = {"x": torch.cat(list(sets.values())).flatten(1), "y": parts.test.y[chosen].repeat(len(sets))}

    def measured(model: Any, batch: Any, hyper: Any) -> tuple[Tensor, ...]:
        whole = model(batch.x).softmax(-1)
        top = whole.argmax(-1)
        dropped = mc_dropout(model, batch.x, batch.key, samples).softmax(-1)
        agreement = (dropped.argmax(-1) == top).to(whole.dtype).mean(0)
        overlap = torch.stack([prediction_overlap(whole, p) for p in dropped]).mean(0)
        return (top == batch.y).to(whole.dtype), agreement, overlap, whole.amax(-1)

    columns = [value.reshape(seeds, len(names), -1).mean(-1).T for value in fleet.evaluate(measured, inputs)]
    hides = torch.tensor([not name.startswith(("rotation", "moved")) for name in names])
    return StabilityStudy(names, hides, *columns)
