"""One-step generators against Gaussians, whose score gap is a constant, chains written out, and their own limits."""

from typing import Any

import pytest
import torch

from toolkit.diffusion import LAST, Mixture, ScoreNet, alpha_sigma
from toolkit.distillation.one_step import (
    OneStep,
    backtrack,
    degradation_path,
    distil_one_step,
    em_distillation_loss,
    one_step_samples,
    score_distillation_loss,
)
from toolkit.distillation.sampling import sample_quality
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.members import Fields
from toolkit.random import fold_in, key, normal, uniform

KEY, COUNT = key(5), 12
SCALE = 0.5  # the deviation of both Gaussians
MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
SMALL: dict[str, Any] = {"batch": 16, "device": "cpu"}


def gaussian(mean: torch.Tensor) -> Mixture:
    return Mixture(mean[None], mean.new_full((1,), SCALE), mean.new_ones(1), torch.zeros(1, dtype=torch.int64))


def build() -> OneStep:
    return OneStep(ScoreNet(2, 1, (16, 16)), (16, 16))


def net() -> ScoreNet:
    return ScoreNet(2, 1, (16, 16))


class Shifted:
    """The generator x = shift + z / 2 with its exact score, in a module's place."""

    def __init__(self):
        self.shift = torch.tensor([-0.3, 0.2], dtype=torch.float64, requires_grad=True)
        self.parameters = {"layers.0.weight": torch.eye(2, dtype=torch.float64)}
        self.exact = gaussian(self.shift.detach().clone())

    def __call__(self, x, t=None, jacobian=False):
        if t is not None:
            return self.exact.epsilon(x, t)
        made = self.shift + SCALE * x
        return (made, SCALE * torch.eye(2).double().expand(len(x), 2, 2)) if jacobian else made


class Model:
    """A real module as a loss sees it."""

    def __init__(self, module):
        self.module, self.parameters = module, dict(module.named_parameters())

    def __call__(self, *args, **options):
        return self.module(*args, **options)


def batch(**more) -> Fields:
    return Fields(index=torch.arange(COUNT), key=KEY, **more)


def levels(earliest: float = 0.02):
    t = earliest + (LAST - earliest) * uniform(fold_in(KEY, 1), (COUNT,), torch.float64)
    return t, *(level[:, None] for level in alpha_sigma(t))


def slope(loss, model, **more) -> torch.Tensor:
    return torch.autograd.grad(loss(model, batch(**more), Fields()).sum(), model.shift)[0]


def test_the_jacobian_is_that_of_autograd():
    module = build().double()
    z = normal(key(1), (5, 2), torch.float64)
    x, found = module(z, jacobian=True)
    torch.testing.assert_close(x, module(z))
    for i in range(5):
        torch.testing.assert_close(found[i], torch.func.jacrev(lambda one: module(one[None])[0])(z[i]))


def test_the_score_gradient_is_that_of_the_weighted_kl():
    """KL of the noised Gaussians is α² |a - m|² / 2v; its derivative by a, times σ² / α, is what the generator gets."""
    model = Shifted()
    _, alpha, sigma = levels()
    variance = (alpha * SCALE) ** 2 + sigma**2
    divergence = alpha**2 * (model.shift - MEAN).square().sum() / (2 * variance)
    wanted = torch.autograd.grad((sigma**2 / alpha * divergence).sum(), model.shift)[0]
    torch.testing.assert_close(slope(score_distillation_loss(gaussian(MEAN)), model), wanted)


@pytest.mark.parametrize("latent_step", [0.0, 0.3])
@pytest.mark.parametrize("langevin", [1, 3, 8])
def test_the_em_gradient_of_gaussians_has_a_closed_form(langevin, latent_step):
    """The gap is a constant, so ε drifts by σ gap (1 - (1 - γ²/2)^K), whatever the noise and z do."""
    model, gamma = Shifted(), 0.6
    _, alpha, sigma = levels()
    gap = alpha * (MEAN - model.shift.detach()) / ((alpha * SCALE) ** 2 + sigma**2)
    wanted = -(sigma**2 * gap * (1 - (1 - gamma**2 / 2) ** langevin)).sum(0)
    loss = em_distillation_loss(gaussian(MEAN), langevin=langevin, noise_step=gamma, latent_step=latent_step)
    torch.testing.assert_close(slope(loss, model), wanted)


def test_one_em_step_is_score_distillation():
    """For a real net, a mixture and each parameter of the generator."""
    mixture = Mixture(
        torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).double(),
        *(torch.tensor([0.5, 0.5]).double(),) * 2,
        torch.tensor([0, 1]),
    )
    model = Model(build().double())
    own = [p for name, p in model.parameters.items() if name.startswith("layers")]
    one = em_distillation_loss(mixture, langevin=1, noise_step=0.5, latent_step=0.0)(model, batch(), Fields())
    first = torch.autograd.grad(one.sum(), own)
    second = torch.autograd.grad(score_distillation_loss(mixture)(model, batch(), Fields()).sum(), own)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 0.125 * b, rtol=1e-7, atol=1e-10)


def test_the_langevin_chain_is_the_one_written_out():
    gamma, delta, steps = 0.5, 0.3, 3
    teacher, model = gaussian(MEAN), Model(build().double())
    loss = em_distillation_loss(teacher, langevin=steps, noise_step=gamma, latent_step=delta)
    t, alpha, sigma = levels()
    z = normal(fold_in(KEY, 2), (COUNT, 2), torch.float64)
    noise = normal(fold_in(KEY, 0), (COUNT, 2), torch.float64)
    first, eps, free = model(z), noise, noise
    for i in range(steps):
        n, m = normal(fold_in(KEY, 10 + i), (2, COUNT, 2), torch.float64)

        def log_density(eps, z):
            """Its gradient: the scores at y times dy, and the priors."""
            y = alpha * model(z) + sigma * eps
            gap = (teacher.score(y, t) + model(y, t=t) / sigma).detach()
            return (gap * y).sum() - (eps.square().sum() + z.square().sum()) / 2

        by_eps, by_z = torch.func.grad(log_density, (0, 1))(eps, z)
        eps = eps + gamma**2 / 2 * by_eps + gamma * n
        free = (1 - gamma**2 / 2) * free + gamma * n
        z = z + delta**2 / 2 * by_z + delta * m
    found = loss(model, batch(), Fields())
    fit = (sigma * (eps - free)).square().sum(1) / (2 * alpha[:, 0])
    fake = (model((alpha * first + sigma * noise).detach(), t=t) - noise).square().mean(1)
    torch.testing.assert_close(found, fit + fake)
    own = model.parameters["layers.0.weight"]
    wanted = -torch.autograd.grad((model(z.detach()) * (sigma * (eps - free)).detach()).sum(), own)[0]
    torch.testing.assert_close(torch.autograd.grad(found.sum(), own)[0], wanted)


@pytest.mark.parametrize("make", [score_distillation_loss, em_distillation_loss])
def test_each_player_has_its_own_gradient(make):
    """A teacher that is the fake score moves no generator; the fake score's gradient does not depend on the teacher."""
    model = Model(build().double())
    names = list(model.parameters)
    grads = []
    for teacher in (lambda x, t, condition: model(x, t=t), lambda x, t, condition: 0.5 * x):
        total = make()(model, batch(teacher=teacher), Fields()).sum()
        found = torch.autograd.grad(total, list(model.parameters.values()), allow_unused=True, materialize_grads=True)
        grads.append(dict(zip(names, found, strict=True)))
    for name in names:
        if name.startswith("layers"):
            assert not bool(grads[0][name].any())
            assert bool(grads[1][name].any())
        else:
            torch.testing.assert_close(grads[0][name], grads[1][name])
    assert bool(grads[0]["score.head.weight"].any())


@pytest.mark.parametrize("method", ["score", "em"])
def test_generators_come_to_a_gaussian(method):
    teacher = gaussian(MEAN.float())
    options: dict[str, Any] = {"members": 2, "batch": 32, "optimiser": Adam(1e-2), "device": "cpu", "warm_up": 30}
    settings: dict[str, Any] = {"langevin": 2} if method == "em" else {}
    before = distil_one_step(teacher, build, method=method, steps=0, **options)
    after = distil_one_step(teacher, build, method=method, steps=100, settings=settings, **options)
    start, end = (sample_quality(one_step_samples(fleet, 500), teacher) for fleet in (before, after))
    assert bool((end < start / 2).all())
    assert float((one_step_samples(after, 500).mean(1) - MEAN).norm(dim=1).max()) < 0.25


def test_samples_are_those_of_the_members():
    fleet = Fleet.of([build() for _ in range(2)], build)
    found = one_step_samples(fleet, 6, seed=3)
    assert found.shape == (2, 6, 2)
    assert torch.equal(found[1], one_step_samples(fleet[[1]], 6, seed=3)[0])
    assert not torch.equal(found, one_step_samples(fleet, 6, seed=4))


def fleets() -> tuple[Fleet, Fleet]:
    fit: dict[str, Any] = {"progress": False, "device": "cpu", "members": 2, "steps": 0}
    slots = {"slot": torch.arange(4)}
    teacher = train(net, lambda m, b, h: m(torch.ones(len(b.index), 2), t=0.5).sum(1), slots, **fit)
    student = train(build, lambda m, b, h: m(torch.ones(len(b.index), 2)).sum(1), slots, **fit)
    return teacher, student


def test_the_path_goes_from_the_teacher_to_the_student():
    teacher, student = fleets()
    path = degradation_path(teacher, student, nodes=3, steps=60, optimiser=Adam(1e-2), **SMALL)
    assert len(path) == 4
    assert path[0] is teacher
    x = one_step_samples(student, 400)
    noise, t = normal(key(7), (2, 400, 2)), torch.tensor(0.6)
    alpha, sigma = alpha_sigma(t)

    def miss(node: Fleet) -> torch.Tensor:
        """Denoising loss on the student's samples."""
        found = torch.stack([node[i](alpha * x[i] + sigma * noise[i], t) for i in range(2)])
        return (found - noise).square().mean((1, 2)).detach()

    losses = torch.stack([miss(node) for node in path])
    assert bool((losses[1:] < losses[0] / 2).all())
    exact = (noise - sigma * (alpha * (x - x.mean(1, keepdim=True)) + sigma * noise)).square().mean((1, 2))
    assert bool((losses[-1] < 3 * exact + 0.1).all())  # the samples are nearly a point


def test_backtracking_goes_from_the_last_node_to_the_teacher():
    teacher, student = fleets()
    path = degradation_path(teacher, student, nodes=2, steps=10, optimiser=Adam(1e-2), **SMALL)
    options: dict[str, Any] = {"steps": 3, "optimiser": Adam(1e-2), **SMALL}
    full = backtrack(path, student, **options)
    assert len(full) == 3
    score = full[0].layout.views(full[0].parameters)["score.head.weight"]
    assert torch.equal(score, path[-1].layout.views(path[-1].parameters)["head.weight"])
    assert torch.equal(
        full[0].layout.views(full[0].parameters)["layers.0.weight"],
        student.layout.views(student.parameters)["layers.0.weight"],
    )
    assert torch.equal(full[1].parameters, backtrack(path[1:], student, **options)[1].parameters)  # the middle first
    by_hand = distil_one_step(
        teacher, build, start=full[1], seed=int(key(0, 1)) & (1 << 31) - 1, streams=student.streams, **options
    )
    assert torch.equal(full[2].parameters, by_hand.parameters)  # then the teacher
    ends = backtrack([path[0], path[-1]], student, stages=2, **options)
    assert len(ends) == 3
    assert torch.equal(ends[0].parameters, full[0].parameters)
    assert not torch.equal(ends[1].parameters, full[1].parameters)


def test_errors_name_the_argument():
    teacher, student = fleets()
    with pytest.raises(ValueError, match="langevin"):
        em_distillation_loss(langevin=0)
    with pytest.raises(ValueError, match="noise_step"):
        em_distillation_loss(noise_step=1.5)
    with pytest.raises(ValueError, match="latent_step"):
        em_distillation_loss(latent_step=-0.1)
    with pytest.raises(ValueError, match="earliest"):
        score_distillation_loss(earliest=1.0)
    with pytest.raises(ValueError, match="build"):
        distil_one_step(gaussian(MEAN), net, members=1)
    with pytest.raises(ValueError, match="student"):
        one_step_samples(teacher, 4)
    with pytest.raises(ValueError, match="student"):
        degradation_path(teacher, student[[0]])
    with pytest.raises(ValueError, match="nodes"):
        degradation_path(teacher, student, nodes=5, steps=4)
    with pytest.raises(ValueError, match="path"):
        backtrack([teacher], student)
    with pytest.raises(ValueError, match="stages"):
        backtrack([teacher] * 4, student, stages=2)
    with pytest.raises(ValueError, match="hidden"):
        OneStep(net(), ())
