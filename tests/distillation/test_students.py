"""A fleet of students against plain autograd and against train; the teacher runs once; settings are checked."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logit_cases import logits

from toolkit.distillation.levels import instance_targets, soft_cross_entropy
from toolkit.distillation.logits import dkd, kd
from toolkit.distillation.students import distil, teacher_outputs
from toolkit.fleet import SGD, Adam, grid, train
from toolkit.models import MLP

N, CLASSES = 48, 4
X = logits(1, N, 6, scale=1).float()
Y = (X @ logits(2, 6, CLASSES).float()).argmax(1)
DATA = {"x": X, "y": Y}
with torch.random.fork_rng():
    torch.manual_seed(0)
    TEACHER = MLP(6, (12,), CLASSES)
TRAINING: dict[str, Any] = {"steps": 12, "batch": 8, "optimiser": Adam(lr=1e-2), "progress": False, "device": "cpu"}


def build():
    return MLP(6, (5,), CLASSES)


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def test_the_teacher_is_run_once_and_in_parts():
    calls = []

    class Counting(MLP):
        def forward(self, x, key=None, return_features=False):
            calls.append(len(x))
            return super().forward(x, key, return_features)

    teacher = Counting(6, (12,), CLASSES)
    found = teacher_outputs(teacher, X, batch=20)
    assert calls == [20, 20, 8]
    whole, features = teacher(X, return_features=True)
    torch.testing.assert_close(found.logits, whole.detach())
    torch.testing.assert_close(found.features, features.detach())
    assert not found.logits.requires_grad
    calls.clear()
    distil(build, kd, DATA, found.logits, members=5, **TRAINING)
    assert calls == []


def test_without_weight_on_the_teacher_a_student_is_trained_on_labels():
    teacher = teacher_outputs(TEACHER, X).logits
    weights = grid(2, weight=[0.0, 0.5])
    students = distil(build, partial(kd, temperature=2.0), DATA, teacher, **weights, **TRAINING)
    plain = train(build, cross_entropy, DATA, members=2, **TRAINING)
    torch.testing.assert_close(students.parameters[:2], plain.parameters, rtol=1e-5, atol=1e-6)
    assert (students.parameters[2:] - plain.parameters).abs().max() > 1e-3


def test_one_step_is_the_gradient_of_each_members_own_loss():
    """By plain autograd from the same start, full batch."""
    teacher = teacher_outputs(TEACHER, X).logits
    settings = grid(2, temperature=[1.0, 5.0], weight=[0.2, 1.0])
    options = TRAINING | {"steps": 1, "batch": N, "optimiser": SGD(lr=0.5), "snapshots": [0]}
    students = distil(build, kd, DATA, teacher, **settings, **options)
    start = students.at(0)
    for i in range(8):
        module = start[i]
        temperature, weight = (settings["hyper"][name][i].item() for name in ("temperature", "weight"))
        z = module(X)
        soft = F.kl_div((z / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean")
        loss = (1 - weight) * F.cross_entropy(z, Y) + weight * temperature**2 * soft
        slopes = torch.autograd.grad(loss, list(module.parameters()))
        moved = torch.cat([(p - 0.5 * g).reshape(-1) for p, g in zip(module.parameters(), slopes, strict=True)])
        torch.testing.assert_close(students.parameters[i], moved.detach(), rtol=1e-4, atol=1e-6)
        assert (students.parameters[i] - start.parameters[i]).abs().max() > 1e-3


def test_a_student_does_not_depend_on_the_others_and_training_resumes():
    teacher = teacher_outputs(TEACHER, X).logits
    values = torch.tensor([1.0, 2.0, 8.0])
    students = distil(build, kd, DATA, teacher, hyper={"temperature": values}, **TRAINING)
    alone = distil(build, kd, DATA, teacher, hyper={"temperature": values[2:]}, streams=torch.tensor([2]), **TRAINING)
    torch.testing.assert_close(alone.parameters, students.parameters[2:], rtol=1e-5, atol=1e-7)
    half = distil(build, kd, DATA, teacher, hyper={"temperature": values}, until=5, **TRAINING)
    assert torch.equal(distil(build, kd, DATA, teacher, resume=half, **TRAINING).parameters, students.parameters)


def test_each_student_may_have_its_own_teacher():
    own = logits(5, 2, N, CLASSES).float()
    both = distil(build, kd, DATA, own, streams=torch.zeros(2, dtype=torch.int64), **TRAINING)
    for i in range(2):
        alone = distil(build, kd, DATA, own[i], streams=torch.zeros(1, dtype=torch.int64), **TRAINING)
        torch.testing.assert_close(both.parameters[i], alone.parameters[0], rtol=1e-5, atol=1e-7)
    assert (both.parameters[0] - both.parameters[1]).abs().max() > 1e-3


def test_targets_progress_and_features_reach_the_loss():
    outputs = teacher_outputs(TEACHER, X)
    targets = instance_targets(outputs.logits.softmax(-1), Y)
    students = distil(build, soft_cross_entropy, DATA, targets, members=1, **TRAINING)
    known = distil(
        build, kd, DATA, targets.log(), hyper={"weight": torch.ones(1), "temperature": torch.ones(1)}, **TRAINING
    )
    torch.testing.assert_close(students.parameters, known.parameters, rtol=1e-4, atol=1e-5)

    late = partial(dkd, warm_up=1.0)
    ramped = distil(build, late, DATA, outputs.logits, members=1, **TRAINING)
    constant = distil(build, partial(dkd, warm_up=1e-9), DATA, outputs.logits, members=1, **TRAINING)
    assert (ramped.parameters - constant.parameters).abs().max() > 1e-3

    def matching(z, teacher, labels, features, teacher_features, weight):
        return weight * (features.square().sum(-1) - teacher_features.square().sum(-1)).square() + 0 * z.sum(-1)

    options = TRAINING | {"steps": 1, "batch": N, "optimiser": SGD(lr=1e-3)}
    matched = distil(
        build,
        matching,
        DATA,
        outputs.logits,
        features=outputs.features,
        hyper={"weight": torch.ones(1)},
        snapshots=[0],
        **options,
    )
    module = matched.at(0)[0]
    _, own = module(X, return_features=True)
    expected = (own.square().sum(-1) - outputs.features.square().sum(-1)).square().mean()
    torch.testing.assert_close(matched.history[0, 0], expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_student_learns_its_teacher():
    teacher = 3 * teacher_outputs(TEACHER, X).logits
    options = TRAINING | {"steps": 400, "batch": N, "optimiser": Adam(lr=2e-2)}
    students = distil(build, partial(kd, weight=1.0), DATA, teacher, members=2, **options)
    assert (students.history[:, -1] < 0.2 * students.history[:, 0]).all()
    agreement = (students.logits(X).argmax(-1) == teacher.argmax(-1)).double().mean(-1)
    assert (agreement > 0.7).all()


def test_bad_input():
    teacher = teacher_outputs(TEACHER, X).logits
    broken = teacher.clone()
    broken[3, 1] = float("nan")
    one = torch.ones(1)
    for call, name in (
        (lambda: distil(build, kd, DATA, teacher[1:], members=1, **TRAINING), "teacher"),
        (lambda: distil(build, kd, DATA, broken, members=1, **TRAINING), "teacher"),
        (lambda: distil(build, kd, {"x": X}, teacher, members=1, **TRAINING), "data"),
        (lambda: distil(build, kd, DATA | {"teacher": X}, teacher, members=1, **TRAINING), "data"),
        (lambda: distil(build, kd, DATA, teacher, hyper={"tau": one}, **TRAINING), "hyper"),
        (lambda: distil(build, kd, DATA, teacher, features=teacher, members=1, **TRAINING), "hyper"),
        (lambda: distil(build, kd, DATA, teacher, hyper={"temperature": -one}, **TRAINING), "temperature"),
        (lambda: distil(build, kd, DATA, teacher, hyper={"weight": 2 * one}, **TRAINING), "weight"),
        (
            lambda: distil(build, kd, DATA, teacher, hyper={"weight": one, "temperature": torch.ones(2)}, **TRAINING),
            "hyper",
        ),
        (lambda: teacher_outputs(TEACHER, X, batch=0), "batch"),
        (lambda: teacher_outputs(TEACHER, X[:0]), "x"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
