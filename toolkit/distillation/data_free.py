"""Distillation without data: a generator looks for inputs on which teacher and student differ, the student closes up.

The generator moves on and the student forgets what it has seen: a memory of earlier samples, and a gradient that lets
new samples in only as far as old ones stay known, hold it. All members (seeds) run at once over functional nets.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.distillation.synthetic import outputs
from toolkit.fleet import Adam, Fleet
from toolkit.fleet.arguments import initial_parameters
from toolkit.fleet.devices import one_thread
from toolkit.fleet.members import Build, Layout, fresh
from toolkit.models import MLP

__all__ = ["DataFree", "data_free_distil", "discrepancy", "generator_loss", "retaining_gradient"]

Objective = Callable[[Tensor], Tensor]
_LATENT, _MEMORY, _GENERATORS = range(330, 333)  # what a key's numbers are for


class DataFree(NamedTuple):
    """``students`` and ``generators`` (fleets; ``sigmoid(generator(z))`` is an input), and what was measured.

    ``samples`` (members, batch, ...): the last generated inputs. ``discrepancy`` (members, iterations): between teacher
    and student on new samples, before the student's steps. ``alignment`` (members, iterations): cosine of the gradients
    on new and on remembered samples (NaN where there is no memory).
    """

    students: Fleet
    generators: Fleet
    samples: Tensor
    discrepancy: Tensor
    alignment: Tensor


@typed
def discrepancy(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Mean over classes of \\|student - teacher\\|, both centred logits: 0 for equal predictions.

    Source: Fang et al. 2019, "Data-Free Adversarial Distillation" (L1 between logits; that a constant shift of the
    logits does not count is our choice).
    """
    gap = torch.sub(*(values - values.mean(-1, keepdim=True) for values in (student, teacher)))
    return (gap * gap.detach().sign()).mean(-1)  # abs(), whose second derivative loads seconds of torch's compiler


@typed
def generator_loss(
    student: Float[Tensor, "*members batch classes"],
    teacher: Float[Tensor, "*members batch classes"],
    confidence: float = 0.0,
    balance: float = 1.0,
) -> Float[Tensor, "*members"]:
    """-mean discrepancy + ``confidence`` · mean CE(t, argmax t) - ``balance`` · H(mean of softmax t), in nats.

    What the generator minimises: samples on which the two differ, of which the teacher is sure, and of all classes.
    Source: Patel, Mopuri & Qiu 2023, "Learning to Retain while Acquiring" (a reading; there batch-norm statistics are a
    prior too, which the nets here do not have). Raises ``ValueError`` for negative weights.
    """
    for name, value in {"confidence": confidence, "balance": balance}.items():
        require_range(name, value, 0, math.inf)
    logs = teacher.log_softmax(-1)
    mean = logs.exp().mean(-2)
    entropy = -torch.xlogy(mean, mean).sum(-1)
    sure = -logs.amax(-1).mean(-1)
    return -discrepancy(student, teacher).mean(-1) + confidence * sure - balance * entropy


@typed
def retaining_gradient(
    acquire: Objective,
    retain: Objective,
    parameters: Float[Tensor, "*members size"],
    rate: float,
    order: Literal[1, 2] = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """∇[L_a(θ) + L_r(θ - ``rate`` · ∇L_a(θ))], and with it ∇L_a(θ) and L_a(θ) ``(*members,)``.

    Keeping what is known after a virtual step towards the new: to first order in the rate
    L_r(θ - a∇L_a) = L_r(θ) - a ⟨∇L_a, ∇L_r⟩, so the second term aligns the two gradients. ``order=1`` takes ∇L_r at
    the virtual weights as it is; ``order=2`` multiplies it by I - a∇²L_a, the derivative of the step.

    Args:
        acquire, retain: differentiable functions of ``parameters``, one value per member that depends on its row only.
        rate: a ≥ 0 of the virtual step; 0 is plain replay.

    Source: Patel, Mopuri & Qiu 2023, "Learning to Retain while Acquiring: Combating Distribution-Shift in Adversarial
    Data-Free Knowledge Distillation". Raises ``ValueError`` for a negative rate.
    """
    require_range("rate", rate, 0, math.inf)
    theta = parameters.detach().requires_grad_()
    value = acquire(theta)
    (new,) = torch.autograd.grad(value.sum(), theta, create_graph=order == 2)
    virtual = theta - rate * (new if order == 2 else new.detach())
    (old,) = torch.autograd.grad(retain(virtual).sum(), theta)
    new = new.detach()
    return new + old, new, value.detach()


@typed
def data_free_distil(
    teacher: nn.Module,
    build: Build,
    shape: tuple[int, ...],
    *,
    memory: Literal["none", "replay", "meta"] = "meta",
    order: Literal[1, 2] = 2,
    members: int = 4,
    iterations: int = 200,
    student_steps: int = 5,
    batch: int = 64,
    stored: int = 10,
    latent: int = 16,
    hidden: int = 64,
    lr: float = 1e-2,
    generator_lr: float = 2e-3,
    rate: float = 0.01,
    confidence: float = 0.0,
    balance: float = 1.0,
    seed: int = 0,
) -> DataFree:
    """Students that never see an example: an MLP generator and a student play against each other before the teacher.

    Each iteration: one step of the generator on :func:`generator_loss`, then ``student_steps`` steps of the student on
    the mean :func:`discrepancy` of new samples. With ``memory="replay"`` the loss on a batch from memory is added; with
    ``"meta"`` it is taken after a virtual step (:func:`retaining_gradient` with ``rate`` and ``order``). Memory: the
    last batch of every iterations / (2 · stored)-th iteration, of which the newest ``stored`` stay. Adam for both.

    Args:
        teacher: maps inputs ``(batch, *shape)`` to logits.
        build: makes one student.
        shape: of one input, with values in (0, 1).
        members: independent runs.
        latent, hidden: dimension of the normal noise and width of the generator's hidden layer.

    Source: Patel, Mopuri & Qiu 2023, "Learning to Retain while Acquiring: Combating Distribution-Shift in Adversarial
    Data-Free Knowledge Distillation" (replay memory; the paper's constants are not known to us). Raises ``ValueError``
    for counts below 1 or rates that are not positive.
    """
    counts = {"members": members, "iterations": iterations, "student_steps": student_steps, "batch": batch}
    for name, given in (counts | {"stored": stored, "lr": lr, "generator_lr": generator_lr}).items():
        require_positive(name, given)
    require_range("rate", rate, 0, math.inf)
    device = next(teacher.parameters()).device
    module, streams = fresh(build).to(device), torch.arange(members)
    layout = Layout.of(module)
    student = initial_parameters(build, layout, seed, streams, device).requires_grad_()

    def build_generator() -> nn.Module:
        return MLP(latent, (hidden,), math.prod(shape)).to(layout.dtype)

    drawer, drawer_layout = fresh(build_generator).to(device), Layout.of(fresh(build_generator))
    painter = int(random.key(seed, _GENERATORS))
    generator = initial_parameters(build_generator, drawer_layout, painter, streams, device).requires_grad_()
    adam, studied, painted = Adam(), Adam().initial(student.detach()), Adam().initial(generator.detach())
    rates = torch.tensor([lr, generator_lr], dtype=layout.dtype, device=device)
    kept: list[tuple[Tensor, Tensor]] = []
    every = max(1, iterations // (2 * stored))
    gaps, cosines = [], []

    def sample(iteration: int, turn: int) -> Tensor:
        keys = random.fold_in(random.key(seed, _LATENT, iteration, turn, device=device), streams.to(device))
        logits, _ = outputs(drawer, drawer_layout.views(generator), random.normal(keys, (batch, latent), layout.dtype))
        return logits.sigmoid().reshape(members, batch, *shape)

    def taught(x: Tensor) -> Tensor:
        return teacher(x.flatten(0, 1)).unflatten(0, (members, batch))

    def gap(x: Tensor, target: Tensor) -> Objective:
        return lambda theta: discrepancy(outputs(module, layout.views(theta), x)[0], target).mean(1)

    with one_thread():
        for iteration in range(iterations):
            x = sample(iteration, 0)
            cost = generator_loss(outputs(module, layout.views(student), x)[0], taught(x), confidence, balance)
            (gradient,) = torch.autograd.grad(cost.sum(), generator)
            adam.apply(generator.detach(), gradient, painted, rates[1], None, iteration)
            for turn in range(student_steps):
                with torch.no_grad():
                    x = sample(iteration, turn + 1)
                    target = taught(x)
                acquire, cosine = gap(x, target), x.new_full((members,), math.nan)
                if kept and memory != "none":
                    pick = random.uniform(random.key(seed, _MEMORY, iteration, turn), ())
                    retain = gap(*kept[int(pick * len(kept))])
                    step = rate if memory == "meta" else 0.0
                    gradient, new, value = retaining_gradient(acquire, retain, student, step, order if step else 1)
                    cosine = torch.cosine_similarity(new, gradient - new, dim=1)
                else:
                    value = acquire(student)
                    (gradient,) = torch.autograd.grad(value.sum(), student)
                if turn == 0:
                    gaps.append(value.detach())
                    cosines.append(cosine)
                adam.apply(student.detach(), gradient, studied, rates[0], None, iteration * student_steps + turn)
            if iteration % every == 0:
                kept = [*kept, (x, target)][-stored:]
    students = Fleet(build, student.detach(), seed, streams.to(device))
    generators = Fleet(build_generator, generator.detach(), seed, streams.to(device))
    return DataFree(students, generators, x, torch.stack(gaps, 1), torch.stack(cosines, 1))
