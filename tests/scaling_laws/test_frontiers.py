"""Frontiers, crossings and envelopes against dense grids, closed forms, exact inverses and published exponents."""

import math
from typing import Any

import pytest
import torch
from torch.func import vmap

from toolkit.scaling_laws.frontiers import (
    bivariate_split,
    budget_to_loss,
    compute_optimal,
    compute_optimal_numeric,
    crossover,
    frontier_exponents,
    isoflop,
    kaplan_frontier,
    lower_envelope,
    one_epoch,
    speed_up,
    steps_to_loss,
    tokens_to_loss,
)
from toolkit.scaling_laws.laws import (
    Bivariate,
    Chinchilla,
    DataConstrained,
    KaplanSteps,
    PowerLaw,
    bivariate,
    chinchilla,
    critical_batch,
    data_constrained,
    kaplan_steps,
    power_law,
)

STEPS = KaplanSteps(6.5e13, 0.077, 2.1e3, 0.76, 2e8, 0.21)
EPOCH = Chinchilla(1.8169, 482.01, 2085.43, 0.3478, 0.3658)
BUDGET = torch.logspace(18, 25, 8, dtype=torch.float64)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def epoch(n, d):
    return chinchilla(n, d, EPOCH)


def test_no_other_size_does_better():
    frontier = compute_optimal(BUDGET, EPOCH)
    torch.testing.assert_close(6 * frontier.size * frontier.data, BUDGET)
    share = frontier.size[:, None] * torch.logspace(-2, 2, 4001, dtype=torch.float64)  # the best one in the middle
    losses = chinchilla(share, BUDGET[:, None] / 6 / share, EPOCH)
    assert (losses.argmin(1) == 2000).all()
    torch.testing.assert_close(frontier.loss, losses.amin(1), rtol=1e-14, atol=0)
    n, d = frontier.size, frontier.data
    torch.testing.assert_close(EPOCH.alpha * 482.01 * n**-EPOCH.alpha, EPOCH.beta * 2085.43 * d**-EPOCH.beta)


def test_exponents_are_the_slopes_of_the_frontier_and_those_published():
    low, high = compute_optimal(doubles(1e20), EPOCH), compute_optimal(doubles(1e23), EPOCH)
    slopes = [(b.log() - a.log()).item() / math.log(1e3) for a, b in zip(low[:2], high[:2], strict=True)]
    exponents = frontier_exponents(EPOCH)
    assert [exponents.size.item(), exponents.data.item()] == pytest.approx(slopes)
    fall = ((low.loss - EPOCH.floor) / (high.loss - EPOCH.floor)).log().item() / math.log(1e3)
    assert exponents.loss.item() == pytest.approx(fall)
    assert exponents.size.item() == pytest.approx(0.513, abs=5e-4)  # the headline of the replication
    outliers = EPOCH._replace(alpha=0.3493, beta=0.4531)  # and with its five outliers
    assert frontier_exponents(outliers).size.item() == pytest.approx(0.565, abs=5e-4)


def test_the_numeric_frontier():
    closed, numeric = compute_optimal(BUDGET, EPOCH), compute_optimal_numeric(BUDGET, epoch)
    torch.testing.assert_close(numeric.loss, closed.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(numeric.size, closed.size, rtol=3e-6, atol=0)
    torch.testing.assert_close(6 * numeric.size * numeric.data, BUDGET)
    # a slope that is not zero at the optimum: the range's end
    assert compute_optimal_numeric(BUDGET[-1:], epoch, 1.0, 1e9).size.item() == pytest.approx(1e9)
    assert compute_optimal_numeric(BUDGET[:1], epoch, 1e10, 1e12).size.item() == pytest.approx(1e10)


def test_repeats_move_the_numeric_frontier():
    """With 1e9 unique tokens the best model is smaller, and trained longer, than with fresh data (dense grid)."""
    law = DataConstrained(*EPOCH, 5.309743, 15.387756)
    unique, budget = doubles(1e9)[0], doubles(1e22)

    def repeats(n, d):
        return data_constrained(n, d, unique.expand_as(d), law)

    best, fresh = compute_optimal_numeric(budget, repeats, 1e6, 1e13), compute_optimal(budget, EPOCH)
    n = torch.logspace(6, 13, 20001, dtype=torch.float64)
    losses = repeats(n, budget / 6 / n)
    assert best.loss.item() == pytest.approx(losses.min().item(), rel=1e-7)
    assert best.size.item() == pytest.approx(n[losses.argmin()].item(), rel=2e-3)
    assert best.loss > fresh.loss + 0.01
    assert best.size < 0.6 * fresh.size
    plenty = compute_optimal_numeric(doubles(1e17), repeats, 1e6, 1e13)
    torch.testing.assert_close(plenty.loss, compute_optimal(doubles(1e17), EPOCH).loss)


def test_inverse_questions():
    frontier = compute_optimal(BUDGET, EPOCH)
    torch.testing.assert_close(budget_to_loss(frontier.loss, EPOCH), BUDGET, rtol=1e-10, atol=0)
    n, d = doubles(1e8, 1e9), doubles(1e9, 3e11)
    torch.testing.assert_close(tokens_to_loss(epoch(n, d), n, EPOCH), d, rtol=1e-10, atol=0)
    assert budget_to_loss(doubles(1.8169, 1.5), EPOCH).isinf().all()
    assert tokens_to_loss(doubles(1.8169 + 482.01 * 1e8**-0.3478 - 1e-9), doubles(1e8), EPOCH).isinf().all()
    assert steps_to_loss(doubles(1.0), doubles(1e8), doubles(1e6), STEPS).isinf().all()
    loss = kaplan_steps(doubles(1e8), doubles(5e3), STEPS)
    at_critical = steps_to_loss(loss, doubles(1e8), critical_batch(loss, STEPS), STEPS)
    torch.testing.assert_close(at_critical, doubles(1e4), rtol=1e-9, atol=0)
    leaf = doubles(2.0, 1.0).requires_grad_()  # no NaN from the branch not taken
    gradient = torch.autograd.grad(budget_to_loss(leaf, EPOCH).where(leaf > EPOCH.floor, 0).sum(), leaf)[0]
    assert gradient[0] < 0
    assert gradient[1] == 0


def test_isoflop_curves():
    n = torch.logspace(7, 11, 9, dtype=torch.float64)
    curves = isoflop(BUDGET, n, epoch)
    for i, budget in enumerate(BUDGET.tolist()):
        for j, size in enumerate(n.tolist()):
            by_hand = 1.8169 + 482.01 * size**-0.3478 + 2085.43 * (budget / (6 * size)) ** -0.3658
            assert curves[i, j].item() == pytest.approx(by_hand, rel=1e-13)
    assert (curves >= compute_optimal(BUDGET, EPOCH).loss[:, None]).all()


def test_the_frontier_in_steps():
    """Against a grid over sizes: least N · S_min for the loss; and against its four exponents, which sum to 1."""
    budget = torch.logspace(18, 24, 7, dtype=torch.float64)
    best = kaplan_frontier(budget, STEPS)
    torch.testing.assert_close(6 * best.size * best.batch * best.steps, budget)
    torch.testing.assert_close(kaplan_steps(best.size, best.steps, STEPS), best.loss)
    torch.testing.assert_close(critical_batch(best.loss, STEPS), best.batch)
    sizes = best.size[:, None] * torch.logspace(-0.5, 0.5, 2001, dtype=torch.float64)
    steps = steps_to_loss(best.loss[:, None], sizes, doubles(1e60), STEPS)
    assert ((sizes * steps).argmin(1) == 1000).all()
    torch.testing.assert_close(best.loss, 1.10131 * (6.5e13 / best.size) ** 0.077, rtol=1e-5, atol=0)
    decade = budget[-1].log() - budget[0].log()
    slopes = [((v[-1].log() - v[0].log()) / decade).item() for v in best]
    a_c = 0.05245
    assert slopes == pytest.approx([a_c / 0.077, a_c / 0.76, a_c / 0.21, -a_c], abs=5e-5)
    assert sum(slopes[:3]) == pytest.approx(1)


def test_the_best_split():
    law = Bivariate(1.4, 300.0, 0.2, 0.3)
    total = doubles(1e7, 1e9)
    encoder, decoder = bivariate_split(total, law)
    torch.testing.assert_close(encoder, 0.4 * total)
    torch.testing.assert_close(encoder + decoder, total)
    share = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)  # 0.4 among them
    losses = bivariate(share * total[:, None], (1 - share) * total[:, None], law)
    torch.testing.assert_close(share[losses.argmin(1)], doubles(0.4, 0.4))
    excess = bivariate(encoder, decoder, law) - 1.4
    assert (excess[1] / excess[0]).item() == pytest.approx(100**-0.5)


# Crossings


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


def test_units_of_compute():
    """FLOPs in petaFLOP-days: the hull and both exponents stay, its compute moves."""
    n, compute, loss = curves(sizes=6, points=60)
    day = 8.64e19
    one, other = lower_envelope(compute, loss, n, 1.7), lower_envelope(compute / day, loss, n / 1e6, 1.7)
    assert torch.equal(one.touching, other.touching)
    torch.testing.assert_close(one.compute, other.compute * day, equal_nan=True)
    torch.testing.assert_close(torch.stack(one[3:]), torch.stack(other[3:]))
    other_units = EPOCH._replace(size_scale=482.01 * 1e6**-EPOCH.alpha, data_scale=2085.43 * 1e9**-EPOCH.beta)
    rescaled, plain = compute_optimal(BUDGET / 1e15, other_units), compute_optimal(BUDGET, EPOCH)
    torch.testing.assert_close(rescaled.size * 1e6, plain.size)
    torch.testing.assert_close(rescaled.data * 1e9, plain.data)
    torch.testing.assert_close(rescaled.loss, plain.loss)


# One epoch


def test_one_epoch():
    p, t = doubles(1e8, 1e6), doubles(1e9, 1e9)
    size, tokens = one_epoch(p, t)
    torch.testing.assert_close(size * tokens, p * t)
    torch.testing.assert_close(tokens / size, doubles(5, 5))
    law = Chinchilla(1.5, 300.0, 300.0 * 5**0.4, 0.4, 0.4)  # of which 5 tokens per parameter is the optimum
    best = compute_optimal(6 * p * t, law)
    torch.testing.assert_close(size, best.size)
    off = law._replace(data_scale=300.0 * 20**0.4)  # there it is 20
    regret = chinchilla(*one_epoch(p, t), off) - compute_optimal(6 * p * t, off).loss
    torch.testing.assert_close(one_epoch(p, t, 20.0)[0], compute_optimal(6 * p * t, off).size)
    assert (regret > 0.001).all()


def test_speed_up_of_two_power_laws():
    """t = (c/L)^(1/b): the ratio of costs is (c1/c2)^(1/b), wherever the points of the new curve lie."""
    cost, new_cost = torch.logspace(2, 5, 30, dtype=torch.float64), torch.logspace(1, 6, 17, dtype=torch.float64)
    slow, fast = 9.0 * cost**-0.3, 6.0 * new_cost**-0.3
    assert speed_up(cost, slow, new_cost, fast).item() == pytest.approx((9 / 6) ** (1 / 0.3), rel=1e-12)
    overfits = torch.cat([slow, slow[-1:] * 2])  # what comes after the best does not count
    longer = torch.cat([cost, doubles(1e7)])
    assert speed_up(longer, overfits, new_cost, fast).item() == pytest.approx(1.5 ** (1 / 0.3), rel=1e-12)
    assert speed_up(cost, slow, new_cost, fast + 1).isnan()
    assert speed_up(cost, slow, cost, slow).item() == pytest.approx(1)
    assert speed_up(cost, slow, new_cost, fast * 1e-6).item() == pytest.approx(1e5 / 10)
    many = vmap(lambda scale: speed_up(cost, slow, new_cost, scale * new_cost**-0.3))(doubles(6.0, 4.0))
    torch.testing.assert_close(many, (9 / doubles(6.0, 4.0)) ** (1 / 0.3))


def test_a_fleet_of_laws_and_single_precision():
    alpha = doubles(0.3, 0.35)
    laws = [EPOCH._replace(alpha=a) for a in alpha]
    sizes = vmap(lambda a: compute_optimal(BUDGET, EPOCH._replace(alpha=a)).size)(alpha)
    torch.testing.assert_close(sizes, torch.stack([compute_optimal(BUDGET, law).size for law in laws]))
    numeric = vmap(lambda a: compute_optimal_numeric(BUDGET, lambda n, d: chinchilla(n, d, EPOCH._replace(alpha=a))))
    torch.testing.assert_close(numeric(alpha).size, sizes, rtol=3e-6, atol=0)
    assert compute_optimal(BUDGET.float(), EPOCH).size.dtype == torch.float32
    torch.testing.assert_close(
        compute_optimal(BUDGET.float(), EPOCH).size.double(), compute_optimal(BUDGET, EPOCH).size, rtol=1e-4, atol=0
    )
    kaplans = kaplan_frontier(BUDGET.float(), STEPS)
    torch.testing.assert_close(kaplans.size.double(), kaplan_frontier(BUDGET, STEPS).size, rtol=1e-3, atol=0)
    exponents = vmap(lambda a: frontier_exponents(EPOCH._replace(alpha=a)).size)(alpha)
    torch.testing.assert_close(exponents, 0.3658 / (alpha + 0.3658))


N4: Any = curves(sizes=4, points=10)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: compute_optimal(doubles(-1.0), EPOCH), "budget"),
        (lambda: compute_optimal(doubles(1.0), EPOCH._replace(alpha=0.0)), "alpha"),
        (lambda: compute_optimal_numeric(doubles(0.0), epoch), "budget"),
        (lambda: compute_optimal_numeric(doubles(1e18), epoch, 1e9, 1e8), "high"),
        (lambda: frontier_exponents(EPOCH._replace(beta=-1.0)), "beta"),
        (lambda: budget_to_loss(doubles(2.0), EPOCH._replace(data_scale=0.0)), "data_scale"),
        (lambda: tokens_to_loss(doubles(2.0), doubles(-5.0), EPOCH), "n"),
        (lambda: steps_to_loss(doubles(2.0), doubles(5.0), doubles(0.0), STEPS), "batch"),
        (lambda: isoflop(doubles(1e18), doubles(-1.0), epoch), "n"),
        (lambda: kaplan_frontier(doubles(math.nan), STEPS), "budget"),
        (lambda: bivariate_split(doubles(0.0), Bivariate(1.0, 1.0, 0.2, 0.3)), "total"),
        (lambda: crossover(PowerLaw(1.0, 1.0, 0.5), PowerLaw(1.0, 2.0, 0.6), 5.0, 2.0), "high"),
        (lambda: crossover(PowerLaw(1.0, -1.0, 0.5), PowerLaw(1.0, 2.0, 0.6), 1.0, 2.0), "scale"),
        (lambda: lower_envelope(N4[1][:3], N4[2][:3], N4[0][:3]), "compute"),
        (lambda: lower_envelope(N4[1], -N4[2], N4[0]), "loss"),
        (lambda: lower_envelope(N4[1], N4[2] * math.inf, N4[0]), "loss"),
        (lambda: lower_envelope(N4[1], N4[2], torch.ones(4).double()), "loss"),
        (lambda: one_epoch(doubles(1.0), doubles(1.0), -5.0), "ratio"),
        (lambda: speed_up(doubles(2.0, 1.0), doubles(2.0, 1.0), doubles(1.0), doubles(1.0)), "cost"),
        (lambda: speed_up(doubles(1.0), doubles(2.0), doubles(1.0), doubles(-1.0)), "new_loss"),
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
