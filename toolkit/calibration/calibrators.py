"""Calibrators fitted after training: temperature, vector, matrix, Dirichlet and ensemble temperature scaling.

scikit-learn's verbs: ``fit(logits, labels)`` on held-out data returns the calibrator itself, and
``predict_proba(logits)`` gives probabilities. Fitted values end with an underscore and have the dtype and device of the
logits they were fitted on. One-vs-rest calibrators are in :mod:`toolkit.calibration.one_vs_rest`, those with a
temperature of each example in :mod:`toolkit.calibration.adaptive_temperature`.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy as nll

from toolkit.calibration.losses import log_softmax
from toolkit.checks import readable, require_labels, typed

__all__ = [
    "DirichletCalibration",
    "EnsembleTemperatureScaling",
    "MatrixScaling",
    "TemperatureScaling",
    "VectorScaling",
    "fit_temperature",
]

Fitted = TypeVar("Fitted", bound="Calibrator")


@typed
def fit_temperature(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
    """The temperature T that minimises the mean cross-entropy of softmax(logits / T); works under ``vmap``.

    With β = 1/T and p = softmax(β z), the optimum has E[max z − E_p z] = E[max z − z_y]. At most eight Newton steps on
    the logarithm of that equation, in log β and of at most one unit each, start at β = 1 / (root mean square of the
    centred logits). So fit(s·z) = s · fit(z), and T stays within e^±8 times that root mean square: T is at the lower
    bound where every label has the largest logit (the optimum would be 0), at the upper one where the labels' logits
    are on average no larger than the others (the optimum would be infinite), and 1 where all logits are equal. T is a
    fitted constant: it carries no gradient.

    Source: temperature scaling of Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. Raises
    ``ValueError`` for logits that are not finite, labels out of range, or an empty batch.
    """
    _require_logits("logits", logits)
    require_labels("labels", labels, logits.shape[-1])
    below = logits.detach() - logits.detach().amax(-1, keepdim=True)
    missed = -below.gather(-1, labels[:, None]).mean()
    blind = missed >= -below.mean()
    spread = (below.square().mean() - below.mean(-1).square().mean()).clamp_min(0).sqrt()
    flat = spread == 0
    tiny = torch.finfo(logits.dtype).tiny
    inverse = 1 / torch.where(flat, 1.0, spread)
    for _ in range(8):
        lost, variance = _moments(inverse, below)
        step = (lost.clamp_min(tiny).log() - missed.clamp_min(tiny).log()) * lost / (variance.clamp_min(tiny) * inverse)
        step = torch.where((lost > tiny) & ~blind, step.clamp(-1, 1), -1.0)
        step = torch.where(missed > 0, step, 1.0)
        inverse = inverse * step.exp()
        if readable(step) and bool(step.square() < torch.finfo(logits.dtype).eps):
            break  # the next step would be no larger than rounding
    return torch.where(flat, 1.0, 1 / inverse)


def _moments(inverse: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows of −E_p z and of Var_p z, with p = softmax(``inverse`` · z) and z = ``below`` (largest entry 0).

    Taken in blocks of rows that fit the processor's cache: about four times as fast as whole arrays.
    """
    lost, variance = [], []
    for z in below.split(max(1, 131072 // below.shape[-1])):
        weights = (inverse * z).exp_()
        total = weights.sum(-1)
        mean = weights.mul_(z).sum(-1) / total
        lost.append(mean.sum())
        variance.append((weights.mul_(z).sum(-1) / total - mean.square()).sum())
    return -torch.stack(lost).sum() / len(below), torch.stack(variance).sum() / len(below)


class Calibrator:
    """What all calibrators share: ``fit``, ``predict_proba``, and the checks of what they are given.

    ``n_classes_`` is the number of classes seen in ``fit``. ``fit`` raises ``ValueError`` for an empty batch, logits
    that are not finite or are probabilities, and labels out of range; ``predict_proba`` raises ``RuntimeError`` before
    ``fit``, and ``ValueError`` for logits that are not finite or have another number of classes.
    """

    n_classes_: int

    @typed
    def fit(self: Fitted, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]) -> Fitted:
        """Fit to held-out ``logits`` and their class indices; returns the calibrator."""
        logits = self._checked(logits, labels)
        with torch.enable_grad():
            self._fit(logits, labels)
        self.n_classes_ = logits.shape[-1]
        return self

    @typed
    def predict_proba(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Calibrated probabilities of ``logits``."""
        self._require_fitted(logits)
        return self._predict(logits)

    def _checked(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits without their gradient, if they and the labels can be fitted to."""
        _require_logits("logits", logits)
        require_labels("labels", labels, logits.shape[-1])
        if len(logits) > 1 and bool((logits >= 0).all() & ((logits.sum(-1) - 1).abs() < 1e-5).all()):
            raise ValueError("logits: every row is a probability vector; pass logits, or the probabilities' logarithm")
        return logits.detach()

    def _require_fitted(self, logits: Tensor) -> None:
        if not hasattr(self, "n_classes_"):
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(logits, labels) before predict_proba")
        if logits.shape[-1] != self.n_classes_:
            raise ValueError(f"logits: expected {self.n_classes_} classes as in fit, got {logits.shape[-1]}")
        require_finite("logits", logits)

    def _fit(self, logits: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def _predict(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


class TemperatureScaling(Calibrator):
    """softmax(z / T) with one temperature for all (``temperature_``), by :func:`fit_temperature`.

    The predicted class never changes. Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.
    """

    temperature_: Tensor

    def _fit(self, logits: Tensor, labels: Tensor) -> None:
        self.temperature_ = fit_temperature(logits, labels)

    def _predict(self, logits: Tensor) -> Tensor:
        return _softmax(logits / self.temperature_.to(logits))


class VectorScaling(Calibrator):
    """softmax(w ∘ z + b): a scale ``weight_`` and an offset ``bias_`` (of mean 0) for each class.

    The maximum-likelihood fit, a convex problem. Guo et al. 2017, "On Calibration of Modern Neural Networks", section
    4.2. Unlike a temperature it depends on what constant each row of logits carries.
    """

    weight_: Tensor
    bias_: Tensor

    def _fit(self, logits: Tensor, labels: Tensor) -> None:
        z, y = _double(logits), labels.cpu()
        classes = z.shape[-1]

        def loss(flat: Tensor) -> Tensor:
            weight, bias = flat.view(2, classes)
            return nll(z * weight + bias, y)

        weight, bias = minimise(loss, torch.cat([z.new_ones(classes), z.new_zeros(classes)])).view(2, classes)
        self.weight_, self.bias_ = weight.to(logits), (bias - bias.mean()).to(logits)

    def _predict(self, logits: Tensor) -> Tensor:
        return _softmax(logits * self.weight_.to(logits) + self.bias_.to(logits))


class MatrixScaling(Calibrator):
    """softmax(W z + b) with a full matrix ``weight_`` (classes, classes) and ``bias_`` (of mean 0).

    W has K² parameters, so two penalties are added to the mean cross-entropy, as in ODIR: ``off_diagonal`` times the
    mean square of W's entries off the diagonal, and ``intercept`` times the mean square of b. Both may be 0: then it is
    maximum likelihood. The default suits a few hundred examples of ten classes; lower it with more data. Guo et al.
    2017, "On Calibration of Modern Neural Networks", section 4.2; ODIR from Kull et al. 2019. Raises ``ValueError``
    for a negative penalty.
    """

    weight_: Tensor
    bias_: Tensor

    def __init__(self, off_diagonal: float = 10.0, intercept: float = 0.01) -> None:
        for name, value in (("off_diagonal", off_diagonal), ("intercept", intercept)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        self.off_diagonal = off_diagonal
        self.intercept = intercept

    def _fit(self, logits: Tensor, labels: Tensor) -> None:
        z, y = self._features(_double(logits)), labels.cpu()
        classes, centre = z.shape[-1], z.mean(0)
        around, off_diagonal = z - centre, 1 - torch.eye(classes, dtype=z.dtype)

        def unpack(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """W, the offset at the mean of z (a well-conditioned parameter), and b."""
            weight, middle = flat[: classes**2].view(classes, classes), flat[classes**2 :]
            return weight, middle, middle - weight @ centre

        def loss(flat: Tensor) -> Tensor:
            weight, middle, bias = unpack(flat)
            bias = bias - bias.mean()
            penalty = self.off_diagonal * (weight * off_diagonal).square().sum() / (classes * (classes - 1))
            penalty = penalty + self.intercept * bias.square().mean()
            return nll(around @ weight.T + middle, y) + penalty

        weight, _, bias = unpack(minimise(loss, torch.cat([torch.eye(classes, dtype=z.dtype).flatten(), centre])))
        self.weight_, self.bias_ = weight.to(logits), (bias - bias.mean()).to(logits)

    def _predict(self, logits: Tensor) -> Tensor:
        return _softmax(self._features(logits) @ self.weight_.to(logits).T + self.bias_.to(logits))

    def _features(self, logits: Tensor) -> Tensor:
        return logits


class DirichletCalibration(MatrixScaling):
    """softmax(W log p + b) with p = softmax(z): :class:`MatrixScaling` on log-probabilities, same penalties.

    The family that is right where the probabilities of each class follow a Dirichlet law. Kull et al. 2019, "Beyond
    temperature scaling: Obtaining well-calibrated multiclass probabilities with Dirichlet calibration".
    """

    def _features(self, logits: Tensor) -> Tensor:
        return log_softmax(logits)


class EnsembleTemperatureScaling(Calibrator):
    """w1 softmax(z / T) + w2 softmax(z) + w3 / K: a convex mixture, so the predicted class never changes.

    T (``temperature_``) is fitted first, then the weights (``weights_``, on the simplex) by maximum likelihood. Zhang,
    Kailkhura & Han 2020, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration", section 4.1.
    """

    temperature_: Tensor
    weights_: Tensor

    def _fit(self, logits: Tensor, labels: Tensor) -> None:
        self.temperature_ = fit_temperature(logits, labels)
        parts = self._parts(_double(logits)).gather(-1, labels.cpu()[None, :, None].expand(3, -1, 1))[..., 0]

        def loss(weights: Tensor) -> Tensor:  # at its minimum over w ≥ 0 the sum of the weights is 1
            return weights.sum() - (weights @ parts).clamp_min(1e-300).log().mean()

        weights = minimise(loss, parts.new_full((3,), 1 / 3), bounds=[(0.0, None)] * 3)
        self.weights_ = (weights / weights.sum()).to(logits)

    def _predict(self, logits: Tensor) -> Tensor:
        return (self.weights_.to(logits)[:, None, None] * self._parts(logits)).sum(0)

    def _parts(self, logits: Tensor) -> Tensor:
        """The three ingredients, ``(3, batch, classes)``."""
        uniform = torch.full_like(logits, 1 / logits.shape[-1])
        return torch.stack([_softmax(logits / self.temperature_.to(logits)), _softmax(logits), uniform])


def minimise(
    loss: Callable[[Tensor], Tensor], start: Tensor, bounds: list[tuple[float | None, float | None]] | None = None
) -> Tensor:
    """Minimum of a smooth function of a float64 vector, by SciPy's L-BFGS-B with gradients from autograd."""
    from scipy.optimize import minimize

    def value_and_gradient(vector: object) -> tuple[float, object]:
        point = torch.as_tensor(vector, dtype=torch.float64).requires_grad_()
        value = loss(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.numpy()

    options = {"maxiter": 3000, "maxfun": 6000, "maxcor": 30, "ftol": 1e-11, "gtol": 1e-6}
    result = minimize(value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return torch.as_tensor(result.x, dtype=torch.float64)


def _softmax(logits: Tensor) -> Tensor:
    return log_softmax(logits).exp()


def _double(values: Tensor) -> Tensor:
    """A float64 copy on the CPU, where SciPy works."""
    return values.detach().to("cpu", torch.float64)


def require_finite(name: str, values: Tensor) -> None:
    if readable(values) and values.numel() and not bool(torch.stack(values.detach().aminmax()).isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got {int((~values.isfinite()).sum())} NaN or infinite ones")


def _require_logits(name: str, logits: Tensor) -> None:
    """Raise ``ValueError`` unless there is at least one example, two classes, and every value is finite."""
    if logits.shape[0] < 1 or logits.shape[-1] < 2:
        raise ValueError(f"{name}: expected at least one example and two classes, got shape {tuple(logits.shape)}")
    require_finite(name, logits)
