"""Approximate unlearning without training: one change of the parameters, from slopes and curvatures.

Arguments as in :mod:`toolkit.unlearning.approximate`: ``data`` has ``x`` and ``y``, ``forget`` and ``retain`` are masks
``(examples,)`` or ``(members, examples)``, strengths are one number or one per member. The returned fleet has the
strengths as its ``hyper``. All raise ``ValueError`` if a mask has another shape, is empty or everything, or the two
overlap, and for strengths out of range.
"""

from typing import Any

import torch

from toolkit.checks import typed
from toolkit.fleet import Fleet
from toolkit.random import fold_in, key, normal
from toolkit.unlearning.parts import (
    NOISE_SCALE,
    Mask,
    Strength,
    mean_weights,
    moved,
    prepare,
    slope,
    solve,
    squared_slopes,
    strengths,
    within,
)

__all__ = ["fisher_forgetting", "influence", "newton_step", "ssd"]


@typed
def ssd(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    alpha: Strength = 10.0,
    dampening: Strength = 1.0,
    retain: Mask | None = None,
) -> Fleet:
    """Dampen what matters for D_f alone: θ_j ← θ_j · min(λ F_D / F_f, 1) where F_f > α F_D; no training.

    F is the mean over the examples (F_f: D_f, F_D: D_f and D_r) of the squared slope of CE, α ≥ 0, λ = ``dampening``
    (infinite: nothing changes). Source: Foster, Schoepf & Brintrup 2024, "Fast Machine Unlearning Without Retraining
    Through Selective Synaptic Dampening". Their code squares the slopes of whole batches; here each example counts.
    """
    task = prepare(trained, data, forget, retain)
    hyper = strengths(trained, within(0, alpha=alpha, dampening=dampening))
    whole, part = squared_slopes(trained, task.fields, [mean_weights(task.whole), mean_weights(task.forget)])
    factor = (hyper["dampening"][:, None] * whole / part).clamp_max(1)
    chosen = part > hyper["alpha"][:, None] * whole
    return moved(trained, torch.where(chosen, trained.parameters * factor, trained.parameters), hyper)


@typed
def fisher_forgetting(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    alpha: Strength = 1e-8,
    largest: Strength = 1e-1,
    head: Strength = 10.0,
    retain: Mask | None = None,
    seed: int = 0,
) -> Fleet:
    """Noise where kept examples do not mind: θ_j ← θ_j + N(0, 1) · min(√(α / F_j), c), F over D_r as in :func:`ssd`.

    c = ``largest``; the noise of the last layer is multiplied by ``head``. Source: Golatkar, Achille & Soatto 2020,
    "Eternal Sunshine of the Spotless Net" (whose optimum has the power -1/4 of the Hessian; public code takes -1/2, as
    here). That c is an upper bound, and its value, are readings that are not confirmed.
    """
    task = prepare(trained, data, forget, retain)
    hyper = strengths(trained, within(0, alpha=alpha, largest=largest, head=head))
    (fisher,) = squared_slopes(trained, task.fields, [mean_weights(task.retain)])
    scale = (hyper["alpha"][:, None] / fisher).sqrt().nan_to_num(0.0, float("inf"))  # 0 / 0: no noise for α = 0
    scale = torch.minimum(scale, hyper["largest"][:, None])
    for name, view in trained.layout.views(scale).items():
        if name.startswith("head."):
            view.mul_(hyper["head"].reshape(-1, *[1] * (view.ndim - 1)))
    keys = fold_in(key(seed, NOISE_SCALE, device=trained.device), trained.streams)
    return moved(trained, trained.parameters + scale * normal(keys, (scale.shape[1],), scale.dtype), hyper)


@typed
def influence(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    scale: Strength = 1.0,
    damping: Strength = 1e-2,
    weight_decay: Strength = 0.0,
    retain: Mask | None = None,
    iterations: int = 50,
) -> Fleet:
    """θ + s · (G_r + (d + w) I)⁻¹ (∇L_D - ∇L_r): the change that taking D_f out makes, to first order.

    L is mean CE, G_r its Gauss-Newton matrix over D_r (the Hessian, for linear models), s = ``scale``, d = ``damping``,
    w the ``weight_decay`` (w/2 |θ|²) of training. ∇L_D - ∇L_r = (n_f / n)(∇L_f - ∇L_r), which leaves out what training
    did not finish. Solved by at most ``iterations`` steps of conjugate gradients. Source: Izzo et al. 2021,
    "Approximate Data Deletion from Machine Learning Models"; Koh & Liang 2017, "Understanding Black-box Predictions via
    Influence Functions"; this difference of slopes after the public code of SalUn, which has the empirical Fisher
    matrix in place of G_r.
    """
    task = prepare(trained, data, forget, retain)
    hyper = strengths(trained, within(None, scale=scale) | within(0, damping=damping, decay=weight_decay))
    ridge = (hyper["damping"] + hyper["decay"])[:, None]
    weights = mean_weights(task.retain)
    push = slope(trained, trained.parameters, task.fields, mean_weights(task.whole) - weights)
    step = solve(trained, trained.parameters, task.fields, weights, ridge, push, iterations)
    return moved(trained, trained.parameters + hyper["scale"][:, None] * step, hyper)


@typed
def newton_step(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    damping: Strength = 0.0,
    weight_decay: Strength = 1e-2,
    retain: Mask | None = None,
    steps: int = 1,
    iterations: int = 50,
) -> Fleet:
    """θ ← θ - (G_r + (d + w) I)⁻¹ (∇L_r + w θ), ``steps`` times; names as in :func:`influence`.

    For a linear model without damping these are Newton's steps on the convex objective of retraining: they end at the
    retrained model, at a quadratic rate. Source: Guo et al. 2020, "Certified Data Removal from Machine Learning
    Models".
    """
    task = prepare(trained, data, forget, retain)
    hyper = strengths(trained, within(0, damping=damping, decay=weight_decay))
    decay, ridge = hyper["decay"][:, None], (hyper["damping"] + hyper["decay"])[:, None]
    parameters, weights = trained.parameters, mean_weights(task.retain)
    for _ in range(steps):
        push = slope(trained, parameters, task.fields, weights) + decay * parameters
        parameters = parameters - solve(trained, parameters, task.fields, weights, ridge, push, iterations)
    return moved(trained, parameters, hyper)
