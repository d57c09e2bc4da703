"""Steps in one layer against brute force: the Pareto front, the layer, and the length of the step."""

import pytest
import torch
from torch.nn import functional as F

from toolkit.fleet import Adam, Fleet, train
from toolkit.models import MLP
from toolkit.unlearning.single_layer import layer_scores, pareto_front, search, slug

N, DIM, CLASSES = 60, 4, 3


def net() -> MLP:
    return MLP(DIM, (6,), CLASSES).double()


def draw() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    centres = 1.5 * torch.randn(CLASSES, DIM, dtype=torch.float64, generator=g)
    return {"x": centres[y] + torch.randn(N, DIM, dtype=torch.float64, generator=g), "y": y}


DATA = draw()
X, Y = DATA["x"], DATA["y"]
FORGET = torch.stack([Y == 1, Y == 2, (torch.arange(N) * 7) % N < 13])


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    return train(net, loss, DATA, members=3, steps=150, batch=20, optimiser=Adam(0.02), seed=4, progress=False)


def slopes(model, mask):
    return torch.autograd.grad(F.cross_entropy(model(X[mask]), Y[mask]), list(model.parameters()))


def accuracy(model, mask) -> float:
    with torch.no_grad():
        return float((model(X[mask]).argmax(-1) == Y[mask]).double().mean())


def stepped(fleet: Fleet, member: int, name: str, direction: torch.Tensor, r: float):
    model = fleet[member]
    with torch.no_grad():
        dict(model.named_parameters())[name] += r * direction
    return model


def test_scores_by_autograd_and_front_by_brute_force(fleet):
    found = layer_scores(fleet, DATA, FORGET)
    assert found.names == ("layers.0.weight", "layers.0.bias", "head.weight", "head.bias")
    for i in range(3):
        model = fleet[i]
        rows = zip(model.parameters(), slopes(model, FORGET[i]), slopes(model, ~FORGET[i]), strict=True)
        scores = [
            (float(f.norm() / p.detach().norm()), abs(float(F.cosine_similarity(f.flatten(), r.flatten(), dim=0))))
            for p, f, r in rows
        ]
        torch.testing.assert_close(found.importance[i].tolist(), [a for a, _ in scores])
        torch.testing.assert_close(found.alignment[i].tolist(), [b for _, b in scores])
        front = [not any(c >= a and d <= b and (c, d) != (a, b) for c, d in scores) for a, b in scores]
        assert found.front[i].tolist() == front
    retain = ~FORGET & (torch.arange(N) < 40)
    assert not torch.equal(layer_scores(fleet, DATA, FORGET, retain=retain).alignment, found.alignment)


def test_front_of_many_points_and_of_ties():
    g = torch.Generator().manual_seed(2)
    gain, cost = torch.randint(0, 6, (2, 50, 9), generator=g).double()
    front = pareto_front(gain, cost)
    for row in range(50):
        points = list(zip(gain[row].tolist(), cost[row].tolist(), strict=True))
        beaten = [any(c >= a and d <= b and (c, d) != (a, b) for c, d in points) for a, b in points]
        assert front[row].tolist() == [not b for b in beaten]
    assert front.any(1).all()
    assert 1 < front.sum(1).double().mean() < 6
    assert pareto_front(torch.ones(3), torch.ones(3)).all()  # equals do not beat each other


@pytest.mark.parametrize("first", [0.03, 1.0, 50.0])
def test_the_least_step_by_exhaustive_search(first):
    thresholds = torch.tensor([0.011, 0.7, 3.1, 17.0], dtype=torch.float64)
    start = torch.full((4,), first, dtype=torch.float64)
    found = search(lambda r: r >= thresholds, start, 14)
    grid = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    for i in range(4):
        least = grid[grid >= thresholds[i]][0]
        assert found[i] >= thresholds[i]
        assert found[i] - least < max(first, float(thresholds[i])) * 2**-13
    assert torch.equal(search(lambda r: r >= 0, start, 5), torch.zeros_like(start))
    assert torch.equal(search(lambda r: r > 1e9, start, 5), start * 2**4)
    mixed = search(lambda r: torch.stack([r[0] >= 0, r[1] > 1e9, r[2] > 2, r[3] > 2]), start, 20)
    torch.testing.assert_close(mixed, torch.tensor([0, first * 2**19, 2, 2]).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layer", ["layers.0.weight", "layers.0.bias", "head.weight", "head.bias"])
def test_a_chosen_layer_moves_up_the_slope_as_far_as_it_must(layer, fleet):
    goal = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)
    found = slug(fleet, DATA, FORGET, goal=goal, layer=layer, iterations=8)
    index = fleet.layout.names.index(layer)
    assert found.hyper["layer"].tolist() == [index] * 3
    for i in range(3):
        direction = slopes(fleet[i], FORGET[i])[index]
        r = float(found.hyper["step"][i])
        assert r > 0
        new, old = (dict(f[i].named_parameters()) for f in (found, fleet))
        for name in fleet.layout.names:
            if name == layer:
                torch.testing.assert_close(new[name], old[name] + r * direction, rtol=1e-9, atol=1e-12)
            else:
                assert torch.equal(new[name], old[name])
        assert accuracy(found[i], FORGET[i]) <= goal[i] < accuracy(fleet[i], FORGET[i])
        if layer.startswith("head") and i < 2:  # one class, straight lines: once forgotten, it stays so
            first = float(old[layer].detach().norm() / direction.norm()) / 10
            doubling = next(
                k for k in range(8) if accuracy(stepped(fleet, i, layer, direction, first * 2**k), FORGET[i]) <= goal[i]
            )
            top = first * 2**doubling
            width = (top / 2 if doubling else top) / 256
            grid = [k * width for k in range(round(top / width) + 1)]
            least = next(s for s in grid if accuracy(stepped(fleet, i, layer, direction, s), FORGET[i]) <= goal[i])
            assert abs(r - least) <= 1.01 * width


def test_the_layer_is_the_one_on_the_front_that_keeps_most(fleet):
    goal = torch.tensor([0.0, 0.1, 0.6], dtype=torch.float64)
    found = slug(fleet, DATA, FORGET, goal=goal)
    front = layer_scores(fleet, DATA, FORGET).front
    names = fleet.layout.names
    each = [slug(fleet, DATA, FORGET, goal=goal, layer=name) for name in names]
    for i in range(3):
        kept = {
            k: accuracy(each[k][i], ~FORGET[i])
            for k in range(4)
            if front[i, k] and accuracy(each[k][i], FORGET[i]) <= goal[i]
        }
        assert kept
        assert int(found.hyper["layer"][i]) == max(kept, key=lambda k: (kept[k], -k))
        assert torch.equal(found.parameters[i], each[int(found.hyper["layer"][i])].parameters[i])
    alone = slug(fleet[[1]], DATA, FORGET[1], goal=0.1)
    torch.testing.assert_close(alone.parameters[0], found.parameters[1], rtol=1e-12, atol=1e-14)


def test_a_goal_that_is_reached_changes_nothing_and_one_out_of_reach_goes_furthest(fleet):
    still = slug(fleet, DATA, FORGET, goal=1.0)
    assert torch.equal(still.parameters, fleet.parameters)
    assert not still.hyper["step"].any()
    short = slug(fleet, DATA, FORGET, iterations=1)
    for i in range(3):
        index = int(short.hyper["layer"][i])
        direction = slopes(fleet[i], FORGET[i])[index]
        start = list(fleet[i].parameters())[index].norm() / direction.norm() / 10
        assert accuracy(short[i], FORGET[i]) > 0
        torch.testing.assert_close(short.hyper["step"][i], start.detach())


def test_a_tensor_of_zeros_is_no_candidate(fleet):
    parameters = fleet.parameters.clone()
    parameters[:, -CLASSES:] = 0
    found = layer_scores(Fleet(net, parameters), DATA, FORGET)
    assert not found.importance[:, -1].any()
    assert (found.alignment[:, -1] == 1).all()
    assert not found.front[:, -1].any()


def test_bad_input(fleet):
    with pytest.raises(ValueError, match="layer: expected one of layers"):
        slug(fleet, DATA, FORGET, layer="tail")
    with pytest.raises(ValueError, match="goal: expected at most 1"):
        slug(fleet, DATA, FORGET, goal=2.0)
    with pytest.raises(ValueError, match="iterations: expected at least 1"):
        slug(fleet, DATA, FORGET, iterations=0)
    with pytest.raises(ValueError, match="forget: expected a mask"):
        layer_scores(fleet, DATA, FORGET[:, :-1])
