"""Two ways to a linear classifier, and how many examples each of them needs.

The generative one (naive Bayes, linear discriminant) estimates how each class looks, the discriminative one (logistic
regression) where the border is. Ng & Jordan 2001, "On Discriminative vs. Generative classifiers"; Zheng et al. 2023,
"Revisiting Discriminative vs. Generative Classifiers: Theory and Implications".
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import readable, require_labels, require_positive, require_range, typed

__all__ = [
    "Pair",
    "crossing",
    "fit_logistic",
    "fit_naive_bayes",
    "gaussian_pair",
    "linear_error",
    "nested_samples",
    "plug_in_error",
    "samples_to_reach",
]

_HALVINGS = 12


@typed
def fit_naive_bayes(
    x: Float[Tensor, "examples features"],
    y: Int[Tensor, "examples"],
    classes: int,
    weights: Float[Tensor, "examples"] | None = None,
    variance: float | None = None,
    smoothing: float = 1e-3,
) -> Float[Tensor, "features+1 classes"]:
    """Gaussian naive Bayes with one variance per feature for all classes, as θ: logits are θᵀ(x, 1).

    θ_c = (m_c / s², log π_c - Σ m_c² / 2s²), with class means m, pooled variances s² (within classes, divided by the
    number of examples) and frequencies π; ``weights`` (0 or 1 for a subset) count examples. With ``variance`` that
    number is s² of all features, and the rule is the linear discriminant of a known covariance. ``smoothing`` is added
    to s² (as a share of the mean variance of the features) and to each class's count, so that a class or a feature that
    the sample does not show leaves no infinity. Raises ``ValueError`` for labels out of range, a variance or
    smoothing not above 0. Source: Ng & Jordan 2001, "On Discriminative vs. Generative classifiers: A comparison of
    logistic regression and naive Bayes".
    """
    require_labels("y", y, classes)
    require_positive("smoothing", smoothing)
    if variance is not None:
        require_positive("variance", variance)
    w = x.new_ones(len(x)) if weights is None else weights
    member = F.one_hot(y.long(), classes) * w[:, None]
    counts = member.sum(0)
    means = (member.T @ x) / counts.clamp_min(1)[:, None]
    if variance is None:
        overall = (w @ x) / w.sum()
        spread = ((x - overall).square().T @ w).mean() / w.sum()
        within = (x - means[y.long()]).square().T @ w / w.sum()
        scale = within + smoothing * spread + torch.finfo(x.dtype).tiny
    else:
        scale = x.new_full((x.shape[1],), variance)
    slopes = means / scale
    prior = ((counts + smoothing) / (counts + smoothing).sum()).log()
    return torch.cat([slopes.T, (prior - (slopes * means).sum(1) / 2)[None]])


@typed
def fit_logistic(
    x: Float[Tensor, "examples features"],
    y: Int[Tensor, "examples"],
    classes: int,
    penalty: float = 1e-2,
    weights: Float[Tensor, "examples"] | None = None,
    steps: int = 15,
) -> Float[Tensor, "features+1 classes"]:
    """Logistic regression θ, logits θᵀ(x, 1): the minimiser of Σ w CE + ½ ``penalty`` |θ|², by Newton's method from 0.

    The penalty (on the intercept too) keeps θ finite where the sample can be separated, as small samples can. Each step
    has the best of the lengths 1, ½, ¼, ..., 0. Raises ``ValueError`` for labels out of range, a penalty not above 0 or
    fewer than 1 step. Source: the discriminative learner of Ng & Jordan 2001, "On Discriminative vs. Generative
    classifiers", there without a penalty.
    """
    require_labels("y", y, classes)
    require_positive("penalty", penalty)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    w = x.new_ones(len(x)) if weights is None else weights
    z = torch.cat([x, x.new_ones(len(x), 1)], 1)
    wide = z.shape[1]
    theta = x.new_zeros(wide, classes)
    lengths = torch.cat([0.5 ** torch.arange(_HALVINGS, dtype=x.dtype, device=x.device), x.new_zeros(1)])
    targets = F.one_hot(y.long(), classes).to(x.dtype)
    ridge = penalty * torch.eye(wide * classes, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        p = (z @ theta).softmax(1)
        gradient = z.T @ ((p - targets) * w[:, None]) + penalty * theta
        scaled = (p[:, None, :] * z[:, :, None]).flatten(1)  # (features+1, classes) in one axis
        own = torch.einsum("nk,ni,nj->kij", p * w[:, None], z, z)
        blocks = torch.diag_embed(own.permute(1, 2, 0)).permute(0, 2, 1, 3).reshape(wide * classes, wide * classes)
        curvature = blocks - (scaled * w[:, None]).T @ scaled + ridge
        move = torch.linalg.solve(curvature, gradient.reshape(-1)).view_as(theta)
        candidates = theta - lengths[:, None, None] * move
        cost = (-(z @ candidates).log_softmax(2) * targets).sum(2) @ w
        cost = cost + penalty / 2 * candidates.square().sum((1, 2))
        theta = candidates[cost.argmin()[None]][0]
    return theta


class Pair(NamedTuple):
    """A sample of two Gaussians N(∓mean, covariance): ``x`` ``(n, dims)`` and ``y`` ``(n,)``."""

    x: Tensor
    y: Tensor
    mean: Tensor
    covariance: Tensor


def gaussian_pair(n: int, dims: int, distance: float, seed: int, correlation: float = 0.0) -> Pair:
    """Two classes in turn (0, 1, 0, 1, ...), N(∓μ, Σ), with |2μ| = ``distance`` along the diagonal (1, ..., 1).

    Σ has 1 on its diagonal; features 2i and 2i + 1 are correlated by r = ``correlation``, with a sign that alternates
    from pair to pair. With r = 0 naive Bayes is right and no error is below Φ(-Δ/2), Δ = ``distance``. Otherwise, where
    ``dims`` is a multiple of 4, naive Bayes still tends to Φ(-Δ/2), but the best is Φ(-Δ / 2√(1 - r²)). float64.
    A larger n appends. Raises ``ValueError`` for sizes below 1, a distance not above 0, or r outside (-1, 1).
    """
    for name, value in (("n", n), ("dims", dims)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    require_positive("distance", distance)
    if not -1 < correlation < 1:
        raise ValueError(f"correlation: expected a number in (-1, 1), got {correlation}")
    y = torch.arange(n) % 2
    signs = correlation * (1.0 - 2.0 * (torch.arange(dims - 1, dtype=torch.float64) // 2 % 2))
    beside = torch.where(torch.arange(dims - 1) % 2 == 0, signs, 0)
    covariance = torch.eye(dims, dtype=torch.float64) + torch.diag(beside, 1) + torch.diag(beside, -1)
    mean = torch.full((dims,), distance / 2 / math.sqrt(dims), dtype=torch.float64)
    noise = random.normal(random.key(seed), (n, dims), torch.float64) @ torch.linalg.cholesky(covariance).T
    return Pair(noise + (2 * y[:, None] - 1) * mean, y, mean, covariance)


@typed
def linear_error(
    theta: Float[Tensor, "_ 2"],
    mean: Float[Tensor, "features"],
    covariance: Float[Tensor, "features features"],
) -> Float[Tensor, ""]:
    """The exact error of a linear rule between N(-μ, Σ) and N(μ, Σ), equally frequent: no test set, no noise.

    With u = θ_1 - θ_0 = (v, c): ½ Φ(-(v·μ + c) / √(vᵀΣv)) + ½ Φ(-(v·μ - c) / √(vᵀΣv)). A rule with v = 0 gives all
    examples one class: ½.
    Raises ``ValueError`` for a θ of another length. Source: elementary, as in Ng & Jordan 2001, "On Discriminative vs.
    Generative classifiers".
    """
    if len(theta) != len(mean) + 1:
        raise ValueError(f"theta: expected {len(mean) + 1} rows, one for each feature and one more, got {len(theta)}")
    rule = theta[:, 1] - theta[:, 0]
    slope, offset = rule[:-1], rule[-1]
    width = (slope @ covariance @ slope).clamp_min(torch.finfo(theta.dtype).tiny).sqrt()
    reach = torch.stack([slope @ mean + offset, slope @ mean - offset]) / width
    return torch.special.ndtr(-reach).mean()


def plug_in_error(distance: float, dims: int, per_class: int) -> float:
    """The exact expected error of the linear discriminant with known covariance and m = ``per_class`` examples a class.

    Means are estimated, the covariance I is known, both classes are equally frequent and Δ = ``distance`` apart. The
    rule asks for the sign of A·B with independent A ~ N(δ/2, (1 + 1/2m) I) and B ~ N(δ, (2/m) I), |δ| = Δ. Scaled to
    unit variance they have means of lengths α = Δ / 2√(1 + 1/2m) and β = Δ√(m/2), and 2 A·B is the difference of two
    noncentral chi-squares with d = ``dims`` degrees of freedom, whose characteristic function gives

        error = ½ - (1/π) ∫₀^{π/2} sin(αβ s c) / (s c) · c^d · exp(-(α² + β²) s² / 2) dφ,  s = sin φ, c = cos φ.

    Computed by Gauss-Legendre quadrature to about 1e-12. m → ∞ gives Φ(-Δ/2). Raises ``ValueError`` for a distance
    below 0 or sizes below 1. Source: derived here with the inversion formula of Imhof 1961, "Computing the Distribution
    of Quadratic Forms in Normal Variables".
    """
    import numpy as np

    require_range("distance", distance, 0, math.inf)
    for name, value in (("dims", dims), ("per_class", per_class)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    alpha, beta = distance / 2 / math.sqrt(1 + 1 / (2 * per_class)), distance * math.sqrt(per_class / 2)
    end = min(math.pi / 2, 14 / math.sqrt(alpha**2 + beta**2 + dims))  # beyond it the exponential is below rounding
    nodes, weights = np.polynomial.legendre.leggauss(400)
    sine, cosine = np.sin(end * (nodes + 1) / 2), np.cos(end * (nodes + 1) / 2)
    wave = alpha * beta * np.sinc(alpha * beta * sine * cosine / math.pi)
    values = wave * cosine**dims * np.exp(-(alpha**2 + beta**2) / 2 * sine**2)
    return 0.5 - float(weights @ values) * end / 2 / math.pi


@typed
def nested_samples(y: Int[Tensor, "examples"], sizes: list[int], seeds: int, seed: int = 0) -> Bool[Tensor, "_ _ _"]:
    """Masks ``(sizes, seeds, examples)`` of random samples; within a seed the larger ones contain the smaller ones.

    The first classes' worth of each sample has every class once, so that no learner is without one. Learn on them all
    at once with ``vmap``, masks as weights. Raises ``ValueError`` for sizes below the number of classes or above that
    of examples, or fewer than 1 seed. For the experiment of Zheng et al. 2023, "Revisiting Discriminative vs.
    Generative Classifiers: Theory and Implications".
    """
    classes = len(y.unique())
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if not sizes or min(sizes) < classes or max(sizes) > len(y):
        raise ValueError(f"sizes: expected sizes from {classes} (classes) to {len(y)}, got {sizes}")
    rank = random.permutation(random.fold_in(random.key(seed), torch.arange(seeds, device=y.device)), len(y))
    same = y[:, None] == y.unique()
    first = torch.where(same.T[None], rank[:, None], len(y)).argmin(2)
    rank = torch.argsort(torch.argsort(rank.scatter_add(1, first, torch.full_like(first, -len(y))), dim=1), dim=1)
    return rank[None] < torch.tensor(sizes, device=y.device)[:, None, None]


@typed
def crossing(
    sizes: Float[Tensor, "sizes"], first: Float[Tensor, "sizes"], second: Float[Tensor, "sizes"]
) -> Float[Tensor, ""]:
    """The sample size from which the first curve's error is no longer below the second's; NaN if there is none.

    The last place where first - second goes from negative to at least 0, on straight lines in log size. Raises
    ``ValueError`` for fewer than 2 sizes, or sizes that are not positive and increasing. Source: the two regimes of Ng
    & Jordan 2001, "On Discriminative vs. Generative classifiers".
    """
    _check_sizes(sizes)
    gap, at = first - second, sizes.log()
    turns = (gap[:-1] < 0) & (gap[1:] >= 0)
    share = gap[:-1] / torch.where(turns, gap[:-1] - gap[1:], 1)
    places = (at[:-1] + share * (at[1:] - at[:-1])).exp()
    return torch.where(turns, places, -math.inf).amax().where(turns.any(), math.nan)


@typed
def samples_to_reach(
    sizes: Float[Tensor, "sizes"], errors: Float[Tensor, "sizes"], level: float | Tensor
) -> Float[Tensor, ""]:
    """The size from which the error stays at or below ``level``, on straight lines in log size; NaN if it never does.

    0 < sizes; where the first error is low enough already, the first size. Raises ``ValueError`` for fewer than 2
    sizes, or sizes that are not positive and increasing.
    """
    _check_sizes(sizes)
    over, at = errors > level, sizes.log()
    turns = over[:-1] & ~over[1:]
    share = (errors[:-1] - level) / torch.where(turns, errors[:-1] - errors[1:], 1)
    places = torch.where(turns, (at[:-1] + share * (at[1:] - at[:-1])).exp(), sizes[0]).amax()
    return places.where(~over[-1], math.nan)


def _check_sizes(sizes: Tensor) -> None:
    if len(sizes) < 2:
        raise ValueError(f"sizes: expected at least 2, got {len(sizes)}")
    if readable(sizes) and not (sizes[0] > 0 and bool((sizes[1:] > sizes[:-1]).all())):
        raise ValueError(f"sizes: expected positive and increasing numbers, got {sizes.tolist()}")
