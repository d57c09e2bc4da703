"""What a synthetic set is worth: fresh nets trained on it, against fresh nets that get real examples."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit import random
from toolkit.checks import require_labels, require_positive, typed
from toolkit.distillation.synthetic import labelled
from toolkit.fleet import Adam, Fleet, train
from toolkit.fleet.members import Build, Layout, fresh
from toolkit.fleet.store import as_fields

__all__ = ["Judgement", "judge"]

_SUBSETS = 320  # what a key's numbers are for


class Judgement(NamedTuple):
    """Test accuracy of each net ``(nets,)``: net i has the same initial weights in all three.

    ``synthetic``: trained on the synthetic set; ``real``: on as many real examples, other ones for each net;
    ``everything``: on all real examples. ``flops``: floating-point operations of the training of one net, the same in
    all three.
    """

    synthetic: Tensor
    real: Tensor
    everything: Tensor
    flops: int


@typed
def judge(
    synthetic: Any,
    data: Any,
    test: Any,
    build: Build,
    *,
    nets: int = 64,
    steps: int = 200,
    optimiser: Any = None,
    seed: int = 0,
    **options: Any,
) -> Judgement:
    """Accuracy of ``nets`` fresh nets on ``test`` after training on ``synthetic``, or on real ``data`` for as long.

    Each training takes ``steps`` steps of one batch as large as the synthetic set, so that all cost the same
    floating-point operations: 6 · weights · batch for each step of a net of linear layers (2 forward, 4 backward),
    ``flops`` = 6 · parameters · batch · steps. The real examples are, for each net and class, a random choice without
    replacement, of as many as the synthetic set has of that class. Compare with :func:`toolkit.intervals.paired`.

    Args:
        synthetic, data, test: fields ``x`` and ``y`` (a ``Synthetic``, a data set, a mapping).
        build: makes one net; other than the nets of the distillation for a test across architectures.
        optimiser: default ``Adam(lr=5e-3)``.
        seed: another one than that of the distillation's nets gives nets which it has not seen.
        options: of :func:`toolkit.fleet.train`.

    Raises ``ValueError`` for missing fields, labels outside the classes of ``data``, more synthetic examples of a class
    than there are real ones, or counts below 1.
    """
    for name, value in {"nets": nets, "steps": steps}.items():
        require_positive(name, value)
    own = as_fields(synthetic, "synthetic")
    x, y, classes = labelled(data)
    held_out = as_fields(test, "test")
    for name, fields in {"synthetic": own, "test": held_out}.items():
        if missing := sorted({"x", "y"} - set(fields)):
            raise ValueError(f"{name}: expected fields x and y, got none named {missing[0]!r}")
        if len(fields["y"]) == 0:
            raise ValueError(f"{name}: expected at least one example, got none")
        require_labels(f"{name}: y", fields["y"], classes)
    counts = torch.bincount(own["y"], minlength=classes)
    subsets = _draw_distinct(y.cpu(), counts.cpu(), nets, seed)
    size = len(own["y"])
    shared = {"members": nets, "steps": steps, "seed": seed, "progress": False} | options
    shared |= {"batch": size, "optimiser": optimiser or Adam(lr=5e-3)}

    def accuracy(fields: dict[str, Tensor], **more: Any) -> Tensor:
        fleet: Fleet = train(build, _cross_entropy, fields, **shared, **more)
        logits = fleet.logits(held_out["x"].to(fleet.device))
        return (logits.argmax(-1) == held_out["y"].to(fleet.device)).double().mean(1)

    real = {"x": x, "y": y}
    return Judgement(
        accuracy({"x": own["x"], "y": own["y"]}),
        accuracy(real, subsets=subsets),
        accuracy(real),
        6 * Layout.of(fresh(build)).size * size * steps,
    )


def _cross_entropy(model: Any, batch: Any, hyper: Any) -> Tensor:
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def _draw_distinct(y: Tensor, counts: Tensor, members: int, seed: int) -> Tensor:
    """Masks ``(members, examples)`` of ``counts[c]`` random examples of each class c, without replacement."""
    masks = torch.zeros(members, len(y), dtype=torch.bool)
    keys = random.fold_in(random.key(seed, _SUBSETS), torch.arange(members))
    for label, count in enumerate(counts.tolist()):
        own = (y == label).nonzero()[:, 0]
        if count > len(own):
            raise ValueError(f"synthetic: expected at most {len(own)} examples of class {label}, got {count}")
        chosen = own[random.permutation(random.fold_in(keys, label), len(own))[:, :count]]
        masks.scatter_(1, chosen, True)
    return masks
