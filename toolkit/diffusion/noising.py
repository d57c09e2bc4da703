"""The one noise schedule, x_t = α x_0 + σ ε, and what converts noise, score and denoised points into each other."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import typed

NULL: int = -1  # the condition that is none
LAST: float = 1 - 2 / math.pi * math.asin(1 / 256)  # the time at which samplers begin
Points = Float[Tensor, "*batch dim"]
Time = float | int | Float[Tensor, "..."]
Condition = int | Int[Tensor, "..."] | None
Field = Callable[[Tensor, Any, Any], Tensor]


@typed
def alpha_sigma(t: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """α = cos(πt/2), the factor of the data, and σ = sin(πt/2), the noise's deviation; t = 2/π · atan(σ / α)."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def levels(x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """α and σ in the points' type, ready to be multiplied with points."""
    alpha, sigma = alpha_sigma(torch.as_tensor(t, dtype=x.dtype, device=x.device))
    return alpha[..., None], sigma[..., None]


@typed
def noised(x: Points, noise: Points, t: Time) -> Points:
    """x_t = α x + σ ε, with ε = ``noise``; t is one number or one per point."""
    alpha, sigma = levels(x, t)
    return alpha * x + sigma * noise


@typed
def score_to_epsilon(score: Points, t: Time) -> Points:
    """ε̂ = -σ ∇ log p_t(x): what the best net answers where the score is known."""
    return -levels(score, t)[1] * score


@typed
def epsilon_to_score(epsilon: Points, t: Time) -> Points:
    """∇ log p_t(x) = -ε̂ / σ, for t > 0."""
    return -epsilon / levels(epsilon, t)[1]


@typed
def epsilon_to_denoised(x: Points, epsilon: Points, t: Time) -> Points:
    """x̂_0 = (x - σ ε̂) / α, the expected data point, for t < 1."""
    alpha, sigma = levels(x, t)
    return (x - sigma * epsilon) / alpha


@typed
def denoised_to_epsilon(x: Points, denoised: Points, t: Time) -> Points:
    """ε̂ = (x - α x̂_0) / σ, for t > 0."""
    alpha, sigma = levels(x, t)
    return (x - alpha * denoised) / sigma
