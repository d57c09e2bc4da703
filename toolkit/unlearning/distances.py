"""How far is an unlearned model from one that was retrained without the forget set?

The reference is always a fleet of retrained models, the oracle: :func:`inside_band` says of a number whether a
retrained model could have given it, and is the only meaning of "passes". Distances between distributions of outputs
(KLoM and its twins without bins) are not 0 between two oracle fleets either; :func:`noise_floor` is what they are then.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_labels, require_positive, require_range, typed
from toolkit.unlearning.attacks import require_numbers

__all__ = [
    "Accuracies",
    "Band",
    "accuracies",
    "aus",
    "beyond_band",
    "gaussian_klom",
    "inside_band",
    "klom",
    "noise_floor",
    "oracle_band",
    "relearn_steps",
    "run_time_efficiency",
    "tow",
    "wasserstein",
]

Scalar = float | int | Float[Tensor, "..."]
_SMALLEST = 1e-12  # standard deviation of margins that are all alike


class Accuracies(NamedTuple):
    """UA, RA and TA in [0, 1], each one value per member; UA is 1 minus the accuracy on the forget set."""

    ua: Float[Tensor, "..."]
    ra: Float[Tensor, "..."]
    ta: Float[Tensor, "..."]

    def mean(self) -> "Accuracies":
        """The fleet's means."""
        return Accuracies(self.ua.mean(), self.ra.mean(), self.ta.mean())


class Band(NamedTuple):
    """Lower and upper end, both inside the band."""

    low: Float[Tensor, "*rest"]
    high: Float[Tensor, "*rest"]


@typed
def oracle_band(oracle: Float[Tensor, "oracles *rest"], level: float = 0.95) -> Band:
    """Prediction band [x_(k), x_(n+1-k)] of n retrained models, entry by entry, with k = ⌊(1 - ``level``)(n + 1) / 2⌋.

    One more retrained model lies inside with probability (n + 1 - 2k) / (n + 1) ≥ ``level`` whatever the distribution
    (exactly so without ties, more often with them), because all n + 1 ranks are equally likely: 39, 79, 119, ... models
    give .95 exactly. Raises ``ValueError`` for NaN, a level outside (0, 1) and fewer than 2 / (1 - level) - 1 models.
    Source: Wilks 1941, "Determination of Sample Sizes for Setting Tolerance Limits".
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    require_numbers("oracle", oracle)
    n = len(oracle)
    k = math.floor((1 - level) / 2 * (n + 1) * (1 + 1e-12))
    if k < 1:
        least = math.ceil(2 / (1 - level) * (1 - 1e-12)) - 1
        raise ValueError(f"oracle: expected at least {least} retrained models for a level of {level:g}, got {n}")
    ordered = oracle.sort(0).values
    return Band(ordered[k - 1], ordered[n - k])


@typed
def inside_band(
    values: Float[Tensor, "*members_and_rest"], oracle: Float[Tensor, "oracles *rest"], level: float = 0.95
) -> Bool[Tensor, "*members_and_rest"]:
    """Whether each of ``values`` could be a retrained model's: the only meaning of "passes".

    One verdict per model (and per example, if the last dimensions are the oracle's ``rest``), by :func:`oracle_band`:
    a retrained model passes at the nominal rate, no more often for being close to the mean. NaN does not pass. About
    single models only: a whole fleet may be shifted within the band, which :func:`klom` and U-LiRA see. Errors as
    :func:`oracle_band`.
    """
    low, high = oracle_band(oracle, level)
    _require_rest(values, oracle)
    return (values >= low) & (values <= high)


@typed
def beyond_band(
    values: Float[Tensor, "*members_and_rest"], oracle: Float[Tensor, "oracles *rest"], level: float = 0.95
) -> Float[Tensor, "*members_and_rest"]:
    """Signed distance to the nearer end of the oracle's band, 0 inside it, in the units of ``values``.

    On the forget set a loss above the band (positive) or an accuracy below it (negative) is over-forgetting: the model
    gives away which examples it was told to forget. The other sign is what was not forgotten. NaN stays NaN. Errors as
    :func:`oracle_band`.
    """
    low, high = oracle_band(oracle, level)
    _require_rest(values, oracle)
    above, below = torch.where(values > high, values - high, 0), torch.where(values < low, values - low, 0)
    return torch.where(values.isnan(), values, above + below)


def _require_rest(values: Tensor, oracle: Tensor) -> None:
    rest = oracle.shape[1:]
    if values.shape[values.ndim - len(rest) :] != rest:
        raise ValueError(f"values: expected last dimensions {tuple(rest)} as the oracle's, got {tuple(values.shape)}")


def _require_fleets(unlearned: Tensor, oracle: Tensor, least: int) -> None:
    for name, values in (("unlearned", unlearned), ("oracle", oracle)):
        require_numbers(name, values)
        if len(values) < least:
            raise ValueError(f"{name}: expected at least {least} models, got {len(values)}")


@typed
def klom(
    unlearned: Float[Tensor, "models examples"],
    oracle: Float[Tensor, "oracles examples"],
    *,
    bins: int = 20,
    clip: float = 100.0,
    floor: float = 1e-5,
) -> Float[Tensor, "examples"]:
    """KLoM: KL(unlearned ‖ oracle) in nats between histograms of :func:`margins`, one value per example, float64.

    Margins are clipped to ±``clip``; ``bins`` equal bins span the joint range of both fleets, the last one closed, so
    that every model is counted (a public implementation loses the largest margin). Where the unlearned share is
    positive, the oracle's share is at least ``floor``; then shares sum to 1 again. Report the mean and the 95th
    percentile over forget, retain and validation examples apart, beside the :func:`noise_floor`.

    Raises ``ValueError`` for empty fleets, NaN and ``bins``, ``clip`` or ``floor`` not above 0. Source: Georgiev et al.
    2024, "Attribute-to-Delete: Machine Unlearning via Datamodel Matching"; the direction is that of the public code,
    not confirmed from the text.
    """
    require_range("bins", bins, 1, math.inf)
    require_positive("clip", clip)
    require_positive("floor", floor)
    _require_fleets(unlearned, oracle, 1)
    ours, theirs = (values.double().clamp(-clip, clip).T for values in (unlearned, oracle))
    low = torch.minimum(ours.amin(1), theirs.amin(1))[:, None]
    width = torch.maximum(ours.amax(1), theirs.amax(1))[:, None] - low
    width = torch.where(width > 0, width, 1)

    def shares(values: Tensor) -> Tensor:
        place = ((values - low) / width * bins).long().clamp(0, bins - 1)
        zeros = torch.zeros(len(values), bins, dtype=torch.float64, device=values.device)
        return zeros.scatter_add(1, place, torch.ones_like(values)) / values.shape[1]

    p, q = shares(ours), shares(theirs)
    q = torch.where(p > 0, q.clamp_min(floor), q)
    q = q / q.sum(1, keepdim=True)
    return torch.where(p > 0, p * (torch.where(p > 0, p, 1).log() - torch.where(p > 0, q, 1).log()), 0).sum(1)


@typed
def gaussian_klom(
    unlearned: Float[Tensor, "models examples"], oracle: Float[Tensor, "oracles examples"]
) -> Float[Tensor, "examples"]:
    """KLoM without bins: KL(N(μ_u, σ_u²) ‖ N(μ_o, σ_o²)) = log(σ_o/σ_u) + (σ_u² + (μ_u - μ_o)²) / 2σ_o² - ½, in nats.

    Means and variances (over n - 1) of the margins of both fleets, one value per example, float64. Between two fleets
    of n normal margins each it is ½[(n-1)(n+2) / (n(n-3)) - 1] ≈ 2/n on average, far less than with bins; it sees
    nothing but mean and spread. Raises ``ValueError`` for NaN and for fewer than 2 models. Source: Kullback & Leibler
    1951, "On Information and Sufficiency".
    """
    _require_fleets(unlearned, oracle, 2)
    spread_u, mean_u = torch.std_mean(unlearned.double(), 0)
    spread_o, mean_o = torch.std_mean(oracle.double(), 0)
    spread_u, spread_o = spread_u.clamp_min(_SMALLEST), spread_o.clamp_min(_SMALLEST)
    ratio, shift = spread_u / spread_o, (mean_u - mean_o) / spread_o
    return (ratio.square() - 1 + shift.square()) / 2 - ratio.log()


@typed
def wasserstein(
    unlearned: Float[Tensor, "models examples"], oracle: Float[Tensor, "oracles examples"]
) -> Float[Tensor, "examples"]:
    """1-Wasserstein distance ∫ |F_u - F_o| between the two fleets' margins, in their units; float64, per example.

    Without bins and without a shape, and finite for fleets that do not overlap. Raises ``ValueError`` for NaN and empty
    fleets. Source: Vallender 1974, "Calculation of the Wasserstein Distance between Probability Distributions on the
    Line".
    """
    _require_fleets(unlearned, oracle, 1)
    ours, theirs = (values.double().T.contiguous().sort(1).values for values in (unlearned, oracle))
    every = torch.cat([ours, theirs], 1).sort(1).values
    steps = every[:, :-1].contiguous()
    below_u, below_o = (torch.searchsorted(values, steps, right=True).double() for values in (ours, theirs))
    gap = below_u / len(unlearned) - below_o / len(oracle)
    return (gap.abs() * every.diff(dim=1)).sum(1)


@typed
def noise_floor(
    oracle: Float[Tensor, "oracles examples"],
    distance: Callable[[Tensor, Tensor], Tensor] = klom,
    *,
    splits: int = 20,
    seed: int = 0,
) -> Float[Tensor, "splits examples"]:
    """What ``distance`` gives between two independent oracle fleets: random halves of one fleet, ``splits`` times.

    Each half has ⌊oracles / 2⌋ models, and the floor depends strongly on that number: hold it against distances of as
    many unlearned models from as many oracles. The splits overlap, so they are no independent sample. Raises
    ``ValueError`` for fewer than 4 models or no split, and what ``distance`` raises.
    """
    if len(oracle) < 4:
        raise ValueError(f"oracle: expected at least 4 models to halve, got {len(oracle)}")
    require_range("splits", splits, 1, math.inf)
    half = len(oracle) // 2
    floors = []
    for split in range(splits):
        order = random.permutation(random.key(seed, split, device=oracle.device), len(oracle))
        floors.append(distance(oracle[order[:half]], oracle[order[half : 2 * half]]))
    return torch.stack(floors)


@typed
def accuracies(
    logits: Float[Tensor, "*members examples classes"],
    labels: Int[Tensor, "examples"],
    forget: Bool[Tensor, "*#members examples"] | Bool[Tensor, "examples"],
    test_logits: Float[Tensor, "*members tests classes"],
    test_labels: Int[Tensor, "tests"],
) -> Accuracies:
    """UA, RA and TA per member, float64: 1 - accuracy on the forget set, accuracy on the other training examples, on
    the test set.

    None is good when large: each is held against the retrained fleet's. Raises ``ValueError`` for labels out of range
    and for a member whose forget set is empty or everything. Source: Jia et al. 2023, "Model Sparsity Can Simplify
    Machine Unlearning".
    """
    require_labels("labels", labels, logits.shape[-1])
    require_labels("test_labels", test_labels, test_logits.shape[-1])
    if len(test_labels) == 0:
        raise ValueError("test_labels: expected at least one example, got none")
    right = logits.argmax(-1) == labels
    forget = forget.expand(right.shape)
    count = forget.sum(-1)
    if readable(count) and bool(((count == 0) | (count == len(labels))).any()):
        raise ValueError("forget: expected at least one example inside and one outside for each member")
    forgot = (~right & forget).sum(-1).double() / count
    retained = (right & ~forget).sum(-1).double() / (len(labels) - count)
    return Accuracies(forgot, retained, (test_logits.argmax(-1) == test_labels).double().mean(-1))


def _require_shares(**shares: Scalar) -> None:
    for name, value in shares.items():
        for bound in value.aminmax() if isinstance(value, Tensor) and value.numel() else [value]:
            require_range(name, bound, 0, 1)


@typed
def aus(forget: Scalar, test: Scalar, original_test: Scalar, *, removed_class: bool = False) -> Float[Tensor, "..."]:
    """Adaptive unlearning score (1 - (A_test,original - A_test)) / (1 + Δ), of accuracies in [0, 1]; float64.

    Δ = |A_forget - A_test| when a random set was forgotten; Δ = A_forget with ``removed_class``, where ``test`` and
    ``original_test`` are on the other classes. It is 1 when forget set and test set are alike and no test accuracy was
    lost (more, when some was gained), whatever a retrained model would give. Raises ``ValueError`` for values outside
    [0, 1], such as percentages. Source: Cotogni et al. 2023, "DUCK: Distance-based Unlearning via Centroid Kinematics".
    """
    _require_shares(forget=forget, test=test, original_test=original_test)
    forgot, tested, before = (torch.as_tensor(value, dtype=torch.float64) for value in (forget, test, original_test))
    gap = forgot if removed_class else (forgot - tested).abs()
    return (1 - (before - tested)) / (1 + gap)


@typed
def tow(unlearned: Accuracies, oracle: Accuracies) -> Float[Tensor, "..."]:
    """Tug of war (1 - |ΔA_forget|)(1 - |ΔA_retain|)(1 - |ΔA_test|), Δ the difference from retrained models, in [0, 1].

    1 means that all three accuracies are the oracle's. With ``oracle`` of the same members each is compared with its
    own retrained twin, with ``oracle.mean()`` with the fleet. Raises ``ValueError`` for values outside [0, 1]. Source:
    Zhao et al. 2024, "What Makes Unlearning Hard and What to Do About It".
    """
    score = torch.ones_like(unlearned.ua - oracle.ua)
    for name, ours, theirs in zip(Accuracies._fields, unlearned, oracle, strict=True):
        _require_shares(**{name: ours, f"oracle's {name}": theirs})
        score = score * (1 - (ours - theirs).abs())
    return score


@typed
def relearn_steps(
    losses: Float[Tensor, "*members steps"], target: float | Float[Tensor, ""] | Float[Tensor, "*members"]
) -> Float[Tensor, "*members"]:
    """Steps of training on the forget set until its loss is first at most ``target``; +∞ where it never is.

    ``losses[..., t]`` is the loss after t steps (a fleet's ``history`` is just that), ``target`` in the same units: the
    loss that the original, or a relearned oracle, has reached. Knowledge that was hidden comes back in fewer steps than
    a retrained fleet needs to learn it: hold the steps against that fleet with :func:`inside_band`. NaN never reaches.
    Raises ``ValueError`` for curves without a step and a target that is NaN. Source: Golatkar et al. 2020, "Eternal
    Sunshine of the Spotless Net" (relearn time).
    """
    if losses.shape[-1] == 0:
        raise ValueError("losses: expected at least one step, got none")
    goal = torch.as_tensor(target, dtype=losses.dtype, device=losses.device)
    require_numbers("target", goal)
    reached = losses <= goal[..., None]
    first = reached.to(torch.int64).argmax(-1).to(losses.dtype)
    return torch.where(reached.any(-1), first, math.inf)


@typed
def run_time_efficiency(unlearning: Scalar, retraining: Scalar) -> Scalar:
    """How many times cheaper unlearning is than retraining: ``retraining`` / ``unlearning``, in seconds or in steps.

    Count what a method needs before the request as well, such as shadow models or Fisher information. Raises
    ``ValueError`` unless both are above 0. Source: Jia et al. 2023, who report the seconds themselves.
    """
    require_positive("unlearning", unlearning)
    require_positive("retraining", retraining)
    return retraining / unlearning
