"""Approximate unlearning without training against loops over examples, explicit matrices, and exact convex cases."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn import functional as F
from unlearning_cases import CLASSES, DATA, DIM, FORGET, N, X, Y, line, make, net

from toolkit.fleet import Fleet
from toolkit.models import MLP
from toolkit.unlearning import one_shot
from toolkit.unlearning.parts import mean_weights, squared_slopes


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return make()


def slopes_of(model, rows) -> torch.Tensor:
    found = []
    for i in rows.tolist():
        model.zero_grad()
        F.cross_entropy(model(X[i : i + 1]), Y[i : i + 1]).backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    return torch.stack(found)


def test_ssd_by_a_loop_over_examples(fleet):
    alpha, strength = torch.tensor([1.1, 1.4], dtype=torch.float64), torch.tensor([0.9, 1.2], dtype=torch.float64)
    found = one_shot.ssd(fleet, DATA, FORGET, alpha=alpha, dampening=strength)
    for i in range(2):
        whole = slopes_of(fleet[i], torch.arange(N)).square().mean(0)
        part = slopes_of(fleet[i], FORGET[i].nonzero()[:, 0]).square().mean(0)
        chosen = part > alpha[i] * whole
        assert 3 < chosen.sum() < len(chosen) - 3
        factor = (strength[i] * whole / part).clamp_max(1)
        expected = torch.where(chosen, fleet.parameters[i] * factor, fleet.parameters[i])
        torch.testing.assert_close(found.parameters[i], expected, rtol=1e-10, atol=1e-13)
        assert torch.equal(found.parameters[i, ~chosen], fleet.parameters[i, ~chosen])
    for limits in ((1.0, float("inf")), (float("inf"), 1.0)):
        identity = one_shot.ssd(fleet, DATA, FORGET, alpha=limits[0], dampening=limits[1])
        assert torch.equal(identity.parameters, fleet.parameters)


class Other(MLP):
    """The same net under another name: its slopes are taken example by example."""


@pytest.mark.parametrize("hidden", [(), (6,), (5, 6)])
def test_squared_slopes_of_linear_layers_are_those_of_any_net(hidden):
    plain = make(lambda: MLP(DIM, hidden, CLASSES, proxies=2).double(), steps=5)
    other = Fleet(lambda: Other(DIM, hidden, CLASSES, proxies=2).double(), plain.parameters)
    weights = [mean_weights(FORGET), mean_weights(~FORGET)]
    for one, two in zip(squared_slopes(plain, DATA, weights), squared_slopes(other, DATA, weights), strict=True):
        assert one.mean() > 1e-4
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-15)


def test_fisher_noise_has_the_size_of_the_formula(fleet):
    alpha = torch.tensor([1e-4, 1e-6], dtype=torch.float64)
    found = one_shot.fisher_forgetting(fleet, DATA, FORGET, alpha=alpha, largest=0.05, head=10.0, seed=7)
    plain = one_shot.fisher_forgetting(fleet, DATA, FORGET, alpha=alpha, largest=0.05, head=1.0, seed=7)
    many = torch.stack([
        one_shot.fisher_forgetting(fleet, DATA, FORGET, alpha=alpha, largest=0.05, head=1.0, seed=s).parameters
        for s in range(100)
    ])  # fmt: skip
    moved, moved_plain = found.parameters - fleet.parameters, plain.parameters - fleet.parameters
    capped = []
    for i in range(2):
        fisher = slopes_of(fleet[i], (~FORGET[i]).nonzero()[:, 0]).square().mean(0)
        size = (alpha[i] / fisher).sqrt().clamp_max(0.05)
        capped.append((size == 0.05).double().mean().item())
        seen = (many[:, i] - fleet.parameters[i]).square().mean(0).sqrt() / size
        assert (seen - 1).abs().max() < 5 / (2 * 100) ** 0.5
        assert (seen.square().mean() - 1).abs() < 5 * (2 / (100 * len(size))) ** 0.5
    assert capped[0] > 0.1
    assert capped[1] < 0.9
    for name, ten in fleet.layout.views(moved).items():
        one = fleet.layout.views(moved_plain)[name]
        torch.testing.assert_close(ten, (10 if name.startswith("head.") else 1) * one, rtol=1e-8, atol=1e-13)
    assert torch.equal(one_shot.fisher_forgetting(fleet, DATA, FORGET, alpha=0.0).parameters, fleet.parameters)


def objective_of(build, mask, decay=0.0):
    module, layout = build(), make(build, steps=0).layout

    def value(flat):
        views = {name: view[0] for name, view in layout.views(flat[None]).items()}
        return F.cross_entropy(functional_call(module, views, (X[mask],)), Y[mask]) + decay / 2 * flat.square().sum()

    return value


@pytest.mark.parametrize("build", [line, net])
def test_influence_and_newton_by_explicit_matrices(build):
    """The Gauss-Newton matrix from all slopes of all logits; for a linear model it is the Hessian."""
    fleet = make(build)
    damping, decay = torch.tensor([0.02, 0.1], dtype=torch.float64), 0.03
    given: dict[str, Any] = {"damping": damping, "weight_decay": decay, "iterations": 150}
    scale = torch.tensor([1.0, -0.5], dtype=torch.float64)
    shifted = one_shot.influence(fleet, DATA, FORGET, scale=scale, **given)
    stepped = one_shot.newton_step(fleet, DATA, FORGET, **given)
    module, layout = build(), fleet.layout
    for i in range(2):
        kept, theta = ~FORGET[i], fleet.parameters[i]

        def outputs(flat, kept=kept):
            return functional_call(module, {n: v[0] for n, v in layout.views(flat[None]).items()}, (X[kept],))

        jacobian, p = jacrev(outputs)(theta), outputs(theta).softmax(-1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        matrix = torch.einsum("nka,nkl,nlb->ab", jacobian, inner, jacobian) / kept.sum()
        if build is line:
            torch.testing.assert_close(matrix, hessian(objective_of(build, kept))(theta))
        matrix = matrix + (damping[i] + decay) * torch.eye(len(theta), dtype=torch.float64)
        everything = grad(objective_of(build, torch.ones(N, dtype=torch.bool)))(theta)
        slope = grad(objective_of(build, kept))(theta)
        expected = theta + scale[i] * torch.linalg.solve(matrix, everything - slope)
        torch.testing.assert_close(shifted.parameters[i], expected, rtol=1e-9, atol=1e-10)
        expected = theta - torch.linalg.solve(matrix, slope + decay * theta)
        torch.testing.assert_close(stepped.parameters[i], expected, rtol=1e-9, atol=1e-10)


def test_newton_steps_end_at_the_retrained_model_at_a_quadratic_rate():
    """The residual slope on what is kept certifies it; the convex objective has one minimum, wherever one starts."""
    fleet, decay = make(line), 0.05
    given: dict[str, Any] = {"weight_decay": decay, "iterations": 60}
    norms = []
    for steps in range(1, 7):
        found = one_shot.newton_step(fleet, DATA, FORGET, steps=steps, **given)
        slopes = [grad(objective_of(line, ~FORGET[i], decay))(found.parameters[i]).norm() for i in range(2)]
        norms.append(float(max(slopes)))
    assert norms[-1] < 1e-13
    assert any(after < 20 * before**2 and before < 0.01 for before, after in pairwise(norms))
    begun = Fleet(line, torch.zeros_like(fleet.parameters))
    other = one_shot.newton_step(begun, DATA, FORGET, steps=12, **given)
    torch.testing.assert_close(other.parameters, found.parameters, rtol=1e-10, atol=1e-12)


def test_influence_from_the_optimum_is_the_newton_step():
    """There ∇L_D = -w θ; removing the trained model's own residual slope makes no difference."""
    decay, nothing = 0.05, torch.zeros(N, dtype=torch.bool)
    nothing[0] = True
    spread: dict[str, Any] = {"weight_decay": decay, "damping": 0.0, "iterations": 60}
    begun = Fleet(line, torch.zeros(2, 15, dtype=torch.float64))
    flat = begun.parameters
    value = objective_of(line, torch.ones(N, dtype=torch.bool), decay)
    for _ in range(12):
        flat = flat - torch.linalg.solve(hessian(value)(flat[0]), grad(value)(flat[0]))
    optimum = Fleet(line, flat)
    one, two = (method(optimum, DATA, FORGET, **spread) for method in (one_shot.influence, one_shot.newton_step))
    assert (one.parameters - flat).norm() > 0.1
    torch.testing.assert_close(one.parameters, two.parameters, rtol=1e-9, atol=1e-10)
