"""Dual-head distillation: a head for the labels, a head for the teacher's logits, one body.

Copying logits on top of cross-entropy pulls one linear classifier in two directions; with a head for each loss only the
body is shared, and what is left of the conflict there is projected away (one-sided gradient alignment).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.checks import require_positive, require_range, typed
from toolkit.distillation.logits import Logits, Scalar, label_mask, require_teacher
from toolkit.fleet import Fleet, train
from toolkit.fleet.members import Build, fresh
from toolkit.fleet.store import as_fields
from toolkit.models import MLP

__all__ = [
    "DualHead",
    "LossConflict",
    "align_gradient",
    "binary_kl",
    "binary_kl_norm",
    "dual_head_distil",
    "loss_conflict",
]

_SETTINGS = {"label_weight": 1.0, "weight": 1.0, "temperature": 2.0, "align": 0.0, "shared": 0.0}


@typed
def binary_kl(logits: Logits, teacher: Logits, temperature: Scalar = 2.0) -> Float[Tensor, "batch"]:
    """T² Σ_c KL(σ(teacher_c / T) ‖ σ(logits_c / T)): each class as a yes-or-no question, in nats.

    Unlike KL of softmaxes it fixes the level of the logits too. T = ``temperature`` > 0. Raises ``ValueError`` for
    T ≤ 0.

    BinaryKL of Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary
    Head".
    """
    require_positive("temperature", temperature)
    s, t = logits / temperature, teacher / temperature
    yes, no = F.logsigmoid(t) - F.logsigmoid(s), F.logsigmoid(-t) - F.logsigmoid(-s)
    return temperature**2 * (t.sigmoid() * yes + (-t).sigmoid() * no).sum(-1)


@typed
def binary_kl_norm(logits: Logits, teacher: Logits, temperature: Scalar = 2.0) -> Float[Tensor, "batch"]:
    """T² Σ_c KL(½ ‖ σ(d_c / T)), d = logits - teacher; this is T² Σ_c log cosh(d_c / 2T), in nats.

    0 where the logits are equal, d² / 8 near there (as the squared error), T |d| / 2 far away (as the absolute error):
    T = ``temperature`` > 0 says where one becomes the other. Raises ``ValueError`` for T ≤ 0.

    Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
    (BinaryKL-Norm). Its code clamps σ at 1e-8; no clamp is needed here.
    """
    require_positive("temperature", temperature)
    half = (logits - teacher) / (2 * temperature)
    near = half.abs() < 1
    by_tanh = -0.5 * torch.log1p(-torch.where(near, half, 0).tanh().square())  # no digits lost near 0
    size = half.abs()
    return temperature**2 * torch.where(near, by_tanh, size + torch.log1p((-2 * size).exp()) - math.log(2)).sum(-1)


@typed
def align_gradient(gradient: Float[Tensor, "size"], leading: Float[Tensor, "size"]) -> Float[Tensor, "size"]:
    """``gradient`` without what works against ``leading``: g - min(0, ⟨g, l⟩) l / |l|².

    Where the two agree g stays as it is; else the result is orthogonal to l, so that a small step along it does not
    raise the leading loss. One-sided: l is never changed. Where l = 0 the result is g.

    Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"; the
    two-sided form is Yu et al. 2020, "Gradient Surgery for Multi-Task Learning".
    """
    return gradient + _against(gradient, leading) * leading


def _against(gradient: Tensor, leading: Tensor) -> Tensor:
    """max(0, -⟨g, l⟩) / |l|²: how much of l is to be added."""
    square = leading.square().sum()
    return (-(gradient * leading).sum()).clamp_min(0) / torch.where(square > 0, square, 1)


class DualHead(nn.Module):
    """An MLP with a second head on the same features: ``model(x)`` are the logits of the first, which is the answer.

    ``model(x, both=True)`` gives ``(logits, auxiliary logits)``; the second head is for training only.

    Args:
        inputs, hidden, classes, dropout: as for :class:`toolkit.models.MLP`; at least one hidden layer.
        auxiliary: width of a hidden layer of the second head; ``None`` for a linear one.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], classes: int, auxiliary: int | None = None, dropout: float = 0.0
    ):
        super().__init__()
        if len(hidden) == 0:
            raise ValueError("hidden: expected at least one hidden layer, which the heads share, got none")
        if auxiliary is not None and auxiliary < 1:
            raise ValueError(f"auxiliary: expected None or a width of at least 1, got {auxiliary}")
        self.body = MLP(inputs, hidden, classes, dropout)
        wide = hidden[-1]
        self.auxiliary: nn.Module = nn.Linear(wide, classes)
        if auxiliary is not None:
            self.auxiliary = nn.Sequential(nn.Linear(wide, auxiliary), nn.ReLU(), nn.Linear(auxiliary, classes))

    @property
    def head(self) -> nn.Module:
        """The first head."""
        return self.body.head

    def forward(self, x: Tensor, key: Tensor | None = None, return_features: bool = False, both: bool = False):
        logits, features = self.body(x, key=key, return_features=True)
        if both:
            return logits, self.auxiliary(features)
        return (logits, features) if return_features else logits


@typed
def dual_head_distil(
    build: Build,
    data: Any,
    teacher: Float[Tensor, "examples classes"],
    *,
    hyper: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Fleet:
    """Train dual-head students: γ CE of the first head + α :func:`binary_kl_norm` of the second to the teacher.

    A call of :func:`toolkit.fleet.train`, which takes ``options``; ``**grid(8, align=[0, 1], shared=[0, 1])`` gives the
    four variants, paired. With alignment, the gradient of the second loss in all parameters together (a reading; they
    meet in the body only) goes through :func:`align_gradient` at every step, with that of the first as ``leading``. The
    sum is then the gradient of (1 + c) γ CE + α KL, c ≥ 0 a number of this step, and so it is written: the history of a
    fleet shows this value.

    Args:
        build: makes one :class:`DualHead`.
        data: fields with ``x`` and labels ``y``.
        teacher: its logits for all examples of ``data``, in their order.
        hyper: any of ``label_weight`` γ (1), ``weight`` α (1), ``temperature`` (2), ``align`` (0; 1 with alignment) and
            ``shared`` (0; 1 puts both losses on the first head, which is what two heads are to be compared with).
        options: of :func:`toolkit.fleet.train`, without ``weights``.

    Raises ``ValueError`` for a teacher that does not fit ``data`` or is not finite, other settings than these, values
    out of range, or weights of examples.

    Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head".
    """
    if "weights" in options:
        raise ValueError("weights: expected none, since the alignment is that of unweighted losses, got some")
    fields, module = as_fields(data), fresh(build)
    if not isinstance(module, DualHead):
        raise ValueError(
            f"build: expected a function that makes a DualHead, got one that makes {type(module).__name__}"
        )
    _check_teacher(fields, teacher)
    given = hyper if hyper is not None or options.get("resume") is None else options["resume"].hyper
    _check_settings(given or {})
    aligning = bool((given or {}).get("align", torch.zeros(1)).any())

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        chosen = _SETTINGS | hyper
        first, second = model(batch.x, both=True)
        copying = torch.where(torch.as_tensor(chosen["shared"], device=first.device) > 0, first, second)
        hard = chosen["label_weight"] * F.cross_entropy(first, batch.y, reduction="none")
        soft = chosen["weight"] * binary_kl_norm(copying, batch.teacher, chosen["temperature"])
        if not aligning:
            return hard + soft
        slopes = _gradients(module, model.parameters, batch, chosen)
        leading, gradient = (torch.cat([pair[i] for pair in slopes.values()]) for i in range(2))
        return (1 + chosen["align"] * _against(gradient, leading)) * hard + soft

    data = fields | {"teacher": teacher.detach().to(next(module.parameters()).dtype)}
    return train(build, loss, data, hyper=hyper, **options)


def _gradients(
    module: DualHead, parameters: Mapping[str, Tensor], batch: Any, chosen: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Flat gradients of both mean losses in each layer that the first loss reaches, by the chain rule as written here.

    Inside a loss of a fleet neither autograd nor ``torch.func.grad`` can be asked for gradients of its parts.
    """
    p = {name: value.detach() for name, value in parameters.items()}

    def linear(layer: str, h: Tensor) -> Tensor:
        return h @ p[f"{layer}.weight"].mT + p[f"{layer}.bias"]

    layers = [f"body.layers.{i}" for i in range(len(module.body.layers))]
    states = [batch.x.flatten(1)]
    for layer in layers:
        states.append(linear(layer, states[-1]).relu())
    features = states[-1]
    first = linear("body.head", features)
    if isinstance(module.auxiliary, nn.Sequential):
        middle = linear("auxiliary.0", features).relu()
        second = linear("auxiliary.2", middle)
    else:
        second = linear("auxiliary", features)
    shared = torch.as_tensor(chosen["shared"], device=first.device) > 0
    off = torch.where(shared, first, second) - batch.teacher
    temperature, n = chosen["temperature"], len(first)
    hard = chosen["label_weight"] * (first.softmax(-1) - label_mask(batch.y, first.shape[-1]).to(first.dtype)) / n
    soft = chosen["weight"] * temperature / 2 * torch.tanh(off / (2 * temperature)) / n
    if isinstance(module.auxiliary, nn.Sequential):
        inner = (soft @ p["auxiliary.2.weight"]) * (middle > 0)
        apart = inner @ p["auxiliary.0.weight"]
    else:
        apart = soft @ p["auxiliary.weight"]

    def slopes(h: Tensor, *deltas: Tensor) -> tuple[Tensor, Tensor]:
        one, two = (torch.cat([(delta.mT @ h).reshape(-1), delta.sum(0)]) for delta in deltas)
        return one, two

    found = {"body.head": slopes(features, hard, torch.where(shared, soft, 0))}
    back = [hard @ p["body.head.weight"], torch.where(shared, soft @ p["body.head.weight"], apart)]
    for i, layer in reversed(list(enumerate(layers))):
        back = [delta * (states[i + 1] > 0) for delta in back]
        found[layer] = slopes(states[i], *back)
        back = [delta @ p[f"{layer}.weight"] for delta in back]
    return found


def _check_teacher(fields: Mapping[str, Tensor], teacher: Tensor) -> None:
    for name in ("x", "y"):
        if name not in fields:
            raise ValueError(f"data: expected fields x and y, got none named {name!r}")
    if "teacher" in fields:
        raise ValueError("data: expected no field 'teacher', which is this function's own, got one")
    if len(teacher) != len(fields["x"]):
        raise ValueError(f"teacher: expected {len(fields['x'])} examples as in data, got {len(teacher)}")
    require_teacher(teacher)


def _check_settings(hyper: Mapping[str, Tensor]) -> None:
    for name, values in hyper.items():
        if name not in _SETTINGS:
            raise ValueError(f"hyper: expected some of {sorted(_SETTINGS)}, got {name!r}")
        for value in values.reshape(-1).tolist():
            if name == "temperature":
                require_positive(name, value)
            else:
                require_range(name, value, 0, 1 if name in ("align", "shared") else math.inf)


class LossConflict(NamedTuple):
    """Cosine of the two losses' gradients per member, in the parameters of the ``body`` and of the first ``head``."""

    body: Tensor
    head: Tensor


@typed
def loss_conflict(
    fleet: Fleet, data: Any, teacher: Float[Tensor, "examples classes"], temperature: float = 2.0
) -> LossConflict:
    """cos(∇CE, ∇:func:`binary_kl_norm`) on ``data`` when both are losses of the first head, from -1 to 1.

    Below 0 a step for one loss undoes the other. The paper's reason for two heads is that this happens in the
    classifier and not in the body. For a fleet of :class:`DualHead`; 0 where a gradient is 0. Raises ``ValueError`` for
    other fleets, a teacher that does not fit ``data`` or is not finite, or a temperature ≤ 0.

    Yang et al. 2024, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head".
    """
    module, fields = fresh(fleet.build), as_fields(data)
    if not isinstance(module, DualHead):
        raise ValueError(f"fleet: expected one of DualHead, got one of {type(module).__name__}")
    require_positive("temperature", temperature)
    _check_teacher(fields, teacher)

    def measure(model: Any, batch: Any, hyper: Any) -> tuple[Tensor, Tensor]:
        chosen = _SETTINGS | {"temperature": temperature, "shared": 1.0}
        slopes = _gradients(module, model.parameters, batch, chosen)
        head = slopes.pop("body.head")
        body = [torch.cat([pair[i] for pair in slopes.values()]) for i in range(2)]
        return _cosine(*body), _cosine(*head)

    shown = {"x": fields["x"], "y": fields["y"], "teacher": teacher.to(next(module.parameters()).dtype)}
    return LossConflict(*fleet.evaluate(measure, shown))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(norms > 0, (a * b).sum() / torch.where(norms > 0, norms, 1), 0)
