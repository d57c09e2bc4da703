"""Losses between features against loops, closed forms and invariances; training with hints against its definition."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.distillation.features import (
    LayeredMLP,
    attention_transfer,
    class_directions,
    hint,
    norm_and_direction,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    train_fitnets,
)
from toolkit.fleet import Adam, train

BATCH, WIDTH, TEACHER, CLASSES = 6, 4, 5, 3
S = random.normal(random.key(1), (BATCH, WIDTH), torch.float64)
T = random.normal(random.key(2), (BATCH, TEACHER), torch.float64)
SAME = random.normal(random.key(3), (BATCH, WIDTH), torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
DIRECTIONS = F.normalize(random.normal(random.key(4), (CLASSES, WIDTH), torch.float64), dim=1)
TURN = torch.linalg.qr(random.normal(random.key(5), (WIDTH, WIDTH), torch.float64))[0]
LOSSES = {
    "hint": lambda s: hint(s, SAME),
    "attention_transfer": lambda s: attention_transfer(s.unflatten(1, (2, 2)), SAME.unflatten(1, (2, 2))),
    "rkd_distance": lambda s: rkd_distance(s, T),
    "rkd_angle": lambda s: rkd_angle(s, T),
    "similarity_preserving": lambda s: similarity_preserving(s, T),
    "norm_and_direction": lambda s: norm_and_direction(s, SAME, DIRECTIONS, LABELS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_and_its_gradient_are_a_loop(name):
    loss, members = LOSSES[name], random.normal(random.key(9), (3, BATCH, WIDTH), torch.float64)
    assert loss(S).shape == (BATCH,)
    values = torch.vmap(loss)(members)
    torch.testing.assert_close(values, torch.stack([loss(s) for s in members]), rtol=0, atol=1e-13)
    gradient = torch.vmap(torch.func.grad(lambda s: loss(s).mean()))(members)
    leaf = members.clone().requires_grad_()
    expected = [torch.autograd.grad(loss(s).mean(), leaf)[0][i] for i, s in enumerate(leaf)]
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(loss, (S.clone().requires_grad_(),))
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_repeated_and_dead_examples_have_finite_gradients(name):
    s = torch.cat([S[:1], S[:1], torch.zeros_like(S[:2]), S[2:4]]).requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](s).sum(), s)
    assert gradient.isfinite().all()


def test_the_hint_is_half_the_squared_difference():
    torch.testing.assert_close(hint(S, SAME), ((S - SAME) ** 2).sum(1) / 2)
    leaf = S.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(hint(leaf, SAME).sum(), leaf)[0], S - SAME)


def test_attention_is_where_a_net_is_active():
    student = random.normal(random.key(6), (4, 3, 2, 5), torch.float64)
    teacher = random.normal(random.key(7), (4, 8, 2, 5), torch.float64)
    maps = [h.square().sum(1).flatten(1) for h in (student, teacher)]
    expected = 2 - 2 * F.cosine_similarity(maps[0], maps[1])
    torch.testing.assert_close(attention_transfer(student, teacher), expected)
    torch.testing.assert_close(attention_transfer(-3 * student[:, [2, 0, 1]], teacher), expected)
    wider = attention_transfer(student, torch.cat([student, -student], 1))
    torch.testing.assert_close(wider, torch.zeros(4, dtype=torch.float64))
    one, other = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    one[0, 0, 0] = other[0, 1, 2] = 1
    assert attention_transfer(one, other).item() == 2
    linear = [h.abs().sum(1).flatten(1) for h in (student, teacher)]
    torch.testing.assert_close(
        attention_transfer(student, teacher, power=1.0), 2 - 2 * F.cosine_similarity(linear[0], linear[1])
    )


def huber(d):
    return d * d / 2 if abs(d) < 1 else abs(d) - 0.5


def test_relational_distances_against_a_loop():
    for student in (S, 5 * S[:, :1]):  # one dimension: distances that differ by more than 1 from the teacher's
        tables = [torch.cdist(x, x) for x in (student, T)]
        tables = [d / (d.sum() / (BATCH * (BATCH - 1))) for d in tables]
        expected = [
            sum(huber(float(tables[0][i, j] - tables[1][i, j])) for j in range(BATCH) if j != i) / (BATCH - 1)
            for i in range(BATCH)
        ]
        torch.testing.assert_close(rkd_distance(student, T), torch.tensor(expected, dtype=torch.float64))


def test_relational_angles_against_a_loop():
    for i in range(BATCH):
        total = 0.0
        for j, k in itertools.permutations([other for other in range(BATCH) if other != i], 2):
            angles = [F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0).item() for x in (S, T)]
            total += huber(angles[0] - angles[1])
        assert rkd_angle(S, T)[i].item() == pytest.approx(total / ((BATCH - 1) * (BATCH - 2)), abs=1e-12)


def test_the_angle_of_a_line_and_of_a_corner():
    line, corner = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    half = 0.5**0.5  # cosines at the three points: 1, -1, 1 against half, 0, half
    expected = torch.tensor([huber(1 - half), huber(-1.0), huber(1 - half)])
    torch.testing.assert_close(rkd_angle(line, corner), expected)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_relations_do_not_see_rotation_shift_and_scale(loss):
    moved = 3.7 * S @ TURN + 11
    torch.testing.assert_close(loss(moved, T), loss(S, T), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(T, moved), loss(T, S), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss(moved, S), torch.zeros(BATCH, dtype=torch.float64), rtol=0, atol=1e-12)
    stretched = S * torch.tensor([3.0, 1, 1, 1], dtype=torch.float64)
    assert loss(stretched, S).mean() > 1e-3


def test_similarities_are_preserved_under_rotation_and_scale_not_shift():
    tables = [x @ x.mT for x in (S, T)]
    tables = [g / g.norm(dim=1, keepdim=True) for g in tables]
    expected = (tables[0] - tables[1]).square().sum() / BATCH**2
    torch.testing.assert_close(similarity_preserving(S, T).mean(), expected)
    torch.testing.assert_close(similarity_preserving(-2 * S @ TURN, T), similarity_preserving(S, T))
    assert similarity_preserving(2 * S @ TURN, S).max() < 1e-14
    assert similarity_preserving(S + 1, S).mean() > 1e-3
    first_row = (tables[0][0] - tables[1][0]).square().sum() / BATCH
    torch.testing.assert_close(similarity_preserving(S, T)[0], first_row)


def test_norm_and_direction_is_0_half_1_and_2():
    """Aligned and long enough, aligned at half the length, across, opposite."""
    directions = torch.tensor([[1.0, 0.0]])
    teacher = torch.tensor([[0.0, 2.0]]).expand(5, 2)
    student = torch.tensor([[7.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-4.0, 0.0], [0.0, 0.0]])
    zero = torch.zeros(5, dtype=torch.int64)
    assert norm_and_direction(student, teacher, directions, zero).tolist() == [0, 0.5, 1, 2, 1]
    nothing = norm_and_direction(torch.zeros(1, 2), torch.zeros(1, 2), directions, zero[:1])
    assert nothing.tolist() == [1]


def test_beyond_the_teachers_length_only_direction_has_a_gradient():
    for factor, radial in ((0.5, True), (2.0, False)):
        student = (factor * F.normalize(S, dim=1)).requires_grad_()
        loss = norm_and_direction(student, F.normalize(SAME, dim=1), DIRECTIONS, LABELS)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        along = (gradient * student).sum(1).abs()
        assert (along > 1e-3).all() if radial else (along < 1e-12).all()
        assert (gradient.norm(dim=1) > 1e-3).all()


def test_class_directions_are_the_normalised_means():
    directions = class_directions(T, LABELS, CLASSES)
    expected = torch.stack([F.normalize(T[c == LABELS].mean(0), dim=0) for c in range(CLASSES)])
    torch.testing.assert_close(directions, expected)
    with pytest.raises(ValueError, match="features"):
        class_directions(T, LABELS, CLASSES + 1)
    with pytest.raises(ValueError, match="labels"):
        class_directions(T, LABELS, CLASSES - 1)


def test_layers_feed_each_other_and_the_regressor():
    model = LayeredMLP(4, (3, 5, 2), 3, hint=(-2, 7)).double()
    logits, layers = model(S, return_layers=True)
    assert [h.shape[1] for h in layers] == [3, 5, 2]
    assert torch.equal(layers[0], model.layers[0](S))
    assert torch.equal(layers[2], model.layers[2](layers[1].relu()))
    assert torch.equal(logits, model.head(layers[2].relu()))
    plain, features = model(S, return_features=True)
    assert torch.equal(plain, logits)
    assert torch.equal(features, layers[2].relu())
    assert torch.equal(model(S, return_hint=True)[1], model.regressor(layers[1].relu()))
    assert torch.equal(model(S), logits)


def test_the_gain_decides_whether_signals_fade():
    """Of squared size gain² · ½ per layer after the first, on average over initial states."""
    x = random.normal(random.key(10), (20, 64))
    for gain in (1.0, 2**0.5):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = LayeredMLP(64, (512,) * 8, 3, gain=gain)(x, return_layers=True)[1]
        sizes = torch.stack([h.square().mean() for h in layers])
        expected = x.square().mean() * gain**2 * (gain**2 / 2) ** torch.arange(8)
        torch.testing.assert_close(sizes, expected, rtol=0.25, atol=0)
    with pytest.raises(ValueError, match="gain"):
        LayeredMLP(4, (3,), 2, gain=0.0)


N = 90
X = random.normal(random.key(20), (N, WIDTH), torch.float64)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
HINTS = X.tanh() @ random.normal(random.key(21), (WIDTH, TEACHER), torch.float64)
LOGITS = 3 * F.one_hot(Y, CLASSES).double() + 0.1 * random.normal(random.key(22), (N, CLASSES), torch.float64)
FIT: dict[str, Any] = {
    "hidden": (6, 6, 6),
    "guided": 1,
    "seeds": 2,
    "batch": 30,
    "optimiser": Adam(lr=5e-3),
    "progress": False,
    "device": "cpu",
}


def fitnets(steps, **options):
    return train_fitnets({"x": X, "y": Y}, LOGITS, HINTS, steps=steps, **FIT | options)


def test_the_first_stage_trains_only_up_to_the_guided_layer():
    begin, after = fitnets((0, 0)), fitnets((60, 0))
    names = after.layout.names
    before, now = (fleet.layout.views(fleet.parameters) for fleet in (begin, after))
    for name in names:
        above = name.startswith(("layers.2", "head"))
        assert torch.equal(before[name], now[name]) == above, name

    def error(model, batch, hyper):
        return hint(model(batch.x, return_hint=True)[1], batch.hint).mean()

    errors = [fleet.evaluate(error, {"x": X, "hint": HINTS}) for fleet in (begin, after)]
    assert (errors[1] < 0.6 * errors[0]).all()


def test_the_second_stage_is_cross_entropy_and_kd_with_a_falling_weight():
    """Against a loss written here; the control is the same loss from the initial state."""

    def loss(model, batch, hyper):
        logits = model(batch.x)
        weight = 4 - 3 * batch.progress
        soft = (batch.t / 3).softmax(1)
        kd = 9 * (soft * (soft.log() - (logits / 3).log_softmax(1))).sum(1)
        return F.cross_entropy(logits, batch.y, reduction="none") + weight * kd

    first = fitnets((20, 0))
    options: dict[str, Any] = {"steps": 20, "batch": 30, "optimiser": Adam(lr=5e-3), "progress": False, "device": "cpu"}
    data = {"x": X, "y": Y, "t": LOGITS}
    expected = train(first.build, loss, data, members=2, start=first, **options)
    torch.testing.assert_close(fitnets((20, 20)).parameters, expected.parameters, rtol=0, atol=1e-10)
    control = train(first.build, loss, data, members=2, **options)
    torch.testing.assert_close(fitnets((12, 8), stages=0).parameters, control.parameters, rtol=0, atol=1e-10)


def test_one_stage_adds_the_mean_squared_difference():
    def loss(model, batch, hyper):
        logits, regressed = model(batch.x, return_hint=True)
        distance = F.mse_loss(regressed, batch.t, reduction="none").mean(1)
        return F.cross_entropy(logits, batch.y, reduction="none") + 100 * distance

    options: dict[str, Any] = {"steps": 20, "batch": 30, "optimiser": Adam(lr=5e-3), "progress": False, "device": "cpu"}
    fleet = fitnets((12, 8), stages=1)
    expected = train(fleet.build, loss, {"x": X, "y": Y, "t": HINTS}, members=2, **options)
    torch.testing.assert_close(fleet.parameters, expected.parameters, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"stages": 3}, "stages"),
        ({"seeds": 0}, "seeds"),
        ({"temperature": 0.0}, "temperature"),
        ({"hint_weight": -1.0}, "hint_weight"),
        ({"kd_weights": (4.0, -1.0)}, "kd_weights"),
        ({"guided": 3}, "hint"),
    ],
)
def test_bad_training(options, name):
    with pytest.raises(ValueError, match=name):
        fitnets((1, 1), **options)


def test_bad_arguments():
    with pytest.raises(ValueError, match="student"):
        attention_transfer(S, SAME)
    with pytest.raises(ValueError, match="power"):
        attention_transfer(S[:, :, None], SAME[:, :, None], power=0.0)
    with pytest.raises(ValueError, match="student"):
        rkd_distance(S[:1], T[:1])
    with pytest.raises(ValueError, match="student"):
        rkd_angle(S[:2], T[:2])
    with pytest.raises(ValueError, match="labels"):
        norm_and_direction(S, SAME, DIRECTIONS, LABELS + 1)
    with pytest.raises(ValueError, match="hidden"):
        LayeredMLP(4, (), 3)
