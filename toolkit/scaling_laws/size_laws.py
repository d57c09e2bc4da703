"""Scaling laws of size and data as pure functions: loss from parameters, tokens, or both.

Units are the caller's and must agree with the constants': parameters for sizes, tokens for data, nats per token for
losses. The constants of a law are a named tuple of numbers or tensors (:mod:`toolkit.scaling_laws.constants`).
Everything broadcasts, differentiates and runs under ``torch.vmap``, over the constants too.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import readable, require_positive, typed
from toolkit.scaling_laws.constants import (
    Bivariate,
    Chinchilla,
    DataConstrained,
    KaplanData,
    Number,
    PowerLaw,
    require_all_positive,
    require_constants,
)

__all__ = [
    "bivariate",
    "chinchilla",
    "data_constrained",
    "effective_size",
    "kaplan",
    "kaplan_data",
    "power_law",
]


@typed
def power_law(x: Float[Tensor, "*#shape"], law: PowerLaw) -> Float[Tensor, "..."]:
    """L(x) = floor + scale · x^-exponent for any resource x > 0 (parameters, tokens, examples, FLOPs).

    Tends to the floor for x → ∞. Raises ``ValueError`` for x, a scale or an exponent that is not positive. Source:
    Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically".
    """
    require_all_positive(x=x)
    require_constants(law)
    return law.floor + law.scale * x**-law.exponent


@typed
def kaplan(x: Float[Tensor, "*#shape"], x_c: Number, exponent: Number) -> Float[Tensor, "..."]:
    """L(x) = (x_c / x)^exponent: the loss when x alone is scarce; x_c is the x at which the loss would be 1.

    Published for non-embedding parameters N (8.8e13, 0.076), tokens D (5.4e13, 0.095) and least compute C (3.1e8
    PF-days, 0.050). Raises ``ValueError`` for what is not positive. Source: Kaplan et al. 2020, "Scaling Laws for
    Neural Language Models".
    """
    require_all_positive(x=x, x_c=x_c, exponent=exponent)
    return (x_c / x) ** exponent


@typed
def kaplan_data(n: Float[Tensor, "*#shape"], d: Float[Tensor, "*#shape"], law: KaplanData) -> Float[Tensor, "..."]:
    """L(N, D) = [(N_c/N)^(a_N/a_D) + D_c/D]^a_D: :func:`kaplan` in N for D → ∞, and in D for N → ∞.

    Overfitting depends on N^(a_N/a_D)/D alone. Raises ``ValueError`` for what is not positive. Source: Kaplan et al.
    2020, "Scaling Laws for Neural Language Models".
    """
    require_all_positive(n=n, d=d)
    require_constants(law)
    return ((law.n_c / n) ** (law.a_n / law.a_d) + law.d_c / d) ** law.a_d


@typed
def chinchilla(n: Float[Tensor, "*#shape"], d: Float[Tensor, "*#shape"], law: Chinchilla) -> Float[Tensor, "..."]:
    """L(N, D) = E + A/N^α + B/D^β for N parameters and D tokens, each seen once.

    Raises ``ValueError`` for what is not positive. Source: Hoffmann et al. 2022, "Training Compute-Optimal Large
    Language Models".
    """
    require_all_positive(n=n, d=d)
    require_constants(law)
    return law.floor + law.size_scale * n**-law.alpha + law.data_scale * d**-law.beta


def _worth(total: Tensor, unique: Tensor, star: Number) -> Tensor:
    """U + U R* (1 - e^(-R/R*)) with R = total/U - 1."""
    return unique - unique * star * torch.expm1(-(total / unique - 1) / star)


@typed
def data_constrained(
    n: Float[Tensor, "*#shape"], d: Float[Tensor, "*#shape"], unique: Float[Tensor, "*#shape"], law: DataConstrained
) -> Float[Tensor, "..."]:
    """:func:`chinchilla` at the effective N' and D' when D tokens are drawn from ``unique`` different ones.

    U_D = min(unique, D), R_D = D/U_D - 1, D' = U_D + U_D r_d (1 - e^(-R_D/r_d)); U_N = min(N_opt(U_D), N) where
    N_opt(D) = (αA/βB)^(1/α) D^(β/α) is the compute-optimal size for D tokens, and N' likewise with r_n. A first repeat
    is worth as much as new data, all of them together r_d times ``unique``. The published r_d = 15.4 and r_n = 5.3 are
    weakly identified. Raises ``ValueError`` for what is not positive. Source: Muennighoff et al. 2023, "Scaling
    Data-Constrained Language Models".
    """
    require_all_positive(n=n, d=d, unique=unique)
    require_constants(law)
    fresh = torch.minimum(unique, d)
    best = (law.alpha * law.size_scale / (law.beta * law.data_scale)) ** (1 / law.alpha) * fresh ** (
        law.beta / law.alpha
    )
    size = _worth(n, torch.minimum(best, n), law.r_n)
    data = _worth(d, fresh, law.r_d)
    return law.floor + law.size_scale * size**-law.alpha + law.data_scale * data**-law.beta


@typed
def bivariate(
    encoder: Float[Tensor, "*#shape"], decoder: Float[Tensor, "*#shape"], law: Bivariate
) -> Float[Tensor, "..."]:
    """L = floor + scale · N_e^-p_e · N_d^-p_d, for the parameters of an encoder and of a decoder.

    Reference sizes are folded into ``scale``. Raises ``ValueError`` for what is not positive. Source: Ghorbani et al.
    2021, "Scaling Laws for Neural Machine Translation" (the form is a reading of the paper).
    """
    require_all_positive(encoder=encoder, decoder=decoder)
    require_constants(law)
    return law.floor + law.scale * encoder**-law.p_e * decoder**-law.p_d


@typed
def effective_size(
    loss: Float[Tensor, "*shape"], floor: float, scale: float, exponent: float
) -> Float[Tensor, "*shape"]:
    """N = c (L - E)^(-1/a), the inverse of L = E + (c / N)^a: the parameters of which a loss is worthy.

    Of models trained on repeated data, N over their true size is how much of them repetition leaves (Hernandez et al.
    2022, "Scaling Laws and Interpretability of Learning from Repeated Data"; the law without floor is theirs, E is
    added as small byte models need it). Of a reducible loss (``floor`` = 0) it is the size that comes so close to the
    truth (Henighan et al. 2020, "Scaling Laws for Autoregressive Generative Modeling"). ``floor`` E and the losses in
    nats, ``scale`` c in parameters. Raises ``ValueError`` for a loss that is not above the floor, or a scale or
    exponent that is not positive.
    """
    require_positive("scale", scale)
    require_positive("exponent", exponent)
    if readable(loss) and not bool((loss > floor).all()):
        raise ValueError(f"loss: expected values above the floor {floor}, got {loss.min().item()}")
    return scale * (loss - floor) ** (-1 / exponent)
