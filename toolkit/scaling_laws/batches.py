"""Large batches: what a larger one buys, gradient noise, ghost batch normalisation, and how far weights diffuse."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.fleet import Fleet
from toolkit.fleet.chunks import Loss
from toolkit.fleet.devices import one_thread
from toolkit.fleet.members import Fields, Member, fresh
from toolkit.fleet.store import as_fields
from toolkit.random import key, uniform

__all__ = [
    "CriticalBatch",
    "Diffusion",
    "GhostNormMLP",
    "fit_critical_batch",
    "fit_diffusion",
    "ghost_norm",
    "gradient_noise",
    "noise_scale",
    "running_statistics",
    "scaled_rate",
    "steps_to_reach",
    "travelled",
]

_DRAW = 223  # what the key's numbers are for


class CriticalBatch(NamedTuple):
    """Least number of steps, least number of examples, and their ratio, the critical batch size (examples)."""

    steps: Tensor
    examples: Tensor
    batch: Tensor


@typed
def steps_to_reach(
    losses: Float[Tensor, "*runs moments"], levels: Float[Tensor, "levels"]
) -> Float[Tensor, "*runs levels"]:
    """How many steps a run needs until its loss is ``level`` for the first time; NaN where it never is.

    ``losses[..., t]`` is the loss after t steps; between two moments it is taken as linear. Smooth noisy curves first.
    Raises ``ValueError`` for fewer than 2 moments and losses that are NaN.
    """
    if losses.shape[-1] < 2:
        raise ValueError(f"losses: expected at least 2 moments, got {losses.shape[-1]}")
    if readable(losses) and bool(losses.isnan().any()):
        raise ValueError("losses: expected numbers, got NaN")
    below = losses[..., None, :] <= levels[:, None]
    after = below.long().argmax(-1)
    before = (after - 1).clamp_min(0)
    high, low = losses.gather(-1, before), losses.gather(-1, after)
    share = (high - levels) / torch.where(high > low, high - low, 1)
    steps = torch.where(after > 0, before + share, 0)
    return torch.where(below.any(-1), steps, float("nan"))


@typed
def fit_critical_batch(steps: Float[Tensor, "*levels runs"], examples: Float[Tensor, "*levels runs"]) -> CriticalBatch:
    """The critical batch size from the (steps S, examples E) that runs with different batches took to one loss.

    (S/S_min - 1)(E/E_min - 1) = 1 in its linear form 1/S = 1/S_min - (E_min/S_min)/E, by least squares; then
    B_crit = E_min/S_min, in examples: the batch that takes twice the least steps and twice the least examples. A
    result that is negative or infinite says that the runs show no such trade-off.

    Source: McCandlish, Kaplan & Amodei 2018, "An Empirical Model of Large-Batch Training" (eq. 2.11), as used by Su et
    al. 2024, "Unraveling the Mystery of Scaling Laws". Raises ``ValueError`` for fewer than 2 runs, one batch size for
    all, and values that are not positive and finite.
    """
    if steps.shape[-1] < 2:
        raise ValueError(f"steps: expected at least 2 runs, got {steps.shape[-1]}")
    for name, value in (("steps", steps), ("examples", examples)):
        require_positive(name, value)
        if readable(value) and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got infinite ones")
    if readable(examples) and bool((examples == examples[..., :1]).all(-1).any()):
        raise ValueError("examples: expected runs with different batch sizes, got the same number of examples in each")
    x, y = examples.reciprocal(), steps.reciprocal()
    middle_x, middle_y = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    slope = ((x - middle_x) * (y - middle_y)).sum(-1) / (x - middle_x).square().sum(-1)
    least = 1 / (middle_y[..., 0] - slope * middle_x[..., 0])
    return CriticalBatch(least, -slope * least, -slope)


@typed
def noise_scale(
    small: Float[Tensor, "*batch"],
    large: Float[Tensor, "*batch"],
    small_batch: float | int,
    large_batch: float | int,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The simple noise scale from mean squared gradient norms at two batch sizes b < B; also its two parts.

    E‖g_b‖² = ‖G‖² + tr Σ / b, hence unbiased ‖G‖² = (B·large - b·small)/(B - b) and tr Σ = (small - large)/(1/b - 1/B);
    the noise scale is tr Σ/‖G‖², in examples. Returns (scale, ‖G‖², tr Σ). Average ``small`` and ``large`` over many
    batches first: a ratio of noisy numbers is biased. Batches are drawn with replacement; without, use a set that is
    much larger than B.

    Source: McCandlish, Kaplan & Amodei 2018, "An Empirical Model of Large-Batch Training", appendix A.1. Raises
    ``ValueError`` unless 0 < b < B.
    """
    if not 0 < small_batch < large_batch:
        raise ValueError(f"small_batch: expected between 0 and large_batch, got {small_batch} and {large_batch}")
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    noise = (small - large) / (1 / small_batch - 1 / large_batch)
    return noise / signal, signal, noise


def gradient_noise(
    fleet: Fleet,
    loss: Loss,
    data: Any,
    *,
    small_batch: int = 8,
    large_batch: int = 256,
    draws: int = 32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, ‖G‖², tr Σ) of every member, each ``(members,)``: :func:`noise_scale` of ``draws`` batches of each size.

    Batches are drawn with replacement, the same for all members. ``loss`` has the signature and the rules of a training
    loss and sees the fields of ``data``. Raises ``ValueError`` for no draws, and as :func:`noise_scale`.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    fields = {name: value.to(fleet.device) for name, value in as_fields(data).items()}
    examples = len(next(iter(fields.values())))
    module = fresh(fleet.build).to(fleet.device)
    leaves = {n: v.detach().requires_grad_() for n, v in fleet.layout.views(fleet.parameters).items()}
    means = []
    with torch.enable_grad(), one_thread():
        for which, size in enumerate((small_batch, large_batch)):
            total = fleet.parameters.new_zeros(len(fleet))
            for draw in range(draws):
                own = key(seed, _DRAW, which, draw, device=fleet.device)
                index = (uniform(own, (size,), torch.float64) * examples).long()
                batch = Fields({name: value[index] for name, value in fields.items()})

                def one(parameters: Any, hyper: Any, batch: Fields = batch) -> Tensor:
                    return loss(Member(module, parameters), batch, Fields(hyper)).mean()

                values = torch.vmap(one)(leaves, fleet.hyper)
                slopes = torch.autograd.grad(values.sum(), list(leaves.values()), materialize_grads=True)
                total = total + sum(slope.flatten(1).square().sum(1) for slope in slopes)
            means.append(total / draws)
    return noise_scale(means[0], means[1], small_batch, large_batch)


@typed
def scaled_rate(
    rate: float | Tensor, batch: float | int, reference: float | int, rule: Literal["sqrt", "linear"] = "sqrt"
) -> float | Tensor:
    """The learning rate for ``batch`` that goes with ``rate`` at batch ``reference``.

    ``sqrt``: rate·√(batch/reference) keeps the covariance of one update, rate²·C/batch, as it is. ``linear``:
    rate·batch/reference keeps the mean of the steps per epoch (Goyal et al. 2017). Source: Hoffer, Hubara & Soudry
    2017, "Train longer, generalize better". Raises ``ValueError`` for sizes that are not positive.
    """
    require_positive("batch", batch)
    require_positive("reference", reference)
    ratio = batch / reference
    return rate * (math.sqrt(ratio) if rule == "sqrt" else ratio)


@typed
def ghost_norm(
    x: Float[Tensor, "batch features"], ghost: int | None = None, eps: float = 1e-5
) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "chunks 2 features"]]:
    """Batch normalisation with the statistics of chunks of ``ghost`` examples; also each chunk's mean and variance.

    (x - μ_chunk)/√(var_chunk + eps), without scale and shift; the last chunk may be smaller. ``ghost=None`` is one
    chunk, ordinary batch normalisation. The variance that normalises is the biased one; the variance that is returned,
    for :func:`running_statistics`, is unbiased, as in torch. vmap-safe. Source: Hoffer, Hubara & Soudry 2017, "Train
    longer, generalize better: closing the generalization gap in large batch training of neural networks" (algorithm 1).

    Raises ``ValueError`` for ``ghost`` below 2 and for a chunk of a single example.
    """
    size = len(x) if ghost is None else min(ghost, len(x))
    if size < 2 or len(x) % size == 1:
        raise ValueError(f"ghost: expected chunks of at least 2 examples, got {ghost} for a batch of {len(x)}")
    outputs, statistics = [], []
    for part in x.split(size):
        mean = part.mean(0)
        centred = part - mean
        square = centred.square().mean(0)
        outputs.append(centred * (square + eps).rsqrt())
        statistics.append(torch.stack([mean, square * len(part) / (len(part) - 1)]))
    return torch.cat(outputs), torch.stack(statistics)


@typed
def running_statistics(
    initial: Float[Tensor, "*shape"], chunks: Float[Tensor, "chunks *shape"], momentum: float = 0.1
) -> Float[Tensor, "*shape"]:
    """Running mean and variance after ``chunks``, one after another: r ← (1 - momentum)·r + momentum·chunk.

    In closed form (1-m)ⁿ r + Σᵢ m(1-m)ⁿ⁻¹⁻ⁱ sᵢ. Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize
    better". Raises ``ValueError`` for a momentum outside [0, 1].
    """
    require_range("momentum", momentum, 0, 1)
    left = torch.arange(len(chunks) - 1, -1, -1, dtype=chunks.dtype, device=chunks.device)
    weights = momentum * (1 - momentum) ** left
    return (1 - momentum) ** len(chunks) * initial + torch.tensordot(weights, chunks, 1)


class GhostNormMLP(nn.Module):
    """MLP with linear, ghost batch normalisation (with scale and shift), ReLU in each hidden layer; a linear head.

    A pure function: it keeps no running statistics. ``model(x)`` normalises by chunks of ``ghost`` examples of ``x``;
    ``model(x, statistics=s)`` with s ``(layers, 2, width)`` (means and variances, see :func:`running_statistics`)
    treats each example by itself; ``model(x, return_statistics=True)`` also returns ``(chunks, layers, 2, width)``.
    """

    def __init__(
        self, inputs: int, width: int, classes: int, *, depth: int = 2, ghost: int | None = None, eps: float = 1e-5
    ):
        super().__init__()
        for name, size in (("inputs", inputs), ("width", width), ("classes", classes), ("depth", depth)):
            if size < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {size}")
        if ghost is not None and ghost < 2:
            raise ValueError(f"ghost: expected chunks of at least 2 examples, got {ghost}")
        sizes = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.scales = nn.ParameterList(torch.ones(width) for _ in range(depth))
        self.shifts = nn.ParameterList(torch.zeros(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        self.ghost, self.eps = ghost, eps

    def forward(self, x: Tensor, statistics: Tensor | None = None, return_statistics: bool = False) -> Any:
        h, found = x.flatten(1), []
        for i, (layer, scale, shift) in enumerate(zip(self.layers, self.scales, self.shifts, strict=True)):
            h = layer(h)
            if statistics is None:
                h, chunk = ghost_norm(h, self.ghost, self.eps)
                found.append(chunk)
            else:
                h = (h - statistics[i, 0]) * (statistics[i, 1] + self.eps).rsqrt()
            h = (scale * h + shift).relu()
        if return_statistics and statistics is not None:
            raise ValueError("statistics: expected none together with return_statistics, got some")
        return (self.head(h), torch.stack(found, 1)) if return_statistics else self.head(h)


def travelled(fleet: Fleet, steps: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Steps ``(moments,)`` and distances ‖w_t - w_0‖ ``(members, moments)`` from a fleet's snapshots, 0 among them.

    ``steps`` picks snapshots (default: all but 0). Raises ``ValueError`` for a snapshot that is missing.
    """
    chosen = sorted(step for step in fleet.snapshots if step) if steps is None else list(steps)
    if missing := [step for step in (0, *chosen) if step not in fleet.snapshots]:
        raise ValueError(f"steps: expected snapshots of the fleet, {sorted(fleet.snapshots)}, got {missing[0]}")
    if not chosen:
        raise ValueError("steps: expected at least one snapshot after step 0, got none")
    distances = [(fleet.snapshots[step] - fleet.snapshots[0]).norm(dim=1) for step in chosen]
    return torch.tensor(chosen), torch.stack(distances, 1)


class Diffusion(NamedTuple):
    """``offset`` + ``rate``·ln t, R² of it and of its competitors, and ``power``, the best exponent p of a + b·t^p."""

    offset: Tensor
    rate: Tensor
    power: Tensor
    r2_log: Tensor
    r2_sqrt: Tensor
    r2_power: Tensor


@typed
def fit_diffusion(
    steps: Float[Tensor, "moments"], distances: Float[Tensor, "*batch moments"], first: float | int = 10
) -> Diffusion:
    """Constants of :func:`toolkit.scaling_laws.step_laws.log_diffusion`, offset + rate·ln t, from measured distances.

    Least squares on steps t ≥ ``first``, against a + b·√t (an ordinary random walk) and a + b·t^p with p the best
    of 0.02, 0.04, ..., 1: with small p that is nearly a logarithm and has one parameter more, so its R² is close to or
    above the logarithm's. Holds while the learning rate is high. Units: those of the weights.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better" (section 3). Raises ``ValueError`` for fewer
    than 4 moments from ``first`` on, and steps that are not positive.
    """
    require_positive("steps", steps)
    used = steps >= first
    if int(used.sum()) < 4:
        raise ValueError(f"steps: expected at least 4 moments from step {first} on, got {int(used.sum())}")
    t, y = steps[used].to(distances.dtype), distances[..., used]
    powers = torch.arange(1, 51, dtype=distances.dtype, device=distances.device) / 50
    shapes = torch.cat([t.log()[None], t.sqrt()[None], t ** powers[:, None]])
    shapes = shapes / shapes.amax(1, keepdim=True)
    centred = shapes - shapes.mean(1, keepdim=True)
    middle = y.mean(-1, keepdim=True)
    slope = (y - middle) @ centred.mT / centred.square().sum(1)
    rest = (y - middle)[..., None, :] - slope[..., None] * centred
    r2 = 1 - rest.square().sum(-1) / (y - middle).square().sum(-1, keepdim=True)
    rate = slope[..., 0] / t.log().amax()
    best = r2[..., 2:].max(-1)
    return Diffusion(
        middle[..., 0] - rate * t.log().mean(), rate, powers[best.indices], r2[..., 0], r2[..., 1], best.values
    )
