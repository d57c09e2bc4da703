"""Kernel and random-feature ridge regression on a known spectrum: exact risks, what they imply, and simulations.

The task: independent standard normal modes x_i, a target Σ_i v_i x_i plus noise of variance ``noise``, and the kernel
Σ_i λ_i x_i x_i'. Risks are exact where modes, samples and features are many (and already close at tens of each); they
are mean squared errors in units of the target's variance and contain the noise. The ridge is added to the Gram matrix
as it is, not divided by the number of samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import require_positive, require_range, typed
from toolkit.random import fold_in, key, normal

__all__ = [
    "Risk",
    "Spectrum",
    "optimal_ridge",
    "overfitting_ratio",
    "power_law_spectrum",
    "ridge_crossover",
    "ridge_risk",
    "simulate_ridge",
]

_SINGLE = 1000  # modes of an infinite spectrum that are summed one by one
_PANELS, _NODES, _END = 48, 8, 1e16  # of the quadrature over the others, up to mode _END
_HALVINGS = 60  # from a few dozen to rounding
_GOLDEN = (math.sqrt(5) - 1) / 2
_BYTES = 1 << 27  # of random numbers that are simulated at a time


class Spectrum(NamedTuple):
    """Eigenvalues of a kernel and the power of the target in its modes, float64.

    Attributes:
        eigenvalues: ``(modes,)`` λ_i > 0.
        power: ``(modes,)`` v_i² ≥ 0 of one mode.
        counts: ``(modes,)`` how many modes an entry stands for; quadrature weights where the spectrum is infinite.
        eigenvalue_tail: Σ λ over the modes that follow; all of them are too small to be learnt.
        power_tail: Σ v² over the modes that follow.
    """

    eigenvalues: Tensor
    power: Tensor
    counts: Tensor
    eigenvalue_tail: float = 0.0
    power_tail: float = 0.0


class Risk(NamedTuple):
    """Mean squared error on new and on training samples; ``effective`` is the ridge κ that a mode is compared with."""

    test: Tensor
    train: Tensor
    effective: Tensor


@typed
def power_law_spectrum(
    alpha: float | int,
    beta: float | int,
    modes: int | None = None,
    tails: bool = True,
    device: str | torch.device = "cpu",
) -> Spectrum:
    """λ_i = i^-α and v_i² = i^-β, i = 1, 2, ...: both exponents > 1, so that both sums are finite.

    Without ``modes`` the spectrum is infinite: 1,000 modes one by one, the others by Gauss-Legendre quadrature in
    log i. With ``modes`` it has so many single ones, as a simulation needs; ``tails`` adds the sums over all that
    follow, Σ_{i>M} i^-α ≈ (M + ½)^(1-α) / (α - 1). A cut spectrum without tails has other optimal ridges even where
    M is far larger than the number of samples. Raises ``ValueError`` for exponents of at most 1 or no mode.
    Source: Simon et al. 2024, "More is Better in Modern Machine Learning: when Infinite Overparameterization is
    Optimal and Overfitting is Obligatory" (power-law tasks; the quadrature is ours).
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 1 < value < math.inf:
            raise ValueError(f"{name}: expected a finite exponent greater than 1, got {value}")
    if modes is not None and modes < 1:
        raise ValueError(f"modes: expected at least 1, got {modes}")
    single = _SINGLE if modes is None else modes
    index, last = torch.arange(1, single + 1, dtype=torch.float64), single + 0.5
    counts = torch.ones_like(index)
    if modes is None:
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(_NODES))
        edges = torch.linspace(math.log(last), math.log(_END), _PANELS + 1, dtype=torch.float64)
        middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
        rest = (middle[:, None] + half[:, None] * nodes).exp()
        counts = torch.cat([counts, (half[:, None] * weights * rest).flatten()])
        index, last = torch.cat([index, rest.flatten()]), _END
    beyond = [last ** (1 - exponent) / (exponent - 1) if tails else 0.0 for exponent in (alpha, beta)]
    return Spectrum((index**-alpha).to(device), (index**-beta).to(device), counts.to(device), beyond[0], beyond[1])


def _checked(spectrum: Spectrum) -> None:
    require_positive("spectrum.eigenvalues", spectrum.eigenvalues)
    shapes = {name: tuple(getattr(spectrum, name).shape) for name in ("eigenvalues", "power", "counts")}
    if len(set(shapes.values())) > 1 or len(shapes["power"]) != 1:
        raise ValueError(f"spectrum: expected three vectors (modes,), got shapes {shapes}")
    for name in ("eigenvalues", "power", "counts"):
        values = getattr(spectrum, name)
        if values.dtype != torch.float64:
            raise ValueError(f"spectrum.{name}: expected torch.float64, got {values.dtype}")
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"spectrum.{name}: expected finite values of at least 0, got {values.min().item()}")


def _setting(spectrum: Spectrum, least: float = 0.0, **values: float | Tensor) -> list[Tensor]:
    """The settings as float64 tensors of one shape, on the spectrum's device."""
    _checked(spectrum)
    found = [torch.as_tensor(value, dtype=torch.float64).to(spectrum.power) for value in values.values()]
    for name, value in zip(values, found, strict=True):
        positive = name in ("samples", "features")
        good = (value > 0) if positive else (value >= 0) & (value < math.inf)
        if name == "samples":
            good = good & (value < math.inf)
        if not bool(good.all()):
            what = "greater than 0" if positive else "of at least 0"
            raise ValueError(f"{name}: expected finite values {what}, got {value[~good].flatten()[0].item()}")
    return list(torch.broadcast_tensors(*found))


def _bisect(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a falling function goes through 0 (``high`` or ``low`` where it does not), elementwise."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def _learnt(spectrum: Spectrum, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """z = Σ λ/(λ + γ), the degrees of freedom, and the terms of the sum, with a last axis of modes."""
    share = spectrum.eigenvalues / (spectrum.eigenvalues + gamma[..., None])
    return share @ spectrum.counts + spectrum.eigenvalue_tail / gamma, share


def _ridgeless(spectrum: Spectrum, samples: Tensor, features: Tensor) -> Tensor:
    """log γ without a ridge: z = min(n, k), or -inf where there are not so many modes."""
    most = torch.minimum(samples, features)
    total = float(spectrum.eigenvalues @ spectrum.counts) + spectrum.eigenvalue_tail
    high = (total / most).log()  # z <= total / γ
    low = high.new_full(high.shape, math.log(float(spectrum.eigenvalues.min())) - 40.0)
    reached = _learnt(spectrum, low.exp())[0] > most
    found = _bisect(lambda log_gamma: _learnt(spectrum, log_gamma.exp())[0] - most, low, high)
    return torch.where(reached, found, low)


def _risk(spectrum: Spectrum, gamma: Tensor, samples: Tensor, features: Tensor, noise: Tensor) -> Risk:
    """The closed forms as functions of γ; 1/k = 0 for a kernel."""
    inverse = 1 / features
    z, share = _learnt(spectrum, gamma)
    q = share.square() @ spectrum.counts
    kappa = gamma * (1 - z * inverse).clamp_min(0)
    weights = (1 - share) - (kappa / (gamma * (1 - q * inverse)))[..., None] * share * (1 - share)
    bias = weights @ (spectrum.counts * spectrum.power) + spectrum.power_tail
    variance = (q * (1 - 2 * z * inverse) + z.square() * inverse) / (samples * (1 - q * inverse))
    test = (bias + noise) / (1 - variance).clamp_min(0)
    return Risk(test, ((samples - z) / samples).clamp_min(0).square() * test, kappa)


@typed
def ridge_risk(
    spectrum: Spectrum,
    samples: float | int | Float[Tensor, "..."],
    ridge: float | int | Float[Tensor, "..."],
    noise: float | int | Float[Tensor, "..."] = 0.0,
    features: float | int | Float[Tensor, "..."] = math.inf,
) -> Risk:
    """Exact risks of ridge regression with a kernel, or with ``features`` random features of it.

    Kernel: n = Σ L_i + δ/κ with L_i = λ_i/(λ_i + κ); E_test = n (Σ (1 - L_i)² v_i² + σ²) / (n - Σ L_i²).
    k random features: n = z + δ/κ and k = z + kκ/γ with z = Σ λ_i/(λ_i + γ), q = Σ (λ_i/(λ_i + γ))²;
    E_test = [Σ (γ/(λ_i + γ) - κλ_i/(λ_i + γ)² · k/(k - q)) v_i² + σ²] / [1 - (q (k - 2z) + z²)/(n (k - q))].
    In both E_train = (δ/(nκ))² E_test. The implicit equations are solved by bisection in float64.

    Args:
        spectrum: see :func:`power_law_spectrum`.
        samples: n > 0.
        ridge: δ ≥ 0, added to the Gram matrix ZZᵀ of features Z with 1/√k in them; 0 is the limit from above.
        noise: variance σ² ≥ 0 of the targets' noise.
        features: k > 0; infinite for the kernel itself.

    Returns:
        :class:`Risk` of the shape that the settings broadcast to. ``effective`` is κ.

    Raises ``ValueError`` for settings out of range. Source: Simon et al. 2024, "More is Better in Modern Machine
    Learning"; Simon et al. 2023, "The Eigenlearning Framework" (kernel).
    """
    n, delta, sigma, k = _setting(spectrum, samples=samples, ridge=ridge, noise=noise, features=features)
    low = _ridgeless(spectrum, n, k)
    total = float(spectrum.eigenvalues @ spectrum.counts) + spectrum.eigenvalue_tail

    def excess(log_gamma: Tensor) -> Tensor:
        gamma = log_gamma.exp()
        z = _learnt(spectrum, gamma)[0]
        return z + delta / (gamma * (1 - z / k)).clamp_min(1e-300) - n

    # At γ = 4 (total + δ) max(1/n, 1/k) both z and δ/κ are below n/2, so the root lies below.
    high = (4 * (total + delta) * torch.maximum(1 / n, 1 / k)).log()
    gamma = torch.where(delta > 0, _bisect(excess, low, high), low).exp()
    return _risk(spectrum, gamma, n, k, sigma)


@typed
def optimal_ridge(
    spectrum: Spectrum,
    samples: float | int | Float[Tensor, "..."],
    noise: float | int | Float[Tensor, "..."] = 0.0,
    features: float | int | Float[Tensor, "..."] = math.inf,
    points: int = 64,
) -> tuple[Float[Tensor, "..."], Risk]:
    """The ridge δ ≥ 0 of the smallest test risk, and the :class:`Risk` there.

    The risk is explicit in γ (see :func:`ridge_risk`), with δ = κ (n - z): it is compared at ``points`` values of log γ
    from no ridge on, and the best of them refined by golden section. 0 where no ridge is best. Optimally tuned, the
    test risk falls in n and in k. Raises ``ValueError`` for settings out of range or fewer than 3 points.
    Source: Simon et al. 2024, "More is Better in Modern Machine Learning" (the search is ours).
    """
    require_range("points", points, 3, math.inf)
    n, sigma, k = _setting(spectrum, samples=samples, noise=noise, features=features)
    start = _ridgeless(spectrum, n, k)
    total = float(spectrum.eigenvalues @ spectrum.counts) + spectrum.eigenvalue_tail
    stretch = (math.log(total) + 8 - start).clamp_min(1.0)  # at the end less than e^-8 of one mode is learnt

    def risk(place: Tensor) -> Risk:  # cubed: finer near no ridge
        return _risk(spectrum, (start + stretch * place**3).exp(), n, k, sigma)

    places = torch.linspace(0, 1, points, dtype=torch.float64, device=n.device)
    grid = torch.stack([risk(place.expand_as(n)).test for place in places])
    best = torch.where(grid.isnan(), math.inf, grid).argmin(0)
    left, right = places[(best - 1).clamp_min(0)], places[(best + 1).clamp_max(points - 1)]
    for _ in range(60):
        one, two = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        lower = risk(one).test < risk(two).test
        left, right = torch.where(lower, left, one), torch.where(lower, two, right)
    place = (left + right) / 2
    found, bare = risk(place), risk(torch.zeros_like(place))
    none = (bare.test <= found.test) | (place < 1e-6)
    z, _ = _learnt(spectrum, (start + stretch * place**3).exp())
    ridge = torch.where(none, 0.0, found.effective * (n - z).clamp_min(0))
    return ridge, Risk(*(torch.where(none, a, b) for a, b in zip(bare, found, strict=True)))


@typed
def overfitting_ratio(
    alpha: float | int | Float[Tensor, "..."],
    beta: float | int | Float[Tensor, "..."],
    noise_to_bias: float | int | Float[Tensor, "..."] = 0.0,
) -> Float[Tensor, "..."]:
    """E_train / E_test at the optimal ridge of a kernel on a power-law task with many samples, float64.

    With r = √(E_train/E_test), E_test ∝ [(1 - r)^(1-β) + s] / (1 + (α - 1) r), where s = ``noise_to_bias`` is the noise
    variance over the bias sum Σ (1 - L_i)² v_i² without a ridge. Without noise the ratio is
    ((α - β) / ((α - 1) β))² for β < α and otherwise 0: the best fit interpolates. With noise 0 is best exactly for
    s ≤ (β - α)/(α - 1), so that overfitting is obligatory there. Between them the minimum is found by bisection.
    Raises ``ValueError`` unless α > 1, 1 < β < 2α + 1 and s ≥ 0.
    Source: Simon et al. 2024, "More is Better in Modern Machine Learning".
    """
    a, b, s = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (alpha, beta, noise_to_bias)))
    for name, good in (("alpha", a > 1), ("beta", (b > 1) & (b < 2 * a + 1)), ("noise_to_bias", s >= 0)):
        if not bool(good.all()):
            raise ValueError(f"{name}: expected alpha > 1, 1 < beta < 2 alpha + 1 and noise_to_bias >= 0")

    def falling(r: Tensor) -> Tensor:  # minus the derivative of log E, times (1 - r)^β and positive factors
        return (a - 1) * ((1 - r) + s * (1 - r) ** b) - (b - 1) * (1 + (a - 1) * r)

    r = _bisect(falling, torch.zeros_like(a), torch.ones_like(a))
    return torch.where(falling(torch.zeros_like(a)) > 0, r, 0.0).square()


@typed
def ridge_crossover(
    spectrum: Spectrum,
    first: float | int | Float[Tensor, "..."],
    second: float | int | Float[Tensor, "..."],
    low: float | int,
    high: float | int,
    noise: float | int | Float[Tensor, "..."] = 0.0,
) -> Float[Tensor, "..."]:
    """The number of samples at which kernel ridge regression has the same test risk with two ridges.

    Found by bisection in log n between ``low`` and ``high``, as a real number; NaN where the order is the same at both
    ends. Without noise and for β < α a fixed ridge δ wins below and loses against none above n* ∝ δ^(-1/(α-1)).
    Raises ``ValueError`` for settings out of range. Source: the crossover of scaling laws in Wang 2024, "Rethinking
    Conventional Wisdom in Machine Learning: From Generalization to Scaling"; this closed-form case is our reading.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    one, two, sigma = _setting(spectrum, first=first, second=second, noise=noise)
    both = torch.stack([one, two])

    def gap(log_n: Tensor) -> Tensor:
        test = ridge_risk(spectrum, log_n.exp(), both, sigma).test
        return (test[0] / test[1]).log()

    left, right = (torch.full_like(one, math.log(end)) for end in (low, high))
    before, after = gap(left).sign(), gap(right).sign()
    for _ in range(45):
        middle = (left + right) / 2
        same = gap(middle).sign() == before
        left, right = torch.where(same, middle, left), torch.where(same, right, middle)
    return torch.where(before * after < 0, ((left + right) / 2).exp(), math.nan)


@typed
def simulate_ridge(
    spectrum: Spectrum,
    samples: int,
    ridges: Float[Tensor, "ridges"],
    seeds: int,
    noise: float | int = 0.0,
    features: int | None = None,
    seed: int = 0,
) -> tuple[Float[Tensor, "seeds ridges"], Float[Tensor, "seeds ridges"]]:
    """Ridge regression on drawn samples: test and training risks, to hold against :func:`ridge_risk`.

    Each seed draws X (samples, modes), Gaussian, and its noise; with ``features`` also F (features, modes), Gaussian,
    for Z = XAᵀ with A = F√λ/√k. One eigendecomposition of the Gram matrix serves all ridges, which are therefore
    paired. The test risk is exact for the drawn sample, |w - v|² + σ². A kernel's tails act as they do in the limit:
    Σλ as part of the ridge, Σv² as noise. A ridge of 0 means least squares, of smallest norm. Runs on the spectrum's
    device, in float64.

    Raises ``ValueError`` for a spectrum of other than single modes (see ``power_law_spectrum(modes=...)``), tails
    together with random features, or settings out of range. Source: Simon et al. 2024, "More is Better in Modern
    Machine Learning" (experiments with Gaussian features).
    """
    (delta,) = _setting(spectrum, ridges=ridges)
    if not bool((spectrum.counts == 1).all()):
        raise ValueError(
            "spectrum: expected single modes, as power_law_spectrum(modes=...) makes, got counts besides 1"
        )
    for name, count in (("samples", samples), ("seeds", seeds), ("features", 1 if features is None else features)):
        require_range(name, count, 1, math.inf)
    require_range("noise", noise, 0, math.inf)
    if features is not None and spectrum.eigenvalue_tail + spectrum.power_tail > 0:
        raise ValueError("spectrum: expected no tails (tails=False) with random features, whose tails are not noise")
    modes, device = len(spectrum.power), spectrum.power.device
    rows = samples + (features or 0)
    chunk = max(1, _BYTES // (8 * rows * modes))
    root, target = spectrum.eigenvalues.sqrt(), spectrum.power.sqrt()
    keys = fold_in(key(seed, device=device), torch.arange(seeds, device=device))
    tests, trains = [], []
    for part in keys.split(chunk):
        x = normal(fold_in(part, 0), (samples, modes), torch.float64)
        error = normal(fold_in(part, 1), (samples,), torch.float64) * math.sqrt(noise + spectrum.power_tail)
        y = x @ target + error
        if features is None:
            z = x * root
        else:
            maps = normal(fold_in(part, 2), (features, modes), torch.float64) * root / math.sqrt(features)
            z = x @ maps.mT
        values, vectors = torch.linalg.eigh(z @ z.mT)
        added = delta + spectrum.eigenvalue_tail
        small = values <= values[:, -1:] * samples * torch.finfo(torch.float64).eps
        values = torch.where(small, 0.0, values)[:, :, None] + 0 * added  # (seeds, samples, ridges)
        turned = (vectors.mT @ y[:, :, None]).expand_as(values)
        inverse = torch.where(values + added > 0, 1 / (values + added), 0.0)
        dual = vectors @ (turned * inverse)
        weights = z.mT @ dual
        learnt = root[:, None] * weights if features is None else maps.mT @ weights
        tests.append((learnt - target[:, None]).square().sum(1) + noise + spectrum.power_tail)
        trains.append((turned * (1 - values * inverse)).square().mean(1))
    test, train = torch.cat(tests), torch.cat(trains)
    if spectrum.eigenvalue_tail:  # the tail's own fit is part of the fit: what is left is δ times the dual weights
        share = delta / (delta + spectrum.eigenvalue_tail)
        train = train * share.square()
    return test, train
