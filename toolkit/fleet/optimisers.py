"""Optimisers that step a whole fleet: parameters, gradients and state are ``(members, size)``.

Learning rate and weight decay may be one number or a tensor with one value per member. An optimiser that does
something around another one's step (masks it, scales it, writes it down) is a :class:`Wrapper`.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

_TINY = 1e-37  # the square root of an exact 0 takes a slow path on a CPU; this one's is far below any epsilon


class Optimiser(Protocol):
    """What the training loop needs of an optimiser."""

    @property
    def lr(self) -> float | Tensor: ...
    @property
    def weight_decay(self) -> float | Tensor: ...
    def initial(self, parameters: Tensor) -> dict[str, Tensor]: ...
    def apply(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        rate: Tensor,
        decay: Tensor | None,
        step: int,
    ) -> None: ...


def _check(lr: float | Tensor, weight_decay: float | Tensor, **shares: float) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(value, int | float | Tensor):
            raise TypeError(f"{name}: expected a number or a tensor with one per member, got {type(value).__name__}")
        values = torch.as_tensor(value)
        if values.ndim > 1:
            raise ValueError(f"{name}: expected one number or one per member, got shape {tuple(values.shape)}")
        if not bool((values >= 0).all()):
            raise ValueError(f"{name}: expected values of at least 0, got {values.min().item()}")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got {values.max().item()}")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {share}")


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1); ``weight_decay`` is added to the gradient as an L2 penalty.

    m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,  θ ← θ - lr · m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε).
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tensor = 0.0

    decoupled = False

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, **{"betas[0]": self.betas[0], "betas[1]": self.betas[1]})

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(parameters), "square": torch.zeros_like(parameters)}

    def apply(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        rate: Tensor,
        decay: Tensor | None,
        step: int,
    ) -> None:
        if decay is not None:
            if self.decoupled:
                parameters.mul_(1 - rate * decay)
            else:
                gradient = gradient + decay * parameters
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = state["square"].add(_TINY).sqrt_().add_(self.eps * correction2**0.5)
        direction = torch.div(state["mean"], scale, out=scale)
        parameters.addcmul_(direction, rate, value=-(correction2**0.5) / correction1)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2): θ ← θ·(1 - lr·decay), then Adam."""

    weight_decay: float | Tensor = 1e-2

    decoupled = True


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, b ← μb + g, θ ← θ - lr·b (Nesterov: g + μb in place of b), with L2 weight decay."""

    lr: float | Tensor = 1e-2
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, momentum=self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected a momentum greater than 0 with it, got momentum 0")

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(parameters)} if self.momentum else {}

    def apply(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        rate: Tensor,
        decay: Tensor | None,
        step: int,
    ) -> None:
        if decay is not None:
            gradient = gradient + decay * parameters
        if self.momentum:
            velocity = state["momentum"].mul_(self.momentum).add_(gradient)
            gradient = gradient + self.momentum * velocity if self.nesterov else velocity
        parameters.addcmul_(gradient, rate, value=-1)


class Step(NamedTuple):
    """One step of an optimiser: what :meth:`Optimiser.apply` is given, in its order.

    ``rate`` is learning rate times schedule ``(members, 1)``, 0 where a member stands still; ``decay`` is ``(members,
    1)`` or None where there is none; ``number`` counts from 0.
    """

    parameters: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    rate: Tensor
    decay: Tensor | None
    number: int


@dataclass(frozen=True)
class Wrapper:
    """An optimiser around another one. As it stands it changes nothing: training is that of ``inner``, bit for bit.

    A subclass, a frozen dataclass too, overrides :meth:`take`, and where it remembers something of its own also
    :meth:`initial`: ``{"name": ..., **super().initial(parameters)}``, the name listed in ``own``. What is one value
    per member belongs into that state, as a tensor whose first dimension is the members: a fleet is trained in chunks,
    and only the state is cut with it. Nested wrappers need different names in ``own``.
    """

    inner: Optimiser

    own: ClassVar[tuple[str, ...]] = ()

    @property
    def lr(self) -> float | Tensor:
        return self.inner.lr

    @property
    def weight_decay(self) -> float | Tensor:
        return self.inner.weight_decay

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        return self.inner.initial(parameters)

    def apply(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        rate: Tensor,
        decay: Tensor | None,
        step: int,
    ) -> None:
        self.take(Step(parameters, gradient, state, rate, decay, step))

    def take(self, step: Step) -> None:
        """The hook: all that happens at a step. Here ``inner`` steps, with the state that is not ``own``."""
        self.inner.apply(*step._replace(state={n: v for n, v in step.state.items() if n not in self.own}))
