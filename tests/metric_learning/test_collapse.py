"""Closed forms of neural collapse against LBFGS on real nets, grids, naive alternation and integrated flows."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap

from toolkit.fleet.engine import train
from toolkit.fleet.optimisers import Adam
from toolkit.metric_learning.collapse import (
    DeepLinear,
    central_path,
    collapsed_solution,
    near_collapse,
    regularised_error,
    within_class_shrinkage,
)
from toolkit.metric_learning.geometry import collapse_measures

DOUBLE = torch.float64


def decays(*values):
    return torch.tensor(values, dtype=DOUBLE)


def fit(model, labels, weight_decay, feature_decay):
    """The minimum that LBFGS finds, in float64: (loss, logits)."""
    model.double()
    x = torch.arange(len(labels))
    search = torch.optim.LBFGS(
        model.parameters(), max_iter=4000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        parameters = dict(model.named_parameters())
        return regularised_error(model(x), labels, parameters, weight_decay, feature_decay).mean()

    def closure():
        search.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    search.step(closure)
    return objective().detach(), model(x).detach()


def sample(items=15, classes=3, dim=8, seed=0, sizes=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(items) % classes if sizes is None else torch.arange(classes).repeat_interleave(sizes)
    centres = torch.randn(classes, dim, generator=generator, dtype=DOUBLE)
    return centres[labels] + 0.7 * torch.randn(len(labels), dim, generator=generator, dtype=DOUBLE), labels


# ---------------------------------------------------------------------- the closed form


def test_one_layer_by_hand():
    solution = collapsed_solution(torch.tensor([16, 4]), decays(0.02), 0.02)  # N √(l l / n) = 0.4 / √n
    torch.testing.assert_close(solution.predictions, decays(0.9, 0.8))
    torch.testing.assert_close(solution.weight_squares, decays(0.9 * 4, 0.8 * 2))
    torch.testing.assert_close(solution.feature_squares, decays(0.9 / 4, 0.8 / 2))
    # Σ n/2N (1-a)² + a √(n l l)
    torch.testing.assert_close(solution.loss.item(), 16 / 40 * 0.01 + 4 / 40 * 0.04 + 0.9 * 0.08 + 0.8 * 0.04)


def test_small_classes_are_lost_at_n_equal_to_the_square_of_n_times_the_decays():
    counts = torch.tensor([89, 9, 2])
    for factor, kept in ((0.99, [True, True, True]), (1.01, [True, True, False])):
        decay = factor * math.sqrt(2) / 100  # 2 = N² l²
        solution = collapsed_solution(counts, decays(decay), decay)
        assert (solution.predictions > 0).tolist() == kept
    assert solution.feature_squares[2] == solution.weight_squares[2] == 0
    torch.testing.assert_close(solution.predictions[:2], 1 - 100 * decay / counts[:2].double().sqrt())


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 9])
def test_the_predictions_are_the_best_of_a_grid(layers):
    generator = torch.Generator().manual_seed(layers)
    a = torch.linspace(0, 1, 200001, dtype=DOUBLE)
    jumps = 0
    for _ in range(6):
        counts = torch.randint(1, 30, (5,), generator=generator).double()
        weight = 10 ** (
            (-3.5 if layers > 3 else -2.5 if layers > 1 else -1.5)
            + 2.2 * torch.rand(layers, generator=generator, dtype=DOUBLE)
        )
        feature = (10 ** (-4 + 2.2 * torch.rand((), generator=generator, dtype=DOUBLE))).item()
        solution, total = collapsed_solution(counts, weight, feature), counts.sum()
        cost = (counts * feature * weight.prod()) ** (1 / (layers + 1))
        error, price = counts[:, None] / (2 * total) * (a - 1) ** 2, cost[:, None] * a ** (2 / (layers + 1))
        values = error + (layers + 1) / 2 * price
        best, where = values.min(-1)
        torch.testing.assert_close(solution.predictions, a[where], rtol=0, atol=1e-5)
        torch.testing.assert_close(solution.loss, best.sum(), rtol=1e-8, atol=1e-10)
        jumps += int((where == 0).sum())
        share = counts * feature * solution.feature_squares
        torch.testing.assert_close(weight[:, None] * solution.layer_squares, share.expand(layers, 5))
        torch.testing.assert_close(solution.weight_squares * solution.feature_squares, solution.predictions**2)
    assert 0 < jumps < 30


@pytest.mark.parametrize("layers", [2, 4])
def test_deep_nets_lose_a_class_at_once_from_m_minus_one_over_m(layers):
    top = (layers - 1) / layers
    strength = top ** ((layers - 1) / (layers + 1)) / layers
    edge = [strength * (1 - 1e-9), strength * (1 + 1e-9)]  # with n = N = 1 and equal decays l, c N / n is l
    kept, lost = (collapsed_solution(torch.ones(1), torch.full((layers,), d, dtype=DOUBLE), d) for d in edge)
    assert abs(kept.predictions - top) < 1e-7
    assert lost.predictions == 0
    torch.testing.assert_close(kept.loss, lost.loss, rtol=1e-7, atol=0)  # two minima, one value


def test_one_layer_on_classes_of_three_sizes_is_what_lbfgs_finds():
    labels = torch.arange(3).repeat_interleave(torch.tensor([20, 8, 3]))
    torch.manual_seed(0)
    model = DeepLinear(31, 3, 5)
    loss, logits = fit(model, labels, 0.005, 0.005)
    solution = collapsed_solution(torch.tensor([20, 8, 3]), decays(0.005), 0.005)
    torch.testing.assert_close(loss, solution.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits, torch.diag(solution.predictions)[labels], rtol=0, atol=1e-5)
    weights, features = model.head.weight.detach(), model.features.detach()
    torch.testing.assert_close(weights @ weights.mT, torch.diag(solution.weight_squares), rtol=1e-5, atol=1e-5)
    squares = torch.diag(solution.feature_squares)[labels][:, labels]
    torch.testing.assert_close(features @ features.mT, squares, rtol=1e-5, atol=1e-5)
    target = torch.stack([solution.feature_squares, solution.weight_squares])
    measures = collapse_measures(features, labels, weights, target=target)
    assert max(measures.nc1, measures.nc2, measures.nc2_weights, measures.nc3_product, measures.nc4) < 1e-4


def test_three_layers_are_what_lbfgs_finds():
    labels = torch.arange(3).repeat_interleave(10)
    torch.manual_seed(1)
    model = DeepLinear(30, 3, 5, layers=3)
    loss, logits = fit(model, labels, decays(1e-3, 2e-3, 0.5e-3), 1e-3)  # as all 1e-3: the product counts
    solution = collapsed_solution(torch.full((3,), 10), decays(1e-3, 2e-3, 0.5e-3), 1e-3)
    torch.testing.assert_close(solution.predictions, decays(*3 * [0.994651]), rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.loss / 3, torch.tensor(0.00355180, dtype=DOUBLE), rtol=2e-6, atol=0)
    torch.testing.assert_close(loss, solution.loss, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(logits, torch.diag(solution.predictions)[labels], rtol=0, atol=1e-4)
    for layer, squares in zip([*model.layers, model.head], solution.layer_squares, strict=True):
        values = torch.linalg.svdvals(layer.weight.detach())
        torch.testing.assert_close(values[:3] ** 2, squares, rtol=1e-4, atol=1e-5)
        assert values[3:].abs().sum() < 1e-4


def test_with_a_bias_the_means_are_a_simplex():
    labels = torch.arange(4).repeat_interleave(5)
    torch.manual_seed(2)
    model = DeepLinear(20, 4, 6, bias=True)
    _, logits = fit(model, labels, 0.004, 0.004)
    a = collapsed_solution(torch.full((4,), 5), decays(0.004), 0.004).predictions[0]
    expected = 1 / 4 + a * (torch.eye(4, dtype=DOUBLE) - 1 / 4)
    torch.testing.assert_close(logits, expected[labels], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.head.bias.detach(), torch.full((4,), 0.25, dtype=DOUBLE), rtol=0, atol=1e-5)
    measures = collapse_measures(model.features.detach(), labels, model.head.weight.detach(), model.head.bias.detach())
    assert max(measures.nc1, measures.nc2, measures.nc2_weights, measures.nc3) < 1e-4


@pytest.mark.parametrize("layers", [1, 3])
def test_the_closed_form_in_a_fleet_and_its_slope(layers):
    counts = torch.tensor([20, 8, 3])
    weight = torch.stack([torch.full((layers,), value, dtype=DOUBLE) for value in (1e-3, 4e-2)])
    feature = decays(2e-3, 9e-2)
    together = vmap(lambda w, f: collapsed_solution(counts, w, f))(weight, feature)
    slopes = vmap(grad(lambda w, f: collapsed_solution(counts, w, f).loss, argnums=(0, 1)))(weight, feature)
    assert (together.predictions[1] == 0).any()
    for member in range(2):
        alone = collapsed_solution(counts, weight[member], feature[member].item())
        for part, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(part[member], expected, rtol=1e-12, atol=1e-14)
        # d loss / d decay is half the squared norm that the decay multiplies
        torch.testing.assert_close(slopes[0][member], alone.layer_squares.sum(-1) / 2, rtol=1e-9, atol=1e-12)
        expected = (counts * alone.feature_squares).sum() / 2
        torch.testing.assert_close(slopes[1][member], expected, rtol=1e-9, atol=1e-12)
    single = collapsed_solution(counts, weight[0].float(), 2e-3)
    assert single.predictions.dtype == torch.float32
    torch.testing.assert_close(single.predictions.double(), together.predictions[0], rtol=1e-5, atol=1e-6)


def test_closed_form_refuses_what_has_no_minimum():
    for arguments, message in [
        ((torch.tensor([3, 0]), decays(0.1), 0.1), "counts"),
        ((torch.tensor([3, 1]), decays(0.1, 0.0), 0.1), "weight_decays"),
        ((torch.tensor([3, 1]), decays(0.1), 0.0), "feature_decay"),
        ((torch.tensor([3, 1]), decays(), 0.1), "weight_decays: expected one value per layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            collapsed_solution(*arguments)


# ---------------------------------------------------------------------- the net


def test_the_net_by_index_and_by_one_hot_row():
    model = DeepLinear(6, 3, 4, layers=3, bias=True)
    x = torch.tensor([4, 0, 4])
    logits, features = model(x, return_features=True)
    torch.testing.assert_close(model.head(features), logits)
    hidden = model.layers[1](model.layers[0](model.features[4]))
    torch.testing.assert_close(logits[0], model.head.weight @ hidden + model.head.bias)
    torch.testing.assert_close(model(torch.eye(6)[x]), logits)
    assert [name for name, _ in model.named_parameters()] == [
        "features",
        "layers.0.weight",
        "layers.1.weight",
        "head.weight",
        "head.bias",
    ]
    for bad in (torch.zeros(3, 5), torch.zeros(3), torch.zeros(2, 6, 1)):
        with pytest.raises(ValueError, match="x: expected indices"):
            model(bad)
    with pytest.raises(ValueError, match="layers: expected a whole number of at least 1, got 0"):
        DeepLinear(6, 3, 4, layers=0)


def test_the_objective_is_the_error_and_a_decay_for_each_layer():
    model = DeepLinear(3, 2, 2, layers=2)
    weights = [[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]]]
    parameters = {
        "features": torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]]),
        "layers.0.weight": torch.tensor(weights[0]),
        "head.weight": torch.tensor(weights[1]),
    }
    logits = functional_call(model, parameters, (torch.arange(3),))
    labels = torch.tensor([0, 0, 1])
    values = regularised_error(logits, labels, parameters, torch.tensor([0.1, 0.2]), 0.4)
    penalty = (0.1 * 5 + 0.2 * 10 + 0.4 * 1.25) / 2
    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, 2.0]) + penalty)
    torch.testing.assert_close(
        regularised_error(logits, labels, parameters, 0.1, 0.4),
        regularised_error(logits, labels, parameters, torch.tensor([0.1, 0.1]), 0.4),
    )
    with pytest.raises(ValueError, match="weight_decay: expected one value or 2, got 3"):
        regularised_error(logits, labels, parameters, torch.ones(3), 0.4)
    with pytest.raises(ValueError, match="labels"):
        regularised_error(logits, labels + 1, parameters, 0.1, 0.4)


def test_a_fleet_trains_to_the_closed_form():
    labels = torch.arange(3).repeat_interleave(torch.tensor([8, 3, 1]))
    decay = torch.tensor([0.01, 0.05])

    def loss(model, batch, hyper):
        return regularised_error(model(batch.x), batch.y, model.parameters, hyper.decay, hyper.decay)

    fleet = train(
        lambda: DeepLinear(12, 3, 4),
        loss,
        {"x": torch.arange(12), "y": labels},
        steps=600,
        batch=12,
        optimiser=Adam(lr=0.03),
        hyper={"decay": decay},
        device="cpu",
        progress=False,
    )
    logits = fleet.logits(torch.arange(12))
    predictions = [collapsed_solution(torch.tensor([8, 3, 1]), d[None], d).predictions for d in decay]
    assert predictions[0].min() > 0.8
    for member in range(2):
        expected = torch.diag(predictions[member])[labels]
        torch.testing.assert_close(logits[member], expected, rtol=0, atol=0.02)


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
