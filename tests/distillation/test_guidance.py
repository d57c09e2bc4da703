"""Alignment of layers against Gram matrices, invariances and its null value; guided training against its definition."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.distillation.features import LayeredMLP
from toolkit.distillation.guidance import guide_layers, layerwise_cka, misalignment, train_guided
from toolkit.fleet import Adam, Fleet, train

BATCH, WIDTH = 12, 5
X = random.normal(random.key(1), (BATCH, WIDTH), torch.float64)
Y = random.normal(random.key(2), (BATCH, 7), torch.float64) + X[:, :1]
TURN = torch.linalg.qr(random.normal(random.key(3), (WIDTH, WIDTH), torch.float64))[0]


def gram(x):
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    return centre @ x @ x.mT @ centre


def test_alignment_is_the_cosine_of_centred_gram_matrices():
    expected = F.cosine_similarity(gram(X).flatten(), gram(Y).flatten(), dim=0)
    torch.testing.assert_close(layerwise_cka(X, Y), expected)
    torch.testing.assert_close(layerwise_cka(Y, X), expected)
    members = torch.stack([X, X.flip(0)])
    torch.testing.assert_close(layerwise_cka(members, Y)[0], expected)
    assert layerwise_cka(members, Y).shape == (2,)


def test_alignment_does_not_see_rotation_shift_and_scale():
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(layerwise_cka(X, -3 * X @ TURN + 2), one)
    torch.testing.assert_close(layerwise_cka(5 * X @ TURN - 1, Y), layerwise_cka(X, Y))
    stretched = X * torch.tensor([1.0, 1, 1, 1, 9], dtype=torch.float64)
    assert layerwise_cka(stretched, X) < 0.9
    assert layerwise_cka(X.flip(0), X) < 0.9


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_alignment_of_very_small_and_large_features(scale):
    value = layerwise_cka(scale * X.float(), Y.float())
    torch.testing.assert_close(value, layerwise_cka(X, Y).float(), rtol=0, atol=1e-5)


def test_a_layer_that_does_not_vary():
    flat = torch.ones(BATCH, 3, dtype=torch.float64, requires_grad=True)
    value = layerwise_cka(flat, Y)
    assert value.item() == 0
    assert torch.autograd.grad(value, flat)[0].abs().max() == 0


@pytest.mark.parametrize(("batch", "width"), [(64, 32), (64, 512), (512, 64)])
def test_independent_layers_seem_aligned_when_wide(batch, width):
    """p / (n - 1 + p) for Gaussian features."""
    draws = random.normal(random.key(4, width), (2, 6, batch, width))
    measured = layerwise_cka(draws[0], draws[1]).mean().item()
    assert measured == pytest.approx(width / (batch - 1 + width), abs=0.01)


def test_vmap_and_its_gradient_are_a_loop():
    members = random.normal(random.key(5), (3, BATCH, WIDTH), torch.float64)

    def loss(x):
        return misalignment([x, x.square(), x[:, :2]], [Y, X])

    torch.testing.assert_close(torch.vmap(loss)(members), torch.stack([loss(x) for x in members]), rtol=0, atol=1e-12)
    leaf = members.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(loss(x), leaf)[0][i] for i, x in enumerate(leaf)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(members), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(layerwise_cka, (X.clone().requires_grad_(), Y))


def test_layers_are_spread_over_the_target():
    assert guide_layers(3, 9) == {0: 0, 4: 1, 8: 2}
    assert guide_layers(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert guide_layers(2, 50) == {0: 0, 49: 1}
    assert guide_layers(5, 2) == {0: 2, 1: 4}  # 0, .25 and .5 (to even) fall on 0, the rest on 1
    assert guide_layers(3, 1) == {0: 2}


def test_guidance_is_the_sum_over_led_layers():
    layers = [X, Y, X.square(), Y.sin(), X.cos()]
    guides = [Y, X, X.exp()]
    expected = 3 - layerwise_cka(X, Y) - layerwise_cka(X.square(), X) - layerwise_cka(X.cos(), X.exp())
    torch.testing.assert_close(misalignment(layers, guides), expected)
    maps = [x[:, :4].unflatten(1, (2, 2)) for x in layers]
    flat = misalignment([x[:, :4] for x in layers], guides)
    torch.testing.assert_close(misalignment(maps, guides), flat)


def test_a_copy_of_the_guide_is_led_nowhere():
    layers = [x.clone().requires_grad_() for x in (X, Y, X.sin())]
    loss = misalignment(layers, [X, Y, X.sin()])
    assert abs(loss.item()) < 1e-12
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(loss, layers)) < 1e-12


N = 60
INPUTS = random.normal(random.key(20), (N, WIDTH), torch.float64)
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()
DATA = {"x": INPUTS, "y": LABELS}
FIT: dict[str, Any] = {"steps": 12, "batch": 20, "optimiser": Adam(lr=5e-3), "progress": False, "device": "cpu"}


def build():
    return LayeredMLP(WIDTH, (6, 6, 6, 6), 3).double()


def activations(fleet: Fleet):
    layers = fleet.evaluate(lambda model, batch, hyper: model(batch.x, return_layers=True)[1], {"x": INPUTS})
    return [layer[0] for layer in layers]


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


GUIDE = train(
    lambda: LayeredMLP(WIDTH, (8, 8), 3).double(), cross_entropy, DATA, members=1, seed=5, **FIT | {"steps": 0}
)


def test_guided_training_is_cross_entropy_plus_misalignment_and_leaves_the_guide():
    before = GUIDE.parameters.clone()
    fleet = train_guided(build, DATA, activations(GUIDE), alphas=[0.0, 0.7], seeds=2, **FIT)
    assert torch.equal(GUIDE.parameters, before)
    streams = torch.tensor([0, 1])
    alone = train(build, cross_entropy, DATA, streams=streams, **FIT)
    assert torch.equal(fleet.parameters[:2], alone.parameters)

    def loss(model, batch, hyper):
        logits, layers = model(batch.x, return_layers=True)
        lead = [h.detach() for h in batch.guide(batch.x, return_layers=True)[1]]
        away = 2 - layerwise_cka(layers[0], lead[0]) - layerwise_cka(layers[3], lead[1])
        return F.cross_entropy(logits, batch.y, reduction="none") + 0.7 * away

    pair = Fleet.of([GUIDE[0], GUIDE[0]], GUIDE.build)
    expected = train(build, loss, DATA, streams=streams, references={"guide": pair}, **FIT)
    torch.testing.assert_close(fleet.parameters[2:], expected.parameters, rtol=0, atol=1e-8)
    assert (fleet.parameters[2:] - alone.parameters).abs().amax() > 1e-2


def test_guidance_aligns_and_may_stop():
    layers = activations(GUIDE)
    options: dict[str, Any] = {"alphas": [0.0, 1.0], "seeds": 2} | FIT
    fleet = train_guided(build, DATA, layers, **options)

    def away(model, batch, hyper):
        return misalignment(model(batch.x, return_layers=True)[1], layers)

    alone, led = fleet.evaluate(away, {"x": INPUTS}).view(2, 2)
    assert (led < alone - 0.05).all()
    never = train_guided(build, DATA, layers, until=0.0, **options)
    assert torch.equal(never.parameters[2:], fleet.parameters[:2])
    half = train_guided(build, DATA, layers, until=0.5, snapshots=[6], **options)
    early = train_guided(build, DATA, layers, snapshots=[6], **options)
    assert torch.equal(half.at(6).parameters, early.at(6).parameters)
    assert not torch.equal(half.parameters[2:], early.parameters[2:])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"alphas": [-1.0]}, "alphas"),
        ({"alphas": []}, "alpha"),
        ({"until": 1.5}, "until"),
        ({"guide": [INPUTS]}, "guide"),
        ({"guide": [INPUTS, INPUTS[1:]]}, "guide"),
    ],
)
def test_bad_training(options, name):
    arguments: dict[str, Any] = {"guide": [INPUTS, INPUTS], "alphas": [1.0], "seeds": 1} | options
    with pytest.raises(ValueError, match=name):
        train_guided(build, DATA, **arguments, **FIT)


def test_bad_arguments():
    with pytest.raises(ValueError, match="target"):
        layerwise_cka(X[:2], Y[:2])
    with pytest.raises(ValueError, match="guide"):
        guide_layers(1, 4)
    with pytest.raises(ValueError, match="target"):
        guide_layers(4, 0)
