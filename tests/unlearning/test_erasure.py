"""Erasing a class: the two readings of ESD, one step by hand, targets in closed form, and the retrained oracle."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from toolkit.diffusion import LAST, NULL, Mixture, ScoreNet, ddim, denoising_loss, epsilon_field
from toolkit.fleet import SGD, Adam, Fleet, cosine, train
from toolkit.models import MLP
from toolkit.random import key, normal
from toolkit.unlearning.erasure import all_but_one, erased_share, esd, esd_field, esd_target, measure_erasure
from toolkit.unlearning.exact import retrain
from toolkit.unlearning.settings import forget_class

ANGLE = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
MIX = Mixture(
    means=1.3 * torch.stack([ANGLE.cos(), ANGLE.sin()], 1),
    deviations=torch.full((3,), 0.2),
    weights=torch.full((3,), 1 / 3),
    classes=torch.arange(3),
)
ERASED = 1
POINTS = normal(key(3), (40, 2), torch.float64)


def net() -> ScoreNet:
    return ScoreNet(2, 3, (32, 32)).double()


def data() -> dict[str, torch.Tensor]:
    return dict(zip("xy", MIX.sample(2000), strict=True))


OPTIONS: dict[str, Any] = {
    "members": 2,
    "steps": 350,
    "batch": 128,
    "optimiser": Adam(8e-3),
    "schedule": cosine(),
    "progress": False,
}


@pytest.fixture(scope="module")
def trained() -> Fleet:
    return train(net, denoising_loss, data(), **OPTIONS)


@pytest.fixture(scope="module")
def rough() -> Fleet:
    """A fleet after a few steps, for what does not depend on quality."""
    return train(net, denoising_loss, data(), **(OPTIONS | {"steps": 25}))


def answers(fleet: Fleet, condition: int, t: float = 0.4) -> torch.Tensor:
    return epsilon_field(fleet)(POINTS, t, condition)


def test_targets_of_both_readings():
    erased, null = normal(key(1), (5, 2), torch.float64), normal(key(2), (5, 2), torch.float64)
    assert torch.equal(esd_target(erased, erased, null, 0.0), erased)
    torch.testing.assert_close(esd_target(erased, erased, null, 1.0), null)
    torch.testing.assert_close(esd_target(erased, erased, null, 1 + 0.7), esd_target(null, erased, null, 0.7))
    torch.testing.assert_close(esd_target(null, erased, null, 1.0), 2 * null - erased)


def test_the_codes_reading_is_the_papers_with_a_strength_larger_by_one(rough):
    eta = torch.tensor([0.5, 1.0], dtype=torch.float64)
    options: dict[str, Any] = {"traces": 8, "moments": 5, "steps": 10, "seed": 3}
    paper, code = (
        esd(rough, ERASED, eta=eta, **options),
        esd(rough, ERASED, eta=eta + 1, anchor=ERASED, **options),
    )
    torch.testing.assert_close(paper.parameters, code.parameters, rtol=1e-8, atol=1e-9)
    assert float((paper.parameters - esd(rough, ERASED, eta=eta + 1, **options).parameters).abs().max()) > 1e-3
    same = esd(rough, ERASED, eta=0.0, anchor=ERASED, **options)  # the code's 0: nothing to learn
    torch.testing.assert_close(same.parameters, rough.parameters, rtol=0, atol=1e-6)


def traces_by_hand(module, start: torch.Tensor, guidance: float, moments: int) -> tuple[torch.Tensor, torch.Tensor]:
    times = [LAST * (1 - i / moments) for i in range(moments + 1)]
    x, points = start, []
    with torch.no_grad():
        for t, s in pairwise(times):
            points.append(x)
            null, own = module(x, t, NULL), module(x, t, ERASED)
            epsilon = null + guidance * (own - null)
            clean = (x - math.sin(math.pi * t / 2) * epsilon) / math.cos(math.pi * t / 2)
            x = math.cos(math.pi * s / 2) * clean + math.sin(math.pi * s / 2) * epsilon
    return torch.cat(points), torch.tensor(times[:-1], dtype=start.dtype).repeat_interleave(len(start))


@pytest.mark.parametrize("method", ["esd", "all_but_one"])
def test_one_step_of_plain_gradient_descent_by_hand(rough, method, monkeypatch):
    start = normal(key(6), (2, 6, 2), torch.float64)
    monkeypatch.setattr("toolkit.random.normal", lambda *_: start)
    strength, guidance = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([3.0, 1.5], dtype=torch.float64)
    options: dict[str, Any] = {"traces": 6, "moments": 4, "steps": 1, "batch": 24, "optimiser": SGD(0.1)}
    options |= {"guidance": guidance, "parts": "all"}
    if method == "esd":
        moved = esd(rough, ERASED, eta=strength, **options)
    else:  # two steps: in the first there is no drift yet
        moved = all_but_one(rough, ERASED, alternative=2, drift_weight=strength, **(options | {"steps": 2}))
    for i in range(2):
        frozen, student = rough[i], rough[i]
        x, t = traces_by_hand(frozen, start[i], float(guidance[i]), 4)
        with torch.no_grad():
            null, own, other = (frozen(x, t, c) for c in (NULL, ERASED, 2))
        for _ in range(1 if method == "esd" else 2):
            if method == "esd":
                value = (student(x, t, ERASED) - null + strength[i] * (own - null)).square().mean()
            else:
                guide, plain = student(x, t, ERASED) - student(x, t), student(x, t)
                value = (guide - (other - null)).square().mean() + strength[i] * (plain - null).square().mean()
            student.zero_grad()
            value.backward()
            with torch.no_grad():
                for p in student.parameters():
                    p -= 0.1 * (0 if p.grad is None else p.grad)
        torch.testing.assert_close(moved.parameters[i], rough.layout.pack(student), rtol=1e-9, atol=1e-10)


def test_only_the_parts_asked_for_move(rough):
    options: dict[str, Any] = {"traces": 8, "moments": 5, "steps": 5}
    for method in (esd, all_but_one):
        for parts in ("condition", "rest", "all"):
            moved = method(rough, ERASED, parts=parts, **options)
            same = {
                name: bool(torch.equal(a, b))
                for (name, a), b in zip(
                    rough.layout.views(rough.parameters).items(),
                    moved.layout.views(moved.parameters).values(),
                    strict=True,
                )
            }
            assert same.pop("condition") == (parts == "rest")
            assert all(value == (parts == "condition") for value in same.values())
            if parts == "condition":  # the class's own row: all other answers to the last bit
                assert all(torch.equal(answers(moved, c), answers(rough, c)) for c in (0, 2, NULL))
                assert not torch.equal(answers(moved, ERASED), answers(rough, ERASED))


def test_members_are_what_they_would_be_alone(rough):
    eta = torch.tensor([0.5, 2.0], dtype=torch.float64)
    options: dict[str, Any] = {"traces": 8, "moments": 5, "steps": 5, "batch": 16}
    both = esd(rough, ERASED, eta=eta, **options)
    alone = esd(rough[1:], ERASED, eta=2.0, **options)
    torch.testing.assert_close(both.parameters[1:], alone.parameters)


def gaussians(x, t, condition):
    """Class 0 at (1, 0), class 1 at (0, 1), and everything at (-0.5, 0), all of deviation 0.3."""
    means = torch.tensor([[1.0, 0], [0, 1], [-0.5, 0]], dtype=torch.float64)
    three = Mixture(means, torch.full((3,), 0.3), torch.full((3,), 1 / 3), torch.arange(3))
    condition = torch.as_tensor(condition)
    return three.epsilon(x, t, torch.where(condition < 0, 2, condition))


@pytest.mark.parametrize("eta", [0.0, 0.5, 2.0])
def test_the_target_of_two_gaussians_overshoots(eta):
    field = esd_field(gaussians, ERASED, eta=eta)
    found = ddim(field, normal(key(0), (4000, 2), torch.float64), ERASED, steps=100)
    null, erased = torch.tensor([-0.5, 0], dtype=torch.float64), torch.tensor([0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found.mean(0), null + eta * (null - erased), rtol=0, atol=0.05)
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.3, dtype=torch.float64), rtol=0.05, atol=0)


def test_the_field_leaves_other_conditions_alone():
    conditions = torch.tensor([0, 1, 2, NULL] * 10)
    field, plain = esd_field(MIX.epsilon, ERASED, eta=2.0), MIX.epsilon(POINTS, 0.3, conditions)
    found = field(POINTS, 0.3, conditions)
    assert torch.equal(found[conditions != ERASED], plain[conditions != ERASED])
    null, own = MIX.epsilon(POINTS, 0.3), MIX.epsilon(POINTS, 0.3, ERASED)
    torch.testing.assert_close(found[conditions == ERASED], (null - 2 * (own - null))[conditions == ERASED])
    torch.testing.assert_close(esd_field(MIX.epsilon, ERASED, eta=1, anchor=ERASED)(POINTS, 0.3, ERASED), null)


def test_share_counts_the_most_probable_class():
    near = MIX.means[[1, 1, 0, 2]] + 0.05 * POINTS[:4]
    assert float(erased_share(near, MIX, 1)) == 0.5
    assert erased_share(torch.stack([near, near[[2, 2, 3, 0]]]), MIX, 1).tolist() == [0.5, 0.25]
    lopsided = Mixture(MIX.means, torch.tensor([0.2, 2.0, 0.2]), MIX.weights, MIX.classes)  # not the nearest mean
    assert float(erased_share(torch.tensor([[2.6, 0.0]], dtype=torch.float64), lopsided, 1)) == 1


def test_measures_of_exact_models():
    def oracle(x, t, condition):
        rest, named = MIX.without(ERASED), torch.as_tensor(condition)
        unnamed = (named == ERASED) | (named == NULL)
        return torch.where(unnamed[..., None], rest.epsilon(x, t), MIX.epsilon(x, t, condition))

    before, after = measure_erasure(MIX.epsilon, MIX, ERASED), measure_erasure(oracle, MIX, ERASED)
    assert float(before.share) > 0.99
    assert float(before.free_share) == pytest.approx(1 / 3, abs=0.09)
    assert float(after.share) == float(after.free_share) < 0.01
    assert float(after.distance) == float(after.free_distance) < 0.3 < 1 < float(before.distance)
    for found in (before, after):
        assert bool((found.kept[:, [0, 2]] < 0.06).all())
        assert bool(found.kept[:, ERASED].isnan().all())
    assert bool((before.floor[[0, 2]] < 0.06).all())
    # class 0 asked, class 2 made
    swapped = measure_erasure(lambda x, t, c: MIX.epsilon(x, t, torch.where(c == 0, 2, c)), MIX, ERASED)
    shift = float((MIX.means[0] - MIX.means[2]).norm()) / math.sqrt(2)
    assert float(swapped.kept[0, 0]) == pytest.approx(shift, rel=0.1)


def test_erasing_from_a_trained_fleet(trained):
    before = measure_erasure(trained, MIX, ERASED)
    assert float(before.share.min()) > 0.97
    eta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    options: dict[str, Any] = {"traces": 64, "moments": 25, "steps": 150}
    coded = measure_erasure(esd(trained, ERASED, eta=eta, anchor=ERASED, **options), MIX, ERASED)
    assert torch.equal(coded.kept.nan_to_num(), before.kept.nan_to_num())
    assert float(coded.share[0]) > 0.2  # the code's 1 only forgets the name
    assert float(coded.share[1]) < float(coded.share[0]) - 0.05
    options |= {"optimiser": Adam(5e-3), "schedule": cosine()}
    other = all_but_one(trained, ERASED, alternative=2, drift_weight=1.0, **options)
    made = ddim(other, POINTS, ERASED)
    assert float(erased_share(ddim(trained, POINTS, ERASED), MIX, 2).max()) < 0.05
    assert float(erased_share(made, MIX, 2).min()) > 0.5
    far = answers(other, NULL) - answers(trained, NULL)
    loose = all_but_one(trained, ERASED, alternative=2, drift_weight=0.0, **options)
    assert float(far.square().mean()) < float((answers(loose, NULL) - answers(trained, NULL)).square().mean()) / 2


def test_the_retrained_oracle_answers_the_erased_name_without_condition():
    fields = data()
    oracle = retrain(net, denoising_loss, fields, forget_class(fields["y"], ERASED), **(OPTIONS | {"members": 1}))
    assert torch.equal(answers(oracle, ERASED), answers(oracle, NULL))
    found = measure_erasure(oracle, MIX, ERASED)
    assert float(found.share.max()) < 0.08
    assert float(found.distance.max()) < 0.35
    assert float(found.kept[:, [0, 2]].max()) < 0.2


def test_errors_name_the_argument(rough):
    plain = train(lambda: MLP(2, (), 2), lambda m, b, h: m(b.x).sum(-1), {"x": POINTS.float()}, members=1, steps=0)
    fewer = Mixture(MIX.means, MIX.deviations, MIX.weights, torch.tensor([0, 1, 1]))
    for name, call in {
        "erased": lambda: esd(rough, 3),
        "anchor": lambda: esd(rough, 1, anchor=5),
        "alternative": lambda: all_but_one(rough, 1, alternative=-2),
        "trained": lambda: esd(plain, 1),
        "traces": lambda: esd(rough, 1, traces=0),
        "moments": lambda: all_but_one(rough, 1, moments=0),
        "eta": lambda: esd(rough, 1, eta=torch.ones(3)),
        "drift_weight": lambda: all_but_one(rough, 1, drift_weight=-1.0),
        "erased: expected a class": lambda: erased_share(POINTS, MIX, 3),
        "mixture": lambda: measure_erasure(rough, fewer, 1),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
