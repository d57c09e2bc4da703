"""The bug museum of the distillation lab: two mistakes in public code, to be put right.

The public version is the first misconception of each.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from toolkit import random
from toolkit.exercises import Exercise

__all__ = ["mixing_switch", "sure_logits"]


def label_against_rest(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """TCKD (batch,), in nats, from logits (batch, classes): KL between (p_y, 1 - p_y) of teacher and student."""
    own = one_hot(labels, student.shape[1]).bool()
    every_p, every_q = teacher.logsumexp(dim=1), student.logsumexp(dim=1)
    label_p, label_q = teacher[own] - every_p, student[own] - every_q
    rest_p = teacher.masked_fill(own, -math.inf).logsumexp(dim=1) - every_p
    rest_q = student.masked_fill(own, -math.inf).logsumexp(dim=1) - every_q
    return label_p.exp() * (label_p - label_q) + rest_p.exp() * (rest_p - rest_q)


_LOGITS = 2 * random.normal(random.key(100), (3, 2, 4, 5)) + torch.tensor([1.0, -2.0])[:, None, None]
_OWN = torch.eye(5)[torch.tensor([2, 0, 1, 4])]
_CLASSES = _OWN.argmax(1)


def _binary(s: Tensor, t: Tensor) -> Tensor:
    """KL of probabilities (batch, 2), as ``kl_div`` with the logarithm of s computes it."""
    return (t.xlogy(t) - t * s.log()).sum(1)


def _pooled(z: Tensor, y: Tensor) -> Tensor:
    """(p_y, the sum of the others) as probabilities."""
    own, p = one_hot(y, z.shape[1]), z.softmax(1)
    return torch.stack([(p * own).sum(1), (p * (1 - own)).sum(1)], 1)


def _leading(p: Tensor) -> Tensor:
    return torch.stack([p[:, 0], 1 - p[:, 0]], 1)


def _weakly_masked(z: Tensor, y: Tensor) -> Tensor:
    rest = (z - 1000 * one_hot(y, z.shape[1])).logsumexp(1)
    return torch.stack([z.gather(1, y[:, None])[:, 0], rest], 1) - z.logsumexp(1)[:, None]


sure_logits = Exercise(
    "sure-logits",
    "TCKD, the first part of decoupled distillation, compares $(p_y, 1 - p_y)$ of teacher and student: "
    "$p_y \\log \\frac{p_y}{q_y} + (1 - p_y) \\log \\frac{1 - p_y}{1 - q_y}$. Its public code, mdistiller, adds up the "
    "student's other probabilities and takes the logarithm, which fails for a sure student. Write it for logits of "
    "any size, with `logsumexp`: $\\log(1 - q_y) = \\log \\sum_{k \\ne y} e^{z_k} - \\log \\sum_k e^{z_k}$.",
    label_against_rest,
    [
        (*_LOGITS[0], _CLASSES),
        (_LOGITS[1, 0] + 40 * _OWN, _LOGITS[1, 1], _CLASSES),
        (_LOGITS[2, 0] + 300 * _OWN, _LOGITS[2, 1], _CLASSES),
        (_LOGITS[2, 0] + 1500 * _OWN, _LOGITS[2, 1], _CLASSES),
    ],
    {
        "log of a sum": (
            lambda s, t, y: _binary(_pooled(s, y), _pooled(t, y)),
            "This is mdistiller's code: where the label's logit leads by over 100, the others' probabilities are 0 in "
            "single precision, and the loss is infinite. Its temperature of 4 moves that to a lead of 400, which a "
            "trained net seldom has; a loss without temperature, or larger logits, meets it.",
        ),
        "log of 1 - p": (
            lambda s, t, y: _binary(_leading(_pooled(s, y)), _pooled(t, y)),
            "You compute 1 - q: it is 0 in single precision from a lead of 17 on, and the loss infinite.",
        ),
        "clamped": (
            lambda s, t, y: _binary(_pooled(s, y).clamp(min=1e-8), _pooled(t, y)),
            "A floor under the probabilities hides the infinity: the loss stops growing where a student is surest, "
            "and its gradient is 0 there.",
        ),
        "minus 1000": (
            lambda s, t, y: (_weakly_masked(t, y).exp() * (_weakly_masked(t, y) - _weakly_masked(s, y))).sum(1),
            "You mask the label by subtracting 1000, as mdistiller does in the second part, NCKD. A lead of more than "
            "1000 shows through: mask with -inf.",
        ),
        "label only": (
            lambda s, t, y: (one_hot(y, s.shape[1]) * t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1),
            "The second term is missing, that of all other classes together.",
        ),
    },
)


def mixing_weights(option: str, drawn: Tensor, plain: Tensor) -> Tensor:
    """Weight λ (batch,) of each example against its partner, after `--pmixup option` on the command line.

    Full mixup takes the drawn weights (batch,); partial mixup leaves examples as they are where plain (batch,) is True.
    """
    partial = option.lower() == "true"
    return torch.where(plain, 1.0, drawn) if partial else drawn


_DRAWN = random.uniform(random.key(105), (4, 8))
_PLAIN = random.uniform(random.key(106), (4, 8)) < 0.6

mixing_switch = Exercise(
    "mixing-switch",
    "Mixup replaces an example by $\\lambda x + (1 - \\lambda) x'$. Partial mixup, the default of MIX-KD, sets "
    "$\\lambda = 1$ for a part of the batch. The option that switches it off has no type in MIX-KD's code, so "
    "the program gets text. Read `option`, True or False with large or small letters, and give each example's "
    "$\\lambda$: partial mixup if it is true, else full.",
    mixing_weights,
    [*zip(("True", "False", "false", "true"), _DRAWN, _PLAIN, strict=True)],
    {
        "text is true": (
            lambda text, w, plain: torch.where(plain, 1, w) if text else w,
            "This is MIX-KD's code: the text 'False' is not empty, so it is true. Whoever runs `--pmixup False` for "
            'a row "full mixup" gets partial mixup again, and compares it with itself.',
        ),
        "capitals only": (
            lambda text, w, plain: torch.where(plain, 1, w) if text == "True" else w,
            "You know 'True' and take everything else, even 'true', for false: ignore capitals.",
        ),
        "switched": (
            lambda text, w, plain: torch.where(plain, 1, w) if text.lower() == "false" else w,
            "Your switch is turned: true means partial mixup.",
        ),
        "partner alone": (
            lambda text, w, plain: torch.where(plain, 0, w) if text.lower() == "true" else w,
            "With λ = 0 an example is replaced by its partner. One that stays as it is has λ = 1.",
        ),
    },
)
