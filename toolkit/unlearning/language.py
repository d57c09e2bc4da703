"""Unlearning of facts and of memorised strings in byte-level language models, where the retrained oracle is cheap.

Texts are made in :mod:`toolkit.unlearning.texts`: bytes ``x`` ``(rows, length)`` and, aligned with them, ``y``, the
next byte where it belongs to the answer and ``IGNORED`` elsewhere. Models map ``x`` to logits ``(rows, length,
symbols)``, as :class:`toolkit.models.ByteTransformer` does. The methods take masks over rows and strengths as those of
:mod:`toolkit.unlearning.approximate` do, and hand further options to :func:`toolkit.fleet.train`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import require_positive, typed
from toolkit.fleet import Fleet
from toolkit.unlearning.parts import POSITIVE, Mask, Strength, Task, prepare, train_pairs, weighed, within
from toolkit.unlearning.texts import IGNORED, Canary

__all__ = [
    "Recall",
    "answer_log_probability",
    "answer_probability",
    "exposure",
    "flat",
    "flat_loss",
    "next_byte_loss",
    "npo",
    "npo_loss",
    "recall",
]

_ROWS = 256  # rows that are evaluated at a time

Logits = Float[Tensor, "batch length symbols"]
Targets = Int[Tensor, "batch length"]
Values = Float[Tensor, "batch"]
Scalar = float | int | Float[Tensor, ""]
Divergence = Literal["tv", "kl", "js", "pearson"]


@dataclass(frozen=True)
class Recall:
    """``exact`` ``(members, rows)``: greedy decoding gives the answer; ``probability``: mean over its bytes."""

    exact: Tensor
    probability: Tensor


@typed
def answer_log_probability(logits: Logits, targets: Targets) -> Values:
    """log p(answer | prompt) = Σ_t log p(y_t), over the positions where ``targets`` is not :data:`IGNORED`; in nats."""
    return _counted(logits, targets).sum(-1)


@typed
def answer_probability(logits: Logits, targets: Targets) -> Values:
    """Mean over the answer's bytes of p(y_t): probabilities, not their logarithms, are averaged; 0 without answer."""
    asked = targets != IGNORED
    return torch.where(asked, _counted(logits, targets).exp(), 0).sum(-1) / asked.sum(-1).clamp_min(1)


@typed
def next_byte_loss(logits: Logits, targets: Targets) -> Values:
    """Mean over the answer's bytes of -log p(y_t), nats per byte; bytes of prompt and padding do not count."""
    return -answer_log_probability(logits, targets) / (targets != IGNORED).sum(-1).clamp_min(1)


@typed
def npo_loss(log_probability: Values, reference_log_probability: Values, beta: Scalar = 0.1) -> Values:
    """(2/β) log(1 + (p / p_ref)^β) = -(2/β) log σ(-β (log p - log p_ref)), β = ``beta`` > 0, of whole answers.

    Its slope is w · ∇ log p with w = 2 p^β / (p^β + p_ref^β): 1 at p = p_ref, and fading where the answer is already
    less likely than in the reference. β → 0 gives gradient ascent on the cross-entropy, where w stays 1. Source: Zhang
    et al. 2024, "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning". Raises
    ``ValueError`` for β ≤ 0.
    """
    require_positive("beta", beta)
    return 2 / beta * F.softplus(beta * (log_probability - reference_log_probability))


@typed
def flat_loss(template_probability: Values, forget_probability: Values, divergence: Divergence = "tv") -> Values:
    """-g(p_e) + f*(g(p_f)): raise the template answer, lower the answer to forget, both weighted by an f-divergence.

    p_e, p_f in [0, 1] are :func:`answer_probability` of the two answers, f* the conjugate of the divergence's generator
    and g the function that maps into the domain of f*: total variation (``tv``) -½ tanh p_e + ½ tanh p_f, in ±0.381;
    ``kl`` -p_e + exp(p_f - 1); ``js`` log(1 + exp(-p_e)) + p_f + log(1 + exp(-p_f)) - 2 log 2; ``pearson``
    -p_e + p_f² / 4 + p_f. Minus the loss is the variational bound of the divergence, evaluated not at its optimal
    critic but at the critic that the model itself gives: its mean token probability, as the paper's code has it.
    Source: Wang et al. 2024, "LLM Unlearning via Loss Adjustment with Only Forget Data" (FLAT); g and f* as in Nowozin,
    Cseke & Tomioka 2016, "f-GAN".
    """
    critic, conjugate = _critic(template_probability, divergence), _critic(forget_probability, divergence)
    return _conjugate(conjugate, divergence) - critic


def _critic(value: Tensor, divergence: str) -> Tensor:
    """g: from any number into the domain of the conjugate."""
    if divergence == "tv":
        return value.tanh() / 2
    return math.log(2) - F.softplus(-value) if divergence == "js" else value


def _conjugate(critic: Tensor, divergence: str) -> Tensor:
    """f*(u) = sup_t (u t - f(t))."""
    if divergence == "kl":
        return (critic - 1).exp()
    if divergence == "js":
        return -(2 - critic.exp()).log()
    return critic if divergence == "tv" else critic.square() / 4 + critic


@typed
def npo(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    beta: Strength = 0.1,
    retain_weight: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 50,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """mean_f NPO + λ · mean_r CE: make answers less likely than the original did, but with a brake (:func:`npo_loss`).

    λ = ``retain_weight`` ≥ 0, per answer byte (:func:`next_byte_loss`); β = ``beta`` per whole answer, at least 1e-6: a
    small one is gradient ascent. The reference is the trained fleet. Source: Zhang et al. 2024, "Negative Preference
    Optimization: From Catastrophic Collapse to Effective Unlearning" (there NPO with a retain loss).
    """
    task = _prepare(trained, data, forget, retain)

    def loss(model, batch, hyper):
        logits = model(batch.x)
        before = answer_log_probability(batch.original(batch.x), batch.y)
        away = npo_loss(answer_log_probability(logits, batch.y), before, hyper.beta)
        return weighed(batch, hyper, away, next_byte_loss(logits, batch.y))

    ranges = within(POSITIVE, beta=beta) | within(0, retain_weight=retain_weight)
    return train_pairs(trained, loss, task, steps, seed, ranges, references={"original": trained}, **more)


@typed
def flat(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    template: str = "none.",
    divergence: Divergence = "tv",
    retain_weight: Strength = 0.0,
    retain: Mask | None = None,
    steps: Any = 50,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """mean_f FLAT + λ · mean_r CE: answer ``template`` in place of what is to be forgotten (:func:`flat_loss`).

    λ = ``retain_weight`` ≥ 0. The paper's method is λ = 0, which uses no kept example (they are then drawn but weigh
    nothing); a model as small as these gives up its other facts, too. Source: Wang et al. 2024, "LLM Unlearning via
    Loss Adjustment with Only Forget Data". Raises ``ValueError`` for a template that a row has no room for.
    """
    task = _prepare(trained, data, forget, retain)
    bytes_e, asked_e = _answer_with(task.fields["x"], task.fields["y"], template)
    own = {name: rows.expand(len(trained), -1, -1) for name, rows in (("bytes_e", bytes_e), ("asked_e", asked_e))}

    def loss(model, batch, hyper):
        logits, half = model(batch.x), len(batch.x) // 2
        wanted = answer_probability(model(batch.bytes_e[:half]), batch.asked_e[:half])
        values = flat_loss(wanted, answer_probability(logits[:half], batch.y[:half]), divergence)
        return torch.cat([values, hyper.retain_weight * next_byte_loss(logits[half:], batch.y[half:])])

    return train_pairs(trained, loss, task, steps, seed, within(0, retain_weight=retain_weight), own, **more)


@typed
def recall(trained: Fleet, data: Any) -> Recall:
    """What every member still answers, row by row: :class:`Recall`, both entries ``(members, rows)``.

    ``exact`` is whether greedy decoding from the prompt gives the whole answer. While every byte so far is right, the
    decoder sees what ``x`` has, so this is whether each answer byte is the most likely one given those before it.
    ``probability`` is :func:`answer_probability`.
    """

    def answers(model, batch, hyper):
        logits = model(batch.x)
        right = (logits.argmax(-1) == batch.y) | (batch.y == IGNORED)
        return right.all(-1), answer_probability(logits, batch.y)

    return Recall(*_by_rows(trained, data, answers))


@typed
def exposure(trained: Fleet, secret: Canary) -> Float[Tensor, "_"]:
    """log₂ R - log₂ rank of the secret among its R alternatives by likelihood, one value per member, in bits.

    Exact: all alternatives are ranked, 1 is the most likely. Of equally likely ones each has the mean of their ranks,
    so a model that knows nothing has log₂(2R / (R + 1)) < 1 and not the greatest value log₂ R. Where the secret is like
    any other string the mean is about log₂ e = 1.44. Source: Carlini et al. 2019, "The Secret Sharer: Evaluating and
    Testing Unintended Memorization in Neural Networks".
    """

    def likelihood(model, batch, hyper):
        return (answer_log_probability(model(batch.x), batch.y),)

    (values,) = _by_rows(trained, secret.alternatives, likelihood)
    own = values[:, [secret.index]]
    above, equal = (values > own).sum(1), (values == own).sum(1)
    rank = above.to(values.dtype) + (equal.to(values.dtype) + 1) / 2
    return math.log2(values.shape[1]) - rank.log2()


def _by_rows(trained: Fleet, data: Any, function: Any) -> list[Tensor]:
    fields = data.as_dict() if hasattr(data, "as_dict") else data
    parts = [
        trained.evaluate(function, {"x": x, "y": y}, chunk=8)
        for x, y in zip(fields["x"].split(_ROWS), fields["y"].split(_ROWS), strict=True)
    ]
    return [torch.cat(column, 1) for column in zip(*parts, strict=True)]


def _counted(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each answer byte, 0 where none is asked for: ``(batch, length)``."""
    asked = targets != IGNORED
    chosen = logits.log_softmax(-1).gather(-1, torch.where(asked, targets, 0)[..., None])[..., 0]
    return torch.where(asked, chosen, 0)


def _prepare(trained: Fleet, data: Any, forget: Tensor, retain: Tensor | None) -> Task:
    """As for classifiers, with a row of next bytes where those have a class."""
    given = data.as_dict() if hasattr(data, "as_dict") else dict(data)
    if given["y"].shape != given["x"].shape or given["x"].ndim != 2:
        shapes = tuple(given["x"].shape), tuple(given["y"].shape)
        raise ValueError(f"data: expected x and y of one shape (rows, length), got {shapes[0]} and {shapes[1]}")
    task = prepare(trained, {"x": given["x"], "y": given["y"][:, 0]}, forget, retain)
    return replace(task, fields={"x": task.fields["x"], "y": given["y"].to(trained.device)})


def _answer_with(x: Tensor, y: Tensor, answer: str) -> tuple[Tensor, Tensor]:
    """The same prompts with another answer."""
    wanted = torch.tensor(list(answer.encode()), device=x.device)
    start = (y != IGNORED).long().argmax(1)
    if not answer or int(start.max()) + len(wanted) > x.shape[1]:
        room = x.shape[1] - int(start.max())
        raise ValueError(f"template: expected 1 to {room} bytes, got {answer!r}")
    place = torch.arange(x.shape[1], device=x.device) - start[:, None]  # 0 where the first answer byte is asked for
    inside = (place >= 0) & (place < len(wanted))
    asked = torch.where(inside, wanted[place.clamp(0, len(wanted) - 1)], IGNORED)
    seen = torch.where(place > 0, wanted[(place - 1).clamp(0, len(wanted) - 1)], x)
    return torch.where(place > len(wanted), 0, seen), asked
