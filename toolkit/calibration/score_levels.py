"""A rating learnt as a choice of level: labels of K levels from a mean opinion and its spread, and back again.

Scores live on 1 .. K, as in You, Cai, Gu, Xue & Dong 2025, "Teaching Large Language Models to Regress Accurate Image
Quality Scores using Score Distribution" (DeQA-Score). There the levels are words (bad .. excellent) that a language
model chooses from; here they are the K outputs of a small net.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit import random
from toolkit.calibration.regression import Predictions, RegressionTask
from toolkit.checks import readable, require_positive, require_probabilities, typed
from toolkit.fleet import Adam, cosine, grid, train
from toolkit.models import MLP

__all__ = [
    "level_moments",
    "one_hot_levels",
    "rating_task",
    "score_level_predictions",
    "soft_levels",
    "thurstone_fidelity",
]


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")


def _check_scores(name: str, scores: Tensor, levels: int) -> None:
    if readable(scores) and scores.numel():
        low, high = (float(value) for value in scores.detach().aminmax())
        if not (low >= 1 and high <= levels):
            raise ValueError(f"{name}: expected scores from 1 to {levels}, got values from {low:.4g} to {high:.4g}")


def _values(levels: int, like: Tensor) -> Tensor:
    return torch.arange(1, levels + 1, dtype=like.dtype, device=like.device)


@typed
def one_hot_levels(
    scores: Float[Tensor, "batch"], levels: int = 5, rule: Literal["equal", "nearest"] = "equal"
) -> Float[Tensor, "batch {levels}"]:
    """One-hot label of the level that a score in 1 .. K falls in.

    ``equal`` cuts [1, K] into K equal parts, as the paper's baseline does: level k holds 1 + (k - 1) w < s <= 1 + k w
    with w = (K - 1) / K, so that a score can be up to (K - 1) / K away from its level's value k. ``nearest`` rounds (a
    half up) and is off by at most 1/2. Raises ``ValueError`` for scores outside 1 .. K or fewer than 2 levels.

    Source: You et al. 2025, "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score
    Distribution" (its baseline; ``nearest`` is ours).
    """
    _check_levels(levels)
    _check_scores("scores", scores, levels)
    if rule == "equal":
        index = torch.ceil((scores - 1) * levels / (levels - 1)).clamp(1, levels)
    else:
        index = torch.floor(scores + 0.5).clamp(1, levels)
    return (index[:, None] == _values(levels, scores)).to(scores.dtype)


def _between(mean: Tensor, levels: int) -> Tensor:
    """The two levels about the mean, in the proportion that has this mean."""
    return (1 - (mean[:, None] - _values(levels, mean)).abs()).clamp_min(0)


@typed
def soft_levels(
    mean: Float[Tensor, "batch"],
    spread: Float[Tensor, "batch"],
    levels: int = 5,
    density: Literal["pdf", "cdf"] = "pdf",
    adjust: bool = True,
    least_spread: float = 0.2,
    largest_shift: float = 0.1,
) -> Float[Tensor, "batch {levels}"]:
    """The Gaussian of a score, N(μ, σ²), as probabilities of the levels 1 .. K.

    First p_k = the density at k (``pdf``) or the mass of [k - 1/2, k + 1/2] (``cdf``). Their sum A = Σ p_k and mean
    B = Σ k p_k are not 1 and μ, as tails are cut off and a density is read at K points only; without ``adjust`` they
    are returned like that. The adjustment is α p_k + β, with α and β such that the sum is 1 and the mean μ:

        α = (μ - c) / (B - c A),  β = (1 - α A) / K,  c = (K + 1) / 2.

    Negative values are cut off and the rest is divided by its sum. Where σ < ``least_spread``, or the cut moved the
    mean by more than ``largest_shift``, the label is the two neighbouring levels in the proportion that has mean μ.
    At μ = c the fraction is 0/0; its limit is used. (The paper's code adds 1e-9 below the line, so that the label of
    μ = c is uniform, and does not divide by the sum after the cut. ``pdf`` is for wide, ``cdf`` for narrow spreads.)
    Raises ``ValueError`` for means outside 1 .. K, spreads that are not positive or fewer than 2 levels.

    Source: You et al. 2025, "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score
    Distribution" (section on the soft label, post-adjustment, and appendix).
    """
    _check_levels(levels)
    _check_scores("mean", mean, levels)
    require_positive("spread", spread)
    values = _values(levels, mean)
    mu, sigma = mean[:, None], spread[:, None]

    def gaussian(at: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((at - mu) / sigma).square()) / (sigma * (2 * torch.pi) ** 0.5)

    if density == "pdf":
        raw = gaussian(values)
        slope = raw * (values - mu) / sigma.square()  # of p_k in μ
    else:
        edges = torch.arange(levels + 1, dtype=mean.dtype, device=mean.device) + 0.5
        raw = torch.special.ndtr((edges - mu) / sigma).diff(dim=-1)
        slope = -gaussian(edges).diff(dim=-1)
    if not adjust:
        return raw
    centred = values - (levels + 1) / 2
    distance, first = mean - (levels + 1) / 2, (raw * centred).sum(-1)
    middle = distance.abs() < 1e-3
    rise = (slope * centred).sum(-1)
    tiny = torch.finfo(mean.dtype).tiny
    below = torch.where(middle, rise, first)
    usable = below.abs() > tiny
    alpha = torch.where(middle, 1.0, distance) / torch.where(usable, below, 1.0)
    beta = (1 - alpha * raw.sum(-1)) / levels
    cut = (alpha[:, None] * raw + beta[:, None]).clamp_min(0)
    label = cut / cut.sum(-1, keepdim=True)
    shift = ((label * values).sum(-1) - mean).abs()
    simple = (spread < least_spread) | ~usable | ~(shift <= largest_shift)
    return torch.where(simple[:, None], _between(mean, levels), label)


@typed
def level_moments(
    probabilities: Float[Tensor, "batch levels"],
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Expected score Σ k p_k and spread √(Σ p_k (k - mean)²) of level probabilities, in levels.

    Rounding alone gives a spread: a mean half-way between two levels has at least 1/2. Raises ``ValueError`` for
    values that are not probabilities.

    Source: You et al. 2025, "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score
    Distribution".
    """
    require_probabilities("probabilities", probabilities)
    values = _values(probabilities.shape[-1], probabilities)
    mean = probabilities @ values
    return mean, (probabilities * (values - mean[:, None]).square()).sum(-1).sqrt()


@typed
def thurstone_fidelity(
    scores: Float[Tensor, "batch"],
    target_means: Float[Tensor, "batch"],
    target_spreads: Float[Tensor, "batch"],
    spreads: Float[Tensor, "batch"] | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "batch"]:
    """Does the net prefer one example to another as often as people do? The mean over all partners in the batch.

    Thurstone: a is preferred to b with probability P = Φ((μ_a - μ_b) / √(σ_a² + σ_b²)). With Q for the net, one pair
    costs 1 - √(P Q) - √((1 - P)(1 - Q)), from 0 (equal) to 1; ``eps`` is added to each product under a root, and to the
    sums of variances, so that a cost can be -√eps. The net's spreads are 1 where ``spreads`` is None, as in the paper's
    training script, and no gradient flows through them otherwise. Only differences count: adding a number to all scores
    costs nothing, which lets data sets with different scales train together; with spreads of 1 the best difference is
    √2 (μ_a - μ_b) / √(σ_a² + σ_b²), *not* that of the means. Raises ``ValueError`` for fewer than 2 examples.

    Source: You et al. 2025, "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score
    Distribution"; Thurstone 1927, "A law of comparative judgment"; Tsai et al. 2007, "FRank" (fidelity).
    """
    count = scores.shape[0]
    if count < 2:
        raise ValueError(f"scores: expected at least 2 examples to compare, got {count}")

    def preferences(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (means[:, None] - means) / (2 * (variances[:, None] + variances + eps)).sqrt()
        return 0.5 * torch.erfc(-scaled), 0.5 * torch.erfc(scaled)

    own = torch.ones_like(scores) if spreads is None else spreads.detach().square()
    more, less = preferences(scores, own)
    target_more, target_less = preferences(target_means.detach(), target_spreads.detach().square())
    cost = 1 - (more * target_more + eps).sqrt() - (less * target_less + eps).sqrt()
    others = 1 - torch.eye(count, dtype=cost.dtype, device=cost.device)
    return (cost * others).sum(-1) / (count - 1)


@typed
def rating_task(n: int, seed: int, annotators: int = 10, levels: int = 5) -> RegressionTask:
    """``n`` inputs, uniform on [-2, 2], and ``annotators`` ratings of each on the scale 1 .. ``levels``.

    With c the scale's middle and h half its length, a rating of x is N(c + 0.75 h sin 2x, (0.2 h (1.3 + cos 3x))²), cut
    to the scale; ``mean`` and ``spread`` are those of the Gaussian before the cut. Float32; a larger ``n`` with the
    same seed only appends. Raises ``ValueError`` for sizes below 1 or fewer than 2 levels.

    Source: a stand-in, in one dimension, for the quality ratings of You et al. 2025, "Teaching Large Language Models to
    Regress Accurate Image Quality Scores using Score Distribution"; the task is ours.
    """
    for name, value in (("n", n), ("annotators", annotators)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    _check_levels(levels)
    centre, half = (levels + 1) / 2, (levels - 1) / 2
    x = -2 + 4 * random.uniform(random.key(seed, 0), (n, 1), torch.float64)
    mean = centre + 0.75 * half * torch.sin(2 * x[:, 0])
    spread = 0.2 * half * (1.3 + torch.cos(3 * x[:, 0]))
    noise = random.normal(random.key(seed, 1), (n, annotators), torch.float64)
    answers = (mean[:, None] + spread[:, None] * noise).clamp(1, levels)
    return RegressionTask(x.float(), answers.float(), mean.float(), spread.float())


def _loss(model, batch, hyper):
    logs = model(batch.x).log_softmax(-1)
    scores = logs.exp() @ _values(logs.shape[-1], logs)
    pairs = thurstone_fidelity(scores, batch.mean_opinion, batch.opinion_spread)
    return -(batch.label * logs).sum(-1) + hyper.fidelity * pairs


def score_level_predictions(
    task: RegressionTask,
    labels: Mapping[str, Float[Tensor, "n levels"]],
    x: Float[Tensor, "points 1"],
    seeds: int = 8,
    *,
    fidelity: Sequence[float] | None = None,
    hidden: Sequence[int] = (32, 32),
    steps: int = 300,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Predictions]:
    """Train nets on every kind of ``labels``, ``seeds`` each, and predict at ``x``: name → mean and spread in levels.

    The loss is the cross-entropy with the label plus ``fidelity`` (one weight per kind of label, default 0) times
    :func:`thurstone_fidelity` with the net's spreads fixed at 1. One call of ``train``; members of one seed share
    initial weights and batches. Raises ``ValueError`` for labels of different shapes or another number of weights.

    Source: You et al. 2025, "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score
    Distribution".
    """
    n = len(task.x)
    shapes = {tuple(label.shape) for label in labels.values()}
    if len(shapes) != 1 or any(len(shape) != 2 or shape[0] != n for shape in shapes):
        raise ValueError(f"labels: expected one or more tensors ({n}, levels) of one shape, got {sorted(shapes)}")
    weights = [0.0] * len(labels) if fidelity is None else list(fidelity)
    if len(weights) != len(labels):
        raise ValueError(f"fidelity: expected {len(labels)} weights, one per kind of label, got {len(weights)}")
    levels = shapes.pop()[1]
    members = grid(seeds, label=range(len(labels)))
    opinion = task.answers.mean(1)
    fleet = train(
        lambda: MLP(1, hidden, levels),
        _loss,
        {"x": task.x, "mean_opinion": opinion, "opinion_spread": task.answers.std(1, correction=0)},
        member_data={"label": torch.stack(list(labels.values())).repeat_interleave(seeds, 0)},
        steps=steps,
        batch=batch,
        optimiser=Adam(lr),
        schedule=cosine(),
        hyper={"fidelity": torch.tensor(weights).repeat_interleave(seeds)},
        streams=members["streams"],
        seed=seed,
        device=device,
        progress=False,
    )
    means, spreads = fleet.evaluate(
        lambda model, batch, hyper: level_moments(model(batch.x).softmax(-1)), {"x": x}, chunk=len(fleet)
    )
    means, spreads = (part.to(x.device).unflatten(0, (len(labels), seeds)) for part in (means, spreads))
    return {name: Predictions(means[i], spreads[i]) for i, name in enumerate(labels)}
