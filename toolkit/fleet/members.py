"""From one module to many: the flat parameter layout, and the model that a loss is handed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.models import MLP

Build = Callable[[], nn.Module]
INITIAL, ORDER, NOISE, EVALUATE, CONTROL = range(5)  # what a key's numbers are for


def fresh(build: Build) -> nn.Module:
    """A new module, without moving the global random numbers on."""
    with torch.random.fork_rng(devices=[]):
        return build()


class Fields(dict[str, Any]):
    """A dict whose entries are attributes too; asking for a missing one names those there are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no field {name!r} here; there are: {', '.join(sorted(self)) or 'none'}")


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a module lies in one flat row."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def sizes(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        parameters = dict(module.named_parameters())
        if not parameters:
            raise ValueError("build: expected a module with parameters, got one without")
        kinds = {p.dtype for p in parameters.values()}
        if len(kinds) > 1:
            raise ValueError(f"build: expected parameters of one type, got {sorted(map(str, kinds))}")
        for name, part in module.named_modules():
            if getattr(part, "track_running_stats", False) and getattr(part, "running_mean", None) is not None:
                raise ValueError(
                    f"build: {name} keeps running statistics, which one pure function of parameters and input cannot; "
                    "use LayerNorm or GroupNorm, or track_running_stats=False"
                )
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()), kinds.pop())

    def pack(self, module: nn.Module) -> Tensor:
        """One flat row from a module's parameters."""
        return torch.cat([p.detach().reshape(-1) for _, p in module.named_parameters()])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views ``(members, *shape)`` of flat rows ``(members, size)``."""
        pieces = flat.split(self.sizes, dim=1)
        return {
            name: piece.view(len(flat), *shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }


class Member:
    """One member's model inside a loss: call it like the module; ``parameters`` are its tensors by name."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], known: "Known | None" = None):
        self.parameters = parameters
        self._module = module
        self._known = known

    def __call__(self, x: Tensor, **options: Any) -> Any:
        if self._known is not None and x is self._known.x and set(options) <= {"return_features"}:
            return self._known.output(**options)
        return functional_call(self._module, dict(self.parameters), (x,), options)


class Known:
    """The logits and features of ``x``, already computed for the whole fleet by the fast path."""

    def __init__(self, x: Tensor, logits: Tensor, features: Tensor, seen: list[bool]):
        self.x = x
        self._logits, self._features = logits, features
        self._seen = seen

    def output(self, return_features: bool = False) -> Any:
        self._seen.append(True)
        return (self._logits, self._features) if return_features else self._logits


def has_fast_path(module: nn.Module, x: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`fast_forward` computes this module on examples like ``x`` (a loss may also make its own input)."""
    return type(module) is MLP and x is not None and x.dtype == dtype and x[0].numel() == module.inputs


def fast_forward(parameters: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Logits and features of a fleet of MLPs for inputs ``(members, batch, ...)``.

    Batched matrix products on ``(members, features, batch)``: with the batch last, activations, softmax and gradients
    run over contiguous memory. The results are transposed views ``(members, batch, classes)`` and
    ``(members, batch, features)``.
    """
    depth = sum(name.startswith("layers.") for name in parameters) // 2
    h = x.flatten(2).mT
    for i in range(depth):
        h = _affine(parameters, f"layers.{i}", h).relu_()
    return {"logits": _affine(parameters, "head", h).mT, "features": h.mT}


def _affine(parameters: Mapping[str, Tensor], layer: str, h: Tensor) -> Tensor:
    return torch.bmm(parameters[f"{layer}.weight"], h).add_(parameters[f"{layer}.bias"][:, :, None])
