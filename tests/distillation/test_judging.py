"""The judge against trainings one by one, and where all three sets are the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.distillation.judging import _draw_distinct, judge
from toolkit.distillation.synthetic import Synthetic
from toolkit.fleet import Adam, train
from toolkit.models import MLP

Y = torch.arange(40) % 2
X = random.normal(random.key(1), (40, 3), torch.float64) + torch.where(Y == 0, -0.7, 0.7)[:, None]
TEST = {"x": X[20:], "y": Y[20:]}
REAL = {"x": X[:20], "y": Y[:20]}
SET = {"x": torch.tensor([[-1.0, -1, -1], [1, 1, 1]]).double(), "y": torch.tensor([0, 1])}


def build():
    return MLP(3, (4,), 2).double()


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def test_subsets_are_as_many_real_examples_of_each_class_others_for_each_net():
    y = torch.tensor([0] * 10 + [1] * 6 + [2] * 5)
    masks = _draw_distinct(y, torch.tensor([3, 0, 5]), 200, 0)
    counts = torch.stack([masks[:, y == label].sum(1) for label in range(3)], 1)
    assert (counts == torch.tensor([3, 0, 5])).all()
    share = masks[:, :10].double().mean(0)
    assert (share - 0.3).abs().max() < 0.1  # 3 standard errors
    assert len(masks.unique(dim=0)) > 60  # of 120
    assert torch.equal(_draw_distinct(y, torch.tensor([3, 0, 5]), 5, 0), masks[:5])
    assert not torch.equal(_draw_distinct(y, torch.tensor([3, 0, 5]), 5, 1), masks[:5])


def test_each_accuracy_is_that_of_a_net_trained_alone_on_the_same_steps():
    result = judge(SET, REAL, TEST, build, nets=3, steps=15, optimiser=Adam(lr=0.05), seed=4, device="cpu")
    masks = _draw_distinct(REAL["y"], torch.tensor([1, 1]), 3, 4)
    options: dict[str, Any] = {
        "members": 3,
        "steps": 15,
        "batch": 2,
        "optimiser": Adam(lr=0.05),
        "seed": 4,
        "progress": False,
        "device": "cpu",
    }
    fleets = [
        train(build, cross_entropy, SET, **options),
        train(build, cross_entropy, REAL, subsets=masks, **options),
        train(build, cross_entropy, REAL, **options),
    ]
    for values, fleet in zip(result[:3], fleets, strict=True):
        right = [float((fleet[i](TEST["x"]).argmax(1) == TEST["y"]).double().mean()) for i in range(3)]
        assert values.tolist() == right
    for i in range(3):  # a net alone sees its two examples only
        few = {name: value[masks[i]] for name, value in REAL.items()}
        one = train(build, cross_entropy, few, **options | {"members": None, "streams": torch.tensor([i])})
        torch.testing.assert_close(one.parameters[0], fleets[1].parameters[i])


def test_all_three_are_equal_where_the_synthetic_set_is_the_data():
    result = judge(REAL, REAL, TEST, build, nets=4, steps=30, device="cpu")
    assert torch.equal(result.synthetic, result.real)
    assert torch.equal(result.synthetic, result.everything)
    assert result.synthetic.mean() > 0.6


def test_operations_are_those_of_the_products():
    """Forward 2, backward 4 for each weight, example and step."""
    parameters = 3 * 4 + 4 + 4 * 2 + 2
    result = judge(SET, REAL, TEST, build, nets=2, steps=7)
    assert result.flops == 6 * parameters * 2 * 7
    assert [len(values) for values in result[:3]] == [2, 2, 2]


def test_good_points_win_and_wrong_labels_lose():
    good = Synthetic(SET["x"], SET["y"], {}, X.new_zeros(0))
    bad = Synthetic(SET["x"], 1 - SET["y"], {}, X.new_zeros(0))
    fit: dict[str, Any] = {"nets": 16, "steps": 60, "optimiser": Adam(lr=0.02)}
    first, second = judge(good, REAL, TEST, build, **fit), judge(bad, REAL, TEST, build, **fit)
    assert torch.equal(first.real, second.real)
    assert first.synthetic.min() > 0.8
    assert first.synthetic.mean() > first.real.mean() + 0.01
    torch.testing.assert_close(second.synthetic, 1 - first.synthetic, rtol=0, atol=0.3)
    assert second.synthetic.mean() < 0.2


def test_bad_input():
    with pytest.raises(ValueError, match="nets"):
        judge(SET, REAL, TEST, build, nets=0)
    with pytest.raises(ValueError, match="steps"):
        judge(SET, REAL, TEST, build, steps=0)
    with pytest.raises(ValueError, match="synthetic: expected fields x and y, got none named 'y'"):
        judge({"x": X}, REAL, TEST, build)
    with pytest.raises(ValueError, match="test: expected at least one"):
        judge(SET, REAL, {"x": X[:0], "y": Y[:0]}, build)
    with pytest.raises(ValueError, match="synthetic: y: expected class"):
        judge({"x": X[:1], "y": torch.tensor([2])}, REAL, TEST, build)
    with pytest.raises(ValueError, match="synthetic: expected at most 10 examples of class 0, got 20"):
        judge({"x": X, "y": Y}, REAL, TEST, build)
