"""Plackett-Luce and Pearson: brute force over permutations, closed gradients, invariances, numpy and scipy."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from logit_cases import BATCH, CLASSES, LABELS, check_against_a_loop, check_extremes, logits
from scipy.stats import spearmanr

from toolkit.distillation.ranking import correlation_distance, dist, order_agreement, plackett_luce, pld

Z, T = logits(1), logits(2, scale=3)


def by_hand(z, t, label, temperature=1.0):
    """Value and gradient of one example, one choice after the other."""
    rest = sorted((c for c in range(len(z)) if c != label), key=lambda c: -t[c])
    order, q = [label, *rest], (t / temperature).softmax(-1)
    value, slope = torch.zeros((), dtype=z.dtype), torch.zeros_like(z)
    for k, chosen in enumerate(order):
        left = order[k:]
        value = value + q[chosen] * (z[left].logsumexp(-1) - z[chosen])
        slope[left] = slope[left] + q[chosen] * z[left].softmax(-1)
        slope[chosen] = slope[chosen] - q[chosen]
    return value, slope


def test_pld_and_its_gradient_are_the_sum_over_choices():
    for temperature in (1.0, 4.0):
        leaf = Z.clone().requires_grad_()
        values = pld(leaf, T, LABELS, temperature)
        (slope,) = torch.autograd.grad(values.sum(), leaf)
        for i, label in enumerate(LABELS.tolist()):
            value, expected = by_hand(Z[i], T[i], label, temperature)
            torch.testing.assert_close(values[i].detach(), value, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(slope[i], expected, rtol=1e-11, atol=1e-13)


def test_all_weight_on_the_label_is_cross_entropy():
    sure = T + 1000 * F.one_hot(LABELS, CLASSES)
    torch.testing.assert_close(pld(Z, sure, LABELS), F.cross_entropy(Z, LABELS, reduction="none"))
    order = torch.stack([torch.randperm(CLASSES, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
    first = torch.zeros(BATCH, CLASSES, dtype=Z.dtype)
    first[:, 0] = 1
    expected = F.cross_entropy(Z, order[:, 0], reduction="none")
    torch.testing.assert_close(plackett_luce(Z, order, first), expected, rtol=1e-13, atol=1e-13)


def test_equal_weights_give_probabilities_of_permutations():
    """exp(-value) sums to 1 over all orders, and the last choice is none."""
    orders = torch.tensor(list(itertools.permutations(range(4))))
    z = Z[0, :4].expand(24, 4)
    values = plackett_luce(z, orders, torch.ones_like(z))
    assert (-values).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert orders[values.argmin()].tolist() == z[0].argsort(descending=True).tolist()
    last = torch.zeros_like(z)
    last[:, -1] = 1
    assert torch.equal(plackett_luce(z, orders, last), torch.zeros(24, dtype=z.dtype))


def test_pld_is_shift_invariant_and_convex():
    shifted = pld(Z + torch.arange(BATCH)[:, None], T - 5, LABELS)
    torch.testing.assert_close(shifted, pld(Z, T, LABELS), rtol=1e-12, atol=1e-13)
    for i in range(BATCH):

        def one(z, i=i):
            return pld(z[None], T[i : i + 1], LABELS[i : i + 1])[0]

        hessian = torch.autograd.functional.hessian(one, Z[i])
        eigenvalues = torch.linalg.eigvalsh(hessian)
        assert eigenvalues[0] > -1e-14
        assert eigenvalues[1] > 1e-9  # only the shift is free
        torch.testing.assert_close(hessian.sum(-1), torch.zeros(CLASSES, dtype=Z.dtype))


def test_the_label_comes_first_whatever_the_teacher_says_and_ties_go_by_class():
    wrong = T - 50 * F.one_hot(LABELS, CLASSES)
    slope = torch.func.grad(lambda z: pld(z, wrong, LABELS).sum())(Z)
    others = pld(Z + 100 * F.one_hot(LABELS, CLASSES), wrong, LABELS)
    assert torch.allclose(slope.gather(-1, LABELS[:, None]), torch.zeros(BATCH, 1, dtype=Z.dtype))
    for i, label in enumerate(LABELS.tolist()):
        rest = [c for c in range(CLASSES) if c != label]
        best = rest[int(T[i, rest].argmax())]
        inner = pld(Z[i : i + 1, rest], T[i : i + 1, rest], torch.tensor([rest.index(best)]))
        torch.testing.assert_close(others[i], inner[0], rtol=1e-9, atol=1e-12)
    tied = pld(Z, torch.zeros_like(T), LABELS)
    for i, label in enumerate(LABELS.tolist()):
        order = torch.tensor([[label, *(c for c in range(CLASSES) if c != label)]])
        expected = plackett_luce(Z[i : i + 1], order, torch.full((1, CLASSES), 1 / CLASSES, dtype=Z.dtype))
        torch.testing.assert_close(tied[i], expected[0])


def test_correlation_is_numpys():
    for i in range(BATCH):
        expected = 1 - np.corrcoef(Z[i].numpy(), T[i].numpy())[0, 1]
        assert correlation_distance(Z, T)[i].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(correlation_distance(3 * T + 7, T), torch.zeros(BATCH, dtype=T.dtype))
    torch.testing.assert_close(correlation_distance(-3 * T + 7, T), torch.full((BATCH,), 2.0, dtype=T.dtype))
    single = correlation_distance((T * 1e-30).float(), Z.float())  # squares of these are 0 in float32
    torch.testing.assert_close(single.double(), correlation_distance(T, Z), rtol=1e-4, atol=1e-5)
    assert torch.equal(correlation_distance(torch.full((3, 5), 0.1), Z[:3].float()), torch.ones(3))


def test_dist_is_its_three_parts():
    p, q = (Z / 2).softmax(-1).numpy(), (T / 2).softmax(-1).numpy()
    inter = np.array([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(BATCH)])
    intra = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(CLASSES)])
    hard = F.cross_entropy(Z, LABELS, reduction="none").numpy()
    expected = torch.from_numpy(0.7 * hard + 4 * (1.5 * inter + 0.5 * intra))
    torch.testing.assert_close(dist(Z, T, LABELS, 2.0, 1.5, 0.5, 0.7), expected, rtol=1e-11, atol=1e-12)


def test_dist_does_not_see_how_sure_a_teacher_is():
    """Probabilities a p + b: nothing to learn between classes; with one a for all, nothing between examples either."""
    q = T.softmax(-1)
    zero = torch.zeros(BATCH, dtype=T.dtype)
    same = (0.3 * q + 0.7 / CLASSES).log()
    torch.testing.assert_close(dist(same, T, LABELS, 1.0, 2.0, 2.0, 0.0), zero)
    share = torch.linspace(0.2, 0.9, BATCH, dtype=T.dtype)[:, None]
    own = (share * q + (1 - share) / CLASSES).log()
    torch.testing.assert_close(dist(own, T, LABELS, 1.0, 2.0, 0.0, 0.0), zero)
    assert dist(own, T, LABELS, 1.0, 0.0, 2.0, 0.0).min() > 1e-3
    torch.testing.assert_close(dist(T + 3, T, LABELS, 4.0, 2.0, 2.0, 0.0), zero)


def test_order_agreement_is_spearmans_without_the_label():
    found = order_agreement(Z, T, LABELS)
    for i, label in enumerate(LABELS.tolist()):
        rest = [c for c in range(CLASSES) if c != label]
        expected = spearmanr(Z[i, rest].numpy(), T[i, rest].numpy()).statistic
        assert found[i].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(order_agreement(T.exp(), T, LABELS), torch.ones(BATCH, dtype=T.dtype))
    torch.testing.assert_close(order_agreement(-T, T, LABELS), -torch.ones(BATCH, dtype=T.dtype))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t, y, h: pld(z, t, y, h),
        lambda z, t, y, h: dist(z, t, y, temperature=h),
        lambda z, t, y, h: dist(z, t, y, beta=h, gamma=2 * h, label_weight=h / 2),
    ],
    ids=["pld", "dist", "dist-weights"],
)
def test_fleets(loss):
    check_against_a_loop(loss, [1.0, 2.5, 6.0])


@pytest.mark.parametrize("loss", [pld, dist])
def test_extremes(loss):
    check_extremes(loss)


def test_bad_input():
    for call, name in (
        (lambda: pld(Z, T, LABELS, 0.0), "temperature"),
        (lambda: pld(Z, T, LABELS + 1), "labels"),
        (lambda: plackett_luce(Z, torch.full_like(Z, CLASSES).long(), Z), "order"),
        (lambda: dist(Z, T, LABELS, 0.0), "temperature"),
        (lambda: dist(Z, T, LABELS, gamma=-1.0), "gamma"),
        (lambda: dist(Z, T, LABELS + 1), "labels"),
        (lambda: dist(Z[:1], T[:1], LABELS[:1]), "logits"),
        (lambda: dist(Z[:, :1], T[:, :1], LABELS * 0), "logits"),
        (lambda: correlation_distance(Z[:, :1], T[:, :1]), "x"),
        (lambda: order_agreement(Z[:, :2], T[:, :2], LABELS % 2), "logits"),
        (lambda: order_agreement(Z, T, LABELS + 1), "labels"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
