"""muP against its gamma form, its kernel and the abc symmetry; coordinate checks; sharpness against dense Hessians."""

from typing import Any

import pytest
import torch
from torch.func import functional_call

from toolkit import random
from toolkit.fleet import SGD, Adam, AdamW, Fleet, train
from toolkit.scaling_laws.parameterisation import (
    PerLayer,
    Rule,
    ScaledMLP,
    coordinate_check,
    layer_rules,
    sharpness,
    top_eigenvalue,
    transfer_sweep,
)

INPUTS, WIDTH, BASE, OUTPUTS = 3, 24, 6, 2
X = random.normal(random.key(1), (12, INPUTS), torch.float64)
Y = random.normal(random.key(2), (12, OUTPUTS), torch.float64)
DATA = {"x": X, "y": Y}
FIT: dict[str, Any] = {"steps": 5, "batch": 12, "progress": False, "device": "cpu"}


def squares(model, batch, hyper):
    return (model(batch.x) - batch.y).square().mean(1)


def builder(rules, width=WIDTH, inputs=INPUTS, outputs=OUTPUTS, activation="tanh"):
    return lambda: ScaledMLP(inputs, width, outputs, rules, activation).double()


def outputs_along(build, start, factors, lr=0.05, x=X, inner=SGD):
    fleet = train(
        build, squares, DATA, start=start, optimiser=PerLayer(inner(lr=lr), factors), snapshots=range(6), **FIT
    )
    return torch.stack([fleet.at(step).logits(x)[0] for step in range(6)])


def rescaled(fleet, build, factors):
    """The fleet with its i-th parameter multiplied by factors[i], under another build."""
    views = fleet.layout.views(fleet.parameters)
    rows = [(value * factor).flatten(1) for value, factor in zip(views.values(), factors, strict=True)]
    return Fleet(build, torch.cat(rows, 1))


def without_biases(rules):
    """Biases that hardly learn, for identities about the weights."""
    return [rule._replace(bias_sgd=1e-300) for rule in rules]


def test_the_table_is_the_gamma_form():
    """Weights N(0, 1), h = W phi / sqrt(fan_in), f = w h / (gamma sqrt N), with gamma = sqrt(N / N0)."""
    gamma = (WIDTH / BASE) ** 0.5
    table = without_biases(layer_rules(INPUTS, WIDTH, "mup", base=BASE))
    unit = [
        Rule(1.0, INPUTS**-0.5, gamma**2 * INPUTS, bias_sgd=1e-300),
        Rule(1.0, WIDTH**-0.5, gamma**2 * BASE, bias_sgd=1e-300),
        Rule(1.0, 1 / (gamma * WIDTH**0.5), gamma**2 * BASE, bias_sgd=1e-300),
    ]
    first = builder(unit)
    start = train(first, squares, DATA, members=1, **FIT | {"steps": 0})
    other = rescaled(start, builder(table), [INPUTS**-0.5, WIDTH**-0.5, BASE**-0.5, 1, 1, 1])
    expected = outputs_along(first, start, first().factors("sgd"))
    found = outputs_along(builder(table), other, builder(table)().factors("sgd"))
    assert (expected[-1] - expected[0]).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def kernel(build, parameters):
    """Theta = J J^T over the weights at the sum of the outputs."""
    weights = {name: value for name, value in parameters.items() if name.startswith("weights")}
    module = build()
    jacobian = torch.func.jacrev(lambda w: functional_call(module, parameters | w, (X,)).sum(1))(weights)
    flat = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    return flat @ flat.mT


def test_mup_has_the_kernel_of_ntk_over_gamma_squared():
    """At equal raw weights, with the readout's multiplier divided by gamma: gamma^2 Theta_muP = Theta_NTK."""
    gamma = 2.0
    ntk = layer_rules(INPUTS, WIDTH, "ntk", base=BASE)
    mup = [*ntk[:-1], ntk[-1]._replace(multiplier=ntk[-1].multiplier / gamma)]
    weights = dict(builder(ntk)().named_parameters())
    torch.testing.assert_close(
        gamma**2 * kernel(builder(mup), weights), kernel(builder(ntk), weights), rtol=0, atol=1e-12
    )


def test_the_three_coincide_at_base_width():
    """From equal effective weights SP, NTK and muP make the same steps there, with SGD and with Adam."""
    for optimiser in ("sgd", "adam"):
        fleets = []
        for kind in ("sp", "ntk", "mup"):
            rules = layer_rules(INPUTS, BASE, kind, base=BASE)
            build = builder(rules, BASE)
            if kind == "sp":
                start = train(build, squares, DATA, members=1, **FIT | {"steps": 0})
            scale = [INPUTS**0.5, BASE**0.5, BASE**0.5, 1, 1, 1] if kind == "ntk" else [1] * 6
            inner = SGD if optimiser == "sgd" else lambda lr: Adam(lr=lr, eps=1e-30)
            factors = build().factors(optimiser)
            fleets.append(outputs_along(build, rescaled(start, build, scale), factors, inner=inner))
        for other in fleets[1:]:
            torch.testing.assert_close(other, fleets[0], rtol=0, atol=1e-10)
        assert (fleets[0][-1] - fleets[0][0]).abs().max() > 1e-2


@pytest.mark.parametrize("shift", [0.5, -1.0])
def test_abc_symmetry(shift):
    """Multiplier N^t, weights N^-t, SGD rate N^-2t: the same function at every step."""
    rules = layer_rules(INPUTS, WIDTH, "mup", base=BASE)
    factor = WIDTH**shift
    moved = [
        rule._replace(std=rule.std / factor, multiplier=rule.multiplier * factor, sgd=rule.sgd / factor**2)
        for rule in rules
    ]
    start = train(builder(rules), squares, DATA, members=1, **FIT | {"steps": 0})
    other = rescaled(start, builder(moved), [1 / factor] * 3 + [1] * 3)
    expected = outputs_along(builder(rules), start, builder(rules)().factors("sgd"))
    found = outputs_along(builder(moved), other, builder(moved)().factors("sgd"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["sp", "mup", "ntk"])
def test_rules_give_their_standard_deviations(kind):
    rules = layer_rules(100, 200, kind, base=50)
    module = ScaledMLP(100, 200, 300, rules)
    for weight, rule in zip(module.weights, rules, strict=True):
        assert float(weight.detach().std()) == pytest.approx(rule.std, rel=0.03)
    assert rules[0].std == (1 if kind == "ntk" else 0.1)
    assert rules[-1].multiplier * rules[-1].std == pytest.approx(200**-0.5 * (0.5 if kind == "mup" else 1))
    last = ScaledMLP(100, 200, 3, layer_rules(100, 200, kind, base=50, zero_readout=True))
    assert not last(torch.ones(2, 100)).any()


def test_published_table_of_mup():
    """Input, hidden, readout at four times the base width: SGD 4, 1, 4; Adam 1, 1/4, 1; output 1/4; hidden biases 4."""
    rules = layer_rules(8, 256, "mup", base=64, depth=3)
    assert [rule.sgd for rule in rules] == [4, 1, 1, 4]
    assert [rule.adam for rule in rules] == [1, 0.25, 0.25, 1]
    assert [rule.multiplier for rule in rules] == [1, 1, 1, 0.25]
    assert [rule.std for rule in rules] == pytest.approx([8**-0.5, 1 / 16, 1 / 16, 1 / 8])
    assert [rule.bias_sgd for rule in rules] == [4, 4, 4, 1]
    assert {rule.bias_adam for rule in rules} == {1}


@pytest.mark.parametrize(
    ("kind", "optimiser", "low", "high"),
    [
        ("mup", "sgd", -0.1, 0.1),
        ("mup", "adam", -0.1, 0.1),
        ("ntk", "sgd", -0.65, -0.35),
        ("ntk", "adam", -0.65, -0.35),
        ("sp", "sgd", 0.3, 0.8),
        ("sp", "adam", 0.3, 1.2),
    ],
)
def test_coordinate_check(kind, optimiser, low, high):
    """Slope of log change of the second hidden layer against log width after 3 steps: 0, -1/2, positive."""
    widths, changes = [64, 512], []
    for width in widths:
        build = builder(layer_rules(INPUTS, width, kind, base=64), width)
        inner: Any = SGD(lr=0.005) if optimiser == "sgd" else Adam(lr=2e-4)
        optimise = PerLayer(inner, build().factors(optimiser))
        fleet = train(build, squares, DATA, members=8, optimiser=optimise, snapshots=(0, 3), **FIT | {"steps": 3})
        moved = coordinate_check(fleet, X, 3)
        assert moved.shape == (8, 3)
        changes.append(moved[:, 1].log().mean())
    logs = torch.tensor(widths).double().log()
    logs, change = logs - logs.mean(), torch.stack(changes)
    assert low < float((logs * change).sum() / logs.square().sum()) < high


def test_coordinate_check_by_hand():
    build = builder(layer_rules(INPUTS, WIDTH, base=BASE))
    fleet = train(build, squares, DATA, members=2, optimiser=SGD(lr=0.1), snapshots=(0, 5), **FIT)
    weights = [fleet.layout.views(fleet.at(step).parameters)["weights.0"][1] for step in (0, 5)]
    biases = [fleet.layout.views(fleet.at(step).parameters)["biases.0"][1] for step in (0, 5)]
    change = X @ (weights[1] - weights[0]).mT + biases[1] - biases[0]
    torch.testing.assert_close(coordinate_check(fleet, X, 5)[1, 0], change.square().mean().sqrt())


def dense_hessian(fleet, member):
    names, shapes = fleet.layout.names, fleet.layout.shapes
    module = fleet[member]

    def loss(flat):
        parts = flat.split(fleet.layout.sizes)
        named = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return (functional_call(module, named, (X,)) - Y).square().mean()

    return torch.autograd.functional.hessian(loss, fleet.parameters[member])


def test_sharpness_is_the_top_eigenvalue():
    rules = layer_rules(INPUTS, 11, base=BASE)
    build = builder(rules, 11)
    assert 180 < sum(p.numel() for p in build().parameters()) < 220
    fleet = train(build, squares, DATA, members=3, optimiser=SGD(lr=0.1), **FIT)
    factors = build().factors("sgd")
    expected, scaled = [], []
    for member in range(3):
        hessian = dense_hessian(fleet, member)
        expected.append(torch.linalg.eigvalsh(hessian)[-1])
        scaled.append(torch.linalg.eigvalsh(factors.sqrt()[:, None] * hessian * factors.sqrt())[-1])
    found = sharpness(fleet, squares, DATA, chunk=2, iterations=60)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        sharpness(fleet, squares, DATA, factors=factors, iterations=60), torch.stack(scaled), rtol=0, atol=1e-6
    )


def test_sharpness_at_zero_residual_is_that_of_the_kernel():
    """H = 2 J^T J / n where the model fits its targets: its top eigenvalue is that of 2 J J^T / n."""
    build = builder(layer_rules(INPUTS, WIDTH, base=BASE), outputs=1)
    fleet = train(build, squares, {"x": X, "y": Y[:, :1]}, members=1, **FIT | {"steps": 0})
    module = fleet[0]
    parameters = dict(module.named_parameters())
    jacobian = torch.func.jacrev(lambda p: functional_call(module, p, (X,)).squeeze(1))(parameters)
    flat = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    expected = torch.linalg.eigvalsh(2 * flat @ flat.mT / len(X))[-1:]
    fitted = {"x": X, "y": fleet.logits(X)[0]}
    torch.testing.assert_close(sharpness(fleet, squares, fitted), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [5, 40])
def test_top_eigenvalue_where_the_largest_magnitude_is_negative(size):
    spread = torch.linspace(-10, 3, size, dtype=torch.float64)
    basis = torch.linalg.qr(random.normal(random.key(4), (size, size), torch.float64))[0]
    matrix = basis @ torch.diag(spread) @ basis.mT
    start = random.normal(random.key(5), (2, size), torch.float64)
    found = top_eigenvalue(lambda v: v @ matrix, start, 60)
    torch.testing.assert_close(found, torch.full((2,), 3.0).double(), rtol=0, atol=1e-9)
    low = top_eigenvalue(lambda v: v @ matrix, start, 3)
    assert (low <= 3 + 1e-12).all()
    single = top_eigenvalue(lambda v: v @ matrix, start, 1)
    torch.testing.assert_close(single, ((start @ matrix) * start).sum(1) / start.square().sum(1))


def test_per_layer_rates_keep_rate_times_decay():
    """With a zero gradient every coordinate shrinks alike; without decay each moves by its own rate."""
    factors = torch.tensor([0.5, 4.0]).double()
    for inner in (SGD(lr=0.1, weight_decay=0.2), AdamW(lr=0.1, weight_decay=0.2)):
        optimiser = PerLayer(inner, factors)
        parameters = torch.ones(1, 2).double()
        one, state = torch.ones(1, 1).double(), optimiser.initial(parameters)
        optimiser.apply(parameters, torch.zeros(1, 2).double(), state, 0.1 * one, 0.2 * one, 0)
        torch.testing.assert_close(parameters, torch.full((1, 2), 0.98).double())
    plain, parameters = PerLayer(SGD(lr=0.1), factors), torch.ones(1, 2).double()
    plain.apply(parameters, torch.ones(1, 2).double(), {}, 0.1 * one, None, 0)
    torch.testing.assert_close(parameters, 1 - 0.1 * factors[None])


def test_transfer_sweep_is_one_run_per_cell():
    options: dict[str, Any] = {"steps": 4, "batch": 6, "progress": False, "device": "cpu"}
    data = {"x": X.float(), "y": Y.float()}
    table = transfer_sweep(
        data, squares, [4, 8], [1e-3, 1e-2, 1e30], inputs=3, outputs=2, base=4, optimiser=SGD(), **options
    )
    assert table.shape == (2, 3, 2)
    assert table[:, 2].isinf().all()
    rules = layer_rules(3, 8, base=4)
    module = ScaledMLP(3, 8, 2, rules)
    single = train(
        lambda: ScaledMLP(3, 8, 2, rules),
        squares,
        data,
        streams=torch.tensor([1]),
        optimiser=PerLayer(SGD(lr=1e-2), module.factors("sgd")),
        **options,
    )
    expected = (single.logits(data["x"])[0] - data["y"]).square().mean()
    torch.testing.assert_close(table[1, 1, 1], expected, rtol=1e-5, atol=0)


def test_refusals():
    with pytest.raises(ValueError, match="width: expected a whole number"):
        layer_rules(3, 0)
    with pytest.raises(ValueError, match="rules: expected"):
        ScaledMLP(3, 4, 2, [Rule(1.0)])
    with pytest.raises(ValueError, match="factors: expected values greater than 0"):
        PerLayer(SGD(), torch.zeros(3))
    with pytest.raises(ValueError, match="activation"):
        ScaledMLP(3, 4, 2, layer_rules(3, 4), "gelu")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ValueError, match="iterations"):
        top_eigenvalue(lambda v: v, torch.ones(1, 2), 0)
    build = builder(layer_rules(INPUTS, WIDTH, base=BASE))
    fleet = train(build, squares, DATA, members=1, **FIT | {"steps": 0})
    with pytest.raises(ValueError, match="factors: expected one per coordinate"):
        sharpness(fleet, squares, DATA, factors=torch.ones(3))
    with pytest.raises(ValueError, match="step: expected one of the snapshots"):
        coordinate_check(fleet, X, 3)
    with pytest.raises(ValueError, match="widths, rates"):
        transfer_sweep(DATA, squares, [], [0.1], inputs=3, outputs=2)
