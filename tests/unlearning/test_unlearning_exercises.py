"""The solutions of the unlearning lab's exercises against the toolkit, refits, autograd and simulation."""

import math

import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from toolkit import random
from toolkit.exercises import EXERCISES
from toolkit.exercises import unlearning as exercises
from toolkit.unlearning.attacks import u_lira
from toolkit.unlearning.distances import aus, inside_band
from toolkit.unlearning.exact import ridge, ridge_delete
from toolkit.unlearning.language import npo_loss
from toolkit.unlearning.shards import expected_deletions, plan_shards, simulate_deletions

SEEDS = range(4)
NAMES = [getattr(exercises, name).name for name in exercises.__all__]
MISTAKES = [(name, mistake) for name in NAMES for mistake in EXERCISES[name].misconceptions]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


@pytest.fixture
def double():
    """float64 for what is created inside a solution."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_newton_step_is_retraining(seed, penalty, double) -> None:
    x, y = normal(seed, 20, 4), normal(seed + 10, 20, 1)
    forget = torch.arange(20) % 4 == 1
    whole = ridge(x, y, penalty)
    found = exercises.newton_without(whole.theta[:, 0], x, y[:, 0], penalty, forget)
    again = ridge(x[~forget], y[~forget], penalty).theta[:, 0]
    assert found.tolist() == pytest.approx(again.tolist(), abs=1e-12)
    assert found.tolist() == pytest.approx(ridge_delete(whole, x[forget], y[forget]).theta[:, 0].tolist(), abs=1e-12)
    anywhere = exercises.newton_without(normal(seed + 20, 4), x, y[:, 0], penalty, forget)
    assert anywhere.tolist() == pytest.approx(again.tolist(), abs=1e-11)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_left_out_residuals_by_refitting(seed, penalty, double) -> None:
    x, y = normal(seed, 10, 3), normal(seed + 10, 10, 1)
    found = exercises.left_out_residuals(x, y[:, 0], penalty)
    for i in range(10):
        others = torch.arange(10) != i
        refit = y[i] - x[i] @ ridge(x[others], y[others], penalty).theta
        removed = y[i] - x[i] @ ridge_delete(ridge(x, y, penalty), x[i : i + 1], y[i : i + 1]).theta
        assert found[i].item() == pytest.approx(refit.item(), abs=1e-12)
        assert found[i].item() == pytest.approx(removed.item(), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_log_ratio_against_scipy_and_the_toolkit(seed) -> None:
    unlearned, retrained = 0.5 * normal(seed, 12, 3) + 1, 2 * normal(seed + 10, 10, 3)
    attack = u_lira(unlearned, retrained, folds=2)  # a fold is scored by Gaussians of the other one
    for example in range(3):
        u, r = unlearned[:, example], retrained[:, example]
        for side, scores in ((u, attack.unlearned), (r, attack.retrained)):
            found = exercises.log_ratio(side[::2], u[1::2], r[1::2])
            assert found.tolist() == pytest.approx(scores[::2, example].tolist(), rel=1e-9)
        first, second = (stats.norm(values.mean(), values.std()) for values in (u, r))
        oracle = first.logpdf(0.25) - second.logpdf(0.25)
        assert exercises.log_ratio(torch.tensor([0.25], dtype=u.dtype), u, r).item() == pytest.approx(oracle, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_of_each_against_scikit_learn_and_the_toolkit(seed) -> None:
    unlearned, retrained = normal(seed, 12, 4).mul(2).round() + 1, normal(seed + 10, 8, 4).mul(2).round()
    found = exercises.auc_of_each(unlearned, retrained)
    truth = [1] * 12 + [0] * 8
    oracle = [roc_auc_score(truth, scores) for scores in torch.cat([unlearned, retrained]).T]
    assert found.tolist() == pytest.approx(oracle, abs=1e-12)
    attack = u_lira(unlearned, retrained, folds=2)
    halves = [exercises.auc_of_each(attack.unlearned[k::2], attack.retrained[k::2]) for k in (0, 1)]
    assert torch.stack(halves).mean(0).tolist() == pytest.approx(attack.auc.tolist(), abs=1e-12)


@pytest.mark.parametrize("removed", [False, True])
def test_score_of_unlearning_against_the_toolkit(removed) -> None:
    for forget, test, original in random.uniform(random.key(5), (30, 3), torch.float64).tolist():
        oracle = aus(forget, test, original, removed_class=removed).item()
        assert exercises.score_of_unlearning(forget, test, original, removed) == pytest.approx(oracle, rel=1e-12)
    assert exercises.score_of_unlearning(0.8, 0.9, 0.9, True) == pytest.approx(1 / 1.8)  # the original model's


@pytest.mark.parametrize(("shards", "slices", "sequences"), [(5, 6, 1), (5, 6, 3), (5, 6, 6), (1, 4, 2), (3, 1, 1)])
def test_expected_requests_against_the_toolkit(shards, slices, sequences) -> None:
    found = exercises.expected_requests(shards, slices, sequences)
    assert found == pytest.approx(expected_deletions(shards, slices, sequences), rel=1e-12)


def test_expected_requests_of_the_sheet_and_by_simulation() -> None:
    assert [round(exercises.expected_requests(5, 6, b), 1) for b in (1, 3, 6)] == [68.5, 99.5, 119.8]
    lasted = simulate_deletions(plan_shards(60, 3, 4, 2), trials=1500, seed=1).lasted.double()
    error = lasted.std().item() / math.sqrt(len(lasted))
    assert abs(lasted.mean().item() - exercises.expected_requests(3, 4, 2)) < 4 * error


@pytest.mark.parametrize("beta", [1e-6, 0.1, 1.0, 5.0])
def test_weight_of_npo_is_the_slope_of_the_toolkits_loss(beta) -> None:
    log_p, reference = (-3 * random.uniform(random.key(6, k), (20,), torch.float64) for k in (0, 1))
    log_p.requires_grad_()
    (slope,) = torch.autograd.grad(npo_loss(log_p, reference, beta).sum(), log_p)
    found = exercises.weight_of_npo(log_p.detach(), reference, beta)
    assert found.tolist() == pytest.approx(slope.tolist(), rel=1e-9)
    ratio = (beta * (log_p - reference)).exp().detach()
    assert found.tolist() == pytest.approx((2 * ratio / (1 + ratio)).tolist(), rel=1e-12)
    assert exercises.weight_of_npo(reference, reference, beta).tolist() == [1.0] * 20


@pytest.mark.parametrize(("oracles", "level"), [(39, 0.95), (79, 0.95), (19, 0.9), (50, 0.8), (9, 0.6)])
def test_inside_oracle_band_against_the_toolkit(oracles, level) -> None:
    oracle = normal(oracles, oracles)
    values = torch.cat([normal(7, 200) * 2, oracle])
    found = exercises.inside_oracle_band(values, oracle, level)
    assert torch.equal(found, inside_band(values, oracle, level))
    assert 0 < found.double().mean() < 1


def test_a_retrained_model_passes_at_the_level() -> None:
    draws = normal(8, 4000, 20).exp()
    passed = [exercises.inside_oracle_band(row[:1], row[1:], 0.8).item() for row in draws]
    assert abs(sum(passed) / 4000 - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 4000)
