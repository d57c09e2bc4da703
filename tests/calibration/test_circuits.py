import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from toolkit import random
from toolkit.calibration.circuit_training import circuit_loss
from toolkit.calibration.circuits import (
    Circuit,
    CircuitMoments,
    class_posterior_moments,
    product_moments,
    sum_moments,
)


def circuit(seed=0, **sizes):
    torch.manual_seed(seed)
    return Circuit(
        **({"inputs": 4, "classes": 3, "depth": 2, "sums": 2, "leaves": 2, "repetitions": 2} | sizes)
    ).double()


def points(n, inputs, seed=0):
    return torch.rand(n, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(parameter):
    return parameter.detach().softmax(-1).numpy()


def top_nodes(model, x, masks=None):
    """Linear values of the two nodes below each root product, ``(masks, parts, sums)``, node by node."""
    means, widths = model.means.detach().numpy(), model.widths.detach().numpy()
    deviations = model.narrowest + (1 - model.narrowest) / (1 + np.exp(1 - widths))
    parts = x.numpy()[model.order.numpy()]
    values = stats.norm.pdf(parts[:, None], means, deviations).prod(-1)[None]
    for level, parameter in enumerate(model.mixing):
        weights = weights_of(parameter)
        nodes, sums, children = weights.shape
        mask = np.ones((1, *weights.shape)) if masks is None else masks[level]
        above = np.zeros((len(mask), nodes, sums))
        pairs = list(itertools.product(range(values.shape[2]), repeat=2))
        for node in range(nodes):
            for one in range(sums):
                for child in range(children):
                    left, right = pairs[child]
                    product = values[:, 2 * node, left] * values[:, 2 * node + 1, right]
                    above[:, node, one] += mask[:, node, one, child] * weights[node, one, child] * product
        values = above
    return values


def roots(model, values):
    """Class likelihoods ``(masks, classes)`` from :func:`top_nodes`."""
    products = np.concatenate(
        [
            (values[:, 2 * r, :, None] * values[:, 2 * r + 1, None, :]).reshape(len(values), -1)
            for r in range(values.shape[1] // 2)
        ],
        1,
    )
    return products @ weights_of(model.roots).T


def all_masks(model, rate):
    """Every set of masks, level by level, and its probability."""
    shapes = [tuple(parameter.shape) for parameter in model.mixing]
    bits = sum(math.prod(shape) for shape in shapes)
    table = (np.arange(2**bits)[:, None] >> np.arange(bits)) & 1
    chance = np.where(table, 1 - rate, rate).prod(1)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [m.reshape(-1, *s) for m, s in zip(np.split(table, ends, 1), shapes, strict=True)], chance


def moments_of(values, chance):
    """Mean and relative covariance of the columns of ``values``."""
    mean = chance @ values
    return mean, (values * chance[:, None]).T @ values / np.outer(mean, mean) - 1


@pytest.mark.parametrize("sizes", [{}, {"inputs": 8, "depth": 3, "sums": 3, "repetitions": 1}, {"depth": 1}])
def test_likelihood_is_that_of_the_tree_of_sums_and_products(sizes):
    model = circuit(**sizes)
    x = points(3, model.inputs)
    expected = np.concatenate([roots(model, top_nodes(model, row)) for row in x])
    np.testing.assert_allclose(model(x).exp().detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("full", [False, True])
def test_without_shared_children_the_moments_are_those_of_all_masks(rate, full):
    model = circuit(sums=1, repetitions=1, classes=2)  # two sums of four children: 256 masks
    masks, chance = all_masks(model, rate)
    for row in points(3, 4):
        mean, ratio = moments_of(roots(model, top_nodes(model, row, masks)), chance)
        found = model(row[None], rate=rate, full=full)
        np.testing.assert_allclose(found.log_mean[0].exp().detach(), mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance[0].detach(), ratio, rtol=1e-11, atol=1e-12)


def test_shared_children_need_the_covariances():
    model, rate = circuit(leaves=1, repetitions=1, classes=2), 0.3  # 4 masks bits, four products share the sums
    masks, chance = all_masks(model, rate)
    row = points(1, 4)[0]
    mean, ratio = moments_of(roots(model, top_nodes(model, row, masks)), chance)
    published, exact = model(row[None], rate=rate), model(row[None], rate=rate, full=True)
    for found in (published, exact):
        np.testing.assert_allclose(found.log_mean[0].exp().detach(), mean, rtol=1e-12)
    np.testing.assert_allclose(exact.covariance[0].detach(), ratio, rtol=1e-11)
    assert (published.covariance[0].detach().numpy() < 0.9 * ratio).all()


def test_full_covariances_are_exact_through_two_layers_of_sums():
    rate = 0.25
    model = circuit(inputs=8, depth=3, leaves=1, repetitions=1)
    row = points(1, 8)[0]
    second = []
    for half in (0, 1):  # the halves are independent: 2^12 masks each
        single = circuit(inputs=8, depth=3, leaves=1, repetitions=1)
        part = [slice(half * len(p) // 2, (half + 1) * len(p) // 2) for p in single.mixing]
        shapes = [tuple(p[s].shape) for p, s in zip(single.mixing, part, strict=True)]
        table = (np.arange(2**12)[:, None] >> np.arange(12)) & 1
        pieces = np.split(table, [4], 1)
        masks = []
        for parameter, s, shape, piece in zip(single.mixing, part, shapes, pieces, strict=True):
            whole = np.ones((2**12, *parameter.shape))
            whole[:, s] = piece.reshape(-1, *shape)
            masks.append(whole)
        values = top_nodes(model, row, masks)[:, half]
        chance = np.where(table, 1 - rate, rate).prod(1)
        second.append((chance @ values, (values * chance[:, None]).T @ values))
    weights = weights_of(model.roots)
    mean = weights @ np.kron(second[0][0], second[1][0])
    raw = weights @ np.kron(second[0][1], second[1][1]) @ weights.T
    found = model(row[None], rate=rate, full=True)
    np.testing.assert_allclose(found.log_mean[0].exp().detach(), mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance[0].detach(), raw / np.outer(mean, mean) - 1, rtol=1e-10)


def test_no_dropout_is_the_plain_likelihood():
    model = circuit(inputs=8, depth=3)
    x = points(4, 8)
    for full in (False, True):
        found = model(x, rate=0.0, full=full)
        torch.testing.assert_close(found.log_mean, model(x), rtol=1e-12, atol=1e-12)
        assert found.covariance.abs().max() == 0
    torch.testing.assert_close(model(x, rate=0.0, key=random.key(0)), model(x))


def test_correction_moves_the_likelihoods_by_a_constant_and_not_the_posterior():
    model, rate = circuit(inputs=8, depth=3), 0.2
    x = points(5, 8)
    for full in (False, True):
        corrected, free = (model(x, rate=rate, correction=c, full=full) for c in (True, False))
        shift = 6 * math.log(1 - rate)  # a product tree of depth 3 has 4 + 2 sums with dropout
        torch.testing.assert_close(corrected.log_mean - free.log_mean, torch.full_like(free.log_mean, shift))
        torch.testing.assert_close(corrected.covariance, free.covariance)
        torch.testing.assert_close(free.log_mean, model(x), rtol=1e-12, atol=1e-12)
    drawn = [model(x, rate=rate, key=random.key(1), correction=c) for c in (True, False)]
    torch.testing.assert_close(drawn[0] - drawn[1], torch.full_like(drawn[0], shift))


@pytest.mark.parametrize("children", [1, 3, 10])
@pytest.mark.parametrize("correction", [True, False])
def test_a_sum_of_equal_children(children, correction):
    p, value = 0.2, 3.0
    log_mean = torch.full((1, children), math.log(value), dtype=torch.float64)
    weights = torch.full((1, 1, children), 1 / children, dtype=torch.float64)
    log_total, ratio = sum_moments(log_mean, torch.zeros_like(log_mean), weights, p, correction)
    mean = log_total.exp()
    variance = ratio * mean**2
    expected = p * (1 - p) * value**2 / children if correction else p / (1 - p) * value**2 / children
    assert mean.item() == pytest.approx(value * (1 - p if correction else 1))
    assert variance.item() == pytest.approx(expected, rel=1e-12)


def test_product_and_sum_rules_are_the_linear_ones():
    generator = torch.Generator().manual_seed(3)
    mean, variance = torch.rand(2, 5, 2, 3, generator=generator, dtype=torch.float64).unbind(0)
    log_mean, ratio = product_moments(mean.log(), variance / mean**2)
    left, right = mean[:, 0, :, None], mean[:, 1, None, :]
    v_left, v_right = variance[:, 0, :, None], variance[:, 1, None, :]
    expected = ((v_left + left**2) * (v_right + right**2) - left**2 * right**2).flatten(1)
    torch.testing.assert_close(log_mean.exp(), (left * right).flatten(1))
    torch.testing.assert_close(ratio * log_mean.exp() ** 2, expected)

    weights = torch.rand(5, 2, 9, generator=generator, dtype=torch.float64)
    children, spread = (left * right).flatten(1), expected
    p, q = 0.3, 0.7
    log_total, relative = sum_moments(children.log(), spread / children**2, weights, p)
    torch.testing.assert_close(log_total.exp(), q * torch.einsum("nsc,nc->ns", weights, children))
    total = q * torch.einsum("nsc,nc->ns", weights**2, spread + p * children**2)
    torch.testing.assert_close(relative * log_total.exp() ** 2, total)


def some_moments(classes=4, seed=5, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    log_mean = torch.randn(6, classes, generator=generator, dtype=torch.float64)
    root = torch.randn(6, classes, classes, generator=generator, dtype=torch.float64)
    return CircuitMoments(log_mean - 700, scale * root @ root.mT)


@pytest.mark.parametrize("heads", ["independent", "shared"])
def test_posterior_moments_are_the_taylor_expansion(heads):
    moments = some_moments()
    found = class_posterior_moments(moments, heads)
    for i in range(6):
        mean = (moments.log_mean[i] + 700).exp()  # the posterior has no unit
        covariance = moments.covariance[i] * torch.outer(mean, mean)
        if heads == "independent":
            covariance = covariance.diagonal().diag_embed()
        for c in range(4):
            share = lambda a, c=c: a[c] / a.sum()  # noqa: E731
            slope = torch.func.grad(share)(mean)
            bend = torch.func.hessian(share)(mean)
            assert found.mean[i, c] == pytest.approx((share(mean) + 0.5 * (bend * covariance).sum()).item(), rel=1e-9)
            assert found.variance[i, c] == pytest.approx((slope @ covariance @ slope).item(), rel=1e-9)
    torch.testing.assert_close(found.mean.sum(1), torch.ones(6, dtype=torch.float64))


def test_third_variance_term_divides_by_the_square_of_the_sum():
    mean, own = torch.tensor([3.0, 1.0]).double(), torch.tensor([0.1, 0.2]).double()
    found = class_posterior_moments(CircuitMoments(mean.log()[None], own.diag_embed()[None]))
    variance = own * mean**2
    a, b = 3.0, 4.0
    head = (a / b) ** 2 * (0.1 - 2 * variance[0] / (a * b))
    third = (a / b) ** 2 * variance.sum()
    assert found.variance[0, 0] == pytest.approx(float(head + third / b**2))
    assert float(head + third / 10) > 1.5 * found.variance[0, 0]  # dividing by 3² + 1² would say much more


def test_posterior_moments_are_exact_where_the_evidence_is_constant():
    share, variance = torch.tensor([0.3, 0.7]).double(), 0.01
    covariance = variance * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double() / torch.outer(share, share)
    found = class_posterior_moments(CircuitMoments(share.log()[None], covariance[None]), "shared")
    torch.testing.assert_close(found.mean[0], share)
    torch.testing.assert_close(found.variance[0], torch.full((2,), variance).double())


def test_missing_inputs_are_summed_out():
    model = circuit()
    x = points(2, 4)
    grid = torch.linspace(-8, 9, 4001, dtype=torch.float64)
    rows = x[0].repeat(len(grid), 1)
    rows[:, 2] = grid
    gap = x[:1].clone()
    gap[:, 2] = float("nan")
    torch.testing.assert_close(torch.trapezoid(model(rows).exp(), grid, dim=0), model(gap).exp()[0])
    nothing = model(torch.full((1, 4), float("nan"), dtype=torch.float64))
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-12)


def test_far_inputs_and_dead_circuits_stay_without_nan():
    model = circuit(inputs=8, depth=3)
    x = 50 * points(3, 8)
    small = Circuit(inputs=8, classes=3, depth=3, sums=2, leaves=2, repetitions=2)
    small.load_state_dict(model.state_dict())
    torch.testing.assert_close(small(x.float()).double(), model(x), rtol=1e-4, atol=1e-3)
    single, double = small(x.float(), rate=0.2), model(x, rate=0.2)
    torch.testing.assert_close(single.covariance.double(), double.covariance, rtol=1e-2, atol=1e-3)
    loss = circuit_loss(small(x.float()), torch.tensor([0, 1, 2]), 8).sum()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in small.parameters())
    dead = model(x, rate=0.999, key=random.key(0))
    assert not dead.isnan().any()
    assert (dead == -math.inf).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Circuit(inputs=60), "inputs: expected a multiple"),
        (lambda: Circuit(sums=0), "sums: expected"),
        (lambda: Circuit(narrowest=1.5), "narrowest: expected"),
        (lambda: circuit()(points(2, 5)), "x: expected 4 values"),
        (lambda: circuit()(points(2, 4), rate=1.0), "rate: expected"),
        (lambda: circuit()(points(2, 4), rate=-0.1, key=random.key(0)), "rate: expected"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
