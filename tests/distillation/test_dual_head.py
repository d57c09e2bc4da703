"""Binary KL against Bernoulli divergences and its limits; alignment against projected gradients by plain autograd."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logit_cases import BATCH, check_against_a_loop, check_extremes, logits
from torch.distributions import Bernoulli, kl_divergence

from toolkit.distillation.dual_head import (
    DualHead,
    align_gradient,
    binary_kl,
    binary_kl_norm,
    dual_head_distil,
    loss_conflict,
)
from toolkit.fleet import SGD, Fleet, grid, train
from toolkit.models import MLP

Z, T = logits(1), logits(2, scale=3)
N, CLASSES = 30, 3
X = logits(5, N, 4, scale=1)
Y = (X @ logits(6, 4, CLASSES)).argmax(1)
DATA = {"x": X, "y": Y}
TEACHER = -8.0 * F.one_hot(Y, CLASSES) + logits(7, N, CLASSES)  # a bad one: it works against the labels
FULL: dict[str, Any] = {
    "steps": 1,
    "batch": N,
    "optimiser": SGD(lr=0.1),
    "snapshots": [0],
    "progress": False,
    "device": "cpu",
}


def build():
    return DualHead(4, (6,), CLASSES).double()


def test_binary_kl_is_a_sum_of_bernoulli_divergences():
    for temperature in (1.0, 2.0):
        half = torch.full_like(Z, 0.5)
        norm = kl_divergence(Bernoulli(half), Bernoulli(logits=(Z - T) / temperature)).sum(-1)
        torch.testing.assert_close(binary_kl_norm(Z, T, temperature), temperature**2 * norm, rtol=1e-10, atol=1e-12)
        plain = kl_divergence(Bernoulli(logits=T / temperature), Bernoulli(logits=Z / temperature)).sum(-1)
        torch.testing.assert_close(binary_kl(Z, T, temperature), temperature**2 * plain, rtol=1e-10, atol=1e-12)


def test_it_is_0_only_at_the_teacher_and_fixes_the_level():
    for loss in (binary_kl, binary_kl_norm):
        zero = loss(T, T)
        torch.testing.assert_close(zero, torch.zeros_like(zero))
        assert (loss(Z, T) > 0.1).all()
        assert (loss(T + 1, T) > 0.1).all()  # where KL of softmaxes is 0


def test_small_differences_cost_an_eighth_of_their_square_and_large_ones_their_size():
    """In float32 too, where log 2 minus nearly log 2 would be left of it."""
    for dtype, step in ((torch.float64, 1e-4), (torch.float32, 1e-3)):
        d = step * logits(9).to(dtype)
        for temperature in (1.0, 2.0, 5.0):
            expected = d.square().sum(-1) / 8
            found = binary_kl_norm(d, torch.zeros_like(d), temperature)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for temperature in (1.0, 2.0):
        d = 500.0 + torch.rand(BATCH, 1, dtype=torch.float64)
        expected = (temperature * d / 2 - temperature**2 * math.log(2))[:, 0]
        torch.testing.assert_close(binary_kl_norm(-d, 0 * d, temperature), expected, rtol=1e-12, atol=0)
    around = torch.tensor([[2 - 1e-9], [2 + 1e-9]], dtype=torch.float64)  # where one formula takes over at T = 1
    values = binary_kl_norm(around, 0 * around, 1.0)
    torch.testing.assert_close(values, torch.full_like(values, math.log(math.cosh(1))), rtol=1e-8, atol=0)


def test_the_gradient_is_a_hyperbolic_tangent():
    slope = torch.func.grad(lambda z: binary_kl_norm(z, T, 3.0).sum())(Z)
    torch.testing.assert_close(slope, 1.5 * torch.tanh((Z - T) / 6), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
def test_fleets_and_extremes(loss):
    check_against_a_loop(lambda z, t, y, h: loss(z, t, h), [1.0, 2.5, 6.0])
    check_extremes(lambda z, t, y: loss(z, t))


def test_alignment_takes_out_only_what_works_against_the_leading_gradient():
    leading = torch.tensor([2.0, 0.0, 0.0])
    against = align_gradient(torch.tensor([-3.0, 1.0, 5.0]), leading)
    assert against.tolist() == [0.0, 1.0, 5.0]
    agreeing = torch.tensor([3.0, 1.0, 5.0])
    assert torch.equal(align_gradient(agreeing, leading), agreeing)
    assert torch.equal(align_gradient(agreeing, 0 * leading), agreeing)
    g, direction = logits(1, 20), logits(2, 20)
    g = g - ((g @ direction) / direction.square().sum() + 0.3) * direction
    assert abs(align_gradient(g, direction) @ direction) < 1e-12
    together = torch.vmap(align_gradient)(torch.stack([g, -g]), torch.stack([direction, direction]))
    torch.testing.assert_close(together, torch.stack([align_gradient(g, direction), -g]))


def gradients(module, shared):
    first, second = module(X, both=True)
    hard = F.cross_entropy(first, Y)
    soft = kl_divergence(Bernoulli(logits=0 * first), Bernoulli(logits=((first if shared else second) - TEACHER) / 2))
    every = list(module.parameters())
    found = []
    for loss in (hard, 4 * soft.sum(-1).mean()):
        slopes = torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True)
        found.append(torch.cat([(0 * p if g is None else g).reshape(-1) for g, p in zip(slopes, every, strict=True)]))
    return [value.detach() for value in found]


@pytest.mark.parametrize("auxiliary", [None, 7])
def test_a_step_of_each_variant_is_that_of_the_projected_gradients(auxiliary):
    def deep():
        return DualHead(4, (6, 5), CLASSES, auxiliary).double()

    settings = grid(2, align=[0.0, 1.0], shared=[0.0, 1.0])
    fleet = dual_head_distil(deep, DATA, TEACHER, **settings, **FULL)
    conflicts = set()
    for i in range(8):
        align, shared = (settings["hyper"][name][i].item() for name in ("align", "shared"))
        hard, soft = gradients(fleet.at(0)[i], shared)
        inner = hard @ soft
        if align and inner < 0:
            soft = soft - inner / hard.square().sum() * hard
            assert abs(soft @ hard) < 1e-9
            conflicts.add(shared)
        moved = fleet.at(0).parameters[i] - 0.1 * (hard + soft)
        torch.testing.assert_close(fleet.parameters[i], moved, rtol=1e-7, atol=1e-9)
    assert conflicts == {0.0, 1.0}


def test_a_teacher_that_agrees_is_left_alone():
    good = 4.0 * F.one_hot(Y, CLASSES).double()
    settings = grid(2, align=[0.0, 1.0])
    fleet = dual_head_distil(build, DATA, good, **settings, **FULL)
    for i in range(2):
        first, second = fleet.at(0)[i](X, both=True)
        parameters = list(fleet.at(0)[i].parameters())
        assert len(parameters) == 6
        assert first.shape == second.shape == (N, CLASSES)
    agree = torch.tensor([gradients_inner(fleet.at(0)[i], good) > 0 for i in range(2)])
    assert agree.any()
    same = (fleet.parameters[:2] - fleet.parameters[2:]).abs().amax(-1) < 1e-12
    assert torch.equal(same, agree)


def gradients_inner(module, teacher):
    first, second = module(X, both=True)
    body = [p for name, p in module.named_parameters() if name.startswith("body.layers")]
    losses = F.cross_entropy(first, Y), binary_kl_norm(second, teacher).mean()
    hard, soft = (torch.autograd.grad(loss, body, retain_graph=True) for loss in losses)
    return sum((a * b).sum().item() for a, b in zip(hard, soft, strict=True))


def test_without_weight_the_first_head_is_trained_on_labels_alone():
    zero = {"weight": torch.zeros(2)}
    options = FULL | {"steps": 5, "batch": 8}
    fleet = dual_head_distil(build, DATA, TEACHER, hyper=zero, **options)

    def cross_entropy(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    plain = train(build, cross_entropy, DATA, members=2, **options)
    torch.testing.assert_close(fleet.parameters, plain.parameters, rtol=1e-9, atol=1e-12)
    half = dual_head_distil(build, DATA, TEACHER, hyper=zero, until=2, **options)
    assert torch.equal(dual_head_distil(build, DATA, TEACHER, resume=half, **options).parameters, fleet.parameters)


def test_heads_share_a_body_and_may_be_nonlinear():
    net = DualHead(4, (6, 5), CLASSES, auxiliary=7).double()
    first, second = net(X, both=True)
    plain, features = net(X, return_features=True)
    assert torch.equal(first, plain)
    torch.testing.assert_close(net.head(features), first)
    torch.testing.assert_close(net.auxiliary(features), second)
    assert second.shape == (N, CLASSES)
    assert len(list(net.auxiliary.parameters())) == 4
    assert torch.equal(net(X), first)


def test_conflict_is_the_cosine_of_gradients():
    fleet = dual_head_distil(build, DATA, TEACHER, members=2, **FULL | {"steps": 0})
    found = loss_conflict(fleet, DATA, TEACHER)
    for i in range(2):
        module = fleet[i]
        z = module(X)
        losses = F.cross_entropy(z, Y), binary_kl_norm(z, TEACHER).mean()
        for prefix, cosine in (("body.layers", found.body[i]), ("body.head", found.head[i])):
            part = [p for name, p in module.named_parameters() if name.startswith(prefix)]
            slopes = [torch.autograd.grad(loss, part, retain_graph=True) for loss in losses]
            hard, soft = (torch.cat([g.reshape(-1) for g in slope]) for slope in slopes)
            torch.testing.assert_close(cosine, F.cosine_similarity(hard, soft, 0), rtol=1e-9, atol=1e-12)
    assert (found.head.abs() > 0.01).all()


def test_bad_input():
    broken = TEACHER.clone()
    broken[0, 0] = float("inf")
    one = torch.ones(1)
    fleet = Fleet.of([build()], build)

    def plain():
        return MLP(4, (6,), CLASSES).double()

    for call, name in (
        (lambda: binary_kl(Z, T, 0.0), "temperature"),
        (lambda: binary_kl_norm(Z, T, -2.0), "temperature"),
        (lambda: DualHead(4, (), CLASSES), "hidden"),
        (lambda: DualHead(4, (3,), CLASSES, auxiliary=0), "auxiliary"),
        (lambda: dual_head_distil(plain, DATA, TEACHER, members=1, **FULL), "build"),
        (lambda: dual_head_distil(build, DATA, TEACHER[1:], members=1, **FULL), "teacher"),
        (lambda: dual_head_distil(build, DATA, broken, members=1, **FULL), "teacher"),
        (lambda: dual_head_distil(build, {"x": X}, TEACHER, members=1, **FULL), "data"),
        (lambda: dual_head_distil(build, DATA, TEACHER, hyper={"alpha": one}, **FULL), "hyper"),
        (lambda: dual_head_distil(build, DATA, TEACHER, hyper={"align": 2 * one}, **FULL), "align"),
        (lambda: dual_head_distil(build, DATA, TEACHER, hyper={"temperature": 0 * one}, **FULL), "temperature"),
        (lambda: dual_head_distil(build, DATA, TEACHER, members=1, weights=torch.ones(N), **FULL), "weights"),
        (lambda: loss_conflict(Fleet.of([plain()], plain), DATA, TEACHER), "fleet"),
        (lambda: loss_conflict(fleet, DATA, TEACHER, 0.0), "temperature"),
        (lambda: loss_conflict(fleet, DATA, TEACHER[1:]), "teacher"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
