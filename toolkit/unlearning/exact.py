"""Exact unlearning: retraining, and the convex models for which forgetting has a closed form or a certificate.

Ridge and logistic regression minimise a sum over examples plus a penalty that does not grow with their number, so that
deleting examples leaves the penalty as it is. Functions of tensors work for one model; ``torch.vmap`` over ``weights``
(0 for a deleted example, 1 for the others) makes a fleet, each member with its own forget set.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.checks import readable, require_labels, require_positive, typed
from toolkit.fleet import Fleet, train
from toolkit.fleet.arguments import count_members
from toolkit.fleet.chunks import Loss
from toolkit.fleet.members import Build
from toolkit.fleet.store import as_fields
from toolkit.unlearning.settings import require_forget

__all__ = [
    "Ridge",
    "logistic",
    "logistic_gradient_norm",
    "newton_unlearn",
    "retrain",
    "ridge",
    "ridge_delete",
]

_HALVINGS = 12


@typed
def retrain(
    build: Build,
    loss: Loss,
    data: Any,
    forget: Bool[Tensor, "examples"] | Bool[Tensor, "members examples"],
    *,
    subsets: Bool[Tensor, "members examples"] | None = None,
    **options: Any,
) -> Fleet:
    """The oracle: a fleet trained from the start on the examples that are not to be forgotten.

    A call of :func:`toolkit.fleet.train`, which takes ``options``, with ``subsets & ~forget``; ``subsets`` is what the
    members were trained on before (default: everything). With ``forget`` of shape ``(examples,)`` the number of
    members comes from ``members`` or another argument. With the seed and streams of the original fleet each member
    begins at its original's initial state; an oracle that is independent of the original needs another seed. Lengths
    in ``epochs`` mean fewer steps on fewer examples, as for any training run.

    Raises ``ValueError`` for a mask that leaves a member nothing to forget or to keep, and for ``start``, ``memory`` or
    ``references``, through which a model that has seen the forget set could reach the oracle.
    """
    if leaks := sorted({"start", "memory", "references"} & set(options)):
        raise ValueError(
            f"{leaks[0]}: expected none for a retrained fleet, which must not know the forget set, got one"
        )
    examples = len(next(iter(as_fields(data).values())))
    require_forget(forget, examples)
    if subsets is None:
        keep = ~forget
        if forget.ndim == 1:
            keep = keep.expand(_members(options), examples)
        return train(build, loss, data, subsets=keep, **options)
    if not bool((subsets & ~forget).any(1).all()):
        raise ValueError("subsets: expected something to keep for each member, got a subset inside its forget set")
    return train(build, loss, data, subsets=subsets & ~forget, **options)


def _members(options: dict[str, Any]) -> int:
    """As :func:`train` will count them."""
    sized = {name: options.get(name) for name in ("epochs", "steps", "streams", "resume")}
    weights, optimiser = options.get("weights"), options.get("optimiser")
    sized["weights"] = weights if weights is not None and weights.ndim == 2 else None
    sized |= {name: getattr(optimiser, name, None) for name in ("lr", "weight_decay")}
    for group in ("hyper", "member_data"):
        sized |= {f"{group}[{name!r}]": value for name, value in (options.get(group) or {}).items()}
    return count_members(options.get("members"), **sized)


class Ridge(NamedTuple):
    """``theta`` (features, outputs) and ``inverse`` (features, features) of XᵀX + λI: all that deletion needs."""

    theta: Tensor
    inverse: Tensor


@typed
def ridge(
    x: Float[Tensor, "examples features"],
    y: Float[Tensor, "examples outputs"],
    penalty: float | Tensor,
    weights: Float[Tensor, "examples"] | None = None,
) -> Ridge:
    """Minimiser of ½ Σ_i w_i |y_i - θᵀx_i|² + ½ λ |θ|²: θ = (XᵀWX + λI)⁻¹ XᵀWy, λ = ``penalty`` > 0.

    A column of ones in ``x`` is an intercept, penalised like the rest. Raises ``ValueError`` for λ ≤ 0.
    """
    require_positive("penalty", penalty)
    weighted = x if weights is None else x * weights[:, None]
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(weighted.mT @ x + penalty * eye)
    return Ridge(torch.cholesky_solve(weighted.mT @ y, factor), torch.cholesky_solve(eye, factor))


@typed
def ridge_delete(
    model: Ridge, x_forget: Float[Tensor, "forget features"], y_forget: Float[Tensor, "forget outputs"]
) -> Ridge:
    """The ridge model without these examples, from the model and the examples alone: no retained example is touched.

    With A = XᵀX + λI, H = X_f A⁻¹ X_fᵀ and residuals r = y_f - X_f θ (Woodbury's identity)
    θ' = θ - A⁻¹X_fᵀ (I - H)⁻¹ r,  A'⁻¹ = A⁻¹ + A⁻¹X_fᵀ (I - H)⁻¹ X_f A⁻¹.
    Exact for examples that were in the fit with weight 1; for one example it is the leave-one-out formula, in which
    influence is divided by 1 - h. Deleting in several calls is deleting at once. Cost: forget³ + forget · features².
    Source: Guo et al. 2020, "Certified Data Removal from Machine Learning Models", whose Newton step this is: on a
    quadratic it has no error.
    """
    gain = model.inverse @ x_forget.mT
    eye = torch.eye(len(x_forget), dtype=x_forget.dtype, device=x_forget.device)
    inner = eye - x_forget @ gain
    residual = y_forget - x_forget @ model.theta
    theta = model.theta - gain @ torch.linalg.solve(inner, residual)
    inverse = model.inverse + gain @ torch.linalg.solve(inner, gain.mT)
    return Ridge(theta, (inverse + inverse.mT) / 2)


def _probabilities(theta: Tensor, x: Tensor) -> Tensor:
    return (x @ theta).softmax(-1)


def _gradient(theta: Tensor, x: Tensor, targets: Tensor, penalty: float | Tensor, weights: Tensor) -> Tensor:
    return (x * weights[:, None]).mT @ (_probabilities(theta, x) - targets) + penalty * theta


def _direction(theta: Tensor, x: Tensor, targets: Tensor, penalty: float | Tensor, weights: Tensor) -> Tensor:
    """-H⁻¹∇F with H = Σ_i w_i (diag p_i - p_i p_iᵀ) ⊗ x_i x_iᵀ + λI."""
    features, classes = theta.shape
    p = _probabilities(theta, x)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nab,ni,nj->iajb", spread * weights[:, None, None], x, x).reshape(features * classes, -1)
    hessian = hessian + penalty * torch.eye(features * classes, dtype=x.dtype, device=x.device)
    gradient = _gradient(theta, x, targets, penalty, weights)
    return -torch.linalg.solve(hessian, gradient.reshape(-1)).reshape(features, classes)


def _prepared(
    x: Tensor, y: Tensor, classes: int, penalty: float | Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    require_positive("penalty", penalty)
    require_labels("y", y, classes)
    targets = torch.nn.functional.one_hot(y, classes).to(x.dtype)
    return targets, x.new_ones(len(x)) if weights is None else weights


@typed
def logistic(
    x: Float[Tensor, "examples features"],
    y: Int[Tensor, "examples"],
    classes: int,
    penalty: float | Tensor,
    weights: Float[Tensor, "examples"] | None = None,
    steps: int = 30,
) -> Float[Tensor, "features classes"]:
    """Minimiser of F(θ) = Σ_i w_i CE(θᵀx_i, y_i) + ½ λ |θ|² by Newton's method from 0, λ = ``penalty`` > 0.

    Of the step lengths 1, ½, ¼, ... that with the smallest gradient norm is taken (Newton's direction lowers it, so
    none is worse than standing still). :func:`logistic_gradient_norm` says how close the result is. In float64 about 10
    steps reach 1e-10. Raises ``ValueError`` for λ ≤ 0, labels out of range or fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    targets, w = _prepared(x, y, classes, penalty, weights)
    theta = x.new_zeros(x.shape[1], classes)
    lengths = 0.5 ** torch.arange(_HALVINGS, dtype=x.dtype, device=x.device)
    lengths = torch.cat([lengths, lengths.new_zeros(1)])
    enough = torch.finfo(x.dtype).eps * torch.linalg.vector_norm(_gradient(theta, x, targets, penalty, w))
    for _ in range(steps):
        candidates = theta + lengths[:, None, None] * _direction(theta, x, targets, penalty, w)
        norms = _gradient(candidates, x, targets, penalty, w).square().sum((1, 2))
        best = norms.argmin()
        theta = candidates[best[None]][0]
        if readable(norms) and (best == len(lengths) - 1 or norms[best].sqrt() <= enough):  # the rest is rounding
            break
    return theta


@typed
def logistic_gradient_norm(
    theta: Float[Tensor, "features classes"],
    x: Float[Tensor, "examples features"],
    y: Int[Tensor, "examples"],
    penalty: float | Tensor,
    weights: Float[Tensor, "examples"] | None = None,
) -> Float[Tensor, ""]:
    """The certificate |∇F(θ)| on the retained examples (see :func:`logistic`): no retrained model is needed.

    F is λ-strongly convex, so |θ - θ*| ≤ |∇F(θ)| / λ: 0 only at the retrained optimum. Source: Guo et al. 2020,
    "Certified Data Removal from Machine Learning Models" (the gradient residual). Raises ``ValueError`` for λ ≤ 0 or
    labels out of range.
    """
    targets, w = _prepared(x, y, theta.shape[1], penalty, weights)
    return torch.linalg.vector_norm(_gradient(theta, x, targets, penalty, w))


@typed
def newton_unlearn(
    theta: Float[Tensor, "features classes"],
    x: Float[Tensor, "examples features"],
    y: Int[Tensor, "examples"],
    penalty: float | Tensor,
    forget: Bool[Tensor, "examples"],
    steps: int = 1,
) -> Float[Tensor, "features classes"]:
    """θ - H_r⁻¹ ∇F_r(θ): Newton steps on the retained examples from the original model, logistic regression.

    At the original optimum ∇F_r = -Σ_forget ∇CE. One step is the removal of Guo et al. 2020, "Certified Data Removal
    from Machine Learning Models" (without the noise of the certificate; there the penalty shrinks with the number of
    examples); each further step squares the remaining error. Raises ``ValueError`` for λ ≤ 0, labels out of range,
    fewer than 1 step, or a mask that forgets nothing or everything.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if readable(forget):
        require_forget(forget, len(x))
    targets, w = _prepared(x, y, theta.shape[1], penalty, (~forget).to(x.dtype))
    for _ in range(steps):
        theta = theta + _direction(theta, x, targets, penalty, w)
    return theta
