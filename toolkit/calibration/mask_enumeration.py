"""All masks of a GFlowOut net, one by one: the exact posterior, how far the learnt law is from it, and the experiment.

With few bits all 2^bits masks of :mod:`toolkit.calibration.gflowout` can be listed, and Bayes' rule needs no
approximation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.calibration.binned import ece
from toolkit.calibration.gflowout import GFlowOut, Kind, gflowout_probabilities, train_gflowout
from toolkit.calibration.scores import nll
from toolkit.calibration.selective import auroc
from toolkit.checks import typed
from toolkit.data import Dataset, corrupt
from toolkit.fleet import Fleet
from toolkit.fleet.members import fresh

__all__ = [
    "GFlowOutStudy",
    "MaskPosterior",
    "gflowout_study",
    "mask_divergence",
    "mask_posterior",
]


class MaskPosterior(NamedTuple):
    """All masks, their exact posterior and the learnt law, in nats; ``rows`` is the batch (``sample``) or 1."""

    masks: Float[Tensor, "masks bits"]
    log_posterior: Float[Tensor, "masks rows"]
    log_learnt: Float[Tensor, "masks rows"]
    log_z: Float[Tensor, "rows"]

    @property
    def divergence(self) -> Tensor:
        """KL(learnt ‖ posterior) of each row, in nats."""
        return (self.log_learnt.exp() * (self.log_learnt - self.log_posterior)).sum(0)


@typed
def mask_posterior(
    model: Any,
    x: Float[Tensor, "batch ..."],
    y: Int[Tensor, "batch"],
    bits: int,
    kind: Kind = "sample",
    beta: float | Float[Tensor, ""] = 1.0,
) -> MaskPosterior:
    """The exact posterior over all 2^``bits`` masks of a net, and the law that its generator q has learnt.

    ``sample``: p(z | x, y) ∝ p(y | x, z)^β p(z | x) for each example, with the learnt p(z | x). Other kinds: one
    posterior p(z | data) ∝ p(z) Π_i p(y_i | x_i, z)^β for the batch, which should be all the training data. ``log_z``
    is the logarithm of the sum. ``bits``: mask bits of all layers together; ``kind``: that of the model. For a fleet:
    ``fleet.evaluate(lambda model, batch, hyper: mask_posterior(model, batch.x, batch.y, bits, kind), data)``. Raises
    ``ValueError`` for more than 16 bits.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: expected 1 to 16 mask bits to enumerate, got {bits}")
    codes = torch.arange(2**bits, device=x.device)
    masks = ((codes[:, None] >> torch.arange(bits, device=x.device)) & 1).to(x.dtype)
    count, many = len(x), len(masks)
    stacked = masks[:, None].expand(-1, count, -1).reshape(many * count, bits)
    repeated = x[None].expand(many, *x.shape).reshape(many * count, *x.shape[1:])
    labels = y[None].expand(many, -1).reshape(-1)
    logits = model(repeated, masks=stacked)
    likelihood = -F.cross_entropy(logits, labels.long(), reduction="none").reshape(many, count)
    if kind == "sample":
        law = model(repeated, y=labels, masks=stacked, trace=True)
    else:  # the same for every example
        likelihood = likelihood.sum(1, keepdim=True)
        law = model(repeated[::count], y=labels[::count], masks=masks, trace=True)
    log_q, log_p = law.log_q.reshape(many, -1), law.log_p.reshape(many, -1)
    joint = beta * likelihood + log_p
    log_z = joint.logsumexp(0)
    return MaskPosterior(masks, joint - log_z, log_q, log_z)


def mask_divergence(fleet: Fleet, data: Any) -> Float[Tensor, "members"]:
    """KL(learnt law ‖ exact posterior over masks) of each member, in nats.

    ``fleet`` is one of :func:`toolkit.calibration.gflowout.train_gflowout`. Averaged over the examples of ``data`` for
    ``sample``; for ``id`` pass all the training data. A law that is independent within a layer, given the layers
    before, cannot go to 0 where the posterior's bits are not: it stops at the best such law. Raises ``ValueError`` for
    more than 16 bits (see :func:`mask_posterior`).
    """
    module = fresh(fleet.build)
    if not isinstance(module, GFlowOut):
        raise ValueError(f"fleet: expected one of GFlowOut nets, got one of {type(module).__name__}")
    kind, bits = module.kind, sum(module.bits)

    def divergence(model: Any, batch: Any, hyper: Any) -> Tensor:
        beta = hyper.get("beta", 1.0)
        return mask_posterior(model, batch.x, batch.y, bits, kind, beta).divergence.mean()

    return fleet.evaluate(divergence, data)


class GFlowOutStudy(NamedTuple):
    """Results of :func:`gflowout_study`, one row for each kind in ``kinds`` and one column for each seed.

    ``nll`` (nats), ``ece`` and ``accuracy`` on clean test digits, with ``rotated_`` on turned ones; ``unseen_auroc`` is
    that of the predictive entropy for digits of classes that training left out.
    """

    kinds: tuple[str, ...]
    accuracy: Float[Tensor, "kinds seeds"]
    nll: Float[Tensor, "kinds seeds"]
    ece: Float[Tensor, "kinds seeds"]
    rotated_accuracy: Float[Tensor, "kinds seeds"]
    rotated_nll: Float[Tensor, "kinds seeds"]
    rotated_ece: Float[Tensor, "kinds seeds"]
    unseen_auroc: Float[Tensor, "kinds seeds"]
    fleets: tuple[Fleet, ...]


def gflowout_study(
    known: Dataset,
    test: Dataset,
    unseen: Dataset,
    hidden: Sequence[int] = (32, 32),
    bits: Sequence[int] | None = (4, 4),
    kinds: Sequence[Kind] = ("dropout", "id", "sample"),
    *,
    seeds: int = 3,
    steps: int = 120,
    draws: int = 16,
    beta: float = 1.0,
    severity: int = 3,
    seed: int = 0,
    **options: Any,
) -> GFlowOutStudy:
    """GFlowOut beside Monte-Carlo dropout: nets of one size and one start, whose masks follow different laws.

    Trains ``seeds`` members of each kind on ``known`` images, averages probabilities over ``draws`` masks, and scores
    them on ``test``, on ``test`` rotated at ``severity`` (see :func:`toolkit.data.corrupt`) and, by predictive entropy,
    on ``unseen`` images, whose labels are not used. ``options`` go to :func:`train_gflowout`. Errors as there. Source:
    Liu et al. 2023, "GFlowOut: Dropout with Generative Flow Networks" (their experiment, at the size of a lesson).
    """
    turned = corrupt(test.x, "rotation", severity, random.key(seed))
    count = len(test)
    fleets, columns = [], []
    for kind in kinds:
        fleet = train_gflowout(
            known, hidden, known.classes, kind, bits=bits, members=seeds, steps=steps, beta=beta, seed=seed, **options
        )
        x = torch.cat([test.x, turned, unseen.x])
        clean, rotated, other = gflowout_probabilities(fleet, x, draws, seed).split([count, count, len(unseen)], 1)
        scores = []
        for part in (clean, rotated):
            right = (part.argmax(-1) == test.y.to(part.device)).to(part.dtype).mean(1)
            scores += [right, *(torch.stack([score(p, test.y.to(p.device)) for p in part]) for score in (nll, ece))]
        entropy = torch.special.entr(torch.cat([clean, other], 1)).sum(-1)
        novel = torch.arange(entropy.shape[1], device=entropy.device) >= count
        scores.append(torch.stack([auroc(row, novel) for row in entropy]))
        fleets.append(fleet)
        columns.append(torch.stack(scores))
    table = torch.stack(columns, 1).cpu()
    scored = dict(zip(GFlowOutStudy._fields[1:-1], table, strict=True))
    return GFlowOutStudy(kinds=tuple(kinds), fleets=tuple(fleets), **scored)
