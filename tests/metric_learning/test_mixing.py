"""Metrix: mixtures, their pairs and losses against loops, pytorch-metric-learning and the beta law."""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as peers
from scipy import stats
from torch.func import grad, vmap

from toolkit import fleet, random
from toolkit.metric_learning.common import pair_masks
from toolkit.metric_learning.mixing import Pairs, metrix_contrastive, metrix_multi_similarity, mix, utilisation
from toolkit.metric_learning.similarities import cosine, euclidean, precomputed, snr
from toolkit.models import MLP

Kind = Literal["positive", "anchor", "either"]
KINDS: tuple[Kind, ...] = ("positive", "anchor", "either")


def sample(size=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (size,), generator=generator)


def sources(labels, seed, share=0.25):
    """Share and partner of each example, read off mixtures of one-hot rows."""
    rows = torch.eye(len(labels), dtype=torch.float64)
    mixed, _ = mix(rows, labels, random.key(seed), "positive", share)
    return mixed, (mixed - share * rows).argmax(-1)


def test_mixtures_are_of_two_classes():
    _, labels = sample(40)
    mixed, partner = sources(labels, 0)
    rows = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(mixed, 0.25 * rows + 0.75 * rows[partner])
    assert (labels != labels[partner]).all()
    assert (partner != sources(labels, 1)[1]).float().mean() > 0.8
    images = torch.arange(40 * 6, dtype=torch.float32).reshape(40, 2, 3)
    shaped, _ = mix(images, labels, random.key(0), "anchor", 0.25)
    torch.testing.assert_close(shaped, 0.25 * images + 0.75 * images[partner])


def test_partners_are_drawn_evenly_from_the_other_classes():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    partners = torch.stack([sources(labels, seed)[1] for seed in range(600)])
    for i in range(6):
        counts = partners[:, i].bincount(minlength=6)[labels != labels[i]]
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    first, second = partners[:, 0], partners[:, 1]
    table = torch.zeros(4, 4).index_put((first - 2, second - 2), torch.ones(600), accumulate=True)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_shares_follow_beta_2_2_and_the_kinds_alternate():
    labels, x = torch.tensor([0, 1]), torch.eye(2, dtype=torch.float64)
    keys = torch.stack([random.key(seed) for seed in range(3000)])
    mixed, pairs = vmap(lambda key: mix(x, labels, key))(keys)
    share = mixed[:, 0, 0]
    torch.testing.assert_close(mixed[:, 1, 1], share)  # one share for the batch
    assert stats.kstest(share.numpy(), stats.beta(2, 2).cdf).pvalue > 0.01
    anchored = (pairs.pull + pairs.push).sum((1, 2)) > 0  # a batch of two has no other positives
    assert anchored.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(3000))
    assert abs(torch.corrcoef(torch.stack([share, anchored.double()]))[0, 1]) < 0.08
    torch.testing.assert_close(pairs.pull[anchored][:, 0, 0], share[anchored])
    torch.testing.assert_close(pairs.push[anchored][:, 0, 1], share[anchored])  # the other's mixture: 1 - share of mine


@pytest.mark.parametrize("kind", ["positive", "anchor"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_pairs_are_the_loop(kind, share):
    _, labels = sample()
    partner = sources(labels, 4)[1]
    _, pairs = mix(torch.eye(10, dtype=torch.float64), labels, random.key(4), kind, share)
    for a in range(10):
        for v in range(10):
            pull = push = 0.0
            for source, part in ((v, share), (int(partner[v]), 1 - share)):
                positive = source == a if kind == "anchor" else source != a and labels[source] == labels[a]
                if positive:
                    pull, push = pull + part, push + 1 - part
            assert pairs.pull[a, v].item() == pytest.approx(pull, abs=1e-15)
            assert pairs.push[a, v].item() == pytest.approx(push, abs=1e-15)
    total = pairs.pull + pairs.push
    assert set(total.unique().tolist()) == {0.0, 1.0}


def test_mix_depends_on_its_key_alone_and_vmaps():
    x, labels = sample()
    keys = torch.stack([random.key(seed) for seed in range(4)])
    together, tables = vmap(mix, in_dims=(None, None, 0))(x, labels, keys)
    for member in range(4):
        mixed, pairs = mix(x, labels, random.key(member))
        torch.testing.assert_close(together[member], mixed)
        torch.testing.assert_close(tables.pull[member], pairs.pull)
        torch.testing.assert_close(tables.push[member], pairs.push)
    shares = torch.tensor([0.2, 0.9], dtype=torch.float64)
    mixed = vmap(lambda share: mix(x, labels, keys[0], "anchor", share)[0])(shares)
    torch.testing.assert_close(mixed[1], mix(x, labels, keys[0], "anchor", 0.9)[0])


LOSSES: dict[str, Any] = {
    "contrastive": metrix_contrastive,
    "multi_similarity": metrix_multi_similarity,
    "contrastive, euclidean": lambda x, y, v, p, w=0.4: metrix_contrastive(x, y, v, p, w, 2.5, euclidean),
    "multi_similarity, snr": lambda x, y, v, p, w=0.4: metrix_multi_similarity(x, y, v, p, w, 2, 4, 1.5, snr),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def generic(table, pull, push, form):
    """τ(σ⁺(Σ pull ρ⁺) + σ⁻(Σ push ρ⁻)) anchor by anchor, with τ = identity; ``form`` is (σ⁺, ρ⁺, σ⁻, ρ⁻)."""
    sigma_pull, rho_pull, sigma_push, rho_push = form
    values = []
    for row, y, rest in zip(table.tolist(), pull.tolist(), push.tolist(), strict=True):
        together = sum(w * rho_pull(s) for w, s in zip(y, row, strict=True) if w)
        apart = sum(w * rho_push(s) for w, s in zip(rest, row, strict=True) if w)
        values.append(sigma_pull(together) + sigma_push(apart))
    return torch.tensor(values, dtype=torch.float64)


FORMS: dict[str, Any] = {
    "contrastive": (cosine, (lambda x: x, lambda s: -s, lambda x: x, lambda s: max(s - 0.5, 0.0))),
    "multi_similarity": (
        cosine,
        (
            lambda x: math.log1p(x) / 2,
            lambda s: math.exp(-2 * (s - 0.5)),
            lambda x: math.log1p(x) / 50,
            lambda s: math.exp(50 * (s - 0.5)),
        ),
    ),
    "contrastive, euclidean": (euclidean, (lambda x: x, lambda d: d, lambda x: x, lambda d: max(2.5 - d, 0.0))),
    "multi_similarity, snr": (
        snr,
        (
            lambda x: math.log1p(x) / 2,
            lambda d: math.exp(2 * (d - 1.5)),
            lambda x: math.log1p(x) / 4,
            lambda d: math.exp(4 * (1.5 - d)),
        ),
    ),
}


@every_loss
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_generic_form(name, kind):
    x, labels = sample()
    similarity, form = FORMS[name]
    mixed, pairs = mix(x, labels, random.key(3), kind)
    assert pairs.pull.max() > 0
    positives, negatives = (mask.double() for mask in pair_masks(labels))
    expected = generic(similarity(x), positives, negatives, form)
    torch.testing.assert_close(LOSSES[name](x, labels, mixed, pairs, 0.0), expected, rtol=1e-7, atol=1e-9)
    expected = expected + 0.7 * generic(similarity(x, mixed), *pairs, form)
    torch.testing.assert_close(LOSSES[name](x, labels, mixed, pairs, 0.7), expected, rtol=1e-7, atol=1e-9)


@every_loss
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_unmixed_mixtures_leave_the_unmixed_terms(name, share):
    """λ = 1 or 0: each mixture is one of its sources, and a whole positive or a whole negative."""
    x, labels = sample()
    similarity, form = FORMS[name]
    mixed, pairs = mix(x, labels, random.key(5), "positive", share)
    partner = sources(labels, 5)[1]
    source, other = (torch.arange(10), partner) if share == 1 else (partner, torch.arange(10))
    torch.testing.assert_close(mixed, x[source])
    positives = pair_masks(labels)[0].double()
    assert (pairs.pull == positives[:, source]).all()
    assert (pairs.push == positives[:, other]).all()
    extra = LOSSES[name](x, labels, mixed, pairs, 1.0) - LOSSES[name](x, labels, mixed, pairs, 0.0)
    expected = generic(similarity(x)[:, source], positives[:, source], positives[:, other], form)
    torch.testing.assert_close(extra, expected, rtol=1e-7, atol=1e-9)
    anchored, own = mix(x, labels, random.key(5), "anchor", 1.0)
    assert (own.pull == torch.eye(10)).all()
    assert (own.push == torch.eye(10)[:, partner]).all()
    torch.testing.assert_close(anchored, x)


def test_plain_terms_are_pytorch_metric_learnings():
    x, labels = sample(16)
    mixed, pairs = mix(x, labels, random.key(0))
    peer = peers.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    plain = distances.LpDistance(normalize_embeddings=False)
    summed = peers.ContrastiveLoss(pos_margin=0, neg_margin=2.5, distance=plain, reducer=reducers.SumReducer())
    cases = (
        (peer, lambda x: metrix_multi_similarity(x, labels, mixed, pairs, 0).mean()),
        (summed, lambda x: metrix_contrastive(x, labels, mixed, pairs, 0, 2.5, euclidean).sum()),
    )
    for theirs, ours in cases:
        one, other = (x.clone().requires_grad_() for _ in range(2))
        value, expected = ours(one), theirs(other, labels)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        slopes = [torch.autograd.grad(loss, at)[0] for loss, at in ((value, one), (expected, other))]
        torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-9)


@every_loss
def test_vmap_and_vmap_of_grad_are_the_loop(name):
    loss = LOSSES[name]
    x, labels = (torch.stack(parts) for parts in zip(*(sample(seed=seed) for seed in range(3)), strict=True))
    keys = torch.stack([random.key(seed) for seed in range(3)])
    weights = torch.tensor([0.0, 0.4, 2.0], dtype=torch.float64)

    def full(x, y, key, weight):
        return loss(x, y, *mix(x, y, key), weight)

    together = vmap(full)(x, labels, keys, weights)
    slopes = vmap(grad(lambda *given: full(*given).mean()))(x, labels, keys, weights)
    for member in range(3):
        one = x[member].clone().requires_grad_()
        value = full(one, labels[member], keys[member], weights[member].item())
        torch.testing.assert_close(together[member], value.detach(), rtol=1e-10, atol=1e-12)
        (expected,) = torch.autograd.grad(value.mean(), one)
        torch.testing.assert_close(slopes[member], expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-3


def test_precomputed_gives_the_weight_of_each_pair():
    """Of the multi-similarity loss: −α-weights of positives and β-weights of negatives, scaled by w y and w (1 − y)."""
    x, labels = sample()
    mixed, pairs = mix(x, labels, random.key(2), "positive", 0.3)
    table, mixtures = cosine(x).requires_grad_(), cosine(x, mixed).requires_grad_()
    value = metrix_multi_similarity(table, labels, mixtures, pairs, 0.4, similarity=precomputed)
    torch.testing.assert_close(value, metrix_multi_similarity(x, labels, mixed, pairs, 0.4))
    weight, mixed_weight = torch.autograd.grad(value.sum(), (table, mixtures))
    positives, negatives = (mask.double() for mask in pair_masks(labels))
    for found, s, pull, push, w in (
        (weight, table.detach(), positives, negatives, 1.0),
        (mixed_weight, mixtures.detach(), pairs.pull, pairs.push, 0.4),
    ):
        near, far = pull * (-2 * (s - 0.5)).exp(), push * (50 * (s - 0.5)).exp()
        expected = far / (1 + far.sum(-1, keepdim=True)) - near / (1 + near.sum(-1, keepdim=True))
        torch.testing.assert_close(found, w * expected, rtol=1e-8, atol=1e-12)
    hinge = metrix_contrastive(table, labels, mixtures, pairs, 0.4, 0.2, precomputed)
    weight, mixed_weight = torch.autograd.grad(hinge.sum(), (table, mixtures))
    torch.testing.assert_close(weight, negatives * (table.detach() > 0.2) - positives)
    torch.testing.assert_close(mixed_weight, 0.4 * (pairs.push * (mixtures.detach() > 0.2) - pairs.pull))


@every_loss
@pytest.mark.parametrize("kind", KINDS)
def test_bad_batches_have_finite_values_and_gradients(name, kind):
    x, labels = sample(dtype=torch.float32)
    batches = {
        "one class": (x, torch.zeros_like(labels)),
        "all classes": (x, torch.arange(10)),
        "one example": (x[:1], labels[:1]),
        "all equal": (x[:1].expand(10, 4), labels),
        "zeros": (0 * x, labels),
        "long": (100 * x if name == "multi_similarity, snr" else 1e3 * x, labels),
    }
    for problem, (rows, given) in batches.items():
        one = rows.detach().clone().requires_grad_()
        mixed, pairs = mix(one, given, random.key(1), kind)
        value = LOSSES[name](one, given, mixed, pairs)
        (slope,) = torch.autograd.grad(value.mean(), one)
        assert value.shape == given.shape
        assert value.dtype == mixed.dtype == torch.float32
        assert value.isfinite().all(), problem
        assert slope.isfinite().all(), problem
        if problem in ("one class", "one example"):
            assert (pairs.pull + pairs.push).abs().max() == 0
        if problem == "one example":
            assert value.tolist() == [0.0]
            assert slope.abs().max() == 0


def test_bad_arguments_are_refused():
    x, labels = sample()
    mixed, pairs = mix(x, labels, random.key(0))
    bad: dict[str, Any] = {
        "x: expected finite": lambda: mix(x * math.nan, labels, random.key(0)),
        "share: expected": lambda: mix(x, labels, random.key(0), "anchor", 1.5),
        "embeddings: expected finite": lambda: metrix_contrastive(x * math.inf, labels, mixed, pairs),
        "mixed: expected finite": lambda: metrix_contrastive(x, labels, mixed * math.inf, pairs),
        "weight: expected": lambda: metrix_contrastive(x, labels, mixed, pairs, -0.1),
        "pairs: expected two tables of shape": lambda: metrix_contrastive(x, labels, mixed[1:], pairs),
        "alpha: expected": lambda: metrix_multi_similarity(x, labels, mixed, pairs, 0.4, 0.0),
        "beta: expected": lambda: metrix_multi_similarity(x, labels, mixed, pairs, 0.4, 1.0, -1.0),
        "queries: expected finite": lambda: utilisation(x * math.nan, x),
        "queries: expected at least one": lambda: utilisation(x[:0], x),
        "embeddings: expected at least one": lambda: utilisation(x, x[:0]),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    for call in (
        lambda: mix(x, labels[1:], random.key(0)),
        lambda: metrix_contrastive(x, labels[1:], mixed, pairs),
        lambda: metrix_multi_similarity(x, labels[1:], mixed, pairs),
    ):
        with pytest.raises(Exception, match="labels"):
            call()


def test_utilisation_is_the_loop_and_falls_with_more_embeddings():
    x, _ = sample(30)
    queries, examples = sample(2100, 1)[0], x
    expected = torch.cdist(queries, examples, compute_mode="donot_use_mm_for_euclid_dist").square().amin(-1).mean()
    torch.testing.assert_close(utilisation(queries, examples), expected)
    assert utilisation(queries, examples[:10]) > utilisation(queries, examples)
    assert utilisation(examples, examples).item() == pytest.approx(0, abs=1e-12)
    pair = torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    assert utilisation(pair, torch.tensor([[0.0, 1.0], [9.0, 9.0]])).item() == 2.5
    stacked = torch.stack([queries[:5], queries[5:10]])
    torch.testing.assert_close(vmap(utilisation, in_dims=(0, None))(stacked, x)[1], utilisation(stacked[1], x))


def test_all_three_levels_train_in_a_fleet():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(20)
    x = 0.7 * torch.randn(80, 6, generator=generator) + 2 * F.one_hot(labels, 6)

    def loss(level):
        def one(model, batch, hyper):
            z, features = model(batch.x, return_features=True)
            if level == "input":
                mixed, pairs = mix(batch.x, batch.y, batch.key)
                mixed = model(mixed)
            elif level == "feature":
                mixed, pairs = mix(features, batch.y, batch.key)
                mixed = mixed @ model.parameters["head.weight"].mT + model.parameters["head.bias"]
            else:
                mixed, pairs = mix(z, batch.y, batch.key)
            return metrix_multi_similarity(z, batch.y, mixed, pairs, hyper.weight)

        return one

    unmixed = []
    for level in ("input", "feature", "embedding"):
        trained, start = (
            fleet.train(
                lambda: MLP(6, (8,), 3),
                loss(level),
                {"x": x, "y": labels},
                steps=steps,
                batch=16,
                optimiser=fleet.Adam(1e-2),
                hyper={"weight": torch.tensor([0.0, 0.4])},
                streams=torch.tensor([0, 0]),
                progress=False,
            )
            for steps in (80, 0)
        )
        embeddings, before = (one.logits(x) for one in (trained, start))
        no_pairs = Pairs(torch.zeros(80, 80), torch.zeros(80, 80))
        for member in range(2):
            plain = [
                metrix_multi_similarity(z[member], labels, z[member], no_pairs).mean() for z in (embeddings, before)
            ]
            assert plain[0] < 0.95 * plain[1], level
        assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3
        unmixed.append(embeddings[0])
    torch.testing.assert_close(unmixed[0], unmixed[1])  # with weight 0 the level makes no difference
    torch.testing.assert_close(unmixed[0], unmixed[2])
