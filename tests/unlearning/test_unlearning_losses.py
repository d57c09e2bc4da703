"""Unlearning losses against torch's own functions, hand-made batches, limits and expectations."""

import math
from typing import Any

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from toolkit.random import key
from toolkit.unlearning.losses import (
    bad_teaching,
    distillation,
    l1_norm,
    logit_matching,
    neg_grad,
    random_label_loss,
    scrub_loss,
    toward_target,
)

CLASSES = 5
FORGOTTEN = torch.tensor([True, False, True, False, False, True, False])
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def logits(seed: int, size: int = 7) -> torch.Tensor:
    return 2 * torch.randn(size, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TEACHER, INCOMPETENT = logits(8), logits(9)
# name: (loss of logits and one hyper-parameter, two values of it)
LOSSES: dict[str, tuple[Any, tuple[float, float]]] = {
    "distillation": (lambda z, h: distillation(z, TEACHER.to(z), h), (1.0, 3.0)),
    "bad_teaching": (lambda z, h: bad_teaching(z, TEACHER.to(z), INCOMPETENT.to(z), FORGOTTEN.to(z), h), (1.0, 2.0)),
    "random_label_loss": (lambda z, h: h * random_label_loss(z, key(3)), (1.0, 2.0)),
    "neg_grad": (lambda z, h: neg_grad(z, LABELS, FORGOTTEN, h), (0.3, 0.9)),
    "scrub_loss, ascent": (
        lambda z, h: scrub_loss(z, TEACHER.to(z), LABELS, FORGOTTEN, torch.tensor(True), h),
        (0.1, 2.0),
    ),
    "scrub_loss, descent": (
        lambda z, h: scrub_loss(z, TEACHER.to(z), LABELS, FORGOTTEN, torch.tensor(False), h),
        (0.1, 2.0),
    ),
    "toward_target": (lambda z, h: h * toward_target(z, TEACHER.to(z)), (1.0, 2.0)),
    "logit_matching": (lambda z, h: h * logit_matching(z, TEACHER.to(z)), (1.0, 2.0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_and_its_gradient_are_the_loop_in_both_precisions(name):
    loss, values = LOSSES[name]
    batch, hyper = torch.stack([logits(0), logits(1)]), torch.tensor(values, dtype=torch.float64)
    together = vmap(loss)(batch, hyper)
    slopes = vmap(grad(lambda z, h: loss(z, h).sum()))(batch, hyper)
    assert together.shape == (2, 7)
    for i in range(2):
        z = batch[i].clone().requires_grad_()
        alone = loss(z, values[i])
        torch.testing.assert_close(together[i], alone)
        torch.testing.assert_close(slopes[i], torch.autograd.grad(alone.sum(), z)[0])
        single = loss(batch[i].float(), values[i])
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, alone.detach().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_torchs_divergence_summed_over_classes(temperature):
    """With torch's default reduction it is smaller by batch × classes: a public mistake."""
    student, teacher = logits(0), logits(1)
    ours = distillation(student, teacher, temperature)
    ours_scaled = ours / temperature**2
    student_log, teacher_p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    torch.testing.assert_close(ours_scaled, F.kl_div(student_log, teacher_p, reduction="none").sum(-1))
    torch.testing.assert_close(ours_scaled.mean(), F.kl_div(student_log, teacher_p, reduction="batchmean"))
    with pytest.warns(UserWarning, match="batchmean"):
        mistaken = F.kl_div(student_log, teacher_p)
    torch.testing.assert_close(ours_scaled.mean(), CLASSES * mistaken)
    assert distillation(teacher, teacher, temperature).abs().max() < 1e-12


def test_slope_of_distillation_tends_to_centred_logits():
    """T² KL → Σ (centred difference)² / (2 C) as T grows: its slope is the centred difference over C."""
    student, teacher = logits(0), logits(1)
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        slope = grad(lambda z, t: distillation(z, teacher, t).sum())(student, temperature)
        centred = student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
        errors.append(((slope - centred / CLASSES).norm() / (centred / CLASSES).norm()).item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 3e-3


def test_bad_teaching_mixes_probabilities():
    student, full, random = logits(0), logits(1), logits(2)
    share = torch.tensor([0.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.75], dtype=torch.float64)
    for temperature in (1.0, 3.0):
        values = bad_teaching(student, full, random, share, temperature)
        torch.testing.assert_close(values[0], distillation(student, full, temperature)[0])
        torch.testing.assert_close(values[1], distillation(student, random, temperature)[1])
        for i in range(7):
            wanted = (1 - share[i]) * (full[i] / temperature).softmax(0) + share[i] * (random[i] / temperature).softmax(
                0
            )
            got = (student[i] / temperature).softmax(0)
            expected = temperature**2 * sum(wanted[k] * (wanted[k] / got[k]).log() for k in range(CLASSES))
            assert values[i].item() == pytest.approx(float(expected), rel=1e-10)


def test_random_labels_are_uniform_the_true_one_among_them_and_new_with_each_key():
    """The values of a row tell which label was drawn: -log p[y']."""
    z = logits(0, 1).expand(20_000, -1)
    values = random_label_loss(z, key(0))
    options = -z[0].log_softmax(-1)
    drawn = (values[:, None] - options).abs().argmin(-1)
    torch.testing.assert_close(options[drawn], values)
    counts = torch.bincount(drawn, minlength=CLASSES)
    assert ((counts - 4000) ** 2 / 4000).sum() < 25  # chi-squared with 4 degrees of freedom
    error = options.std(correction=0) / math.sqrt(20_000)
    assert (values.mean() - options.mean()).abs() < 4 * error
    assert not torch.equal(values, random_label_loss(z, key(1)))
    assert torch.equal(values, random_label_loss(z, key(0)))


def test_neg_grad_ends_in_fine_tuning_and_ascent():
    z = logits(0)
    ce = F.cross_entropy(z, LABELS, reduction="none")
    torch.testing.assert_close(neg_grad(z, LABELS, FORGOTTEN, 1.0), torch.where(FORGOTTEN, 0, ce))
    torch.testing.assert_close(neg_grad(z, LABELS, FORGOTTEN, 0.0), torch.where(FORGOTTEN, -ce, 0))
    torch.testing.assert_close(neg_grad(z, LABELS, FORGOTTEN, 0.7), torch.where(FORGOTTEN, -0.3 * ce, 0.7 * ce))


def test_scrub_by_its_parts():
    z, teacher = logits(0), logits(1)
    ce, away = F.cross_entropy(z, LABELS, reduction="none"), distillation(z, teacher, 4.0)
    up = scrub_loss(z, teacher, LABELS, FORGOTTEN, torch.tensor(True), 0.3, 0.8)
    down = scrub_loss(z, teacher, LABELS, FORGOTTEN, torch.tensor(False), 0.3, 0.8)
    torch.testing.assert_close(up, torch.where(FORGOTTEN, -away, 0))
    torch.testing.assert_close(down, torch.where(FORGOTTEN, 0, 0.8 * ce + 0.3 * away))


def test_distances_by_hand():
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    target = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    torch.testing.assert_close(toward_target(features, target), torch.tensor([0, 1, 2, 1 - 0.5**0.5, 1]))
    assert logit_matching(features, target).tolist() == [4, 5, 4, 1, 1]
    parameters = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([-3.0, 0.0])}
    assert l1_norm(parameters).item() == 6
    slopes = grad(l1_norm)(parameters)
    assert (slopes["a"].tolist(), slopes["b"].tolist()) == ([[1, -1]], [-1, 0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda z: distillation(z, z, 0.0), "temperature"),
        (lambda z: bad_teaching(z, z, z, FORGOTTEN.to(z), -1.0), "temperature"),
        (lambda z: neg_grad(z, LABELS, FORGOTTEN, 1.5), "beta"),
        (lambda z: neg_grad(z, LABELS + 3, FORGOTTEN), "labels"),
        (lambda z: scrub_loss(z, z, LABELS, FORGOTTEN, torch.tensor(True), -0.1), "alpha"),
        (lambda z: scrub_loss(z, z, LABELS, FORGOTTEN, torch.tensor(True), 0.1, -0.1), "gamma"),
        (lambda z: scrub_loss(z, z, LABELS + 3, FORGOTTEN, torch.tensor(True)), "labels"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call(logits(0))
