"""A small data set of three classes and a small net, in double precision, for the tests of distilled data."""

import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.models import MLP

N, INPUTS, CLASSES = 60, 6, 3


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


Y = torch.arange(N) % CLASSES
X = normal(1, CLASSES, INPUTS)[Y] + 0.5 * normal(2, N, INPUTS)
DATA = {"x": X, "y": Y}


def build():
    return MLP(INPUTS, (5,), CLASSES).double()


def cross_entropy(model, batch, hyper):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")
