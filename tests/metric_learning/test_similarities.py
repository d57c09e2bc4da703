"""Similarities and the tools of the losses: closed forms, pytorch-metric-learning, gradients where rows coincide."""

import math

import pytest
import torch
from pytorch_metric_learning import distances
from torch.func import vmap

from toolkit.metric_learning.common import masked_logsumexp, masked_mean, pair_masks, require_finite, shared
from toolkit.metric_learning.similarities import cosine, euclidean, normalise, precomputed, snr, squared_euclidean

MEASURES = [cosine, euclidean, squared_euclidean, snr]
X = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
every_measure = pytest.mark.parametrize("measure", MEASURES, ids=repr)


def rows(count=6, dim=5, seed=0, dtype=torch.float64):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_tables_by_hand():
    assert cosine(X).tolist() == [pytest.approx(row) for row in ([1, 0.8, -0.6], [0.8, 1, 0], [-0.6, 0, 1])]
    squares = [[0, 13, 32], [13, 0, 5], [32, 5, 0]]
    assert squared_euclidean(X).tolist() == [pytest.approx(row) for row in squares]
    assert euclidean(X).tolist() == [pytest.approx([math.sqrt(v) for v in row]) for row in squares]
    # centred rows (-.5, .5), (-1, 1), (-.5, .5): noise 0 or .5, signals .5 and 2
    assert snr(X).tolist() == [pytest.approx(row, abs=1e-12) for row in ([0, 1, 0], [0.25, 0, 0.25], [0, 1, 0])]
    assert precomputed(X) is X
    assert normalise(X).tolist() == [pytest.approx(row) for row in ([0.6, 0.8], [0, 1], [-1, 0])]


def test_excess_is_how_much_farther_the_first_is():
    assert [measure.far_is_large for measure in [*MEASURES, precomputed]] == [False, True, True, True, False]
    assert euclidean.excess(3.0, 1.0) == 2
    assert cosine.excess(0.25, 0.75) == 0.5
    assert euclidean.excess(torch.tensor([1.0]), 3.0).tolist() == [-2]
    assert [repr(measure) for measure in MEASURES] == ["cosine", "euclidean", "squared_euclidean", "snr"]


@pytest.mark.parametrize(
    ("measure", "peer"),
    [
        (cosine, distances.CosineSimilarity()),
        (euclidean, distances.LpDistance(normalize_embeddings=False)),
        (squared_euclidean, distances.LpDistance(normalize_embeddings=False, power=2)),
        (snr, distances.SNRDistance(normalize_embeddings=False)),
    ],
    ids=repr,
)
def test_tables_and_gradients_are_pytorch_metric_learnings(measure, peer):
    x, y, weights = rows(6).requires_grad_(), rows(4, seed=1).requires_grad_(), rows(6, 4, seed=2)
    ours, theirs = measure(x, y), peer(x, y)
    assert ours.shape == (6, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad((weights * ours).sum(), (x, y)),
        torch.autograd.grad((weights * theirs).sum(), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(measure(x), measure(x, x), rtol=1e-12, atol=1e-12)


@every_measure
def test_one_row_at_a_time_and_vmap(measure):
    x, y = rows(6), rows(4, seed=1)
    table = measure(x, y)
    for i in range(6):
        for j in range(4):
            torch.testing.assert_close(measure(x[i : i + 1], y[j : j + 1])[0, 0], table[i, j], rtol=1e-11, atol=1e-12)
    together = vmap(measure)(torch.stack([x, 2 * x]), torch.stack([y, y]))
    torch.testing.assert_close(together[1], measure(2 * x, y), rtol=1e-12, atol=1e-12)


def test_snr_is_not_symmetric_and_ignores_shifts():
    x = rows()
    variance = x.var(-1)
    torch.testing.assert_close(snr(x) * variance[:, None], (snr(x) * variance[:, None]).mT)
    torch.testing.assert_close(snr(x + 3), snr(x))
    torch.testing.assert_close(snr(x - x.mean(-1, keepdim=True)), snr(x))
    assert (snr(x) - snr(x).mT).abs().max() > 0.1


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_correlation_under_independent_noise_is_one_over_the_root_of_one_plus_snr(noise):
    """Exactly so when noise is orthogonal to the centred signal."""
    signal, other = (lambda t: t - t.mean(-1, keepdim=True))(rows(2, 200))
    other = other - signal * (other @ signal) / (signal @ signal)
    received = signal + noise * other
    distance = snr(signal[None], received[None]).item()
    assert distance == pytest.approx((noise**2 * other.var() / signal.var()).item())
    assert torch.corrcoef(torch.stack([signal, received]))[0, 1].item() == pytest.approx(1 / math.sqrt(1 + distance))


@every_measure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_zero_and_constant_rows_have_finite_gradients(measure, dtype):
    one = rows(1, dtype=dtype)
    x = torch.cat([one, one, 0 * one, 0 * one, torch.ones_like(one), 3 * one, -one]).requires_grad_()
    table = measure(x)
    (gradient,) = torch.autograd.grad(table.sum() + (table**2).sum(), x)
    assert table.isfinite().all()
    assert gradient.isfinite().all()
    if measure.far_is_large:
        assert table.min() >= 0
        assert table.diagonal().abs().max() < 1e-4
        (between,) = torch.autograd.grad(measure(x)[0, 1], x)
        assert between.abs().max() < 1e-2
    else:
        assert table[2].abs().max() == 0
        assert normalise(x)[2:4].abs().max() == 0


def test_euclidean_of_rows_that_coincide_far_from_the_origin_is_zero_without_gradient():
    x = (rows(1, dtype=torch.float32) * 1e3).repeat(2, 1).requires_grad_()
    table = euclidean(x)
    (gradient,) = torch.autograd.grad(table.sum(), x)
    assert table.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_anchor_of_equal_coordinates_has_snr_distance_zero(dtype):
    """Also when their mean is rounded."""
    equal = torch.tensor([0.1, 1 / 3, -7e4, 1e-20], dtype=dtype)[:, None].expand(4, 127)
    x = torch.cat([equal, rows(2, 127, dtype=dtype)]).requires_grad_()
    table = snr(x)
    (gradient,) = torch.autograd.grad(table.sum(), x)
    assert table[:4].abs().max() == 0
    assert gradient.abs().max() < 1e3 * table.detach().max()
    faint = 1e-3 * rows(2, 5, dtype=dtype) + 1
    torch.testing.assert_close(snr(faint), snr(1e3 * faint), rtol=2e-2, atol=1e-3)
    assert snr(faint)[0, 1] > 0.1


def test_shapes_are_checked():
    for measure in MEASURES:
        with pytest.raises(TypeError):
            measure(rows(3, 4), rows(3, 5))
        with pytest.raises(TypeError):
            measure(rows(3)[0])


def test_pair_masks_by_hand():
    positive, negative = pair_masks(torch.tensor([4, 7, 4]))
    assert positive.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert negative.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_logsumexp(dtype):
    values = (30 * rows(5, 7, dtype=dtype)).requires_grad_()
    mask = rows(5, 7, seed=1) > 0
    mask[0], mask[1] = False, True
    result = masked_logsumexp(values, mask)
    expected = torch.stack([values[i][mask[i]].logsumexp(-1) for i in range(1, 5)])
    torch.testing.assert_close(result[1:], expected)
    assert result[0] < torch.finfo(dtype).min / 3
    assert torch.nn.functional.softplus(result[0]) == 0
    (gradient,) = torch.autograd.grad(result.sum(), values)
    torch.testing.assert_close(gradient[1:], values.masked_fill(~mask, -math.inf)[1:].softmax(-1))
    assert gradient[0].abs().max() == 0
    huge = torch.full((1, 3), 1e30, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(masked_logsumexp(huge, torch.tensor([[True, True, False]])).sum(), huge)
    assert gradient.tolist() == [[0.5, 0.5, 0]]
    torch.testing.assert_close(vmap(masked_logsumexp)(values.detach()[None], mask[None])[0], result.detach())


def test_masked_mean_and_shared():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_mean(torch.tensor([[1.0, math.nan, 4.0], [1.0, 2.0, 3.0]]), mask).tolist() == [2.5, 0]
    totals = torch.tensor([1.0, 0.0, 0.2], dtype=torch.float64)
    values = shared(totals, torch.tensor(7))
    assert values.mean().item() == pytest.approx(1.2 / 7, rel=1e-15)
    assert shared(0 * totals, torch.tensor(0)).tolist() == [0, 0, 0]
    many = vmap(shared)(torch.stack([totals, totals]), torch.tensor([7, 3]))
    torch.testing.assert_close(many[0], values, rtol=0, atol=0)


def test_require_finite_names_the_argument_and_counts():
    require_finite("table", torch.ones(3))
    with pytest.raises(ValueError, match=r"^table: expected finite values, got 2 that are not"):
        require_finite("table", torch.tensor([math.nan, 1.0, -math.inf]))
    require_finite("table", torch.tensor([3e38, 3e38]))  # whose sum is not finite


def test_require_finite_reads_nothing_under_vmap():
    def same(row):
        require_finite("table", row)
        return row

    assert vmap(same)(torch.full((2, 2), math.nan)).isnan().all()
