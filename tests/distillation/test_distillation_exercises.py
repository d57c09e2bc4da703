"""The distillation lab's exercises: solutions against the toolkit, autograd, scipy and loops; public mistakes too."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch.nn import functional as F

from toolkit import models, random
from toolkit.diffusion import alpha_sigma
from toolkit.distillation.features import class_directions, norm_and_direction
from toolkit.distillation.logits import decoupled_terms, kd
from toolkit.distillation.ranking import correlation_distance, dist, plackett_luce
from toolkit.distillation.sampling import gaussian_flow
from toolkit.exercises import EXERCISES, check, museum_distillation
from toolkit.exercises import distillation as exercises

SEEDS = range(4)
LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * normal(seed, 6, 5) + 1, 3 * normal(seed + 10, 6, 5) - 2


def numbers(value: torch.Tensor) -> list[float]:
    return value.double().tolist()


def mistake(name: str, which: str):
    return EXERCISES[name].misconceptions[which][0]


# --- softened logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_softened_loss_against_the_toolkit_and_scipy(seed, temperature) -> None:
    student, teacher = logits(seed)
    found = numbers(exercises.softened_loss(student, teacher, temperature))
    assert found == pytest.approx(numbers(kd(student, teacher, LABELS, temperature, 1.0)), rel=1e-10)
    p, q = (special.softmax(z.numpy() / temperature, axis=1) for z in (teacher, student))
    assert found == pytest.approx((temperature**2 * stats.entropy(p, q, axis=1)).tolist(), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_limit_against_autograd(seed) -> None:
    """The error falls as 1/T: at two high temperatures it is what is said, and ten times less at the second."""
    student, teacher = logits(seed)
    found = exercises.gradient_limit(student, teacher)
    errors = []
    for temperature in (1e3, 1e4):
        leaf = student.clone().requires_grad_()
        (slope,) = torch.autograd.grad(kd(leaf, teacher, LABELS, temperature, 1.0).sum(), leaf)
        errors.append((found - slope).abs().max().item())
    assert errors[0] < 0.02 * found.abs().max()
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
    leaf = student.clone().requires_grad_()
    gap = (leaf - leaf.mean(1, keepdim=True) - teacher + teacher.mean(1, keepdim=True)).square().mean(1) / 2
    (slope,) = torch.autograd.grad(gap.sum(), leaf)
    torch.testing.assert_close(found, slope)


# --- decoupled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_decoupled_parts_against_the_toolkit_and_the_whole(seed, temperature) -> None:
    student, teacher = logits(seed)
    target, rest = decoupled_terms(student, teacher, LABELS, temperature)
    whole = kd(student, teacher, LABELS, temperature, 1.0) / temperature**2
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    for i, label in enumerate(LABELS.tolist()):
        found = numbers(exercises.decoupled_parts(p[i], q[i], label))
        assert found == pytest.approx([target[i].item(), rest[i].item(), whole[i].item()], rel=1e-9)
        assert found[2] == pytest.approx(stats.entropy(p[i].numpy(), q[i].numpy()), rel=1e-9)


# --- rankings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_ranking_likelihood_against_the_toolkit_and_all_rankings(seed) -> None:
    scores = 2 * normal(seed, 4)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    found = torch.stack([exercises.ranking_likelihood(scores, order) for order in orders])
    oracle = -plackett_luce(scores.expand(24, 4), orders, torch.ones(24, 4, dtype=torch.float64))
    torch.testing.assert_close(found, oracle)
    assert found.exp().sum().item() == pytest.approx(1, rel=1e-12)
    first = torch.stack([found[orders[:, 0] == k].logsumexp(0) for k in range(4)])
    torch.testing.assert_close(first, scores.log_softmax(0))


def test_ranking_likelihood_by_drawing() -> None:
    """The most likely rankings are those of logits with Gumbel noise, which is how Plackett and Luce draw."""
    scores, count = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64), 40_000
    noise = -(-random.uniform(random.key(3), (count, 3), torch.float64).log()).log()
    drawn = (scores + noise).argsort(1, descending=True)
    for order in torch.tensor(list(itertools.permutations(range(3)))):
        p = exercises.ranking_likelihood(scores, order).exp().item()
        share = (drawn == order).all(1).double().mean().item()
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / count)


def test_the_last_choice_is_none_and_may_be_left_out() -> None:
    def without_last(scores: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        chosen = scores[order]
        return torch.stack([chosen[k] - chosen[k:].logsumexp(0) for k in range(len(chosen) - 1)]).sum()

    assert check("plackett-luce", without_last).status == "passed"


# --- correlations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_correlation_distances_against_the_toolkit_and_scipy(seed) -> None:
    student, teacher = logits(seed)
    p, q = student.softmax(1), teacher.softmax(1)
    found = exercises.correlation_distances(p, q)
    torch.testing.assert_close(found, correlation_distance(p, q))
    oracle = [1 - stats.pearsonr(a, b).statistic for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    assert numbers(found) == pytest.approx(oracle, rel=1e-9)
    torch.testing.assert_close(found, dist(student, teacher, LABELS, 1.0, 1.0, 0.0, 0.0))
    assert numbers(exercises.correlation_distances(3 * q + 0.2, q)) == pytest.approx([0] * 6, abs=1e-12)
    classes = mistake("correlation", "over the batch")(p, q).mean()
    torch.testing.assert_close(dist(student, teacher, LABELS, 1.0, 0.0, 1.0, 0.0).mean(), classes)


# --- norm and direction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_long_and_aligned_against_the_toolkit_and_a_loop(seed) -> None:
    features, classes = normal(seed, 20, 7), torch.arange(20) % 5
    means = torch.stack([features[classes == c].mean(0) for c in range(5)])
    student, teacher = normal(seed + 10, 6, 7), normal(seed + 20, 6, 7) * torch.linspace(0.3, 3, 6)[:, None]
    found = exercises.long_and_aligned(student, teacher, means, LABELS)
    oracle = norm_and_direction(student, teacher, class_directions(features, classes, 5), LABELS)
    torch.testing.assert_close(found, oracle)
    for i, label in enumerate(LABELS.tolist()):
        s, t, m = student[i].numpy(), teacher[i].numpy(), means[label].numpy()
        lengths = [np.linalg.norm(v) for v in (s, t, m)]
        assert found[i].item() == pytest.approx(1 - s @ m / lengths[2] / max(lengths[:2]), rel=1e-9)


def test_long_and_aligned_in_closed_form() -> None:
    means = torch.tensor([[0.0, 2.0]])
    student = torch.tensor([[0.0, 5.0], [0.0, 1.0], [3.0, 0.0], [0.0, -9.0]])
    teacher = torch.tensor([[4.0, 0.0]]).expand(4, 2)
    found = exercises.long_and_aligned(student, teacher, means, torch.zeros(4, dtype=torch.long))
    assert numbers(found) == pytest.approx([0, 0.75, 1, 2])


# --- the consistency map ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("mean", "deviation"), [(1.5, 0.6), (-2.0, 1.3), (0.0, 1.0), (3.0, 0.05)])
def test_gaussian_consistency_against_the_toolkit_and_a_solver(mean, deviation, time) -> None:
    x = 2 * normal(0, 5)
    found = numbers(exercises.gaussian_consistency(x, time, mean, deviation))
    at = torch.tensor([mean], dtype=torch.float64)
    assert found == pytest.approx(numbers(gaussian_flow(x[:, None], time, 0.0, at, deviation)[:, 0]), rel=1e-9)

    def flow(angle: float, x: np.ndarray) -> np.ndarray:
        """dx/dφ = -σ x̂_0 + α ε̂ for α = cos φ, σ = sin φ, with the posterior mean x̂_0 of Gaussian data."""
        a, s = math.cos(angle), math.sin(angle)
        v = a**2 * deviation**2 + s**2
        denoised = mean + a * deviation**2 / v * (x - a * mean)
        noise = s / v * (x - a * mean)
        return -s * denoised + a * noise

    solved = integrate.solve_ivp(flow, (math.pi * time / 2, 0), x.numpy(), rtol=1e-9, atol=1e-11, method="DOP853")
    assert found == pytest.approx(solved.y[:, -1].tolist(), abs=1e-6)


def test_gaussian_consistency_keeps_the_distribution_and_the_denoised_mean_does_not() -> None:
    time, mean, deviation = 0.6, 1.5, 0.7
    alpha, sigma = alpha_sigma(torch.tensor(time, dtype=torch.float64))
    noised = alpha * (mean + deviation * normal(1, 50_000)) + sigma * normal(2, 50_000)
    ends = exercises.gaussian_consistency(noised, time, mean, deviation)
    assert ends.mean().item() == pytest.approx(mean, abs=0.015)
    assert ends.std().item() == pytest.approx(deviation, rel=0.015)
    means = mistake("consistency-point", "denoised mean")(noised, time, mean, deviation)
    spread = (alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2).sqrt()).item()
    assert means.std().item() == pytest.approx(spread, rel=0.015)


# --- equal compute ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_steps_with_teacher_by_spending(seed, cached) -> None:
    """Step after step is paid for until the operations of the student alone are used up."""
    draw = random.uniform(random.key(seed), (5,), torch.float64).tolist()
    steps, batch, student = 200 + int(300 * draw[0]), 1 + int(60 * draw[1]), 1000 + int(5000 * draw[2])
    teacher, examples = 500 + int(9000 * draw[3]), 1 + int(1000 * draw[4])
    left = steps * batch * (2 + 4) * student
    left -= examples * 2 * teacher if cached else 0
    price = batch * ((2 + 4) * student + (0 if cached else 2) * teacher)
    taken = 0
    while left >= price:
        left, taken = left - price, taken + 1
    assert exercises.steps_with_teacher(steps, batch, student, teacher, examples, cached) == taken


def test_operations_of_a_net_are_those_the_exercise_counts() -> None:
    """torch's own count for a net without biases: 2 per weight and example forward, 4 more backward but for x."""
    from torch.utils.flop_counter import FlopCounterMode

    net = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 3, bias=False))
    weights, x = sum(p.numel() for p in net.parameters()), torch.ones(5, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert counter.get_total_flops() == 2 * weights * 5
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    assert counter.get_total_flops() == 6 * weights * 5


# --- the two public mistakes -----------------------------------------------------------------------------------------


def public_tckd(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As in mdistiller: probabilities added up, then the logarithm, then ``kl_div``; here one value per example."""
    own = F.one_hot(labels, student.shape[1])
    p, q = (
        torch.stack([(z.softmax(1) * own).sum(1), (z.softmax(1) * (1 - own)).sum(1)], 1) for z in (teacher, student)
    )
    return F.kl_div(q.log(), p, reduction="none").sum(1)


def sure(lead: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Single precision; the student leads by so much at the label, the teacher is unsure."""
    student, teacher = (z.float() for z in logits(0))
    return student + lead * F.one_hot(LABELS, 5), teacher


@pytest.mark.parametrize("seed", SEEDS)
def test_label_against_rest_against_the_toolkit(seed) -> None:
    student, teacher = logits(seed)
    found = museum_distillation.label_against_rest(student, teacher, LABELS)
    torch.testing.assert_close(found, decoupled_terms(student, teacher, LABELS, 1.0).target)
    torch.testing.assert_close(found, public_tckd(student, teacher, LABELS))


@pytest.mark.parametrize("lead", [0.0, 40.0, 300.0, 1500.0, 1e5])
def test_label_against_rest_for_sure_students(lead) -> None:
    """Against double precision, where the probabilities of leads up to 700 do not vanish; with a gradient throughout.

    Beyond, TCKD is a straight line in the lead: its slope is the teacher's 1 - p.
    """
    student, teacher = sure(lead)
    student.requires_grad_()
    found = museum_distillation.label_against_rest(student, teacher, LABELS)
    near = student.detach().double() - max(lead - 600, 0) * F.one_hot(LABELS, 5)
    oracle = public_tckd(near, teacher.double(), LABELS)
    p = teacher.double().softmax(1).gather(1, LABELS[:, None])[:, 0]
    assert numbers(found.detach()) == pytest.approx(numbers(oracle + max(lead - 600, 0) * (1 - p)), rel=2e-4)
    (slope,) = torch.autograd.grad(found.sum(), student)
    q = student.detach().double().softmax(1).gather(1, LABELS[:, None])[:, 0]
    assert numbers(slope.gather(1, LABELS[:, None])[:, 0]) == pytest.approx(numbers(q - p), abs=1e-5)
    torch.testing.assert_close(found.detach(), decoupled_terms(student.detach(), teacher, LABELS, 1.0).target)


def test_the_public_label_against_rest_fails() -> None:
    public = mistake("sure-logits", "log of a sum")
    for lead in (0.0, 60.0, 300.0):
        student, teacher = sure(lead)
        torch.testing.assert_close(public(student, teacher, LABELS), public_tckd(student, teacher, LABELS))
    assert public_tckd(*sure(60.0), LABELS).isfinite().all()
    assert public_tckd(*sure(300.0), LABELS).isinf().all()
    for written in (public, public_tckd):
        outcome = check("sure-logits", written)
        assert (outcome.status, outcome.misconception) == ("failed", "log of a sum")
    student, teacher = sure(1500.0)
    leaking = mistake("sure-logits", "minus 1000")(student, teacher, LABELS)
    assert (leaking < 0.8 * museum_distillation.label_against_rest(student, teacher, LABELS)).all()


def test_sure_logits_are_met_by_a_net_whose_weights_are_large() -> None:
    """An MLP separates its data; scaling its last layer up makes it as sure as one likes, right all along."""
    torch.manual_seed(0)
    x, y = torch.eye(4), torch.arange(4)
    net = models.MLP(4, [8], 4)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    student = 60 * net(x).detach()
    assert (student.argmax(1) == y).all()
    flat = torch.zeros(4, 4)
    assert public_tckd(student, flat, y).isinf().any()
    assert museum_distillation.label_against_rest(student, flat, y).isfinite().all()


@pytest.mark.parametrize("text", ["True", "False", "true", "false", "FALSE"])
def test_mixing_weights_by_a_loop(text) -> None:
    drawn, plain = random.uniform(random.key(1), (9,)), random.uniform(random.key(2), (9,)) < 0.5
    found = museum_distillation.mixing_weights(text, drawn, plain)
    partial = text[0] in "tT"
    expected = [1.0 if partial and own else weight for weight, own in zip(drawn.tolist(), plain.tolist(), strict=True)]
    assert numbers(found) == pytest.approx(expected)


def test_the_public_switch_fails() -> None:
    """A command line as MIX-KD reads it: the option has a default and no type."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pmixup", default=True)
    public = mistake("mixing-switch", "text is true")
    drawn, plain = torch.full((4,), 0.5), torch.tensor([True, True, True, False])

    def from_command_line(option: str, drawn: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        asked = parser.parse_args(["--pmixup", option]).pmixup
        return torch.where(plain, 1.0, drawn) if asked else drawn

    for text in ("True", "False"):
        assert numbers(from_command_line(text, drawn, plain)) == [1, 1, 1, 0.5]
        assert torch.equal(public(text, drawn, plain), from_command_line(text, drawn, plain))
    assert numbers(museum_distillation.mixing_weights("False", drawn, plain)) == [0.5] * 4
    outcome = check("mixing-switch", from_command_line)
    assert (outcome.status, outcome.misconception) == ("failed", "text is true")
