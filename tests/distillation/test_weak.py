"""A student's own past, pseudo-labels, untrained and worse teachers: each against its definition by plain autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logit_cases import logits

from toolkit import random
from toolkit.distillation.logits import kd
from toolkit.distillation.weak import (
    DeepMLP,
    linear_probe,
    near_teacher,
    noisy_student,
    progressive_weight,
    pseudo_weights,
    train_from_random_teacher,
    train_ps_kd,
    trainee_mentor,
)
from toolkit.fleet import SGD, Adam, train
from toolkit.models import MLP

N, CLASSES = 48, 4
X = logits(31, N, 6, scale=1).float()
Y = (X @ logits(32, 6, CLASSES).float()).argmax(1)
DATA = {"x": X, "y": Y}
QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}


def build():
    return MLP(6, (5,), CLASSES)


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def moved(module, value, lr):
    slopes = torch.autograd.grad(value, list(module.parameters()))
    with torch.no_grad():
        for parameter, slope in zip(module.parameters(), slopes, strict=True):
            parameter -= lr * slope
    return torch.cat([p.reshape(-1) for p in module.parameters()]).detach()


def test_the_weight_of_the_past_grows_by_epochs():
    for epochs in (1, 7, 30, 300):
        for per_epoch in (1, 3, 7):
            progress = (torch.arange(epochs * per_epoch) / torch.tensor(float(epochs * per_epoch))).float()
            found = torch.vmap(lambda p, epochs=epochs: progressive_weight(p, epochs, 0.8))(progress)
            epoch = torch.arange(epochs).repeat_interleave(per_epoch)
            expected = torch.where(epoch > 0, 0.8 * (epoch + 1) / epochs, 0)
            torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)
    assert progressive_weight(0.99, 300).item() == pytest.approx(0.8 * 298 / 300)


def test_self_distillation_is_three_epochs_by_hand():
    options = QUIET | {"batch": N, "optimiser": SGD(lr=0.5)}
    fleet = train_ps_kd(build, DATA, CLASSES, finals=[0.0, 0.9], seeds=2, epochs=3, snapshots=[0], **options)
    for i in range(4):
        module, final, past = fleet.at(0)[i], (0.0, 0.9)[i // 2], torch.zeros(N, CLASSES)
        for epoch in range(3):
            alpha = final * (epoch + 1) / 3 if epoch else 0.0
            z = module(X)
            target = (1 - alpha) * F.one_hot(Y, CLASSES) + alpha * past
            past = z.detach().softmax(-1)
            after = moved(module, -(target * z.log_softmax(-1)).sum(-1).mean(), 0.5)
        torch.testing.assert_close(fleet.parameters[i], after, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fleet.memory["previous"][i], past, rtol=1e-4, atol=1e-6)
    assert (fleet.parameters[:2] - fleet.parameters[2:]).abs().max() > 1e-2


def test_self_distillation_without_a_past_is_cross_entropy_and_resumes():
    options = QUIET | {"batch": 10, "optimiser": Adam(lr=1e-2), "epochs": 4}
    fleet = train_ps_kd(build, DATA, CLASSES, finals=[0.0, 0.8], seeds=2, **options)
    plain = train(build, cross_entropy, DATA, members=2, **options)
    torch.testing.assert_close(fleet.parameters[:2], plain.parameters, rtol=1e-5, atol=1e-6)
    half = train_ps_kd(build, DATA, CLASSES, finals=[0.0, 0.8], seeds=2, until=9, **options)
    whole = train_ps_kd(build, DATA, CLASSES, finals=[0.0, 0.8], seeds=2, resume=half, **options)
    assert torch.equal(whole.parameters, fleet.parameters)


def by_hand(p, per_class, threshold):
    weights = torch.zeros(len(p), dtype=p.dtype)
    for c in range(p.shape[1]):
        mine = [i for i in range(len(p)) if p[i].argmax() == c and p[i].max() > threshold]
        mine = sorted(mine, key=lambda i: (-p[i].max().item(), i))[:per_class]
        for i in mine:
            weights[i] = per_class / len(mine)
    return weights


@pytest.mark.parametrize(("per_class", "threshold"), [(1, 0.3), (4, 0.5), (12, 0.45), (100, 0.0), (3, 1.0)])
def test_pseudo_labels_are_balanced(per_class, threshold):
    p = torch.cat([logits(33, 40, 4, scale=1.5), logits(34, 5, 4).repeat(2, 1)]).softmax(-1)
    found = pseudo_weights(p, per_class, threshold)
    torch.testing.assert_close(found, by_hand(p, per_class, threshold))
    both = torch.stack([p, p.flip(0)])
    torch.testing.assert_close(torch.vmap(lambda q: pseudo_weights(q, per_class, threshold))(both)[0], found)
    classes = (found > 0).double() @ F.one_hot(p.argmax(-1), 4).double()
    totals = found @ F.one_hot(p.argmax(-1), 4).double()
    torch.testing.assert_close(totals, torch.where(classes > 0, float(per_class), 0.0).double())


def test_a_noisy_students_round_by_hand():
    few, more = {"x": X[:16], "y": Y[:16]}, X[16:]
    options: dict[str, Any] = QUIET | {"batch": 48, "optimiser": SGD(lr=0.5), "steps": 1, "snapshots": [0]}
    wide = lambda: MLP(6, (9,), CLASSES)  # noqa: E731
    teacher, student = noisy_student(
        [build, wide], few, more, CLASSES, noises=[0.0, 0.4], seeds=2, per_class=3, threshold=0.26, **options
    )
    plain = train(build, cross_entropy, few, members=2, **options)
    for rows in (slice(0, 2), slice(2, 4)):
        torch.testing.assert_close(teacher.parameters[rows], plain.parameters)
    for i in range(4):
        index, key = first_batch(i % 2)
        guess = teacher[i](more).detach().softmax(-1)
        target = torch.cat([F.one_hot(Y[:16], CLASSES).float(), guess])[index]
        weights = torch.cat([torch.ones(16), by_hand(guess, 3, 0.26)])
        noise = (0.0, 0.4)[i // 2]
        x = X[index]
        seen = random.dropout(x, noise, random.fold_in(key, 0))
        seen = seen + noise * random.normal(random.fold_in(key, 1), (48, 6))
        module = student.at(0)[i]
        values = -(target * module(seen).log_softmax(-1)).sum(-1) * weights[index]
        expected = moved(module, values.sum() / weights.sum(), 0.5)
        torch.testing.assert_close(student.parameters[i], expected, rtol=1e-4, atol=1e-6)
        assert 0 < (weights > 0).sum() < 48


def first_batch(stream):
    """The examples and the key of a member's first step, as its loss sees them."""
    rows = {"place": torch.zeros(N, dtype=torch.int64), "drawn": torch.zeros(N, dtype=torch.int64)}

    def loss(model, batch, hyper):
        return model(batch.x).sum(-1), {"place": torch.arange(N), "drawn": batch.key.expand(N)}

    streams = torch.tensor([stream])
    fleet = train(build, loss, DATA, streams=streams, memory=rows, steps=1, batch=N, **QUIET)
    return fleet.memory["place"][0].argsort(), fleet.memory["drawn"][0, 0]


def test_starts_near_the_teacher_keep_their_variance():
    teacher, other = logits(35, 5, 40000, scale=1), logits(36, 5, 40000, scale=1)
    alpha = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    start = near_teacher(teacher, other, alpha)
    torch.testing.assert_close(start.var(1), torch.ones(5, dtype=torch.float64), rtol=0.03, atol=0)
    assert torch.equal(start[0], teacher[0])
    assert torch.equal(start[4], other[4])
    cosine = F.cosine_similarity(start, teacher)
    torch.testing.assert_close(cosine, (1 - alpha) / (alpha**2 + (1 - alpha) ** 2).sqrt(), rtol=0, atol=0.02)


def test_a_random_teacher_is_the_initial_state_and_the_student_imitates_it():
    options = QUIET | {"batch": N, "optimiser": SGD(lr=1.0)}
    alphas = [0.0, 0.3, 1.0]
    fleet = train_from_random_teacher(build, X, alphas=alphas, seeds=2, steps=60, snapshots=[0, 1], **options)
    fresh = train(build, cross_entropy, DATA, members=2, steps=0, **options)
    torch.testing.assert_close(fleet.at(0).parameters[:2], fresh.parameters)
    torch.testing.assert_close(fleet.parameters[:2], fresh.parameters, rtol=0, atol=1e-5)  # there is nothing to learn
    wanted = fresh.logits(X)
    zero = torch.zeros(N, dtype=torch.int64)
    for i in (2, 3, 4, 5):
        module = fleet.at(0)[i]
        z = module(X)
        before = kd(z, wanted[i % 2], zero, 1.0, 1.0).mean()
        after = kd(fleet[i](X), wanted[i % 2], zero, 1.0, 1.0).mean()
        assert after < 0.7 * before
        soft = -(wanted[i % 2].softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(fleet.at(1).parameters[i], moved(module, soft, 1.0), rtol=1e-4, atol=1e-6)
    distance = [(fleet.at(0).parameters[2 * i + 1] - fresh.parameters[1]).norm().item() for i in range(3)]
    assert distance[0] == 0 < distance[1] < distance[2]


def test_the_probe_is_ridge_regression():
    features, tests = logits(37, 60, 7) * torch.arange(1, 8) + 5, logits(38, 90, 7) * torch.arange(1, 8) + 5
    shear = torch.eye(7, dtype=torch.float64) + 0.9 * torch.ones(7, 7, dtype=torch.float64)
    turn = logits(39, 7, 3)
    y, truth = (features @ turn).argmax(1), ((tests + logits(40, 90, 7) * 6) @ turn).argmax(1)
    features, tests = features @ shear, tests @ shear  # features that are alike: there the penalty matters
    mean, size = features.mean(0), features.std(0, correction=0)
    rows = torch.cat([(features - mean) / size, (0.5 * 60) ** 0.5 * torch.eye(7, dtype=torch.float64)])
    wanted, prior = F.one_hot(y, 3).double(), F.one_hot(y, 3).double().mean(0)
    weights = torch.linalg.lstsq(rows, torch.cat([wanted - prior, torch.zeros(7, 3, dtype=torch.float64)])).solution
    guess = ((tests - mean) / size @ weights + prior).argmax(1)
    expected = (guess == truth).double().mean()
    found = linear_probe(features, y, tests, truth, 3, 0.5)
    torch.testing.assert_close(found, expected)
    assert 0.3 < expected < 0.9
    assert linear_probe(features, y, tests, truth, 3, 0.5 / 60) != expected
    many = linear_probe(torch.stack([features, features * 0]), y, torch.stack([tests, tests]), truth, 3, 0.5)
    torch.testing.assert_close(many[0], expected)
    torch.testing.assert_close(many[1], (truth == y.bincount().argmax()).double().mean())


def test_deep_nets_with_and_without_skips():
    with torch.random.fork_rng():
        nets = []
        for skip in (False, True):
            torch.manual_seed(0)
            nets.append(DeepMLP(6, 5, 2, CLASSES, skip).double())
    x = X.double()
    for net, kept in zip(nets, (0, 1), strict=True):
        h = net.first(x)
        for layer in net.layers:
            h = kept * h + layer(F.relu(h))
        found, features = net(x, return_features=True)
        torch.testing.assert_close(features, F.relu(h))
        torch.testing.assert_close(found, net.head(F.relu(h)))
        assert torch.equal(net(x), found)
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_trainee_and_mentor_table():
    """Each cell is its student trained alone."""
    options: dict[str, Any] = QUIET | {"batch": 16, "optimiser": Adam(lr=1e-2)}
    found = trainee_mentor(DATA, DATA, CLASSES, depths=[3, 1], width=5, seeds=2, steps=25, worse_steps=5, **options)
    assert found.students.shape == (2, 2, 3, 2)
    make = lambda depth, skip: lambda: DeepMLP(6, 5, depth, CLASSES, skip)  # noqa: E731
    teachers = [train(make(1, True), cross_entropy, DATA, members=2, steps=25, snapshots=[5], **options)]
    teachers.append(teachers[0].at(5))

    def accuracy(fleet):
        return torch.stack([(fleet[i](X).argmax(1) == Y).double().mean() for i in range(2)])

    for row, teacher in zip(found.teachers, teachers, strict=True):
        torch.testing.assert_close(row, accuracy(teacher))
    tables = [(0.0, teachers[0]), (0.9, teachers[0]), (0.9, teachers[1])]
    for a, depth in enumerate((3, 1)):
        for skip in (False, True):
            for c, (weight, teacher) in enumerate(tables):

                def loss(model, batch, hyper, weight=weight):
                    z, p = model(batch.x), (batch.wanted / 4).softmax(-1)
                    soft = p * (p.log() - (z / 4).log_softmax(-1))
                    hard = F.cross_entropy(z, batch.y, reduction="none")
                    return (1 - weight) * hard + weight * 16 * soft.sum(-1)

                own = {"wanted": teacher.logits(X)}
                fleet = train(make(depth, skip), loss, DATA, member_data=own, members=2, steps=25, **options)
                assert (found.students[a, int(skip), c] - accuracy(fleet)).abs().max() < 1.5 / N


def test_bad_input():
    p, few = logits(41, 6, 3).softmax(-1), {"x": X[:16], "y": Y[:16]}
    options: dict[str, Any] = QUIET | {"steps": 1}
    noisy: dict[str, Any] = {"noises": [0.1], "seeds": 1, "per_class": 2} | options
    mentor: dict[str, Any] = {"depths": [1], "width": 4, "seeds": 1, "steps": 4, "worse_steps": 2} | QUIET
    for call, name in (
        (lambda: progressive_weight(0.5, 0), "epochs"),
        (lambda: progressive_weight(0.5, 3, 1.2), "final"),
        (lambda: progressive_weight(-0.5, 3), "progress"),
        (lambda: train_ps_kd(build, DATA, 3, finals=[0.5], seeds=1, epochs=2, **QUIET), "labels"),
        (lambda: train_ps_kd(build, DATA, CLASSES, finals=[1.5], seeds=1, epochs=2, **QUIET), "final"),
        (lambda: pseudo_weights(p, 0), "per_class"),
        (lambda: pseudo_weights(p, 1, 1.5), "threshold"),
        (lambda: pseudo_weights(2 * p, 1), "probabilities"),
        (lambda: noisy_student([], few, X, CLASSES, **noisy), "builds"),
        (lambda: noisy_student([build], few, X, CLASSES, **noisy | {"noises": [1.0]}), "noises"),
        (lambda: noisy_student([build], few, X, 2, **noisy), "labels"),
        (lambda: near_teacher(p, p, torch.full((6,), 1.5, dtype=torch.float64)), "alpha"),
        (lambda: train_from_random_teacher(build, X, alphas=[-0.1], seeds=1, **options), "alpha"),
        (lambda: linear_probe(X, Y, X, Y, CLASSES, 0.0), "penalty"),
        (lambda: linear_probe(X, Y, X, Y, 2), "labels"),
        (lambda: DeepMLP(6, 0, 2, 3, True), "width"),
        (lambda: trainee_mentor(DATA, DATA, CLASSES, **mentor | {"depths": []}), "depths"),
        (lambda: trainee_mentor(DATA, DATA, CLASSES, **mentor | {"worse_steps": 4}), "worse_steps"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
