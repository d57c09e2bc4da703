"""Entropy and divergence by identities, pictures by summing over all of them."""

import itertools
import math

import pytest
import torch

from toolkit import random
from toolkit.data import digits
from toolkit.scaling_laws.corpora import markov_source, windows
from toolkit.scaling_laws.domains import (
    PixelModel,
    binary_digits,
    entropy_and_divergence,
    information,
    leak_alarm,
    pixel_loss,
    pixel_sweep,
    tabular_model,
)

SOURCE = markov_source(6, 1.0, 1.5, seed=3)
TRUTH, WEIGHTS = SOURCE.transition.flatten(0, 1), SOURCE.stationary.flatten()


def table(rows: int, seed: int = 1, smoothing: float = 0.5) -> torch.Tensor:
    data = windows(SOURCE.sample(rows, 52, seed), 2)
    return tabular_model(data["x"], data["y"], 6, smoothing)


def test_loss_is_entropy_plus_divergence_to_1e_12():
    model = table(4)
    cross, entropy, divergence = entropy_and_divergence(TRUTH, model, WEIGHTS)
    assert abs(cross - entropy - divergence) < 1e-12
    assert entropy == pytest.approx(SOURCE.entropy_rate, abs=1e-12)
    assert divergence > 0.01
    by_hand = sum(
        float(WEIGHTS[i] * TRUTH[i, c]) * math.log(float(TRUTH[i, c] / model[i, c]))
        for i, c in itertools.product(range(36), range(6))
    )
    assert divergence == pytest.approx(by_hand, abs=1e-12)
    assert entropy_and_divergence(TRUTH, TRUTH, WEIGHTS)[2].abs() < 1e-14
    certain = torch.eye(2, dtype=torch.float64)
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    cross, entropy, divergence = entropy_and_divergence(certain, half, half[0])
    assert (float(cross), float(entropy), float(divergence)) == pytest.approx((math.log(2), 0, math.log(2)))
    assert entropy_and_divergence(half, certain, half[0])[0].isinf()


def test_the_divergence_of_the_tabular_model_falls_as_parameters_over_2n():
    """KL ≈ contexts (symbols - 1) / 2n once every context is frequent: the exponent is 1."""
    losses = [
        torch.stack([entropy_and_divergence(TRUTH, table(rows, seed), WEIGHTS)[2] for seed in range(12)]).mean()
        for rows in (400, 1600)
    ]
    assert losses[0] / losses[1] == pytest.approx(4, rel=0.15)
    assert losses[1] == pytest.approx(36 * 5 / (2 * 1600 * 50), rel=0.15)


def test_the_tabular_model_counts():
    x = torch.tensor([[0, 1], [0, 1], [2, 0], [0, 1]])
    got = tabular_model(x, torch.tensor([2, 2, 1, 0]), 3, 0.5)
    assert got.shape == (9, 3)
    torch.testing.assert_close(got[1], torch.tensor([1.5, 0.5, 2.5], dtype=torch.float64) / 4.5)
    torch.testing.assert_close(got[6], torch.tensor([0.5, 1.5, 0.5], dtype=torch.float64) / 2.5)
    torch.testing.assert_close(got[4], torch.full((3,), 1 / 3, dtype=torch.float64))


def row_losses(model: torch.Tensor, seed: int) -> torch.Tensor:
    text = SOURCE.sample(200, 52, seed)
    return -model.view(6, 6, 6)[text[:, :-2], text[:, 1:-1], text[:, 2:]].log().mean(1)


def test_the_alarm_sounds_for_a_model_that_has_seen_its_test_and_for_no_other():
    data = windows(SOURCE.sample(3, 52, 5), 2)
    seen = tabular_model(data["x"], data["y"], 6, 1e-3)
    text = SOURCE.sample(3, 52, 5)
    own = -seen.view(6, 6, 6)[text[:, :-2], text[:, 1:-1], text[:, 2:]].log().mean(1)
    assert leak_alarm(own, SOURCE.entropy_rate).alarm
    assert not leak_alarm(row_losses(seen, 8), SOURCE.entropy_rate).alarm
    z = []
    for seed in range(60):  # the source itself: the mean is the entropy, the alarm rare
        leak = leak_alarm(row_losses(TRUTH, 100 + seed), SOURCE.entropy_rate)
        z.append(leak.gap / leak.standard_error)
        assert not leak.alarm or z[-1] < -3
    scores = torch.tensor(z)
    assert abs(scores.mean()) < 3 / 60**0.5
    assert 0.7 < scores.std() < 1.35
    assert leak_alarm(torch.tensor([1.0, 1.2, 0.8]), 1.0).gap == pytest.approx(0, abs=1e-7)
    assert leak_alarm(torch.tensor([1.0, 3.0]), 1.5).standard_error == pytest.approx(1.0)


def test_information_of_a_known_joint_distribution():
    """Exact probabilities in, the mutual information of the table out, within its own standard error."""
    joint = random.uniform(random.key(4), (5, 3), torch.float64)
    joint /= joint.sum()
    image, label = joint.sum(1), joint.sum(0)
    exact = (joint * (joint / (image[:, None] * label)).log()).sum()
    drawn = torch.searchsorted(joint.flatten().cumsum(0), random.uniform(random.key(5), (20_000,), torch.float64))
    i, j = drawn // 3, drawn % 3
    got, error = information(-image[i].log(), -(joint[i, j] / label[j]).log())
    assert exact > 5 * error
    assert abs(got - exact) < 3 * error
    every, _ = information(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 2.0]))
    assert every == 2
    assert information(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 2.0]))[1] == pytest.approx(1.0)


def test_a_pixel_model_is_a_distribution_and_does_not_look_ahead():
    torch.manual_seed(0)
    model = PixelModel(6, 4, 3).double()
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    with torch.no_grad():
        model.label.normal_()
        model.bias.normal_()
        for label in (None, torch.full((64,), 2)):
            loss = pixel_loss(model(every, label=label), every)
            assert (-loss).exp().sum() == pytest.approx(1, abs=1e-12)
        assert not torch.equal(model(every, label=torch.full((64,), 2)), model(every, label=torch.full((64,), 1)))
        logits = model(every)
        for i in range(6):
            changed = every.clone()
            changed[:, i:] = 1 - changed[:, i:]
            torch.testing.assert_close(model(changed)[:, i], logits[:, i])
            if i:
                assert not torch.allclose(model(changed)[:, i + 1 :], logits[:, i + 1 :]) or i == 5
        hidden = (model.start + every[:, :3] @ model.inward[:3]).clamp_min(0)
        torch.testing.assert_close(logits[:, 3], hidden @ model.outward[3] + model.bias[3])


def test_the_pictures_are_the_digits_cut_at_half_ink_and_none_is_in_both_parts():
    train, test = binary_digits(397, seed=2)
    assert train["x"].shape == (1400, 64)
    assert test["x"].shape == (397, 64)
    both = torch.cat([train["x"], test["x"]])
    labels = torch.cat([train["y"], test["y"]])
    source = digits()
    ours = sorted((*x, y) for x, y in zip(both.tolist(), labels.tolist(), strict=True))
    theirs = sorted(
        (*x, y) for x, y in zip((source.x >= 0.5).float().flatten(1).tolist(), source.y.tolist(), strict=True)
    )
    assert ours == theirs


def test_wider_models_of_pictures_are_better_and_the_label_tells_something():
    train, test = binary_digits(397)
    sweep = pixel_sweep(train, test, (2, 8), 2, epochs=6)
    assert sweep.losses.shape == (2, 2, 2, 397)
    assert sweep.parameters.tolist() == [[64 * 5 + 2, 64 * 5 + 22], [64 * 17 + 8, 64 * 17 + 88]]
    mean = sweep.losses.mean((2, 3))
    assert (mean[1] < mean[0] - 1).all()
    gain, error = sweep.information()
    torch.testing.assert_close(gain, mean[:, 0] - mean[:, 1])
    assert gain[1] > 5 * error[1]
    ink = train["x"].mean(0).double().clamp(1e-3, 1 - 1e-3)  # pixels on their own
    alone = -(test["x"] * ink.log() + (1 - test["x"]) * (1 - ink).log()).sum(1).mean()
    assert mean[1, 0] < alone - 3


def test_bad_input():
    row = torch.full((1, 2), 0.5)
    train = {"x": torch.ones(4, 3), "y": torch.tensor([0, 1, 2, 3])}
    for name, call in (
        ("truth", lambda: entropy_and_divergence(row * 3, row, torch.ones(1))),
        ("model", lambda: entropy_and_divergence(row, row * 3, torch.ones(1))),
        ("weights", lambda: entropy_and_divergence(row.repeat(2, 1), row.repeat(2, 1), torch.ones(2))),
        ("smoothing", lambda: tabular_model(train["y"][:, None], train["y"], 4, 0.0)),
        ("y", lambda: tabular_model(train["y"][:, None] * 0, train["y"], 3)),
        ("x", lambda: tabular_model(train["y"][:, None], train["y"] * 0, 3)),
        ("symbols", lambda: tabular_model(train["y"][:, None], train["y"], 10_000)),
        ("losses", lambda: leak_alarm(torch.ones(1), 1.0)),
        ("losses", lambda: leak_alarm(torch.tensor([1.0, math.nan]), 1.0)),
        ("errors", lambda: leak_alarm(torch.ones(2), 1.0, 0.0)),
        ("plain", lambda: information(torch.ones(1), torch.ones(1))),
        ("held_out", lambda: binary_digits(0)),
        ("width", lambda: PixelModel(3, 0)),
        ("seeds", lambda: pixel_sweep(train, train, seeds=0)),
        ("lr", lambda: pixel_sweep(train, train, lr=0.0)),
        ("y", lambda: pixel_sweep(train, train, classes=3)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
