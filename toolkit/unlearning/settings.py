"""What is to be forgotten: masks over the training examples, one for all members or one for each.

A forget mask is boolean, ``(examples,)`` or ``(members, examples)``, true where an example is to be forgotten. Random
choices depend only on ``seed`` and the member's number, so a longer list of members begins with the same masks.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import require_labels, typed

__all__ = ["forget_class", "forget_random", "forget_subclass", "mislabel", "require_forget"]


@typed
def require_forget(
    forget: Bool[Tensor, "examples"] | Bool[Tensor, "members examples"], examples: int, members: int | None = None
) -> None:
    """Raise ``ValueError`` unless ``forget`` is a mask over ``examples`` with some to forget and some to keep.

    With ``members`` given, a mask with one row per member must have that many rows.
    """
    if forget.shape[-1] != examples:
        raise ValueError(f"forget: expected a mask over {examples} examples, got one over {forget.shape[-1]}")
    if forget.ndim == 2 and members is not None and len(forget) != members:
        raise ValueError(f"forget: expected one row for each of {members} members, got {len(forget)}")
    for wrong, name in ((~forget.any(-1), "none"), (forget.all(-1), "all")):
        if bool(wrong.any()):
            where = "" if forget.ndim == 1 else f" for member {int(wrong.nonzero()[0, 0])}"
            raise ValueError(
                f"forget: expected at least one example to forget and one to keep, got {name} to forget{where}"
            )


@typed
def forget_random(
    examples: int, count: int, *, members: int | None = None, seed: int = 0
) -> Bool[Tensor, "examples"] | Bool[Tensor, "members examples"]:
    """``count`` of ``examples`` at random without replacement; with ``members`` one independent draw for each.

    Raises ``ValueError`` unless 0 < count < examples and members ≥ 1.
    """
    if not 0 < count < examples:
        raise ValueError(f"count: expected 1 to {examples - 1} of {examples} examples, got {count}")
    if members is not None and members < 1:
        raise ValueError(f"members: expected at least 1, got {members}")
    keys = random.fold_in(random.key(seed), torch.arange(members or 1))
    chosen = random.permutation(keys, examples)[:, :count]
    mask = torch.zeros(members or 1, examples, dtype=torch.bool).scatter(1, chosen, True)
    return mask[0] if members is None else mask


@typed
def forget_class(labels: Int[Tensor, "examples"], target: int) -> Bool[Tensor, "examples"]:
    """All examples of class ``target``. Raises ``ValueError`` if there are none, or no others."""
    mask = labels == target
    if not bool(mask.any()) or bool(mask.all()):
        classes = labels.unique().tolist()
        raise ValueError(f"target: expected one of at least two classes that occur, {classes}, got {target}")
    return mask


@typed
def forget_subclass(
    labels: Int[Tensor, "examples"], domains: Int[Tensor, "examples"], target: int, domain: int
) -> Bool[Tensor, "examples"]:
    """The examples of class ``target`` that are in ``domain`` (a script, a style): the rest of the class stays.

    Raises ``ValueError`` if the class has no example in the domain, or none outside it (then it is the class itself).
    """
    inside = domains[labels == target]
    if not bool((inside == domain).any()):
        raise ValueError(
            f"domain: expected one in which class {target} occurs, {inside.unique().tolist()}, got {domain}"
        )
    if bool((inside == domain).all()):
        raise ValueError(f"domain: expected a part of class {target}, got all of its examples (use forget_class)")
    return (labels == target) & (domains == domain)


@typed
def mislabel(
    labels: Int[Tensor, "examples"],
    classes: int,
    count: int,
    *,
    between: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[Int[Tensor, "examples"], Bool[Tensor, "examples"]]:
    """Labels with ``count`` wrong ones, and the mask of those: what a corrected model must forget.

    The examples are drawn at random. Each gets another class, uniform over the ``classes`` - 1 wrong ones; with
    ``between=(a, b)`` only examples of the two classes are drawn and the two labels are exchanged, which a model learns
    as a confusion and not as noise. Source: Goel et al. 2022, "Towards Adversarial Evaluations for Inexact Machine
    Unlearning" (the interclass confusion test). Raises ``ValueError`` for labels outside 0 .. classes - 1, fewer than
    two classes, two equal classes, or more wrong labels than there are candidates.
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    require_labels("labels", labels, classes)
    candidates = torch.arange(len(labels), device=labels.device)
    if between is not None:
        first, second = between
        if first == second or not {first, second} <= set(range(classes)):
            raise ValueError(f"between: expected two different classes from 0 to {classes - 1}, got {between}")
        candidates = candidates[(labels == first) | (labels == second)]
    if not 0 < count <= len(candidates):
        raise ValueError(f"count: expected 1 to {len(candidates)} wrong labels, got {count}")
    chosen = candidates[random.permutation(random.key(seed, 0, device=labels.device), len(candidates))[:count]]
    if between is None:
        uniform = random.uniform(random.key(seed, 1, device=labels.device), (count,), torch.float64)
        wrong = (labels[chosen] + 1 + (uniform * (classes - 1)).long()) % classes
    else:
        wrong = first + second - labels[chosen]
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mask[chosen] = True
    changed = labels.clone()
    changed[chosen] = wrong.to(labels.dtype)
    return changed, mask
