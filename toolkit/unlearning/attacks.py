"""Membership attacks: can a model's outputs tell which examples it was trained on?

Every score is larger for an example that looks more like a member. A population attack puts one threshold on all
examples of a model; LiRA and U-LiRA give each example its own pair of Gaussians, fitted to shadow models, and so see
leaks that a population attack averages away. Rates and likelihood ratios are float64. Nothing here asks for an AUC of
1/2: the reference is what the same attack gives on retrained models.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.checks import readable, require_labels, require_range, typed

__all__ = [
    "PopulationAttack",
    "ULira",
    "attack_auc",
    "lira",
    "margins",
    "membership_scores",
    "population_attack",
    "tpr_at_fpr",
    "u_lira",
]

Score = Literal["confidence", "loss", "margin", "hinge", "entropy", "modified_entropy"]
Variance = Literal["example", "pooled"]

_SMALLEST = 1e-12  # standard deviation of statistics that are all alike


class PopulationAttack(NamedTuple):
    """One threshold for all examples, per member: the AUC, and the true positive rate at a false positive rate."""

    auc: Float[Tensor, "*members"]
    tpr: Float[Tensor, "*members"]


class ULira(NamedTuple):
    """Per example: the attack's AUC over models, and the likelihood ratios it rests on (each from models not seen)."""

    auc: Float[Tensor, "examples"]
    unlearned: Float[Tensor, "unlearned examples"]
    retrained: Float[Tensor, "retrained examples"]


def require_numbers(name: str, values: Tensor, *, finite: bool = False) -> None:
    """Raise ``ValueError`` for NaN (and for infinities, with ``finite``); nothing where values cannot be read."""
    if not readable(values):
        return
    wrong = ~values.isfinite() if finite else values.isnan()
    if bool(wrong.any()):
        kind = "finite values" if finite else "values that are not NaN"
        raise ValueError(f"{name}: expected {kind}, got {int(wrong.sum())} others of {values.numel()}")


def _own_class(logits: Tensor, labels: Tensor) -> Tensor:
    """``(..., examples, classes)`` whether an entry is the one of its label; errors for bad logits and labels."""
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"logits: expected at least 2 classes, got {classes}")
    require_numbers("logits", logits, finite=True)
    require_labels("labels", labels, classes)
    return labels[..., None] == torch.arange(classes, device=logits.device)


@typed
def margins(
    logits: Float[Tensor, "*members examples classes"], labels: Int[Tensor, "examples"]
) -> Float[Tensor, "..."]:
    """Logit-scaled confidence log(p_y / (1 - p_y)) = z_y - log Σ_{k≠y} exp z_k, ``(*members, examples)``, in nats.

    Near-Gaussian over models and never saturated, unlike p_y: what LiRA and KLoM are computed from. Raises
    ``ValueError`` for logits that are not finite, fewer than 2 classes and labels out of range. Source: Carlini et al.
    2022, "Membership Inference Attacks From First Principles", in the form that needs no division.
    """
    own = _own_class(logits, labels)
    return torch.where(own, logits, 0).sum(-1) - torch.where(own, -math.inf, logits).logsumexp(-1)


@typed
def membership_scores(
    logits: Float[Tensor, "*members examples classes"], labels: Int[Tensor, "examples"], kind: Score = "loss"
) -> Float[Tensor, "..."]:
    """How much each example looks like a member, ``(*members, examples)``; larger is more so.

    - ``"confidence"``: p_y; ``"loss"``: log p_y, minus the cross-entropy in nats; ``"margin"``: see :func:`margins`.
      These three order the examples alike, so that one threshold on any of them is the same attack, until p_y rounds
      to 1 and ties appear.
    - ``"hinge"``: z_y - max_{k≠y} z_k.
    - ``"entropy"``: minus the entropy of p, which does not use the label.
    - ``"modified_entropy"``: (1 - p_y) log p_y + Σ_{k≠y} p_k log(1 - p_k), with the label's column of each example's
      own row and log(1 - p), not log p, of the others. Source: Song & Mittal 2021, "Systematic Evaluation of Privacy
      Risks of Machine Learning Models" (there with the other sign).

    Source of the first: Yeom et al. 2018, "Privacy Risk in Machine Learning". Errors as :func:`margins`.
    """
    own = _own_class(logits, labels)
    if kind == "margin":
        return margins(logits, labels)
    if kind == "hinge":
        return torch.where(own, logits, 0).sum(-1) - torch.where(own, -math.inf, logits).amax(-1)
    log_p = logits.log_softmax(-1)
    loss = torch.where(own, log_p, 0).sum(-1)
    if kind == "loss":
        return loss
    if kind == "confidence":
        return loss.exp()
    p = log_p.exp()
    if kind == "entropy":
        return (p * log_p).sum(-1)
    top = torch.arange(logits.shape[-1], device=logits.device) == logits.argmax(-1, keepdim=True)
    rest = torch.where(top, -math.inf, log_p).logsumexp(-1, keepdim=True)  # log(1 - p) where p may round to 1
    log_other = torch.where(top, rest, torch.log1p(-torch.where(top, 0, p)))
    return torch.where(own, log_other.exp() * log_p, p * log_other).sum(-1)


def _sides(scores: Tensor, inside: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks of both sides in the shape of ``scores`` and their counts; errors for an empty or an ambiguous side."""
    require_numbers("scores", scores)
    if outside is None:
        outside = ~inside
    elif readable(outside) and readable(inside) and bool((inside & outside).any()):
        raise ValueError("outside: expected no item that is inside as well, got some")
    inside, outside = inside.expand(scores.shape), outside.expand(scores.shape)
    for name, mask in (("inside", inside), ("outside", outside)):
        if readable(mask) and not bool(mask.any(-1).all()):
            raise ValueError(f"{name}: expected at least one item for each member, got none for some")
    return inside, outside, inside.sum(-1), outside.sum(-1)


@typed
def attack_auc(
    scores: Float[Tensor, "*members items"],
    inside: Bool[Tensor, "*#members items"] | Bool[Tensor, "items"],
    outside: Bool[Tensor, "*#members items"] | Bool[Tensor, "items"] | None = None,
) -> Float[Tensor, "..."]:
    """Area under the ROC curve per member, ``(*members,)`` float64: P(score inside > score outside) + ½ P(equal).

    The Mann-Whitney statistic over the number of pairs, exact with ties. Items in neither mask do not count;
    ``outside`` is by default everything else. For one AUC per example over models pass the transposed tables. Raises
    ``ValueError`` for NaN, for a member with an empty side and for items on both sides. Source: Hanley & McNeil 1982,
    "The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC) Curve".
    """
    inside, outside, positives, negatives = _sides(scores, inside, outside)
    ordered = torch.where(outside, scores, math.inf).sort(-1).values.contiguous()
    values = scores.contiguous()
    count = negatives[..., None]  # the others were put at +∞, behind the real ones
    below = torch.minimum(torch.searchsorted(ordered, values), count)
    reached = torch.minimum(torch.searchsorted(ordered, values, right=True), count)
    wins = torch.where(inside, (below + reached).double() / 2, 0).sum(-1)
    return wins / (positives.double() * negatives)


@typed
def tpr_at_fpr(
    scores: Float[Tensor, "*members items"],
    inside: Bool[Tensor, "*#members items"] | Bool[Tensor, "items"],
    outside: Bool[Tensor, "*#members items"] | Bool[Tensor, "items"] | None = None,
    *,
    fpr: float = 0.01,
) -> Float[Tensor, "..."]:
    """Largest true positive rate of a threshold whose false positive rate is at most ``fpr``: ``(*members,)`` float64.

    With a = ⌊fpr · outside⌋ the items strictly above the (a+1)-th highest outside score are called members: no
    interpolation between thresholds, which for few outside items would invent rates that no threshold has. Errors as
    :func:`attack_auc`, and for a rate outside [0, 1]. Source: Carlini et al. 2022, who ask for small rates.
    """
    require_range("fpr", fpr, 0, 1)
    inside, outside, positives, negatives = _sides(scores, inside, outside)
    ordered = torch.where(outside, scores, -math.inf).sort(-1, descending=True).values
    allowed = (fpr * negatives.double() * (1 + 1e-12)).floor().long()
    threshold = ordered.gather(-1, allowed.clamp_max(scores.shape[-1] - 1)[..., None])
    called = (scores > threshold) | (allowed >= negatives)[..., None]
    return (called & inside).sum(-1).double() / positives


@typed
def population_attack(
    scores: Float[Tensor, "*members items"],
    inside: Bool[Tensor, "*#members items"] | Bool[Tensor, "items"],
    outside: Bool[Tensor, "*#members items"] | Bool[Tensor, "items"] | None = None,
    *,
    fpr: float = 0.01,
) -> PopulationAttack:
    """One threshold on :func:`membership_scores` for all examples of a member: ``inside`` the forget set, ``outside``
    fresh examples of the same distribution.

    The weak attack: an easy example that was never seen looks more like a member than a hard one that was learned. On
    a retrained model its AUC is 1/2 only on average over forget sets drawn at random; one forget set may be easier
    than the fresh examples. So compare with :func:`toolkit.unlearning.distances.inside_band` of the retrained fleet.
    Errors as :func:`attack_auc`. Source: Yeom et al. 2018, "Privacy Risk in Machine Learning".
    """
    return PopulationAttack(attack_auc(scores, inside, outside), tpr_at_fpr(scores, inside, outside, fpr=fpr))


def _gaussians(name: str, values: Tensor, counted: Tensor, variance: Variance) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per example over the models that ``counted`` marks, each ``(examples,)``."""
    count = counted.sum(0)
    if readable(count) and bool((count < 2).any()):
        raise ValueError(f"{name}: expected at least 2 models of each kind per example, got {int(count.min())}")
    mean = torch.where(counted, values, 0).sum(0) / count
    squares = torch.where(counted, values - mean, 0).square().sum(0)
    spread = squares / (count - 1) if variance == "example" else (squares.sum() / (count - 1).sum()).expand_as(mean)
    return mean, spread.sqrt().clamp_min(_SMALLEST)


def _log_density(values: Tensor, gaussian: tuple[Tensor, Tensor]) -> Tensor:
    mean, deviation = gaussian
    return -((values - mean) / deviation).square() / 2 - deviation.log()


@typed
def lira(
    statistics: Float[Tensor, "targets examples"],
    shadows: Float[Tensor, "shadows examples"],
    inside: Bool[Tensor, "shadows examples"],
    *,
    online: bool = True,
    variance: Variance = "example",
) -> Float[Tensor, "targets examples"]:
    """Likelihood-ratio attack with shadow models: one score per target model and example, float64.

    Online: log N(φ; μ_in, σ_in²) - log N(φ; μ_out, σ_out²), the Gaussians of an example fitted to the shadows trained
    with it (``inside``) and without it. Offline: (φ - μ_out) / σ_out, which orders as 1 - P(Z > φ) but does not
    saturate. ``statistics`` and ``shadows`` are :func:`margins`; no target may be among the shadows. Variances divide
    by n - 1. ``variance="pooled"`` shares one variance of each kind between the examples, better below about 64
    shadows: deviations are taken from each example's own mean, "in" and "out" apart. (A well-known public
    implementation takes the spread of all "in" values for both kinds, with the differences between examples in it.)

    Raises ``ValueError`` for values that are not finite and for an example with fewer than 2 shadows in or out.
    Source: Carlini et al. 2022, "Membership Inference Attacks From First Principles".
    """
    require_numbers("statistics", statistics, finite=True)
    require_numbers("shadows", shadows, finite=True)
    values, shadows = statistics.double(), shadows.double()
    without = _gaussians("inside", shadows, ~inside, variance)
    if not online:
        return (values - without[0]) / without[1]
    return _log_density(values, _gaussians("inside", shadows, inside, variance)) - _log_density(values, without)


@typed
def u_lira(
    unlearned: Float[Tensor, "unlearned examples"],
    retrained: Float[Tensor, "retrained examples"],
    *,
    forgotten: Bool[Tensor, "unlearned examples"] | None = None,
    unseen: Bool[Tensor, "retrained examples"] | None = None,
    folds: int = 2,
    variance: Variance = "example",
) -> ULira:
    """Per-example attack on unlearning: is a model one that learned x and unlearned it, or one that never saw x?

    The score of a model with margin φ at x is log N(φ; Q_u) - log N(φ; Q_r), Q_u and Q_r fitted to the :func:`margins`
    of unlearned and of retrained models. Both fleets are dealt into ``folds`` (model i into fold i mod ``folds``); a
    fold is scored with Gaussians of the other folds, and the AUC of an example is the mean of its folds' AUCs. So the
    expectation is exactly 1/2 for unlearning that is exact; Gaussians that contain the model under attack give more,
    those that leave out just that model give less. ``forgotten`` marks for each unlearned model the examples it was
    asked to forget, ``unseen`` for each retrained model those it never saw (by default all of them).

    Raises ``ValueError`` for values that are not finite and for examples with too few models in or outside a fold.
    Source: Hayes et al. 2024, "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy";
    the number of models and the split are not confirmed from the paper.
    """
    require_numbers("unlearned", unlearned, finite=True)
    require_numbers("retrained", retrained, finite=True)
    smallest = min(len(unlearned), len(retrained))
    if folds < 2 or smallest - -(-smallest // folds) < 2:
        raise ValueError(f"folds: expected at least 2, with 2 or more models outside each, got {folds} for {smallest}")
    values = torch.cat([unlearned.double(), retrained.double()])
    counted = torch.cat(
        [
            torch.ones_like(unlearned, dtype=torch.bool) if forgotten is None else forgotten,
            torch.ones_like(retrained, dtype=torch.bool) if unseen is None else unseen,
        ]
    )
    own = torch.cat([torch.arange(len(rows), device=values.device) for rows in (unlearned, retrained)]) % folds
    first = (torch.arange(len(values), device=values.device) < len(unlearned))[:, None]
    scores, areas = torch.zeros_like(values), []
    for fold in range(folds):
        here, others = (own == fold)[:, None], counted & (own != fold)[:, None]
        ratio = _log_density(values, _gaussians("forgotten", values, others & first, variance)) - _log_density(
            values, _gaussians("unseen", values, others & ~first, variance)
        )
        scores = torch.where(here, ratio, scores)
        here = here & counted
        areas.append(attack_auc(ratio.T, (here & first).T, (here & ~first).T))
    return ULira(torch.stack(areas).mean(0), scores[: len(unlearned)], scores[len(unlearned) :])
