"""Losses that remember something of each example: its own temperature, or how hard its pair was in each epoch."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import require_positive, require_range, typed
from toolkit.metric_learning.common import Scalar, masked_logsumexp, masked_mean, pair_masks, require_finite
from toolkit.metric_learning.similarities import Measure, cosine

__all__ = ["bad_pair_weights", "isogclr", "isogclr_state"]

State = Mapping[str, Tensor]


@typed
def isogclr_state(examples: int, temperature: float = 0.07) -> dict[str, Float[Tensor, "examples"]]:
    """The state of ``examples`` examples before training, for ``toolkit.fleet.train(..., memory=isogclr_state(n))``.

    ``log_mean``: log of the moving average of e^(s/τ) over negatives (-∞ before the first visit); ``tau``: the
    example's temperature; ``momentum``: the moving average of the gradient on it. Raises ``ValueError`` for a
    temperature ≤ 0.
    """
    require_positive("temperature", temperature)
    return {
        "log_mean": torch.full((examples,), -math.inf),
        "tau": torch.full((examples,), float(temperature)),
        "momentum": torch.zeros(examples),
    }


@typed
def isogclr(
    embeddings: Float[Tensor, "rows dim"],
    labels: Int[Tensor, "batch"],
    state: State,
    rho: Scalar = 6.0,
    step: Scalar = 1e-3,
    decay: Scalar = 0.8,
    momentum: Scalar = 0.9,
    lowest: Scalar = 0.05,
    highest: Scalar = 1.0,
    similarity: Measure = cosine,
) -> tuple[Float[Tensor, "batch"], dict[str, Tensor]]:
    """Contrastive loss whose temperature is learnt for each example; returns the values and the new state rows.

    For anchor i, τ_i is driven to the minimum of τ log mean_n e^(s_in/τ) + τ ρ over [``lowest``, ``highest``], n over
    its negatives: a worst case over weights p on the negatives with KL(p ‖ uniform) ≤ ρ, an equality at an inner
    optimum. With ``state`` rows of this batch (as :func:`isogclr_state` makes them):
    g_i = mean_n e^(s_in/τ_i); m_i ← (1 - γ) m_i + γ g_i (g_i itself at the first visit);
    w_in = e^(s_in/τ_i) / m_i, constants; value_i = mean_n w_in s_in - mean over the positives of s_ip;
    G = log m_i + ρ - mean_n w_in s_in / τ_i, cut off at ±3; u_i ← (1 - b) u_i + b G;
    τ_i ← τ_i - η u_i within its bounds. γ = ``decay``, b = ``momentum``, η = ``step``; the paper's values by default.

    The gradient of the values is what counts, the values are no objective. ``embeddings`` may hold several views of the
    batch one after the other, ``rows`` = views · batch: another view of the example is then a positive, and value, m
    and G are averaged over the views (the public code sums the values). An anchor without a positive or a negative
    has value 0 and keeps its state. A distance d enters as s = -d. Raises ``ValueError`` for rows that are no multiple
    of the batch, missing state, values that are not finite, a parameter out of range, or τ ≤ 0.

    Qiu et al. 2023, "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic
    Temperature Individualization", algorithm 1; constants as in its code.
    """
    require_finite("embeddings", embeddings)
    names = {"log_mean", "tau", "momentum"}
    if missing := names - set(state):
        raise ValueError(f"state: expected {sorted(names)}, got no {sorted(missing)}")
    for name in names:
        if state[name].shape != labels.shape:
            raise ValueError(
                f"state[{name!r}]: expected one value per label, {len(labels)}, got shape {tuple(state[name].shape)}"
            )
    if len(embeddings) % len(labels):
        raise ValueError(f"embeddings: expected whole views of {len(labels)} examples, got {len(embeddings)} rows")
    require_positive("state['tau']", state["tau"])
    require_positive("lowest", lowest)
    require_positive("highest", highest)
    for name, value in {"decay": decay, "momentum": momentum}.items():
        require_range(name, value, 0, 1)
    for name, value in {"rho": rho, "step": step}.items():
        require_range(name, value, 0, math.inf)

    views = len(embeddings) // len(labels)
    closeness = similarity(embeddings) * similarity.excess(0.0, 1.0)
    positives, negatives = pair_masks(labels.repeat(views))
    known = positives.any(-1) & negatives.any(-1)
    before = {name: state[name].detach() for name in names}
    tau, log_mean = before["tau"].repeat(views), before["log_mean"].repeat(views)

    logits = closeness.detach() / tau[:, None]
    count = negatives.sum(-1).clamp_min(1).to(logits.dtype).log()
    log_g = torch.where(known, masked_logsumexp(logits, negatives) - count, 0)
    fresh = log_mean == -math.inf
    share = torch.as_tensor(decay, dtype=logits.dtype, device=logits.device)
    mixed = torch.logaddexp(torch.where(fresh, log_g, log_mean) + (1 - share).log(), log_g + share.log())
    log_mean = torch.where(fresh, log_g, mixed)
    weights = torch.where(negatives & known[:, None], logits - log_mean[:, None], -math.inf).exp()
    values = masked_mean(weights * closeness, negatives) - masked_mean(closeness, positives)
    slope = log_mean + rho - masked_mean(weights * logits, negatives)

    def over_views(x: Tensor) -> Tensor:
        return x.reshape(views, -1).mean(0)

    pull = momentum * over_views(slope).clamp(-3, 3) + (1 - momentum) * before["momentum"]
    after = {
        "log_mean": log_mean.reshape(views, -1).logsumexp(0) - math.log(views),
        "tau": (before["tau"] - step * pull).clamp_min(lowest).clamp_max(highest),
        "momentum": pull,
    }
    seen = known.reshape(views, -1)[0]
    written = {name: torch.where(seen, after[name].to(before[name].dtype), before[name]) for name in after}
    return over_views(torch.where(known, values, 0)), written


@typed
def bad_pair_weights(
    history: Float[Tensor, "epochs examples"],
    losses: Float[Tensor, "examples"],
    total: int | None = None,
    noisy: Scalar = 2.0,
    faulty: Scalar = 3.0,
) -> Float[Tensor, "examples"]:
    """Weights for positive pairs whose loss was suspiciously low (shared noise) or high (not the same thing) so far.

    ``history`` holds each pair's loss in the epochs so far, t = 0 .. e - 1, ``losses`` its current one. The mean
    m_i = (1/e) Σ_t ((t + 1)/T) l_i^(t) lets later epochs weigh more, T = ``total`` epochs (e by default). With mean μ
    and standard deviation σ of m over all pairs, those with m_i ≤ μ - c_n σ or m_i ≥ μ + c_f σ are flagged, c_n =
    ``noisy``, c_f = ``faulty`` ≥ 0. A flagged pair has weight exp(-z²/2), z = (current loss - μ)/σ, the others 1;
    equal losses (σ = 0) flag none. Weights are constants for the gradient; multiply them with the current losses.

    Lan et al. 2024, "Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach". As in the
    public code z compares the current loss with epoch-weighted means. Unlike it, which multiplies with the normal
    density itself, the weight is the density over its peak: for σ < .4 the density exceeds 1 and would weigh some bad
    pairs up. Raises ``ValueError`` for no epochs, more epochs than T, negative c, or values that are not finite.
    """
    epochs = len(history)
    total = epochs if total is None else total
    if not 1 <= epochs <= total:
        raise ValueError(f"history: expected from 1 to {total} epochs, got {epochs}")
    require_finite("history", history)
    require_finite("losses", losses)
    require_range("noisy", noisy, 0, math.inf)
    require_range("faulty", faulty, 0, math.inf)
    later = torch.arange(1, epochs + 1, dtype=history.dtype, device=history.device) / total
    mean = (later[:, None] * history.detach()).mean(0)
    middle, spread = mean.mean(), mean.std(correction=0)
    varied = spread > 10 * torch.finfo(mean.dtype).eps * middle.abs()
    spread = torch.where(varied, spread, 1)
    flagged = varied & ((mean <= middle - noisy * spread) | (mean >= middle + faulty * spread))
    z = (losses.detach() - middle) / spread
    return torch.where(flagged, (-z.square() / 2).exp(), 1)
