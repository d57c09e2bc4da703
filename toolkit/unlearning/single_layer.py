"""SLUG: one step in one parameter tensor, chosen by its slopes, as long as it has to be."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit.checks import typed
from toolkit.fleet import Fleet
from toolkit.unlearning.parts import Mask, Strength, Task, mean_weights, moved, prepare, slope, strengths, within

__all__ = ["LayerScores", "layer_scores", "slug"]

_SLACK = 1e-6  # an accuracy and a goal that were rounded differently are still equal


class LayerScores(NamedTuple):
    """Of every parameter tensor, by ``names``: three tables ``(members, tensors)``.

    ``importance`` is ‖∇L_f‖ / ‖θ‖, ``alignment`` the |cos| of ∇L_f and ∇L_r, ``front`` marks the Pareto front.
    """

    names: tuple[str, ...]
    importance: Tensor
    alignment: Tensor
    front: Tensor


@typed
def pareto_front(
    importance: Float[Tensor, "*members tensors"], alignment: Float[Tensor, "*members tensors"]
) -> Bool[Tensor, "*members tensors"]:
    """Tensors that no other one beats: as important and as little aligned, and one of the two strictly."""
    more = importance[..., None, :] >= importance[..., None]
    less = alignment[..., None, :] <= alignment[..., None]
    strict = (importance[..., None, :] > importance[..., None]) | (alignment[..., None, :] < alignment[..., None])
    return ~(more & less & strict).any(-1)


@typed
def layer_scores(trained: Fleet, data: Any, forget: Mask, *, retain: Mask | None = None) -> LayerScores:
    """Where forgetting is concentrated: importance ‖∇_l L_f‖ / ‖θ_l‖ against alignment |cos(∇_l L_f, ∇_l L_r)|.

    L_f and L_r are mean CE over D_f and D_r, l runs over the parameter tensors (weights and biases apart). The Pareto
    front is large importance, small alignment. A tensor whose values or slopes are all 0 has importance 0 and
    alignment 1. Source: Cai, Tan & Asif 2025, "Targeted Unlearning with Single Layer Unlearning Gradient". Errors as in
    :mod:`toolkit.unlearning.approximate`.
    """
    return _scores(trained, *_slopes(trained, prepare(trained, data, forget, retain)))


@typed
def slug(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    goal: Strength = 0.0,
    layer: str | None = None,
    iterations: int = 12,
    retain: Mask | None = None,
) -> Fleet:
    """θ_l ← θ_l + r ∇_l L_f for one tensor l: the shortest step up L_f with which accuracy on D_f is at most ``goal``.

    The slope is taken once, at the original, and so is every step. r starts at ‖θ_l‖ / (10 ‖∇_l L_f‖), is doubled until
    the goal is reached and then bisected, ``iterations`` times each: the result reaches the goal, and a step shorter by
    2^-iterations of the last doubling does not. ``goal`` in [0, 1] is a number or one per member; the accuracy of
    models that never saw D_f is more honest than 0. The tensor is ``layer``, or of each member the one on the Pareto
    front of :func:`layer_scores` with which accuracy on D_r is best (of equals the first). Where none reaches the goal,
    it is the longest step of the tensor that gets nearest. A member that is at the goal already stays as it is. The
    fleet's ``hyper`` has ``goal``, ``layer`` (index into the names of the layout) and ``step`` r.

    Source: Cai, Tan & Asif 2025, "Targeted Unlearning with Single Layer Unlearning Gradient" (there top-5 accuracy, in
    CLIP; the choice by accuracy on D_r and the number of iterations are readings that are not confirmed). Raises
    ``ValueError`` for an unknown layer, fewer than 1 iteration, and as in :mod:`toolkit.unlearning.approximate`.
    """
    task = prepare(trained, data, forget, retain)
    names = trained.layout.names
    if layer is not None and layer not in names:
        raise ValueError(f"layer: expected one of {', '.join(names)}, got {layer!r}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    wanted = strengths(trained, within(0, 1, goal=goal))["goal"]
    push, pull = _slopes(trained, task)
    front = _scores(trained, push, pull).front if layer is None else None
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in range(len(names)):
        chosen = front[:, index] if front is not None else torch.full_like(wanted, names[index] == layer).bool()
        if not bool(chosen.any()):
            results.append((trained.parameters, torch.zeros_like(wanted), torch.full_like(wanted, -torch.inf)))
            continue
        part = _only(trained, index)
        sizes = [torch.where(part, values, 0).norm(dim=1) for values in (trained.parameters, push)]
        first = torch.where(sizes[1] > 0, sizes[0] / sizes[1].clamp_min(torch.finfo(push.dtype).tiny), 0) / 10

        def step(r: Tensor, part: Tensor = part) -> Tensor:
            stepped = trained.parameters + r[:, None] * push
            return torch.where(part & (r > 0)[:, None], stepped, trained.parameters)

        def reached(r: Tensor, step: Callable = step) -> Tensor:
            return _accuracy(trained, step(r), task, task.forget) <= wanted + _SLACK

        r = search(reached, first, iterations)
        parameters = step(r)
        left, kept = (_accuracy(trained, parameters, task, mask) for mask in (task.forget, task.retain))
        rank = torch.where(left <= wanted + _SLACK, kept, -1 - left)  # whoever reaches the goal comes first
        results.append((parameters, r, torch.where(chosen, rank, -torch.inf)))
    best = torch.stack([rank for *_, rank in results], 1).argmax(1)
    members = torch.arange(len(trained), device=trained.device)
    parameters, r = (torch.stack([result[i] for result in results], 1)[members, best] for i in (0, 1))
    return moved(trained, parameters, {"goal": wanted, "layer": best.to(wanted.dtype), "step": r})


@typed
def search(
    reached: Callable[[Tensor], Tensor], first: Float[Tensor, "members"], iterations: int
) -> Float[Tensor, "members"]:
    """The least step that reaches the goal: 0 if that does, else by doubling from ``first``, then bisection.

    ``reached`` says of each member's step whether it does. A member that never does has the longest step that was
    tried, 2^(iterations - 1) times its ``first``.
    """
    low, high = torch.zeros_like(first), first
    done = already = reached(low)
    for doubling in range(iterations):
        done = done | reached(high)
        if doubling < iterations - 1:
            low, high = torch.where(done, low, high), torch.where(done, high, 2 * high)
    for _ in range(iterations):
        middle = (low + high) / 2
        enough = reached(middle)
        low, high = torch.where(done & ~enough, middle, low), torch.where(done & enough, middle, high)
    return torch.where(already, 0, high)


def _slopes(trained: Fleet, task: Task) -> tuple[Tensor, Tensor]:
    """Slopes of mean CE over D_f and over D_r, ``(members, size)``."""
    push, pull = (
        slope(trained, trained.parameters, task.fields, mean_weights(mask)) for mask in (task.forget, task.retain)
    )
    return push, pull


def _scores(trained: Fleet, push: Tensor, pull: Tensor) -> LayerScores:
    sizes = trained.layout.sizes

    def norms(values: Tensor) -> Tensor:
        return torch.stack([piece.norm(dim=1) for piece in values.split(sizes, dim=1)], 1)

    length, up, other = norms(trained.parameters), norms(push), norms(pull)
    dot = torch.stack([piece.sum(1) for piece in (push * pull).split(sizes, dim=1)], 1)
    live = (length > 0) & (up > 0)
    importance = torch.where(live, up / length, 0)
    alignment = torch.where(live, torch.where(other > 0, dot.abs() / (up * other), 0), 1)
    return LayerScores(trained.layout.names, importance, alignment, pareto_front(importance, alignment))


def _only(trained: Fleet, index: int) -> Tensor:
    """Which coordinates of a flat row belong to one tensor."""
    sizes = torch.tensor(trained.layout.sizes, device=trained.device)
    numbers = torch.arange(len(sizes), device=trained.device).repeat_interleave(sizes)
    return numbers == index


def _accuracy(trained: Fleet, parameters: Tensor, task: Task, mask: Tensor) -> Tensor:
    rows = mask.any(0)
    right = moved(trained, parameters, {}).logits(task.fields["x"][rows]).argmax(-1) == task.fields["y"][rows]
    return (right & mask[:, rows]).sum(1).to(parameters.dtype) / mask.sum(1)
