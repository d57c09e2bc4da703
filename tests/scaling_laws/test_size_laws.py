"""Laws of size and data against limits, units, finite differences, identities and published points."""

import math
from typing import Any

import pytest
import torch
from law_cases import D, N, check_derivatives, check_vmap, doubles
from torch.func import grad

from toolkit import random
from toolkit.scaling_laws.constants import Bivariate, Chinchilla, DataConstrained, KaplanData, PowerLaw
from toolkit.scaling_laws.size_laws import (
    bivariate,
    chinchilla,
    data_constrained,
    effective_size,
    kaplan,
    kaplan_data,
    power_law,
)

POWER = PowerLaw(1.7, 40.0, 0.3)
DATA = KaplanData(6.4e13, 0.076, 1.8e13, 0.103)
CHINCHILLA = Chinchilla(1.8172, 477.8, 2143.0, 0.3473, 0.3672)
CONSTRAINED = DataConstrained(
    math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596, 5.309743, 15.387756
)
BIVARIATE = Bivariate(1.4, 300.0, 0.18, 0.31)

LAWS: dict[str, Any] = {
    "power_law": (lambda law, x: power_law(x, law), POWER, (N,)),
    "kaplan": (lambda law, x: kaplan(x, law[0], law[1]), (8.8e13, 0.076), (N,)),
    "kaplan_data": (lambda law, n, d: kaplan_data(n, d, law), DATA, (N, D)),
    "chinchilla": (lambda law, n, d: chinchilla(n, d, law), CHINCHILLA, (N, D)),
    "data_constrained": (
        lambda law, n, d: data_constrained(n, d, torch.full_like(d, 1e9), law),
        CONSTRAINED,
        (doubles(1e6, 3e7, 1e11), D),
    ),
    "bivariate": (lambda law, n, d: bivariate(n, d, law), BIVARIATE, (N, D)),
}


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_those_of_finite_differences(name):
    check_derivatives(*LAWS[name])


@pytest.mark.parametrize("name", LAWS)
def test_vmap_over_constants_and_single_precision(name):
    check_vmap(*LAWS[name])


def test_limits():
    huge = doubles(1e60)
    assert power_law(huge, POWER).item() == pytest.approx(1.7, abs=1e-14)
    torch.testing.assert_close(kaplan_data(N, huge, DATA), kaplan(N, 6.4e13, 0.076), rtol=1e-4, atol=0)
    torch.testing.assert_close(kaplan_data(huge * 1e60, D, DATA), kaplan(D, 1.8e13, 0.103))
    torch.testing.assert_close(chinchilla(N, huge, CHINCHILLA), 1.8172 + 477.8 / N**0.3473)
    torch.testing.assert_close(chinchilla(huge, D, CHINCHILLA), 1.8172 + 2143.0 / D**0.3672)
    assert bivariate(huge, huge, BIVARIATE).item() == pytest.approx(1.4, abs=1e-14)
    assert kaplan(doubles(8.8e13), 8.8e13, 0.076).item() == 1


def test_published_points():
    """Kaplan's one-variable laws at a billion parameters, Epoch's floor, by hand with logarithms."""
    assert kaplan(doubles(1e9), 8.8e13, 0.076).item() == pytest.approx(math.exp(0.076 * math.log(88000)), rel=1e-14)
    by_hand = 1.8172 + 477.8 * math.exp(-0.3473 * math.log(70e9)) + 2143 * math.exp(-0.3672 * math.log(1.4e12))
    assert chinchilla(doubles(70e9), doubles(1.4e12), CHINCHILLA).item() == pytest.approx(by_hand, rel=1e-14)


def test_units_are_the_callers():
    """Counting in thousands with constants in thousands leaves the loss alone; nats to bits scales floor and scales."""
    k, e = 1e3, CHINCHILLA
    other = e._replace(size_scale=e.size_scale * k**-e.alpha, data_scale=e.data_scale * k**-e.beta)
    torch.testing.assert_close(chinchilla(N / k, D / k, other), chinchilla(N, D, e), rtol=1e-13, atol=0)
    bits = e._replace(
        floor=e.floor / math.log(2), size_scale=e.size_scale / math.log(2), data_scale=e.data_scale / math.log(2)
    )
    torch.testing.assert_close(chinchilla(N, D, bits), chinchilla(N, D, e) / math.log(2), rtol=1e-13, atol=0)
    scaled = DATA._replace(n_c=DATA.n_c / k, d_c=DATA.d_c / k)
    torch.testing.assert_close(kaplan_data(N / k, D / k, scaled), kaplan_data(N, D, DATA), rtol=1e-13, atol=0)
    c = CONSTRAINED
    per_k = c._replace(size_scale=c.size_scale * k**-c.alpha, data_scale=c.data_scale * k**-c.beta)
    unique, big = torch.full_like(D, 1e9), doubles(1e6, 3e7, 1e11)
    torch.testing.assert_close(
        data_constrained(big / k, D / k, unique / k, per_k), data_constrained(big, D, unique, c), rtol=1e-13, atol=0
    )


def test_repeats():
    """New data is Chinchilla's; a first repeat is worth as much, all of them at most r_d times the unique data."""
    small = doubles(1e4, 1e5, 1e6)
    plain = Chinchilla(*CONSTRAINED[:5])
    enough = doubles(1e15)
    torch.testing.assert_close(data_constrained(small, D, enough, CONSTRAINED), chinchilla(small, D, plain))
    unique = doubles(1e8)
    limit = data_constrained(small, unique * 1e6, unique, CONSTRAINED)
    torch.testing.assert_close(limit, chinchilla(small, unique * (1 + 15.387756), plain))
    four = data_constrained(small, unique * 4, unique, CONSTRAINED)
    torch.testing.assert_close(
        four, chinchilla(small, unique * (1 + 15.387756 * (1 - math.exp(-3 / 15.387756))), plain)
    )
    used = CONSTRAINED._replace(r_d=1e12, r_n=1e12)  # nothing decays
    big = doubles(1e12)
    torch.testing.assert_close(data_constrained(big, D, unique, used), chinchilla(big, D, plain), rtol=1e-8, atol=0)

    def of_data(d):
        return data_constrained(doubles(1e5)[0], d, unique[0], CONSTRAINED)

    def of_fresh(d):
        return chinchilla(doubles(1e5)[0], d, plain)

    just = unique[0] * (1 + 1e-9)
    assert grad(of_data)(just).item() == pytest.approx(grad(of_fresh)(just).item(), rel=1e-6)


def test_excess_size():
    """Sizes beyond the compute-optimal one for the unique data are worth at most r_n times as much."""
    plain, unique = Chinchilla(*CONSTRAINED[:5]), doubles(1e8)
    best = (math.exp(6.255414) / math.exp(7.3049974)) ** (1 / 0.3526596) * unique  # α = β
    marginal = [0.3526596 * scale * x**-0.3526596 for scale, x in ((plain[1], best), (plain[2], unique))]
    torch.testing.assert_close(*marginal)  # αA/N^α = βB/D^β there
    below = data_constrained(best / 2, unique, unique, CONSTRAINED)
    torch.testing.assert_close(below, chinchilla(best / 2, unique, plain))
    endless = data_constrained(best * 1e9, unique, unique, CONSTRAINED)
    torch.testing.assert_close(endless, chinchilla(best * (1 + 5.309743), unique, plain))


def test_encoder_and_decoder():
    """Log-excess is additive; scaling one side keeps floor and slope; a law in the sum of both fits worse."""
    encoder, decoder = torch.meshgrid(doubles(1e7, 4e7, 3e8), doubles(2e7, 1e8, 9e8), indexing="ij")
    excess = (bivariate(encoder, decoder, BIVARIATE) - 1.4).log()
    mixed = excess[1:, 1:] - excess[1:, :-1] - excess[:-1, 1:] + excess[:-1, :-1]
    torch.testing.assert_close(mixed, torch.zeros_like(mixed), atol=1e-12, rtol=0)
    alone = power_law(encoder[:, 1], PowerLaw(1.4, 300.0 * 1e8**-0.31, 0.18))
    torch.testing.assert_close(bivariate(encoder, decoder, BIVARIATE)[:, 1], alone)
    ones, noisy = torch.ones(9).double(), excess.flatten() + 0.003 * random.normal(random.key(4), (9,), torch.float64)

    def residual(*columns):
        design = torch.stack([ones, *(c.flatten().log() for c in columns)], 1)
        return (design @ torch.linalg.lstsq(design, noisy[:, None]).solution - noisy[:, None]).square().sum()

    full = residual(encoder, decoder)
    assert (residual(encoder + decoder) - full) / (full / 6) > 13.7  # the 1% point of F(1, 6)


def test_the_effective_size_inverts_the_law():
    size = torch.tensor([1e3, 5e4, 2e6], dtype=torch.float64)
    loss = 1.7 + (300 / size) ** 0.4
    torch.testing.assert_close(effective_size(loss, 1.7, 300.0, 0.4), size, rtol=1e-10, atol=0)
    half = 1.7 + (300 / (size / 2)) ** 0.4
    torch.testing.assert_close(effective_size(half, 1.7, 300.0, 0.4) / size, torch.full_like(size, 0.5))
    size = effective_size(doubles(0.05), 0.0, 2e3, 0.31)  # so close to the truth
    assert kaplan(size, 2e3, 0.31).item() == pytest.approx(0.05, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: power_law(doubles(1.0, 0.0), POWER), "x"),
        (lambda: power_law(doubles(math.nan), POWER), "x"),
        (lambda: power_law(N, POWER._replace(exponent=-0.1)), "exponent"),
        (lambda: power_law(N, POWER._replace(scale=doubles(-1.0))), "scale"),
        (lambda: kaplan(N, -1.0, 0.1), "x_c"),
        (lambda: kaplan_data(N, -D, DATA), "d"),
        (lambda: chinchilla(-N, D, CHINCHILLA), "n"),
        (lambda: chinchilla(N, D, CHINCHILLA._replace(beta=0.0)), "beta"),
        (lambda: data_constrained(N, D, D * 0, CONSTRAINED), "unique"),
        (lambda: bivariate(N, D, BIVARIATE._replace(p_d=-1.0)), "p_d"),
        (lambda: effective_size(doubles(1.0), 1.0, 2.0, 0.5), "loss"),
        (lambda: effective_size(doubles(2.0), 1.0, 0.0, 0.5), "scale"),
        (lambda: effective_size(doubles(2.0), 1.0, 1.0, -0.5), "exponent"),
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
