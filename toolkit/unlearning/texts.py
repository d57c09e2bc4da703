"""Texts to learn and to forget: invented facts in several forms, and secret strings among all that they might be.

A row of a text is its bytes ``x`` ``(rows, length)`` and, aligned with them, ``y``: at each position the next byte
where it belongs to the answer, :data:`IGNORED` elsewhere.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit import random

__all__ = ["IGNORED", "TEMPLATES", "Canary", "Text", "canary", "facts", "join"]

IGNORED = -100  # what y has where no byte is asked for; torch's cross-entropy skips it by default
TEMPLATES: dict[str, tuple[str, ...]] = {
    "home": ("{name} lives in {answer}.", "the home of {name} is {answer}.", "visit {name} at {answer}."),
    "pet": ("{name} has a pet {answer}.", "the pet of {name} is {answer}.", "feed {name} and {answer}."),
}
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_NAMES, _POOL, _CHOICE, _SECRET = range(4)  # what a key's numbers are for
_MOST = 100_000  # alternatives to a canary that are ranked


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
