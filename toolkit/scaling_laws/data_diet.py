"""Which examples a short training run says are hard, and a training set that keeps only those.

Scores of one run are noisy: they are computed for every member of a fleet that was trained for a few epochs, and
averaged over its members. Paul, Ganguli & Dziugaite 2021, "Deep Learning on a Data Diet: Finding Important Examples
Early in Training".
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import readable, require_labels, typed
from toolkit.fleet import Fleet
from toolkit.fleet.members import Member, fresh
from toolkit.fleet.store import as_fields
from toolkit.models import MLP

__all__ = ["detection_auc", "el2n", "forgetting_counts", "grand", "head_grand", "keep_largest", "reliability"]

_EXAMPLES = 128  # examples of one member whose gradients are held at a time


@typed
def el2n(
    logits: Float[Tensor, "*members examples classes"], labels: Int[Tensor, "examples"]
) -> Float[Tensor, "*members examples"]:
    """EL2N: the length ‖softmax(f(x)) - onehot(y)‖₂ of the error vector, from 0 to √2.

    For a net that says nothing yet (equal probabilities of K classes) it is √(1 - 1/K) for all examples. Average over
    members: ``el2n(fleet.logits(x), y).mean(0)``. Raises ``ValueError`` for labels out of range. Source: Paul, Ganguli
    & Dziugaite 2021, "Deep Learning on a Data Diet: Finding Important Examples Early in Training".
    """
    require_labels("labels", labels, logits.shape[-1])
    error = logits.softmax(-1) - F.one_hot(labels.long(), logits.shape[-1])
    return torch.linalg.vector_norm(error, dim=-1)


@typed
def head_grand(
    logits: Float[Tensor, "*members examples classes"],
    labels: Int[Tensor, "examples"],
    features: Float[Tensor, "*_ examples width"],
    bias: bool = True,
) -> Float[Tensor, "*members examples"]:
    """The part of GraNd that belongs to a linear head: EL2N · √(‖h‖² + 1), without the 1 where there is no bias.

    The gradient of the cross-entropy by the head is the outer product of the error vector and the features h, whose
    norm is the product of their norms. For a linear model (h = x) this is all of GraNd. Raises ``ValueError`` for
    labels out of range. Source: Paul, Ganguli & Dziugaite 2021, "Deep Learning on a Data Diet"; the product is
    elementary.
    """
    return el2n(logits, labels) * (features.square().sum(-1) + float(bias)).sqrt()


def grand(trained: Fleet, data: Any) -> Float[Tensor, "members examples"]:
    """GraNd: ‖∇_θ CE(f_θ(x), y)‖₂ over all parameters, of each example (fields ``x``, ``y``) and each member.

    Average over members: ``grand(fleet, data).mean(0)``. For an ``MLP`` each layer's gradient is an outer product, so
    that the norm is Σ_layers ‖δ‖² (‖input‖² + 1) under the root, exactly; any other net takes one gradient an example
    by autograd. GraNd of untrained nets is reported not to rank examples (a reading): score after some epochs. Raises
    ``ValueError`` for data without the two fields, or labels out of range. Source: Paul, Ganguli & Dziugaite 2021,
    "Deep Learning on a Data Diet: Finding Important Examples Early in Training".
    """
    fields = as_fields(data)
    if missing := [name for name in ("x", "y") if name not in fields]:
        raise ValueError(f"data: expected fields 'x' and 'y', got none of the name {missing[0]!r}")
    x, y = fields["x"].to(trained.device), fields["y"].to(trained.device)
    module, layout = fresh(trained.build).to(trained.device), trained.layout
    require_labels("data['y']", y, trained[:1].logits(x[:1]).shape[-1])
    if type(module) is MLP:
        views = layout.views(trained.parameters)
        parts = [_norms_of_mlp({n: v[i] for n, v in views.items()}, x.flatten(1), y) for i in range(len(trained))]
        return torch.stack(parts)

    def one(flat, x, y):
        views = {name: value[0] for name, value in layout.views(flat[None]).items()}
        return F.cross_entropy(Member(module, views)(x[None])[0], y)

    rows = []
    for flat in trained.parameters:
        found = []
        for part in torch.arange(len(y), device=y.device).split(_EXAMPLES):
            copies = flat.detach().expand(len(part), -1).clone().requires_grad_()
            with torch.enable_grad():
                values = torch.func.vmap(one)(copies, x[part], y[part])
            found.append(torch.linalg.vector_norm(torch.autograd.grad(values.sum(), copies)[0], dim=1))
        rows.append(torch.cat(found))
    return torch.stack(rows)


def _norms_of_mlp(views: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Gradient norms ``(examples,)`` of one net of linear layers: forwards for the inputs, backwards for the δ."""
    layers = [f"layers.{i}" for i in range(sum(name.startswith("layers.") for name in views) // 2)] + ["head"]
    inputs = [x]
    for name in layers[:-1]:
        inputs.append((inputs[-1] @ views[f"{name}.weight"].T + views[f"{name}.bias"]).relu())
    logits = inputs[-1] @ views["head.weight"].T + views["head.bias"]
    back = logits.softmax(-1) - F.one_hot(y.long(), logits.shape[-1])
    total = torch.zeros_like(x[:, 0])
    for name, before in zip(reversed(layers), reversed(inputs), strict=True):
        total = total + back.square().sum(1) * (before.square().sum(1) + 1)
        back = (back @ views[f"{name}.weight"]) * (before > 0)
    return total.sqrt()


@typed
def forgetting_counts(right: Bool[Tensor, "moments *members examples"]) -> Int[Tensor, "*members examples"]:
    """How often an example that was classified rightly at one moment is wrong at the next one.

    An example that was never right has no count; it gets the number of moments, which is more than any count, so that
    it ranks hardest. Raises ``ValueError`` for fewer than 2 moments. Source: Toneva et al. 2019, "An Empirical Study of
    Example Forgetting during Deep Neural Network Learning" (there the moments are the steps that see the example, and
    what is never learnt counts as forgotten for ever).
    """
    if len(right) < 2:
        raise ValueError(f"right: expected at least 2 moments, got {len(right)}")
    lost = (right[:-1] & ~right[1:]).sum(0)
    return torch.where(right.any(0), lost, len(right))


@typed
def keep_largest(
    scores: Float[Tensor, "*members examples"], keep: float, offset: float = 0.0
) -> Bool[Tensor, "*members examples"]:
    """Mask of a share ``keep`` of the examples: those that score highest after the highest ``offset`` are dropped.

    Both are shares of all examples, rounded to whole examples; of equal scores the earlier example counts as higher.
    With wrong labels in the data the very highest scores belong to them, which is what the offset is for. Use it as
    ``train(..., subsets=mask.expand(members, -1))``. Raises ``ValueError`` for a share outside [0, 1], keep + offset
    above 1, a mask without any example, or scores that are NaN. Source: Paul, Ganguli & Dziugaite 2021, "Deep Learning
    on a Data Diet: Finding Important Examples Early in Training".
    """
    examples = scores.shape[-1]
    first, count = round(offset * examples), round(keep * examples)
    if not 0 <= offset <= 1:
        raise ValueError(f"offset: expected a share from 0 to 1, got {offset}")
    if not 0 <= keep <= 1 or count < 1:
        raise ValueError(f"keep: expected a share from 0 to 1 that keeps some of {examples} examples, got {keep}")
    if first + count > examples:
        raise ValueError(f"offset: expected keep + offset of at most 1, got {keep} + {offset}")
    if readable(scores) and bool(scores.isnan().any()):
        raise ValueError("scores: expected numbers, got NaN")
    rank = torch.argsort(torch.argsort(scores, dim=-1, descending=True, stable=True), dim=-1)
    return (rank >= first) & (rank < first + count)


@typed
def detection_auc(
    scores: Float[Tensor, "*members examples"], wrong: Bool[Tensor, "examples"]
) -> Float[Tensor, "*members"]:
    """The chance that an example with a wrong label scores higher than one with a right label (a tie counts ½).

    From ranks: (Σ ranks of the wrong - w(w+1)/2) / (w r), w wrong and r right ones; ½ is chance. Raises ``ValueError``
    unless there are both. Source: Mann & Whitney 1947, "On a Test of Whether one of Two Random Variables is
    Stochastically Larger than the Other".
    """
    if readable(wrong) and not (bool(wrong.any()) and bool((~wrong).any())):
        raise ValueError(f"wrong: expected some of {len(wrong)} examples, got {int(wrong.sum())}")
    hits = wrong.to(scores.dtype)
    count = hits.sum()
    return ((_ranks(scores) * hits).sum(-1) - count * (count + 1) / 2) / (count * (1 - hits).sum())


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last axis; equal values share the mean of theirs."""
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    return (below + torch.searchsorted(ordered, values.contiguous(), right=True) + 1).to(values.dtype) / 2


@typed
def reliability(scores: Float[Tensor, "members examples"], runs: int) -> Float[Tensor, ""]:
    """Rank correlation (Spearman) between the scores averaged over ``runs`` members and over as many others.

    The mean over all pairs of disjoint groups of neighbouring members. If the correlation of single runs is r, that of
    averages over k runs is about k r / (1 + (k - 1) r) (Spearman 1910 and Brown 1910; exact for covariances). Raises
    ``ValueError`` where ``runs`` < 1 or there are fewer than 2 ``runs`` members. Source: the averages over runs of
    Paul, Ganguli & Dziugaite 2021, "Deep Learning on a Data Diet".
    """
    if not 1 <= runs <= len(scores) // 2:
        raise ValueError(f"runs: expected from 1 to half of {len(scores)} members, got {runs}")
    groups = len(scores) // runs
    ranks = _ranks(scores[: groups * runs].unflatten(0, (groups, runs)).mean(1))
    together = torch.corrcoef(ranks)
    return (together.sum() - groups) / (groups * (groups - 1))
