"""Many students of one teacher: the teacher runs once, its outputs are data, and the students train as one fleet."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toolkit.checks import typed
from toolkit.distillation.logits import require_teacher
from toolkit.fleet import Fleet, train
from toolkit.fleet.members import Build, Layout, fresh
from toolkit.fleet.store import as_fields

__all__ = ["TeacherOutputs", "distil", "teacher_outputs"]

_TRIED = 8  # examples on which the settings are tried before training


class TeacherOutputs(NamedTuple):
    """``logits`` (examples, classes) and penultimate ``features`` (examples, dim)."""

    logits: Tensor
    features: Tensor


@typed
def teacher_outputs(teacher: nn.Module, x: Float[Tensor, "examples ..."], batch: int = 1024) -> TeacherOutputs:
    """One pass of the teacher over ``x``, ``batch`` examples at a time, without gradients.

    Of a fleet, ``fleet[i]`` is a teacher; the logits of several are ``fleet.logits(x)``. Raises ``ValueError`` for no
    example, or fewer than 1 at a time.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if len(x) == 0:
        raise ValueError("x: expected at least one example, got none")
    with torch.no_grad():
        parts = [teacher(piece, return_features=True) for piece in x.split(batch)]
    logits, features = (torch.cat(values) for values in zip(*parts, strict=True))
    return TeacherOutputs(logits, features)


@typed
def distil(
    build: Build,
    loss: Callable[..., Any],
    data: Any,
    teacher: Float[Tensor, "examples classes"] | Float[Tensor, "members examples classes"],
    *,
    features: Float[Tensor, "examples ..."] | None = None,
    hyper: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Fleet:
    """A fleet of students that all learn from the same pass of the teacher.

    A call of :func:`toolkit.fleet.train`, which takes ``options``. ``loss(logits, teacher, labels, **settings)``
    returns values ``(batch,)``, as the losses of this package do; each entry of ``hyper`` (one value per member) is the
    keyword argument of its name: ``distil(build, kd, data, teacher, **grid(8, temperature=[1, 4], weight=[0.5, 0.9]))``
    is 32 students. Settings that all share are bound with ``functools.partial``. A loss with an argument ``progress``
    is given it.

    Args:
        build: makes one student.
        loss: pure and vmap-safe; the whole objective, cross-entropy included.
        data: fields with ``x`` and labels ``y``.
        teacher: its logits (or whatever ``loss`` wants as second argument) for all examples of ``data``, in their
            order; with a leading member axis each student has its own teacher.
        features: the teacher's features of all examples. Then the loss is given ``features=`` of the student and
            ``teacher_features=`` too.
        hyper: argument of the loss → one value per member. Tried on the first examples before training, so that a
            value which the loss refuses is an error here.
        options: of :func:`toolkit.fleet.train`.

    Raises ``ValueError`` for a teacher that does not fit ``data`` or is not finite, for fields that have the names of
    the teacher's, for settings that the loss does not take or refuses.
    """
    fields = as_fields(data)
    if missing := sorted({"x", "y"} - set(fields)):
        raise ValueError(f"data: expected fields x and y, got none named {missing[0]!r}")
    dtype, examples = Layout.of(fresh(build)).dtype, len(fields["x"])
    given = {"teacher": teacher} | ({} if features is None else {"teacher_features": features})
    for name, value in given.items():
        if name in fields or name in (options.get("member_data") or {}):
            raise ValueError(f"data: expected no field {name!r}, which is this function's own, got one")
        length = value.shape[1 if name == "teacher" and value.ndim == 3 else 0]
        if length != examples:
            raise ValueError(f"{name}: expected {examples} examples as in data, got {length}")
        require_teacher(value)
        given[name] = value.detach().to(dtype)
    settings = hyper if hyper is not None or options.get("resume") is None else options["resume"].hyper
    wants_progress = _check_settings(loss, settings or {}, features is not None)
    if features is None:
        _try(loss, given["teacher"], fields["y"], settings or {})

    def student(model: Any, batch: Any, chosen: Any) -> Any:
        extra = {"progress": batch.progress} if wants_progress else {}
        if features is None:
            return loss(model(batch.x), batch.teacher, batch.y, **chosen, **extra)
        logits, own = model(batch.x, return_features=True)
        extra |= {"features": own, "teacher_features": batch.teacher_features}
        return loss(logits, batch.teacher, batch.y, **chosen, **extra)

    if teacher.ndim == 3:
        options["member_data"] = dict(options.get("member_data") or {}) | {"teacher": given.pop("teacher")}
    return train(build, student, fields | given, hyper=hyper, **options)


def _check_settings(loss: Callable[..., Any], hyper: Mapping[str, Tensor], with_features: bool) -> bool:
    """Raise for names that the loss does not take; whether it wants to be told the progress of training."""
    known = inspect.signature(loss).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return "progress" in known
    free = set(list(known)[3:])
    for name in [*hyper, *(["features", "teacher_features"] if with_features else [])]:
        if name not in free:
            raise ValueError(f"hyper: expected arguments of the loss, {sorted(free)}, got {name!r}")
    return "progress" in free and "progress" not in hyper


def _try(loss: Callable[..., Any], teacher: Tensor, labels: Tensor, hyper: Mapping[str, Tensor]) -> None:
    """Each setting once on the first examples, where values can be read and the loss refuses what it must."""
    first = teacher if teacher.ndim == 2 else teacher[0]
    inputs = [first[:_TRIED], first[:_TRIED], labels[:_TRIED].to(first.device)]
    if any(value.ndim != 1 for value in hyper.values()) or len({len(value) for value in hyper.values()}) > 1:
        return  # train says what is wrong
    columns = [value.detach().to(first.device, torch.float64) for value in hyper.values()]
    rows = torch.stack(columns, 1).unique(dim=0) if columns else torch.zeros(1, 0)
    with torch.no_grad():
        for row in rows:
            loss(*inputs, **{name: value.to(first.dtype) for name, value in zip(hyper, row, strict=True)})
