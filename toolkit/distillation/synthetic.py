"""Data-set distillation: a few images on which a fresh net learns what it would learn from all of the data.

Gradients of gradients are taken by plain autograd over functional nets that are batched over members: each iteration
sees several random nets at once. Images are free values: nothing keeps them in [0, 1]. Images whose training follows
that of experts are in :mod:`toolkit.distillation.trajectories`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.fleet import Adam
from toolkit.fleet.arguments import initial_parameters
from toolkit.fleet.devices import one_thread
from toolkit.fleet.members import Build, Layout, fast_forward, fresh, has_fast_path
from toolkit.fleet.store import as_fields

__all__ = [
    "Synthetic",
    "distribution_matching_loss",
    "gradient_matching_loss",
    "match_distributions",
    "match_gradients",
]

Start = Literal["noise", "real", "clusters"]
_START, _NETS, _REAL = range(300, 303)  # what a key's numbers are for
_LLOYD = 10


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Distilled examples, ``per_class`` of each class, in the order of the classes.

    Attributes:
        x: ``(points, ...)`` in the shape of the real examples.
        y: ``(points,)`` class indices.
        snapshots: iteration → images ``(points, ...)`` as they were after so many.
        history: ``(iterations,)`` the loss of each iteration.
        rate: the learning rate that was learnt with the images (trajectory matching only).
    """

    x: Tensor
    y: Tensor
    snapshots: dict[int, Tensor]
    history: Tensor
    rate: float | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The fields ``x`` and ``y``: what :func:`toolkit.fleet.train` reads, so that a net can be trained on this."""
        return {"x": self.x, "y": self.y}


@typed
def gradient_matching_loss(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """Σ_layers Σ_rows (1 - cos(g_real, g_syn)): zero where both gradients point the same way, row by row.

    Each entry is one layer's gradient ``(..., rows, columns)``, a row for each output; the result has the leading
    shape. Rows in which the real gradient is zero count 0 (there the original has the constant 1, to no effect).
    Source: Zhao, Mopuri & Bilen 2021, "Dataset Condensation with Gradient Matching". Raises ``ValueError`` for lists of
    different or no length, or layers of different shapes.
    """
    shapes = [tuple(g.shape) for g in real], [tuple(g.shape) for g in synthetic]
    if shapes[0] != shapes[1] or not real or min(map(len, shapes[0])) < 2:
        raise ValueError(f"synthetic: expected matrices of the shapes of real, {shapes[0]}, got {shapes[1]}")
    total = real[0].new_zeros(())
    for a, b in zip(real, synthetic, strict=True):
        length_a, length_b = (g.square().sum(-1) for g in (a, b))
        floor = torch.finfo(a.dtype).tiny ** 0.5
        cosine = (a * b).sum(-1) * length_a.clamp_min(floor).rsqrt() * length_b.clamp_min(floor).rsqrt()
        total = total + torch.where(length_a > 0, 1 - cosine, torch.zeros_like(cosine)).sum(-1)
    return total


@typed
def distribution_matching_loss(
    real: Float[Tensor, "... classes examples dim"], synthetic: Float[Tensor, "... classes points dim"]
) -> Float[Tensor, "..."]:
    """Σ_classes |mean of the real embeddings - mean of the synthetic ones|².

    Source: Zhao & Bilen 2023, "Dataset Condensation with Distribution Matching". Raises ``ValueError`` for a class
    without examples.
    """
    if real.shape[-2] == 0 or synthetic.shape[-2] == 0:
        raise ValueError("real, synthetic: expected at least one example of each class, got none")
    return (real.mean(-2) - synthetic.mean(-2)).square().sum((-2, -1))


@typed
def match_gradients(
    data: Any,
    build: Build,
    *,
    per_class: int = 1,
    iterations: int = 300,
    nets: int = 4,
    batch: int = 64,
    updates: int = 1,
    net_steps: int = 0,
    net_lr: float = 0.01,
    lr: float = 0.05,
    start: Start = "noise",
    snapshots: Sequence[int] = (),
    seed: int = 0,
) -> Synthetic:
    """Dataset condensation: images whose gradients in random nets are those of real examples, class by class.

    Each iteration takes :func:`gradient_matching_loss` for each class in ``nets`` nets (mean over nets, sum over
    classes; weights only, no biases) and moves the images by Adam. Nets are drawn afresh after ``updates`` iterations;
    between those they take ``net_steps`` steps on the synthetic set (the original: 1 and 1 for one image per class, 10
    and 50 for ten, where the last steps of a net are not used).

    Args:
        data: fields ``x`` and ``y``, with every class from 0 on.
        build: makes one random net (any of :mod:`toolkit.models`).
        batch: real examples of each class in each iteration.
        net_lr: learning rate of the nets on the synthetic set.
        lr: learning rate of the images (several nets and Adam are our choice: the original has one net and SGD).
        start: ``noise`` (standard normal), ``real`` examples or ``clusters`` (class-wise k-means centres).
        snapshots: iterations after which images are kept; 0 is the start.

    Source: Zhao, Mopuri & Bilen 2021, "Dataset Condensation with Gradient Matching". Raises ``ValueError`` for missing
    classes, counts below 1, rates that are not positive, snapshots that are not reached.
    """
    at_least_one(nets=nets, batch=batch, updates=updates)
    require_range("net_steps", net_steps, 0, math.inf)
    require_positive("net_lr", net_lr)
    x, y, classes = labelled(data)
    module, layout = matched_net(build, x, classes)
    state: dict[str, Tensor] = {}

    def weights(flat: Tensor, inputs: Tensor, create_graph: bool) -> list[Tensor]:
        """Each net's gradient for each class: from ``(nets, classes, n, ...)`` to matrices of nets · classes."""
        rows = flat.repeat_interleave(classes, 0).requires_grad_()
        labels = torch.arange(classes, device=x.device).repeat(nets)[:, None].expand(-1, inputs.shape[2])
        values = mean_cross_entropy(outputs(module, layout.views(rows), inputs.flatten(0, 1))[0], labels)
        (gradient,) = torch.autograd.grad(values.sum(), rows, create_graph=create_graph)
        return [g.flatten(2) for g in layout.views(gradient).values() if g.ndim > 2]

    def loss(images: Tensor, iteration: int) -> Tensor:
        if iteration % updates == 0:
            state["flat"] = random_nets(build, layout, seed, iteration, nets, x)
        else:
            inputs = images.detach().expand(nets, *images.shape)
            labels = torch.arange(classes, device=x.device).repeat_interleave(per_class).expand(nets, -1)
            for _ in range(net_steps):
                flat = state["flat"].requires_grad_()
                values = mean_cross_entropy(outputs(module, layout.views(flat), inputs)[0], labels)
                state["flat"] = (flat - net_lr * torch.autograd.grad(values.sum(), flat)[0]).detach()
        chosen = x[draw_classes(y, classes, batch, random.key(seed, _REAL, iteration, device=x.device))]
        own = images.view(classes, per_class, *x.shape[1:])
        real = weights(state["flat"].detach(), chosen.expand(nets, *chosen.shape), False)
        fake = weights(state["flat"].detach(), own.expand(nets, *own.shape), True)
        return gradient_matching_loss(real, fake).sum() / nets

    images, labels = initial_points(x, y, classes, per_class, start, seed)
    return optimise_points(images, labels, loss, iterations, lr, snapshots)


@typed
def match_distributions(
    data: Any,
    build: Build,
    *,
    per_class: int = 1,
    iterations: int = 300,
    nets: int = 4,
    batch: int = 64,
    lr: float = 0.05,
    start: Start = "noise",
    snapshots: Sequence[int] = (),
    seed: int = 0,
) -> Synthetic:
    """Distribution matching: the classes' mean features are the real ones in nets that no one has trained.

    :func:`distribution_matching_loss` of the penultimate features of ``nets`` fresh random nets each iteration (mean
    over nets), Adam on the images. No gradient of a gradient is needed. Arguments as for :func:`match_gradients`.
    Source: Zhao & Bilen 2023, "Dataset Condensation with Distribution Matching" (there one net, SGD and 256 real
    examples). Raises ``ValueError`` as :func:`match_gradients`.
    """
    at_least_one(nets=nets, batch=batch)
    x, y, classes = labelled(data)
    module, layout = matched_net(build, x, classes)

    def loss(images: Tensor, iteration: int) -> Tensor:
        views = layout.views(random_nets(build, layout, seed, iteration, nets, x))
        chosen = x[draw_classes(y, classes, batch, random.key(seed, _REAL, iteration, device=x.device)).flatten()]
        with torch.no_grad():
            real = outputs(module, views, chosen.expand(nets, *chosen.shape))[1]
        fake = outputs(module, views, images.expand(nets, *images.shape))[1]
        shape = (nets, classes, -1, real.shape[-1])
        return distribution_matching_loss(real.reshape(shape), fake.reshape(shape)).mean()

    images, labels = initial_points(x, y, classes, per_class, start, seed)
    return optimise_points(images, labels, loss, iterations, lr, snapshots)


def outputs(module: nn.Module, views: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of nets with parameters ``views`` for their own inputs ``(nets, batch, ...)``."""
    if has_fast_path(module, x[0], next(iter(views.values())).dtype):
        values = fast_forward(views, x)
        return values["logits"], values["features"]

    def one(parameters: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(module, parameters, (inputs,), {"return_features": True})

    return torch.vmap(one)(views, x)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Each net's mean over its examples: ``(nets, batch, classes)`` and ``(nets, batch)`` to ``(nets,)``."""
    return -logits.log_softmax(-1).gather(2, labels[..., None])[..., 0].mean(1)


def at_least_one(**counts: int) -> None:
    """Raise ``ValueError`` for a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def labelled(data: Any) -> tuple[Tensor, Tensor, int]:
    """Images, labels and the number of classes, each of which must be there."""
    fields = as_fields(data)
    if missing := sorted({"x", "y"} - set(fields)):
        raise ValueError(f"data: expected fields x and y, got none named {missing[0]!r}")
    x, y = fields["x"], fields["y"]
    if not bool(x.isfinite().all()):
        raise ValueError("data: expected finite values of x, got others")
    classes = int(y.max()) + 1
    require_labels("y", y, classes)
    if len(found := y.unique()) < max(classes, 2):
        raise ValueError(f"data: expected at least two classes without gaps from 0 on, got labels {found.tolist()}")
    return x, y, classes


def matched_net(build: Build, x: Tensor, classes: int) -> tuple[nn.Module, Layout]:
    """A net on the device of ``x``, which must have a logit for each class, and its layout."""
    module = fresh(build).to(x.device)
    with torch.no_grad():
        got = module(x[:1]).shape[-1]
    if got < classes:
        raise ValueError(f"build: expected a net with {classes} logits or more, got {got}")
    return module, Layout.of(module)


def random_nets(build: Build, layout: Layout, seed: int, iteration: int, nets: int, x: Tensor) -> Tensor:
    """Nets ``(nets, size)`` that no other iteration sees."""
    return initial_parameters(build, layout, int(random.key(seed, _NETS, iteration)), torch.arange(nets), x.device)


def draw_classes(y: Tensor, classes: int, count: int, key: Tensor) -> Tensor:
    """Indices ``(classes, count)`` of random examples of each class, with replacement."""
    order, counts = y.argsort(stable=True), torch.bincount(y, minlength=classes)[:, None]
    slots = (random.uniform(key, (classes, count), torch.float64) * counts).long()
    return order[(counts.cumsum(0) - counts) + slots]


def initial_points(
    x: Tensor, y: Tensor, classes: int, per_class: int, start: Start, seed: int
) -> tuple[Tensor, Tensor]:
    """Images ``(classes · per_class, ...)`` and their labels."""
    at_least_one(per_class=per_class)
    key = random.key(seed, _START, device=x.device)
    labels = torch.arange(classes, device=x.device).repeat_interleave(per_class)
    if start == "noise":
        return random.normal(key, (len(labels), *x.shape[1:]), x.dtype), labels
    if (least := int(torch.bincount(y).min())) < per_class:
        raise ValueError(f"per_class: expected at most {least}, the examples of the smallest class, got {per_class}")
    images = []
    for label in range(classes):
        own = x[y == label]
        centres = own[random.permutation(random.fold_in(key, label), len(own))[:per_class]]
        for _ in range(_LLOYD if start == "clusters" else 0):
            nearest = torch.cdist(own.flatten(1), centres.flatten(1)).argmin(1)
            share = F.one_hot(nearest, per_class).to(x.dtype).T
            sums = (share @ own.flatten(1)).view_as(centres)
            size = share.sum(1).view(-1, *[1] * (x.ndim - 1))
            centres = torch.where(size > 0, sums / size.clamp_min(1), centres)
        images.append(centres)
    return torch.cat(images), labels


def optimise_points(
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    iterations: int,
    lr: float,
    snapshots: Sequence[int],
    others: Mapping[Tensor, float] | None = None,
) -> Synthetic:
    """Adam on the images, which ``loss(images, iteration)`` judges, and on ``others``, each with its own rate."""
    at_least_one(iterations=iterations)
    require_positive("lr", lr)
    if outside := sorted(moment for moment in snapshots if not 0 <= moment <= iterations):
        raise ValueError(f"snapshots: expected iterations from 0 to {iterations}, got {outside}")
    images = images.detach().clone().requires_grad_()
    rated = {images: lr, **(others or {})}
    free, rates = list(rated), [torch.as_tensor(rate).to(images) for rate in rated.values()]
    states = [Adam().initial(parameter.detach()) for parameter in free]
    kept, history = {0: images.detach().clone()}, []
    with one_thread():
        for iteration in range(iterations):
            value = loss(images, iteration)
            gradients = torch.autograd.grad(value, free)
            for parameter, gradient, state, rate in zip(free, gradients, states, rates, strict=True):
                Adam().apply(parameter.detach(), gradient, state, rate, None, iteration)
            history.append(value.detach())
            kept |= {iteration + 1: images.detach().clone()} if iteration + 1 in snapshots else {}
    kept = {moment: kept[moment] for moment in sorted(set(snapshots))}
    return Synthetic(images.detach(), labels, kept, torch.stack(history))
