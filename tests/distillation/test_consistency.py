"""Consistency distillation against the closed-form map of a Gaussian, brute-force targets, and a loss written out."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from toolkit.diffusion import LAST, Mixture, ScoreNet, guided, noised, probability_flow
from toolkit.distillation.consistency import (
    consistency_loss,
    distil_consistency,
    heun_step,
    pseudo_huber,
    retuned,
    target_mask,
)
from toolkit.distillation.sampling import few_steps, gaussian_flow, jump
from toolkit.fleet import Adam, Fleet, cosine
from toolkit.fleet.members import Fields
from toolkit.random import fold_in, key, normal

MEAN = torch.tensor([0.7, -0.4])
GAUSSIAN = Mixture(MEAN[None], torch.tensor([0.5]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
MIX = Mixture(
    means=torch.tensor([[1.2, 0.3], [-0.9, 0.8], [-0.2, -1.3]], dtype=torch.float64),
    deviations=torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64),
    weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    classes=torch.tensor([0, 1, 2]),
)
X = normal(key(3), (40, 2), torch.float64)


def net() -> ScoreNet:
    return ScoreNet(2, 3, (32, 32))


def data(mixture: Mixture, count: int = 1000) -> dict:
    x, y = mixture.sample(count)
    return {"x": x, "y": y}


class Exact:
    """The exact consistency map of the Gaussian as a field: its jump to time 0 is the end of the path."""

    def __call__(self, x, t, condition=None):
        angle = torch.as_tensor(t, dtype=x.dtype)[..., None] * (math.pi / 2)
        end = gaussian_flow(x, t, 0.0, MEAN.to(x), 0.5)
        return torch.where(angle > 0, (x - angle.cos() * end) / angle.sin().clamp_min(1e-12), 0.0)


def values(loss, model, mixture, **hyper):
    batch = Fields(data(mixture, 64), key=key(5), index=torch.arange(64))
    return loss(model, batch, Fields(hyper))


def test_pseudo_huber_is_a_square_near_and_a_distance_far():
    zero, step = torch.zeros(2).double(), torch.tensor([3.0, 4.0]).double()
    assert float(pseudo_huber(step, zero, 1e-3)) == pytest.approx(5 - 1e-3, abs=1e-6)
    assert float(pseudo_huber(1e-3 * step, zero, 1.0)) == pytest.approx(25e-6 / 2, rel=1e-4)
    assert float(pseudo_huber(step, step, 1e-3)) == 0


def test_heun_step_is_one_step_of_the_sampler_and_takes_a_time_for_each_point():
    found = heun_step(MIX.epsilon, X, 0.8, 0.7, 1)
    torch.testing.assert_close(found, probability_flow(MIX.epsilon, X, 1, steps=1, since=0.8, until=0.7))
    times = torch.linspace(0.3, 0.9, len(X), dtype=torch.float64)
    each = heun_step(MIX.epsilon, X, times, times - 0.1)
    torch.testing.assert_close(each[9], heun_step(MIX.epsilon, X[9], float(times[9]), float(times[9]) - 0.1))
    gaussian = Mixture(MEAN[None].double(), *(getattr(GAUSSIAN, n) for n in ("deviations", "weights", "classes")))
    errors = [
        (heun_step(gaussian.epsilon, X, 0.8, 0.8 - h) - gaussian_flow(X, 0.8, 0.8 - h, MEAN.double(), 0.5)).norm()
        for h in (0.04, 0.02, 0.01)
    ]
    assert [float(torch.log2(a / b)) for a, b in pairwise(errors)] == pytest.approx([3, 3], abs=0.2)


def test_targets_are_those_of_a_search():
    mask = target_mask(50, (4, 5, 6, 7, 8), 0.26)
    schedule = {round(j * 50 / k) for k in range(4, 9) for j in range(k)}
    for n in range(1, 51):
        wanted = {s for s in schedule if s < n and n - s <= 13}
        assert set(mask[n - 1].nonzero()[:, 0].tolist()) == wanted
        assert wanted
    plain = target_mask(50)
    assert bool(plain[:, 0].all())
    assert int(plain.sum()) == 50
    assert target_mask(10, (2,), 0.1).int().argmax(1).tolist() == [0] * 5 + [5] * 5  # the next one where none is near


def test_the_student_is_the_identity_at_the_end_of_a_path():
    """Boundary condition, with an untrained net: f(x, 0) = x, and f(x, t) is the map with c_skip = α, c_out = -σ."""
    model = net().double()
    torch.testing.assert_close(jump(X, model(X, 0.0), 0.0, 0.0), X)
    angle = torch.tensor(0.4 * math.pi / 2, dtype=torch.float64)
    head = (model(X, 0.4) - angle.sin() * X) / angle.cos()
    torch.testing.assert_close(jump(X, model(X, 0.4), 0.4, 0.0), angle.cos() * X - angle.sin() * head)


class AsModel:
    """A field in a loss's place of a model; ``scale`` is what a gradient is taken by."""

    def __init__(self, field):
        self.field, self.scale = field, torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x, t, condition=None):
        return self.scale * self.field(x, t, condition)


def test_the_exact_map_has_no_loss_up_to_the_solvers_error():
    model = AsModel(Exact())
    double = Mixture(MEAN[None].double(), *(getattr(GAUSSIAN, n) for n in ("deviations", "weights", "classes")))
    losses = [
        float(values(consistency_loss(double, intervals=n, c=1e-9), model, double).detach().mean())
        for n in (50, 100, 200)
    ]
    assert losses[0] < 5e-4
    assert [math.log2(a / b) for a, b in pairwise(losses)] == pytest.approx([3, 3], abs=0.6)
    off = AsModel(lambda x, t, c: Exact()(x, t) + 0.1)
    assert float(values(consistency_loss(double, c=1e-9), off, double).detach().mean()) > 10 * losses[0]


@pytest.mark.parametrize("targets", [(), (4, 5, 6, 7, 8)])
def test_only_the_later_point_gives_a_gradient(targets):
    """The derivative by the model's scale is that of the first jump alone; at one interval the target is a constant."""
    model = AsModel(MIX.epsilon)
    loss = consistency_loss(MIX, targets=targets, c=0.1)
    found = torch.autograd.grad(values(loss, model, MIX).sum(), model.scale)[0]

    def with_target(scale):
        moving, fixed = AsModel(MIX.epsilon), AsModel(MIX.epsilon)
        moving.scale = scale
        batch = Fields(data(MIX, 64), key=key(5), index=torch.arange(64), target=fixed)
        return loss(moving, batch, Fields()).sum()

    one = torch.ones((), dtype=torch.float64)
    numeric = (with_target(one + 1e-6) - with_target(one - 1e-6)) / 2e-6
    torch.testing.assert_close(found, numeric.detach(), rtol=1e-5, atol=1e-7)


def test_the_loss_is_what_a_loop_gives():
    """One interval: x_1 is at LAST, the teacher's step ends at 0, and the target is that point for any student."""
    model = net().double()
    found = values(consistency_loss(MIX, intervals=1, c=0.5), model, MIX, drop=0.0, guidance=2.0)
    batch, field = data(MIX, 64), guided(MIX.epsilon, 2.0)
    noise = normal(fold_in(key(5), 0), (64, 2), torch.float64)
    for i in range(0, 64, 16):
        x, y = batch["x"][i], int(batch["y"][i])
        start = noised(x, noise[i], LAST)
        wanted = probability_flow(field, start[None], y, steps=1)[0]
        gap = jump(start, model(start[None], LAST, torch.tensor([y]))[0], LAST, 0.0) - wanted
        torch.testing.assert_close(found[i], ((gap**2).sum() + 0.25).sqrt() - 0.5)


@pytest.mark.parametrize("options", [{}, {"ema": 0.8, "every": 10}])
def test_students_of_a_gaussian_learn_the_closed_form(options: dict[str, Any]):
    fit: dict[str, Any] = {"members": 2, "batch": 48, "optimiser": Adam(1e-2), "schedule": cosine(), "device": "cpu"}
    fleet = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, steps=160, intervals=8, **fit, **options)
    start = normal(key(8), (300, 2))
    wanted = gaussian_flow(start, LAST, 0.0, MEAN, 0.5)
    off = (few_steps(fleet, start) - wanted).norm(dim=-1).mean(1)
    assert float(off.max()) < 0.25
    assert float(off.max()) < float((start * 0.5 - wanted).norm(dim=-1).mean()) / 3  # not the spread alone
    again = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, steps=2, intervals=8, **fit | {"members": 3}, **options)
    fewer = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, steps=2, intervals=8, **fit, **options)
    torch.testing.assert_close(again.parameters[:2], fewer.parameters, rtol=1e-4, atol=1e-6)


def test_the_average_decides_the_target():
    """With μ = 1 the target stays the untrained student, with μ = 0 and every step it is the student itself."""
    fit: dict[str, Any] = {"members": 1, "batch": 16, "device": "cpu", "intervals": 8, "steps": 4}
    own = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, **fit)
    moving = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, ema=0.0, every=1, **fit)
    still = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, ema=1.0, every=1, **fit)
    late = distil_consistency(GAUSSIAN, data(GAUSSIAN), net, ema=0.0, every=4, **fit)
    torch.testing.assert_close(own.parameters, moving.parameters)
    torch.testing.assert_close(still.parameters, late.parameters)
    assert not torch.allclose(own.parameters, still.parameters, atol=1e-5)


def test_a_fleet_teaches_as_its_members_do():
    teachers = Fleet.of([net(), net()], net)
    fit: dict[str, Any] = {"batch": 16, "device": "cpu", "intervals": 8, "steps": 3, "targets": (2, 3), "window": 0.5}
    both = distil_consistency(teachers, data(GAUSSIAN), net, start=teachers, **fit)
    second = distil_consistency(
        teachers[[1]], data(GAUSSIAN), net, start=teachers[[1]], streams=torch.tensor([1]), **fit
    )
    torch.testing.assert_close(both.parameters[1], second.parameters[0])
    assert not torch.equal(both.parameters, teachers.parameters)


def test_guidance_can_be_retuned():
    """A student that has learned the guided field of weight 3 answers as the field of any other weight."""
    strong = guided(MIX.epsilon, 3.0)

    def student(x, t, condition=None):
        return MIX.epsilon(x, t) if condition == -1 or condition is None else strong(x, t, condition)

    for wanted in (0.0, 1.0, 2.0):
        found = retuned(student, 3.0, wanted)(X, 0.5, 1)
        torch.testing.assert_close(found, guided(MIX.epsilon, wanted)(X, 0.5, 1))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="targets"):
        target_mask(8, (9,))
    with pytest.raises(ValueError, match="intervals"):
        consistency_loss(MIX, intervals=0)
    with pytest.raises(ValueError, match="eta"):
        consistency_loss(MIX, eta=2.0)
    with pytest.raises(ValueError, match="c:"):
        consistency_loss(MIX, c=0.0)
    with pytest.raises(ValueError, match="ema"):
        distil_consistency(GAUSSIAN, data(GAUSSIAN), net, ema=1.5, members=1)
    with pytest.raises(ValueError, match="build"):
        distil_consistency(GAUSSIAN, data(GAUSSIAN), lambda: torch.nn.Linear(2, 2), members=1)
    with pytest.raises(ValueError, match="resume"):
        distil_consistency(GAUSSIAN, data(GAUSSIAN), net, resume=None)
    with pytest.raises(ValueError, match="trained"):
        retuned(MIX.epsilon, 0.0, 1.0)
