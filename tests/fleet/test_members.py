"""What may differ between members of a fleet: subsets, weights, starts, data, settings, memory, random masks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fleet_cases import (
    CLASSES,
    FEATURES,
    N,
    batches,
    cross_entropy,
    differ,
    fit,
    make_data,
    member_keys,
    normal,
    plain_loop,
    same,
)

from toolkit import random
from toolkit.fleet import SGD, ClassBalanced, concatenate, grid
from toolkit.fleet.members import NOISE
from toolkit.models import MLP

# What may differ between members


def test_a_member_never_sees_what_its_subset_leaves_out(device):
    subsets = random.uniform(random.key(9), (4, N)) < torch.tensor([0.1, 0.3, 0.6, 0.9])[:, None]
    inputs = make_data()["x"].expand(4, N, FEATURES).clone()
    inputs[~subsets] = float("nan")
    own = {"x": inputs, "poison": torch.where(subsets, 0.0, float("inf")).double()}

    def loss(model, batch, hyper):
        return cross_entropy(model, batch, hyper) + batch.poison

    data = {"y": make_data()["y"]}
    fleet = fit(loss, data, subsets=subsets, member_data=own, steps=30, device=device)
    assert not fleet.failures()
    assert fleet.parameters.isfinite().all()
    same(fleet.parameters, fit(subsets=subsets, steps=30).parameters)
    alone = fit(subsets=subsets[2:3], streams=torch.tensor([2]), steps=30)
    same(fleet.parameters[2], alone.parameters[0])


def test_an_epoch_visits_each_example_of_the_subset_once(device):
    subsets = random.uniform(random.key(9), (4, N)) < torch.tensor([0.05, 0.3, 0.6, 1.0])[:, None]
    counts = subsets.sum(1)

    def loss(model, batch, hyper):
        return cross_entropy(model, batch, hyper), {"visits": batch.visits + 1}

    memory = {"visits": torch.zeros(N)}
    for epochs in (1, 3):
        fleet = fit(loss, subsets=subsets, memory=memory, batch=1, epochs=epochs, device=device)
        assert torch.equal(fleet.memory["visits"].cpu(), epochs * subsets.float())
        assert torch.equal(fleet.planned.cpu(), epochs * counts)
    assert torch.equal(memory["visits"], torch.zeros(N))


def test_epochs_are_as_long_as_the_subset():
    subsets = torch.arange(N) < torch.tensor([10, 16, 17, N])[:, None]
    fleet = fit(subsets=subsets, epochs=torch.tensor([1.0, 1.0, 0.5, 2.0]))
    assert fleet.planned.tolist() == [2, 2, 2, 13]
    assert fit(epochs=1, members=2).planned.tolist() == [7, 7]


@pytest.mark.parametrize("fast", [True, False])
def test_weights_multiply_each_examples_loss(fast):
    weights = random.uniform(random.key(4), (3, N), torch.float64)
    weights[:, ::3] = 0
    fleet = fit(members=3, weights=weights, fast=fast)
    initial, plan = fit(members=3, steps=0), batches(range(3), 12, 8)
    for i in range(3):
        make = lambda p: torch.optim.Adam(p, 1e-3)  # noqa: E731
        parameters, losses = plain_loop(initial[i], plan[:, i], make, make_data(), weight=weights[i])
        same(fleet.parameters[i], parameters, 1e-10)
        same(fleet.history[i], losses, 1e-10)
    shared = fit(members=3, weights=weights[0], fast=fast)
    same(shared.parameters[0], fleet.parameters[0])
    differ(shared.history[1], fleet.history[1])


def test_a_weight_of_zero_takes_an_example_out():
    weights = torch.ones(N, dtype=torch.float64)
    weights[::2] = 0
    data = make_data()
    changed = data | {"y": torch.where(torch.arange(N) % 2 == 0, (data["y"] + 1) % CLASSES, data["y"])}
    assert torch.equal(fit(weights=weights).parameters, fit(weights=weights, data=changed).parameters)
    differ(fit().history, fit(data=changed).history)


def test_start_gives_the_initial_states():
    first = fit(members=3, seed=1)
    clones = first[[2, 0, 2]]
    begun = fit(start=clones, steps=0)
    assert torch.equal(begun.parameters, first.parameters[[2, 0, 2]])
    trained = fit(start=clones, streams=torch.tensor([0, 1, 0]), steps=6)
    assert torch.equal(trained.parameters[0], trained.parameters[2])
    assert torch.equal(clones.parameters, first.parameters[[2, 0, 2]])
    plan = batches([0, 1], 6, 8)
    parameters, _ = plain_loop(first[0], plan[:, 1], lambda p: torch.optim.Adam(p, 1e-3), make_data())
    same(trained.parameters[1], parameters, 1e-10)


def test_references_are_the_members_own_and_frozen():
    wide = lambda: MLP(FEATURES, (5, 4), CLASSES).double()  # noqa: E731
    teachers = fit(build=wide, members=3, seed=7)
    before = teachers.parameters.clone()

    def loss(model, batch, hyper):
        return (model(batch.x) - batch.teacher(batch.x)).square().sum(1)

    fleet = fit(loss, members=3, references={"teacher": teachers}, chunk=2)
    assert torch.equal(teachers.parameters, before)
    initial, plan, data = fit(members=3, steps=0), batches(range(3), 12, 8), make_data()
    for i in range(3):
        module, teacher = initial[i], teachers[i]
        optimiser = torch.optim.Adam(module.parameters(), 1e-3)
        for index in plan[:, i]:
            optimiser.zero_grad()
            x = data["x"][index]
            (module(x) - teacher(x).detach()).square().sum(1).mean().backward()
            optimiser.step()
        same(fleet.parameters[i], torch.cat([p.detach().flatten() for p in module.parameters()]), 1e-10)


def test_member_data_belongs_to_its_member():
    labels = torch.stack([(make_data()["y"] + i) % CLASSES for i in range(3)])
    fleet = fit(member_data={"y": labels}, chunk=2)
    for i in range(3):
        alone = fit(data=make_data() | {"y": labels[i]}, streams=torch.tensor([i]))
        same(fleet.parameters[i], alone.parameters[0])


def test_hyper_belongs_to_its_member():
    def loss(model, batch, hyper):
        return cross_entropy(model, batch, hyper) * hyper.scale + hyper["shift"]

    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.0, 3.0, -1.0]).double()
    fleet = fit(loss, hyper={"scale": scale, "shift": shift}, optimiser=SGD(0.1), chunk=2)
    assert torch.equal(fleet.hyper["scale"], scale)
    for i in range(3):
        alone = fit(streams=torch.tensor([i]), optimiser=SGD(0.1 * scale[i].item()))
        same(fleet.parameters[i], alone.parameters[0])
        same(fleet.history[i], alone.history[0] * scale[i] + shift[i])


def test_grid_makes_paired_members():
    arguments = grid(3, a=[1.0, 2.0], b=torch.tensor([5.0, 6.0]))
    a, b = arguments["hyper"]["a"].view(2, 2, 3), arguments["hyper"]["b"].view(2, 2, 3)
    assert torch.equal(a, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 2, 3))
    assert torch.equal(b, torch.tensor([5.0, 6.0])[:, None].expand(2, 2, 3))
    assert torch.equal(arguments["streams"].view(4, 3), torch.arange(3).expand(4, 3))
    assert arguments["streams"].dtype == torch.int64
    assert grid(2)["hyper"] == {}
    fleet = fit(**grid(2, a=[1.0, 2.0]))
    assert torch.equal(fleet.parameters[:2], fleet.parameters[2:])
    cases: list[tuple[Any, str]] = [
        ({"seeds": 0}, "seeds"),
        ({"seeds": 1, "a": []}, "a"),
        ({"seeds": 1, "a": 3.0}, "a"),
    ]
    for bad, name in cases:
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            grid(**bad)


def test_memory_carries_values_from_step_to_step():
    def loss(model, batch, hyper):
        values = cross_entropy(model, batch, hyper)
        mean = 0.9 * batch.mean + 0.1 * values.detach()
        return values + 0 * mean, {"mean": mean, "own": batch.own + batch.index[:, None]}

    own = normal(6, 3, N, 2)
    memory = {"mean": torch.zeros(N, dtype=torch.float64), "own": own}
    fleet = fit(loss, members=3, memory=memory, chunk=2)
    initial, plan, data = fit(members=3, steps=0), batches(range(3), 12, 8), make_data()
    for i in range(3):
        module, table, second = initial[i], torch.zeros(N, dtype=torch.float64), own[i].clone()
        optimiser = torch.optim.Adam(module.parameters(), 1e-3)
        for index in plan[:, i]:
            optimiser.zero_grad()
            values = F.cross_entropy(module(data["x"][index]), data["y"][index], reduction="none")
            values.mean().backward()
            optimiser.step()
            table[index] = 0.9 * table[index] + 0.1 * values.detach()
            second[index] = second[index] + index[:, None]
        same(fleet.memory["mean"][i], table)
        same(fleet.memory["own"][i], second)


# Random numbers in the loss


def test_dropout_follows_the_members_key(device):
    net = lambda: MLP(FEATURES, (8,), CLASSES, dropout=0.5).double()  # noqa: E731

    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x, key=batch.key), batch.y, reduction="none"), {"seen": batch.key.expand(8)}

    memory = {"seen": torch.zeros(N, dtype=torch.int64)}
    options: dict[str, Any] = {"build": net, "memory": memory, "steps": 5, "device": device}
    small, large = fit(loss, members=3, **options), fit(loss, members=7, chunk=2, **options)
    same(small.parameters, large.parameters[:3])
    differ(small.history, fit(build=net, members=3, steps=5, device=device).history)
    plan = batches(range(3), 5, 8)
    for step in range(5):
        keys = random.fold_in(random.fold_in(member_keys(range(3)), NOISE), step)
        last = [set(plan[step, i].tolist()) - set(plan[step + 1 :, i].flatten().tolist()) for i in range(3)]
        for i in range(3):
            assert all(small.memory["seen"][i, e].item() == keys[i].item() for e in last[i])
    paired = fit(loss, streams=torch.tensor([1, 1]), **options)
    assert torch.equal(paired.parameters[0], paired.parameters[1])


def test_dropout_equals_a_plain_loop_with_the_same_masks():
    net = lambda: MLP(FEATURES, (8,), CLASSES, dropout=0.4).double()  # noqa: E731

    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x, key=batch.key), batch.y, reduction="none")

    fleet = fit(loss, build=net, members=2)
    initial, plan, data = fit(build=net, members=2, steps=0), batches(range(2), 12, 8), make_data()
    for i in range(2):
        module = initial[i]
        optimiser = torch.optim.Adam(module.parameters(), 1e-3)
        noise = random.fold_in(member_keys(i), NOISE)
        for step, index in enumerate(plan[:, i]):
            optimiser.zero_grad()
            logits = module(data["x"][index], key=random.fold_in(noise, step))
            F.cross_entropy(logits, data["y"][index]).backward()
            optimiser.step()
        same(fleet.parameters[i], torch.cat([p.detach().flatten() for p in module.parameters()]), 1e-10)


def test_progress_index_and_fields_reach_the_loss():
    seen = []

    def loss(model, batch, hyper):
        seen.append(sorted(batch))
        values = cross_entropy(model, batch, hyper)
        return values, {"when": batch.progress.expand(8), "x0": batch.x[:, 0]}

    memory = {"when": torch.full((N,), -1.0).double(), "x0": torch.zeros(N).double()}
    fleet = fit(loss, members=2, memory=memory, steps=torch.tensor([4, 8]))
    assert seen[0] == ["index", "key", "progress", "when", "x", "x0", "y"]
    plan = batches(range(2), 8, 8)
    for i, steps in enumerate((4, 8)):
        expected = torch.full((N,), -1.0).double()
        for step in range(steps):
            expected[plan[step, i]] = step / steps
        same(fleet.memory["when"][i], expected)
        touched = expected >= 0
        assert torch.equal(fleet.memory["x0"][i][touched], make_data()["x"][touched, 0])


# Samplers, devices, the step


def test_class_balanced_batches_reach_the_loss():
    def loss(model, batch, hyper):
        y = batch.y.view(3, 2)
        wrong = (y != y[:, :1]).sum() + (y[:, 0].sort().values != torch.arange(3)).sum()
        return cross_entropy(model, batch, hyper) + wrong

    fleet = fit(loss, sampler=ClassBalanced(3, 2), batch=999)
    plan = batches(range(4), 12, 0, sampler=ClassBalanced(3, 2), y=make_data()["y"])
    make = lambda p: torch.optim.Adam(p, 1e-3)  # noqa: E731
    parameters, losses = plain_loop(fit(steps=0)[2], plan[:, 2], make, make_data())
    same(fleet.parameters[2], parameters, 1e-10)
    same(fleet.history[2], losses, 1e-10)
    assert fit(sampler=ClassBalanced(3, 2), epochs=1, members=1).planned.tolist() == [9]


def test_fleets_over_seeds_and_machines_join():
    whole = fit(members=6, steps=9)
    parts = [fit(streams=torch.arange(a, b), steps=9) for a, b in ((0, 1), (1, 4), (4, 6))]
    same(concatenate(parts).parameters, whole.parameters)
