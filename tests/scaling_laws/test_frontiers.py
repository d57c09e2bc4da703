"""Frontiers against dense grids, closed forms, exact inverses and published exponents."""

import math

import pytest
import torch
from law_cases import doubles
from torch.func import vmap

from toolkit.scaling_laws.constants import Bivariate, Chinchilla, DataConstrained, KaplanSteps
from toolkit.scaling_laws.frontiers import (
    bivariate_split,
    budget_to_loss,
    compute_optimal,
    compute_optimal_numeric,
    frontier_exponents,
    isoflop,
    kaplan_frontier,
    steps_to_loss,
    tokens_to_loss,
)
from toolkit.scaling_laws.size_laws import bivariate, chinchilla, data_constrained
from toolkit.scaling_laws.step_laws import critical_batch, kaplan_steps

STEPS = KaplanSteps(6.5e13, 0.077, 2.1e3, 0.76, 2e8, 0.21)
EPOCH = Chinchilla(1.8169, 482.01, 2085.43, 0.3478, 0.3658)
BUDGET = torch.logspace(18, 25, 8, dtype=torch.float64)


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


def test_units_of_sizes_and_data():
    """Parameters in millions and tokens in billions: the same frontier."""
    other_units = EPOCH._replace(size_scale=482.01 * 1e6**-EPOCH.alpha, data_scale=2085.43 * 1e9**-EPOCH.beta)
    rescaled, plain = compute_optimal(BUDGET / 1e15, other_units), compute_optimal(BUDGET, EPOCH)
    torch.testing.assert_close(rescaled.size * 1e6, plain.size)
    torch.testing.assert_close(rescaled.data * 1e9, plain.data)
    torch.testing.assert_close(rescaled.loss, plain.loss)


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
    ],
)
def test_bad_input(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
