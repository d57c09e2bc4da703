"""Mixtures pixel by pixel, picks and ranks against other code, training against plain autograd."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logit_cases import logits
from scipy.stats import spearmanr

from toolkit import random
from toolkit.distillation.augmentation import (
    augmentation_scatter,
    cutmix,
    entropy_pick,
    mixed_targets,
    mixup,
    rank_correlation,
    t_stddev,
    train_augmented,
    train_mix_kd,
)
from toolkit.distillation.logits import kd, standardised_kd
from toolkit.fleet import SGD, train
from toolkit.models import MLP

IMAGES = random.uniform(random.key(1), (400, 1, 6, 8), torch.float64)
KEY = random.key(2)
SMALL = random.uniform(random.key(3), (24, 1, 4, 4))
Y = torch.arange(24) % 3
DATA = {"x": SMALL, "y": Y}
ONE_STEP: dict[str, Any] = {
    "steps": 1,
    "batch": 24,
    "optimiser": SGD(lr=0.5),
    "snapshots": [0],
    "progress": False,
    "device": "cpu",
}


def build():
    return MLP(16, (6,), 3)


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


TEACHER = train(build, cross_entropy, DATA, members=2, seed=9, **ONE_STEP | {"steps": 30})


def test_mixup_is_its_definition():
    x, partner, share = mixup(IMAGES, KEY)
    for i in range(0, 400, 37):
        torch.testing.assert_close(x[i], share[i] * IMAGES[i] + (1 - share[i]) * IMAGES[partner[i]])
    assert torch.equal(partner.sort().values, torch.arange(400))
    assert torch.equal(mixup(IMAGES, KEY).x, x)
    assert not torch.equal(mixup(IMAGES, random.key(3)).x, x)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_are_beta(alpha):
    share = mixup(torch.zeros(20000, 1, dtype=torch.float64), KEY, alpha).share
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


@pytest.mark.parametrize("mixed", [0.0, 0.1, 0.5, 1.0])
def test_partial_mixup_mixes_that_share(mixed):
    x, _, share = mixup(IMAGES, KEY, mixed=mixed)
    assert int((share < 1).sum()) == round(mixed * 400)
    assert torch.equal(x[share == 1], IMAGES[share == 1])
    full = mixup(IMAGES, KEY)
    assert torch.equal(x[share < 1], full.x[share < 1])
    if 0 < mixed < 1:
        first = (share < 1).nonzero()[:, 0]
        assert not torch.equal(first, torch.arange(len(first)))


def test_cutmix_is_a_box_of_the_partner():
    x, partner, share = cutmix(IMAGES, KEY)
    sizes = set()
    for i in range(400):
        theirs = x[i, 0] != IMAGES[i, 0] if partner[i] != i else torch.zeros(6, 8, dtype=torch.bool)
        assert torch.equal(x[i, 0][theirs], IMAGES[partner[i], 0][theirs])
        if partner[i] != i:
            assert share[i].item() == pytest.approx(1 - theirs.double().mean().item())
        rows, columns = theirs.any(1).nonzero()[:, 0], theirs.any(0).nonzero()[:, 0]
        if len(rows):
            assert theirs[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            sizes.add((len(rows), len(columns)))
    assert len(sizes) > 15


def test_cutmix_boxes_have_the_sides_and_places_that_lambda_asks_for():
    """Against numpy-like code of one image, with the same draws."""
    x, partner, _ = cutmix(IMAGES, KEY)
    lam = random.symmetric_beta(random.fold_in(KEY, 1), 400, 1.0, torch.float64)
    place = random.uniform(random.fold_in(KEY, 2), (2, 400), torch.float64)
    for i in range(400):
        cut_h, cut_w = int(6 * math.sqrt(1 - lam[i])), int(8 * math.sqrt(1 - lam[i]))
        top, left = int(6 * place[0, i]) - cut_h // 2, int(8 * place[1, i]) - cut_w // 2
        expected = IMAGES[i].clone()
        part = slice(max(top, 0), max(top + cut_h, 0)), slice(max(left, 0), max(left + cut_w, 0))
        expected[0][part] = IMAGES[partner[i], 0][part]
        assert torch.equal(x[i], expected)


def test_mixing_in_a_fleet_is_mixing_alone():
    keys = random.fold_in(random.key(4), torch.arange(3))
    shares = torch.tensor([0.0, 0.3, 1.0])
    for found, alone in (
        (
            torch.vmap(lambda k, m: mixup(SMALL, k, 1.0, m))(keys, shares),
            lambda i: mixup(SMALL, keys[i], 1.0, shares[i]),
        ),
        (torch.vmap(lambda k: cutmix(SMALL, k))(keys), lambda i: cutmix(SMALL, keys[i])),
    ):
        for i in range(3):
            for together, single in zip(found, alone(i), strict=True):
                assert torch.equal(together[i], single)


def test_targets_of_mixtures():
    labels = torch.arange(400) % 5
    mixtures = mixup(IMAGES, KEY)
    found = mixed_targets(labels, mixtures, 5)
    torch.testing.assert_close(found.sum(1), torch.ones(400, dtype=torch.float64))
    for i in range(0, 400, 29):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[labels[i]] += mixtures.share[i]
        expected[labels[mixtures.partner[i]]] += 1 - mixtures.share[i]
        torch.testing.assert_close(found[i], expected)


def test_the_least_sure_are_picked():
    z = logits(5, 30, 4)
    entropy = torch.distributions.Categorical(logits=z).entropy()
    assert torch.equal(entropy_pick(z, 7), entropy.topk(7).indices)
    both = torch.stack([z, z.flip(0)])
    assert torch.equal(torch.vmap(lambda v: entropy_pick(v, 7))(both)[1], entropy_pick(z.flip(0), 7))


def test_t_stddev():
    p = logits(6, 4, 9, 3).softmax(-1)
    u = torch.stack([p[r].sum(0) / 9 for r in range(4)])
    expected = sum(math.sqrt(sum((u[r, c] - u[:, c].mean()) ** 2 for r in range(4)) / 3) for c in range(3)) / 3
    assert t_stddev(p).item() == pytest.approx(expected, rel=1e-12)
    assert t_stddev(p[:1].expand(4, -1, -1)).item() == pytest.approx(0, abs=1e-15)


def test_t_stddev_of_a_teacher_that_tells_classes_apart():
    """One-hot answers to random classes: a binomial share in each block, √(p (1 - p) / batch)."""
    draws = (random.uniform(KEY, (4000, 50), torch.float64) * 4).long()
    found = t_stddev(F.one_hot(draws, 4).double()).item()
    assert found == pytest.approx(math.sqrt(0.25 * 0.75 / 50), rel=0.03)


def test_rank_correlation_is_scipys():
    a, b = logits(7, 20), logits(8, 20)
    ties = a.round()
    for first, second in ((a, b), (ties, b), (ties, a)):
        assert rank_correlation(first, second).item() == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    torch.testing.assert_close(rank_correlation(a, a.exp()), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(rank_correlation(a, -(a**3)), -torch.ones((), dtype=torch.float64))
    assert rank_correlation(a, torch.ones_like(a)).isnan()


def moved(module, value):
    slopes = torch.autograd.grad(value, list(module.parameters()))
    return torch.cat([(p - 0.5 * g).reshape(-1) for p, g in zip(module.parameters(), slopes, strict=True)]).detach()


def first_batch(stream):
    """The examples and the key of a member's first step, as its loss sees them."""
    rows = {"place": torch.zeros(24, dtype=torch.int64), "drawn": torch.zeros(24, dtype=torch.int64)}

    def loss(model, batch, hyper):
        return model(batch.x).sum(-1), {"place": torch.arange(24), "drawn": batch.key.expand(24)}

    fleet = train(build, loss, DATA, streams=torch.tensor([stream]), memory=rows, **ONE_STEP)
    return fleet.memory["place"][0].argsort(), fleet.memory["drawn"][0, 0]


def blend(x, key):
    return 0.7 * x + 0.3 * x.roll(1, 0) + 0.5 * random.uniform(key, (len(x), 1, 1, 1))


@pytest.mark.parametrize("pick", [None, "teacher", "student"])
def test_a_step_on_augmented_inputs_is_the_gradient_of_its_definition(pick):
    settings: dict[str, Any] = {"weight": 0.6, "temperature": 3.0, "pick": pick}
    fleet = train_augmented(build, DATA, TEACHER, blend, seeds=2, **settings, **ONE_STEP)
    for i in range(2):
        index, key = first_batch(i)
        module, teacher = fleet.at(0)[i], TEACHER[i]
        x, y = SMALL[index], Y[index]
        seen = blend(x, random.fold_in(key, 0))
        if pick is not None:
            seen = torch.cat([seen, blend(x, random.fold_in(key, 1))])
            judge = teacher if pick == "teacher" else module
            entropy = torch.distributions.Categorical(logits=judge(seen)).entropy()
            seen = seen[entropy.topk(24).indices]
        wanted = teacher(seen).detach()
        value = 0.4 * F.cross_entropy(module(x), y) + 0.6 * kd(module(seen), wanted, y, 3.0, 1.0).mean()
        torch.testing.assert_close(fleet.parameters[i], moved(module, value), rtol=1e-4, atol=1e-6)
        assert (fleet.parameters[i] - fleet.at(0).parameters[i]).abs().max() > 1e-3


def test_a_step_on_mixup_is_the_gradient_of_its_definition():
    fleet = train_mix_kd(build, DATA, TEACHER[:1], 3, mixed=[0.0, 0.5, 1.0], seeds=2, weight=0.7, **ONE_STEP)
    for i, mixed in enumerate((0.0, 0.5, 1.0)):
        index, key = first_batch(1)
        module = fleet.at(0)[2 * i + 1]
        mixtures = mixup(SMALL[index], key, 1.0, mixed)
        targets = mixed_targets(Y[index], mixtures, 3)
        values = standardised_kd(module(mixtures.x), TEACHER[0](mixtures.x).detach(), targets, weight=0.7)
        torch.testing.assert_close(fleet.parameters[2 * i + 1], moved(module, values.mean()), rtol=1e-4, atol=1e-6)


def test_the_scatter_is_made_of_its_parts():
    options = ONE_STEP | {"steps": 20}
    augments = {"none": lambda x, key: x, "blend": blend}
    found = augmentation_scatter(build, DATA, DATA, TEACHER[:1], augments, seeds=2, blocks=5, block=24, **options)
    whole = TEACHER[:1].probabilities(SMALL)[0]
    assert found.stddev[0].item() < 1e-6  # each block holds all examples: nothing varies
    assert found.stddev[1].item() > 1e-4
    assert whole.shape == (24, 3)
    students = train_augmented(build, DATA, TEACHER[:1], blend, seeds=2, **options)
    for i in range(2):
        z = students[i](SMALL).detach()
        torch.testing.assert_close(found.losses[1, i], F.cross_entropy(z, Y), rtol=1e-4, atol=1e-6)
        assert found.accuracies[1, i].item() == pytest.approx((z.argmax(1) == Y).float().mean().item())


def test_bad_input():
    z, p = logits(9, 6, 3), logits(10, 2, 4, 3).softmax(-1)
    none = {"none": lambda x, key: x}
    scatter: dict[str, Any] = {"seeds": 1, "block": 24} | ONE_STEP
    for call, name in (
        (lambda: mixup(SMALL, KEY, 0.0), "alpha"),
        (lambda: mixup(SMALL, KEY, mixed=1.1), "mixed"),
        (lambda: cutmix(SMALL, KEY, -1.0), "alpha"),
        (lambda: mixed_targets(Y + 1, mixup(SMALL, KEY), 3), "labels"),
        (lambda: entropy_pick(z, 0), "count"),
        (lambda: entropy_pick(z, 7), "count"),
        (lambda: t_stddev(p[:1]), "probabilities"),
        (lambda: t_stddev(2 * p), "probabilities"),
        (lambda: rank_correlation(z[:2, 0], z[:2, 1]), "a"),
        (lambda: rank_correlation(z[:, 0], z[:, 1] / 0), "b"),
        (lambda: train_mix_kd(build, DATA, TEACHER, 3, mixed=[0.1], seeds=3, **ONE_STEP), "teacher"),
        (lambda: train_mix_kd(build, DATA, TEACHER, 3, mixed=[1.1], seeds=2, **ONE_STEP), "mixed"),
        (lambda: train_mix_kd(build, DATA, TEACHER, 2, mixed=[0.1], seeds=2, **ONE_STEP), "labels"),
        (lambda: train_augmented(build, DATA, TEACHER, blend, seeds=2, temperature=0.0, **ONE_STEP), "temperature"),
        (lambda: train_augmented(build, DATA, TEACHER, blend, seeds=2, weight=1.5, **ONE_STEP), "weight"),
        (lambda: augmentation_scatter(build, DATA, DATA, TEACHER[:1], {}, **scatter), "augments"),
        (lambda: augmentation_scatter(build, DATA, DATA, TEACHER, none, **scatter), "teacher"),
        (lambda: augmentation_scatter(build, DATA, DATA, TEACHER[:1], none, **scatter | {"block": 25}), "block"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
