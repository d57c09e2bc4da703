import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from toolkit.calibration.regression import interval_coverage
from toolkit.calibration.score_levels import (
    level_moments,
    one_hot_levels,
    rating_task,
    score_level_predictions,
    soft_levels,
    thurstone_fidelity,
)

GRID = [(m, s) for m in (1.2, 1.9, 2.5, 2.999, 3.0, 3.3, 4.6) for s in (0.25, 0.5, 0.9, 1.4)]
MEAN, SPREAD = torch.tensor(GRID, dtype=torch.float64).unbind(1)


def raw_levels(mean, spread, density, levels=5):
    k = np.arange(1, levels + 1)
    if density == "pdf":
        return stats.norm.pdf(k, mean, spread)
    return stats.norm.cdf(k + 0.5, mean, spread) - stats.norm.cdf(k - 0.5, mean, spread)


def adjusted(raw, mean):
    """Alpha and beta from the two linear equations, then the cut and the division."""
    k = np.arange(1, len(raw) + 1)
    alpha, beta = np.linalg.solve([[raw.sum(), len(raw)], [raw @ k, k.sum()]], [1, mean])
    cut = np.maximum(alpha * raw + beta, 0)
    return cut / cut.sum(), alpha * raw + beta


def neighbours(mean, levels=5):
    label = np.zeros(levels)
    below = min(math.floor(mean), levels - 1)
    label[below - 1], label[below] = below + 1 - mean, mean - below
    return label


def test_one_hot():
    scores = torch.tensor([1.0, 1.8, 1.81, 2.5, 3.4, 3.41, 4.2, 4.21, 5.0], dtype=torch.float64)
    assert (one_hot_levels(scores).argmax(1) + 1).tolist() == [1, 1, 2, 2, 3, 4, 4, 5, 5]
    assert (one_hot_levels(scores, rule="nearest").argmax(1) + 1).tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 5]
    assert (one_hot_levels(scores, 9).argmax(1) + 1).tolist()[-1] == 5  # 4 / (8 / 9) = 4.5 parts: in the fifth
    assert one_hot_levels(scores).sum(1).tolist() == [1] * 9
    fine = torch.linspace(1, 5, 4001, dtype=torch.float64)
    rules: list[tuple[Any, float]] = [("equal", 0.8), ("nearest", 0.5)]
    for rule, worst in rules:
        error = (level_moments(one_hot_levels(fine, rule=rule))[0] - fine).abs().max()
        assert error.item() == pytest.approx(worst, abs=2e-3)


@pytest.mark.parametrize("density", ["pdf", "cdf"])
def test_soft_levels_solve_the_two_equations(density):
    raw = soft_levels(MEAN, SPREAD, density=density, adjust=False)
    label = soft_levels(MEAN, SPREAD, density=density)
    uncuts = []
    for (mean, spread), p, found in zip(GRID, raw, label, strict=True):
        np.testing.assert_allclose(p, raw_levels(mean, spread, density), rtol=1e-9, atol=1e-15)
        nearby = mean if mean != 3 else 3 + 1e-5  # the limit, from a point where the equations are regular
        expected, uncut = adjusted(raw_levels(nearby, spread, density), nearby)
        if abs(expected @ np.arange(1, 6) - mean) > 0.1:
            expected = neighbours(mean)
        np.testing.assert_allclose(found, expected, atol=2e-3 if abs(mean - 3) < 2e-3 else 1e-9)
        uncuts.append(bool((uncut >= 0).all()))
    assert 8 < sum(uncuts) < len(GRID)  # with and without the cut
    mass, means = label.sum(1), label @ torch.arange(1.0, 6, dtype=torch.float64)
    torch.testing.assert_close(mass, torch.ones_like(mass))
    assert (label >= 0).all()
    assert ((means - MEAN).abs() <= 0.1).all()
    regular = torch.tensor(uncuts)
    torch.testing.assert_close(means[regular], MEAN[regular], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", ["pdf", "cdf"])
@pytest.mark.parametrize("levels", [4, 5])
def test_soft_levels_are_continuous_and_symmetric_at_the_centre(dtype, density, levels):
    centre = (levels + 1) / 2
    mean = centre + torch.tensor([-2e-3, -1.0001e-3, -0.9999e-3, 0, 0.9999e-3, 1.0001e-3, 2e-3], dtype=dtype)
    label = soft_levels(mean, torch.full_like(mean, 0.7), levels, density)
    assert label.diff(dim=0).abs().max() < 1e-3
    torch.testing.assert_close(label, label.flip(0, 1), atol=2e-5 if dtype == torch.float32 else 1e-9, rtol=0)
    assert label[3].max() > 1.5 / levels  # and not uniform, as 0 / (0 + 1e-9) would make it


def test_soft_levels_with_a_small_spread_are_two_neighbours():
    mean = torch.tensor([1.0, 1.3, 2.0, 3.0, 3.9, 5.0], dtype=torch.float64)
    for spread in (1e-12, 0.19):
        label = soft_levels(mean, torch.full_like(mean, spread))
        np.testing.assert_allclose(label, [neighbours(m) for m in mean.tolist()], atol=1e-12)
    assert (soft_levels(mean, torch.full_like(mean, 1.0))[3] > 0).sum() == 5
    kept = soft_levels(mean, torch.full_like(mean, 0.19), least_spread=0.1, density="cdf")
    assert not torch.allclose(kept, soft_levels(mean, torch.full_like(mean, 0.19), density="cdf"))
    assert torch.isfinite(soft_levels(mean.float(), torch.full((6,), 1e-30))).all()


def test_largest_shift_decides_between_the_cut_and_the_neighbours():
    mean, spread = torch.tensor([1.2], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    expected, uncut = adjusted(raw_levels(1.2, 0.5, "pdf"), 1.2)
    assert (uncut < 0).any()
    shift = abs(expected @ np.arange(1, 6) - 1.2)
    np.testing.assert_allclose(soft_levels(mean, spread, largest_shift=1.01 * shift)[0], expected, atol=1e-12)
    np.testing.assert_allclose(soft_levels(mean, spread, largest_shift=0.99 * shift)[0], neighbours(1.2), atol=1e-12)


def test_level_moments():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25], [0, 0.5, 0.5, 0, 0]], dtype=torch.float64)
    mean, spread = level_moments(p)
    for i in range(2):
        law = stats.rv_discrete(values=(np.arange(1, 6), p[i].numpy()))
        assert mean[i].item() == pytest.approx(law.mean())
        assert spread[i].item() == pytest.approx(law.std())
    # On a fine, wide scale a mass label has Sheppard's variance s^2 + 1/12 and a density label s^2.
    at, s = torch.tensor([20.37], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    cases: list[tuple[Any, float]] = [("cdf", 4 + 1 / 12), ("pdf", 4.0)]
    for density, variance in cases:
        mean, spread = level_moments(soft_levels(at, s, 40, density))
        assert mean.item() == pytest.approx(20.37, abs=1e-9)
        assert spread.item() ** 2 == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("fixed", [True, False])
def test_fidelity_by_enumeration(fixed):
    generator = torch.Generator().manual_seed(0)
    mu, s, m, t = (torch.rand(6, generator=generator, dtype=torch.float64) * 2 + 0.2 for _ in range(4))
    expected = np.zeros(6)
    for a in range(6):
        for b in range(6):
            if a != b:
                q = stats.norm.cdf((mu[a] - mu[b]) / math.sqrt(2 if fixed else s[a] ** 2 + s[b] ** 2))
                p = stats.norm.cdf((m[a] - m[b]) / math.sqrt(t[a] ** 2 + t[b] ** 2))
                expected[a] += (1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q))) / 5
    found = thurstone_fidelity(mu, m, t, None if fixed else s, eps=1e-14)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (expected > 1e-3).all()


def test_fidelity_is_zero_for_the_truth_and_sees_differences_only():
    m, t = torch.tensor([1.2, 2.5, 3.1, 4.4]), torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert thurstone_fidelity(m + 0.7, m, t, t).abs().max() < 3e-4  # -sqrt(eps) at most
    opposed = thurstone_fidelity(-m, m, t, t)
    assert (opposed > 0.2).all()
    assert (opposed <= 1).all()
    # Spreads fixed at 1: best at sqrt(2) difference / sqrt(sum of the variances) = 2 differences here.
    assert thurstone_fidelity(2 * m, m, t).abs().max() < 3e-4
    assert (thurstone_fidelity(m, m, t) > 5e-3).all()


def test_fidelity_gradient_goes_to_the_scores_alone():
    m, t = torch.tensor([1.2, 2.5, 3.1]), torch.tensor([0.0, 0.0, 0.3])
    scores = torch.tensor([3.0, 2.5, 2.5], requires_grad=True)
    spreads = torch.full((3,), 0.4, requires_grad=True)
    thurstone_fidelity(scores, m, t, spreads).sum().backward()
    assert spreads.grad is None
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0] > 0 > scores.grad[2]  # the first is rated too high, the last too low
    far = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    thurstone_fidelity(far, m, t).sum().backward()
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


def test_under_vmap():
    mean, spread = MEAN.reshape(4, 7), SPREAD.reshape(4, 7)
    for function in (
        lambda m, s: one_hot_levels(m),
        soft_levels,
        lambda m, s: soft_levels(m, s, density="cdf"),
        lambda m, s: level_moments(soft_levels(m, s))[1],
        lambda m, s: thurstone_fidelity(m.flip(0), m, s, s),
    ):
        loop = torch.stack([function(*row) for row in zip(mean, spread, strict=True)])
        torch.testing.assert_close(torch.vmap(function)(mean, spread), loop)


def test_rating_task():
    task = rating_task(4_000, 0, annotators=50)
    assert task.answers.min() == 1
    assert task.answers.max() == 5
    x = task.x[:, 0]
    torch.testing.assert_close(task.mean, 3 + 1.5 * torch.sin(2 * x))
    torch.testing.assert_close(task.spread, 0.4 * (1.3 + torch.cos(3 * x)))
    inside = (task.mean - 3).abs() + 4 * task.spread < 2  # where the cut to the scale does next to nothing
    assert inside.sum() > 200
    z = (task.answers - task.mean[:, None]) / task.spread[:, None]
    assert stats.kstest(z[inside].flatten().double().numpy(), "norm").pvalue > 1e-3
    for a, b in zip(rating_task(5, 1), rating_task(9, 1), strict=True):
        assert torch.equal(a, b[:5])


@pytest.fixture(scope="module")
def ratings():
    task, test = rating_task(256, 0), rating_task(500, 50)
    mean, spread = task.answers.mean(1), task.answers.std(1)
    raw = soft_levels(mean, spread, adjust=False)
    labels = {
        "one-hot": one_hot_levels(mean),
        "soft": soft_levels(mean, spread),
        "unadjusted": raw / raw.sum(1, keepdim=True),
        "soft again": soft_levels(mean, spread),
    }
    return test, score_level_predictions(task, labels, test.x, 3, fidelity=[0, 0, 0, 1])


def test_soft_labels_give_better_scores_and_spreads(ratings):
    test, found = ratings
    assert found["soft"].mean.shape == found["soft"].spread.shape == (3, 500)
    error = {name: (part.mean - test.mean).abs().mean(1) for name, part in found.items()}
    assert (error["soft"] < 0.5 * error["one-hot"]).all()
    assert (error["soft"] < 0.8 * error["unadjusted"]).all()
    correlation = {
        name: torch.corrcoef(torch.stack([part.spread.mean(0), test.spread]))[0, 1] for name, part in found.items()
    }
    assert correlation["soft"] > 0.75 > correlation["one-hot"]
    level = torch.tensor([0.8])
    one, soft = (
        torch.stack([interval_coverage(m, s, test.answers[:, 0], level) for m, s in zip(*found[name], strict=True)])
        for name in ("one-hot", "soft")
    )
    assert (one < 0.76).all()
    assert (soft > 0.8).all()


def test_fidelity_changes_only_its_own_members(ratings):
    _, found = ratings
    assert not torch.allclose(found["soft"].mean, found["soft again"].mean, atol=1e-3)
    task = rating_task(64, 0)
    label = soft_levels(task.answers.mean(1), task.answers.std(1))
    both = score_level_predictions(task, {"a": label, "b": label}, task.x, 2, fidelity=[0, 3], steps=8)
    alone = score_level_predictions(task, {"a": label}, task.x, 3, steps=8)
    torch.testing.assert_close(both["a"].mean, alone["a"].mean[:2], atol=1e-5, rtol=1e-5)


def test_bad_input():
    ok, low = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 3.0])
    task = rating_task(8, 0)
    label = soft_levels(task.answers.mean(1), task.answers.std(1))
    with pytest.raises(ValueError, match="levels"):
        one_hot_levels(ok, 1)
    with pytest.raises(ValueError, match="scores"):
        one_hot_levels(low)
    with pytest.raises(ValueError, match="mean"):
        soft_levels(low, ok)
    with pytest.raises(ValueError, match="mean"):
        soft_levels(torch.tensor([math.nan, 2.0]), ok)
    with pytest.raises(ValueError, match="spread"):
        soft_levels(ok, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="levels"):
        soft_levels(ok, ok, 1)
    with pytest.raises(ValueError, match="probabilities"):
        level_moments(torch.tensor([[0.5, 0.6]]))
    with pytest.raises(ValueError, match="scores"):
        thurstone_fidelity(ok[:1], ok[:1], ok[:1])
    with pytest.raises(ValueError, match="annotators"):
        rating_task(8, 0, annotators=0)
    with pytest.raises(ValueError, match="levels"):
        rating_task(8, 0, levels=1)
    with pytest.raises(ValueError, match="labels"):
        score_level_predictions(task, {}, task.x)
    with pytest.raises(ValueError, match="labels"):
        score_level_predictions(task, {"a": label, "b": label[:, :4]}, task.x)
    with pytest.raises(ValueError, match="fidelity"):
        score_level_predictions(task, {"a": label}, task.x, fidelity=[0, 1])
