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

from toolkit.diffusion.distances import mmd, sliced_wasserstein
from toolkit.diffusion.mixtures import Mixture
from toolkit.diffusion.nets import ScoreNet, denoising_loss, epsilon_field
from toolkit.diffusion.noising import (
    LAST,
    NULL,
    alpha_sigma,
    denoised_to_epsilon,
    epsilon_to_denoised,
    epsilon_to_score,
    noised,
    score_to_epsilon,
)
from toolkit.diffusion.noising import Condition as Condition
from toolkit.diffusion.noising import Field as Field
from toolkit.diffusion.noising import Points as Points
from toolkit.diffusion.noising import Time as Time
from toolkit.diffusion.samplers import ddim, guided, probability_flow

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
