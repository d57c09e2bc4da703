"""The bug museum: solutions against the toolkit, autograd and loops; the mistakes against the public code's lines."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from toolkit import fleet, models, random
from toolkit.exercises import EXERCISES, museum
from toolkit.unlearning.attacks import membership_scores
from toolkit.unlearning.distances import klom
from toolkit.unlearning.label_free import extraction
from toolkit.unlearning.losses import bad_teaching, distillation
from toolkit.unlearning.no_retain import gaussians
from toolkit.unlearning.parts import Masked, cross_entropy, nearest_other_class, prepare

SEEDS = range(4)
PUBLIC = {
    "histogram-klom": "drops the largest",
    "masked-sgd": "gradient only",
    "modified-entropy": "both public mistakes",
    "duck-target": "row for class",
    "bad-teacher-loss": "mean over classes",
    "laf-loss": "all data",
    "scar-shrinkage": "twice",
    "scrub-step": "nothing moves",
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def public(name: str):
    """The mistaken function of an exhibit."""
    return EXERCISES[name].misconceptions[PUBLIC[name]][0]


@pytest.mark.parametrize("bins", [3, 10, 20])
@pytest.mark.parametrize("seed", SEEDS)
def test_klom_against_the_toolkit(seed, bins) -> None:
    unlearned, oracle = normal(seed, 100, 3) + 0.3, normal(seed + 10, 60, 3)
    found = [museum.klom_of_example(u, o, bins) for u, o in zip(unlearned.T, oracle.T, strict=True)]
    assert found == pytest.approx(klom(unlearned, oracle, bins=bins).tolist(), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_klom_that_loses_the_largest_is_the_public_one(seed) -> None:
    unlearned, oracle = normal(seed, 100) + 0.5, normal(seed + 10, 100)
    both = torch.cat([unlearned, oracle])
    edges = np.linspace(both.min().item(), both.max().item(), 21)
    p, q = (
        np.array([(np.digitize(values.numpy(), edges) == index).sum() for index in range(1, 21)]) / 100
        for values in (unlearned, oracle)
    )
    assert p.sum() + q.sum() == pytest.approx(1.99)
    oracle_value = stats.entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q))
    assert public("histogram-klom")(unlearned, oracle, 20).item() == pytest.approx(oracle_value, rel=1e-3)
    assert museum.klom_of_example(unlearned, oracle, 20) != pytest.approx(oracle_value, rel=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_step_against_the_toolkit(seed) -> None:
    """Several steps, as the toolkit's optimiser makes them for one member."""
    start, mask = normal(seed, 12), random.uniform(random.key(seed + 20), (12,)) < 0.5
    optimiser = Masked(fleet.SGD(0.1, momentum=0.9, weight_decay=0.3), mask)
    parameters = start[None].clone()
    state = optimiser.initial(parameters)
    found, velocity = start, torch.zeros(12, dtype=torch.float64)
    rate, decay = torch.tensor([[0.1]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    for step in range(4):
        gradient = normal(100 * seed + step, 12)
        optimiser.apply(parameters, gradient[None].clone(), state, rate, decay, step)
        found, velocity = museum.masked_step(found, gradient, velocity, mask, 0.1, 0.9, 0.3)
        assert found.tolist() == pytest.approx(parameters[0].tolist(), abs=1e-12)
        assert velocity.tolist() == pytest.approx(state["momentum"][0].tolist(), abs=1e-12)
    assert torch.equal(found[~mask], start[~mask])
    assert not torch.isclose(found[mask], start[mask]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_leaking_step_is_a_masked_gradient_in_torchs_optimiser(seed) -> None:
    start, mask = normal(seed, 12), random.uniform(random.key(seed + 20), (12,)) < 0.5
    weights = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.SGD([weights], lr=0.1, momentum=0.9, weight_decay=0.3)
    found, velocity = start, torch.zeros(12, dtype=torch.float64)
    for step in range(3):
        gradient = normal(100 * seed + step, 12)
        weights.grad = gradient * mask
        optimiser.step()
        found, velocity = public("masked-sgd")(found, gradient, velocity, mask, 0.1, 0.9, 0.3)
        assert found.tolist() == pytest.approx(weights.tolist(), abs=1e-12)
    assert not torch.isclose(found[~mask], start[~mask]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_modified_entropy_against_the_toolkit_and_a_loop(seed) -> None:
    logits, labels = 2 * normal(seed, 30, 5), torch.arange(30) % 5
    p = logits.softmax(1)
    found = museum.entropy_by_hand(p, labels)
    assert found.tolist() == pytest.approx((-membership_scores(logits, labels, "modified_entropy")).tolist(), rel=1e-9)
    for row, y, value in zip(p.tolist(), labels.tolist(), found.tolist(), strict=True):
        others = sum(q * math.log(1 - q) for k, q in enumerate(row) if k != y)
        assert value == pytest.approx(-(1 - row[y]) * math.log(row[y]) - others, rel=1e-12)


def test_public_entropy_and_how_far_it_is_off() -> None:
    p, labels = (4 * normal(0, 40, 6)).softmax(1), torch.arange(40) % 6
    reverse, log_reverse = 1 - p, p.log()  # the second is where 1 - p was meant
    modified, log_modified = p.clone(), log_reverse.clone()
    modified[:, labels] = reverse[:, labels]
    log_modified[:, labels] = p.log()[:, labels]
    oracle = -(modified * log_modified).sum(1)
    found = public("modified-entropy")(p, labels)
    assert found.tolist() == pytest.approx(oracle.tolist(), rel=1e-12)
    ratio = found / museum.entropy_by_hand(p, labels)
    assert ratio.min() > 1
    assert ratio.max() > 100
    assert not torch.isclose(public("modified-entropy")(p[:1], labels[:1]), found[:1]).any()  # depends on the batch


@pytest.mark.parametrize("removed", [None, 0, 2])
def test_duck_target_against_the_toolkit(removed) -> None:
    x, y = normal(3, 40, 5).float(), torch.arange(40) % 5
    forget = y == removed if removed is not None else torch.arange(40) % 3 == 0
    data = {"x": x, "y": y}
    trained = fleet.train(
        lambda: models.MLP(5, (8,), 5), cross_entropy, data, members=2, steps=0, seed=1, progress=False
    )
    chosen = nearest_other_class(trained, prepare(trained, data, forget, None))
    classes = y[~forget].unique()
    for features, targets in zip(trained.features(x), chosen, strict=True):
        centroids = torch.stack([features[~forget & (y == k)].mean(0) for k in classes])
        found = museum.nearest_other_class(features[forget], y[forget], centroids, classes)
        place = torch.searchsorted(classes, found)
        assert torch.allclose(centroids[place], targets[forget], atol=1e-5)
        assert not bool((found == y[forget]).any())


def test_public_duck_sends_the_next_class_to_its_second_choice() -> None:
    """Without class 2 the centroids' rows are classes 0, 1, 3, 4: row 2, class 3, is taken for the removed one."""
    features, centroids = normal(4, 200, 3), normal(5, 4, 3)
    classes, labels = torch.tensor([0, 1, 3, 4]), torch.full((200,), 2)
    right = museum.nearest_other_class(features, labels, centroids, classes)
    wrong = public("duck-target")(features, labels, centroids, classes)
    assert (right == 3).sum() > 10
    assert torch.equal(right != wrong, right == 3)
    order = F.cosine_similarity(features[:, None], centroids, dim=2).argsort(dim=1, descending=True)
    assert torch.equal(wrong, classes[torch.where(order[:, 0] == labels, order[:, 1], order[:, 0])])


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_bad_teaching_against_the_toolkit_and_torch(seed, classes) -> None:
    student, competent, incompetent = 2 * normal(seed, 3, 16, classes)
    forgotten = torch.arange(16) % 3 == 0
    found = museum.teaching_loss(student, competent, incompetent, forgotten)
    values = bad_teaching(student, competent, incompetent, forgotten.double())
    assert found == pytest.approx(values.mean().item(), rel=1e-9)
    share = forgotten[:, None].double()
    teacher = share * incompetent.softmax(1) + (1 - share) * competent.softmax(1)
    with pytest.warns(UserWarning, match="batchmean"):
        wrong = F.kl_div(student.log_softmax(1), teacher)
    assert public("bad-teacher-loss")(student, competent, incompetent, forgotten) == pytest.approx(wrong.item())
    assert found / wrong.item() == pytest.approx(classes)


@pytest.mark.parametrize("seed", SEEDS)
def test_laf_loss_by_a_loop(seed) -> None:
    features, forgotten = normal(seed, 12, 3).numpy(), (torch.arange(12) % 3 == 1).numpy()
    centres = {part: features[forgotten == part].mean(0) for part in (True, False)}
    total = 0.0
    for x, lost in zip(features, forgotten, strict=True):
        error = np.sum((x - centres[bool(lost)]) ** 2)
        total += (-1 if lost else 1) * math.exp(error / (error + 1))
    found = museum.extractor_loss(torch.tensor(features), torch.tensor(forgotten))
    assert found == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_laf_loss_against_the_toolkit(seed) -> None:
    features, forgotten = normal(seed, 12, 3), torch.arange(12) < 6
    means = features.view(2, 6, 3).mean(1).repeat_interleave(6, 0)
    oracle = extraction(features, means).sum().item()
    assert museum.extractor_loss(features, forgotten) == pytest.approx(oracle, rel=1e-9)


def test_what_laf_keeps_does_not_depend_on_where_the_forgotten_are() -> None:
    x, forgotten = normal(1, 12, 3), torch.arange(12) % 3 == 1
    moved = x + 5 * forgotten[:, None]
    assert museum.extractor_loss(moved, forgotten) == pytest.approx(museum.extractor_loss(x, forgotten), rel=1e-12)
    assert abs(public("laf-loss")(moved, forgotten) - public("laf-loss")(x, forgotten)) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_shrinkage_by_a_loop_and_twice_is_a_larger_once(seed) -> None:
    factors = normal(seed, 5, 12).numpy()
    covariance = factors @ factors.T / 12
    diagonal = np.mean([covariance[i, i] for i in range(5)])
    others = np.mean([covariance[i, j] for i in range(5) for j in range(5) if i != j])

    def shrunk(a: float, b: float) -> list[list[float]]:
        s = [[covariance[i, j] + (a * diagonal if i == j else b * others) for j in range(5)] for i in range(5)]
        return [[s[i][j] / math.sqrt(s[i][i] * s[j][j]) for j in range(5)] for i in range(5)]

    given = torch.tensor(covariance)
    once, twice = museum.shrunk_correlation(given, 3.0, 2.0), public("scar-shrinkage")(given, 3.0, 2.0)
    assert once.numpy() == pytest.approx(np.array(shrunk(3, 2)), abs=1e-12)
    assert twice.numpy() == pytest.approx(np.array(shrunk(15, 8)), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_shrinkage_against_the_toolkit(seed) -> None:
    features, labels = normal(seed, 30, 4), torch.arange(30) % 2
    for rounds, function in ((1, museum.shrunk_correlation), (2, public("scar-shrinkage"))):
        found = gaussians(features, labels, torch.ones(30, dtype=torch.bool), 2, 3.0, rounds).inverse
        for k in range(2):
            correlation = function(torch.cov(features[labels == k].T), 3.0, 3.0)
            assert torch.allclose(torch.linalg.inv(correlation), found[k], atol=1e-9)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_scrub_step_against_autograd(seed, forgotten) -> None:
    weights, x = normal(seed, 2, 3, 4), normal(seed + 10, 6, 3)
    student, teacher = weights[0].clone().requires_grad_(), weights[1].clone().requires_grad_()
    loss = distillation(x @ student, x @ teacher).mean() * (-1 if forgotten else 1)
    to_student, to_teacher = torch.autograd.grad(loss, (student, teacher))
    after = museum.distilled_step(weights[0], weights[1], x, 0.3, forgotten)
    assert torch.allclose(after[0], weights[0] - 0.3 * to_student, atol=1e-12)
    assert torch.equal(after[1], weights[1])
    both = EXERCISES["scrub-step"].misconceptions["both move"][0](*weights, x, 0.3, forgotten)
    assert torch.allclose(both, weights - 0.3 * torch.stack([to_student, to_teacher]), atol=1e-12)


def test_an_optimiser_of_the_teacher_moves_nothing() -> None:
    weights, x = normal(0, 2, 3, 4), normal(1, 6, 3)
    student, teacher = (torch.nn.Parameter(w.clone()) for w in weights)
    optimiser = torch.optim.SGD([teacher], lr=0.5)
    for _ in range(3):
        distillation(x @ student, (x @ teacher).detach()).mean().backward()
        optimiser.step()
    found = public("scrub-step")(*weights, x, 0.5, False)
    assert student.grad is not None
    assert student.grad.abs().max() > 0.01
    assert torch.equal(found, torch.stack([student.detach(), teacher.detach()]))
    assert torch.equal(found, weights)
