"""Unlearning of facts and of memorised strings in byte-level language models, where the retrained oracle is cheap.

A row of a text is its bytes ``x`` ``(rows, length)`` and, aligned with them, ``y``: at each position the next byte
where it belongs to the answer, :data:`IGNORED` elsewhere. Models map ``x`` to logits ``(rows, length, symbols)``, as
:class:`toolkit.models.ByteTransformer` does. The methods take masks over rows and strengths as those of
:mod:`toolkit.unlearning.approximate` do, and hand further options to :func:`toolkit.fleet.train`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import require_positive, typed
from toolkit.fleet import Fleet
from toolkit.unlearning.parts import POSITIVE, Mask, Range, Strength, Task, prepare, train_pairs

__all__ = [
    "IGNORED",
    "TEMPLATES",
    "Canary",
    "Recall",
    "Text",
    "answer_log_probability",
    "answer_probability",
    "canary",
    "exposure",
    "facts",
    "flat",
    "flat_loss",
    "join",
    "next_byte_loss",
    "npo",
    "npo_loss",
    "recall",
]

IGNORED = -100  # what y has where no byte is asked for; torch's cross-entropy skips it by default
TEMPLATES: dict[str, tuple[str, ...]] = {
    "home": ("{name} lives in {answer}.", "the home of {name} is {answer}.", "visit {name} at {answer}."),
    "pet": ("{name} has a pet {answer}.", "the pet of {name} is {answer}.", "feed {name} and {answer}."),
}
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NAMES, _POOL, _CHOICE, _SECRET = range(4)  # what a key's numbers are for
_MOST = 100_000  # alternatives to a canary that are ranked
_ROWS = 256  # rows that are evaluated at a time

Logits = Float[Tensor, "batch length symbols"]
Targets = Int[Tensor, "batch length"]
Values = Float[Tensor, "batch"]
Scalar = float | int | Float[Tensor, ""]
Divergence = Literal["tv", "kl", "js", "pearson"]


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of bytes: ``x`` and ``y`` ``(rows, length)`` int64, and of which fact and in which form each row is.

    ``y[i, t]`` is the byte after ``x[i, t]`` where that belongs to the answer, :data:`IGNORED` elsewhere. ``fact`` and
    ``form`` ``(rows,)`` are numbers: rows with the same ``fact`` say the same thing in different forms.
    """

    x: Tensor
    y: Tensor
    fact: Tensor
    form: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def answer(self) -> Tensor:
        """Where an answer byte is asked for: a mask ``(rows, length)``."""
        return self.y != IGNORED

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors by name, for a trainer's batches."""
        return {"x": self.x, "y": self.y, "fact": self.fact, "form": self.form}

    def lines(self) -> list[str]:
        """The rows as text, prompt and answer."""
        whole = torch.cat([self.x, torch.zeros_like(self.x[:, :1])], 1)
        whole[:, 1:] = torch.where(self.answer, self.y, whole[:, 1:])
        return [bytes(row).rstrip(b"\0").decode() for row in whole.tolist()]


@dataclass(frozen=True, eq=False)
class Canary:
    """A secret string: ``text``, the rows to train on, and ``alternatives``, one row for every string it might be.

    ``index`` is the row of the secret among the alternatives.
    """

    text: Text
    alternatives: Text
    index: int


@dataclass(frozen=True)
class Recall:
    """``exact`` ``(members, rows)``: greedy decoding gives the answer; ``probability``: mean over its bytes."""

    exact: Tensor
    probability: Tensor


def facts(
    people: int = 12,
    templates: Mapping[str, Sequence[str]] = TEMPLATES,
    *,
    pool: int = 8,
    length: int | None = None,
    seed: int = 0,
) -> Text:
    """A corpus of invented facts: for each of ``people`` and each attribute one answer, stated in each of its forms.

    ``templates`` maps an attribute to its forms, each with ``{name}`` before ``{answer}``. Names and answers are
    invented words of four letters, all different; an attribute has ``pool`` answers, of which each person gets one at
    random, so 1 / pool is what a model can know of a person that it never saw. What follows the name's answer in the
    form (a full stop) belongs to the answer. Rows are ordered by person, attribute and form; ``fact`` is person ·
    attributes + attribute, ``form`` the number of the form within its attribute. ``length`` (default: what the longest
    needs) pads the rows with byte 0. Raises ``ValueError`` for fewer than two people or one answer, forms that lack a
    placeholder, more words than there are, or rows longer than ``length``.
    """
    if people < 2:
        raise ValueError(f"people: expected at least 2, got {people}")
    if pool < 1:
        raise ValueError(f"pool: expected at least 1 answer, got {pool}")
    for attribute, forms in templates.items():
        for form in forms:
            if not -1 < form.find("{name}") < form.find("{answer}"):
                raise ValueError(f"templates[{attribute!r}]: expected {{name}} before {{answer}}, got {form!r}")
    words, needed = _words(seed), people + pool * len(templates)
    if needed > len(words):
        raise ValueError(f"people, pool: expected at most {len(words)} words together, got {needed}")
    names, answers = words[:people], words[people:needed]
    chosen = (random.uniform(random.key(seed, _CHOICE), (people, len(templates)), torch.float64) * pool).long()
    rows, labels = [], []
    for person, name in enumerate(names):
        for kind, forms in enumerate(templates.values()):
            answer = answers[kind * pool + int(chosen[person, kind])]
            for number, form in enumerate(forms):
                prompt, end = form.split("{answer}")
                rows.append((prompt.format(name=name), answer + end))
                labels.append((person * len(templates) + kind, number))
    fact, form_ = torch.tensor(labels).unbind(1)
    return Text(*_encode(rows, length), fact, form_)


def canary(
    prefix: str = "the code is ",
    alphabet: str = "0123456789",
    symbols: int = 3,
    *,
    copies: int = 1,
    length: int | None = None,
    seed: int = 0,
) -> Canary:
    """A random string of ``symbols`` characters after ``prefix``, ``copies`` rows of it, and all that it might be.

    The secret is uniform over the len(alphabet)^symbols strings. Source: Carlini et al. 2019, "The Secret Sharer:
    Evaluating and Testing Unintended Memorization in Neural Networks". Raises ``ValueError`` for an empty prefix, an
    alphabet with repetitions, no copy, rows longer than ``length``, or more than 100,000 alternatives.
    """
    if len(set(alphabet)) != len(alphabet) or len(alphabet) < 2:
        raise ValueError(f"alphabet: expected at least 2 different characters, got {alphabet!r}")
    if symbols < 1 or len(alphabet) ** symbols > _MOST:
        raise ValueError(f"symbols: expected 1 or more and at most {_MOST} strings, got {symbols}")
    if copies < 1:
        raise ValueError(f"copies: expected at least 1, got {copies}")
    rows = [(prefix, "".join(letters)) for letters in itertools.product(alphabet, repeat=symbols)]
    index = int(random.uniform(random.key(seed, _SECRET), (), torch.float64) * len(rows))
    x, y = _encode(rows, length)
    number = torch.arange(len(rows))
    alternatives = Text(x, y, number, torch.zeros_like(number))
    zeros = torch.zeros(copies, dtype=torch.int64)
    text = Text(x[[index] * copies], y[[index] * copies], zeros, zeros)
    return Canary(text, alternatives, index)


def join(*texts: Text) -> Text:
    """One text of the rows of several, padded to the longest; ``fact`` numbers go on where the text before ends."""
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    width, base, parts = max(text.x.shape[1] for text in texts), 0, []
    for text in texts:
        short = width - text.x.shape[1]
        x, y = F.pad(text.x, (0, short)), F.pad(text.y, (0, short), value=IGNORED)
        parts.append((x, y, text.fact + base, text.form))
        base += int(text.fact.max()) + 1
    return Text(*(torch.cat(column) for column in zip(*parts, strict=True)))


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
        return torch.where(batch.forgotten, away, hyper.retain_weight * next_byte_loss(logits, batch.y))

    ranges: dict[str, Range] = {"beta": (beta, POSITIVE, None), "retain_weight": (retain_weight, 0, None)}
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

    return train_pairs(trained, loss, task, steps, seed, {"retain_weight": (retain_weight, 0, None)}, own, **more)


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


def _words(seed: int) -> list[str]:
    """All words of two syllables in an order that the seed decides."""
    syllables = ["".join(pair) for pair in itertools.product(_CONSONANTS, _VOWELS)]
    words = ["".join(pair) for pair in itertools.product(syllables, repeat=2)]
    return [words[i] for i in random.permutation(random.key(seed, _NAMES), len(words)).tolist()]


def _encode(rows: Sequence[tuple[str, str]], length: int | None) -> tuple[Tensor, Tensor]:
    """Inputs and next bytes of prompts and answers; the last byte is only a target."""
    longest = max(len((prompt + answer).encode()) for prompt, answer in rows) - 1
    if length is not None and length < longest:
        raise ValueError(f"length: expected at least {longest} bytes, got {length}")
    width = longest if length is None else length
    x = torch.zeros(len(rows), width, dtype=torch.int64)
    y = torch.full_like(x, IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        given, wanted = prompt.encode(), answer.encode()
        if not given:
            raise ValueError("prefix: expected at least one byte before the answer, got none")
        whole = torch.tensor(list(given + wanted))
        x[i, : len(whole) - 1] = whole[:-1]
        y[i, len(given) - 1 : len(whole) - 1] = whole[len(given) :]
    return x, y
