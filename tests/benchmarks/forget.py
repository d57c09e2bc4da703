"""Rows of the benchmark for unlearning: fleets of oracles, datamodels and an attack, in units of single trainings."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import calibration, data, fleet, models
from toolkit import unlearning as un

EPOCHS, BATCH = 15, 64


class Digits:
    """All 1,797 digits, of which 180 are to be forgotten, and nets 64-64-10 trained for 15 epochs by Adam."""

    def __init__(self) -> None:
        digits = data.digits()
        self.points = {"x": digits.x.flatten(1), "y": digits.y}
        self.forget = un.forget_random(len(digits.y), 180)
        self.rule: dict[str, Any] = {
            "epochs": EPOCHS,
            "batch": BATCH,
            "optimiser": fleet.Adam(2e-3),
            "device": "cpu",
            "progress": False,
        }

    @staticmethod
    def build() -> models.MLP:
        return models.MLP(64, (64,), 10)

    @staticmethod
    def loss(model, batch, hyper) -> Tensor:
        return calibration.losses.cross_entropy(model(batch.x), batch.y)

    def one_by_one(self, rows: Tensor, count: int) -> None:
        """``count`` nets after one another, as anybody would write it."""
        x, y = self.points["x"], self.points["y"]
        for i in range(count):
            torch.manual_seed(i)
            model = self.build()
            optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
            for _ in range(EPOCHS):
                for index in rows[torch.randperm(len(rows))].split(BATCH):
                    value = F.cross_entropy(model(x[index]), y[index])
                    optimiser.zero_grad()
                    value.backward()
                    optimiser.step()

    def oracles(self, members: int = 64) -> fleet.Fleet:
        return un.retrain(self.build, self.loss, self.points, self.forget, members=members, **self.rule)

    def datamodels(self, count: int = 1024) -> un.Datamodels:
        """Nets on random halves, and the ridge datamodel of every digit's margin."""
        halves = un.random_subsets(count, len(self.points["y"]))
        shadows = fleet.train(self.build, self.loss, self.points, subsets=halves, **self.rule)
        return un.datamodels(halves, un.margins(shadows.logits(self.points["x"]), self.points["y"]), 100.0)

    def attack(self, members: int = 64) -> Tensor:
        """Originals that unlearn by NegGrad+, oracles, and U-LiRA between them."""
        trained = fleet.train(self.build, self.loss, self.points, members=members, **self.rule)
        unlearned = un.neg_grad_plus(trained, self.points, self.forget, steps=20)
        asked = {name: values[self.forget] for name, values in self.points.items()}
        both = (un.margins(f.logits(asked["x"]), asked["y"]) for f in (unlearned, self.oracles(members)))
        return un.u_lira(*both).auc


def tasks() -> list[tuple[str, Callable[[Digits], object], str, int, float]]:
    """Name, what is timed, what a sequential training sees, how many of these are the measure, and the goal."""
    return [
        ("64 retrained oracles, digits, 15 epochs", Digits.oracles, "kept", 64, 10),
        ("1,024 subset nets and their datamodels", Digits.datamodels, "half", 120, 1),
        ("U-LiRA with 2 × 64 nets", Digits.attack, "kept", 20, 1),
    ]
