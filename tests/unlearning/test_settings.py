"""Forget masks against counting, and the errors that name the argument."""

import pytest
import torch

from toolkit.unlearning.settings import forget_class, forget_random, forget_subclass, mislabel, require_forget

LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 1, 1])
DOMAINS = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1])


def test_random_masks_have_the_size_and_do_not_depend_on_how_many_there_are():
    many = forget_random(50, 7, members=400, seed=3)
    assert many.shape == (400, 50)
    assert (many.sum(1) == 7).all()
    assert torch.equal(many[:5], forget_random(50, 7, members=5, seed=3))
    assert torch.equal(many[0], forget_random(50, 7, seed=3))
    assert not torch.equal(many[0], forget_random(50, 7, seed=4))
    assert len(many.unique(dim=0)) == 400
    counts = many.sum(0).double()  # each example is hit 400 * 7/50 = 56 times, standard deviation 6.9
    assert (counts - 56).abs().max() < 4 * 6.94
    assert counts.std() > 4


def test_class_and_subclass_are_what_a_loop_finds():
    assert forget_class(LABELS, 1).tolist() == [label == 1 for label in LABELS.tolist()]
    assert forget_subclass(LABELS, DOMAINS, 1, 1).nonzero().flatten().tolist() == [3, 7]
    for target, domain in ((0, 1), (0, 0), (9, 0)):  # absent, the whole class, no such class
        with pytest.raises(ValueError, match="domain"):
            forget_subclass(LABELS, DOMAINS, target, domain)
    for labels, target in ((LABELS, 7), (torch.ones(4, dtype=torch.long), 1)):
        with pytest.raises(ValueError, match="target"):
            forget_class(labels, target)


def test_mislabelled_points_are_wrong_and_uniform_over_the_wrong_classes():
    labels = torch.arange(6000) % 4
    changed, mask = mislabel(labels, 4, 3000, seed=1)
    assert mask.sum() == 3000
    assert torch.equal(changed != labels, mask)
    shift = (changed - labels)[mask] % 4
    counts = torch.bincount(shift, minlength=4)[1:]
    assert (counts - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5
    assert torch.equal(mislabel(labels, 4, 3000, seed=1)[0], changed)
    assert not torch.equal(mislabel(labels, 4, 3000, seed=2)[1], mask)


def test_confused_classes_are_exchanged_and_others_stay():
    labels = torch.arange(300) % 3
    changed, mask = mislabel(labels, 3, 60, between=(0, 2))
    assert mask.sum() == 60
    assert set(labels[mask].tolist()) == {0, 2}
    assert torch.equal(changed[mask], 2 - labels[mask])
    assert torch.equal(changed[~mask], labels[~mask])
    assert mislabel(labels, 3, 200, between=(0, 2))[1].sum() == 200


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"classes": 1, "count": 1}, "classes"),
        ({"classes": 2, "count": 1}, "labels"),
        ({"classes": 3, "count": 0}, "count"),
        ({"classes": 3, "count": 9}, "count"),
        ({"classes": 3, "count": 5, "between": (0, 2)}, "count"),
        ({"classes": 3, "count": 1, "between": (1, 1)}, "between"),
        ({"classes": 3, "count": 1, "between": (1, 3)}, "between"),
    ],
)
def test_bad_mislabelling(options, name):
    with pytest.raises(ValueError, match=name):
        mislabel(LABELS, **options)


@pytest.mark.parametrize(
    ("mask", "members"),
    [
        (torch.zeros(8, dtype=torch.bool), None),
        (torch.ones(8, dtype=torch.bool), None),
        (torch.arange(7) > 2, None),
        (torch.stack([torch.arange(8) > 2] * 3), 2),
        (torch.stack([torch.arange(8) > 2, torch.arange(8) > 9]), 2),
        (torch.stack([torch.arange(8) > 2, torch.arange(8) > -1]), None),
    ],
)
def test_masks_that_are_no_forget_sets(mask, members):
    with pytest.raises(ValueError, match="forget"):
        require_forget(mask, 8, members)


def test_good_masks_pass_and_counts_are_checked():
    require_forget(torch.arange(8) > 6, 8, 3)
    require_forget(torch.stack([torch.arange(8) > 6, torch.arange(8) > 0]), 8, 2)
    for count in (0, 8):
        with pytest.raises(ValueError, match="count"):
            forget_random(8, count)
    with pytest.raises(ValueError, match="members"):
        forget_random(8, 2, members=0)
