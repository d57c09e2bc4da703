"""Fréchet means on labels: by brute force, on the line in closed form, and loci by enumeration of the simplex."""

from itertools import combinations

import pytest
import torch

from toolkit.calibration.label_metric import (
    frechet_cost,
    frechet_mean,
    graph_metric,
    predictable_labels,
    squared_distance,
    unseen_label_study,
)
from toolkit.random import key, normal, uniform


def graph(count: int, *edges: tuple[int, int]) -> torch.Tensor:
    lengths = torch.zeros(count, count, dtype=torch.float64)
    for i, j in edges:
        lengths[i, j] = lengths[j, i] = 1.0
    return graph_metric(lengths)


def line(count: int) -> torch.Tensor:
    return graph(count, *((i, i + 1) for i in range(count - 1)))


def ring(count: int) -> torch.Tensor:
    return graph(count, *((i, (i + 1) % count) for i in range(count)))


TREE = graph(7, (0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6))
GRID = graph(9, *((i, i + 1) for i in range(9) if i % 3 < 2), *((i, i + 3) for i in range(6)))


def chosen(count: int, *labels: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill(0, torch.tensor(labels), True)


def test_graph_metric_on_graphs_with_known_distances():
    places = torch.arange(9, dtype=torch.float64)
    torch.testing.assert_close(line(9), (places[:, None] - places).abs())
    gap = (places[:, None] - places).abs()
    torch.testing.assert_close(ring(9), torch.minimum(gap, 9 - gap))
    rows, columns = places // 3, places % 3
    torch.testing.assert_close(GRID, (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs())
    assert TREE[3].tolist() == [2, 1, 3, 0, 2, 4, 4]
    lengths = torch.tensor([[0, 1.0, 5.0], [1.0, 0, 2.5], [5.0, 2.5, 0]])
    assert graph_metric(lengths).tolist() == [[0, 1.0, 3.5], [1.0, 0, 2.5], [3.5, 2.5, 0]]  # round the long edge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frechet_mean_is_the_cheapest_label(dtype):
    observed = torch.tensor([3, 4, 5, 6])
    p = normal(key(0), (40, 4), dtype).softmax(-1)
    distances = TREE.to(dtype)[:, observed]
    for row, cost, mean in zip(p, frechet_cost(p, distances), frechet_mean(p, distances), strict=True):
        brute = [sum(row[k].item() * TREE[y, o].item() ** 2 for k, o in enumerate(observed)) for y in range(7)]
        torch.testing.assert_close(cost, torch.tensor(brute, dtype=dtype))
        assert mean == min(range(7), key=brute.__getitem__)


def test_on_a_line_it_is_the_label_nearest_to_the_expected_position():
    observed = torch.tensor([0, 4, 5, 11])
    p = normal(key(1), (200, 4), torch.float64).mul(2).softmax(-1)
    expected = (p * observed).sum(1)
    assert torch.equal(frechet_mean(p, line(12)[:, observed]), expected.round().long())
    variance = (p * observed.square()).sum(1) - expected.square()
    places = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(  # the parallel axis theorem
        frechet_cost(p, line(12)[:, observed]), variance[:, None] + (expected[:, None] - places).square()
    )


def test_under_the_discrete_metric_it_is_argmax_and_a_sure_answer_stays():
    p = normal(key(2), (50, 6)).softmax(-1)
    assert torch.equal(frechet_mean(p, 1 - torch.eye(6)), p.argmax(-1))
    assert frechet_mean(torch.eye(4), TREE.float()[:, [3, 4, 5, 6]]).tolist() == [3, 4, 5, 6]


def test_half_way_between_two_labels_lies_the_unseen_one_and_ties_go_to_the_first():
    assert frechet_mean(torch.tensor([[0.5, 0.5]]), line(5).float()[:, [0, 4]]).tolist() == [2]
    assert frechet_mean(torch.tensor([[0.5, 0.5]]), line(4).float()[:, [0, 3]]).tolist() == [1]
    assert frechet_mean(torch.tensor([[0.5, 0.5]]), GRID.float()[:, [0, 8]]).tolist() == [2]  # 2, 4 and 6 are equal


def test_temperature_moves_the_mean_from_the_argmax_to_the_centre():
    logits, distances = torch.tensor([[2.0, 0.0, 1.0]]), line(9).float()[:, [0, 4, 8]]
    found = [frechet_mean((logits / t).softmax(-1), distances).item() for t in (0.05, 1.0, 100.0)]
    assert found == [0, 2, 4]  # 1: expected position 4 · .090 + 8 · .245 = 2.32


def test_frechet_mean_and_squared_distance_vmap():
    p, distances = normal(key(3), (3, 10, 4)).softmax(-1), TREE.float()[:, [3, 4, 5, 6]]
    batched = torch.vmap(lambda row: frechet_mean(row, distances))(p)
    assert torch.equal(batched, torch.stack([frechet_mean(row, distances) for row in p]))
    y = torch.arange(10) % 7
    errors = torch.vmap(lambda row: squared_distance(row, y, TREE))(batched)
    expected = [[TREE[a, b].item() ** 2 for a, b in zip(row.tolist(), y.tolist(), strict=True)] for row in batched]
    torch.testing.assert_close(errors, torch.tensor(expected, dtype=torch.float64))


def test_locus_agrees_with_a_search_of_the_simplex():
    """Every mean of a random p is in the locus; labels in it are reached by a dense set of p or at a tie."""
    for distances, labels in (
        (TREE, [1, 5, 6]),
        (TREE, [3, 6, 0]),
        (ring(8), [0, 2, 5]),
        (GRID, [0, 1, 5]),
        (ring(9), [0, 3]),
    ):
        p = uniform(key(4), (20000, len(labels)), torch.float64).log()
        p = p / p.sum(1, keepdim=True)  # uniform on the simplex
        corners = torch.eye(len(labels), dtype=torch.float64)
        weights = torch.cat([p, corners, (corners[:, None] + corners).reshape(-1, len(labels)) / 2])
        cost = frechet_cost(weights, distances[:, labels])
        reached = (cost <= cost.amin(1, keepdim=True) + 1e-9).any(0)
        assert torch.equal(predictable_labels(distances, chosen(len(distances), *labels)), reached)


def test_leaves_of_a_tree_suffice_and_nothing_less_does():
    assert predictable_labels(TREE, chosen(7, 3, 4, 5, 6)).all()
    for left_out in (3, 4, 5, 6):
        observed = chosen(7, 3, 4, 5, 6) & ~chosen(7, left_out)
        assert not predictable_labels(TREE, observed)[left_out]
    assert predictable_labels(line(6), chosen(6, 0, 5)).all()  # a line is a tree with two leaves


def test_opposite_corners_of_a_grid_suffice_and_other_pairs_do_not():
    full = [pair for pair in combinations(range(9), 2) if predictable_labels(GRID, chosen(9, *pair)).all()]
    assert full == [(0, 8), (2, 6)]


def test_complete_graph_predicts_only_what_was_observed():
    complete = 1 - torch.eye(5, dtype=torch.float64)
    for observed in (chosen(5, 0, 2, 3), chosen(5, 1, 4)):
        assert torch.equal(predictable_labels(complete, observed), observed)


def test_unseen_angles_are_predicted_better_than_by_argmax():
    study = unseen_label_study(seeds=2, steps=100, temperatures=(0.01, 1.0))
    assert study.mean_unseen.shape == (2, 2)
    assert (study.mean_unseen[1] < 0.75 * study.argmax_unseen).all()
    torch.testing.assert_close(study.mean_unseen[0], study.argmax_unseen, atol=0.3, rtol=0)  # cold: the argmax
    assert (study.mean_unseen_accuracy[1] > 0.08).all()
    assert (study.argmax_unseen >= 1).all()
    turning = unseen_label_study(geometry="circle", labels=12, seeds=1, steps=60, temperatures=(1.0,))
    assert turning.mean_unseen[0] < turning.argmax_unseen


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="probabilities: expected"):
        frechet_mean(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="lengths: expected numbers of at least 0"):
        graph_metric(-torch.ones(2, 2))
    with pytest.raises(ValueError, match="lengths: expected a symmetric"):
        graph_metric(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="lengths: expected a connected"):
        graph_metric(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="predicted: expected class indices"):
        squared_distance(torch.tensor([5]), torch.tensor([0]), torch.ones(2, 2))
    with pytest.raises(ValueError, match="observed: expected at least one"):
        predictable_labels(TREE, torch.zeros(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="every: expected"):
        unseen_label_study(every=1)
