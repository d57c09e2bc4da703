"""Diffusion models small enough to be checked: exact scores of Gaussian mixtures, a net, samplers, distances.

One noise schedule throughout, variance preserving: x_t = α x_0 + σ ε with α = cos(πt/2), σ = sin(πt/2), t from 0 (data)
to 1 (noise). Models give ε̂(x, t, condition), the expectation of ε; samplers begin at t = ``LAST``, where α is 1/256.
Data should have about unit variance. For formulas in the other common schedule, x / α is data with noise of deviation
σ / α. Sources: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (the cosine, without their
offset); Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (the angle).

A condition is the number of a class, or ``NULL`` (-1, also ``None``): no condition. A *field* is any function
ε̂(x, t, condition) of points ``(..., batch, dim)``: :meth:`Mixture.epsilon` is one, :func:`epsilon_field` makes one of a
fleet, for points ``(members, batch, dim)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import readable, require_positive, require_probabilities, require_range, typed
from toolkit.fleet import Fleet
from toolkit.fleet.members import fresh

__all__ = [
    "LAST",
    "NULL",
    "Mixture",
    "ScoreNet",
    "alpha_sigma",
    "ddim",
    "denoised_to_epsilon",
    "denoising_loss",
    "epsilon_field",
    "epsilon_to_denoised",
    "epsilon_to_score",
    "guided",
    "mmd",
    "noised",
    "probability_flow",
    "score_to_epsilon",
    "sliced_wasserstein",
]

NULL: int = -1  # the condition that is none
LAST: float = 1 - 2 / math.pi * math.asin(1 / 256)  # the time at which samplers begin
Points = Float[Tensor, "*batch dim"]
Time = float | int | Float[Tensor, "..."]
Condition = int | Int[Tensor, "..."] | None
Field = Callable[[Tensor, Any, Any], Tensor]
Strength = float | int | Float[Tensor, "_"]  # one number or one per member


@typed
def alpha_sigma(t: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """α = cos(πt/2), the factor of the data, and σ = sin(πt/2), the noise's deviation; t = 2/π · atan(σ / α)."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def _levels(x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """α and σ in the points' type, ready to be multiplied with points."""
    alpha, sigma = alpha_sigma(torch.as_tensor(t, dtype=x.dtype, device=x.device))
    return alpha[..., None], sigma[..., None]


@typed
def noised(x: Points, noise: Points, t: Time) -> Points:
    """x_t = α x + σ ε, with ε = ``noise``; t is one number or one per point."""
    alpha, sigma = _levels(x, t)
    return alpha * x + sigma * noise


@typed
def score_to_epsilon(score: Points, t: Time) -> Points:
    """ε̂ = -σ ∇ log p_t(x): what the best net answers where the score is known."""
    return -_levels(score, t)[1] * score


@typed
def epsilon_to_score(epsilon: Points, t: Time) -> Points:
    """∇ log p_t(x) = -ε̂ / σ, for t > 0."""
    return -epsilon / _levels(epsilon, t)[1]


@typed
def epsilon_to_denoised(x: Points, epsilon: Points, t: Time) -> Points:
    """x̂_0 = (x - σ ε̂) / α, the expected data point, for t < 1."""
    alpha, sigma = _levels(x, t)
    return (x - sigma * epsilon) / alpha


@typed
def denoised_to_epsilon(x: Points, denoised: Points, t: Time) -> Points:
    """ε̂ = (x - α x̂_0) / σ, for t > 0."""
    alpha, sigma = _levels(x, t)
    return (x - alpha * denoised) / sigma


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
        alpha, sigma = _levels(x, t)
        variance = (alpha * self.deviations.to(x)).square() + sigma.square()
        away = alpha[..., None] * self.means.to(x) - x[..., None, :]
        normal = away.square().sum(-1) / variance + x.shape[-1] * (2 * math.pi * variance).log()
        return self._log_weights(condition).to(x) - normal / 2, away, variance.expand(normal.shape)


class ScoreNet(nn.Module):
    """ε̂(x, t, condition) = σ x + α · net: a small net with Fourier features of the time and a row for each class.

    The rows begin at 0 and no condition adds nothing, so a class that was never seen is answered as if there were no
    condition: a net retrained without a class has a definite answer to its name. With the term σ x the net learns what
    a Gaussian of unit variance does not explain (Salimans & Ho 2022), and the denoised point is bounded at t = 1.

    Args:
        dim: coordinates of a point (64 for 8×8 glyphs).
        classes: how many conditions.
        hidden: widths of the hidden layers.
        frequencies: the features are sin and cos of kπt/2 for k = 1, 2, 4, ... (so many).
    """

    def __init__(self, dim: int, classes: int, hidden: Sequence[int] = (64, 64), frequencies: int = 4):
        super().__init__()
        for name, size in {"dim": dim, "classes": classes, "hidden": len(hidden), "frequencies": frequencies}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.dim, self.classes, self.frequencies = dim, classes, frequencies
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise([dim, *hidden]))
        self.time = nn.Linear(2 * frequencies, sum(hidden))
        self.condition = nn.Parameter(torch.zeros(classes, sum(hidden)))
        self.head = nn.Linear(hidden[-1], dim)

    def forward(self, x: Tensor, t: Any, condition: Any = None) -> Tensor:
        """ε̂ ``(batch, dim)`` of points ``(batch, dim)``; t and the condition are one number or ``(batch,)``."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        angle = t[..., None] * (math.pi / 2 * 2.0 ** torch.arange(self.frequencies, dtype=x.dtype, device=x.device))
        extra = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        if condition is not None:
            wanted = torch.as_tensor(condition, device=x.device)
            own = wanted[..., None] == torch.arange(self.classes, device=x.device)  # NULL is none of them
            extra = extra + own.to(x.dtype) @ self.condition
        h, done = x, 0
        for layer in self.layers:
            h = layer(h)
            h = F.silu(h + extra[..., done : done + h.shape[-1]])
            done += h.shape[-1]
        alpha, sigma = _levels(x, t)
        return sigma * x + alpha * self.head(h)


def denoising_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """|ε̂(x_t, t, y) - ε|² / dim for each example, a loss for :func:`toolkit.fleet.train`: ``(batch,)``.

    ``batch`` has ``x`` ``(batch, dim)`` and classes ``y``; t is uniform in (0, LAST), ε normal. With probability
    ``hyper.drop`` the condition is left out; where there is none, 0.25: less leaves the unconditional answer of a short
    training poor. Sources: Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models"; Ho & Salimans 2022,
    "Classifier-Free Diffusion Guidance".
    """
    x, count = batch.x, len(batch.x)
    noise = random.normal(random.fold_in(batch.key, 0), tuple(x.shape), x.dtype)
    share, chance = random.uniform(random.fold_in(batch.key, 1), (2, count), x.dtype)
    t = LAST * share
    condition = torch.where(chance < hyper.get("drop", 0.25), NULL, batch.y)
    found = model(noised(x, noise, t), t=t, condition=condition)
    return (found - noise).square().mean(-1)


def epsilon_field(fleet: Fleet) -> Field:
    """The field of a fleet of :class:`ScoreNet`: points ``(members, batch, dim)`` → ε̂, without gradients.

    t and the condition are one number, ``(batch,)`` or ``(members, batch)``. Raises ``ValueError`` for other nets.
    """
    module, views = fresh(fleet.build).to(fleet.device), fleet.layout.views(fleet.parameters.detach())
    if not isinstance(module, ScoreNet):
        raise ValueError(f"fleet: expected one of ScoreNet, got one of {type(module).__name__}")

    def one(parameters: dict[str, Tensor], x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return functional_call(module, parameters, (x, t, condition))

    @torch.no_grad()
    def field(x: Tensor, t: Any, condition: Any = None) -> Tensor:
        x = x.expand(len(fleet), *x.shape[-2:]) if x.ndim == 2 else x
        if len(x) != len(fleet) or x.shape[-1] != module.dim:
            got = tuple(x.shape)
            raise ValueError(f"x: expected points ({len(fleet)}, batch, {module.dim}), got {got}")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        condition = torch.as_tensor(NULL if condition is None else condition, device=x.device)
        own = tuple(0 if value.ndim == 2 else None for value in (t, condition))
        return torch.vmap(one, (0, 0, *own))(views, x, t, condition)

    return field


def guided(field: Field, weight: Any) -> Field:
    """Classifier-free guidance: ε̂(null) + w (ε̂(c) - ε̂(null)); w = 1 is the field itself, w = 0 has no condition.

    w is one number or one per member. Source: Ho & Salimans 2022 (whose weight is w - 1).
    """
    if not isinstance(weight, Tensor) and weight == 1:
        return field

    def steered(x: Tensor, t: Any, condition: Any = None) -> Tensor:
        free = field(x, t, NULL)
        w = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
        return free + (w[:, None, None] if w.ndim else w) * (field(x, t, condition) - free)

    return steered


def _prepare(model: Any, start: Tensor, steps: int, guidance: Any, since: float, until: float) -> tuple[Field, Tensor]:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    require_range("since", since, 0, 1 - 1e-6)
    require_range("until", until, 0, since)
    field = guided(epsilon_field(model) if isinstance(model, Fleet) else model, guidance)
    return field, torch.linspace(since, until, steps + 1, dtype=start.dtype, device=start.device)


@torch.no_grad()
def ddim(
    model: Fleet | Field,
    start: Tensor,
    condition: Condition = None,
    *,
    steps: int = 30,
    guidance: Any = 1.0,
    since: float = LAST,
    until: float = 0.0,
    path: bool = False,
) -> Tensor:
    """Deterministic sampling: x_s = α_s x̂_0(x_t) + σ_s ε̂(x_t), ``steps`` equal steps of t from ``since`` to ``until``.

    Args:
        model: a fleet of :class:`ScoreNet`, or a field.
        start: normal noise ``(batch, dim)``, for a fleet the same for all members, or ``(members, batch, dim)``.
        condition: one number, ``(batch,)`` or ``(members, batch)``.
        guidance: weight of :func:`guided`, one number or one per member.
        path: return the states at all steps, ``(steps + 1, ...)``, the start first.

    Returns points ``(members, batch, dim)`` for a fleet, of the shape of ``start`` for a field. Source: Song, Meng &
    Ermon 2021, "Denoising Diffusion Implicit Models" (η = 0). Raises ``ValueError`` unless 0 ≤ until ≤ since < 1.
    """
    field, times = _prepare(model, start, steps, guidance, since, until)
    states = [start]
    for t, s in pairwise(times):
        epsilon = field(states[-1], t, condition)
        now = states[-1].expand_as(epsilon)
        states = [*states, noised(epsilon_to_denoised(now, epsilon, t), epsilon, s)]
    states[0] = states[0].expand_as(states[-1])
    return torch.stack(states) if path else states[-1]


@torch.no_grad()
def probability_flow(
    model: Fleet | Field,
    start: Tensor,
    condition: Condition = None,
    *,
    steps: int = 30,
    guidance: Any = 1.0,
    since: float = LAST,
    until: float = 0.0,
) -> Tensor:
    """The probability-flow equation dx/dt = π/2 · v, v = (ε̂ - σ x) / α = α ε̂ - σ x̂_0, by Heun's rule.

    Two evaluations per step, error of order steps⁻² (:func:`ddim` has one, and order steps⁻¹). Arguments and result
    are those of :func:`ddim`. Sources: Song et al. 2021, "Score-Based Generative Modeling through Stochastic
    Differential Equations"; Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
    """
    field, times = _prepare(model, start, steps, guidance, since, until)

    def slope(x: Tensor, t: Tensor) -> Tensor:
        epsilon, (alpha, sigma) = field(x, t, condition), _levels(x, t)
        return (epsilon - sigma * x) / alpha * (math.pi / 2)

    x = start
    for t, s in pairwise(times):
        first = slope(x, t)
        x = x + (s - t) / 2 * (first + slope(x + (s - t) * first, s))
    return x


@typed
def sliced_wasserstein(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], *, projections: int = 64, seed: int = 0
) -> Float[Tensor, ""]:
    """Sliced Wasserstein-2 distance of two samples, in the points' units: (mean over directions u of W₂²(x·u, y·u))^½.

    Directions are uniform on the sphere, from ``seed``; in one dimension each W₂ is exact, for other numbers of points
    too. A shift by δ has distance |δ| / √dim. Source: Rabin et al. 2011, "Wasserstein Barycenter and Its Application to
    Texture Mixing". Raises ``ValueError`` without points or directions.
    """
    n, m = len(x), len(y)
    if min(n, m, projections) < 1:
        raise ValueError(f"projections: expected points and directions, got {n}, {m} points, {projections} directions")
    drawn = random.normal(random.key(seed, device=x.device), (projections, x.shape[1]), torch.float64)
    axes = F.normalize(drawn, dim=1).to(x.dtype).T
    first, second = (x @ axes).sort(0).values, (y @ axes).sort(0).values
    if n == m:
        return (first - second).square().mean().sqrt()
    steps = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(x.device)  # in units of 1 / nm
    share = steps.diff().to(x.dtype) / (n * m)
    apart = first[steps[:-1] // m] - second[steps[:-1] // n]
    return (share[:, None] * apart.square()).sum(0).mean().sqrt()


@typed
def mmd(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], bandwidth: float | int | Float[Tensor, ""] = 1.0
) -> Tensor:
    """Unbiased estimate of MMD² with the kernel exp(-|x - y|² / (2 h²)), h = ``bandwidth`` > 0; it may be below 0.

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean k(x_i, y_j), in memory of (n + m)². Source: Gretton et al.
    2012, "A Kernel Two-Sample Test". Raises ``ValueError`` for fewer than two points or h ≤ 0.
    """
    require_positive("bandwidth", bandwidth)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"x and y: expected at least two points each, got {len(x)} and {len(y)}")

    centre = y.mean(0)  # products of centred points: nothing of size n · m · dim is held
    x, y = x - centre, y - centre

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return (-square.clamp_min(0) / (2 * bandwidth**2)).exp()

    def inner(a: Tensor) -> Tensor:
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return inner(x) + inner(y) - 2 * kernel(x, y).mean()
