"""One epoch against many: what further passes cost, what dropout gives back, and what a single pass should spend.

Losses of sweeps are in nats per byte (see :mod:`toolkit.scaling_laws.corpora`); "tokens" are predicted bytes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.fleet import train
from toolkit.fleet.schedules import warmup
from toolkit.scaling_laws.constants import Chinchilla, Number, require_all_positive
from toolkit.scaling_laws.corpora import ByteMLP, byte_adam, byte_loss, nats_per_byte, require_total
from toolkit.scaling_laws.frontiers import FLOPS, compute_optimal
from toolkit.scaling_laws.size_laws import chinchilla

__all__ = [
    "EpochSweep",
    "dropout_ridge",
    "epoch_sweep",
    "one_epoch",
    "ratio_regret",
    "recovery",
    "speed_up",
]


def _step_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """Dropout from the share ``late`` of the run on."""
    rate = hyper.rate * (batch.progress >= hyper.late)
    return byte_loss(model(batch.x, key=batch.key, rate=rate), batch.y)


@dataclass(frozen=True, eq=False)
class EpochSweep:
    """Loss along training, for equal numbers of steps on data seen once or many times.

    ``curves`` ``(epochs, rates, seeds, times)``: held-out nats per byte after ``steps`` ``(times,)`` steps, float64;
    ``train`` ``(epochs, rates, seeds)``: mean loss of the last tenth of the training batches (with dropout, if any).
    """

    epochs: tuple[int, ...]
    rates: tuple[float, ...]
    steps: Tensor
    curves: Tensor
    train: Tensor

    def degradation(self) -> Tensor:
        """Δ(e): final held-out loss above that of the first of ``epochs`` with the first rate, same seed."""
        final = self.curves[..., -1]
        return final - final[:1, :1]


def epoch_sweep(
    data: dict[str, Tensor],
    held_out: dict[str, Tensor],
    symbols: int,
    width: int = 64,
    epochs: Sequence[int] = (1, 4, 16),
    rates: Sequence[float] = (0.0, 0.2),
    seeds: int = 2,
    *,
    late: float = 0.0,
    total: int = 16384,
    batch: int = 128,
    times: int = 8,
    lr: float = 2e-2,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> EpochSweep:
    """Spend ``total`` tokens on total / e different ones, e passes each, at each dropout rate: one fleet.

    The data of more epochs are part of those of fewer. Dropout on the hidden layer starts at the share ``late`` of the
    run. The learning rate rises over 5 % of the steps and then stays: every point of a curve is a fair end.

    Sources: Komatsuzaki 2019, "One Epoch Is All You Need"; Xue et al. 2023, "To Repeat or Not To Repeat" (late dropout
    is a reading of theirs). Raises ``ValueError`` if ``total`` exceeds the data or is not a multiple of the batch,
    total / e is not whole, a rate is outside [0, 1) or there are more times than steps.
    """
    n, context = data["x"].shape
    require_total(total, batch, n)
    for e in epochs:
        if e < 1 or total % e:
            raise ValueError(f"epochs: expected divisors of {total} (total), got {e}")
    for rate in rates:
        if not 0 <= rate < 1:
            raise ValueError(f"rates: expected rates in [0, 1), got {rate}")
    require_range("late", late, 0, 1)
    ends = total // batch
    require_range("times", times, 1, ends)
    if seeds < 1 or not epochs or not rates:
        raise ValueError(
            f"seeds: expected at least one seed, rate and number of epochs, got {seeds}, {rates}, {epochs}"
        )
    count = len(epochs) * len(rates) * seeds
    streams = torch.arange(seeds).repeat(len(epochs) * len(rates))
    rank = random.permutation(random.fold_in(random.key(seed, 3), torch.arange(seeds)), n).argsort(1)
    kept = torch.tensor([total // e for e in epochs]).repeat_interleave(len(rates) * seeds)
    moments = [round(ends ** (1 - (times - 1 - i) / times)) for i in range(times)]
    moments = sorted({*moments, ends})
    fleet = train(
        functools.partial(ByteMLP, symbols, context, width),
        _step_loss,
        {"x": data["x"], "y": data["y"]},
        subsets=rank[streams] < kept[:, None],
        streams=streams,
        hyper={
            "rate": torch.tensor(rates).repeat_interleave(seeds).repeat(len(epochs)),
            "late": torch.full((count,), float(late)),
        },
        steps=ends,
        batch=batch,
        optimiser=byte_adam(lr, width),
        schedule=warmup(0.05),
        snapshots=moments,
        seed=seed,
        device=device,
        progress=False,
    )
    shape = (len(epochs), len(rates), seeds)
    curves = torch.stack([nats_per_byte(fleet.at(step), held_out) for step in moments], 1)
    last = fleet.history[:, -max(1, ends // 10) :].double().mean(1)
    return EpochSweep(
        tuple(epochs), tuple(rates), torch.tensor(moments), curves.view(*shape, -1).cpu(), last.view(shape).cpu()
    )


@typed
def recovery(regularised: Float[Tensor, "*shape"], plain: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 - Δ_reg / Δ_none: the share of the degradation that a regulariser takes away (1: all, below 0: it harms).

    Both Δ are losses above the same run on fresh data. A definition of this lab for Xue et al. 2023. Raises
    ``ValueError`` where there is no degradation to recover from.
    """
    require_positive("plain", plain)
    return 1 - regularised / plain


@typed
def dropout_ridge(
    x: Float[Tensor, "n features"], y: Float[Tensor, "n"], rate: float | Tensor
) -> Float[Tensor, "features"]:
    """Least squares with inverted dropout on the inputs, in expectation: (XᵀX + p/(1 - p) diag XᵀX) w = Xᵀy.

    Source: Wager, Wang & Liang 2013, "Dropout Training as Adaptive Regularization". Raises ``ValueError`` for a rate
    outside [0, 1).
    """
    require_range("rate", rate, 0, 1 - 1e-12)
    gram = x.mT @ x
    return torch.linalg.solve(gram + rate / (1 - rate) * torch.diag_embed(gram.diagonal(0, -2, -1)), x.mT @ y)


@typed
def one_epoch(
    parameters: Float[Tensor, "*#shape"], tokens: Float[Tensor, "*#shape"], ratio: Number = 5.0
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """(P', T') = (√(PT/r), √(rPT)): the model and data of a single epoch for the compute PT, r = ``ratio`` tokens each.

    The rule of about 5 tokens processed per parameter; it is optimal at every budget only if the loss falls with the
    same exponent in both (T/P = (B/A)^(1/α) for :func:`chinchilla` with α = β). Raises ``ValueError`` for what is not
    positive. Source: Komatsuzaki 2019, "One Epoch Is All You Need" (the rule is a reading).
    """
    require_all_positive(parameters=parameters, tokens=tokens, ratio=ratio)
    work = parameters * tokens
    return (work / ratio) ** 0.5, (work * ratio) ** 0.5


@typed
def ratio_regret(
    parameters: Float[Tensor, "*#shape"], tokens: Float[Tensor, "*#shape"], law: Chinchilla, ratio: Number = 5.0
) -> Float[Tensor, "..."]:
    """What a fixed ratio of tokens to parameters costs, in nats: the loss at :func:`one_epoch` minus the least for PT.

    The least is that of :func:`toolkit.scaling_laws.frontiers.compute_optimal`. 0 at every budget only for α = β and
    the ratio (B/A)^(1/α). Raises ``ValueError`` for what is not positive. Derived, for the rule of Komatsuzaki 2019,
    "One Epoch Is All You Need".
    """
    best = compute_optimal(FLOPS * parameters * tokens, law)
    return chinchilla(*one_epoch(parameters, tokens, ratio), law) - best.loss


@typed
def speed_up(
    cost: Float[Tensor, "points"],
    loss: Float[Tensor, "points"],
    new_cost: Float[Tensor, "new_points"],
    new_loss: Float[Tensor, "new_points"],
) -> Float[Tensor, ""]:
    """Cost at which the baseline first has its own least test loss, over the cost at which the new run reaches it.

    Costs ascend; the new curve's running least is interpolated in logarithms of both. NaN if the new run never gets
    there; its first cost if it begins there. Raises ``ValueError`` for what is not positive. Source: Komatsuzaki 2019,
    "One Epoch Is All You Need".
    """
    require_all_positive(cost=cost, loss=loss, new_cost=new_cost, new_loss=new_loss)
    for name, values in (("cost", cost), ("new_cost", new_cost)):
        if readable(values) and not bool((values[1:] > values[:-1]).all()):
            raise ValueError(f"{name}: expected ascending costs, got a step down or a repeat")
    target, own = loss.min(), cost.gather(0, loss.argmin(keepdim=True))[0]
    best, places = new_loss.cummin(0).values.log(), new_cost.log()
    reached = best <= target.log()
    after = reached.int().argmax(keepdim=True)
    before = (after - 1).clamp(min=0)
    top, bottom, right, left = (
        v.gather(0, i)[0] for v, i in ((best, before), (best, after), (places, after), (places, before))
    )
    share = ((top - target.log()) / torch.where(top > bottom, top - bottom, 1)).clamp(0, 1)
    return torch.where(reached.any(), own / torch.exp(left + share * (right - left)), math.nan)
