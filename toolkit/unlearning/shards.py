"""Training for deletion: SISA and S3T, whose models give up only what a deleted example has touched.

The examples are split into shards, each shard into slices; one model (or several, each with its own order of slices)
belongs to a shard. Stage k of a model's training brings in the k-th slice of its order:

- SISA: all parameters train on the slices so far; the model is kept after each stage.
- S3T: only the k-th group of parameters (a layer) trains, on the k-th slice alone; the other groups rest.

A deletion in the k-th slice takes back stages k and later: what is left has never seen the slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import typed
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.chunks import Loss
from toolkit.fleet.members import Build
from toolkit.fleet.optimisers import Optimiser
from toolkit.unlearning.parts import Masked

__all__ = ["Deletions", "Plan", "Sharded", "expected_deletions", "plan_shards", "simulate_deletions", "train_shards"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Who trains on what, and when.

    - ``shard``, ``slice``: int64 ``(examples,)``, where each example is; slices are counted within their shard.
    - ``order``: int64 ``(shards, sequences, slices)``, the slice that each model's stage brings in.

    Models are counted shard by shard: model ``s * sequences + b`` is sequence b of shard s.
    """

    shard: Tensor
    slice: Tensor
    order: Tensor

    @property
    def models(self) -> int:
        return self.order.shape[0] * self.order.shape[1]

    @property
    def slices(self) -> int:
        return self.order.shape[2]

    def mask(self, stage: int, cumulative: bool) -> Bool[Tensor, "models examples"]:
        """What the models see in ``stage``: that stage's slice, or with ``cumulative`` all slices up to it."""
        if not 0 <= stage < self.slices:
            raise ValueError(f"stage: expected 0 to {self.slices - 1}, got {stage}")
        present = torch.zeros_like(self.order, dtype=torch.bool)
        present.scatter_(2, self.order[:, :, (0 if cumulative else stage) : stage + 1], True)
        inside = self.shard == torch.arange(len(self.order))[:, None]
        return (present[:, :, self.slice] & inside[:, None]).flatten(0, 1)

    def touched(self, forget: Bool[Tensor, "examples"]) -> Bool[Tensor, "shards slices"]:
        """Slices with at least one example to forget."""
        if forget.shape != self.shard.shape:
            raise ValueError(f"forget: expected a mask over {len(self.shard)} examples, got {tuple(forget.shape)}")
        forget = forget.to(self.shard.device)
        touched = torch.zeros(len(self.order), self.slices, dtype=torch.bool)
        touched[self.shard[forget], self.slice[forget]] = True
        return touched

    def depth(self, touched: Bool[Tensor, "*trials shards slices"]) -> Int[Tensor, "*trials shards sequences"]:
        """Stages that each model keeps: the slices of its order before the first that is touched."""
        hit = torch.stack([touched[..., s, order] for s, order in enumerate(self.order)], -3)
        return (~hit).long().cumprod(-1).sum(-1)


@typed
def plan_shards(examples: int, shards: int, slices: int, sequences: int = 1, seed: int = 0) -> Plan:
    """Split ``examples`` at random into shards and slices of equal size (up to one example), and order the slices.

    The first ``slices`` sequences of a shard are the rotations of one order: every slice is first once, so B of them
    fail only when B different slices have been hit. Further ones are rotations of further random orders (the papers'
    iteration of the rotation is a reading that is not confirmed). ``sequences=1`` is SISA's plan. Sources: Bourtoule et
    al. 2021, "Machine Unlearning"; Chowdhury et al. 2024, "Towards Scalable Exact Machine Unlearning Using
    Parameter-Efficient Fine-Tuning" (S3T).
    Raises ``ValueError`` for counts below 1 or more slices than examples.
    """
    for name, value in (("shards", shards), ("slices", slices), ("sequences", sequences)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if shards * slices > examples:
        raise ValueError(f"slices: expected at most {examples} in all, one example each, got {shards * slices}")
    place = torch.empty(examples, dtype=torch.int64)
    place[random.permutation(random.key(seed, 0), examples)] = torch.arange(examples) % (shards * slices)
    orders = []
    for first in range(0, sequences, slices):
        base = torch.arange(slices) if first == 0 else random.permutation(random.key(seed, 1, first), slices)
        orders += [base.roll(-i) for i in range(min(slices, sequences - first))]
    order = torch.stack(orders).expand(shards, sequences, slices).clone()
    return Plan(place % shards, place // shards, order)


@dataclass(frozen=True, eq=False)
class Sharded:
    """A fleet that was trained stage by stage: ``stages[k]`` holds all models after k stages."""

    plan: Plan
    stages: tuple[Fleet, ...]

    def after(self, forget: Bool[Tensor, "examples"]) -> tuple[Fleet, Int[Tensor, "models"]]:
        """The models as they are without the slices of ``forget``, and how many stages each has kept.

        A model that has kept 0 stages is untrained and out of service.
        """
        depth = self.plan.depth(self.plan.touched(forget)).flatten()
        rows = torch.stack([stage.parameters for stage in self.stages])
        kept = depth.to(rows.device)
        final = self.stages[-1]
        return replace(final, parameters=rows[kept, torch.arange(len(kept), device=rows.device)], state={}), depth

    def serving(self, forget: Bool[Tensor, "examples"]) -> Int[Tensor, "alive"]:
        """For each shard that is still in service the model that has kept most stages (the first of equals)."""
        depth = self.plan.depth(self.plan.touched(forget))
        most, best = depth.max(1)
        models = torch.arange(len(depth)) * depth.shape[1] + best
        return models[most > 0]


@typed
def train_shards(
    build: Build,
    loss: Loss,
    data: Any,
    plan: Plan,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    start: Fleet | None = None,
    forget: Bool[Tensor, "examples"] | None = None,
    reuse: Sharded | None = None,
    optimiser: Any = None,  # an Optimiser, whose protocol cannot be checked at run time
    seed: int = 0,
    **options: Any,
) -> Sharded:
    """Train all models of ``plan`` stage by stage; ``options`` (``epochs`` or ``steps``, ...) are those of each stage.

    Without ``groups`` this is SISA. With ``groups``, one list of parameter names for each slice ("head" stands for
    "head.weight" and "head.bias"), it is S3T: in stage k the parameters of group k train on slice k alone, and all
    others stay bit-identical. S3T trains adapters from the last layer down; small nets have no adapters, so here whole
    layers take their place, and an untrained group is at its initial value (or at ``start``'s, whose models must not
    have seen the data). Optimisers begin afresh in each stage.

    ``forget`` leaves examples out. With ``reuse``, a run of the same arguments without ``forget``, only stages from the
    first slice that is touched are trained again: SISA's deletion, the same numbers as training everything anew.

    Sources: Bourtoule et al. 2021, "Machine Unlearning"; Chowdhury et al. 2024, "Towards Scalable Exact Machine
    Unlearning Using Parameter-Efficient Fine-Tuning". Raises ``ValueError`` for another number of groups than slices,
    groups that overlap or name no parameter, a mask that empties a slice's training set, or a ``reuse`` of another
    plan.
    """
    options = {"streams": torch.arange(plan.models), **options}
    if len(options["streams"]) != plan.models:
        raise ValueError(f"streams: expected one for each of {plan.models} models, got {len(options['streams'])}")
    if reuse is not None and (forget is None or reuse.plan is not plan):
        raise ValueError("reuse: expected a run of this very plan, and examples to forget")
    inner: Optimiser = optimiser or Adam()
    length = {name: options.pop(name) for name in ("epochs", "steps") if name in options}
    everywhere = torch.ones(plan.models, len(plan.shard), dtype=torch.bool)
    first = train(build, loss, data, start=start, seed=seed, subsets=everywhere, steps=0, **options)
    masks = None if groups is None else _group_masks(first, groups, plan.slices)
    depth = torch.zeros(plan.models, dtype=torch.int64)
    if forget is not None and reuse is not None:
        depth = plan.depth(plan.touched(forget)).flatten()
    stages = [first]
    for stage in range(plan.slices):
        subsets = plan.mask(stage, cumulative=groups is None)
        if forget is not None:
            subsets = subsets & ~forget.to(subsets.device)
        again = (depth <= stage).nonzero()[:, 0]
        parameters = stages[-1].parameters.clone() if reuse is None else reuse.stages[stage + 1].parameters.clone()
        if len(again):
            trained = train(
                build,
                loss,
                data,
                start=stages[-1][again],
                subsets=subsets[again],
                seed=seed + stage,
                optimiser=inner if masks is None else Masked(inner, masks[stage]),
                **options | length | {"streams": options["streams"][again]},
            )
            parameters[again.to(parameters.device)] = trained.parameters
        stages.append(replace(first, parameters=parameters, state={}))
    return Sharded(plan, tuple(stages))


def _group_masks(fleet: Fleet, groups: Sequence[Sequence[str]], slices: int) -> Tensor:
    """``(groups, size)``: the coordinates of each group in a member's flat row of parameters."""
    if len(groups) != slices:
        raise ValueError(f"groups: expected one for each of {slices} slices, got {len(groups)}")
    layout = fleet.layout
    masks = []
    for group in groups:
        inside = [any(name == part or name.startswith(f"{part}.") for part in group) for name in layout.names]
        if not any(inside):
            raise ValueError(f"groups: expected names among {', '.join(layout.names)}, got {list(group)}")
        masks.append(torch.tensor(inside).repeat_interleave(torch.tensor(layout.sizes)))
    if bool((torch.stack(masks).sum(0) > 1).any()):
        raise ValueError("groups: expected parameters in one group each, got groups that overlap")
    return torch.stack(masks)


@typed
def expected_deletions(shards: int, slices: int, sequences: int = 1) -> float:
    """Mean number of uniform deletion requests until no model is left: m L H(m min(B, L)), H(k) = 1 + ½ + ... + 1/k.

    A model is lost when the first slice of its order is hit. The m B models of B ≤ L rotations have m B different first
    slices, so all must be collected among m L coupons; more than L sequences repeat first slices and add nothing.
    Source: Chowdhury et al. 2024, "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning".
    """
    for name, value in (("shards", shards), ("slices", slices), ("sequences", sequences)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    return shards * slices * sum(1 / k for k in range(1, shards * min(sequences, slices) + 1))


@dataclass(frozen=True, eq=False)
class Deletions:
    """Runs of deletion requests, each until no model is left.

    - ``lasted``: int64 ``(trials,)``, the request that put the last model out of service, counted from 1.
    - ``depth``: ``(trials, requests)``, stages kept by the best model of each shard, averaged over shards, after each.
    """

    lasted: Tensor
    depth: Tensor


@typed
def simulate_deletions(
    plan: Plan,
    trials: int = 1000,
    *,
    priors: Float[Tensor, "shards slices"] | None = None,
    seed: int = 0,
) -> Deletions:
    """Deletion requests one by one, each in a random slice, until every order has lost its first slice.

    ``priors`` are the slices' chances to be hit, in any unit (default: equal, where :func:`expected_deletions` is the
    mean). Source: Chowdhury et al. 2024, "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient
    Fine-Tuning". Raises ``ValueError`` for fewer than 1 trial or priors that are not greater than 0.
    """
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, got {trials}")
    shards, slices = len(plan.order), plan.slices
    chances = torch.ones(shards, slices) if priors is None else priors
    if tuple(chances.shape) != (shards, slices) or not bool((chances > 0).all() & chances.isfinite().all()):
        raise ValueError(f"priors: expected ({shards}, {slices}) finite values greater than 0, got {priors}")
    edges = chances.double().flatten().cumsum(0)
    edges = edges / edges[-1].clone()
    keys = random.fold_in(random.key(seed), torch.arange(trials))
    touched = torch.zeros(trials, shards * slices, dtype=torch.bool)
    lasted = torch.zeros(trials, dtype=torch.int64)
    depths: list[Tensor] = []
    while not bool(lasted.all()):
        draw = random.uniform(random.fold_in(keys, len(depths)), (1,), torch.float64)
        touched.scatter_(1, torch.searchsorted(edges, draw).clamp_max(shards * slices - 1), True)
        best = plan.depth(touched.view(trials, shards, slices)).amax(-1)
        depths.append(best.double().mean(-1))
        lasted = torch.where((lasted == 0) & ~best.any(-1), len(depths), lasted)
    return Deletions(lasted, torch.stack(depths, 1))
