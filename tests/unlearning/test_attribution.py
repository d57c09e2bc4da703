"""Datamodels against scikit-learn and linear worlds, scores against closed forms and refits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge as SklearnRidge

from toolkit import random
from toolkit.fleet import Fleet, train
from toolkit.models import MLP
from toolkit.unlearning.attribution import (
    datamodels,
    influence_scores,
    lds,
    lds_ceiling,
    pick_by_component,
    random_subsets,
    trak,
)
from toolkit.unlearning.exact import ridge, ridge_delete

MODELS, EXAMPLES, POINTS = 80, 30, 4


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


def test_subsets_have_their_size():
    masks = random_subsets(200, 41, 0.5, seed=1)
    assert (masks.sum(1) == 20).all()
    assert torch.equal(random_subsets(10, 41, 0.5, seed=1), masks[:10])
    assert len(masks.unique(dim=0)) == 200
    assert (masks.double().mean(0) - 20 / 41).abs().max() < 4 * (0.25 / 200) ** 0.5
    for options, name in (((0, 9), "models"), ((3, 9, 0.01), "fraction"), ((3, 9, 0.99), "fraction")):
        with pytest.raises(ValueError, match=name):
            random_subsets(*options)


@pytest.mark.parametrize("models", [20, 30, 80])
def test_datamodels_are_scikit_learns_ridge_in_both_dimensions(models):
    masks, outputs = random_subsets(models, EXAMPLES, seed=2), 3 + normal(1, models, POINTS)
    fit = datamodels(masks, outputs, 0.7)
    peer = SklearnRidge(0.7, solver="svd").fit(masks.double().numpy(), outputs.numpy())
    torch.testing.assert_close(fit.weights, torch.from_numpy(peer.coef_), rtol=0, atol=1e-10)
    torch.testing.assert_close(fit.bias, torch.from_numpy(peer.intercept_), rtol=0, atol=1e-10)
    new = random_subsets(9, EXAMPLES, seed=3)
    expected = torch.from_numpy(peer.predict(new.double().numpy()))
    torch.testing.assert_close(fit.predict(new), expected, rtol=0, atol=1e-10)


def test_datamodels_recover_outputs_that_are_linear_in_membership():
    masks = random.uniform(random.key(3), (MODELS, EXAMPLES)) < 0.5
    truth = normal(5, POINTS, EXAMPLES)
    outputs = masks.double() @ truth.mT - 2
    fit = datamodels(masks, outputs, 1e-9)
    torch.testing.assert_close(fit.weights, truth, rtol=0, atol=1e-7)
    torch.testing.assert_close(fit.bias, torch.full((POINTS,), -2.0).double(), rtol=0, atol=1e-7)
    for arguments, name in (((masks[:1], outputs[:1], 1.0), "masks"), ((masks, outputs, 0.0), "penalty")):
        with pytest.raises(ValueError, match=name):
            datamodels(*arguments)
    with pytest.raises(ValueError, match="outputs"):
        datamodels(masks, outputs.log(), 1.0)


def test_lds_is_scipys_rank_correlation_with_ties():
    predicted, actual = normal(1, 25, POINTS), (2 * normal(2, 25, POINTS)).round()
    actual[:, 0] += 3 * predicted[:, 0]
    expected = [spearmanr(predicted[:, i], actual[:, i]).statistic for i in range(POINTS)]
    torch.testing.assert_close(lds(predicted, actual), torch.tensor(expected).double(), rtol=0, atol=1e-12)
    assert lds(predicted, predicted.exp()).tolist() == pytest.approx([1] * POINTS)
    assert lds(predicted, -predicted).tolist() == pytest.approx([-1] * POINTS)
    assert lds(predicted, torch.ones_like(actual)).isnan().all()
    with pytest.raises(ValueError, match="actual"):
        lds(predicted[:2], actual[:2])


@pytest.mark.parametrize(("noise", "seeds"), [(1.0, 2), (2.0, 4), (0.3, 3)])
def test_the_ceiling_is_the_lds_of_the_true_signal(noise, seeds):
    signal = normal(1, 300, 40)
    outputs = signal[:, None] + noise * normal(2, 300, seeds, 40)
    reached = lds(signal, outputs.mean(1))
    ceiling = lds_ceiling(outputs)
    gap = reached - ceiling
    assert gap.mean().abs() < 3 * gap.std() / math.sqrt(40)
    exact = 6 / math.pi * math.asin(0.5 / math.sqrt(1 + noise**2 / seeds))
    assert float(ceiling.mean()) == pytest.approx(exact, abs=0.01)


def test_the_ceiling_at_its_ends():
    steady = normal(1, 20, 1, POINTS).expand(20, 3, POINTS)
    torch.testing.assert_close(lds_ceiling(steady), torch.ones(POINTS).double())
    table = torch.tensor([[0.0, 2.0], [2.0, 0.0]])[..., None]  # equal means: nothing to predict
    assert lds_ceiling(table).tolist() == [0]
    table = torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 7.0]])[..., None]  # MS_w = 1/2, MS_b = 18
    assert lds_ceiling(table).item() == pytest.approx(6 / math.pi * math.asin(math.sqrt(1 - 1 / 36) / 2))
    for bad in (torch.zeros(1, 3, 2), torch.zeros(3, 1, 2)):
        with pytest.raises(ValueError, match="outputs"):
            lds_ceiling(bad)


def regression():
    return MLP(3, (), 1).double()


def squares(model, batch, hyper):
    return (model(batch.x)[:, 0] - batch.y).square() / 2


def prediction(model, batch, hyper):
    return model(batch.x)[:, 0]


X, Y, Q = normal(1, EXAMPLES, 3), normal(2, EXAMPLES), normal(3, POINTS, 3)
ONE = torch.ones(EXAMPLES, 1).double()


def ridge_fleet(penalty):
    """Two copies of the ridge model of (x, 1) as a fleet of linear nets."""
    model = ridge(torch.cat([X, ONE], 1), Y[:, None], penalty)
    return Fleet(regression, model.theta.mT.repeat(2, 1)), model


def test_exact_leave_one_out_is_influence_over_1_minus_the_leverage():
    fleet, model = ridge_fleet(0.5)
    assert torch.equal(Fleet.of([fleet[0]], regression).parameters, fleet.parameters[:1])
    scores = influence_scores(fleet, squares, prediction, {"x": X, "y": Y}, {"x": Q, "y": Q[:, 0]}, penalty=0.5)
    assert scores.shape == (2, POINTS, EXAMPLES)
    rows, queries = torch.cat([X, ONE], 1), torch.cat([Q, ONE[:POINTS]], 1)
    leverage = (rows @ model.inverse * rows).sum(1)
    for i in range(EXAMPLES):
        without = ridge_delete(model, rows[i : i + 1], Y[i : i + 1, None])
        included = (queries @ (model.theta - without.theta))[:, 0]  # with the example minus without it
        torch.testing.assert_close(scores[1, :, i] / (1 - leverage[i]), included, rtol=0, atol=1e-12)
    assert scores.abs().max() > 0.05


def test_datamodels_of_a_linear_learner_order_examples_as_influence_does():
    x = torch.cat([X, ONE], 1)
    masks = random_subsets(1500, EXAMPLES, 0.9, seed=4)
    queries = torch.cat([Q, ONE[:POINTS]], 1)
    outputs = torch.vmap(lambda mask: (queries @ ridge(x, Y[:, None], 2.0, mask.double()).theta)[:, 0])(masks)
    fit = datamodels(masks, outputs, 1e-3)
    fleet, _ = ridge_fleet(2.0)
    scores = influence_scores(fleet[:1], squares, prediction, {"x": X, "y": Y}, {"x": Q, "y": Q[:, 0]}, penalty=2.0)[0]
    agreement = lds(fit.weights.mT.contiguous(), scores.mT.contiguous())
    assert agreement.min() > 0.97
    held_out = random_subsets(100, EXAMPLES, 0.9, seed=5)
    actual = torch.vmap(lambda mask: (queries @ ridge(x, Y[:, None], 2.0, mask.double()).theta)[:, 0])(held_out)
    assert lds(fit.predict(held_out), actual).min() > 0.97


def _slope(value, parameters):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)])


def test_influence_of_a_small_net_is_autograds_formula_and_bad_input():
    def build():
        return MLP(3, (4,), 1).double()

    data = {"x": X, "y": Y}
    fleet = train(build, squares, data, members=2, steps=60, batch=16, progress=False, device="cpu")
    scores = influence_scores(fleet, squares, prediction, data, {"x": Q, "y": Q[:, 0]}, penalty=20.0)
    module = fleet[1]
    parameters = list(module.parameters())
    total = (module(X)[:, 0] - Y).square().sum() / 2
    slopes = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, parameters, create_graph=True)])
    rows = [torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True) for slope in slopes]
    curvature = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    curvature += 20 * torch.eye(len(curvature)).double()
    for q, i in ((0, 0), (3, 11)):
        one = torch.autograd.grad((module(X[i : i + 1])[0, 0] - Y[i]).square() / 2, parameters)
        out = torch.autograd.grad(module(Q[q : q + 1])[0, 0], parameters)
        left, right = (torch.cat([g.reshape(-1) for g in part]) for part in (out, one))
        torch.testing.assert_close(scores[1, q, i], -left @ torch.linalg.solve(curvature, right), rtol=1e-9, atol=1e-12)
    fisher = influence_scores(fleet, squares, prediction, data, {"x": Q, "y": Q[:, 0]}, penalty=0.3, curvature="fisher")
    given = torch.stack([_slope((module(X[i : i + 1])[0, 0] - Y[i]).square() / 2, parameters) for i in range(EXAMPLES)])
    wanted = torch.stack([_slope(module(Q[i : i + 1])[0, 0], parameters) for i in range(POINTS)])
    matrix = given.mT @ given + 0.3 * torch.eye(given.shape[1]).double()
    torch.testing.assert_close(fisher[1], -wanted @ torch.linalg.solve(matrix, given.mT), rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="penalty: expected one that makes"):
        influence_scores(fleet, lambda *a: -squares(*a), prediction, data, data)
    with pytest.raises(ValueError, match="penalty: expected a number"):
        influence_scores(fleet, squares, prediction, data, data, penalty=-1.0)
    with pytest.raises(ValueError, match="one value per example"):
        influence_scores(fleet, squares, lambda model, batch, hyper: model(batch.x), data, data, penalty=20.0)
    with pytest.raises(ValueError, match="queries"):
        influence_scores(fleet, squares, prediction, data, {"x": Q, "y": Y}, penalty=20.0)


class Binary(torch.nn.Module):
    """Logits (0, wᵀx): the margin of label 1 is wᵀx, of label 0 -wᵀx."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x):
        score = x @ self.w
        return torch.stack([torch.zeros_like(score), score], 1)


LABELS = (Y > 0).long()
BINARY: dict[str, Any] = {"data": {"x": X, "y": LABELS}, "queries": {"x": Q, "y": (Q[:, 0] > 0).long()}}


def test_trak_of_logistic_regression_is_its_closed_form():
    fleet = Fleet(Binary, normal(7, 3, 3))
    scores = trak(fleet, **BINARY, projections=None, penalty=0.2)
    signs, query_signs = 2 * LABELS - 1, 2 * BINARY["queries"]["y"] - 1
    affinity = Q @ torch.linalg.solve(X.mT @ X + 0.2 * torch.eye(3).double(), X.mT) * signs * query_signs[:, None]
    doubt = torch.sigmoid(-signs * (fleet.parameters @ X.mT)).mean(0)
    torch.testing.assert_close(scores, affinity * doubt, rtol=0, atol=1e-12)
    # Three dimensions, projected to three: the same space, so without a penalty the same scores for every member.
    exact = trak(fleet, **BINARY, projections=None)
    torch.testing.assert_close(trak(fleet, **BINARY, projections=3, seed=4), exact, rtol=0, atol=1e-9)


def test_trak_averages_members_before_it_multiplies_and_projections_approach_the_exact_scores():
    fleet = Fleet(Binary, normal(7, 3, 3))
    several = trak(fleet, **BINARY, projections=2)
    alone = torch.stack([trak(fleet[i : i + 1], **BINARY, projections=2) for i in range(3)])
    doubts = torch.sigmoid(-(2 * LABELS - 1) * (fleet.parameters @ X.mT))
    expected = (alone / doubts[:, None]).mean(0) * doubts.mean(0)
    torch.testing.assert_close(several, expected, rtol=1e-9, atol=1e-12)
    assert (several - alone.mean(0)).abs().max() > 1e-3
    assert torch.equal(trak(fleet, **BINARY, projections=2), several)
    assert not torch.allclose(trak(fleet, **BINARY, projections=2, seed=1), several)
    exact = trak(fleet[:1], **BINARY, projections=None, penalty=5.0)
    errors = [(trak(fleet[:1], **BINARY, projections=k, penalty=5.0) - exact).norm() / exact.norm() for k in (4, 4000)]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 3


def test_trak_and_influence_agree_on_who_helps_in_logistic_regression():
    def cross_entropy(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    def margin(model, batch, hyper):
        score = model(batch.x)
        return (2 * batch.y - 1) * (score[:, 1] - score[:, 0])

    fleet = train(Binary, cross_entropy, BINARY["data"], steps=400, batch=30, progress=False, device="cpu")
    scores = influence_scores(fleet, cross_entropy, margin, **BINARY)[0]
    agreement = lds(trak(fleet, **BINARY, projections=None).mT.contiguous(), scores.mT.contiguous())
    assert agreement.min() > 0.8  # TRAK's kernel has no weights p (1 - p)
    assert agreement.mean() > 0.93


def test_bad_trak():
    fleet = Fleet(Binary, normal(7, 1, 3))
    for options, name in (({"projections": 0}, "projections"), ({"penalty": -1.0}, "penalty")):
        with pytest.raises(ValueError, match=name):
            trak(fleet, **BINARY, **options)
    with pytest.raises(ValueError, match="regular"):
        trak(fleet, **BINARY, projections=64)


def test_pickers_take_the_ends_of_a_planted_direction():
    n = 40
    place = torch.linspace(-1, 1.2, n, dtype=torch.float64)[random.permutation(random.key(1), n)]
    second = normal(2, n)
    second = (
        second
        - second.mean()
        - (second @ (place - place.mean())) / (place - place.mean()).square().sum() * (place - place.mean())
    )
    directions = torch.linalg.qr(normal(3, n, 2)).Q
    weights = 5 * place[:, None] * directions[:, 0] + second[:, None] * directions[:, 1] + 7  # an offset of all rows
    order = (place - place.mean()).argsort(descending=True)
    ends = [set(order[:6].tolist()), set(order[-6:].tolist())]
    top = set(pick_by_component(weights, 0, 6).nonzero()[:, 0].tolist())
    bottom = set(pick_by_component(weights, 0, 6, "bottom").nonzero()[:, 0].tolist())
    assert top in ends
    assert bottom in ends
    assert top != bottom
    both = set(pick_by_component(weights, 0, 11, "both").nonzero()[:, 0].tolist())
    assert len(both) == 11
    assert len(both & top) == 6
    assert len(both & bottom) == 5
    extreme = int(second.abs().argmax())
    assert bool(pick_by_component(weights, 1, 1)[extreme])
    for arguments, name in (((40, 3), "component"), ((0, 0), "count"), ((0, 40), "count")):
        with pytest.raises(ValueError, match=name):
            pick_by_component(weights, *arguments)
