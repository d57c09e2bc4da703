"""A Gaussian mixture as a density of low-dimensional features: expectation-maximisation that can be vmapped.

A fixed number of steps, full covariances with a ridge, several starts and several numbers of components side by side;
the one with the largest likelihood on held-out rows is chosen and then fitted to all rows. All of it in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_positive, typed

__all__ = ["MixtureFit", "expectation_maximisation", "fit_mixture", "mixture_log_density"]


class MixtureFit(NamedTuple):
    """Gaussians over (features - ``centre``) / ``scale``, in float64; unused components have log weight -∞."""

    centre: Float[Tensor, "features"]
    scale: Float[Tensor, "features"]
    log_weights: Float[Tensor, "components"]
    means: Float[Tensor, "components features"]
    covariances: Float[Tensor, "components features features"]


def _powers(x: Tensor) -> Tensor:
    """1, x and the products x_i x_j ``(n, 1 + dim + dim²)``: a log density and the sufficient sums are linear in it."""
    return torch.cat([torch.ones_like(x[:, :1]), x, (x[:, :, None] * x[:, None, :]).flatten(1)], 1)


def _log_joint(powers: Tensor, log_weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """log w_k + log N(x; m_k, C_k), ``(n, runs, components)``, of mixtures with leading axis ``runs``."""
    dim = means.shape[-1]
    cholesky = torch.linalg.cholesky_ex(covariances).L
    identity = torch.eye(dim, dtype=means.dtype, device=means.device).expand_as(cholesky)
    whiten = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    precision = whiten.transpose(-1, -2) @ whiten
    slope = (precision @ means[..., None])[..., 0]
    logdet = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = -((slope * means).sum(-1) + logdet + dim * math.log(2 * math.pi)) / 2
    linear = torch.cat([constant[..., None], slope, -precision.flatten(-2) / 2], -1)
    return log_weights + (powers @ linear.flatten(0, 1).T).unflatten(1, means.shape[:2])


def _climb(
    powers: Tensor, rows: Tensor, runs: tuple[Tensor, Tensor, Tensor], steps: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``steps`` rounds of EM of all runs, on rows with weights ``(n,)``; components of log weight -∞ stay unused."""
    log_weights, means, covariances = runs
    used, dim = ~log_weights.isneginf(), means.shape[-1]
    floor = ridge * torch.eye(dim, dtype=means.dtype, device=means.device)
    for _ in range(steps):
        share = _log_joint(powers, log_weights, means, covariances).softmax(-1) * rows[:, None, None]
        count, first, second = (share.flatten(1).T @ powers).split([1, dim, dim * dim], -1)
        count = count.reshape(used.shape) + 10 * torch.finfo(means.dtype).eps
        means = first.reshape(means.shape) / count[..., None]
        second = second.reshape(covariances.shape) / count[..., None, None]
        covariances = second - means[..., :, None] * means[..., None, :] + floor
        log_weights = torch.where(used, count.log(), log_weights).log_softmax(-1)
    return log_weights, means, covariances


@typed
def expectation_maximisation(
    features: Float[Tensor, "n features"], start: MixtureFit, steps: int = 50, ridge: float = 1e-6
) -> MixtureFit:
    """``steps`` rounds of expectation-maximisation from ``start``; the log-likelihood never falls but for the ridge.

    Shares r_nk = softmax_k(log w_k + log N(z_n; m_k, C_k)) of the standardised rows z; then w_k = mean r_nk, m_k the
    mean of z under r_k, C_k its covariance + ``ridge`` · I. Raises ``ValueError`` for a ridge that is not positive and
    a negative number of steps.

    Source: Dempster, Laird & Rubin 1977, "Maximum Likelihood from Incomplete Data via the EM Algorithm".
    """
    require_positive("ridge", ridge)
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    powers = _powers((features.detach().double() - start.centre) / start.scale)
    log_weights, means, covariances = start[2:]
    runs = (log_weights[None], means[None], covariances[None])
    climbed = _climb(powers, torch.ones_like(powers[:, 0]), runs, steps, ridge)
    return MixtureFit(start.centre, start.scale, *(part[0] for part in climbed))


@typed
def fit_mixture(
    features: Float[Tensor, "n features"],
    key: Int[Tensor, ""],
    *,
    components: Sequence[int] = (1, 2, 4, 8),
    starts: int = 3,
    steps: int = 30,
    held_out: float = 0.25,
    ridge: float = 1e-6,
) -> MixtureFit:
    """Fit a Gaussian mixture with full covariances to normal examples' features, their number of components chosen.

    Features are standardised. For each number in ``components``, ``starts`` runs of ``steps`` rounds of EM (means at
    random rows, the pooled covariance) on a random share 1 - ``held_out`` of the rows; the run with the largest
    likelihood on the other rows is continued for ``steps`` rounds on all rows. ``ridge`` is in squared standard
    deviations of a feature; where features are nearly collinear and rows few (score norms of a few hundred images), a
    density is dominated by directions without variance unless it is larger, for instance 0.01. ``vmap`` over
    ``(features, key)`` fits a fleet's features at once: the result has max(``components``) components, of which a run
    with fewer leaves the rest unused. No gradient flows through.

    Raises ``ValueError`` for empty or non-positive ``components``, ``starts`` or ``steps``, a share outside (0, 1),
    too few rows for the components, and features that are not finite.

    Source: Mahmood, Oliva & Styner 2021, "Multiscale Score Matching for Out-of-Distribution Detection" (there 2 to 20
    components by 10-fold cross-validated likelihood; one split here).
    """
    n = features.shape[0]
    if not components or min(components) < 1:
        raise ValueError(f"components: expected numbers of at least 1, got {tuple(components)}")
    for name, value in (("starts", starts), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}")
    require_positive("ridge", ridge)
    largest, fitted = max(components), n - max(1, round(held_out * n))
    if fitted < max(2, largest):
        raise ValueError(f"features: expected at least {max(2, largest)} rows besides those held out, got {fitted}")
    if readable(features) and not bool(features.isfinite().all()):
        raise ValueError("features: expected finite values, got some that are not")

    x, key = features.detach().double(), key.to(features.device)
    centre, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    z = (x - centre) / scale
    rank = random.permutation(random.fold_in(key, 0), n)
    inside = (rank < fitted).to(z.dtype)
    # Means of run r: rows in a random order of its own, those held out last.
    shuffled = random.permutation(random.fold_in(key, 1 + torch.arange(starts, device=x.device)), n)
    order = (shuffled + n * (rank >= fitted)).argsort(-1)[:, :largest]
    means = z[order].repeat(len(components), 1, 1)
    numbers = torch.tensor(components, device=x.device).repeat_interleave(starts)
    used = torch.arange(largest, device=x.device) < numbers[:, None]
    log_weights = torch.where(used, -numbers[:, None].to(z.dtype).log(), -math.inf)
    dim = z.shape[1]
    pooled = z.T @ z / n + ridge * torch.eye(dim, dtype=z.dtype, device=z.device)
    powers = _powers(z)
    runs = _climb(powers, inside, (log_weights, means, pooled.expand(*means.shape, dim)), steps, ridge)
    held = ((1 - inside)[:, None] * _log_joint(powers, *runs).logsumexp(-1)).sum(0)
    best = held.argmax(0, keepdim=True)
    log_weights, means, covariances = (part.index_select(0, best) for part in runs)
    final = _climb(powers, torch.ones_like(inside), (log_weights, means, covariances), steps, ridge)
    return MixtureFit(centre, scale, *(part[0] for part in final))


@typed
def mixture_log_density(features: Float[Tensor, "batch features"], fit: MixtureFit) -> Float[Tensor, "batch"]:
    """log p(f) = log Σ_k w_k N(f; m_k, C_k) in nats, a density of the features as they were given."""
    powers = _powers((features.double() - fit.centre) / fit.scale)
    log_weights, means, covariances = (part[None] for part in fit[2:])
    joint = _log_joint(powers, log_weights, means, covariances)[:, 0]
    return (joint.logsumexp(-1) - fit.scale.log().sum()).to(features.dtype)
