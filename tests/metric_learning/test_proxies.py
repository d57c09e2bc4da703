"""Losses with one vector per class against pytorch-metric-learning, loops and closed forms."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as peers
from torch.func import grad, vmap

from toolkit.metric_learning import proxies as ours
from toolkit.metric_learning.similarities import cosine, euclidean, normalise, snr

CLASSES, DIM = 5, 6


def sample(size=12, seed=0, dtype=torch.float64):
    """Embeddings near their class's proxy (for seed 0 the last class does not occur), labels and proxies."""
    generator = torch.Generator().manual_seed(seed)
    proxies = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES - 1, (size,), generator=generator)
    noise = torch.randn(size, DIM, generator=generator, dtype=torch.float64)
    return (1.3 * proxies[labels] + noise).to(dtype), labels, proxies.to(dtype)


# name: (loss of embeddings, labels, proxies and one hyper-parameter, two values of it)
LOSSES: dict[str, tuple[Any, tuple[float, ...]]] = {
    "proxy_nca": (ours.proxy_nca, (1.0, 3.0)),
    "proxy_anchor": (ours.proxy_anchor, (0.1, 0.3)),
    "proxy_anchor_alpha": (lambda x, y, w, h: ours.proxy_anchor(x, y, w, 0.1, h, euclidean), (2.0, 8.0)),
    "normalised_softmax": (ours.normalised_softmax, (1.0, 10.0)),
    "cosface": (lambda x, y, w, h: ours.cosface(x, y, w, h, 8.0), (0.0, 0.35)),
    "cosface_scale": (lambda x, y, w, h: ours.cosface(x, y, w, 0.2, h), (4.0, 16.0)),
    "arcface": (lambda x, y, w, h: ours.arcface(x, y, w, h, 8.0), (0.0, 0.5)),
    "madacos": (ours.madacos, (0.02, 0.3)),
    "unpg": (lambda x, y, w, h: ours.unpg(x, y, w, "cosface", 0.3, 8.0, h), (0.3, 1.5)),
    "unpg_arcface": (lambda x, y, w, h: ours.unpg(x, y, w, "arcface", 0.3, h), (6.0, 12.0)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def with_gradients(loss, x, w):
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    value = loss(x, w)
    return value.detach(), *torch.autograd.grad(value.mean(), (x, w))


@every_loss
def test_vmap_and_vmap_of_grad_are_the_loop(name):
    loss, hypers = LOSSES[name]
    x, labels, proxies = (torch.stack(parts) for parts in zip(*(sample(seed=seed) for seed in range(2)), strict=True))
    hyper = torch.tensor(hypers, dtype=torch.float64)
    together = vmap(loss)(x, labels, proxies, hyper)
    assert together.shape == (2, 12)
    slopes = vmap(grad(lambda x, w, y, h: loss(x, y, w, h).mean(), argnums=(0, 1)))(x, proxies, labels, hyper)
    for member in range(2):
        value, *expected = with_gradients(
            lambda x, w, member=member: loss(x, labels[member], w, hypers[member]), x[member], proxies[member]
        )
        torch.testing.assert_close(together[member], value, rtol=1e-12, atol=1e-12)
        for slope, other in zip(slopes, expected, strict=True):
            torch.testing.assert_close(slope[member], other, rtol=1e-9, atol=1e-12)
            assert other.abs().max() > 1e-3


@every_loss
def test_lengths_rows_and_classes_do_not_matter(name):
    loss, hypers = LOSSES[name]
    x, labels, proxies = sample()
    value = loss(x, labels, proxies, hypers[1])
    generator = torch.Generator().manual_seed(1)
    rows, order = torch.randperm(12, generator=generator), torch.randperm(CLASSES, generator=generator)
    torch.testing.assert_close(loss(x[rows], labels[rows], proxies, hypers[1]), value[rows])
    torch.testing.assert_close(loss(x, order.argsort()[labels], proxies[order], hypers[1]), value)
    if name != "proxy_anchor_alpha":
        stretched = loss(x * torch.linspace(0.1, 9, 12)[:, None], labels, 7 * proxies, hypers[1])
        torch.testing.assert_close(stretched, value)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "madacos"])  # which has a test of its own
def test_gradients_are_finite_differences(name):
    loss, hypers = LOSSES[name]
    x, labels, proxies = sample(size=6)
    x.requires_grad_(), proxies.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: loss(x, labels, w, hypers[1]), (x, proxies), atol=1e-6)


@every_loss
def test_bad_batches_have_finite_values_and_gradients(name):
    loss, hypers = LOSSES[name]
    x, labels, proxies = sample(dtype=torch.float32)
    doubled = x.clone()
    doubled[1] = doubled[0]
    zero = x.clone()
    zero[3] = 0
    batches = {
        "one class": (x, torch.zeros_like(labels), proxies),
        "one example": (x[:1], labels[:1], proxies),
        "duplicates of different classes": (doubled, labels.index_fill(0, torch.tensor([1]), 4), proxies),
        "zero row": (zero, labels, proxies),
        "zero proxy": (x, labels, proxies * (torch.arange(CLASSES) > 0)[:, None]),
        "on the proxies": (proxies[labels], labels, proxies),
        "against the proxies": (-proxies[labels], labels, proxies),
        "one proxy": (x, torch.zeros_like(labels), proxies[:1]),
        "long": (1e6 * x, labels, proxies),
    }
    for kind, (rows, given, table) in batches.items():
        value, *slopes = with_gradients(lambda x, w, given=given: loss(x, given, w, hypers[1]), rows, table)
        assert value.shape == given.shape, kind
        assert value.dtype == torch.float32
        assert all(part.isfinite().all() for part in (value, *slopes)), kind
    torch.testing.assert_close(
        loss(x, labels, proxies, hypers[1]).double(), loss(*sample(), hypers[1]), rtol=1e-4, atol=1e-4
    )


@every_loss
def test_bad_arguments_are_refused(name):
    loss, hypers = LOSSES[name]
    x, labels, proxies = sample()
    spoilt = x.clone()
    spoilt[2, 1] = math.nan
    with pytest.raises(ValueError, match="embeddings: expected finite"):
        loss(spoilt, labels, proxies, hypers[0])
    with pytest.raises(ValueError, match="proxies: expected finite"):
        loss(x, labels, proxies * math.inf, hypers[0])
    with pytest.raises(ValueError, match="labels: expected class indices from 0 to 4"):
        loss(x, labels + 2, proxies, hypers[0])
    with pytest.raises(Exception, match="labels"):
        loss(x, labels[:-1], proxies, hypers[0])
    with pytest.raises(Exception, match="proxies"):
        loss(x, labels, proxies[:, :-1], hypers[0])


BAD: dict[str, Any] = {
    "scale": lambda x, y, w: ours.proxy_nca(x, y, w, 0.0),
    "alpha": lambda x, y, w: ours.proxy_anchor(x, y, w, 0.1, -1.0),
    "scale ": lambda x, y, w: ours.normalised_softmax(x, y, w, -1.0),
    "margin": lambda x, y, w: ours.cosface(x, y, w, -0.1),
    "scale  ": lambda x, y, w: ours.cosface(x, y, w, 0.1, 0.0),
    "margin ": lambda x, y, w: ours.arcface(x, y, w, 3.5),
    "probability": lambda x, y, w: ours.madacos(x, y, w, 1.0),
    "probability ": lambda x, y, w: ours.madacos(x, y, w, 0.0),
    "whisker": lambda x, y, w: ours.unpg(x, y, w, "cosface", 0.5, 64.0, -1.0),
    "margin  ": lambda x, y, w: ours.unpg(x, y, w, "arcface", -0.5),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name.strip()}: expected"):
        BAD[name](*sample())


DEGREES = math.pi / 180
PEERS: dict[str, tuple[Any, Any]] = {
    "proxy_nca": (
        lambda x, y, w: ours.proxy_nca(x, y, w, 1.7),
        lambda: peers.ProxyNCALoss(CLASSES, DIM, softmax_scale=1.7),
    ),
    "proxy_anchor": (ours.proxy_anchor, lambda: peers.ProxyAnchorLoss(CLASSES, DIM)),
    "normalised_softmax": (
        lambda x, y, w: ours.normalised_softmax(x, y, w, 20.0),
        lambda: peers.NormalizedSoftmaxLoss(CLASSES, DIM),
    ),
    "cosface": (ours.cosface, lambda: peers.CosFaceLoss(CLASSES, DIM)),
    "arcface": (
        lambda x, y, w: ours.arcface(x, y, w, 28.6 * DEGREES),
        lambda: peers.ArcFaceLoss(CLASSES, DIM),
    ),
    "arcface beyond the turn": (
        lambda x, y, w: ours.arcface(-x, y, w, 90 * DEGREES, 4.0),
        lambda: Negated(peers.ArcFaceLoss(CLASSES, DIM, margin=90, scale=4)),
    ),
}


class Negated(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, labels):
        return self.loss(-x, labels)


@pytest.mark.parametrize("name", PEERS)
def test_value_and_gradients_are_pytorch_metric_learnings(name):
    loss, build = PEERS[name]
    x, labels, proxies = sample(size=20)
    peer = build()
    inner = getattr(peer, "loss", peer)
    table = "proxies" if hasattr(inner, "proxies") else "W"
    own = proxies.clone() if table == "proxies" else proxies.T.clone()
    setattr(inner, table, torch.nn.Parameter(own))
    value, slope, slope_proxies = with_gradients(lambda x, w: loss(x, labels, w), x, proxies)
    given = x.clone().requires_grad_()
    expected = peer(given, labels)
    expected_slope, expected_proxies = torch.autograd.grad(expected, (given, getattr(inner, table)))
    torch.testing.assert_close(value.mean(), expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        slope_proxies, expected_proxies if table == "proxies" else expected_proxies.T, rtol=1e-7, atol=1e-9
    )
    assert slope.abs().max() > 1e-3


def cosines_of(x, labels, proxies):
    table = F.cosine_similarity(x[:, None], proxies, dim=-1)
    return table, table.gather(1, labels[:, None])[:, 0]


def test_values_per_example_by_hand():
    """x at 60° and 90° from proxies at 0° and 90°; the first belongs to the first, the second to the second."""
    proxies = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    x = torch.tensor([[0.5, math.sqrt(3) / 2], [0.0, 2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    high, turned = math.sqrt(3) / 2, math.cos(math.pi / 3 + 0.5)

    def lost(own, other):
        return math.log1p(math.exp(other - own))

    cases = {
        "proxy_nca": (ours.proxy_nca(x, labels, proxies), [lost(-1, -(2 - math.sqrt(3))), lost(0, -2)]),
        "softmax": (ours.normalised_softmax(x, labels, proxies, 3.0), [lost(1.5, 3 * high), lost(3, 0)]),
        "cosface": (ours.cosface(x, labels, proxies, 0.2, 3.0), [lost(0.9, 3 * high), lost(2.4, 0)]),
        "arcface": (
            ours.arcface(x, labels, proxies, 0.5, 3.0),
            [lost(3 * turned, 3 * high), lost(3 * math.cos(0.5), 0)],
        ),
    }
    for name, (value, expected) in cases.items():
        assert value.tolist() == pytest.approx(expected, rel=1e-12), name
    pull = (math.log1p(math.exp(-4 * (0.5 - 0.1))) + math.log1p(math.exp(-4 * (1 - 0.1)))) / 2
    push = (math.log1p(math.exp(4 * (0 + 0.1))) + math.log1p(math.exp(4 * (high + 0.1)))) / 2
    assert ours.proxy_anchor(x, labels, proxies, 0.1, 4.0).tolist() == pytest.approx([pull + push] * 2, rel=1e-12)
    assert ours.proxy_nca(x, labels, proxies).tolist() == pytest.approx(
        ours.normalised_softmax(x, labels, proxies, 2.0).tolist(), rel=1e-12
    )


@pytest.mark.parametrize("similarity", [cosine, euclidean, snr])
def test_proxy_anchor_with_any_measure_is_the_loop(similarity):
    x, labels, proxies = sample()
    table, pull, push = similarity(x, proxies), [], []
    sign = 1 if similarity.far_is_large else -1
    for p in range(CLASSES):
        own = [math.exp(2 * sign * (table[i, p].item() - 0.1)) for i in range(12) if labels[i] == p]
        other = [math.exp(2 * sign * (-0.1 - table[i, p].item())) for i in range(12) if labels[i] != p]
        pull += [math.log1p(sum(own))] if own else []
        push.append(math.log1p(sum(other)))
    assert len(pull) == CLASSES - 1
    expected = sum(pull) / len(pull) + sum(push) / CLASSES
    assert ours.proxy_anchor(x, labels, proxies, 0.1, 2.0, similarity).tolist() == pytest.approx([expected] * 12)


def test_margins_of_zero_are_no_margins():
    x, labels, proxies = sample()
    plain = ours.normalised_softmax(x, labels, proxies, 8.0)
    torch.testing.assert_close(ours.cosface(x, labels, proxies, 0.0, 8.0), plain)
    torch.testing.assert_close(ours.arcface(x, labels, proxies, 0.0, 8.0), plain)


def test_novel_class_weights_are_normalised_means_of_normalised_rows():
    x, labels, _ = sample()
    weights = ours.novel_class_weights(x, labels, CLASSES)
    for k in range(CLASSES - 1):
        rows = x[labels == k]
        mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(0)
        torch.testing.assert_close(weights[k], mean / mean.norm())
    assert weights[-1].tolist() == [0.0] * DIM
    stretched = ours.novel_class_weights(x * torch.linspace(1, 9, 12)[:, None], labels, CLASSES)
    torch.testing.assert_close(stretched, weights)
    stacked = torch.stack([x, -x]), torch.stack([labels, labels.flip(0)])
    together = vmap(ours.novel_class_weights, in_dims=(0, 0, None))(*stacked, CLASSES)
    torch.testing.assert_close(together[1], ours.novel_class_weights(-x, labels.flip(0), CLASSES))
    with pytest.raises(ValueError, match="labels: expected"):
        ours.novel_class_weights(x, labels, 2)
    with pytest.raises(ValueError, match="embeddings: expected finite"):
        ours.novel_class_weights(x * math.nan, labels, CLASSES)


@pytest.mark.parametrize("size", [11, 12])
@pytest.mark.parametrize("probability", [0.02, 0.1, 0.4])
def test_madacos_gives_the_median_example_its_probability(size, probability):
    """When the margin is positive the median example's own class has probability a, so its loss is −log a."""
    x, labels, proxies = sample(size)
    table, own = cosines_of(x, labels, proxies)
    middle = int(own.argsort()[(size - 1) // 2])
    values = ours.madacos(x, labels, proxies, probability)
    assert values[middle].item() == pytest.approx(-math.log(probability), rel=1e-9)
    centre = own[middle].item()
    scale = max(32.0, math.log(9999999 * (1 - probability) / probability) / (1 - centre))
    assert scale > 32
    rivals = sum(math.exp(scale * c) for k, c in enumerate(table[middle].tolist()) if k != labels[middle])
    margin = centre - math.log(rivals * probability / (1 - probability)) / scale
    assert margin > 0
    torch.testing.assert_close(values, ours.cosface(x, labels, proxies, margin, scale), rtol=1e-9, atol=1e-9)


def test_madacos_without_margin_is_the_normalised_softmax():
    """Where the median example is already less likely than a, the margin is 0; its scale is then the least, 32."""
    x, labels, proxies = sample()
    away = -x
    assert cosines_of(away, labels, proxies)[1].median() < 0
    value = ours.madacos(away, labels, proxies)
    torch.testing.assert_close(value, ours.normalised_softmax(away, labels, proxies, 32.0), rtol=1e-9, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    near = proxies[labels] + 1e-9 * torch.randn(12, DIM, generator=generator, dtype=torch.float64)
    bound = math.log(9999999 * 0.98 / 0.02) / 1e-3
    own = cosines_of(near, labels, proxies)[1]
    table = cosines_of(near, labels, proxies)[0].masked_fill(F.one_hot(labels, CLASSES).bool(), -math.inf)
    middle = int(own.argsort()[5])
    margin = own[middle] - (torch.logsumexp(bound * table[middle], 0) + math.log(0.02 / 0.98)) / bound
    torch.testing.assert_close(
        ours.madacos(near, labels, proxies), ours.cosface(near, labels, proxies, margin, bound), rtol=1e-6, atol=1e-6
    )


def test_madacos_takes_scale_and_margin_for_constants():
    x, labels, proxies = sample()
    table, own = cosines_of(x, labels, proxies)
    middle = int(own.argsort()[5])
    scale = math.log(9999999 * 0.98 / 0.02) / (1 - own[middle].item())
    rivals = sum(math.exp(scale * c) for k, c in enumerate(table[middle].tolist()) if k != labels[middle])
    margin = own[middle].item() - math.log(rivals * 0.02 / 0.98) / scale
    found = with_gradients(lambda x, w: ours.madacos(x, labels, w), x, proxies)
    expected = with_gradients(lambda x, w: ours.cosface(x, labels, w, margin, scale), x, proxies)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("head", ["cosface", "arcface"])
@pytest.mark.parametrize("whisker", [0.0, 0.4, 1.5])
def test_unpg_is_the_loop(head, whisker):
    x, labels, proxies = sample()
    x = torch.cat([x, -3 * x[:1]])  # a pair of opposites: an outlier
    labels = torch.cat([labels, (labels[:1] + 1) % CLASSES])
    table, own = cosines_of(x, labels, proxies)
    pairs = sorted(
        F.cosine_similarity(x[i], x[j], dim=0).item() for i in range(13) for j in range(i) if labels[i] != labels[j]
    )
    first, third = pairs[int(0.25 * len(pairs))], pairs[int(0.75 * len(pairs))]
    low, high = first - whisker * (third - first), third + whisker * (third - first)
    kept = [s for s in pairs if low - 1e-12 <= s <= high + 1e-12]
    assert 0 < len(kept) < len(pairs) or whisker == 1.5
    expected = []
    for i in range(13):
        angle = math.acos(own[i].item())
        target = own[i].item() - 0.3 if head == "cosface" else math.cos(angle + 0.3)
        if head == "arcface" and angle > math.pi - 0.3:
            target = own[i].item() - 0.3 * math.sin(0.3)
        total = math.exp(6 * target) + sum(math.exp(6 * c) for k, c in enumerate(table[i].tolist()) if k != labels[i])
        expected.append(math.log(total + sum(math.exp(6 * s) for s in kept)) - 6 * target)
    assert ours.unpg(x, labels, proxies, head, 0.3, 6.0, whisker).tolist() == pytest.approx(expected, rel=1e-9)


def test_unpg_with_one_class_is_its_head():
    x, labels, proxies = sample()
    labels = torch.full_like(labels, 2)
    torch.testing.assert_close(
        ours.unpg(x, labels, proxies, "cosface", 0.3, 8.0), ours.cosface(x, labels, proxies, 0.3, 8.0)
    )
    torch.testing.assert_close(
        ours.unpg(x, labels, proxies, "arcface", 0.3, 8.0), ours.arcface(x, labels, proxies, 0.3, 8.0)
    )


def test_unpg_drops_outliers():
    """Fourteen pairs at cosine 0 and one at 0.99: the quartiles coincide, so no whisker ever reaches it."""
    x = torch.eye(6, dtype=torch.float64)
    x[1] = torch.tensor([0.99, math.sqrt(1 - 0.99**2), 0, 0, 0, 0])
    x[2, :2] = 0
    labels, proxies = torch.arange(6), torch.eye(6, dtype=torch.float64)
    assert (normalise(x) @ normalise(x).mT).triu(1).count_nonzero() == 1
    own = cosines_of(x, labels, proxies)[1]
    denominator = (ours.normalised_softmax(x, labels, proxies, 4.0) + 4 * own).exp()
    for whisker in (1.5, 1e9):
        value = ours.unpg(x, labels, proxies, "cosface", 0.0, 4.0, whisker)
        torch.testing.assert_close(value, (denominator + 14).log() - 4 * own)
