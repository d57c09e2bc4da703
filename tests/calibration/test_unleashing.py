"""Unleashing Mask: the loss by its gradient, masks by enumeration, the constraint by hand, UMAP against autograd."""

from itertools import combinations

import pytest
import torch
from torch import nn

from toolkit.calibration.losses import cross_entropy
from toolkit.calibration.unleashing import (
    estimated_constraint,
    flooding,
    mask_weights,
    random_scores,
    subnet_mask,
    unleash,
    unleash_by_mask,
    unleashing_study,
)
from toolkit.fleet import SGD, Fleet, train
from toolkit.models import MLP
from toolkit.random import key, normal


def net() -> MLP:
    return MLP(4, (6,), 3)


@pytest.fixture(scope="module")
def data():
    x = normal(key(0), (60, 4))
    return {"x": x, "y": (x[:, 0] > 0).long() + (x[:, 1] > 0).long()}


@pytest.fixture(scope="module")
def fleet(data):
    def loss(model, batch, hyper):
        return cross_entropy(model(batch.x), batch.y)

    return train(net, loss, data, members=2, steps=120, batch=20, optimiser=SGD(lr=0.5), device="cpu", progress=False)


def mean_ce(module: nn.Module, data) -> torch.Tensor:
    return nn.functional.cross_entropy(module(data["x"]), data["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flooding_is_plain_above_the_constraint_and_ascent_below_it(dtype):
    z = normal(key(1), (5, 3), dtype).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1])
    plain = cross_entropy(z, y).mean()
    (descent,) = torch.autograd.grad(plain, z)
    for shift, sign in ((-0.3, 1), (0.3, -1)):
        g = plain.item() + shift
        values = flooding(cross_entropy(z, y), g)
        assert values.shape == (5,)
        assert values.dtype == dtype
        (found,) = torch.autograd.grad(values.mean(), z)
        torch.testing.assert_close(found, sign * descent)
        assert values.mean().item() == pytest.approx(plain.item() if sign > 0 else 2 * g - plain.item(), rel=1e-5)
    assert flooding(cross_entropy(z, y), plain.item()).mean().item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(flooding(cross_entropy(z, y), 0.0).mean(), plain)  # g = 0: cross-entropy itself


def test_flooding_acts_on_the_batch_mean():
    values = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(flooding(values, 0.5), torch.tensor([0.5, 0.5]))
    by_example = ((values - 0.5).abs() + 0.5).mean()
    assert by_example == 1.0  # Jensen: at least the batch form, here twice as much
    rows, limits = normal(key(2), (4, 6)), torch.tensor([-1.0, 0.0, 0.5, 2.0])
    looped = [flooding(row, g) for row, g in zip(rows, limits, strict=True)]
    torch.testing.assert_close(torch.vmap(flooding)(rows, limits), torch.stack(looped))


def test_the_mask_keeps_the_share_of_largest_scores():
    scores = torch.tensor([[0.1, -5.0, 0.3], [-0.2, 4.0, 0.05]])
    assert subnet_mask(scores, 0.5).tolist() == [[0, 1, 1], [0, 1, 0]]
    assert subnet_mask(scores, 1.0).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert not subnet_mask(scores, 0.0).any()
    for keep, kept in ((0.965, 965), (0.8, 800), (0.7, 700), (0.1, 100)):  # the share that stays, not what goes
        assert subnet_mask(normal(key(3), (40, 25)), keep).sum() == kept
    assert subnet_mask(torch.ones(5), 0.8).tolist() == [0, 1, 1, 1, 1]  # 0.2 * 5 is 1, whatever rounding says
    rows = normal(key(4), (3, 7))
    torch.testing.assert_close(
        torch.vmap(lambda s: subnet_mask(s, 0.6))(rows), torch.stack([subnet_mask(s, 0.6) for s in rows])
    )


def test_the_gradient_passes_through_the_mask_as_through_the_size_of_the_score():
    scores, weight = normal(key(5), (3, 4), torch.float64).requires_grad_(), normal(key(6), (3, 4), torch.float64)
    (found,) = torch.autograd.grad((subnet_mask(scores, 0.5) * weight).sum(), scores)
    torch.testing.assert_close(found, weight * scores.sign())


def test_a_random_mask_keeps_each_subset_equally_often():
    """Over all subsets of 3 of 4 inputs a linear layer's mean output is 3/4 of its own; the random masks hit each."""
    weight, x = normal(key(7), (1, 4), torch.float64), normal(key(8), (4,), torch.float64)
    subsets = [
        torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(c), 1.0) for c in combinations(range(4), 3)
    ]
    mean = torch.stack([(weight * mask) @ x for mask in subsets]).mean(0)
    torch.testing.assert_close(mean, 0.75 * weight @ x)
    drawn = torch.vmap(lambda s: subnet_mask(s, 0.75))(normal(key(9), (4000, 4)))
    shares = torch.stack([(drawn == mask).all(1).float().mean() for mask in subsets])
    assert shares.sum() == 1
    assert (shares - 0.25).abs().max() < 0.03


def test_masked_fleet_has_masked_matrices_and_its_own_biases(fleet):
    scores = random_scores(fleet)
    assert scores.min() > 0
    assert scores.max() < 1
    assert not torch.equal(scores[0], scores[1])
    torch.testing.assert_close(random_scores(fleet[[1]])[0], scores[1])  # a member's scores are its own
    masked = mask_weights(fleet, scores, 0.75)
    views = fleet.layout.views(scores)
    for i in range(2):
        whole, part = dict(fleet[i].named_parameters()), dict(masked[i].named_parameters())
        for name, value in whole.items():
            if value.ndim == 1:
                torch.testing.assert_close(part[name], value)
                continue
            own = views[name][i].flatten()
            kept = own >= own.sort(descending=True).values[round(0.75 * own.numel()) - 1]
            torch.testing.assert_close(part[name].flatten(), torch.where(kept, value.flatten(), 0.0))


def test_constraint_is_the_training_loss_under_the_mask(fleet, data):
    whole = torch.stack([mean_ce(module, data) for module in (fleet[0], fleet[1])]).detach()
    torch.testing.assert_close(estimated_constraint(fleet, data, 1.0), whole)
    masked = mask_weights(fleet, random_scores(fleet, 3), 0.6)
    expected = torch.stack([mean_ce(masked[i], data) for i in range(2)]).detach()
    torch.testing.assert_close(estimated_constraint(fleet, data, 0.6, seed=3), expected)
    assert (expected > whole).all()
    constant = nn.functional.cross_entropy(fleet[1].head.bias.expand(60, 3), data["y"]).detach()  # biases are left
    torch.testing.assert_close(estimated_constraint(mask_weights(fleet, random_scores(fleet), 0.0), data)[1], constant)
    own = {"y": torch.stack([data["y"], (data["y"] + 1) % 3])}
    assert estimated_constraint(fleet, data, 1.0, member_data=own)[1] > 2 * whole[1]


def test_first_step_of_um_goes_up_or_down(fleet, data):
    """One full-batch SGD step by hand: weights minus lr times sign(l - g) times the gradient plus weight decay."""
    for g, sign in ((0.0, 1.0), (5.0, -1.0)):
        tuned = unleash(fleet, data, g, steps=1, batch=60, lr=0.1)
        module = fleet[1]
        gradients = torch.autograd.grad(mean_ce(module, data), list(module.parameters()))
        expected = [p - 0.1 * (sign * d + 1e-4 * p) for p, d in zip(module.parameters(), gradients, strict=True)]
        for found, value in zip(tuned[1].parameters(), expected, strict=True):
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5)


def test_um_comes_to_its_constraint(fleet, data):
    goals = torch.tensor([0.35, 0.5])
    tuned = unleash(fleet, data, goals, steps=150, batch=60, lr=0.1)
    torch.testing.assert_close(estimated_constraint(tuned, data, 1.0), goals, atol=0.03, rtol=0)


def test_first_step_of_umap_by_hand(fleet, data):
    before = unleash_by_mask(fleet, data, 0.0, 0.7, steps=1, batch=60, lr=0.0)
    after = unleash_by_mask(fleet, data, 0.0, 0.7, steps=1, batch=60, lr=0.2)
    weights, scores = dict(fleet[0].named_parameters()), dict(before[0].named_parameters())
    leaves = {name: value.detach().clone().requires_grad_() for name, value in scores.items()}
    masked = {n: w.detach() * subnet_mask(leaves[n], 0.7) if w.ndim > 1 else w.detach() for n, w in weights.items()}
    logits = torch.func.functional_call(net(), masked, (data["x"],))
    loss = nn.functional.cross_entropy(logits, data["y"])
    gradients = torch.autograd.grad(loss, [leaves[n] for n in scores], allow_unused=True)
    for (name, value), gradient in zip(scores.items(), gradients, strict=True):
        step = torch.zeros_like(value) if gradient is None else gradient
        expected = value - 0.2 * (step + 1e-4 * value)
        torch.testing.assert_close(dict(after[0].named_parameters())[name], expected, atol=1e-6, rtol=1e-5)


def test_umap_leaves_the_weights_alone_and_comes_to_its_constraint(fleet, data):
    before = fleet.parameters.clone()
    scores = unleash_by_mask(fleet, data, 0.45, 0.6, steps=150, batch=60, lr=0.3)
    torch.testing.assert_close(fleet.parameters, before, atol=0, rtol=0)
    detector = mask_weights(fleet, scores.parameters, 0.6)
    assert ((detector.parameters == fleet.parameters) | (detector.parameters == 0)).all()
    start = estimated_constraint(fleet, data, 0.6)
    found = estimated_constraint(detector, data, 1.0)
    assert ((found - 0.45).abs() < 0.15).all()
    assert ((found - 0.45).abs() < (start - 0.45).abs()).all()
    # only the kept set counts: other scores in the same order give the same detector
    torch.testing.assert_close(mask_weights(fleet, scores.parameters.square() * 3, 0.6).parameters, detector.parameters)


def test_detection_falls_after_its_peak_and_comes_back():
    study = unleashing_study(seeds=2)
    assert study.auroc.shape == study.accuracy.shape == (len(study.steps), 2)
    assert study.methods == ("final", "plain", "UM", "UMAP")
    torch.testing.assert_close(study.auroc[-1], study.method_auroc[0])
    torch.testing.assert_close(study.accuracy[-1], study.method_accuracy[0])
    middle = study.auroc[study.steps.index(34)]
    assert (middle > study.auroc[-1] + 0.04).all()
    assert (middle > study.auroc[0] + 0.02).all()
    assert (study.method_auroc[2] > study.method_auroc[1] + 0.04).all()  # UM against plain fine-tuning
    assert (study.constraint > study.training_loss[-1]).all()
    one = unleashing_study(seeds=1)
    torch.testing.assert_close(one.auroc[:, 0], study.auroc[:, 0], atol=1e-3, rtol=0)  # members are independent


def test_bad_input_is_named(fleet, data):
    with pytest.raises(ValueError, match="keep: expected"):
        subnet_mask(torch.ones(3), 1.2)
    with pytest.raises(ValueError, match="keep: expected"):
        unleash_by_mask(fleet, data, 0.1, -0.1)
    with pytest.raises(ValueError, match="scores: expected one per parameter"):
        mask_weights(fleet, torch.ones(2, 3), 0.5)
    assert isinstance(mask_weights(fleet, random_scores(fleet), 1.0), Fleet)
