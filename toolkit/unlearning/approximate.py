"""Approximate unlearning of classifiers: a trained fleet and what to forget → the unlearned fleet, all members at once.

Every method takes ``data`` (fields ``x`` and ``y``, what the fleet was trained on), ``forget``, a mask ``(examples,)``
or ``(members, examples)``, and ``retain``, a mask too (by default all that is not forgotten; a fleet that was trained
on subsets needs its own). Strengths are one number or one per member. All train: they take ``steps`` and ``seed``, and
hand further options to :func:`toolkit.fleet.train`: ``optimiser`` (Adam at 1e-3 by default), ``batch``, ``schedule``,
``snapshots``, ``chunk`` ... Members keep their random streams, so each is what it would be in a fleet of its own.
Methods without training are in :mod:`toolkit.unlearning.one_shot`.

Methods with two parts see pairs: a step takes ``batch`` examples to forget and ``batch`` to keep, weighted so that over
one epoch each part is the plain mean over its own examples, however different their numbers are.

All raise ``ValueError`` if a mask has another shape, is empty or everything, or the two overlap.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import typed
from toolkit.fleet import Adam, Fleet
from toolkit.unlearning import losses
from toolkit.unlearning.parts import (
    POSITIVE,
    Mask,
    Masked,
    Strength,
    Task,
    cross_entropy,
    mean_weights,
    nearest_other_class,
    prepare,
    slope,
    strengths,
    train_on,
    train_pairs,
    untrained,
    weighed,
    within,
)

__all__ = [
    "bad_teacher",
    "duck",
    "fine_tune",
    "gradient_ascent",
    "l1_sparse",
    "neg_grad_plus",
    "oracle_matching",
    "random_labels",
    "saliency_mask",
    "salun",
    "scrub",
    "stochastic_teacher",
]


@typed
def fine_tune(
    trained: Fleet, data: Any, forget: Mask, *, retain: Mask | None = None, steps: Any = 100, seed: int = 0, **more: Any
) -> Fleet:
    """Go on training on the kept examples: minimise mean CE over D_r, and hope that the rest is forgotten.

    Source: a baseline in Golatkar, Achille & Soatto 2020, "Eternal Sunshine of the Spotless Net".
    """
    task = prepare(trained, data, forget, retain)
    return train_on(trained, cross_entropy, task.fields, steps, seed, subsets=task.retain, **more)


@typed
def gradient_ascent(
    trained: Fleet, data: Any, forget: Mask, *, retain: Mask | None = None, steps: Any = 10, seed: int = 0, **more: Any
) -> Fleet:
    """Train backwards on the examples to forget: maximise mean CE over D_f. It has no bound: few steps, small rates.

    Source: Graves, Nagisetty & Ganesh 2021, "Amnesiac Machine Learning"; Thudi et al. 2022, "Unrolling SGD:
    Understanding Factors Influencing Machine Unlearning".
    """
    task = prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        return -cross_entropy(model, batch, hyper)

    return train_on(trained, loss, task.fields, steps, seed, subsets=task.forget, **more)


@typed
def neg_grad_plus(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    beta: Strength = 0.95,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """Descent on D_r and ascent on D_f at once: β · mean_r CE - (1 - β) · mean_f CE (:func:`neg_grad`), β in [0, 1].

    Source: Kurmanji et al. 2023, "Towards Unbounded Machine Unlearning".
    """
    task = prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        return losses.neg_grad(model(batch.x), batch.y, batch.forgotten, hyper.beta)

    return train_pairs(trained, loss, task, steps, seed, within(0, 1, beta=beta), **more)


@typed
def random_labels(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    retain_weight: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """mean_f CE(f(x), y') + λ · mean_r CE(f(x), y), y' uniform over all classes, drawn anew at every step.

    λ = ``retain_weight`` ≥ 0; with 0 only the examples to forget are seen, as in Zhang et al. 2024, "Unforgettable
    Generalization in Language Models". That labels are drawn anew there too is a reading that is not confirmed.
    Source: Golatkar, Achille & Soatto 2020, "Eternal Sunshine of the Spotless Net" (a baseline).
    """
    task = prepare(trained, data, forget, retain)
    hyper = within(0, retain_weight=retain_weight)
    return train_pairs(trained, _random_labels, task, steps, seed, hyper, **more)


@typed
def bad_teacher(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    retain_weight: Strength = 1.0,
    temperature: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """An untrained net teaches on D_f, the original on D_r: mean_f KL + λ · mean_r KL (:func:`bad_teaching`).

    λ = ``retain_weight`` ≥ 0, T = ``temperature`` > 0. The untrained nets come from ``seed`` and the member's stream
    and are not what the members started from. Each KL is a sum over classes; the public code's default reduction
    divides it by their number. Source: Chundawat et al. 2023, "Can Bad Teaching Induce Forgetting?".
    """
    task = prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        x, forgotten = batch.x, batch.forgotten
        logits = model(x)
        values = losses.bad_teaching(
            logits, batch.original(x), batch.untrained(x), forgotten.to(logits.dtype), hyper.temperature
        )
        return weighed(batch, hyper, values, values)

    hyper = within(0, retain_weight=retain_weight) | within(POSITIVE, temperature=temperature)
    teachers = _two_teachers(trained, task, seed)
    return train_pairs(trained, loss, task, steps, seed, hyper, references=teachers, **more)


@typed
def stochastic_teacher(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    erase: Strength = 0.25,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """First erase, then rebuild: KL(p_untrained ‖ p) on D_f for a share ``erase`` of the steps, KL(p_o ‖ p) on D_r.

    The untrained nets are those of :func:`bad_teacher`, p_o is the original. Source: Zhang et al. 2023, "Machine
    Unlearning Methodology Based on Stochastic Teacher Network"; temperature 1 and the share (there one epoch, then as
    many as accuracy needs) are readings that are not confirmed.
    """
    task = prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        logits, erasing = model(batch.x), batch.progress < hyper.erase
        away = losses.distillation(logits, batch.untrained(batch.x)) * erasing
        return torch.where(batch.forgotten, away, losses.distillation(logits, batch.original(batch.x)) * ~erasing)

    teachers = _two_teachers(trained, task, seed)
    return train_pairs(trained, loss, task, steps, seed, within(0, 1, erase=erase), references=teachers, **more)


@typed
def scrub(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    alpha: Strength = 0.1,
    gamma: Strength = 0.99,
    temperature: Strength = 4.0,
    rounds: Strength = 10,
    ascents: Strength = 3,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """Away from the original on D_f, near it on D_r, in turn (:func:`scrub_loss`).

    The steps are cut into ``rounds`` equal rounds; each of the first ``ascents`` begins with ascent on D_f for half its
    steps, all other steps descend on D_r. Give at least two steps per round. The last rounds repair what ascent broke.
    At the original itself the slope of D is 0 but for rounding, so the ascent that comes first does next to nothing.
    Source: Kurmanji et al. 2023, "Towards Unbounded Machine Unlearning" (there a phase is an epoch of its own set).
    """
    task = prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        place = batch.progress * hyper.rounds + 1e-4  # progress is rounded; a round begins at a whole number
        ascend = (place.floor() < hyper.ascents) & (place.frac() < 0.5)
        values = (model(batch.x), batch.original(batch.x), batch.y, batch.forgotten, ascend)
        return losses.scrub_loss(*values, hyper.alpha, hyper.gamma, hyper.temperature)

    hyper = within(0, alpha=alpha, gamma=gamma, ascents=ascents)
    hyper |= within(POSITIVE, temperature=temperature) | within(1, rounds=rounds)
    return train_pairs(trained, loss, task, steps, seed, hyper, references={"original": trained}, **more)


@typed
def l1_sparse(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    strength: Strength = 1e-4,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """Fine-tune towards a sparse net: mean_r CE + a (1 - t) ‖θ‖₁, t the share of the steps that is done, a = strength.

    Source: Jia et al. 2023, "Model Sparsity Can Simplify Machine Unlearning".
    """
    task = prepare(trained, data, forget, retain)
    hyper = strengths(trained, within(0, strength=strength))

    def loss(model, batch, hyper):
        sparse = hyper.strength * (1 - batch.progress) * losses.l1_norm(model.parameters)
        return cross_entropy(model, batch, hyper) + sparse

    return train_on(trained, loss, task.fields, steps, seed, subsets=task.retain, hyper=hyper, **more)


@typed
def saliency_mask(
    trained: Fleet, data: Any, forget: Mask, *, fraction: Strength = 0.5, retain: Mask | None = None
) -> Bool[Tensor, "members size"]:
    """The ``fraction`` in [0, 1] of each member's parameters with the largest |∂ mean_f CE / ∂θ_j|, over all layers.

    Exactly round(fraction · size) coordinates of the flat rows of ``trained.parameters``; of equals the first.
    Source: Fan et al. 2024, "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency".
    """
    task = prepare(trained, data, forget, retain)
    share = strengths(trained, within(0, 1, fraction=fraction))["fraction"]
    order = (
        slope(trained, trained.parameters, task.fields, mean_weights(task.forget))
        .abs()
        .argsort(dim=1, descending=True, stable=True)
    )
    size = order.shape[1]
    kept = torch.arange(size, device=order.device) < (share.double() * size).round()[:, None]
    return torch.zeros_like(kept).scatter(1, order, kept)


@typed
def salun(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    fraction: Strength = 0.5,
    retain_weight: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    optimiser: Any = None,
    **more: Any,
) -> Fleet:
    """:func:`random_labels` that moves only the coordinates of :func:`saliency_mask`; the others stay to the last bit.

    They are put back after each step: a mask on the gradient alone lets weight decay and momentum move them, as the
    public code did until 2026. Source: Fan et al. 2024, "SalUn: Empowering Machine Unlearning via Gradient-based Weight
    Saliency" (which on its smaller sets trains on D_f and D_r in turn; here both are in each step).
    """
    task = prepare(trained, data, forget, retain)
    mask = saliency_mask(trained, data, forget, fraction=fraction, retain=retain)
    masked = Masked(Adam() if optimiser is None else optimiser, mask)
    hyper = within(0, 1, fraction=fraction) | within(0, retain_weight=retain_weight)
    return train_pairs(trained, _random_labels, task, steps, seed, hyper, optimiser=masked, **more)


@typed
def duck(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    forget_weight: Strength = 1.0,
    retain_weight: Strength = 1.4,
    temperature: Strength = 2.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """λ₁ · mean_f [1 - cos(φ(x), μ_k(x))] + λ₂ · mean_r CE(f(x) / T, y), φ the features, T = ``temperature`` > 0.

    μ_k is the mean feature of class k over D_r in the original model, k(x) ≠ y the class whose μ is nearest to φ(x) by
    cosine; both are fixed before the first step. Classes that D_r lacks are no targets. λ₁ = ``forget_weight``, λ₂ =
    ``retain_weight``. Source: Cotogni et al. 2023, "DUCK: Distance-based Unlearning via Centroid Kinematics".
    Raises ``ValueError`` where D_r has no class but that of an example to forget.
    """
    task = prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        logits, features = model(batch.x, return_features=True)
        near = losses.toward_target(features, batch.target)
        keep = F.cross_entropy(logits / hyper.temperature, batch.y, reduction="none")
        return torch.where(batch.forgotten, hyper.forget_weight * near, hyper.retain_weight * keep)

    hyper = within(0, forget_weight=forget_weight, retain_weight=retain_weight)
    hyper |= within(POSITIVE, temperature=temperature)
    own = {"target": nearest_other_class(trained, task)}
    return train_pairs(trained, loss, task, steps, seed, hyper, own, **more)


@typed
def oracle_matching(
    trained: Fleet,
    data: Any,
    forget: Mask,
    targets: Float[Tensor, "_ classes"] | Float[Tensor, "_ _ classes"],
    *,
    retain_weight: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """mean_f |f(x) - f*(x)|² + λ · mean_r |f(x) - f*(x)|²: regress on ``targets`` f*, λ = ``retain_weight`` ≥ 0.

    ``targets`` are logits ``(examples, classes)`` or ``(members, examples, classes)``. With those of retrained models
    (their mean, say) this is oracle matching, a bound on what fine-tuning can do; with those that datamodels predict it
    is datamodel matching, which needs no retrained model. Source: Georgiev et al.
    2024, "Attribute-to-Delete: Machine Unlearning via Datamodel Matching"; as many examples of D_r as of D_f in each
    step is a reading that is not confirmed. Raises ``ValueError`` for targets of another length.
    """
    task = prepare(trained, data, forget, retain)
    members, examples = task.forget.shape
    if targets.shape[-2] != examples or (targets.ndim == 3 and len(targets) != members):
        got = tuple(targets.shape)
        raise ValueError(f"targets: expected ({examples}, classes) or ({members}, {examples}, classes), got {got}")
    wanted = targets.to(trained.device).expand(members, *targets.shape[-2:])

    def loss(model, batch, hyper):
        values = losses.logit_matching(model(batch.x), batch.target)
        return weighed(batch, hyper, values, values)

    hyper = within(0, retain_weight=retain_weight)
    return train_pairs(trained, loss, task, steps, seed, hyper, {"target": wanted}, **more)


def _two_teachers(trained: Fleet, task: Task, seed: int) -> dict[str, Fleet]:
    """Who knows what is to be kept, and who knows nothing."""
    return {"original": trained, "untrained": untrained(trained, task, seed)}


def _random_labels(model: Any, batch: Any, hyper: Any) -> Tensor:
    logits = model(batch.x)
    right = F.cross_entropy(logits, batch.y, reduction="none")
    return weighed(batch, hyper, losses.random_label_loss(logits, batch.key), right)
