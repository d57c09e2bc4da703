"""Training losses that act on one example at a time, and the pass@N metric they aim at.

Every loss takes logits ``(batch, classes)`` and returns one value per example, ``(batch,)``; the trainer takes the
mean. Hyper-parameters may be numbers or scalar tensors, so that each member of a fleet can have its own. All of them
work under ``vmap`` and ``vmap(grad)``. Losses whose terms couple the examples of a batch are in
:mod:`toolkit.calibration.batch_losses`.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import (
    readable,
    require_labels,
    require_positive,
    require_probabilities,
    require_range,
    typed,
)

__all__ = [
    "aldr_kl",
    "aldr_temperature",
    "confidence_penalty",
    "cross_entropy",
    "dual_focal",
    "focal",
    "label_smoothing",
    "ldr_kl",
    "limited_confidence",
    "log_softmax",
    "pass_at_n",
    "pass_at_n_from_samples",
    "ps_kd",
    "z_loss",
]

Scalar = float | int | Float[Tensor, ""]
Targets = Int[Tensor, "batch"] | Float[Tensor, "batch classes"]


@typed
def log_softmax(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """Log-probabilities z_k − log Σ_j exp z_j.

    Computed with the batch in the last dimension, where it runs over contiguous memory: several times faster for few
    classes, and free where ``logits`` already are a transposed ``(members, classes, batch)``.
    """
    return _log_softmax(logits)


@typed
def cross_entropy(logits: Float[Tensor, "batch classes"], labels: Targets) -> Float[Tensor, "batch"]:
    """Cross-entropy −Σ_k t_k log p_k per example, in nats; p = softmax(logits).

    ``labels`` are class indices ``(batch,)`` (t is then one-hot) or target probabilities ``(batch, classes)``.
    Raises ``ValueError`` for indices outside 0 .. classes - 1 and for targets that are not probabilities.
    """
    if labels.is_floating_point():
        require_probabilities("labels", labels)
        return -(labels * log_softmax(logits)).sum(-1)
    require_labels("labels", labels, logits.shape[-1])
    return -_pick(_log_softmax(logits), labels)


@typed
def label_smoothing(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], smoothing: Scalar = 0.1
) -> Float[Tensor, "batch"]:
    """Label smoothing: (1 − ε) · cross-entropy + ε · (mean over classes of −log p_k), ε = ``smoothing`` in [0, 1].

    Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7; for its effect on calibration see Müller et
    al. 2019. ε = 0 is the cross-entropy. Raises ``ValueError`` for ε outside [0, 1] or labels out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_range("smoothing", smoothing, 0, 1)
    log_p = log_softmax(logits)
    return -(1 - smoothing) * _pick(log_p, labels) - smoothing * log_p.mean(-1)


@typed
def focal(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], gamma: Scalar = 2.0
) -> Float[Tensor, "batch"]:
    """Focal loss −(1 − p_y)^γ log p_y, with γ = ``gamma`` ≥ 0; γ = 0 is the cross-entropy.

    Lin et al. 2017, equation 4; as a calibration method Mukhoti et al. 2020. Raises ``ValueError`` for γ < 0 or labels
    out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_range("gamma", gamma, 0, math.inf)
    log_py = _pick(log_softmax(logits), labels)
    return -_power(-torch.expm1(log_py), gamma) * log_py


@typed
def dual_focal(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], gamma: Scalar = 5.0
) -> Float[Tensor, "batch"]:
    """Dual focal loss −(1 − p_y + p_j)^γ log p_y, where p_j is the largest probability strictly below p_y.

    p_j is 0 where the true class has the smallest probability. γ = ``gamma`` ≥ 0; γ = 0 is the cross-entropy. Tao, Dong
    & Xu 2023, "Dual Focal Loss for Calibration", equation 6. Raises ``ValueError`` for γ < 0 or labels out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_range("gamma", gamma, 0, math.inf)
    log_p = log_softmax(logits)
    log_py = _pick(log_p, labels)
    below = torch.where(log_p < log_py[:, None], log_p.exp(), 0.0)
    return -_power(below.amax(-1) - torch.expm1(log_py), gamma) * log_py


@typed
def confidence_penalty(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], weight: Scalar = 0.1
) -> Float[Tensor, "batch"]:
    """Cross-entropy minus β times the entropy of the prediction: −log p_y − β H(p), β = ``weight`` ≥ 0.

    Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions". The value can fall
    a little below 0 near a certain prediction. Raises ``ValueError`` for β < 0 or labels out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_range("weight", weight, 0, math.inf)
    log_p = log_softmax(logits)
    return weight * (log_p.exp() * log_p).sum(-1) - _pick(log_p, labels)


@typed
def ps_kd(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    previous: Float[Tensor, "batch classes"],
    alpha: Scalar,
) -> Float[Tensor, "batch"]:
    """Self-distillation: cross-entropy against the target (1 − α) · one-hot + α · ``previous``.

    ``previous`` holds the model's own probabilities of these examples from the epoch before; α = ``alpha`` in [0, 1]
    grows linearly over training, α_t = α_T (t + 1) / epochs with α_T = 0.8 in the paper. The gradient in the logits is
    softmax − target. Kim et al. 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets" (PS-KD),
    equations 3 and 4. Raises ``ValueError`` where ``previous`` are no probabilities, for α outside [0, 1], or labels
    out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_probabilities("previous", previous)
    require_range("alpha", alpha, 0, 1)
    log_p = log_softmax(logits)
    return -(1 - alpha) * _pick(log_p, labels) - alpha * (previous * log_p).sum(-1)


@typed
def ldr_kl(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    temperature: Scalar = 1.0,
    margin: Scalar = 0.0,
) -> Float[Tensor, "batch"]:
    """LDR-KL loss λ log( (1/K) Σ_k exp((z_k − z_y + c·1[k ≠ y]) / λ) ), with λ = ``temperature`` > 0, c = ``margin``.

    The worst expected margin over label weights that stay KL-close to uniform. λ = 1, c = 0 is the cross-entropy minus
    log K; λ → 0 is the Crammer-Singer hinge max_k (...), λ → ∞ the mean of the margins. Zhu, Ying & Yang 2023, "Label
    Distributionally Robust Losses for Multi-class Classification". Raises ``ValueError`` for λ ≤ 0 or labels out of
    range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_positive("temperature", temperature)
    return _robust_margin(logits, labels, temperature, margin)


@typed
def aldr_temperature(
    logits: Float[Tensor, "batch classes"],
    temperature: Float[Tensor, "batch"],
    base: Scalar = 1.0,
    strength: Scalar = 2.0,
) -> Float[Tensor, "batch"]:
    """Next temperature of each example: λ_i ← λ0 (1 − KL(softmax(z_i / λ_i) ‖ uniform) / (α log K)), detached.

    ``base`` is λ0 > 0, ``strength`` is α > 1 (which keeps every λ_i above λ0 (1 − 1/α)). A confident prediction gets a
    low temperature, hence a stronger focus on its worst margin; an undecided one, as on a noisy label, stays near λ0.
    Keep the result per example from epoch to epoch, starting at λ0. Zhu, Ying & Yang 2023, "Label Distributionally
    Robust Losses for Multi-class Classification", algorithm for ALDR-KL. Raises ``ValueError`` for λ ≤ 0 or α ≤ 1.
    """
    require_positive("temperature", temperature)
    require_positive("base", base)
    _require_strength(strength)
    log_p = log_softmax(logits.detach() / temperature.detach()[:, None])
    log_classes = math.log(logits.shape[-1])
    divergence = (log_p.exp() * log_p).sum(-1) + log_classes
    return base * (1 - divergence / (strength * log_classes))


@typed
def aldr_kl(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    temperature: Float[Tensor, "batch"],
    base: Scalar = 1.0,
    strength: Scalar = 2.0,
    margin: Scalar = 0.0,
) -> Float[Tensor, "batch"]:
    """ALDR-KL loss: :func:`ldr_kl` with a temperature λ_i of each example, minus (α log K / (2 λ0)) (λ_i − λ0)².

    ``temperature`` holds the λ_i, as :func:`aldr_temperature` gives them; ``base`` is λ0, ``strength`` is α > 1,
    ``margin`` is c. At c = 0 the update's fixed point is where the loss is stationary in λ_i. Zhu, Ying & Yang 2023,
    "Label Distributionally Robust Losses for Multi-class Classification". Raises ``ValueError`` as its two relatives
    do.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_positive("temperature", temperature)
    require_positive("base", base)
    _require_strength(strength)
    leash = strength * math.log(logits.shape[-1]) / (2 * base)
    return _robust_margin(logits, labels, temperature[:, None], margin) - leash * (temperature - base) ** 2


@typed
def z_loss(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], scale: Scalar = 1.0, shift: Scalar = 3.0
) -> Float[Tensor, "batch"]:
    """Z-loss (1/a) softplus(a (b − ẑ_y)), with ẑ the logits standardised over classes (population deviation).

    a = ``scale`` > 0, b = ``shift``. Unchanged by z → s z + t for s > 0, so it fixes no temperature: calibrate after
    it. ẑ_y is at most √(K − 1). A row of equal logits is centred only. de Brébisson & Vincent 2016, "The Z-loss: a
    shift and scale invariant classification loss belonging to the Spherical Family". Raises ``ValueError`` for a ≤ 0
    or labels out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_positive("scale", scale)
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    spread = variance > torch.finfo(logits.dtype).tiny
    deviation = torch.where(spread, variance, 1.0).sqrt()
    gap = scale * (shift - _pick(centred, labels) / deviation)
    return torch.logaddexp(gap, torch.zeros_like(gap)) / scale


@typed
def limited_confidence(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], n: Scalar = 16
) -> Float[Tensor, "batch"]:
    """Negative log chance that at least one of N samples is right: −log(1 − (1 − p_y)^N), with N = ``n`` ≥ 1.

    N = 1 is the cross-entropy. The gradient in the logits is F(N, p_y) times the cross-entropy's, with
    F = N p (1 − p)^(N−1) / (1 − (1 − p)^N): once N tries suffice, confidence earns nothing. No step loses precision or
    overflows, whether p_y underflows or rounds to 1. Chen et al. 2025, "Rethinking Fine-Tuning when Scaling Test-Time
    Compute: Limiting Confidence Improves Mathematical Reasoning" (direct coverage optimisation). Raises ``ValueError``
    for N < 1 or labels out of range.
    """
    require_labels("labels", labels, logits.shape[-1])
    require_range("n", n, 1, math.inf)
    log_p = log_softmax(logits)
    log_py = _pick(log_p, labels)
    p = log_py.exp()
    # log(1 - p): from p where p is small, from the other classes where p is near 1
    others = torch.where(_is_label(logits, labels), -math.inf, log_p)
    top = others.detach().amax(-1, keepdim=True)
    log_rest = (others - top).exp().sum(-1).log() + top[:, 0]
    low = p < 0.5
    log_miss = torch.where(low, torch.log1p(-torch.where(low, p, 0.25)), log_rest)
    # log(1 - exp(all_miss)): three branches, each fed only arguments that it can bear
    all_miss = n * log_miss
    rare, often = all_miss > -1e-8, all_miss < -math.log(2)
    log_tries = math.log(n) if not isinstance(n, Tensor) else n.log()
    hit_rare = log_tries + log_py + (p + all_miss) / 2
    hit_often = torch.log1p(-torch.where(often, all_miss, -1.0).exp())
    hit = torch.log(-torch.expm1(torch.where(rare | often, -0.5, all_miss)))
    return -torch.where(rare, hit_rare, torch.where(often, hit_often, hit))


@typed
def pass_at_n(
    probabilities: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], n: Scalar
) -> Float[Tensor, ""]:
    """Expected share of examples solved by at least one of N independent samples: mean of 1 − (1 − p_y)^N. Exact.

    N = ``n`` ≥ 1. Chen et al. 2025, "Limiting Confidence Improves Mathematical Reasoning", equation 1. Raises
    ``ValueError`` for N < 1, labels out of range, or values that are no probabilities.
    """
    require_probabilities("probabilities", probabilities)
    require_labels("labels", labels, probabilities.shape[-1])
    require_range("n", n, 1, math.inf)
    return -torch.expm1(n * torch.log1p(-_pick(probabilities, labels).clamp(0, 1))).mean()


@typed
def pass_at_n_from_samples(correct: Int[Tensor, "batch"], samples: int, n: int) -> Float[Tensor, ""]:
    """Unbiased pass@N from counts: mean of 1 − C(m − c, N) / C(m, N), c of the m = ``samples`` answers being right.

    The share of size-N subsets of the drawn answers that hold a right one. Chen et al. 2021, "Evaluating Large Language
    Models Trained on Code", equation 1. Raises ``ValueError`` unless 1 ≤ N ≤ m and every count lies in 0 .. m.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"n: expected a number of tries from 1 to samples = {samples}, got {n}")
    require_labels("correct", correct, samples + 1)
    left = torch.arange(n, device=correct.device)
    factors = ((samples - correct)[:, None] - left).clamp_min(0) / (samples - left).to(torch.float64)
    return (1 - factors.prod(-1)).mean().to(torch.get_default_dtype())


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.mT.log_softmax(-2).mT


def _pick(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row at its label."""
    return values.mT.gather(-2, labels[None])[0]


def _is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Boolean one-hot ``(batch, classes)``."""
    return labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)


def _power(base: Tensor, exponent: Scalar) -> Tensor:
    """base ** exponent for base ≥ 0, with a gradient that is finite at base = 0 whatever the exponent."""
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** exponent


def _robust_margin(logits: Tensor, labels: Tensor, temperature: Scalar, margin: Scalar) -> Tensor:
    """λ log mean_k exp(d_k / λ) of the margins d_k; ``temperature`` is a scalar or ``(batch, 1)``."""
    margins = logits - _pick(logits, labels)[:, None] + margin * ~_is_label(logits, labels)
    top = margins.detach().amax(-1, keepdim=True)
    return (top + temperature * ((margins - top) / temperature).exp().mean(-1, keepdim=True).log())[:, 0]


def _require_strength(value: Scalar) -> None:
    """Raise ``ValueError`` unless ALDR's α is above 1 (nothing where it cannot be read)."""
    if isinstance(value, Tensor):
        if not readable(value):
            return
        value = value.item()
    if not value > 1:
        raise ValueError(f"strength: expected a number greater than 1, got {value}")
