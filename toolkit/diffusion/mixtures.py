"""Data whose every density is known: mixtures of round Gaussians, noised or not."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import readable, require_positive, require_probabilities, typed
from toolkit.diffusion.noising import NULL, Condition, Points, Time, levels, score_to_epsilon


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data whose every density is known: round Gaussians, each of a class.

    Attributes:
        means: ``(components, dim)``; their type is that of all results.
        deviations: ``(components,)``, greater than 0, the same in all directions.
        weights: ``(components,)``, probabilities.
        classes: ``(components,)``, the class of each component, from 0; a class may have several components.

    Points are ``(..., dim)``, a time t is one number or one per point, a condition too. At t > 0 the density is that
    of the noised data, whose components have means α m and variances α² s² + σ². Raises ``ValueError`` for parts that
    do not fit, and for a condition on a class of weight 0.
    """

    means: Tensor
    deviations: Tensor
    weights: Tensor
    classes: Tensor

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or not self.means.is_floating_point():
            raise ValueError(f"means: expected numbers (components, dim), got {tuple(self.means.shape)}")
        for name in ("deviations", "weights", "classes"):
            if (got := tuple(getattr(self, name).shape)) != (len(self.means),):
                raise ValueError(f"{name}: expected one for each of {len(self.means)} components, got {got}")
        require_positive("deviations", self.deviations)
        require_probabilities("weights", self.weights[None])
        if self.classes.is_floating_point() or bool((self.classes < 0).any()):
            raise ValueError(f"classes: expected whole numbers from 0, got {self.classes.tolist()}")

    @property
    def classes_count(self) -> int:
        return int(self.classes.max()) + 1

    def without(self, erased: int) -> "Mixture":
        """The mixture without a class: its weight goes to the others in proportion; class numbers stay."""
        kept = self.weights * (self.classes != erased)
        if not 0 < float(kept.sum()) < float(self.weights.sum()):
            raise ValueError(f"erased: expected one of at least two classes with weight, got {erased}")
        return replace(self, weights=kept / kept.sum())

    def sample(self, count: int, *, condition: Condition = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``count`` points ``(count, dim)`` and their classes ``(count,)``, of all classes or of the condition's."""
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        device = self.means.device
        ladder = self._log_weights(condition).double().exp().cumsum(-1)
        height = random.uniform(random.key(seed, 0, device=device), (count,), torch.float64)
        chosen = (height[:, None] > ladder / ladder[..., -1:]).sum(-1)
        noise = random.normal(random.key(seed, 1, device=device), (count, self.means.shape[1]), self.means.dtype)
        return self.means[chosen] + self.deviations[chosen, None].to(noise) * noise, self.classes[chosen]

    @typed
    def log_density(self, x: Points, t: Time = 0.0, condition: Condition = None) -> Float[Tensor, "*batch"]:
        """log p_t(x), or log p_t(x | class), in nats."""
        return self._joint(x, t, condition)[0].logsumexp(-1)

    @typed
    def score(self, x: Points, t: Time = 0.0, condition: Condition = None) -> Points:
        """∇ log p_t(x) = Σ_k p(k | x) (α m_k - x) / v_k, over the components k of the condition."""
        joint, away, variance = self._joint(x, t, condition)
        return ((joint.softmax(-1) / variance)[..., None] * away).sum(-2)

    @typed
    def epsilon(self, x: Points, t: Time, condition: Condition = None) -> Points:
        """The exact ε̂ = -σ · score, a field for the samplers."""
        return score_to_epsilon(self.score(x, t, condition), t)

    @typed
    def posterior(self, x: Points, t: Time = 0.0) -> Float[Tensor, "*batch classes"]:
        """p(class | x_t = x), probabilities over the classes."""
        own = F.one_hot(self.classes.long(), self.classes_count).to(x)
        return self._joint(x, t, None)[0].softmax(-1) @ own

    def _log_weights(self, condition: Condition) -> Tensor:
        """Log weights ``(..., components)`` of the components given the condition."""
        wanted = torch.as_tensor(NULL if condition is None else condition, device=self.means.device)
        own = (self.classes == wanted[..., None]) | (wanted < 0)[..., None]
        values = self.weights.to(self.means).log().masked_fill(~own, -math.inf)
        total = values.logsumexp(-1, keepdim=True)
        if readable(total) and bool(total.isneginf().any()):
            raise ValueError(f"condition: expected classes of {self.classes.unique().tolist()} that have a weight")
        return values - total

    def _joint(self, x: Tensor, t: Time, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """Log of weight times density, α m - x, and variances: ``(..., components)`` and ``(..., components, dim)``."""
        if x.shape[-1] != self.means.shape[1]:
            raise ValueError(f"x: expected points of dimension {self.means.shape[1]}, got {x.shape[-1]}")
        alpha, sigma = levels(x, t)
        variance = (alpha * self.deviations.to(x)).square() + sigma.square()
        away = alpha[..., None] * self.means.to(x) - x[..., None, :]
        normal = away.square().sum(-1) / variance + x.shape[-1] * (2 * math.pi * variance).log()
        return self._log_weights(condition).to(x) - normal / 2, away, variance.expand(normal.shape)
