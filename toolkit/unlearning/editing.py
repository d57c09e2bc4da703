"""Rank-one edits: one linear layer is changed so that a concept's key gets a harmless concept's value; no training."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from toolkit.checks import require_positive, typed
from toolkit.fleet import Fleet
from toolkit.fleet.members import Member, fresh
from toolkit.fleet.store import as_fields
from toolkit.unlearning.parts import Mask, Strength, moved, prepare, strengths, within
from toolkit.unlearning.texts import IGNORED

__all__ = ["layer_keys", "rank_one_edit", "redirect_concept"]

_ROWS = 256  # rows whose keys are computed at a time


@typed
def rank_one_edit(
    weight: Float[Tensor, "out in"],
    key: Float[Tensor, "in"],
    value: Float[Tensor, "out"],
    covariance: Float[Tensor, "in in"],
) -> Float[Tensor, "out in"]:
    """W' = W + (v* - W k)(C⁻¹ k)ᵀ / (kᵀ C⁻¹ k): the layer that maps k = ``key`` to v* = ``value``, and else is W.

    C = E[u uᵀ] over the keys that are to keep their values, positive definite. Of all matrices with W' k = v* this one
    has the least E |(W' - W) u|² = tr((W' - W) C (W' - W)ᵀ); keys u with kᵀ C⁻¹ u = 0 keep their values exactly.
    A zero key is not defined (NaN). Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT"
    (ROME), from Bau et al. 2020, "Rewriting a Deep Generative Model".
    """
    direction = torch.linalg.solve(covariance, key)
    return weight + torch.outer(value - weight @ key, direction / (key @ direction))


@typed
def layer_keys(trained: Fleet, data: Any, layer: str) -> Float[Tensor, "members examples in"]:
    """What enters the linear layer of the name ``layer``, one key per example and member.

    For texts (:mod:`toolkit.unlearning.texts`) the key is taken at the prompt's last byte, from which the answer's
    first byte is predicted. Raises ``ValueError`` if there is no linear layer of that name.
    """
    fields = as_fields(data)
    module, layout = fresh(trained.build).to(trained.device), trained.layout
    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    if layer not in linear:
        raise ValueError(f"layer: expected one of {', '.join(linear) or 'none'}, got {layer!r}")
    x, y = (fields[name].to(trained.device) for name in ("x", "y"))
    place = (y != IGNORED).long().argmax(1) if y.ndim == 2 else None
    caught: list[Tensor] = []
    hook = linear[layer].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))

    def one(views: Any, x: Tensor) -> Tensor:
        caught.clear()
        Member(module, views)(x)
        return caught[0]

    found = []
    with hook, torch.no_grad():
        for rows in torch.arange(len(x), device=x.device).split(_ROWS):
            keys = torch.vmap(one, (0, None))(layout.views(trained.parameters), x[rows])
            if place is not None:
                keys = keys[:, torch.arange(len(rows), device=x.device), place[rows]]
            found.append(keys)
    return torch.cat(found, 1)


@typed
def redirect_concept(
    trained: Fleet,
    data: Any,
    forget: Mask,
    harmless: Bool[Tensor, "examples"],
    *,
    layer: str,
    strength: Strength = 1.0,
    ridge: float = 1e-2,
    retain: Mask | None = None,
) -> Fleet:
    """Let ``layer`` answer the concept to forget as it answers a harmless one: :func:`rank_one_edit` in each member.

    k = mean key over ``forget`` (one concept: a mean over many is none of them), k' = mean key over ``harmless``,
    v* = W k + s · (W k' - W k) with s = ``strength`` (1: the harmless value itself), C = mean of u uᵀ over ``retain``
    (default: all but ``forget``) + ``ridge`` · mean diagonal · I. Keys are those of :func:`layer_keys`. Only what
    passes through this layer at this position changes: other forms of the same fact have other keys, and whether they
    follow is to be measured. The returned fleet has the strengths as its ``hyper``. Source: "LLM Unlearning
    Should Be Form-Independent" (ROCR), with the closed form of Meng et al. 2022, "Locating and Editing Factual
    Associations in GPT"; layer, position and ridge are readings that are not confirmed. Raises ``ValueError`` for masks
    that are empty, everything or overlap, an unknown layer, or a ridge of 0 or less.
    """
    require_positive("ridge", ridge)
    fields = as_fields(data)
    text = fields["y"].ndim == 2
    task = prepare(trained, {"x": fields["x"], "y": fields["y"][:, 0] if text else fields["y"]}, forget, retain)
    hyper = strengths(trained, within(None, strength=strength))
    harmless = harmless.to(trained.device)
    if not bool(harmless.any()) or bool((harmless & task.forget).any()):
        raise ValueError("harmless: expected at least one example and none of those to forget")
    keys = layer_keys(trained, data, layer)
    parameters = trained.parameters.clone()
    weight = trained.layout.views(parameters)[f"{layer}.weight"]
    concept, other = (_mean(keys, mask.expand_as(task.forget)) for mask in (task.forget, harmless))
    kept = keys * (task.retain / task.retain.sum(1, keepdim=True)).sqrt().to(keys.dtype)[..., None]
    covariance = kept.mT @ kept
    size = ridge * covariance.diagonal(dim1=1, dim2=2).mean(1)
    covariance = covariance + size[:, None, None] * torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
    goal = concept + hyper["strength"][:, None] * (other - concept)
    value = (weight @ goal[..., None])[..., 0]
    weight.copy_(torch.vmap(rank_one_edit)(weight, concept, value, covariance))
    return moved(trained, parameters, hyper)


def _mean(keys: Tensor, mask: Tensor) -> Tensor:
    share = mask / mask.sum(1, keepdim=True)
    return (share.to(keys.dtype)[:, None] @ keys)[:, 0]
