import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from toolkit import random
from toolkit.calibration.mixture_density import (
    MixtureFit,
    expectation_maximisation,
    fit_mixture,
    mixture_log_density,
)

DOUBLE = torch.float64


def clusters(n=240, dim=3, count=3, apart=6.0, seed=0):
    """Rows of ``count`` correlated Gaussians, on scales that differ from feature to feature."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(count, dim, dim, generator=g, dtype=DOUBLE)
    which = torch.arange(n) % count
    x = torch.einsum("nij,nj->ni", mixing[which], torch.randn(n, dim, generator=g, dtype=DOUBLE))
    places = apart * torch.eye(max(count, dim), dtype=DOUBLE)[:count, :dim]
    return (x + places[which]) * torch.tensor([1.0, 10.0, 0.1], dtype=DOUBLE)[:dim] + 5, which


def rough_start(x, count):
    dim = x.shape[1]
    return MixtureFit(
        torch.zeros(dim, dtype=DOUBLE),
        torch.ones(dim, dtype=DOUBLE),
        torch.arange(1, count + 1, dtype=DOUBLE).log_softmax(0),
        x[:count].clone(),
        torch.stack([(1 + 0.2 * k) * x.T.cov() + 0.01 * torch.eye(dim, dtype=DOUBLE) for k in range(count)]),
    )


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_each_step_of_em_is_scikit_learns(steps, ridge):
    x, _ = clusters(apart=1.5)
    start = rough_start(x, 3)
    reference = GaussianMixture(
        3,
        reg_covar=ridge,
        max_iter=steps,
        tol=0.0,
        weights_init=start.log_weights.exp().numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.linalg.inv(start.covariances).numpy(),
    )
    with pytest.warns(ConvergenceWarning):  # as many steps as asked
        reference.fit(x.numpy())
    fit = expectation_maximisation(x, start, steps, ridge)
    np.testing.assert_allclose(fit.log_weights.exp(), reference.weights_, rtol=1e-8)
    np.testing.assert_allclose(fit.means, reference.means_, rtol=1e-8)
    np.testing.assert_allclose(fit.covariances, reference.covariances_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(mixture_log_density(x, fit), reference.score_samples(x.numpy()), rtol=1e-8)


def test_likelihood_never_falls_and_no_step_changes_nothing():
    x, _ = clusters(apart=1.0, seed=3)
    fit = rough_start(x, 4)
    for part, same in zip(fit, expectation_maximisation(x, fit, 0), strict=True):
        assert torch.equal(part, same)
    values = []
    for _ in range(25):
        values.append(mixture_log_density(x, fit).mean().item())
        fit = expectation_maximisation(x, fit, 1, 1e-12)
    assert min(np.diff(values)) > -1e-9
    assert values[-1] > values[0] + 0.1


def test_one_component_is_the_sample_gaussian():
    x, _ = clusters(count=1)
    fit = fit_mixture(x, random.key(0), components=(1,), ridge=1e-3)
    ridge = 1e-3 * np.diag(x.numpy().var(0))
    law = stats.multivariate_normal(x.numpy().mean(0), np.cov(x.numpy().T, bias=True) + ridge)
    new = torch.cat([x[:20], x[:20] * 3 - 7])
    np.testing.assert_allclose(mixture_log_density(new, fit), law.logpdf(new.numpy()), rtol=1e-9)
    assert mixture_log_density(new.float(), fit).dtype == torch.float32


def test_density_is_a_mixture_of_scipys_normals_in_the_given_units():
    x, which = clusters()
    fit = fit_mixture(x, random.key(1), components=(3,))
    centre, scale = fit.centre.numpy(), fit.scale.numpy()
    np.testing.assert_allclose(centre, x.numpy().mean(0))
    np.testing.assert_allclose(scale, x.numpy().std(0))
    parts = [
        w + stats.multivariate_normal(centre + scale * m, c * np.outer(scale, scale)).logpdf(x.numpy())
        for w, m, c in zip(fit.log_weights.tolist(), fit.means.numpy(), fit.covariances.numpy(), strict=True)
    ]
    np.testing.assert_allclose(mixture_log_density(x, fit), special.logsumexp(parts, axis=0), rtol=1e-8)
    # The well separated clusters are what EM finds: their own means and shares.
    found = (fit.means * fit.scale + fit.centre)[:, 1].argsort()
    own = torch.stack([x[which == k].mean(0) for k in range(3)])
    torch.testing.assert_close(fit.means[found] * fit.scale + fit.centre, own[own[:, 1].argsort()], rtol=0.02, atol=0.1)
    torch.testing.assert_close(fit.log_weights.exp(), torch.full((3,), 1 / 3, dtype=DOUBLE), atol=0.02, rtol=0)


def test_number_of_components_is_chosen_by_likelihood_of_held_out_rows():
    def used(fit):
        return int((~fit.log_weights.isneginf()).sum())

    three, one = clusters(seed=1)[0], clusters(count=1, seed=1)[0]
    fit = fit_mixture(three, random.key(0), components=(1, 3, 12))
    assert used(fit) == 3
    assert fit.means.shape == (12, 3)
    assert fit.log_weights.exp().sum().item() == pytest.approx(1)
    assert used(fit_mixture(one, random.key(0), components=(1, 6, 12))) == 1
    # By the fitted rows' own likelihood, the largest number would have been chosen.
    ends = [mixture_log_density(one, fit_mixture(one, random.key(0), components=(k,))).mean() for k in (1, 12)]
    assert ends[1] > ends[0] + 0.1


def test_unused_components_change_nothing():
    x, _ = clusters(apart=2.0)
    start = rough_start(x, 3)
    spare = MixtureFit(
        start.centre,
        start.scale,
        torch.cat([start.log_weights, torch.tensor([-torch.inf], dtype=DOUBLE)]),
        torch.cat([start.means, x[7:8]]),
        torch.cat([start.covariances, start.covariances[:1]]),
    )
    plain, padded = (expectation_maximisation(x, s, 5) for s in (start, spare))
    torch.testing.assert_close(mixture_log_density(x, padded), mixture_log_density(x, plain))
    assert padded.log_weights[3].isneginf()


def test_scale_of_the_features_is_only_a_change_of_units():
    x, _ = clusters(apart=2.0)
    units = torch.tensor([3.0, 0.5, 20.0], dtype=DOUBLE)
    plain = mixture_log_density(x, fit_mixture(x, random.key(0)))
    moved = mixture_log_density(x * units - 4, fit_mixture(x * units - 4, random.key(0)))
    torch.testing.assert_close(moved, plain - units.log().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_new_rows_are_as_likely_as_under_scikit_learns_best_of_several_starts(seed):
    x, _ = clusters(n=600, apart=2.5, seed=seed)
    train, new = x[:300], x[300:]
    scale = train.std(0, correction=0)
    reference = GaussianMixture(3, n_init=5, random_state=0, max_iter=200).fit((train / scale).numpy())
    expected = reference.score((new / scale).numpy()) - scale.log().sum().item()
    fit = fit_mixture(train, random.key(seed), components=(3,), starts=5, steps=60)
    assert mixture_log_density(new, fit).mean().item() > expected - 0.1


def test_fits_under_vmap_are_the_single_fits():
    sets = torch.stack([clusters(n=80, apart=2.0, seed=s)[0] for s in range(3)])
    keys = torch.stack([random.key(s) for s in range(3)])

    def pipeline(features, key):
        return mixture_log_density(features, fit_mixture(features, key, components=(1, 2, 4)))

    looped = torch.stack([pipeline(*args) for args in zip(sets, keys, strict=True)])
    torch.testing.assert_close(torch.func.vmap(pipeline)(sets, keys), looped)


def test_degenerate_features_have_a_finite_density():
    x, _ = clusters(n=100)
    x = torch.cat([x, 2 * x[:, :1], torch.ones(100, 1, dtype=DOUBLE)], 1)  # collinear, and constant
    density = mixture_log_density(x, fit_mixture(x, random.key(0)))
    assert density.isfinite().all()
    off = x.clone()
    off[:, 3] += 0.5  # leaves the plane
    assert (mixture_log_density(off, fit_mixture(x, random.key(0))) < density - 1000).all()


def test_bad_input_is_named():
    x, _ = clusters(n=20)
    key = random.key(0)
    with pytest.raises(ValueError, match=r"components: expected numbers of at least 1, got \(0, 2\)"):
        fit_mixture(x, key, components=(0, 2))
    with pytest.raises(ValueError, match="components: expected"):
        fit_mixture(x, key, components=())
    with pytest.raises(ValueError, match="starts: expected at least 1"):
        fit_mixture(x, key, starts=0)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        fit_mixture(x, key, steps=0)
    with pytest.raises(ValueError, match="steps: expected at least 0"):
        expectation_maximisation(x, rough_start(x, 2), -1)
    with pytest.raises(ValueError, match="held_out: expected a share"):
        fit_mixture(x, key, held_out=1.0)
    with pytest.raises(ValueError, match="ridge: expected a number greater than 0"):
        fit_mixture(x, key, ridge=0.0)
    with pytest.raises(ValueError, match="features: expected at least 16 rows besides those held out, got 15"):
        fit_mixture(x, key, components=(16,))
    with pytest.raises(ValueError, match="features: expected finite"):
        fit_mixture(x / 0, key)
