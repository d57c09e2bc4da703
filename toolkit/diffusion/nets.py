"""A small net that answers with ε̂, its training loss, and the field of a fleet of such nets."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from toolkit import random
from toolkit.diffusion.noising import LAST, NULL, Field, levels, noised
from toolkit.fleet import Fleet
from toolkit.fleet.members import fresh


class ScoreNet(nn.Module):
    """ε̂(x, t, condition) = σ x + α · net: a small net with Fourier features of the time and a row for each class.

    The rows begin at 0 and no condition adds nothing, so a class that was never seen is answered as if there were no
    condition: a net retrained without a class has a definite answer to its name. With the term σ x the net learns what
    a Gaussian of unit variance does not explain (Salimans & Ho 2022), and the denoised point is bounded at t = 1.

    Args:
        dim: coordinates of a point (64 for 8×8 glyphs).
        classes: how many conditions.
        hidden: widths of the hidden layers.
        frequencies: the features are sin and cos of kπt/2 for k = 1, 2, 4, ... (so many).
    """

    def __init__(self, dim: int, classes: int, hidden: Sequence[int] = (64, 64), frequencies: int = 4):
        super().__init__()
        for name, size in {"dim": dim, "classes": classes, "hidden": len(hidden), "frequencies": frequencies}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.dim, self.classes, self.frequencies = dim, classes, frequencies
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise([dim, *hidden]))
        self.time = nn.Linear(2 * frequencies, sum(hidden))
        self.condition = nn.Parameter(torch.zeros(classes, sum(hidden)))
        self.head = nn.Linear(hidden[-1], dim)

    def forward(self, x: Tensor, t: Any, condition: Any = None) -> Tensor:
        """ε̂ ``(batch, dim)`` of points ``(batch, dim)``; t and the condition are one number or ``(batch,)``."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        angle = t[..., None] * (math.pi / 2 * 2.0 ** torch.arange(self.frequencies, dtype=x.dtype, device=x.device))
        extra = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        if condition is not None:
            wanted = torch.as_tensor(condition, device=x.device)
            own = wanted[..., None] == torch.arange(self.classes, device=x.device)  # NULL is none of them
            extra = extra + own.to(x.dtype) @ self.condition
        h, done = x, 0
        for layer in self.layers:
            h = layer(h)
            h = F.silu(h + extra[..., done : done + h.shape[-1]])
            done += h.shape[-1]
        alpha, sigma = levels(x, t)
        return sigma * x + alpha * self.head(h)


def denoising_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """|ε̂(x_t, t, y) - ε|² / dim for each example, a loss for :func:`toolkit.fleet.train`: ``(batch,)``.

    ``batch`` has ``x`` ``(batch, dim)`` and classes ``y``; t is uniform in (0, LAST), ε normal. With probability
    ``hyper.drop`` the condition is left out; where there is none, 0.25: less leaves the unconditional answer of a short
    training poor. Sources: Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models"; Ho & Salimans 2022,
    "Classifier-Free Diffusion Guidance".
    """
    x, count = batch.x, len(batch.x)
    noise = random.normal(random.fold_in(batch.key, 0), tuple(x.shape), x.dtype)
    share, chance = random.uniform(random.fold_in(batch.key, 1), (2, count), x.dtype)
    t = LAST * share
    condition = torch.where(chance < hyper.get("drop", 0.25), NULL, batch.y)
    found = model(noised(x, noise, t), t=t, condition=condition)
    return (found - noise).square().mean(-1)


def epsilon_field(fleet: Fleet) -> Field:
    """The field of a fleet of :class:`ScoreNet`: points ``(members, batch, dim)`` → ε̂, without gradients.

    t and the condition are one number, ``(batch,)`` or ``(members, batch)``. Raises ``ValueError`` for other nets.
    """
    module, views = fresh(fleet.build).to(fleet.device), fleet.layout.views(fleet.parameters.detach())
    if not isinstance(module, ScoreNet):
        raise ValueError(f"fleet: expected one of ScoreNet, got one of {type(module).__name__}")

    def one(parameters: dict[str, Tensor], x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return functional_call(module, parameters, (x, t, condition))

    @torch.no_grad()
    def field(x: Tensor, t: Any, condition: Any = None) -> Tensor:
        x = x.expand(len(fleet), *x.shape[-2:]) if x.ndim == 2 else x
        if len(x) != len(fleet) or x.shape[-1] != module.dim:
            got = tuple(x.shape)
            raise ValueError(f"x: expected points ({len(fleet)}, batch, {module.dim}), got {got}")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        condition = torch.as_tensor(NULL if condition is None else condition, device=x.device)
        own = tuple(0 if value.ndim == 2 else None for value in (t, condition))
        return torch.vmap(one, (0, 0, *own))(views, x, t, condition)

    return field
