"""KD and its relatives: identities, limits, and torch's own kl_div and cross_entropy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from logit_cases import BATCH, CLASSES, LABELS, check_against_a_loop, check_extremes, logits

from toolkit.distillation.logits import decoupled_terms, dkd, kd, standardised_kd

Z, T = logits(1), logits(2, scale=3)


def kl(teacher, student):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def test_kd_is_a_mixture_of_cross_entropy_and_of_kl_times_t_squared():
    for temperature, weight in ((1.0, 0.3), (4.0, 0.9), (0.5, 1.0)):
        expected = (1 - weight) * F.cross_entropy(Z, LABELS, reduction="none")
        expected = expected + weight * temperature**2 * kl(T / temperature, Z / temperature)
        torch.testing.assert_close(kd(Z, T, LABELS, temperature, weight), expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(kd(Z, T, LABELS, 3.0, 0.0), F.cross_entropy(Z, LABELS, reduction="none"))
    torch.testing.assert_close(kd(T + 5, T, LABELS, 3.0, 1.0), torch.zeros(BATCH, dtype=Z.dtype))
    mixed = 0.7 * F.one_hot(LABELS, CLASSES) + 0.3 * F.one_hot(LABELS.flip(0), CLASSES)
    both = [kd(Z, T, labels, 2.0, 0.4) for labels in (LABELS, LABELS.flip(0))]
    torch.testing.assert_close(kd(Z, T, mixed.double(), 2.0, 0.4), 0.7 * both[0] + 0.3 * both[1])


def gradient(loss, z):
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def test_the_gradient_of_kd_tends_to_centred_logit_matching_as_one_over_t():
    wanted = ((Z - Z.mean(-1, keepdim=True)) - (T - T.mean(-1, keepdim=True))) / CLASSES
    errors = []
    for temperature in (10.0, 100.0, 1000.0, 10_000.0):
        found = gradient(lambda z, t=temperature: kd(z, T, LABELS, t, 1.0), Z)
        analytic = temperature * ((Z / temperature).softmax(-1) - (T / temperature).softmax(-1))
        torch.testing.assert_close(found, analytic, rtol=1e-9, atol=1e-11)
        errors.append((found - wanted).norm() / wanted.norm())
    for before, after, tolerance in zip(errors, errors[1:], (0.25, 0.03, 0.003), strict=False):
        assert after * 10 / before == pytest.approx(1, abs=tolerance)
    assert errors[-1] < 1e-3


def test_kd_is_tckd_and_the_unsure_part_of_nckd():
    for temperature in (1.0, 4.0):
        target, rest = decoupled_terms(Z, T, LABELS, temperature)
        p = (T / temperature).softmax(-1).gather(-1, LABELS[:, None])[:, 0]
        whole = kl(T / temperature, Z / temperature)
        torch.testing.assert_close(target + (1 - p) * rest, whole, rtol=1e-12, atol=1e-13)
    for i, label in enumerate(LABELS.tolist()):
        others = [c for c in range(CLASSES) if c != label]
        torch.testing.assert_close(rest[i], kl(T[i, others] / 4, Z[i, others] / 4), rtol=1e-12, atol=1e-13)
        p, q = ((z[i] / 4).softmax(-1)[label] for z in (T, Z))
        binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        torch.testing.assert_close(target[i], binary, rtol=1e-11, atol=1e-13)


def test_dkd_weights_its_parts():
    target, rest = decoupled_terms(Z, T, LABELS, 2.0)
    hard = F.cross_entropy(Z, LABELS, reduction="none")
    torch.testing.assert_close(dkd(Z, T, LABELS, 2.0, 0.5, 3.0, 0.7), 0.7 * hard + 4 * (0.5 * target + 3 * rest))
    half = dkd(Z, T, LABELS, 2.0, 0.5, 3.0, 0.7, progress=0.1, warm_up=0.2)
    torch.testing.assert_close(half, 0.7 * hard + 2 * (0.5 * target + 3 * rest))
    torch.testing.assert_close(dkd(Z, T, LABELS, 2.0, 0.5, 3.0, 0.7, progress=0.0), 0.7 * hard)
    two = decoupled_terms(Z[:, :2], T[:, :2], LABELS % 2)
    torch.testing.assert_close(two.rest, torch.zeros_like(two.rest))
    torch.testing.assert_close(two.target, kl(T[:, :2] / 4, Z[:, :2] / 4), rtol=1e-11, atol=1e-13)


def test_dkd_keeps_what_a_sure_teacher_says_of_the_rest():
    """In plain probabilities 1 - p is 0 here, and its logarithm is lost."""
    sure = logits(5) + 200 * F.one_hot(LABELS, CLASSES)
    target, rest = decoupled_terms(Z, sure, LABELS, 1.0)
    torch.testing.assert_close(target, F.cross_entropy(Z, LABELS, reduction="none"))
    torch.testing.assert_close(rest, decoupled_terms(Z, logits(5), LABELS, 1.0).rest, rtol=1e-9, atol=1e-12)
    assert (rest > 0.01).all()


def test_standardised_logits():
    own, wanted = (z / z.std(-1, keepdim=True) for z in (Z, T))
    for temperature, weight in ((1.0, 0.9), (2.0, 0.4)):
        expected = (1 - weight) * F.cross_entropy(own, LABELS, reduction="none")
        expected = expected + weight * kl(wanted / temperature, own / temperature)
        found = standardised_kd(Z, T, LABELS, temperature, weight)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        moved = standardised_kd(7 * Z - 3, 0.1 * T + 2, LABELS, temperature, weight)
        torch.testing.assert_close(moved, found, rtol=1e-11, atol=1e-12)
    along = (gradient(lambda z: standardised_kd(z, T, LABELS), Z) * Z).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along))
    flat = standardised_kd(torch.full_like(Z, 3.3), T, LABELS, weight=0.0)
    torch.testing.assert_close(flat, torch.full_like(flat, CLASSES).log())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t, y, h: kd(z, t, y, h, 0.7),
        lambda z, t, y, h: kd(z, t, y, 3.0, h / 10),
        lambda z, t, y, h: dkd(z, t, y, temperature=h, beta=2.0),
        lambda z, t, y, h: dkd(z, t, y, alpha=h, progress=h / 100),
        lambda z, t, y, h: standardised_kd(z, t, y, h),
    ],
    ids=["kd", "kd-weight", "dkd", "dkd-alpha", "standardised"],
)
def test_fleets(loss):
    check_against_a_loop(loss, [1.0, 2.5, 6.0])


@pytest.mark.parametrize("loss", [kd, dkd, standardised_kd, partial(kd, temperature=0.5)])
def test_extremes(loss):
    check_extremes(loss)


def test_bad_input():
    for call, name in (
        (lambda: kd(Z, T, LABELS, 0.0), "temperature"),
        (lambda: kd(Z, T, LABELS, float("nan")), "temperature"),
        (lambda: kd(Z, T, LABELS, 1.0, 1.5), "weight"),
        (lambda: kd(Z, T, LABELS + 1), "labels"),
        (lambda: kd(Z, T, Z), "labels"),
        (lambda: dkd(Z, T, LABELS, -1.0), "temperature"),
        (lambda: dkd(Z, T, LABELS, beta=-1.0), "beta"),
        (lambda: dkd(Z, T, LABELS, progress=2.0), "progress"),
        (lambda: dkd(Z, T, LABELS, warm_up=0.0), "warm_up"),
        (lambda: dkd(Z[:, :1], T[:, :1], LABELS * 0), "logits"),
        (lambda: standardised_kd(Z[:, :1], T[:, :1], LABELS * 0), "logits"),
        (lambda: standardised_kd(Z, T, LABELS, 0.0), "temperature"),
        (lambda: standardised_kd(Z, T, LABELS, weight=-0.1), "weight"),
        (lambda: standardised_kd(Z, T, LABELS - 1), "labels"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
