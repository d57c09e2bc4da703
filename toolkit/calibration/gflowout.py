"""GFlowOut: a generative flow network learns which dropout masks explain the data, and dropout draws from it.

A mask of a few bits is built layer by layer, so every mask has one history and a generator's log-probability of a mask
is a sum over layers. *Trajectory balance* pulls that law towards the posterior over masks, which with few bits can be
enumerated: :mod:`toolkit.calibration.mask_enumeration`. Three kinds share one architecture: ``dropout`` (every bit kept
with a fixed probability), ``id`` (one posterior for the whole data set, which ignores the input) and ``sample`` (one
posterior for each example). Ours, for small nets: a bit may switch a block of units, a generator is one hidden layer on
the joined inputs and has no weight decay (published code: 0.1), and the ``id`` form shares a mask among several
examples of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toolkit import random
from toolkit.calibration.ensembles import mc_dropout
from toolkit.checks import require_labels, require_positive, typed
from toolkit.fleet import Adam, Fleet, train

__all__ = [
    "GFlowOut",
    "MaskPass",
    "gflowout_loss",
    "gflowout_probabilities",
    "mask_log_probability",
    "train_gflowout",
    "trajectory_balance",
]

Kind = Literal["dropout", "id", "sample"]
_EXPLORE = 2.0  # training draws masks from sigmoid(logit / 2)
_NORMALISER_SCALE = 10.0  # log Z moves this much faster than other outputs at one learning rate


class MaskPass(NamedTuple):
    """One pass of a :class:`GFlowOut` under masks: what :func:`gflowout_loss` and the enumeration need.

    ``masks`` are 0 or 1, layer after layer; ``log_q`` is their log-probability (nats) under the generator that training
    draws from, ``log_p`` under the law that is used at test time (``sample``) or under the prior (other kinds).
    """

    logits: Float[Tensor, "batch classes"]
    masks: Float[Tensor, "batch bits"]
    log_q: Float[Tensor, "batch"]
    log_p: Float[Tensor, "batch"]
    log_z: Float[Tensor, "batch"]


@typed
def mask_log_probability(
    logits: Float[Tensor, "*batch bits"], masks: Float[Tensor, "*batch bits"]
) -> Float[Tensor, "*batch"]:
    """Log-probability of binary masks under independent bits, Σ_b z_b log σ(l_b) + (1 - z_b) log σ(-l_b), in nats.

    A bit that is *off* counts log(1 - keep). (Published code puts the probability of the bit that was drawn, which is
    already 1 - keep for a bit that is off, into this formula once more, and so counts log(keep) for it: its law is not
    normalised.) Source: Liu et al. 2023, "GFlowOut: Dropout with Generative Flow Networks".
    """
    return (masks * F.logsigmoid(logits) + (1 - masks) * F.logsigmoid(-logits)).sum(-1)


@typed
def trajectory_balance(
    log_z: Float[Tensor, "batch"], log_q: Float[Tensor, "batch"], log_reward: Float[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """(log Z + log q(z) - log R(z))², per example; no gradient flows into the reward.

    Zero for every mask exactly if q = R / Σ R and log Z = log Σ R, whatever law the masks were drawn from. For masks
    drawn from q itself its expected gradient with respect to q is 2 ∇ KL(q ‖ R / Σ R), at any log Z. All in nats; each
    mask has one history, so no backward probability is needed. Source: Malkin et al. 2022, "Trajectory balance:
    improved credit assignment in GFlowNets"; Liu et al. 2023, "GFlowOut: Dropout with Generative Flow Networks".
    """
    return (log_z + log_q - log_reward.detach()).square()


class _Generator(nn.Module):
    """Logits of one layer's bits; starts as the prior, whatever it is shown."""

    def __init__(self, inputs: int, width: int, bits: int, keep: float):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(inputs, width), nn.LayerNorm(width), nn.Linear(width, bits)
        with torch.no_grad():
            self.outer.weight.zero_()
            self.outer.bias.fill_(math.log(keep / (1 - keep)))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(F.leaky_relu(self.inner(x))))


class GFlowOut(nn.Module):
    """A ReLU net whose hidden units are switched by masks, and the generators that draw the masks.

    ``model(x)`` is the plain net (every bit on); ``model(x, key=key)`` draws masks from the test-time law and
    ``model(x, masks=masks)`` takes given ones. A masked layer is multiplied by width / max(units that are on, 1): the
    published 1e-6, added to that count, guards the empty mask too (its layer is 0 either way), but bends every other
    factor a little, while a whole number needs no such addition and "every bit on" stays exactly the plain net. With
    ``trace=True`` the result is a :class:`MaskPass`; labels ``y`` are then needed, and a ``key`` draws from the law
    q of training, at ``temperature``. In layer l, q sees (ReLU output h_l, y, earlier masks) and p sees (h_l, earlier
    masks) for ``sample``; for ``id`` q sees earlier masks only and p is the prior; for ``dropout`` both are the prior.
    Generators send no gradient into the net; ``shared`` neighbours in the batch are given one mask.

    Args:
        inputs, hidden, classes: sizes of the net, as in :class:`toolkit.models.MLP`.
        kind: ``"dropout"``, ``"id"`` or ``"sample"``; the parameters are laid out alike, so that a fleet of one kind
            can ``start`` from one of another.
        bits: mask bits of each hidden layer, each a divisor of the layer's width; by default one for each unit.
        keep: the prior probability that a bit is on, in (0, 1).
        width: hidden units of a generator.

    Raises ``ValueError`` for other values. Source: Liu et al. 2023, "GFlowOut: Dropout with Generative Flow Networks".
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        classes: int,
        kind: Kind = "sample",
        bits: Sequence[int] | None = None,
        keep: float = 0.5,
        width: int = 32,
    ):
        super().__init__()
        bits = tuple(hidden if bits is None else bits)
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {get_args(Kind)}, got {kind!r}")
        if len(hidden) == 0 or min(inputs, classes, width, *hidden) < 1:
            raise ValueError(f"hidden: expected sizes of at least 1 and a hidden layer, got {inputs, *hidden, classes}")
        if len(bits) != len(hidden) or any(b < 1 or h % b for b, h in zip(bits, hidden, strict=True)):
            raise ValueError(f"bits: expected a divisor of each width in {tuple(hidden)}, got {bits}")
        if not 0 < keep < 1:
            raise ValueError(f"keep: expected a probability in (0, 1), got {keep}")
        self.inputs, self.hidden, self.classes = inputs, tuple(hidden), classes
        self.kind, self.bits, self.keep = kind, bits, keep
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((inputs, *hidden), hidden, strict=False))
        self.head = nn.Linear(hidden[-1], classes)
        before = [sum(bits[:i]) for i in range(len(bits))]
        sizes = list(zip(hidden, before, bits, strict=True))
        self.posterior = nn.ModuleList(_Generator(h + b + classes, width, own, keep) for h, b, own in sizes)
        self.prior = nn.ModuleList(_Generator(h + b, width, own, keep) for h, b, own in sizes)
        self.normaliser = _Generator(inputs + classes, 16, 1, 0.5)

    def _laws(self, i: int, h: Tensor, label: Tensor | None, before: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits of q (None where it needs a label that is not there) and of p, for layer i's bits."""
        fixed = h.new_full((len(h), self.bits[i]), math.log(self.keep / (1 - self.keep)))
        if self.kind == "dropout":
            return fixed, fixed
        if self.kind == "id":
            blank = h.new_zeros(len(h), self.hidden[i])
            return self.posterior[i](torch.cat([blank, before, h.new_zeros(len(h), self.classes)], 1)), fixed
        h = h.detach()
        q = None if label is None else self.posterior[i](torch.cat([h, before, label], 1))
        return q, self.prior[i](torch.cat([h, before], 1))

    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        masks: Tensor | None = None,
        y: Tensor | None = None,
        temperature: float = 1.0,
        shared: int = 1,
        trace: bool = False,
    ) -> Any:
        h = x.flatten(1)
        if h.shape[1] != self.inputs:
            raise ValueError(f"x: expected {self.inputs} values per example, got {h.shape[1]}")
        if trace and (y is None or (key is None and masks is None)):
            raise ValueError("trace: expected labels y, and a key or masks, with trace=True")
        count, total = len(h), sum(self.bits)
        if masks is not None and tuple(masks.shape) != (count, total):
            raise ValueError(f"masks: expected shape {(count, total)}, got {tuple(masks.shape)}")
        if shared < 1 or count % shared:
            raise ValueError(f"shared: expected a divisor of the batch {count}, got {shared}")
        label = F.one_hot(y.long(), self.classes).to(h.dtype) if trace and y is not None else None
        if key is not None:
            noise = random.uniform(key, (count // shared, total), h.dtype)
            noise = noise[:, None].expand(-1, shared, -1).reshape(count, total)
        flat, first, before, log_q, log_p = h, 0, h.new_zeros(count, 0), h.new_zeros(count), h.new_zeros(count)
        for i, layer in enumerate(self.layers):
            h, last = layer(h).relu(), first + self.bits[i]
            if key is None and masks is None:
                continue
            if masks is None or trace:
                q, p = self._laws(i, h, label, before)
            if masks is not None:
                z = masks[:, first:last]
            else:
                drawn = (p if q is None else q).detach() / temperature
                z = (noise[:, first:last] < drawn.sigmoid()).to(h.dtype)
            if trace:
                assert q is not None  # labels are there
                log_q, log_p = log_q + mask_log_probability(q, z), log_p + mask_log_probability(p, z)
            units = z[:, :, None].expand(-1, -1, self.hidden[i] // self.bits[i]).reshape(h.shape)
            h = h * units * (self.hidden[i] / units.sum(1, keepdim=True).clamp_min(1))
            before, first = torch.cat([before, z], 1), last
        logits = self.head(h)
        if not trace:
            return logits
        assert label is not None
        seen = torch.cat([flat, label], 1)
        log_z = self.normaliser(seen if self.kind == "sample" else torch.zeros_like(seen))[:, 0]
        return MaskPass(logits, before, log_q, log_p, _NORMALISER_SCALE * log_z)


@typed
def gflowout_loss(
    model: Any,
    batch: Mapping[str, Any],
    hyper: Mapping[str, Any],
    kind: Kind = "sample",
    examples: int | None = None,
    shared: int = 1,
) -> Float[Tensor, "batch"]:
    """Everything that GFlowOut minimises, per example; each part trains its own parameters.

    Cross-entropy under drawn masks trains the net. For ``sample`` trajectory balance with log R = β log p(y | x, z)
    + log p(z | x) trains q and log Z, and -log p(z | x) of the masks drawn trains p. For ``id``, log R = β N l(z)
    + log p(z): N is ``examples``, and l(z) is the mean log-likelihood of the ``shared`` neighbours in the batch that
    were given the mask z, relative to that of the batch's other masks (which moves log Z and not the posterior; ours,
    for log Z would otherwise have to follow N times the training loss). ``dropout`` is the cross-entropy alone.

    ``batch``: fields ``x``, ``y``, ``key``. ``hyper``: ``beta`` (default 1) and ``net`` (default 1; 0 keeps the net as
    it is). Masks are drawn at temperature 2, which balance allows. Raises ``ValueError`` for a batch that ``id`` cannot
    split into two or more masks. Source: Liu et al. 2023, "GFlowOut: Dropout with Generative Flow Networks".
    """
    x, y, beta = batch["x"], batch["y"], hyper.get("beta", 1.0)
    size = len(x)
    if kind != "id":
        shared = 1
    elif size % shared or size // shared < 2:
        raise ValueError(f"shared: expected a divisor of the batch {size} below it, got {shared}")
    share = hyper.get("net", 1.0)
    if kind == "dropout":
        return share * F.cross_entropy(model(x, key=batch["key"]), y.long(), reduction="none")
    drawn = model(x, y=y, key=batch["key"], temperature=_EXPLORE, shared=shared, trace=True)
    loss = F.cross_entropy(drawn.logits, y.long(), reduction="none")
    learnt = share * loss
    likelihood = -loss.detach()
    if kind == "sample":
        balance = trajectory_balance(drawn.log_z, drawn.log_q, beta * likelihood + drawn.log_p)
        return learnt + balance - drawn.log_p
    groups = likelihood.reshape(-1, shared).mean(1)
    others = (groups.sum() - groups) / (len(groups) - 1)
    total = (size if examples is None else examples) * (groups - others)
    reward = beta * total[:, None].expand(-1, shared).reshape(-1) + drawn.log_p
    return learnt + trajectory_balance(drawn.log_z, drawn.log_q, reward)


def train_gflowout(
    data: Any,
    hidden: Sequence[int] = (64, 64),
    classes: int = 10,
    kind: Kind = "sample",
    *,
    bits: Sequence[int] | None = None,
    keep: float = 0.5,
    members: int = 4,
    steps: int = 400,
    batch: int = 64,
    lr: float = 5e-3,
    beta: float | Tensor = 1.0,
    shared: int = 8,
    start: Fleet | None = None,
    freeze: bool = False,
    **options: Any,
) -> Fleet:
    """Train ``members`` nets of one kind, each with its own generators, in one call of :func:`toolkit.fleet.train`.

    Fleets of different kinds with the same seed are paired: same initial nets, same batches. ``data``: ``x``
    ``(n, ...)`` and ``y`` ``(n,)``. ``beta``: power of the likelihood, one number or one per member. ``shared``:
    examples per mask for ``id``. ``start`` with ``freeze`` trains generators for nets that stay as they are.
    ``options`` are those of ``train``. Raises ``ValueError`` for labels out of range, ``beta`` that is not positive and
    ``freeze`` without ``start``. Source: Liu et al. 2023, "GFlowOut: Dropout with Generative Flow Networks".
    """
    fields = dict(data.as_dict() if hasattr(data, "as_dict") else data)
    require_labels("data['y']", fields["y"], classes)
    require_positive("beta", beta)
    if freeze and start is None:
        raise ValueError("freeze: expected nets to keep as they are, given as start, got none")
    x = fields["x"]
    powers = torch.as_tensor(beta, dtype=x.dtype).expand(members).clone()
    return train(
        partial(GFlowOut, x[0].numel(), tuple(hidden), classes, kind, bits=bits, keep=keep),
        partial(gflowout_loss, kind=kind, examples=len(x), shared=shared),
        fields,
        members=members,
        steps=steps,
        batch=batch,
        optimiser=Adam(lr=lr),
        hyper={"beta": powers, "net": torch.full_like(powers, 0.0 if freeze else 1.0)},
        start=start,
        **options,
    )


def gflowout_probabilities(
    fleet: Fleet, x: Float[Tensor, "batch ..."], draws: int = 16, seed: int = 0
) -> Float[Tensor, "members batch classes"]:
    """Class probabilities of each member, averaged over ``draws`` masks from its test-time law (probabilities, not
    logits). Raises ``ValueError`` for fewer than one draw."""
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    found = fleet.evaluate(
        lambda model, batch, _: mc_dropout(model, batch.x, batch.key, draws).softmax(-1).mean(0), {"x": x}, seed=seed
    )
    return found.to(x.device)
