"""Dropout without sampling: a probabilistic circuit that carries the mean *and variance* that dropout gives each node.

A circuit is sums (mixtures) over products of independent parts, so a class's likelihood is exact, and so are missing
inputs. Tractable dropout inference (TDI) sends two numbers per node upwards, under a Bernoulli mask on every edge of
the sums, and gets in one pass what Monte-Carlo dropout estimates from many.

The numbers are the logarithm of the expectation E and the *relative* variance Var / E². In these terms both rules only
add and multiply what is not negative: nothing cancels and nothing underflows, however small the likelihoods are.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toolkit import random
from toolkit.checks import require_range, typed

__all__ = [
    "Circuit",
    "CircuitMoments",
    "class_posterior_moments",
    "product_moments",
    "sum_moments",
]


class CircuitMoments(NamedTuple):
    """Class likelihoods under dropout: log E[A_c] (nats), and Cov(A_c, A_d) / (E[A_c] E[A_d])."""

    log_mean: Float[Tensor, "batch classes"]
    covariance: Float[Tensor, "batch classes classes"]


class PosteriorMoments(NamedTuple):
    """Mean and variance of the class posterior under dropout."""

    mean: Float[Tensor, "batch classes"]
    variance: Float[Tensor, "batch classes"]


def _require_rate(rate: float | Tensor) -> None:
    require_range("rate", rate, 0, math.nextafter(1, 0))


def _mixture(log_values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ_j w_j v_j, the values with their largest scaled to 1, and their sum. Values may be 0, all of them too."""
    top = log_values.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top)).detach()
    values = (log_values - top).exp()
    total = torch.einsum("...nc,nsc->...ns", values, weights)
    return total.log() + top, values, total


@typed
def sum_moments(
    log_mean: Float[Tensor, "*batch nodes children"],
    ratio: Float[Tensor, "*batch nodes children"],
    weights: Float[Tensor, "nodes sums children"],
    rate: float | Float[Tensor, ""] = 0.0,
    correction: bool = True,
) -> tuple[Float[Tensor, "*batch nodes sums"], Float[Tensor, "*batch nodes sums"]]:
    """log E and Var / E² of sum nodes whose edges are each kept with probability q = 1 - ``rate``.

    For S = Σ_j m_j w_j C_j with m_j ~ Bernoulli(q) and uncorrelated children (p = ``rate``; V_j, E_j the children's):
    E = q Σ w_j E_j and Var = q Σ w_j² (V_j + p E_j²). That is with the ``correction`` of the expectation; without it
    kept edges are divided by q, E = Σ w_j E_j and Var = (1 / q) Σ w_j² (V_j + p E_j²). The two differ by the factor q
    on the node's value, so Var / E² = Σ u_j² (r_j + p) / q with u_j = w_j E_j / Σ w E is the same, and a factor that
    all classes share drops out of their posterior.

    ``log_mean`` (nats) and ``ratio`` r = V / E² of the children, ``weights`` linear. Raises ``ValueError`` for a rate
    outside [0, 1). Source: Ventola, Braun, Yu, Mundt & Kersting 2023, "Probabilistic Circuits That Know What They Don't
    Know" (rules as in its public code, here in relative terms).
    """
    _require_rate(rate)
    log_total, values, total = _mixture(log_mean, weights)
    keep = 1 - rate
    spread = torch.einsum("...nc,nsc->...ns", values.square() * (ratio + rate), weights.square())
    return log_total + _log_keep(rate, correction), spread / total.square() / keep


def _log_keep(rate: float | Tensor, correction: bool) -> float | Tensor:
    if not correction:
        return 0.0
    return (1 - rate).log() if isinstance(rate, Tensor) else math.log1p(-rate)


@typed
def product_moments(
    log_mean: Float[Tensor, "*batch nodes 2 children"], ratio: Float[Tensor, "*batch nodes 2 children"]
) -> tuple[Float[Tensor, "*batch nodes products"], Float[Tensor, "*batch nodes products"]]:
    """log E and Var / E² of all products of one left and one right child, which are independent.

    E = E_1 E_2 and Var = (V_1 + E_1²)(V_2 + E_2²) - E_1² E_2², in relative terms r_1 + r_2 + r_1 r_2. Product i · k + j
    is left child i times right child j, k the number of children of a side. Source: Ventola et al. 2023, "Probabilistic
    Circuits That Know What They Don't Know".
    """
    r_left, r_right = ratio[..., 0, :, None], ratio[..., 1, None, :]
    spread = r_left + r_right + r_left * r_right
    return _cross(log_mean), spread.flatten(-2)


def _cross(log_values: Tensor) -> Tensor:
    return (log_values[..., 0, :, None] + log_values[..., 1, None, :]).flatten(-2)


def _product_covariances(log_mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`product_moments` with the relative covariances ``(..., nodes, 2, children, children)`` of each side."""
    left, right = covariance[..., 0, :, None, :, None], covariance[..., 1, None, :, None, :]
    return _cross(log_mean), (left + right + left * right).flatten(-2).flatten(-3, -2)


def _sum_covariances(
    log_mean: Tensor, covariance: Tensor, weights: Tensor, rate: float | Tensor, correction: bool
) -> tuple[Tensor, Tensor]:
    """:func:`sum_moments` with relative covariances K: u K u' between sums, whose masks are independent, and on the
    diagonal (p / q) Σ u_j² (1 + K_jj) more."""
    _require_rate(rate)
    log_total, values, total = _mixture(log_mean, weights)
    shares = values[..., None, :] * weights / total[..., None]
    own = 1 + covariance.diagonal(dim1=-2, dim2=-1)
    masks = (shares.square() * own[..., None, :]).sum(-1) * (rate / (1 - rate))
    return log_total + _log_keep(rate, correction), shares @ covariance @ shares.mT + masks.diag_embed()


@typed
def class_posterior_moments(
    moments: CircuitMoments, heads: Literal["independent", "shared"] = "independent"
) -> PosteriorMoments:
    """Second-order mean and first-order variance of the posterior A_c / B, B = Σ_c A_c, under equal class priors.

    With a = E[A_c], b = E[B]: mean a/b - Cov(A_c, B)/b² + a Var(B)/b³ (these sum to 1 over the classes) and variance
    (a/b)² (Var(A_c)/a² - 2 Cov(A_c, B)/(a b) + Var(B)/b²). ``independent`` heads, as in the paper, have
    Cov(A_c, B) = Var(A_c) and Var(B) = Σ Var(A_c); ``shared`` keeps the covariance that the classes' root sums have
    through their common children (our addition). Both are exact where B is constant; a mean can leave [0, 1] where the
    relative variances are large. The published code, as we read it, divides the third variance term by Σ E[A_c]²
    instead of b² = (Σ E[A_c])²; here it is b². Source: Ventola et al. 2023, "Probabilistic Circuits That Know What They
    Don't Know".
    """
    share = moments.log_mean.softmax(-1)
    own = moments.covariance.diagonal(dim1=-2, dim2=-1)
    covariance = own.diag_embed() if heads == "independent" else moments.covariance
    with_total = (covariance @ share[..., None]).squeeze(-1)  # Cov(A_c, B) / (a b)
    total = (share * with_total).sum(-1, keepdim=True)
    variance = share.square() * (own - 2 * with_total + total)
    return PosteriorMoments(share * (1 - with_total + total), variance.clamp_min(0))


class Circuit(nn.Module):
    """A random sum-product network over ``inputs`` numbers, with one root sum per class.

    Each of ``repetitions`` shuffles the inputs and halves them ``depth`` times. Each part at the bottom has ``leaves``
    Gaussians (independent inputs, standard deviations in [``narrowest``, 1]); where two parts meet, all products of a
    left and a right node feed ``sums`` mixtures, and at the top the roots mix the products of all repetitions. The
    structure depends on ``structure`` alone, so all members of a fleet share it. NaN inputs are summed out exactly.

    ``model(x)`` gives log-likelihoods log p(x | class) ``(batch, classes)`` in nats, whose softmax is the posterior
    under equal priors. ``model(x, rate=p)`` gives the :class:`CircuitMoments` under dropout of the inner sums' edges
    (leaves and roots have none; that the root sum which the paper spares means each class's head is our reading), and
    ``model(x, rate=p, key=key)`` the log-likelihoods under one drawn set of masks, the same for the whole batch.
    ``correction`` as in :func:`sum_moments`. The means are exact. The variances neglect that nodes of one part share
    children: they are exact with one sum per part, and too small otherwise. ``full=True`` carries the covariances along
    (our addition), at a cost that grows with ``sums``⁴: then the likelihoods' covariance is exact.

    Source: Peharz et al. 2020, "Random Sum-Product Networks: A Simple and Effective Approach to Probabilistic Deep
    Learning"; Ventola et al. 2023, "Probabilistic Circuits That Know What They Don't Know" (dropout).
    Raises ``ValueError`` for sizes below 1, ``inputs`` that are no multiple of 2^``depth``, and a rate outside [0, 1).
    """

    order: Tensor

    def __init__(
        self,
        inputs: int = 64,
        classes: int = 10,
        depth: int = 3,
        sums: int = 5,
        leaves: int = 5,
        repetitions: int = 5,
        narrowest: float = 0.1,
        structure: int = 0,
    ):
        super().__init__()
        sizes = {"inputs": inputs, "classes": classes, "depth": depth, "repetitions": repetitions}
        for name, value in (sizes | {"sums": sums, "leaves": leaves}).items():
            if value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
        if inputs % 2**depth:
            raise ValueError(f"inputs: expected a multiple of 2^depth = {2**depth}, got {inputs}")
        if not 0 < narrowest < 1:
            raise ValueError(f"narrowest: expected a standard deviation in (0, 1), got {narrowest}")
        self.inputs, self.repetitions, self.narrowest = inputs, repetitions, narrowest
        keys = random.fold_in(random.key(structure), torch.arange(repetitions))
        parts = repetitions * 2**depth
        self.register_buffer("order", random.permutation(keys, inputs).reshape(parts, -1))
        self.means = nn.Parameter(torch.rand(parts, leaves, inputs // 2**depth))
        self.widths = nn.Parameter(0.1 * torch.randn(parts, leaves, inputs // 2**depth))
        nodes = [leaves] + [sums] * (depth - 1)
        self.mixing = nn.ParameterList(
            nn.Parameter(0.5 * torch.randn(parts >> (level + 1), sums, nodes[level] ** 2)) for level in range(depth - 1)
        )
        self.roots = nn.Parameter(0.5 * torch.randn(classes, repetitions * nodes[-1] ** 2))

    def _leaf_logs(self, x: Tensor) -> Tensor:
        """Log-densities of the leaves, ``(batch, parts, leaves)``: sums of a x² + b x + c over the observed inputs."""
        x = x.flatten(1)
        if x.shape[1] != self.inputs:
            raise ValueError(f"x: expected {self.inputs} values per example, got {x.shape[1]}")
        x = x[:, self.order]
        seen = ~x.isnan()
        x = torch.where(seen, x, torch.zeros((), dtype=x.dtype, device=x.device))
        deviation = self.narrowest + (1 - self.narrowest) * torch.sigmoid(self.widths - 1)
        precision = deviation.square().reciprocal()
        terms = torch.cat([x.square(), x, seen.to(x.dtype)], -1)
        constant = -0.5 * self.means.square() * precision - deviation.log() - 0.5 * math.log(2 * math.pi)
        return torch.einsum("bnd,nid->bni", terms, torch.cat([-0.5 * precision, self.means * precision, constant], -1))

    def forward(
        self,
        x: Tensor,
        rate: float | Tensor | None = None,
        key: Tensor | None = None,
        correction: bool = True,
        full: bool = False,
    ) -> Any:
        value = self._leaf_logs(x)
        if rate is not None:
            _require_rate(rate)
            if key is None:
                return self._moments(value, rate, correction, full)
        for level, weights in enumerate(self.mixing):
            weights = weights.softmax(-1)
            if key is not None and rate is not None:
                mask = random.uniform(random.fold_in(key, level), tuple(weights.shape), weights.dtype) >= rate
                weights = weights * mask / (1.0 if correction else 1 - rate)
            value = _mixture(_cross(_paired(value)), weights)[0]
        return _mixture(_cross(_paired(value)).flatten(1)[:, None], self.roots.softmax(-1)[None])[0][:, 0]

    def _moments(self, value: Tensor, rate: float | Tensor, correction: bool, full: bool) -> CircuitMoments:
        spread = value.new_zeros(*value.shape, value.shape[-1]) if full else torch.zeros_like(value)
        rule, product = (_sum_covariances, _product_covariances) if full else (sum_moments, product_moments)
        for weights in self.mixing:
            value, spread = product(_paired(value), _paired(spread))
            value, spread = rule(value, spread, weights.softmax(-1), rate, correction)
        value, spread = product(_paired(value), _paired(spread))
        roots = self.roots.softmax(-1)[None]
        log_mean, scaled, total = _mixture(value.flatten(1)[:, None], roots)
        shares = scaled * roots / total.mT  # (batch, classes, products)
        if full:
            shares = shares.unflatten(2, (self.repetitions, -1)).transpose(1, 2)  # repetitions are independent
            return CircuitMoments(log_mean[:, 0], (shares @ spread @ shares.mT).sum(1))
        return CircuitMoments(log_mean[:, 0], (shares * spread.flatten(1)[:, None]) @ shares.mT)


def _paired(values: Tensor) -> Tensor:
    """Neighbouring parts of one repetition side by side: ``(batch, parts / 2, 2, nodes)``."""
    return values.unflatten(1, (-1, 2))
