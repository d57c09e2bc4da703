"""Rank-one edits against Lagrange's conditions, random rivals, nets run by hand, and edits made member by member."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from toolkit.fleet import Adam, Fleet, train
from toolkit.models import MLP, ByteTransformer
from toolkit.unlearning.editing import layer_keys, rank_one_edit, redirect_concept
from toolkit.unlearning.language import next_byte_loss, recall
from toolkit.unlearning.texts import IGNORED, facts

OUT, IN = 4, 6
TEXT = facts(5, {"home": ("{name} in {answer}.", "so {name}: {answer}.")}, pool=4, seed=3)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem() -> tuple[torch.Tensor, ...]:
    keys = draw(20, IN, seed=3) @ draw(IN, IN, seed=4)
    return draw(OUT, IN), draw(IN, seed=1), draw(OUT, seed=2), keys.mT @ keys / 20


def net() -> MLP:
    return MLP(5, (8, 7), 3).double()


def text_net() -> ByteTransformer:
    return ByteTransformer(TEXT.x.shape[1], 128, 16, 1, 2)


X, Y = draw(12, 5, seed=6), torch.arange(12) % 3


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet.of([net() for _ in range(2)], net)


def test_the_key_gets_its_value_and_orthogonal_keys_keep_theirs():
    weight, key, value, covariance = problem()
    edited = rank_one_edit(weight, key, value, covariance)
    torch.testing.assert_close(edited @ key, value)
    u = draw(IN, 5, seed=7)
    dual = torch.linalg.solve(covariance, key)
    u = u - torch.outer(key, dual @ u) / (key @ dual)  # kᵀ C⁻¹ u = 0
    torch.testing.assert_close(edited @ u, weight @ u)
    assert not torch.allclose(edited @ draw(IN, seed=8), weight @ draw(IN, seed=8))


def test_the_change_has_rank_one_and_is_the_least():
    weight, key, value, covariance = problem()
    change = rank_one_edit(weight, key, value, covariance) - weight
    sizes = torch.linalg.svdvals(change)
    assert sizes[0] > 0.1
    assert sizes[1] < 1e-12
    # Lagrange: the slope 2 Δ C of the norm tr(Δ C Δᵀ) is a multiple of k for each output
    slope = change @ covariance
    torch.testing.assert_close(slope, torch.outer(slope @ key, key) / (key @ key))
    least = torch.trace(change @ covariance @ change.mT)
    for seed in range(20):  # other changes that keep the constraint
        free = draw(OUT, IN, seed=20 + seed)
        rival = change + 0.3 * (free - torch.outer(free @ key, key) / (key @ key))
        torch.testing.assert_close(rival @ key, change @ key)
        assert torch.trace(rival @ covariance @ rival.mT) > least
    plain = torch.outer(value - weight @ key, key) / (key @ key)
    torch.testing.assert_close(rank_one_edit(weight, key, value, torch.eye(IN, dtype=weight.dtype)), weight + plain)


def test_an_edit_to_the_same_value_and_vmap():
    weight, key, value, covariance = problem()
    torch.testing.assert_close(rank_one_edit(weight, key, weight @ key, covariance), weight)
    keys = torch.stack([key, 2 * draw(IN, seed=9)])
    together = torch.vmap(rank_one_edit, (None, 0, None, None))(weight, keys, value, covariance)
    torch.testing.assert_close(together[1], rank_one_edit(weight, keys[1], value, covariance))


def test_keys_are_what_enters_the_layer(fleet):
    with torch.no_grad():
        for member in range(2):
            module = fleet[member]
            first = module.layers[0](X).relu()
            torch.testing.assert_close(layer_keys(fleet, {"x": X, "y": Y}, "layers.0")[member], X)
            torch.testing.assert_close(layer_keys(fleet, {"x": X, "y": Y}, "layers.1")[member], first)
            second = module.layers[1](first).relu()
            torch.testing.assert_close(layer_keys(fleet, {"x": X, "y": Y}, "head")[member], second)


def test_keys_of_texts_are_those_at_the_last_byte_of_the_prompt():
    texts = Fleet.of([text_net() for _ in range(2)], text_net)
    keys = layer_keys(texts, TEXT, "blocks.0.down")
    caught = []
    module = texts[1]
    with torch.no_grad(), module.blocks[0].down.register_forward_pre_hook(lambda _, given: caught.append(given[0])):
        for row in range(len(TEXT)):
            prompt = TEXT.lines()[row][:-5]  # the answer is four letters and a full stop
            module(torch.tensor([list(prompt.encode())]))
            torch.testing.assert_close(keys[1, row], caught[-1][0, -1])
            assert int((TEXT.y[row] != IGNORED).nonzero()[0, 0]) == len(prompt) - 1


def test_each_member_is_edited_as_by_hand_and_only_its_layer(fleet):
    forget = torch.stack([Y == 0, Y == 1])
    harmless, strength, ridge = Y == 2, torch.tensor([1.0, 0.5], dtype=torch.float64), 0.02
    after = redirect_concept(
        fleet, {"x": X, "y": Y}, forget, harmless, layer="layers.1", strength=strength, ridge=ridge
    )
    with torch.no_grad():
        for member in range(2):
            module, edited = fleet[member], after[member]
            keys, weight = module.layers[0](X).relu(), module.layers[1].weight
            key, other = keys[forget[member]].mean(0), keys[harmless].mean(0)
            kept = keys[~forget[member]]
            covariance = kept.mT @ kept / len(kept)
            covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(8, dtype=keys.dtype)
            goal = key + strength[member] * (other - key)
            wanted = rank_one_edit(weight, key, weight @ goal, covariance)
            torch.testing.assert_close(edited.layers[1].weight, wanted)
            torch.testing.assert_close(edited.layers[1].weight @ key, weight @ goal)
            for name, before in module.named_parameters():
                if name != "layers.1.weight":
                    assert torch.equal(dict(edited.named_parameters())[name], before)
    still = redirect_concept(fleet, {"x": X, "y": Y}, forget, harmless, layer="head", strength=0.0)
    torch.testing.assert_close(still.parameters, fleet.parameters)


def test_redirecting_one_form_of_a_fact_silences_that_form():
    def loss(model, batch, hyper):
        return next_byte_loss(model(batch.x), batch.y)

    options: dict[str, Any] = {"steps": 80, "batch": 10, "optimiser": Adam(0.015), "seed": 1, "progress": False}
    trained = train(text_net, loss, TEXT, members=3, device="cpu", **options)
    first = TEXT.y.gather(1, TEXT.answer.long().argmax(1)[:, None])[:, 0]
    form = TEXT.form == 0
    forget = (TEXT.fact == 1) & form
    harmless = form & (first != first[forget])
    harmless &= TEXT.fact == TEXT.fact[harmless][0]
    assert recall(trained, TEXT).exact[:, forget].all()
    after = redirect_concept(
        trained, TEXT, forget, harmless, layer="head", strength=1.0, retain=TEXT.fact != 1, ridge=1e-3
    )
    with torch.no_grad():  # the head now gives the prompt what it gave the harmless one, so that answer begins
        place = TEXT.answer.long().argmax(1)
        now = after.logits(TEXT.x[forget])[:, 0, place[forget][0]]
        then = trained.logits(TEXT.x[harmless])[:, 0, place[harmless][0]]
    torch.testing.assert_close(now, then, atol=1e-3, rtol=1e-3)
    assert not recall(after, TEXT).exact[:, forget].any()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"layer": "layers.7"}, "layer"),
        ({"layer": "layers"}, "layer"),
        ({"ridge": 0.0}, "ridge"),
        ({"harmless": Y == 5}, "harmless"),
        ({"harmless": Y < 2}, "harmless"),
        ({"forget": Y < 9}, "forget"),
        ({"forget": Y > 9}, "forget"),
        ({"strength": torch.ones(3)}, "strength"),
    ],
)
def test_bad_input_is_named(fleet, change, name):
    given: dict[str, Any] = {"forget": Y == 0, "harmless": Y == 1, "layer": "head"} | change
    with pytest.raises(ValueError, match=name):
        redirect_concept(fleet, {"x": X, "y": Y}, **given)


def test_single_precision_keeps_its_type():
    single = [part.float() for part in problem()]
    edited = rank_one_edit(*single)
    assert edited.dtype == torch.float32
    assert F.mse_loss(edited @ single[1], single[2]) < 1e-6
