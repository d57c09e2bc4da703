"""LAF: forget without labels, by what two autoencoders of the representations know."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.checks import typed
from toolkit.fleet import Adam, Fleet, Step, Wrapper, train
from toolkit.fleet.optimisers import Optimiser
from toolkit.fleet.store import as_fields
from toolkit.random import key, normal
from toolkit.unlearning.parts import Mask, Masked, Task, cross_entropy, prepare, train_on, train_pairs, within

__all__ = ["laf"]

_KEPT, _LOST, _REPAIR = 111, 112, 113  # what a key's numbers are for


class Autoencoders(NamedTuple):
    """Two fleets of variational autoencoders: of representations to keep, and of those to forget."""

    kept: Fleet
    lost: Fleet


@typed
def laf(
    trained: Fleet,
    data: Any,
    forget: Mask,
    *,
    temperature: float = 20.0,
    latent: int = 8,
    fit_steps: int = 300,
    optimiser: Any = None,
    aligner: Any = None,
    repair_steps: int = 0,
    repairer: Any = None,
    retain: Mask | None = None,
    steps: Any = 100,
    seed: int = 0,
    **more: Any,
) -> Fleet:
    """Two kinds of steps in turn, on the representation e = φ(x) alone; labels are not looked at.

    First two variational autoencoders per member are fitted (``fit_steps``, ``latent`` numbers per code) to the
    original's representations: h to those of D_r only, h_f to those of D_f. (Public code fits h to all training data,
    those to forget among them.) Even steps, by ``optimiser``: mean_r s(‖h(e) - e‖²) - mean_f s(‖h_f(e) - e‖²), s(M) =
    exp(M / (M + 1)): :func:`extraction`. Odd steps, by ``aligner``: mean_r a(x) - log Σ_f exp(a(x) / τ), a = 1 -
    cos(e, e_o), e_o the original's, τ = ``temperature`` > 0: :func:`alignment`. ``steps`` counts both kinds. Both
    optimisers are Adam by default, at 5e-5 and 1e-4 (the source's), each with its own state; rates may differ between
    members. The head stays bit for bit. Small nets need more: on 8×8 digits 1e-3 and 3e-3 with τ = 3 and repair forget
    a class in 200 steps, the defaults next to nothing.

    ``repair_steps`` > 0 adds LAF+R: cross-entropy on D_r with labels, of which only the head learns (``repairer``, Adam
    at 1e-3). ``data`` needs a ``y`` only for that. Source: Shen et al. 2024, "Label-Agnostic Forgetting: A
    Supervision-Free Unlearning in Deep Models"; that the autoencoders take the mean code during unlearning, their
    widths and the weight of their KL term are readings that are not confirmed. Raises ``ValueError`` also for a
    temperature of 0 or less, or fewer than 1 latent number.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number greater than 0, got {temperature}")
    given = as_fields(data)
    if repair_steps and "y" not in given:
        raise ValueError("data: expected a field 'y' to repair the head with, got none")
    if "x" in given:
        given = {"y": torch.zeros(len(given["x"]), dtype=torch.int64), **given}
    task = prepare(trained, given, forget, retain)
    original = trained.features(task.fields["x"])
    models = autoencoders(trained, task, latent, fit_steps, seed)
    planned = torch.as_tensor(steps, device=trained.device).to(original.dtype).expand(len(trained))

    def loss(model, batch, hyper):
        half = len(batch.forgotten) // 2  # the first half is to be forgotten
        now = model(batch.x, return_features=True)[1]
        known = torch.cat([batch.lost(now[:half])[0], batch.kept(now[half:])[0]])
        first = extraction(now, known)
        second = alignment(now, batch.representation, temperature)
        turn = (batch.progress * hyper.planned).round()
        return torch.where(turn % 2 == 0, first, second)

    turns = Alternating(optimiser or Adam(5e-5), aligner or Adam(1e-4))
    options = {"own": {"representation": original}, "optimiser": turns, "references": models._asdict(), **more}
    found = train_pairs(trained, loss, task, steps, seed, within(0, planned=planned), **options)
    if not repair_steps:
        return found
    head = [
        torch.full((size,), name.startswith("head."))
        for name, size in zip(trained.layout.names, trained.layout.sizes, strict=True)
    ]
    masked = Masked(repairer or Adam(), torch.cat(head).to(trained.device))
    options = {"optimiser": masked, **{k: v for k, v in more.items() if k in ("batch", "chunk", "memory_limit")}}
    return train_on(
        found, cross_entropy, task.fields, repair_steps, _narrow(seed, _REPAIR), subsets=task.retain, **options
    )


@typed
def extraction(
    representations: Float[Tensor, "pairs dim"], known: Float[Tensor, "pairs dim"]
) -> Float[Tensor, "pairs"]:
    """-s(‖h_f(e) - e‖²) in the first half (to forget), s(‖h(e) - e‖²) in the second, s(M) = exp(M / (M + 1)).

    ``known`` are the autoencoders' answers. s is bounded, from 1 to e, so neither part can run away.
    """
    error = (known - representations).square().sum(-1)
    sign = torch.where(torch.arange(len(error), device=error.device) < len(error) // 2, -1, 1)
    return sign * (error / (error + 1)).exp()


@typed
def alignment(
    representations: Float[Tensor, "pairs dim"], original: Float[Tensor, "pairs dim"], temperature: float
) -> Float[Tensor, "pairs"]:
    """log[exp(a_i) / Σ_j exp(a_j / τ)] for i in the second half (to keep), j over the first (to forget), 0 for those.

    a = 1 - cos(e, e_o): kept representations hold on to the original, those to forget turn away from it.
    """
    apart = 1 - F.cosine_similarity(representations, original, dim=-1)
    half = len(apart) // 2
    return torch.cat([torch.zeros_like(apart[:half]), apart[half:] - (apart[:half] / temperature).logsumexp(0)])


class _Autoencoder(nn.Module):
    """One hidden layer each way; the answer, mean and log variance of the code. With a ``key`` the code is drawn."""

    def __init__(self, dim: int, width: int, latent: int):
        super().__init__()
        self.encode, self.code = nn.Linear(dim, width), nn.Linear(width, 2 * latent)
        self.decode, self.answer = nn.Linear(latent, width), nn.Linear(width, dim)

    def forward(self, x: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.code(self.encode(x).relu()).chunk(2, -1)
        code = mean
        if key is not None:
            code = mean + (log_variance / 2).exp() * normal(key, tuple(mean.shape), mean.dtype)
        return self.answer(self.decode(code).relu()), mean, log_variance


def autoencoders(trained: Fleet, task: Task, latent: int = 8, steps: int = 300, seed: int = 0) -> Autoencoders:
    """Fitted to ‖h(e) - e‖² + 0.025 · KL(code ‖ N(0, 1)): one on the representations of D_r only, one on those of D_f.

    Adam at 3e-3, 64 representations a step, 64 hidden units.
    """
    if latent < 1:
        raise ValueError(f"latent: expected at least 1, got {latent}")
    representations = trained.features(task.fields["x"])
    dim, dtype = representations.shape[-1], representations.dtype

    def fit(mask: Tensor, purpose: int) -> Fleet:
        rows = torch.arange(mask.shape[1], device=mask.device)
        return train(
            lambda: _Autoencoder(dim, 64, latent).to(dtype),
            _fitting,
            {"row": rows},
            member_data={"representation": representations},
            subsets=mask,
            steps=steps,
            optimiser=Adam(3e-3),
            streams=trained.streams,
            device=trained.device,
            seed=_narrow(seed, purpose),
            progress=False,
        )

    return Autoencoders(fit(task.retain, _KEPT), fit(task.forget, _LOST))


def _fitting(model: Any, batch: Any, hyper: Any) -> Tensor:
    answer, mean, log_variance = model(batch.representation, key=batch.key)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
    return (answer - batch.representation).square().sum(-1) + 0.025 * divergence


def _narrow(seed: int, purpose: int) -> int:
    return int(key(seed, purpose)) & (2**63 - 1)


@dataclass(frozen=True)
class Alternating(Wrapper):
    """Two optimisers in turn: ``inner`` takes the even steps, ``odd`` the odd ones, each with its own state and count.

    Rates and weight decays of the two travel in the state, so that chunks of members have theirs; a schedule's factor
    multiplies both rates.
    """

    odd: Optimiser

    lr = 1.0
    weight_decay = 0.0

    def initial(self, parameters: Tensor) -> dict[str, Tensor]:
        state = {}
        for name, inner in (("even", self.inner), ("odd", self.odd)):
            for option in ("lr", "weight_decay"):
                values = torch.as_tensor(getattr(inner, option), dtype=parameters.dtype, device=parameters.device)
                if values.ndim and len(values) != len(parameters):
                    raise ValueError(f"{option}: expected one for each of {len(parameters)} members, got {len(values)}")
                state[f"{name}.{option}"] = values.expand(len(parameters))[:, None].clone()
            state |= {f"{name}/{key}": value for key, value in inner.initial(parameters).items()}
        return state

    def take(self, step: Step) -> None:
        name, inner = ("even", self.inner) if step.number % 2 == 0 else ("odd", self.odd)
        values, start = step.state, f"{name}/"
        own = {label.removeprefix(start): value for label, value in values.items() if label.startswith(start)}
        rate, decay = step.rate * values[f"{name}.lr"], values[f"{name}.weight_decay"]
        inner.apply(*step._replace(state=own, rate=rate, decay=decay, number=step.number // 2))
