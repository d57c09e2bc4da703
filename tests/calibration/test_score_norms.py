from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from toolkit import random
from toolkit.calibration.mixture_density import fit_mixture, mixture_log_density
from toolkit.calibration.score_norms import (
    data_score,
    learnt_score,
    mixture_novelty,
    neighbour_novelty,
    noise_scales,
    score_matching_loss,
    score_norm_features,
)
from toolkit.diffusion import Mixture, ScoreNet
from toolkit.fleet import Adam, Fleet, cosine, train
from toolkit.models import MLP

DOUBLE = torch.float64
SIGMAS = torch.tensor([2.0, 0.7, 0.1], dtype=DOUBLE)


def points(n, dim, seed=0):
    return random.normal(random.key(seed), (n, dim), DOUBLE)


def test_scales_fall_by_one_ratio():
    np.testing.assert_allclose(noise_scales(), np.geomspace(1.0, 0.01, 10), rtol=1e-6)
    np.testing.assert_allclose(noise_scales(3, 8.0, 0.5), [8, 2, 0.5], rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_data_score_is_the_gradient_of_the_noised_log_density(sigma):
    data, x = points(12, 3) + 4, points(7, 3, seed=1) + 4
    score = data_score(x, data, sigma)

    def log_density(one):
        return torch.logsumexp(-(one - data).square().sum(1) / (2 * sigma**2), 0)

    torch.testing.assert_close(score, torch.func.vmap(torch.func.grad(log_density))(x))
    weights = torch.full((12,), 1 / 12, dtype=DOUBLE)
    mixture = Mixture(data, torch.full_like(weights, sigma), weights, torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close(score, mixture.score(x))


@pytest.mark.parametrize("sigma", [0.05, 0.8])
def test_leaving_one_out_is_scoring_each_point_among_the_others(sigma):
    data = points(9, 4)
    others = [data_score(data[i : i + 1], data[torch.arange(9) != i], sigma)[0] for i in range(9)]
    torch.testing.assert_close(data_score(data, data, sigma, leave_one_out=True), torch.stack(others))
    # A point among the data is its own nearest neighbour: at a small scale, nothing pulls it away.
    assert data_score(data, data, 0.05).norm(dim=1).max() < 1e-6
    assert data_score(data, data, 0.05, leave_one_out=True).norm(dim=1).min() > 100


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_features_of_one_known_point_are_distances_over_sigma(dtype):
    x, only = points(5, 6).to(dtype) + 100, points(1, 6, seed=1).to(dtype) + 100
    features = score_norm_features(lambda q, sigma: data_score(q, only, sigma), x, SIGMAS)
    torch.testing.assert_close(features, (x - only).norm(dim=1)[:, None] / SIGMAS.to(dtype), rtol=1e-5, atol=0)
    assert features.dtype == dtype


def test_small_scales_see_the_nearest_point_and_large_ones_the_mean():
    data, x = points(20, 5), points(6, 5, seed=1)
    small, large = (
        score_norm_features(lambda q, s: data_score(q, data, s), x, SIGMAS.new_tensor([s])) for s in (0.02, 1e3)
    )
    torch.testing.assert_close(small[:, 0], torch.cdist(x, data).amin(1) / 0.02)
    torch.testing.assert_close(large[:, 0], (x - data.mean(0)).norm(dim=1) / 1e3, rtol=1e-4, atol=0)


def unit_gaussian_nets(dim, members=2):
    """Nets whose answer is exactly that for N(0, I): ε̂ = σ x, the part that :class:`ScoreNet` does not learn."""
    fleet = Fleet.of([ScoreNet(dim, 1, (4,)).double() for _ in range(members)], lambda: ScoreNet(dim, 1, (4,)).double())
    fleet.layout.views(fleet.parameters)["head.weight"].zero_()
    fleet.layout.views(fleet.parameters)["head.bias"].zero_()
    return fleet


def test_learnt_score_of_a_known_net_is_the_gaussians_closed_form():
    x = 3 * points(2 * 5, 6).reshape(2, 5, 6)
    score = learnt_score(unit_gaussian_nets(6))
    for sigma in SIGMAS:
        torch.testing.assert_close(score(x, sigma), -x / (1 + sigma**2))
    expected = x.norm(dim=-1)[..., None] * SIGMAS / (1 + SIGMAS.square())
    torch.testing.assert_close(score_norm_features(score, x, SIGMAS), expected)
    torch.testing.assert_close(score_norm_features(score, x[0], SIGMAS)[1], expected[0])  # shared points


def test_features_of_a_gaussian_with_any_covariance():
    root = points(4, 4)
    mean, covariance, x = points(1, 4, seed=2)[0], root @ root.T, points(6, 4, seed=1)

    def score(q, sigma):
        inverse = torch.linalg.inv(covariance + sigma**2 * torch.eye(4, dtype=DOUBLE))
        return -(q - mean) @ inverse

    # Many draws of the Gaussian are a data set whose score, at scales of its size, is the Gaussian's.
    many = mean + points(40_000, 4, seed=3) @ root.T
    sigmas = SIGMAS.new_tensor([4.0, 2.0])
    sampled = score_norm_features(lambda q, s: data_score(q, many, s), x, sigmas)
    torch.testing.assert_close(sampled, score_norm_features(score, x, sigmas), rtol=0.05, atol=0.01)


def batch_of(x, seed=0):
    return SimpleNamespace(x=x, key=random.key(seed))


def test_loss_is_the_papers_at_the_noise_that_was_drawn():
    x = points(4000, 3) + 2
    seen: dict[str, torch.Tensor] = {}

    def model(shrunk, t):
        seen.update(x=shrunk, t=t)
        return shrunk.sin() + t[:, None]

    values = score_matching_loss(SIGMAS)(model, batch_of(x.reshape(4000, 1, 3)), None)
    assert values.shape == (4000,)
    sigma = (seen["t"] * torch.pi / 2).tan()
    moved = seen["x"] / (seen["t"] * torch.pi / 2).cos()[:, None]  # x + σ ε
    noise = (moved - x) / sigma[:, None]
    score = -(seen["x"].sin() + seen["t"][:, None]) / sigma[:, None]
    expected = 0.5 * sigma**2 * (score + noise / sigma[:, None]).square().sum(1)
    torch.testing.assert_close(values, expected)
    shares = torch.stack([(sigma / s - 1).abs() < 1e-9 for s in SIGMAS]).double().mean(1)
    assert shares.sum().item() == pytest.approx(1)
    assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / 4000) ** 0.5
    assert abs(noise.mean()) < 4 / 12000**0.5
    assert abs(noise.square().mean() - 1) < 4 * (2 / 12000) ** 0.5


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_least_loss_on_gaussian_data_and_the_loss_of_nothing(deviation):
    dim, n = 4, 20_000
    x = deviation * points(n, dim, seed=5)
    ones = torch.ones(1, dtype=DOUBLE)
    exact = Mixture(torch.zeros(1, dim, dtype=DOUBLE), deviation * ones, ones, torch.zeros(1, dtype=torch.int64))
    loss = score_matching_loss(SIGMAS)
    best = loss(lambda shrunk, t: exact.epsilon(shrunk, t), batch_of(x), None)
    expected = dim / 2 * (deviation**2 / (deviation**2 + SIGMAS.square())).mean()
    assert abs(best.mean() - expected) < 4 * best.std() / n**0.5
    nothing = loss(lambda shrunk, t: torch.zeros_like(shrunk), batch_of(x), None)
    assert abs(nothing.mean() - dim / 2) < 4 * nothing.std() / n**0.5


def test_no_answer_beats_the_score_of_the_data():
    data = points(6, 3)
    x = data[torch.arange(30_000) % 6]

    def answer(error):
        def model(shrunk, t):
            sigma, moved = (t * torch.pi / 2).tan(), shrunk / (t * torch.pi / 2).cos()[:, None]
            epsilon = torch.empty_like(shrunk)
            for s in SIGMAS:
                rows = (sigma / s - 1).abs() < 1e-9
                epsilon[rows] = -s * data_score(moved[rows], data, s)
            return epsilon + error(shrunk)

        return score_matching_loss(SIGMAS)(model, batch_of(x), None).mean()

    best = answer(torch.zeros_like)
    for error in (lambda q: 0.2 * q, lambda q: -0.2 * q, lambda q: 0.2 * q.sin(), torch.ones_like):
        assert answer(error) > best + 0.01


def test_trained_nets_approach_the_closed_form_and_do_not_depend_on_each_other():
    shape = torch.tensor([1.5, 1.0, 0.3])
    x = points(2000, 3, seed=7).float() * shape
    sigmas = noise_scales(4, 2.0, 0.25)

    def trained(members):
        return train(
            lambda: ScoreNet(3, 1, (32,)),
            score_matching_loss(sigmas),
            {"x": x},
            members=members,
            steps=300,
            optimiser=Adam(1e-2),
            schedule=cosine(),
            progress=False,
        )

    fleet = trained(2)
    features = score_norm_features(learnt_score(fleet), x[:200], sigmas)
    assert features.shape == (2, 200, 4)
    exact = score_norm_features(lambda q, s: -q / (shape.square() + s**2), x[:200], sigmas)
    error = (features - exact).square().mean((1, 2)) / exact.square().mean()
    assert error.max() < 0.02
    untrained = score_norm_features(lambda q, s: -q / (1 + s**2), x[:200], sigmas)
    assert (untrained - exact).square().mean() / exact.square().mean() > 0.1
    torch.testing.assert_close(trained(1).parameters[0], fleet.parameters[0], rtol=1e-4, atol=1e-5)


def test_mixture_novelty_grows_away_from_the_data():
    data, x = points(300, 4), points(60, 4, seed=1)
    known = score_norm_features(lambda q, s: data_score(q, data, s, True), data, SIGMAS)
    fit = fit_mixture(known, random.key(0), components=(1, 2))

    def features(q):
        return score_norm_features(lambda a, s: data_score(a, data, s), q, SIGMAS)

    near, far, farther = (mixture_novelty(features(q), fit) for q in (x, x * 3, x * 9))
    assert near.median() < far.median() < farther.median()
    torch.testing.assert_close(near, -mixture_log_density(features(x), fit))


@pytest.mark.parametrize("neighbour", [1, 5])
def test_neighbour_novelty_is_scikit_learns_distance_between_standardised_features(neighbour):
    scales = torch.tensor([1.0, 100.0, 0.01], dtype=DOUBLE)
    reference, features = points(40, 3) * scales, points(15, 3, seed=1) * scales
    deviation = reference.numpy().std(0)
    search = NearestNeighbors(n_neighbors=neighbour).fit(reference.numpy() / deviation)
    expected = search.kneighbors(features.numpy() / deviation)[0][:, -1]
    np.testing.assert_allclose(neighbour_novelty(features, reference, neighbour), expected)
    flat = torch.cat([reference, torch.ones(40, 1, dtype=DOUBLE)], 1)
    new = torch.cat([features, torch.ones(15, 1, dtype=DOUBLE)], 1)
    np.testing.assert_allclose(neighbour_novelty(new, flat, neighbour), expected)


def test_everything_under_vmap():
    data, x = points(3 * 20, 4).reshape(3, 20, 4), points(3 * 6, 4, seed=1).reshape(3, 6, 4)
    sigma = SIGMAS[:3].contiguous()
    looped = [data_score(*args) for args in zip(x, data, sigma, strict=True)]
    torch.testing.assert_close(torch.func.vmap(data_score)(x, data, sigma), torch.stack(looped))

    def pipeline(data, x):
        known = score_norm_features(lambda q, s: data_score(q, data, s, True), data, SIGMAS)
        new = score_norm_features(lambda q, s: data_score(q, data, s), x, SIGMAS)
        return neighbour_novelty(new, known, 2)

    looped = [pipeline(*args) for args in zip(data, x, strict=True)]
    torch.testing.assert_close(torch.func.vmap(pipeline)(data, x), torch.stack(looped))


def test_bad_input_is_named():
    x = points(5, 3)
    with pytest.raises(ValueError, match="count: expected at least 2, got 1"):
        noise_scales(1)
    for largest, smallest in ((1.0, 0.0), (0.1, 0.2), (float("inf"), 0.1)):
        with pytest.raises(ValueError, match="smallest: expected 0 < smallest < largest"):
            noise_scales(4, largest, smallest)
    with pytest.raises(ValueError, match="sigma: expected a number greater than 0"):
        data_score(x, x, 0.0)
    with pytest.raises(ValueError, match="data: expected at least one point"):
        data_score(x, x[:0], 1.0)
    with pytest.raises(ValueError, match=r"x: expected the data, .* got 5 of 4"):
        data_score(x, x[:4], 1.0, leave_one_out=True)
    with pytest.raises(ValueError, match="x: expected the data, two points or more"):
        data_score(x[:1], x[:1], 1.0, leave_one_out=True)
    with pytest.raises(ValueError, match="sigmas: expected values greater than 0"):
        score_matching_loss(-SIGMAS)
    with pytest.raises(ValueError, match="sigmas: expected a row of scales"):
        score_matching_loss(SIGMAS[0])
    with pytest.raises(ValueError, match="sigmas: expected values greater than 0"):
        score_norm_features(lambda q, s: q, x, 0 * SIGMAS)
    with pytest.raises(ValueError, match="neighbour: expected a number from 1 to 5, got 6"):
        neighbour_novelty(x, x, 6)
    with pytest.raises(ValueError, match="expected one of ScoreNet, got one of MLP"):
        learnt_score(Fleet.of([MLP(3, (), 3)], lambda: MLP(3, (), 3)))
