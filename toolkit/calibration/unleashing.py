"""When in training does a net detect unknowns best, and can a trained net be brought back there?

A net that goes on until it has memorised its atypical examples detects unseen classes worse than it did half-way.
Unleashing Mask estimates how far to go back from the loss that a *randomly pruned* copy has on the training set, and
then trains towards that loss: the net's weights (UM), or a mask over its frozen weights (UMAP).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from toolkit import random
from toolkit.calibration.losses import cross_entropy
from toolkit.calibration.novelty import energy_score
from toolkit.calibration.selective import auroc
from toolkit.checks import require_range, typed
from toolkit.data import digits, label_noise, splits
from toolkit.fleet import SGD, Adam, Fleet, cosine, each, train
from toolkit.fleet.members import fresh
from toolkit.models import MLP

__all__ = [
    "UnleashStudy",
    "estimated_constraint",
    "flooding",
    "mask_weights",
    "random_scores",
    "subnet_mask",
    "unleash",
    "unleash_by_mask",
    "unleashing_study",
]

Scalar = float | int | Float[Tensor, ""]


@typed
def flooding(values: Float[Tensor, "batch"], constraint: Scalar) -> Float[Tensor, "batch"]:
    """|l - g| + g for every example, l the batch's mean of ``values`` and g = ``constraint`` (nats).

    Above g the gradient is that of l, below it its opposite: the loss is kept near g, and never below it. The paper
    uses the mean over the batch; |l_i - g| + g example by example is a different loss, whose mean is larger (Jensen).
    Source: Ishida et al. 2020, "Do We Need Zero Training Loss After Achieving Zero Training Error?"; as fine-tuning
    towards an estimated g: Zhu et al. 2023, "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection
    Capability".
    """
    return ((values.mean() - constraint).abs() + constraint).expand(len(values))


@typed
def subnet_mask(scores: Float[Tensor, "*shape"], keep: float) -> Float[Tensor, "*shape"]:
    """1 at the entries of one layer whose |score| is largest, a share ``keep`` of them; 0 at the others.

    Of n entries floor((1 - keep) n) are zeroed, of equal ones the first. ``keep`` is the share that *stays*: the public
    code calls it ``prune_rate``. Straight-through gradient: as if the mask were |score|. Source: Ramanujan et al.
    2020, "What's Hidden in a Randomly Weighted Neural Network?" (edge-popup), as in Zhu et al. 2023, "Unleashing Mask".
    Raises ``ValueError`` for a share outside [0, 1].
    """
    require_range("keep", keep, 0, 1)
    size = scores.detach().abs()
    dropped = math.floor((1 - keep) * scores.numel() + 1e-6)
    order = size.flatten().argsort(stable=True)
    kept = (torch.arange(scores.numel(), device=scores.device) >= dropped).to(scores.dtype)
    mask = torch.zeros_like(size.flatten()).scatter(0, order, kept).reshape(size.shape)
    return mask + (scores.abs() - size)


@typed
def random_scores(fleet: Fleet, seed: int = 0) -> Float[Tensor, "members size"]:
    """A fresh score in (0, 1) for each parameter of each member, from the ``seed`` and the member's stream.

    With them :func:`mask_weights` keeps a random subset of each layer; any continuous distribution gives the same
    subsets (the public code draws Kaiming-uniform scores).
    """
    keys = random.fold_in(random.key(seed, device=fleet.device), fleet.streams)
    return random.uniform(keys, (fleet.layout.size,), torch.float64).to(fleet.parameters.dtype)


@typed
def mask_weights(fleet: Fleet, scores: Float[Tensor, "members size"], keep: float) -> Fleet:
    """The fleet with each weight matrix (not the biases) of each member multiplied by its :func:`subnet_mask`.

    ``scores`` has one score per parameter, in the layout of ``fleet.parameters``. Raises ``ValueError`` for another
    shape or a share outside [0, 1]. The result has no snapshots and no optimiser state. Source: Zhu et al. 2023,
    "Unleashing Mask".
    """
    if scores.shape != fleet.parameters.shape:
        expected, got = tuple(fleet.parameters.shape), tuple(scores.shape)
        raise ValueError(f"scores: expected one per parameter of each member {expected}, got {got}")

    def masked(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([value.flatten() for value in _masked(weights, own, keep).values()])

    with torch.no_grad():
        views = fleet.layout.views(fleet.parameters), fleet.layout.views(scores.to(fleet.device))
        parameters = torch.vmap(masked)(*views)
    return replace(fleet, parameters=parameters, snapshots={}, state={}, memory={})


def _masked(weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    return {n: v * subnet_mask(scores[n], keep) if v.ndim > 1 else v for n, v in weights.items()}


def _training_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    return cross_entropy(model(batch.x), batch.y)


def _training_ce(fleet: Fleet, data: Mapping[str, Tensor], member_data: Mapping[str, Tensor] | None) -> Tensor:
    return fleet.evaluate(_training_loss, data, member_data=member_data).mean(1)


def estimated_constraint(
    fleet: Fleet,
    data: Mapping[str, Tensor],
    keep: float = 0.965,
    *,
    member_data: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Float[Tensor, "members"]:
    """g of each member: its mean training cross-entropy (nats) once a random share 1 - ``keep`` of each layer is zero.

    ``data`` has ``x`` and ``y``, ``member_data`` what differs between members. With ``keep`` = 1 it is the training
    loss itself. What a random mask takes away first is what was memorised: this is the paper's argument. Raises
    ``ValueError`` for a share outside [0, 1]. Source: Zhu et al. 2023, "Unleashing Mask: Explore the Intrinsic
    Out-of-Distribution Detection Capability" (.965 is the public configuration for CIFAR-10).
    """
    return _training_ce(mask_weights(fleet, random_scores(fleet, seed), keep), data, member_data)


def _constraints(fleet: Fleet, constraint: float | Tensor) -> dict[str, Tensor]:
    return {
        "constraint": torch.as_tensor(constraint, dtype=fleet.parameters.dtype, device=fleet.device).expand(len(fleet))
    }


def unleash(
    fleet: Fleet,
    data: Mapping[str, Tensor],
    constraint: float | Tensor,
    *,
    steps: int = 80,
    batch: int = 256,
    lr: float = 0.4,
    member_data: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Fleet:
    """UM: fine-tune all weights of each member towards its ``constraint`` with the loss of :func:`flooding`.

    SGD with momentum .9, weight decay 1e-4 and a cosine schedule, from the members' present weights. ``constraint``
    is one number or one per member (see :func:`estimated_constraint`). Source: Zhu et al. 2023, "Unleashing Mask:
    Explore the Intrinsic Out-of-Distribution Detection Capability" (there lr .1, 100 epochs of batches of 256).
    """

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        return flooding(cross_entropy(model(batch.x), batch.y), hyper.constraint)

    return _fine_tune(
        fleet, loss, data, _constraints(fleet, constraint), steps, batch, lr, member_data, seed, start=fleet
    )


def unleash_by_mask(
    fleet: Fleet,
    data: Mapping[str, Tensor],
    constraint: float | Tensor,
    keep: float = 0.8,
    *,
    steps: int = 80,
    batch: int = 256,
    lr: float = 1.0,
    member_data: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Fleet:
    """UMAP: the weights stay, a mask over each layer that keeps a share ``keep`` of it is trained instead.

    Scores start at random (Kaiming-uniform, as an untrained layer) and are trained through :func:`subnet_mask` with the
    same loss and optimiser as :func:`unleash`. Returns the scores as a fleet of the same architecture: the detector is
    ``mask_weights(fleet, scores.parameters, keep)``, the classifier is still ``fleet``. Source: Zhu et al. 2023,
    "Unleashing Mask" (keeps .8). Raises ``ValueError`` for a share outside [0, 1].
    """
    require_range("keep", keep, 0, 1)
    module = fresh(fleet.build).to(fleet.device)

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        weights = _masked(batch.trained.parameters, model.parameters, keep)
        return flooding(cross_entropy(functional_call(module, weights, (batch.x,)), batch.y), hyper.constraint)

    return _fine_tune(
        fleet,
        loss,
        data,
        _constraints(fleet, constraint),
        steps,
        batch,
        lr,
        member_data,
        seed,
        references={"trained": replace(fleet, snapshots={}, state={}, memory={})},
    )


def _fine_tune(fleet, loss, data, hyper, steps, batch, lr, member_data, seed, **options) -> Fleet:
    return train(
        fleet.build,
        loss,
        data,
        steps=steps,
        batch=batch,
        optimiser=SGD(lr=lr, momentum=0.9, weight_decay=1e-4),
        schedule=cosine(),
        hyper=hyper,
        streams=fleet.streams,
        seed=seed,
        member_data=member_data,
        device=fleet.device,
        progress=False,
        **options,
    )


class UnleashStudy(NamedTuple):
    """AUROC of the energy for unseen classes, accuracy on seen ones, training loss (nats), at each stage and after.

    ``methods`` names the rows of the last two: the final model, plain fine-tuning, UM, and UMAP.
    """

    steps: tuple[int, ...]
    auroc: Float[Tensor, "steps seeds"]
    accuracy: Float[Tensor, "steps seeds"]
    training_loss: Float[Tensor, "steps seeds"]
    constraint: Float[Tensor, "seeds"]
    methods: tuple[str, ...]
    method_auroc: Float[Tensor, "methods seeds"]
    method_accuracy: Float[Tensor, "methods seeds"]


def unleashing_study(
    *,
    known: int = 6,
    atypical: float = 0.1,
    examples: int = 500,
    seeds: int = 3,
    steps: int = 250,
    hidden: tuple[int, ...] = (128,),
    keep: float = 0.8,
    umap_keep: float = 0.5,
    fine_tune_steps: int = 60,
    seed: int = 0,
) -> UnleashStudy:
    """Follow the detection of unseen digits through training with wrong labels, then unleash the final model.

    Nets learn the first ``known`` digits from ``examples`` images of which a share ``atypical`` is mislabelled, anew
    for each seed, until they have all but memorised them; the other digits are the unknowns. The final model is then
    fine-tuned with g = 0 (plain cross-entropy, the control with the same optimiser), with the estimated g (UM), and
    through a mask (UMAP); ``keep`` is the share kept for the estimate, ``umap_keep`` that of UMAP.
    Source: Zhu et al. 2023, "Unleashing Mask" (there images of CIFAR-10 and a large net; sizes and rates are ours).
    """
    everything = digits()
    seen = splits(everything.subset(everything.y < known), seed, (0.6, 0.0, 0.4))
    x, y = seen.train.x[:examples].flatten(1), seen.train.y[:examples]
    noisy = torch.stack([label_noise(y, atypical, known, random.key(seed, 1, i)) for i in range(seeds)])
    data, own = {"x": x, "y": y}, {"y": noisy}
    stages = sorted({max(1, round(steps ** (i / 11))) for i in range(3, 12)})
    fleet = train(
        lambda: MLP(x.shape[1], hidden, known),
        _training_loss,
        data,
        member_data=own,
        members=seeds,
        steps=steps,
        optimiser=Adam(lr=0.01),
        snapshots=stages,
        seed=seed,
        device="cpu",
        progress=False,
    )
    inputs = torch.cat([seen.test.x, everything.x[everything.y >= known]]).flatten(1)
    unknown = torch.arange(len(inputs)) >= len(seen.test)

    def measured(part: Fleet) -> tuple[Tensor, Tensor]:
        logits = part.logits(inputs)
        right = logits[:, ~unknown].argmax(-1) == seen.test.y
        return each(lambda z: auroc(energy_score(z), unknown), logits), right.float().mean(1)

    through = [(*measured(part), _training_ce(part, data, own)) for part in map(fleet.at, stages)]
    constraint = estimated_constraint(fleet, data, keep, member_data=own, seed=seed)
    twice = fleet[list(range(seeds)) * 2]
    targets = torch.cat([torch.zeros_like(constraint), constraint])
    tuned = unleash(twice, data, targets, steps=fine_tune_steps, member_data={"y": noisy.repeat(2, 1)}, seed=seed)
    scores = unleash_by_mask(fleet, data, constraint, umap_keep, steps=fine_tune_steps, member_data=own, seed=seed)
    after = [fleet, tuned[:seeds], tuned[seeds:], mask_weights(fleet, scores.parameters, umap_keep)]
    areas, accuracies = zip(*map(measured, after), strict=True)
    area, accuracy, loss = (torch.stack(values) for values in zip(*through, strict=True))
    methods = ("final", "plain", "UM", "UMAP")
    return UnleashStudy(
        tuple(stages), area, accuracy, loss, constraint, methods, torch.stack(areas), torch.stack(accuracies)
    )
