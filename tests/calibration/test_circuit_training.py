import math
from typing import Any

import pytest
import torch

from toolkit.calibration.circuit_training import (
    circuit_loss,
    dropout_inference_study,
    monte_carlo_posteriors,
    train_circuits,
)
from toolkit.calibration.circuits import Circuit, CircuitMoments, class_posterior_moments
from toolkit.fleet import Fleet


def points(n, inputs, seed=0):
    return torch.rand(n, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fleet_of(count=2, **sizes):
    options = {"inputs": 8, "classes": 3, "depth": 3, "sums": 3, "leaves": 2, "repetitions": 2} | sizes
    modules = []
    for seed in range(count):
        torch.manual_seed(seed)
        modules.append(Circuit(**options))
    return Fleet.of(modules, lambda: Circuit(**options))


def test_monte_carlo_means_converge_at_one_over_the_root_of_the_samples():
    fleet, x, groups, per_group = fleet_of(), points(6, 8).float(), 60, 20
    _, logs = monte_carlo_posteriors(fleet, x, 0.2, groups * per_group)
    exact = fleet.evaluate(lambda model, batch, hyper: model(batch.x, rate=0.2, full=True), {"x": x})
    ratio = exact.covariance.diagonal(dim1=-2, dim2=-1)
    relative = (logs - exact.log_mean[:, None]).exp()
    whole = (relative.mean(1) - 1) / (ratio / (groups * per_group)).sqrt()
    assert whole.abs().max() < 4
    few = (relative.unflatten(1, (groups, per_group)).mean(2) - 1).square().mean(1) / (ratio / per_group)
    assert few.mean().item() == pytest.approx(1, abs=0.2)
    torch.testing.assert_close(relative.var(1) / ratio, torch.ones_like(ratio), rtol=0, atol=0.25)


def test_posterior_deviation_agrees_with_monte_carlo_at_a_small_rate():
    fleet, x = fleet_of(1), points(5, 8).float()
    posteriors, _ = monte_carlo_posteriors(fleet, x, 0.01, 3000)
    exact = fleet.evaluate(lambda model, batch, hyper: model(batch.x, rate=0.01, full=True), {"x": x})
    found = class_posterior_moments(CircuitMoments(exact.log_mean[0], exact.covariance[0]), "shared")
    torch.testing.assert_close(found.variance.sqrt(), posteriors[0].std(0), rtol=0.15, atol=0)
    independent = class_posterior_moments(CircuitMoments(exact.log_mean[0], exact.covariance[0]))
    assert (independent.variance > 1.2 * found.variance).all()  # classes share children


def test_loss_mixes_cross_entropy_and_likelihood():
    logs = torch.tensor([[-10.0, -12.0], [-7.0, -3.0]])
    labels = torch.tensor([0, 0])
    cross = torch.tensor([math.log1p(math.exp(-2)), 4 + math.log1p(math.exp(-4))])
    torch.testing.assert_close(circuit_loss(logs, labels, 4, 1.0), cross)
    torch.testing.assert_close(circuit_loss(logs, labels, 4, 0.0), torch.tensor([2.5, 1.75]))
    torch.testing.assert_close(circuit_loss(logs, labels, 4, 0.25), 0.25 * cross + 0.75 * torch.tensor([2.5, 1.75]))


def test_training_raises_the_likelihood_and_members_stand_alone():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 2
    x = 0.5 + 0.25 * (2 * y[:, None] - 1) + 0.1 * torch.randn(120, 4, generator=generator)
    sizes = {"depth": 2, "sums": 2, "leaves": 2, "repetitions": 1}
    fleet = train_circuits(x, y, members=3, steps=60, **sizes)
    untrained = train_circuits(x, y, members=3, steps=1, lr=1e-9, **sizes)
    own = [f.logits(x).gather(-1, y.expand(3, -1)[..., None]).mean() for f in (fleet, untrained)]
    assert own[0] > own[1] + 1
    assert (fleet.logits(x).argmax(-1) == y).float().mean() > 0.95
    alone = train_circuits(x, y, members=1, steps=60, **sizes)
    torch.testing.assert_close(alone.parameters[0], fleet.parameters[0], rtol=1e-4, atol=1e-5)
    one = fleet.evaluate(lambda model, batch, hyper: model(batch.x, rate=0.2), {"x": x}).covariance[1]
    torch.testing.assert_close(one, fleet[1](x, rate=0.2).covariance.detach(), rtol=1e-4, atol=1e-6)


def test_study_repeats_itself():
    options: dict[str, Any] = {
        "angles": (0.0, 90.0),
        "samples": (2, 4),
        "examples": 12,
        "seeds": 2,
        "steps": 12,
        "repetitions": 2,
    }
    first, second = dropout_inference_study(**options), dropout_inference_study(**options)
    for name in first._fields:
        if name != "seconds":
            a, b = getattr(first, name), getattr(second, name)
            assert torch.allclose(a, b, equal_nan=True) if isinstance(a, torch.Tensor) else a == b
    assert first.sets == ("0°", "90°", "unseen classes")
    assert first.entropy.shape == first.deviation.shape == (4, 3, 2)
    assert first.accuracy.shape == (3, 2)
    assert first.accuracy[2].isnan().all()
    assert first.auroc.shape == (4, 2)
    assert first.error.shape == (2, 2)
    assert (first.deviation[0] == 0).all()
    assert (first.deviation[1:] > 0).all()
    torch.testing.assert_close(first.expected[0] / first.expected[1], torch.full((2,), math.sqrt(2)))
    assert len(first.seconds) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: circuit_loss(torch.zeros(2, 3), torch.tensor([0, 3]), 4), "labels: expected"),
        (lambda: circuit_loss(torch.zeros(2, 3), torch.tensor([0, 1]), 4, 1.5), "discriminative: expected"),
        (lambda: monte_carlo_posteriors(fleet_of(1), points(2, 8).float(), 0.1, 0), "samples: expected"),
        (lambda: dropout_inference_study(angles=(15.0,)), "angles: expected 0 first"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_draws_that_leave_no_path_answer_with_the_prior():
    fleet = fleet_of(1, depth=2, sums=2, repetitions=1)
    posteriors, logs = monte_carlo_posteriors(fleet, points(3, 8).float(), 0.6, 200)
    nothing = logs.isneginf().all(-1)
    assert nothing.any()
    assert not nothing.all()
    assert posteriors.isfinite().all()
    assert torch.equal(posteriors[nothing], torch.full_like(posteriors[nothing], 1 / 3))


@pytest.mark.parametrize("samples", [(), (0, 4), (1,)])
def test_a_study_needs_two_draws(samples):
    with pytest.raises(ValueError, match=r"^samples: expected counts of at least 1"):
        dropout_inference_study(samples=samples)
