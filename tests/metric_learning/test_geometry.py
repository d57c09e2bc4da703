"""Geometry measures against loops over pairs, identities of discriminant analysis and exact simplex frames."""

import math

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.func import grad, vmap

from toolkit.metric_learning.geometry import alignment, collapse_measures, fisher_ratio, tolerance, uniformity
from toolkit.metric_learning.similarities import normalise


def cloud(items=40, classes=4, dim=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(items) % classes).index_fill(0, torch.arange(3), 0)  # a little imbalanced
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return (centres[labels] + torch.randn(items, dim, generator=generator, dtype=torch.float64)).to(dtype), labels


def weights_and_bias(classes=4, dim=6, seed=5):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return w, torch.randn(classes, generator=generator, dtype=torch.float64)


def simplex(classes=4, dim=6, seed=0):
    """Rows of a simplex frame, rotated: lengths 1, cosines -1/(K-1)."""
    frame = math.sqrt(classes / (classes - 1)) * (torch.eye(classes, dtype=torch.float64) - 1 / classes)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    return frame @ turn[:classes]


# Alignment, uniformity, tolerance


def test_pair_measures_are_means_over_pairs():
    x, labels = cloud(15)
    points = normalise(x)
    pairs = [(i, j) for i in range(15) for j in range(15) if i != j]
    lengths = {(i, j): float((points[i] - points[j]).norm()) for i, j in pairs}
    same = [pair for pair in pairs if labels[pair[0]] == labels[pair[1]]]
    for power in (1, 2, 3.5):
        expected = sum(lengths[pair] ** power for pair in same) / len(same)
        assert float(alignment(x, labels, power)) == pytest.approx(expected, rel=1e-12)
    for scale in (0.5, 2):
        expected = math.log(sum(math.exp(-scale * lengths[pair] ** 2) for pair in pairs) / len(pairs))
        assert float(uniformity(x, scale)) == pytest.approx(expected, rel=1e-12)
    expected = sum(float(points[i] @ points[j]) for i, j in same) / len(pairs)
    assert float(tolerance(x, labels)) == pytest.approx(expected, rel=1e-12)
    assert float(tolerance(x, labels)) == pytest.approx(
        len(same) / len(pairs) * (1 - float(alignment(x, labels)) / 2), rel=1e-12
    )


def test_pair_measures_by_hand():
    x = torch.tensor([[3.0, 0], [0, 1], [-2, 0], [0, -1]])
    labels = torch.tensor([0, 0, 1, 1])
    assert float(alignment(x, labels)) == pytest.approx(2)
    assert float(alignment(x, labels, 1)) == pytest.approx(math.sqrt(2))
    assert float(uniformity(x)) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert float(tolerance(x, labels)) == pytest.approx(0)
    assert float(tolerance(x, torch.tensor([0, 1, 0, 1]))) == pytest.approx(-1 / 3)
    assert float(uniformity(x[:1].expand(5, 2))) == pytest.approx(0, abs=1e-6)


PAIRED = {
    "alignment": lambda x, y: alignment(x, y, 1.5),
    "alignment_2": alignment,
    "uniformity": lambda x, y: uniformity(x, 2.0),
    "tolerance": tolerance,
}


@pytest.mark.parametrize("name", PAIRED)
def test_pair_measures_differentiate_and_vmap(name):
    measure = PAIRED[name]
    x = torch.stack([cloud(12, seed=seed)[0] for seed in range(3)])
    labels = torch.stack([cloud(12)[1].roll(seed) for seed in range(3)])
    values, slopes = vmap(measure)(x, labels), vmap(grad(measure))(x, labels)
    for member in range(3):
        torch.testing.assert_close(values[member], measure(x[member], labels[member]))
        torch.testing.assert_close(slopes[member], grad(measure)(x[member], labels[member]))
    assert torch.autograd.gradcheck(lambda e: measure(e, labels[0]), (x[0].clone().requires_grad_(),))
    single = measure(x[0].float(), labels[0])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), measure(x[0], labels[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_pair_measures_of_poor_batches_are_finite(name):
    measure = PAIRED[name]
    x, labels = cloud(8)
    for points, truth in (
        (x[:1], labels[:1]),
        (x[:0], labels[:0]),
        (x, torch.arange(8)),
        (x, torch.zeros_like(labels)),
        (torch.zeros_like(x), labels),
        (x[:1].expand(8, 6), labels),
    ):
        assert measure(points, truth).isfinite()
        assert grad(measure)(points, truth).isfinite().all()
    with pytest.raises(ValueError, match="embeddings: expected finite"):
        measure(x / 0, labels)


def test_bad_hyper_parameters_and_labels():
    x, labels = cloud(8)
    with pytest.raises(ValueError, match="power"):
        alignment(x, labels, 0)
    with pytest.raises(ValueError, match="scale"):
        uniformity(x, -1.0)
    for function in (alignment, tolerance, fisher_ratio):
        with pytest.raises(Exception, match="labels"):
            function(x, labels[1:])


# Fisher ratio


def scatter(x, labels):
    mean = x.mean(0)
    within = between = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for c in labels.unique():
        own = x[labels == c]
        within = within + (own - own.mean(0)).T @ (own - own.mean(0))
        between = between + len(own) * torch.outer(own.mean(0) - mean, own.mean(0) - mean)
    return within, between


def test_fisher_ratio_is_the_trace_and_the_identities_hold():
    x, labels = cloud()
    within, between = scatter(x, labels)
    value = float(fisher_ratio(x, labels))
    assert value == pytest.approx(float(torch.linalg.solve(within, between).trace()), rel=1e-11)
    assert 6 + value == pytest.approx(float(torch.linalg.solve(within, within + between).trace()), rel=1e-11)
    two = labels < 2
    a, b = x[labels == 0], x[labels == 1]
    apart = a.mean(0) - b.mean(0)
    share = len(a) * len(b) / (len(a) + len(b))
    expected = share * apart @ torch.linalg.solve(scatter(x[two], labels[two])[0], apart)
    assert float(fisher_ratio(x[two], labels[two])) == pytest.approx(float(expected), rel=1e-11)


def test_fisher_ratio_from_linear_discriminant_analysis():
    x, labels = cloud()
    lda = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), labels.numpy())
    share = lda.explained_variance_ratio_  # of the leading eigenvalue: it fixes the scale of all of them
    within, between = (s.numpy() for s in scatter(x, labels))
    leading = np.linalg.eigvals(np.linalg.solve(within, between)).real.max()
    assert float(fisher_ratio(x, labels)) == pytest.approx(leading / share[0], rel=1e-9)


def test_fisher_ratio_ignores_affine_maps_and_constant_dimensions():
    x, labels = cloud()
    value = float(fisher_ratio(x, labels))
    linear = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert float(fisher_ratio(x @ linear + 7, labels)) == pytest.approx(value, rel=1e-10)
    scales = torch.tensor([1e-6, 1e4, 1, 1, 10, 1e-3], dtype=torch.float64)
    assert float(fisher_ratio(scales * x, labels)) == pytest.approx(value, rel=1e-10)
    wider = torch.cat([torch.full((40, 1), 0.1), x, torch.zeros(40, 1), x[:, :1] - x[:, 2:3]], 1)  # the last: redundant
    assert float(fisher_ratio(wider, labels)) == pytest.approx(value, rel=1e-9)
    assert float(fisher_ratio(x, 10 * labels - 5)) == pytest.approx(value, rel=1e-12)
    single = fisher_ratio(x.float(), labels)
    assert single.dtype == torch.float64
    assert float(single) == pytest.approx(value, rel=1e-5)


def test_fisher_ratio_at_the_ends():
    labels = torch.arange(12) % 3
    assert fisher_ratio(torch.eye(3)[labels], labels) == math.inf
    assert fisher_ratio(torch.ones(12, 3), labels) == 0
    assert fisher_ratio(torch.full((12, 3), 0.1), labels) == 0
    assert float(fisher_ratio(cloud(12)[0], torch.zeros(12, dtype=torch.long))) == pytest.approx(0, abs=1e-12)
    x, own = cloud()
    wide = torch.cat([x, torch.eye(4, dtype=torch.float64)[own]], 1)
    assert fisher_ratio(wide, own) == math.inf
    with pytest.raises(ValueError, match="features: expected finite"):
        fisher_ratio(x / 0, own)
    with pytest.raises(ValueError, match="labels: expected class indices"):
        fisher_ratio(x, own, classes=3)


def test_fisher_ratio_under_vmap():
    x = torch.stack([cloud(seed=seed)[0] for seed in range(3)])
    labels = torch.stack([cloud()[1].roll(seed) for seed in range(3)])
    expected = torch.stack([fisher_ratio(e, y) for e, y in zip(x, labels, strict=True)])
    torch.testing.assert_close(vmap(lambda e, y: fisher_ratio(e, y, 4))(x, labels), expected)
    first = torch.stack([fisher_ratio(e, labels[0]) for e in x])
    torch.testing.assert_close(vmap(lambda e: fisher_ratio(e, labels[0]))(x), first)
    with pytest.raises(ValueError, match="classes: expected the number"):
        vmap(fisher_ratio)(x, labels)


# Neural collapse


def test_collapse_by_matrices():
    x, labels = cloud()
    w, b = weights_and_bias()
    means = torch.stack([x[labels == c].mean(0) for c in range(4)])
    apart = means - means.mean(0)
    inside = x - means[labels]
    within, between = inside.T @ inside / 40, apart.T @ apart / 4
    shape = torch.eye(4, dtype=torch.float64) - 0.25

    def away(a, t):
        return float((a / a.norm() - t / t.norm()).norm())

    result = collapse_measures(x, labels, w, b)
    inverse = torch.linalg.pinv(between, hermitian=True, rtol=1e-10)
    assert float(result.nc1) == pytest.approx(float((within @ inverse).trace()) / 4, rel=1e-10)
    assert float(result.nc1_ratio) == pytest.approx(float(within.trace() / between.trace()), rel=1e-12)
    assert float(result.nc2) == pytest.approx(away(apart @ apart.T, shape), rel=1e-12)
    assert float(result.nc2_weights) == pytest.approx(away(w @ w.T, shape), rel=1e-12)
    assert float(result.nc3) == pytest.approx(away(w, apart), rel=1e-12)
    assert float(result.nc3_product) == pytest.approx(away(w @ apart.T, shape), rel=1e-12)
    near = torch.cdist(x, means).argmin(1)
    assert float(result.nc4) == pytest.approx(float(((x @ w.T + b).argmax(1) != near).double().mean()))
    assert 0 < result.nc4 < 1
    assert collapse_measures(x, labels, w).nc4 != result.nc4

    square = collapse_measures(x, labels, w, b, target="identity")
    assert float(square.nc2) == pytest.approx(away(means @ means.T, torch.eye(4, dtype=torch.float64)), rel=1e-12)
    assert float(square.nc3) == pytest.approx(away(w, means), rel=1e-12)
    assert square.nc1 == result.nc1

    lengths = torch.tensor([[4.0, 3, 2, 1], [1, 0.5, 2, 0]], dtype=torch.float64)
    uneven = collapse_measures(x, labels, w, target=lengths)
    assert float(uneven.nc2) == pytest.approx(away(means @ means.T, torch.diag(lengths[0])), rel=1e-12)
    assert float(uneven.nc2_weights) == pytest.approx(away(w @ w.T, torch.diag(lengths[1])), rel=1e-12)
    assert float(uneven.nc3_product) == pytest.approx(away(w @ means.T, torch.diag(lengths.prod(0).sqrt())), rel=1e-12)
    both = collapse_measures(x, labels, w, target=lengths[0])
    assert float(both.nc3_product) == pytest.approx(away(w @ means.T, torch.diag(lengths[0])), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_simplex_is_full_collapse(dtype):
    labels = torch.arange(4).repeat_interleave(torch.tensor([9, 2, 5, 4]))
    frame = simplex()
    shift = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (3 * frame[labels] + shift).to(dtype)
    w = (0.2 * frame).to(dtype)
    result = collapse_measures(x, labels, w, (-0.2 * frame @ shift).to(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert max(float(value) for value in result) < tolerance
    assert result.nc1.dtype == dtype
    assert float(collapse_measures(x, labels, -w).nc3) == pytest.approx(2, abs=1e-5)
    assert collapse_measures(x, labels, -w).nc4 == 1
    assert collapse_measures(x, labels, w, target="identity").nc2 > 0.1


def test_imbalanced_deep_linear_optimum_is_full_collapse():
    # Squared error with weight decay l on both: a_k = 1 - N l / √n_k, |w_k|² = a_k √n_k, |h_k|² = a_k / √n_k.
    sizes, decay = torch.tensor([20, 8, 3]), 0.005
    root = sizes.double().sqrt()
    gain = 1 - decay * sizes.sum().double() / root
    labels = torch.arange(3).repeat_interleave(sizes)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0][:3]
    h, w = (gain / root).sqrt()[:, None] * turn, (gain * root).sqrt()[:, None] * turn
    prediction = h[labels] @ w.T
    total = sizes.sum()
    slope = (prediction - torch.eye(3, dtype=torch.float64)[labels]).T @ h[labels] / total + decay * w
    assert slope.abs().max() < 1e-14  # it is a stationary point
    exact = collapse_measures(h[labels], labels, w, target=torch.stack([gain / root, gain * root]))
    assert max(float(value) for name, value in exact._asdict().items() if name != "nc3") < 1e-12
    assert collapse_measures(h[labels], labels, w, target="identity").nc2 > 0.1


def test_within_class_spread_scales_nc1():
    x, labels = cloud()
    w, _ = weights_and_bias()
    means = torch.stack([x[labels == c].mean(0) for c in range(4)])[labels]
    full, half = (collapse_measures(means + s * (x - means), labels, w) for s in (1, 0.5))
    assert float(half.nc1) == pytest.approx(float(full.nc1) / 4, rel=1e-10)
    assert float(half.nc1_ratio) == pytest.approx(float(full.nc1_ratio) / 4, rel=1e-10)
    assert half.nc2 == pytest.approx(float(full.nc2), rel=1e-10)


def test_collapse_under_vmap_over_members_and_epochs():
    x = torch.stack([torch.stack([cloud(seed=3 * m + e)[0] for e in range(3)]) for m in range(2)])
    w = torch.stack([torch.stack([weights_and_bias(seed=3 * m + e)[0] for e in range(3)]) for m in range(2)])
    labels = cloud()[1]
    together = vmap(vmap(lambda e, v: collapse_measures(e, labels, v)))(x, w)
    own = vmap(collapse_measures)(x[0], torch.stack([labels.roll(s) for s in range(3)]), w[0])
    for e in range(3):
        for m in range(2):
            for one, two in zip(together, collapse_measures(x[m, e], labels, w[m, e]), strict=True):
                torch.testing.assert_close(one[m, e], two)
        for one, two in zip(own, collapse_measures(x[0, e], labels.roll(e), w[0, e]), strict=True):
            torch.testing.assert_close(one[e], two)


def test_collapse_of_poor_and_bad_input():
    labels = torch.arange(12) % 3
    w = torch.eye(3)
    for points in (torch.ones(12, 3), torch.zeros(12, 3), torch.full((12, 3), 0.1)):
        result = collapse_measures(points, labels, w)
        assert (result.nc1, result.nc1_ratio) == (math.inf, math.inf)
        assert not any(value.isnan() for value in result)
    x, own = cloud()
    w, _ = weights_and_bias()
    assert not any(value.isnan() for value in collapse_measures(x, own, torch.zeros_like(w)))
    with pytest.raises(ValueError, match="features: expected finite"):
        collapse_measures(x / 0, own, w)
    with pytest.raises(ValueError, match="weights: expected finite"):
        collapse_measures(x, own, w / 0)
    with pytest.raises(ValueError, match="labels: expected class indices"):
        collapse_measures(x, own + 1, w)
    with pytest.raises(ValueError, match="labels: expected items of every class"):
        collapse_measures(x, own.clamp_max(2), w)
    with pytest.raises(ValueError, match="target: expected squared"):
        collapse_measures(x, own, w, target=torch.tensor([1.0, 1, 1, -1]))
    with pytest.raises(Exception, match="labels"):
        collapse_measures(x, own[1:], w)
