"""Retraining against data that cannot be read; ridge and logistic regression against refits, loops and scikit-learn."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge

from toolkit import random
from toolkit.fleet import Adam, train
from toolkit.models import MLP
from toolkit.unlearning.exact import (
    Ridge,
    logistic,
    logistic_gradient_norm,
    newton_unlearn,
    retrain,
    ridge,
    ridge_delete,
)
from toolkit.unlearning.settings import forget_random

N, FEATURES, CLASSES, PENALTY = 60, 5, 3, 0.3
X = random.normal(random.key(1), (N, FEATURES), torch.float64)
Y = X @ random.normal(random.key(2), (FEATURES, 2), torch.float64) + random.normal(random.key(3), (N, 2), torch.float64)
LABELS = (Y @ random.normal(random.key(4), (2, CLASSES), torch.float64)).argmax(1)
FORGET = forget_random(N, 9)
KEEP = (~FORGET).double()


def build():
    return MLP(FEATURES, (6,), CLASSES).double()


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


FIT: dict[str, Any] = {
    "steps": 20,
    "batch": 8,
    "optimiser": Adam(lr=1e-2, weight_decay=1e-3),
    "progress": False,
    "device": "cpu",
}


def test_the_oracle_never_reads_the_forget_set():
    """Bit-identical to a run in which those examples are not a number, and to the plain call with subsets."""
    data = {"x": X, "y": LABELS}
    oracle = retrain(build, cross_entropy, data, FORGET, members=3, **FIT)
    blind = {"x": torch.where(FORGET[:, None], float("nan"), X), "y": LABELS}
    assert torch.equal(retrain(build, cross_entropy, blind, FORGET, members=3, **FIT).parameters, oracle.parameters)
    plain = train(build, cross_entropy, data, subsets=(~FORGET).expand(3, N), **FIT)
    assert torch.equal(oracle.parameters, plain.parameters)
    assert oracle.parameters.isfinite().all()
    original = train(build, cross_entropy, blind, members=3, **FIT | {"steps": 0})
    assert not torch.equal(original.parameters, oracle.parameters)


def test_each_member_has_its_own_forget_set_within_its_own_subset():
    masks, subsets = forget_random(N, 20, members=4, seed=5), ~forget_random(N, 10, members=4, seed=6)
    data = {"x": X, "y": LABELS}
    fleet = retrain(build, cross_entropy, data, masks, subsets=subsets, **FIT)
    plain = train(build, cross_entropy, data, subsets=subsets & ~masks, **FIT)
    assert torch.equal(fleet.parameters, plain.parameters)
    shared = retrain(build, cross_entropy, data, FORGET, subsets=subsets, **FIT)
    assert torch.equal(
        shared.parameters, train(build, cross_entropy, data, subsets=subsets & ~FORGET, **FIT).parameters
    )
    assert len(retrain(build, cross_entropy, data, FORGET, streams=torch.tensor([4, 7]), **FIT)) == 2
    rates = FIT | {"optimiser": Adam(lr=torch.tensor([1e-2, 1e-3, 0.0]))}
    assert len(retrain(build, cross_entropy, data, FORGET, **rates)) == 3


def test_bad_retraining():
    data = {"x": X, "y": LABELS}
    with pytest.raises(ValueError, match="forget"):
        retrain(build, cross_entropy, data, torch.zeros(N, dtype=torch.bool), **FIT)
    with pytest.raises(ValueError, match="forget"):
        retrain(build, cross_entropy, data, FORGET[1:], **FIT)
    original = train(build, cross_entropy, data, **FIT)
    with pytest.raises(ValueError, match="start"):
        retrain(build, cross_entropy, data, FORGET, start=original, **FIT)
    with pytest.raises(ValueError, match="references"):
        retrain(build, cross_entropy, data, FORGET, references={"original": original}, **FIT)
    with pytest.raises(ValueError, match="subsets"):
        retrain(build, cross_entropy, data, FORGET, subsets=FORGET[None], **FIT)


def test_ridge_is_scikit_learns():
    model = ridge(X, Y, PENALTY)
    expected = torch.from_numpy(SklearnRidge(PENALTY, fit_intercept=False).fit(X.numpy(), Y.numpy()).coef_.T)
    torch.testing.assert_close(model.theta, expected, rtol=0, atol=1e-12)
    weights = random.uniform(random.key(8), (N,), torch.float64)
    peer = SklearnRidge(PENALTY, fit_intercept=False).fit(X.numpy(), Y.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close(ridge(X, Y, PENALTY, weights).theta, torch.from_numpy(peer.coef_.T), rtol=0, atol=1e-12)


def test_deletion_is_the_refit_to_1e_10():
    model = ridge(X, Y, PENALTY)
    deleted, refit = ridge_delete(model, X[FORGET], Y[FORGET]), ridge(X[~FORGET], Y[~FORGET], PENALTY)
    assert (model.theta - refit.theta).abs().max() > 1e-2
    torch.testing.assert_close(tuple(deleted), tuple(refit), rtol=0, atol=1e-10)
    torch.testing.assert_close(tuple(ridge(X, Y, PENALTY, KEEP)), tuple(refit), rtol=0, atol=1e-12)
    one_by_one = model
    for i in FORGET.nonzero().flatten().tolist():
        one_by_one = ridge_delete(one_by_one, X[i : i + 1], Y[i : i + 1])
    torch.testing.assert_close(tuple(one_by_one), tuple(refit), rtol=0, atol=1e-10)


def test_deletion_is_one_newton_step_on_the_retained_examples():
    """By autograd: on a quadratic the step has no error."""

    def cost(theta):
        return (Y[~FORGET] - X[~FORGET] @ theta).square().sum() / 2 + PENALTY / 2 * theta.square().sum()

    model = ridge(X, Y, PENALTY)
    curvature = torch.func.hessian(cost)(model.theta).reshape(2 * FEATURES, -1)
    step = torch.linalg.solve(curvature, torch.func.grad(cost)(model.theta).reshape(-1)).view(FEATURES, 2)
    deleted = ridge_delete(model, X[FORGET], Y[FORGET])
    torch.testing.assert_close(deleted.theta, model.theta - step, rtol=0, atol=1e-12)


def test_deletion_where_there_are_fewer_examples_than_features_and_of_everything():
    x, y = X[:4], Y[:4]
    rest = ridge_delete(ridge(x, y, PENALTY), x[:3], y[:3])
    torch.testing.assert_close(tuple(rest), tuple(ridge(x[3:], y[3:], PENALTY)), rtol=0, atol=1e-10)
    nothing = ridge_delete(rest, x[3:], y[3:])
    torch.testing.assert_close(nothing.theta, torch.zeros(FEATURES, 2).double(), rtol=0, atol=1e-10)


def test_the_residual_of_an_example_that_is_left_out_is_e_over_1_minus_h():
    model = ridge(X, Y, PENALTY)
    leverage = (X @ model.inverse * X).sum(1)
    for i in (0, 17):
        without = ridge_delete(model, X[i : i + 1], Y[i : i + 1])
        expected = (Y[i] - X[i] @ model.theta) / (1 - leverage[i])
        torch.testing.assert_close(Y[i] - X[i] @ without.theta, expected, rtol=0, atol=1e-12)


def test_a_fleet_of_deletions_under_vmap_is_the_loop():
    masks = forget_random(N, 6, members=5, seed=2)
    fleet = torch.vmap(lambda mask: ridge(X, Y, PENALTY, (~mask).double()).theta)(masks)
    model = ridge(X, Y, PENALTY)
    chosen = masks.nonzero()[:, 1].view(5, 6)
    deleted = torch.vmap(lambda x, y: tuple(ridge_delete(model, x, y)))(X[chosen], Y[chosen])
    torch.testing.assert_close(Ridge(*deleted).theta, fleet, rtol=0, atol=1e-10)


def objective(theta, x, y):
    return F.cross_entropy(x @ theta, y, reduction="sum") + PENALTY / 2 * theta.square().sum()


def test_logistic_regression_is_at_an_optimum_by_autograd_and_is_scikit_learns():
    theta = logistic(X, LABELS, CLASSES, PENALTY)
    gradient = torch.func.grad(objective)(theta, X, LABELS)
    assert gradient.norm() < 1e-10
    torch.testing.assert_close(logistic_gradient_norm(theta, X, LABELS, PENALTY), gradient.norm(), rtol=0, atol=1e-12)
    somewhere = random.normal(random.key(9), (FEATURES, CLASSES), torch.float64)
    norm = torch.func.grad(objective)(somewhere, X, LABELS).norm()
    torch.testing.assert_close(logistic_gradient_norm(somewhere, X, LABELS, PENALTY), norm)
    peer = LogisticRegression(C=1 / PENALTY, fit_intercept=False, tol=1e-12, max_iter=10_000)
    expected = torch.from_numpy(peer.fit(X.numpy(), LABELS.numpy()).coef_.T)
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-5)


def test_logistic_regression_converges_on_separable_data_of_great_length():
    """Full Newton steps from 0 overshoot here: the step length matters."""
    labels = (X[:, 0] > 0).long()
    for scale, penalty in ((100.0, 1e-3), (1.0, 1e-6)):
        theta = logistic(scale * X, labels, 2, penalty, steps=100)
        assert logistic_gradient_norm(theta, scale * X, labels, penalty) < 1e-8


def test_newton_unlearning_reaches_the_retrained_optimum_quadratically_with_its_certificate():
    original = logistic(X, LABELS, CLASSES, PENALTY)
    retrained = logistic(X[~FORGET], LABELS[~FORGET], CLASSES, PENALTY)
    torch.testing.assert_close(logistic(X, LABELS, CLASSES, PENALTY, KEEP), retrained, rtol=0, atol=1e-12)
    before = (original - retrained).norm()
    assert before > 0.05
    errors = []
    for steps in (1, 2, 3, 4, 6):
        theta = newton_unlearn(original, X, LABELS, PENALTY, FORGET, steps)
        errors.append((theta - retrained).norm())
        bound = logistic_gradient_norm(theta, X, LABELS, PENALTY, KEEP) / PENALTY
        assert errors[-1] <= bound + 1e-12
        assert bound < 200 * errors[-1] + 1e-12
    assert errors[0] < before / 3
    assert errors[1] < errors[0] ** 2
    assert errors[2] < errors[1] ** 2 * 2
    assert errors[-1] < 1e-10


def test_one_newton_step_is_autograds():
    original = logistic(X, LABELS, CLASSES, PENALTY)
    x, y = X[~FORGET], LABELS[~FORGET]
    hessian = torch.func.hessian(objective)(original, x, y).reshape(15, 15)
    gradient = torch.func.grad(objective)(original, x, y)
    expected = original - torch.linalg.solve(hessian, gradient.reshape(-1)).view(5, 3)
    torch.testing.assert_close(newton_unlearn(original, X, LABELS, PENALTY, FORGET), expected, rtol=0, atol=1e-12)
    forgotten = torch.func.grad(lambda t: F.cross_entropy(X[FORGET] @ t, LABELS[FORGET], reduction="sum"))(original)
    torch.testing.assert_close(gradient, -forgotten, rtol=0, atol=1e-9)  # at the original optimum


def test_a_fleet_of_logistic_regressions_under_vmap_is_the_loop():
    masks = forget_random(N, 8, members=3, seed=1)
    fleet = torch.vmap(lambda mask: logistic(X, LABELS, CLASSES, PENALTY, (~mask).double(), 15))(masks)
    original = logistic(X, LABELS, CLASSES, PENALTY)
    newton = torch.vmap(lambda mask: newton_unlearn(original, X, LABELS, PENALTY, mask, 6))(masks)
    for i, mask in enumerate(masks):
        alone = logistic(X[~mask], LABELS[~mask], CLASSES, PENALTY)
        torch.testing.assert_close(fleet[i], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(newton[i], alone, rtol=0, atol=1e-10)


def test_single_precision_and_bad_input():
    theta = logistic(X.float(), LABELS, CLASSES, PENALTY)
    assert theta.dtype == torch.float32
    torch.testing.assert_close(theta.double(), logistic(X, LABELS, CLASSES, PENALTY), rtol=0, atol=1e-5)
    for call in (
        lambda: ridge(X, Y, 0.0),
        lambda: logistic(X, LABELS, CLASSES, -1.0),
        lambda: newton_unlearn(theta.double(), X, LABELS, 0.0, FORGET),
        lambda: logistic_gradient_norm(theta.double(), X, LABELS, 0.0),
    ):
        with pytest.raises(ValueError, match="penalty"):
            call()
    with pytest.raises(ValueError, match="y: expected class"):
        logistic(X, LABELS, 2, PENALTY)
    with pytest.raises(ValueError, match="steps"):
        logistic(X, LABELS, CLASSES, PENALTY, steps=0)
    with pytest.raises(ValueError, match="steps"):
        newton_unlearn(theta.double(), X, LABELS, PENALTY, FORGET, 0)
    with pytest.raises(ValueError, match="forget"):
        newton_unlearn(theta.double(), X, LABELS, PENALTY, ~FORGET | FORGET)
