"""Distances to the oracle against NumPy, SciPy and closed forms; bands against their exact coverage."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import vmap

from toolkit.fleet import Adam, train
from toolkit.models import MLP
from toolkit.unlearning.attacks import margins, membership_scores, population_attack, u_lira
from toolkit.unlearning.distances import (
    Accuracies,
    accuracies,
    aus,
    beyond_band,
    gaussian_klom,
    inside_band,
    klom,
    noise_floor,
    oracle_band,
    relearn_steps,
    run_time_efficiency,
    tow,
    wasserstein,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# the band of the retrained fleet ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("oracles", "level", "k"), [(39, 0.95, 1), (78, 0.95, 1), (79, 0.95, 2), (19, 0.9, 1)])
def test_band_is_order_statistics(oracles, level, k):
    oracle = normal(oracles, 3)
    low, high = oracle_band(oracle, level)
    ordered = np.sort(oracle.numpy(), 0)
    np.testing.assert_array_equal(low, ordered[k - 1])
    np.testing.assert_array_equal(high, ordered[-k])


@pytest.mark.parametrize(("oracles", "level"), [(39, 0.95), (79, 0.95), (50, 0.9), (99, 0.5)])
def test_retrained_models_pass_at_the_nominal_rate(oracles, level):
    """Each column is a fleet of its own, and one more model of the same skewed distribution."""
    trials = 40000
    generator = torch.Generator().manual_seed(oracles)
    fleet = -torch.rand(oracles + 1, trials, generator=generator, dtype=torch.float64).log()
    k = math.floor((1 - level) / 2 * (oracles + 1) * (1 + 1e-12))
    exact = (oracles + 1 - 2 * k) / (oracles + 1)
    assert exact >= level - 1e-12
    passed = inside_band(fleet[:1], fleet[1:], level)
    error = math.sqrt(exact * (1 - exact) / trials)
    assert abs(passed.double().mean().item() - exact) < 3.5 * error
    assert abs((beyond_band(fleet[0], fleet[1:], level) > 0).double().mean().item() - k / (oracles + 1)) < 4 * error


def test_models_of_the_same_fleet_pass_and_others_do_not():
    fleet = normal(400, 1) + 3
    halves = inside_band(fleet[:200], fleet[200:])
    assert halves.shape == (200, 1)
    assert 0.88 < halves.double().mean().item() < 0.995
    assert not bool(inside_band(fleet[:200] + 20, fleet[200:]).any())
    assert not bool(inside_band(fleet[:200] - 20, fleet[200:]).any())


def test_distance_beyond_the_band_is_signed_and_zero_inside():
    oracle = torch.arange(1.0, 40.0)  # 39 models: the band is [1, 39]
    values = torch.tensor([-2.0, 1.0, 20.0, 39.0, 44.5, math.inf, math.nan])
    distance = beyond_band(values, oracle)
    assert distance[:6].tolist() == [-3.0, 0.0, 0.0, 0.0, 5.5, math.inf]
    assert math.isnan(distance[6].item())
    assert inside_band(values, oracle).tolist() == [False, True, True, True, False, False, False]
    assert beyond_band(values[:3], torch.cat([oracle[:-1], torch.tensor([math.inf])])).tolist() == [-3.0, 0.0, 0.0]


def test_bands_take_examples_apart():
    oracle = normal(50, 6)
    values = normal(3, 6, seed=1) * 3
    together = beyond_band(values, oracle)
    for j in range(6):
        torch.testing.assert_close(together[:, j], beyond_band(values[:, j], oracle[:, j]))
    torch.testing.assert_close(vmap(lambda v: beyond_band(v, oracle))(values), together)
    low, high = oracle_band(oracle)
    scaled = oracle_band(-2 * oracle + 1)
    torch.testing.assert_close(scaled.low, -2 * high + 1)
    torch.testing.assert_close(scaled.high, -2 * low + 1)


# KLoM ---------------------------------------------------------------------------------------------------------------


def plain_klom(ours, theirs, bins=20, clip=100.0, floor=1e-5):
    """One example with NumPy's histogram and SciPy's entropy."""
    ours, theirs = np.clip(ours, -clip, clip), np.clip(theirs, -clip, clip)
    edges = np.linspace(min(ours.min(), theirs.min()), max(ours.max(), theirs.max()), bins + 1)
    p = np.histogram(ours, edges)[0] / len(ours)
    q = np.histogram(theirs, edges)[0] / len(theirs)
    q = np.where(p > 0, np.maximum(q, floor), q)
    return stats.entropy(p, q)


@pytest.mark.parametrize(("models", "oracles", "bins"), [(30, 30, 20), (17, 40, 20), (40, 9, 7)])
def test_klom_is_numpy_and_scipy(models, oracles, bins):
    ours, theirs = 4 * normal(models, 25) + 2, 3 * normal(oracles, 25, seed=1)
    expected = [plain_klom(ours[:, j].numpy(), theirs[:, j].numpy(), bins) for j in range(25)]
    np.testing.assert_allclose(klom(ours, theirs, bins=bins), expected, rtol=1e-12, atol=1e-13)
    wide = torch.where(normal(models, 25, seed=2) > 1, 1e6, ours)
    wide[0] = -math.inf
    expected = [plain_klom(wide[:, j].numpy(), theirs[:, j].numpy()) for j in range(25)]
    np.testing.assert_allclose(klom(wide, theirs), expected, rtol=1e-12)


def test_klom_is_zero_for_the_same_models_and_has_a_direction():
    fleet = 3 * normal(40, 12)
    torch.testing.assert_close(klom(fleet, fleet.flip(0)), torch.zeros(12, dtype=torch.float64))
    assert klom(torch.ones(5, 2), torch.ones(8, 2)).tolist() == [0.0, 0.0]
    half, whole = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    assert klom(half, whole).item() == pytest.approx(math.log(2))  # KL((1, 0), (.5, .5))
    floored = 1e-5 / (1 + 1e-5)
    expected = 0.5 * math.log(0.5 / (1 / (1 + 1e-5))) + 0.5 * math.log(0.5 / floored)
    assert klom(whole, half).item() == pytest.approx(expected)


def test_klom_counts_the_largest_margin():
    """The public mistake: np.digitize puts a maximum into a bin beyond the last, and it is lost."""
    ours = torch.cat([torch.zeros(99), torch.ones(1)])[:, None]
    theirs = torch.zeros(100, 1)
    expected = 0.99 * math.log(0.99 * (1 + 1e-5)) + 0.01 * math.log(0.01 / 1e-5 * (1 + 1e-5))
    assert klom(ours, theirs).item() == pytest.approx(expected)

    def digitized(values):
        edges = np.linspace(0, 1, 21)
        place = np.digitize(values[:, 0].numpy(), edges)
        return np.array([(place == i).sum() for i in range(1, 21)]) / len(values)

    p, q = digitized(ours), digitized(theirs)
    assert p.sum() == pytest.approx(0.99)
    assert stats.entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q)) == pytest.approx(0)  # the mistake sees nothing


def test_twins_without_bins():
    ours, theirs = 2 * normal(31, 10) + 1, normal(45, 10, seed=1)
    for j in range(10):
        a, b = ours[:, j].numpy(), theirs[:, j].numpy()
        assert wasserstein(ours, theirs)[j].item() == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-11)
        p = torch.distributions.Normal(a.mean(), a.std(ddof=1))
        q = torch.distributions.Normal(b.mean(), b.std(ddof=1))
        divergence = torch.distributions.kl_divergence(p, q).item()
        assert gaussian_klom(ours, theirs)[j].item() == pytest.approx(divergence, rel=1e-6)
    same = normal(20, 3)
    assert wasserstein(same, same.flip(0)).abs().max() == 0
    assert gaussian_klom(same, same.flip(0)).abs().max() < 1e-12
    torch.testing.assert_close(wasserstein(same, same + 2.5), torch.full((3,), 2.5, dtype=torch.float64))
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(1.0, 2.0), torch.distributions.Normal(0.0, 1.0)
    )
    many = gaussian_klom(2 * normal(20000, 1) + 1, normal(20000, 1, seed=1)).item()
    assert many == pytest.approx(exact.item(), rel=0.04)
    assert gaussian_klom(torch.ones(3, 1), torch.ones(4, 1)).item() == 0


@pytest.mark.parametrize("distance", [klom, gaussian_klom, wasserstein])
def test_distances_vmap_over_methods_and_do_not_need_double(distance):
    ours, theirs = normal(3, 12, 5), normal(15, 5, seed=1)
    mapped = vmap(lambda fleet: distance(fleet, theirs))(ours)
    for i in range(3):
        torch.testing.assert_close(mapped[i], distance(ours[i], theirs))
    near = distance(ours[0].float(), theirs.float())
    assert near.dtype == torch.float64
    torch.testing.assert_close(near, mapped[0], rtol=1e-5, atol=1e-6)


def test_floor_of_the_gaussian_twin_is_its_closed_form():
    for n in (8, 32):
        fleet = normal(2 * n, 3000)
        floor = noise_floor(fleet, gaussian_klom, splits=6)
        assert floor.shape == (6, 3000)
        expected = ((n - 1) * (n + 2) / (n * (n - 3)) - 1) / 2
        error = floor.mean(0).std().item() / math.sqrt(3000)
        assert abs(floor.mean().item() - expected) < 4 * error
        assert 4 * error < 0.15 * expected


def test_floor_is_the_distance_of_disjoint_halves():
    fleet = torch.arange(9.0)[:, None].expand(-1, 2).contiguous()
    seen = []

    def watch(first, second):
        seen.append((set(first[:, 0].tolist()), set(second[:, 0].tolist())))
        return first.mean(0) - second.mean(0)

    floor = noise_floor(fleet, watch, splits=5, seed=3)
    assert all(len(a) == len(b) == 4 and not a & b for a, b in seen)
    assert len({frozenset(a) for a, _ in seen}) > 1
    torch.testing.assert_close(noise_floor(fleet, watch, splits=5, seed=3), floor)
    assert not torch.equal(noise_floor(fleet, watch, splits=5, seed=4), floor)


def test_klom_floor_is_not_zero_and_falls_with_the_fleet():
    floors = [noise_floor(4 * normal(2 * n, 60), klom, splits=4).mean().item() for n in (16, 64, 256)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2] > 0.04


# accuracies and scores made of them -----------------------------------------------------------------------------------


def test_accuracies_are_counts():
    labels, test_labels = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 0, 1])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 0, 1]]), 3).double()
    tests = torch.nn.functional.one_hot(torch.tensor([[2, 2, 0, 0], [0, 0, 1, 1]]), 3).double()
    forget = torch.tensor([[True, True, False, False, False], [False, True, True, True, False]])
    got = accuracies(logits, labels, forget, tests, test_labels)
    assert got.ua.tolist() == pytest.approx([0.0, 2 / 3])
    assert got.ra.tolist() == pytest.approx([1.0, 1.0])
    assert got.ta.tolist() == pytest.approx([0.75, 0.25])
    shared = accuracies(logits, labels, forget[0], tests, test_labels)
    assert shared.ua.tolist() == pytest.approx([0.0, 0.5])
    assert shared.ra.tolist() == pytest.approx([1.0, 2 / 3])
    assert [float(value) for value in got.mean()] == pytest.approx([1 / 3, 1.0, 0.5])
    mapped = vmap(lambda z, f, t: accuracies(z, labels, f, t, test_labels))(logits, forget, tests)
    torch.testing.assert_close(mapped, got)


def test_aus_of_the_original_of_the_perfect_and_by_hand():
    for forget in (0.0, 0.4, 1.0):
        assert aus(forget, 0.83, 0.83, removed_class=True).item() == pytest.approx(1 / (1 + forget))
    assert aus(0.83, 0.83, 0.83).item() == 1
    assert aus(0.95, 0.8, 0.9).item() == pytest.approx(0.9 / 1.15)
    assert aus(0.65, 0.8, 0.9).item() == pytest.approx(0.9 / 1.15)
    assert aus(0.1, 0.8, 0.9, removed_class=True).item() == pytest.approx(0.9 / 1.1)
    assert aus(0.8, 0.8, 0.7).item() == pytest.approx(1.1)  # a gain in test accuracy counts
    values = aus(torch.tensor([0.5, 0.8]), torch.tensor([0.8, 0.8]), 0.8)
    assert values.tolist() == pytest.approx([1 / 1.3, 1.0], rel=1e-6)


def test_tow_is_one_for_the_oracle_and_a_product():
    oracle = Accuracies(*(torch.tensor(v, dtype=torch.float64) for v in ([0.1, 0.2], [1.0, 0.9], [0.9, 0.8])))
    assert tow(oracle, oracle).tolist() == [1.0, 1.0]
    worse = Accuracies(oracle.ua + 0.3, oracle.ra - 0.2, oracle.ta - 0.1)
    expected = torch.full((2,), 0.7 * 0.8 * 0.9, dtype=torch.float64)
    torch.testing.assert_close(tow(worse, oracle), expected)
    torch.testing.assert_close(tow(oracle, worse), expected)
    against_mean = tow(oracle, oracle.mean())
    torch.testing.assert_close(against_mean, torch.full((2,), 0.95**3, dtype=torch.float64))


# relearning and time --------------------------------------------------------------------------------------------------


def test_relearn_steps():
    losses = torch.tensor([[3.0, 2.0, 1.0, 0.5], [0.4, 2.0, 0.3, 0.1], [3.0, 3.0, 3.0, math.nan], [3.0, 1.0, 2.0, 1.0]])
    assert relearn_steps(losses, 1.0).tolist() == [2.0, 0.0, math.inf, 1.0]
    assert relearn_steps(losses, torch.tensor([0.5, 0.3, 3.0, 0.2])).tolist() == [3.0, 2.0, 0.0, math.inf]
    torch.testing.assert_close(vmap(lambda curve: relearn_steps(curve, 1.0))(losses), relearn_steps(losses, 1.0))
    oracle = torch.arange(10.0, 49.0)
    assert inside_band(relearn_steps(losses, 1.0), oracle).tolist() == [False] * 4  # sooner than the oracle, or never
    decay = 2.0 * 0.9 ** torch.arange(60.0)
    assert relearn_steps(decay, 0.5).item() == math.ceil(math.log(0.25) / math.log(0.9))


def test_run_time_efficiency():
    assert run_time_efficiency(2.0, 30.0) == 15
    torch.testing.assert_close(run_time_efficiency(torch.tensor([10.0, 60.0]), 30.0), torch.tensor([3.0, 0.5]))
    with pytest.raises(ValueError, match="unlearning: expected a number greater than 0"):
        run_time_efficiency(0.0, 3.0)


def test_real_fleets_pass_when_retrained_and_fail_when_nothing_was_forgotten():
    """Noise labels: what a model knows of them it has memorised. Forget 20 of 60 examples."""
    x, y = normal(100, 8, dtype=torch.float32), torch.randint(3, (100,), generator=torch.Generator().manual_seed(4))
    forget = torch.arange(60) < 20

    def fleet(members, subset, seed):
        data = {"x": x[:60], "y": y[:60]}
        subsets = subset.expand(members, -1)

        def loss(model, batch, hyper):
            return torch.nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")

        options = {"optimiser": Adam(0.02), "batch": 20, "steps": 60, "subsets": subsets, "seed": seed}
        return train(lambda: MLP(8, (16,), 3), loss, data, **options, device="cpu", progress=False).logits(x)

    oracle, retrained = fleet(79, ~forget, 0), fleet(100, ~forget, 1)
    original = fleet(60, torch.ones(60, dtype=torch.bool), 2)
    forgotten = [accuracies(z[:, :60], y[:60], forget, z[:, 60:], y[60:]).ua for z in (oracle, retrained, original)]
    areas = [
        population_attack(membership_scores(z, y), torch.arange(100) < 20, torch.arange(100) >= 60).auc
        for z in (oracle, retrained, original)
    ]
    for table in (forgotten, areas):
        assert inside_band(table[1], table[0]).double().mean().item() >= 0.88  # .95, with 3 standard errors off
        assert inside_band(table[2], table[0]).double().mean().item() < 0.1
    assert beyond_band(areas[2], areas[0]).mean() > 0.05
    assert beyond_band(forgotten[2], forgotten[0]).mean() < -0.05
    of_oracle, of_retrained, of_original = (margins(z[:, :20], y[:20]) for z in (oracle, retrained, original))
    assert u_lira(of_retrained, of_oracle).auc.mean().item() == pytest.approx(0.5, abs=0.03)
    assert u_lira(of_original, of_oracle).auc.mean() > areas[2].mean() + 0.05
    for distance in (klom, gaussian_klom, wasserstein):
        near, far = distance(of_retrained[:39], of_oracle[:39]), distance(of_original[:39], of_oracle[:39])
        floor = noise_floor(of_oracle, distance).mean()
        assert abs(near.mean() / floor - 1) < 0.4
        assert far.mean() > 3 * floor


def test_bad_input_is_named():
    fleet = normal(40, 3)
    with pytest.raises(ValueError, match=r"oracle: expected at least 39 retrained models for a level of 0.95, got 38"):
        oracle_band(fleet[:38])
    with pytest.raises(ValueError, match=r"oracle: expected at least 19 retrained models for a level of 0.9, got 5"):
        inside_band(fleet[:, 0], fleet[:5, 0], 0.9)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1"):
        oracle_band(fleet, 95.0)
    with pytest.raises(ValueError, match=r"values: expected last dimensions \(3,\)"):
        beyond_band(fleet[:, :2], fleet)
    with pytest.raises(ValueError, match="oracle: expected values that are not NaN"):
        inside_band(fleet, fleet * math.nan)
    with pytest.raises(ValueError, match="unlearned: expected at least 1 models, got 0"):
        klom(fleet[:0], fleet)
    with pytest.raises(ValueError, match="oracle: expected at least 2 models, got 1"):
        gaussian_klom(fleet, fleet[:1])
    with pytest.raises(ValueError, match="oracle: expected at least 4 models"):
        noise_floor(fleet[:3])
    with pytest.raises(ValueError, match="clip"):
        klom(fleet, fleet, clip=0.0)
    with pytest.raises(ValueError, match="forget: expected a number from 0 to 1, got 93"):
        aus(93.0, 0.9, 0.9)
    perfect = Accuracies(*(torch.ones(2) for _ in range(3)))
    with pytest.raises(ValueError, match="ua: expected a number from 0 to 1"):
        tow(Accuracies(100 * torch.ones(2), torch.ones(2), torch.ones(2)), perfect)
    with pytest.raises(ValueError, match="losses: expected at least one step"):
        relearn_steps(torch.zeros(3, 0), 1.0)
    labels = torch.zeros(4, dtype=torch.int64)
    for forget in (torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="forget: expected at least one example inside and one outside"):
            accuracies(torch.zeros(2, 4, 3), labels, forget, torch.zeros(2, 4, 3), labels)
