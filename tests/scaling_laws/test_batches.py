"""Batch laws against planted curves, exact expectations on linear regression, and torch's own batch normalisation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.fleet import SGD, Fleet, train
from toolkit.models import MLP
from toolkit.scaling_laws.batches import (
    GhostNormMLP,
    fit_critical_batch,
    fit_diffusion,
    ghost_norm,
    gradient_noise,
    noise_scale,
    running_statistics,
    scaled_rate,
    steps_to_reach,
    travelled,
)
from toolkit.scaling_laws.step_laws import log_diffusion

X = random.normal(random.key(1), (24, 5), torch.float64)
Y = (X[:, 0] > 0).long()
FIT: dict[str, Any] = {"batch": 24, "progress": False, "device": "cpu"}


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def test_critical_batch_of_planted_curves():
    """S = S_min (1 + B_crit / B), E = B S: recovered for two levels; at B = B_crit both are twice their least."""
    least, critical = torch.tensor([120.0, 500.0]).double(), torch.tensor([64.0, 300.0]).double()
    batch = torch.tensor([8.0, 32, 64, 300, 2000]).double()
    steps = least[:, None] * (1 + critical[:, None] / batch)
    found = fit_critical_batch(steps, steps * batch)
    torch.testing.assert_close(found.steps, least)
    torch.testing.assert_close(found.batch, critical)
    torch.testing.assert_close(found.examples, least * critical)
    assert float(steps[0, 2]) == 2 * 120
    assert float((steps * batch)[1, 3]) == pytest.approx(2 * float(found.examples[1]))
    torch.testing.assert_close(
        (steps / found.steps[:, None] - 1) * (steps * batch / found.examples[:, None] - 1), steps**0
    )
    mapped = torch.vmap(fit_critical_batch)(steps, steps * batch)
    torch.testing.assert_close(mapped.batch, critical)


def test_steps_to_reach_interpolates():
    losses = torch.tensor([[4.0, 3.0, 1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    found = steps_to_reach(losses, torch.tensor([5.0, 3.5, 2.0, 0.6, 0.1]))
    expected = torch.tensor([0, 0.5, 1.5, 3 + 1.4 / 1.5, float("nan")])
    torch.testing.assert_close(found[0], expected, equal_nan=True)
    assert found[1, 0] == 0
    assert found[1, 3].isnan()


def test_noise_scale_of_exact_expectations():
    signal, noise = torch.tensor(0.3), torch.tensor(12.0)
    scale, g, sigma = noise_scale(signal + noise / 4, signal + noise / 50, 4, 50)
    torch.testing.assert_close((scale, g, sigma), (torch.tensor(40.0), signal, noise), rtol=1e-5, atol=0)


def slopes_of_regression(weights):
    """Per-example gradients of (w x - y)^2 / 2 at fixed w."""
    return (X @ weights - Y.double())[:, None] * X


def test_gradient_noise_matches_per_example_gradients():
    """Averages of many draws against the exact squared norm of the mean gradient and the trace of the covariance."""

    def loss(model, batch, hyper):
        return (model(batch.x)[:, 0] - batch.y).square() / 2

    def build():
        return torch.nn.Linear(5, 1, bias=False).double()

    weights = random.normal(random.key(3), (2, 5), torch.float64)
    fleet = Fleet(build, weights)
    scale, signal, noise = gradient_noise(
        fleet, loss, {"x": X, "y": Y.double()}, small_batch=2, large_batch=64, draws=250
    )
    for member in range(2):
        slopes = slopes_of_regression(weights[member])
        mean = slopes.mean(0)
        trace = (slopes - mean).square().sum(1).mean()
        assert float(noise[member]) == pytest.approx(float(trace), rel=0.15)
        assert float(signal[member]) == pytest.approx(float(mean.square().sum()), rel=0.25)
    torch.testing.assert_close(scale, noise / signal)


def test_square_root_rate_keeps_the_covariance_of_an_update():
    """lr^2 C / B for (8, lr) and (32, 2 lr), by drawing: trace ratio 1 within 3 standard errors; linear gives 4."""
    slopes = slopes_of_regression(torch.ones(5).double())
    spread = (slopes - slopes.mean(0)).square().sum(1).mean()
    traces = {}
    for size in (8, 32):
        index = (random.uniform(random.key(5, size), (4000, size), torch.float64) * len(X)).long()
        rate = float(scaled_rate(0.1, size, 8))
        traces[size] = rate**2 * (slopes[index].mean(1) - slopes.mean(0)).square().sum(1)
    means = {size: float(trace.mean()) for size, trace in traces.items()}
    errors = {size: float(trace.std()) / 4000**0.5 / means[size] for size, trace in traces.items()}
    assert means[8] == pytest.approx(0.01 * float(spread) / 8, rel=3 * errors[8])
    assert abs(means[32] / means[8] - 1) < 3 * (errors[8] ** 2 + errors[32] ** 2) ** 0.5
    assert float(scaled_rate(0.1, 32, 8, "linear")) == pytest.approx(0.4)
    assert float(scaled_rate(0.1, 32, 8)) == pytest.approx(0.2)


def test_ghost_norm_is_batch_norm_of_each_chunk():
    layer = torch.nn.BatchNorm1d(5, affine=False, momentum=0.3).double()
    layer.running_mean.fill_(0.7)  # type: ignore[union-attr]  # it tracks statistics
    x = 3 * X[:22] + 1
    expected = torch.cat([layer(part) for part in x.split(8)])
    out, chunks = ghost_norm(x, 8)
    assert chunks.shape == (3, 2, 5)
    torch.testing.assert_close(out, expected)
    before = torch.stack([torch.full((5,), 0.7), torch.ones(5)]).double()
    after = torch.stack([layer.running_mean, layer.running_var])  # type: ignore[list-item]  # it tracks statistics
    torch.testing.assert_close(running_statistics(before, chunks, 0.3), after)
    closed = 0.7**3 * before + sum(0.3 * 0.7 ** (2 - i) * chunks[i] for i in range(3))
    torch.testing.assert_close(running_statistics(before, chunks, 0.3), closed)
    torch.testing.assert_close(torch.vmap(lambda v: ghost_norm(v, 8)[0])(torch.stack([x, 2 * x]))[0], out)


def test_ghost_as_large_as_the_batch_is_the_ordinary_step():
    def fleet(ghost, steps=3):
        build = lambda: GhostNormMLP(5, 7, 2, ghost=ghost).double()  # noqa: E731
        return train(build, cross_entropy, {"x": X, "y": Y}, members=2, steps=steps, optimiser=SGD(lr=0.1), **FIT)

    assert torch.equal(fleet(24).parameters, fleet(None).parameters)
    assert torch.equal(fleet(500).parameters, fleet(None).parameters)
    assert not torch.allclose(fleet(8).parameters, fleet(None).parameters, atol=1e-4)


def mean_gradient(module, parts, **options):
    module.zero_grad()
    for x, y in parts:
        (F.cross_entropy(module(x, **options), y) / len(parts)).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def test_ghost_gradient_is_the_mean_of_the_chunks():
    """One pass with ghost 8 = three passes of 8; without normalisation, or with fixed statistics = the full batch."""
    torch.manual_seed(0)
    parts = list(zip(X.split(8), Y.split(8), strict=True))
    ghost = GhostNormMLP(5, 7, 2, ghost=8).double()
    chunked = mean_gradient(ghost, parts)
    torch.testing.assert_close(mean_gradient(ghost, [(X, Y)]), chunked, rtol=0, atol=1e-12)
    plain = GhostNormMLP(5, 7, 2).double()
    plain.load_state_dict(ghost.state_dict())
    assert not torch.allclose(mean_gradient(plain, [(X, Y)]), chunked, atol=1e-3)
    statistics = torch.stack([torch.zeros(2, 7), torch.ones(2, 7)], 1).double()
    fixed = [mean_gradient(ghost, batches, statistics=statistics) for batches in (parts, [(X, Y)])]
    torch.testing.assert_close(fixed[0], fixed[1], rtol=0, atol=1e-12)
    mlp = MLP(5, (7,), 2).double()
    torch.testing.assert_close(mean_gradient(mlp, parts), mean_gradient(mlp, [(X, Y)]), rtol=0, atol=1e-12)


def test_statistics_of_one_chunk_give_its_own_outputs():
    """Fed back (with the biased variance), a batch's statistics normalise as the batch did."""
    torch.manual_seed(0)
    model = GhostNormMLP(5, 7, 2).double()
    logits, found = model(X, return_statistics=True)
    assert found.shape == (1, 2, 2, 7)
    biased = found[0] * torch.tensor([1, 23 / 24]).double()[:, None]
    torch.testing.assert_close(model(X, statistics=biased), logits)
    torch.testing.assert_close(model(X[:1], statistics=biased), logits[:1])
    hidden = X @ model.layers[0].weight.mT  # type: ignore[operator]  # a tensor
    torch.testing.assert_close(found[0, 0], torch.stack([hidden.mean(0), hidden.var(0)]))


def test_planted_diffusion_laws():
    t = torch.tensor([1.0, 5, 10, 20, 50, 100, 300, 1000, 3000]).double()
    noise = torch.zeros(9).double()
    noise[:2] = 50  # before step 10: not looked at
    laws = torch.stack([log_diffusion(t, 2.0, 3.0), 1 + 0.5 * t.sqrt(), 4 + 2 * t**0.3]) + noise
    fit = fit_diffusion(t, laws)
    assert float(fit.offset[0]) == pytest.approx(2, abs=1e-10)
    assert float(fit.rate[0]) == pytest.approx(3, abs=1e-10)
    assert float(fit.r2_log[0]) == pytest.approx(1, abs=1e-12)
    assert fit.r2_sqrt[0] < 0.9
    assert float(fit.r2_sqrt[1]) == pytest.approx(1, abs=1e-12)
    assert fit.r2_log[1] < 0.9
    assert fit.power[1:].tolist() == pytest.approx([0.5, 0.3])
    assert float(fit.r2_power[2]) == pytest.approx(1, abs=1e-12)
    logs = t[2:].log()
    slope = float(((logs - logs.mean()) * laws[1, 2:]).sum() / (logs - logs.mean()).square().sum())
    intercept = float(laws[1, 2:].mean() - slope * logs.mean())
    assert (float(fit.rate[1]), float(fit.offset[1])) == pytest.approx((slope, intercept))


def test_travelled_reads_snapshots():
    fleet = train(
        lambda: MLP(5, (), 2).double(),
        cross_entropy,
        {"x": X, "y": Y},
        members=2,
        steps=4,
        snapshots=(0, 1, 4),
        optimiser=SGD(lr=0.1),
        **FIT,
    )
    steps, distances = travelled(fleet)
    assert steps.tolist() == [1, 4]
    torch.testing.assert_close(distances[:, 1], (fleet.parameters - fleet.snapshots[0]).square().sum(1).sqrt())
    assert distances.shape == (2, 2)
    with pytest.raises(ValueError, match="steps: expected snapshots"):
        travelled(fleet, [2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_critical_batch(torch.ones(1), torch.ones(1)), "steps: expected at least 2 runs"),
        (lambda: fit_critical_batch(torch.ones(3), torch.ones(3)), "examples: expected runs with different"),
        (lambda: fit_critical_batch(torch.tensor([1.0, -2]), torch.tensor([1.0, 2])), "steps: expected values greater"),
        (lambda: fit_critical_batch(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2])), "steps: expected"),
        (
            lambda: fit_critical_batch(torch.tensor([1.0, 2]), torch.tensor([1.0, torch.inf])),
            "examples: expected finite",
        ),
        (lambda: steps_to_reach(torch.tensor([1.0, float("nan")]), torch.ones(1)), "losses: expected numbers"),
        (lambda: steps_to_reach(torch.ones(1), torch.ones(1)), "losses: expected at least 2"),
        (lambda: noise_scale(torch.ones(()), torch.ones(()), 8, 8), "small_batch: expected"),
        (lambda: scaled_rate(0.1, 0, 8), "batch: expected a number greater"),
        (lambda: ghost_norm(torch.ones(4, 2), 1), "ghost: expected chunks"),
        (lambda: ghost_norm(torch.ones(9, 2), 4), "ghost: expected chunks"),
        (lambda: GhostNormMLP(3, 4, 2, ghost=1), "ghost: expected chunks"),
        (lambda: running_statistics(torch.ones(2), torch.ones(3, 2), 1.5), "momentum: expected"),
        (lambda: fit_diffusion(torch.arange(1.0, 13), torch.ones(12)), "steps: expected at least 4"),
        (lambda: fit_diffusion(torch.arange(0.0, 50), torch.ones(50)), "steps: expected values greater"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
