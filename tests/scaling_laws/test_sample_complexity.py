"""Both learners against scikit-learn, errors against closed forms and simulation, crossings against drawn curves."""

import math

import numpy as np
import pytest
import torch
from scipy.special import betainc
from scipy.stats import norm, poisson
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB

from toolkit import random
from toolkit.data import digits
from toolkit.scaling_laws.sample_complexity import (
    crossing,
    fit_logistic,
    fit_naive_bayes,
    gaussian_pair,
    linear_error,
    nested_samples,
    plug_in_error,
    samples_to_reach,
)

N, FEATURES, CLASSES = 90, 4, 3
X = random.normal(random.key(1), (N, FEATURES), torch.float64)
Y = (X @ random.normal(random.key(2), (FEATURES, CLASSES), torch.float64)).argmax(1)
X = X + 0.7 * random.normal(random.key(3), (N, FEATURES), torch.float64)
ONE = torch.ones(N, 1, dtype=torch.float64)
Z = torch.cat([X, ONE], 1)


def test_naive_bayes_is_bayes_rule_with_pooled_variances():
    theta = fit_naive_bayes(X, Y, CLASSES, smoothing=1e-12)
    peer = GaussianNB(var_smoothing=0).fit(X.numpy(), Y.numpy())
    shares = torch.from_numpy(peer.class_prior_)
    peer.var_ = np.tile((shares @ torch.from_numpy(peer.var_)).numpy(), (CLASSES, 1))
    expected = torch.from_numpy(peer.predict_proba(X.numpy()))
    torch.testing.assert_close((Z @ theta).softmax(1), expected, rtol=0, atol=1e-8)


def test_the_discriminant_with_a_known_variance_is_bayes_rule_by_hand():
    theta = fit_naive_bayes(X, Y, CLASSES, variance=0.7, smoothing=1e-12)
    logs = [Y.eq(c).double().mean().log() - (X - X[Y.eq(c)].mean(0)).square().sum(1) / 1.4 for c in range(CLASSES)]
    torch.testing.assert_close((Z @ theta).softmax(1), torch.stack(logs, 1).softmax(1), rtol=0, atol=1e-10)


def test_logistic_regression_is_at_its_optimum_and_is_scikit_learns():
    theta = fit_logistic(X, Y, CLASSES, 0.3)

    def cost(t):
        return torch.nn.functional.cross_entropy(Z @ t, Y, reduction="sum") + 0.15 * t.square().sum()

    assert torch.func.grad(cost)(theta).norm() < 1e-9
    peer = LogisticRegression(C=1 / 0.3, fit_intercept=False, tol=1e-12, max_iter=10_000)
    expected = torch.from_numpy(peer.fit(Z.numpy(), Y.numpy()).coef_.T)
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-5)


def test_logistic_regression_on_a_sample_that_can_be_separated():
    labels = (X[:, 0] > 0).long()
    for scale in (1.0, 100.0):
        theta = fit_logistic(scale * X, labels, 2, 1e-4, steps=60)
        p = (torch.cat([scale * X, ONE], 1) @ theta).softmax(1)
        gradient = torch.cat([scale * X, ONE], 1).T @ (p - torch.nn.functional.one_hot(labels, 2)) + 1e-4 * theta
        assert gradient.norm() < 1e-5


def test_samples_as_weights_under_vmap_are_refits():
    masks = nested_samples(Y, [12, 40], 2).flatten(0, 1)
    for fit in (fit_naive_bayes, fit_logistic):
        together = torch.vmap(lambda mask, fit=fit: fit(X, Y, CLASSES, weights=mask.double()))(masks)
        for theta, mask in zip(together, masks, strict=True):
            torch.testing.assert_close(theta, fit(X[mask], Y[mask], CLASSES), rtol=0, atol=1e-8)
    assert fit_logistic(X.float(), Y, CLASSES).dtype == torch.float32


def test_samples_are_nested_and_hold_every_class():
    masks = nested_samples(Y, [3, 10, 89], 50, seed=4)
    assert masks.shape == (3, 50, N)
    assert bool((masks.sum(2) == torch.tensor([[3], [10], [89]])).all())
    assert bool((masks[0] <= masks[1]).all())
    assert bool((masks[1] <= masks[2]).all())
    for sample in masks[0]:
        assert sorted(Y[sample].tolist()) == [0, 1, 2]
    assert len(masks[1].unique(dim=0)) == 50
    often = nested_samples(Y, [10], 4000)[0].double().mean(0)
    for c in range(CLASSES):
        assert often[Y.eq(c)].std() < 0.02
    assert torch.equal(masks[:, :7], nested_samples(Y, [3, 10, 89], 7, seed=4))


def test_the_sample_has_the_moments_that_it_says():
    x, y, mean, covariance = gaussian_pair(200_000, 8, 1.5, 5, 0.6)
    for c, sign in ((0, -1), (1, 1)):
        torch.testing.assert_close(x[y == c].mean(0), sign * mean, rtol=0, atol=0.02)
        torch.testing.assert_close(x[y == c].T.cov(), covariance, rtol=0, atol=0.02)
    assert (2 * mean).norm().item() == pytest.approx(1.5, abs=1e-12)
    assert covariance[0, 1] == -covariance[2, 3] == 0.6
    assert covariance[1, 2] == 0
    best = (2 * mean @ torch.linalg.solve(covariance, 2 * mean)).sqrt()
    assert best.item() == pytest.approx(1.5 / 0.8, abs=1e-12)


def test_the_error_of_a_rule_is_what_a_large_sample_shows_and_is_never_below_bayes():
    x, y, mean, covariance = gaussian_pair(400_000, 4, 1.5, 6, 0.5)
    for seed in range(3):
        theta = random.normal(random.key(seed), (5, 2), torch.float64)
        wrong = ((x @ theta[:-1] + theta[-1]).argmax(1) != y).double().mean()
        assert linear_error(theta, mean, covariance).item() == pytest.approx(wrong.item(), abs=0.003)
    slope = torch.linalg.solve(covariance, mean)
    best = torch.stack([torch.cat([-slope, slope[:1] * 0]), torch.cat([slope, slope[:1] * 0])], 1)
    assert linear_error(best, mean, covariance).item() == pytest.approx(norm.cdf(-0.75 / math.sqrt(0.75)), abs=1e-12)
    assert linear_error(torch.zeros(5, 2).double(), mean, covariance).item() == 0.5


@pytest.mark.parametrize(("distance", "dims", "per_class"), [(2.0, 1, 3), (2.0, 5, 4), (1.0, 20, 10), (3.0, 30, 2)])
def test_the_plug_in_error_is_that_of_fitted_rules(distance, dims, per_class):
    """Fitted with the toolkit's learner on many samples; each rule's error is exact."""
    x, y, mean, covariance = gaussian_pair(3000 * 2 * per_class, dims, distance, 7)

    def error(x, y):
        return linear_error(fit_naive_bayes(x, y, 2, variance=1.0), mean, covariance)

    errors = torch.vmap(error)(x.unflatten(0, (3000, -1)), y.unflatten(0, (3000, -1)))
    exact = plug_in_error(distance, dims, per_class)
    assert abs(errors.mean().item() - exact) < 4 * errors.std().item() / 3000**0.5
    assert exact > norm.cdf(-distance / 2)


def test_limits_of_the_plug_in_error():
    assert plug_in_error(2.0, 3, 10**6) == pytest.approx(norm.cdf(-1), abs=1e-5)
    assert plug_in_error(0.0, 3, 5) == pytest.approx(0.5, abs=1e-12)
    sizes = [plug_in_error(2.0, 30, m) for m in (1, 3, 10, 30, 100)]
    assert sizes == sorted(sizes, reverse=True)
    many = plug_in_error(2.0, 4000, 2000)  # the limit of many features: Φ(-Δ²/2 / √(Δ² + 2d/m))
    assert many == pytest.approx(norm.cdf(-2 / math.sqrt(4 + 4)), abs=1e-3)
    alpha, beta = 1 / math.sqrt(1 + 1 / 6), 2 * math.sqrt(1.5)
    line = norm.cdf(-alpha) * norm.cdf(beta) + norm.cdf(alpha) * norm.cdf(-beta)
    assert plug_in_error(2.0, 1, 3) == pytest.approx(line, abs=1e-10)


@pytest.mark.parametrize(("distance", "dims", "per_class"), [(2.0, 2, 3), (1.0, 7, 10), (4.0, 3, 300), (3.0, 200, 1)])
def test_the_plug_in_error_is_a_double_sum_over_noncentral_chi_squares(distance, dims, per_class):
    """Mixtures over Poisson numbers of degrees of freedom: Σ p_j q_k I_½(d/2 + j, d/2 + k)."""
    alpha, beta = distance / 2 / math.sqrt(1 + 0.5 / per_class), distance * math.sqrt(per_class / 2)
    j = np.arange(1500)
    p, q = poisson.pmf(j, (alpha + beta) ** 2 / 4), poisson.pmf(j, (alpha - beta) ** 2 / 4)
    expected = p @ betainc(dims / 2 + j[:, None], dims / 2 + j[None], 0.5) @ q
    assert plug_in_error(distance, dims, per_class) == pytest.approx(expected, abs=1e-11)


def test_crossings_and_sizes_by_hand():
    sizes = torch.tensor([1.0, 10.0, 100.0, 1000.0]).double()
    first, second = torch.tensor([4.0, 3.0, 2.0, 2.0]).double(), torch.tensor([6.0, 4.0, 1.0, 0.5]).double()
    assert crossing(sizes, first, second).item() == pytest.approx(10**1.5, rel=1e-12)
    assert crossing(sizes, second, first).isnan()
    back = torch.tensor([6.0, 2.0, 3.0, 0.0]).double()
    assert crossing(sizes, first, back).item() == pytest.approx(10 ** (2 + 1 / 3), rel=1e-12)
    assert samples_to_reach(sizes, second, 2.5).item() == pytest.approx(10**1.5, rel=1e-12)
    assert samples_to_reach(sizes, second, 7.0) == 1
    assert samples_to_reach(sizes, second, 0.4).isnan()
    assert samples_to_reach(sizes, back, 2.5).item() == pytest.approx(10 ** (2 + 1 / 6), rel=1e-12)
    rows = torch.stack([second, back])
    assert torch.vmap(lambda e: samples_to_reach(sizes, e, 2.5))(rows).shape == (2,)


def test_logistic_regression_ends_lower_where_features_depend():
    sizes = [16, 64, 1024]
    x, y, mean, covariance = gaussian_pair(2048, 16, 2.0, 8, 0.8)
    masks = nested_samples(y, sizes, 10).flatten(0, 1).double()

    def errors(fit):
        return torch.vmap(lambda mask: linear_error(fit(x, y, 2, weights=mask), mean, covariance))(masks)

    generative, discriminative = (errors(fit).view(3, 10) for fit in (fit_naive_bayes, fit_logistic))
    assert generative[2].mean() > discriminative[2].mean() + 0.05
    assert generative[2].mean().item() == pytest.approx(norm.cdf(-1), abs=0.01)
    assert discriminative[2].mean().item() == pytest.approx(norm.cdf(-1 / 0.6), abs=0.02)


def test_on_digits_logistic_regression_ends_lower():
    data = digits()
    x = torch.nn.functional.avg_pool2d(data.x.double(), 2).flatten(1)
    sizes = [10, 30, 1000]
    masks = nested_samples(data.y[:1200], sizes, 2).flatten(0, 1).double()

    def errors(fit):
        thetas = torch.vmap(lambda mask: fit(x[:1200], data.y[:1200], 10, weights=mask))(masks)
        wrong = (x[1200:] @ thetas[:, :-1] + thetas[:, -1:]).argmax(2) != data.y[1200:]
        return wrong.double().mean(1).view(3, 2).mean(1)

    generative, discriminative = errors(fit_naive_bayes), errors(fit_logistic)
    assert generative[2] > discriminative[2] + 0.03


def test_bad_input():
    for name, call in (
        ("y", lambda: fit_logistic(X, Y, 2)),
        ("y", lambda: fit_naive_bayes(X, Y, 2)),
        ("penalty", lambda: fit_logistic(X, Y, CLASSES, 0.0)),
        ("steps", lambda: fit_logistic(X, Y, CLASSES, steps=0)),
        ("variance", lambda: fit_naive_bayes(X, Y, CLASSES, variance=0.0)),
        ("smoothing", lambda: fit_naive_bayes(X, Y, CLASSES, smoothing=0.0)),
        ("distance", lambda: plug_in_error(-1.0, 3, 3)),
        ("dims", lambda: plug_in_error(1.0, 0, 3)),
        ("distance", lambda: gaussian_pair(5, 3, 0.0, 1)),
        ("correlation", lambda: gaussian_pair(5, 3, 1.0, 1, 1.0)),
        ("theta", lambda: linear_error(torch.zeros(4, 2), torch.zeros(4), torch.eye(4))),
        ("sizes", lambda: nested_samples(Y, [2], 3)),
        ("sizes", lambda: nested_samples(Y, [91], 3)),
        ("seeds", lambda: nested_samples(Y, [5], 0)),
        ("sizes", lambda: crossing(torch.ones(2), torch.ones(2), torch.ones(2))),
        ("sizes", lambda: samples_to_reach(torch.ones(1), torch.ones(1), 0.1)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
