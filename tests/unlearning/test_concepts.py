"""Concepts against least squares, optimality conditions, completeness, and poisoning against a plain gradient step."""

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from toolkit.fleet import SGD, Adam, Fleet, train
from toolkit.models import MLP
from toolkit.unlearning.concepts import (
    concept_direction,
    concept_head,
    concept_poisoning,
    integrated_gradients,
    patch_concepts,
    poison,
    rank_concepts,
)

N, SIDE, CLASSES = 36, 4, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Y = torch.arange(N) % CLASSES
X = (draw(CLASSES, SIDE * SIDE, seed=1)[Y] + 0.5 * draw(N, SIDE * SIDE, seed=2)).reshape(N, 1, SIDE, SIDE)
FORGET = Y == 1
DATA = {"x": X, "y": Y}


def net() -> MLP:
    return MLP(SIDE * SIDE, (8,), CLASSES).double()


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    options: dict[str, Any] = {"steps": 60, "batch": 12, "optimiser": Adam(0.02), "progress": False, "device": "cpu"}
    return train(net, loss, DATA, members=2, **options)


def test_direction_is_weighted_ridge_regression():
    features, present = draw(30, 5) + 2, torch.arange(30) % 5 == 0
    got = concept_direction(features, present, 0.1)
    share = torch.where(present, 1 / present.sum(), 1 / (~present).sum()).double() / 2
    middle = (features[present].mean(0) + features[~present].mean(0)) / 2
    centred = features - middle
    size = 0.1 * (share[:, None] * centred.square()).sum(0).mean()
    rows = torch.cat([share.sqrt()[:, None] * centred, size.sqrt() * torch.eye(5, dtype=features.dtype)])
    signs = torch.cat([share.sqrt() * torch.where(present, 1.0, -1.0), torch.zeros(5)]).double()
    normal = torch.linalg.lstsq(rows, signs[:, None]).solution[:, 0]
    torch.testing.assert_close(got, normal / normal.norm())
    torch.testing.assert_close(concept_direction(features, ~present, 0.1), -got)
    torch.testing.assert_close(concept_direction(3 * features - 1, present, 0.1), got)


def test_direction_is_the_planted_one_and_vmaps():
    features, present = draw(4000, 3), torch.arange(4000) % 2 == 0
    features[:, 1] += 2 * present
    got = concept_direction(features, present)
    assert got[1] > 0.998
    assert not concept_direction(torch.ones(8, 3), torch.arange(8) > 3).any()
    both = torch.stack([features[:50], features[50:100]])
    torch.testing.assert_close(
        vmap(concept_direction, (0, None))(both, present[:50])[1], concept_direction(both[1], present[:50])
    )


def test_patches_are_orthonormal_and_found_where_the_class_differs():
    images, present = draw(300, 2, 4, 6), torch.arange(300) % 3 == 0
    images[present, 1, 3, 2] += 3.0  # row 3, column 2: the second of three squares in the lower row
    directions = patch_concepts(images, present, 2)
    assert directions.shape == (6, 48)
    torch.testing.assert_close(directions @ directions.mT, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)
    inside = directions.reshape(6, 2, 4, 6)[4]
    assert not inside[:, :2].any()
    assert not inside[..., :2].any()
    assert not inside[..., 4:].any()
    assert inside[1, 3, 2] > 0.95
    scores = images.flatten(1) @ directions.mT
    gap = scores[present].mean(0) - scores[~present].mean(0)
    assert gap.argmax() == 4


def test_head_meets_the_optimality_conditions():
    scores, labels, sparsity = draw(80, 6), torch.arange(80) % 3, 0.05
    scores[:, 0] += labels == 0
    scores[:, 1] -= 2.0 * (labels == 2)
    weights, biases = concept_head(scores, labels, 3, sparsity, iterations=3000)
    error = (scores @ weights.mT + biases).softmax(-1) - F.one_hot(labels, 3)
    slope = error.mT @ scores / 80
    active = weights != 0
    assert 0 < active.sum() < 18
    torch.testing.assert_close(slope[active], -sparsity * weights[active].sign(), atol=1e-7, rtol=0)
    assert slope[~active].abs().max() <= sparsity + 1e-7
    assert error.mean(0).abs().max() < 1e-7
    assert not concept_head(scores, labels, 3, 1.0)[0].any()
    assert rank_concepts(weights, 0)[0] == 0
    assert rank_concepts(weights, 2)[-1] == 1


def test_head_without_penalty_is_logistic_regression():
    scores, labels = draw(60, 3), torch.arange(60) % 2
    weights, biases = concept_head(scores, labels, 2, 0.0, iterations=4000)
    error = (scores @ weights.mT + biases).softmax(-1) - F.one_hot(labels, 2)
    assert (error.mT @ scores / 60).abs().max() < 1e-8


def test_integrated_gradients_are_complete_and_exact_where_known():
    x, baseline = draw(5, 3), draw(3, seed=1)

    def cubic(z):
        return z[:, 0].pow(3) + 2 * z[:, 1] * z[:, 2]

    got = integrated_gradients(cubic, x, baseline, points=400)
    torch.testing.assert_close(got.sum(1), cubic(x) - cubic(baseline[None]), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[:, 0], x[:, 0].pow(3) - baseline[0].pow(3), atol=1e-4, rtol=0)
    step = x - baseline
    product = 2 * step[:, 1] * (baseline[2] + step[:, 2] / 2)  # ∫ 2 (b + t s) dt
    torch.testing.assert_close(got[:, 1], product)
    slope = draw(3, seed=2)
    torch.testing.assert_close(integrated_gradients(lambda z: z @ slope, x, baseline, points=1), step * slope)


def test_integrated_gradients_of_a_net_are_complete(fleet):
    module = fleet[0]
    got = integrated_gradients(lambda z: module(z)[:, 1], X, X.mean(0), points=2000)
    with torch.no_grad():
        wanted = module(X)[:, 1] - module(X.mean(0)[None])[:, 1]
    torch.testing.assert_close(got.flatten(1).sum(1), wanted, atol=2e-3, rtol=0)


def test_poison_swaps_the_concept_and_nothing_else():
    x, donors = draw(7, 6), draw(7, 6, seed=1)
    basis = torch.linalg.qr(draw(6, 6, seed=2)).Q.mT
    got = poison(x, donors, basis[:2])
    torch.testing.assert_close(got @ basis[:2].mT, donors @ basis[:2].mT)
    torch.testing.assert_close(got @ basis[2:].mT, x @ basis[2:].mT)
    by_hand = x - (x @ basis[0])[:, None] * basis[0] + (donors @ basis[0])[:, None] * basis[0]
    torch.testing.assert_close(poison(x, donors, basis[:1]), by_hand)
    torch.testing.assert_close(poison(x, donors, basis), donors)
    assert torch.equal(poison(x, donors, basis[:0]), x)


def donor_class(fleet: Fleet, member: int) -> int:
    mean = fleet[member](X[FORGET]).softmax(-1).mean(0).detach()
    return max((k for k in range(CLASSES) if k != 1), key=lambda k: float(mean[k]))


def test_targeted_poisoning_takes_the_step_of_its_objective(fleet):
    """Without a direction x' = x, and the step is that of relabelling to the donor class."""
    weight = torch.tensor([0.5, 1.7], dtype=torch.float64)
    none = torch.zeros(1, SIDE * SIDE, dtype=torch.float64)
    pairs = int(FORGET.sum()) * int((~FORGET).sum())
    options: dict[str, Any] = {"steps": 1, "batch": pairs, "optimiser": SGD(0.1)}
    got = concept_poisoning(fleet, DATA, FORGET, none, retain_weight=weight, **options)
    for member in range(2):
        module, target = fleet[member], donor_class(fleet, member)
        start = {name: p.detach() for name, p in module.named_parameters()}

        def value(parameters, module=module, target=target, member=member):
            def model(x):
                return functional_call(module, parameters, (x,))

            lost = F.cross_entropy(model(X[FORGET]), torch.full((int(FORGET.sum()),), target))
            return lost + weight[member] * F.cross_entropy(model(X[~FORGET]), Y[~FORGET])

        slope = grad(value)(start)
        wanted = torch.cat([(start[name] - 0.1 * slope[name]).flatten() for name in start])
        torch.testing.assert_close(got.parameters[member], wanted)


def test_donors_are_of_the_donor_class_and_kept(fleet):
    """One donor only: with the whole space as concept every poisoned example is that donor, so the step is known."""
    retain = ~FORGET
    target = donor_class(fleet, 0)
    single = retain & ((~torch.eq(Y, target)) | (torch.arange(N) == int(torch.eq(Y, target).nonzero()[0, 0])))
    donor = X[single & torch.eq(Y, target)]
    one = fleet[[0]]
    pairs = int(FORGET.sum()) * int(single.sum())
    options: dict[str, Any] = {"steps": 1, "batch": pairs, "optimiser": SGD(0.1), "retain_weight": 0.0}
    whole = torch.eye(SIDE * SIDE, dtype=torch.float64)
    got = concept_poisoning(one, DATA, FORGET, whole, retain=single, **options)
    module = one[0]
    F.cross_entropy(module(donor), torch.tensor([target])).backward()
    wanted = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(got.parameters[0], wanted)


def accuracy(fleet: Fleet, mask: torch.Tensor) -> torch.Tensor:
    return (fleet.logits(X[mask]).argmax(-1) == Y[mask]).double().mean()


@pytest.mark.parametrize("labels", ["random", "targeted"])
def test_the_class_is_forgotten_and_the_others_stay(fleet, labels):
    directions = patch_concepts(X, FORGET, 4)  # one square: a single direction of the image
    options: dict[str, Any] = {"labels": labels, "steps": 60, "batch": 12, "optimiser": Adam(0.01)}
    after = concept_poisoning(fleet, DATA, FORGET, torch.zeros_like(directions), **options)
    assert accuracy(fleet, FORGET) == 1
    assert accuracy(after, FORGET) < 0.3
    assert accuracy(after, ~FORGET) > 0.85
    alone = concept_poisoning(fleet[[1]], DATA, FORGET, directions, **options)
    together = concept_poisoning(fleet, DATA, FORGET, directions, **options)
    torch.testing.assert_close(alone.parameters[0], together.parameters[1])
    assert not torch.allclose(together.parameters, after.parameters)


def test_a_donor_under_its_own_label_teaches_nothing(fleet):
    """All directions: the poisoned example is the donor, whose class is its label."""
    whole = torch.eye(SIDE * SIDE, dtype=torch.float64)
    after = concept_poisoning(fleet, DATA, FORGET, whole, steps=60, batch=12, optimiser=Adam(0.01))
    assert accuracy(after, FORGET) > 0.8


def test_random_labels_are_wrong_ones(fleet):
    """A model that is certain of the true class is never trained towards it: its logit falls in one step."""
    directions = torch.zeros(1, SIDE * SIDE, dtype=torch.float64)
    options: dict[str, Any] = {"labels": "random", "retain_weight": 0.0, "optimiser": SGD(0.05), "batch": 9 * 27}
    after = concept_poisoning(fleet, DATA, FORGET, directions, steps=1, **options)
    before = fleet.probabilities(X[FORGET])[..., 1].mean(1)
    assert bool((after.probabilities(X[FORGET])[..., 1].mean(1) < before).all())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda f: concept_poisoning(f, DATA, FORGET, torch.zeros(1, 3).double()), "directions"),
        (lambda f: concept_poisoning(f, DATA, FORGET, 2 * torch.eye(16).double()), "directions"),
        (lambda f: concept_poisoning(f, DATA, FORGET, torch.ones(2, 16).double() / 4), "directions"),
        (lambda f: concept_poisoning(f, DATA, Y > 9, torch.eye(16).double()), "forget"),
        (lambda f: concept_poisoning(f, DATA, torch.arange(N) < 8, torch.eye(16).double()), "retain"),
        (lambda f: patch_concepts(X, FORGET, 3), "patch"),
        (lambda f: patch_concepts(X, Y > 9, 2), "present"),
        (lambda f: concept_head(draw(4, 2), torch.arange(4), 3), "labels"),
        (lambda f: concept_head(draw(4, 2), torch.arange(4), 4, -1.0), "sparsity"),
        (lambda f: rank_concepts(draw(3, 2), 3), "target"),
        (lambda f: integrated_gradients(torch.sum, draw(3, 2), draw(2), 0), "points"),
        (lambda f: concept_direction(draw(4, 2), torch.arange(4) > 1, 0.0), "ridge"),
    ],
)
def test_bad_input_is_named(fleet, call, name):
    with pytest.raises(ValueError, match=name):
        call(fleet)
