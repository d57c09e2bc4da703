"""The forecast against exact exponentials, the process against dense formulas, the search against runs by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from toolkit import random
from toolkit.fleet import SGD, train
from toolkit.scaling_laws.lr_search import auto_rates, forecast_loss, gaussian_process

X = random.normal(random.key(1), (64, 3))
DATA = {"x": X, "y": X @ torch.tensor([1.0, -2.0, 0.5]) + 0.3}


def build():
    return nn.Linear(3, 1)


def squares(model, batch, hyper):
    return (model(batch.x)[:, 0] - batch.y).square()


def test_forecast_of_an_exponential():
    """2 exp(-.013 t) + 1.2 from 100 steps: exact parameters and exact loss at step 1000; the same for a batch."""
    t = torch.arange(100).double()
    series = torch.stack([2 * torch.exp(-0.013 * t) + 1.2, 0.5 * torch.exp(-0.4 * t) - 3])
    value, parameters = forecast_loss(series, torch.tensor([150.0, 1000.0]).double())
    expected = torch.tensor([[2, 0.013, 1.2], [0.5, 0.4, -3]]).double()
    torch.testing.assert_close(parameters, expected, rtol=1e-5, atol=0)
    far = torch.tensor([[2 * 2.718281828459045**-1.95 + 1.2, 2 * 2.718281828459045**-13 + 1.2], [-3, -3]]).double()
    torch.testing.assert_close(value, far, rtol=1e-5, atol=0)


def test_forecast_of_gradient_descent_on_a_quadratic():
    """One curvature h: the loss is exactly (1 - lr h)^{2t}, so that the forecast is exact."""
    lr, h, w, losses = 0.05, 0.6, 3.0, []
    for _ in range(400):
        losses.append(0.5 * h * w * w)
        w -= lr * h * w
    value, parameters = forecast_loss(torch.tensor(losses[:40]).double(), 399)
    assert float(parameters[1]) == pytest.approx(-2 * torch.tensor(1 - lr * h).double().log().item(), rel=1e-5)
    assert float(value[0]) == pytest.approx(losses[399], abs=1e-6)


def test_forecast_is_least_squares():
    """No other triple near it fits noisy losses better."""
    t = torch.arange(60).double()
    series = torch.exp(-0.05 * t) + 1 + 0.05 * random.normal(random.key(3), (60,), torch.float64)
    _, best = forecast_loss(series, 1)

    def error(a, r, c):
        return float((series - a * torch.exp(-r * t) - c).square().sum())

    least = error(*best)
    for i in range(3):
        for factor in (0.98, 1.02):
            other = best.clone()
            other[i] *= factor
            assert error(*other) > least
    rising, parameters = forecast_loss(1 + 0.1 * t, 500)
    assert parameters[0] == 0
    assert float(rising[0]) == pytest.approx(float((1 + 0.1 * t).mean()))


def test_gaussian_process_by_dense_formulas():
    x = torch.tensor([-1.0, 0.2, 1.5]).double()
    y = torch.tensor([3.0, 1.0, 2.0]).double()
    query = torch.linspace(-3, 3, 31).double()
    mean, deviation = gaussian_process(x, y, query, 0.8, 0.1)
    spread = y.var(correction=0).sqrt()

    def kernel(a, b):
        return torch.tensor([[torch.exp(-((p - q) ** 2) / (2 * 0.64)) for q in b] for p in a]).double()

    inverse = torch.linalg.inv(kernel(x, x) + 0.01 * torch.eye(3).double())
    cross = kernel(query, x)
    torch.testing.assert_close(mean, y.mean() + cross @ inverse @ (y - y.mean()))
    variance = spread**2 * (1 - torch.diag(cross @ inverse @ cross.mT))
    torch.testing.assert_close(deviation, variance.sqrt())
    exact, none = gaussian_process(x, y, x, 0.8, 1e-5)
    torch.testing.assert_close(exact, y, rtol=0, atol=1e-6)
    assert none.max() < 1e-4
    batched = torch.vmap(lambda values: gaussian_process(x, values, query, 0.8, 0.1)[0])(torch.stack([y, -y]))
    torch.testing.assert_close(batched[1], -mean)


OPTIONS: dict[str, Any] = {"members": 2, "batch": 16, "progress": False, "device": "cpu"}


def test_a_series_that_has_risen_is_forecast_at_its_last_value():
    found = auto_rates(
        build, squares, DATA, stages=1, stage=10, candidates=1, window=1, bounds=(2.0, 2.0001), **OPTIONS
    )
    torch.testing.assert_close(found.forecast[0, :, 0], found.fleet.history[:, 9].double())
    assert (found.fleet.history[:, 9] > found.fleet.history[:, 0]).all()


def test_forecast_is_for_the_end_of_the_stage():
    found = auto_rates(build, squares, DATA, stages=1, stage=40, candidates=2, window=1, bounds=(0.01, 0.02), **OPTIONS)
    expected, _ = forecast_loss(found.fleet.history[:, :20].double(), 39)
    torch.testing.assert_close(found.forecast[0].amin(1), expected[:, 0])


def test_search_restores_bit_for_bit():
    """The chosen rates, trained by hand without any trial between, give the same fleet, momentum included."""
    found = auto_rates(
        build,
        squares,
        DATA,
        stages=2,
        stage=40,
        candidates=4,
        optimiser=SGD(momentum=0.5),
        bounds=(1e-3, 10),
        **OPTIONS,
    )
    assert found.searched == 80  # as much again as the training
    fleet = train(build, squares, DATA, steps=80, until=0, optimiser=SGD(momentum=0.5), **OPTIONS)
    for number, rates in enumerate(found.chosen):
        optimiser = SGD(lr=rates, momentum=0.5)
        fleet = train(
            build, squares, DATA, steps=80, resume=fleet, until=40 * (number + 1), optimiser=optimiser, **OPTIONS
        )
    for name in ("parameters", "history"):
        assert torch.equal(getattr(found.fleet, name), getattr(fleet, name))
    assert torch.equal(found.fleet.state["momentum"], fleet.state["momentum"])
    assert found.fleet.finished.all()
    assert (
        found.forecast.gather(2, found.tried.sub(found.chosen[..., None]).abs().argmin(2, keepdim=True))
        .squeeze(2)
        .equal(found.forecast.amin(2))
    )
    assert (found.fleet.history[:, -5:].mean(1) < 0.05 * found.fleet.history[:, 0]).all()


def test_pure_exploration_asks_where_the_deviation_is_largest():
    found = auto_rates(
        build, squares, DATA, stages=1, stage=24, candidates=4, kappa=1e9, bounds=(1e-3, 1e-1), **OPTIONS
    )
    grid = torch.linspace(math.log(1e-3), math.log(1e-1), 101, dtype=torch.float64)
    tried = found.tried[0, 0].log()
    assert float(tried[0]) == pytest.approx(float(grid[50]))
    for turn in range(1, 4):
        seen = tried[:turn]
        _, deviation = gaussian_process(seen, torch.arange(turn).double(), grid)
        gap = float(gaussian_process(seen, torch.arange(turn).double(), tried[turn : turn + 1])[1])
        assert gap == pytest.approx(float(deviation.max()), rel=1e-6)


def test_candidates_that_diverge_are_never_chosen():
    found = auto_rates(
        build, squares, DATA, stages=1, stage=60, candidates=6, kappa=1.0, bounds=(1e-4, 1e12), **OPTIONS
    )
    assert not found.forecast.isfinite().all()
    assert (found.chosen < 2).all()
    assert (found.fleet.failed < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forecast_loss(torch.ones(3), 1), "losses: expected at least 4"),
        (lambda: forecast_loss(torch.tensor([1.0, 2, float("nan"), 1]), 1), "losses: expected finite"),
        (lambda: gaussian_process(torch.ones(0), torch.ones(0), torch.ones(2)), "x: expected at least one"),
        (lambda: gaussian_process(torch.ones(1), torch.ones(1), torch.ones(2), 0.0), "length: expected"),
        (lambda: auto_rates(build, squares, DATA, bounds=(1.0, 0.5)), "bounds: expected"),
        (lambda: auto_rates(build, squares, DATA, stage=20), "stage: expected at least 4 steps"),
        (lambda: auto_rates(build, squares, DATA, stages=0), "stages, candidates"),
        (lambda: auto_rates(build, squares, DATA, steps=100), "steps: expected none"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
