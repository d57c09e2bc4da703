"""What the tests of approximate unlearning share: a task in float64, two members that forget different examples."""

from typing import Any

import torch
from torch.nn import functional as F

from toolkit.fleet import Adam, Fleet, train
from toolkit.models import MLP
from toolkit.unlearning import approximate, one_shot

N, DIM, CLASSES = 30, 4, 3
METHODS = {name: getattr(approximate, name) for name in approximate.__all__ if name != "saliency_mask"}
METHODS |= {name: getattr(one_shot, name) for name in one_shot.__all__}
TRAINING = [name for name in approximate.__all__ if name != "saliency_mask"]


def net() -> MLP:
    return MLP(DIM, (6,), CLASSES).double()


def line() -> MLP:
    return MLP(DIM, (), CLASSES).double()


def make(build=net, members: int = 2, steps: int = 40) -> Fleet:
    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    return train(
        build, loss, DATA, members=members, steps=steps, batch=10, optimiser=Adam(0.02), seed=4, progress=False
    )


def draw() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    centres = torch.randn(CLASSES, DIM, dtype=torch.float64, generator=generator)
    return {"x": centres[y] + torch.randn(N, DIM, dtype=torch.float64, generator=generator), "y": y}


DATA = draw()
X, Y = DATA["x"], DATA["y"]
# member 0 forgets the whole of class 1 (10 of 30), member 1 forgets 7 examples; 30 - 10 = 20 and 30 - 7 = 23 are kept
FORGET = torch.stack([Y == 1, (torch.arange(N) * 11) % N < 7])
WHOLE = 20 * 23  # a batch of this many pairs is a whole number of epochs for both members
TARGETS = torch.randn(2, N, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def call(name: str, fleet: Fleet, forget=FORGET, **options: Any) -> Fleet:
    given = (TARGETS[: len(fleet)],) if name == "oracle_matching" else ()
    return METHODS[name](fleet, DATA, forget, *given, **options)


def mean_ce(model, mask, temperature=1.0):
    return F.cross_entropy(model(X[mask]) / temperature, Y[mask])
