"""The uncertainty lab's exercises: solutions against the toolkit, autograd, torch.distributions and enumeration.

What the messages say follows from a mistake is tested here too.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Bernoulli, Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from toolkit import calibration as ca
from toolkit import random
from toolkit.exercises import EXERCISES, check
from toolkit.exercises import uncertainty as exercises

SEEDS = range(4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return random.uniform(random.key(seed), shape, torch.float64)


def mistake(name: str, which: str):
    return EXERCISES[name].misconceptions[which][0]


def cases(name: str) -> list:
    return [[v.double() if isinstance(v, torch.Tensor) else v for v in case] for case in EXERCISES[name].cases]


# --- annotators ------------------------------------------------------------------------------------------------------


def ratings(seed: int) -> tuple[torch.Tensor, ...]:
    return normal(seed, 6), 0.2 + uniform(seed + 10, 6), normal(seed + 20, 6), 0.2 + uniform(seed + 30, 6)


@pytest.mark.parametrize("seed", SEEDS)
def test_annotator_divergence_against_the_toolkit_torch_and_an_integral(seed) -> None:
    m, s, n, t = ratings(seed)
    found = exercises.annotator_divergence(m, s, n, t)
    torch.testing.assert_close(found, ca.gaussian_kl(m, s, n, t, eps=0.0))
    torch.testing.assert_close(found, kl_divergence(Normal(n, t), Normal(m, s)))
    p, q = stats.norm(n[0].item(), t[0].item()), stats.norm(m[0].item(), s[0].item())
    low, high = p.mean() - 12 * p.std(), p.mean() + 12 * p.std()
    oracle, _ = integrate.quad(lambda y: p.pdf(y) * (p.logpdf(y) - q.logpdf(y)), low, high, points=[p.mean()])
    assert found[0].item() == pytest.approx(oracle, rel=1e-7)
    torch.testing.assert_close(exercises.annotator_divergence(n, t, n, t), torch.zeros_like(n))


def test_the_best_spread_has_the_bias_in_it_and_the_turned_one_has_not() -> None:
    spreads = torch.linspace(0.2, 3, 28001, dtype=torch.float64)
    ones = torch.ones_like(spreads)
    for function, best in (
        (exercises.annotator_divergence, math.sqrt(0.5**2 + 1.2**2)),
        (mistake("annotator-kl", "turned"), 0.5),
        (mistake("annotator-kl", "no bias"), 0.5),
    ):
        found = spreads[function(0.3 * ones, spreads, 1.5 * ones, 0.5 * ones).argmin()].item()
        assert found == pytest.approx(best, abs=2e-4)


def test_only_variances_are_free_of_the_unit() -> None:
    parts = ratings(0)
    tens = [10 * part for part in parts]
    torch.testing.assert_close(exercises.annotator_divergence(*tens), exercises.annotator_divergence(*parts))
    wrong = mistake("annotator-kl", "spreads as variances")
    assert (wrong(*tens) - wrong(*parts)).abs().max() > 1


# --- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [4, 5, 6])
def test_exact_mean_levels_against_the_toolkit_and_a_linear_solver(levels) -> None:
    """The toolkit cuts negative values off afterwards: where there are none it must agree."""
    mean = torch.linspace(1.05, levels - 0.1, 40, dtype=torch.float64)
    spread = 0.25 + 0.5 * uniform(levels, 40)
    values = torch.arange(1, levels + 1, dtype=torch.float64)
    density = Normal(mean[:, None], spread[:, None]).log_prob(values).exp()
    found = exercises.exact_mean_levels(density, mean)
    for row, p, mu in zip(found, density, mean, strict=True):
        equations = [[p.sum().item(), levels], [(p @ values).item(), values.sum().item()]]
        alpha, beta = np.linalg.solve(equations, [1.0, mu.item()])
        torch.testing.assert_close(row, alpha * p + beta)
    torch.testing.assert_close(found.sum(1), torch.ones_like(mean))
    torch.testing.assert_close(found @ values, mean)
    kept = (found >= 0).all(1)
    assert kept.sum() >= 10
    torch.testing.assert_close(found[kept], ca.soft_levels(mean, spread, levels)[kept])


def test_the_cases_need_no_cut_and_what_the_mistakes_do_to_the_mean() -> None:
    for density, mean in cases("level-shift"):
        values = torch.arange(1, density.shape[1] + 1, dtype=torch.float64)
        assert (exercises.exact_mean_levels(density, mean) >= 0).all()
        from_zero = mistake("level-shift", "levels from 0")(density, mean)
        torch.testing.assert_close(from_zero @ values, mean + 1)
        torch.testing.assert_close(mistake("level-shift", "scaled to the mean")(density, mean) @ values, mean)
        for which in ("divided by the sum", "constant only"):
            label = mistake("level-shift", which)(density, mean)
            torch.testing.assert_close(label.sum(1), torch.ones_like(mean))
            assert (label @ values - mean).abs().max() > 0.1
    density, mean = cases("level-shift")[0]
    label = mistake("level-shift", "divided by the sum")(density, mean)[0]
    assert mean[0].item() == pytest.approx(2.2)
    assert label[1] > 0.95
    assert (label @ torch.arange(1.0, 6.0, dtype=torch.float64)).item() == pytest.approx(2.04, abs=0.01)


# --- labels with a metric --------------------------------------------------------------------------------------------


def metric(kind: str) -> torch.Tensor:
    if kind == "plane":
        points = normal(1, 9, 2)
        return torch.cdist(points, points)
    edges = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(9 if kind == "ring" else 8):
        edges[i, (i + 1) % 9] = edges[(i + 1) % 9, i] = 1 + i / 10
    return ca.graph_metric(edges)


@pytest.mark.parametrize("kind", ["line", "ring", "plane"])
def test_central_label_against_the_toolkit_and_a_loop(kind) -> None:
    distances, seen = metric(kind), [7, 0, 4]
    p = (2 * normal(2, 40, 3)).softmax(1)
    found = exercises.central_label(p, distances[:, seen])
    assert torch.equal(found, ca.frechet_mean(p, distances[:, seen]))
    for row, label in zip(p.tolist(), found.tolist(), strict=True):
        costs = [sum(q * distances[y, k].item() ** 2 for q, k in zip(row, seen, strict=True)) for y in range(9)]
        assert costs[label] == pytest.approx(min(costs))
    if kind == "line":
        assert not set(found.tolist()) <= set(seen)


def test_on_a_line_it_is_the_label_nearest_to_the_mean_position() -> None:
    places = torch.arange(9, dtype=torch.float64)
    p = (2 * normal(3, 200, 3)).softmax(1)
    seen = torch.tensor([1, 4, 8])
    distances = (places[:, None] - places[seen]).abs()
    assert torch.equal(exercises.central_label(p, distances), (p @ places[seen]).round().long())
    median = mistake("label-metric", "not squared")(p, distances)
    assert torch.equal(median, seen[(p.cumsum(1) < 0.5).sum(1)])


def test_no_case_is_near_a_tie() -> None:
    for p, distances in cases("label-metric"):
        for cost in (p @ distances.square().T, p @ distances.T):
            best = cost.topk(2, largest=False).values
            assert (best[:, 1] - best[:, 0]).min() > 1e-4


# --- missing inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_gap_linear_against_the_toolkit_and_the_neutraliser(seed) -> None:
    x, weight, bias = normal(seed, 8, 6), normal(seed + 10, 3, 6), normal(seed + 20, 3)
    missing = uniform(seed + 30, 8, 6) < 0.4
    missing[0], missing[1] = True, False
    gaps = x.masked_fill(missing, math.nan)
    found = exercises.gap_linear(gaps, weight, bias)
    torch.testing.assert_close(found, ca.promissing_linear(gaps, weight, bias))
    for i, u in itertools.product(range(8), range(3)):
        filled = torch.where(missing[i], -bias[u] / (6 * weight[u]), x[i])
        assert found[i, u].item() == pytest.approx((filled @ weight[u] + bias[u]).item(), rel=1e-9, abs=1e-12)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1], torch.nn.functional.linear(x[1], weight, bias))


def test_what_the_mistaken_layers_say_of_nothing() -> None:
    x, weight, bias = torch.full((1, 4), math.nan, dtype=torch.float64), normal(1, 3, 4), normal(2, 3)
    for which in ("zero imputation", "missing share"):
        torch.testing.assert_close(mistake("missing-inputs", which)(x, weight, bias)[0], bias)
    for which in ("rescaled", "NaN"):
        assert mistake("missing-inputs", which)(x, weight, bias).isnan().all()


def test_another_way_to_leave_inputs_out() -> None:
    def by_nansum(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.where(x.isnan()[:, None], torch.nan, x[:, None] * weight + bias[:, None] / x.shape[1]).nansum(2)

    assert check("missing-inputs", by_nansum).status == "passed"


# --- the score of data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 0.8, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_data_set_score_against_the_toolkit_and_autograd(seed, sigma) -> None:
    data, x = normal(seed, 7, 3), 2 * normal(seed + 10, 5, 3)
    found = exercises.data_set_score(x, data, sigma)
    torch.testing.assert_close(found, ca.data_score(x, data, sigma))
    leaf = x.clone().requires_grad_()
    parts = MultivariateNormal(data, sigma**2 * torch.eye(3, dtype=torch.float64))
    density = MixtureSameFamily(Categorical(torch.ones(7, dtype=torch.float64)), parts).log_prob(leaf)
    (slope,) = torch.autograd.grad(density.sum(), leaf)
    torch.testing.assert_close(found, slope)


def test_mistaken_scores_are_what_their_messages_say() -> None:
    data, x = normal(1, 7, 2), normal(2, 5, 2)
    at = exercises.data_set_score
    torch.testing.assert_close(mistake("exact-score", "nearest point")(x, data, 0.02), at(x, data, 0.02))
    assert (mistake("exact-score", "nearest point")(x, data, 1.0) - at(x, data, 1.0)).abs().max() > 0.3
    torch.testing.assert_close(mistake("exact-score", "no half")(x, data, 0.8), at(x, data, 0.8 / math.sqrt(2)) / 2)
    torch.testing.assert_close(mistake("exact-score", "sigma once")(x, data, 0.01), 0.01 * at(x, data, 0.01))
    wrong = mistake("exact-score", "over the batch")
    assert (wrong(x, data, 0.8)[:2] - wrong(x[:2], data, 0.8)).abs().max() > 0.1


# --- a sum node ------------------------------------------------------------------------------------------------------


def enumerated(weights: list[float], means: list[float], variances: list[float], rate: float) -> float:
    """Over all masks and all children, each of which is its mean plus or minus its deviation."""
    total = first = second = 0.0
    for mask in itertools.product((0, 1), repeat=len(weights)):
        chance = math.prod(1 - rate if z else rate for z in mask)
        for signs in itertools.product((-1, 1), repeat=len(weights)):
            parts = zip(mask, signs, weights, means, variances, strict=True)
            value = sum(z * w * (e + sign * math.sqrt(v)) for z, sign, w, e, v in parts)
            share = chance / 2 ** len(weights)
            total, first, second = total + share, first + share * value, second + share * value**2
    assert total == pytest.approx(1)
    return second - first**2


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_variance_against_the_toolkit_and_all_masks(seed, rate) -> None:
    weights = normal(seed, 4).softmax(0)
    means, variances = 0.2 + uniform(seed + 10, 5, 4), uniform(seed + 20, 5, 4)
    found = exercises.dropout_variance(weights, means, variances, rate)
    oracle = [enumerated(weights.tolist(), *row, rate) for row in zip(means.tolist(), variances.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(oracle, rel=1e-9)
    log_mean, ratio = ca.sum_moments(
        means.log()[:, None], (variances / means.square())[:, None], weights[None, None], rate
    )
    torch.testing.assert_close(found, (ratio * (2 * log_mean).exp())[:, 0, 0])


def test_ends_of_the_rate() -> None:
    weights, means, variances = torch.full((5,), 0.2), torch.ones(1, 5), torch.full((1, 5), 2.0)
    assert exercises.dropout_variance(weights, means, variances, 0.0).item() == pytest.approx(2 / 5)
    assert exercises.dropout_variance(weights, means, variances, 1.0).item() == 0
    wrong = {
        key: pair[0](weights, means, variances, 0.0).item() for key, pair in exercises.sum_node.misconceptions.items()
    }
    assert wrong == pytest.approx({"no p E²": 0.4, "w not squared": 2, "no q": 0.4, "second moment": 0.6, "p for q": 0})
    assert mistake("sum-node", "no q")(weights, means, variances, 1.0).item() == pytest.approx(0.6)
    assert mistake("sum-node", "no p E²")(weights, means, 0 * variances, 0.3).item() == 0


# --- masks -----------------------------------------------------------------------------------------------------------

ALL_MASKS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_log_chance_against_the_toolkit_and_torch(seed) -> None:
    logits = 3 * normal(seed, 4).expand(16, 4)
    found = exercises.mask_log_chance(logits, ALL_MASKS)
    torch.testing.assert_close(found, ca.mask_log_probability(logits, ALL_MASKS))
    torch.testing.assert_close(found, Bernoulli(logits=logits).log_prob(ALL_MASKS).sum(1))
    assert found.exp().sum().item() == pytest.approx(1, rel=1e-12)
    counted = np.prod(np.where(ALL_MASKS.numpy() == 1, logits.sigmoid(), 1 - logits.sigmoid()), axis=1)
    assert found.exp().tolist() == pytest.approx(counted.tolist(), rel=1e-9)


def test_mistaken_laws_are_not_laws() -> None:
    logits = normal(1, 4).expand(16, 4)
    twice = mistake("mask-law", "taken twice")(logits, ALL_MASKS)
    torch.testing.assert_close(twice, torch.nn.functional.logsigmoid(logits).sum(1))
    assert twice.exp().sum().item() == pytest.approx((2 * logits[0].sigmoid()).prod().item())
    on = mistake("mask-law", "on only")(logits, ALL_MASKS)
    assert on[0] == 0
    assert on.exp().sum().item() == pytest.approx((1 + logits[0].sigmoid()).prod().item())


def published(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The probability of what was drawn, gathered, and then a Bernoulli law with that probability."""
    both = torch.stack([1 - logits.sigmoid(), logits.sigmoid()], -1)
    taken = both.gather(-1, masks.long()[..., None])[..., 0]
    return (masks * taken.log() + (1 - masks) * (1 - taken).log()).sum(1)


def test_the_published_mask_law_is_recognised() -> None:
    outcome = check("mask-law", published)
    assert (outcome.status, outcome.misconception) == ("failed", "taken twice")


def test_large_logits_in_single_precision() -> None:
    mask = torch.zeros(1, 1)
    naive = mistake("mask-law", "log of 1 - p")
    for logit, infinite in ((16.0, False), (17.5, True), (80.0, True)):
        logits = torch.full((1, 1), logit)
        assert exercises.mask_log_chance(logits, mask).item() == pytest.approx(-logit, rel=1e-6)
        assert naive(logits, mask).isinf().item() == infinite
    assert check("mask-law", lambda a, z: Bernoulli(logits=a).log_prob(z).sum(1)).status == "passed"
