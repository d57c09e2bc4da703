import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toolkit.calibration.gflowout import GFlowOut, gflowout_probabilities, train_gflowout
from toolkit.calibration.mask_enumeration import gflowout_study, mask_divergence, mask_posterior
from toolkit.data import digits
from toolkit.fleet import Fleet
from toolkit.models import MLP


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


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_mask_posterior_is_bayes_rule(beta: float):
    x, y = points()
    sample, one = net("sample"), net("id", keep=0.7)
    found = mask_posterior(sample, x, y, 4, "sample", beta)
    joint = torch.zeros(16, 7, dtype=torch.float64)
    whole = torch.zeros(16, dtype=torch.float64)
    for j, mask in enumerate(found.masks):
        for i in range(7):
            logits = torch.as_tensor(by_hand(sample, x[i], mask))
            prior = sample(x[i : i + 1], y=y[i : i + 1], masks=mask[None], trace=True).log_p[0].detach().exp()
            joint[j, i] = logits.softmax(0)[y[i]] ** beta * prior
            whole[j] += beta * torch.as_tensor(by_hand(one, x[i], mask)).log_softmax(0)[y[i]]
        whole[j] += mask.sum() * math.log(0.7) + (4 - mask.sum()) * math.log(0.3)
    torch.testing.assert_close(found.log_posterior.exp(), joint / joint.sum(0))
    torch.testing.assert_close(found.log_z.exp(), joint.sum(0))
    data = mask_posterior(one, x, y, 4, "id", beta)
    torch.testing.assert_close(data.log_posterior[:, 0], whole.log_softmax(0))
    torch.testing.assert_close(data.log_z[0], whole.logsumexp(0))
    q, p = (v[:, 0].detach().exp().numpy() for v in (data.log_learnt, data.log_posterior))
    assert data.divergence.item() == pytest.approx((q * np.log(q / p)).sum())
    assert len(found.masks.unique(dim=0)) == 16


def test_constant_likelihood_leaves_the_prior_with_log_z_beta_times_it():
    x, y = points()
    cases: Any = (("sample", 1), ("id", 7))
    for kind, count in cases:
        module = net(kind)
        with torch.no_grad():
            module.head.weight.zero_()
        found = mask_posterior(module, x, y, 4, kind, 1.5)
        prior = torch.stack([module(x, y=y, masks=m.expand(7, -1), trace=True).log_p for m in found.masks])
        torch.testing.assert_close(found.log_posterior, prior[:, : found.log_posterior.shape[1]])
        level = module.head.bias.log_softmax(0)[y]
        torch.testing.assert_close(found.log_z, 1.5 * (level if count == 1 else level.sum()[None]))


def test_training_finds_the_enumerated_posterior():
    """With one bit in each layer the generator can be any law; the nets stay as they are."""
    x, y = points(12)
    data = {"x": x.float(), "y": y}
    build = train_gflowout(data, (4, 4), 3, "dropout", bits=(1, 1), steps=1, members=2, progress=False).build
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = build()
        with torch.no_grad():
            for n, p in module.named_parameters():
                if n.startswith(("layers", "head")):
                    p.mul_(3)
        nets.append(module)
    start = Fleet.of(nets, build)
    common: dict[str, Any] = {
        "bits": (1, 1),
        "members": 2,
        "start": start,
        "freeze": True,
        "progress": False,
        "batch": 48,
    }
    kinds: Any = (("id", {"beta": 1.0, "shared": 12}), ("sample", {"beta": 8.0}))
    for kind, options in kinds:
        fleet = train_gflowout(data, (4, 4), 3, kind, steps=160, lr=2e-2, snapshots=(0, 20), **options, **common)
        first, middle, last = (mask_divergence(f, data) for f in (fleet.at(0), fleet.at(20), fleet))
        assert (last < middle).all()
        assert (last < 0.1 * first).all(), (kind, first, last)
        for name in [n for n in fleet.layout.names if n.startswith(("layers", "head"))]:
            before, after = (fleet.layout.views(f.parameters)[name] for f in (start, fleet))
            assert torch.equal(before, after), name
        if kind == "sample":
            bits = fleet.evaluate(lambda m, b, h: mask_posterior(m, b.x, b.y, 2, "sample", 8.0), data)
            learnt = fleet.evaluate(
                lambda m, b, h: m(b.x, y=b.y, masks=b.x.new_ones(len(b.x), 2), trace=True).log_z, data
            )
            assert (learnt - bits.log_z).abs().mean() < 0.2


def small_digits():
    data = digits()
    seen = data.subset((data.y < 3).nonzero().flatten()[:240])
    known = replace(seen.subset(torch.arange(120)), classes=3, names=())
    return known, seen.subset(torch.arange(120, 240)), data.subset((data.y > 7).nonzero().flatten()[:60])


def test_study_scores_every_kind_and_seed():
    known, test, unseen = small_digits()
    study = gflowout_study(known, test, unseen, (16,), (4,), seeds=2, steps=60, draws=4, progress=False)
    assert study.kinds == ("dropout", "id", "sample")
    assert study.nll.shape == (3, 2)
    assert (study.accuracy > 0.8).all()
    assert (study.unseen_auroc > 0.6).all()
    assert (study.rotated_nll > study.nll).all()
    p = gflowout_probabilities(study.fleets[2], torch.cat([test.x, test.x, unseen.x]), 4)[1, :120]
    assert study.nll[2, 1].item() == pytest.approx(F.nll_loss(p.log(), test.y).item(), abs=0.1)
    assert study.accuracy[2, 1].item() == pytest.approx((p.argmax(-1) == test.y).float().mean().item(), abs=0.05)


def test_bad_input_is_named():
    x, y = points(6)
    with pytest.raises(ValueError, match="bits: expected 1 to 16"):
        mask_posterior(net(), x, y, 17)
    with pytest.raises(ValueError, match="fleet: expected one of GFlowOut"):
        mask_divergence(Fleet.of([MLP(5, (4,), 3)], lambda: MLP(5, (4,), 3)), {"x": x.float(), "y": y})
