"""What the approximate methods are made of: checked masks, pairs of examples, slopes, and an optimiser with a mask."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from toolkit.fleet import Fleet, Step, Wrapper, train
from toolkit.fleet.members import Fields, Member, fresh
from toolkit.fleet.store import as_fields
from toolkit.models import MLP
from toolkit.random import fold_in, key, shuffled_slots

Mask = Bool[Tensor, "examples"] | Bool[Tensor, "members examples"]
Strength = float | int | Float[Tensor, "_"]  # one number or one per member
Range = tuple[Any, Any, Any]  # a strength, and the least and the largest it may be
POSITIVE: float = 1e-6  # the least value of a strength that must be greater than 0
PAIRING, UNTRAINED, NOISE_SCALE = 101, 102, 103  # what a key's numbers are for
_MEMBERS, _EXAMPLES = 16, 128  # members, and examples of one member, whose slopes are held at a time


@dataclass(frozen=True)
class Task:
    """The data, and for each member what is to be forgotten and what is to be kept: masks ``(members, examples)``."""

    fields: dict[str, Tensor]
    forget: Tensor
    retain: Tensor

    @property
    def whole(self) -> Tensor:
        return self.forget | self.retain


def prepare(trained: Fleet, data: Any, forget: Tensor, retain: Tensor | None) -> Task:
    """The checked task, on the fleet's device."""
    given = as_fields(data)
    if missing := [name for name in ("x", "y") if name not in given]:
        raise ValueError(f"data: expected fields 'x' and 'y', got none of the name {missing[0]!r}")
    fields = {name: given[name].to(trained.device) for name in ("x", "y")}
    members, examples = len(trained), len(fields["x"])
    if fields["y"].shape != (examples,):
        raise ValueError(f"data['y']: expected one class for each of {examples} rows, got {tuple(fields['y'].shape)}")

    def rows(name: str, mask: Tensor) -> Tensor:
        if mask.shape not in ((examples,), (members, examples)):
            got = tuple(mask.shape)
            raise ValueError(f"{name}: expected a mask ({examples},) or ({members}, {examples}), got {got}")
        return mask.to(trained.device).expand(members, examples)

    lost = rows("forget", forget)
    if not bool(lost.any(1).all()):
        raise ValueError("forget: expected at least one example for each member, got none")
    if bool(lost.all(1).any()):
        raise ValueError(f"forget: expected some of the {examples} examples, got all of them")
    kept = ~lost if retain is None else rows("retain", retain)
    if not bool(kept.any(1).all()):
        raise ValueError("retain: expected at least one example for each member, got none")
    if both := int((lost & kept).sum(1).max()):
        raise ValueError(f"retain: expected no example that is in forget too, got {both}")
    return Task(fields, lost, kept)


def strengths(trained: Fleet, given: Mapping[str, Range]) -> dict[str, Tensor]:
    """Each strength as ``(members,)``, checked against its range."""
    made = {}
    for name, (value, low, high) in given.items():
        values = torch.as_tensor(value, dtype=trained.parameters.dtype, device=trained.device)
        if values.ndim and len(values) != len(trained):
            raise ValueError(
                f"{name}: expected one number or one for each of {len(trained)} members, got {len(values)}"
            )
        if bool(values.isnan().any()) or (low is not None and bool((values < low).any())):
            raise ValueError(f"{name}: expected at least {low}, got {values.min().item():.4g}")
        if high is not None and bool((values > high).any()):
            raise ValueError(f"{name}: expected at most {high}, got {values.max().item():.4g}")
        made[name] = values.expand(len(trained)).clone()
    return made


def within(low: float | None, high: float | None = None, /, **values: Any) -> dict[str, Range]:
    """Strengths by name, each of which may be from ``low`` to ``high`` (None: without a limit)."""
    return {name: (value, low, high) for name, value in values.items()}


def cross_entropy(model: Any, batch: Any, hyper: Any) -> Tensor:
    """The loss that classifiers are trained with."""
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


def weighed(batch: Any, hyper: Any, forgotten: Tensor, retained: Tensor) -> Tensor:
    """The loss of each of a pair's examples: that of those to forget as it is, that of those to keep times λ."""
    return torch.where(batch.forgotten, forgotten, hyper.retain_weight * retained)


def train_on(trained: Fleet, loss: Callable, data: Mapping[str, Tensor], steps: Any, seed: int, **more: Any) -> Fleet:
    """:func:`toolkit.fleet.train` from where the fleet stands, on its device and in its members' streams."""
    fixed: dict[str, Any] = {
        "start": trained,
        "streams": trained.streams,
        "device": trained.device,
        "steps": steps,
        "seed": seed,
    }
    return train(trained.build, loss, data, **{"progress": False, **more, **fixed})


def train_pairs(
    trained: Fleet,
    loss: Callable,
    task: Task,
    steps: Any,
    seed: int,
    hyper: Mapping[str, Range],
    own: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Fleet:
    """Train on pairs of an example to forget and one to keep.

    An epoch of a member has as many pairs as the larger of its two sets; the smaller set is gone through repeatedly,
    partners drawn at random. The loss sees 2·batch examples, forgotten ones first: ``x``, ``y``, ``forgotten`` and the
    fields of ``own`` ``(members, n, ...)``. Where an epoch holds some examples once more than others, weights make up
    for it: the mean over an epoch is the mean over D_f plus the mean over D_r.
    """
    lengths = torch.maximum(task.forget.sum(1), task.retain.sum(1))
    keys = fold_in(key(seed, PAIRING, device=trained.device), trained.streams)
    forgotten, lost = _walk(task.forget, lengths, keys)
    retained, kept = _walk(task.retain, lengths, None)
    members = torch.arange(len(trained), device=trained.device)[:, None]
    tables = {"row_f": forgotten, "row_r": retained, "weight_f": lost, "weight_r": kept}
    tables = {n: v.to(trained.parameters.dtype) if v.is_floating_point() else v for n, v in tables.items()}
    for name, values in (own or {}).items():
        tables |= {f"{name}_f": values[members, forgotten], f"{name}_r": values[members, retained]}
    x, y = task.fields["x"], task.fields["y"]

    def both(batch: Any, name: str) -> Tensor:
        return torch.cat([batch[f"{name}_f"], batch[f"{name}_r"]])

    def paired(model, batch, hyper):
        row, half = both(batch, "row"), len(batch.row_f)
        view = Fields(batch, x=x[row], y=y[row], forgotten=torch.arange(2 * half, device=x.device) < half)
        view |= {name: both(batch, name) for name in own or {}}
        values = loss(model, view, hyper) * both(batch, "weight")
        return values[:half] + values[half:]

    slots = torch.arange(int(lengths.max()), device=trained.device)
    return train_on(
        trained,
        paired,
        {"slot": slots},
        steps,
        seed,
        subsets=slots < lengths[:, None],
        member_data=tables,
        hyper=strengths(trained, hyper),
        **more,
    )


def _walk(mask: Tensor, lengths: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices ``(members, longest)`` that go through each row's set again and again up to its length, and weights."""
    counts, longest = mask.sum(1), int(lengths.max())
    order = torch.argsort(~mask, dim=1, stable=True)
    if keys is not None:
        order = order.gather(1, shuffled_slots(keys, mask.shape[1], counts))
    slot = torch.arange(longest, device=mask.device) % counts[:, None]
    times = lengths[:, None] // counts[:, None] + (slot < lengths[:, None] % counts[:, None])
    return order.gather(1, slot), lengths[:, None].double() / (counts[:, None] * times)


def untrained(trained: Fleet, task: Task, seed: int) -> Fleet:
    """A new net for each member, from the seed and the member's stream; not the one that the member began as."""
    other = int(key(seed, UNTRAINED)) & (2**63 - 1)
    options: dict[str, Any] = {
        "streams": trained.streams,
        "device": trained.device,
        "steps": 0,
        "seed": other,
        "progress": False,
    }
    return train(trained.build, cross_entropy, task.fields, **options)


def moved(trained: Fleet, parameters: Tensor, hyper: dict[str, Tensor]) -> Fleet:
    """The fleet with other parameters, and without what belongs to its training."""
    return replace(trained, parameters=parameters.detach(), hyper=hyper, state={}, memory={}, snapshots={})


def mean_weights(mask: Tensor) -> Tensor:
    """Weights ``(members, examples)`` whose sum of products is the mean over the mask, in float64."""
    return mask.double() / mask.sum(1, keepdim=True)


def slope(trained: Fleet, parameters: Tensor, fields: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Gradients ``(members, size)`` of Σ_i weights_i · CE_i."""
    found, outputs = [], _forward(trained, fields["x"])
    for rows in torch.arange(len(trained), device=trained.device).split(_MEMBERS):
        with torch.enable_grad():
            flat = parameters[rows].detach().requires_grad_()
            logits = outputs(flat)
            values = F.cross_entropy(logits.mT, fields["y"].expand(len(rows), -1), reduction="none")
            found.append(torch.autograd.grad((values * weights[rows].to(values.dtype)).sum(), flat)[0])
    return torch.cat(found)


def slopes_of(function: Callable, flat: Tensor, *batch: Any) -> Tensor:
    """Gradients ``(rows, size)`` of ``function(flat, *row)``, one number, for each row of the batch.

    A copy of ``flat`` for each row and plain autograd: the first call of ``torch.func.grad`` takes seconds.
    """
    count = len(tree_leaves(batch)[0])
    copies = flat.detach().expand(count, -1).clone().requires_grad_()
    with torch.enable_grad():
        values = torch.func.vmap(function)(copies, *batch)
    return torch.autograd.grad(values.sum(), copies)[0]


def squared_slopes(trained: Fleet, fields: Mapping[str, Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Σ_i weights_i · (∂CE_i / ∂θ)² of each member, ``(members, size)``, for each of the weights: Fisher diagonals."""
    module, layout = fresh(trained.build).to(trained.device), trained.layout
    if type(module) is MLP:
        return [_squared_slopes_of_mlps(trained, fields, each) for each in weights]

    def one(flat, x, y):
        views = {name: value[0] for name, value in layout.views(flat[None]).items()}
        return F.cross_entropy(Member(module, views)(x[None])[0], y)

    together = torch.stack(weights, 1).to(trained.parameters.dtype)
    found = trained.parameters.new_zeros(len(trained), len(weights), trained.parameters.shape[1])
    seen = together.any(1)  # examples that no weight counts are left out
    for member in range(len(trained)):
        for part in seen[member].nonzero()[:, 0].split(_EXAMPLES):
            squares = slopes_of(one, trained.parameters[member], fields["x"][part], fields["y"][part]).square()
            found[member] += together[member][:, part] @ squares
    return list(found.unbind(1))


def _squared_slopes_of_mlps(trained: Fleet, fields: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """The same for nets of linear layers, where the slope of a weight is a product: (∂CE/∂z)² times (input)²."""
    views, share = trained.layout.views(trained.parameters), weights.to(trained.parameters.dtype)[..., None]
    layers = [f"layers.{i}" for i in range(sum(name.startswith("layers.") for name in views) // 2)] + ["head"]
    inputs = [fields["x"].flatten(1).expand(len(trained), -1, -1)]
    for name in layers[:-1]:
        inputs.append((inputs[-1] @ views[f"{name}.weight"].mT + views[f"{name}.bias"][:, None]).relu())
    logits = inputs[-1] @ views["head.weight"].mT + views["head.bias"][:, None]
    back = logits.softmax(-1) - F.one_hot(fields["y"].long(), logits.shape[-1])
    squares = {name: torch.zeros_like(view) for name, view in views.items()}
    for depth in range(len(layers) - 1, -1, -1):
        weighted = share * back.square()
        squares[f"{layers[depth]}.weight"] = weighted.mT @ inputs[depth].square()
        squares[f"{layers[depth]}.bias"] = weighted.sum(1)
        back = (back @ views[f"{layers[depth]}.weight"]) * (inputs[depth] > 0)
    return torch.cat([squares[name].flatten(1) for name in views], 1)


def solve(
    trained: Fleet,
    parameters: Tensor,
    fields: Mapping[str, Tensor],
    weights: Tensor,
    ridge: Tensor,
    wanted: Tensor,
    iterations: int,
) -> Tensor:
    """(G + ridge I)⁻¹ wanted by conjugate gradients, G the Gauss-Newton matrix of Σ weights · CE at ``parameters``."""
    found, outputs = [], _forward(trained, fields["x"])
    for rows in torch.arange(len(trained), device=trained.device).split(_MEMBERS):
        share = weights[rows].to(parameters.dtype)[..., None]
        with torch.enable_grad():
            flat = parameters[rows].detach().requires_grad_()
            logits = outputs(flat)
            probe = torch.zeros_like(logits, requires_grad=True)
            (back,) = torch.autograd.grad(logits, flat, probe, create_graph=True)  # Jᵀ u, whose slope by u is J
        p = logits.detach().softmax(-1)

        def product(vector, p=p, share=share, logits=logits, flat=flat, probe=probe, back=back, ridge=ridge[rows]):
            (change,) = torch.autograd.grad(back, probe, vector, retain_graph=True)
            bent = share * p * (change - (p * change).sum(-1, keepdim=True))
            return torch.autograd.grad(logits, flat, bent, retain_graph=True)[0] + ridge * vector

        found.append(_conjugate_gradients(product, wanted[rows], iterations))
    return torch.cat(found)


def _conjugate_gradients(product: Callable, wanted: Tensor, iterations: int) -> Tensor:
    """Each row on its own: a row whose residual is at rounding error stands still."""
    solution, residual, direction = torch.zeros_like(wanted), wanted, wanted
    square = residual.square().sum(1, keepdim=True)
    enough = square * torch.finfo(wanted.dtype).eps ** 2
    for _ in range(iterations):
        active = square > enough
        if not bool(active.any()):
            break
        image = product(direction)
        bend = (direction * image).sum(1, keepdim=True)
        length = torch.where(active & (bend > 0), square / bend, 0)
        solution, residual = solution + length * direction, residual - length * image
        fresh_square = residual.square().sum(1, keepdim=True)
        direction = torch.where(active, residual + fresh_square / square.clamp_min(1e-300) * direction, 0)
        square = torch.where(active, fresh_square, square)
    return solution


def _forward(trained: Fleet, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The function from flat rows ``(members, size)`` to logits ``(members, examples, classes)``."""
    module, layout = fresh(trained.build).to(trained.device), trained.layout

    def outputs(flat: Tensor) -> Tensor:
        return torch.func.vmap(lambda views: Member(module, views)(x))(layout.views(flat))

    return outputs


def nearest_other_class(trained: Fleet, task: Task) -> Tensor:
    """For every example the centroid (of D_r) nearest by cosine among the classes but its own: ``(members, n, d)``."""
    classes = trained.logits(task.fields["x"][:1]).shape[-1]
    own = F.one_hot(task.fields["y"].long(), classes).bool()
    features = trained.features(task.fields["x"])
    counted = (own & task.retain[..., None]).to(features.dtype)
    centroids = counted.mT @ features / counted.sum(1).clamp_min(1)[..., None]
    near = F.normalize(features, dim=-1) @ F.normalize(centroids, dim=-1).mT
    open_ = (counted.sum(1) > 0)[:, None] & ~own  # columns are classes by number, whether D_r has them or not
    if not bool((open_.any(-1) | ~task.forget).all()):
        raise ValueError("retain: expected a class besides that of each example to forget, got one class only")
    chosen = near.masked_fill(~open_, float("-inf")).argmax(-1)
    return centroids[torch.arange(len(trained), device=centroids.device)[:, None], chosen]


@dataclass(frozen=True)
class Masked(Wrapper):
    """An optimiser that leaves the coordinates outside a mask bit for bit as they were.

    The mask is ``(members, size)`` or ``(size,)``. The coordinates are put back after every step, and what the
    optimiser remembers of them is set to 0. Mask and original values travel in the optimiser's state, so that chunks
    of members have theirs.
    """

    mask: Tensor = field(repr=False)

    own = ("mask", "original")

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        mask = self.mask.to(parameters).expand_as(parameters).clone()
        return {"mask": mask, "original": parameters.clone(), **super().initial(parameters)}

    def take(self, step: Step) -> None:
        mask, original = (step.state[name] for name in self.own)
        free = mask > 0
        super().take(step._replace(gradient=torch.where(free, step.gradient, 0)))
        for name in step.state.keys() - set(self.own):
            step.state[name].mul_(mask)
        step.parameters.copy_(torch.where(free, step.parameters, original))
