"""Inducing points by an exact inner solver: the net is infinitely wide, so training on the images is kernel ridge."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import require_positive, typed
from toolkit.distillation.synthetic import (
    Start,
    Synthetic,
    draw_classes,
    initial_points,
    labelled,
    optimise_points,
)

__all__ = ["kernel_points", "kernel_points_loss", "kernel_ridge", "relu_tangent_kernel"]

Kernel = Callable[[Tensor, Tensor], Tensor]
_TARGETS = 310  # what a key's numbers are for


@typed
def relu_tangent_kernel(
    a: Float[Tensor, "first dim"], b: Float[Tensor, "second dim"], depth: int = 1
) -> Float[Tensor, "first second"]:
    """Neural tangent kernel of an infinitely wide ReLU net with ``depth`` hidden layers and no biases.

    Σ₀ = Θ₀ = aᵀb / dim; with c = Σ/√(Σ_aa Σ_bb) and φ = arccos c,
    Σ ← √(Σ_aa Σ_bb) (sin φ + (π - φ) c) / π,  Θ ← Σ + Θ (π - φ) / π (variance 2 / width keeps Σ_aa).
    An all-zero row has kernel 0 with everything. Source: Jacot, Gabriel & Hongler 2018, "Neural Tangent Kernel"; Cho &
    Saul 2009, "Kernel Methods for Deep Learning". Raises ``ValueError`` for a negative depth or rows of no value.
    """
    if depth < 0 or a.shape[1] == 0:
        raise ValueError(f"depth, a: expected depth of at least 0 and a dimension, got {depth} and {a.shape[1]}")
    sigma = a @ b.mT / a.shape[1]
    scale = (a.square().mean(1)[:, None] * b.square().mean(1)).clamp_min(torch.finfo(a.dtype).tiny).sqrt()
    theta, nearly = sigma, 1 - 4 * torch.finfo(a.dtype).eps
    for _ in range(depth):
        cosine = (sigma / scale).clamp(-nearly, nearly)  # arccos has no slope at ±1
        angle = cosine.arccos()
        share = (math.pi - angle) / math.pi
        sigma = scale * ((1 - cosine.square()).sqrt() / math.pi + share * cosine)
        theta = sigma + theta * share
    return theta


@typed
def kernel_ridge(
    points: Float[Tensor, "points points"],
    targets: Float[Tensor, "points outputs"],
    queries: Float[Tensor, "queries points"],
    ridge: float | Tensor = 1e-6,
) -> Float[Tensor, "queries outputs"]:
    """K_qs (K_ss + λ tr(K_ss)/n · I)⁻¹ Y: predictions from the kernels K_ss = ``points`` and K_qs = ``queries``.

    λ = ``ridge`` > 0 is relative to the mean diagonal entry, so that the scale of a kernel does not matter. Raises
    ``ValueError`` for λ ≤ 0 or no points.
    """
    require_positive("ridge", ridge)
    if len(points) == 0:
        raise ValueError("points: expected at least one point, got none")
    eye = torch.eye(len(points), dtype=points.dtype, device=points.device)
    regular = points + ridge * points.diagonal().mean() * eye
    return queries @ torch.cholesky_solve(targets, torch.linalg.cholesky(regular))


@typed
def kernel_points_loss(
    points: Float[Tensor, "points dim"],
    point_targets: Float[Tensor, "points outputs"],
    x: Float[Tensor, "examples dim"],
    targets: Float[Tensor, "examples outputs"],
    ridge: float = 1e-6,
    kernel: Kernel = relu_tangent_kernel,
) -> Float[Tensor, ""]:
    """½ Σ_outputs (y - f(x))², mean over examples, where f is kernel ridge on the points alone.

    The inner problem is solved exactly, so the gradient in the points is the whole one. Source: Nguyen, Chen & Lee
    2021, "Dataset Meta-Learning from Kernel Ridge-Regression" (kernel inducing points). Raises ``ValueError`` as
    :func:`kernel_ridge`, and for no example.
    """
    if len(x) == 0:
        raise ValueError("x: expected at least one example, got none")
    predicted = kernel_ridge(kernel(points, points), point_targets, kernel(x, points), ridge)
    return (targets - predicted).square().sum(1).mean() / 2


@typed
def kernel_points(
    data: Any,
    *,
    per_class: int = 1,
    iterations: int = 200,
    batch: int = 32,
    lr: float = 0.03,
    ridge: float = 1e-6,
    depth: int = 1,
    start: Start = "real",
    snapshots: Sequence[int] = (),
    seed: int = 0,
) -> Synthetic:
    """Images from which kernel ridge with :func:`relu_tangent_kernel` predicts the real labels best.

    Adam on :func:`kernel_points_loss` with ``batch`` real examples of each class an iteration; targets are one-hot
    minus 1/classes, and stay (the original can learn them too). Solved in float64.

    Args:
        data: fields ``x`` and ``y``, with every class from 0 on; features are the flattened ``x``.
        lr: learning rate of the images.
        ridge: as in :func:`kernel_ridge`.
        depth: hidden layers of the infinitely wide net.
        start: ``noise``, ``real`` examples or ``clusters`` (class-wise k-means centres).
        snapshots: iterations after which images are kept; 0 is the start.

    Source: Nguyen, Chen & Lee 2021, "Dataset Meta-Learning from Kernel Ridge-Regression". Raises ``ValueError`` for
    missing classes, counts below 1, a ridge that is not positive, snapshots that are not reached.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1 example of each class, got {batch}")
    require_positive("ridge", ridge)
    x, y, classes = labelled(data)
    images, labels = initial_points(x, y, classes, per_class, start, seed)
    codes = torch.eye(classes, dtype=torch.float64, device=x.device) - 1 / classes

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return relu_tangent_kernel(a, b, depth)

    def loss(images: Tensor, iteration: int) -> Tensor:
        key = random.key(seed, _TARGETS, iteration, device=x.device)
        chosen = draw_classes(y, classes, batch, key).flatten()
        real = x[chosen].flatten(1).double()
        return kernel_points_loss(images.flatten(1).double(), codes[labels], real, codes[y[chosen]], ridge, kernel)

    return optimise_points(images, labels, loss, iterations, lr, snapshots)
