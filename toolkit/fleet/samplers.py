"""Samplers: which examples each member sees at each step, computed from keys alone.

A sampler's plan for steps ``first .. last - 1`` is a tensor of example indices ``(steps, members, batch)``. It depends
on each member's key and subset, never on the other members or on how the steps are cut into blocks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toolkit.random import fold_in, shuffled_slots

_BLOCK_ELEMENTS = 4_000_000


class Sampler(Protocol):
    """What the training loop needs of a sampler."""

    def size(self, batch: int) -> int: ...
    def check(self, labels: Tensor | None, subsets: Tensor | None, examples: int) -> None: ...
    def block(self, members: int, examples: int, batch: int) -> int: ...
    def plan(
        self,
        keys: Tensor,
        first: int,
        last: int,
        batch: int,
        examples: int,
        labels: Tensor | None,
        subsets: Tensor | None,
    ) -> Tensor: ...


def subset_table(subsets: Tensor) -> tuple[Tensor, Tensor]:
    """From a mask ``(members, n)``: the subset's indices, padded to the longest, and their counts ``(members,)``."""
    counts = subsets.sum(1)
    order = torch.argsort(~subsets, dim=1, stable=True)
    return order[:, : int(counts.max())], counts


@dataclass(frozen=True)
class Uniform:
    """Without replacement: each member walks through a fresh permutation of its examples each epoch.

    Batches always have full size; one that reaches the end of an epoch goes on in the next one.
    """

    def size(self, batch: int) -> int:
        return batch

    def check(self, labels: Tensor | None, subsets: Tensor | None, examples: int) -> None:
        pass

    def block(self, members: int, examples: int, batch: int) -> int:
        epochs = max(1, min(8, _BLOCK_ELEMENTS // max(1, members * examples)))
        return max(1, epochs * examples // batch)

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
        draws = torch.arange(first * batch, last * batch, device=keys.device)
        if subsets is None:
            index = self._walk(keys, draws, torch.full_like(keys, examples))
        else:
            table, counts = subset_table(subsets)
            index = table.new_empty(len(keys), len(draws))
            scale = torch.frexp(counts.double()).exponent
            for like in scale.unique():  # members of like size together: a small subset is walked through many times
                rows = (scale == like).nonzero()[:, 0]
                index[rows] = table[rows].gather(1, self._walk(keys[rows], draws, counts[rows]))
        return index.view(len(keys), last - first, batch).transpose(0, 1).contiguous()

    def _walk(self, keys: Tensor, draws: Tensor, counts: Tensor) -> Tensor:
        """Slots ``(members, draws)``: draw d is entry d mod count of the permutation of epoch d // count."""
        size, epoch = int(counts.max()), draws[0] // counts
        epochs = int((draws[-1] // counts - epoch).max()) + 1
        epoch_keys = fold_in(keys[:, None], epoch[:, None] + torch.arange(epochs, device=keys.device))
        slots = shuffled_slots(epoch_keys, size, counts[:, None].expand_as(epoch_keys))
        draw = draws - (epoch * counts)[:, None]
        return slots.flatten(1).gather(1, draw // counts[:, None] * size + draw % counts[:, None])


@dataclass(frozen=True)
class InOrder(Uniform):
    """Without chance: each member takes its examples in their order, and from the first again at the end."""

    def _walk(self, keys: Tensor, draws: Tensor, counts: Tensor) -> Tensor:
        return draws % counts[:, None]


@dataclass(frozen=True)
class ClassBalanced:
    """P×K batches: ``classes`` different classes per step and ``per_class`` examples of each, grouped by class.

    Both are drawn without replacement; a class with fewer than ``per_class`` examples repeats them in turn.
    The batch size is classes·per_class.
    """

    classes: int
    per_class: int

    def __post_init__(self) -> None:
        for name, value in (("classes", self.classes), ("per_class", self.per_class)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def size(self, batch: int) -> int:
        return self.classes * self.per_class

    def check(self, labels: Tensor | None, subsets: Tensor | None, examples: int) -> None:
        if labels is None:
            raise ValueError("data: expected a field 'y' with class labels for class-balanced batches, got none")
        for mask in [None] if subsets is None else subsets.unique(dim=0):
            found = len((labels if mask is None else labels[mask]).unique())
            if found < self.classes:
                raise ValueError(f"sampler: expected at least {self.classes} classes to draw from, got {found}")

    def block(self, members: int, examples: int, batch: int) -> int:
        return max(1, min(64, _BLOCK_ELEMENTS // max(1, members * examples)))

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
        assert labels is not None
        names, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
        width = int(counts.max())
        order = torch.argsort(inverse, stable=True)
        starts = counts.cumsum(0) - counts
        column = torch.arange(width, device=keys.device)
        table = order[(starts[:, None] + column).clamp_max(examples - 1)]
        filled = column < counts[:, None]
        keep = filled[None] if subsets is None else filled & subsets[:, table]
        # rows of a class with its usable examples first
        table = table.expand(len(keep), -1, -1).gather(2, torch.argsort(~keep, dim=2, stable=True))
        usable = keep.sum(2)
        ranked = torch.argsort((usable == 0).long(), dim=1, stable=True)
        available = (usable > 0).sum(1)

        steps = torch.arange(first, last, device=keys.device)
        step_keys = fold_in(keys[:, None], steps)
        slots = shuffled_slots(step_keys, len(names), available[:, None].expand_as(step_keys))[..., : self.classes]
        rows = torch.arange(len(keep), device=keys.device).expand(len(keys))
        chosen = ranked[rows[:, None, None], slots]
        count = usable[rows[:, None, None], chosen]
        class_keys = fold_in(step_keys[..., None], chosen + 1)
        inside = shuffled_slots(class_keys, width, count)
        turn = torch.arange(self.per_class, device=keys.device) % count[..., None]
        index = table[rows[:, None, None, None], chosen[..., None], inside.gather(-1, turn)]
        return index.flatten(2).transpose(0, 1).contiguous()
