"""Target tensors: what each keeps, that each is the best of its kind, and autograd for the ratio of gradients."""

import pytest
import torch
import torch.nn.functional as F
from logit_cases import BATCH, CLASSES, LABELS, check_against_a_loop, logits

from toolkit.distillation.levels import (
    class_targets,
    gradient_ratio,
    instance_targets,
    soft_cross_entropy,
    top_targets,
    universe_targets,
)

N = 40
Y = torch.arange(N) % 4  # class 4 has no example
P = (logits(3, N, CLASSES) + 2 * F.one_hot(Y, CLASSES)).softmax(-1)
ALL = (universe_targets, class_targets, instance_targets)


def kl(targets):
    return (P * (P / targets).log()).sum(-1).mean()


def test_targets_are_probabilities_with_the_teachers_mean_confidence():
    mean = P.gather(-1, Y[:, None]).mean()
    for level in ALL:
        targets = level(P, Y)
        torch.testing.assert_close(targets.sum(-1), torch.ones(N, dtype=P.dtype))
        torch.testing.assert_close(targets.gather(-1, Y[:, None]).mean(), mean)


def test_the_universe_is_label_smoothing():
    mean = P.gather(-1, Y[:, None]).mean()
    smoothing = (1 - mean) * CLASSES / (CLASSES - 1)
    expected = (1 - smoothing) * F.one_hot(Y, CLASSES) + smoothing / CLASSES
    torch.testing.assert_close(universe_targets(P, Y), expected)


def test_class_relations_are_means_over_a_class_and_instances_are_their_own():
    relations, own = class_targets(P, Y), instance_targets(P, Y)
    for i in range(N):
        torch.testing.assert_close(relations[i], P[Y[i] == Y].mean(0))
        assert own[i, Y[i]] == P[i, Y[i]]
        rest = own[i, torch.arange(CLASSES) != Y[i]]
        torch.testing.assert_close(rest, (1 - P[i, Y[i]]).expand(CLASSES - 1) / (CLASSES - 1))


def test_each_level_is_the_nearest_of_its_kind_and_the_levels_nest():
    """Moving the targets within their kind makes KL from the teacher larger, and a wider kind is nearer."""
    one = F.one_hot(Y, CLASSES)
    away = (one - (1 - one) / (CLASSES - 1)).double()
    per_class = logits(7, CLASSES, CLASSES)[Y]
    per_example = logits(8, N, 1) * away
    moves = (away, per_class - per_class.mean(-1, keepdim=True), per_example)
    for level, move in zip(ALL, moves, strict=True):
        targets = level(P, Y)
        for step in (1e-3, -1e-3):
            assert kl(targets + step * move) > kl(targets)
        slope = (kl(targets + 1e-5 * move) - kl(targets - 1e-5 * move)) / 2e-5
        assert abs(slope) < 1e-5
    universe, relations, own = (kl(level(P, Y)) for level in ALL)
    assert universe > relations > 0
    assert universe > own > 0
    for level in ALL:  # a projection: what has one level only keeps it
        torch.testing.assert_close(level(level(P, Y), Y), level(P, Y))
    torch.testing.assert_close(universe_targets(class_targets(P, Y), Y), universe_targets(P, Y))


def test_top_k_keeps_k():
    for k in (CLASSES - 1, CLASSES):
        torch.testing.assert_close(top_targets(P, k), P)
    found = top_targets(P, 2)
    for i in range(N):
        order = P[i].argsort(descending=True)
        assert torch.equal(found[i, order[:2]], P[i, order[:2]])
        torch.testing.assert_close(found[i, order[2:]], P[i, order[2:]].mean().expand(CLASSES - 2))
    tied = top_targets(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), 1)
    torch.testing.assert_close(tied, torch.full((1, 4), 0.25))


def test_soft_cross_entropy_is_torchs():
    z, targets = logits(1, N, CLASSES), class_targets(P, Y)
    torch.testing.assert_close(soft_cross_entropy(z, targets, Y), F.cross_entropy(z, targets, reduction="none"))
    hard, soft = F.cross_entropy(z, Y, reduction="none"), F.cross_entropy(z / 3, targets, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(z, targets, Y, 3.0, 0.6), 0.4 * hard + 0.6 * 9 * soft)
    slope = torch.func.grad(lambda z: soft_cross_entropy(z, targets, Y).sum())(z)
    torch.testing.assert_close(slope, z.softmax(-1) - targets, rtol=1e-11, atol=1e-13)


def test_soft_cross_entropy_in_a_fleet():
    check_against_a_loop(lambda z, t, y, h: soft_cross_entropy(z, t.softmax(-1), y, h, h / 10), [1.0, 2.5, 6.0])


def test_the_ratio_of_gradients_at_the_label():
    z, t = logits(1), logits(2).softmax(-1)

    def at_label(targets):
        slope = torch.func.grad(lambda z: soft_cross_entropy(z, targets, LABELS).sum())(z)
        return slope.gather(-1, LABELS[:, None])[:, 0]

    hard = at_label(F.one_hot(LABELS, CLASSES).double())
    found = gradient_ratio(z, t, LABELS)
    torch.testing.assert_close(found, at_label(t) / hard, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, at_label(instance_targets(t, LABELS)) / hard, rtol=1e-10, atol=1e-12)
    assert (found < 0).any()
    assert (found > 0).any()
    one = F.one_hot(LABELS, CLASSES).double()
    torch.testing.assert_close(gradient_ratio(z, one, LABELS), torch.ones(BATCH, dtype=z.dtype))
    together = torch.vmap(gradient_ratio)(torch.stack([z, 2 * z]), torch.stack([t, t]), torch.stack([LABELS, LABELS]))
    torch.testing.assert_close(together[1], gradient_ratio(2 * z, t, LABELS))
    assert gradient_ratio(1e4 * one, t, LABELS).isnan().all()


def test_bad_input():
    for level in ALL:
        for probabilities, labels, name in ((2 * P, Y, "teacher"), (P, Y + 2, "labels"), (P[:0], Y[:0], "teacher")):
            with pytest.raises(ValueError, match=f"^{name}: "):
                level(probabilities, labels)
        with pytest.raises(ValueError, match="teacher"):
            level(P[:, :1], Y * 0)
    z = logits(1, N, CLASSES)
    for call, name in (
        (lambda: top_targets(P, 0), "k"),
        (lambda: top_targets(P, CLASSES + 1), "k"),
        (lambda: top_targets(z, 2), "teacher"),
        (lambda: soft_cross_entropy(z, z, Y), "targets"),
        (lambda: soft_cross_entropy(z, P, Y, 0.0), "temperature"),
        (lambda: soft_cross_entropy(z, P, Y, 1.0, 2.0), "weight"),
        (lambda: soft_cross_entropy(z, P, Y + 2), "labels"),
        (lambda: gradient_ratio(z, z, Y), "teacher"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
