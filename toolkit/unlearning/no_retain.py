"""SCAR: forget towards the nearest other class by Mahalanobis distance, and keep the rest with foreign images."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import typed
from toolkit.fleet import Fleet
from toolkit.unlearning.losses import distillation
from toolkit.unlearning.parts import POSITIVE, Mask, Strength, Task, prepare, train_pairs, within

__all__ = ["scar"]


class Gaussians(NamedTuple):
    """Of each class its mean feature and inverse correlation matrix, and whether it has enough examples for them."""

    mean: Tensor
    inverse: Tensor
    known: Tensor


@typed
def scar(
    trained: Fleet,
    data: Any,
    forget: Mask,
    ood: Float[Tensor, "images ..."],
    *,
    removed: int | None = None,
    forget_weight: Strength = 1.0,
    distil_weight: Strength = 5.0,
    temperature: Strength = 1.0,
    power: float = 0.5,
    shrinkage: float = 3.0,
    rounds: int = 1,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """λ₁ · mean_f d_k(x) + λ₂ · mean_ood T² KL(p_o ‖ p): no step sees a kept example.

    d_k = zᵀ S_k⁺ z, z = n(φ̃(x)) - n(μ_k), n divides by the length, φ̃ = φ^δ are the features after Tukey's transform (δ
    = ``power`` in (0, 1]; features must be ≥ 0, as after a ReLU). μ_k and the covariance of each class are those of φ̃
    over D_f and D_r (the only use of D_r) in the original; S_k is the covariance plus γ · its mean variance on the
    diagonal and γ · its mean covariance off it, as a correlation matrix, γ = ``shrinkage`` ≥ 0. ``rounds=2`` shrinks
    twice, as the public code does without saying so. Each x in D_f goes to the class k ≠ y that is nearest at the
    start; the choice is frozen. Classes with fewer than two examples are no targets.

    ``ood`` are out-of-distribution inputs, of the shape of ``data``'s, on which the original teaches. When a whole
    class is forgotten, ``removed`` is its number: inputs that the original takes for it are dropped, and its logit in
    the teacher becomes the smallest logit of the batch. λ₁ = ``forget_weight``, λ₂ = ``distil_weight``, T =
    ``temperature`` > 0; the factor T² is ours. Source: Bonato, Cotogni & Sabetta 2024, "Is Retain Set All You Need in
    Machine Unlearning? Restoring Performance of Unlearned Models with Out-Of-Distribution Images"; their stopping rule
    and the weights by class for random sets are left out. Raises ``ValueError`` also for inputs of another shape,
    features below 0, no other class to go to, or a member with no out-of-distribution input left.
    """
    task = prepare(trained, data, forget, retain)
    x, members = task.fields["x"], len(trained)
    for name, value, low, high in (("power", power, 1e-3, 1), ("shrinkage", shrinkage, 0, torch.inf)):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")
    if rounds < 0:
        raise ValueError(f"rounds: expected 0, 1 or 2, got {rounds}")
    if len(ood) == 0 or ood.shape[1:] != x.shape[1:]:
        raise ValueError(f"ood: expected inputs (images, {', '.join(map(str, x.shape[1:]))}), got {tuple(ood.shape)}")
    everything = torch.cat([x, ood.to(x)])
    teacher = trained.logits(everything)
    classes = teacher.shape[-1]
    if removed is not None and not 0 <= removed < classes:
        raise ValueError(f"removed: expected a class from 0 to {classes - 1}, got {removed}")
    kept = F.pad(torch.zeros_like(task.retain), (0, len(ood)), value=True)
    if removed is not None:
        kept &= teacher.argmax(-1) != removed
        if bool((~kept.any(1)).any()):
            raise ValueError(f"ood: expected inputs that are not taken for class {removed}, got none for a member")

    features = trained.features(x)
    if bool((features < 0).any()):
        raise ValueError(f"trained: expected features of at least 0 (Tukey's transform), got {features.min().item()}")
    found = [
        gaussians(tukey(f, power), task.fields["y"], seen, classes, shrinkage, rounds)
        for f, seen in zip(features, task.whole, strict=True)
    ]
    targets = torch.stack(
        [
            nearest(tukey(f, power), task.fields["y"], lost, g)
            for f, lost, g in zip(features, task.forget, found, strict=True)
        ]
    )
    means, inverses = (torch.cat([g[part] for g in found]) for part in (0, 1))
    slots = targets + classes * torch.arange(members, device=x.device)[:, None]

    def loss(model, batch, hyper):
        half = len(batch.forgotten) // 2  # the first half is to be forgotten
        logits, features = model(batch.x, return_features=True)
        away = mahalanobis(tukey(features[:half], power), means[batch.slot[:half]], inverses[batch.slot[:half]])
        wanted = batch.teacher[half:]
        if removed is not None:
            wanted = torch.where(torch.arange(classes, device=x.device) == removed, wanted.amin(), wanted)
        keep = distillation(logits[half:], wanted, hyper.temperature)
        return torch.cat([hyper.forget_weight * away, hyper.distil_weight * keep])

    joined = Task(
        {"x": everything, "y": F.pad(task.fields["y"], (0, len(ood)))}, F.pad(task.forget, (0, len(ood))), kept
    )
    own = {"slot": F.pad(slots, (0, len(ood))), "teacher": teacher}
    hyper = within(0, forget_weight=forget_weight, distil_weight=distil_weight)
    hyper |= within(POSITIVE, temperature=temperature)
    return train_pairs(trained, loss, joined, steps, seed, hyper, own=own, **more)


@typed
def tukey(features: Float[Tensor, "batch dim"], power: float) -> Float[Tensor, "batch dim"]:
    """Tukey's ladder of powers φ^δ of features ≥ 0; the slope at 0, which is infinite, is taken as 0."""
    live = features > 0
    return torch.where(live, torch.where(live, features, 1) ** power, 0)


@typed
def shrink(covariance: Float[Tensor, "dim dim"], shrinkage: float) -> Float[Tensor, "dim dim"]:
    """S + γ · mean(diagonal) · I + γ · mean(off the diagonal) · (1 - I); positive semi-definite if S is."""
    size = len(covariance)
    diagonal = covariance.diagonal().sum()
    off = (covariance.sum() - diagonal) / max(size * (size - 1), 1)
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    return covariance + shrinkage * (diagonal / size * eye + off * (1 - eye))


@typed
def gaussians(
    features: Float[Tensor, "examples dim"],
    labels: Int[Tensor, "examples"],
    seen: Bool[Tensor, "examples"],
    classes: int,
    shrinkage: float = 3.0,
    rounds: int = 1,
) -> Gaussians:
    """Mean and pseudo-inverse of the shrunk correlation matrix of each class, over the rows that are ``seen``."""
    dim = features.shape[1]
    mean, inverse = features.new_zeros(classes, dim), features.new_zeros(classes, dim, dim)
    known = torch.zeros(classes, dtype=torch.bool, device=features.device)
    for k in range(classes):
        rows = features[seen & (labels == k)].double()
        if len(rows) < 2 or not bool((rows != rows[0]).any()):
            continue
        matrix = torch.cov(rows.mT).reshape(dim, dim)
        for _ in range(rounds):
            matrix = shrink(matrix, float(shrinkage))
        scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
        correlation = matrix * scale * scale[:, None]
        mean[k] = rows.mean(0)
        inverse[k] = torch.linalg.pinv(correlation, hermitian=True)
        known[k] = True
    return Gaussians(mean, inverse, known)


@typed
def mahalanobis(
    features: Float[Tensor, "batch dim"], mean: Float[Tensor, "batch dim"], inverse: Float[Tensor, "batch dim dim"]
) -> Float[Tensor, "batch"]:
    """zᵀ S⁺ z with z the difference of the two vectors, each divided by its length: a squared distance, no unit."""
    z = F.normalize(features, dim=-1) - F.normalize(mean, dim=-1)
    return (z[:, None] @ inverse @ z[..., None])[:, 0, 0]


@typed
def nearest(
    features: Float[Tensor, "examples dim"],
    labels: Int[Tensor, "examples"],
    forget: Bool[Tensor, "examples"],
    classes: Gaussians,
) -> Int[Tensor, "examples"]:
    """The known class other than its own that is nearest to each example to forget; 0 for the other examples."""
    numbers = torch.arange(len(classes.known), device=features.device)
    found = torch.zeros_like(labels, dtype=torch.int64)
    rows = forget.nonzero()[:, 0]
    z = F.normalize(features[rows], dim=-1)[None] - F.normalize(classes.mean, dim=-1)[:, None]
    distances = ((z @ classes.inverse) * z).sum(-1).mT
    open_ = classes.known & (numbers != labels[rows, None])
    if not bool(open_.any(-1).all()):
        raise ValueError("data: expected a class besides that of each example to forget, with two examples, got none")
    found[rows] = distances.masked_fill(~open_, torch.inf).argmin(-1)
    return found
