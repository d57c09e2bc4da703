"""Circuits in use: train a fleet of them, draw their dropout masks, and set four kinds of uncertainty side by side."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.calibration.circuits import Circuit, CircuitMoments, _require_rate, class_posterior_moments
from toolkit.calibration.losses import cross_entropy
from toolkit.calibration.selective import auroc
from toolkit.checks import require_range, typed
from toolkit.data import digits, splits
from toolkit.fleet import Adam, Fleet, each, train

__all__ = [
    "CircuitStudy",
    "circuit_loss",
    "dropout_inference_study",
    "monte_carlo_posteriors",
    "train_circuits",
]


@typed
def circuit_loss(
    log_likelihood: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    inputs: int,
    discriminative: float | Float[Tensor, ""] = 0.5,
) -> Float[Tensor, "batch"]:
    """λ · cross-entropy of the posterior - (1 - λ) · log p(x | y) / ``inputs``, in nats (λ = ``discriminative``).

    λ = 0 is maximum likelihood. Raises ``ValueError`` for λ outside [0, 1] and labels that are no class indices.
    Source: Peharz et al. 2020, "Random Sum-Product Networks".
    """
    require_range("discriminative", discriminative, 0, 1)
    error = cross_entropy(log_likelihood, labels)
    classes = torch.arange(log_likelihood.shape[1], device=labels.device)
    own = torch.where(labels[:, None] == classes, log_likelihood, torch.zeros_like(log_likelihood)).sum(-1)
    return discriminative * error - (1 - discriminative) * own / inputs


@typed
def train_circuits(
    x: Float[Tensor, "n inputs"],
    y: Int[Tensor, "n"],
    *,
    members: int = 3,
    discriminative: float = 0.5,
    steps: int = 120,
    batch: int = 64,
    lr: float = 0.05,
    seed: int = 0,
    **sizes: Any,
) -> Fleet:
    """A fleet of circuits of one structure, trained by :func:`circuit_loss`; ``sizes`` as in :class:`Circuit`."""
    inputs, classes = x.shape[1], int(y.max()) + 1

    def loss(model, batch, hyper):
        return circuit_loss(model(batch.x), batch.y, inputs, discriminative)

    return train(
        lambda: Circuit(inputs, classes, **sizes),
        loss,
        {"x": x, "y": y},
        members=members,
        steps=steps,
        batch=batch,
        optimiser=Adam(lr=lr),
        seed=seed,
        device="cpu",
        progress=False,
    )


@typed
def monte_carlo_posteriors(
    fleet: Fleet, x: Float[Tensor, "batch inputs"], rate: float, samples: int, seed: int = 0
) -> tuple[Float[Tensor, "members samples batch classes"], Float[Tensor, "members samples batch classes"]]:
    """Posteriors and log-likelihoods (nats) under ``samples`` drawn masks.

    With the correction of :func:`toolkit.calibration.circuits.sum_moments`. The reference that tractable
    dropout inference replaces: Gal & Ghahramani 2016, "Dropout as a Bayesian approximation", through the same circuit.
    A draw that leaves no class a path answers with the prior, 1 / K each. Raises ``ValueError`` for a rate outside
    [0, 1) and fewer than 1 sample.
    """
    _require_rate(rate)
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")

    def draw(model, batch, hyper):
        keys = random.fold_in(batch.key, torch.arange(samples, device=batch.key.device))
        return torch.vmap(lambda k: model(batch.x, rate=rate, key=k), chunk_size=32)(keys)

    logs = fleet.evaluate(draw, {"x": x}, seed=seed)
    nothing = logs.isneginf().all(-1, keepdim=True)
    return torch.where(nothing, 1 / logs.shape[-1], torch.where(nothing, 0.0, logs).softmax(-1)), logs


class CircuitStudy(NamedTuple):
    """Uncertainty of the class posterior on rotated digits and unseen classes, by four ``methods``.

    ``entropy`` (nats) is that of the mean posterior, ``deviation`` the standard deviation of the predicted class's
    probability under dropout, both averaged over a set's images; ``auroc`` is for telling unseen classes from upright
    digits by that entropy, ``likelihood_auroc`` by log p(x). ``error`` is the root mean squared relative error of the
    Monte-Carlo mean of the likelihoods after so many ``samples``, ``expected`` what an unbiased mean of independent
    samples has. ``seconds`` per method, for all images and seeds, are measured: they alone differ from run to run.
    """

    methods: tuple[str, ...]
    sets: tuple[str, ...]
    accuracy: Float[Tensor, "sets seeds"]
    entropy: Float[Tensor, "methods sets seeds"]
    deviation: Float[Tensor, "methods sets seeds"]
    auroc: Float[Tensor, "methods seeds"]
    likelihood_auroc: Float[Tensor, "seeds"]
    samples: tuple[int, ...]
    error: Float[Tensor, "samples seeds"]
    expected: Float[Tensor, "samples seeds"]
    seconds: tuple[float, ...]


def _rotated(x: Tensor, degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = x.new_tensor([[cos, sin, 0], [-sin, cos, 0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@typed
def dropout_inference_study(
    *,
    known: int = 6,
    angles: Sequence[float] = (0.0, 22.5, 45.0, 67.5, 90.0),
    rate: float = 0.2,
    samples: Sequence[int] = (4, 16, 64),
    examples: int = 40,
    seeds: int = 3,
    steps: int = 100,
    seed: int = 0,
    **sizes: Any,
) -> CircuitStudy:
    """Train circuits on the first ``known`` digits; ask them about turned ones and about the digits they never saw.

    The methods are the plain posterior, TDI as published, TDI with full covariances, and the mean of
    max(``samples``) Monte-Carlo dropout passes, all through the same circuits at dropout ``rate``; ``examples`` images
    in each set, ``sizes`` as in :class:`Circuit`. Raises ``ValueError`` for a first angle that is not 0 and for too few
    ``samples``.
    Source: Ventola et al. 2023, "Probabilistic Circuits That Know What They Don't Know" (there MNIST and larger
    circuits; sizes are ours).
    """
    if not angles or angles[0] != 0:
        raise ValueError(f"angles: expected 0 first, got {list(angles)}")
    if not samples or min(samples) < 1 or max(samples) < 2:
        raise ValueError(f"samples: expected counts of at least 1, one of them above 1, got {list(samples)}")
    everything = digits()
    seen = splits(everything.subset(everything.y < known), seed, (0.5, 0.0, 0.5))
    fleet = train_circuits(
        seen.train.x.flatten(1),
        seen.train.y,
        members=seeds,
        steps=steps,
        seed=seed,
        **({"sums": 8, "leaves": 4, "narrowest": 0.25} | sizes),
    )
    examples = min(examples, len(seen.test), int((everything.y >= known).sum()))
    images, labels = seen.test.x[:examples], seen.test.y[:examples]
    unseen = everything.x[everything.y >= known][:examples]
    x = torch.cat([*(_rotated(images, angle) for angle in angles), unseen]).flatten(1)

    def moments(full: bool) -> CircuitMoments:
        return fleet.evaluate(lambda model, batch, hyper: model(batch.x, rate=rate, full=full), {"x": x}, chunk=1)

    fleet.logits(x[:1])  # the first call prepares what all need
    seconds = [time.perf_counter()]
    plain = fleet.logits(x, chunk=1)
    seconds.append(time.perf_counter())
    published = moments(False)
    seconds.append(time.perf_counter())
    exact = moments(True)
    seconds.append(time.perf_counter())
    drawn, logs = monte_carlo_posteriors(fleet, x, rate, max(samples), seed)
    seconds.append(time.perf_counter())

    tdi = each(lambda pair: class_posterior_moments(CircuitMoments(*pair)), tuple(published))
    whole = each(lambda pair: class_posterior_moments(CircuitMoments(*pair), "shared"), tuple(exact))
    means = torch.stack([plain.softmax(-1), tdi[0], whole[0], drawn.mean(1)])
    variances = torch.stack([torch.zeros_like(means[0]), tdi[1], whole[1], drawn.var(1)])
    entropy = torch.special.entr(means.clamp(0, 1)).sum(-1)
    chosen = means[0].argmax(-1)
    deviation = variances.sqrt().gather(-1, chosen.expand(means.shape[:-1])[..., None])[..., 0]
    groups = (len(angles) + 1, examples)
    right = (chosen.unflatten(1, groups)[:, :-1] == labels).float().mean(-1)
    upright_or_unseen = torch.cat([torch.arange(examples), torch.arange(len(x) - examples, len(x))])
    novel = torch.arange(2 * examples) >= examples
    areas = each(lambda values: auroc(values, novel), entropy[..., upright_or_unseen].flatten(0, 1))
    known_part = slice(0, examples)
    relative = (logs - exact.log_mean[:, None])[:, :, known_part].exp()
    error = [(relative[:, :count].mean(1) - 1).square().mean((-2, -1)).sqrt() for count in samples]
    scale = exact.covariance.diagonal(dim1=-2, dim2=-1)[:, known_part].mean((-2, -1)).sqrt()
    return CircuitStudy(
        ("plain", "TDI", "TDI, full covariance", "MC dropout"),
        (*(f"{angle:g}°" for angle in angles), "unseen classes"),
        torch.cat([right, right.new_full((len(fleet), 1), float("nan"))], 1).T,
        entropy.unflatten(2, groups).mean(-1).transpose(1, 2),
        deviation.unflatten(2, groups).mean(-1).transpose(1, 2),
        areas.reshape(len(means), -1),
        each(lambda values: auroc(-values.logsumexp(-1), novel), plain[:, upright_or_unseen]),
        tuple(samples),
        torch.stack(error),
        torch.stack([scale / math.sqrt(count) for count in samples]),
        tuple(after - before for before, after in pairwise(seconds)),
    )
