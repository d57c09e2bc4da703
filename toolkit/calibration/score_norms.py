"""Multi-scale score norms (MSMA): how long is the score ∇ log p_σ(x) at each of several noise scales?

The scores may be learnt (a fleet of noise-conditional nets) or those of a finite data set, which are exact. Three
steps: :func:`score_norm_features`, then :func:`toolkit.calibration.mixture_density.fit_mixture` on normal examples,
then :func:`mixture_novelty` (or :func:`neighbour_novelty` instead of the last two). *Larger is more novel*, as in
:mod:`toolkit.calibration.novelty`.

Noise is added without shrinking the data: x̃ = x + σ ε. The nets of :mod:`toolkit.diffusion` read α (x + σ ε) with
α = (1 + σ²)^-½ at the time t = 2/π · atan σ; there σ s(x̃, σ) = -ε̂(α x̃, t) exactly, so they serve as they are.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.calibration.mixture_density import MixtureFit, mixture_log_density
from toolkit.checks import require_positive, typed
from toolkit.diffusion import epsilon_field
from toolkit.fleet import Fleet

__all__ = [
    "data_score",
    "learnt_score",
    "mixture_novelty",
    "neighbour_novelty",
    "noise_scales",
    "score_matching_loss",
    "score_norm_features",
]

Score = Callable[[Tensor, Tensor], Tensor]  # points and σ → the score at these points


@typed
def noise_scales(count: int = 10, largest: float = 1.0, smallest: float = 0.01) -> Float[Tensor, "{count}"]:
    """σ_1 > ... > σ_L in geometric progression, in the unit of the data.

    The defaults are the paper's, for images in [0, 1]. Raises ``ValueError`` for fewer than two scales and unless
    0 < ``smallest`` < ``largest``. Source: Mahmood, Oliva & Styner 2021, "Multiscale Score Matching for
    Out-of-Distribution Detection".
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2, got {count}")
    if not 0 < smallest < largest < math.inf:
        raise ValueError(f"smallest: expected 0 < smallest < largest, got {smallest} and {largest}")
    return torch.logspace(math.log(largest), math.log(smallest), count, base=math.e, dtype=torch.float64).float()


@typed
def data_score(
    x: Float[Tensor, "batch dim"],
    data: Float[Tensor, "n dim"],
    sigma: float | Float[Tensor, ""],
    leave_one_out: bool = False,
) -> Float[Tensor, "batch dim"]:
    """∇ log p_σ(x) of a finite data set with noise: (Σ_j w_j x_j - x) / σ², w = softmax_j(-|x - x_j|² / (2 σ²)).

    No net can have a lower denoising loss on ``data``. With ``leave_one_out``, ``x`` are the data themselves and row i
    is scored without point i: what the score is to a point that is not yet known. Distances are in float64; the result
    has the type of ``x`` and the unit 1 / that of the data. Raises ``ValueError`` for σ that is not positive, no data,
    and left-out points that are not as many as the data or fewer than two.

    Source: the mixture of Gaussians that Mahmood, Oliva & Styner 2021, "Multiscale Score Matching for
    Out-of-Distribution Detection", train nets on; its optimum is Vincent 2011, "A Connection Between Score Matching and
    Denoising Autoencoders".
    """
    require_positive("sigma", sigma)
    if leave_one_out and not 2 <= len(data) == len(x):
        raise ValueError(f"x: expected the data, two points or more, to leave one out, got {len(x)} of {len(data)}")
    if len(data) == 0:
        raise ValueError("data: expected at least one point, got none")
    centre = data.double().mean(0)
    points, known = x.double() - centre, data.double() - centre
    closeness = points @ known.T - known.square().sum(1) / 2  # |x|² is the same for all j
    if leave_one_out:
        own = torch.eye(len(data), dtype=torch.bool, device=data.device)
        closeness = closeness.masked_fill(own, -math.inf)
    logits = (closeness - closeness.amax(-1, keepdim=True)) / sigma**2
    return (logits.to(x.dtype).softmax(-1) @ known.to(x.dtype) - points.to(x.dtype)) / sigma**2


def score_matching_loss(sigmas: Float[Tensor, "scales"]) -> Callable[[Any, Any, Any], Tensor]:
    """A loss for :func:`toolkit.fleet.train`: ½ σ² |s(x + σ ε, σ) + ε / σ|² with σ uniform among ``sigmas``.

    Per example ``(batch,)``, summed over coordinates: a net that answers 0 has d / 2, and Gaussian data of variance τ²
    allow no less than d/2 · τ² / (τ² + σ²). The net is a :class:`toolkit.diffusion.ScoreNet`, called with α (x + σ ε)
    and t = 2/π · atan σ (see the module), where the loss is ½ |ε̂ - ε|². Its inputs should have about unit variance:
    divide images *and* ``sigmas`` by the images' deviation (norms σ |s| stay as they are). ``batch`` needs ``x`` only.
    Raises ``ValueError`` for scales that are not positive.

    Source: Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution"; Mahmood et al.
    2021, "Multiscale Score Matching for Out-of-Distribution Detection".
    """
    _check_scales(sigmas)

    def loss(model: Any, batch: Any, hyper: Any) -> Tensor:
        x = batch.x.flatten(1)
        noise = random.normal(random.fold_in(batch.key, 0), tuple(x.shape), x.dtype)
        place = (random.uniform(random.fold_in(batch.key, 1), (len(x),)) * len(sigmas)).long()
        sigma = sigmas.to(x)[place]
        shrunk, t = _preserving(x + sigma[:, None] * noise, sigma)
        return (model(shrunk, t=t) - noise).square().sum(-1) / 2

    return loss


def _check_scales(sigmas: Tensor) -> None:
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas: expected a row of scales, got shape {tuple(sigmas.shape)}")
    require_positive("sigmas", sigmas)


def _preserving(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Points with noise of deviation σ as :mod:`toolkit.diffusion` has them: shrunk by α, and their time."""
    return x / (1 + sigma.square()).sqrt()[..., None], sigma.atan() * (2 / math.pi)


def learnt_score(fleet: Fleet) -> Score:
    """The scores s(x, σ) = -ε̂(α x, t) / σ of a fleet of nets trained with :func:`score_matching_loss`.

    A function of points ``(batch, dim)`` or ``(members, batch, dim)`` and σ > 0; it gives ``(members, batch, dim)``,
    without gradients. Raises ``ValueError`` for a fleet of other nets than :class:`toolkit.diffusion.ScoreNet`.
    """
    field = epsilon_field(fleet)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        found = field(*_preserving(x.to(fleet.device), sigma.to(fleet.device)), None)
        return -found.to(x.device) / sigma

    return score


@typed
def score_norm_features(
    score: Score, x: Float[Tensor, "*batch dim"], sigmas: Float[Tensor, "scales"]
) -> Float[Tensor, "*result scales"]:
    """The features of *clean* points: (σ_1 |s(x, σ_1)|, ..., σ_L |s(x, σ_L)|), without a unit.

    ``score`` is :func:`learnt_score` of a fleet, which puts members first, or ``lambda x, sigma: data_score(x, data,
    sigma)``. For one known point x_0 a feature is |x - x_0| / σ; for Gaussian data of covariance C it is
    σ |(C + σ² I)^-1 (x - m)|, about √d · τ σ / (τ² + σ²) where C = τ² I. Raises ``ValueError`` for scales that are not
    positive.

    Source: Mahmood, Oliva & Styner 2021, "Multiscale Score Matching for Out-of-Distribution Detection".
    """
    _check_scales(sigmas)
    scales = sigmas.to(x).unbind()
    return torch.stack([sigma * torch.linalg.vector_norm(score(x, sigma), dim=-1) for sigma in scales], -1)


@typed
def mixture_novelty(features: Float[Tensor, "batch scales"], fit: MixtureFit) -> Float[Tensor, "batch"]:
    """-log p(f) under a mixture fitted to normal examples' score norms, in nats; larger is more novel.

    Source: Mahmood, Oliva & Styner 2021, "Multiscale Score Matching for Out-of-Distribution Detection".
    """
    return -mixture_log_density(features, fit)


@typed
def neighbour_novelty(
    features: Float[Tensor, "batch scales"], reference: Float[Tensor, "n scales"], neighbour: int = 5
) -> Float[Tensor, "batch"]:
    """Distance to the ``neighbour``-th nearest of the ``reference`` features, in standard deviations; no density.

    Features are standardised by the reference's mean and deviation (a reading: the paper standardises for its mixture).
    Raises ``ValueError`` for a neighbour that is not one of 1 .. n.

    Source: Mahmood, Oliva & Styner 2021, "Multiscale Score Matching for Out-of-Distribution Detection" (its
    nearest-neighbour variant, with the fifth).
    """
    if not 1 <= neighbour <= len(reference):
        raise ValueError(f"neighbour: expected a number from 1 to {len(reference)}, got {neighbour}")
    deviation = reference.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    apart = torch.cdist(features / deviation, reference / deviation, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.topk(neighbour, dim=-1, largest=False).values[:, -1]
