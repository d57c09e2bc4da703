"""Mixed inputs in distillation: mixup, CutMix, how much to mix, which mixtures to keep, and what makes them good.

The teacher must see each mixture itself, so that it is run in training: it is a frozen reference of the fleet.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import require_labels, require_positive, require_probabilities, require_range, typed
from toolkit.distillation.logits import Labels, Scalar, divergence, label_mask, standardised_kd
from toolkit.fleet import Fleet, grid, train
from toolkit.fleet.members import Build
from toolkit.fleet.store import as_fields

__all__ = [
    "Mixtures",
    "Scatter",
    "augmentation_scatter",
    "cutmix",
    "entropy_pick",
    "mixed_targets",
    "mixup",
    "rank_correlation",
    "t_stddev",
    "train_augmented",
    "train_mix_kd",
]

Augment = Callable[[Tensor, Tensor], Tensor]


class Mixtures(NamedTuple):
    """Mixed inputs ``x`` (batch, ...), each one's ``partner`` (batch,) and the ``share`` of its own (batch,)."""

    x: Tensor
    partner: Tensor
    share: Tensor


@typed
def mixup(x: Float[Tensor, "batch ..."], key: Int[Tensor, ""], alpha: Scalar = 1.0, mixed: Scalar = 1.0) -> Mixtures:
    """λ_i x_i + (1 - λ_i) x_j with j from a random permutation and λ_i ~ Beta(α, α) for each example.

    Partial mixup: only the share ``mixed`` in [0, 1] of the batch (rounded, chosen at random) is mixed, the others
    have λ = 1. α = ``alpha`` > 0. Depends on ``key`` alone. Raises ``ValueError`` for α ≤ 0 or a share outside [0, 1].

    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"; partial: Choi et al. 2023, "Understanding the Role
    of Mixup in Knowledge Distillation: An Empirical Study" (a tenth is mixed).
    """
    require_positive("alpha", alpha)
    require_range("mixed", mixed, 0, 1)
    count = len(x)
    partner = random.permutation(random.fold_in(key, 0), count)
    share = random.symmetric_beta(random.fold_in(key, 1), count, alpha, x.dtype)
    rank = random.permutation(random.fold_in(key, 2), count)
    chosen = rank < torch.as_tensor(mixed * count).round().to(rank.device)
    share = torch.where(chosen, share, 1)
    part = share.view(-1, *[1] * (x.ndim - 1))
    return Mixtures(part * x + (1 - part) * x[partner], partner, share)


@typed
def cutmix(x: Float[Tensor, "batch channels height width"], key: Int[Tensor, ""], alpha: Scalar = 1.0) -> Mixtures:
    """Each image with a box of another one: λ ~ Beta(α, α), sides √(1 - λ) of the image's, centre anywhere.

    What lies outside the image is cut off; ``share`` is then the share of pixels that are the image's own. Every image
    has a box of its own (the original has one per batch). α = ``alpha`` > 0. Depends on ``key`` alone. Raises
    ``ValueError`` for α ≤ 0. Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features".
    """
    require_positive("alpha", alpha)
    count, _, height, width = x.shape
    partner = random.permutation(random.fold_in(key, 0), count)
    side = (1 - random.symmetric_beta(random.fold_in(key, 1), count, alpha, x.dtype)).sqrt()
    centre = random.uniform(random.fold_in(key, 2), (2, count), x.dtype)
    inside = []
    for size, middle in zip((height, width), centre, strict=True):
        cut, at = (side * size).floor(), (middle * size).floor()
        low = at - (cut / 2).floor()
        places = torch.arange(size, device=x.device)
        inside.append((places >= low[:, None]) & (places < (low + cut)[:, None]))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    share = 1 - box.to(x.dtype).mean((1, 2))
    return Mixtures(torch.where(box[:, None], x[partner], x), partner, share)


@typed
def mixed_targets(labels: Labels, mixtures: Mixtures, classes: int) -> Float[Tensor, "batch classes"]:
    """λ onehot(y_i) + (1 - λ) onehot(y_j): the label of each mixture. Raises ``ValueError`` for labels out of range."""
    require_labels("labels", labels, classes)
    own = label_mask(labels, classes).to(mixtures.x.dtype)
    share = mixtures.share[:, None]
    return share * own + (1 - share) * own[mixtures.partner]


@typed
def entropy_pick(logits: Float[Tensor, "pool classes"], count: int) -> Int[Tensor, "{count}"]:
    """Which ``count`` mixtures of a pool to keep: those of which the net is least sure, by the entropy of softmax.

    With the largest entropy first; constant for gradients. CutMixPick makes a pool of two CutMix batches and keeps as
    many as one of them. Raises ``ValueError`` for a count outside 1 .. pool. Wang et al. 2022, "What Makes a 'Good'
    Data Augmentation in Knowledge Distillation - A Statistical Perspective".
    """
    if not 1 <= count <= len(logits):
        raise ValueError(f"count: expected a number from 1 to {len(logits)}, got {count}")
    log_p = logits.detach().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return entropy.argsort(descending=True, stable=True)[:count]


@typed
def t_stddev(probabilities: Float[Tensor, "blocks batch classes"]) -> Float[Tensor, ""]:
    """How much a teacher's mean probabilities vary from block to block of augmented inputs; low is good.

    u_r = mean over block r of the teacher's probabilities; the result is the mean over classes of the standard
    deviation of u over blocks (with blocks - 1, a reading; ranks do not depend on it). Raises ``ValueError`` for fewer
    than 2 blocks or values that are no probabilities. Wang et al. 2022, "What Makes a 'Good' Data Augmentation in
    Knowledge Distillation - A Statistical Perspective".
    """
    if len(probabilities) < 2:
        raise ValueError(f"probabilities: expected at least 2 blocks, got {len(probabilities)}")
    require_probabilities("probabilities", probabilities)
    return probabilities.mean(1).std(0).mean()


@typed
def rank_correlation(a: Float[Tensor, "points"], b: Float[Tensor, "points"]) -> Float[Tensor, ""]:
    """Spearman's correlation in [-1, 1]: that of the ranks, ties with their mean rank; NaN if one does not vary.

    Raises ``ValueError`` for fewer than 3 points or values that are not finite.
    """
    if len(a) < 3:
        raise ValueError(f"a: expected at least 3 points, got {len(a)}")
    for name, value in (("a", a), ("b", b)):
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got some that are not")
    first, second = (_ranks(value) for value in (a, b))
    return ((first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()).to(a.dtype)


def _ranks(values: Tensor) -> Tensor:
    """Half of (number below - number above): mid-ranks with mean 0."""
    return (values[:, None] - values).sign().sum(1).double() / 2


def _teachers(teacher: Fleet, seeds: int, repeats: int) -> Fleet:
    """One frozen teacher per member: the same for all, or one for each seed."""
    if len(teacher) not in (1, seeds):
        raise ValueError(f"teacher: expected 1 or {seeds} members, one for each seed, got {len(teacher)}")
    return teacher[torch.arange(seeds).remainder(len(teacher)).repeat(repeats)]


@typed
def train_mix_kd(
    build: Build,
    data: Any,
    teacher: Fleet,
    classes: int,
    *,
    mixed: Sequence[float | int],
    seeds: int,
    alpha: float | int = 1.0,
    weight: float | int = 0.9,
    **options: Any,
) -> Fleet:
    """Distillation on mixup, by the share of each batch that is mixed: none (0), partial (0.1), full (1).

    The loss is :func:`toolkit.distillation.logits.standardised_kd` of both nets on the same mixtures, with
    :func:`mixed_targets`. Members are ordered as by ``grid(seeds, mixed=mixed)``. ``teacher`` has one member, or one
    for each seed; it may itself have been trained on mixtures (:func:`train_mix_kd` with ``weight=0``). ``options`` go
    to :func:`toolkit.fleet.train`. Raises ``ValueError`` for a share or weight outside [0, 1], α ≤ 0, labels out of
    range, or another number of teachers. Choi et al. 2023, "Understanding the Role of Mixup in Knowledge Distillation:
    An Empirical Study".
    """
    require_labels("labels", as_fields(data)["y"], classes)
    require_positive("alpha", alpha)
    require_range("weight", weight, 0, 1)
    for share in mixed:
        require_range("mixed", share, 0, 1)

    def loss(model, batch, hyper):
        mixtures = mixup(batch.x, batch.key, alpha, hyper.mixed)
        targets = mixed_targets(batch.y, mixtures, classes)
        return standardised_kd(model(mixtures.x), batch.teacher(mixtures.x), targets, weight=weight)

    references = {"teacher": _teachers(teacher, seeds, len(mixed))}
    return train(build, loss, data, references=references, **grid(seeds, mixed=mixed), **options)


@typed
def train_augmented(
    build: Build,
    data: Any,
    teacher: Fleet,
    augment: Augment,
    *,
    seeds: int,
    pick: Literal["teacher", "student"] | None = None,
    temperature: float | int = 4.0,
    weight: float | int = 0.9,
    **options: Any,
) -> Fleet:
    """Distillation on augmented inputs: (1 - w) CE(labels, p_s(x)) + w T² KL(p_t(x') ‖ p_s(x')) at temperature T.

    ``augment(x, key)`` gives x', as many as x: the labels are those of the originals, the teacher speaks about the
    mixtures. With ``pick`` it is called twice, and of both batches those mixtures are kept of which the teacher, or the
    student, is least sure (:func:`entropy_pick`). Members are ``seeds`` in number; ``teacher`` has one member, or one
    for each. ``options`` go to :func:`toolkit.fleet.train`. Raises ``ValueError`` for T ≤ 0, w outside [0, 1] or
    another number of teachers. Wang et al. 2022, "What Makes a 'Good' Data Augmentation in Knowledge Distillation - A
    Statistical Perspective".
    """
    require_positive("temperature", temperature)
    require_range("weight", weight, 0, 1)

    def loss(model, batch, hyper):
        seen = augment(batch.x, random.fold_in(batch.key, 0))
        if pick is not None:
            seen = torch.cat([seen, augment(batch.x, random.fold_in(batch.key, 1))])
        own, wanted = model(seen), batch.teacher(seen)
        if pick is not None:
            kept = entropy_pick(own if pick == "student" else wanted, len(batch.x))
            own, wanted = own[kept], wanted[kept]
        soft = divergence(wanted / temperature, own / temperature)
        hard = F.cross_entropy(model(batch.x), batch.y, reduction="none")
        return (1 - weight) * hard + weight * temperature**2 * soft

    return train(
        build,
        loss,
        data,
        references={"teacher": _teachers(teacher, seeds, 1)},
        streams=torch.arange(seeds),
        **options,
    )


class Scatter(NamedTuple):
    """``stddev`` (augmentations,), students' test ``losses`` (augmentations, seeds) and ``accuracies`` (same)."""

    stddev: Tensor
    losses: Tensor
    accuracies: Tensor


@typed
def augmentation_scatter(
    build: Build,
    data: Any,
    test: Any,
    teacher: Fleet,
    augments: Mapping[str, Augment],
    *,
    seeds: int,
    blocks: int = 50,
    block: int = 64,
    seed: int = 0,
    **options: Any,
) -> Scatter:
    """T.stddev of each augmentation beside the test loss (cross-entropy in nats) of students trained with it.

    ``blocks`` blocks of ``block`` augmented training inputs each measure :func:`t_stddev`; they are the same examples
    for every augmentation. Students are those of :func:`train_augmented`. ``teacher`` has one member. Raises
    ``ValueError`` for no augmentation, a block larger than the data, or as those functions do. Wang et al. 2022, "What
    Makes a 'Good' Data Augmentation in Knowledge Distillation - A Statistical Perspective" (there a block is ten
    batches of mixtures and originals).
    """
    if not augments:
        raise ValueError("augments: expected at least one, got none")
    if len(teacher) != 1:
        raise ValueError(f"teacher: expected one member, got {len(teacher)}")
    x, held = as_fields(data)["x"], as_fields(test)
    if not 1 <= block <= len(x):
        raise ValueError(f"block: expected a number from 1 to {len(x)}, got {block}")
    start = random.key(seed, 1)
    stddev, losses, accuracies = [], [], []
    for augment in augments.values():
        means = []
        for r in range(blocks):
            key = random.fold_in(start, r)
            chosen = random.permutation(random.fold_in(key, 0), len(x))[:block]
            means.append(teacher.probabilities(augment(x[chosen], random.fold_in(key, 1)))[0])
        stddev.append(t_stddev(torch.stack(means)))
        logits = (
            train_augmented(build, data, teacher, augment, seeds=seeds, seed=seed, **options)
            .logits(held["x"])
            .to(held["y"].device)
        )
        labels = held["y"].expand(len(logits), -1)
        losses.append(F.cross_entropy(logits.mT, labels, reduction="none").mean(-1))
        accuracies.append((logits.argmax(-1) == labels).to(logits.dtype).mean(-1))
    return Scatter(torch.stack(stddev), torch.stack(losses), torch.stack(accuracies))
