"""Data that is seen again: exact mixtures, what repetition costs and dropout gives back, one epoch against many.

Losses are in nats per byte (see :mod:`toolkit.scaling_laws.corpora`); "tokens" are predicted bytes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.schedules import linear, warmup
from toolkit.models import ByteTransformer
from toolkit.scaling_laws.corpora import ByteMLP, byte_loss, nats_per_byte, plain_loss

__all__ = [
    "EpochSweep",
    "InOrder",
    "RepeatSweep",
    "attention_maps",
    "balanced_size",
    "copy_gain",
    "copy_test",
    "dropout_ridge",
    "effective_size",
    "epoch_sweep",
    "mixture_order",
    "prefix_matching",
    "ratio_regret",
    "recovery",
    "repeat_sweep",
    "speed_up",
]


@typed
def mixture_order(total: int, share: float, repeats: int, seed: int = 0) -> Int[Tensor, "total"]:
    """Which item each of ``total`` draws is: 0, 1, 2, ... once each, and a repeated set mixed in at an exact share.

    With T draws, pT of them go to R = pT / r items, numbered from T - pT on, each of which comes exactly r times: in a
    new random order on each pass. Draw t is one of these where ⌊(t + 1) p⌋ > ⌊t p⌋, so every stretch has its share to
    within one. At share 0 the order is 0 .. T - 1; at r = 1 all T items differ.

    The setting of Hernandez et al. 2022, "Scaling Laws and Interpretability of Learning from Repeated Data" (the paper
    fixes T and the share and varies R; drawing without chance is our choice). Raises ``ValueError`` unless pT is whole
    and a multiple of r.
    """
    require_range("share", share, 0, 1)
    again = round(share * total)
    if total < 1 or abs(again - share * total) > 1e-6:
        raise ValueError(f"share: expected a whole number of the {total} draws, got {share * total:.4f}")
    if repeats < 1 or again % repeats:
        raise ValueError(f"repeats: expected a divisor of the {again} repeated draws, got {repeats}")
    place = torch.arange(total)
    before, after = place * again // total, (place + 1) * again // total
    if again == 0:
        return place
    size = again // repeats
    passes = random.permutation(random.fold_in(random.key(seed), torch.arange(repeats)), size).flatten()
    return torch.where(after > before, total - again + passes[before.clamp_max(again - 1)], place - before)


@dataclass(frozen=True)
class InOrder:
    """A sampler without chance: step s takes examples s·batch, s·batch + 1, ... (from the start again at the end)."""

    def size(self, batch: int) -> int:
        return batch

    def check(self, labels: Tensor | None, subsets: Tensor | None, examples: int) -> None:
        if subsets is not None:
            raise ValueError("subsets: expected none, as all examples are taken in their order, got some")

    def block(self, members: int, examples: int, batch: int) -> int:
        return max(1, examples // batch)

    def plan(
        self,
        keys: Tensor,
        first: int,
        last: int,
        batch: int,
        examples: int,
        labels: Tensor | None,
        subsets: Tensor | None,
    ) -> Tensor:
        draws = torch.arange(first * batch, last * batch, device=keys.device) % examples
        return draws.view(last - first, 1, batch).repeat(1, len(keys), 1)


@dataclass(frozen=True, eq=False)
class RepeatSweep:
    """Losses after training on mixtures: each ``(widths, repeats, seeds)``, nats per byte, float64.

    ``held_out`` on fresh text; ``repeated`` on the repeated set itself (what was memorised shows there);
    ``parameters`` ``(widths,)``.
    """

    widths: tuple[int, ...]
    repeats: tuple[int, ...]
    parameters: Tensor
    held_out: Tensor
    repeated: Tensor

    def degradation(self) -> Tensor:
        """Held-out loss above that of r = the first entry of ``repeats``, same width and seed: same shape."""
        return self.held_out - self.held_out[:, :1]


def repeat_sweep(
    data: dict[str, Tensor],
    held_out: dict[str, Tensor],
    symbols: int,
    widths: Sequence[int] = (16, 64),
    repeats: Sequence[int] = (1, 4, 16, 64, 256),
    seeds: int = 2,
    *,
    share: float = 0.5,
    total: int = 16384,
    batch: int = 128,
    lr: float = 4e-2,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> RepeatSweep:
    """Train byte MLPs on the mixtures of :func:`mixture_order`: one fleet a width, repeats and seeds as members.

    All members of a seed start alike and see the same unique windows at the same steps; the repeated sets are nested.
    A seed picks the windows of ``data`` at random. Optimiser and schedule are those of
    :func:`toolkit.scaling_laws.corpora.byte_sweep`.

    Raises ``ValueError`` if ``data`` has fewer than ``total`` windows, ``total`` is not a multiple of ``batch``, or
    for what :func:`mixture_order` refuses.
    """
    n, context = data["x"].shape
    if total > n or total % batch:
        raise ValueError(f"total: expected a multiple of {batch} (batch), at most {n} windows, got {total}")
    if seeds < 1 or not repeats or not widths:
        raise ValueError(f"seeds: expected at least one seed, width and count, got {seeds}, {widths}, {repeats}")
    streams = torch.arange(seeds).repeat(len(repeats))
    orders = torch.stack([mixture_order(total, share, r, seed) for r in repeats]).repeat_interleave(seeds, 0)
    drawn = random.permutation(random.fold_in(random.key(seed, 2), torch.arange(seeds)), n)[:, :total]
    items = drawn[streams].gather(1, orders)
    again = orders >= total - round(share * total)
    held, repeated, parameters = [], [], []
    for width in widths:
        fleet = train(
            functools.partial(ByteMLP, symbols, context, width),
            plain_loss,
            {"place": torch.arange(total)},
            member_data={"x": data["x"][items], "y": data["y"][items]},
            streams=streams,
            steps=total // batch,
            batch=batch,
            sampler=InOrder(),
            optimiser=Adam(lr=lr * (16 / width) ** 0.5),
            schedule=warmup(0.05, linear()),
            seed=seed,
            device=device,
            progress=False,
        )
        own = fleet.evaluate(
            lambda model, batch, hyper: (byte_loss(model(batch.x), batch.y).double() * batch.again).sum(),
            {},
            member_data={"x": data["x"][items], "y": data["y"][items], "again": again.double()},
            chunk=4,
        )
        held.append(nats_per_byte(fleet, held_out).view(len(repeats), seeds).cpu())
        repeated.append((own.cpu() / again.sum(1)).view(len(repeats), seeds))
        parameters.append(fleet.layout.size)
    return RepeatSweep(
        tuple(widths), tuple(repeats), torch.tensor(parameters), torch.stack(held), torch.stack(repeated)
    )


@typed
def effective_size(
    loss: Float[Tensor, "*shape"], floor: float, scale: float, exponent: float
) -> Float[Tensor, "*shape"]:
    """N_eff = c (L - E)^(-1/a): the parameters of a model that reaches loss L without repetition, L = E + (c / N)^a.

    N_eff / N is how much of a model repetition leaves; ``floor`` E and the losses in nats, ``scale`` c in parameters.
    Source: Hernandez et al. 2022 (the law without floor is theirs; E is added, as small byte models need it). Raises
    ``ValueError`` for a loss that is not above the floor, or a scale or exponent that is not positive.
    """
    require_positive("scale", scale)
    require_positive("exponent", exponent)
    if readable(loss) and not bool((loss > floor).all()):
        raise ValueError(f"loss: expected values above the floor {floor}, got {loss.min().item()}")
    return scale * (loss - floor) ** (-1 / exponent)


@typed
def copy_gain(nats: Float[Tensor, "batch positions"]) -> Float[Tensor, "batch"]:
    """Mean loss of the second copy of a block minus that of the first; negative if the model copies.

    ``nats`` holds the losses of bytes 1 .. 2m - 1 of a block of m bytes written twice. Compared are the same bytes,
    1 .. m - 1 of each copy. Source: Hernandez et al. 2022 (copying a paragraph). Raises ``ValueError`` for an even
    number of positions, or fewer than 3.
    """
    positions = nats.shape[1]
    if positions < 3 or positions % 2 == 0:
        raise ValueError(f"nats: expected 2m - 1 positions for a block of m >= 2 bytes, got {positions}")
    m = (positions + 1) // 2
    return nats[:, m:].mean(1) - nats[:, : m - 1].mean(1)


def copy_test(fleet: Fleet, blocks: Tensor) -> Tensor:
    """:func:`copy_gain` of byte transformers on ``blocks`` ``(n, m)``, each written twice: mean for each member.

    Raises ``ValueError`` for blocks of fewer than 2 bytes.
    """
    if blocks.ndim != 2 or blocks.shape[1] < 2:
        raise ValueError(f"blocks: expected (n, m) with m of at least 2, got {tuple(blocks.shape)}")
    text = torch.cat([blocks, blocks], 1)

    def gain(model: Any, batch: Any, hyper: Any) -> Tensor:
        logits = model(batch.x)
        values = logits.logsumexp(-1) - logits.gather(-1, batch.y[..., None])[..., 0]
        return copy_gain(values).mean()

    return fleet.evaluate(gain, {"x": text[:, :-1], "y": text[:, 1:]}, chunk=4)


@typed
def prefix_matching(attention: Float[Tensor, "*heads length length"]) -> Float[Tensor, "*heads"]:
    """How much each head looks, from the second copy of a block of m bytes, at the byte after the same place before.

    The mean over positions i = m .. 2m - 1 of the attention from i to i - m + 1 (Olsson et al. 2022, "In-context
    Learning and Induction Heads"): 1 for a perfect induction head, mean 1/(i + 1) if attention is uniform. Raises
    ``ValueError`` for an odd length.
    """
    length = attention.shape[-1]
    if length < 2 or length % 2:
        raise ValueError(f"attention: expected an even length (a block twice), got {length}")
    m = length // 2
    return attention.diagonal(1 - m, -2, -1)[..., 1:].mean(-1) if m > 1 else attention[..., 1, 1]


def attention_maps(model: ByteTransformer, x: Tensor) -> Tensor:
    """Attention ``(depth, batch, heads, length, length)`` of one model (``fleet[i]``): rows look at columns."""
    maps: list[Tensor] = []
    with torch.no_grad():
        h = model.embed(x) + model.position.weight[: x.shape[1]]
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block in cast(list[Any], model.blocks):
            parts = block.qkv(block.norm1(h)).view(*x.shape, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
            scores = parts[0] @ parts[1].mT * parts.shape[-1] ** -0.5
            maps.append(scores.masked_fill(future, float("-inf")).softmax(-1))
            h = block(h)
    return torch.stack(maps)


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
    if total > n or total % batch:
        raise ValueError(f"total: expected a multiple of {batch} (batch), at most {n} windows, got {total}")
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
        optimiser=Adam(lr=lr * (16 / width) ** 0.5),
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
def speed_up(
    cost: Float[Tensor, "times"],
    loss: Float[Tensor, "times"],
    new_cost: Float[Tensor, "more"],
    new_loss: Float[Tensor, "more"],
) -> Float[Tensor, ""]:
    """Cost at which the baseline is best, over the cost at which the new run's loss first comes down to that.

    Between points the new curve is a straight line in log cost and log loss. NaN if it never comes down so far; before
    its first point it is taken to be above. Source: Komatsuzaki 2019 (speed-up at equal loss). Raises ``ValueError``
    for costs or losses that are not positive, costs that do not rise, or fewer than 2 points.
    """
    for name, costs, values in (("cost", cost, loss), ("new_cost", new_cost, new_loss)):
        if len(costs) < 2 or len(values) != len(costs):
            raise ValueError(f"{name}: expected at least 2 points, as many as losses, got {len(costs)}, {len(values)}")
        require_positive(name, costs)
        require_positive(name.replace("cost", "loss"), values)
        if readable(costs) and not bool((costs.diff() > 0).all()):
            raise ValueError(f"{name}: expected costs that rise, got {costs.tolist()}")
    best = loss.argmin()
    target, spent = loss[best].log(), cost[best].log()
    times, values = new_cost.log(), new_loss.log()
    there = values[1:] <= target
    share = (values[:-1] - target) / torch.where(there & (values[:-1] > target), values[:-1] - values[1:], 1.0)
    reached = times[:-1] + share.clamp(0, 1) * times.diff()
    first = torch.where(there, reached, float("inf")).amin()
    first = torch.where(values[0] <= target, times[0], first)
    return torch.where(first.isinf(), float("nan"), (spent - first).exp())


def balanced_size(parameters: float, tokens: float, ratio: float = 5.0) -> tuple[float, float]:
    """P' = √(P T / ratio), T' = √(ratio P T): as much compute P T with ``ratio`` tokens for each parameter.

    Source: Komatsuzaki 2019 (about 5 tokens per parameter for one epoch; as a review reports it). Raises
    ``ValueError`` for arguments that are not positive.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens), ("ratio", ratio)):
        require_positive(name, value)
    product = parameters * tokens
    return (product / ratio) ** 0.5, (product * ratio) ** 0.5


def ratio_regret(
    size_scale: float, size_exponent: float, data_scale: float, data_exponent: float, compute: float, ratio: float = 5.0
) -> float:
    """What a fixed ratio T / P costs, in nats: A P^-a + B T^-b at :func:`balanced_size` minus its least at P T = C.

    At the optimum a A P^-a = b B T^-b, so P* = (a A / (b B))^(1/(a + b)) C^(b/(a + b)): the best ratio is the same at
    all C only if a = b, and then it is (B / A)^(1/a). Raises ``ValueError`` for arguments that are not positive.
    """
    a, b = size_exponent, data_exponent
    for name, value in (("size_scale", size_scale), ("size_exponent", a), ("data_scale", data_scale)):
        require_positive(name, value)
    for name, value in (("data_exponent", b), ("compute", compute), ("ratio", ratio)):
        require_positive(name, value)

    def excess(parameters: float) -> float:
        return size_scale * parameters**-a + data_scale * (compute / parameters) ** -b

    best = (a * size_scale / (b * data_scale)) ** (1 / (a + b)) * compute ** (b / (a + b))
    return excess(balanced_size(compute, 1.0, ratio)[0]) - excess(best)
