"""Data that is seen again: exact mixtures, and what repetition costs.

Losses are in nats per byte (see :mod:`toolkit.scaling_laws.corpora`); "tokens" are predicted bytes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from toolkit import random
from toolkit.checks import require_range, typed
from toolkit.fleet import train
from toolkit.fleet.samplers import InOrder
from toolkit.fleet.schedules import linear, warmup
from toolkit.scaling_laws.corpora import ByteMLP, byte_adam, byte_loss, nats_per_byte, plain_loss, require_total

__all__ = [
    "RepeatSweep",
    "mixture_order",
    "repeat_sweep",
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
    for what :func:`mixture_order` refuses. Source: Hernandez et al. 2022, "Scaling Laws and Interpretability of
    Learning from Repeated Data".
    """
    n, context = data["x"].shape
    require_total(total, batch, n)
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
            optimiser=byte_adam(lr, width),
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
