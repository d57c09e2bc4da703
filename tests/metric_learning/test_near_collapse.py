"""Near collapse against naive alternation, integrated flows and its own limits."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from toolkit.metric_learning.collapse import (
    central_path,
    collapsed_solution,
    near_collapse,
    within_class_shrinkage,
)
from toolkit.metric_learning.geometry import collapse_measures

DOUBLE = torch.float64


def decays(*values):
    return torch.tensor(values, dtype=DOUBLE)


def sample(items=15, classes=3, dim=8, seed=0, sizes=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(items) % classes if sizes is None else torch.arange(classes).repeat_interleave(sizes)
    centres = torch.randn(classes, dim, generator=generator, dtype=DOUBLE)
    return centres[labels] + 0.7 * torch.randn(len(labels), dim, generator=generator, dtype=DOUBLE), labels


# ---------------------------------------------------------------------- near collapse


def objective(weights, features, start, labels, decay, feature_decay, proximity):
    classes, items = len(weights), len(start)
    error = ((features @ weights.mT - torch.eye(classes, dtype=DOUBLE)[labels]) ** 2).sum()
    rest = feature_decay * (features**2).sum() + proximity * ((features - start) ** 2).sum()
    return (error + rest) / (2 * items) + decay / (2 * classes) * (weights**2).sum()


@pytest.mark.parametrize("sizes", [None, torch.tensor([9, 4, 2])])
def test_near_collapse_is_the_naive_alternation_and_a_minimum(sizes):
    start, labels = sample(sizes=sizes)
    arguments = (labels, 3, 0.05, 0.01, 0.5)
    few = near_collapse(start, *arguments, iterations=3)
    columns, target, unit = start.mT, torch.eye(3, dtype=DOUBLE)[labels].mT, torch.eye(8, dtype=DOUBLE)
    features = columns
    losses = []
    for _ in range(4):
        weights = target @ features.mT @ torch.linalg.inv(features @ features.mT + 5 * 0.05 * unit)
        features = torch.linalg.inv(weights.mT @ weights + 0.51 * unit) @ (weights.mT @ target + 0.5 * columns)
        losses.append(objective(weights, features.mT, start, labels, 0.05, 0.01, 0.5).item())
    torch.testing.assert_close(few.weights, weights, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(few.features, features.mT, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(few.loss.item(), losses[-1], rtol=1e-12, atol=0)
    assert losses == sorted(losses, reverse=True)
    end = near_collapse(start, *arguments)
    slopes = grad(objective, argnums=(0, 1))(end.weights, end.features, start, labels, 0.05, 0.01, 0.5)
    assert max(slope.abs().max() for slope in slopes) < 1e-9


def test_what_differs_within_a_class_shrinks_by_the_law():
    start, labels = sample()
    end = near_collapse(start, labels, 3, 0.05, 0.01, 0.5)
    matrix = within_class_shrinkage(end.weights, 0.01, 0.5)
    member = torch.eye(3, dtype=DOUBLE)[labels]

    def inside(table):
        return table - member @ (member.mT @ table / 5)

    torch.testing.assert_close(inside(end.features), inside(start) @ matrix.mT, rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(end.weights)
    expected = torch.cat([0.5 / (values**2 + 0.51), torch.full((5,), 0.5 / 0.51, dtype=DOUBLE)])
    torch.testing.assert_close(torch.linalg.eigvalsh(matrix), expected.sort().values, rtol=1e-10, atol=1e-12)
    before, after = (collapse_measures(table, labels, end.weights) for table in (start, end.features))
    assert after.nc1_ratio < before.nc1_ratio
    ratios = []
    for feature_decay, proximity in ((0.01, 0.5), (0.01, 0.1), (0.3, 0.1)):  # weaker, then more decay
        end = near_collapse(start, labels, 3, 0.05, feature_decay, proximity)
        ratios.append(collapse_measures(end.features, labels, end.weights).nc1_ratio.item())
    assert ratios == sorted(ratios, reverse=True)


def test_without_proximity_it_is_the_unconstrained_model_and_with_much_nothing_moves():
    start, labels = sample()
    end = near_collapse(start, labels, 3, 0.05, 0.01, 0.0)
    expected = 0.97763932 * torch.eye(3, dtype=DOUBLE)[labels]  # 1 - √(0.05 · 0.01)
    torch.testing.assert_close(end.features @ end.weights.mT, expected, rtol=0, atol=1e-8)
    start, labels = sample(sizes=torch.tensor([9, 4, 2]))
    end = near_collapse(start, labels, 3, 0.3, 0.2, 0.0, 1000)
    solution = collapsed_solution(torch.tensor([9, 4, 2]), decays(0.1), 0.2 / 15)
    torch.testing.assert_close(end.features @ end.weights.mT, torch.diag(solution.predictions)[labels])
    torch.testing.assert_close(end.loss, solution.loss, rtol=1e-9, atol=0)
    still = near_collapse(start, labels, 3, 0.3, 0.2, 1e9, 3)
    torch.testing.assert_close(still.features, start, rtol=0, atol=1e-7)


def test_near_a_collapsed_start_the_first_order_is_enough():
    _, labels = sample()
    solution = collapsed_solution(torch.full((3,), 5), decays(0.05 / 3), 0.01 / 15)
    rows = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(3), dtype=DOUBLE))[0].mT
    weights = solution.weight_squares.sqrt()[:, None] * rows
    collapsed = (solution.feature_squares.sqrt()[:, None] * rows)[labels]
    matrix = within_class_shrinkage(weights, 0.01, 0.5)
    noise = sample(seed=5)[0] - sample(seed=6)[0]
    member = torch.eye(3, dtype=DOUBLE)[labels]
    noise = noise - member @ (member.mT @ noise / 5)
    drift = noise + member @ (1 + 0.5 * sample(3, seed=7)[0])
    errors = []
    for size in (0.02, 0.01):
        end = near_collapse(collapsed + size * drift, labels, 3, 0.05, 0.01, 0.5, 500)
        inside = end.features - member @ (member.mT @ end.features / 5)
        errors.append(torch.linalg.matrix_norm(inside - size * noise @ matrix).item())
    assert errors[0] < 0.02 * 0.02 * 50
    assert 3.7 < errors[0] / errors[1] < 4.3  # halve the distance: a quarter of the error


def test_near_collapse_in_a_fleet_and_in_float32():
    start, labels = sample()
    proximity, decay = decays(0.1, 1.0), decays(0.05, 0.2)
    together = vmap(lambda m, w: near_collapse(start, labels, 3, w, 0.01, m))(proximity, decay)
    matrices = vmap(lambda w, m: within_class_shrinkage(w, 0.01, m))(together.weights, proximity)
    flows = vmap(lambda w: central_path(start, labels, 3, w, 0.01))(decay)
    for member in range(2):
        alone = near_collapse(start, labels, 3, decay[member].item(), 0.01, proximity[member].item())
        for part, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(part[member], expected, rtol=1e-9, atol=1e-11)
        expected = within_class_shrinkage(alone.weights, 0.01, proximity[member].item())
        torch.testing.assert_close(matrices[member], expected, rtol=1e-9, atol=1e-11)
        expected = central_path(start, labels, 3, decay[member].item(), 0.01)
        torch.testing.assert_close(flows[member], expected, rtol=1e-10, atol=1e-12)
    single = near_collapse(start.float(), labels, 3, 0.05, 0.01, 0.1)
    assert single.features.dtype == torch.float32
    torch.testing.assert_close(single.features.double(), together.features[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_decay", [0.0, 0.01])
def test_along_the_central_path_classes_only_collapse(feature_decay):
    start, labels = sample()

    def best(features):  # W*(H) inside: the slope through it vanishes
        target = torch.eye(3, dtype=DOUBLE)[labels]
        square = features.mT @ features + 5 * 0.05 * torch.eye(8, dtype=DOUBLE)
        weights = torch.linalg.solve(square, features.mT @ target).mT
        return 15 * objective(weights, features, start, labels, 0.05, feature_decay, 0.0)

    flow = central_path(start, labels, 3, 0.05, feature_decay)
    torch.testing.assert_close(flow, -grad(best)(start), rtol=1e-9, atol=1e-12)
    features, ratios = start, []
    for step in range(600):
        if step % 30 == 0:
            ratios.append(collapse_measures(features, labels, torch.eye(3, 8, dtype=DOUBLE)).nc1_ratio.item())
        features = features + 0.02 * central_path(features, labels, 3, 0.05, feature_decay)
    assert all(later < earlier for earlier, later in pairwise(ratios))
    assert ratios[-1] < 0.97 * ratios[0]


def test_near_collapse_refuses_bad_input():
    start, labels = sample()
    bad = start.clone()
    bad[0, 0] = float("nan")
    fine: dict[str, Any] = dict(
        features=start, labels=labels, classes=3, weight_decay=0.1, feature_decay=0.1, proximity=0.1
    )
    for change, message in [
        ({"features": bad}, "features: expected finite"),
        ({"classes": 2}, "labels"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"feature_decay": -0.1}, "feature_decay: "),
        ({"proximity": -0.1}, "proximity: "),
        ({"feature_decay": 0.0, "proximity": 0.0}, "feature_decay \\+ proximity"),
        ({"iterations": 0}, "iterations"),
    ]:
        with pytest.raises(ValueError, match=message):
            near_collapse(**fine | change)
    with pytest.raises(ValueError, match="weight_decay"):
        central_path(start, labels, 3, 0.0, 0.1)
    with pytest.raises(ValueError, match="proximity: "):
        within_class_shrinkage(start, 0.1, -1.0)
