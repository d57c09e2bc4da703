"""What should a net do with an input of which a part is missing? Fill the gap with a guess, or grow undecided.

A PROMISSING layer leaves missing inputs (NaN) out of each neuron's sum, together with their share of the bias: nothing
is guessed, and with nothing observed nothing is said. mPROMISSING learns what a neuron should say then. Beside them are
two imputations, zero and the observed mean, and the three kinds of missingness (at random or not) to compare under.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from toolkit import random
from toolkit.calibration.binned import ece
from toolkit.calibration.losses import cross_entropy
from toolkit.checks import require_range, typed
from toolkit.data import digits, splits
from toolkit.fleet import Adam, each, train
from toolkit.models import MLP

__all__ = [
    "MissingStudy",
    "PromissingMLP",
    "missing_features_study",
    "missing_probability",
    "promissing_linear",
    "remove_features",
]

Missingness = Literal["mcar", "mar", "mnar"]
METHODS = ("PROMISSING", "mPROMISSING", "mean", "zero")
_HALVINGS = 50


@typed
def promissing_linear(
    x: Float[Tensor, "batch inputs"],
    weight: Float[Tensor, "units inputs"],
    bias: Float[Tensor, "units"],
    compensation: Float[Tensor, "units"] | None = None,
) -> Float[Tensor, "batch units"]:
    """Σ over observed inputs of w_i x_i + (q / p) b, and + (r / p) c with a ``compensation`` c (mPROMISSING).

    p inputs, of which q are observed and r = p - q are missing (NaN in ``x``). It is the linear layer of an input whose
    missing entries are, for each neuron anew, the *neutraliser* -b / (p w_i): w_i x_i then cancels a p-th of the bias.
    It differs from zero imputation, which keeps all of b, and from scaling the sum by p / q. Without missing inputs it
    is the plain linear layer; with all missing it is 0 (or c). Gradients of a missing input's weight are exactly 0.
    Pure and vmap-safe. Source: Kia et al. 2022, "PROMISSING: Pruning Missing Values in Neural Networks" (the equations
    as a published replication quotes them).
    """
    observed = ~x.isnan()
    share = observed.to(x.dtype).mean(-1, keepdim=True)
    total = torch.where(observed, x, torch.zeros((), dtype=x.dtype, device=x.device)) @ weight.mT + share * bias
    return total if compensation is None else total + (1 - share) * compensation


class PromissingMLP(nn.Module):
    """A ReLU net whose first layer is :func:`promissing_linear`: NaN in the input means missing.

    ``model(x)`` gives logits ``(batch, classes)``; ``compensated`` (a number, 1 or 0) multiplies the learnt
    compensation, which starts at 0: 0 is PROMISSING, 1 is mPROMISSING, and both can be in one fleet. Other layers are
    unchanged, so with everything missing a deep net says what its later biases say; only without hidden layers is that
    the uniform distribution. ``inputs``, ``hidden`` and ``classes`` as in :class:`toolkit.models.MLP`.
    Source: Kia et al. 2022, "PROMISSING: Pruning Missing Values in Neural Networks".
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int):
        super().__init__()
        self.inputs = inputs
        widths = [*hidden, classes]
        if inputs < 1 or min(widths) < 1:
            raise ValueError(
                f"inputs, hidden, classes: expected sizes of at least 1, got {inputs}, {hidden}, {classes}"
            )
        self.first = nn.Linear(inputs, widths[0])
        self.compensation = nn.Parameter(torch.zeros(widths[0]))
        self.rest = MLP(widths[0], widths[1:-1], classes) if hidden else None

    def forward(self, x: Tensor, compensated: float | Tensor = 1.0) -> Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.inputs:
            raise ValueError(f"x: expected {self.inputs} values per example, got {x.shape[1]}")
        first = promissing_linear(x, self.first.weight, self.first.bias, compensated * self.compensation)
        return first if self.rest is None else self.rest(first.relu())


def _intercept(drive: Tensor, rate: float | Tensor) -> Tensor:
    """The number c for which the mean of sigmoid(drive + c) is ``rate``, by bisection."""
    target = torch.logit(torch.as_tensor(rate, dtype=drive.dtype, device=drive.device), eps=1e-9)
    low, high = target - drive.amax(), target - drive.amin()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = torch.sigmoid(drive + middle).mean() > rate
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    deviation = centred.square().mean(0).sqrt()
    return centred / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


@typed
def missing_probability(
    x: Float[Tensor, "batch features"],
    rate: float | Float[Tensor, ""],
    kind: Missingness = "mcar",
    strength: float = 2.0,
    drivers: int | None = None,
) -> Float[Tensor, "batch features"]:
    """The probability that each entry of ``x`` goes missing; its mean over what can is ``rate``.

    - ``"mcar"``, completely at random: ``rate`` everywhere;
    - ``"mar"``, at random given what is seen: sigmoid(strength · u + c) with u the standardised mean of the first
      ``drivers`` features (by default a quarter, at least one), which are themselves never missing;
    - ``"mnar"``, not at random: sigmoid(strength · z + c) with z the entry's own value, standardised over the batch.

    c makes the mean equal ``rate`` (for ``mar`` the mean over the features that can go missing). ``strength`` is in
    log-odds per standard deviation: 0 is ``mcar``. Kinds: Rubin 1976, "Inference and missing data"; the logistic forms
    are ours. Raises ``ValueError`` for a rate outside [0, 1] and for ``drivers`` outside 1 .. features - 1.
    """
    require_range("rate", rate, 0, 1)
    features = x.shape[1]
    level = torch.as_tensor(rate, dtype=x.dtype, device=x.device)
    if kind == "mcar":
        return level.expand(x.shape)
    if kind == "mnar":
        drive = strength * _standardised(x)
        return torch.where((level > 0) & (level < 1), torch.sigmoid(drive + _intercept(drive, level)), level)
    count = max(1, features // 4) if drivers is None else drivers
    if not 1 <= count < features:
        raise ValueError(f"drivers: expected a number from 1 to features - 1 = {features - 1}, got {count}")
    drive = strength * _standardised(x[:, :count].mean(1, keepdim=True))
    probability = torch.where((level > 0) & (level < 1), torch.sigmoid(drive + _intercept(drive, level)), level)
    return torch.where(torch.arange(features, device=x.device) < count, torch.zeros_like(level), probability)


@typed
def remove_features(
    x: Float[Tensor, "batch features"],
    rate: float | Float[Tensor, ""],
    key: Int[Tensor, ""],
    kind: Missingness = "mcar",
    strength: float = 2.0,
    drivers: int | None = None,
) -> Float[Tensor, "batch features"]:
    """``x`` with NaN in each entry with its :func:`missing_probability`, independently; the rest as it is.

    A larger rate with the same ``key`` keeps the gaps of a smaller one. Errors as :func:`missing_probability`.
    """
    probability = missing_probability(x, rate, kind, strength, drivers)
    gone = random.uniform(key, tuple(x.shape), x.dtype) < probability
    return torch.where(gone, torch.full((), float("nan"), dtype=x.dtype, device=x.device), x)


class MissingStudy(NamedTuple):
    """Mean confidence, accuracy, ECE (15 bins) and entropy (nats) for each way to treat gaps, test rate and seed."""

    methods: tuple[str, ...]
    rates: tuple[float, ...]
    confidence: Float[Tensor, "methods rates seeds"]
    accuracy: Float[Tensor, "methods rates seeds"]
    ece: Float[Tensor, "methods rates seeds"]
    entropy: Float[Tensor, "methods rates seeds"]


def _loss(model, batch, hyper):
    return cross_entropy(model(batch.x, compensated=hyper.compensated), batch.y)


def _treated(x: Tensor, means: Tensor) -> Tensor:
    """Data with gaps ``(seeds, n, features)`` as the members of the four methods see them, method after method."""
    gone = x.isnan()
    return torch.cat([x, x, torch.where(gone, means[:, None], x), torch.where(gone, torch.zeros_like(x), x)])


@typed
def missing_features_study(
    *,
    rates: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95),
    train_rate: float = 0.3,
    kind: Missingness = "mcar",
    hidden: tuple[int, ...] = (64,),
    examples: int = 400,
    seeds: int = 4,
    steps: int = 250,
    batch: int = 64,
    lr: float = 0.005,
    seed: int = 0,
) -> MissingStudy:
    """Digits whose pixels go missing: does confidence fall with what is seen, and with it the accuracy?

    One fleet of 4 · ``seeds`` nets (PROMISSING, mPROMISSING, plain nets after mean and after zero imputation; paired:
    same initial weights, batches and gaps) learns from digits of which ``train_rate`` of the pixels is missing, and is
    asked about ``examples`` others with each of ``rates`` missing. Means for imputation are those of the observed
    training pixels. Raises ``ValueError`` for rates outside [0, 1].
    Source: Kia et al. 2022, "PROMISSING: Pruning Missing Values in Neural Networks" (there other data; sizes are ours).
    """
    for i, rate in enumerate(rates):
        require_range(f"rates[{i}]", rate, 0, 1)
    parts = splits(digits(), seed, (0.5, 0.0, 0.5))
    x, unseen, labels = parts.train.x.flatten(1), parts.test.x[:examples].flatten(1), parts.test.y[:examples]
    gaps = torch.stack([remove_features(x, train_rate, random.key(seed, 1, i), kind) for i in range(seeds)])
    means = gaps.nanmean(1).nan_to_num(0.5)  # a pixel never seen: half of white
    streams = torch.arange(seeds).repeat(len(METHODS))
    fleet = train(
        lambda: PromissingMLP(x.shape[1], hidden, 10),
        _loss,
        {"y": parts.train.y},
        member_data={"x": _treated(gaps, means)},
        hyper={"compensated": (torch.arange(len(streams)) // seeds == 1).float()},
        streams=streams,
        steps=steps,
        batch=batch,
        optimiser=Adam(lr=lr),
        seed=seed,
        device="cpu",
        progress=False,
    )
    asked = torch.stack(
        [torch.cat([remove_features(unseen, r, random.key(seed, 2, i), kind) for r in rates]) for i in range(seeds)]
    )
    logits = fleet.evaluate(
        lambda model, batch, hyper: model(batch.x, compensated=hyper.compensated),
        {},
        member_data={"x": _treated(asked, means)},
    )
    p = logits.softmax(-1).reshape(-1, len(labels), 10)
    errors = each(lambda rows: ece(rows, labels), p)
    values = (
        p.amax(-1).mean(-1),
        (p.argmax(-1) == labels).float().mean(-1),
        errors,
        torch.special.entr(p).sum(-1).mean(-1),
    )
    shape = (len(METHODS), seeds, len(rates))
    return MissingStudy(METHODS, tuple(rates), *(v.reshape(shape).transpose(1, 2) for v in values))
