"""Training that unlearns, against plain gradient descent on one module; and what all approximate methods share."""

from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from unlearning_cases import (
    CLASSES,
    DATA,
    DIM,
    FORGET,
    METHODS,
    TARGETS,
    TRAINING,
    WHOLE,
    N,
    X,
    Y,
    call,
    make,
    mean_ce,
    net,
)

from toolkit.fleet import SGD, Adam, AdamW, Fleet, train
from toolkit.models import MLP
from toolkit.random import key, normal
from toolkit.unlearning import approximate, one_shot
from toolkit.unlearning.parts import prepare, untrained


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return make()


def mean_kl(model, teacher, mask, temperature=1.0):
    student, wanted = ((net(X[mask]) / temperature).log_softmax(-1) for net in (model, teacher))
    return temperature**2 * F.kl_div(student, wanted.detach(), log_target=True, reduction="batchmean")


class Duck:
    """Centroids by a loop over classes by name, once, from the original."""

    def __init__(self, original, lost, kept):
        with torch.no_grad():
            features = original(X, return_features=True)[1]
            centres = {int(k): features[kept & (k == Y)].mean(0) for k in Y[kept].unique()}
            self.targets = []
            for i in lost.nonzero()[:, 0].tolist():
                others = [k for k in centres if k != int(Y[i])]
                best = max(others, key=lambda k: float(F.cosine_similarity(features[i], centres[k], dim=0)))
                self.targets.append(centres[best])

    def __call__(self, model, lost):
        features = model(X[lost], return_features=True)[1]
        return (1 - F.cosine_similarity(features, torch.stack(self.targets))).mean()


LAMBDA = torch.tensor([0.5, 1.7], dtype=torch.float64)  # one strength for each member

# name: (options, objective(model, original, untrained, member, share of the steps done, duck) for one plain module)
OBJECTIVES: dict[str, tuple[dict[str, Any], Any]] = {
    "fine_tune": ({}, lambda m, o, u, i, t, d: mean_ce(m, ~FORGET[i])),
    "gradient_ascent": ({}, lambda m, o, u, i, t, d: -mean_ce(m, FORGET[i])),
    "neg_grad_plus": (
        {"beta": LAMBDA / 2},
        lambda m, o, u, i, t, d: LAMBDA[i] / 2 * mean_ce(m, ~FORGET[i]) - (1 - LAMBDA[i] / 2) * mean_ce(m, FORGET[i]),
    ),
    "bad_teacher": (
        {"retain_weight": LAMBDA, "temperature": 2.0},
        lambda m, o, u, i, t, d: mean_kl(m, u, FORGET[i], 2.0) + LAMBDA[i] * mean_kl(m, o, ~FORGET[i], 2.0),
    ),
    "stochastic_teacher": (
        {"erase": torch.tensor([0.5, 0.75], dtype=torch.float64)},
        lambda m, o, u, i, t, d: mean_kl(m, u, FORGET[i]) if t < (0.5, 0.75)[i] else mean_kl(m, o, ~FORGET[i]),
    ),
    "scrub": (
        {"rounds": 4, "ascents": torch.tensor([2.0, 3.0], dtype=torch.float64), "alpha": LAMBDA, "gamma": 0.9},
        lambda m, o, u, i, t, d: (
            -mean_kl(m, o, FORGET[i], 4.0)
            if (t * 8) % 2 == 0 and t * 4 < (2, 3)[i]
            else 0.9 * mean_ce(m, ~FORGET[i]) + LAMBDA[i] * mean_kl(m, o, ~FORGET[i], 4.0)
        ),
    ),
    "l1_sparse": (
        {"strength": LAMBDA / 100},
        lambda m, o, u, i, t, d: (
            mean_ce(m, ~FORGET[i]) + LAMBDA[i] / 100 * (1 - t) * sum(p.abs().sum() for p in m.parameters())
        ),
    ),
    "duck": (
        {"forget_weight": LAMBDA, "retain_weight": 1.2, "temperature": 3.0},
        lambda m, o, u, i, t, d: LAMBDA[i] * d(m, FORGET[i]) + 1.2 * mean_ce(m, ~FORGET[i], 3.0),
    ),
    "oracle_matching": (
        {"retain_weight": LAMBDA},
        lambda m, o, u, i, t, d: (
            (m(X[FORGET[i]]) - TARGETS[i, FORGET[i]]).square().sum(-1).mean()
            + LAMBDA[i] * (m(X[~FORGET[i]]) - TARGETS[i, ~FORGET[i]]).square().sum(-1).mean()
        ),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_full_batches_are_plain_gradient_descent_on_the_objective(name, fleet):
    """Also: each member has its own mask and strength, teachers stay as they are, sets of any two sizes weigh alike."""
    options, objective = OBJECTIVES[name]
    batch = {"gradient_ascent": 70}.get(name, WHOLE)
    before = fleet.parameters.clone()
    found = call(name, fleet, steps=8, batch=batch, optimiser=SGD(0.05), seed=3, **options)
    assert torch.equal(fleet.parameters, before)
    teachers = untrained(fleet, prepare(fleet, DATA, FORGET, None), 3)
    for i in range(2):
        model, original = fleet[i], fleet[i]
        duck = Duck(original, FORGET[i], ~FORGET[i])
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        for step in range(8):
            optimiser.zero_grad()
            objective(model, original, teachers[i], i, step / 8, duck).backward()
            optimiser.step()
        expected = fleet.layout.pack(model)
        assert (expected - before[i]).norm() > 0.01
        torch.testing.assert_close(found.parameters[i], expected, rtol=1e-9, atol=1e-11)


def test_random_labels_are_uniform_in_expectation(fleet):
    """Over many draws the step is that of mean_f CE(uniform) + λ mean_r CE."""
    found = approximate.random_labels(
        fleet, DATA, FORGET, retain_weight=LAMBDA, steps=1, batch=WHOLE * 100, optimiser=SGD(1.0)
    )
    for i in range(2):
        model = fleet[i]
        uniform = -model(X[FORGET[i]]).log_softmax(-1).mean()
        (uniform + LAMBDA[i] * mean_ce(model, ~FORGET[i])).backward()
        expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        step = fleet.parameters[i] - found.parameters[i]
        assert (step - expected).norm() < 0.03 * expected.norm()


def test_teachers_without_training_are_not_what_the_members_began_as(fleet):
    task = prepare(fleet, DATA, FORGET, None)
    new = untrained(fleet, task, fleet.seed)
    began = make(steps=0).parameters
    assert (new.parameters - began).norm(dim=1).min() > 0.5
    assert (new.parameters[0] - new.parameters[1]).norm() > 0.5
    assert torch.equal(
        new[[1]].parameters, untrained(fleet[[1]], prepare(fleet[[1]], DATA, FORGET[1], None), fleet.seed).parameters
    )


@pytest.mark.parametrize("name", METHODS)
def test_each_member_is_what_it_is_alone(name, fleet):
    options = {"steps": 5, "batch": 8, "seed": 2} if name in TRAINING else {"alpha": 1.0} if name == "ssd" else {}
    together = call(name, fleet, **options)
    assert len(together) == 2
    assert (together.parameters - fleet.parameters).norm(dim=1).min() > 1e-4
    alone = METHODS[name](fleet[[1]], DATA, FORGET[1], *([TARGETS[1]] if name == "oracle_matching" else []), **options)
    torch.testing.assert_close(alone.parameters[0], together.parameters[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_examples_in_neither_mask_play_no_part(name, fleet):
    """A fleet that was trained on subsets says what is to be kept; what it never saw may be anything."""
    retain = ~FORGET
    retain[:, 20:] = False
    out = ~(FORGET | retain).any(0)
    assert out.any()
    other = {"x": torch.where(out[:, None], 100.0, X), "y": torch.where(out, 0, Y)}
    options = {"steps": 5, "batch": 8} if name in TRAINING else {"alpha": 1.0} if name == "ssd" else {}
    extra = [TARGETS] if name == "oracle_matching" else []
    one, two = (METHODS[name](fleet, data, FORGET, *extra, retain=retain, **options) for data in (DATA, other))
    torch.testing.assert_close(one.parameters, two.parameters, rtol=1e-9, atol=1e-11)
    full = METHODS[name](fleet, DATA, FORGET, *extra, **options)
    if name not in ("gradient_ascent",):
        assert not torch.equal(one.parameters, full.parameters)


def test_saliency_is_the_top_of_all_slopes(fleet):
    fraction = torch.tensor([0.3, 0.8], dtype=torch.float64)
    mask = approximate.saliency_mask(fleet, DATA, FORGET, fraction=fraction)
    for i in range(2):
        model = fleet[i]
        mean_ce(model, FORGET[i]).backward()
        slopes = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).abs()
        count = round(float(fraction[i]) * len(slopes))
        assert mask[i].sum() == count
        first = sorted(range(len(slopes)), key=lambda j: (-float(slopes[j]), j))[:count]
        assert mask[i].nonzero()[:, 0].tolist() == sorted(first)


@pytest.mark.parametrize(
    "optimiser",
    [Adam(0.01, weight_decay=0.1), AdamW(0.01, weight_decay=0.5), SGD(0.05, momentum=0.9, weight_decay=0.1)],
    ids=["adam", "adamw", "sgd"],
)
def test_salun_leaves_masked_coordinates_bit_for_bit(optimiser, fleet):
    fraction = torch.tensor([0.3, 0.8], dtype=torch.float64)
    mask = approximate.saliency_mask(fleet, DATA, FORGET, fraction=fraction)
    options: dict[str, Any] = {"steps": 25, "batch": 8, "optimiser": optimiser, "fraction": fraction}
    found = approximate.salun(fleet, DATA, FORGET, **options)
    assert torch.equal(found.parameters[~mask], fleet.parameters[~mask])
    assert (found.parameters[mask] != fleet.parameters[mask]).all()
    for name in set(found.state) - {"mask", "original"}:
        assert not found.state[name][~mask].any()
        assert found.state[name][mask].any()
    chunked = approximate.salun(fleet, DATA, FORGET, chunk=1, **options)
    torch.testing.assert_close(chunked.parameters, found.parameters, rtol=1e-9, atol=1e-11)


def test_a_mask_on_the_gradient_alone_leaks(fleet):
    """The public mistake: weight decay moves what the mask should hold."""
    mask = approximate.saliency_mask(fleet, DATA, FORGET, fraction=0.5)

    def leaking(model, batch, hyper):
        views = {
            n: torch.where(batch[k], p, p.detach()) for (n, p), k in zip(model.parameters.items(), keys, strict=True)
        }
        return F.cross_entropy(functional_call(module, views, (batch.x,)), batch.y, reduction="none")

    module, keys = net(), [f"mask{j}" for j in range(4)]
    rows = {
        k: v[:, None].expand(-1, N, *v.shape[1:]) for k, v in zip(keys, fleet.layout.views(mask).values(), strict=True)
    }

    def first(model, batch, hyper):
        batch = type(batch)(batch, **{k: batch[k][0] for k in keys})
        return leaking(model, batch, hyper)

    options: dict[str, Any] = {"steps": 5, "batch": 8, "start": fleet, "member_data": rows, "progress": False}
    still = train(net, first, DATA, optimiser=SGD(0.05, momentum=0.9), **options)
    assert torch.equal(still.parameters[~mask], fleet.parameters[~mask])
    leaked = train(net, first, DATA, optimiser=SGD(0.05, momentum=0.9, weight_decay=5e-2), **options)
    assert not torch.equal(leaked.parameters[~mask], fleet.parameters[~mask])


def test_salun_with_every_coordinate_is_random_labels(fleet):
    options: dict[str, Any] = {"steps": 6, "batch": 8, "optimiser": AdamW(0.01), "seed": 5}
    masked = approximate.salun(fleet, DATA, FORGET, fraction=1.0, **options)
    assert torch.equal(masked.parameters, approximate.random_labels(fleet, DATA, FORGET, **options).parameters)
    none = approximate.salun(fleet, DATA, FORGET, fraction=0.0, **options)
    assert torch.equal(none.parameters, fleet.parameters)


def test_scrub_moves_the_student_and_not_the_teacher(fleet):
    """A public version gave the optimiser the teacher's parameters, so that the student stood still."""
    before = fleet.parameters.clone()
    student = approximate.scrub(fleet, DATA, FORGET, steps=20, optimiser=Adam(0.01))
    assert torch.equal(fleet.parameters, before)
    assert (student.parameters - before).norm(dim=1).min() > 0.05


def test_strengths_are_kept_as_hyper_parameters_and_snapshots_pass_through(fleet):
    found = approximate.neg_grad_plus(fleet, DATA, FORGET, beta=LAMBDA / 2, steps=4, batch=8, snapshots=[0, 2])
    torch.testing.assert_close(found.hyper["beta"], LAMBDA / 2)
    assert torch.equal(found.at(0).parameters, fleet.parameters)
    assert torch.equal(one_shot.ssd(fleet, DATA, FORGET, alpha=LAMBDA).hyper["alpha"], LAMBDA)
    rates = torch.tensor([0.0, 0.1])
    moved = approximate.fine_tune(fleet, DATA, FORGET, steps=2, optimiser=SGD(rates)).parameters - fleet.parameters
    assert (moved.norm(dim=1) > 0).tolist() == [False, True]


@pytest.mark.parametrize("name", METHODS)
def test_masks_that_make_no_sense_are_refused(name, fleet):
    none, everything = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    for forget, message in ((none, "forget: expected at least one"), (everything, "forget: expected some of the 30")):
        with pytest.raises(ValueError, match=message):
            call(name, fleet, forget)
    with pytest.raises(ValueError, match=r"forget: expected a mask \(30,\) or \(2, 30\), got \(29,\)"):
        call(name, fleet, FORGET[0, 1:])
    with pytest.raises(ValueError, match="retain: expected at least one"):
        call(name, fleet, FORGET, retain=none)
    with pytest.raises(ValueError, match="retain: expected no example that is in forget too, got 10"):
        call(name, fleet, FORGET, retain=everything)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neg_grad_plus", {"beta": 1.5}, "beta: expected at most 1"),
        ("random_labels", {"retain_weight": -1.0}, "retain_weight: expected at least 0"),
        ("bad_teacher", {"temperature": 0.0}, "temperature: expected at least"),
        ("stochastic_teacher", {"erase": torch.tensor([0.5, 1.5])}, "erase: expected at most 1"),
        ("scrub", {"rounds": 0}, "rounds: expected at least 1"),
        ("l1_sparse", {"strength": -1.0}, "strength: expected at least 0"),
        ("salun", {"fraction": 1.1}, "fraction: expected at most 1"),
        ("ssd", {"alpha": -1.0}, "alpha: expected at least 0"),
        ("fisher_forgetting", {"largest": torch.ones(3)}, "largest: expected one number or one for each of 2"),
        ("newton_step", {"damping": float("nan")}, "damping: expected at least 0"),
        ("duck", {"temperature": -2.0}, "temperature: expected at least"),
    ],
)
def test_strengths_out_of_range_are_refused(name, options, message, fleet):
    with pytest.raises(ValueError, match=message):
        call(name, fleet, **options)


def test_other_errors_name_the_argument(fleet):
    with pytest.raises(ValueError, match=r"targets: expected \(30, classes\)"):
        approximate.oracle_matching(fleet, DATA, FORGET, TARGETS[:, 1:])
    with pytest.raises(ValueError, match="data: expected fields 'x' and 'y', got none of the name 'y'"):
        approximate.fine_tune(fleet, {"x": X}, FORGET)
    with pytest.raises(ValueError, match=r"data\['y'\]: expected one class"):
        approximate.fine_tune(fleet, {"x": X, "y": Y[:, None]}, FORGET)
    with pytest.raises(ValueError, match="retain: expected a class besides"):
        approximate.duck(fleet, DATA, (Y == 0) & (torch.arange(N) < 9), retain=(Y == 0) & (torch.arange(N) >= 9))


def test_float32_members_and_the_same_noise():
    assert normal(key(0), (3,)).dtype == torch.float32
    data = {"x": X.float(), "y": Y}

    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    single = train(lambda: MLP(DIM, (6,), CLASSES), loss, data, members=2, steps=20, progress=False)
    for name in METHODS:
        options = {"steps": 3, "batch": 8} if name in TRAINING else {}
        extra = [TARGETS.float()] if name == "oracle_matching" else []
        found = METHODS[name](single, data, FORGET, *extra, **options)
        assert found.parameters.dtype == torch.float32
        assert found.parameters.isfinite().all()
