"""A trained fleet: its parameters, what it was trained with, and what it can be asked."""

import json
import operator
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.fleet.devices import one_thread, pick_device
from toolkit.fleet.members import EVALUATE, Build, Fields, Layout, Member, fresh
from toolkit.random import fold_in, key

FORMAT = "fleetlab-fleet-1"


@dataclass(frozen=True, eq=False)
class Fleet:
    """N trained models of one architecture, as one stacked state.

    ``fleet[3]`` is member 3 as a plain ``nn.Module``; a slice, a list of indices or a mask gives a smaller fleet.

    Attributes:
        build: makes the module that all members share.
        parameters: ``(members, size)``, one flat row per member.
        seed: the seed it was trained with.
        streams: ``(members,)`` int64; members with the same stream share initial weights and batches (see ``grid``).
        hyper: per-member hyper-parameters by name, each ``(members,)``.
        steps: ``(members,)`` training steps done.
        planned: ``(members,)`` training steps asked for.
        failed: ``(members,)`` the step whose loss or gradient was not finite (the member is frozen there), or -1.
        history: ``(members, steps)`` mean training loss of each step; NaN where a member took no step.
        snapshots: step → parameters ``(members, size)`` as they were after that many steps.
        state: the optimiser's state, each ``(members, size)``.
        memory: per-example values that the loss carried from step to step, each ``(members, n, ...)``.
    """

    build: Build
    parameters: Tensor
    seed: int = 0
    streams: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    hyper: dict[str, Tensor] = field(default_factory=dict)
    steps: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    planned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    failed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    history: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        members, device = len(self.parameters), self.parameters.device
        layout, shape = self.layout, tuple(self.parameters.shape)
        if len(shape) != 2 or shape[1] != layout.size:
            raise ValueError(f"parameters: expected (members, {layout.size}) for this architecture, got {shape}")
        if self.parameters.dtype != layout.dtype:
            raise ValueError(f"parameters: expected {layout.dtype}, as build makes, got {self.parameters.dtype}")
        defaults = {"streams": torch.arange(members), "failed": torch.full((members,), -1)}
        for name in ("streams", "steps", "planned", "failed"):
            if len(getattr(self, name)) == 0:
                value = defaults.get(name, torch.zeros(members, dtype=torch.int64)).to(device)
                object.__setattr__(self, name, value)
        if len(self.history) == 0:
            object.__setattr__(self, "history", self.parameters.new_zeros(members, 0))
        for name, values in self._rows().items():
            if len(values) != members:
                raise ValueError(f"{name}: expected {members} rows, one per member, got {len(values)}")

    @classmethod
    def of(cls, modules: Sequence[nn.Module], build: Build) -> "Fleet":
        """A fleet from plain modules of the architecture that ``build`` makes."""
        layout = Layout.of(fresh(build))
        if not modules:
            raise ValueError("modules: expected at least one, got none")
        for i, module in enumerate(modules):
            if Layout.of(module) != layout:
                raise ValueError(f"modules[{i}]: expected the architecture that build makes, got another one")
        return cls(build, torch.stack([layout.pack(module) for module in modules]))

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(fresh(self.build))

    @property
    def device(self) -> torch.device:
        return self.parameters.device

    @property
    def finished(self) -> Tensor:
        """``(members,)`` whether each member took all its steps (a frozen one has no more to take)."""
        return (self.steps >= self.planned) | (self.failed >= 0)

    def failures(self) -> dict[int, int]:
        """Members whose loss or gradient became non-finite, by index, and the step at which each was frozen."""
        return {i: step for i, step in enumerate(self.failed.tolist()) if step >= 0}

    def __len__(self) -> int:
        return len(self.parameters)

    def __repr__(self) -> str:
        done = int(self.finished.sum())
        name = type(fresh(self.build)).__name__
        parts = [f"{len(self)} members", f"{name} of {self.layout.size:,} parameters on {self.device}"]
        parts += [f"{done} finished"] if done < len(self) else []
        parts += [f"{len(self.failures())} failed"] if self.failures() else []
        return f"Fleet({', '.join(parts)})"

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice | Sequence) and (not isinstance(index, Tensor | np.ndarray) or index.ndim == 0):
            index = operator.index(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"index: expected a member from 0 to {len(self) - 1}, got {index}")
            module = fresh(self.build).to(self.device)
            row = self.layout.views(self.parameters[index].detach()[None])
            module.load_state_dict({name: value[0].clone() for name, value in row.items()}, strict=False)
            return module
        rows = torch.arange(len(self), device=self.device)
        rows = rows[index] if isinstance(index, slice) else rows[torch.as_tensor(index, device=self.device)]
        return self._map(lambda values: values[rows])

    def _rows(self) -> dict[str, Tensor]:
        """Every tensor with a leading member axis, under a name that says where it belongs."""
        rows = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Tensor):
                rows[part.name] = value
            elif isinstance(value, dict):
                rows |= {f"{part.name}/{name}": tensor for name, tensor in value.items()}
        return rows

    def _with(self, rows: Mapping[str, Tensor]) -> "Fleet":
        return _assemble(self.build, self.seed, rows)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Fleet":
        return self._with({name: function(values) for name, values in self._rows().items()})

    def clone(self) -> "Fleet":
        """An independent copy."""
        return self._map(torch.clone)

    def to(self, device: str | torch.device) -> "Fleet":
        """The fleet on another device."""
        return self._map(lambda values: values.to(pick_device(device)))

    def at(self, step: int) -> "Fleet":
        """The fleet as it was after ``step`` steps (one of its snapshots), without what only training needs."""
        if step not in self.snapshots:
            raise ValueError(f"step: expected one of the snapshots {sorted(self.snapshots)}, got {step}")
        return replace(
            self,
            parameters=self.snapshots[step],
            steps=self.steps.clamp_max(step),
            failed=torch.where(self.failed < step, self.failed, -1),
            history=self.history[:, :step],
            snapshots={},
            state={},
            memory={},
        )

    def evaluate(
        self,
        function: Callable[[Any, Any, Any], Any],
        data: Any,
        *,
        member_data: Mapping[str, Tensor] | None = None,
        chunk: int = 32,
        seed: int = 0,
        threads: int = 1,
    ) -> Any:
        """``function(model, batch, hyper)`` for every member, on all of ``data``; results get a leading member axis.

        The function has a loss's signature and rules (pure, vmap-safe); it may return a tensor or any nesting of tuples
        and dicts of tensors. ``batch`` holds the fields of ``data``, of ``member_data`` (each ``(members, ...)``) and a
        ``key`` that depends on ``seed`` and the member's stream. ``chunk`` members are evaluated together.
        """
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1 member, got {chunk}")
        if len(self) == 0:
            raise ValueError("fleet: expected at least one member to evaluate, got none")
        shared = {name: value.to(self.device) for name, value in as_fields(data).items()}
        own = {name: value.to(self.device) for name, value in as_fields(member_data or {}, "member_data").items()}
        require_names("data", shared, {"key"})
        require_names("member_data", own, {"key"})
        for name, value in own.items():
            if value.ndim == 0 or len(value) != len(self):
                got = tuple(value.shape)
                raise ValueError(f"member_data[{name!r}]: expected ({len(self)}, ...), one row per member, got {got}")
        own["key"] = fold_in(key(seed, EVALUATE, device=self.device), self.streams)
        module = fresh(self.build).to(self.device)

        def one(parameters, own, hyper):
            return function(Member(module, parameters), Fields(shared | own), Fields(hyper))

        results = []
        with torch.no_grad(), one_thread(threads):
            for start in range(0, len(self), chunk):
                part = slice(start, start + chunk)
                views = self.layout.views(self.parameters[part])
                inputs = ({n: v[part] for n, v in own.items()}, {n: v[part] for n, v in self.hyper.items()})
                results.append(torch.vmap(one, randomness="error")(views, *inputs))
        return torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *results)

    def logits(self, x: Tensor, **options: Any) -> Tensor:
        """Logits of every member for the same inputs, ``(members, batch, classes)``."""
        return self.evaluate(lambda model, batch, hyper: model(batch.x), {"x": x}, **options)

    def probabilities(self, x: Tensor, **options: Any) -> Tensor:
        """Softmax probabilities of every member for the same inputs, ``(members, batch, classes)``."""
        return self.logits(x, **options).softmax(-1)

    def features(self, x: Tensor, **options: Any) -> Tensor:
        """Penultimate features of every member for the same inputs, ``(members, batch, features)``."""
        return self.evaluate(lambda model, batch, hyper: model(batch.x, return_features=True)[1], {"x": x}, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but ``build`` to one safetensors file (whole or not at all)."""
        target = Path(path)
        layout = self.layout
        about = {"seed": self.seed, "names": layout.names, "shapes": layout.shapes}
        scratch = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
        try:
            scratch.touch()
            mode = scratch.stat().st_mode  # as for any new file; safetensors would keep others from reading it
            rows = {name: values.detach().contiguous().cpu() for name, values in self._rows().items()}
            save_file(rows, scratch, metadata={"format": FORMAT, "about": json.dumps(about)})
            scratch.chmod(mode)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, build: Build, device: str | torch.device = "auto") -> "Fleet":
        """Read a fleet that :meth:`save` wrote. ``build`` must make the architecture it was trained with."""
        try:
            with safe_open(str(path), "pt", device=str(pick_device(device))) as file:
                meta = file.metadata() or {}
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"path: expected a saved fleet, got {path}, which is damaged or another format") from error
        if meta.get("format") != FORMAT:
            raise ValueError(f"path: expected a saved fleet ({FORMAT}), got {path} with format {meta.get('format')!r}")
        about = json.loads(meta["about"])
        layout, dtype = Layout.of(fresh(build)), rows["parameters"].dtype
        saved = Layout(tuple(about["names"]), tuple(tuple(shape) for shape in about["shapes"]), dtype)
        if saved != layout:
            raise ValueError(f"build: expected the architecture of the file, {saved}, got {layout}")
        return _assemble(build, about["seed"], rows)


def _assemble(build: Build, seed: int, rows: Mapping[str, Tensor]) -> Fleet:
    parts: dict[str, Any] = {}
    for name, values in rows.items():
        outer, _, inner = name.partition("/")
        if inner:
            parts.setdefault(outer, {})[int(inner) if outer == "snapshots" else inner] = values
        else:
            parts[outer] = values
    return Fleet(build=build, seed=seed, **parts)


def concatenate(fleets: Iterable[Fleet]) -> Fleet:
    """One fleet from several of the same architecture and training length, members in order."""
    fleets = list(fleets)
    if not fleets:
        raise ValueError("fleets: expected at least one, got none")
    first = fleets[0]
    for i, fleet in enumerate(fleets):
        if fleet.layout != first.layout:
            raise ValueError(f"fleets[{i}]: expected the architecture of the first, got another one")
        if fleet.seed != first.seed and not bool(fleet.finished.all() and first.finished.all()):
            raise ValueError(f"fleets[{i}]: expected seed {first.seed} to go on with training, got {fleet.seed}")
    every = [fleet._rows() for fleet in fleets]
    for rows in every[1:]:
        if set(rows) != set(every[0]):
            extra = sorted(set(rows) ^ set(every[0]))
            raise ValueError(f"fleets: expected the same contents in each, got {extra} in some only")
    width = max(rows["history"].shape[1] for rows in every)
    for rows in every:
        short = width - rows["history"].shape[1]
        rows["history"] = torch.nn.functional.pad(rows["history"], (0, short), value=float("nan"))
    return first._with({name: torch.cat([rows[name] for rows in every]) for name in every[0]})


def as_fields(data: Any, argument: str = "data") -> dict[str, Tensor]:
    """The tensors of a data set: a mapping, or an object with ``as_dict()``."""
    found = data if isinstance(data, Mapping) else data.as_dict() if hasattr(data, "as_dict") else None
    if found is None:
        raise TypeError(f"{argument}: expected a mapping of tensors or a toolkit.data set, got {type(data).__name__}")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument}[{name!r}]: expected a tensor, got {type(value).__name__}")
    return dict(found)


def require_names(argument: str, names: Iterable[str], taken: Iterable[str]) -> None:
    """Refuse names that something else in ``batch`` has, and names of a dict's own methods (``batch.items``)."""
    if clash := sorted(name for name in names if name in set(taken) or hasattr(dict, name)):
        raise ValueError(f"{argument}: expected names that are still free, got {clash}")


def each(function: Callable[..., Any], members: Any, *shared: Any, **options: Any) -> Any:
    """``function(row, *shared, **options)`` for every row of ``members``, as one batched call.

    ``members`` is a tensor with a leading member axis (or a tuple of them, passed as one argument); results get that
    axis too: ``each(ece, fleet.probabilities(x), y, bins=15)`` is one calibration error per member. The function must
    be pure and vmap-safe.
    """
    with torch.no_grad(), one_thread():
        return torch.vmap(lambda row: function(row, *shared, **options))(members)
