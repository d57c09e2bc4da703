"""From a call of :func:`toolkit.fleet.train` to steps: the fleet in chunks that fit, and one step of a chunk."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from toolkit.checks import unchecked
from toolkit.fleet.devices import free_memory, out_of_memory
from toolkit.fleet.members import (
    NOISE,
    ORDER,
    Build,
    Fields,
    Known,
    Layout,
    Member,
    fast_forward,
    fresh,
    has_fast_path,
)
from toolkit.fleet.optimisers import Optimiser
from toolkit.fleet.samplers import Sampler
from toolkit.fleet.schedules import Schedule
from toolkit.fleet.store import Fleet, concatenate
from toolkit.random import fold_in

Loss = Callable[[Any, Any, Any], Any]
_LARGEST_CPU_CHUNK = 64  # beyond it a chunk leaves the cache and gains nothing


class Stop(Protocol):
    """Says when to end after the step in hand."""

    asked: bool


@dataclass(frozen=True)
class Task:
    """What all chunks of one call to :func:`train` share. Per-member tensors have the whole fleet's rows."""

    build: Build
    loss: Loss
    data: dict[str, Tensor]
    own_data: dict[str, Tensor]
    hyper: dict[str, Tensor]
    references: dict[str, Fleet]
    weights: Tensor | None
    subsets: Tensor | None
    keys: Tensor
    planned: Tensor
    rate: Tensor
    decay: Tensor | None
    batch: int
    until: int
    optimiser: Optimiser
    schedule: Schedule
    sampler: Sampler
    snapshots: frozenset[int]
    fast: bool
    stop: Stop
    bar: Any

    @property
    def examples(self) -> int:
        return len(next(iter(self.data.values())))


def train_in_chunks(task: Task, fleet: Fleet, chunk: int | None, memory_limit: int | None) -> Fleet:
    count, place = len(fleet), fleet.device
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 member, got {chunk}")
    need, fast = _probe(task, fleet)
    task = replace(task, fast=fast)
    if chunk is None:
        limit = memory_limit if memory_limit is not None else free_memory(place) // 2
        chunk = max(1, min(limit // need, _LARGEST_CPU_CHUNK if place.type == "cpu" else count))
    done: list[Fleet] = []
    first = 0
    while first < count:
        same = fleet.steps[first : first + chunk] == fleet.steps[first]  # a chunk marches in step
        last = first + int(same.long().cumprod(0).sum())
        part, shown = fleet[first:last], task.bar.n
        if not task.stop.asked:
            try:
                with unchecked():  # the probe has checked the loss on a batch of the same shapes
                    part = _train_chunk(task, part.clone(), slice(first, last))
            except (RuntimeError, MemoryError) as error:
                if last - first == 1 or not out_of_memory(error):
                    raise
                part = None
        if part is None:  # outside the except clause, whose error keeps the chunk's tensors alive
            chunk = (last - first) // 2
            task.bar.update(shown - task.bar.n)
            if place.type == "cuda":
                torch.cuda.empty_cache()
            continue
        done.append(part)
        first = last
    steps = set().union(*(part.snapshots for part in done))
    return concatenate([_with_snapshots(part, steps) for part in done])


def _with_snapshots(part: Fleet, steps: Iterable[int]) -> Fleet:
    """The chunk with a snapshot at each of ``steps``: a member that has ended stays so, others have none yet."""
    ended = torch.where(part.failed >= 0, part.failed, part.planned)
    snapshots = dict(part.snapshots)
    for step in set(steps) - set(snapshots):
        there = part.finished & (ended <= step)
        snapshots[step] = torch.where(there[:, None], part.parameters, float("nan"))
    return replace(part, snapshots=snapshots)


class _Step:
    """Losses and gradients of one chunk, with its per-member inputs bound."""

    def __init__(self, task: Task, fleet: Fleet, rows: slice):
        self.task, self.fleet = task, fleet
        self.module = fresh(task.build).to(fleet.device)
        self.layout = Layout.of(self.module)
        self.leaves = {n: v.detach().requires_grad_() for n, v in self.layout.views(fleet.parameters).items()}
        self.hyper = {name: value[rows] for name, value in task.hyper.items()}
        self.own = {name: value[rows] for name, value in task.own_data.items()}
        self.frozen = {n: f.layout.views(f.parameters[rows]) for n, f in task.references.items()}
        self.frozen_modules = {n: fresh(f.build).to(fleet.device) for n, f in task.references.items()}
        self.weights = None if task.weights is None else task.weights[rows]
        self.members = torch.arange(len(fleet), device=fleet.device)[:, None]
        x = self.own["x"][0] if "x" in self.own else task.data.get("x")
        self.fast = task.fast and has_fast_path(self.module, x, fleet.parameters.dtype)
        self.seen: list[bool] = []
        self.written: tuple[str, ...] = ()
        self.gradient = torch.zeros_like(fleet.parameters)

    def one(self, parameters, fields, hyper, known, weight, *frozen):
        """The loss of one member (runs under vmap), and the memory rows to write, named by ``self.written``."""
        batch = Fields(fields)
        for name, values in zip(self.frozen, frozen, strict=True):
            batch[name] = Member(self.frozen_modules[name], values)
        ready = Known(batch["x"], known["logits"], known["features"], self.seen) if known else None
        result = self.task.loss(Member(self.module, parameters, ready), batch, Fields(hyper))
        values, written = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        size = tuple(fields["index"].shape)
        if not isinstance(values, Tensor) or not isinstance(written, Mapping):
            raise TypeError(f"loss: expected values {size}, or (values, memory rows by name), got {_kind(result)}")
        if values.shape != size or not values.is_floating_point():
            raise ValueError(f"loss: expected per-example values of shape {size}, got {_kind(values)}")
        for name, rows in written.items():
            if name not in self.fleet.memory:
                raise ValueError(f"loss: expected to write only {sorted(self.fleet.memory)}, got {name!r}")
            if rows.shape != (expected := fields[name].shape):
                raise ValueError(f"loss: expected rows {tuple(expected)} for memory {name!r}, got {tuple(rows.shape)}")
        self.written = tuple(written)
        return (weight["weight"] * values if weight else values).mean(), *(rows.detach() for rows in written.values())

    def __call__(self, index: Tensor, keys: Tensor, progress: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``(members,)`` and memory rows to write; the gradient is left in ``self.gradient``."""
        flat = index.reshape(-1)
        fields = {n: v.index_select(0, flat).view(*index.shape, *v.shape[1:]) for n, v in self.task.data.items()}
        for source in (self.own, self.fleet.memory):
            fields |= {name: value[self.members, index] for name, value in source.items()}
        fields |= {"index": index, "key": keys, "progress": progress}
        weight = {} if self.weights is None else {"weight": self.weights[self.members, index]}
        known = fast_forward(self.leaves, fields["x"]) if self.fast else {}
        groups = [self.leaves, fields, self.hyper, known, weight, *self.frozen.values()]

        def one(*values: Tensor):  # a flat list: vmap's own walk through nested containers takes longer than a loss
            rest = iter(values)
            return self.one(*({name: next(rest) for name in group} for group in groups))

        losses, *rows = torch.vmap(one)(*(value for group in groups for value in group.values()))
        written = dict(zip(self.written, rows, strict=True))
        if not losses.requires_grad:
            raise ValueError("loss: expected values that depend on the model's parameters, got constants")
        gradients = torch.autograd.grad(losses.sum(), list(self.leaves.values()), materialize_grads=True)
        torch.cat([g.reshape(len(g), -1) for g in gradients], 1, out=self.gradient)
        return losses.detach(), written


def _train_chunk(task: Task, fleet: Fleet, rows: slice) -> Fleet:
    """Train one chunk (a private copy, changed in place) from where it stands to its end or to an interruption."""
    place, count = fleet.device, len(fleet)
    step = _Step(task, fleet, rows)
    rate, keys = task.rate[rows], task.keys[rows]
    decay = None if task.decay is None else task.decay[rows]
    subsets = None if task.subsets is None else task.subsets[rows]
    planned, alive, failed = fleet.planned, fleet.failed < 0, fleet.failed.clone()
    order, noise = fold_in(keys, ORDER), fold_in(keys, NOISE)
    snapshots = dict(fleet.snapshots)
    now, end = int(fleet.steps[0]), min(task.until, int(planned.max()))
    size = task.sampler.size(task.batch)
    stride = task.sampler.block(count, task.examples, size)
    while now < end and not task.stop.asked:
        begin, last = now, min(end, now + stride)
        plan = task.sampler.plan(order, now, last, size, task.examples, task.data.get("y"), subsets)
        times = torch.arange(now, last, device=place)[:, None]
        progress = times.to(fleet.parameters.dtype) / planned.clamp_min(1)
        active = times < planned
        factors = task.schedule(progress) * active
        step_keys = fold_in(noise, times)
        for i in range(last - now):
            losses, written = step(plan[i], step_keys[i], progress[i])
            gradient, scale, moving = step.gradient, rate * factors[i, :, None], alive & active[i]
            fleet.history[:, now] = torch.where(moving, losses.to(fleet.history.dtype), float("nan"))
            # looking is free on a CPU, a wait elsewhere: there one sum tells that nothing is amiss
            if place.type != "cpu" or not (moving.all() and (losses.sum() + gradient.sum()).isfinite()):
                broke = moving & ~(losses.isfinite() & gradient.sum(1).isfinite())
                failed = torch.where(broke, now, failed)
                alive, moving = alive & ~broke, moving & ~broke
                gradient = torch.where(moving[:, None], gradient, 0)
                scale = torch.where(moving[:, None], scale, 0)
            task.optimiser.apply(fleet.parameters, gradient, fleet.state, scale, decay, now)
            for name, values in written.items():
                table, old = fleet.memory[name], fleet.memory[name][step.members, plan[i]]
                keep = moving.view(-1, *[1] * (values.ndim - 1))
                table[step.members, plan[i]] = torch.where(keep, values.to(table.dtype), old)
            now += 1
            if now in task.snapshots:
                snapshots[now] = fleet.parameters.clone()
            if task.stop.asked:
                break
        task.bar.update(int((planned.clamp_max(now) - planned.clamp_max(begin)).sum()))
    return replace(fleet, steps=planned.clamp_max(now), failed=failed, snapshots=snapshots)


def _probe(task: Task, fleet: Fleet) -> tuple[int, bool]:
    """Bytes that one member takes in training, and whether its loss uses the fast path: one step, thrown away."""
    part = fleet[:1].clone()
    step = _Step(task, part, slice(0, 1))
    size, held = task.sampler.size(task.batch), [0]

    def hold(tensor: Tensor) -> Tensor:
        held[0] += tensor.numel() * tensor.element_size()
        return tensor

    index = torch.arange(size, device=fleet.device)[None] % task.examples
    try:
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            step(index, task.keys[:1], torch.zeros(1, dtype=part.parameters.dtype, device=fleet.device))
    except RuntimeError as error:
        raise _explained(error) from error
    rows = sum(v.numel() * v.element_size() for n, v in part._rows().items() if n != "history")
    copies = 4 + len(task.snapshots - set(fleet.snapshots))
    own = copies * step.gradient.numel() * step.gradient.element_size()
    return rows + own + 2 * held[0], bool(step.seen) and step.fast


def _explained(error: RuntimeError) -> Exception:
    """What a loss that vmap refuses should hear."""
    if "randomness" in str(error):
        return ValueError(
            "loss: expected random numbers from batch.key only (toolkit.random), got a draw from torch's own generator"
        )
    if ".item()" in str(error) or "data-dependent" in str(error):
        return ValueError("loss: expected a function without .item() or a Python branch on a tensor's value, got one")
    return error


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
