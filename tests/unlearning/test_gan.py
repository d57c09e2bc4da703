"""Adapt, then unlearn, against derivatives by hand, one player at a time, and shares of modes that are counted."""

import math
from typing import Any

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F

from toolkit.fleet import SGD, Adam, Fleet, train
from toolkit.fleet.members import NOISE
from toolkit.fleet.schedules import linear
from toolkit.random import fold_in, key, normal
from toolkit.unlearning import gan
from toolkit.unlearning.gan import GAN

MODES, MEMBERS, SPREAD = 3, 2, 0.3
DATA, CENTRES = gan.ring(600, MODES, radius=1.5, spread=SPREAD)


def net() -> GAN:
    return GAN(width=16)


def exact() -> GAN:
    return GAN(width=5).double()


def small(members: int = MEMBERS) -> Fleet:
    """In float64 and hardly trained: for what holds for any parameters."""
    data = {"x": DATA["x"].double()}
    return train(exact, gan.gan_loss(), data, members=members, steps=3, batch=8, optimiser=Adam(0.01), progress=False)


def samples_of(fleet: Fleet, n: int = 40):
    samples = gan.generate(fleet, n)
    return samples, torch.arange(n).expand(len(fleet), -1) % 4 == 0


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return small()


@pytest.fixture(scope="module")
def trained() -> Fleet:
    options: dict[str, Any] = {"batch": 64, "optimiser": Adam(5e-3, betas=(0.0, 0.99)), "schedule": linear()}
    return train(net, gan.gan_loss(), DATA, members=MEMBERS, steps=400, progress=False, **options)


def named(fleet: Fleet, member: int, prefix: str = "generator") -> dict[str, torch.Tensor]:
    views = fleet.layout.views(fleet.parameters)
    return {name: v[member] for name, v in views.items() if name.startswith(prefix)}


def row(fleet: Fleet, prefix: str) -> torch.Tensor:
    return torch.stack([torch.cat([v.flatten() for v in named(fleet, i, prefix).values()]) for i in range(len(fleet))])


def shares(fleet: Fleet) -> torch.Tensor:
    modes = gan.nearest_mode(gan.generate(fleet, 1000, seed=5), CENTRES)
    return F.one_hot(modes, MODES).float().mean(1)


# ------------------------------------------------------------------------------------------------- the two players


def test_each_player_gets_its_own_slope_only(fleet):
    """One step of plain gradient descent against two losses of one module, each with the other player at rest."""
    data = {"x": DATA["x"][:6].double()}
    out = train(
        exact,
        gan.gan_loss(r1=0.7),
        data,
        start=fleet,
        steps=1,
        batch=6,
        optimiser=SGD(1.0),
        progress=False,
        snapshots=[1],
    )

    for i in range(MEMBERS):
        z = normal(fold_in(fold_in(fold_in(key(0), i), NOISE), 0), (6, 2), torch.float64)
        model, x = fleet[i], data["x"].clone().requires_grad_()
        made = model(z)
        real = model(x, judge=True)
        slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0]
        judged = F.softplus(-real) + F.softplus(model(made, judge=True)) + 0.35 * slope.square().sum(1)
        of_d = torch.autograd.grad(judged.mean(), list(model.discriminator.parameters()), retain_graph=True)
        fooled = F.binary_cross_entropy_with_logits(model(made, judge=True), torch.ones(6, dtype=torch.float64))
        of_g = torch.autograd.grad(fooled, list(model.generator.parameters()))
        for prefix, wanted in (("discriminator", of_d), ("generator", of_g)):
            moved = row(fleet, prefix)[i] - row(out, prefix)[i]
            torch.testing.assert_close(moved, torch.cat([w.flatten() for w in wanted]), atol=1e-12, rtol=1e-8)


def test_slopes_by_hand_are_those_of_autograd(fleet):
    x = DATA["x"][:3].double()
    model = fleet[0]
    logits, slopes = model(x, judge=True, slopes=True)
    torch.testing.assert_close(logits, model(x, judge=True))
    torch.testing.assert_close(slopes, torch.stack([grad(lambda v: model(v[None], judge=True)[0])(v) for v in x]))


def test_samples_depend_on_seed_and_stream(fleet):
    samples = gan.generate(fleet, 5)
    assert samples.shape == (MEMBERS, 5, 2)
    assert torch.equal(gan.generate(fleet[1:], 5), samples[1:])
    assert not torch.equal(gan.generate(fleet, 5, seed=1), samples)


def test_a_trained_fleet_makes_every_mode(trained):
    assert bool((shares(trained) > 0.15).all())


# --------------------------------------------------------------------------------------------------------- formulas


def test_slopes_of_repulsion_by_hand():
    """d = |θ - θ_A|² / n, one tensor: the slopes are -200 γ e^(-γd), -2 γ and -2 γ / d² times (θ - θ_A) / n."""
    generator = torch.Generator().manual_seed(1)
    theta, other = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    gamma, away = 0.8, (theta - other) / 7
    d = (theta - other).square().sum() / 7
    factors = {"el2": -200 * gamma * math.exp(-gamma * d), "nl2": -2 * gamma, "il2": -2 * gamma / d**2}
    for kind, factor in factors.items():
        got = grad(lambda t, k=kind: gan.repulsion_loss(gan.parameter_distance({"w": t}, [{"w": other}]), gamma, k))(
            theta
        )
        torch.testing.assert_close(got, factor * away)


def test_repulsion_near_and_far():
    near, far = torch.tensor(1e-12, dtype=torch.float64), torch.tensor(1e6, dtype=torch.float64)
    values = {kind: [float(gan.repulsion_loss(d, 2.0, kind)) for d in (near, far)] for kind in ("el2", "nl2", "il2")}
    assert values["el2"] == pytest.approx([100, 0])
    assert values["nl2"] == pytest.approx([-2e-12, -2e6], rel=1e-9, abs=0)
    assert values["il2"] == pytest.approx([2e12, 2e-6])


def test_distance_is_a_plain_mean_over_models_and_tensors():
    mine = {"a": torch.zeros(2), "b": torch.zeros(3, 4)}
    one, two = (
        {"a": torch.tensor([1.0, 3.0]), "b": torch.full((3, 4), 2.0)},
        {"a": torch.ones(2), "b": torch.ones(3, 4)},
    )
    assert float(gan.parameter_distance(mine, [one])) == 4.5  # (5 + 4) / 2, not the 4.14 of all 14 numbers
    assert float(gan.parameter_distance(mine, [one, two])) == 2.75
    assert float(gan.parameter_distance(mine, [one] * 5)) == 4.5  # the public code's grows with the number of models


def test_ewc_has_its_minimum_where_two_parabolas_say():
    """½ h (θ - b)² + λ · ½ F (θ - θ₀)² is least at (h b + λ F θ₀) / (h + λ F)."""
    generator = torch.Generator().manual_seed(2)
    h, b, fisher, first = torch.rand(4, 5, dtype=torch.float64, generator=generator) + 0.1
    strength = 3.0
    best = (h * b + strength * fisher * first) / (h + strength * fisher)

    def total(theta):
        penalty = gan.ewc_penalty({"w": theta, "unused": first}, {"w": first}, {"w": fisher})
        return (h / 2 * (theta - b).square()).sum() + strength * penalty

    torch.testing.assert_close(grad(total)(best), torch.zeros_like(best), atol=1e-12, rtol=0)
    away = best + 0.1
    torch.testing.assert_close(grad(total)(away), 0.1 * (h + strength * fisher))


def test_fisher_is_the_mean_square_of_single_slopes(fleet):
    count = 6
    got = gan.generator_fisher(fleet, count, seed=3)

    for i in range(MEMBERS):
        z = normal(fold_in(key(3, 104), fleet.streams[i]), (count, 2), torch.float64)
        model, total = fleet[i], torch.zeros_like(row(fleet, "generator")[i])
        for one in z:
            model.zero_grad()
            model(model(one[None]), judge=True).sum().backward()
            total += torch.cat([p.grad.flatten() for p in model.generator.parameters()]).square() / count
        wanted = torch.cat([total, torch.zeros_like(row(fleet, "discriminator")[i])])
        torch.testing.assert_close(got[i], wanted)


def test_rings_shares_and_quality():
    assert torch.equal(gan.nearest_mode(DATA["x"], CENTRES).bincount(minlength=MODES), torch.full((MODES,), 200))
    torch.testing.assert_close(CENTRES.norm(dim=1), torch.full((MODES,), 1.5))
    spread = torch.stack([(DATA["x"] - CENTRES[DATA["y"]])[DATA["y"] == k].std(0) for k in range(MODES)])
    torch.testing.assert_close(spread, torch.full_like(spread, SPREAD), atol=0.06, rtol=0)
    inside = gan.mode_quality(gan.ring(20000, 8, 5.0, 0.1)[0]["x"], gan.ring(8, 8, 5.0)[1], 0.1, radius=2.0)
    assert abs(float(inside) - (1 - math.exp(-2))) < 4 * math.sqrt(0.1353 * 0.8647 / 20000)


# ----------------------------------------------------------------------------------------------------------- stages


def test_without_repulsion_the_second_stage_is_fine_tuning_on_the_other_samples(fleet):
    samples, forget = samples_of(fleet)
    adapted = gan.adapt(fleet, samples, forget, steps=2, copies=2, batch=8)
    plain = train(
        exact,
        gan.gan_loss(),
        {"row": torch.arange(40)},
        start=fleet,
        member_data={"x": samples},
        subsets=~forget,
        steps=6,
        batch=8,
        progress=False,
    )
    for kind in ("el2", "nl2", "il2"):
        out = gan.repel(fleet, samples, forget, adapted, gamma=0.0, repulsion=kind, steps=6, batch=8)
        torch.testing.assert_close(out.parameters, plain.parameters, atol=1e-10, rtol=0)
    pushed = gan.repel(fleet, samples, forget, adapted, gamma=1.0, steps=6, batch=8)
    assert not torch.equal(row(pushed, "generator"), row(plain, "generator"))


@pytest.mark.parametrize("kind", ["el2", "nl2", "il2"])
def test_repulsion_adds_its_slope_to_the_generator_and_nothing_to_the_discriminator(fleet, kind):
    samples, forget = samples_of(fleet)
    adapted = gan.adapt(fleet, samples, forget, steps=2, copies=2, batch=8)
    gamma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    outs = [
        gan.repel(fleet, samples, forget, adapted, gamma=g, repulsion=kind, steps=1, batch=8, optimiser=SGD(1e-3))
        for g in (gamma, 0.0)
    ]
    assert torch.equal(row(outs[0], "discriminator"), row(outs[1], "discriminator"))
    for i in range(MEMBERS):
        theirs = [named(a, i) for a in adapted]

        def value(ours, theirs=theirs, i=i):
            return gan.repulsion_loss(gan.parameter_distance(ours, theirs), gamma[i], kind)

        wanted = torch.cat([v.flatten() for v in grad(value)(named(fleet, i)).values()])
        moved = (row(outs[1], "generator") - row(outs[0], "generator"))[i]
        torch.testing.assert_close(moved, 1e-3 * wanted, atol=1e-12, rtol=1e-6)


def test_a_negative_distance_runs_away_and_the_exponential_does_not(fleet):
    samples, forget = samples_of(fleet)
    adapted = gan.adapt(fleet, samples, forget, steps=2, copies=1, batch=8)
    options: dict[str, Any] = {"gamma": 200.0, "steps": 20, "batch": 8, "optimiser": SGD(0.05)}
    far = {}
    for kind in ("el2", "nl2"):
        out = gan.repel(fleet, samples, forget, adapted, repulsion=kind, **options)
        far[kind] = float(gan.parameter_distance(named(out, 0), [named(adapted[0], 0)]))
    assert far["nl2"] > 1000 * far["el2"]
    assert far["el2"] < 10


def test_copies_are_held_by_the_penalty_and_differ(fleet):
    """The penalty's slope is 0 in the first step; in the second it is λ F (θ₁ - θ₀), for the generator alone."""
    samples, forget = samples_of(fleet)
    options: dict[str, Any] = {"copies": 2, "batch": 8, "optimiser": SGD(0.1)}
    strength = torch.tensor([5.0, 20.0], dtype=torch.float64)
    loose = gan.adapt(fleet, samples, forget, ewc_weight=0.0, steps=2, **options)
    held = gan.adapt(fleet, samples, forget, ewc_weight=strength, steps=2, **options)
    first = gan.adapt(fleet, samples, forget, ewc_weight=strength, steps=2, until=1, **options)
    assert len(loose) == 2
    assert not torch.equal(loose[0].parameters, loose[1].parameters)
    fisher = gan.generator_fisher(fleet)
    for before, after, one in zip(loose, held, first, strict=True):
        wanted = 0.1 * strength[:, None] * fisher * (one.parameters - fleet.parameters)
        torch.testing.assert_close(before.parameters - after.parameters, wanted, atol=1e-12, rtol=1e-6)
        assert wanted.abs().max() > 1e-6


def test_members_are_what_they_would_be_alone(fleet):
    samples, forget = samples_of(fleet)
    gamma = torch.tensor([0.5, 3.0], dtype=torch.float64)

    def both_stages(rows, gamma):
        options: dict[str, Any] = {"steps": 3, "batch": 8}
        adapted = gan.adapt(fleet[rows], samples[rows], forget[rows], copies=2, **options)
        return gan.repel(fleet[rows], samples[rows], forget[rows], adapted, gamma=gamma, **options)

    together = both_stages(slice(None), gamma)
    for i in range(MEMBERS):
        alone = both_stages(slice(i, i + 1), float(gamma[i]))
        torch.testing.assert_close(alone.parameters[0], together.parameters[i], atol=1e-9, rtol=0)


def test_extrapolation_moves_the_generator_along_the_line(fleet):
    samples, forget = samples_of(fleet)
    adapted = gan.adapt(fleet, samples, forget, steps=3, copies=2, batch=8)
    mean = (row(adapted[0], "generator") + row(adapted[1], "generator")) / 2
    back = gan.extrapolate(fleet, adapted, -1.0)
    torch.testing.assert_close(row(back, "generator"), mean)
    torch.testing.assert_close(row(back, "discriminator"), row(fleet, "discriminator"))
    there = gan.extrapolate(fleet, adapted, 0.5)
    torch.testing.assert_close(row(there, "generator"), 1.5 * row(fleet, "generator") - 0.5 * mean)


def test_the_unwanted_share_falls(trained):
    """Adapted copies make more of mode 0; away from them, and further along the line, there is less of it."""
    samples = gan.generate(trained, 1000)
    forget = gan.nearest_mode(samples, CENTRES) == 0
    options: dict[str, Any] = {"batch": 64, "optimiser": Adam(2e-3, betas=(0.0, 0.99))}
    adapted = gan.adapt(trained, samples, forget, ewc_weight=0.1, copies=1, steps=60, **options)
    before = shares(trained)[:, 0]
    assert bool((shares(adapted[0])[:, 0] > before + 0.2).all())
    line = torch.stack([shares(gan.extrapolate(trained, adapted, k))[:, 0].mean() for k in (0.0, 0.1, 0.2, 0.3)])
    assert bool((line.diff() < 0).all())
    out = gan.repel(trained, samples, forget, adapted, gamma=1.0, steps=120, schedule=linear(), **options)
    assert bool((shares(out)[:, 0] < 0.5 * before).all())


def test_wrong_input_is_named(fleet):
    samples, forget = samples_of(fleet)
    for wrong in (torch.zeros_like(forget), torch.ones_like(forget)):
        with pytest.raises(ValueError, match="forget: expected some samples"):
            gan.adapt(fleet, samples, wrong)
    with pytest.raises(ValueError, match="samples: expected one row for each of 1"):
        gan.adapt(fleet[:1], samples, forget)
    with pytest.raises(ValueError, match="adapted: expected at least one"):
        gan.repel(fleet, samples, forget, ())
    with pytest.raises(ValueError, match="adapted: expected at least one"):
        gan.extrapolate(fleet, (), 1.0)
    with pytest.raises(ValueError, match=r"adapted\[0\]: expected parameters"):
        gan.repel(fleet, samples, forget, (fleet[:1],))
    with pytest.raises(ValueError, match="gamma: expected at least 0"):
        gan.repel(fleet, samples, forget, (fleet,), gamma=-1.0)
    with pytest.raises(ValueError, match="r1"):
        gan.gan_loss(r1=-1.0)
    with pytest.raises(ValueError, match="copies"):
        gan.adapt(fleet, samples, forget, copies=0)
    line = Fleet.of([torch.nn.Linear(2, 2)], lambda: torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a fleet of GAN"):
        gan.generate(line, 3)
