"""Verification rates against scikit-learn's ROC and counting; OPIS against loops over pairs and closed cases."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve
from torch.func import vmap

from toolkit.metric_learning import verification
from toolkit.metric_learning.similarities import cosine, euclidean, normalise, snr
from toolkit.metric_learning.verification import far_frr, opis, pair_scores, roc, threshold_at_far, utility_curves


def cloud(items=60, classes=5, dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(items) % classes
    labels[:6] = 0  # classes of unequal sizes
    spread = 0.4 + 0.3 * torch.arange(classes, dtype=torch.float64)[labels]  # some classes wider than others
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(items, dim, generator=generator, dtype=torch.float64)
    return (centres[labels] + spread[:, None] * noise).to(dtype), labels


def rounded_pairs(seed=0, pairs=300):
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.rand(pairs, generator=generator) < 0.3
    scores = torch.randn(pairs, generator=generator, dtype=torch.float64) + same
    return (8 * scores).round() / 8, same


def test_pairs_in_order():
    x, labels = cloud(9)
    for measure, sign in ((cosine, 1), (euclidean, -1), (snr, -1)):
        scores, same = pair_scores(x, labels, measure)
        table = measure(x)
        pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
        assert scores.tolist() == [float(sign * table[i, j]) for i, j in pairs]
        assert same.tolist() == [bool(labels[i] == labels[j]) for i, j in pairs]
    assert pair_scores(x[:1], labels[:1])[0].shape == (0,)


def test_roc_is_that_of_scikit_learn():
    scores, same = rounded_pairs()
    curve = roc(scores, same)
    far, tar, thresholds = roc_curve(same.numpy(), scores.numpy(), drop_intermediate=False)
    distinct = np.unique(np.stack([-curve.thresholds, curve.far, curve.tar], 1), axis=0)
    np.testing.assert_allclose(distinct, np.stack([-thresholds, far, tar], 1), atol=1e-15)
    assert len(curve.far) == len(scores) + 1
    assert (curve.far[0], curve.frr[0], curve.far[-1], curve.frr[-1]) == (0, 1, 1, 0)
    assert curve.far.dtype == torch.float64


def test_rates_at_given_thresholds_are_counts():
    scores, same = rounded_pairs(1)
    thresholds = torch.tensor([0.25, -9.0, 9.0, 0.0, 0.3, -math.inf, math.inf], dtype=torch.float64)
    curve = roc(scores, same, thresholds)
    for place, threshold in enumerate(thresholds.tolist()):
        accepted = [s >= threshold for s in scores.tolist()]
        far = sum(a for a, g in zip(accepted, same.tolist(), strict=True) if not g) / int((~same).sum())
        frr = sum(not a for a, g in zip(accepted, same.tolist(), strict=True) if g) / int(same.sum())
        assert float(curve.far[place]) == pytest.approx(far, abs=1e-15)
        assert float(curve.frr[place]) == pytest.approx(frr, abs=1e-15)
        for form in (threshold, thresholds[place]):
            one = far_frr(scores, same, form)
            assert [float(value) for value in one] == pytest.approx([far, frr], abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_is_the_lowest_that_keeps_the_rate(dtype):
    scores, same = rounded_pairs(2)
    scores = scores.to(dtype)
    for rate in (0.0, 0.01, 0.1, 0.29, 0.5, 0.999, 1.0):
        threshold = threshold_at_far(scores, same, rate)
        assert threshold.dtype == dtype
        assert far_frr(scores, same, threshold)[0] <= rate
        lower = torch.nextafter(threshold, torch.full_like(threshold, -math.inf))
        if rate < 1:
            assert far_frr(scores, same, lower)[0] > rate
    assert threshold_at_far(scores, same, 1) == scores.min()
    hundred = torch.arange(100, dtype=dtype)
    impostors = torch.zeros(100, dtype=torch.bool)
    assert far_frr(torch.cat([hundred, hundred[:1]]), torch.cat([impostors, ~impostors[:1]]), 71)[0] == 0.29
    assert 70 < threshold_at_far(hundred, impostors, 0.29) < 70.1
    several = threshold_at_far(scores, same, torch.tensor([0.1, 0.01]))
    assert several.tolist() == [float(threshold_at_far(scores, same, rate)) for rate in (0.1, 0.01)]


def utility_by_pairs(x, labels, thresholds):
    x = normalise(x)
    out = []
    for c in labels.unique().tolist():
        mine = [i for i in range(len(x)) if labels[i] == c]
        rest = [i for i in range(len(x)) if labels[i] != c]
        same = [float((x[i] - x[j]).norm()) for i in mine for j in mine if i < j]
        other = [float((x[i] - x[j]).norm()) for i in mine for j in rest]
        row = []
        for d in thresholds.tolist():
            phi, psi = sum(v <= d for v in same) / len(same), sum(v > d for v in other) / len(other)
            row.append((2 * phi * psi / (phi + psi) if phi + psi else 0.0, phi, psi))
        out.append(row)
    return torch.tensor(out, dtype=torch.float64).permute(2, 0, 1)


@pytest.mark.parametrize("block", [60 * 7, 1 << 21])
def test_utility_curves_are_counts_of_pairs(block, monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK", block)
    x, labels = cloud()
    thresholds = torch.tensor([0.31, 0.0, 0.77, 1.2, 1.9, 2.1, 0.6], dtype=torch.float64)
    curves = utility_curves(x, 3 * labels + 1, thresholds)
    expected = utility_by_pairs(x, labels, thresholds)
    torch.testing.assert_close(torch.stack(curves[:3]), expected, rtol=1e-13, atol=1e-13)
    assert curves.counted.all()
    assert expected[0].amax() > 0.7
    single = utility_curves(x.float(), labels, thresholds.float())
    torch.testing.assert_close(single.utility, expected[0], rtol=0, atol=0.02)
    assert single.utility.dtype == torch.float64


def opis_by_pairs(x, labels, far, count, worst=None):
    points = normalise(x)
    n = len(x)
    other = sorted(
        float((points[i] - points[j]).norm()) for i in range(n) for j in range(i + 1, n) if labels[i] != labels[j]
    )
    low, high = (
        other[math.floor(rate * len(other) + 1e-9)] - 1e-12 for rate in far
    )  # the next pair would be one too many
    grid = torch.linspace(low, high, count, dtype=torch.float64)
    utility = utility_by_pairs(x, labels, grid)[0]
    square = (utility - utility.mean(0)) ** 2
    integrals = torch.trapezoid(square, grid, dim=1) / (high - low)
    if worst is not None:
        integrals = integrals.sort(descending=True).values[: math.ceil(worst * len(integrals))]
    return float(integrals.mean())


@pytest.mark.parametrize("far", [(0.01, 0.1), (0.05, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_opis_is_the_integral_over_pairs(far, seed):
    x, labels = cloud(45, seed=seed)
    value = opis(x, labels, far, 33)
    assert float(value) == pytest.approx(opis_by_pairs(x, labels, far, 33), rel=1e-9)
    assert value > 1e-4
    for worst in (0.01, 0.2, 0.4, 0.5, 1.0):
        assert float(opis(x, labels, far, 33, worst)) == pytest.approx(
            opis_by_pairs(x, labels, far, 33, worst), rel=1e-9
        )
    assert float(opis(x, labels, far, 33, 1.0)) == pytest.approx(float(value), rel=1e-12)
    assert opis(x, labels, far, 33, 0.2) > value


def test_opis_vanishes_when_classes_share_one_curve():
    # Classes are rotated copies of each other on a circle, so that each sees the same distances.
    angle = torch.tensor([0.0, 0.1, 0.35, 0.6], dtype=torch.float64)
    turns = 2 * math.pi / 5 * torch.arange(5, dtype=torch.float64)
    x = (turns[:, None] + angle).reshape(-1)
    x = torch.stack([x.cos(), x.sin()], 1)
    labels = torch.arange(5).repeat_interleave(4)
    edges = torch.tensor([0.2, 0.4, 0.58, 0.7, 1.3])
    utility = utility_curves(x, labels, edges).utility
    assert utility.amax() - utility.amin() > 0.1
    assert opis(x, labels, (0.2, 0.6)) < 1e-20
    wider = torch.where(labels[:, None] == 0, x + torch.tensor([0.0, 0.6], dtype=x.dtype), x)
    assert opis(wider, labels, (0.2, 0.6)) > 1e-3


def test_two_curves_by_hand():
    # Class 0 is one point, class 1 two points a right angle apart, and each class keeps clear of the other.
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    curves = utility_curves(x, labels, torch.tensor([1.0, 1.5, 2.0]))
    torch.testing.assert_close(curves.sensitivity, torch.tensor([[1.0, 1, 1], [0, 1, 1]], dtype=torch.float64))
    torch.testing.assert_close(curves.specificity, torch.tensor([[1.0, 0.5, 0]] * 2, dtype=torch.float64))
    torch.testing.assert_close(curves.utility, torch.tensor([[1.0, 2 / 3, 0], [0, 2 / 3, 0]], dtype=torch.float64))
    # Distances of the four pairs of two classes: √2, √2, 2, 2. Below the first U is (1, 0), so OPIS is 1/4 there.
    assert float(opis(x, labels, (0.0, 0.0))) == pytest.approx(0.25, abs=1e-12)


def test_scale_and_order_do_not_matter():
    x, labels = cloud(40)
    lengths = 0.5 + torch.rand(40, 1, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    expected = opis(x, labels)
    assert float(opis((lengths * x)[order], 7 - labels[order])) == pytest.approx(float(expected), rel=1e-9)


def test_classes_that_cannot_be_judged_are_not_counted():
    x, labels = cloud(30, 3)
    lonely = torch.cat([labels, torch.tensor([50])])
    with_one_more = torch.cat([x, -x[:1]])
    curves = utility_curves(with_one_more, lonely, torch.tensor([0.5, 1.0], dtype=x.dtype), classes=60)
    assert curves.counted.nonzero()[:, 0].tolist() == [0, 1, 2]
    assert curves.utility[3:].abs().max() == 0
    assert float(opis(with_one_more, lonely, classes=60)) == pytest.approx(
        float(opis(with_one_more, lonely)), rel=1e-12
    )
    one_class = utility_curves(x, torch.zeros(30, dtype=torch.long), torch.tensor([0.5]))
    assert not one_class.counted.any()


def test_members_of_a_fleet_under_vmap(monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK", 400)
    x = torch.stack([cloud(40, seed=seed)[0] for seed in range(3)])
    labels = torch.stack([cloud(40, seed=seed)[1].roll(seed) for seed in range(3)])
    thresholds = torch.linspace(0, 2, 9, dtype=x.dtype)
    rates = torch.tensor([0.05, 0.1, 0.3])

    def measures(e, y, rate):
        scores, same = pair_scores(e, y)
        threshold = threshold_at_far(scores, same, rate)
        curve = roc(scores, same)
        return (
            opis(e, y, classes=5),
            opis(e, y, worst=0.3, classes=5),
            utility_curves(e, y, thresholds, 5).utility,
            threshold,
            *far_frr(scores, same, threshold),
            *curve,
            *roc(scores, same, thresholds),
        )

    together = vmap(measures)(x, labels, rates)
    for member in range(3):
        for one, two in zip(together, measures(x[member], labels[member], rates[member]), strict=True):
            torch.testing.assert_close(one[member], two)
    shared = vmap(lambda e: opis(e, labels[0]))(x)
    torch.testing.assert_close(shared, torch.stack([opis(e, labels[0]) for e in x]))
    with pytest.raises(ValueError, match="classes: expected the number"):
        vmap(opis)(x, labels)


def test_collapsed_embeddings_are_defined():
    labels = torch.arange(12) % 3
    for points in (torch.ones(12, 4), torch.zeros(12, 4), torch.eye(3)[labels]):
        assert opis(points, labels).isfinite()
        assert roc(*pair_scores(points, labels)).far.isfinite().all()
    assert opis(torch.eye(3)[labels], labels) == 0


def test_bad_input():
    x, labels = cloud(20)
    scores, same = pair_scores(x, labels)
    nan = x.index_fill(0, torch.tensor([1]), math.nan)
    thresholds = torch.tensor([0.5])
    for call in (
        lambda: pair_scores(nan, labels),
        lambda: opis(nan, labels),
        lambda: utility_curves(nan, labels, thresholds),
    ):
        with pytest.raises(ValueError, match="embeddings: expected finite"):
            call()
    for function in (roc, lambda s, g: far_frr(s, g, 0.5), lambda s, g: threshold_at_far(s, g, 0.1)):
        with pytest.raises(ValueError, match="scores: expected finite"):
            function(scores / 0, same)
        with pytest.raises(ValueError, match="pair of different classes"):
            function(scores, torch.ones_like(same))
        with pytest.raises(Exception, match="same"):
            function(scores, same[1:])
    for function in (roc, lambda s, g: far_frr(s, g, 0.5)):
        with pytest.raises(ValueError, match="pair of the same class"):
            function(scores, torch.zeros_like(same))
    for call, name in (
        (lambda: threshold_at_far(scores, same, 1.5), "far"),
        (lambda: threshold_at_far(scores, same, torch.tensor([0.1, -0.1])), "far"),
        (lambda: utility_curves(x, labels, -thresholds), "thresholds"),
        (lambda: utility_curves(x, labels, thresholds, 3), "labels"),
        (lambda: opis(x, labels, far=(0.1, 0.01)), "far"),
        (lambda: opis(x, labels, thresholds=1), "thresholds"),
        (lambda: opis(x, labels, worst=0.0), "worst"),
        (lambda: opis(x, labels, worst=1.1), "worst"),
        (lambda: opis(x, torch.zeros_like(labels)), "labels"),
        (lambda: opis(x, torch.arange(20)), "labels"),
        (lambda: opis(x[:1], labels[:1]), "labels"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()
    with pytest.raises(Exception, match="labels"):
        opis(x, labels[1:])
