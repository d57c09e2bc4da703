"""Unlearning by datamodels: predict what a retrained model would answer, then teach it to the model."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from toolkit.checks import typed
from toolkit.fleet import Fleet
from toolkit.unlearning.approximate import oracle_matching
from toolkit.unlearning.attribution import Datamodels
from toolkit.unlearning.parts import Mask, Strength, prepare

__all__ = ["datamodel_matching", "dm_direct"]

Outputs = Float[Tensor, "points classes"] | Float[Tensor, "members points classes"]


@typed
def dm_direct(outputs: Outputs, datamodels: Datamodels, forget: Mask) -> Outputs:
    """f̂(x) = f_o(x) - Σ_{i in forget} β_i(x): the predicted logits of a model that never saw what is to be forgotten.

    ``outputs`` are the logits f_o of one trained model or of each member; ``forget`` is ``(examples,)`` or
    ``(members, examples)``, and the result has a member axis if either of the two has one. ``datamodels`` serve all
    members: ``datamodels(masks, logits.flatten(1), penalty)`` with ``logits`` ``(models, points, classes)`` of models
    trained on the subsets ``masks``, so that row ``point * classes + class`` of their weights is β of that logit. The
    bias does not enter. No model is changed: this is a prediction of outputs, exact where they are sums over the
    training examples, and the aim of :func:`datamodel_matching`. Source: Georgiev et al. 2024, "Attribute-to-Delete:
    Machine Unlearning via Datamodel Matching" (DM-Direct). Raises ``ValueError`` if the sizes do not fit or nothing is
    forgotten.
    """
    points, classes = outputs.shape[-2:]
    rows, examples = datamodels.weights.shape
    if rows != points * classes:
        raise ValueError(f"datamodels: expected {points} points times {classes} classes outputs, got {rows}")
    if forget.shape[-1] != examples:
        raise ValueError(f"forget: expected a mask over the {examples} examples of datamodels, got {forget.shape[-1]}")
    if not bool(forget.any(-1).all()):
        raise ValueError("forget: expected at least one example for each member, got none")
    weights = datamodels.weights.to(outputs)
    change = forget.to(outputs) @ weights.mT
    return outputs - change.unflatten(-1, (points, classes))


@typed
def datamodel_matching(
    trained: Fleet,
    data: Any,
    forget: Mask,
    datamodels: Datamodels | Outputs,
    *,
    retain_weight: Strength = 1.0,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """:func:`oracle_matching` towards predicted outputs: mean_f |f(x) - f̂(x)|² + λ · mean_r |f(x) - f̂(x)|².

    f̂ is :func:`dm_direct` of each member, over the points of ``data``: no retrained model is needed. In place of
    ``datamodels`` predicted logits may be given, ``(examples, classes)`` for all members or ``(members, examples,
    classes)``: those of ``datamodels.predict(~forget[None])``, say, which predict the mean retrained model. λ =
    ``retain_weight`` ≥ 0. Source: Georgiev et al. 2024, "Attribute-to-Delete: Machine Unlearning via Datamodel
    Matching"; their optimiser, its rate and how many kept examples an epoch has are not confirmed. Errors as in
    :func:`oracle_matching` and :func:`dm_direct`.
    """
    task = prepare(trained, data, forget, retain)
    if isinstance(datamodels, Datamodels):
        placed = Datamodels(*(part.to(trained.device) for part in datamodels))
        wanted = dm_direct(trained.logits(task.fields["x"]), placed, task.forget)
    else:
        wanted = datamodels
    options = {"retain_weight": retain_weight, "retain": retain, "steps": steps, "seed": seed, **more}
    return oracle_matching(trained, data, forget, wanted.to(trained.parameters.dtype), **options)
