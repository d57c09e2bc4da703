"""How far two samples are from each other."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from toolkit import random
from toolkit.checks import require_positive, typed


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
