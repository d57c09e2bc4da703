"""One autoregressive law in several domains: the floor of the loss is an entropy, what lies above it a divergence.

Domains: bytes (:mod:`toolkit.scaling_laws.corpora`) and binary 8x8 digits, pixel by pixel. After Henighan et al. 2020,
"Scaling Laws for Autoregressive Generative Modeling".
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_labels, require_positive, require_probabilities, require_range, typed
from toolkit.data import digits
from toolkit.fleet import Adam, train
from toolkit.fleet.schedules import linear, warmup

__all__ = [
    "Leak",
    "PixelModel",
    "PixelSweep",
    "binary_digits",
    "entropy_and_divergence",
    "information",
    "leak_alarm",
    "pixel_loss",
    "pixel_sweep",
    "tabular_model",
]


@typed
def entropy_and_divergence(
    truth: Float[Tensor, "contexts symbols"],
    model: Float[Tensor, "contexts symbols"],
    weights: Float[Tensor, "contexts"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy, entropy and divergence of a table of next-symbol probabilities, in nats per symbol.

    With contexts x of frequency μ(x): -Σ μ p ln q = -Σ μ p ln p + Σ μ p ln(p / q), so loss = entropy + KL with KL ≥ 0.
    Henighan et al. 2020 read the constant of a power law with offset as the entropy, the power as KL. A symbol that
    never comes (p = 0) counts 0; infinite where q = 0 < p. Raises ``ValueError`` for what is not a probability.
    """
    for name, rows in (("truth", truth), ("model", model), ("weights", weights[None])):
        require_probabilities(name, rows)
    w = weights[:, None]
    entropy = -(w * torch.special.xlogy(truth, truth)).sum()
    cross = -(w * torch.special.xlogy(truth, model)).sum()
    ratio = torch.where(truth > 0, truth / model, 1.0)
    return cross, entropy, (w * torch.special.xlogy(truth, ratio)).sum()


@typed
def tabular_model(
    x: Int[Tensor, "n context"], y: Int[Tensor, "n"], symbols: int, smoothing: float = 0.5
) -> Float[Tensor, "contexts symbols"]:
    """q(c | x) = (count(x, c) + s) / (count(x) + s · symbols), one row for each context, float64.

    Contexts are numbered with the last symbol fastest. s = ½ is the estimator of Krichevsky & Trofimov 1981. Raises
    ``ValueError`` for a smoothing that is not positive, symbols out of range, or a table of over 10⁷ values.
    """
    require_positive("smoothing", smoothing)
    context = x.shape[1]
    if symbols < 2 or symbols ** (context + 1) > 10**7:
        raise ValueError(f"symbols: expected a table of at most 10^7 values, got {symbols}^{context + 1}")
    require_labels("x", x, symbols)
    require_labels("y", y, symbols)
    place = torch.zeros_like(y)
    for i in range(context):
        place = place * symbols + x[:, i]
    counts = torch.bincount(place * symbols + y, minlength=symbols ** (context + 1)).view(-1, symbols).double()
    return (counts + smoothing) / (counts.sum(1, keepdim=True) + smoothing * symbols)


@dataclass(frozen=True)
class Leak:
    """A mean loss against the entropy of its source: ``gap`` (loss - entropy, nats), its standard error, the alarm."""

    gap: float
    standard_error: float
    alarm: bool


@typed
def leak_alarm(losses: Float[Tensor, "n"], entropy: float, errors: float = 3.0) -> Leak:
    """Is a loss on "fresh" data too good to be true? Alarm if the mean is ``errors`` standard errors below the entropy.

    On fresh data E[loss] = entropy + KL ≥ entropy, so a mean below it says that the data were seen, or that the model
    is shown what it should predict. ``losses`` must be independent: means of whole rows of a text, not its bytes.
    Raises ``ValueError`` for fewer than 2 losses or values that are not finite.
    """
    if len(losses) < 2 or not bool(losses.isfinite().all()):
        raise ValueError(f"losses: expected at least 2 finite values, got {len(losses)}")
    require_positive("errors", errors)
    error = float(losses.double().std()) / len(losses) ** 0.5
    gap = float(losses.double().mean()) - entropy
    return Leak(gap, error, gap < -errors * error)


@typed
def information(
    plain: Float[Tensor, "n"], conditional: Float[Tensor, "n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """I ≈ E[ln p(image | label) - ln p(image)], nats per image, and its standard error over the images.

    From the losses of each image without and with its label. Henighan et al. 2020 measure it for images and captions,
    and call its share of the caption's own loss the information gain. Neither sign of the error is sure: two models
    are subtracted; the truth lies between 0 and the label's entropy. Raises ``ValueError`` for fewer than 2 images.
    """
    if len(plain) < 2:
        raise ValueError(f"plain: expected losses of at least 2 images, got {len(plain)}")
    gain = plain - conditional
    return gain.mean(), gain.std() / len(gain) ** 0.5


@typed
def binary_digits(held_out: int = 397, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and held-out digits as rows of 64 pixels: ``x`` ``(n, 64)`` float32, 1 where the ink is over half full.

    ``y`` ``(n,)`` is the digit. 1,797 pictures in all. Raises ``ValueError`` unless both parts hold at least one.
    """
    data = digits()
    if not 0 < held_out < len(data):
        raise ValueError(f"held_out: expected from 1 to {len(data) - 1} pictures, got {held_out}")
    order = random.permutation(random.key(seed), len(data))
    x, y = (data.x.flatten(1) >= 0.5).float()[order], data.y[order]
    return {"x": x[held_out:], "y": y[held_out:]}, {"x": x[:held_out], "y": y[:held_out]}


class PixelModel(nn.Module):
    """p(pixel i = 1 | pixels before it, label): an autoregressive net with one shared hidden layer.

    h_i = ReLU(c + u_label + Σ_(j<i) x_j w_j), logit_i = v_i · h_i + b_i: the estimator of Larochelle & Murray 2011,
    "The Neural Autoregressive Distribution Estimator" (with ReLU). ``model(x)`` takes ``(batch, pixels)`` of 0 and 1
    and gives logits of the same shape; ``label`` ``(batch,)`` is 1 .. classes, or 0 for no label. Probabilities of all
    2^pixels pictures sum to 1. Raises ``ValueError`` for a size below 1.
    """

    def __init__(self, pixels: int, width: int, classes: int = 10):
        super().__init__()
        for name, value in (("pixels", pixels), ("width", width), ("classes", classes)):
            require_range(name, value, 1, math.inf)
        self.inward = nn.Parameter(torch.randn(pixels, width) * pixels**-0.5)
        self.outward = nn.Parameter(torch.randn(pixels, width) * width**-0.5)
        self.label = nn.Parameter(torch.zeros(classes + 1, width))
        self.start = nn.Parameter(torch.rand(width))
        self.bias = nn.Parameter(torch.zeros(pixels))

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        steps = x[..., None] * self.inward
        before = steps.cumsum(1) - steps
        start = self.start if label is None else (self.start + self.label[label])[:, None]
        return ((start + before).relu() * self.outward).sum(-1) + self.bias


@typed
def pixel_loss(logits: Float[Tensor, "batch pixels"], x: Float[Tensor, "batch pixels"]) -> Float[Tensor, "batch"]:
    """-ln p(picture) = Σ_i -ln p(pixel i | those before), nats per picture."""
    return torch.nn.functional.softplus((1 - 2 * x) * logits).sum(1)


@dataclass(frozen=True, eq=False)
class PixelSweep:
    """Held-out loss of each picture: ``losses`` ``(widths, 2, seeds, pictures)``, nats; second axis: no label, label.

    ``parameters`` ``(widths, 2)``: those that the model uses, so without the label's rows where it is not shown.
    """

    widths: tuple[int, ...]
    parameters: Tensor
    losses: Tensor

    def information(self) -> tuple[Tensor, Tensor]:
        """:func:`information` of picture and label for each width (mean loss over seeds): two tensors ``(widths,)``."""
        mean = self.losses.mean(2)
        pairs = [information(plain, conditional) for plain, conditional in mean.unbind(0)]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def _pixel_step(model: Any, batch: Any, hyper: Any) -> Tensor:
    label = (batch.y + 1) * (hyper.conditional > 0)
    return pixel_loss(model(batch.x, label=label), batch.x)


def pixel_sweep(
    data: dict[str, Tensor],
    held_out: dict[str, Tensor],
    widths: Sequence[int] = (2, 4, 8, 16),
    seeds: int = 2,
    *,
    classes: int = 10,
    epochs: float = 12,
    batch: int = 64,
    lr: float = 5e-2,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> PixelSweep:
    """Train :class:`PixelModel` at each width, with and without the label: one fleet for each width.

    Models of a seed start alike, with the label or without. Adam, 5 % warm-up, then a linear decay to 0. Raises
    ``ValueError`` for fewer than one seed or width, or labels out of range. Source: the pictures of Henighan et al.
    2020, "Scaling Laws for Autoregressive Generative Modeling", here of 64 pixels and two grey levels.
    """
    if seeds < 1 or not widths:
        raise ValueError(f"seeds: expected at least one seed and width, got {seeds} and {tuple(widths)}")
    require_positive("lr", lr)
    for part in (data, held_out):
        require_labels("y", part["y"], classes)
    pixels, losses, parameters = data["x"].shape[1], [], []
    for width in widths:
        fleet = train(
            functools.partial(PixelModel, pixels, width, classes),
            _pixel_step,
            {"x": data["x"], "y": data["y"]},
            streams=torch.arange(seeds).repeat(2),
            hyper={"conditional": torch.tensor([0.0, 1.0]).repeat_interleave(seeds)},
            epochs=epochs,
            batch=batch,
            optimiser=Adam(lr=lr),
            schedule=warmup(0.05, linear()),
            seed=seed,
            device=device,
            progress=False,
        )
        values = fleet.evaluate(_pixel_step, {"x": held_out["x"], "y": held_out["y"]})
        losses.append(values.double().view(2, seeds, -1).cpu())
        parameters.append([fleet.layout.size - (classes + 1) * width, fleet.layout.size - width])
    return PixelSweep(tuple(widths), torch.tensor(parameters), torch.stack(losses))
