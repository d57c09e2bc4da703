import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fleet_cases import fit
from torch import Tensor

from toolkit.fleet import SGD, Adam, AdamW, Step, Wrapper, cosine

MEMBERS, SIZE, STEPS = 3, 5, 30
RATES = torch.tensor([0.1, 0.01, 0.3], dtype=torch.float64)
DECAYS = torch.tensor([0.0, 0.2, 0.05], dtype=torch.float64)

CASES: dict[str, tuple[Any, Any]] = {
    "adam": (Adam(RATES), lambda p, lr, wd: torch.optim.Adam(p, lr)),
    "adam, other constants": (
        Adam(RATES, betas=(0.5, 0.9), eps=0.1, weight_decay=DECAYS),
        lambda p, lr, wd: torch.optim.Adam(p, lr, betas=(0.5, 0.9), eps=0.1, weight_decay=wd),
    ),
    "adamw": (AdamW(RATES, weight_decay=DECAYS), lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd)),
    "sgd": (SGD(RATES, weight_decay=DECAYS), lambda p, lr, wd: torch.optim.SGD(p, lr, weight_decay=wd)),
    "momentum": (
        SGD(RATES, momentum=0.9, weight_decay=DECAYS),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd),
    ),
    "nesterov": (
        SGD(RATES, momentum=0.5, nesterov=True),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.5, nesterov=True),
    ),
}


def gradients():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(STEPS, MEMBERS, SIZE, generator=generator, dtype=torch.float64)
        * torch.tensor([1.0, 1e-6, 1e3])[:, None]
    )


@pytest.mark.parametrize("name", CASES)
def test_each_member_steps_as_torch_does(name, device):
    ours, theirs = CASES[name]
    decay = ours.weight_decay if isinstance(ours.weight_decay, torch.Tensor) else None
    parameters = torch.linspace(-1, 1, MEMBERS * SIZE, dtype=torch.float64).view(MEMBERS, SIZE).to(device)
    plain = [torch.nn.Parameter(row.clone()) for row in parameters]
    optimisers = [theirs([p], RATES[i].item(), DECAYS[i].item()) for i, p in enumerate(plain)]
    state = ours.initial(parameters)
    column = None if decay is None else decay.to(device)[:, None]
    for step, gradient in enumerate(gradients().to(device)):
        before = gradient.clone()
        factor = 1 / (1 + step)
        ours.apply(parameters, gradient, state, RATES.to(device)[:, None] * factor, column, step)
        assert torch.equal(gradient, before)
        for i, optimiser in enumerate(optimisers):
            plain[i].grad = before[i]
            optimiser.param_groups[0]["lr"] = RATES[i].item() * factor
            optimiser.step()
        torch.testing.assert_close(parameters, torch.stack([p.detach() for p in plain]), rtol=1e-12, atol=1e-13)


def test_the_first_step_of_adam_is_the_learning_rate():
    parameters = torch.zeros(1, 3, dtype=torch.float64)
    optimiser = Adam(eps=0.0)
    rate = torch.full((1, 1), 0.5, dtype=torch.float64)
    gradient = torch.tensor([[3.0, -1e-4, 200.0]]).double()
    optimiser.apply(parameters, gradient, optimiser.initial(parameters), rate, None, 0)
    torch.testing.assert_close(parameters, torch.tensor([[-0.5, 0.5, -0.5]]).double())


def test_decoupled_decay_shrinks_even_without_a_gradient():
    parameters = torch.full((1, 2), 2.0, dtype=torch.float64)
    rate, decay = torch.full((1, 1), 0.1).double(), torch.full((1, 1), 0.5).double()
    AdamW().apply(parameters, torch.zeros(1, 2).double(), AdamW().initial(parameters), rate, decay, 0)
    torch.testing.assert_close(parameters, torch.full((1, 2), 2.0 * (1 - 0.05)).double(), rtol=1e-7, atol=0)
    SGD().apply(parameters, torch.zeros(1, 2).double(), {}, rate, decay, 0)
    torch.testing.assert_close(parameters, torch.full((1, 2), 2.0 * 0.95 * 0.95).double(), rtol=1e-7, atol=0)


def test_state_is_only_what_is_needed():
    parameters = torch.ones(2, 3)
    assert SGD().initial(parameters) == {}
    assert set(SGD(momentum=0.5).initial(parameters)) == {"momentum"}
    state = Adam().initial(parameters)
    assert set(state) == {"mean", "square"}
    assert all(bool((value == 0).all()) and value.shape == (2, 3) for value in state.values())


def test_the_default_decay_is_the_papers():
    assert Adam().weight_decay == SGD().weight_decay == 0
    assert AdamW().weight_decay == 0.01
    assert (Adam().lr, Adam().betas, Adam().eps) == (1e-3, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD])
def test_bad_rates_are_named(kind):
    for name in ("lr", "weight_decay"):
        for value in (-0.1, float("nan"), torch.tensor([0.1, -0.1])):
            with pytest.raises(ValueError, match=rf"^{name}: expected values of at least 0"):
                kind(**{name: value})
        with pytest.raises(ValueError, match=rf"^{name}: expected finite values"):
            kind(**{name: float("inf")})
        with pytest.raises(ValueError, match=rf"^{name}: expected one number or one per member, got shape \(2, 1\)"):
            kind(**{name: torch.ones(2, 1)})
        others: list[Any] = [[0.1, 0.2], "fast", np.ones(2), None]
        for other in others:
            with pytest.raises(TypeError, match=rf"^{name}: expected a number or a tensor with one per member"):
                kind(**{name: other})


def test_bad_shares_are_named():
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"^betas\[0\]: expected a number in \[0, 1\)"):
            Adam(betas=(value, 0.9))
        with pytest.raises(ValueError, match=r"^betas\[1\]: expected a number in \[0, 1\)"):
            AdamW(betas=(0.9, value))
        with pytest.raises(ValueError, match=r"^momentum: expected a number in \[0, 1\)"):
            SGD(momentum=value)
    with pytest.raises(ValueError, match=r"^nesterov: expected a momentum greater than 0"):
        SGD(nesterov=True)


# --- wrappers --------------------------------------------------------------------------------------------------------

INNER: dict[str, Any] = {
    "adam": Adam(0.05, weight_decay=0.1),
    "adamw": AdamW(torch.tensor([0.1, 0.01, 0.3]), weight_decay=torch.tensor([0.0, 0.2, 0.05])),
    "sgd": SGD(0.1, momentum=0.9, weight_decay=0.01),
    "plain": SGD(0.1),
}


@dataclass(frozen=True)
class Holding(Wrapper):
    """Only some coordinates have a gradient; how many steps there were is remembered."""

    mask: Tensor

    own = ("taken",)

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        return {"taken": parameters.new_zeros(len(parameters), 1), **super().initial(parameters)}

    def take(self, step: Step) -> None:
        step.state["taken"].add_(1)
        super().take(step._replace(gradient=torch.where(self.mask, step.gradient, 0)))


class Reading(SGD):
    """Writes down which parts of the state it is shown."""

    def apply(self, parameters, gradient, state, rate, decay, step) -> None:
        assert set(state) == {"momentum"}
        super().apply(parameters, gradient, state, rate, decay, step)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_wrapper_that_changes_nothing_gives_the_same_training_bit_for_bit(name, chunk):
    inner = INNER[name]
    options: dict[str, Any] = {"members": 3, "chunk": chunk, "schedule": cosine(), "snapshots": [5]}
    plain = fit(optimiser=inner, **options)
    assert (plain.parameters - plain.at(5).parameters).norm(dim=1).min() > 1e-3
    for wrapped in (Wrapper(inner), Wrapper(Wrapper(inner))):
        assert wrapped.lr is inner.lr
        assert wrapped.weight_decay is inner.weight_decay
        found = fit(optimiser=wrapped, **options)
        assert torch.equal(found.parameters, plain.parameters)
        assert torch.equal(found.history, plain.history)
        assert torch.equal(found.at(5).parameters, plain.at(5).parameters)
        assert set(found.state) == set(plain.state)
        assert all(torch.equal(found.state[part], value) for part, value in plain.state.items())


@pytest.mark.parametrize("inner", [Adam(0.05), SGD(0.1, momentum=0.9), SGD(0.1)], ids=["adam", "momentum", "sgd"])
def test_a_wrapper_that_masks_the_gradient_leaves_coordinates_bit_for_bit(inner):
    start = fit(steps=0, members=3)
    mask = torch.arange(start.parameters.shape[1]) % 3 == 0
    plain, found = (fit(start=start, optimiser=each, chunk=2) for each in (inner, Holding(inner, mask)))
    assert torch.equal(found.parameters[:, ~mask], start.parameters[:, ~mask])
    assert ((found.parameters != start.parameters)[:, mask]).all()
    assert (plain.parameters != start.parameters).all()
    assert found.state["taken"].flatten().tolist() == [12, 12, 12]
    everything = fit(start=start, optimiser=Holding(inner, torch.ones_like(mask)), chunk=2)
    assert torch.equal(everything.parameters, plain.parameters)


def test_a_wrapper_keeps_its_own_state_to_itself():
    mask = torch.ones((), dtype=torch.bool)
    found = fit(optimiser=Wrapper(Holding(Reading(0.1, momentum=0.9), mask)))
    assert set(found.state) == {"momentum", "taken"}
    assert torch.equal(found.parameters, fit(optimiser=SGD(0.1, momentum=0.9)).parameters)


def test_a_step_holds_what_apply_is_given_in_its_order():
    assert Step._fields[:-1] == tuple(inspect.signature(Adam.apply).parameters)[1:-1]
    seen = []

    class Seeing(Wrapper):
        def take(self, step: Step) -> None:
            seen.append(step)

    given = [torch.full((1, 1), float(i)) for i in range(5)]
    parameters, gradient, state, rate, decay = given[0], given[1], {"mean": given[2]}, given[3], given[4]
    Seeing(Adam()).apply(parameters, gradient, state, rate, decay, 7)
    assert seen == [(parameters, gradient, state, rate, decay, 7)]
