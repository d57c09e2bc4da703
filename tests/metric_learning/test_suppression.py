"""The spectral contrastive loss, its minimum and its dynamics, against loops, LBFGS and integrated flows."""

import math
from itertools import product

import pair_cases
import pytest
import torch
from torch.func import grad, vmap

from toolkit import random
from toolkit.metric_learning.similarities import precomputed
from toolkit.metric_learning.suppression import (
    feature_growth,
    spectral_contrastive,
    spectral_solution,
    toy_moments,
    toy_views,
)


def moments(size=5, seed=0):
    """M and M⁺ of x = z + e, x⁺ = z + e' for random covariances of z and of the noise."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    return first @ first.mT + second @ second.mT / 3, first @ first.mT


def population_loss(solution, moment, positive):
    return -2 * torch.trace(solution @ positive) + torch.trace(solution @ moment @ solution @ moment)


def lbfgs(moment, positive, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = (0.3 * torch.randn(rows, len(moment), generator=generator, dtype=torch.float64)).requires_grad_()
    search = torch.optim.LBFGS(
        [weights], max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        loss = population_loss(weights.mT @ weights, moment, positive)
        loss.backward()
        return loss

    search.step(closure)
    return (weights.mT @ weights).detach()


@pytest.mark.parametrize("push_positives", [True, False])
def test_the_loss_is_the_loop_over_pairs(push_positives):
    embeddings, labels = pair_cases.sample()
    labels[labels == 3] = torch.arange(10, 10 + int((labels == 3).sum()))  # three anchors without a positive
    table = (embeddings @ embeddings.mT).tolist()
    names, anchors = labels.tolist(), range(12)
    pulls, pushes = [], []
    for a in anchors:
        near = [table[a][j] for j in anchors if j != a and names[j] == names[a]]
        far = [table[a][j] ** 2 for j in anchors if j != a and (push_positives or names[j] != names[a])]
        pushes.append(sum(far) / len(far))
        if near:
            pulls.append(sum(near) / len(near))
    assert len(pulls) == 9
    values = spectral_contrastive(embeddings, labels, push_positives)
    expected = sum(pushes) / 12 - 2 * sum(pulls) / 9
    torch.testing.assert_close(values.mean().item(), expected, rtol=1e-12, atol=1e-12)
    alone = int((labels >= 10).nonzero()[0])
    torch.testing.assert_close(values[alone].item(), pushes[alone], rtol=1e-12, atol=1e-12)


def test_the_loss_by_hand():
    embeddings = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])  # inner products 2 (positives), 0 and 3
    labels = torch.tensor([0, 0, 1])
    torch.testing.assert_close(spectral_contrastive(embeddings, labels).mean(), torch.tensor(26 / 6 - 4))
    torch.testing.assert_close(spectral_contrastive(embeddings, labels, False).mean(), torch.tensor(4.5 - 4))
    first = torch.tensor([(4 + 0) / 2 - 2 * 2 * 1.5, (4 + 9) / 2 - 2 * 2 * 1.5, (0 + 9) / 2])
    torch.testing.assert_close(spectral_contrastive(embeddings, labels), first)


def test_a_pair_weighs_two_over_the_positives_and_two_s_over_the_others():
    embeddings, labels = pair_cases.sample()  # four classes of three
    table = embeddings @ embeddings.mT
    slope = grad(lambda s: spectral_contrastive(s, labels, similarity=precomputed).sum())(table)
    same = labels[:, None] == labels
    expected = 2 * table / 11 - torch.where(same, 2 / 2, 0)
    torch.testing.assert_close(slope, expected.fill_diagonal_(0), rtol=1e-12, atol=1e-13)


def test_two_views_have_the_expectation_of_the_population():
    scales = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    points = scales * torch.tensor(list(product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = (points @ weights.mT)[torch.cartesian_prod(torch.arange(8), torch.arange(8))]  # all batches of two
    batches = images.repeat_interleave(2, 1)
    values = vmap(lambda x: spectral_contrastive(x, torch.tensor([0, 0, 1, 1]), False))(batches)
    moment, positive = (full[:3, :3] for full in toy_moments(scales, 0.0))
    expected = population_loss(weights.mT @ weights, moment, positive)
    torch.testing.assert_close(values.mean(), expected, rtol=1e-12, atol=1e-12)


def joint(embeddings, labels, share):
    both = [spectral_contrastive(embeddings, labels, push) for push in (True, False)]
    return share * both[0] + (1 - share) * both[1]


def test_the_loss_under_vmap_in_any_order_and_on_bad_batches():
    pair_cases.check_against_a_loop(joint, (0.2, 0.7))
    for push in (True, False):
        pair_cases.check_order_and_precision(lambda x, y, push=push: spectral_contrastive(x, y, push))
        pair_cases.check_bad_batches(lambda x, y, push=push: spectral_contrastive(x, y, push), comparing=False)
    values, slope = pair_cases.value_and_gradient(spectral_contrastive, torch.ones(1, 4), torch.tensor([2]))
    assert values.item() == slope.abs().max() == 0
    with pytest.raises(ValueError, match="embeddings: expected finite values, got 1"):
        spectral_contrastive(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]))


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_the_solution_is_the_minimum_that_lbfgs_finds(rows):
    moment, positive = moments()
    solution = spectral_solution(moment, positive, rows)
    torch.testing.assert_close(solution, lbfgs(moment, positive, rows), rtol=1e-5, atol=1e-7)
    gains = torch.linalg.eigvals(torch.linalg.solve(moment, positive)).real.sort(descending=True).values
    loss = population_loss(solution, moment, positive)
    torch.testing.assert_close(loss, -(gains[:rows] ** 2).sum(), rtol=1e-10, atol=1e-12)
    assert torch.linalg.matrix_rank(solution) == min(rows, 5)


def test_negative_eigenvalues_are_never_kept():
    moment = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    positive = torch.diag(torch.tensor([0.5, -2.0, -3.0], dtype=torch.float64))
    expected = torch.diag(torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(spectral_solution(moment, positive, 3), expected)


SCALES = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)  # the class is hardest, the distractor easiest
TOY = [  # supervision, keep, dimensions, weight of class, subclass and distractor times its amplitude²
    (1.0, (1.0, 1.0), 4, (1, 0, 0)),  # class collapse
    (0.0, (1.0, 1.0), 3, (1, 1, 1)),
    (0.0, (1.0, 1.0), 2, (0, 1, 1)),  # feature suppression
    (0.0, (1.0, 1.0), 1, (0, 0, 1)),
    (0.0, (1.0, 0.0), 2, (1, 1, 0)),  # the augmentation destroys the distractor
    (0.0, (1.0, 0.5), 3, (1, 1, 0.5)),
    (0.25, (1.0, 1.0), 4, (1, 0.75, 0.75)),  # joint: class first, the rest kept
    (0.25, (1.0, 1.0), 2, (1, 0, 0.75)),
    (0.25, (1.0, 1.0), 1, (1, 0, 0)),
]


@pytest.mark.parametrize(("supervision", "keep", "rows", "weights"), TOY)
def test_which_features_of_the_toy_are_kept(supervision, keep, rows, weights):
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    pair = toy_moments(SCALES, 0.7, supervision, torch.tensor(keep, dtype=torch.float64), 2)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[:3] = torch.tensor(weights, dtype=torch.float64) / SCALES**2
    torch.testing.assert_close(spectral_solution(*pair, rows), torch.diag(expected), rtol=1e-10, atol=1e-12)
    # ties need not follow the axes
    moment, positive = (turn @ part @ turn.mT for part in pair)
    turned = spectral_solution(moment, positive, rows)
    torch.testing.assert_close(turned, turn @ torch.diag(expected) @ turn.mT, rtol=1e-7, atol=1e-8)


def test_of_all_minimisers_the_one_of_least_trace():
    moment, positive = toy_moments(SCALES, 0.7)
    solution = spectral_solution(moment, positive, 2)
    root = torch.diag(1 / moment.diagonal().sqrt())[:, :3]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        plane = torch.linalg.qr(torch.randn(3, 2, generator=generator, dtype=torch.float64))[0]
        other = root @ plane @ plane.mT @ root.mT
        losses = [population_loss(g, moment, positive) for g in (solution, other)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        assert solution.trace() < other.trace()


def test_more_dimensions_than_items_only_the_least_solution_collapses():
    views = toy_views(random.key(0), 12, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), 0.3, None, 30)
    x, member = views.first, torch.nn.functional.one_hot(views.classes).double()
    means = (member.mT @ x) / member.sum(0)[:, None]
    moment, positive = x.mT @ x / 12, means.mT @ torch.diag(member.mean(0)) @ means
    solution = spectral_solution(moment, positive, 3)
    embedded = x @ solution @ x.mT
    torch.testing.assert_close(embedded, (embedded @ member / member.sum(0)) @ member.mT, rtol=1e-8, atol=1e-8)
    outside = torch.eye(33, dtype=torch.float64) - torch.linalg.pinv(x) @ x
    assert (solution @ outside).abs().max() < 1e-10
    other = solution + outside  # another minimiser, which costs nothing on these items but tells subclasses apart
    losses = [population_loss(g, moment, positive) for g in (solution, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    assert other[1, 1] > 0.1 > 10 * solution[1, 1]


def test_a_fleet_of_solutions_is_the_loop():
    pairs = [moments(seed=seed) for seed in range(2)]
    stacked = [torch.stack(parts) for parts in zip(*pairs, strict=True)]
    together = vmap(spectral_solution)(stacked[0], stacked[1], torch.tensor([2, 4]))
    for member, rows in enumerate((2, 4)):
        torch.testing.assert_close(
            together[member], spectral_solution(pairs[member][0], pairs[member][1], rows), rtol=1e-10, atol=1e-12
        )
    single = spectral_solution(pairs[0][0].float(), pairs[0][1].float(), 2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), together[0], rtol=1e-4, atol=1e-4)


def test_solution_refuses_bad_moments():
    moment, positive = moments()
    with pytest.raises(ValueError, match="second_moment: expected finite"):
        spectral_solution(moment * float("nan"), positive, 2)
    with pytest.raises(ValueError, match="positive_moment: expected a symmetric matrix"):
        spectral_solution(moment, positive + torch.ones(5, 5).triu(1), 2)
    with pytest.raises(ValueError, match="dimension: expected a number of at least 1, got 0"):
        spectral_solution(moment, positive, 0)


def test_toy_views_have_the_moments_and_the_labels_they_say():
    scales, keep = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, 0.6])
    views = toy_views(random.key(3), 40000, scales, 0.7, keep, 2)
    assert views.first.shape == views.second.shape == (40000, 5)
    for column, hidden in enumerate((views.classes, views.subclasses, views.distractors)):
        torch.testing.assert_close(views.first[:, column], scales[column] * (2.0 * hidden - 1))
        assert abs(hidden.float().mean() - 0.5) < 0.01
    assert torch.equal(views.first[:, :2], views.second[:, :2])
    assert abs((views.first[:, 2] == views.second[:, 2]).float().mean() - 0.8) < 0.01
    assert abs((views.second[:, 2] > 0).float().mean() - 0.5) < 0.01
    moment, positive = toy_moments(scales, 0.7, 0.0, keep, 2)
    assert (views.first.mT @ views.first / 40000 - moment).abs().max() < 0.05
    assert (views.second.mT @ views.second / 40000 - moment).abs().max() < 0.05
    assert (views.first.mT @ views.second / 40000 - positive).abs().max() < 0.05
    assert abs(positive[2, 2] - 0.6 * 9) < 1e-5
    means = torch.stack([views.first[views.classes == c].mean(0) for c in (0, 1)])
    assert (means.mT @ means / 2 - toy_moments(scales, 0.7, 1.0, keep, 2)[1]).abs().max() < 0.05


def test_toy_views_come_from_the_key_alone():
    keys = torch.stack([random.key(1, member) for member in range(2)])
    scales = torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 2.0]])
    together = vmap(lambda k, a: toy_views(k, 6, a))(keys, scales)
    for member in range(2):
        for part, alone in zip(together, toy_views(keys[member], 6, scales[member]), strict=True):
            assert torch.equal(part[member], alone)
    assert not torch.equal(together.first[0], together.first[1])
    with pytest.raises(ValueError, match="images"):
        toy_views(keys[0], 0, scales[0])
    with pytest.raises(ValueError, match="noise_dimensions"):
        toy_views(keys[0], 3, scales[0], noise_dimensions=0)
    with pytest.raises(ValueError, match="keep"):
        toy_views(keys[0], 3, scales[0], keep=torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="supervision"):
        toy_moments(scales[0], supervision=1.5)


def test_growth_is_the_logistic_curve_by_hand():
    # a = 1, b = 1: g' = 8 g (1 - g), from 1/2 to 3/4 in the time log(3) / 8
    half = torch.tensor(math.log(3) / 8, dtype=torch.float64)
    torch.testing.assert_close(feature_growth(half, 0.5, 1.0).item(), 0.75)
    torch.testing.assert_close(feature_growth(half, 0.5, 1.0, 0.0).item(), 0.5 / (1 + 4 * half.item()))


@pytest.mark.parametrize(("scale", "overlap"), [(0.7, 1.0), (1.5, 0.6), (1.2, 0.0), (1.2, 1e-9), (0.8, -0.5)])
def test_growth_solves_its_equation(scale, overlap):
    g, step, values = 0.05, 1e-3, [0.05]

    def slope(g):
        return 8 * g * scale**2 * (overlap - scale**2 * g)

    for _ in range(500):  # Runge-Kutta of fourth order
        k1 = slope(g)
        k2 = slope(g + step * k1 / 2)
        k3 = slope(g + step * k2 / 2)
        k4 = slope(g + step * k3)
        g = g + step * (k1 + 2 * k2 + 2 * k3 + k4) / 6
        values.append(g)
    time = torch.arange(501, dtype=torch.float64) * step
    curve = feature_growth(time, 0.05, scale, overlap)
    torch.testing.assert_close(curve, torch.tensor(values, dtype=torch.float64), rtol=1e-8, atol=1e-10)


def test_gradient_descent_learns_features_in_the_order_of_the_curves():
    moment, positive = toy_moments(SCALES, 0.7, 0.25)
    weights, rate, steps = 0.1 * torch.eye(4, dtype=torch.float64), 1e-4, 5000

    def flow(w):
        return 4 * w @ (positive - moment @ w.mT @ w @ moment)

    other = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(grad(lambda w: population_loss(w.mT @ w, moment, positive))(other), -flow(other))
    for _ in range(steps):
        weights = weights + rate * flow(weights)
    time = torch.full((4,), steps * rate, dtype=torch.float64)
    scale = torch.cat([SCALES, torch.tensor([0.7], dtype=torch.float64)])
    overlap = torch.tensor([1, 0.75, 0.75, 0], dtype=torch.float64)
    expected = feature_growth(time, torch.full_like(time, 0.01), scale, overlap)
    torch.testing.assert_close((weights.mT @ weights).diagonal(), expected, rtol=2e-3, atol=1e-6)
    done = expected[:3] * SCALES**2 / overlap[:3]
    assert done[0] < 0.1 < done[1] < 0.9 < done[2]


def test_growth_far_out_in_a_fleet_and_refused():
    far = torch.tensor([0.0, 1.0, 1e3, 1e6])
    torch.testing.assert_close(feature_growth(far, 0.01, 2.0, 0.8)[2:], torch.tensor([0.2, 0.2]))
    assert feature_growth(far, 0.0, 2.0).abs().max() == 0
    for overlap in (1.0, 0.0, -1.0):
        slopes = vmap(grad(lambda t, a, b=overlap: feature_growth(t, 0.01, a, b)), (0, None))(far, torch.tensor(2.0))
        assert slopes.isfinite().all()
    scales = torch.tensor([0.5, 2.0])
    together = vmap(lambda a: feature_growth(far, 0.01, a))(scales)
    for member in range(2):
        torch.testing.assert_close(together[member], feature_growth(far, 0.01, scales[member].item()))
    with pytest.raises(ValueError, match="initial"):
        feature_growth(far, -0.1, 1.0)
    with pytest.raises(ValueError, match="time"):
        feature_growth(-far, 0.1, 1.0)
