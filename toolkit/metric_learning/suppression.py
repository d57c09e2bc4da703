"""Which features a contrastive loss learns: class collapse and feature suppression, where they can be computed.

A linear map f(x) = W x under the spectral contrastive loss depends on G = Wᵀ W alone, and its minimum is known: so one
can say in advance which feature is kept, which is lost, and when each is learned. The toy data have a class sign, a
subclass sign that is independent of it, a sign that means nothing (a distractor), and noise.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.metric_learning.common import Scalar, masked_mean, pair_masks, require_finite, shared
from toolkit.metric_learning.similarities import Measure
from toolkit.random import fold_in, normal, uniform

__all__ = ["ToyViews", "feature_growth", "spectral_contrastive", "spectral_solution", "toy_moments", "toy_views"]


class ToyViews(NamedTuple):
    """Two views of each image, and its hidden signs as 0 or 1."""

    first: Float[Tensor, "images dim"]
    second: Float[Tensor, "images dim"]
    classes: Int[Tensor, "images"]
    subclasses: Int[Tensor, "images"]
    distractors: Int[Tensor, "images"]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.mT


_inner_product = Measure(_dot, far_is_large=False)


@typed
def spectral_contrastive(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    push_positives: bool = True,
    similarity: Measure = _inner_product,
) -> Float[Tensor, "batch"]:
    """-2 E f(x)·f(x⁺) + E (f(x)·f(x⁻))², inner products of embeddings as they are (not scaled to length 1).

    x⁺ is another item with the anchor's label: its class (supervised), or its image, of which the batch holds two views
    (unsupervised). x⁻ is an item drawn independently of x: with class labels all others, those of the class too; with
    image labels all but the image's own views, so set ``push_positives`` to False. Both means then have the
    expectation of the loss over the population. Pulls are averaged over the anchors that have a positive.
    A pull weighs -2 / (positives), a push 2 s / (others). Source: HaoChen et al. 2021, "Provable Guarantees for
    Self-Supervised Deep Learning with Spectral Contrastive Loss". Raises ``ValueError`` for embeddings that
    are not finite.
    """
    require_finite("embeddings", embeddings)
    table = similarity(embeddings)
    positive, negative = pair_masks(labels)
    pull = shared(masked_mean(table, positive), positive.any(-1).sum())
    independent = positive | negative if push_positives else negative
    push = shared(masked_mean(table**2, independent), independent.any(-1).sum())
    return push - 2 * pull


@typed
def spectral_solution(
    second_moment: Float[Tensor, "dim dim"],
    positive_moment: Float[Tensor, "dim dim"],
    dimension: Scalar | Int[Tensor, ""],
) -> Float[Tensor, "dim dim"]:
    """The G = Wᵀ W of least trace among the minimisers of -2 tr(G M⁺) + tr(G M G M), W with ``dimension`` rows.

    That is the spectral contrastive loss of f(x) = W x with M = E x xᵀ (``second_moment``) and M⁺ = E x x⁺ᵀ
    (``positive_moment``). With M^-½ the root of the pseudo-inverse and B = M^-½ M⁺ M^-½, G = M^-½ B_p M^-½, where B_p
    keeps the p = ``dimension`` largest of the positive eigenvalues λ; the loss is -Σ λ² over those kept. Of equal
    eigenvalues, those that cost least |W|² = tr G are kept: features of large amplitude. Directions without variance
    get 0: other minimisers differ there, for they cost nothing. Eigenvalues count as equal within the root of the
    type's precision. Float64 inside; ``dimension`` may differ between the members of a fleet. No gradient.

    Raises ``ValueError`` for moments that are not finite or not symmetric, and ``dimension`` < 1. Derived for the
    linear model of Xue et al. 2023, "Which Features are Learnt by Contrastive Learning? On the Role of Simplicity Bias
    in Class Collapse and Feature Suppression".
    """
    for name, moment in (("second_moment", second_moment), ("positive_moment", positive_moment)):
        require_finite(name, moment)
        if readable(moment):
            skew = (moment - moment.mT).abs().max().item()
            if skew > 1e-4 * moment.abs().max().item():
                raise ValueError(f"{name}: expected a symmetric matrix, got entries that differ by {skew:.3g}")
    require_range("dimension", dimension, 1, math.inf)
    size, tolerance = len(second_moment), torch.finfo(second_moment.dtype).eps
    moment, positive = second_moment.detach().double(), positive_moment.detach().double()
    values, directions = torch.linalg.eigh(moment)
    kept = values > 10 * size * tolerance * values.amax()
    scales = torch.where(kept, torch.where(kept, values, 1).rsqrt(), 0)
    root = (directions * scales) @ directions.mT
    table = root @ ((positive + positive.mT) / 2) @ root
    gains, axes = torch.linalg.eigh(table)
    gains, axes = gains.flip(-1), axes.flip(-1)
    rank = torch.arange(size, device=gains.device)
    last = torch.where(rank < dimension, gains, torch.inf).amin()  # the smallest gain that there is room for
    near = tolerance**0.5 * gains.abs().amax()
    above = gains > last + near
    tied = (gains - last).abs() <= near
    room = torch.clamp_max(dimension - above.sum(), size)
    # Among the tied directions: take those on which M⁻¹, the price per unit of gain, is smallest.
    plane = axes * tied
    plane = plane @ plane.mT
    price = root @ root
    worth = plane @ (2 * price.diagonal().sum() * torch.eye(size, dtype=price.dtype, device=price.device) - price)
    order = torch.linalg.eigh(worth @ plane)[1].flip(-1) * (rank < torch.minimum(room, tied.sum()))
    chosen = (axes * (above * gains.clamp_min(0))) @ axes.mT + last.clamp_min(0) * (order @ order.mT)
    return (root @ chosen @ root).to(second_moment.dtype)


@typed
def toy_views(
    key: Int[Tensor, ""],
    images: int,
    scales: Float[Tensor, "3"],
    noise: Scalar = 1.0,
    keep: Float[Tensor, "2"] | None = None,
    noise_dimensions: int = 1,
) -> ToyViews:
    """Images x = (a₁ y, a₂ s, a₃ ξ, noise): independent fair signs for class, subclass and distractor, Gaussian noise.

    ``scales`` are the amplitudes a; each of the ``noise_dimensions`` has standard deviation ``noise``. The second view
    has new noise, keeps y, and keeps s and ξ with the probabilities ``keep`` (default 1), else draws them anew: an
    augmentation. A function of ``key`` alone. Raises ``ValueError`` for fewer than one image or noise dimension, and
    ``keep`` outside [0, 1]. Setting: Xue et al. 2023, "Which Features are Learnt by Contrastive Learning?".
    """
    require_positive("images", images)
    require_positive("noise_dimensions", noise_dimensions)
    keep = _kept(scales, keep)

    def signs(number: int) -> Tensor:
        return torch.where(uniform(fold_in(key, number), (images, 3)) < 0.5, -1.0, 1.0).to(scales.dtype)

    first = signs(0)
    stays = torch.cat([keep.new_ones(1), keep])
    redrawn = uniform(fold_in(key, 1), (images, 3)).to(scales.dtype) >= stays
    second = torch.where(redrawn, signs(2), first)
    views = [
        torch.cat([scales * part, noise * normal(fold_in(key, 3 + view), (images, noise_dimensions), scales.dtype)], 1)
        for view, part in enumerate((first, second))
    ]
    hidden = (first > 0).long()
    return ToyViews(views[0], views[1], hidden[:, 0], hidden[:, 1], hidden[:, 2])


@typed
def toy_moments(
    scales: Float[Tensor, "3"],
    noise: Scalar = 1.0,
    supervision: Scalar = 0.0,
    keep: Float[Tensor, "2"] | None = None,
    noise_dimensions: int = 1,
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim dim"]]:
    """M = E x xᵀ and M⁺ = E x x⁺ᵀ of :func:`toy_views`, for :func:`spectral_solution`.

    ``supervision`` β in [0, 1] mixes the losses, β · supervised + (1 - β) · unsupervised: M⁺ is
    diag(a₁², (1-β) k₂ a₂², (1-β) k₃ a₃², 0) with k = ``keep``, as items of one class share only y. So supervised
    training gives subclasses weight 0 (class collapse), unsupervised training in few dimensions drops the smaller
    amplitudes (feature suppression), and 0 < β < 1 ranks the class first and keeps the rest while there is room.
    Raises ``ValueError`` for β or ``keep`` outside [0, 1] and fewer than one noise dimension. Derived for Xue et al.
    2023, "Which Features are Learnt by Contrastive Learning?".
    """
    require_range("supervision", supervision, 0, 1)
    require_positive("noise_dimensions", noise_dimensions)
    keep = _kept(scales, keep)
    squares = scales**2
    noises = torch.zeros_like(scales[:1]).expand(noise_dimensions)
    shares = torch.cat([torch.ones_like(scales[:1]), (1 - supervision) * keep])
    return torch.diag(torch.cat([squares, noises + noise**2])), torch.diag(torch.cat([squares * shares, noises]))


@typed
def feature_growth(
    time: Float[Tensor, "*#shape"],
    initial: Scalar | Float[Tensor, "*#shape"],
    scale: Scalar | Float[Tensor, "*#shape"],
    overlap: Scalar | Float[Tensor, "*#shape"] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Weight g = w² of one feature under gradient flow on the spectral contrastive loss: easy features come first.

    For diagonal moments M = a² (a = ``scale``) and M⁺ = b a² (b = ``overlap``: 1 if positives share the feature, 0 if
    not) the flow dW/dt = 4 W (M⁺ - M G M) is dg/dt = 8 g a² (b - a² g): a logistic curve from ``initial`` g(0) ≥ 0 with
    rate 8 a² b and plateau b / a²; for b = 0, the decay g(0) / (1 + 8 a⁴ g(0) t). Arguments broadcast. ``time`` is the
    steps of plain gradient descent times its learning rate. Derived for the linear model of Xue et al. 2023, "Which
    Features are Learnt by Contrastive Learning?". Raises ``ValueError`` for a negative ``initial`` or ``time``.
    """
    for name, value in (("initial", initial), ("time", time)):
        if not isinstance(value, Tensor) or readable(value):
            require_range(name, torch.as_tensor(value).min(), 0, math.inf)
    square = torch.as_tensor(scale, dtype=time.dtype, device=time.device) ** 2
    top = 0.9 * math.log(torch.finfo(time.dtype).max)
    exponent = (8 * square * overlap * time).clamp_min(-top / 2)
    small = exponent.abs() < torch.finfo(time.dtype).eps ** 0.5
    safe = torch.where(small, 1, exponent)
    average = torch.where(small, 1 - exponent / 2, -torch.expm1(-safe) / safe)  # mean of exp(-u) for u in 0 .. exponent
    return initial / ((-exponent.clamp_max(top)).exp() + 8 * square**2 * initial * time * average)


def _kept(scales: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.ones_like(scales[:2])
    if readable(keep):
        require_range("keep", keep.min(), 0, 1)
        require_range("keep", keep.max(), 0, 1)
    return keep
