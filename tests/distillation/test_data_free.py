"""The retaining gradient against closed forms and differences; the game against itself and an untrained student."""

import math
from typing import Any

import pytest
import torch

from toolkit import random
from toolkit.distillation import data_free
from toolkit.distillation.data_free import data_free_distil, discrepancy, generator_loss, retaining_gradient
from toolkit.distillation.synthetic import outputs
from toolkit.models import MLP


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


SHAPE, CLASSES = (2, 3), 4


def build():
    return MLP(6, (8,), CLASSES).double()


def net(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
    for parameter in model.parameters():
        parameter.data *= 3
    return model


TEACHER = net(1)
GAME: dict[str, Any] = {"members": 2, "iterations": 12, "batch": 16, "latent": 3, "hidden": 8, "stored": 4}


def test_discrepancy_by_hand_and_shifts():
    student, teacher = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    assert discrepancy(student, teacher).tolist() == pytest.approx([2 / 3])  # (-2, -1, 3) and (-1, -1, 2)
    torch.testing.assert_close(discrepancy(student + 5, teacher - 1), discrepancy(student, teacher))
    assert discrepancy(student, student + 3).abs().max() < 1e-6


def test_the_generator_wants_discrepancy_certainty_and_all_classes():
    teacher, student = normal(1, 3, 5, CLASSES), normal(2, 3, 5, CLASSES)
    p = teacher.softmax(-1)
    expected = []
    for one in range(3):
        gap = sum(float(discrepancy(student[one, i], teacher[one, i])) for i in range(5)) / 5
        sure = -sum(math.log(float(p[one, i].max())) for i in range(5)) / 5
        mean = p[one].mean(0)
        expected.append(-gap + 0.7 * sure + 0.3 * sum(float(q) * math.log(float(q)) for q in mean))
    torch.testing.assert_close(generator_loss(student, teacher, 0.7, 0.3), torch.tensor(expected).double())
    one_hot = 100 * torch.eye(CLASSES).double()
    assert generator_loss(one_hot, one_hot, 1.0, 1.0).item() == pytest.approx(-math.log(CLASSES))
    with pytest.raises(ValueError, match="balance"):
        generator_loss(student, teacher, 0.0, -1.0)


def bowl(seed):
    """½ (θ - p)ᵀ A (θ - p) with its A and p."""
    root, p = normal(seed, 5, 5), normal(seed + 1, 5)
    a = root @ root.T / 5
    return (lambda theta: ((theta - p) @ a * (theta - p)).sum(-1) / 2), a, p


THETA = normal(20, 3, 5)


def test_the_retaining_gradient_of_bowls_in_closed_form():
    (acquire, a, p), (retain, b, q) = bowl(10), bowl(12)
    new = (THETA - p) @ a
    virtual = (THETA - 0.1 * new - q) @ b
    second = retaining_gradient(acquire, retain, THETA, 0.1)
    torch.testing.assert_close(second[0], new + virtual @ (torch.eye(5).double() - 0.1 * a))
    torch.testing.assert_close(second[1], new)
    torch.testing.assert_close(second[2], acquire(THETA))
    first = retaining_gradient(acquire, retain, THETA, 0.1, order=1)
    torch.testing.assert_close(first[0], new + virtual)
    plain = retaining_gradient(acquire, retain, THETA, 0.0)
    torch.testing.assert_close(plain[0], new + (THETA - q) @ b)


def test_second_order_is_the_gradient_of_the_whole_objective_by_differences():
    def acquire(theta):
        return theta.sin().prod(-1) + theta.pow(4).sum(-1) / 8

    def retain(theta):
        return (theta * torch.arange(5)).cos().sum(-1)

    def whole(theta):
        leaf = theta.clone().requires_grad_()
        (new,) = torch.autograd.grad(acquire(leaf), leaf)
        return float(acquire(theta) + retain(theta - 0.2 * new))

    gradient = retaining_gradient(acquire, retain, THETA[:1], 0.2)[0][0]
    wrong = retaining_gradient(acquire, retain, THETA[:1], 0.2, order=1)[0][0]
    steps = 1e-6 * torch.eye(5).double()
    expected = torch.tensor([(whole(THETA[0] + h) - whole(THETA[0] - h)) / 2e-6 for h in steps]).double()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)
    assert (wrong - expected).abs().max() > 1e-2


def test_the_virtual_step_aligns_gradients_to_first_order():
    """L_r(θ - a g) - L_r(θ) + a ⟨g, ∇L_r⟩ is O(a²)."""
    (acquire, a, p), (_, b, q) = bowl(14), bowl(16)

    def retain(theta):
        return ((theta - q) @ b).tanh().square().sum(-1)

    theta = THETA[0]
    new = (theta - p) @ a
    old = torch.func.grad(retain)(theta)
    errors = [retain(theta - rate * new) - retain(theta) + rate * new @ old for rate in (1e-3, 5e-4)]
    assert float(errors[0] / errors[1]) == pytest.approx(4, rel=0.02)
    assert abs(errors[0]) < 0.05 * 1e-3 * abs(new @ old)
    slopes = [retaining_gradient(acquire, retain, theta[None], rate)[0][0] for rate in (0.0, 1e-5)]
    inner = torch.func.grad(lambda t: torch.func.grad(lambda s: acquire(s))(t) @ torch.func.grad(retain)(t))(theta)
    torch.testing.assert_close((slopes[0] - slopes[1]) / 1e-5, inner, rtol=1e-3, atol=1e-3)


def test_rows_of_members_do_not_mix():
    (acquire, _, _), (retain, _, _) = bowl(10), bowl(12)
    together = retaining_gradient(acquire, retain, THETA, 0.1)
    for i in range(3):
        torch.testing.assert_close(retaining_gradient(acquire, retain, THETA[i : i + 1], 0.1)[0][0], together[0][i])


def test_members_are_those_of_a_smaller_run_and_the_teacher_is_left_alone():
    before = [p.clone() for p in TEACHER.parameters()]
    both = data_free_distil(TEACHER, build, SHAPE, **GAME)
    alone = data_free_distil(TEACHER, build, SHAPE, **GAME | {"members": 1})
    torch.testing.assert_close(both.students.parameters[:1], alone.students.parameters)
    torch.testing.assert_close(both.generators.parameters[:1], alone.generators.parameters)
    assert not torch.allclose(both.students.parameters[0], both.students.parameters[1])
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, TEACHER.parameters(), strict=True))
    assert both.samples.shape == (2, 16, *SHAPE)
    assert ((both.samples > 0) & (both.samples < 1)).all()
    assert both.discrepancy.shape == both.alignment.shape == (2, 12)


def test_a_virtual_step_of_no_length_is_replay_and_memories_differ():
    meta = data_free_distil(TEACHER, build, SHAPE, **GAME, rate=0.0)
    replay = data_free_distil(TEACHER, build, SHAPE, **GAME, memory="replay")
    none = data_free_distil(TEACHER, build, SHAPE, **GAME, memory="none")
    torch.testing.assert_close(meta.students.parameters, replay.students.parameters)
    assert (none.students.parameters - replay.students.parameters).abs().max() > 1e-3
    assert none.alignment.isnan().all()
    assert replay.alignment[:, 0].isnan().all()  # nothing is remembered yet
    assert replay.alignment[:, 1:].abs().max() <= 1
    second, first = (data_free_distil(TEACHER, build, SHAPE, **GAME, rate=0.05, order=o) for o in (2, 1))
    assert (second.students.parameters - first.students.parameters).abs().max() > 1e-6


def test_memory_holds_the_newest_batches_that_were_kept(monkeypatch):
    """One is kept after each second iteration: 0, 2, 4, 6; the newest two stay."""
    seen: list[torch.Tensor] = []

    def spy(module, views, x):
        seen.extend([x] if x.shape[2:] == SHAPE else [])  # the student's inputs
        return outputs(module, views, x)

    monkeypatch.setattr(data_free, "outputs", spy)
    game = GAME | {"iterations": 8, "stored": 2, "student_steps": 1}
    data_free_distil(TEACHER, build, SHAPE, **game, memory="replay")
    new, old = [seen[1], *seen[3::3]], seen[4::3]  # generator's, new, (remembered)
    assert (len(new), len(old)) == (8, 7)
    for iteration, remembered in enumerate(old, 1):
        kept = [new[i] for i in (0, 2, 4, 6) if i < iteration][-2:]
        assert any(remembered is batch for batch in kept)
    assert any(batch is new[4] for batch in old)


def test_the_student_comes_nearer_on_inputs_that_no_one_gave_it():
    game = GAME | {"iterations": 70, "batch": 32, "hidden": 16}
    x = random.uniform(random.key(5), (500, *SHAPE), torch.float64)
    start = data_free_distil(TEACHER, build, SHAPE, **GAME | {"iterations": 1, "student_steps": 1, "lr": 1e-12})
    target = TEACHER(x).detach()

    def gap(students):
        return discrepancy(students.logits(x), target.expand(2, -1, -1)).mean()

    for memory in ("none", "meta"):
        result = data_free_distil(TEACHER, build, SHAPE, **game, memory=memory, rate=0.01, lr=5e-3)
        assert gap(result.students) < 0.5 * gap(start.students)


def test_bad_input():
    for wrong in ({"members": 0}, {"iterations": 0}, {"student_steps": 0}, {"batch": 0}, {"stored": 0}, {"lr": 0.0},
                  {"generator_lr": -1.0}, {"rate": -0.1}, {"confidence": -1.0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            data_free_distil(TEACHER, build, SHAPE, **GAME | wrong)
    with pytest.raises(ValueError, match="rate"):
        retaining_gradient(lambda t: t.sum(-1), lambda t: t.sum(-1), THETA, -1.0)
