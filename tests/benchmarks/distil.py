"""Rows of the benchmark for distillation: 64 students of one teacher against a loop over students."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import data, fleet, models
from toolkit.distillation import distil, kd, teacher_outputs

STUDENTS, TIMED, STEPS, BATCH, RATE = 64, 8, 660, 64, 2e-3
TEMPERATURE, WEIGHT = 4.0, 0.9


class Row(NamedTuple):
    """``peer`` trains one in ``times`` of the students: its seconds are to be multiplied by ``times``."""

    peer_name: str
    peer: Callable[[], object]
    goal: float
    times: int


def student() -> models.MLP:
    return models.MLP(64, (16,), 10)


def kd_as_written(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The usual lines: cross-entropy and a divergence at high temperature."""
    soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1), reduction="batchmean")
    return (1 - WEIGHT) * F.cross_entropy(logits, labels) + WEIGHT * TEMPERATURE**2 * soft


class Digits:
    """1,400 digits to learn from, the others to test on, and a trained teacher 64-128-10."""

    def __init__(self) -> None:
        digits = data.digits()
        points = {"x": digits.x.flatten(1), "y": digits.y}
        self.seen, self.held_out = (
            {k: v[part] for k, v in points.items()} for part in (slice(1400), slice(1400, None))
        )
        torch.manual_seed(0)
        self.teacher = models.MLP(64, (128,), 10)
        optimiser = torch.optim.Adam(self.teacher.parameters(), lr=RATE)
        for _ in range(20):
            for index in torch.randperm(1400).split(BATCH):
                optimiser.zero_grad()
                F.cross_entropy(self.teacher(self.seen["x"][index]), self.seen["y"][index]).backward()
                optimiser.step()
        self.teacher.eval().requires_grad_(False)

    def ours(self) -> fleet.Fleet:
        """All students, and the teacher's only pass."""
        return distil(
            student,
            partial(kd, temperature=TEMPERATURE, weight=WEIGHT),
            self.seen,
            teacher_outputs(self.teacher, self.seen["x"]).logits,
            members=STUDENTS,
            steps=STEPS,
            batch=BATCH,
            optimiser=fleet.Adam(RATE),
            device="cpu",
            progress=False,
        )

    def one_by_one(self, cached: bool, count: int) -> list[torch.nn.Module]:
        """``count`` students after one another; the teacher runs in each step, or once before the first."""
        x, y = self.seen["x"], self.seen["y"]
        if cached:
            with torch.no_grad():
                known = self.teacher(x)
        students: list[torch.nn.Module] = []
        for i in range(count):
            torch.manual_seed(i)
            model = student()
            optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
            order, place = torch.randperm(len(x)), 0
            for _ in range(STEPS):
                if place + BATCH > len(x):
                    order, place = torch.randperm(len(x)), 0
                index = order[place : place + BATCH]
                place += BATCH
                inputs = x[index]
                if cached:
                    target = known[index]
                else:
                    with torch.no_grad():
                        target = self.teacher(inputs)
                value = kd_as_written(model(inputs), target, y[index])
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
            students.append(model)
        return students

    def accuracy(self, logits: Tensor) -> float:
        return (logits.argmax(-1) == self.held_out["y"]).double().mean().item()

    def check(self) -> tuple[float, float]:
        """Mean accuracy of both kinds of students, which is asserted to be the same, as is the loss."""
        batch = (torch.randn(BATCH, 10), 3 * torch.randn(BATCH, 10), self.seen["y"][:BATCH])
        torch.testing.assert_close(kd(*batch, TEMPERATURE, WEIGHT).mean(), kd_as_written(*batch))
        x = self.held_out["x"]
        mine = self.accuracy(self.ours().logits(x))
        theirs = statistics.mean(self.accuracy(model(x)) for model in self.one_by_one(True, TIMED))
        assert abs(mine - theirs) < 0.015, (mine, theirs)
        return mine, theirs


def rows(digits: Digits) -> list[Row]:
    """The peers, of which a few students are timed."""
    return [
        Row("sequential, teacher in every step", partial(digits.one_by_one, False, TIMED), 8, STUDENTS // TIMED),
        Row("sequential, cached logits", partial(digits.one_by_one, True, TIMED), 8, STUDENTS // TIMED),
    ]
