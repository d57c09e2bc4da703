"""LAF against plain descent on one module, and against what it must not look at: labels, and what is forgotten."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from toolkit.fleet import SGD, Adam, AdamW, Fleet, train
from toolkit.models import MLP
from toolkit.unlearning.label_free import Alternating, _fitting, alignment, autoencoders, extraction, laf
from toolkit.unlearning.parts import prepare

N, DIM, CLASSES, WIDTH = 20, 4, 2, 6


def net() -> MLP:
    return MLP(DIM, (WIDTH,), CLASSES).double()


def draw() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    centres = 1.5 * torch.randn(CLASSES, DIM, dtype=torch.float64, generator=g)
    return {"x": centres[y] + torch.randn(N, DIM, dtype=torch.float64, generator=g), "y": y}


DATA = draw()
X, Y = DATA["x"], DATA["y"]
FORGET = torch.stack([Y == 1, (torch.arange(N) * 7) % N < 10])  # half of the examples, so that a batch can hold all


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    return train(net, loss, DATA, members=2, steps=60, batch=10, optimiser=Adam(0.02), seed=4, progress=False)


def distance(a, b):
    return 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def objective(step, model, original, kept, lost, forget, temperature):
    now, before = (m(X, return_features=True)[1] for m in (model, original))
    if step % 2 == 0:
        errors = [(h(e)[0] - e).square().sum(-1) for h, e in ((kept, now[~forget]), (lost, now[forget]))]
        scores = [torch.exp(m / (m + 1)).mean() for m in errors]
        return scores[0] - scores[1]
    top = distance(now[~forget], before[~forget].detach()).exp()
    bottom = (distance(now[forget], before[forget].detach()) / temperature).exp().sum()
    return (top / bottom).log().mean()


def test_full_batches_are_plain_descent_in_turn(fleet):
    """Even steps extract and odd ones align, each with its own rate (one per member) and its own momentum."""
    rates = torch.tensor([0.3, 0.15], dtype=torch.float64)
    found = laf(
        fleet, DATA, FORGET, temperature=2.0, latent=2, fit_steps=40, steps=6, batch=10, seed=3, chunk=1,
        optimiser=SGD(rates, momentum=0.5), aligner=SGD(0.2, momentum=0.8),
    )  # fmt: skip
    models = autoencoders(fleet, prepare(fleet, DATA, FORGET, None), 2, 40, 3)
    for i in range(2):
        model, original = fleet[i], fleet[i]
        plans = [torch.optim.SGD(model.parameters(), lr, m) for lr, m in ((float(rates[i]), 0.5), (0.2, 0.8))]
        for step in range(6):
            for plan in plans:
                plan.zero_grad()
            value = objective(step, model, original, models.kept[i], models.lost[i], FORGET[i], 2.0)
            torch.testing.assert_close(found.history[i, step], value.detach(), rtol=1e-9, atol=1e-11)
            value.backward()
            model.head.zero_grad()
            plans[step % 2].step()
        expected = fleet.layout.pack(model)
        assert (expected - fleet.parameters[i]).norm() > 0.01
        torch.testing.assert_close(found.parameters[i], expected, rtol=1e-8, atol=1e-10)
        assert torch.equal(found[i].head.weight, fleet[i].head.weight)


def test_the_two_losses_by_hand():
    e = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    answers = torch.tensor([[3.0, 3.0], [1.0, 2.0], [0.0, 2.0], [1.0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([-0.5, -0.8, 0.0, 0.9], dtype=torch.float64)
    torch.testing.assert_close(extraction(e, answers), torch.tensor([-1, -1, 1, 1]) * expected.abs().exp())
    turned = torch.tensor([[4.0, -3.0], [-2.0, 0.0], [0.0, 7.0], [2.0, 0.0]], dtype=torch.float64)
    apart = torch.tensor([1.0, 2.0, 0.0, 1 - 0.5**0.5], dtype=torch.float64)
    bottom = (apart[:2] / 4).exp().sum()
    torch.testing.assert_close(alignment(e, turned, 4.0), torch.cat([apart[:2] * 0, (apart[2:].exp() / bottom).log()]))


def test_labels_are_not_looked_at(fleet):
    options: dict[str, Any] = {"steps": 6, "fit_steps": 10, "batch": 8}
    found = laf(fleet, DATA, FORGET, **options)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert torch.equal(laf(fleet, {"x": X, "y": Y[order]}, FORGET, **options).parameters, found.parameters)
    assert torch.equal(laf(fleet, {"x": X}, FORGET, **options).parameters, found.parameters)
    assert (found.parameters - fleet.parameters).norm(dim=1).min() > 1e-4
    repaired = laf(fleet, DATA, FORGET, repair_steps=5, **options)
    assert not torch.equal(repaired.parameters, found.parameters)
    other = laf(fleet, {"x": X, "y": Y[order]}, FORGET, repair_steps=5, **options)
    assert not torch.equal(repaired.parameters, other.parameters)


def test_what_is_forgotten_does_not_teach_the_autoencoder_of_the_rest(fleet):
    """The public version fits it to all training data: then the examples to forget do teach it."""

    def fitted(x, forget=FORGET):
        return autoencoders(fleet, prepare(fleet, {"x": x, "y": Y}, forget, None), 2, 15, 0)

    changed = torch.where(FORGET[0][:, None], X + 3, X)
    one, two = fitted(X), fitted(changed)
    assert torch.equal(one.kept.parameters[0], two.kept.parameters[0])
    assert not torch.equal(one.lost.parameters[0], two.lost.parameters[0])
    kept = torch.where(FORGET[0][:, None], X, X + 3)
    assert torch.equal(one.lost.parameters[0], fitted(kept).lost.parameters[0])
    assert not torch.equal(one.kept.parameters[0], fitted(kept).kept.parameters[0])

    def public(x):
        rows = {"representation": fleet.features(x)}
        return train(one.kept.build, _fitting, {"row": torch.arange(N)}, member_data=rows, steps=15, progress=False)

    assert not torch.equal(public(X).parameters[0], public(changed).parameters[0])


def test_an_autoencoder_learns_its_own_part(fleet):
    models = autoencoders(fleet, prepare(fleet, DATA, FORGET[0], None), 4, 400, 0)
    e = fleet.features(X)
    for i in range(2):
        kept, lost = (m[i](e[i])[0].sub(e[i]).square().sum(-1).detach() for m in models)
        spread = e[i].var(0).sum()
        assert kept[~FORGET[0]].mean() < 0.3 * spread
        assert lost[FORGET[0]].mean() < 0.3 * spread
        assert kept[FORGET[0]].mean() > 2 * lost[FORGET[0]].mean()
        assert lost[~FORGET[0]].mean() > 2 * kept[~FORGET[0]].mean()


def test_the_fit_is_the_bound_of_a_variational_autoencoder(fleet):
    """‖h(e) - e‖² + 0.025 KL(N(m, v) ‖ N(0, 1)), the divergence by torch.distributions."""
    module = autoencoders(fleet, prepare(fleet, DATA, FORGET, None), 3, 5, 0).kept[0]
    e, key = fleet.features(X)[0], torch.tensor(7)
    answer, mean, log_variance = module(e, key=key)
    normals = torch.distributions.Normal(mean, log_variance.exp().sqrt())
    divergence = torch.distributions.kl_divergence(normals, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    batch = type("Batch", (), {"representation": e, "key": key})
    torch.testing.assert_close(
        _fitting(module, batch, None), F.mse_loss(answer, e, reduction="none").sum(-1) + 0.025 * divergence
    )
    assert not torch.equal(answer, module(e)[0])


def test_repair_moves_the_head_alone(fleet):
    options: dict[str, Any] = {"steps": 4, "fit_steps": 10, "batch": 8}
    before = laf(fleet, DATA, FORGET, **options)
    after = laf(fleet, DATA, FORGET, repair_steps=30, repairer=AdamW(0.01), **options)
    for i in range(2):
        assert torch.equal(after[i].layers[0].weight, before[i].layers[0].weight)
        assert torch.equal(after[i].layers[0].bias, before[i].layers[0].bias)
        values = [F.cross_entropy(f[i](X[~FORGET[i]]), Y[~FORGET[i]]) for f in (before, after)]
        assert values[1] < values[0]


def test_each_optimiser_counts_its_own_steps_and_keeps_its_own_state():
    g = torch.Generator().manual_seed(0)
    slopes = torch.randn(6, 2, 3, dtype=torch.float64, generator=g)
    start = torch.randn(2, 3, dtype=torch.float64, generator=g)
    decay = torch.tensor([0.1, 0.3], dtype=torch.float64)
    both = Alternating(Adam(0.1, weight_decay=decay), SGD(torch.tensor([0.2, 0.3]).double(), 0.9))
    values, state = start.clone(), both.initial(start)
    for step in range(6):
        both.apply(values, slopes[step], state, torch.ones(2, 1).double(), None, step)
    for i in range(2):
        leaf = start[i].clone().requires_grad_()
        rates = [
            torch.optim.Adam([leaf], 0.1, weight_decay=float(decay[i])),
            torch.optim.SGD([leaf], (0.2, 0.3)[i], 0.9),
        ]
        for step in range(6):
            leaf.grad = slopes[step, i].clone()
            rates[step % 2].step()
        torch.testing.assert_close(values[i], leaf.detach(), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="lr: expected one for each of 2"):
        Alternating(Adam(torch.ones(3)), Adam()).initial(start)


def test_each_member_is_what_it_is_alone(fleet):
    options: dict[str, Any] = {"steps": 5, "fit_steps": 10, "batch": 6, "seed": 2}
    together = laf(fleet, DATA, FORGET, optimiser=Adam(torch.tensor([1e-3, 5e-3])), **options)
    alone = laf(fleet[[1]], DATA, FORGET[1], optimiser=Adam(5e-3), **options)
    torch.testing.assert_close(alone.parameters[0], together.parameters[1], rtol=1e-6, atol=1e-8)


def test_bad_input(fleet):
    with pytest.raises(ValueError, match="temperature: expected"):
        laf(fleet, DATA, FORGET, temperature=0.0)
    with pytest.raises(ValueError, match="latent: expected at least 1"):
        laf(fleet, DATA, FORGET, latent=0)
    with pytest.raises(ValueError, match="data: expected a field 'y' to repair"):
        laf(fleet, {"x": X}, FORGET, repair_steps=3)
    with pytest.raises(ValueError, match="forget: expected some"):
        laf(fleet, DATA, torch.ones(N, dtype=torch.bool))
