import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli

from toolkit import random
from toolkit.calibration.gflowout import (
    GFlowOut,
    gflowout_loss,
    gflowout_probabilities,
    mask_log_probability,
    train_gflowout,
    trajectory_balance,
)
from toolkit.calibration.mask_enumeration import mask_divergence, mask_posterior
from toolkit.data import digits
from toolkit.fleet import Fleet
from toolkit.models import MLP

MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(kind="sample", hidden=(6, 4), bits=(2, 2), classes=3, inputs=5, seed=0, scale=2.0, **options):
    """A net in float64 whose parameters, generators included, are all random."""
    torch.manual_seed(seed)
    module = GFlowOut(inputs, hidden, classes, kind, bits, **options).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * 0.3 * torch.randn_like(p))
    return module


def points(n=7, inputs=5, classes=3, seed=1):
    return draws(n, inputs, seed=seed), torch.arange(n) % classes


def by_hand(module, x, mask):
    """The masked net, example by example, with numpy."""
    h, first = x.detach().numpy(), 0
    for layer, bits, width in zip(module.layers, module.bits, module.hidden, strict=True):
        h = np.maximum(layer.weight.detach().numpy() @ h + layer.bias.detach().numpy(), 0)
        units = np.repeat(mask[first : first + bits].numpy(), width // bits)
        h = h * units * (width / units.sum() if units.any() else 0)
        first += bits
    return module.head.weight.detach().numpy() @ h + module.head.bias.detach().numpy()


def test_mask_log_probability_is_bernoulli_and_normalised():
    logits = 3 * draws(5, 4)
    every = mask_log_probability(logits[:, None].expand(-1, 16, -1), MASKS.expand(5, -1, -1))
    torch.testing.assert_close(every.exp().sum(1), torch.ones(5, dtype=torch.float64))
    for row, mask in ((0, 5), (1, 15), (4, 0)):
        torch.testing.assert_close(every[row, mask], Bernoulli(logits=logits[row]).log_prob(MASKS[mask]).sum())
    # the published form, whose bit that is off counts log keep, is not a law
    taken = torch.where(MASKS.bool(), logits[0].sigmoid(), 1 - logits[0].sigmoid())
    published = (MASKS * taken.log() + (1 - MASKS) * (1 - taken).log()).sum(1)
    assert published.exp().sum().item() == pytest.approx((2 * logits[0].sigmoid()).prod().item())
    assert mask_log_probability(torch.tensor([1000.0]), torch.tensor([0.0])).item() == -1000.0
    batched = torch.func.vmap(torch.func.grad(lambda a, z: mask_log_probability(a, z)))(logits, MASKS[3:8])
    torch.testing.assert_close(batched, MASKS[3:8] - logits.sigmoid())


def test_trajectory_balance_is_zero_exactly_at_the_posterior():
    log_reward = draws(16)
    log_z = log_reward.logsumexp(0)
    posterior = log_reward - log_z
    assert trajectory_balance(log_z.expand(16), posterior, log_reward).max() < 1e-24
    off = trajectory_balance(log_z.expand(16) + 0.3, posterior, log_reward)
    torch.testing.assert_close(off, torch.full_like(off, 0.09))
    other = draws(16, seed=1).log_softmax(0)
    assert trajectory_balance(log_z.expand(16), other, log_reward).max() > 0.1
    # zero for some log Z: only if log R - log q is constant, so q ∝ R
    assert (log_reward - other).var() > 1e-3
    assert (log_reward - posterior).var() < 1e-24
    reward = log_reward.clone().requires_grad_()
    q = other.clone().requires_grad_()
    trajectory_balance(log_z.expand(16), q, reward).sum().backward()
    assert reward.grad is None
    torch.testing.assert_close(q.grad, 2 * (log_z + other - log_reward))


@pytest.mark.parametrize("log_z", [-3.0, 0.0, 7.5])
def test_on_policy_balance_has_twice_the_gradient_of_the_divergence(log_z):
    log_reward = draws(16)
    logits = draws(4, seed=1).requires_grad_()
    log_q = mask_log_probability(logits.expand(16, -1), MASKS)
    loss = (log_q.detach().exp() * trajectory_balance(torch.full((16,), log_z).double(), log_q, log_reward)).sum()
    balance = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    divergence = (log_q.exp() * (log_q - log_reward.log_softmax(0))).sum()
    torch.testing.assert_close(balance, 2 * torch.autograd.grad(divergence, logits)[0], atol=1e-12, rtol=1e-9)


def test_masked_net_by_hand_and_all_ones_is_the_plain_net():
    module, (x, _) = net(), points()
    plain = MLP(5, (6, 4), 3).double()
    plain.load_state_dict({n: v for n, v in module.state_dict().items() if n.startswith(("layers", "head"))})
    torch.testing.assert_close(module(x, masks=torch.ones(7, 4).double()), plain(x), atol=1e-14, rtol=0)
    torch.testing.assert_close(module(x), plain(x), atol=1e-14, rtol=0)
    for mask in MASKS:
        found = module(x, masks=mask.expand(7, -1))
        np.testing.assert_allclose(found.detach(), [by_hand(module, row, mask) for row in x], atol=1e-12)


@pytest.mark.parametrize("kind", ["dropout", "id", "sample"])
def test_laws_are_normalised_and_see_what_they_should(kind):
    module, (x, y) = net(kind, keep=0.7), points(3)
    traced = [module(x, y=y, masks=m.expand(3, -1), trace=True) for m in MASKS]
    log_q, log_p = (torch.stack([getattr(t, name) for t in traced]) for name in ("log_q", "log_p"))
    for log in (log_q, log_p):
        torch.testing.assert_close(log.exp().sum(0), torch.ones(3, dtype=torch.float64))
    prior = Bernoulli(torch.tensor(0.7).double()).log_prob(MASKS).sum(1)
    if kind != "sample":
        torch.testing.assert_close(log_p, prior[:, None].expand(-1, 3))
        assert (log_q.diff(dim=1).abs() < 1e-15).all()  # blind to the example
    assert torch.allclose(log_q, log_p) == (kind == "dropout")
    other = torch.stack([module(x, y=(y + 1) % 3, masks=m.expand(3, -1), trace=True).log_q for m in MASKS])
    assert torch.equal(other, log_q) == (kind != "sample")  # only this posterior reads the label
    # a later layer's bits depend on earlier ones, given the same layer's activations: chain rule over layers
    first = log_q.exp().reshape(4, 4, 3).sum(1)
    second = log_q.exp().reshape(4, 4, 3) / first[:, None]
    assert ((second[0] - second[3]).abs().max() > 1e-3) == (kind != "dropout")


@pytest.mark.parametrize("kind", ["id", "sample"])
def test_drawn_masks_follow_the_law_and_test_time_draws_ignore_labels(kind):
    module, (x, y) = net(kind, scale=1.0), points(1)
    n = 20000
    drawn = module(x.expand(n, -1), y=y.expand(n), key=random.key(0), trace=True)
    code = (drawn.masks @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long()
    law = torch.stack([module(x, y=y, masks=m[None], trace=True).log_q[0] for m in MASKS]).exp()
    share = code.bincount(minlength=16) / n
    assert ((share - law).abs() < 4.5 * (law * (1 - law) / n).sqrt() + 1e-9).all()
    torch.testing.assert_close(drawn.log_q.exp(), law[code])
    hot = module(x.expand(n, -1), y=y.expand(n), key=random.key(0), temperature=1e9, trace=True)
    assert (hot.masks.mean(0) - 0.5).abs().max() < 0.02
    # without trace: the law without labels
    test_law = torch.stack([module(x, y=y, masks=m[None], trace=True)[3 if kind == "sample" else 2][0] for m in MASKS])
    outputs = torch.stack([module(x, masks=m[None])[0] for m in MASKS])
    mean = module(x.expand(n, -1), key=random.key(1)).softmax(-1).mean(0)
    expected = (test_law.exp()[:, None] * outputs.softmax(-1)).sum(0)
    torch.testing.assert_close(mean, expected, atol=0.01, rtol=0)
    shared = module(x.expand(12, -1), y=y.expand(12), key=random.key(0), shared=4, trace=True).masks.reshape(3, 4, 4)
    assert torch.equal(shared, shared[:, :1].expand(-1, 4, -1))
    assert not torch.equal(shared[0], shared[1]) or not torch.equal(shared[0], shared[2])


def loss_parts(module, x, y, kind, beta, examples=None, shared=1, seed=3):
    batch = {"x": x, "y": y, "key": random.key(seed)}
    return gflowout_loss(module, batch, {"beta": beta}, kind, examples, shared)


@pytest.mark.parametrize("kind", ["dropout", "id", "sample"])
def test_new_generators_draw_from_the_prior(kind):
    x, y = points()
    model = GFlowOut(5, (6, 4), 3, kind, (2, 2), keep=0.8).double()
    trace = model(x[:2], masks=MASKS[[15, 5]], y=y[:2], trace=True)
    expected = torch.tensor([4 * np.log(0.8), 2 * np.log(0.8) + 2 * np.log(0.2)])
    torch.testing.assert_close(trace.log_q, expected)
    torch.testing.assert_close(trace.log_p, expected)


def test_losses_by_formula():
    x, y = points(6)
    module = net("sample")
    t = module(x, y=y, key=random.key(3), temperature=2.0, trace=True)
    ce = -t.logits.log_softmax(-1)[torch.arange(6), y]
    expected = ce + (t.log_z + t.log_q + 1.7 * ce - t.log_p).square() - t.log_p
    torch.testing.assert_close(loss_parts(module, x, y, "sample", 1.7), expected)
    plain = net("dropout", keep=0.7)
    t = plain(x, y=y, key=random.key(3), trace=True)
    torch.testing.assert_close(loss_parts(plain, x, y, "dropout", 1.0), -t.logits.log_softmax(-1)[torch.arange(6), y])
    one = net("id", keep=0.7)
    t = one(x, y=y, key=random.key(3), temperature=2.0, shared=2, trace=True)
    ce = -t.logits.log_softmax(-1)[torch.arange(6), y]
    a, b, c = (ce[i : i + 2].mean() for i in (0, 2, 4))
    relative = torch.stack([a - (b + c) / 2, b - (a + c) / 2, c - (a + b) / 2]).repeat_interleave(2)
    expected = ce + (t.log_z + t.log_q + 1.7 * 50 * relative - t.log_p).square()
    torch.testing.assert_close(loss_parts(one, x, y, "id", 1.7, 50, 2), expected)


def test_each_part_trains_its_own_parameters():
    x, y = points(6)
    module = net("sample")
    t = module(x, y=y, key=random.key(3), temperature=2.0, trace=True)
    ce = F.cross_entropy(t.logits, y, reduction="none")
    parts = {
        ("layers", "head"): ce,
        ("posterior", "normaliser"): (t.log_z + t.log_q - (t.log_p - ce).detach()).square(),
        ("prior",): -t.log_p,
    }
    total = loss_parts(module, x, y, "sample", 1.0).sum()
    for names, part in parts.items():
        own = [p for n, p in module.named_parameters() if n.startswith(names)]
        expected = torch.autograd.grad(part.sum(), own, retain_graph=True)
        for found, grad in zip(torch.autograd.grad(total, own, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(found, grad)


def small_digits():
    data = digits()
    seen = data.subset((data.y < 3).nonzero().flatten()[:240])
    known = replace(seen.subset(torch.arange(120)), classes=3, names=())
    return known, seen.subset(torch.arange(120, 240)), data.subset((data.y > 7).nonzero().flatten()[:60])


def test_fleet_is_paired_repeatable_and_independent_of_its_size():
    known, test, _ = small_digits()
    common: dict[str, Any] = {"hidden": (8,), "classes": 3, "bits": (4,), "steps": 5, "progress": False}
    for kind in ("id", "sample"):
        many = train_gflowout(known, kind=kind, members=3, **common)
        few = train_gflowout(known, kind=kind, members=2, **common)
        torch.testing.assert_close(many.parameters[:2], few.parameters)
        p = gflowout_probabilities(many, test.x, draws=4)
        torch.testing.assert_close(p.sum(-1), torch.ones(3, 120))
        assert torch.equal(p, gflowout_probabilities(many, test.x, draws=4))
        torch.testing.assert_close(p[:2], gflowout_probabilities(few, test.x, draws=4))
        loop = [mask_posterior(many[i], known.x, known.y, 4, kind).divergence.mean() for i in range(3)]
        torch.testing.assert_close(mask_divergence(many, known), torch.stack(loop), rtol=1e-3, atol=1e-5)


def test_probabilities_are_averaged_over_masks():
    known, test, _ = small_digits()
    fleet = train_gflowout(known, (8, 8), 3, "id", bits=(2, 2), members=2, steps=60, progress=False)
    found = gflowout_probabilities(fleet, test.x[:20], draws=2000)
    for member in range(2):
        exact = mask_posterior(fleet[member], test.x[:20], test.y[:20], 4, "id")
        outputs = torch.stack([fleet[member](test.x[:20], masks=m.expand(20, -1)) for m in exact.masks]).softmax(-1)
        expected = (exact.log_learnt.exp()[:, :, None] * outputs).sum(0)
        torch.testing.assert_close(found[member], expected, atol=0.05, rtol=0)


def test_bad_input_is_named():
    x, y = points(6)
    module = net()
    data = {"x": x.float(), "y": y}
    for options, message in (
        ({"kind": "other"}, "kind: expected"),
        ({"bits": (4, 2)}, "bits: expected a divisor"),
        ({"bits": (2,)}, "bits: expected a divisor"),
        ({"hidden": (), "bits": ()}, "hidden: expected"),
        ({"keep": 1.0}, "keep: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            net(**options)
    with pytest.raises(ValueError, match="x: expected 5 values"):
        module(x[:, :4])
    with pytest.raises(ValueError, match="trace: expected labels"):
        module(x, trace=True, key=random.key(0))
    with pytest.raises(ValueError, match=r"masks: expected shape \(6, 4\)"):
        module(x, masks=torch.ones(6, 3).double())
    with pytest.raises(ValueError, match="shared: expected a divisor of the batch 6"):
        module(x, key=random.key(0), shared=4)
    with pytest.raises(ValueError, match="shared: expected a divisor"):
        loss_parts(net("id"), x, y, "id", 1.0, shared=6)
    with pytest.raises(ValueError, match=r"data\['y'\]: expected class indices"):
        train_gflowout(data, (4,), 2)
    with pytest.raises(ValueError, match="beta: expected"):
        train_gflowout(data, (4,), 3, beta=0.0)
    with pytest.raises(ValueError, match="freeze: expected"):
        train_gflowout(data, (4,), 3, freeze=True)
    with pytest.raises(ValueError, match="draws: expected"):
        gflowout_probabilities(Fleet.of([MLP(5, (4,), 3)], lambda: MLP(5, (4,), 3)), x.float(), draws=0)
