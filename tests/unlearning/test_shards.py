"""Plans by counting, training against data that cannot be read, deletions against the law of coupons."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.fleet import Adam, train
from toolkit.models import MLP
from toolkit.unlearning.shards import expected_deletions, plan_shards, simulate_deletions, train_shards

N, FEATURES, CLASSES = 48, 4, 3
X = random.normal(random.key(1), (N, FEATURES), torch.float64)
Y = (X @ random.normal(random.key(2), (FEATURES, CLASSES), torch.float64)).argmax(1)
DATA = {"x": X, "y": Y}
GROUPS = [["head"], ["layers.1"], ["layers.0.weight", "layers.0.bias"]]
FIT: dict[str, Any] = {"optimiser": Adam(1e-2, weight_decay=0.1), "batch": 4, "progress": False, "device": "cpu"}


def build():
    return MLP(FEATURES, (6, 5), CLASSES).double()


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def blinded(plan, shard, slices):
    """The data with some slices of a shard not a number."""
    hidden = (plan.shard == shard) & torch.isin(plan.slice, torch.tensor(slices))
    return {"x": torch.where(hidden[:, None], float("nan"), X), "y": Y}


def test_plan_splits_evenly_and_rotations_put_every_slice_first_once():
    plan = plan_shards(50, 3, 4, 4, seed=1)
    counts = torch.bincount(plan.shard * 4 + plan.slice, minlength=12)
    assert counts.tolist().count(4) + counts.tolist().count(5) == 12
    for order in plan.order:
        assert order[:, 0].sort().values.tolist() == [0, 1, 2, 3]
        for row in order:
            assert row.sort().values.tolist() == [0, 1, 2, 3]
            assert ((row - row[0]) % 4).tolist() == [0, 1, 2, 3]
    assert not torch.equal(plan.shard, plan_shards(50, 3, 4, 4, seed=2).shard)
    more = plan_shards(50, 1, 4, 11).order[0]
    assert len(more) == 11
    assert all(sorted(row) == [0, 1, 2, 3] for row in more.tolist())
    assert torch.equal(plan_shards(50, 3, 4, 1).order, torch.arange(4).expand(3, 1, 4))


def test_masks_are_what_a_loop_finds():
    plan = plan_shards(N, 2, 3, 2)
    for stage, cumulative in itertools.product(range(3), (False, True)):
        mask = plan.mask(stage, cumulative)
        for shard, sequence, i in itertools.product(range(2), range(2), range(N)):
            seen = plan.order[shard, sequence].tolist()[0 if cumulative else stage : stage + 1]
            expected = int(plan.shard[i]) == shard and int(plan.slice[i]) in seen
            assert bool(mask[2 * shard + sequence, i]) == expected
    assert (plan.mask(2, True).sum(0) == 2).all()  # each example in both models of its shard
    with pytest.raises(ValueError, match="stage"):
        plan.mask(3, True)


def test_depth_is_the_prefix_before_the_first_touched_slice():
    plan = plan_shards(N, 2, 3, 3)
    for hits in itertools.product((False, True), repeat=6):
        touched = torch.tensor(hits).view(2, 3)
        for shard, sequence in itertools.product(range(2), range(3)):
            order = plan.order[shard, sequence].tolist()
            expected = next((k for k, s in enumerate(order) if touched[shard, s]), 3)
            assert int(plan.depth(touched)[shard, sequence]) == expected
    forget = torch.zeros(N, dtype=torch.bool)
    forget[7] = True
    assert plan.touched(forget).nonzero().tolist() == [[int(plan.shard[7]), int(plan.slice[7])]]
    with pytest.raises(ValueError, match="forget"):
        plan.touched(forget[1:])


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["SISA", "S3T"])
def test_what_is_left_after_a_deletion_never_saw_the_slice(groups):
    """Bit-identical to training on data in which that slice is not a number."""
    plan = plan_shards(N, 2, 3, 2, seed=4)
    run = train_shards(build, cross_entropy, DATA, plan, groups=groups, steps=6, **FIT)
    forget = torch.zeros(N, dtype=torch.bool)
    forget[((plan.shard == 1) & (plan.slice == 1)).nonzero()[0]] = True  # one example of the slice
    fleet, depth = run.after(forget)
    assert depth.tolist() == [3, 3, 1, 0]
    assert run.serving(forget).tolist() == [0, 2]
    with pytest.warns(RuntimeWarning, match="non-finite"):
        blind = train_shards(build, cross_entropy, blinded(plan, 1, [1]), plan, groups=groups, steps=6, **FIT)
    for model, kept in enumerate(depth.tolist()):
        assert torch.equal(fleet.parameters[model], blind.stages[kept].parameters[model])
        assert torch.equal(fleet.parameters[model], run.stages[kept].parameters[model])
        if kept:
            assert not torch.equal(fleet.parameters[model], run.stages[0].parameters[model])
    gone = plan.shard == 1
    assert run.serving(gone).tolist() == [0]
    assert run.serving(gone | ~gone).tolist() == []


def test_a_stage_of_s3t_moves_its_layer_only_and_sees_its_slice_only():
    plan = plan_shards(N, 2, 3, 1, seed=4)
    run = train_shards(build, cross_entropy, DATA, plan, groups=GROUPS, steps=6, **FIT)
    for stage, group in enumerate(GROUPS):
        before, after = (s.layout.views(s.parameters) for s in run.stages[stage : stage + 2])
        for name in before:
            moves = any(name.startswith(part) for part in group)
            assert torch.equal(before[name], after[name]) != moves
    with pytest.warns(RuntimeWarning, match="non-finite"):
        blind = train_shards(build, cross_entropy, blinded(plan, 0, [1]), plan, groups=GROUPS, steps=6, **FIT)
    assert torch.equal(blind.stages[1].parameters, run.stages[1].parameters)
    # A stage is training on that slice alone with all other layers held constant.
    plain = FIT | {"optimiser": Adam(1e-2)}
    run = train_shards(build, cross_entropy, DATA, plan, groups=GROUPS, steps=6, **plain)
    module = build()

    def last_stage(model, batch, hyper):
        layers = {n: p if n.startswith("layers.0") else p.detach() for n, p in model.parameters.items()}
        return F.cross_entropy(torch.func.functional_call(module, layers, (batch.x,)), batch.y, reduction="none")

    hidden = {"x": torch.where((plan.slice < 2)[:, None], float("nan"), X), "y": Y}
    subsets = torch.stack([(plan.shard == shard) & (plan.slice == 2) for shard in range(2)])
    expected = train(build, last_stage, hidden, start=run.stages[2], subsets=subsets, seed=2, steps=6, **plain)
    torch.testing.assert_close(run.stages[3].parameters, expected.parameters, rtol=0, atol=1e-12)
    assert (run.stages[3].parameters - run.stages[2].parameters).abs().max() > 1e-2


def test_stages_of_sisa_are_plain_training_from_the_stage_before():
    plan = plan_shards(N, 2, 2, 1, seed=4)
    run = train_shards(build, cross_entropy, DATA, plan, epochs=2, seed=5, **FIT)
    fleet = None
    for stage in range(2):
        subsets = torch.stack([(plan.shard == shard) & (plan.slice <= stage) for shard in range(2)])
        fleet = train(build, cross_entropy, DATA, start=fleet, subsets=subsets, epochs=2, seed=5 + stage, **FIT)
        assert torch.equal(fleet.parameters, run.stages[stage + 1].parameters)


def test_sisa_retrains_from_the_stage_before_the_deletion_to_the_same_numbers():
    plan = plan_shards(N, 3, 3, 1, seed=6)
    run = train_shards(build, cross_entropy, DATA, plan, epochs=1, **FIT)
    forget = torch.zeros(N, dtype=torch.bool)
    forget[((plan.shard == 1) & (plan.slice == 1)).nonzero()[:2]] = True
    blind = {"x": torch.where(forget[:, None], float("nan"), X), "y": Y}
    anew = train_shards(build, cross_entropy, blind, plan, forget=forget, epochs=1, **FIT)
    reused = train_shards(build, cross_entropy, blind, plan, forget=forget, reuse=run, epochs=1, **FIT)
    assert anew.stages[-1].parameters.isfinite().all()
    for one, other, before in zip(anew.stages, reused.stages, run.stages, strict=True):
        assert torch.equal(one.parameters, other.parameters)
        assert torch.equal(one.parameters[0], before.parameters[0])
    assert torch.equal(anew.stages[1].parameters[1], run.stages[1].parameters[1])
    assert not torch.equal(anew.stages[2].parameters[1], run.stages[2].parameters[1])


@pytest.mark.parametrize(("shards", "slices", "sequences"), [(5, 6, 1), (5, 6, 3), (5, 6, 6), (2, 3, 2), (1, 4, 9)])
def test_deletions_until_failure_follow_the_law(shards, slices, sequences):
    plan = plan_shards(60, shards, slices, sequences)
    lasted = simulate_deletions(plan, 1200, seed=1).lasted.double()
    error = lasted.std() / math.sqrt(len(lasted))
    law = expected_deletions(shards, slices, sequences)
    assert abs(lasted.mean() - law) < 3 * error
    first = plan.order[:, :, 0] + slices * torch.arange(shards)[:, None]
    wanted, total = len(first.unique()), shards * slices  # the variance of the collector, too
    variance = sum(total * (total - k) / k**2 for k in range(1, wanted + 1))
    assert lasted.var() == pytest.approx(variance, rel=0.2)


def test_the_law_at_the_papers_sizes():
    assert expected_deletions(5, 6) == pytest.approx(68.5, abs=0.05)
    assert expected_deletions(5, 6, 3) == pytest.approx(99.5, abs=0.05)
    assert expected_deletions(5, 6, 6) == pytest.approx(119.8, abs=0.05)
    assert expected_deletions(5, 6, 12) == expected_deletions(5, 6, 6)
    assert expected_deletions(1, 1) == 1


def test_the_simulator_walks_through_requests_and_heeds_priors():
    plan = plan_shards(60, 2, 3, 3)
    run = simulate_deletions(plan, 500, seed=2)
    assert (run.depth.diff(dim=1) <= 0).all()
    for trial, last in enumerate(run.lasted.tolist()):
        assert run.depth[trial, last - 2] > 0
        assert run.depth[trial, last - 1] == 0
    assert run.depth[:, 0].unique().tolist() == [2.5]  # one slice gone: the best of three rotations keeps two of three
    assert torch.equal(simulate_deletions(plan, 20, seed=2).lasted, run.lasted[:20])
    single = plan_shards(60, 1, 3, 1)
    lasted = simulate_deletions(single, 4000, priors=torch.tensor([[0.2, 0.3, 0.5]])).lasted.double()
    assert abs(lasted.mean() - 5) < 3 * lasted.std() / math.sqrt(4000)  # slice 0 is first: geometric with 0.2


def test_bad_input():
    plan = plan_shards(N, 2, 3)
    for options, name in (
        ((N, 0, 1), "shards"),
        ((N, 1, 0), "slices"),
        ((N, 1, 1, 0), "sequences"),
        ((5, 2, 3), "slices"),
    ):
        with pytest.raises(ValueError, match=name):
            plan_shards(*options)
    with pytest.raises(ValueError, match="sequences"):
        expected_deletions(1, 1, 0)
    with pytest.raises(ValueError, match="trials"):
        simulate_deletions(plan, 0)
    for priors in (torch.ones(3, 3), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="priors"):
            simulate_deletions(plan, 1, priors=priors)
    for groups in ([["head"]], [["head"], ["layers.0"], ["body"]], [["head"], ["layers.0"], ["layers"]]):
        with pytest.raises(ValueError, match="groups"):
            train_shards(build, cross_entropy, DATA, plan, groups=groups, steps=1, **FIT)
    run = train_shards(build, cross_entropy, DATA, plan, steps=1, **FIT)
    with pytest.raises(ValueError, match="reuse"):
        train_shards(build, cross_entropy, DATA, plan_shards(N, 2, 3), forget=Y == 0, reuse=run, steps=1, **FIT)
    with pytest.raises(ValueError, match="streams"):
        train_shards(build, cross_entropy, DATA, plan, streams=torch.arange(5), steps=1, **FIT)
