"""Weights of the examples in a batch that follow from their losses, and a task on which they matter.

Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining".
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_positive, require_range, typed

__all__ = ["STRATEGIES", "hard_and_redundant", "loss_weights", "reweighted"]

STRATEGIES = ("linear_upper", "quadratic", "extremes")

_ROUNDING = 16  # a spread of the losses below so many units of rounding is none


@typed
def loss_weights(
    losses: Float[Tensor, "batch"], strategy: str, temperature: float | Tensor = 1.0, delta: float = 1.0
) -> Float[Tensor, "batch"]:
    """Weights that sum to 1, softmax(f(h) / r), of the losses' places h in [-δ, δ] between the batch's extremes.

    h = δ (2ℓ - ℓ_max - ℓ_min) / (ℓ_max - ℓ_min), r = ``temperature``, δ = ``delta``, and f by ``strategy``:

    - ``"linear_upper"``: min(h + δ, δ): all losses above the middle count alike, the lowest count e^(-δ/r) of that;
    - ``"quadratic"``: 1 - h²/δ²: losses in the middle count most, both extremes least;
    - ``"extremes"``: |h|: the other way round.

    Adding to the losses or multiplying them by a positive number changes nothing; r → ∞ gives equal weights, and so do
    losses that differ by rounding only. The weights maximise Σ w f - r KL(w ‖ uniform). They carry no gradient. Raises
    ``ValueError`` for another strategy, an empty batch, r ≤ 0 or δ ≤ 0, and losses that are not finite. Source: Sow et
    al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining" and its code.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    if len(losses) == 0:
        raise ValueError("losses: expected at least one, got none")
    require_positive("temperature", temperature)
    require_positive("delta", delta)
    losses = losses.detach()
    if readable(losses) and not bool(losses.isfinite().all()):
        raise ValueError("losses: expected finite numbers, got NaN or infinity")
    low, high = losses.amin(), losses.amax()
    spread = high - low
    real = spread > _ROUNDING * torch.finfo(losses.dtype).eps * torch.maximum(low.abs(), high.abs())
    place = torch.where(real, (losses - low - (high - losses)) / torch.where(real, spread, 1), 0) * delta
    if strategy == "linear_upper":
        value = (place + delta).clamp_max(delta)
    elif strategy == "quadratic":
        value = 1 - place.square() / delta**2
    else:
        value = place.abs()
    return (value / temperature).softmax(0)


def reweighted(
    loss: Callable[[Any, Any, Any], Any],
    strategy: str,
    temperature: float | str = 1.0,
    delta: float = 1.0,
    uniform_until: float = 0.0,
) -> Callable[[Any, Any, Any], Any]:
    """A loss for :func:`toolkit.fleet.train` from another: its values times :func:`loss_weights` times the batch size.

    ``temperature`` is a number, or the name of a hyper-parameter, which then may differ from member to member. While
    the progress of training is below ``uniform_until`` (a share of the steps, in [0, 1]) all weights are equal. The
    mean of the values is Σ w ℓ, which is also what the fleet's history holds: compare runs by their plain losses. What
    the loss writes to memory is passed on. Raises ``ValueError`` for another strategy, a temperature or δ not above 0,
    or ``uniform_until`` outside [0, 1]. Source: Sow et al. 2025, "Dynamic Loss-Based Sample Reweighting for Improved
    Large Language Model Pretraining" (there the first 1,000 of 20,000 steps are uniform, and r = 1).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    if not isinstance(temperature, str):
        require_positive("temperature", temperature)
    require_positive("delta", delta)
    require_range("uniform_until", uniform_until, 0, 1)

    def weighted(model, batch, hyper):
        result = loss(model, batch, hyper)
        values, written = result if isinstance(result, tuple) else (result, None)
        r = hyper[temperature] if isinstance(temperature, str) else temperature
        share = loss_weights(values, strategy, r, delta) * len(values)
        if uniform_until > 0:
            share = torch.where(batch.progress < uniform_until, 1, share)
        return values * share if written is None else (values * share, written)

    return weighted


@typed
def hard_and_redundant(
    n: int, dims: int, seed: int, hard: float = 0.1, rank: int = 2, noise: float = 0.0, outliers: float = 0.0
) -> tuple[dict[str, Tensor], Float[Tensor, "{dims}"]]:
    """Linear regression in which most examples repeat each other: fields ``x``, ``y``, ``group`` and the true θ.

    y = θᵀx + noise with θ ~ N(0, I). A share ``hard`` of the examples (``group`` 1) has x ~ N(0, I) in all ``dims``
    directions, the others (``group`` 0) lie in the first ``rank`` directions only, with variance dims / rank in each,
    so that both have the same mean length. A share ``outliers`` of all examples (``group`` 2) gets a y of its own,
    N(0, dims), that has nothing to do with x. All float32. Raises ``ValueError`` for n < 1, a rank outside 1 .. dims, a
    share outside [0, 1] or a negative noise. The task is a reading: Sow et al. 2025, "Dynamic Loss-Based Sample
    Reweighting for Improved Large Language Model Pretraining" show a linear regression without all of its details.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if not 1 <= rank <= dims:
        raise ValueError(f"rank: expected from 1 to {dims} (dims), got {rank}")
    require_range("hard", hard, 0, 1)
    require_range("outliers", outliers, 0, 1)
    require_range("noise", noise, 0, float("inf"))
    theta = random.normal(random.key(seed, 0), (dims,))
    x = random.normal(random.key(seed, 1), (n, dims))
    group = (random.uniform(random.key(seed, 2), (n,)) < hard).long()
    plane = torch.where(torch.arange(dims) < rank, (dims / rank) ** 0.5, 0.0)
    x = torch.where(group[:, None] == 0, x * plane, x)
    y = x @ theta + noise * random.normal(random.key(seed, 3), (n,))
    lost = random.uniform(random.key(seed, 4), (n,)) < outliers
    y = torch.where(lost, dims**0.5 * random.normal(random.key(seed, 5), (n,)), y)
    return {"x": x, "y": y, "group": torch.where(lost, 2, group)}, theta
