"""Per-example training losses against closed forms, identities, torch's own losses and high-precision arithmetic."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.optimize import minimize
from torch.func import grad, vmap
from torch.nn import functional as F

from toolkit.calibration.losses import (
    aldr_kl,
    aldr_temperature,
    confidence_penalty,
    cross_entropy,
    dual_focal,
    focal,
    label_smoothing,
    ldr_kl,
    limited_confidence,
    log_softmax,
    pass_at_n,
    pass_at_n_from_samples,
    ps_kd,
    z_loss,
)

SETTINGS = settings(derandomize=True, deadline=None, max_examples=25)
CLASSES = 5


def sample(size=8, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, CLASSES, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(CLASSES, (size,), generator=generator)


def earlier(logits):
    """Probabilities that depend on nothing but the shape, for PS-KD; the same for every class."""
    return torch.full_like(logits, 1 / logits.shape[-1])


def warmth(logits):
    return torch.linspace(0.5, 1.0, len(logits), dtype=logits.dtype)


# name: (loss of logits, labels and one hyper-parameter, three values of it)
LOSSES: dict[str, tuple[Any, tuple[float, float, float]]] = {
    "cross_entropy": (lambda z, y, h: cross_entropy(z, y) * h, (1.0, 1.0, 1.0)),
    "label_smoothing": (label_smoothing, (0.0, 0.1, 0.4)),
    "focal": (focal, (0.0, 1.5, 3.0)),
    "dual_focal": (dual_focal, (0.0, 1.5, 5.0)),
    "confidence_penalty": (confidence_penalty, (0.0, 0.1, 0.5)),
    "ps_kd": (lambda z, y, h: ps_kd(z, y, earlier(z), h), (0.0, 0.3, 0.8)),
    "ldr_kl": (lambda z, y, h: ldr_kl(z, y, h, 0.5), (0.5, 1.0, 2.0)),
    "aldr_kl": (lambda z, y, h: aldr_kl(z, y, warmth(z), h, 2.0, 0.3), (0.8, 1.0, 1.2)),
    "z_loss": (lambda z, y, h: z_loss(z, y, h, 2.0), (0.5, 1.0, 2.0)),
    "limited_confidence": (limited_confidence, (1.0, 4.0, 64.0)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_values_are_one_per_example_and_each_depends_on_its_own_row(name):
    loss, hypers = LOSSES[name]
    logits, labels = sample()
    values = loss(logits, labels, hypers[1])
    assert values.shape == labels.shape
    assert values.dtype == torch.float64
    jacobian = torch.autograd.functional.jacobian(lambda z: loss(z, labels, hypers[1]), logits)
    off_diagonal = jacobian * (1 - torch.eye(len(labels)))[:, :, None]
    assert off_diagonal.abs().max() == 0


@every_loss
def test_gradients_match_finite_differences_and_sum_to_zero(name):
    loss, hypers = LOSSES[name]
    logits, labels = sample(seed=1)
    logits.requires_grad_()
    for hyper in hypers:
        assert torch.autograd.gradcheck(lambda z, hyper=hyper: loss(z, labels, hyper), (logits,))
        (gradient,) = torch.autograd.grad(loss(logits, labels, hyper).sum(), logits)
        assert gradient.sum(-1).abs().max() < 1e-12
        assert gradient.abs().max() > 1e-3


@every_loss
@given(seed=st.integers(0, 10**6), shift=st.floats(-30, 30))
@SETTINGS
def test_classes_may_be_renamed_and_logits_shifted(name, seed, shift):
    loss, hypers = LOSSES[name]
    logits, labels = sample(seed=seed)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    values = loss(logits, labels, hypers[1])
    torch.testing.assert_close(loss(logits[:, order], order.argsort()[labels], hypers[1]), values)
    torch.testing.assert_close(loss(logits + shift, labels, hypers[1]), values)


@every_loss
@given(seed=st.integers(0, 10**6))
@SETTINGS
def test_lower_bounds(name, seed):
    loss, hypers = LOSSES[name]
    logits, labels = sample(seed=seed, scale=6.0)
    for hyper in hypers:
        lowest = {"ldr_kl": -hyper * math.log(CLASSES), "aldr_kl": -2 * math.log(CLASSES), "confidence_penalty": -0.5}
        assert loss(logits, labels, hyper).min() >= lowest.get(name, 0.0) - 1e-12


@every_loss
def test_vmap_and_vmap_of_grad_are_the_loop(name):
    loss, hypers = LOSSES[name]
    logits = torch.stack([sample(seed=seed)[0] for seed in range(3)])
    labels = torch.stack([sample(seed=seed)[1] for seed in range(3)])
    hyper = torch.tensor(hypers, dtype=torch.float64)
    together = vmap(loss)(logits, labels, hyper)
    slopes = vmap(grad(lambda z, y, h: loss(z, y, h).mean(), argnums=(0, 2)))(logits, labels, hyper)
    for member in range(3):
        one = [logits[member].clone().requires_grad_(), labels[member], hyper[member].clone().requires_grad_()]
        value = loss(*one)
        torch.testing.assert_close(together[member], value.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss(one[0], one[1], hypers[member]), value, rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad(value.mean(), [one[0], one[2]])
        for got, want in zip(slopes, expected, strict=True):
            assert want.isfinite().all()
            torch.testing.assert_close(got[member], want, rtol=1e-10, atol=1e-12)


@every_loss
def test_float32_and_strided_logits_give_the_same_values(name):
    loss, hypers = LOSSES[name]
    logits, labels = sample()
    for hyper in hypers:
        values = loss(logits, labels, hyper)
        strided = logits.T.contiguous().T
        assert not strided.is_contiguous()
        torch.testing.assert_close(loss(strided, labels, hyper), values, rtol=1e-14, atol=1e-14)
        single = loss(logits.float(), labels, hyper)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), values, rtol=2e-5, atol=2e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(name, dtype):
    loss, hypers = LOSSES[name]
    logits = torch.tensor([[1e4, 0, 0, 0, -1e4]] * 3 + [[0.0] * 5, [30, 0, 0, 0, 0]], dtype=dtype).requires_grad_()
    for hyper in (*hypers, torch.tensor(hypers[1], dtype=dtype)):
        value = loss(logits, torch.tensor([0, 1, 4, 2, 0]), hyper)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("bad", [-1, CLASSES])
def test_labels_out_of_range_are_refused(name, bad):
    loss, hypers = LOSSES[name]
    logits, labels = sample()
    labels[3] = bad
    with pytest.raises(ValueError, match=r"labels: expected class indices from 0 to 4"):
        loss(logits, labels, hypers[1])


def test_log_softmax_is_torchs_and_has_the_batch_last_in_memory():
    logits, _ = sample(size=30, scale=20.0)
    for values in (logits, logits.T.contiguous().T):
        result = log_softmax(values)
        torch.testing.assert_close(result, torch.log_softmax(logits, -1), rtol=1e-14, atol=1e-14)
        assert result.mT.is_contiguous()


def test_cross_entropy_with_hard_and_soft_targets():
    logits, labels = sample(size=30)
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))
    targets = sample(size=30, seed=5)[0].softmax(-1)
    torch.testing.assert_close(cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none"))
    with pytest.raises(ValueError, match="labels: expected probabilities"):
        cross_entropy(logits, targets * 3)
    with pytest.raises(ValueError, match="labels: expected rows that sum to 1"):
        cross_entropy(logits, targets / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37, 1.0])
def test_label_smoothing_is_torchs_and_a_mixture(smoothing):
    logits, labels = sample(size=30)
    values = label_smoothing(logits, labels, smoothing)
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(values, expected)
    uniform = cross_entropy(logits, torch.full_like(logits, 1 / CLASSES))
    torch.testing.assert_close(values, (1 - smoothing) * cross_entropy(logits, labels) + smoothing * uniform)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.7])
def test_focal_is_its_formula(gamma):
    logits, labels = sample(size=30)
    p = logits.softmax(-1)[torch.arange(30), labels]
    torch.testing.assert_close(focal(logits, labels, gamma), -((1 - p) ** gamma) * p.log())


def test_dual_focal_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 3 + [[0.4, 0.4, 0.2]], dtype=torch.float64).log()
    labels = torch.tensor([0, 1, 2, 0])
    # the largest probability strictly below that of the label: .3, .2, none, and .2 (the tie does not count)
    base = torch.tensor([0.5 + 0.3, 0.7 + 0.2, 0.8, 0.6 + 0.2], dtype=torch.float64)
    p = torch.tensor([0.5, 0.3, 0.2, 0.4], dtype=torch.float64)
    torch.testing.assert_close(dual_focal(logits, labels, 5.0), -(base**5) * p.log())
    torch.testing.assert_close(dual_focal(logits, labels, 0.0), cross_entropy(logits, labels))
    torch.testing.assert_close(dual_focal(logits, labels), dual_focal(logits, labels, 5.0))


def test_confidence_penalty_takes_the_entropy_away():
    logits, labels = sample(size=30)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(confidence_penalty(logits, labels, 0.3), cross_entropy(logits, labels) - 0.3 * entropy)


def test_ps_kd_gradient_is_softmax_minus_target():
    logits, labels = sample(size=30)
    previous, alpha = sample(size=30, seed=7)[0].softmax(-1), 0.6
    logits.requires_grad_()
    value = ps_kd(logits, labels, previous, alpha)
    target = (1 - alpha) * F.one_hot(labels, CLASSES) + alpha * previous
    torch.testing.assert_close(value, F.cross_entropy(logits, target, reduction="none"))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(gradient, p - target)
    # the label's gradient is the cross-entropy's, rescaled by how hard the example was before and is now
    rows = torch.arange(30)
    rescaled = (p[rows, labels] - 1) * (1 - alpha * (1 - previous[rows, labels]) / (1 - p[rows, labels]))
    torch.testing.assert_close(gradient[rows, labels], rescaled)
    torch.testing.assert_close(ps_kd(logits, labels, previous, 0.0), cross_entropy(logits, labels))


def test_ldr_kl_limits():
    logits, labels = sample(size=30)
    ce = cross_entropy(logits, labels)
    torch.testing.assert_close(ldr_kl(logits, labels), ce - math.log(CLASSES), rtol=1e-13, atol=1e-13)
    margins = logits - logits.gather(1, labels[:, None]) + 0.7 * (1 - F.one_hot(labels, CLASSES))
    torch.testing.assert_close(ldr_kl(logits, labels, 1e-9, 0.7), margins.amax(-1), rtol=0, atol=1e-7)
    torch.testing.assert_close(ldr_kl(logits, labels, 1e9, 0.7), margins.mean(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_ldr_kl_is_the_worst_case_over_label_weights(temperature):
    logits, labels = sample(size=6)
    margins = logits - logits.gather(1, labels[:, None]) + 0.5 * (1 - F.one_hot(labels, CLASSES))
    value = ldr_kl(logits, labels, temperature, 0.5)

    def dual(weights):
        return (weights * margins).sum(-1) - temperature * (weights * (CLASSES * weights).log()).sum(-1)

    torch.testing.assert_close(dual((margins / temperature).softmax(-1)), value)
    others = torch.distributions.Dirichlet(torch.ones(CLASSES, dtype=torch.float64)).sample((200, 6))
    assert (dual(others) <= value + 1e-12).all()


def test_aldr_temperature_is_its_formula_and_stays_on_its_leash():
    logits, _ = sample(size=30, scale=4.0)
    logits[0] = 3.0
    logits[1] = torch.tensor([1e3, 0, 0, 0, 0])
    current = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)
    p = (logits / current[:, None]).softmax(-1)
    divergence = math.log(CLASSES) - torch.distributions.Categorical(probs=p).entropy()
    update = aldr_temperature(logits.requires_grad_(), current, 0.9, 3.0)
    torch.testing.assert_close(update, 0.9 * (1 - divergence / (3 * math.log(CLASSES))), rtol=1e-9, atol=1e-9)
    assert not update.requires_grad
    assert update[0].item() == pytest.approx(0.9)
    assert update[1].item() == pytest.approx(0.9 * (1 - 1 / 3))
    assert ((update > 0.9 * (1 - 1 / 3) - 1e-12) & (update <= 0.9 + 1e-12)).all()
    twice = vmap(aldr_temperature)(torch.stack([logits, 2 * logits]).detach(), torch.stack([current, current]))
    torch.testing.assert_close(twice[1], aldr_temperature(2 * logits, current))


def test_aldr_kl_is_stationary_where_the_update_rests():
    logits, labels = sample(size=30, scale=1.0)
    temperature = torch.full((30,), 1.2, dtype=torch.float64)
    for _ in range(300):
        temperature = aldr_temperature(logits, temperature, 1.2, 2.5)
    assert temperature.std() > 0.01
    temperature.requires_grad_()
    value = aldr_kl(logits, labels, temperature, 1.2, 2.5)
    (slope,) = torch.autograd.grad(value.sum(), temperature)
    assert slope.abs().max() < 1e-12
    base = torch.full((30,), 1.2, dtype=torch.float64)
    torch.testing.assert_close(aldr_kl(logits, labels, base, 1.2, 2.5, 0.4), ldr_kl(logits, labels, 1.2, 0.4))
    warmer = aldr_kl(logits, labels, base + 0.5, 1.2, 2.5, 0.4)
    leash = 2.5 * math.log(CLASSES) / (2 * 1.2) * 0.25
    torch.testing.assert_close(warmer, ldr_kl(logits, labels, 1.7, 0.4) - leash)


@given(seed=st.integers(0, 10**6), stretch=st.floats(0.01, 100), shift=st.floats(-10, 10))
@SETTINGS
def test_z_loss_is_its_formula_and_spherical(seed, stretch, shift):
    logits, labels = sample(size=6, seed=seed)
    values = z_loss(logits, labels, 1.7, 2.3)
    z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
    expected = F.softplus(1.7 * (2.3 - z[torch.arange(6), labels]), threshold=100) / 1.7
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(z_loss(stretch * logits + shift, labels, 1.7, 2.3), values, rtol=1e-9, atol=1e-9)


def coverage_factor(n, p):
    """F(N, p) in exact arithmetic, as a float."""
    p = Fraction(p)
    return float(n * p * (1 - p) ** (n - 1) / (1 - (1 - p) ** n))


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_limited_confidence_is_its_formula_and_its_gradient_a_rescaled_one(n):
    logits, labels = sample(size=40, scale=3.0)
    logits.requires_grad_()
    value = limited_confidence(logits, labels, n)
    p = logits.detach().softmax(-1)
    p_label = p[torch.arange(40), labels]
    expected = [
        -math.log1p(-((1 - Fraction(q)) ** n)) if q > 0.9 else -math.log(1 - (1 - q) ** n) for q in p_label.tolist()
    ]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-13)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    factor = torch.tensor([coverage_factor(n, q) for q in p_label.tolist()], dtype=torch.float64)
    torch.testing.assert_close(gradient, factor[:, None] * (p - F.one_hot(labels, CLASSES)), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 16, 1000])
@pytest.mark.parametrize("gap", [-300.0, -60.0, -19.0, -18.0, -10.0, -4.0, 0.0, 4.0, 15.0, 40.0, 90.0])
def test_limited_confidence_keeps_its_digits_at_both_ends(dtype, n, gap):
    mp.dps = 500
    odds = mp.exp(mpf(gap)) / 2  # label at ``gap``, two others at 0
    miss = 1 / (1 + odds)
    expected = -mp.log1p(-(miss**n))
    slope = n * (1 - miss) * miss ** (n - 1) / (1 - miss**n) * -miss
    logits = torch.tensor([[gap, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    value = limited_confidence(logits, torch.tensor([0]), n)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    tiny = torch.finfo(dtype).tiny
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert value.item() == pytest.approx(float(expected), rel=tolerance, abs=tiny)
    # the label's logit gradient at p near 1 is a difference of numbers near 1
    assert gradient[0, 0].item() == pytest.approx(float(slope), rel=tolerance, abs=3 * torch.finfo(dtype).eps)


def test_limited_confidence_factor_falls_with_confidence_and_has_its_limits():
    gaps = torch.linspace(-12, 8, 41, dtype=torch.float64)
    logits = torch.stack([gaps, torch.zeros_like(gaps), torch.zeros_like(gaps)], -1).requires_grad_()
    labels = torch.zeros(41, dtype=torch.int64)
    (limited,) = torch.autograd.grad(limited_confidence(logits, labels, 16).sum(), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    factor = (limited / plain)[:, 0]
    assert (factor.diff() < 0).all()
    assert factor[0].item() == pytest.approx(1, abs=1e-4)
    assert factor[-1].item() == pytest.approx(0, abs=1e-12)


def test_limited_confidence_has_the_population_optimum_of_the_theory():
    share = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def risk(vector):
        logits = torch.as_tensor(vector).requires_grad_()
        value = (share * limited_confidence(logits.expand(3, 3), torch.arange(3), 4)).sum()
        return value.item(), torch.autograd.grad(value, logits)[0].numpy()

    best = minimize(risk, [0.0, 0.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-10}).x
    chosen = torch.as_tensor(best).softmax(-1)
    pull = share * torch.tensor([coverage_factor(4, q) for q in chosen.tolist()]) / chosen
    assert pull.max().item() == pytest.approx(pull.min().item(), rel=1e-6)
    assert (chosen - 1 / 3).abs().max() < (share - 1 / 3).abs().max() - 0.05


def test_pass_at_n_is_its_formula():
    logits, labels = sample(size=30)
    probabilities = logits.softmax(-1)
    p = probabilities[torch.arange(30), labels]
    for n in (1, 2, 7):
        assert pass_at_n(probabilities, labels, n).item() == pytest.approx((1 - (1 - p) ** n).mean().item(), rel=1e-12)
    rare = torch.tensor([[1e-13, 1 - 1e-13], [0.0, 1.0]], dtype=torch.float64)
    assert pass_at_n(rare, torch.tensor([0, 0]), 10).item() == pytest.approx(5e-13, rel=1e-9)
    assert pass_at_n(rare, torch.tensor([1, 1]), 10).item() == 1
    tries = torch.tensor([1.0, 5.0], dtype=torch.float64)
    together = vmap(pass_at_n, in_dims=(None, None, 0))(probabilities, labels, tries)
    assert together.tolist() == pytest.approx([pass_at_n(probabilities, labels, n).item() for n in (1, 5)])


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_n_from_samples_is_unbiased(samples):
    for n in range(1, samples + 1):
        scores = [pass_at_n_from_samples(torch.tensor([c]), samples, n).item() for c in range(samples + 1)]
        assert scores == pytest.approx(
            [1 - math.comb(samples - c, n) / math.comb(samples, n) for c in range(samples + 1)], abs=1e-6
        )
        for p in (0.1, 0.45, 0.9):
            law = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
            mean = sum(a * b for a, b in zip(law, scores, strict=True))
            assert mean == pytest.approx(1 - (1 - p) ** n, abs=1e-6)
    counts = torch.arange(samples + 1)
    each = [pass_at_n_from_samples(counts[c : c + 1], samples, 1).item() for c in range(samples + 1)]
    assert pass_at_n_from_samples(counts, samples, 1).item() == pytest.approx(sum(each) / (samples + 1))
    torch.testing.assert_close(
        vmap(lambda c: pass_at_n_from_samples(c, samples, 1))(counts[:, None]), torch.tensor(each)
    )


BAD = {
    "smoothing": lambda z, y: label_smoothing(z, y, 1.5),
    "gamma": lambda z, y: focal(z, y, -1),
    "gamma ": lambda z, y: dual_focal(z, y, torch.tensor(-1.0)),
    "weight": lambda z, y: confidence_penalty(z, y, -0.1),
    "alpha": lambda z, y: ps_kd(z, y, z.softmax(-1), 1.2),
    "previous": lambda z, y: ps_kd(z, y, z, 0.5),
    "temperature": lambda z, y: ldr_kl(z, y, 0.0),
    "temperature ": lambda z, y: aldr_kl(z, y, z.new_zeros(len(z))),
    "strength": lambda z, y: aldr_kl(z, y, z.new_ones(len(z)), 1.0, 1.0),
    "strength ": lambda z, y: aldr_temperature(z, z.new_ones(len(z)), 1.0, torch.tensor(0.5)),
    "base": lambda z, y: aldr_temperature(z, z.new_ones(len(z)), 0.0),
    "scale": lambda z, y: z_loss(z, y, 0.0),
    "n": lambda z, y: limited_confidence(z, y, 0),
    "n ": lambda z, y: pass_at_n(z.softmax(-1), y, 0.5),
    "n  ": lambda z, y: pass_at_n_from_samples(y, 3, 4),
    "correct": lambda z, y: pass_at_n_from_samples(y, 3, 2),
    "probabilities": lambda z, y: pass_at_n(z, y, 2),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    logits, _ = sample()
    with pytest.raises(ValueError, match=rf"^{name.strip()}: expected"):
        BAD[name](logits, torch.tensor([4, 0, 1, 2, 3, 4, 0, 1]))


def test_wrong_shapes_are_refused():
    logits, labels = sample()
    with pytest.raises(TypeError, match="labels"):
        focal(logits, labels[:3])
    with pytest.raises(TypeError, match="logits"):
        cross_entropy(logits[0], labels)
