"""Crossings and envelopes against closed forms, dense grids, a convex hull point by point and planted exponents."""

import math
from typing import Any

import pytest
import torch
from torch.func import vmap

from toolkit.scaling_laws.constants import Chinchilla, PowerLaw
from toolkit.scaling_laws.envelopes import crossover, lower_envelope
from toolkit.scaling_laws.frontiers import compute_optimal
from toolkit.scaling_laws.size_laws import chinchilla, power_law


def test_crossing_with_a_shared_floor():
    first, second = PowerLaw(1.5, 30.0, 0.4), PowerLaw(1.5, 8.0, 0.25)
    meeting = crossover(first, second, 1.0, 1e9)
    at = (30 / 8) ** (1 / 0.15)
    assert meeting.at[0].item() == pytest.approx(at, rel=1e-13)
    assert meeting.at[1].isnan()
    assert meeting.loss[0].item() == pytest.approx(1.5 + 30 * at**-0.4, rel=1e-13)
    assert crossover(first, second, 1.0, at * 0.99).at.isnan().all()
    assert crossover(first, second, at * 1.01, 1e9).at.isnan().all()
    near = crossover(first, PowerLaw(1.5 - 1e-13, 8.0, 0.25), 1.0, 1e9)  # by the root: the same
    assert near.at[0].item() == pytest.approx(at, rel=1e-9)


def test_crossings_with_two_floors():
    """One, two and no crossing, against the losses there and sign changes on a dense grid."""
    x = torch.logspace(0, 9, 200001, dtype=torch.float64)
    cases = {
        (PowerLaw(1.5, 30.0, 0.4), PowerLaw(1.7, 8.0, 0.25)): 1,
        (PowerLaw(1.8, 30.0, 0.5), PowerLaw(1.7, 8.0, 0.25)): 2,
        (PowerLaw(2.9, 30.0, 0.5), PowerLaw(1.7, 8.0, 0.25)): 0,
        (PowerLaw(1.8, 8.0, 0.25), PowerLaw(1.7, 9.0, 0.25)): 1,
        (PowerLaw(1.8, 8.0, 0.25), PowerLaw(1.7, 8.0, 0.25)): 0,
        (PowerLaw(1.8, 8.0, 0.25), PowerLaw(1.8, 8.0, 0.25)): 0,
    }
    for (first, second), count in cases.items():
        for one, other in ((first, second), (second, first)):
            found = crossover(one, other, 1.0, 1e9)
            signs = power_law(x, one) > power_law(x, other)
            grid = x[1:][signs[1:] != signs[:-1]]
            assert len(grid) == count
            assert int((~found.at.isnan()).sum()) == count
            torch.testing.assert_close(found.at[:count], grid, rtol=2e-4, atol=0)
            torch.testing.assert_close(power_law(found.at[:count], one), power_law(found.at[:count], other))
            torch.testing.assert_close(power_law(found.at[:count], one), found.loss[:count])


def test_a_single_crossing_comes_first():
    first, second = PowerLaw(1.8, 30.0, 0.5), PowerLaw(1.7, 8.0, 0.25)
    both = crossover(first, second, 1.0, 1e9).at
    assert both[0] < both[1]
    for turn in (both.prod().sqrt().item(), both[0].item() * 1.001):
        later = crossover(first, second, turn, 1e9).at
        assert later[0].item() == pytest.approx(both[1].item())
        assert later[1].isnan()


def test_crossings_of_many_resamples():
    scale = torch.linspace(5, 40, 50, dtype=torch.float64)
    first, second = PowerLaw(1.5, scale, 0.4), PowerLaw(1.5, 8.0, 0.25)
    found = crossover(first, second, 1.0, 1e4).at[:, 0]
    closed = (scale / 8) ** (1 / 0.15)
    inside = (closed >= 1) & (closed <= 1e4)
    assert torch.equal(inside, ~found.isnan())
    assert 0 < inside.sum() < 50
    torch.testing.assert_close(found[inside], closed[inside])
    one = vmap(lambda s: crossover(PowerLaw(1.5, s, 0.4), second, 1.0, 1e4).at)(scale)
    torch.testing.assert_close(one[:, 0], found, equal_nan=True)


# Envelopes


def curves(floor=1.7, alpha=0.34, beta=0.28, sizes=13, points=160):
    """One-pass runs of many sizes: L(N, D) along D, compute 6ND."""
    n = torch.logspace(6, 10, sizes, dtype=torch.float64)
    d = torch.logspace(3, 13, points, dtype=torch.float64).expand(sizes, points)
    return n, 6 * n[:, None] * d, chinchilla(n[:, None].expand_as(d), d, Chinchilla(floor, 406.4, 410.7, alpha, beta))


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.3, 0.5)])
@pytest.mark.parametrize("floor", [0.0, 1.7])
def test_envelope_exponents(alpha, beta, floor):
    """N_opt ~ C^(β/(α+β)) and L - E ~ C^(-αβ/(α+β)), from the curves alone, within 0.01."""
    n, compute, loss = curves(floor, alpha, beta)
    envelope = lower_envelope(compute, loss, n, floor)
    assert envelope.size_exponent.item() == pytest.approx(beta / (alpha + beta), abs=0.01)
    assert envelope.loss_exponent.item() == pytest.approx(alpha * beta / (alpha + beta), abs=0.01)
    seen = ~envelope.compute.isnan()
    assert seen.sum() == 11
    assert torch.equal(seen, envelope.touching.any(1))
    law = Chinchilla(floor, 406.4, 410.7, alpha, beta)
    best = compute_optimal(envelope.compute[seen], law)
    torch.testing.assert_close(envelope.loss[seen], best.loss, rtol=3e-3, atol=0)
    assert (best.size / n[seen]).log().abs().max() < 0.15


def test_touching_points_are_those_of_a_convex_hull():
    n, compute, loss = curves(sizes=5, points=30)
    order = compute.flatten().argsort()
    x, y = compute.flatten()[order].log().tolist(), loss.flatten()[order].tolist()
    hull: list[int] = []
    for i in range(len(x)):  # Andrew's monotone chain, lower half
        while len(hull) > 1:
            a, b = hull[-2:]
            if (x[b] - x[a]) * (y[i] - y[a]) > (y[b] - y[a]) * (x[i] - x[a]):
                break
            hull.pop()
        hull.append(i)
    expected = torch.zeros(150, dtype=torch.bool)
    expected[order[torch.tensor(hull)]] = True
    expected = expected.reshape(5, 30)
    expected[0] = expected[-1] = False
    expected[:, [0, -1]] = False
    touching = lower_envelope(compute, loss, n).touching
    assert torch.equal(touching, expected)
    assert touching.any(1).tolist() == [False, True, True, True, False]
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    moved = lower_envelope(compute[shuffled], loss[shuffled], n[shuffled])
    assert torch.equal(moved.touching, touching[shuffled])


def test_what_rises_is_not_on_the_envelope():
    """Runs whose loss rises at the end: the hull goes on to the right of the least loss, the envelope ends there."""
    n, compute, loss = curves(sizes=6, points=60)
    best = compute.flatten()[loss.argmin()]
    ascent = torch.where(compute > best / 1e3, 0.2 * (compute * 1e3 / best).log(), 0.0)
    touching = lower_envelope(compute, loss + ascent, n).touching
    least = (loss + ascent).argmin()
    assert touching.any()
    assert compute[touching].max() <= compute.flatten()[least]
    assert (compute[1:-1, 1:-1] > compute.flatten()[least]).any()


def test_the_envelope_of_a_few_points_by_hand():
    """The inner points of four runs: two lie on the hull; of the others one lies above it and one is dominated."""
    compute = torch.tensor([[0.0, 1, 2, 3], [1, 2, 4, 6], [2, 4, 5, 8], [3, 6, 8, 10]]).double().exp()
    loss = torch.tensor([[9.0, 8, 7, 7], [8, 3, 2.6, 2.5], [7, 1.6, 1.5, 1.4], [7, 6, 5, 4]]).double()
    touching = lower_envelope(compute, loss, torch.tensor([1.0, 2, 3, 4]).double()).touching
    assert touching.nonzero().tolist() == [[1, 1], [2, 1], [2, 2]]


def test_units_of_compute():
    """FLOPs in petaFLOP-days: the hull and both exponents stay, its compute moves."""
    n, compute, loss = curves(sizes=6, points=60)
    day = 8.64e19
    one, other = lower_envelope(compute, loss, n, 1.7), lower_envelope(compute / day, loss, n / 1e6, 1.7)
    assert torch.equal(one.touching, other.touching)
    torch.testing.assert_close(one.compute, other.compute * day, equal_nan=True)
    torch.testing.assert_close(torch.stack(one[3:]), torch.stack(other[3:]))


N4: Any = curves(sizes=4, points=10)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: crossover(PowerLaw(1.0, 1.0, 0.5), PowerLaw(1.0, 2.0, 0.6), 5.0, 2.0), "high"),
        (lambda: crossover(PowerLaw(1.0, -1.0, 0.5), PowerLaw(1.0, 2.0, 0.6), 1.0, 2.0), "scale"),
        (lambda: lower_envelope(N4[1][:3], N4[2][:3], N4[0][:3]), "compute"),
        (lambda: lower_envelope(N4[1], -N4[2], N4[0]), "loss"),
        (lambda: lower_envelope(N4[1], N4[2] * math.inf, N4[0]), "loss"),
        (lambda: lower_envelope(N4[1], N4[2], torch.ones(4).double()), "loss"),
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
