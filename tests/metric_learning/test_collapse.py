"""Closed forms of neural collapse against LBFGS on real nets and grids."""

import math

import pytest
import torch
from torch.func import functional_call, grad, vmap

from toolkit.fleet.engine import train
from toolkit.fleet.optimisers import Adam
from toolkit.metric_learning.collapse import (
    DeepLinear,
    collapsed_solution,
    regularised_error,
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
