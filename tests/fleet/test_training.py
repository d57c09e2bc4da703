from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fleet_cases import (
    CLASSES,
    FEATURES,
    N,
    batches,
    build,
    cross_entropy,
    differ,
    fit,
    make_data,
    plain_loop,
    same,
)

from toolkit.fleet import SGD, Adam, AdamW, Fleet, chunks, cosine
from toolkit.models import MLP

# Members are independent


def test_a_member_does_not_depend_on_the_fleet_or_the_chunk(device):
    small = fit(members=8, device=device)
    large = fit(members=32, device=device)
    chunked = fit(members=32, chunk=5, device=device)
    for other in (large, chunked):
        same(small.parameters[7], other.parameters[7])
        same(small.history[7], other.history[7])
    same(large.parameters, chunked.parameters)
    alone = fit(streams=torch.tensor([7]), device=device)
    same(small.parameters[7], alone.parameters[0])


def test_the_seed_and_the_stream_decide():
    first = fit(seed=3)
    assert torch.equal(first.parameters, fit(seed=3).parameters)
    other = fit(seed=4)
    for i in range(4):
        differ(first.parameters[i], other.parameters[i])
        differ(first.parameters[i], first.parameters[(i + 1) % 4])
    paired = fit(streams=torch.tensor([5, 2, 5]))
    assert torch.equal(paired.parameters[0], paired.parameters[2])
    differ(paired.parameters[0], paired.parameters[1])
    initial = fit(streams=torch.tensor([5, 2, 5]), steps=0)
    assert torch.equal(initial.parameters[0], initial.parameters[2])
    differ(initial.parameters[0], initial.parameters[1])
    differ(initial.parameters, fit(streams=torch.tensor([5, 2, 5]), steps=0, seed=1).parameters)


def test_the_seed_decides_the_batches_too():
    def seen(seed):
        loss = lambda model, batch, hyper: (cross_entropy(model, batch, hyper), {"at": batch.index})  # noqa: E731
        memory = {"at": torch.full((N,), -1)}
        return fit(loss, members=2, steps=1, seed=seed, memory=memory).memory["at"] >= 0

    assert torch.equal(seen(0), seen(0))
    assert not torch.equal(seen(0), seen(1))
    assert not torch.equal(seen(0)[0], seen(0)[1])
    plan = batches([0, 1], 1, 8)[0]
    assert torch.equal(seen(0).nonzero()[:, 1].view(2, 8), plan.sort(1).values)


def test_training_leaves_global_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fleet = fit(steps=2)
    fleet.logits(make_data()["x"])
    fleet[0], fleet[:2].clone(), repr(fleet)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert torch.equal(fit(steps=2).parameters, fleet.parameters)


def test_training_works_under_no_grad():
    with torch.no_grad():
        fleet = fit(steps=3)
    assert torch.equal(fleet.parameters, fit(steps=3).parameters)


# A fleet is the plain loop, many times


LR, DECAY = torch.tensor([0.01, 0.03, 0.002], dtype=torch.float64), torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
OPTIMISERS = {
    "adam": (Adam(lr=LR), lambda p, lr, wd: torch.optim.Adam(p, lr)),
    "adam, one rate": (Adam(0.01), lambda p, lr, wd: torch.optim.Adam(p, 0.01)),
    "adam, decay": (
        Adam(lr=LR, weight_decay=DECAY, betas=(0.8, 0.95), eps=1e-3),
        lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd, betas=(0.8, 0.95), eps=1e-3),
    ),
    "adamw": (AdamW(lr=LR, weight_decay=DECAY), lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd)),
    "adamw, default": (AdamW(lr=LR), lambda p, lr, wd: torch.optim.AdamW(p, lr)),
    "sgd": (SGD(lr=LR * 10), lambda p, lr, wd: torch.optim.SGD(p, lr * 10)),
    "sgd, momentum, decay": (
        SGD(lr=LR, momentum=0.9, weight_decay=DECAY),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd),
    ),
    "sgd, nesterov, decay": (
        SGD(lr=LR, momentum=0.7, nesterov=True, weight_decay=DECAY),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.7, nesterov=True, weight_decay=wd),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("schedule", [None, cosine(0.1)], ids=["constant", "cosine"])
def test_members_equal_a_plain_loop(name, fast, schedule, device):
    ours, theirs = OPTIMISERS[name]
    data = make_data()
    options: dict[str, Any] = {"members": 3, "steps": 12, "fast": fast, "device": device}
    fleet = fit(optimiser=ours, schedule=schedule, **options)
    plan, initial = batches(range(3), 12, 8), fit(members=3, steps=0)
    for i in range(3):
        make = lambda p, i=i: theirs(p, LR[i].item(), DECAY[i].item())  # noqa: E731
        parameters, losses = plain_loop(initial[i], plan[:, i], make, data, schedule)
        same(fleet.parameters[i], parameters, 1e-10)
        same(fleet.history[i], losses, 1e-10)
    differ(fleet.parameters, initial.parameters.to(device))


@pytest.mark.parametrize("fast", [True, False])
def test_members_of_unlike_length_see_their_own_schedule(fast):
    steps = torch.tensor([5, 20, 0, 13])
    fleet = fit(steps=steps, schedule=cosine(), optimiser=AdamW(0.02, weight_decay=0.1), fast=fast)
    initial, plan = fit(steps=0), batches(range(4), 20, 8)
    for i, count in enumerate(steps.tolist()):
        make = lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1)  # noqa: E731
        parameters, losses = plain_loop(initial[i], plan[:count, i], make, make_data(), cosine())
        same(fleet.parameters[i], parameters, 1e-10)
        same(fleet.history[i, :count], losses, 1e-10)
        assert fleet.history[i, count:].isnan().all()
    assert torch.equal(fleet.steps, steps)
    assert torch.equal(fleet.planned, steps)
    same(
        fleet.parameters,
        fit(steps=steps, schedule=cosine(), optimiser=AdamW(0.02, weight_decay=0.1), chunk=1).parameters,
    )


def test_the_fast_path_is_used_and_changes_nothing(monkeypatch):
    calls = []
    forward = chunks.fast_forward

    def counted(*arguments):
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(chunks, "fast_forward", counted)

    def loss(model, batch, hyper):
        logits, features = model(batch.x, return_features=True)
        own = model(batch.x * 1.5)
        return F.cross_entropy(logits + own, batch.y, reduction="none") + 0.1 * features.square().mean(1)

    fast = fit(loss)
    assert len(calls) > 12
    calls.clear()
    same(fast.parameters, fit(loss, fast=False).parameters)
    assert not calls

    def by_hand(model, batch, hyper):  # never asks for the logits of batch.x, so they are not computed for it
        return F.cross_entropy(model(batch.x + 0), batch.y, reduction="none")

    by = fit(by_hand)
    assert len(calls) == 1
    same(by.parameters, fit().parameters)


def test_the_fast_path_leaves_other_inputs_to_the_loss():
    data = make_data() | {"x": make_data()["x"].float()}
    fleet = fit(lambda model, batch, hyper: F.cross_entropy(model(batch.x.double()), batch.y, reduction="none"), data)
    rounded = {"x": data["x"].double(), "y": data["y"]}
    same(fleet.parameters, fit(data=rounded).parameters)
    images = {"image": make_data()["x"], "y": data["y"]}
    fleet = fit(lambda model, batch, hyper: F.cross_entropy(model(batch.image), batch.y, reduction="none"), images)
    same(fleet.parameters, fit().parameters)


def test_the_gradient_is_autograds():
    def value(model, parameters, x, y):
        logits, features = model(x, return_features=True)
        return (logits.logsumexp(1) - logits[:, 0]) * features.mean(1).exp() + parameters["head.weight"].square().sum()

    fleet = fit(
        lambda model, batch, hyper: value(model, model.parameters, batch.x, batch.y),
        steps=1,
        optimiser=SGD(1.0),
        fast=False,
    )
    initial, plan = fit(steps=0), batches(range(4), 1, 8)
    for i in range(4):
        module, index = initial[i], plan[0, i]
        batch = make_data()
        value(module, dict(module.named_parameters()), batch["x"][index], batch["y"][index]).mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
        same(initial.parameters[i] - fleet.parameters[i], gradient)


def test_float32_keeps_its_type_and_comes_close():
    data = {"x": make_data()["x"].float(), "y": make_data()["y"]}
    single = fit(build=lambda: MLP(FEATURES, (8,), CLASSES), data=data)
    assert single.parameters.dtype == single.history.dtype == torch.float32
    initial = fit(build=lambda: MLP(FEATURES, (8,), CLASSES), data=data, steps=0)
    start = Fleet(build, initial.parameters.double())
    same(single.parameters.double(), fit(start=start).parameters, 1e-4)
