import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from toolkit.calibration.regression import (
    error_correlation,
    error_prediction,
    gaussian_kl,
    heteroscedastic,
    interval_coverage,
    noisy_gap_task,
    noisy_gap_truth,
    spread_decomposition,
    train_regressors,
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_heteroscedastic_is_the_gaussian_likelihood_and_blind_to_the_sign():
    mean, spread, y = numbers(9), numbers(9, seed=1), numbers(9, seed=2)
    expected = -stats.norm.logpdf(y, mean, spread.abs()) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(heteroscedastic(mean, spread, y, eps=0.0), expected, rtol=1e-12)
    np.testing.assert_allclose(heteroscedastic(mean, -spread, y, eps=0.0), expected, rtol=1e-12)
    wide = (spread.square() + 0.3).sqrt()
    torch.testing.assert_close(heteroscedastic(mean, spread, y, 0.3), heteroscedastic(mean, wide, y, 0.0))
    assert heteroscedastic(mean.float(), spread.float(), y.float()).dtype == torch.float32


def test_slope_in_the_log_variance():
    mean, y = numbers(7), numbers(7, seed=2)
    log_variance = numbers(7, seed=1).requires_grad_()
    heteroscedastic(mean, (log_variance / 2).exp(), y, 0.0).sum().backward()
    torch.testing.assert_close(log_variance.grad, 0.5 * (1 - (y - mean).square() / log_variance.detach().exp()))


def test_best_constants():
    e = numbers(101)
    power = e.square().mean()
    u = torch.linspace(0.01, 3, 600, dtype=torch.float64)
    step = (u[1] - u[0]).item()
    cases: list[tuple[Any, torch.Tensor]] = [
        ("hts", power.sqrt()),
        ("squared", power.sqrt()),
        ("absolute", e.abs().median()),
    ]
    for kind, best in cases:
        losses = torch.stack([error_prediction(value.expand(101), e, kind, eps=0.0).mean() for value in u])
        assert u[losses.argmin()].item() == pytest.approx(best.item(), abs=step)
        torch.testing.assert_close(error_prediction(-u, u + 0.1, kind), error_prediction(u, -u - 0.1, kind))
    at_best = error_prediction(power.sqrt().expand(101), e, eps=0.0).mean().item()
    assert at_best == pytest.approx(0.5 + 0.5 * math.log(power.item()), abs=1e-12)


def test_error_prediction_values():
    u, e = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -3.0])
    expected = [0.5 / 4 + math.log(2), 0.5 * 9 / 0.25 + math.log(0.5)]
    assert error_prediction(u, e, "hts", 0.0).tolist() == pytest.approx(expected)
    assert error_prediction(u, e, "squared").tolist() == [9.0, 8.75**2]
    assert error_prediction(u, e, "absolute").tolist() == [1.0, 2.5]


def test_kl_is_the_integral():
    mean, spread, target_mean, target_spread = 0.4, 0.7, -0.3, 1.1
    y = np.linspace(-14, 14, 200_001)
    p, q = stats.norm(target_mean, target_spread), stats.norm(mean, spread)
    expected = np.trapezoid(p.pdf(y) * (p.logpdf(y) - q.logpdf(y)), y)
    one = [torch.tensor([v], dtype=torch.float64) for v in (mean, spread, target_mean, target_spread)]
    assert gaussian_kl(one[0], one[1], one[2], one[3], eps=0.0).item() == pytest.approx(expected, rel=1e-9)
    m, s = numbers(5), numbers(5, seed=1)
    torch.testing.assert_close(gaussian_kl(m, -s, m, s), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (gaussian_kl(m, s, m + 0.1, s) > 1e-4).all()
    assert (gaussian_kl(m, s, m, 1.1 * s) > 1e-4).all()


def test_kl_is_heteroscedastic_training_on_every_answer():
    answers, mean, spread = numbers(6, 4), numbers(6, seed=1), numbers(6, seed=2)
    every = torch.stack([heteroscedastic(mean, spread, a, 0.0) for a in answers.unbind(1)]).mean(0)
    target_spread = answers.std(1, correction=0)
    kl = gaussian_kl(mean, spread, answers.mean(1), target_spread, eps=0.0)
    torch.testing.assert_close(kl, every - target_spread.log() - 0.5)


def test_best_variance_of_the_kl_counts_the_annotators_once():
    answers = 2 * numbers(40_000, 3)  # true variance 4
    m, zero = answers.mean(1), torch.zeros(40_000, dtype=torch.float64)
    for correction, expected in ((0, 4.0), (1, 4 * (1 + 1 / 3))):
        s = answers.std(1, correction=correction)
        spread = torch.linspace(1.5, 3, 151, dtype=torch.float64)
        losses = torch.stack([gaussian_kl(zero, v.expand(40_000), m, s).mean() for v in spread])
        assert spread[losses.argmin()].square().item() == pytest.approx(expected, rel=0.02)


def test_spread_decomposition_is_the_mixtures_variance():
    means, spreads = numbers(5, 3), numbers(5, 3, seed=1).abs()
    y = np.linspace(-15, 15, 100_001)
    parts = spread_decomposition(means, spreads)
    for i in range(3):
        density = np.mean([stats.norm.pdf(y, m, s) for m, s in zip(means[:, i], spreads[:, i], strict=True)], 0)
        centre = np.trapezoid(density * y, y)
        assert parts.total[i].item() ** 2 == pytest.approx(np.trapezoid(density * (y - centre) ** 2, y), rel=1e-6)
    torch.testing.assert_close(parts.epistemic, means.std(0, correction=0))
    torch.testing.assert_close(parts.total.square(), parts.aleatoric.square() + parts.epistemic.square())


def test_coverage_is_the_level_for_the_truth_and_counts_by_hand():
    mean, spread = numbers(50_000, seed=1), numbers(50_000, seed=2).abs() + 0.1
    y, levels = mean + spread * numbers(50_000), torch.tensor([0.5, 0.8, 0.95], dtype=torch.float64)
    np.testing.assert_allclose(interval_coverage(mean, spread, y, levels), levels, atol=0.008)
    half = interval_coverage(mean, spread / 2, y, levels)
    np.testing.assert_allclose(half, 2 * stats.norm.cdf(stats.norm.ppf((1 + levels) / 2) / 2) - 1, atol=0.008)
    zero, y = torch.zeros(4), torch.tensor([0.6, -0.7, 1.2, -2.0])  # z of 0.5 is 0.674, of 0.9 is 1.645
    assert interval_coverage(zero, torch.ones(4), y, torch.tensor([0.5, 0.9])).tolist() == [0.25, 0.75]


def test_error_correlation():
    e, u = numbers(30), numbers(30, seed=1)
    assert error_correlation(e, u).item() == pytest.approx(stats.pearsonr(e.abs(), u).statistic)
    assert error_correlation(e, -3 * e.abs() + 2).item() == pytest.approx(-1)
    assert error_correlation(e, torch.full((30,), 0.3, dtype=torch.float64)).item() == 0
    assert error_correlation(torch.full((30,), 0.1), u.float()).item() == 0
    x = numbers(200_000)  # with the true spread: mean 0.798 s, and 0.603 s of scatter about it
    s = torch.where(x > 0, 1.0, 2.0).double()
    signal, scatter = 2 / math.pi * 0.25, (1 - 2 / math.pi) * 2.5
    expected = math.sqrt(signal / (signal + scatter))
    assert error_correlation(s * numbers(200_000, seed=1), s).item() == pytest.approx(expected, abs=0.006)


def test_under_vmap():
    mean, spread, y = numbers(4, 6), numbers(4, 6, seed=1), numbers(4, 6, seed=2)
    levels = torch.tensor([0.5, 0.9], dtype=torch.float64)
    for function in (
        heteroscedastic,
        error_correlation_of_difference,
        lambda m, s, t: gaussian_kl(m, s, t, t),
        lambda m, s, t: error_prediction(s, t - m, "hts"),
        lambda m, s, t: error_prediction(s, t - m, "squared"),
        lambda m, s, t: error_prediction(s, t - m, "absolute"),
        lambda m, s, t: interval_coverage(m, s.abs(), t, levels),
    ):
        loop = torch.stack([function(*row) for row in zip(mean, spread, y, strict=True)])
        torch.testing.assert_close(torch.vmap(function)(mean, spread, y), loop)


def error_correlation_of_difference(mean, spread, y):
    return error_correlation(y - mean, spread)


def test_task_has_the_stated_truth_and_gap():
    task = noisy_gap_task(20_000, 3, annotators=2)
    x = task.x[:, 0]
    assert not ((x > 0.3) & (x < 1.3)).any()
    assert stats.kstest(torch.where(x > 0.8, x - 1, x).double().numpy(), "uniform", (-2, 3)).pvalue > 1e-3
    mean, spread = noisy_gap_truth(task.x.double())
    torch.testing.assert_close(task.mean.double(), mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(task.spread.double(), spread, atol=1e-6, rtol=1e-6)
    z = (task.answers - task.mean[:, None]) / task.spread[:, None]
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(z.T)[0, 1].item()) < 0.03
    value, width = noisy_gap_truth(torch.tensor([[-1.0], [math.pi / 4]]))
    assert value.tolist() == pytest.approx([-0.3 - math.sin(2), 1 + 0.075 * math.pi])
    assert width.tolist() == pytest.approx([0.5, 0.05], abs=1e-6)


def test_task_grows_by_appending_and_may_cover_the_gap():
    small, large = noisy_gap_task(10, 0), noisy_gap_task(30, 0)
    for a, b in zip(small, large, strict=True):
        assert torch.equal(a, b[:10])
    x = noisy_gap_task(5_000, 0, gap=None).x[:, 0]
    assert 0.22 < ((x > 0.3) & (x < 1.3)).float().mean() < 0.28
    assert not torch.equal(noisy_gap_task(10, 1).x, small.x)


@pytest.fixture(scope="module")
def trained():
    task = noisy_gap_task(256, 0)
    held = {"uncovered": noisy_gap_task(256, 1), "covered": noisy_gap_task(256, 2, gap=None)}
    return train_regressors(task, held, 4, steps=250)


def test_what_each_method_sees(trained):
    gap, calm, noisy = (torch.linspace(a, b, 41)[:, None] for a, b in ((0.5, 1.1), (-0.2, 0.1), (-1.2, -0.8)))
    found = trained.predict(torch.cat([gap, calm, noisy]))
    assert list(found) == ["base", "hts", "kl"] + [
        f"dup_{kind}_{name}" for name in ("uncovered", "covered") for kind in ("hts", "squared", "absolute")
    ]
    for means, spreads in found.values():
        assert means.shape == spreads.shape == (4, 123)
        assert (spreads > 0).all()
    spread = {name: part.spread.unflatten(1, (3, 41)).mean((0, 2)) for name, part in found.items()}
    for name in set(found) - {"base"}:  # all see the noise
        assert spread[name][2] > 3 * spread[name][1], name
    for name in ("hts", "kl", "dup_hts_uncovered"):  # the gap looks like any calm place
        assert spread[name][0] < 2 * spread[name][1], name
        assert spread[name][0] < 0.5 * spread["dup_hts_covered"][0], name
    for name in ("hts", "kl"):  # but there the members disagree
        parts = spread_decomposition(*found[name])
        assert parts.epistemic[:41].mean() > 2 * parts.epistemic[41:82].mean()
    assert torch.equal(found["base"].mean, found["dup_absolute_covered"].mean)
    assert (found["base"].spread == found["base"].spread[:, :1]).all()


def test_a_member_does_not_depend_on_how_many_there_are():
    task, held = noisy_gap_task(64, 0), {"covered": noisy_gap_task(64, 2, gap=None)}
    x = torch.linspace(-2, 2, 9)[:, None]
    few, many = (train_regressors(task, held, n, steps=8, kinds=("absolute",)).predict(x) for n in (2, 3))
    for name, part in few.items():
        for a, b in zip(part, many[name], strict=True):
            torch.testing.assert_close(a, b[:2], atol=1e-5, rtol=1e-5)
    assert list(few) == ["base", "hts", "kl", "dup_absolute_covered"]


def test_kinds_are_trained_on_their_own_loss(trained):
    x = torch.linspace(-1.3, -0.7, 41)[:, None]
    found = trained.predict(x)
    ratio = found["dup_absolute_covered"].spread.mean() / found["dup_squared_covered"].spread.mean()
    assert 0.45 < ratio < 0.9  # the median of a Gaussian's absolute error is 0.674 of its root mean square


def test_a_method_does_not_depend_on_which_others_are_trained():
    task, x = noisy_gap_task(64, 0), torch.linspace(-2, 2, 9)[:, None]
    held = {"a": noisy_gap_task(64, 1), "b": noisy_gap_task(64, 2, gap=None)}
    every = train_regressors(task, held, 3, steps=8).predict(x)
    for name, kind in (("a", "squared"), ("b", "hts")):
        only: list[Any] = [kind]
        one = train_regressors(task, {name: held[name]}, 3, steps=8, kinds=only).predict(x)
        for method, part in one.items():
            torch.testing.assert_close(part.spread, every[method].spread, atol=1e-5, rtol=1e-5)


def test_bad_input():
    one, three = torch.ones(3), torch.ones(4, 3)
    task = noisy_gap_task(8, 0)
    with pytest.raises(ValueError, match="eps"):
        heteroscedastic(one, one, one, -1.0)
    with pytest.raises(ValueError, match="eps"):
        gaussian_kl(one, one, one, one, -1.0)
    with pytest.raises(ValueError, match="eps"):
        error_prediction(one, one, eps=-1.0)
    with pytest.raises(Exception, match="kind"):
        error_prediction(one, one, "cubed")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="means"):
        spread_decomposition(three[:0], three[:0])
    with pytest.raises(ValueError, match="levels"):
        interval_coverage(one, one, one, torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="targets"):
        interval_coverage(one[:0], one[:0], one[:0], torch.tensor([0.5]))
    with pytest.raises(ValueError, match="errors"):
        error_correlation(one[:1], one[:1])
    with pytest.raises(ValueError, match="annotators"):
        noisy_gap_task(8, 0, annotators=0)
    with pytest.raises(ValueError, match="gap"):
        noisy_gap_task(8, 0, gap=(1.0, 0.0))
    with pytest.raises(ValueError, match="held_out"):
        train_regressors(task, {})
    with pytest.raises(ValueError, match="held_out"):
        train_regressors(task, {"a": task, "b": noisy_gap_task(9, 0)})
    with pytest.raises(ValueError, match="kinds"):
        train_regressors(task, {"a": task}, kinds=("hts", "hts"))
