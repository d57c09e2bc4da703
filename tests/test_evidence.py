"""Intervals and permutation tests against scipy, enumeration and simulation."""

import html
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from toolkit.evidence import (
    Interval,
    interval,
    paired,
    permutation_p,
    unpaired,
)

VALUES = np.array([0.031, 0.029, 0.035, 0.030, 0.028, 0.036, 0.0305, 0.027])
OTHERS = np.array([0.040, 0.052, 0.043, 0.038, 0.061, 0.044, 0.047, 0.039])


def limits(found: Interval) -> tuple[float, float]:
    return found.low, found.high


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_t_interval_is_scipys(level) -> None:
    found = interval(VALUES, level)
    oracle = stats.ttest_1samp(VALUES, 0).confidence_interval(level)
    assert limits(found) == pytest.approx((oracle.low, oracle.high), rel=1e-12)
    assert found.estimate == pytest.approx(VALUES.mean(), rel=1e-14)
    assert (found.n, found.level, found.method) == (8, level, "t")


def test_t_interval_covers_as_often_as_it_says() -> None:
    samples = np.random.default_rng(3).normal(2.0, 0.5, (4000, 8))
    covered = np.mean([found.low <= 2.0 <= found.high for found in map(interval, samples)])
    assert abs(covered - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 4000)


def test_unpaired_covers_with_unequal_spreads() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.normal(1.0, 0.2, (3000, 6)), rng.normal(0.4, 1.0, (3000, 12))
    covered = np.mean([low <= 0.6 <= high for low, high in map(limits, map(unpaired, first, second))])
    assert abs(covered - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / 3000)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 5), (3, 8)])
def test_welch_interval_is_scipys(sizes) -> None:
    a, b = VALUES[: sizes[0]], OTHERS[: sizes[1]]
    found = unpaired(a, b, 0.9)
    oracle = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert limits(found) == pytest.approx((oracle.low, oracle.high), rel=1e-12)
    assert found.estimate == pytest.approx(a.mean() - b.mean(), rel=1e-12)
    assert found.n == sum(sizes)


def test_paired_interval_is_that_of_the_differences() -> None:
    found = paired(VALUES, OTHERS)
    oracle = stats.ttest_rel(VALUES, OTHERS).confidence_interval(0.95)
    assert limits(found) == pytest.approx((oracle.low, oracle.high), rel=1e-12)
    assert found.estimate < 0
    shared = np.linspace(0, 1, 8)
    narrow, wide = paired(shared + VALUES, shared + OTHERS), unpaired(shared + VALUES, shared + OTHERS)
    assert narrow.high - narrow.low < 0.2 * (wide.high - wide.low)


@pytest.mark.parametrize("statistic", [None, np.median, lambda x: np.exp(np.mean(np.log(x)))])
def test_bootstrap_is_scipys_bca(statistic) -> None:
    found = interval(OTHERS, 0.9, "bootstrap", statistic, seed=5)
    oracle = stats.bootstrap(
        (OTHERS,), statistic or np.mean, vectorized=False, confidence_level=0.9, rng=np.random.default_rng(5)
    ).confidence_interval
    assert limits(found) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert found.estimate == pytest.approx((statistic or np.mean)(OTHERS))
    assert found.method == "bootstrap (BCa)"
    assert interval(OTHERS, 0.9, "bootstrap", statistic, seed=5) == found


def test_bootstrap_depends_on_its_seed_only() -> None:
    first = interval(OTHERS, method="bootstrap")
    np.random.default_rng().normal(size=10)
    assert interval(OTHERS, method="bootstrap") == first
    assert interval(OTHERS, method="bootstrap", seed=1) != first


def test_unpaired_bootstrap() -> None:
    found = unpaired(VALUES, OTHERS[:5], method="bootstrap")
    oracle = stats.bootstrap(
        (VALUES, OTHERS[:5]), lambda x, y: x.mean() - y.mean(), vectorized=False, rng=np.random.default_rng(0)
    ).confidence_interval
    assert limits(found) == pytest.approx((oracle.low, oracle.high), rel=1e-9)


def test_bootstrap_without_an_acceleration() -> None:
    found = interval([0.0, 0.0, 0.0, 0.0, 1.0], method="bootstrap", statistic=np.min)
    assert found.method == "bootstrap (percentile)"
    assert limits(found) == (0.0, 0.0)


@given(st.floats(-1e6, 1e6), st.integers(2, 20), st.sampled_from(["t", "bootstrap"]))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_constant_values_have_zero_width(value, n, method) -> None:
    found = interval([value] * n, method=method)
    assert (found.estimate, found.low, found.high, found.n) == (value, value, value, n)
    both = unpaired([value] * n, [value] * 3, method=method)
    assert (both.estimate, both.low, both.high) == (0.0, 0.0, 0.0)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-10, 10))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_intervals_move_and_stretch_with_the_values(values, scale, shift) -> None:
    before, after = interval(values), interval(scale * np.array(values) + shift)
    expected = [scale * end + shift for end in (before.low, before.estimate, before.high)]
    assert [after.low, after.estimate, after.high] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert before.low <= before.estimate <= before.high


def test_lists_arrays_and_tensors() -> None:
    oracle = interval(VALUES)
    assert interval(VALUES.tolist()) == oracle
    assert interval(torch.tensor(VALUES, requires_grad=True)) == oracle
    assert interval(torch.tensor(VALUES).float()).estimate == pytest.approx(oracle.estimate, rel=1e-6)
    assert interval(torch.tensor([1, 2, 3])) == interval([1.0, 2.0, 3.0])
    assert interval(torch.tensor([True, False])).estimate == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.1], "values: expected at least 2 members to state an interval, got 1"),
        ([], "values: expected at least 2 members .* got 0"),
        (0.5, r"values: expected one number per member, shape \(members,\), got shape \(\)"),
        ([[1.0, 2.0]], r"got shape \(1, 2\)"),
        ([1.0, math.nan, math.inf, 2.0], "values: 2 of 4 values are not finite, the first at index 1"),
        (["a", "b"], "values: expected one number per member, got list"),
    ],
)
def test_bad_values(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        interval(values)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="b: expected 8 values to pair with a, got 7"):
        paired(VALUES, OTHERS[:7])
    with pytest.raises(ValueError, match="b: expected 8 values to pair with a, got 7"):
        permutation_p(VALUES, OTHERS[:7])
    with pytest.raises(ValueError, match="a: 1 of 2 values are not finite"):
        unpaired([math.nan, 1.0], OTHERS)
    with pytest.raises(ValueError, match="b: expected at least 2 members"):
        unpaired(VALUES, [1.0])
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
            interval(VALUES, level)
    with pytest.raises(ValueError, match="method: expected"):
        interval(VALUES, method="normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistic: expected None"):
        interval(VALUES, statistic=np.median)


def test_permutations_of_pairs_by_enumeration() -> None:
    difference = VALUES - OTHERS + 0.012
    signs = np.array(list(itertools.product((1, -1), repeat=8)))
    sums = signs @ difference
    tail: dict[Any, float] = {"less": np.mean(sums <= sums[0] + 1e-12), "greater": np.mean(sums >= sums[0] - 1e-12)}
    tail["two-sided"] = min(1.0, 2 * min(tail.values()))
    for alternative, expected in tail.items():
        assert permutation_p(difference, np.zeros(8), alternative=alternative) == pytest.approx(expected, abs=1e-12)


def test_permutations_of_groups_by_enumeration() -> None:
    a, b = VALUES[:4] + 0.008, OTHERS[:5]
    pool = np.concatenate([a, b])
    means = []
    for chosen in itertools.combinations(range(9), 4):
        rest = [index for index in range(9) if index not in chosen]
        means.append(pool[list(chosen)].mean() - pool[rest].mean())
    expected = np.mean(np.array(means) <= a.mean() - b.mean() + 1e-12)
    assert permutation_p(a, b, paired=False, alternative="less") == pytest.approx(expected, abs=1e-12)


# --- how an interval reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0.03124, 0.02899, 0.03349, 16), "0.0312 [0.0290, 0.0335] (n = 16)"),
        ((-1.5, -2.0, -1.0, 3), "-1.50 [-2.00, -1.00] (n = 3)"),
        ((12345.6, 12000.0, 12691.2, 5), "12350 [12000, 12690] (n = 5)"),
        ((0.5, 0.5, 0.5, 2), "0.5000 [0.5000, 0.5000] (n = 2)"),
        ((0.0, 0.0, 0.0, 2), "0.000 [0.000, 0.000] (n = 2)"),
        ((50.0, 50.0, 50.0, 2), "50.00 [50.00, 50.00] (n = 2)"),
        ((2e-9, 1e-9, 3e-9, 4), "2e-09 [1e-09, 3e-09] (n = 4)"),
        ((-0.0001, -0.05, 0.05, 4), "0.000 [-0.050, 0.050] (n = 4)"),
    ],
)
def test_text_of_an_interval(numbers, expected) -> None:
    estimate, low, high, n = numbers
    found = Interval(estimate, low, high, n, 0.95, "t")
    assert str(found) == expected
    assert html.escape(expected) in found._repr_html_()
    assert "95 % confidence interval, t" in found._repr_html_()
