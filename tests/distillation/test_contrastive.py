"""Contrastive losses in a batch against cross-entropy, loops and each other; the second task against its definition."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.distillation.contrastive import PatchNet, crd, csd, multi_scale_crd, nearest_class_mean, train_next_task
from toolkit.fleet import Adam, grid, train
from toolkit.models import MLP

BATCH, WIDTH, CLASSES = 5, 4, 3
S = random.normal(random.key(1), (BATCH, WIDTH), torch.float64)
T = random.normal(random.key(2), (BATCH, WIDTH), torch.float64)
LABELS = torch.tensor([0, 1, 0, 2, 0])
MAP = random.normal(random.key(3), (BATCH, WIDTH, 4, 4), torch.float64)
TEACHER_MAP = random.normal(random.key(4), (BATCH, WIDTH, 4, 4), torch.float64)
HEAD = random.normal(random.key(5), (CLASSES, WIDTH), torch.float64)
BIAS = random.normal(random.key(6), (CLASSES,), torch.float64)
LOSSES = {
    "crd": lambda s: crd(s.mean((2, 3)), T),
    "csd": lambda s: csd(s.mean((2, 3)), T, LABELS),
    "multi_scale_crd": lambda s: multi_scale_crd(
        s, TEACHER_MAP, HEAD, BIAS, scales=(1, 2, 4), complementary=0.5, feature_weight=0.3
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_and_its_gradient_are_a_loop(name):
    loss, members = LOSSES[name], random.normal(random.key(9), (3, BATCH, WIDTH, 4, 4), torch.float64)
    assert loss(MAP).shape == (BATCH,)
    values = torch.vmap(loss)(members)
    torch.testing.assert_close(values, torch.stack([loss(s) for s in members]), rtol=0, atol=1e-12)
    gradient = torch.vmap(torch.func.grad(lambda s: loss(s).mean()))(members)
    expected = []
    for s in members:
        leaf = s.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf).mean(), leaf)[0])
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=0, atol=1e-12)
    dead = MAP.clone()
    dead[0] = 0
    dead.requires_grad_()
    assert torch.autograd.grad(loss(dead).sum(), dead)[0].isfinite().all()


def test_crd_is_cross_entropy_of_the_cosines():
    cosines = F.cosine_similarity(S[:, None], T[None], dim=-1)
    expected = F.cross_entropy(cosines / 0.1, torch.arange(BATCH), reduction="none")
    torch.testing.assert_close(crd(S, T), expected)
    warmer = F.cross_entropy(cosines / 0.2, torch.arange(BATCH), reduction="none")
    torch.testing.assert_close(crd(3 * S, 5 * T, 0.2), warmer)
    unsure = torch.ones(BATCH, WIDTH)
    torch.testing.assert_close(crd(unsure, unsure), torch.full((BATCH,), math.log(BATCH)))
    axes = torch.eye(4)  # of four: its own at cosine 1, the others at 0
    torch.testing.assert_close(crd(axes, axes, 0.5), torch.full((4,), math.log(1 + 3 * math.exp(-2))))
    turn = torch.linalg.qr(random.normal(random.key(7), (WIDTH, WIDTH), torch.float64))[0]
    torch.testing.assert_close(crd(S @ turn, T @ turn), crd(S, T))


@pytest.mark.parametrize("feature_weight", [0.0, 0.7])
@pytest.mark.parametrize("complementary", [0.0, 1.0, 2.0])
def test_one_scale_is_crd_in_the_batch(feature_weight, complementary):
    s, t = MAP.mean((2, 3)), TEACHER_MAP.mean((2, 3))
    value = multi_scale_crd(MAP, TEACHER_MAP, HEAD, BIAS, (1,), 0.1, complementary, feature_weight)
    expected = crd(s, t) + (feature_weight * crd(s.mT, t.mT).mean() if feature_weight else 0)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)


def test_windows_against_a_loop():
    scales, expected = (1, 2, 4), torch.zeros(BATCH, dtype=torch.float64)
    told_apart = set()
    for scale in scales:
        edge = 4 // scale
        for row in range(scale):
            for column in range(scale):
                cell = (..., slice(row * edge, (row + 1) * edge), slice(column * edge, (column + 1) * edge))
                s, t = MAP[cell].mean((2, 3)), TEACHER_MAP[cell].mean((2, 3))
                value = crd(s, t, 0.3)
                for i in range(BATCH):
                    image = F.linear(TEACHER_MAP[i].mean((1, 2)), HEAD, BIAS).argmax()
                    consistent = bool(F.linear(t[i], HEAD, BIAS).argmax() == image)
                    told_apart.add(consistent)
                    expected[i] += value[i] * (1 if consistent else 0.25) / scale**2 / len(scales)
    assert told_apart == {True, False}
    value = multi_scale_crd(MAP, TEACHER_MAP, HEAD, BIAS, scales, 0.3, complementary=0.25)
    torch.testing.assert_close(value, expected)


def test_maps_of_different_sizes_meet_in_windows():
    finer = MAP.repeat_interleave(2, 2).repeat_interleave(2, 3)
    value = multi_scale_crd(finer, TEACHER_MAP, HEAD, BIAS, (1, 2, 4))
    torch.testing.assert_close(value, multi_scale_crd(MAP, TEACHER_MAP, HEAD, BIAS, (1, 2, 4)))


def test_contrastive_supervision_against_a_loop_and_its_limits():
    cosines = F.cosine_similarity(S[:, None], T[None], dim=-1) / 0.07
    logs = cosines.log_softmax(1)
    expected = torch.stack([-logs[i][LABELS[i] == LABELS].mean() for i in range(BATCH)])
    torch.testing.assert_close(csd(S, T, LABELS), expected)
    torch.testing.assert_close(csd(S, T, torch.arange(BATCH), 0.1), crd(S, T))
    torch.testing.assert_close(csd(S, T, torch.full((BATCH,), 2)), -logs.mean(1))


def test_one_place_is_classified_by_the_same_head():
    net = PatchNet(8, 4, 6, CLASSES, project=3).double()
    x = random.normal(random.key(8), (2, 1, 8, 8), torch.float64)
    logits, features = net(x, return_features=True)
    torch.testing.assert_close(logits, net.head(features))
    same, places = net(x, return_map=True)
    assert places.shape == (2, 3, 2, 2)
    assert torch.equal(same, logits)
    torch.testing.assert_close(places.mean((2, 3)), net.projector(features))
    other = x.clone()
    other[:, :, :4, 4:] += 1  # the patch above on the right
    changed = (net(other, return_map=True)[1] != places).any(1).any(0)
    assert changed.tolist() == [[False, True], [False, False]]
    patch = net.embed(x[:, 0, 4:, :4].flatten(1)) + net.position[2]
    expected = net.projector(net.mix(patch.relu()).relu())
    torch.testing.assert_close(places[:, :, 1, 0], expected)


N = 60
X = random.normal(random.key(20), (N, WIDTH), torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
KNOWN = torch.tensor([True, True, False])
FIT: dict[str, Any] = {"steps": 15, "batch": 12, "optimiser": Adam(lr=1e-2), "progress": False, "device": "cpu"}


def build():
    return MLP(WIDTH, (6,), CLASSES).double()


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def test_the_second_task_is_its_definition_for_each_member():
    old = Y < 2
    first = train(build, cross_entropy, {"x": X[old], "y": Y[old]}, members=4, **FIT)
    data = {"x": X, "y": Y}
    hyper = {
        "csd": torch.tensor([0.0, 1, 0, 0.5]),
        "kd": torch.tensor([0.0, 0, 1, 0.5]),
        "features": torch.tensor([0.0, 0, 0, 2]),
    }
    second = train_next_task(first, data, KNOWN, hyper=hyper, **FIT)
    plain = train(build, cross_entropy, data, start=first, **FIT)
    torch.testing.assert_close(second.parameters[0], plain.parameters[0], rtol=0, atol=1e-9)

    def loss(model, batch, hyper):
        logits, features = model(batch.x, return_features=True)
        frozen, target = batch.teacher(batch.x, return_features=True)
        soft, log = (frozen[:, :2] / 2).softmax(1), (logits[:, :2] / 2).log_softmax(1)
        kd = 4 * (soft * (soft.log() - log)).sum(1)
        value = F.cross_entropy(logits, batch.y, reduction="none")
        value = value + hyper.csd * csd(features, target, batch.y) + hyper.kd * kd
        return value + hyper.features * (1 - F.cosine_similarity(features, target))

    expected = train(build, loss, data, start=first, references={"teacher": first}, hyper=hyper, **FIT)
    torch.testing.assert_close(second.parameters, expected.parameters, rtol=0, atol=1e-9)
    assert (second.parameters[1:] - plain.parameters[1:]).abs().amax(1).min() > 1e-3


def test_class_means_are_found_again():
    gallery, labels = torch.tensor([[2.0, 0], [0, 1], [0, 3]]), torch.tensor([0, 1, 1])
    queries = torch.tensor([[5.0, 1], [1, 5], [2, 1], [1, 2]])
    share = nearest_class_mean(gallery, labels, queries, torch.tensor([0, 1, 1, 1]), 2)
    assert share.item() == 0.75


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"hyper": {"csd": torch.zeros(1)}}, "hyper"),
        ({"known": torch.zeros(3, dtype=torch.bool)}, "known"),
        ({"known": torch.ones(4, dtype=torch.bool)}, "known"),
        ({"kd_temperature": 0.0}, "kd_temperature"),
    ],
)
def test_bad_second_task(options, name):
    first = train(build, cross_entropy, {"x": X, "y": Y}, **FIT | {"steps": 0}, members=1)
    arguments: dict[str, Any] = {"known": KNOWN, "hyper": grid(1, csd=[1], kd=[1], features=[0])["hyper"]} | options
    with pytest.raises(ValueError, match=name):
        train_next_task(first, {"x": X, "y": Y}, **arguments, **FIT)


def test_bad_arguments():
    for loss in (crd, lambda s, t, temperature: csd(s, t, LABELS[: len(s)], temperature)):
        with pytest.raises(ValueError, match="student"):
            loss(S[:1], T[:1], 0.1)
        with pytest.raises(ValueError, match="temperature"):
            loss(S, T, 0.0)
    for scales in ((), (3,), (0,)):
        with pytest.raises(ValueError, match="scales"):
            multi_scale_crd(MAP, TEACHER_MAP, HEAD, BIAS, scales)
    with pytest.raises(ValueError, match="complementary"):
        multi_scale_crd(MAP, TEACHER_MAP, HEAD, BIAS, complementary=-1.0)
    with pytest.raises(ValueError, match="patch"):
        PatchNet(8, 3, 4, 2)
