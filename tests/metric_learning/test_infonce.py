"""Contrastive losses against loops over pairs, pytorch-metric-learning, and the papers' own identities."""

import math
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from pytorch_metric_learning import distances, losses
from torch.func import grad, vmap

from toolkit import random
from toolkit.fleet import Adam, train
from toolkit.metric_learning.infonce import (
    MultiHead,
    adaptive_multi_head,
    hard_contrastive,
    hopfield,
    info_loob,
    look,
    mw,
    nt_xent,
    simple_contrastive,
    sup_con,
)
from toolkit.metric_learning.pooled import pooled_softplus
from toolkit.metric_learning.similarities import cosine, euclidean, normalise, precomputed, snr
from toolkit.metric_learning.transformation import (
    extrapolated_positives,
    feature_transformed,
    interpolated_negatives,
)
from toolkit.models import MLP

CLASSED = torch.tensor([0, 1, 2, 0, 1, 0, 3, 1, 2, 0])  # class 3 has one example
PAIRED = torch.arange(5).repeat(2)
KEY = random.key(3)


def sample(size=10, dim=4, seed=0, dtype=torch.float64):
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def multi_head(x, labels, beta, similarity=cosine):
    """Two heads and temperatures, all made from ``x``."""
    heads = torch.stack([x, x.flip(-1) + 0.3 * x.square()], 1)
    tau = 0.2 + torch.stack([torch.sigmoid(x @ x.mT), torch.sigmoid(x @ x.mT - x[:, :1])])
    return adaptive_multi_head(heads, labels, tau, beta, similarity)


# name: (loss of embeddings, labels and one hyper-parameter, two values of it)
LOSSES: dict[str, tuple[Any, tuple[float, float]]] = {
    "nt_xent": (nt_xent, (0.1, 0.5)),
    "sup_con": (sup_con, (0.1, 0.5)),
    "hard_contrastive": (lambda x, y, h, **o: hard_contrastive(x, y, h, 0.4, **o), (0.1, 0.5)),
    "hard_share": (lambda x, y, h, **o: hard_contrastive(x, y, 0.3, h, **o), (0.2, 0.7)),
    "simple_contrastive": (lambda x, y, h, **o: simple_contrastive(x, y, h, 0.5, **o), (0.5, 1.0)),
    "mw": (mw, (0.1, 0.5)),
    "info_loob": (info_loob, (0.1, 0.5)),
    "cloob": (lambda x, y, h, **o: info_loob(x, y, 0.3, h, **o), (2.0, 8.0)),
    "look": (lambda x, y, h, **o: look(x, y, 3, h, **o), (0.1, 0.5)),
    "multi_head": (multi_head, (0.1, 0.5)),
    "feature_transformed": (lambda x, y, h, **o: feature_transformed(x, y, KEY, h, **o), (0.1, 0.5)),
    "feature_share": (lambda x, y, h, **o: feature_transformed(x, y, KEY, 0.3, h, 0.4, **o), (1.2, 1.9)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
PER_TABLE = [name for name in LOSSES if name not in ("cloob", "multi_head")]


@every_loss
@pytest.mark.parametrize("labels", [CLASSED, PAIRED], ids=["classes", "pairs"])
def test_gradients_match_finite_differences(name, labels):
    loss, hypers = LOSSES[name]
    x = sample().requires_grad_()
    for hyper in hypers:
        assert loss(x, labels, hyper).shape == labels.shape
        assert torch.autograd.gradcheck(lambda z, hyper=hyper: loss(z, labels, hyper), (x,), atol=1e-6, fast_mode=True)
        (slope,) = torch.autograd.grad(loss(x, labels, hyper).mean(), x)
        assert slope.abs().max() > 1e-3


@every_loss
def test_vmap_and_vmap_of_grad_are_the_loop(name):
    loss, hypers = LOSSES[name]
    x = torch.stack([sample(seed=seed) for seed in range(2)])
    labels = torch.stack([CLASSED, CLASSED[torch.randperm(10, generator=torch.Generator().manual_seed(1))]])
    hyper = torch.tensor(hypers, dtype=torch.float64)
    together = vmap(loss)(x, labels, hyper)
    slopes = vmap(grad(lambda z, y, h: loss(z, y, h).mean()))(x, labels, hyper)
    for member in range(2):
        one = x[member].clone().requires_grad_()
        value = loss(one, labels[member], hypers[member])
        torch.testing.assert_close(together[member], value.detach(), rtol=1e-11, atol=1e-12)
        (expected,) = torch.autograd.grad(value.mean(), one)
        torch.testing.assert_close(slopes[member], expected, rtol=1e-9, atol=1e-11)


BATCHES = {
    "one class": (sample(6), torch.zeros(6, dtype=torch.long)),
    "no positives": (sample(6), torch.arange(6)),
    "one example": (sample(1), torch.tensor([4])),
    "duplicates": (sample(3).repeat(2, 1), torch.tensor([0, 0, 1, 0, 1, 1])),
    "zero rows": (sample(6) * torch.tensor([1, 0, 0, 1, 1, 0])[:, None], torch.tensor([0, 0, 1, 1, 2, 2])),
    "all equal": (torch.ones(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])),
    "far": (1e4 * sample(6), torch.tensor([0, 0, 1, 1, 2, 2])),
}


@every_loss
@pytest.mark.parametrize("batch", BATCHES)
def test_bad_batches_give_finite_values_and_gradients(name, batch):
    loss, hypers = LOSSES[name]
    x, labels = BATCHES[batch]
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        for hyper in hypers:
            values = loss(given, labels, hyper)
            (slope,) = torch.autograd.grad(values.mean(), given)
            assert values.dtype == dtype
            assert values.isfinite().all()
            assert slope.isfinite().all()
            empty = batch in ("no positives", "one example") or (batch == "one class" and name not in ("sup_con",))
            if empty and name != "multi_head":
                assert values.abs().max() == 0
                assert slope.abs().max() == 0


@every_loss
def test_bad_input_is_refused(name):
    loss, hypers = LOSSES[name]
    x = sample()
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match=r"(embeddings|temperatures): expected"):
            loss(broken, CLASSED, hypers[0])
    with pytest.raises(TypeCheckError):
        loss(x, CLASSED[:-1], hypers[0])
    with pytest.raises(ValueError, match="expected"):
        loss(x, CLASSED, -1.0)


@every_loss
def test_values_in_single_precision_and_any_order_of_the_batch(name):
    loss, hypers = LOSSES[name]
    x = sample()
    values = loss(x, CLASSED, hypers[1])
    torch.testing.assert_close(loss(x.float(), CLASSED, hypers[1]).double(), values, rtol=2e-5, atol=2e-5)
    if not name.startswith(("feature", "cloob")):  # these two look at the order of the batch
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(loss(x[order], CLASSED[order], hypers[1]), values[order])


@pytest.mark.parametrize("name", PER_TABLE)
def test_a_similarity_table_may_stand_in_for_embeddings(name):
    loss, hypers = LOSSES[name]
    x = sample()
    table = cosine(x)
    torch.testing.assert_close(
        loss(table, CLASSED, hypers[0], similarity=precomputed), loss(x, CLASSED, hypers[0]), rtol=1e-12, atol=1e-12
    )


def peer(loss, x, labels):
    x = x.clone().requires_grad_()
    value = loss(x, labels)
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("labels", [CLASSED, PAIRED], ids=["classes", "pairs"])
@pytest.mark.parametrize(("ours", "theirs"), [(nt_xent, losses.NTXentLoss), (sup_con, losses.SupConLoss)])
@pytest.mark.parametrize("temperature", [0.07, 0.6])
def test_value_and_gradient_of_pytorch_metric_learning(ours, theirs, labels, temperature):
    x = sample()
    measures = ((cosine, None), (euclidean, distances.LpDistance(normalize_embeddings=False)))
    for similarity, distance in measures:
        found = peer(lambda z, y, s=similarity: ours(z, y, temperature, s).mean(), x, labels)
        for a, b in zip(found, peer(theirs(temperature=temperature, distance=distance), x, labels), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def pairs_of(labels):
    """(anchor, positive, its negatives) of every positive pair."""
    n = len(labels)
    for i in range(n):
        negatives = [k for k in range(n) if labels[k] != labels[i]]
        for j in range(n):
            if j != i and labels[j] == labels[i]:
                yield i, j, negatives


def per_anchor(labels, value):
    """Sums over the positives of each anchor, scaled as the losses are."""
    totals, count = [torch.zeros((), dtype=torch.float64) for _ in labels], 0
    for i, j, negatives in pairs_of(labels):
        totals[i] = totals[i] + value(i, j, negatives)
        count += 1
    return torch.stack(totals) * len(labels) / count


def nce(s, negatives_s, t):
    return -torch.log((s / t).exp() / ((s / t).exp() + (negatives_s / t).exp().sum()))


@pytest.mark.parametrize("labels", [CLASSED, PAIRED], ids=["classes", "pairs"])
def test_losses_over_pairs_are_their_loops(labels):
    x = sample()
    s = cosine(x)

    def hardest(i, negatives, share):
        return s[i, negatives].sort(descending=True).values[: math.ceil(share * len(negatives))]

    loops = {
        nt_xent(x, labels, 0.3): lambda i, j, n: nce(s[i, j], s[i, n], 0.3),
        hard_contrastive(x, labels, 0.3, 0.4): lambda i, j, n: nce(s[i, j], hardest(i, n, 0.4), 0.3),
        hard_contrastive(x, labels, 0.3, 0.01): lambda i, j, n: nce(s[i, j], s[i, n].max(), 0.3),
        simple_contrastive(x, labels, 0.7): lambda i, j, n: 0.7 * s[i, n].mean() - s[i, j],
        simple_contrastive(x, labels, 0.7, 0.4): lambda i, j, n: 0.7 * hardest(i, n, 0.4).mean() - s[i, j],
        info_loob(x, labels, 0.3): lambda i, j, n: (s[i, n] / 0.3).logsumexp(0) - s[i, j] / 0.3,
        mw(x, labels, 0.3): lambda i, j, n: torch.log1p(((s[labels[:, None] != labels] - s[i, j]) / 0.3).exp()).mean(),
    }
    for values, value in loops.items():
        torch.testing.assert_close(values, per_anchor(labels, value), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(hard_contrastive(x, labels, 0.3, 1.0), nt_xent(x, labels, 0.3))


def test_sup_con_by_hand():
    table = torch.tensor([[9, 2, 1, 0], [2, 9, 0, 0], [1, 0, 9, 3], [0, 0, 3, 9]], dtype=torch.float64)
    values = sup_con(table, torch.tensor([0, 0, 0, 1]), 1.0, precomputed)
    e = math.e
    rows = [math.log(e**2 + e + 1) - 1.5, math.log(e**2 + 2) - 1.0, math.log(e + 1 + e**3) - 0.5, 0.0]
    torch.testing.assert_close(values, torch.tensor(rows, dtype=torch.float64) * 4 / 3)
    one_class = sup_con(torch.ones(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.long), 1.0, precomputed)
    torch.testing.assert_close(one_class, torch.full((3,), math.log(2), dtype=torch.float64))


def test_weights_of_pairs_are_the_softmax():
    table, t = cosine(sample()), 0.2
    weight = grad(lambda s: nt_xent(s, PAIRED, t, precomputed).sum())(table)
    same = PAIRED[:, None] == PAIRED
    p = (table / t).masked_fill(torch.eye(10, dtype=torch.bool), -math.inf).softmax(-1)
    torch.testing.assert_close(weight, torch.where(same, torch.where(p > 0, (p - 1) / t, 0), p / t))
    torch.testing.assert_close(weight.sum(-1), torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)
    entropy = []
    for t in (0.07, 1.0):
        weight = grad(lambda s, t=t: nt_xent(s, PAIRED, t, precomputed).sum())(table).clamp_min(0)
        share = weight / weight.sum(-1, keepdim=True)
        entropy.append(torch.special.entr(share).sum(-1))
    assert (entropy[0] < entropy[1]).all()


def test_limits_of_the_temperature():
    x = sample()
    s, same = cosine(x), PAIRED[:, None] == PAIRED
    top = s.masked_fill(same, -math.inf).amax(-1)
    pulled = s.gather(1, ((torch.arange(10) + 5) % 10)[:, None])[:, 0]
    torch.testing.assert_close(1e-4 * nt_xent(x, PAIRED, 1e-4), (top - pulled).clamp_min(0), rtol=0, atol=1e-8)
    far = 1e5 * (nt_xent(x, PAIRED, 1e5) - math.log(9))
    torch.testing.assert_close(far, 8 / 9 * simple_contrastive(x, PAIRED), rtol=0, atol=1e-5)


def test_info_loob_is_info_nce_without_the_positive():
    x = sample()
    torch.testing.assert_close(nt_xent(x, PAIRED, 0.2), torch.log1p(info_loob(x, PAIRED, 0.2).exp()))
    weight = grad(lambda s: info_loob(s, PAIRED, 0.2, similarity=precomputed).sum())(cosine(x))
    torch.testing.assert_close(weight[0, 5].item(), -1 / 0.2)  # does not saturate
    torch.testing.assert_close(weight.sum(-1), torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)


def test_cloob_compares_within_each_modality():
    x, t, beta = sample(), 0.3, 5.0
    image, text = normalise(x[:5]), normalise(x[5:])

    def retrieve(state, stored):
        found = torch.stack([(beta * stored @ row).softmax(0) @ stored for row in state])
        return found / found.norm(dim=1, keepdim=True)

    def loob(a, b):
        s = a @ b.T / t
        return torch.stack([s[i, [j for j in range(5) if j != i]].logsumexp(0) - s[i, i] for i in range(5)])

    by_image = loob(retrieve(image, image), retrieve(text, image))
    by_text = loob(retrieve(text, text), retrieve(image, text))
    torch.testing.assert_close(info_loob(x, PAIRED, t, beta), torch.cat([by_image, by_text]))
    mixed = torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])  # image and text in turn
    torch.testing.assert_close(info_loob(x[mixed], PAIRED[mixed], t, beta), torch.cat([by_image, by_text])[mixed])


def test_hopfield_averages_or_picks():
    state, stored = normalise(sample(3)), normalise(sample(6, seed=1))
    torch.testing.assert_close(hopfield(stored, stored, 1e4), stored)
    torch.testing.assert_close(hopfield(state, stored, 1e-9), normalise(stored.mean(0)).expand(3, 4))
    keep = torch.tensor([True, False, True, True, False, False])
    torch.testing.assert_close(hopfield(state, stored, 3.0, keep), hopfield(state, stored[keep], 3.0))
    with pytest.raises(ValueError, match="beta: expected"):
        hopfield(state, stored, 0.0)
    with pytest.raises(ValueError, match="similarity: expected one of embeddings"):
        info_loob(cosine(state), torch.tensor([0, 0, 1]), 0.1, 8.0, precomputed)


@pytest.mark.parametrize(("span", "tolerance"), [(0.1, 1e-8), (5.0, 1e-9), (100.0, 1e-7), (200.0, 1e-5)])
def test_pooled_softplus_is_the_double_sum(span, tolerance):
    values = (
        span * torch.rand(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).requires_grad_()
    points = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) < 0.2
    sources = ~points & (torch.rand(20, 20, generator=torch.Generator().manual_seed(2)) < 0.7)
    found = pooled_softplus(values, points, sources)
    pairs = torch.logaddexp(values[sources] - values[..., None], torch.zeros((), dtype=torch.float64))
    expected = torch.where(points, pairs.sum(-1), 0)
    weigh = torch.rand(20, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slopes = [torch.autograd.grad((weigh * table).sum(), values)[0] for table in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=tolerance, atol=tolerance)


def test_mw_bounds_the_comparisons_lost_and_sees_a_shift_between_anchors():
    for seed in range(5):
        s = cosine(sample(seed=seed))
        same = CLASSED[:, None] == CLASSED
        positives, negatives = s[same & ~torch.eye(10, dtype=torch.bool)], s[~same]
        lost = (negatives > positives[:, None]).double().mean()
        assert 0 < lost <= mw(s, CLASSED, 0.1, precomputed).mean() / math.log(2)
        shift = torch.linspace(-3, 3, 10, dtype=torch.float64)[:, None]
        torch.testing.assert_close(nt_xent(s + shift, CLASSED, 0.1, precomputed), nt_xent(s, CLASSED, 0.1, precomputed))
        assert mw(s + shift, CLASSED, 0.1, precomputed).mean() > mw(s, CLASSED, 0.1, precomputed).mean() + 1
    perfect = torch.where(same, 1.0, -1.0)
    torch.testing.assert_close(mw(perfect, CLASSED, 0.5, precomputed).mean().item(), math.log1p(math.exp(-4)))


def test_look_is_its_loop():
    x = sample()
    s = cosine(x)
    for k in (1, 3, 5, 9, 50):
        rows = []
        for i in range(10):
            near = sorted((j for j in range(10) if j != i), key=lambda j: -s[i, j].item())
            own = [j for j in near if CLASSED[j] == CLASSED[i]]
            if not own:
                rows.append(torch.zeros((), dtype=torch.float64))
                continue
            among = set(near[:k]) | {own[0]}
            e = (s[i] / 0.3).exp()
            rows.append(-torch.log(e[[j for j in among if j in own]].sum() / e[list(among)].sum()))
        torch.testing.assert_close(look(x, CLASSED, k, 0.3), torch.stack(rows) * 10 / 9)
    same = (CLASSED[:, None] == CLASSED) & ~torch.eye(10, dtype=torch.bool)
    share = look(x, CLASSED, 9, 1e9)[:6] * 9 / 10
    torch.testing.assert_close(share, -(same.sum(-1)[:6] / 9.0).double().log())
    with pytest.raises(ValueError, match="neighbours: expected"):
        look(x, CLASSED, 0)


def test_look_leaves_two_clusters_of_a_class_apart():
    centres = torch.eye(4, dtype=torch.float64).repeat_interleave(3, 0)
    x = centres + 0.05 * sample(12)
    labels = torch.tensor([0, 1, 0, 1]).repeat_interleave(3)  # two clusters per class
    for loss, still in ((lambda z: look(z, labels, 2, 0.1), True), (lambda z: sup_con(z, labels, 0.1), False)):
        slope = grad(lambda z, loss=loss: loss(z).mean())(x)
        assert (slope.abs().max() == 0) == still
    assert look(x, labels, 2, 0.1).abs().max() == 0


def test_adaptive_multi_head_adds_heads_and_the_spread():
    heads = torch.stack([sample(seed=seed) for seed in range(3)], 1)
    tau = 0.1 + torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.stack([cosine(heads[:, h]) for h in range(3)]) / tau
    pulls = per_anchor(CLASSED, lambda i, j, n: sum(nce(s[h, i, j], s[h, i, n], 1.0) for h in range(3)))
    spread = [
        sum(2 * math.log(t) + 1 / t for h in range(3) for j in range(10) if j != i for t in [tau[h, i, j].item()]) / 9
        for i in range(10)
    ]
    expected = pulls + 0.3 * torch.tensor(spread, dtype=torch.float64)
    torch.testing.assert_close(adaptive_multi_head(heads, CLASSED, tau, 0.3), expected)
    constant = torch.full((3, 10, 10), 0.5, dtype=torch.float64)  # the least spread for d = 4
    slope = grad(lambda t: adaptive_multi_head(torch.zeros_like(heads), CLASSED, t).mean())(constant)
    assert slope.abs().max() < 1e-12
    with pytest.raises(ValueError, match="temperatures: expected values greater than 0"):
        adaptive_multi_head(heads, CLASSED, 0 * tau)
    with pytest.raises(TypeCheckError):
        adaptive_multi_head(heads, CLASSED, tau[:2])


def test_multi_head_shapes_and_temperatures():
    torch.manual_seed(0)
    model: Any = MultiHead(MLP(6, (8,), 5), 5, heads=2, dim=3, hidden=4, low=0.1, high=0.4)
    x = torch.randn(7, 6)
    vectors, tau = model(x, pairs=True)
    assert vectors.shape == (7, 2, 3)
    assert tau.shape == (2, 7, 7)
    together, features = model(x, return_features=True)
    torch.testing.assert_close(features, model.net(x))
    torch.testing.assert_close(cosine(model(x)), (cosine(vectors[:, 0]) + cosine(vectors[:, 1])) / 2)
    torch.testing.assert_close(together, vectors.flatten(1))
    first = torch.cat([model.anchor[1].weight, model.other[1].weight], 1)  # on the pair side by side
    pair = torch.cat([vectors[2, 1], vectors[5, 1]])
    score = model.score[1]((first @ pair + model.anchor[1].bias).relu())
    torch.testing.assert_close(tau[1, 2, 5], 0.1 + 0.3 * torch.sigmoid(score)[0])
    with pytest.raises(ValueError, match="low, high: expected 0 < low < high"):
        MultiHead(MLP(6, (8,), 5), 5, low=0.0)
    with pytest.raises(ValueError, match="heads: expected a whole number"):
        MultiHead(MLP(6, (8,), 5), 5, heads=0)


def test_a_fleet_of_multi_heads_learns():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(16)
    x = torch.randn(4, 8, generator=generator)[labels] + 0.7 * torch.randn(64, 8, generator=generator)

    def loss(model, batch, hyper):
        vectors, tau = model(batch.x, pairs=True)
        return adaptive_multi_head(vectors, batch.y, tau, hyper.beta)

    fleet = train(
        lambda: MultiHead(MLP(8, (16,), 8), 8, heads=2, dim=4, hidden=8),
        loss,
        {"x": x, "y": labels},
        steps=40,
        batch=32,
        optimiser=Adam(lr=1e-2),
        hyper={"beta": torch.tensor([0.0, 0.1, 0.3])},
        progress=False,
    )
    assert not fleet.failures()
    assert (fleet.history[:, -5:].mean(1) < fleet.history[:, :5].mean(1) - 0.3).all()
    vectors = fleet.logits(x)
    assert vectors.shape == (3, 64, 8)
    top = torch.stack([cosine(v).fill_diagonal_(-2).argmax(-1) for v in vectors])
    assert (labels[top] == labels).float().mean() > 0.8


def test_extrapolation_lowers_the_similarity_as_the_paper_says():
    q, k = normalise(sample(6)), normalise(sample(6, seed=1))
    s = (q * k).sum(-1)
    for share in (1.0, 1.4, 2.0):
        far_q, far_k = extrapolated_positives(q, k, share)
        torch.testing.assert_close((far_q * far_k).sum(-1), s + 2 * share * (1 - share) * (1 - s))
        torch.testing.assert_close(far_q + far_k, q + k)
        torch.testing.assert_close(far_q - far_k, (2 * share - 1) * (q - k))
    each = 1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far_q, far_k = extrapolated_positives(q, k, each)
    torch.testing.assert_close((far_q * far_k).sum(-1), s - (each * (each - 1) * (q - k).square()).sum(-1))
    with pytest.raises(ValueError, match="share: expected a number of at least 1"):
        extrapolated_positives(q, k, 0.9)
    with pytest.raises(ValueError, match="share: expected a number of at least 1"):
        extrapolated_positives(q, k, 0.5 * each)


def test_interpolation_keeps_the_mean_and_shrinks_the_variance():
    scores = sample(400, 1)[:, 0]
    mixed = torch.stack(
        [interpolated_negatives(scores[:, None], scores[random.permutation(random.key(i), 400)][:, None], 0.3)[:, 0]
         for i in range(50)]
    )  # fmt: skip
    torch.testing.assert_close(mixed.mean(-1), scores.mean().expand(50))
    ratio = mixed.var(-1).mean() / scores.var()
    assert abs(ratio - (0.3**2 + 0.7**2)) < 0.01
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1"):
        interpolated_negatives(scores[:, None], scores[:, None], 1.1)


@pytest.mark.parametrize("labels", [CLASSED, PAIRED], ids=["classes", "pairs"])
def test_feature_transformed_is_its_loop(labels):
    x, t, far, near = sample(), 0.3, 1.6, 0.35
    unit = normalise(x)
    order = random.permutation(random.fold_in(KEY, 2), 10).tolist()

    def following(i, allowed):
        place = order.index(i)
        return next(order[(place + step) % 10] for step in range(1, 11) if order[(place + step) % 10] in allowed)

    rows = []
    for i in range(10):
        own = [j for j in range(10) if j != i and labels[j] == labels[i]]
        rest = [j for j in range(10) if labels[j] != labels[i]]
        if not own:
            rows.append(torch.zeros((), dtype=torch.float64))
            continue
        q, k = extrapolated_positives(unit[i], unit[following(i, own)], far)
        others = torch.stack([interpolated_negatives(unit[n], unit[following(n, rest)], near) for n in rest])
        rows.append(nce(q @ k, others @ q, t))
    found = sum(bool(row != 0) for row in rows)
    torch.testing.assert_close(feature_transformed(x, labels, KEY, t, far, near), torch.stack(rows) * 10 / found)


def test_feature_transformed_without_a_change_is_nt_xent_and_draws_from_the_beta_laws():
    x = sample()
    for near in (0.0, 1.0):
        torch.testing.assert_close(feature_transformed(x, PAIRED, KEY, 0.3, 1.0, near), nt_xent(x, PAIRED, 0.3))
    table = torch.zeros(10, 10, dtype=torch.float64)
    table[0, 5] = table[5, 0] = 1.0  # an anchor with q'·k' = λ² + (1 - λ)² and q'·n' = 0
    keys = random.fold_in(random.key(0), torch.arange(1000))
    value = vmap(lambda k: feature_transformed(table, PAIRED, k, 1.0, None, 0.5, precomputed)[0])(keys)
    pull = math.log(8) - value.expm1().log()
    share = (1 + (2 * pull - 1).clamp_min(0).sqrt()) / 2
    assert abs(share.mean() - 1.5) < 0.02
    assert abs(share.var() - 1 / 20) < 0.005
    assert (feature_transformed(x, PAIRED, KEY) != feature_transformed(x, PAIRED, random.key(4))).any()
    torch.testing.assert_close(feature_transformed(x, PAIRED, KEY), feature_transformed(x, PAIRED, KEY))


def test_parameters_out_of_range_are_named():
    x = sample()
    cases: dict[str, list[Any]] = {
        "temperature": [lambda f=f: f(x, CLASSED, temperature=0.0) for f in (nt_xent, sup_con, mw, info_loob, look)],
        "share": [lambda: hard_contrastive(x, CLASSED, share=1.5), lambda: hard_contrastive(x, CLASSED, share=0.0)],
        "weight": [lambda: simple_contrastive(x, CLASSED, -1.0)],
        "beta": [lambda: info_loob(x, CLASSED, beta=-1.0), lambda: multi_head(x, CLASSED, -0.1)],
        "positive": [lambda: feature_transformed(x, CLASSED, KEY, positive=0.5)],
        "negative": [lambda: feature_transformed(x, CLASSED, KEY, negative=1.5)],
        "similarity": [lambda: feature_transformed(x, CLASSED, KEY, similarity=snr)],
    }
    for name, calls in cases.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                call()
