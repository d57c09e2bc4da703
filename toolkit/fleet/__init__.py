"""Train many models at once: one loss written for one model, every random choice a function of (seed, member)."""

from toolkit.fleet.engine import grid, train
from toolkit.fleet.optimisers import SGD, Adam, AdamW, Step, Wrapper
from toolkit.fleet.samplers import ClassBalanced, InOrder, Uniform
from toolkit.fleet.schedules import constant, cosine, linear, stable_decay, warmup
from toolkit.fleet.store import Fleet, concatenate, each

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ClassBalanced",
    "Fleet",
    "InOrder",
    "Step",
    "Uniform",
    "Wrapper",
    "concatenate",
    "constant",
    "cosine",
    "each",
    "grid",
    "linear",
    "stable_decay",
    "train",
    "warmup",
]
