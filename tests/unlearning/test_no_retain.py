"""SCAR against NumPy's covariances and SciPy's distances, plain descent on one module, and what must not matter."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from torch.nn import functional as F

from toolkit.fleet import SGD, Adam, Fleet, train
from toolkit.models import MLP
from toolkit.unlearning.losses import distillation
from toolkit.unlearning.no_retain import gaussians, mahalanobis, nearest, scar, shrink, tukey

N, DIM, CLASSES, IMAGES = 30, 4, 3, 16


def net() -> MLP:
    return MLP(DIM, (6,), CLASSES).double()


def draw() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    centres = torch.randn(CLASSES, DIM, dtype=torch.float64, generator=g)
    return {"x": centres[y] + torch.randn(N, DIM, dtype=torch.float64, generator=g), "y": y}


DATA = draw()
X, Y = DATA["x"], DATA["y"]
FORGET = torch.stack([Y == 1, (torch.arange(N) * 11) % N < 8])
OOD = torch.randn(IMAGES, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
WHOLE = 240  # a batch of this many pairs is a whole number of epochs: 16 slots each


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    return train(net, loss, DATA, members=2, steps=60, batch=10, optimiser=Adam(0.02), seed=4, progress=False)


def by_hand(features, k, seen, rounds):
    """Mean and inverse of one class, entry by entry."""
    rows = np.sqrt(features[(seen & (k == Y)).numpy()])
    matrix = np.cov(rows, rowvar=False)
    for _ in range(rounds):
        off = [matrix[i, j] for i in range(len(matrix)) for j in range(len(matrix)) if i != j]
        extra = np.full_like(matrix, 3 * np.mean(off))
        np.fill_diagonal(extra, 3 * np.mean(np.diag(matrix)))
        matrix = matrix + extra
    scale = np.sqrt(np.where(np.diag(matrix) > 0, np.diag(matrix), 1))  # a dead feature has no correlation
    return rows.mean(0), np.linalg.pinv(matrix / np.outer(scale, scale))


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_distances_and_targets_by_numpy_and_scipy(rounds, fleet):
    """Also: shrinking twice, as public code does unsaid, is another distance than shrinking once."""
    features = fleet.features(X)[0].numpy()
    seen = torch.ones(N, dtype=torch.bool)
    transformed = tukey(torch.from_numpy(features), 0.5)
    found = gaussians(transformed, Y, seen, CLASSES, rounds=rounds)
    assert found.known.all()
    table = np.empty((N, CLASSES))
    for k in range(CLASSES):
        mean, inverse = by_hand(features, k, seen, rounds)
        for i in range(N):
            a = np.sqrt(features[i]) / np.linalg.norm(np.sqrt(features[i]))
            table[i, k] = scipy_mahalanobis(a, mean / np.linalg.norm(mean), inverse) ** 2
        got = mahalanobis(transformed, found.mean[k].expand(N, -1), found.inverse[k].expand(N, -1, -1))
        torch.testing.assert_close(got, torch.from_numpy(table[:, k]), rtol=1e-8, atol=1e-10)
    chosen = nearest(transformed, Y, FORGET[1], found)
    for i in FORGET[1].nonzero()[:, 0].tolist():
        assert int(chosen[i]) == min((k for k in range(CLASSES) if k != int(Y[i])), key=lambda k: table[i, k])
    other = gaussians(transformed, Y, seen, CLASSES, rounds=3 - rounds)
    assert (other.inverse - found.inverse).abs().max() > 1e-3


def test_shrinking_stays_positive_and_can_be_undone_to_nothing():
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 8, dtype=torch.float64, generator=g)
    matrix = torch.cov(rows.mT)
    assert torch.linalg.eigvalsh(matrix)[0] < 1e-10
    assert torch.linalg.eigvalsh(shrink(matrix, 3.0))[0] > 0.01
    assert torch.equal(shrink(matrix, 0.0), matrix)


def test_classes_that_are_too_small_are_no_targets():
    features, labels = torch.rand(7, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 2, 2, 3])
    seen = torch.ones(7, dtype=torch.bool)
    found = gaussians(features, labels, seen, 5)
    assert found.known.tolist() == [True, False, True, False, False]
    assert nearest(features, labels, labels == 0, found)[:3].tolist() == [2, 2, 2]
    assert set(nearest(features, labels, labels == 1, found)[3:4].tolist()) <= {0, 2}
    with pytest.raises(ValueError, match="expected a class besides"):
        nearest(features, labels, labels == 0, gaussians(features, labels, labels < 1, 5))


def test_tukey_has_a_slope_of_zero_where_its_own_is_infinite():
    x = torch.tensor([[0.0, 0.25, 4.0]], dtype=torch.float64, requires_grad=True)
    value = tukey(x, 0.5)
    assert value.tolist() == [[0, 0.5, 2]]
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 0.25]]


class Targets:
    """Frozen classes of the original and their distances, in plain operations."""

    def __init__(self, original, lost, rounds=1):
        with torch.no_grad():
            features = original(X, return_features=True)[1]
        self.lost, self.forms = lost, []
        seen = torch.ones(N, dtype=torch.bool)
        forms = [tuple(map(torch.from_numpy, by_hand(features.numpy(), k, seen, rounds))) for k in range(CLASSES)]
        for i in lost.nonzero()[:, 0].tolist():
            others = [k for k in range(CLASSES) if k != int(Y[i])]
            self.forms.append(min((forms[k] for k in others), key=lambda form: float(self.one(features[i], form))))

    @staticmethod
    def one(feature, form):
        root = torch.where(feature > 0, feature, 1).sqrt() * (feature > 0)
        z = root / root.norm() - form[0] / form[0].norm()
        return z @ form[1] @ z

    def __call__(self, model):
        features = model(X[self.lost], return_features=True)[1]
        return torch.stack([self.one(f, form) for f, form in zip(features, self.forms, strict=True)]).mean()


@pytest.mark.parametrize("rounds", [1, 2])
def test_full_batches_are_plain_descent_with_frozen_targets(rounds, fleet):
    """Each member has its own mask and strengths; the retained examples are in no batch."""
    weight = torch.tensor([0.5, 1.5], dtype=torch.float64)
    options: dict[str, Any] = {"forget_weight": weight, "distil_weight": 2.0, "temperature": 3.0, "rounds": rounds}
    found = scar(fleet, DATA, FORGET, OOD, steps=5, batch=WHOLE, optimiser=SGD(0.02), **options)
    for i in range(2):
        model, original = fleet[i], fleet[i]
        targets, optimiser = Targets(original, FORGET[i], rounds), torch.optim.SGD(model.parameters(), 0.02)
        for _ in range(5):
            optimiser.zero_grad()
            student, teacher = (m(OOD) / 3 for m in (model, original))
            kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1).detach(), reduction="batchmean")
            (weight[i] * targets(model) + 2 * 9 * kl).backward()
            optimiser.step()
        expected = fleet.layout.pack(model)
        assert (expected - fleet.parameters[i]).norm() > 0.01
        torch.testing.assert_close(found.parameters[i], expected, rtol=1e-7, atol=1e-9)


def test_the_whole_class_is_taken_from_the_teacher(fleet):
    """Foreign inputs taken for class 1 are dropped, and the teacher's logit of class 1 is the batch's smallest."""
    found = scar(fleet, DATA, Y == 1, OOD, removed=1, forget_weight=0.0, steps=1, batch=720, optimiser=SGD(0.1))
    sizes = set()
    for i in range(2):
        model = fleet[i]
        teacher = fleet[i](OOD).detach()
        rows = teacher.argmax(-1) != 1
        sizes.add(int(rows.sum()))
        assert 2 < rows.sum() < IMAGES
        wanted = teacher[rows].clone()
        wanted[:, 1] = teacher[rows].min()
        # an epoch of max(10, rows) slots, walked through 720 / rows times: only whole numbers are full batches
        (5 * distillation(model(OOD[rows]), wanted).mean()).backward()
        step = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert step.norm() > 0.01
        moved = (fleet.parameters[i] - found.parameters[i]) / 0.1
        if 720 % max(10, int(rows.sum())) == 0:
            torch.testing.assert_close(moved, step, rtol=1e-8, atol=1e-10)
        else:
            assert (moved - step).norm() < 0.05 * step.norm()


def test_distillation_starts_at_zero_and_the_public_one_does_not(fleet):
    still = scar(fleet, DATA, FORGET, OOD, forget_weight=0.0, temperature=2.0, steps=1, batch=WHOLE, optimiser=SGD(1.0))
    assert still.history.abs().max() < 1e-14
    torch.testing.assert_close(still.parameters, fleet.parameters, rtol=0, atol=1e-13)
    logits = fleet.logits(OOD)[0]
    public = F.kl_div(logits.log_softmax(-1) + 1e-4, logits.softmax(-1), reduction="batchmean")  # the mistake
    assert public < -0.9e-4


def test_no_step_sees_a_kept_example(fleet):
    """Without its forget term nothing of the data matters; with it only the statistics of D_r do."""
    other = {"x": torch.where(FORGET.any(0)[:, None], X, X.flip(0) + 1), "y": Y}
    options: dict[str, Any] = {"steps": 6, "batch": 8, "removed": 0, "seed": 2}
    one, two = (scar(fleet, d, FORGET, OOD, forget_weight=0.0, **options) for d in (DATA, other))
    assert torch.equal(one.parameters, two.parameters)
    assert not torch.equal(one.parameters, fleet.parameters)
    swapped = torch.arange(N)
    rows = (~FORGET.any(0) & (Y == 2)).nonzero()[:, 0]
    swapped[rows] = rows.flip(0)  # the same class statistics, up to rounding, from rows in another order
    same = {"x": X[swapped], "y": Y}
    one, two = (scar(fleet, d, FORGET, OOD, **options) for d in (DATA, same))
    torch.testing.assert_close(one.parameters, two.parameters, rtol=1e-8, atol=1e-10)


def test_each_member_is_what_it_is_alone_and_float32_works(fleet):
    together = scar(fleet, DATA, FORGET, OOD, steps=5, batch=8, seed=2)
    alone = scar(fleet[[1]], DATA, FORGET[1], OOD, steps=5, batch=8, seed=2)
    torch.testing.assert_close(alone.parameters[0], together.parameters[1], rtol=1e-7, atol=1e-9)
    single = Fleet(lambda: MLP(DIM, (6,), CLASSES), fleet.parameters.float(), streams=fleet.streams)
    found = scar(single, {"x": X.float(), "y": Y}, FORGET, OOD.float(), steps=5, batch=8, seed=2)
    torch.testing.assert_close(found.parameters.double(), together.parameters, rtol=1e-2, atol=1e-3)


def test_bad_input(fleet):
    for error, options in (
        ("power: expected a number from 0.001 to 1", {"power": 2.0}),
        ("shrinkage: expected a number from 0", {"shrinkage": -1.0}),
        ("rounds: expected 0, 1 or 2", {"rounds": -1}),
        ("removed: expected a class from 0 to 2", {"removed": 3}),
        ("temperature: expected at least", {"temperature": 0.0}),
    ):
        with pytest.raises(ValueError, match=error):
            scar(fleet, DATA, FORGET, OOD, **options)
    with pytest.raises(ValueError, match="ood: expected inputs"):
        scar(fleet, DATA, FORGET, OOD[:, :-1])
    taken = X[fleet.logits(X)[0].argmax(-1) == 0]
    assert len(taken) > 3
    with pytest.raises(ValueError, match="ood: expected inputs that are not taken for class 0"):
        scar(fleet, DATA, FORGET, taken, removed=0)
    line = Fleet.of([MLP(DIM, (), CLASSES).double()], lambda: MLP(DIM, (), CLASSES).double())
    with pytest.raises(ValueError, match="expected features of at least 0"):
        scar(line, DATA, FORGET[0], OOD)
