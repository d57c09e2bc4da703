"""Half of the neurons of a wide net do as well as all of them, and then two nets are joined by a path of low loss.

Shevchenko & Mondelli 2020, "Landscape Connectivity and Dropout Stability of SGD Solutions for Over-parameterized Neural
Networks".
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from toolkit.checks import readable, require_positive, typed
from toolkit.fleet import SGD, Fleet, train

__all__ = [
    "MeanField",
    "along",
    "barrier",
    "dropout_variance",
    "dropped",
    "five_segments",
    "squared_error",
    "train_mean_field",
]


class MeanField(nn.Module):
    """Two layers, the second a mean over neurons: f(x) = (1/N) Σ_i a_i relu(w_i·x + b_i).

    Parameters ``a`` ``(width, outputs)``, ``w`` ``(width, inputs)`` and ``b`` ``(width,)`` start as N(0, 1),
    N(0, 2 / inputs) and 0. With ``return_features`` the neurons' values ``(batch, width)`` come along.
    """

    def __init__(self, inputs: int, width: int, outputs: int):
        super().__init__()
        for name, size in (("inputs", inputs), ("width", width), ("outputs", outputs)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.a = nn.Parameter(torch.randn(width, outputs))
        self.w = nn.Parameter(torch.randn(width, inputs) * (2 / inputs) ** 0.5)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, return_features: bool = False):
        hidden = (x.flatten(1) @ self.w.T + self.b).relu()
        out = hidden @ self.a / len(self.b)
        return (out, hidden) if return_features else out


def squared_error(model: Any, batch: Any, hyper: Any) -> Tensor:
    """Σ over outputs of (f(x) - target)², ``(batch,)``, with the field ``target`` ``(batch, outputs)``."""
    return (model(batch.x) - batch.target).square().sum(1)


def train_mean_field(data: Any, width: int, members: int, steps: int, rate: float = 0.1, **options: Any) -> Fleet:
    """A fleet of :class:`MeanField` nets on fields ``x`` and ``target``, by SGD with learning rate ``rate`` · width.

    Each neuron's gradient has a factor 1 / width; with it in the rate, nets of all widths move alike, and approach one
    limit (the mean-field scaling). ``options`` go to :func:`toolkit.fleet.train`. Raises ``ValueError`` for data
    without the two fields or a rate not above 0. Source: Shevchenko & Mondelli 2020, "Landscape Connectivity and
    Dropout Stability of SGD Solutions for Over-parameterized Neural Networks".
    """
    if missing := [name for name in ("x", "target") if name not in data]:
        raise ValueError(f"data: expected fields 'x' and 'target', got none of the name {missing[0]!r}")
    require_positive("rate", rate)
    inputs, outputs = data["x"].flatten(1).shape[1], data["target"].shape[1]
    optimiser = SGD(lr=rate * width)
    return train(
        lambda: MeanField(inputs, width, outputs).to(data["x"].dtype),
        squared_error,
        data,
        members=members,
        steps=steps,
        optimiser=optimiser,
        **options,
    )


def _views(trained: Fleet) -> dict[str, Tensor]:
    views = trained.layout.views(trained.parameters)
    if set(views) != {"a", "w", "b"}:
        raise ValueError(f"trained: expected a fleet of MeanField nets, got parameters {sorted(views)}")
    return views


def _fleet(trained: Fleet, views: dict[str, Tensor]) -> Fleet:
    return Fleet(trained.build, torch.cat([views[name].flatten(1) for name in trained.layout.names], 1))


def _check_kept(kept: Tensor, shape: tuple[int, ...]) -> None:
    if kept.shape != shape or not bool(kept.any(-1).all()):
        raise ValueError(f"kept: expected a mask {shape} that keeps some neurons, got {tuple(kept.shape)}")


def dropped(trained: Fleet, kept: Tensor) -> Fleet:
    """Nets without the neurons outside ``kept`` (bool, ``(width,)`` or ``(members, width)``): the mean over the rest.

    a_i → a_i N / M for the M neurons that are kept, 0 for the others. Raises ``ValueError`` for another mask, one that
    keeps nothing, or a fleet of other nets. Source: Shevchenko & Mondelli 2020, "Landscape Connectivity and Dropout
    Stability of SGD Solutions for Over-parameterized Neural Networks".
    """
    views = _views(trained)
    shape = tuple(views["b"].shape)
    _check_kept(kept, shape if kept.ndim == 2 else shape[1:])
    kept = kept.to(trained.device).expand(shape)
    share = kept.to(trained.parameters.dtype)
    share = share * (shape[1] / share.sum(1, keepdim=True))
    return _fleet(trained, views | {"a": views["a"] * share[..., None]})


@typed
def dropout_variance(
    hidden: Float[Tensor, "examples width"], a: Float[Tensor, "width outputs"], keep: int
) -> Float[Tensor, "examples outputs"]:
    """Variance of each output over random sets of ``keep`` = M of the N neurons: (1/M)(1 - M/N) S².

    S² is the unbiased variance over the neurons of a_i h_i(x); sets are drawn without replacement, each of them alike,
    and the outputs are means over the set, so their mean is that of the whole net. Hence a squared error grows by
    exactly this much in expectation, Σ over outputs: at M = N/2 by S²/N. Raises ``ValueError`` unless 1 ≤ M ≤ N and
    N ≥ 2. Source: the variance of a sample mean in a finite population (Cochran 1977, "Sampling Techniques"), for the
    nets of Shevchenko & Mondelli 2020, "Landscape Connectivity and Dropout Stability of SGD Solutions".
    """
    width = len(a)
    if width < 2 or not 1 <= keep <= width:
        raise ValueError(f"keep: expected from 1 to the width of at least 2, got {keep} of {width}")
    mean = hidden @ a / width
    spread = hidden.square() @ a.square() - width * mean.square()
    return spread.clamp_min(0) / (width - 1) * (1 - keep / width) / keep


def five_segments(trained: Fleet, first: int, second: int, kept: Bool[Tensor, "width"] | None = None) -> Fleet:
    """The 6 corners of a path from one member to another, as a fleet: between them the nets move on straight lines.

    With the neurons split in A (``kept``; default: the first half) and B, and s = N/|A|, t = N/|B|:

        (a, W) → (s a_A, 0; W) → (s a_A, 0; W_A, W'_B) → (0, t a'_B; W_A, W'_B) → (0, t a'_B; W') → (a', W').

    Segments 2 and 4 change the weights of dead neurons only: the loss is constant. The others change the last layer
    only: a convex loss is convex along them. So the largest loss of the whole path is that of a corner: no more than
    the losses of the two ends and of both after dropping half of their neurons (:func:`dropped`: A of the first,
    B of the second). Raises ``ValueError`` for members that there are not, a mask that keeps nothing or all, or other
    nets. Source: Shevchenko & Mondelli 2020, "Landscape Connectivity and Dropout Stability of SGD Solutions for
    Over-parameterized Neural Networks", after Kuditipudi et al. 2019, "Explaining Landscape Connectivity of Low-cost
    Solutions for Multilayer Nets" (the order of the segments is a reading).
    """
    for name, member in (("first", first), ("second", second)):
        if not 0 <= member < len(trained):
            raise ValueError(f"{name}: expected a member from 0 to {len(trained) - 1}, got {member}")
    views = _views(trained)
    width = views["b"].shape[1]
    mask = torch.arange(width) < width // 2 if kept is None else kept
    _check_kept(mask, (width,))
    _check_kept(~mask, (width,))
    mask = mask.to(trained.device)
    ends = trained[[first, second]]
    half = _views(dropped(ends, torch.stack([mask, ~mask]).to(trained.device)))["a"]
    before, after = ({name: view[end] for name, view in views.items()} for end in (first, second))

    def mixed(name: str, left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (left[name].ndim - 1)), left[name], right[name])

    corners = {"a": torch.stack([before["a"], half[0], half[0], half[1], half[1], after["a"]])}
    for name in ("w", "b"):
        middle = mixed(name, before, after)
        corners[name] = torch.stack([before[name], before[name], middle, middle, after[name], after[name]])
    return _fleet(trained, corners)


def along(corners: Fleet, points: int) -> Fleet:
    """Nets on the straight lines from each member to the next one, ``points`` to a line after the first member.

    ``along(fleet[[i, j]], 20)`` is the straight line between two members, ``along(five_segments(...), 20)`` the path.
    The corners themselves are on it, at every ``points``-th place. Raises ``ValueError`` for fewer than 2 corners or
    fewer than 1 point.
    """
    if len(corners) < 2:
        raise ValueError(f"corners: expected at least 2 members, got {len(corners)}")
    if points < 1:
        raise ValueError(f"points: expected at least 1, got {points}")
    rows = corners.parameters
    share = (torch.arange(points, device=rows.device, dtype=rows.dtype) / points)[:, None]
    lines = (rows[:-1, None] * (1 - share) + rows[1:, None] * share).flatten(0, 1)
    return Fleet(corners.build, torch.cat([lines, rows[-1:]]))


@typed
def barrier(losses: Float[Tensor, "*paths points"]) -> Float[Tensor, "*paths"]:
    """The largest loss on a path less the larger of the losses of its two ends (0 where an end is the worst place).

    Raises ``ValueError`` for fewer than 2 points or losses that are not finite. Source: Shevchenko & Mondelli 2020,
    "Landscape Connectivity and Dropout Stability of SGD Solutions" (connected with an error of this size).
    """
    if losses.shape[-1] < 2:
        raise ValueError(f"losses: expected at least 2 points, got {losses.shape[-1]}")
    if readable(losses) and not bool(losses.isfinite().all()):
        raise ValueError("losses: expected finite numbers, got NaN or infinity")
    return losses.amax(-1) - torch.maximum(losses[..., 0], losses[..., -1])
