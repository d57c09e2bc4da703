"""Stability under dropout: overlaps in closed form, matching by enumeration, leave-one-out by refitting."""

from itertools import permutations

import numpy as np
import pytest
import torch

from toolkit.calibration.stability import (
    accuracy_line,
    box_iou,
    matched_box_stability,
    prediction_overlap,
    stability_study,
)
from toolkit.random import key, normal, uniform


def boxes(seed: int, count: int) -> torch.Tensor:
    corners = uniform(key(seed), (count, 2), torch.float64) * 4
    return torch.cat([corners, corners + 1 + uniform(key(seed, 1), (count, 2), torch.float64) * 4], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_by_hand(dtype):
    a = torch.tensor(
        [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1.0]], dtype=dtype
    )
    b = torch.tensor(
        [[0, 0, 2, 2], [1, 0, 3, 2], [1, 1, 3, 2], [1, 0, 2, 1], [1, 1, 1, 1], [3, 3, 4, 4.0]], dtype=dtype
    )
    expected = torch.tensor([1, 2 / 6, 2 / 16, 0, 0, 0], dtype=dtype)
    torch.testing.assert_close(box_iou(a, b), expected)
    torch.testing.assert_close(box_iou(b, a), expected)


def test_iou_counts_pixels():
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 40  # 0 .. 10
    for a, b in zip(boxes(0, 5), boxes(1, 5), strict=True):
        inside = [
            ((grid >= box[0]) & (grid < box[2]))[:, None] & ((grid >= box[1]) & (grid < box[3])) for box in (a, b)
        ]
        counted = (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()
        assert box_iou(a[None], b[None]).item() == pytest.approx(counted.item(), abs=0.02)
    pairs = boxes(0, 6).reshape(2, 3, 4), boxes(1, 6).reshape(2, 3, 4)
    looped = torch.stack([box_iou(a, b) for a, b in zip(*pairs, strict=True)])
    torch.testing.assert_close(torch.vmap(box_iou)(*pairs), looped)


def test_matching_is_the_best_of_all_pairings():
    for seed in range(6):
        a, b = boxes(seed, 3), boxes(seed + 50, 4)
        best = max(sum(box_iou(a, b[list(order)]).tolist()) / 3 for order in permutations(range(4), 3))
        assert matched_box_stability(a, b).item() == pytest.approx(best)
        assert matched_box_stability(b, a).item() == pytest.approx(best)
    a = boxes(3, 5)
    assert matched_box_stability(a, a[[4, 2, 0, 1, 3]]).item() == pytest.approx(1)


def test_overlap_is_a_function_of_total_variation():
    p, q = normal(key(0), (30, 5), torch.float64).softmax(-1), normal(key(1), (30, 5), torch.float64).softmax(-1)
    t = (p - q).abs().sum(1) / 2
    torch.testing.assert_close(prediction_overlap(p, q), (1 - t) / (1 + t))
    assert prediction_overlap(torch.eye(3), torch.eye(3)[[0, 2, 1]]).tolist() == [1, 0, 0]
    assert prediction_overlap(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1 / 3)


def test_line_and_left_out_estimates_by_refitting():
    x = uniform(key(2), (12,), torch.float64)
    y = 0.2 + 0.7 * x + 0.1 * normal(key(3), (12,), torch.float64)
    found = accuracy_line(x, y)
    slope, intercept = np.polyfit(x.numpy(), y.numpy(), 1)
    assert found.slope.item() == pytest.approx(slope)
    assert found.intercept.item() == pytest.approx(intercept)
    assert found.correlation.item() == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1])
    for i in range(12):
        rest = np.arange(12) != i
        assert found.left_out[i].item() == pytest.approx(np.polyval(np.polyfit(x[rest], y[rest], 1), x[i].item()))
    falling = accuracy_line(-x, y)
    assert falling.correlation.item() == pytest.approx(-found.correlation.item())
    torch.testing.assert_close(falling.left_out, found.left_out)


def test_exact_line_has_no_error_and_constant_accuracy_no_correlation():
    x = torch.tensor([0.1, 0.4, 0.5, 0.9])
    exact = accuracy_line(x, 0.3 + 0.5 * x)
    torch.testing.assert_close(exact.left_out, 0.3 + 0.5 * x)
    assert exact.correlation.item() == pytest.approx(1)
    assert exact.left_out.dtype == torch.float32
    flat = accuracy_line(x, torch.full((4,), 0.5))
    assert flat.correlation == 0
    assert flat.slope == 0
    rows = uniform(key(4), (3, 8))
    batched = torch.vmap(lambda row: accuracy_line(row, row.square()).left_out)(rows)
    torch.testing.assert_close(batched, torch.stack([accuracy_line(row, row.square()).left_out for row in rows]))


def test_stability_follows_accuracy_where_evidence_is_hidden_and_not_where_it_is_turned():
    study = stability_study(seeds=2, examples=150)
    assert len(study.names) == len(study.hides) == len(study.accuracy) == 37
    assert int(study.hides.sum()) == 28
    hidden, turned = study.hides, study.names.index("rotation 5")
    for i in range(2):
        line = accuracy_line(study.agreement[hidden, i], study.accuracy[hidden, i])
        assert line.correlation > 0.8
        assert line.slope > 0
        errors = (line.left_out - study.accuracy[hidden, i]).square().mean().sqrt()
        assert errors < 0.6 * study.accuracy[hidden, i].std()
        assert study.agreement[turned, i] > 0.7
        assert study.accuracy[turned, i] < 0.4
    for scores in (study.agreement, study.overlap, study.confidence):
        assert scores.min() > 0
        assert scores.max() <= 1
    clean = study.names.index("clean")
    assert (study.accuracy[clean] > 0.9).all()
    one = stability_study(seeds=1, examples=150)
    torch.testing.assert_close(one.agreement[:, 0], study.agreement[:, 0], atol=0.02, rtol=0)  # members are independent


def test_without_dropout_nothing_moves():
    study = stability_study(rate=0.0, seeds=1, examples=30, steps=10, samples=1)
    torch.testing.assert_close(study.agreement, torch.ones(37, 1))
    torch.testing.assert_close(study.overlap, torch.ones(37, 1))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="first: expected corners"):
        box_iou(torch.tensor([[2.0, 0.0, 1.0, 1.0]]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="dropped: expected at least one box"):
        matched_box_stability(torch.zeros(1, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="second: expected"):
        prediction_overlap(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.6]]))
    with pytest.raises(ValueError, match="scores: expected at least 3"):
        accuracy_line(torch.rand(2), torch.rand(2))
    for scores in ([0.5, 0.5, 0.5], [0.5, 0.5, 0.9]):
        with pytest.raises(ValueError, match="scores: expected scores that differ"):
            accuracy_line(torch.tensor(scores), torch.rand(3))
    with pytest.raises(ValueError, match="samples: expected"):
        stability_study(samples=0)
