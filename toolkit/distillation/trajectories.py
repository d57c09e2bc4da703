"""Distilled images on which a few steps of training follow the path of experts that saw all of the data.

The experts' weights are snapshots of a fleet; students are batched over experts, and their losses differentiated
through all of their steps.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.distillation.synthetic import (
    Start,
    Synthetic,
    at_least_one,
    initial_points,
    labelled,
    matched_net,
    mean_cross_entropy,
    optimise_points,
    outputs,
)
from toolkit.fleet import SGD, Fleet, train
from toolkit.fleet.members import Build, fresh
from toolkit.fleet.store import as_fields
from toolkit.models import MLP

__all__ = ["expert_trajectories", "match_trajectories", "trajectory_loss"]

_MOMENT, _PERTURB = range(303, 305)  # what a key's numbers are for; those before are the other matching's


@typed
def trajectory_loss(
    end: Float[Tensor, "... size"], target: Float[Tensor, "... size"], start: Float[Tensor, "... size"]
) -> Float[Tensor, "..."]:
    """|end - target|² / |start - target|²: 0 at the expert's later weights, 1 where the student has not moved.

    Source: Cazenave et al. 2022, "Dataset Distillation by Matching Training Trajectories". Raises ``ValueError`` where
    the expert itself does not move (if values can be read).
    """
    way = (start - target).square().sum(-1)
    if readable(way) and not bool((way > 0).all()):
        raise ValueError("target: expected an expert that moves, got the weights it started from")
    return (end - target).square().sum(-1) / way


@typed
def expert_trajectories(
    build: Build,
    data: Any,
    *,
    members: int = 8,
    epochs: int = 10,
    smooth: bool = False,
    penalty: float = 2.0,
    lr: float = 0.05,
    batch: int = 64,
    seed: int = 0,
    **options: Any,
) -> Fleet:
    """Nets trained on real data, a snapshot of the weights after each epoch and before the first.

    Plain experts: cross-entropy and SGD. ``smooth`` ones: momentum 0.9, weight decay 1e-3, the loss multiplied by 0.5,
    0.55, ..., 0.95 in the first ten epochs, rate × 0.6 from the middle on, and a penalty ``penalty`` · (s - 1)² on the
    length s of the gradient of the sum of the logits in the input (a reading: of d out/d x), for which the net must be
    an ``MLP``. ``options`` are of :func:`toolkit.fleet.train`. Choose ``lr`` for each kind: momentum 0.9 makes steps
    ten times as long. Source: Shen, Yang & Wang 2023, "Effective Dataset Distillation through Alignment with Smooth and
    High-Quality Expert Trajectories". Raises ``ValueError`` for counts below 1, a negative penalty, or another net.
    """
    at_least_one(members=members, epochs=epochs)
    require_range("penalty", penalty, 0, math.inf)
    if smooth and not isinstance(fresh(build), MLP):
        raise ValueError("build: expected an MLP for smooth experts, got another net")
    per_epoch = math.ceil(len(as_fields(data)["x"]) / batch)

    def loss(model: Any, fields: Any, hyper: Any) -> Tensor:
        values = F.cross_entropy(model(fields.x), fields.y, reduction="none")
        if not smooth:
            return values
        values = values * (0.5 + 0.05 * (fields.progress * epochs).floor()).clamp_max(1)
        return values + penalty * (input_gradient(model.parameters, fields.x).norm(dim=-1) - 1).square()

    optimiser = SGD(lr, momentum=0.9, weight_decay=1e-3) if smooth else SGD(lr)
    steps = per_epoch * epochs
    given: dict[str, Any] = {"schedule": lambda t: torch.where(t < 0.5, 1.0, 0.6)} if smooth else {}
    given |= {"progress": False, "optimiser": optimiser, "snapshots": range(0, steps + 1, per_epoch)} | options
    return train(build, loss, data, members=members, steps=steps, batch=batch, seed=seed, **given)


def input_gradient(parameters: Any, x: Tensor) -> Tensor:
    """∂(Σ logits)/∂x of an MLP ``(batch, inputs)``, layer by layer: a fleet's loss cannot call autograd."""
    h, masks = x.flatten(1), []
    for i in range(sum(name.endswith(".weight") for name in parameters) - 1):
        before = h @ parameters[f"layers.{i}.weight"].mT + parameters[f"layers.{i}.bias"]
        masks.append((before > 0).to(h.dtype))
        h = before.relu()
    slope = parameters["head.weight"].sum(0).expand(len(x), -1)
    for i in reversed(range(len(masks))):
        slope = (slope * masks[i]) @ parameters[f"layers.{i}.weight"]
    return slope


@typed
def match_trajectories(
    data: Any,
    experts: Fleet,
    *,
    per_class: int = 1,
    iterations: int = 200,
    steps: int = 10,
    span: int = 1,
    latest: int | None = None,
    nets: int = 4,
    lr: float = 0.03,
    rate: float = 0.1,
    rate_lr: float = 0.01,
    momentum: float = 0.0,
    perturb: float = 0.0,
    intermediate: float = 0.0,
    balance: bool = False,
    start: Start = "real",
    snapshots: Sequence[int] = (),
    seed: int = 0,
) -> Synthetic:
    """Images on which ``steps`` steps of training end where an expert ends after ``span`` snapshots of real data.

    Each iteration takes ``nets`` experts, each at one of its snapshots 0 .. ``latest`` at random; students start there
    and take ``steps`` gradient steps on all images. :func:`trajectory_loss` (mean over nets) is differentiated through
    all steps, to the images and the logarithm of the students' learning rate (first ``rate``).

    For smooth experts: students with ``momentum``, start weights θ + ``perturb`` · d · θ with d ~ N(0, 1)/|d|,
    ``intermediate`` times the loss of each snapshot on the way, reached after an equal share of the steps, and with
    ``balance`` the students' loss times (late) or divided by (early) log₅(8 + \\|t - t_max/2\\|).

    Args:
        data: fields ``x`` and ``y``: only for the start of the images.
        experts: with snapshots, as :func:`expert_trajectories` trains them.
        lr, rate_lr: learning rates (Adam) of the images and of the logarithm of the rate.

    Source: Cazenave et al. 2022, "Dataset Distillation by Matching Training Trajectories"; Shen, Yang & Wang 2023,
    "Effective Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories" (how the loss is
    balanced is a reading). Raises ``ValueError`` for experts without so many snapshots, and as :func:`match_gradients`.
    """
    at_least_one(nets=nets, steps=steps, span=span)
    for name, value in {"perturb": perturb, "intermediate": intermediate}.items():
        require_range(name, value, 0, math.inf)
    require_range("momentum", momentum, 0, 1)
    for name, value in {"rate": rate, "rate_lr": rate_lr}.items():
        require_positive(name, value)
    x, y, classes = labelled(data)
    module, layout = matched_net(experts.build, x, classes)
    path = [experts.snapshots[step].to(x.device) for step in sorted(experts.snapshots)]
    latest = len(path) - 1 - span if latest is None else latest
    if not 0 <= latest < len(path) - span:
        raise ValueError(f"latest: expected a snapshot from 0 to {len(path) - 1 - span}, got {latest}")
    if intermediate and steps % span:
        raise ValueError(f"steps: expected a multiple of span {span} with intermediate losses, got {steps}")
    table = torch.stack(path)
    if not bool(table.isfinite().all()):
        raise ValueError("experts: expected finite weights, got others")
    log_rate = torch.tensor(math.log(rate), dtype=x.dtype, device=x.device, requires_grad=True)
    images, labels = initial_points(x, y, classes, per_class, start, seed)

    def loss(images: Tensor, iteration: int) -> Tensor:
        u = random.uniform(random.key(seed, _MOMENT, iteration, device=x.device), (2, nets))
        who, when = (u[0] * len(experts)).long(), (u[1] * (latest + 1)).long()
        begin = table[when, who]
        flat, velocity = begin, torch.zeros_like(begin)
        if perturb:
            d = random.normal(random.key(seed, _PERTURB, iteration, device=x.device), tuple(begin.shape), x.dtype)
            flat = begin * (1 + perturb * d / d.norm(dim=1, keepdim=True))
        flat = flat.detach().requires_grad_()
        scale = x.new_ones(nets)
        if balance:
            scale = (8 + (when - latest / 2).abs()).log() / math.log(5)
            scale = torch.where(when > latest / 2, scale, 1 / scale).to(x.dtype)
        inputs, targets, total = images.expand(nets, *images.shape), labels.expand(nets, -1), x.new_zeros(())
        for step in range(1, steps + 1):
            values = mean_cross_entropy(outputs(module, layout.views(flat), inputs)[0], targets) * scale
            (gradient,) = torch.autograd.grad(values.sum(), flat, create_graph=True)
            velocity = momentum * velocity + gradient
            flat = flat - log_rate.exp() * velocity
            if intermediate and step < steps and step * span % steps == 0:
                passed = table[when + step * span // steps, who]
                total = total + intermediate * trajectory_loss(flat, passed, begin).mean()
        return total + trajectory_loss(flat, table[when + span, who], begin).mean()

    result = optimise_points(images, labels, loss, iterations, lr, snapshots, {log_rate: rate_lr})
    return Synthetic(result.x, result.y, result.snapshots, result.history, float(log_rate.detach().exp()))
