"""Class unlearning by concepts: find what a class is recognised by, replace that in its examples, and train on those.

A concept is a direction in the space of the inputs, so that it can be drawn and a poisoned example can be looked at:
the direction inside one patch of the image in which a class differs from the rest. (In the paper concepts live in the
features of a pretrained net and are pasted into photographs; this reading is ours and is not confirmed.)
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import require_labels, require_positive, typed
from toolkit.fleet import Fleet
from toolkit.unlearning.parts import Mask, Strength, prepare, train_pairs, weighed, within

__all__ = [
    "concept_direction",
    "concept_head",
    "concept_poisoning",
    "integrated_gradients",
    "patch_concepts",
    "poison",
    "rank_concepts",
]

_DONORS, _LABELS = 111, 112  # what a key's numbers are for


@typed
def concept_direction(
    features: Float[Tensor, "examples dim"], present: Bool[Tensor, "examples"], ridge: float | Float[Tensor, ""] = 1e-2
) -> Float[Tensor, "dim"]:
    """Concept activation vector: unit normal of a linear classifier of examples with it from those without.

    The classifier is ridge regression on a target of +1 and -1, both kinds weighted alike, features about the mean of
    the two means: v ∝ (S + ridge · mean diagonal · I)⁻¹ (μ₁ - μ₀), S the balanced covariance about that point. It
    points towards the examples with the concept; 0 where nothing differs. Source: Kim et al. 2018, "Interpretability
    Beyond Feature Attribution: Quantitative Testing with Concept Activation Vectors" (any linear classifier; they use a
    support vector machine or logistic regression). Raises ``ValueError`` for a ridge of 0 or less.
    """
    require_positive("ridge", ridge)
    weights = (present / present.sum() + ~present / (~present).sum()).to(features.dtype) / 2
    centred = features - weights @ features
    scatter = (centred * weights[:, None]).mT @ centred
    signs = torch.where(present, weights, -weights)
    eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    tiny = torch.finfo(features.dtype).tiny
    normal = torch.linalg.solve(scatter + (ridge * scatter.diagonal().mean() + tiny) * eye, signs @ centred)
    return normal / normal.norm().clamp_min(tiny)


@typed
def patch_concepts(
    images: Float[Tensor, "examples channels height width"], present: Bool[Tensor, "examples"], patch: int = 4
) -> Float[Tensor, "concepts values"]:
    """One :func:`concept_direction` for each patch × patch square of the image, over all channels, 0 outside it.

    Rows have as many values as an image and go through the squares row by row; different ones are orthogonal. Raises
    ``ValueError`` if ``patch`` does not divide height and width, or ``present`` is true or false everywhere.
    """
    _, channels, height, width = images.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch: expected a divisor of {height} and {width}, got {patch}")
    if bool(present.all()) or not bool(present.any()):
        raise ValueError("present: expected examples with the concept and without, got one kind only")
    numbers = torch.arange(height * width, device=images.device).reshape(height, width)
    square = (numbers // width // patch * (width // patch) + numbers % width // patch).expand(channels, -1, -1)
    flat, found = images.flatten(1), []
    for i in range(int(square.max()) + 1):
        inside = (square == i).flatten()
        direction = flat.new_zeros(flat.shape[1])
        direction[inside] = concept_direction(flat[:, inside], present)
        found.append(direction)
    return torch.stack(found)


@typed
def concept_head(
    scores: Float[Tensor, "examples concepts"],
    labels: Int[Tensor, "examples"],
    classes: int,
    sparsity: float = 1e-2,
    iterations: int = 500,
) -> tuple[Float[Tensor, "classes concepts"], Float[Tensor, "classes"]]:
    """Weights W and biases b of the sparse linear head min mean CE(W s + b, y) + λ ‖W‖₁, λ = ``sparsity`` ≥ 0.

    With it on the concept scores s = x · v (standardise them first) a classifier is a post-hoc concept bottleneck.
    Accelerated proximal gradient steps with restarts; biases are not penalised. Source: Yuksekgonul, Wang & Zou 2023,
    "Post-hoc Concept Bottleneck Models" (an elastic net there, the L1 part alone here). Raises ``ValueError`` for
    labels out of range or a negative λ.
    """
    require_labels("labels", labels, classes)
    if not sparsity >= 0:
        raise ValueError(f"sparsity: expected at least 0, got {sparsity}")
    inputs = torch.cat([scores, scores.new_ones(len(scores), 1)], 1)
    onehot = F.one_hot(labels.long(), classes).to(scores.dtype)
    rate = 2 / torch.linalg.matrix_norm(inputs.mT @ inputs / len(inputs), 2)  # softmax has curvature of at most 1/2
    limit = rate * torch.full((inputs.shape[1],), float(sparsity), dtype=scores.dtype, device=scores.device)
    limit[-1] = 0
    found = ahead = scores.new_zeros(classes, inputs.shape[1])
    momentum = scores.new_ones(())
    for _ in range(iterations):
        slope = ((inputs @ ahead.mT).softmax(-1) - onehot).mT @ inputs / len(inputs)
        moved = ahead - rate * slope
        after = moved.sign() * (moved.abs() - limit).relu()
        uphill = ((ahead - after) * (after - found)).sum() > 0
        momentum = torch.where(uphill, 1, momentum)
        grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = after + torch.where(uphill, 0, (momentum - 1) / grown) * (after - found)
        found, momentum = after, grown
    return found[:, :-1], found[:, -1]


@typed
def rank_concepts(weights: Float[Tensor, "classes concepts"], target: int) -> Int[Tensor, "concepts"]:
    """Concepts in order of their weight for class ``target`` in :func:`concept_head`, the greatest first.

    Weights compare only where scores are standardised. A negative weight means that the concept speaks against the
    class. Raises ``ValueError`` if there is no such class.
    """
    if not 0 <= target < len(weights):
        raise ValueError(f"target: expected a class from 0 to {len(weights) - 1}, got {target}")
    return weights[target].argsort(descending=True, stable=True)


@typed
def integrated_gradients(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch ..."],
    baseline: Float[Tensor, "..."],
    points: int = 64,
) -> Float[Tensor, "batch ..."]:
    """(x - x₀) · ∫₀¹ ∇F(x₀ + t (x - x₀)) dt: what each input adds to F(x) - F(x₀), by the midpoint rule.

    ``function`` maps a batch to one value each, ``(batch,)``, for instance the logit of a class; ``baseline`` x₀ is one
    input. Attributions sum to F(x) - F(x₀) (completeness), exactly for linear F and up to O(1/points²) where F is
    smooth. Source: Sundararajan, Taly & Yan 2017, "Axiomatic Attribution for Deep Networks". Raises ``ValueError``
    for fewer than one point.
    """
    if points < 1:
        raise ValueError(f"points: expected at least 1, got {points}")
    total = torch.zeros_like(x)
    with torch.enable_grad():
        for i in range(points):
            place = (baseline + (i + 0.5) / points * (x - baseline)).detach().requires_grad_()
            total = total + torch.autograd.grad(function(place).sum(), place)[0]
    return (x - baseline) * total / points


@typed
def poison(
    x: Float[Tensor, "examples dim"], donors: Float[Tensor, "examples dim"], directions: Float[Tensor, "concepts dim"]
) -> Float[Tensor, "examples dim"]:
    """x' = x - Σ_v (x · v) v + Σ_v (donor · v) v: the concept that the donor has, in place of the example's own.

    The ``directions`` v must be orthonormal (or 0), as those of :func:`patch_concepts` are; all else of x stays.
    """
    return x + ((donors - x) @ directions.mT) @ directions


@typed
def concept_poisoning(
    trained: Fleet,
    data: Any,
    forget: Mask,
    directions: Float[Tensor, "concepts values"],
    *,
    labels: Literal["random", "targeted"] = "targeted",
    retain_weight: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """mean_f CE(f(x'), y') + λ · mean_r CE(f(x), y), x' poisoned examples (:func:`poison`), λ = ``retain_weight`` ≥ 0.

    Each example to forget gets a donor at random from D_r's examples of the donor class: the class other than its own
    to which the original gives the greatest mean probability over the member's D_f. y' is the donor class
    (``targeted``) or any class but the example's own, uniform (``random``). Donors and labels are drawn once.
    ``directions`` are orthonormal rows over the values of an input, best those of highest rank
    (:func:`rank_concepts`); with none x' = x, and with enough of them x' is the donor under its own label, which
    teaches nothing. Source: "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning";
    epochs, rates and the drawing of donors are readings that are not confirmed. Raises ``ValueError`` for
    directions of another length, that are not orthonormal, or where D_r has no other class.
    """
    task = prepare(trained, data, forget, retain)
    x, y = task.fields["x"], task.fields["y"].long()
    flat, directions = x.flatten(1), directions.to(x)
    if directions.shape[1] != flat.shape[1]:
        raise ValueError(f"directions: expected {flat.shape[1]} values each, got {directions.shape[1]}")
    gram = directions @ directions.mT
    if bool(((gram - gram.diagonal().round().clamp_max(1).diag()).abs() > 1e-4).any()):
        raise ValueError("directions: expected orthonormal rows (or rows of 0), got others")
    probabilities = trained.probabilities(x)
    members, classes = len(trained), probabilities.shape[-1]
    own = F.one_hot(y, classes).bool()
    has = (task.retain[..., None] & own).any(1)  # (members, classes) that D_r has
    seen = (probabilities * ~own * task.forget[..., None]).sum(1)
    lost = (task.forget[..., None] & own).any(1)
    candidates = has & ~lost
    if not bool(candidates.any(1).all()):
        raise ValueError("retain: expected a class that has no example to forget, got none")
    donor_class = seen.masked_fill(~candidates, -math.inf).argmax(1)
    keys = random.fold_in(random.key(seed, _DONORS, device=x.device), trained.streams.to(x.device))
    able = task.retain & (y == donor_class[:, None])
    order = able.long().argsort(dim=1, descending=True, stable=True)
    drawn = random.uniform(keys, (len(y),), torch.float64) * able.sum(1, keepdim=True)
    donors = order.gather(1, drawn.long())
    poisoned = torch.stack([poison(flat, flat[rows], directions) for rows in donors]).reshape(members, *x.shape)
    if labels == "targeted":
        wrong = donor_class[:, None].expand(-1, len(y))
    else:
        keys = random.fold_in(random.key(seed, _LABELS, device=x.device), trained.streams.to(x.device))
        shift = 1 + (random.uniform(keys, (len(y),), torch.float64) * (classes - 1)).long()
        wrong = (y + shift) % classes

    def loss(model, batch, hyper):
        mask = batch.forgotten.reshape(-1, *[1] * (batch.x.ndim - 1))
        logits = model(torch.where(mask, batch.poisoned, batch.x))
        values = F.cross_entropy(logits, torch.where(batch.forgotten, batch.wrong, batch.y), reduction="none")
        return weighed(batch, hyper, values, values)

    tables = {"poisoned": poisoned, "wrong": wrong.contiguous()}
    return train_pairs(trained, loss, task, steps, seed, within(0, retain_weight=retain_weight), tables, **more)
