"""Long-tail remedies against hand-computed values, Bayes' rule, limits, and a classifier that is really trained."""

import math

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from toolkit import random
from toolkit.metric_learning.long_tail import (
    additive_adjustment,
    class_balanced_weights,
    etf_head,
    max_norm,
    multiplicative_adjustment,
    norm_limit,
    tau_normalise,
)

DOUBLE = torch.float64
ROWS = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 2.0]], dtype=DOUBLE)  # lengths 5, 1 and 2


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ---------------------------------------------------------------------- weights of classes


def test_class_balanced_weights_by_hand():
    weights = class_balanced_weights(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE), 0.5)  # in proportion 1, 2/3, 4/7
    torch.testing.assert_close(weights, torch.tensor([63.0, 42.0, 36.0], dtype=DOUBLE) / 47)


def test_class_balanced_weights_at_both_ends():
    counts = torch.tensor([500, 50, 5])
    assert class_balanced_weights(counts, 0.0).tolist() == [1, 1, 1]
    inverse = 3 / counts / (1 / counts).sum()
    torch.testing.assert_close(class_balanced_weights(counts, 1.0), inverse)
    torch.testing.assert_close(class_balanced_weights(counts, 1 - 1e-9), inverse, rtol=1e-6, atol=0)
    torch.testing.assert_close(class_balanced_weights(counts, 0.99).sum().item(), 3.0, rtol=1e-6, atol=0)
    # more examples than 1 / (1 - β) hardly count
    many = class_balanced_weights(torch.tensor([10**4, 10**6]), 0.99)
    torch.testing.assert_close(many, torch.ones(2))


def test_class_balanced_weights_in_a_fleet_and_refused():
    counts, betas = torch.tensor([[30, 3], [200, 1]]), torch.tensor([0.9, 1.0], dtype=DOUBLE)
    together = vmap(class_balanced_weights)(counts, betas)
    for member in range(2):
        torch.testing.assert_close(together[member], class_balanced_weights(counts[member], betas[member].item()))
    for arguments, message in [
        ((counts[0] * 0, 0.9), "counts"),
        ((counts[0], 1.1), "beta"),
        ((counts[0], -0.1), "beta"),
    ]:
        with pytest.raises(ValueError, match=message):
            class_balanced_weights(*arguments)


def test_strong_decay_gives_lengths_like_counts_and_equal_ones_with_inverse_weights():
    counts, decay = torch.tensor([40, 10, 4]), 200.0
    labels = torch.arange(3).repeat_interleave(counts)
    features = etf_head(random.key(0), 3, 4, DOUBLE)[labels]  # collapsed: each class one corner of a simplex
    for beta, ratios in ((0.0, counts / 4.0), (1.0, torch.ones(3))):
        per_class = class_balanced_weights(counts.double(), beta)

        def loss(weights, per_class=per_class):
            values = per_class[labels] * F.cross_entropy(features @ weights.mT, labels, reduction="none")
            return values.mean() + decay / 2 * (weights**2).sum()

        weights = torch.zeros(3, 4, dtype=DOUBLE)
        for _ in range(30):
            weights = weights - grad(loss)(weights) / (decay + 1)
        centred = torch.eye(3, dtype=DOUBLE)[labels] - 1 / 3
        expected = (per_class[labels][:, None] * centred).mT @ features / (decay * len(labels))
        torch.testing.assert_close(weights, expected, rtol=1e-2, atol=1e-6)
        # less a vector that all rows share, which no decision depends on, each row is its class's corner
        common = -features.mT @ per_class[labels] / (3 * decay * 54)
        lengths = (weights - common).norm(dim=-1)
        torch.testing.assert_close(lengths / lengths[2], ratios.double(), rtol=1e-2, atol=0)
        assert F.cosine_similarity(weights - common, features[[0, 40, 50]]).min() > 0.999


# ---------------------------------------------------------------------- the fixed head


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 5), (5, 4), (7, 16)])
def test_etf_rows_are_a_simplex(classes, dim):
    rows = etf_head(random.key(1), classes, dim, DOUBLE)
    gram = torch.full((classes, classes), -1 / (classes - 1), dtype=DOUBLE).fill_diagonal_(1)
    torch.testing.assert_close(rows @ rows.mT, gram, rtol=0, atol=1e-12)
    assert rows.sum(0).abs().max() < 1e-12


def test_etf_is_uniform_over_rotations_and_made_from_the_key():
    keys = torch.stack([random.key(0, i) for i in range(4000)])
    rows = vmap(lambda k: etf_head(k, 3, 2))(keys)
    assert torch.equal(rows[7], etf_head(keys[7], 3, 2))
    angle = torch.atan2(rows[:, 0, 1], rows[:, 0, 0])
    for k in (1, 2, 3):  # moments of the uniform distribution on the circle, 4000 draws
        assert abs((k * angle).cos().mean()) < 0.05
        assert abs((k * angle).sin().mean()) < 0.05
    handed = torch.linalg.det(rows[:, :2]) > 0  # mirror images are as frequent
    assert abs(handed.float().mean() - 0.5) < 0.04
    assert etf_head(keys[0], 3, 2).dtype == torch.float32


def test_etf_refuses_what_has_no_simplex():
    with pytest.raises(ValueError, match="dim: expected at least 4 for 5 classes, got 3"):
        etf_head(random.key(0), 5, 3)
    with pytest.raises(ValueError, match="classes: expected at least 2, got 1"):
        etf_head(random.key(0), 1, 3)
    with pytest.raises(ValueError, match="dtype"):
        etf_head(random.key(0), 3, 3, torch.float16)


# ---------------------------------------------------------------------- lengths of classifier rows


def test_limits_and_projections_by_hand():
    torch.testing.assert_close(norm_limit(ROWS).item(), 1.4)
    torch.testing.assert_close(norm_limit(ROWS, 0.5).item(), 3.0)
    expected = torch.tensor([[1.8, 2.4], [0.6, 0.8], [0.0, 2.0]], dtype=DOUBLE)
    torch.testing.assert_close(max_norm(ROWS, 3.0), expected)
    assert torch.equal(max_norm(ROWS, 3.0)[1:], ROWS[1:])
    torch.testing.assert_close(max_norm(max_norm(ROWS, 3.0), 3.0), expected, rtol=1e-15, atol=0)
    assert torch.equal(max_norm(ROWS, 5.0), ROWS)


def test_max_norm_is_the_nearest_point_within_the_limit():
    near = max_norm(ROWS, 1.5)
    for seed in range(20):
        inside = max_norm(2 * numbers(3, 2, seed=seed), 1.5)
        assert ((ROWS - near) * (inside - near)).sum(-1).max() <= 1e-12  # the angle at the projection is obtuse


def test_tau_normalisation_by_hand():
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 1.0]], dtype=DOUBLE)
    torch.testing.assert_close(tau_normalise(ROWS), expected)
    assert torch.equal(tau_normalise(ROWS, 0.0), ROWS)
    torch.testing.assert_close(tau_normalise(ROWS, 2.0).norm(dim=-1), 1 / ROWS.norm(dim=-1))


def test_lengths_in_a_fleet_with_zero_rows_and_refused():
    other = numbers(3, 2)
    stacked, values = torch.stack([ROWS, 2 * ROWS]), torch.tensor([0.7, 1.9], dtype=DOUBLE)
    for function in (max_norm, tau_normalise):
        together = vmap(function)(stacked, values)
        slopes = vmap(grad(lambda w, v, f=function: (f(w, v) * other).sum(), argnums=(0, 1)))(stacked, values)
        for member in range(2):
            torch.testing.assert_close(together[member], function(stacked[member], values[member].item()))
            assert torch.autograd.gradcheck(
                lambda w, f=function, v=values[member]: f(w, v), stacked[member].requires_grad_()
            )
            ends = [(function(stacked[member], values[member].item() + h) * other).sum() for h in (1e-6, -1e-6)]
            torch.testing.assert_close(slopes[1][member], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)
            stacked = stacked.detach()
        zero = torch.zeros(2, 3)
        assert function(zero, 1.0).abs().max() == 0
        assert grad(lambda w, f=function: f(w, 1.0).sum())(zero).isfinite().all()
        with pytest.raises(ValueError, match="weights: expected finite"):
            function(ROWS / 0, 1.0)
    torch.testing.assert_close(vmap(norm_limit)(stacked), torch.tensor([1.4, 2.8], dtype=DOUBLE))
    with pytest.raises(ValueError, match="limit"):
        max_norm(ROWS, 0.0)
    with pytest.raises(ValueError, match="tau"):
        tau_normalise(ROWS, -1.0)
    with pytest.raises(ValueError, match="share"):
        norm_limit(ROWS, 2.0)


# ---------------------------------------------------------------------- adjustment at test time


def test_additive_adjustment_turns_the_posterior_into_the_balanced_one():
    likelihood = numbers(6, 4).exp()  # p(x | k), to any scale per x
    priors = torch.tensor([0.7, 0.2, 0.07, 0.03], dtype=DOUBLE)
    posterior = likelihood * priors
    logits = (posterior / posterior.sum(-1, keepdim=True)).log() + numbers(
        6, 1, seed=1
    )  # a shift per x changes nothing
    balanced = likelihood / likelihood.sum(-1, keepdim=True)
    torch.testing.assert_close(additive_adjustment(logits, priors).softmax(-1), balanced, rtol=1e-12, atol=0)
    torch.testing.assert_close(additive_adjustment(logits, priors, 0.0), logits)
    half = likelihood * priors**0.5
    half = half / half.sum(-1, keepdim=True)
    torch.testing.assert_close(additive_adjustment(logits, priors, 0.5).softmax(-1), half, rtol=1e-12, atol=0)


def test_multiplicative_adjustment_by_hand():
    priors = torch.tensor([0.75, 0.25], dtype=DOUBLE)
    logits = torch.tensor([[1.0, 0.5], [-1.0, -0.9], [0.0, 0.0]], dtype=DOUBLE)
    adjusted = multiplicative_adjustment(logits, priors, 1.0)
    torch.testing.assert_close(adjusted, torch.tensor([[4 / 3, 2.0], [-4 / 3, -3.6], [0, 0]], dtype=DOUBLE))
    assert adjusted.argmax(-1)[:2].tolist() == [1, 0]  # above 0 the rare class gains, below it loses
    assert logits.argmax(-1)[:2].tolist() == [0, 1]
    torch.testing.assert_close(
        multiplicative_adjustment(logits, priors)[0, 1].item(), 0.5 * math.exp(0.65 * math.log(4))
    )


def test_multiplicative_adjustment_is_a_longer_row():
    features, rows, priors = numbers(6, 3), numbers(4, 3, seed=1), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DOUBLE)
    longer = features @ (rows / priors[:, None] ** 0.65).mT
    torch.testing.assert_close(multiplicative_adjustment(features @ rows.mT, priors), longer, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adjust", [additive_adjustment, multiplicative_adjustment])
def test_adjustment_in_a_fleet_and_refused(adjust):
    logits, priors = numbers(2, 5, 3), torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.09, 0.01]], dtype=DOUBLE)
    together = vmap(adjust)(logits, priors, torch.tensor([0.5, 2.0], dtype=DOUBLE))
    for member, tau in enumerate((0.5, 2.0)):
        torch.testing.assert_close(together[member], adjust(logits[member], priors[member], tau))
    torch.testing.assert_close(adjust(logits, priors[0])[1], adjust(logits[1], priors[0]))  # leading dimensions
    assert adjust(logits.float(), priors[0].float()).dtype == torch.float32
    for values, shares, message in [
        (logits / 0, priors[0], "logits"),
        (logits, priors[0] * 2, "priors"),
        (logits, torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE), "priors"),
    ]:
        with pytest.raises(ValueError, match=message):
            adjust(values, shares)
