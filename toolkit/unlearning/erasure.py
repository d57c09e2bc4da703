"""Erasing a class from a conditional diffusion model: a trained fleet → a fleet that no longer makes it on request.

The models are fleets of :class:`toolkit.diffusion.ScoreNet`; ε̂(x, t, c) is their answer under the condition c, and
``NULL`` is no condition. Erasure sees no data: it trains on points x_t that the frozen original passes through when it
samples the erased class itself, with guidance, at all its steps. What it should have become is a fleet retrained on
the data without the class (:func:`toolkit.unlearning.retrain`), whose answer to the erased name is its unconditional
one; where the data is a :class:`toolkit.diffusion.Mixture`, what a model does is measured with exact posteriors.

All raise ``ValueError`` if the class is none of the model's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit import random
from toolkit.checks import typed
from toolkit.diffusion import LAST, NULL, Field, Mixture, ScoreNet, ddim, epsilon_field, sliced_wasserstein
from toolkit.fleet import Adam, Fleet
from toolkit.fleet.members import fresh
from toolkit.unlearning.parts import Masked, Strength, strengths, train_on, within

__all__ = ["Erasure", "all_but_one", "erased_share", "esd", "esd_field", "esd_target", "measure_erasure"]

_TRACES = 104  # what a key's numbers are for
Parts = Literal["all", "condition", "rest"]


@typed
def esd_target(
    anchor: Float[Tensor, "*shape"], erased: Float[Tensor, "*shape"], null: Float[Tensor, "*shape"], eta: Any
) -> Float[Tensor, "*shape"]:
    """ε̂(anchor) - η (ε̂(erased) - ε̂(null)): away from the erased class by η times its own guidance.

    Paper: the anchor is null, η = 1. Public code: the anchor is the erased class itself, η = 2. They are the same with
    η_code = 1 + η_paper: the code's η = 0 changes nothing and its η = 1 makes the class unconditional. Source:
    Gandikota et al. 2023, "Erasing Concepts from Diffusion Models".
    """
    return anchor - eta * (erased - null)


def esd_field(field: Field, erased: int, *, eta: Any = 1.0, anchor: int = NULL) -> Field:
    """The field that :func:`esd` regresses on, without any training: its target where the condition is ``erased``.

    Other conditions are those of ``field`` (:meth:`Mixture.epsilon`: the exact target). η is one number or one per
    member. Two Gaussians of one variance, of the class and of all else, have the target N(m + η (m - m_erased), s²):
    it does not avoid the class, it overshoots to the far side of what is left.
    """
    strength = torch.as_tensor(eta)

    def away(x: Tensor, t: Any, condition: Any = None) -> Tensor:
        plain = field(x, t, condition)
        own = torch.as_tensor(NULL if condition is None else condition, device=x.device) == erased
        size = strength.to(x)
        target = esd_target(field(x, t, anchor), field(x, t, erased), field(x, t, NULL), _spread(size))
        return torch.where(own[..., None], target, plain)

    return away


@typed
def esd(
    trained: Fleet,
    erased: int,
    *,
    eta: Strength = 1.0,
    anchor: int = NULL,
    parts: Parts = "condition",
    guidance: Strength = 3.0,
    traces: int = 256,
    moments: int = 50,
    steps: Any = 300,
    seed: int = 0,
    optimiser: Any = None,
    **more: Any,
) -> Fleet:
    """Erased stable diffusion: minimise |ε̂(x_t, t, erased) - :func:`esd_target` of the frozen original|² / dim.

    Args:
        eta: the strength, one number or one per member; any sign.
        anchor: ``NULL`` for the paper's reading, ``erased`` for the code's (whose η is larger by 1), or another class.
        parts: which parameters move: ``"condition"``, what conditions pass through (as the paper's variant x moves the
            cross-attention: here the class's own row, so other conditions stay to the last bit), ``"rest"``, all
            others (its variant u), or ``"all"``.
        guidance: weight with which the frozen model makes x_t under the erased condition, one or one per member.
        traces: sampling paths per member, drawn from ``seed`` and the member's stream.
        moments: steps of each path; x_t is one of its states, the first noise included, the finished sample not.
        optimiser, more: see :func:`toolkit.fleet.train`; Adam at 1e-2 for ``"condition"``, else at 1e-3.

    Source: Gandikota et al. 2023, "Erasing Concepts from Diffusion Models".
    """
    _require(trained, erased, anchor)
    hyper = strengths(trained, within(None, eta=eta))
    x, t = _traces(trained, erased, guidance, traces, moments, seed)
    wanted = esd_field(epsilon_field(trained), erased, eta=hyper["eta"], anchor=anchor)(x, t, erased)

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        return (model(batch.x, t=batch.t, condition=erased) - batch.target).square().mean(-1)

    own = {"x": x, "target": wanted}
    return _erase(trained, loss, t, own, steps, seed, parts, optimiser, hyper=hyper, **more)


@typed
def all_but_one(
    trained: Fleet,
    erased: int,
    *,
    alternative: int = NULL,
    drift_weight: Strength = 1.0,
    parts: Parts = "all",
    guidance: Strength = 3.0,
    traces: int = 256,
    moments: int = 50,
    steps: Any = 300,
    seed: int = 0,
    optimiser: Any = None,
    **more: Any,
) -> Fleet:
    """Regress the guidance term g(c) = ε̂(c) - ε̂(null): |g(erased) - g_o(alternative)|² + λ |ε̂(null) - ε̂_o(null)|².

    Both are means over coordinates, at points of the original's deterministic sampling path. g_o is the frozen
    original's term: of another class, or 0 for ``alternative=NULL``. λ = ``drift_weight`` ≥ 0, one number or one per
    member, holds the unconditional answer, which g alone leaves free; other conditions are held by neither. With
    ``parts="condition"`` the unconditional answer cannot move and λ does nothing. The other arguments are those of
    :func:`esd`. Source: Hong, Lee & Woo 2024, "All but One: Surgical Concept Erasing with Model Preservation in
    Text-to-Image Diffusion Models"; the formula and λ = 1 are a reading that is not confirmed.
    """
    _require(trained, erased, alternative)
    hyper = strengths(trained, within(0, drift_weight=drift_weight))
    x, t = _traces(trained, erased, guidance, traces, moments, seed)
    field = epsilon_field(trained)
    before = field(x, t, NULL)
    own = {"x": x, "before": before, "target": field(x, t, alternative) - before}

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        null = model(batch.x, t=batch.t, condition=NULL)
        term = model(batch.x, t=batch.t, condition=erased) - null
        drift = (null - batch.before).square().mean(-1)
        return (term - batch.target).square().mean(-1) + hyper.drift_weight * drift

    return _erase(trained, loss, t, own, steps, seed, parts, optimiser, hyper=hyper, **more)


@typed
def erased_share(samples: Float[Tensor, "*batch count dim"], mixture: Mixture, erased: int) -> Float[Tensor, "*batch"]:
    """Share of the samples whose most probable class is ``erased``, by the mixture's exact posterior, in [0, 1].

    Every point has a most probable class, however far from the data it lies: read it with a distance.
    """
    if not 0 <= erased < mixture.classes_count:
        raise ValueError(f"erased: expected a class from 0 to {mixture.classes_count - 1}, got {erased}")
    return (mixture.posterior(samples).argmax(-1) == erased).to(samples.dtype).mean(-1)


@dataclass(frozen=True)
class Erasure:
    """What a model makes when it is asked for each class. Distances are sliced Wasserstein-2, in the data's units.

    Attributes:
        share: ``(members,)``, :func:`erased_share` of the samples under the erased condition.
        free_share: ``(members,)``, the same without a condition.
        distance: ``(members,)``, the erased condition's samples to the mixture without the class.
        free_distance: ``(members,)``, the unconditional samples to the same.
        kept: ``(members, classes)``, each other condition's samples to its truth; NaN for the erased class.
        floor: ``(classes,)``, the same distance for two samples of the truth; for the erased class those of the mixture
            without it.
    """

    share: Tensor
    free_share: Tensor
    distance: Tensor
    free_distance: Tensor
    kept: Tensor
    floor: Tensor


@typed
def measure_erasure(
    model: Any,
    mixture: Mixture,
    erased: int,
    *,
    count: int = 500,
    steps: int = 30,
    guidance: Any = 1.0,
    seed: int = 0,
) -> Erasure:
    """Sample ``count`` points of a fleet (or a field) under each condition and compare them with the exact mixture.

    All members and conditions start from the same noise, so that differences are paired. ``steps`` and ``guidance`` are
    those of :func:`toolkit.diffusion.ddim`, by which the points are made; with guidance above 1 even a perfect model's
    samples are nearer to the modes than the truth.
    """
    rest, classes = mixture.without(erased), mixture.classes_count
    if isinstance(model, Fleet) and (has := _require(model, erased).classes) != classes:
        raise ValueError(f"mixture: expected one of {has} classes, as the model has, got {classes}")
    start = random.normal(random.key(seed, 0), (count, mixture.means.shape[1]), mixture.means.dtype).to(mixture.means)
    names = torch.tensor([*range(classes), NULL], device=start.device)  # the last is no condition
    begin = start.repeat(classes + 1, 1)
    begin = begin if isinstance(model, Fleet) else begin[None]
    made = ddim(model, begin, names.repeat_interleave(count), steps=steps, guidance=guidance)
    found = made.unflatten(1, (classes + 1, count)).transpose(0, 1)
    truths = [(rest if c == erased else mixture, None if c == erased else c) for c in range(classes)]
    first, second = (
        [truth.sample(count, condition=c, seed=seed + shift)[0] for truth, c in truths] for shift in (1, 2)
    )

    def distances(samples: Tensor, truth: Tensor) -> Tensor:
        return torch.stack([sliced_wasserstein(each, truth) for each in samples.to(truth)])

    kept = torch.stack([distances(found[c], first[c]) for c in range(classes)], 1)
    distance = kept[:, erased].clone()
    kept[:, erased] = float("nan")
    return Erasure(
        share=erased_share(found[erased].to(start), mixture, erased),
        free_share=erased_share(found[-1].to(start), mixture, erased),
        distance=distance,
        free_distance=distances(found[-1], first[erased]),
        kept=kept,
        floor=torch.stack([sliced_wasserstein(a, b) for a, b in zip(first, second, strict=True)]),
    )


def _require(trained: Fleet, erased: int, other: int = NULL) -> ScoreNet:
    net = fresh(trained.build)
    if not isinstance(net, ScoreNet):
        raise ValueError(f"trained: expected a fleet of ScoreNet, got one of {type(net).__name__}")
    if not 0 <= erased < net.classes:
        raise ValueError(f"erased: expected a class from 0 to {net.classes - 1}, got {erased}")
    if not NULL <= other < net.classes:
        raise ValueError(f"anchor or alternative: expected {NULL} or a class below {net.classes}, got {other}")
    return net


def _spread(strength: Tensor) -> Tensor:
    return strength[:, None, None] if strength.ndim else strength


def _erase(
    trained: Fleet,
    loss: Callable,
    t: Tensor,
    own: dict[str, Tensor],
    steps: Any,
    seed: int,
    parts: Parts,
    optimiser: Any,
    **more: Any,
) -> Fleet:
    """Train the coordinates that may move, on each member's ``own`` points at the times t."""
    moved = Masked(optimiser or Adam(1e-2 if parts == "condition" else 1e-3), _moving(trained, parts))
    options = {"batch": 128, **more, "optimiser": moved, "member_data": own}
    return train_on(trained, loss, {"t": t}, steps, seed, **options)


def _moving(trained: Fleet, parts: Parts) -> Bool[Tensor, "size"]:
    """The coordinates of a flat row that may move."""
    layout = trained.layout
    named = [torch.full((n,), name == "condition") for name, n in zip(layout.names, layout.sizes, strict=True)]
    condition = torch.cat(named).to(trained.device)
    return torch.ones_like(condition) if parts == "all" else condition if parts == "condition" else ~condition


def _traces(
    trained: Fleet, erased: int, guidance: Strength, traces: int, moments: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Points ``(members, moments · traces, dim)`` on the frozen fleet's way to the erased class, and their times."""
    for name, size in {"traces": traces, "moments": moments}.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    weight = strengths(trained, within(None, guidance=guidance))["guidance"]
    keys = random.fold_in(random.key(seed, _TRACES, device=trained.device), trained.streams)
    start = random.normal(keys, (traces, _require(trained, erased).dim), trained.parameters.dtype)
    states = ddim(trained, start, erased, steps=moments, guidance=weight, path=True)[:-1]
    times = torch.linspace(LAST, 0, moments + 1, dtype=start.dtype, device=start.device)[:-1]
    return states.transpose(0, 1).flatten(1, 2), times.repeat_interleave(traces)
