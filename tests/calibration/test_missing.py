import math
from typing import Any

import pytest
import torch

from toolkit import random
from toolkit.calibration.missing import (
    PromissingMLP,
    _treated,
    missing_features_study,
    missing_probability,
    promissing_linear,
    remove_features,
)
from toolkit.models import MLP

NAN = float("nan")


def layer(units=3, inputs=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, bias, compensation, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((units, inputs), (units,), (units,), (5, inputs))
    )
    gone = torch.rand(5, inputs, generator=generator) < 0.4
    gone[0], gone[1] = True, False
    return torch.where(gone, NAN, x), x, weight, bias, compensation


def test_missing_inputs_are_each_neurons_own_neutraliser():
    x, _, weight, bias, _ = layer()
    found = promissing_linear(x, weight, bias)
    for unit in range(3):
        neutral = -bias[unit] / (6 * weight[unit])
        filled = torch.where(x.isnan(), neutral, x)
        torch.testing.assert_close(found[:, unit], filled @ weight[unit] + bias[unit], rtol=1e-12, atol=1e-12)


def test_ends_of_the_range():
    x, whole, weight, bias, compensation = layer()
    plain = promissing_linear(x, weight, bias)
    learnt = promissing_linear(x, weight, bias, compensation)
    torch.testing.assert_close(promissing_linear(whole, weight, bias, compensation), whole @ weight.T + bias)
    assert (plain[0] == 0).all()  # nothing observed
    torch.testing.assert_close(learnt[0], compensation)
    gone = x.isnan().double().mean(1, keepdim=True)
    torch.testing.assert_close(learnt - plain, gone * compensation)


def test_neither_zero_imputation_nor_rescaling():
    x, _, weight, bias, _ = layer()
    zeroed = x.nan_to_num(0)
    torch.testing.assert_close(promissing_linear(x, weight, 0 * bias), zeroed @ weight.T)
    partly = slice(2, None)
    found = promissing_linear(x, weight, bias)[partly]
    observed = (~x.isnan()).double().mean(1, keepdim=True)[partly]
    torch.testing.assert_close(found - zeroed[partly] @ weight.T, observed * bias)
    assert (found - (zeroed[partly] @ weight.T / observed + bias)).abs().min() > 1e-3


def test_gradients_pass_by_what_is_missing():
    x = torch.tensor([[1.0, NAN, 2.0, NAN]])
    weight, bias = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.ones(2)
    compensation = torch.zeros(2)
    slopes = torch.func.grad(lambda w, b, c: promissing_linear(x, w, b, c).sum(), argnums=(0, 1, 2))(
        weight, bias, compensation
    )
    torch.testing.assert_close(slopes[0], torch.tensor([1.0, 0.0, 2.0, 0.0]).expand(2, 4))
    torch.testing.assert_close(slopes[1], torch.full((2,), 0.5))
    torch.testing.assert_close(slopes[2], torch.full((2,), 0.5))


def test_layer_under_vmap_is_the_layer():
    x, _, weight, bias, compensation = layer()
    stacked = torch.vmap(lambda w: promissing_linear(x, w, bias, compensation))(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(stacked[1], promissing_linear(x, 2 * weight, bias, compensation))


def test_net_without_hidden_layers_is_undecided_in_proportion():
    torch.manual_seed(0)
    net = PromissingMLP(6, (), 4)
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(torch.full((1, 6), NAN)).softmax(-1), torch.full((1, 4), 0.25))
    bound = (net.first.weight.abs() + net.first.bias.abs()[:, None] / 6).max()
    for count in range(7):
        seen = torch.where(torch.arange(6) < count, x, NAN)
        assert net(seen).abs().max() <= count * bound + 1e-6


def test_net_with_everything_observed_is_the_plain_net():
    torch.manual_seed(0)
    net, plain = PromissingMLP(6, (5, 7), 4), MLP(6, (5, 7), 4)
    assert net.rest is not None
    own = [*net.first.parameters(), *net.rest.parameters()]
    for theirs, ours in zip(plain.parameters(), own, strict=True):
        theirs.data = ours.data
    with torch.no_grad():
        net.compensation.add_(1)
    x = torch.rand(3, 6)
    torch.testing.assert_close(net(x), plain(x))
    gap = torch.where(torch.arange(6) == 2, NAN, x)
    hidden = promissing_linear(gap, net.first.weight, net.first.bias)
    torch.testing.assert_close(net(gap, compensated=0.0), net.rest(hidden.relu()))
    torch.testing.assert_close(net(gap), net.rest((hidden + 1 / 6).relu()))


def table(n=400, features=8):
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x * torch.arange(1, features + 1) + 3


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_mean_probability_is_the_rate(rate):
    x = table()
    mcar, mar, mnar = (missing_probability(x, rate, kind) for kind in ("mcar", "mar", "mnar"))
    assert (mcar == rate).all()
    assert (mar[:, :2] == 0).all()
    assert mar[:, 2:].mean().item() == pytest.approx(rate, abs=1e-9)
    assert mnar.mean().item() == pytest.approx(rate, abs=1e-9)


def test_log_odds_are_linear_in_what_drives_them():
    x = table()
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    odds = missing_probability(x, 0.4, "mnar", strength=1.5).logit()
    torch.testing.assert_close(odds - odds[:1, :1], 1.5 * (z - z[:1, :1]), rtol=1e-7, atol=1e-7)
    drive = x[:, :3].mean(1)
    drive = (drive - drive.mean()) / drive.std(unbiased=False)
    odds = missing_probability(x, 0.4, "mar", strength=1.5, drivers=3).logit()[:, 3:]
    expected = 1.5 * (drive - drive[0])[:, None].expand_as(odds)
    torch.testing.assert_close(odds - odds[:1, :1], expected, rtol=1e-7, atol=1e-7)


def test_at_random_does_not_look_at_what_goes_missing():
    x = table()
    other = torch.cat([x[:, :2], x[:, 2:].flip(0)], 1)
    assert torch.equal(missing_probability(x, 0.4, "mar"), missing_probability(other, 0.4, "mar"))
    assert not torch.equal(missing_probability(x, 0.4, "mnar"), missing_probability(other, 0.4, "mnar"))
    for kind in ("mar", "mnar"):
        flat = missing_probability(x, 0.4, kind, strength=0.0)
        torch.testing.assert_close(flat[:, 2:], torch.full_like(flat[:, 2:], 0.4))


@pytest.mark.parametrize("kind", ["mcar", "mar", "mnar"])
def test_removed_features_follow_their_probability_and_are_nested(kind):
    x = table(4000)
    few, many = (remove_features(x, rate, random.key(1), kind) for rate in (0.3, 0.6))
    assert (few.isnan() & ~many.isnan()).sum() == 0
    assert torch.equal(few[~few.isnan()], x[~few.isnan()])
    probability = missing_probability(x, 0.3, kind)
    for part in (probability > 0.4, (probability > 0) & (probability < 0.32)):
        if part.any():
            assert few.isnan()[part].double().mean().item() == pytest.approx(probability[part].mean().item(), abs=0.02)
    assert not few.isnan()[probability == 0].any()


def test_generators_under_vmap():
    x = table(50)
    rates = torch.tensor([0.2, 0.7], dtype=torch.float64)
    for kind in ("mcar", "mar", "mnar"):
        stacked = torch.vmap(lambda r, kind=kind: remove_features(x, r, random.key(0), kind))(rates)
        for i in range(2):
            alone = remove_features(x, float(rates[i]), random.key(0), kind)
            assert torch.equal(stacked[i].isnan(), alone.isnan())


def test_what_the_four_methods_see():
    x = torch.tensor([[[1.0, NAN], [NAN, 4.0]], [[NAN, 2.0], [3.0, NAN]]])
    means = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    neuron, compensated, mean, zero = _treated(x, means).unflatten(0, (4, 2))
    for kept in (neuron, compensated):
        torch.testing.assert_close(kept, x, equal_nan=True)
    torch.testing.assert_close(mean, torch.tensor([[[1.0, 0.2], [0.1, 4.0]], [[0.3, 2.0], [3.0, 0.4]]]))
    torch.testing.assert_close(zero, x.nan_to_num(0))


def test_without_gaps_the_four_methods_are_one():
    study = missing_features_study(rates=(0.0,), train_rate=0.0, hidden=(8,), examples=100, seeds=2, steps=20)
    for values in (study.confidence, study.accuracy, study.ece, study.entropy):
        assert values.shape == (4, 1, 2)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-4, atol=1e-4)
    assert study.accuracy.min() > 0.3


def test_study_without_hidden_layers_ends_at_chance():
    options: dict[str, Any] = {"rates": (0.0, 1.0), "hidden": (), "examples": 100, "seeds": 2, "steps": 30}
    study = missing_features_study(**options)
    again = missing_features_study(**options)
    assert all(torch.equal(a, b) for a, b in zip(study[2:], again[2:], strict=True))
    torch.testing.assert_close(study.confidence[0, 1], torch.full((2,), 0.1))
    torch.testing.assert_close(study.entropy[0, 1], torch.full((2,), math.log(10)))
    assert (study.confidence[1:, 1] > 0.1001).all()  # a compensation, a bias or a guess always says something
    assert (study.confidence[:, 0] > study.confidence[:, 1]).all()
    first = missing_features_study(**(options | {"seeds": 1}))
    torch.testing.assert_close(first.confidence[..., 0], study.confidence[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PromissingMLP(0, (), 3), "inputs, hidden, classes: expected"),
        (lambda: PromissingMLP(4, (3,), 3)(torch.zeros(2, 5)), "x: expected 4 values"),
        (lambda: missing_probability(table(), 1.2), "rate: expected"),
        (lambda: missing_probability(table(), 0.2, "mar", drivers=8), "drivers: expected"),
        (lambda: missing_features_study(rates=(0.5, 2.0)), r"rates\[1\]: expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
