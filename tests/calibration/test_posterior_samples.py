import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from toolkit import random
from toolkit.calibration.posterior_samples import (
    _masks,
    effective_sample_size,
    gaussian_stationary_covariance,
    langevin,
    mlp_log_density,
    parameter_groups,
    sample_posteriors,
)
from toolkit.fleet import Fleet
from toolkit.fleet.members import Layout
from toolkit.models import MLP, ConvNet

PRECISION = torch.tensor([[2.0, 0.8, -0.5], [0.8, 1.5, 0.6], [-0.5, 0.6, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 1])
SINGLE = torch.arange(3)


def gaussian(precision=PRECISION, mean=MEAN):
    return lambda theta, key: -0.5 * (theta - mean) @ precision @ (theta - mean)


def mask_law(form, count, keep):
    """(probability, mask) pairs, with the factor of the energy."""
    masks = [m for m in itertools.product([0.0, 1.0], repeat=count) if any(m)]
    if form == "one_group":
        masks = [m for m in masks if sum(m) == 1]
        weights = [1.0] * len(masks)
    else:
        weights = [keep ** sum(m) * (1 - keep) ** (count - sum(m)) for m in masks]
    total = sum(weights)
    law = [(w / total, torch.tensor(m, dtype=torch.float64)) for w, m in zip(weights, masks, strict=True)]
    return law, count / sum(w * m.sum().item() for w, m in law)


def exact_covariance(precision, groups, form, keep, step, rounds=None):
    """The chain's covariance ``rounds`` steps after the mean, or at last: second moments enumerated over all masks.

    Partners are independent of the chain and of each other (infinitely many chains). vec(m C m') = (m x m) vec(C).
    """
    d, count = len(precision), int(groups.max()) + 1
    identity, same = torch.eye(d, dtype=torch.float64), groups[:, None] == groups
    partner = same.double().flatten().diag()  # partners of different groups are different chains
    if form == "structured":
        own = identity - step / 2 * precision * same
        operator = torch.kron(own, own)
        for g in range(count):
            r = (groups == g).double().diag()
            other = step / 2 * r @ precision @ (identity - r)
            operator = operator + torch.kron(other, other) @ partner
    else:
        law, factor = mask_law(form, count, keep)
        operator = torch.zeros(d * d, d * d, dtype=torch.float64)
        for weight, mask in law:
            r = mask[groups].diag()
            own = identity - step / 2 * factor * r @ precision @ r
            other = step / 2 * factor * r @ precision @ (identity - r)
            operator = operator + weight * (torch.kron(own, own) + torch.kron(other, other) @ partner)
    noise = step * identity.flatten()
    if rounds is None:
        return torch.linalg.solve(torch.eye(d * d, dtype=torch.float64) - operator, noise).view(d, d)
    covariance = torch.zeros_like(noise)
    for _ in range(rounds):
        covariance = operator @ covariance + noise
    return covariance.view(d, d)


def test_masks_have_the_conditional_bernoulli_law():
    keys = random.fold_in(random.key(0), torch.arange(40_000))
    for keep in (0.2, 0.5, 0.9):
        masks, factor = _masks("dropout", keys, 3, keep, torch.float64)
        law, expected = mask_law("dropout", 3, keep)
        assert factor == pytest.approx(expected, rel=1e-12)
        for weight, mask in law:
            share = (masks[0] == mask).all(-1).double().mean().item()
            assert abs(share - weight) < 4.5 * math.sqrt(weight * (1 - weight) / len(keys))
        assert (masks.sum(-1) > 0).all()
    masks, factor = _masks("one_group", keys, 3, 0.5, torch.float64)
    assert factor == 3
    assert (masks.sum(-1) == 1).all()
    np.testing.assert_allclose(masks[0].mean(0), 1 / 3, atol=0.01)


def test_one_group_and_full_masks_are_plain_langevin():
    start = torch.zeros(4, 3, dtype=torch.float64)
    options: dict[str, Any] = {"step": 0.1, "steps": 40, "key": random.key(1)}
    plain = langevin(gaussian(), start, **options)
    same: tuple[dict[str, Any], ...] = (
        {"form": "structured"},
        {"form": "one_group"},
        {"form": "dropout", "groups": GROUPS, "keep": 1.0},
        {"form": "joint", "groups": SINGLE},
    )
    for extra in same:
        torch.testing.assert_close(langevin(gaussian(), start, **options, **extra), plain)
    assert not torch.allclose(langevin(gaussian(), start, **options, form="dropout", groups=GROUPS), plain)
    # A chain of plain Langevin dynamics knows nothing of the others; draws are thinned states after the burn-in.
    torch.testing.assert_close(langevin(gaussian(), start[:2], **options), plain[:2])
    thinned = langevin(gaussian(), start, **options, burn=11, thin=4)
    torch.testing.assert_close(thinned, plain[:, 14::4])
    assert not torch.equal(langevin(gaussian(), start, **options | {"key": random.key(2)}), plain)


def test_first_step_by_hand():
    """Two chains: each one's partner is the other, so the structured drift is a formula without chance."""
    start = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], dtype=torch.float64)
    options: dict[str, Any] = {"step": 0.1, "steps": 1, "key": random.key(3)}
    other = start.flip(0)
    noise = langevin(lambda theta, key: theta.sum() * 0, start, **options)[:, 0] - start
    moved = langevin(gaussian(), start, **options, form="structured", groups=GROUPS)[:, 0] - start - noise
    blocks = PRECISION * (GROUPS[:, None] == GROUPS)
    expected = -0.05 * ((start - MEAN) @ blocks + (other - MEAN) @ (PRECISION - blocks))
    torch.testing.assert_close(moved, expected)
    # One random group moves, by twice as much.
    single = langevin(gaussian(), start, **options, form="one_group", groups=GROUPS)[:, 0] - start - noise
    still = single.abs() < 1e-12
    assert (still[:, 0] == still[:, 1]).all()
    assert (still[:, 0] != still[:, 2]).all()
    torch.testing.assert_close(single, torch.where(still, 0.0, 2 * expected), atol=1e-12, rtol=1e-9)


def test_partners_are_other_chains_and_differ_between_groups():
    """Chain i holds i everywhere; the first group's gradient of θ_0 (θ_1 + 10 θ_2) spells the partners out."""
    start = torch.arange(5, dtype=torch.float64)[:, None].expand(5, 3)
    seen = set()
    for seed in range(30):
        options: dict[str, Any] = {"step": 0.1, "steps": 1, "key": random.key(seed)}
        noise = langevin(lambda theta, key: theta.sum() * 0, start, **options)[:, 0]
        target = langevin(lambda t, key: t[0] * (t[1] + 10 * t[2]), start, **options, form="structured", groups=SINGLE)
        spelt = ((target[:, 0] - noise)[:, 0] / 0.05).round().long().tolist()
        pairs = [((value % 10 - i) % 5, (value // 10 - i) % 5) for i, value in enumerate(spelt)]
        seen.update(pairs)
        assert len(set(pairs)) == 1  # every chain serves once
    assert all(first and second for first, second in seen)
    assert len(seen) > 8  # 16 pairs of shifts


@pytest.mark.parametrize(
    ("form", "groups", "keep", "step"),
    [
        ("joint", SINGLE, 0.5, 0.5),
        ("structured", SINGLE, 0.5, 0.5),
        ("structured", GROUPS, 0.5, 0.5),
        ("one_group", SINGLE, 0.5, 0.1),
        ("dropout", SINGLE, 0.5, 0.3),
        ("dropout", GROUPS, 0.8, 0.3),
    ],
)
def test_gaussian_law_at_a_finite_step_is_the_enumerated_one(form, groups, keep, step):
    rounds, chains = 40, 4000
    start = MEAN.expand(chains, 3)
    options: dict[str, Any] = {
        "step": step,
        "steps": rounds,
        "key": random.key(4),
        "form": form,
        "groups": groups,
        "keep": keep,
    }
    draws = langevin(gaussian(), start, **options, burn=rounds - 1)[:, 0]
    if form == "joint":
        expected = gaussian_stationary_covariance(PRECISION, step=step)
    else:
        expected = exact_covariance(PRECISION, groups, form, keep, step, rounds)
    scale = expected.diagonal().sqrt()
    np.testing.assert_allclose((draws.mean(0) - MEAN) / scale, 0, atol=0.07)
    np.testing.assert_allclose(draws.T.cov() / (scale[:, None] * scale), expected / (scale[:, None] * scale), atol=0.07)


@pytest.mark.parametrize("groups", [SINGLE, GROUPS])
@pytest.mark.parametrize(
    ("form", "keep"), [("structured", 0.0), ("one_group", 0.0), ("dropout", 0.5), ("dropout", 0.2)]
)
def test_closed_form_is_the_limit_of_small_steps(form, keep, groups):
    expected = gaussian_stationary_covariance(PRECISION, groups, keep)
    errors = [
        (exact_covariance(PRECISION, groups, form, keep, step) - expected).abs().max().item() for step in (0.02, 0.01)
    ]
    assert errors[1] < 0.03
    assert errors[0] == pytest.approx(2 * errors[1], rel=0.1)  # of order step


def test_covariances_of_plain_langevin_and_of_blocks():
    for curvature, step in ((1.0, 0.3), (4.0, 0.7)):
        value = gaussian_stationary_covariance(torch.tensor([[curvature]], dtype=torch.float64), step=step).item()
        assert value == pytest.approx(step / (1 - (1 - step * curvature / 2) ** 2), rel=1e-12)
    moved = torch.eye(3, dtype=torch.float64) - 0.25 * PRECISION
    fixed = gaussian_stationary_covariance(PRECISION, step=0.5)
    torch.testing.assert_close(moved @ fixed @ moved.T + 0.5 * torch.eye(3, dtype=torch.float64), fixed)
    structured = gaussian_stationary_covariance(PRECISION, GROUPS, 0.0)
    torch.testing.assert_close(structured[:2, :2], torch.linalg.inv(PRECISION[:2, :2]))
    assert structured[2, 2].item() == pytest.approx(1.0)
    assert (structured[2, :2] == 0).all()
    torch.testing.assert_close(gaussian_stationary_covariance(PRECISION, GROUPS), torch.linalg.inv(PRECISION))


@pytest.mark.parametrize(("keep", "chains"), [(0.0, 2), (0.0, 5), (0.5, 3)])
def test_few_chains_leave_a_trace_of_the_dependence(keep, chains):
    """The law of all chains together is Gaussian; its precision in the limit of small steps is the averaged drift."""
    blocks = PRECISION * (GROUPS[:, None] == GROUPS)
    rest = PRECISION - blocks
    among = torch.full((chains, chains), (1 - keep) / (chains - 1), dtype=torch.float64).fill_diagonal_(keep)
    drift = torch.kron(torch.eye(chains, dtype=torch.float64), blocks) + torch.kron(among, rest)
    value = gaussian_stationary_covariance(PRECISION, GROUPS, keep, chains=chains)
    torch.testing.assert_close(value, torch.linalg.inv(drift)[:3, :3])
    many = gaussian_stationary_covariance(PRECISION, GROUPS, keep, chains=10**9)
    torch.testing.assert_close(many, gaussian_stationary_covariance(PRECISION, GROUPS, keep), rtol=1e-6, atol=1e-6)


def correlated(rho=0.99):
    return torch.linalg.inv(torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64))


def test_strong_correlation_slows_the_joint_chain_only():
    target, groups = gaussian(correlated(), torch.zeros(2, dtype=torch.float64)), torch.arange(2)
    options: dict[str, Any] = {"step": 0.01, "steps": 600, "key": random.key(5), "groups": groups, "burn": 200}
    start = torch.zeros(256, 2, dtype=torch.float64)
    sizes, variances = {}, {}
    forms: tuple[Any, ...] = ("joint", "structured")
    for form in forms:
        draws = langevin(target, start, **options, form=form)
        sizes[form] = effective_sample_size(draws).mean().item()
        variances[form] = draws.flatten(0, 1).var(0).mean().item()
    assert sizes["structured"] > 15 * sizes["joint"]
    expected = gaussian_stationary_covariance(correlated(), groups, 0.0, chains=256)[0, 0].item()
    assert expected == pytest.approx((1 - 0.99**2) * (1 + 1 / 256 / (1 - 0.99**2)), rel=0.02)
    assert expected < variances["structured"] < 1.35 * expected  # partners' noise: of order step
    assert variances["joint"] > 0.7


def brute_force_size(draws):
    """Geyer's initial monotone sequence with sums written out, one parameter at a time."""
    m, n, d = draws.shape
    sizes = []
    for j in range(d):
        x = draws[:, :, j]
        c = [
            np.mean([((x[i] - x[i].mean())[: n - t] * (x[i] - x[i].mean())[t:]).sum() / n for i in range(m)])
            for t in range(n)
        ]
        within = c[0] * n / (n - 1)
        total = c[0] + (x.mean(1).var(ddof=1) if m > 1 else 0)
        rho = [1 - (within - ct) / total for ct in c]
        rho[0] = 1.0
        time, before = -1.0, math.inf
        for k in range(n // 2):
            pair = rho[2 * k] + rho[2 * k + 1]
            if pair <= 0:
                break
            before = min(before, pair)
            time += 2 * before
        sizes.append(m * n / time)
    return sizes


def autoregression(phi, chains, length, seed=0):
    x = torch.zeros(chains, length, dtype=torch.float64)
    noise = random.normal(random.key(seed), (length, chains), torch.float64)
    state = noise[0]
    for t in range(length):
        state = phi * state + math.sqrt(1 - phi**2) * noise[t]
        x[:, t] = state
    return x


def test_effective_size_is_the_written_out_sum_and_that_of_an_autoregression():
    draws = torch.stack([autoregression(phi, 3, 51, seed) for seed, phi in enumerate((0.0, 0.5, 0.9))], 2)
    np.testing.assert_allclose(effective_sample_size(draws), brute_force_size(draws.numpy()), rtol=1e-9)
    np.testing.assert_allclose(effective_sample_size(draws[:1]), brute_force_size(draws[:1].numpy()), rtol=1e-9)
    torch.testing.assert_close(effective_sample_size(3 * draws + 7), effective_sample_size(draws))
    for phi in (0.0, 0.6, 0.9):
        size = effective_sample_size(autoregression(phi, 20, 2000)[..., None]).item()
        assert size == pytest.approx(40_000 * (1 - phi) / (1 + phi), rel=0.12)
    apart = autoregression(0.0, 4, 200)[..., None] + 10 * torch.arange(4)[:, None, None]
    assert effective_sample_size(apart).item() < 8  # chains that never meet are worth about one draw each
    assert effective_sample_size(torch.ones(2, 9, 1)).item() == 1


def test_parameter_groups_follow_the_flat_row():
    model = MLP(3, (4, 2), 2)
    layout = Layout.of(model)
    layers = layout.views(parameter_groups(model, "layer")[None])
    neurons = layout.views(parameter_groups(model, "neuron")[None])
    for i, (name, first) in enumerate((("layers.0", 0), ("layers.1", 4), ("head", 6))):
        assert (layers[f"{name}.weight"] == i).all()
        assert (layers[f"{name}.bias"] == i).all()
        bias = neurons[f"{name}.bias"][0]
        assert bias.tolist() == list(range(first, first + len(bias)))
        assert (neurons[f"{name}.weight"][0] == bias[:, None]).all()
    assert parameter_groups(model, "parameter").tolist() == list(range(layout.size))


@pytest.mark.parametrize("real", [True, False])
def test_mlp_log_density_is_likelihood_and_prior_of_the_model(real):
    model = MLP(2, (5, 4), 1 if real else 3).double()
    x = random.normal(random.key(1), (12, 2), torch.float64)
    y = x.sum(1).sin() if real else torch.arange(12) % 3
    noise = 0.3 if real else None
    density = mlp_log_density(model, x, y, noise=noise, prior=0.7)
    layout = Layout.of(model)
    thetas = random.normal(random.fold_in(random.key(2), torch.arange(3)), (layout.size,), torch.float64)

    def reference(theta):
        views = {name: value[0] for name, value in layout.views(theta[None]).items()}
        outputs = functional_call(model, views, (x,))
        if real:
            likelihood = torch.distributions.Normal(outputs[:, 0], 0.3).log_prob(y).sum()
        else:
            likelihood = -F.cross_entropy(outputs, y, reduction="sum")
        return likelihood + torch.distributions.Normal(0.0, 0.7).log_prob(theta).sum()

    keys = random.fold_in(random.key(3), torch.arange(3))
    values = torch.func.vmap(density)(thetas, keys)
    expected = torch.stack([reference(theta) for theta in thetas])
    torch.testing.assert_close(values - values[0], expected - expected[0])
    # Drawn batches of examples: unbiased, and not always the same.
    drawn = mlp_log_density(model, x, y, noise=noise, prior=0.7, batch=4)
    many = random.fold_in(random.key(4), torch.arange(4000))
    estimates = torch.func.vmap(lambda key: drawn(thetas[0], key))(many)
    assert estimates.std() > 0
    assert abs(estimates.mean() - values[0]) < 4 * estimates.std() / math.sqrt(4000)


def test_posterior_of_a_linear_model_is_the_conjugate_one():
    def build():
        return MLP(2, (), 1)

    x = random.normal(random.key(6), (20, 2)) + torch.tensor([1.0, 0.0])
    y = x @ torch.tensor([0.5, -1.0]) + 0.3
    start = Fleet(build, torch.zeros(1, 3))
    forms: dict[str, Any] = {"plain": ("joint", "layer"), "free": ("structured", "parameter")}
    fleets = sample_posteriors(start, x, y, forms, step=0.02, steps=300, chains=128, noise=1.0, burn=100, thin=20)
    design = torch.cat([x, torch.ones(20, 1)], 1).double()
    precision = design.T @ design + torch.eye(3, dtype=torch.float64)
    mean = torch.linalg.solve(precision, design.T @ y.double())
    laws = {
        "plain": gaussian_stationary_covariance(precision, step=0.02),
        "free": exact_covariance(precision, torch.arange(3), "structured", 1.0, 0.02),
    }
    for name, law in laws.items():
        assert len(fleets[name]) == 128 * 10
        draws = fleets[name].parameters.double()
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.02)
        np.testing.assert_allclose(draws.T.cov(), law, atol=0.16 * law.diagonal().max().item())
    chains = fleets["plain"].parameters.unflatten(0, (128, -1))
    again = sample_posteriors(start, x, y, forms, step=0.02, steps=300, chains=3, noise=1.0, burn=100, thin=20)
    torch.testing.assert_close(again["plain"].parameters.unflatten(0, (3, -1)), chains[:3], rtol=1e-4, atol=1e-5)


def test_posterior_of_a_net_is_less_sure_far_away_than_the_fit_it_starts_from():
    def build():
        return MLP(2, (8,), 2)

    x = random.normal(random.key(7), (40, 2))
    y = (x[:, 0] > 0).long()
    start = Fleet.of([MLP(2, (8,), 2) for _ in range(4)], build)
    fleets = sample_posteriors(start, x, y, step=0.02, steps=200, chains=8, thin=20, batch=20)
    assert set(fleets) == {"SGLD", "structured, layers", "dropout, layers", "dropout, parameters"}
    for fleet in fleets.values():
        probabilities = fleet.probabilities(torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 8.0]])).mean(0)[:, 1]
        assert probabilities[0] > 0.8
        assert probabilities[1] < 0.2
        assert 0.1 < probabilities[2] < 0.9


def test_bad_input():
    start = torch.zeros(3, 3, dtype=torch.float64)
    good: dict[str, Any] = {"step": 0.1, "steps": 10, "key": random.key(0)}
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"step": 0.0}, "step: expected a number greater than 0"),
        ({"step": 5.0, "steps": 2000}, "step: expected one small enough"),
        ({"keep": 0.0}, "keep: expected a probability"),
        ({"steps": 0}, "steps: expected"),
        ({"burn": 10}, "burn"),
        ({"thin": 11}, "thin"),
        ({"groups": torch.tensor([0, 2, 2])}, "groups: expected every number"),
    )
    for extra, message in wrong:
        with pytest.raises(ValueError, match=message):
            langevin(gaussian(), start, **good | extra)
    with pytest.raises(ValueError, match="start: expected at least 2 chains"):
        langevin(gaussian(), start[:1], **good, form="structured", groups=GROUPS)
    with pytest.raises(ValueError, match="log_density: expected one number"):
        langevin(lambda theta, key: theta, start, **good)
    unlawful: tuple[tuple[tuple[Any, ...], str], ...] = (
        ((-PRECISION,), "precision"),
        ((PRECISION, GROUPS, 1.5), "keep"),
        ((PRECISION, GROUPS, 1.0, 3.0), "step: expected less than"),
        ((PRECISION, GROUPS, 0.5, 0.0, 1), "chains"),
        ((PRECISION, GROUPS, 0.5, 0.1, 4), "chains"),
    )
    for arguments, message in unlawful:
        with pytest.raises(ValueError, match=message):
            gaussian_stationary_covariance(*arguments)
    with pytest.raises(ValueError, match="draws: expected at least 4"):
        effective_sample_size(torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="proxies"):
        parameter_groups(MLP(2, (3,), 2, proxies=4), "layer")
    x, labels = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    unfit: tuple[tuple[MLP, torch.Tensor, dict[str, Any], str], ...] = (
        (MLP(2, (3,), 2), labels + 2, {}, "y: expected class indices"),
        (MLP(2, (3,), 2), labels, {"noise": 0.1}, "noise"),
        (MLP(2, (3,), 1), labels.float(), {}, "noise"),
        (MLP(2, (3,), 2), labels.float(), {"noise": 0.1}, "model: expected one output"),
        (MLP(2, (3,), 2), labels, {"prior": 0.0}, "prior"),
        (MLP(2, (3,), 2), labels, {"batch": 6}, "batch"),
    )
    for model, y, options, message in unfit:
        with pytest.raises(ValueError, match=message):
            mlp_log_density(model, x, y, **options)
    nets = Fleet.of([ConvNet(1, (1, 1), 2)], lambda: ConvNet(1, (1, 1), 2))
    with pytest.raises(ValueError, match="fleet of MLPs"):
        sample_posteriors(nets, x, labels, step=0.1, steps=4)
