"""Which training examples made this output? Datamodels, influence and TRAK-like scores, and what to forget by them.

All scores have one sign, that of a datamodel's weights: the predicted change of an output when the training example is
*included*. Leaving a set out changes the output by minus the sum of its scores, as far as a linear model holds.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from toolkit import random
from toolkit.checks import require_positive, typed
from toolkit.fleet import Fleet
from toolkit.fleet.members import Fields, fresh
from toolkit.fleet.store import as_fields
from toolkit.unlearning.parts import slopes_of

__all__ = [
    "Datamodels",
    "datamodels",
    "influence_scores",
    "lds",
    "lds_ceiling",
    "pick_by_component",
    "random_subsets",
    "trak",
]

_ROWS = 64  # of a Hessian, computed together

Output = Callable[[Any, Any, Any], Tensor]  # like a loss: (model, batch, hyper) -> one value per example of the batch


@typed
def random_subsets(models: int, examples: int, fraction: float = 0.5, seed: int = 0) -> Bool[Tensor, "models examples"]:
    """Training subsets for datamodels: each has round(``fraction`` · examples) examples, without replacement.

    Raises ``ValueError`` for fewer than 1 model, or a fraction that leaves nothing in or nothing out.
    """
    count = round(fraction * examples)
    if models < 1:
        raise ValueError(f"models: expected at least 1, got {models}")
    if not 0 < count < examples:
        raise ValueError(
            f"fraction: expected one that keeps some of {examples} examples and drops some, got {fraction}"
        )
    keys = random.fold_in(random.key(seed), torch.arange(models))
    chosen = random.permutation(keys, examples)[:, :count]
    return torch.zeros(models, examples, dtype=torch.bool).scatter(1, chosen, True)


class Datamodels(NamedTuple):
    """Linear models of outputs in the training set: ``weights`` ``(points, examples)``, ``bias`` ``(points,)``."""

    weights: Tensor
    bias: Tensor

    def predict(self, masks: Bool[Tensor, "models examples"]) -> Float[Tensor, "models points"]:
        """Outputs of models that would be trained on these subsets: bias + sum of the weights of those included."""
        return masks.to(self.weights.dtype) @ self.weights.mT + self.bias


@typed
def datamodels(
    masks: Bool[Tensor, "models examples"], outputs: Float[Tensor, "models points"], penalty: float
) -> Datamodels:
    """Ridge regression of outputs on 0/1 membership: min_w,b Σ_m (f_m - b - wᵀ1_m)² + λ |w|², b free of the penalty.

    ``outputs`` are one number per model and point, a margin say. Solved exactly in the smaller of the two dimensions:
    examples × examples, or models × models where there are fewer models than examples (w = Mᵀ(MMᵀ + λI)⁻¹f, M the
    centred masks). ``penalty`` λ > 0; what predicts best is found on subsets that were kept back.
    Source: Ilyas et al. 2022, "Datamodels: Predicting Predictions from Training Data", which uses the lasso. Raises
    ``ValueError`` for λ ≤ 0, fewer than 2 models, or outputs that are not finite.
    """
    require_positive("penalty", penalty)
    if len(masks) < 2:
        raise ValueError(f"masks: expected at least 2 models, got {len(masks)}")
    if not bool(outputs.isfinite().all()):
        raise ValueError("outputs: expected finite values, got some that are not")
    membership, target = masks.to(outputs.dtype), outputs.mean(0)
    centre = membership.mean(0)
    m, f = membership - centre, outputs - target
    models, examples = m.shape
    table = m.mT @ m if examples <= models else m @ m.mT
    table.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(table)
    weights = torch.cholesky_solve(m.mT @ f, factor) if examples <= models else m.mT @ torch.cholesky_solve(f, factor)
    return Datamodels(weights.mT.contiguous(), target - centre @ weights)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, ties at their mean rank."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).to(values.dtype) / 2


@typed
def lds(predicted: Float[Tensor, "models points"], actual: Float[Tensor, "models points"]) -> Float[Tensor, "points"]:
    """Linear datamodeling score: Spearman's rank correlation over subsets, predicted against trained, for each point.

    In [-1, 1]; ties have their mean rank; NaN where one side is constant. ``actual`` are outputs of models trained on
    subsets that the scores have not seen, averaged over seeds if there are several; :func:`lds_ceiling` is what a
    perfect prediction gets. Source: Park et al. 2023, "TRAK: Attributing Model Behavior at Scale". Raises
    ``ValueError`` for fewer than 3 models.
    """
    if len(actual) < 3:
        raise ValueError(f"actual: expected at least 3 models to rank, got {len(actual)}")
    first, second = _ranks(predicted.mT), _ranks(actual.mT)
    first, second = first - first.mean(-1, keepdim=True), second - second.mean(-1, keepdim=True)
    scale = first.square().sum(-1).sqrt() * second.square().sum(-1).sqrt()
    return torch.where(scale > 0, (first * second).sum(-1) / scale, float("nan"))


@typed
def lds_ceiling(outputs: Float[Tensor, "models seeds points"]) -> Float[Tensor, "points"]:
    """The LDS that the noise of seeds leaves to a perfect prediction of the mean over seeds, for each point.

    With mean squares of the one-way table, MS_b between subsets and MS_w within (over seeds), the observed means have
    reliability r = [1 - MS_w / MS_b]₊, and the expected output correlates √r with them. As a rank correlation of normal
    variables that is (6/π) arcsin(√r / 2). An estimate: it varies with few subsets, and is NaN if nothing varies.
    Source: the standard theory of reliability (Spearman 1904, "The Proof and Measurement of Association between Two
    Things"); the use for LDS is ours. Raises ``ValueError`` for fewer than 2 subsets or 2 seeds.
    """
    models, seeds, _ = outputs.shape
    if models < 2 or seeds < 2:
        raise ValueError(f"outputs: expected at least 2 subsets and 2 seeds, got {models} and {seeds}")
    within = outputs.var(1).mean(0)
    between = seeds * outputs.mean(1).var(0)
    return 6 / math.pi * ((1 - within / between).clamp_min(0).sqrt() / 2).arcsin()


class _Row:
    """One member's model as a function of its flat row of parameters."""

    def __init__(self, module: Any, parameters: Mapping[str, Tensor]):
        self.module, self.parameters = module, parameters

    def __call__(self, x: Tensor, **options: Any) -> Any:
        return functional_call(self.module, dict(self.parameters), (x,), options)


def _values(fleet: Fleet, function: Output) -> Callable[..., Tensor]:
    """(flat parameters, one example, member's index) -> the function's value for that example."""
    module, layout = fresh(fleet.build).to(fleet.device), fleet.layout

    def value(flat: Tensor, example: dict[str, Tensor], member: int) -> Tensor:
        parameters = {name: view[0] for name, view in layout.views(flat[None]).items()}
        batch = Fields({name: field[None] for name, field in example.items()})
        hyper = Fields({name: field[member] for name, field in fleet.hyper.items()})
        result = function(_Row(module, parameters), batch, hyper)
        if result.shape != (1,):
            raise ValueError(f"function: expected one value per example, got shape {tuple(result.shape)} for one")
        return result[0]

    return value


def _on(fleet: Fleet, name: str, data: Any) -> dict[str, Tensor]:
    fields = {field: value.to(fleet.device) for field, value in as_fields(data, name).items()}
    if len(lengths := {len(value) for value in fields.values()}) != 1 or 0 in lengths:
        raise ValueError(f"{name}: expected fields of one length of at least 1, got {sorted(lengths)}")
    return fields


@typed
def influence_scores(
    trained: Fleet,
    loss: Output,
    output: Output,
    data: Any,
    queries: Any,
    *,
    penalty: float = 1e-2,
    curvature: Literal["hessian", "fisher"] = "hessian",
) -> Float[Tensor, "members queries examples"]:
    """-∇f(q)ᵀ (C + λI)⁻¹ ∇ℓ_i for every query q and training example i: no projection, so for small models.

    ``loss`` and ``output`` have a loss's signature, (model, batch, hyper) → one value per example; f is ``output``, a
    margin say. C is the exact Hessian Σ_i ∇²ℓ_i or the empirical Fisher matrix Σ_i ∇ℓ_i ∇ℓ_iᵀ, and λ = ``penalty`` ≥ 0
    that of the training objective Σ_i ℓ_i + ½ λ |θ|². A net is seldom at a minimum: there the Hessian needs a larger λ
    to be positive definite, and the Fisher matrix only λ > 0. For a linear model exact leave-one-out is this (with the
    Hessian) divided by 1 - h_ii: influence is too small by the leverage. Memory: parameters² + examples · parameters;
    a few thousand parameters at most. Source: Koh & Liang 2017, "Understanding Black-box Predictions via Influence
    Functions". Raises ``ValueError`` for λ < 0 and where C + λI is not positive definite.
    """
    if not penalty >= 0:
        raise ValueError(f"penalty: expected a number of at least 0, got {penalty}")
    examples, asked = _on(trained, "data", data), _on(trained, "queries", queries)
    losses, outputs = _values(trained, loss), _values(trained, output)
    scores = []
    for member, flat in enumerate(trained.parameters.detach()):

        def total(row: Tensor, member: int = member) -> Tensor:
            return vmap(losses, (None, 0, None))(row, examples, member).sum()

        given = slopes_of(partial(losses, member=member), flat, examples)
        wanted = slopes_of(partial(outputs, member=member), flat, asked)
        matrix = given.mT @ given if curvature == "fisher" else jacrev(grad(total), chunk_size=_ROWS)(flat)
        matrix.diagonal().add_(penalty)
        factor, bad = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
        if bad.item():
            raise ValueError(f"penalty: expected one that makes the {curvature} positive definite, got {penalty}")
        scores.append(-wanted @ torch.cholesky_solve(given.mT, factor))
    return torch.stack(scores)


@typed
def trak(
    trained: Fleet,
    data: Any,
    queries: Any,
    *,
    projections: int | None = 512,
    penalty: float = 0.0,
    seed: int = 0,
) -> Float[Tensor, "queries examples"]:
    """TRAK-like scores φ(q)ᵀ (ΦᵀΦ + λI)⁻¹ φ_i, a mean over members, times the mean over members of 1 - p_i.

    φ = Pᵀ∇f with the margin f = log p_y / (1 - p_y) of fields ``x`` and ``y``, and P a normal random projection to
    ``projections`` dimensions (None: no projection), another one for each member. Members should be trained on
    different subsets or from different seeds. TRAK's last step, a soft threshold, is left out. The sign is that of the
    margin: positive scores help the query. Source: Park et al. 2023, "TRAK: Attributing Model Behavior at Scale".
    Raises ``ValueError`` for fewer than 1 projection, λ < 0, or a singular ΦᵀΦ (more dimensions than examples and λ=0).
    """
    if projections is not None and projections < 1:
        raise ValueError(f"projections: expected at least 1, got {projections}")
    if not penalty >= 0:
        raise ValueError(f"penalty: expected a number of at least 0, got {penalty}")
    examples, asked = _on(trained, "data", data), _on(trained, "queries", queries)
    value = _values(trained, _margin)
    size = trained.parameters.shape[1]
    affinities, losses = [], []
    for member, flat in enumerate(trained.parameters.detach()):
        given, wanted = (slopes_of(partial(value, member=member), flat, batch) for batch in (examples, asked))
        if projections is not None:
            key = random.key(seed, int(trained.streams[member]), device=flat.device)
            matrix = random.normal(key, (size, projections), flat.dtype) * projections**-0.5
            given, wanted = given @ matrix, wanted @ matrix
        kernel = given.mT @ given
        kernel.diagonal().add_(penalty)
        factor, bad = torch.linalg.cholesky_ex(kernel)
        if bad.item():
            raise ValueError(
                f"penalty: expected one that makes the kernel of {len(kernel)} rows regular, got {penalty}"
            )
        affinities.append(wanted @ torch.cholesky_solve(given.mT, factor))
        losses.append(
            torch.sigmoid(-vmap(value, (None, 0, None))(flat, examples, member))
        )  # 1 - p of the margin log p / (1 - p)
    return torch.stack(affinities).mean(0) * torch.stack(losses).mean(0)


def _margin(model: Any, batch: Any, hyper: Any) -> Tensor:
    """log p_y / (1 - p_y) = z_y - logsumexp of the others."""
    logits = model(batch.x)
    own = logits.gather(1, batch.y[:, None])
    others = logits.scatter(1, batch.y[:, None], -math.inf)
    return own[:, 0] - others.logsumexp(1)


@typed
def pick_by_component(
    weights: Float[Tensor, "examples examples"],
    component: int,
    count: int,
    side: Literal["top", "bottom", "both"] = "top",
) -> Bool[Tensor, "examples"]:
    """Forget set of the ``count`` examples that lie farthest along a principal component of the datamodels.

    Row i of ``weights`` is the datamodel of training example i; rows are centred and projected on principal
    ``component`` (0 is the first), whose sign is such that the largest |projection| is positive. ``both`` takes half
    (the larger one) from the top and the rest from the bottom. Such sets have a common influence, so they are harder
    to forget than random ones. Source: Georgiev et al. 2024, "Attribute-to-Delete: Machine Unlearning via Datamodel
    Matching", for the sets; the sign is ours. Raises ``ValueError`` for a component or a count out of range.
    """
    examples = len(weights)
    if not 0 <= component < examples:
        raise ValueError(f"component: expected 0 to {examples - 1}, got {component}")
    if not 0 < count < examples:
        raise ValueError(f"count: expected 1 to {examples - 1} of {examples} examples, got {count}")
    rows = weights - weights.mean(0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    along = rows @ directions[component]
    along = along * along[along.abs().argmax()].sign()
    order = along.argsort(descending=True, stable=True)
    top = {"top": count, "bottom": 0, "both": (count + 1) // 2}[side]
    mask = torch.zeros(examples, dtype=torch.bool, device=weights.device)
    mask[order[:top]] = True
    mask[order[examples - (count - top) :]] = True
    return mask
