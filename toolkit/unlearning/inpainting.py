"""Image-to-image unlearning: an autoencoder that fills in what is hidden, and that must stop doing so for some classes.

The net is shown part of an image and completes the rest. To forget, only the encoder is trained: it learns to answer an
image to forget with the code of noise, and any other with the code it had. The decoder stays bit for bit.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_positive, typed
from toolkit.fleet import Adam, Fleet
from toolkit.unlearning.parts import NOISE_SCALE, Mask, Masked, Strength, prepare, train_pairs, within

__all__ = ["Inpainter", "image_to_image", "inpainting_errors", "inpainting_loss", "noise_images", "noise_outputs"]

Noise = Literal["gaussian", "uniform", "constant"]
Aim = Literal["noise_code", "random_code", "noise_image", "max_loss"]


def _layers(widths: Sequence[int]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [nn.ReLU()] * bool(parts) + [nn.Linear(before, after)]
    return nn.Sequential(*parts)


class Inpainter(nn.Module):
    """Completes square images: the ``encoder`` sees the image with a part set to 0, the ``decoder`` paints all of it.

    ``model(x)`` gives images of the shape of x; ``model(x, return_features=True)`` gives ``(images, codes)``, codes
    ``(batch, code)``; ``model(x, against=y)`` gives the mean squared distance to the images y over the hidden pixels,
    ``(batch,)``.

    Args:
        size: pixels along a side of the (grey) images.
        hole: pixels along a side of the square in the centre.
        outside: hide all but the centre (outpainting) instead of the centre (inpainting).
        code: values in a code.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse. Empty for a linear net.
        bias: whether the encoder's layers have a bias.
    """

    def __init__(
        self,
        size: int = 8,
        hole: int = 4,
        *,
        outside: bool = False,
        code: int = 16,
        hidden: Sequence[int] = (64,),
        bias: bool = True,
    ):
        super().__init__()
        if not 0 < hole < size:
            raise ValueError(f"hole: expected 1 to {size - 1} pixels for images of {size}, got {hole}")
        require_positive("code", code)
        self.encoder = _layers([size * size, *hidden, code])
        self.decoder = _layers([code, *reversed(hidden), size * size])
        if not bias:
            for part in self.encoder:
                part.register_parameter("bias", None)
        first = (size - hole) // 2
        centre = torch.zeros(size, size)
        centre[first : first + hole, first : first + hole] = 1
        self.register_buffer("hidden_part", (1 - centre if outside else centre).flatten(), persistent=False)

    def forward(self, x: Tensor, return_features: bool = False, against: Tensor | None = None):
        pixels, mask = x.flatten(1), self.get_buffer("hidden_part")
        if pixels.shape[1] != len(mask):
            raise ValueError(f"x: expected {len(mask)} pixels per image, got {pixels.shape[1]}")
        codes = self.encoder(pixels * (1 - mask))
        painted = self.decoder(codes)
        if against is not None:
            return ((painted - against.flatten(1)).square() * mask).sum(1) / mask.sum()
        return (painted.reshape(x.shape), codes) if return_features else painted.reshape(x.shape)


def inpainting_loss(model: Any, batch: Any, hyper: Any) -> Tensor:
    """What an :class:`Inpainter` is trained with: the mean squared error over the hidden pixels, ``(batch,)``."""
    return model(batch.x, against=batch.x)


@typed
def noise_images(
    like: Float[Tensor, "batch *image"], key: Int[Tensor, ""], noise: Noise = "gaussian"
) -> Float[Tensor, "batch *image"]:
    """Images without content: one for each image of a batch with pixels in [0, 1].

    ``gaussian``: N(m, s²) in every pixel, clamped to [0, 1], m and s the mean and the standard deviation of all pixels
    of the batch; ``uniform``: on [0, 1]; ``constant``: m everywhere. Vmap-safe.
    """
    if noise == "uniform":
        return random.uniform(key, tuple(like.shape), like.dtype)
    flat = torch.zeros_like(like) + like.mean()
    if noise == "constant":
        return flat
    return (flat + like.std() * random.normal(key, tuple(like.shape), like.dtype)).clamp(0, 1)


@typed
def image_to_image(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    forget_weight: Strength = 0.25,
    retain_weight: Strength = 1.0,
    noise: Noise = "gaussian",
    aim: Aim = "noise_code",
    retain: Mask | None = None,
    steps: Any = 200,
    seed: int = 0,
    optimiser: Any = None,
    **more: Any,
) -> Fleet:
    """a_R · mean_r |E(x) - E₀(x)|² / c + a_F · mean_f |E(x) - E₀(n)|² / c over the encoder E; the decoder is frozen.

    E₀ is the original encoder, c the length of a code, n a new noise image (:func:`noise_images`, with the mean and
    standard deviation of the batch) at every step, under the same mask as x. a_F = ``forget_weight`` ≥ 0, a_R =
    ``retain_weight`` ≥ 0. In the optimum for D_f alone every x gets the mean code of noise. With a_F = 0 the original
    stays as it is to the last bit: its slope is exactly 0. ``trained`` is a fleet of :class:`Inpainter`.

    ``retain`` may name examples that the fleet has not been trained on, rows added to ``data``: the proxy set of the
    variant for which D_r is lost. Other aims are the baselines, with the same part for D_r:

    - ``random_code``: |E(x) - ε|² / c on D_f, ε standard normal;
    - ``noise_image``: the error of the painting against n in the hidden pixels, in place of x;
    - ``max_loss``: minus the error of the painting, which has no bound.

    Source: Li et al. 2024, "Machine Unlearning for Image-to-Image Generative Models"; its public code takes the mean
    over a code and weights 2 a_R and 2 a_F on a mixed batch, which is this for halves of equal size. The weight 0.25
    and the exact form of the baselines are readings that are not confirmed. Raises ``ValueError`` for a fleet without
    an encoder.
    """
    task = prepare(trained, data, forget, retain)
    layout = trained.layout
    free = [torch.full((n,), name.startswith("encoder.")) for name, n in zip(layout.names, layout.sizes, strict=True)]
    mask = torch.cat(free).to(trained.device)
    if not bool(mask.any()) or bool(mask.all()):
        raise ValueError(f"trained: expected an encoder and a decoder, got parameters {list(layout.names)}")

    def loss(model, batch, hyper):
        x, forgotten = batch.x, batch.forgotten
        blank = noise_images(x, batch.key, noise)
        shown = torch.where(forgotten.view(-1, *[1] * (x.ndim - 1)), blank, x)
        wanted = batch.original(shown, return_features=True)[1]
        codes = model(x, return_features=True)[1]
        if aim == "random_code":
            drawn = random.normal(random.fold_in(batch.key, NOISE_SCALE), tuple(codes.shape), codes.dtype)
            wanted = torch.where(forgotten[:, None], drawn, wanted)
        values = (codes - wanted).square().mean(1)
        if aim == "noise_image":
            values = torch.where(forgotten, model(x, against=shown), values)
        if aim == "max_loss":
            values = torch.where(forgotten, -model(x, against=x), values)
        return torch.where(forgotten, hyper.forget_weight, hyper.retain_weight) * values

    weights = within(0, forget_weight=forget_weight, retain_weight=retain_weight)
    masked = Masked(Adam() if optimiser is None else optimiser, mask)
    return train_pairs(
        trained,
        loss,
        task,
        steps,
        seed,
        weights,
        references={"original": trained},
        optimiser=masked,
        **more,
    )


@typed
def inpainting_errors(fleet: Fleet, x: Float[Tensor, "batch *image"]) -> Float[Tensor, "members batch"]:
    """Mean squared error over the hidden pixels, of each member for each image.

    Their means over kept and over forgotten classes are what the method must leave alone and what it must raise.
    """
    return fleet.evaluate(inpainting_loss, {"x": x.to(fleet.parameters.dtype)})


@typed
def noise_outputs(
    fleet: Fleet, x: Float[Tensor, "batch *image"], noise: Noise = "gaussian", seed: int = 0
) -> Float[Tensor, "members batch *image"]:
    """What each member paints for :func:`noise_images` like the batch x: the aim for the images to forget.

    With the original fleet this is D(E₀(n)). The noise depends only on ``seed`` and the member's stream, and is the
    same for an original and what was made of it.
    """

    def outputs(model, batch, hyper):
        return model(noise_images(batch.x, batch.key, noise))

    return fleet.evaluate(outputs, {"x": x.to(fleet.parameters.dtype)}, seed=seed)
