"""Datamodel matching against learners whose outputs are sums over their training examples, and plain descent."""

from typing import Any

import pytest
import torch

from toolkit.fleet import SGD, Fleet
from toolkit.models import MLP
from toolkit.unlearning.approximate import oracle_matching
from toolkit.unlearning.attribution import Datamodels, datamodels, random_subsets
from toolkit.unlearning.matching import datamodel_matching, dm_direct

N, DIM, CLASSES = 12, 4, 3
G = torch.Generator().manual_seed(0)
X = torch.randn(N, DIM, dtype=torch.float64, generator=G)
Y = torch.arange(N) % CLASSES
DATA = {"x": X, "y": Y}
FORGET = torch.stack([Y == 1, torch.arange(N) < 3])


def net() -> MLP:
    return MLP(DIM, (5,), CLASSES).double()


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    torch.manual_seed(1)
    return Fleet.of([net() for _ in range(2)], net)


def retrained(mask: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Linear regression with a fixed second moment (I): θ = Σ_i x_i one_hot(y_i)ᵀ, plus a constant; sums over i."""
    theta = X[mask].mT @ torch.nn.functional.one_hot(Y[mask], CLASSES).double()
    return points @ theta + torch.arange(CLASSES)


def test_additive_outputs_are_predicted_exactly():
    """Test points that are not training examples, subsets that no regression saw, all logits apart."""
    points = torch.randn(7, DIM, dtype=torch.float64, generator=G)
    masks = random_subsets(60, N, seed=3)
    masks[::3] = ~masks[::3] | (torch.arange(N) < 2)  # sizes that differ, or the bias would not be identified
    outputs = torch.stack([retrained(mask, points) for mask in masks])
    fitted = datamodels(masks, outputs.flatten(1), 1e-10)
    whole = torch.stack([retrained(torch.ones(N, dtype=torch.bool), points) + shift for shift in (0.0, 2.0)])
    found = dm_direct(whole, fitted, FORGET)
    for member, shift in enumerate((0.0, 2.0)):  # a member's own offset stays: only the change is predicted
        expected = retrained(~FORGET[member], points) + shift
        assert (expected - whole[member]).abs().max() > 1
        torch.testing.assert_close(found[member], expected, rtol=1e-7, atol=1e-7)
    shared = dm_direct(whole, fitted, FORGET[0])
    torch.testing.assert_close(shared[0], found[0])
    torch.testing.assert_close(shared[1], found[0] + 2)
    alone = dm_direct(whole[0], fitted, FORGET)  # one model, two sets to forget
    torch.testing.assert_close(alone, torch.stack([found[0], found[1] - 2]))
    assert torch.equal(dm_direct(whole[0], fitted, FORGET[1]), alone[1])


def random_datamodels() -> Datamodels:
    g = torch.Generator().manual_seed(5)
    weights = torch.randn(N * CLASSES, N, dtype=torch.float64, generator=g) * 0.3
    return Datamodels(weights, torch.randn(N * CLASSES, dtype=torch.float64, generator=g))


def test_each_output_loses_the_weights_of_its_own_row():
    models, outputs = random_datamodels(), torch.randn(2, N, CLASSES, dtype=torch.float64, generator=G)
    found = dm_direct(outputs, models, FORGET)
    for member in range(2):
        for point in range(N):
            for k in range(CLASSES):
                change = sum(models.weights[point * CLASSES + k, i] for i in FORGET[member].nonzero()[:, 0])
                assert abs(found[member, point, k] - (outputs[member, point, k] - change)) < 1e-12


def test_matching_is_oracle_matching_towards_the_prediction(fleet):
    models = random_datamodels()
    targets = dm_direct(fleet.logits(X), models, FORGET)
    options: dict[str, Any] = {"steps": 6, "batch": 5, "seed": 2, "retain_weight": torch.tensor([0.5, 2.0])}
    found = datamodel_matching(fleet, DATA, FORGET, models, **options)
    assert torch.equal(found.parameters, oracle_matching(fleet, DATA, FORGET, targets, **options).parameters)
    given = datamodel_matching(fleet, DATA, FORGET, targets, **options)
    assert torch.equal(given.parameters, found.parameters)
    alone = datamodel_matching(fleet[[1]], DATA, FORGET[1], models, **{**options, "retain_weight": 2.0})
    torch.testing.assert_close(alone.parameters[0], found.parameters[1], rtol=1e-9, atol=1e-11)


def test_predictions_for_one_forget_set_serve_all_members(fleet):
    models = random_datamodels()
    wanted = models.predict(~FORGET[:1])[0].unflatten(0, (N, CLASSES))
    found = datamodel_matching(fleet, DATA, FORGET[0], wanted, steps=100, batch=32, optimiser=SGD(0.02, 0.9))
    before, after = ((f.logits(X) - wanted).square().sum(-1).mean(-1) for f in (fleet, found))
    assert (after < 0.5 * before).all()


def test_every_step_gets_nearer_to_the_targets(fleet):
    """Full batches: the objective mean_f + mean_r falls at each of 20 steps, for each member."""
    models = random_datamodels()
    found = datamodel_matching(
        fleet, DATA, FORGET, models, steps=20, batch=72, optimiser=SGD(0.01), snapshots=tuple(range(21))
    )
    targets = dm_direct(fleet.logits(X), models, FORGET)
    distances = []
    for step in range(21):
        apart = (found.at(step).logits(X) - targets).square().sum(-1)
        distances.append((apart * FORGET).sum(1) / FORGET.sum(1) + (apart * ~FORGET).sum(1) / (~FORGET).sum(1))
    fall = torch.stack(distances).diff(dim=0)
    assert (fall < 0).all()
    assert (distances[-1] < 0.8 * distances[0]).all()


def test_bad_input(fleet):
    models, outputs = random_datamodels(), fleet.logits(X)
    with pytest.raises(ValueError, match="datamodels: expected 12 points times 3"):
        dm_direct(outputs, Datamodels(models.weights[:-1], models.bias[:-1]), FORGET)
    with pytest.raises(ValueError, match="forget: expected a mask over the 12"):
        dm_direct(outputs, models, FORGET[:, :-1])
    with pytest.raises(ValueError, match="forget: expected at least one example"):
        dm_direct(outputs, models, torch.zeros(N, dtype=torch.bool))
    with pytest.raises(ValueError, match="forget: expected some of the 12 examples"):
        datamodel_matching(fleet, DATA, torch.ones(N, dtype=torch.bool), models)
    with pytest.raises(ValueError, match="targets: expected"):
        datamodel_matching(fleet, DATA, FORGET, outputs[:, :-1])
