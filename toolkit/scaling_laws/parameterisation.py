"""Standard, NTK and muP parameterisation of MLPs, and what tells them apart: coordinate check, sharpness, transfer.

A parameterisation says how three things of every layer depend on the width N: the standard deviation of the initial
weights, a multiplier in the forward pass, and the layer's learning rate. All three of them coincide at ``base`` width,
so that one axis of learning rates serves them all.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from toolkit.checks import require_positive, typed
from toolkit.fleet import SGD, Adam, Fleet, Step, Wrapper, grid, train
from toolkit.fleet.chunks import Loss
from toolkit.fleet.devices import one_thread
from toolkit.fleet.members import Fields, Member, fresh
from toolkit.fleet.optimisers import Optimiser
from toolkit.fleet.store import as_fields
from toolkit.random import key, normal

__all__ = [
    "PerLayer",
    "Rule",
    "ScaledMLP",
    "coordinate_check",
    "layer_rules",
    "sharpness",
    "top_eigenvalue",
    "transfer_sweep",
]

Kind = Literal["sp", "ntk", "mup"]
_PROBE = 211  # what the key's numbers are for


class Rule(NamedTuple):
    """How one layer h ↦ multiplier · W h + b begins and learns: factors multiply the optimiser's learning rate."""

    std: float
    multiplier: float = 1.0
    sgd: float = 1.0
    adam: float = 1.0
    bias_sgd: float = 1.0
    bias_adam: float = 1.0


@typed
def layer_rules(
    inputs: int, width: int, kind: Kind = "mup", *, depth: int = 2, base: int = 64, zero_readout: bool = False
) -> list[Rule]:
    """The rules of ``depth`` hidden layers of ``width`` units and a readout, in this order.

    With m = width / base, d = inputs, N = width, N₀ = base (biases begin at 0):

    ====  =======  =========  ==========  ==============  ===========================
    kind  layer    std        multiplier  SGD             Adam
    ====  =======  =========  ==========  ==============  ===========================
    sp    all      1/√fan_in  1           1               1
    ntk   all      1          1/√fan_in   fan_in at base  √fan_in · m^-½, m^-3/2, 1/m
    mup   input    1/√d       1           m               1
    mup   hidden   1/√N       1           1               1/m
    mup   readout  1/√N₀      1/m         m               1
    ====  =======  =========  ==========  ==============  ===========================

    Hidden biases learn at m (SGD) or 1 (Adam) in muP; at 1 (SGD) or m^-½ (Adam) in NTK. The Adam column of NTK (input,
    hidden, readout) is a derivation from the demand that the function moves by O(1) and features by O(N^-½), not a
    published table. ``zero_readout`` begins the readout at 0.

    Sources: Yang et al. 2022, "Tensor Programs V" (table 8) and its package ``mup``; Jacot, Gabriel & Hongler 2018,
    "Neural Tangent Kernel"; compared in Noci et al. 2024, "Why do Learning Rates Transfer?".

    Raises ``ValueError`` for sizes below 1.
    """
    for name, size in (("inputs", inputs), ("width", width), ("depth", depth), ("base", base)):
        if size < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {size}")
    m = width / base
    first = {
        "sp": Rule(inputs**-0.5),
        "ntk": Rule(1.0, inputs**-0.5, float(inputs), (inputs / m) ** 0.5, 1.0, m**-0.5),
        "mup": Rule(inputs**-0.5, 1.0, m, 1.0, m),
    }[kind]
    hidden = {
        "sp": Rule(width**-0.5),
        "ntk": Rule(1.0, width**-0.5, float(base), width**0.5 * m**-1.5, 1.0, m**-0.5),
        "mup": Rule(width**-0.5, 1.0, 1.0, 1 / m, m),
    }[kind]
    readout = {
        "sp": Rule(width**-0.5),
        "ntk": Rule(1.0, width**-0.5, float(base), width**0.5 / m),
        "mup": Rule(base**-0.5, 1 / m, m),
    }[kind]
    return [first, *[hidden] * (depth - 1), readout._replace(std=0.0) if zero_readout else readout]


class ScaledMLP(nn.Module):
    """MLP whose layers follow ``rules``: h ↦ multiplier · W h + b, W ~ N(0, std²), b = 0, then the activation.

    ``model(x)`` gives ``(batch, outputs)``; with ``return_features`` also the last hidden activations; with
    ``return_layers`` the list of all pre-activations, the output last. ``len(rules) - 1`` hidden layers.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        rules: Sequence[Rule],
        activation: Literal["tanh", "relu"] = "tanh",
    ):
        super().__init__()
        if len(rules) < 2:
            raise ValueError(f"rules: expected those of at least one hidden layer and the readout, got {len(rules)}")
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation: expected 'tanh' or 'relu', got {activation!r}")
        sizes = [inputs, *[width] * (len(rules) - 1), outputs]
        self.rules, self.activation = tuple(rules), activation
        self.weights = nn.ParameterList(
            torch.randn(after, before) * rule.std
            for before, after, rule in zip(sizes[:-1], sizes[1:], rules, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(after) for after in sizes[1:])

    def forward(self, x: Tensor, return_features: bool = False, return_layers: bool = False) -> Any:
        h = x.flatten(1)
        layers: list[Tensor] = []
        for i, (rule, weight, bias) in enumerate(zip(self.rules, self.weights, self.biases, strict=True)):
            if i:
                h = layers[-1].tanh() if self.activation == "tanh" else layers[-1].relu()
            layers.append(rule.multiplier * (h @ weight.mT) + bias)
        return layers if return_layers else (layers[-1], h) if return_features else layers[-1]

    def factors(self, optimiser: Literal["sgd", "adam"]) -> Tensor:
        """The learning-rate factor of every coordinate, ``(size,)``, in the order of the fleet's flat rows."""
        if optimiser not in ("sgd", "adam"):
            raise ValueError(f"optimiser: expected 'sgd' or 'adam', got {optimiser!r}")
        pairs = [(r.sgd, r.bias_sgd) if optimiser == "sgd" else (r.adam, r.bias_adam) for r in self.rules]
        weights = [torch.full_like(w, pair[0]).flatten() for w, pair in zip(self.weights, pairs, strict=True)]
        biases = [torch.full_like(b, pair[1]) for b, pair in zip(self.biases, pairs, strict=True)]
        return torch.cat([*weights, *biases]).detach()


@dataclass(frozen=True)
class PerLayer(Wrapper):
    """An optimiser whose learning rate is multiplied, coordinate by coordinate, by ``factors`` ``(size,)``.

    Weight decay is divided by them, so that learning rate times decay is the same everywhere (as ``mup`` does). Adam's
    epsilon is not rescaled.
    """

    factors: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.factors.ndim != 1:
            raise ValueError(f"factors: expected one per coordinate, got shape {tuple(self.factors.shape)}")
        require_positive("factors", self.factors)

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        if parameters.shape[1:] != self.factors.shape:
            raise ValueError(f"factors: expected {parameters.shape[1]} values, got {len(self.factors)}")
        return super().initial(parameters)

    def take(self, step: Step) -> None:
        factors = self.factors.to(step.parameters)
        decay = None if step.decay is None else step.decay / factors
        super().take(step._replace(rate=step.rate * factors, decay=decay))


@typed
def coordinate_check(fleet: Fleet, x: Float[Tensor, "batch ..."], step: int) -> Float[Tensor, "members layers"]:
    """How far the pre-activations have moved after ``step`` steps: root mean square over examples and units.

    ``fleet`` holds :class:`ScaledMLP` members with snapshots 0 and ``step``; the last column is the output. Against
    width, the logarithm of hidden changes has slope 0 in muP, -½ in NTK, and is positive in SP at a fixed rate (Yang
    et al. 2022, "Tensor Programs V", appendix D.1). Raises ``ValueError`` for a missing snapshot.
    """

    def layers(moment: int) -> list[Tensor]:
        return fleet.at(moment).evaluate(lambda model, batch, hyper: model(batch.x, return_layers=True), {"x": x})

    pairs = zip(layers(step), layers(0), strict=True)
    return torch.stack([(after - before).square().flatten(1).mean(1).sqrt() for after, before in pairs], 1)


@typed
def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, "members size"], iterations: int = 30
) -> Float[Tensor, "members"]:
    """The largest (not the largest in magnitude) eigenvalue of one symmetric matrix for each member, by Lanczos.

    ``product`` maps ``(members, size)`` to the rows' products with their matrices. T = QᵀAQ on the Krylov space of
    ``start``, fully orthogonalised (twice), whose largest eigenvalue is a lower bound that grows with ``iterations``
    and is exact at ``size`` iterations. Plain power iteration would return a negative eigenvalue where that has the
    largest magnitude. Source: Golub & Van Loan 2013, "Matrix Computations", section 10.1.

    Raises ``ValueError`` for fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    kind = torch.finfo(start.dtype)
    vector = start / start.norm(dim=1, keepdim=True).clamp_min(kind.tiny)
    basis, images = vector[:, None], product(vector)[:, None]
    alive = [vector.norm(dim=1) > 0]
    for _ in range(min(iterations, start.shape[1]) - 1):
        scale = images.norm(dim=2).amax(1)
        vector = images[:, -1]
        for _ in range(2):
            vector = vector - torch.einsum("mks,mk->ms", basis, torch.einsum("mks,ms->mk", basis, vector))
        length = vector.norm(dim=1)
        alive.append(length > 30 * kind.eps * scale)  # otherwise the space is complete: only rounding errors are left
        vector = torch.where(alive[-1][:, None], vector / length.clamp_min(kind.tiny)[:, None], 0)
        basis, images = torch.cat([basis, vector[:, None]], 1), torch.cat([images, product(vector)[:, None]], 1)
    inner = basis @ images.mT
    spare = torch.where(torch.stack(alive, 1), 0, inner[:, :1, 0])  # a Rayleigh quotient in place of a spurious 0
    return torch.linalg.eigvalsh((inner + inner.mT) / 2 + torch.diag_embed(spare))[:, -1]


def sharpness(
    fleet: Fleet,
    loss: Loss,
    data: Any,
    *,
    factors: Tensor | None = None,
    iterations: int = 30,
    chunk: int = 8,
    seed: int = 0,
) -> Tensor:
    """The top Hessian eigenvalue of every member's mean loss on all of ``data``: ``(members,)``.

    With ``factors`` r ``(size,)`` (see :meth:`ScaledMLP.factors`) it is the top eigenvalue of √r H √r, which does not
    change when a factor moves between weights and multiplier; SGD at rate η is stable on a quadratic while it is below
    2/η. ``loss`` has the signature and the rules of a training loss. Hessian times vector by differentiating twice,
    top eigenvalue by :func:`top_eigenvalue`.

    Source: Noci et al. 2024, "Why do Learning Rates Transfer? Reconciling Optimization and Scaling Limits for Deep
    Learning". Raises ``ValueError`` for factors that do not fit.
    """
    size = fleet.parameters.shape[1]
    if factors is not None and factors.shape != (size,):
        raise ValueError(f"factors: expected one per coordinate, ({size},), got {tuple(factors.shape)}")
    fields = {name: value.to(fleet.device) for name, value in as_fields(data).items()}
    root = torch.ones_like(fleet.parameters[0]) if factors is None else factors.to(fleet.parameters).sqrt()
    module = fresh(fleet.build).to(fleet.device)
    found = []
    with torch.enable_grad(), one_thread():
        for first in range(0, len(fleet), chunk):
            rows = slice(first, first + chunk)
            views = fleet.layout.views(fleet.parameters[rows])
            leaves = {name: value.detach().requires_grad_() for name, value in views.items()}

            def one(parameters: Any, hyper: Any) -> Tensor:
                return loss(Member(module, parameters), Fields(fields), Fields(hyper)).mean()

            hyper = {name: value[rows] for name, value in fleet.hyper.items()}
            total = torch.vmap(one)(leaves, hyper).sum()
            slopes = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
            slope = torch.cat([part.flatten(1) for part in slopes], 1)

            def product(vector: Tensor, slope: Tensor = slope, leaves: Any = leaves) -> Tensor:
                parts = torch.autograd.grad(
                    slope, list(leaves.values()), root * vector, retain_graph=True, materialize_grads=True
                )
                return root * torch.cat([part.flatten(1) for part in parts], 1)

            probe = normal(key(seed, _PROBE, device=fleet.device), (size,), fleet.parameters.dtype)
            found.append(top_eigenvalue(product, probe.expand_as(slope).clone(), iterations))
    return torch.cat(found)


def transfer_sweep(
    data: Any,
    loss: Loss,
    widths: Sequence[int],
    rates: Sequence[float],
    *,
    inputs: int,
    outputs: int,
    kind: Kind = "mup",
    optimiser: Optimiser | None = None,
    seeds: int = 2,
    depth: int = 2,
    base: int = 64,
    activation: Literal["tanh", "relu"] = "tanh",
    zero_readout: bool = False,
    **options: Any,
) -> Tensor:
    """Mean loss on ``data`` after training, ``(widths, rates, seeds)``: where is each width's best learning rate?

    One fleet for each width, one member for each rate and seed. ``optimiser`` is ``SGD`` or ``Adam`` (default), whose
    ``lr`` gives way to ``rates``; ``options`` go to :func:`toolkit.fleet.train` (``steps``, ``batch``, ``schedule``,
    ...). A run that diverged counts as infinite. Source: Yang et al. 2022, "Tensor Programs V: Tuning Large Neural
    Networks via Zero-Shot Hyperparameter Transfer", figure 1. Raises ``ValueError`` for no widths or rates.
    """
    if len(widths) == 0 or len(rates) == 0:
        raise ValueError(f"widths, rates: expected at least one of each, got {len(widths)} and {len(rates)}")
    inner: Any = optimiser or Adam()
    if not isinstance(inner, Adam | SGD):
        raise ValueError(f"optimiser: expected Adam, AdamW or SGD, got {type(inner).__name__}")
    members = grid(seeds, lr=rates)
    inner = replace(inner, lr=members["hyper"]["lr"])
    results = []
    for width in widths:
        rules = layer_rules(inputs, width, kind, depth=depth, base=base, zero_readout=zero_readout)

        def build(width: int = width, rules: Any = rules) -> ScaledMLP:
            return ScaledMLP(inputs, width, outputs, rules, activation)

        factors = fresh(build).factors("adam" if isinstance(inner, Adam) else "sgd")  # type: ignore[operator]  # a ScaledMLP
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "non-finite loss", RuntimeWarning)
            fleet = train(build, loss, data, optimiser=PerLayer(inner, factors), **members, **options)
        final = fleet.evaluate(lambda model, batch, hyper: loss(model, batch, hyper).mean(), data)
        final = torch.where((fleet.failed < 0) & final.isfinite(), final, float("inf"))
        results.append(final.view(len(rates), seeds))
    return torch.stack(results)
