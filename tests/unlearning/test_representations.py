"""CKA against Gram matrices and its invariances, probes and neighbours against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch.func import vmap

from toolkit.unlearning.representations import (
    Probe,
    forget_gap,
    linear_cka,
    probe_accuracy,
    ridge_probe,
    transfer_accuracy,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


both = pytest.mark.parametrize("unbiased", [False, True])


def related(examples=30, seed=0):
    shared = normal(examples, 4, seed=seed)
    x = torch.cat([shared, normal(examples, 2, seed=seed + 1)], 1) + 3
    y = torch.cat([shared @ normal(4, 4, seed=seed + 2), 2 * normal(examples, 3, seed=seed + 3)], 1) - 1
    return x, y


def test_biased_cka_is_the_ratio_of_centred_gram_matrices():
    x, y = related()
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / (k.norm() * m.norm())
    torch.testing.assert_close(linear_cka(x, y), expected, rtol=1e-12, atol=0)
    raw = (x @ x.T * (y @ y.T)).sum() / ((x @ x.T).norm() * (y @ y.T).norm())
    assert abs(raw - expected) > 0.03  # what leaving out the centring would give


def u_statistic(k, m):
    """HSIC of Song et al. 2012 over all quadruples of different examples, by brute force."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += (k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])).item()
                        count += 1
    return total / count


def test_unbiased_cka_is_the_u_statistic():
    x, y = related(7)
    k, m = x @ x.T, y @ y.T
    expected = u_statistic(k, m) / math.sqrt(u_statistic(k, k) * u_statistic(m, m))
    assert linear_cka(x, y, unbiased=True).item() == pytest.approx(expected, rel=1e-10)


@both
def test_cka_is_invariant_to_rotation_shift_and_scale_only(unbiased):
    x, y = related()
    value = linear_cka(x, y, unbiased=unbiased)
    moved = linear_cka(5 * x @ rotation(6) + 7, -0.1 * y @ rotation(7) - normal(7), unbiased=unbiased)
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(linear_cka(y, x, unbiased=unbiased), value)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(linear_cka(x, 3 * x @ rotation(6) + 1, unbiased=unbiased), one)
    assert linear_cka(x, x * torch.tensor([9.0, 1, 1, 1, 1, 1]).double(), unbiased=unbiased) < 0.9
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear_cka(x[order], y[order], unbiased=unbiased), value)
    assert linear_cka(x[order], y, unbiased=unbiased) < value - 0.2


def test_few_examples_and_many_features_fool_only_the_biased_cka():
    x, y = normal(20, 40, 400), normal(20, 40, 400, seed=1)
    assert linear_cka(x, y).mean() > 0.85
    unrelated = linear_cka(x, y, unbiased=True)
    assert abs(unrelated.mean()) < 4 * unrelated.std() / math.sqrt(20)
    assert unrelated.abs().max() < 0.3
    assert linear_cka(normal(2000, 3), normal(2000, 3, seed=1)) < 0.01


@both
def test_cka_of_members(unbiased):
    x, y = normal(3, 12, 5), normal(3, 12, 4, seed=1)
    together = linear_cka(x, y, unbiased=unbiased)
    alone = torch.stack([linear_cka(a, b, unbiased=unbiased) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(vmap(lambda a, b: linear_cka(a, b, unbiased=unbiased))(x, y), alone)
    every_pair = linear_cka(x[:, None], y[None], unbiased=unbiased)
    assert every_pair.shape == (3, 3)
    torch.testing.assert_close(every_pair.diagonal(), alone)
    near = linear_cka(x.float() + 1000, y.float(), unbiased=unbiased)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, alone.float(), rtol=1e-3, atol=1e-4)
    assert math.isnan(linear_cka(torch.ones(12, 2), y[0].float(), unbiased=unbiased).item())


def classes_of(features, count, seed=5):
    return (features @ normal(features.shape[-1], count, seed=seed)).argmax(-1)


def test_ridge_probe_is_scikit_learn():
    features = 2 * normal(50, 6) + 4
    labels = classes_of(features - 4, 3)
    for penalty in (1e-3, 0.5):
        probe = ridge_probe(features, labels, 3, penalty)
        variance = features.var(0, unbiased=False).mean().item()
        peer = Ridge(alpha=penalty * variance * 50).fit(features.numpy(), np.eye(3)[labels.numpy()])
        np.testing.assert_allclose(probe.weights, peer.coef_.T, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(probe.bias, peer.intercept_, rtol=1e-9)
        predicted = peer.predict(features.numpy()).argmax(1)
        assert probe_accuracy(probe, features, labels).item() == (predicted == labels.numpy()).mean()


def test_ridge_probe_is_a_stationary_point_of_its_objective():
    features, labels = normal(40, 5) + 1, classes_of(normal(40, 5), 3)
    penalty = 0.2
    probe = ridge_probe(features, labels, 3, penalty)
    weights, bias = probe.weights.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    targets = torch.eye(3, dtype=torch.float64)[labels]
    variance = features.var(0, unbiased=False).mean()
    loss = ((targets - features @ weights - bias) ** 2).sum(1).mean() + penalty * variance * (weights**2).sum()
    slopes = torch.autograd.grad(loss, (weights, bias))
    assert max(slope.abs().max().item() for slope in slopes) < 1e-13


def test_predictions_do_not_depend_on_rotation_shift_and_scale():
    features = normal(60, 5) * torch.tensor([1.0, 1, 2, 2, 5]).double()
    labels = classes_of(features, 4)
    scores = ridge_probe(features, labels, 4, 0.1).scores(features)
    moved = 30 * features @ rotation(5) + 8
    torch.testing.assert_close(ridge_probe(moved, labels, 4, 0.1).scores(moved), scores)


def test_probes_of_members():
    features, labels = normal(3, 40, 5), classes_of(normal(40, 5), 3)
    penalties = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64)
    probe = ridge_probe(features, labels, 3, penalties)
    fresh, fresh_labels = normal(3, 25, 5, seed=9), classes_of(normal(25, 5, seed=9), 3)
    accuracy = probe_accuracy(probe, fresh, fresh_labels)
    for i in range(3):
        alone = ridge_probe(features[i], labels, 3, penalties[i].item())
        torch.testing.assert_close(probe.weights[i], alone.weights)
        torch.testing.assert_close(probe.bias[i], alone.bias)
        torch.testing.assert_close(accuracy[i], probe_accuracy(alone, fresh[i], fresh_labels))
    mapped = vmap(lambda h, v: probe_accuracy(Probe(*ridge_probe(h, labels, 3)), v, fresh_labels))(features, fresh)
    torch.testing.assert_close(mapped, probe_accuracy(ridge_probe(features, labels, 3), fresh, fresh_labels))


def test_a_rotated_feature_is_hidden_from_no_probe_and_a_dead_one_gives_the_shares():
    features = normal(200, 6)
    labels = classes_of(features, 3)
    hidden = features @ rotation(6)  # a head that was fitted to the features reads nothing from these
    head = ridge_probe(features, labels, 3)
    assert probe_accuracy(head, hidden, labels) < 0.6
    assert probe_accuracy(ridge_probe(hidden, labels, 3), hidden, labels) == probe_accuracy(head, features, labels)
    dead = ridge_probe(torch.ones(200, 4), labels, 3)
    torch.testing.assert_close(dead.scores(torch.ones(1, 4))[0], torch.bincount(labels, minlength=3) / 200)
    more = ridge_probe(normal(5, 30), torch.tensor([0, 1, 2, 0, 1]), 3)  # more features than examples
    assert bool(more.weights.isfinite().all())


@pytest.mark.parametrize("neighbours", [1, 5])
def test_transfer_is_scikit_learn_where_no_vote_is_tied(neighbours):
    train, test = normal(2, 60, 4), normal(2, 200, 4, seed=1)
    names = torch.tensor([3, 8, 9])
    labels, test_labels = names[classes_of(train[0], 3)], names[classes_of(test[0], 3)]
    for i in range(2):
        peer = KNeighborsClassifier(neighbours, metric="cosine").fit(train[i].numpy(), labels.numpy())
        shares = np.sort(peer.predict_proba(test[i].numpy()), 1)
        clear = torch.from_numpy(shares[:, -1] > shares[:, -2] + 1e-9)
        expected = (peer.predict(test[i][clear].numpy()) == test_labels[clear].numpy()).mean()
        got = transfer_accuracy(train[i], labels, test[i][clear], test_labels[clear], neighbours=neighbours)
        assert got.item() == pytest.approx(expected, abs=1e-14)
    together = transfer_accuracy(train, labels, test, test_labels, neighbours=neighbours)
    alone = [
        transfer_accuracy(a, labels, b, test_labels, neighbours=neighbours) for a, b in zip(train, test, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


def test_tied_votes_go_to_the_nearer_class_and_majorities_stand():
    angles = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.5])
    train = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [9.0], [2.0], [5.0], [0.1]])
    test = torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([7, 7, 2, 2, 2])  # by angle: 7 2 2 7 2

    def predicted(neighbours):
        return [
            name
            for name in (2, 7)
            if transfer_accuracy(train, labels, test, torch.tensor([name]), neighbours=neighbours) == 1
        ]

    assert [predicted(k) for k in (1, 2, 3, 4, 5)] == [[7], [7], [2], [7], [2]]


def test_forget_gap():
    gaps = forget_gap(torch.tensor([0.9, 0.9, 0.9]), torch.tensor([0.9, 0.1, 0.5]), 0.1)
    assert gaps.tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-6)
    assert float(forget_gap(0.9, 0.02, 0.1)) == pytest.approx(1.1)


def test_bad_input_is_named():
    x, labels = normal(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match="x: expected at least 4 examples, got 3"):
        linear_cka(x[:3], x[:3], unbiased=True)
    with pytest.raises(ValueError, match="y: expected finite values"):
        linear_cka(x, x / 0)
    with pytest.raises(ValueError, match="labels: expected class indices from 0 to 1"):
        ridge_probe(x, labels, 2)
    with pytest.raises(ValueError, match="penalty: expected"):
        ridge_probe(x, labels, 3, 0.0)
    with pytest.raises(ValueError, match="labels: expected at least one example"):
        ridge_probe(x[:0], labels[:0], 3)
    with pytest.raises(ValueError, match="labels: expected class indices from 0 to 2"):
        probe_accuracy(ridge_probe(x, labels, 3), x, labels + 1)
    with pytest.raises(ValueError, match="neighbours: expected a number from 1 to 6, got 7"):
        transfer_accuracy(x, labels, x, labels, neighbours=7)
    with pytest.raises(ValueError, match="test_features: expected finite values"):
        transfer_accuracy(x, labels, x * math.nan, labels)
    with pytest.raises(ValueError, match=r"chance: expected a number in \[0, 1\)"):
        forget_gap(0.9, 0.5, 10.0)
