"""Adapt, then unlearn: a generator that must stop making one kind of sample, though it was trained without classes.

First copies of the generator are adapted to the unwanted samples: they mark the place in parameter space to keep away
from. Then the original is trained on its other samples and repelled from that place.

Functions take ``samples``, ``(members, n, values)`` that the fleet itself has made (:func:`generate`), and ``forget``,
``(members, n)``, true where a classifier finds a sample unwanted. Distances, penalties and repulsion look at the
generator's parameters; the discriminator is trained along. Exponential averages of the parameters, which the paper
evaluates, are not kept: let the learning rate fall to 0 instead (``schedule=linear()``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.fleet import Fleet
from toolkit.fleet.members import Member, fresh
from toolkit.unlearning.parts import Strength, moved, slopes_of, strengths, train_on, within

__all__ = [
    "GAN",
    "adapt",
    "ewc_penalty",
    "extrapolate",
    "gan_loss",
    "generate",
    "generator_fisher",
    "mode_quality",
    "nearest_mode",
    "parameter_distance",
    "repel",
    "repulsion_loss",
    "ring",
]

Repulsion = Literal["el2", "nl2", "il2"]
_FISHER, _COPY = 104, 105  # what a key's numbers are for


class GAN(nn.Module):
    """Generator and discriminator in one module: leaky ReLU nets (slope 0.2), latent values standard normal.

    ``model(z)`` gives samples ``(batch, values)`` for z ``(batch, latent)``; ``model(x, judge=True)`` gives the
    discriminator's logits ``(batch,)``, large for real; with ``frozen=True`` no gradient reaches its parameters, and
    ``slopes=True`` gives ``(logits, gradients by x)``.
    """

    def __init__(self, values: int = 2, latent: int = 2, width: int = 64, depth: int = 2):
        super().__init__()
        for name, number in (("values", values), ("latent", latent), ("width", width), ("depth", depth)):
            require_positive(name, number)
        inner = [width] * depth
        self.latent, self.values = latent, values
        self.generator = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([latent, *inner, values]))
        self.discriminator = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([values, *inner, 1]))

    def forward(self, x: Tensor, judge: bool = False, frozen: bool = False, slopes: bool = False):
        layers: list[Any] = list(self.discriminator if judge else self.generator)
        weights = [(p.weight.detach(), p.bias.detach()) if frozen else (p.weight, p.bias) for p in layers]
        factors = []
        for i, (weight, bias) in enumerate(weights):
            x = F.linear(x, weight, bias)
            if i < len(weights) - 1:
                factors.append(torch.where(x > 0, 1.0, 0.2).to(x.dtype))
                x = x * factors[-1]
        if not judge:
            return x
        if not slopes:
            return x[:, 0]
        back = weights[-1][0].expand(len(x), -1)
        for factor, (weight, _) in zip(reversed(factors), reversed(weights[:-1]), strict=True):
            back = (back * factor) @ weight
        return x[:, 0], back


def gan_loss(latent: int = 2, r1: float = 0.1) -> Callable[[Any, Any, Any], Tensor]:
    """The loss of a :class:`GAN` for :func:`toolkit.fleet.train`: both players move in every step.

    softplus(-D(x)) + softplus(D(G(z))) + r1/2 · |∂D/∂x|² moves the discriminator only, softplus(-D(G(z))) the generator
    only (non-saturating); the value per example is their sum, so its size means little. x is the field ``x``.
    Source: Goodfellow et al. 2014, "Generative Adversarial Nets"; the penalty at real examples is R1 of Mescheder,
    Geiger & Nowozin 2018, "Which Training Methods for GANs do actually Converge?".
    """
    require_range("r1", r1, 0, math.inf)

    def loss(model, batch, hyper):
        z = random.normal(batch.key, (len(batch.x), latent), batch.x.dtype)
        made = model(z)
        real, slopes = model(batch.x, judge=True, slopes=True)
        judged = F.softplus(-real) + F.softplus(model(made.detach(), judge=True)) + r1 / 2 * slopes.square().sum(1)
        return judged + F.softplus(-model(made, judge=True, frozen=True))

    return loss


@typed
def generate(fleet: Fleet, count: int, seed: int = 0) -> Float[Tensor, "members {count} values"]:
    """``count`` samples of each member's generator; they depend only on ``seed`` and the member's stream."""
    require_positive("count", count)
    latent, dtype = _latent(fleet), fleet.parameters.dtype

    def made(model, batch, hyper):
        return model(random.normal(batch.key, (count, latent), dtype))

    return fleet.evaluate(made, {}, seed=seed)


@typed
def generator_fisher(trained: Fleet, count: int = 256, seed: int = 0) -> Float[Tensor, "members size"]:
    """Fisher diagonal of the generator: mean over ``count`` samples of (∂D(G(z)) / ∂θ_j)², 0 for the discriminator.

    As in Li et al. 2020, "Few-shot Image Generation with Elastic Weight Consolidation", but from the discriminator's
    logit, as the public code of Adapt-then-Unlearn does (32 samples, convolutions only).
    """
    require_positive("count", count)
    latent, dtype, layout = _latent(trained), trained.parameters.dtype, trained.layout
    module = fresh(trained.build).to(trained.device)

    def score(flat, z):
        model = Member(module, {name: view[0] for name, view in layout.views(flat[None]).items()})
        return model(model(z[None]), judge=True, frozen=True)[0]

    keys = random.fold_in(random.key(seed, _FISHER, device=trained.device), trained.streams)
    z = random.normal(keys, (count, latent), dtype)
    return torch.stack([slopes_of(score, *row).square().mean(0) for row in zip(trained.parameters, z, strict=True)])


@typed
def ewc_penalty(
    parameters: Mapping[str, Tensor], original: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """½ Σ_j F_j (θ_j - θ₀_j)² over all tensors of ``fisher``, a dict as ``model.parameters``.

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks".
    """
    parts = [(f * (parameters[name] - original[name]).square()).sum() for name, f in fisher.items()]
    return torch.stack(parts).sum() / 2


@typed
def parameter_distance(parameters: Mapping[str, Tensor], adapted: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, ""]:
    """d = plain mean, over the adapted models and over the tensors, of the mean squared difference of a tensor.

    Tensors are those of the first adapted model. The public code divides by 2 and multiplies by the number of models,
    where a mean was likely meant: here their number does not change the size of d.
    """
    differences = [(parameters[name] - model[name]).square().mean() for model in adapted for name in adapted[0]]
    return torch.stack(differences).mean()


@typed
def repulsion_loss(
    distance: Float[Tensor, "*shape"], gamma: Float[Tensor, ""] | float | int, kind: Repulsion = "el2"
) -> Float[Tensor, "*shape"]:
    """What falls as the distance d from the unwanted parameters grows.

    ``el2``: 100 exp(-γ d), at most 100 and flat far away; ``nl2``: -γ d, which has no bound below and runs away;
    ``il2``: γ / d, which diverges where d is 0. Source: Tiwary et al. 2025, "Adapt then Unlearn".
    """
    if kind == "el2":
        return 100 * torch.exp(-gamma * distance)
    return -gamma * distance if kind == "nl2" else gamma / distance


@typed
def adapt(
    trained: Fleet,
    samples: Float[Tensor, "members n values"],
    forget: Bool[Tensor, "members n"],
    *,
    ewc_weight: Strength = 1.0,
    copies: int = 3,
    r1: float = 0.1,
    fisher_samples: int = 256,
    steps: Any = 300,
    seed: int = 0,
    **more: Any,
) -> tuple[Fleet, ...]:
    """Stage 1: ``copies`` of every member, trained on its unwanted samples: GAN loss + λ · :func:`ewc_penalty`.

    λ = ``ewc_weight`` ≥ 0 holds what matters for all samples in place; choose it so that the penalty is about a tenth
    of the loss. The copies differ in their batches and latent values. Source: Tiwary et al. 2025, "Adapt then Unlearn:
    Exploring Parameter Space Semantics for Unlearning in Generative Adversarial Networks".
    """
    _check(trained, samples, forget)
    require_positive("copies", copies)
    every = torch.arange(len(trained), device=trained.device).repeat(copies)
    number = torch.arange(copies, device=trained.device).repeat_interleave(len(trained))
    streams = random.fold_in(random.key(_COPY, device=trained.device), number)
    start = moved(trained[every], trained.parameters[every], {})
    start.streams.copy_(random.fold_in(streams, trained.streams[every]))
    weights = {"ewc_weight": strengths(trained, within(0, ewc_weight=ewc_weight))["ewc_weight"][every]}
    fisher = moved(trained, generator_fisher(trained, fisher_samples, seed), {})[every]
    plain, names = gan_loss(_latent(trained), r1), _generator(trained)

    def loss(model, batch, hyper):
        ours, first, bend = (
            {name: part.parameters[name] for name in names} for part in (model, batch.original, batch.fisher)
        )
        return plain(model, batch, hyper) + hyper.ewc_weight * ewc_penalty(ours, first, bend)

    adapted = _train(
        start,
        loss,
        samples[every],
        forget[every],
        steps,
        seed,
        hyper=weights,
        references={"original": trained[every], "fisher": fisher},
        **more,
    )
    return tuple(adapted[i * len(trained) : (i + 1) * len(trained)] for i in range(copies))


@typed
def repel(
    trained: Fleet,
    samples: Float[Tensor, "members n values"],
    forget: Bool[Tensor, "members n"],
    adapted: Sequence[Fleet],
    *,
    gamma: Strength = 1.0,
    repulsion: Repulsion = "el2",
    r1: float = 0.1,
    steps: Any = 300,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """Stage 2: the original on its samples that are not unwanted: GAN loss + :func:`repulsion_loss` of d, γ = gamma.

    d is :func:`parameter_distance` to the adapted generators. γ = 0 is plain fine-tuning, the baseline. d is a mean,
    so a larger net needs a larger γ for the same push. Source: Tiwary et al. 2025, "Adapt then Unlearn". Raises
    ``ValueError`` without adapted fleets, or for fleets of another size.
    """
    _check(trained, samples, forget)
    if not adapted:
        raise ValueError("adapted: expected at least one fleet, got none")
    for i, fleet in enumerate(adapted):
        if fleet.parameters.shape != trained.parameters.shape:
            got = tuple(fleet.parameters.shape)
            raise ValueError(f"adapted[{i}]: expected parameters {tuple(trained.parameters.shape)}, got {got}")
    hyper = strengths(trained, within(0, gamma=gamma))
    plain, names = gan_loss(_latent(trained), r1), _generator(trained)
    references = {f"adapted_{i}": fleet for i, fleet in enumerate(adapted)}

    def loss(model, batch, hyper):
        ours = {name: model.parameters[name] for name in names}
        theirs = [{name: batch[other].parameters[name] for name in names} for other in references]
        away = repulsion_loss(parameter_distance(ours, theirs), hyper.gamma, repulsion)
        return plain(model, batch, hyper) + away

    return _train(trained, loss, samples, ~forget, steps, seed, hyper=hyper, references=references, **more)


@typed
def extrapolate(trained: Fleet, adapted: Sequence[Fleet], k: Strength) -> Fleet:
    """θ₀ + k (θ₀ - θ_A) for the generator, θ_A the mean of the adapted ones: a baseline without a second training.

    It shows whether the line away from the unwanted samples leads to their absence. Source: the same public code.
    """
    if not adapted:
        raise ValueError("adapted: expected at least one fleet, got none")
    hyper = strengths(trained, within(None, k=k))
    away = trained.parameters - torch.stack([fleet.parameters for fleet in adapted]).mean(0)
    return moved(trained, trained.parameters + hyper["k"][:, None] * away * _mask(trained), hyper)


@typed
def ring(
    n: int, modes: int = 6, radius: float = 2.0, spread: float = 0.1, seed: int = 0
) -> tuple[dict[str, Tensor], Float[Tensor, "{modes} 2"]]:
    """Points of ``modes`` equal Gaussians N(c, spread² I) on a circle: fields ``x`` ``(n, 2)``, ``y``, and centres."""
    require_positive("n", n)
    require_positive("modes", modes)
    angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    centres = (radius * torch.stack([angle.cos(), angle.sin()], 1)).float()
    y = torch.arange(n) % modes
    return {"x": centres[y] + spread * random.normal(random.key(seed), (n, 2)), "y": y}, centres


@typed
def nearest_mode(
    samples: Float[Tensor, "*batch values"], centres: Float[Tensor, "modes values"]
) -> Int[Tensor, "*batch"]:
    """The number of the nearest centre: the class of a sample. ``(nearest_mode(...) == 3).float().mean(-1)`` is the
    share of an unwanted one."""
    return (samples[..., None, :] - centres).square().sum(-1).argmin(-1)


@typed
def mode_quality(
    samples: Float[Tensor, "*batch n values"],
    centres: Float[Tensor, "modes values"],
    spread: float,
    radius: float = 4.0,
) -> Float[Tensor, "*batch"]:
    """Share of the samples that lie within ``radius`` standard deviations of the nearest of ``centres``.

    Give only the kept centres to judge what else is made. Of true samples 1 - exp(-radius²/2) lie there in two
    dimensions: 0.9997 for 4.
    """
    require_positive("spread", spread)
    near = (samples[..., None, :] - centres).square().sum(-1).amin(-1)
    return (near < (radius * spread) ** 2).to(samples.dtype).mean(-1)


def _latent(fleet: Fleet) -> int:
    module = fresh(fleet.build)
    if not isinstance(module, GAN):
        raise ValueError(f"trained: expected a fleet of GAN, got one of {type(module).__name__}")
    return module.latent


def _generator(fleet: Fleet) -> list[str]:
    return [name for name in fleet.layout.names if name.startswith("generator.")]


def _mask(fleet: Fleet) -> Tensor:
    """1 for the generator's coordinates of a flat row, 0 for the others."""
    layout, names = fleet.layout, set(_generator(fleet))
    parts = [torch.full((n,), float(name in names)) for name, n in zip(layout.names, layout.sizes, strict=True)]
    return torch.cat(parts).to(fleet.parameters)


def _check(trained: Fleet, samples: Tensor, forget: Tensor) -> None:
    _latent(trained)
    if len(samples) != len(trained):
        raise ValueError(f"samples: expected one row for each of {len(trained)} members, got {len(samples)}")
    for wrong, name in ((~forget.any(1), "none"), (forget.all(1), "all")):
        if bool(wrong.any()):
            member = int(wrong.nonzero()[0, 0])
            raise ValueError(f"forget: expected some samples to forget and some to keep, got {name} for {member}")


def _train(start: Fleet, loss: Callable, samples: Tensor, chosen: Tensor, steps: Any, seed: int, **more: Any) -> Fleet:
    rows = torch.arange(samples.shape[1], device=start.device)
    own = {"x": samples.to(start.parameters)}
    return train_on(start, loss, {"row": rows}, steps, seed, subsets=chosen.to(start.device), member_data=own, **more)
