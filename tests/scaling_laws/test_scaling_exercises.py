"""The solutions of the scaling-laws lab's exercises against the toolkit, scipy, closed forms and published numbers."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats

from toolkit import random
from toolkit.exercises import scaling_laws as exercises
from toolkit.scaling_laws.batches import fit_critical_batch
from toolkit.scaling_laws.constants import Chinchilla, DataConstrained, PowerLaw
from toolkit.scaling_laws.fit_intervals import bootstrap
from toolkit.scaling_laws.fitting import fit_law
from toolkit.scaling_laws.frontiers import compute_optimal
from toolkit.scaling_laws.parameterisation import layer_rules
from toolkit.scaling_laws.size_laws import chinchilla, data_constrained, power_law
from toolkit.scaling_laws.step_laws import annealing_areas

SEEDS = range(4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return random.uniform(random.key(seed), shape, torch.float64)


def numbers(value: torch.Tensor) -> list[float]:
    return value.double().tolist()


# --- exponent and floor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.5, 2.0, 10.0])
@pytest.mark.parametrize("exponent", [0.05, 0.34, 1.0, 2.5])
def test_exponent_of_three_gives_the_laws_back(exponent, ratio) -> None:
    x = 3 * ratio ** torch.arange(3, dtype=torch.float64)
    for floor in (0.0, 0.7, 2.0):
        losses = power_law(x, PowerLaw(floor, 1.7, exponent))
        assert exercises.exponent_of_three(losses, ratio) == pytest.approx(exponent, rel=1e-9)
        assert exercises.exponent_of_three(5 * losses + 1, ratio) == pytest.approx(exponent, rel=1e-9)


def test_exponent_of_three_against_the_fit() -> None:
    x = 2.0 ** torch.arange(6, dtype=torch.float64)
    losses = power_law(x, PowerLaw(1.2, 3.0, 0.6))
    fit = fit_law({"x": x}, losses, [["x"]], objective="log_squares", outliers="keep")
    assert exercises.exponent_of_three(losses[::2], 4.0) == pytest.approx(fit.parameters["alpha_x"], rel=1e-5)


# --- the best size ---------------------------------------------------------------------------------------------------

LAWS = [Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28), Chinchilla(0.3, 20.0, 300.0, 0.3, 0.5), Chinchilla(0, 5, 2, 1, 0.4)]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("budget", [1e9, 1e18, 5.76e23])
def test_size_for_budget_against_the_toolkit_and_a_search(budget, law) -> None:
    found = exercises.size_for_budget(budget, law.size_scale, law.alpha, law.data_scale, law.beta)
    oracle = compute_optimal(torch.tensor(budget, dtype=torch.float64), law)
    assert found == pytest.approx(oracle[0].item(), rel=1e-10)

    def excess(u: float) -> float:
        n = torch.tensor(math.exp(u), dtype=torch.float64)
        return chinchilla(n, budget / (6 * n), law._replace(floor=0.0)).item()

    least = optimize.minimize_scalar(excess, bracket=(1.0, 0.5 * math.log(budget)), tol=1e-12)
    assert found == pytest.approx(math.exp(least.x), rel=1e-5)


# --- Huber's loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-3, 0.1, 0.5, 10.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_huber_of_logs_against_scipy(seed, delta) -> None:
    losses = 1 + uniform(seed, 30)
    predicted = losses * (0.4 * normal(seed + 10, 30)).exp()
    oracle = special.huber(delta, np.log(predicted.numpy()) - np.log(losses.numpy())).sum()
    assert exercises.huber_of_logs(predicted, losses, delta) == pytest.approx(oracle, rel=1e-10)


@pytest.mark.parametrize("delta", [1e-3, 0.02])
def test_huber_of_logs_is_what_the_fit_minimises(delta) -> None:
    x = torch.logspace(1, 4, 12, dtype=torch.float64)
    losses = power_law(x, PowerLaw(1.0, 3.0, 0.4)) * (0.03 * normal(0, 12)).exp()
    fit = fit_law({"x": x}, losses, [["x"]], objective="log_huber", outliers="keep", delta=delta)
    found = exercises.huber_of_logs(fit.predict({"x": x}), losses, delta)
    assert found == pytest.approx(fit.objective_value, rel=1e-8)


# --- the critical batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critical", [3.0, 100.0, 5000.0])
def test_batch_of_two_runs_on_the_hyperbola(critical) -> None:
    batch = torch.tensor([8.0, 512.0], dtype=torch.float64)
    steps = 40 * (1 + critical / batch)
    examples = steps * batch
    least = 40 * critical
    assert numbers((steps / 40 - 1) * (examples / least - 1)) == pytest.approx([1, 1], rel=1e-9)
    assert exercises.batch_of_two_runs(steps, examples) == pytest.approx(critical, rel=1e-9)
    assert exercises.batch_of_two_runs(steps.flip(0), examples.flip(0)) == pytest.approx(critical, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_batch_of_two_runs_against_the_toolkit(seed) -> None:
    steps, examples = 10 + 100 * uniform(seed, 2), 1000 + 9000 * uniform(seed + 10, 2)
    oracle = fit_critical_batch(steps, examples).batch.item()
    assert exercises.batch_of_two_runs(steps, examples) == pytest.approx(oracle, rel=1e-9)


# --- the annealing area ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_area_of_annealing_against_the_toolkit(seed, decay) -> None:
    rates = uniform(seed, 50)
    oracle = annealing_areas(rates, decay)[1][-1].item()
    assert exercises.area_of_annealing(rates, decay) == pytest.approx(oracle, rel=1e-9, abs=1e-12)


def test_area_of_annealing_in_closed_form() -> None:
    drop = torch.ones(1000, dtype=torch.float64)
    drop[100:] = 0.1  # the drop's own step is the first of 900
    assert exercises.area_of_annealing(drop, 0.999) == pytest.approx(534.252, abs=1e-3)
    line = 1 - 0.01 * torch.arange(51, dtype=torch.float64)
    assert exercises.area_of_annealing(line, 0.99) == pytest.approx(10.895601, abs=1e-6)
    assert exercises.area_of_annealing(torch.full((20,), 0.3), 0.9) == 0
    rates = uniform(5, 30)
    forgetting_nothing = 29 * rates[0] - rates[1:].sum()
    assert exercises.area_of_annealing(rates, 1.0) == pytest.approx(forgetting_nothing.item(), rel=1e-9)


# --- muP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "base", "depth"), [(64, 64, 2), (512, 64, 4), (16, 64, 3), (100, 10, 1)])
def test_adam_factors_against_the_rules(width, base, depth) -> None:
    rules = layer_rules(10, width, "mup", depth=depth, base=base)
    assert numbers(exercises.adam_factors(width, base, depth)) == pytest.approx([rule.adam for rule in rules])
    sgd, _ = exercises.mup_adam_factors.misconceptions["of SGD"]
    assert sgd(width, base, depth) == pytest.approx([rule.sgd for rule in rules])
    standard, _ = exercises.mup_adam_factors.misconceptions["standard"]
    assert standard(width, base, depth) == [rule.adam for rule in layer_rules(10, width, "sp", depth=depth, base=base)]


# --- repeated data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r_d", [1.0, 5.3, 15.4])
@pytest.mark.parametrize(("tokens", "unique"), [(40.0, 10.0), (7.0, 7.0), (5.0, 30.0), (1000.0, 2.0), (30.0, 12.0)])
def test_worth_of_tokens_against_the_toolkit_and_an_integral(tokens, unique, r_d) -> None:
    found = exercises.worth_of_tokens(tokens, unique, r_d)
    law = DataConstrained(0.0, 1.0, 1.0, 1.0, 1.0, 5.3, r_d)  # L = 1/N' + 1/D', and N' = N for N = 1
    one, d, u = torch.tensor([1.0, tokens, unique], dtype=torch.float64)
    assert found == pytest.approx(1 / (data_constrained(one, d, u, law).item() - 1), rel=1e-9)
    seen = min(tokens, unique)
    gained, _ = integrate.quad(lambda repeat: math.exp(-repeat / r_d), 0, tokens / seen - 1, epsabs=1e-12)
    assert found == pytest.approx(seen * (1 + gained), rel=1e-9)


# --- the interval ----------------------------------------------------------------------------------------------------


def points(seed: int, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = torch.logspace(1, 4, count, dtype=torch.float64)
    return sizes, power_law(sizes, PowerLaw(0.0, 5.0, 0.3)) * (0.1 * normal(seed, count)).exp()


def drawn(seed: int, resamples: int, count: int = 12) -> torch.Tensor:
    return (uniform(seed, resamples, count) * count).long()


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("seed", SEEDS)
def test_interval_of_exponent_against_scipy(seed, level) -> None:
    sizes, losses = points(seed)
    draws = drawn(seed + 10, 50)
    found = exercises.interval_of_exponent(sizes, losses, draws, level)
    x, y = sizes.log().numpy(), losses.log().numpy()
    slopes = [stats.linregress(x[row], y[row]).slope for row in draws.numpy()]
    oracle = np.quantile(-np.array(slopes), [(1 - level) / 2, (1 + level) / 2])
    assert found == pytest.approx(oracle.tolist(), rel=1e-9)


def test_interval_of_exponent_against_the_toolkits_bootstrap() -> None:
    """Other draws, 2000 on both sides: the ends agree to a small part of the interval's width."""
    sizes, losses = points(0)
    low, high = exercises.interval_of_exponent(sizes, losses, drawn(20, 2000), 0.9)
    fit = fit_law({"x": sizes}, losses, [["x"]], objective="log_squares", outliers="keep", offset=False)
    oracle = bootstrap(fit, resamples=2000).intervals(fit.parameters, 0.9)["alpha_x"]
    width = oracle.high - oracle.low
    assert abs(low - oracle.low) < 0.1 * width
    assert abs(high - oracle.high) < 0.1 * width
    assert low < fit.parameters["alpha_x"] < high
