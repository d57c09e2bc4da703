"""Matching losses against closed forms and brute force; distilled images against what they were distilled for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic_cases import CLASSES, DATA, INPUTS, N, X, Y, build, cross_entropy, normal

from toolkit import random
from toolkit.data import digits
from toolkit.distillation.synthetic import (
    Synthetic,
    distribution_matching_loss,
    draw_classes,
    gradient_matching_loss,
    initial_points,
    match_distributions,
    match_gradients,
    outputs,
    random_nets,
)
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.members import Layout
from toolkit.models import MLP, ConvNet


def test_gradient_matching_by_hand():
    real = [torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0]])]
    fake = [torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 1.0]]), torch.tensor([[4.0, 3.0]])]
    assert gradient_matching_loss(real, fake).item() == pytest.approx(0 + 2 + 0 + (1 - 24 / 25))
    assert gradient_matching_loss(real, [7 * g for g in real]).item() == pytest.approx(0, abs=1e-6)
    batched = gradient_matching_loss([g[None].expand(4, -1, -1) for g in real], [g.expand(4, -1, -1) for g in fake])
    assert batched.shape == (4,)
    torch.testing.assert_close(torch.vmap(lambda a, b: gradient_matching_loss([a], [b]))(*batch_of_gradients()), loop())


def batch_of_gradients():
    return normal(3, 5, 4, 6), normal(4, 5, 4, 6)


def loop():
    pairs = zip(*batch_of_gradients(), strict=True)
    rows = [torch.stack([F.cosine_similarity(p, q, dim=0) for p, q in zip(a, b, strict=True)]) for a, b in pairs]
    return (1 - torch.stack(rows)).sum(1)


def test_the_gradient_of_gradient_matching_is_finite_in_single_precision_where_gradients_vanish():
    fake = torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(gradient_matching_loss([torch.tensor([[0.0] * 3, [1e-9] * 3])], [fake]), fake)
    assert slope.isfinite().all()
    own, other = normal(5, 4, 3), normal(6, 4, 3)
    assert torch.autograd.gradcheck(lambda g: gradient_matching_loss([own], [g]), other.requires_grad_())


def test_distribution_matching_has_its_closed_form_gradient_for_a_linear_map():
    """-2/n_c AᵀA (mean_real - mean_syn) for each point of class c."""
    a = normal(7, 4, INPUTS)
    real, fake = normal(8, CLASSES, 9, INPUTS), normal(9, CLASSES, 2, INPUTS).requires_grad_()
    (slope,) = torch.autograd.grad(distribution_matching_loss(real @ a.T, fake @ a.T), fake)
    apart = real.mean(1) - fake.mean(1)
    expected = -(apart @ a.T @ a)[:, None].expand_as(fake)  # 2 / n_c with n_c = 2
    torch.testing.assert_close(slope, expected.detach(), rtol=0, atol=1e-12)
    value = distribution_matching_loss(real @ a.T, fake @ a.T)
    torch.testing.assert_close(value, (apart @ a.T @ a * apart).sum())
    assert distribution_matching_loss(real, real.flip(1)).item() == pytest.approx(0, abs=1e-25)
    assert distribution_matching_loss(real.expand(4, *real.shape), fake.expand(4, *fake.shape)).shape == (4,)


def test_the_real_set_itself_has_loss_0_in_one_iteration():
    """One real example of each class, all that there is: real and synthetic batches are the same."""
    tiny = {"x": X[:CLASSES], "y": Y[:CLASSES]}
    for match in (match_gradients, match_distributions):
        result = match(tiny, build, start="real", iterations=1, nets=3, batch=4, snapshots=(0,))
        torch.testing.assert_close(result.snapshots[0], tiny["x"])
        assert result.history[0].item() == pytest.approx(0, abs=1e-12)
        assert match(DATA, build, start="noise", iterations=1).history[0] > 0.1


def test_the_first_loss_of_gradient_matching_is_that_of_a_loop_over_nets_and_classes():
    tiny = {"x": X[:CLASSES], "y": Y[:CLASSES]}
    result = match_gradients(tiny, build, start="noise", per_class=2, iterations=1, nets=3, batch=1, snapshots=(0,))
    fakes, total = result.snapshots[0], 0.0
    for net in nets_of(3):
        for label in range(CLASSES):
            grads = []
            for x in (tiny["x"][label : label + 1], fakes[2 * label : 2 * label + 2]):
                loss = F.cross_entropy(net(x), torch.full((len(x),), label))
                grads.append(torch.autograd.grad(loss, [p for p in net.parameters() if p.ndim > 1]))
            for a, b in zip(*grads, strict=True):
                rows = 1 - F.cosine_similarity(a, b, dim=1)
                total += float(rows[a.abs().sum(1) > 0].sum()) / 3
    assert result.history[0].item() == pytest.approx(total, rel=1e-10)


def nets_of(nets, iteration=0):
    """The random nets of an iteration: a fleet that is not trained."""
    flat = random_nets(build, Layout.of(build()), 0, iteration, nets, X)
    fleet = Fleet(build, flat)
    return [fleet[i] for i in range(nets)]


def test_the_first_loss_of_distribution_matching_is_that_of_a_loop():
    tiny = {"x": X[:CLASSES], "y": Y[:CLASSES]}
    result = match_distributions(tiny, build, start="noise", per_class=2, iterations=1, nets=3, snapshots=(0,))
    total = 0.0
    for net in nets_of(3):
        for label in range(CLASSES):
            fake = net(result.snapshots[0][2 * label : 2 * label + 2], return_features=True)[1]
            real = net(tiny["x"][label : label + 1], return_features=True)[1]
            total += float((fake.mean(0) - real.mean(0)).detach().square().sum()) / 3
    assert result.history[0].item() == pytest.approx(total, rel=1e-10)


def test_nets_are_fresh_in_each_iteration_or_kept_and_trained():
    first, second = (torch.cat([p.flatten() for p in nets_of(1, i)[0].parameters()]) for i in (0, 1))
    assert (first - second).abs().max() > 0.1
    fixed = match_gradients(DATA, build, iterations=4, updates=4, net_steps=0, lr=1e-9, batch=400)
    assert (fixed.history[1:] / fixed.history[0] - 1).abs().max() < 0.1  # the same nets, other real batches
    moved = match_gradients(DATA, build, iterations=4, updates=4, net_steps=40, net_lr=0.5, lr=1e-9, batch=400)
    assert moved.history[0] == fixed.history[0]
    assert (moved.history[3] - fixed.history[3]).abs() > 0.1


def test_images_start_as_noise_as_examples_or_as_cluster_centres():
    images, labels = initial_points(X, Y, CLASSES, 2, "real", 0)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, label in zip(images, labels, strict=True):
        assert int(((image == X).all(1) & (label == Y)).sum()) == 1
    assert not torch.equal(images[0], images[1])
    means, _ = initial_points(X, Y, CLASSES, 1, "clusters", 0)
    torch.testing.assert_close(means, torch.stack([X[label == Y].mean(0) for label in range(CLASSES)]))
    noise, _ = initial_points(X, Y, CLASSES, 2000, "noise", 0)
    assert abs(noise.mean()) < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    two, _ = initial_points(
        torch.tensor([[0.0], [1.0], [9.0], [11.0], [5.0]]), torch.tensor([0, 0, 0, 0, 1]), 2, 1, "clusters", 0
    )
    assert two.flatten().tolist() == [5.25, 5.0]
    for seed in range(3):  # two clear clusters are found from any start
        line = torch.tensor([[0.0], [1.0], [9.0], [11.0], [20.0], [30.0]])
        centres, _ = initial_points(line, torch.tensor([0, 0, 0, 0, 1, 1]), 2, 2, "clusters", seed)
        assert sorted(centres.flatten().tolist()) == [0.5, 10.0, 20.0, 30.0]


def test_real_batches_hold_their_class():
    index = draw_classes(Y, CLASSES, 50, random.key(1))
    assert (Y[index] == torch.arange(CLASSES)[:, None]).all()
    assert len(index[0].unique()) > 15
    assert not torch.equal(index, draw_classes(Y, CLASSES, 50, random.key(2)))


def test_other_nets_than_mlps():
    x = normal(13, 12, 1, 4, 4)
    data = {"x": x, "y": torch.arange(12) % 2}

    def convolution():
        return ConvNet(1, (2, 3), 2).double()

    for match in (match_gradients, match_distributions):
        result = match(data, convolution, iterations=2, nets=2, batch=4)
        assert result.x.shape == (2, 1, 4, 4)
        assert result.history.isfinite().all()
    fleet = train(convolution, cross_entropy, data, members=2, steps=1, progress=False, device="cpu")
    logits, _ = outputs(fleet[0], fleet.layout.views(fleet.parameters), x.expand(2, *x.shape))
    torch.testing.assert_close(logits, fleet.logits(x))


def test_ten_digits_teach_more_than_ten_examples():
    """Growing from noise, by gradients and by distributions; snapshots are moments of the same run."""
    digit = digits()
    data = {"x": digit.x[:1000], "y": digit.y[:1000]}

    def net():
        return MLP(64, (32,), 10)

    def accuracy(x, y):
        fit: dict[str, Any] = {"members": 8, "steps": 120, "batch": len(y), "device": "cpu", "progress": False}
        fleet = train(net, cross_entropy, {"x": x, "y": y}, optimiser=Adam(lr=5e-3), seed=7, **fit)
        return (fleet.logits(digit.x[1000:]).argmax(-1) == digit.y[1000:]).double().mean()

    real, labels = initial_points(data["x"], data["y"], 10, 1, "real", 0)
    base = accuracy(real, labels)
    for match, seen in ((match_gradients, 40), (match_distributions, 50)):
        result = match(data, net, iterations=seen, nets=2, batch=32, lr=0.2, snapshots=(0, 10, seen))
        assert list(result.snapshots) == [0, 10, seen]
        assert torch.equal(result.snapshots[seen], result.x)
        assert torch.equal(match(data, net, iterations=10, nets=2, batch=32, lr=0.2).x, result.snapshots[10])
        grown = [accuracy(images, result.y) for images in result.snapshots.values()]
        assert grown[0] < base < grown[2] - 0.05
        assert grown[2] > grown[1] > grown[0]


def test_a_synthetic_set_is_data_for_training():
    result = Synthetic(X[:3], Y[:3], {}, X.new_zeros(0))
    assert set(result.as_dict()) == {"x", "y"}
    assert len(train(build, cross_entropy, result, members=2, steps=1, progress=False)) == 2


def test_bad_input():
    for match in (match_gradients, match_distributions):
        for name in ("per_class", "iterations", "nets", "batch"):
            wrong: dict[str, Any] = {name: 0}
            with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
                match(DATA, build, **wrong)
        with pytest.raises(ValueError, match="lr: expected a number greater than 0"):
            match(DATA, build, lr=0.0)
        with pytest.raises(ValueError, match="snapshots: expected iterations from 0 to 3, got"):
            match(DATA, build, iterations=3, snapshots=(4,))
        with pytest.raises(ValueError, match="two classes without gaps"):
            match({"x": X, "y": Y * 2}, build)
        with pytest.raises(ValueError, match="logits"):
            match({"x": X, "y": torch.arange(N) % 5}, build)
        with pytest.raises(ValueError, match="'y'"):
            match({"x": X}, build)
        with pytest.raises(ValueError, match="finite"):
            match({"x": X / 0, "y": Y}, build)
        with pytest.raises(ValueError, match="per_class: expected at most 20"):
            match(DATA, build, per_class=21, start="real")
    for name in ("updates", "net_steps", "net_lr"):
        wrong = {name: -1.0 if name == "net_lr" else -1}
        with pytest.raises(ValueError, match=name):
            match_gradients(DATA, build, **wrong)
    with pytest.raises(ValueError, match="shapes"):
        gradient_matching_loss([X], [X, X])
    with pytest.raises(ValueError, match="shapes"):
        gradient_matching_loss([], [])
    with pytest.raises(ValueError, match="one example of each class"):
        distribution_matching_loss(X[None], X[None, :0])
