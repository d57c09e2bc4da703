"""Samples of a posterior over weights by Langevin dynamics, with chosen dependencies between parameters broken.

Many chains run side by side. Joint Langevin dynamics (SGLD) follows the gradient of log p(θ). The structured forms
follow an energy in which every group of parameters sees the *other* groups as they are in other chains, so that groups
become independent, each one's law staying of any shape: a mean field without a parametric family. The dropout form
lets a random share of the groups see each other and costs one gradient per step, as SGLD does.

Other chains stand for the history of one chain, which the original method keeps in a buffer; each group's partner is
drawn on its own, as there.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.fleet import Fleet
from toolkit.fleet.members import fresh
from toolkit.models import MLP

__all__ = [
    "effective_sample_size",
    "gaussian_stationary_covariance",
    "langevin",
    "mlp_log_density",
    "parameter_groups",
    "sample_posteriors",
]

Form = Literal["joint", "structured", "one_group", "dropout"]
Grouping = Literal["layer", "neuron", "parameter"]
LogDensity = Callable[[Tensor, Tensor], Tensor]
_NOISE, _MASK, _DATA = range(3)  # what a key's numbers are for
DEFAULT_FORMS: Mapping[str, tuple[Form, Grouping]] = {
    "SGLD": ("joint", "layer"),
    "structured, layers": ("structured", "layer"),
    "dropout, layers": ("dropout", "layer"),
    "dropout, parameters": ("dropout", "parameter"),
}
_BLOCK = 32  # steps whose random numbers are drawn together


def _group_count(groups: Tensor) -> int:
    present = torch.unique(groups)
    count = len(present)
    if count == 0 or int(present[0]) != 0 or int(present[-1]) != count - 1:
        raise ValueError(f"groups: expected every number from 0 to the last group's, got {present.tolist()}")
    return count


def _masks(form: Form, keys: Tensor, count: int, keep: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Masks r over groups, ``(evaluations, *keys.shape, groups)``, and the factor M / E[Σ r] of their energy.

    ``structured`` returns all one-hot masks, to be summed with factor 1.
    """
    if form == "structured":
        one = torch.eye(count, dtype=dtype, device=keys.device)
        return one.view(count, *[1] * keys.ndim, count).expand(count, *keys.shape, count), 1.0
    uniforms = random.uniform(keys, (count + 1,), dtype)
    index, chosen = torch.arange(count, device=keys.device), uniforms[..., :1]
    if form == "one_group":
        first = (chosen * count).floor()
        return (index == first).to(dtype)[None], float(count)
    # Bernoulli masks that are not all 0: the first kept group has a truncated geometric law, later ones are free.
    some = 1 - (1 - keep) ** count
    first = (torch.log1p(-chosen * some) / math.log1p(-keep)).floor().clamp_max(count - 1)
    kept = (index == first) | ((index > first) & (uniforms[..., 1:] < keep))
    return kept.to(dtype)[None], some / keep


def _gradient(log_density: LogDensity, theta: Tensor, keys: Tensor) -> Tensor:
    """∇ log p at each of ``theta`` ``(evaluations, chains, parameters)``."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        values = torch.func.vmap(log_density)(leaf.flatten(0, 1), keys.expand(len(theta), -1).flatten())
        if values.ndim != 1:
            raise ValueError(f"log_density: expected one number, got shape {tuple(values.shape[1:])}")
        return torch.autograd.grad(values.sum(), leaf)[0]


@typed
def langevin(
    log_density: LogDensity,
    start: Float[Tensor, "chains parameters"],
    *,
    step: float,
    steps: int,
    key: Int[Tensor, ""],
    groups: Int[Tensor, "parameters"] | None = None,
    form: Form = "joint",
    keep: float = 0.5,
    burn: int = 0,
    thin: int = 1,
) -> Float[Tensor, "chains draws parameters"]:
    """Langevin chains θ ← θ - (ε/2) ∇U(θ) + N(0, ε I); every ``thin``-th state after the first ``burn`` is a draw.

    With r a mask over the M groups, θ' groups taken from other chains (no gradient flows through them) and
    U(θ) = -(M / E Σ_g r_g) E_r E_θ' log p(r θ + (1 - r) θ'):

    - ``joint``: r = 1, plain SGLD, whose law is p as ε → 0;
    - ``structured``: r runs over all one-hot masks, M gradients per step. The law is q(θ) = Π_g q_g(θ_g) with
      q_g ∝ exp E_{q_-g} log p, the best product of free factors;
    - ``one_group``: one random one-hot mask per step, an estimate of the same energy from one gradient, whose
      noise grows with M (so must the step shrink);
    - ``dropout``: r_g = 1 with probability ``keep``, not all 0; one gradient per step; between the two laws.

    The random masks add variance of order ε to the law. Chains must share a mode to be each other's history: start them
    near one point. As the chains' average moves by the *joint* gradient, few chains keep a part of its slowness: see
    :func:`gaussian_stationary_covariance`.

    Args:
        log_density: log p(θ) up to a constant for one θ ``(parameters,)``, called as ``log_density(theta, key)`` under
            vmap; an unbiased estimate may draw its batch from the key (one per chain and step).
        step: ε, in squared units of θ; stable below 4 over the largest curvature for ``joint``.
        groups: group 0 .. M - 1 of each parameter (by default one group for all: ``joint``).

    Raises ``ValueError`` for a step, keep, steps, burn or thin out of range, groups with gaps, fewer than two chains
    where history is needed, and chains that leave the finite numbers.

    Source: Alexos, Boyd & Mandt 2022, "Structured stochastic gradient MCMC"; Welling & Teh 2011, "Bayesian learning via
    stochastic gradient Langevin dynamics". The factor M / E Σ r is our reading (published code leaves out
    the prior's, and allows masks that are all 0).
    """
    chains, size = start.shape
    require_positive("step", step)
    require_positive("steps", steps)
    require_range("burn", burn, 0, steps - 1)
    require_range("thin", thin, 1, steps - burn)
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a probability in (0, 1], got {keep}")
    groups = torch.zeros(size, dtype=torch.int64, device=start.device) if groups is None else groups
    count = _group_count(groups)
    joint = form == "joint" or count == 1 or (form == "dropout" and keep == 1)
    if not joint and chains < 2:
        raise ValueError(f"start: expected at least 2 chains, each other's history, got {chains}")
    theta, dtype, key = start.detach(), start.dtype, key.to(start.device)
    order = torch.arange(chains, device=theta.device)
    draws: list[Tensor] = []
    for first in range(0, steps, _BLOCK):
        times = torch.arange(first, min(first + _BLOCK, steps), device=theta.device)
        keys = random.fold_in(random.fold_in(key, order), times[:, None])  # one per step and chain
        noise = math.sqrt(step) * random.normal(random.fold_in(keys, _NOISE), (size,), dtype)
        data_keys = random.fold_in(keys, _DATA)
        if not joint:
            masks, factor = _masks(form, random.fold_in(keys, _MASK), count, keep, dtype)
            shift_keys = random.fold_in(random.fold_in(key, -1), times)  # the same for all chains
            shifts = 1 + (random.uniform(shift_keys, (len(masks), count)) * (chains - 1)).long().clamp_max(chains - 2)
        for i in range(len(times)):
            if joint:
                drift = _gradient(log_density, theta[None], data_keys[i])[0]
            else:
                partner = (order[:, None] + shifts[i][:, None]) % chains  # evaluations, chains, groups
                history = theta.expand(len(partner), -1, -1).gather(1, partner[..., groups])
                mask = masks[:, i][..., groups]
                mixed = mask * theta + (1 - mask) * history
                drift = factor * (mask * _gradient(log_density, mixed, data_keys[i])).sum(0)
            theta = theta + step / 2 * drift + noise[i]
            if first + i >= burn and (first + i - burn + 1) % thin == 0:
                draws.append(theta)
        if not bool(theta.isfinite().all()):
            raise ValueError(f"step: expected one small enough for chains to stay finite, got {step}")
    return torch.stack(draws, 1)


@typed
def gaussian_stationary_covariance(
    precision: Float[Tensor, "parameters parameters"],
    groups: Int[Tensor, "parameters"] | None = None,
    keep: float = 1.0,
    step: float = 0.0,
    chains: int | None = None,
) -> Float[Tensor, "parameters parameters"]:
    """Covariance of the law that :func:`langevin` leaves invariant when p is Gaussian with ``precision`` Λ.

    The averaged drift has precision A = keep Λ + (1 - keep) B, B the blocks of Λ within groups: ``keep`` = 1 is
    ``joint``, 0 is ``structured`` and ``one_group``. The covariance is A⁻¹ (I - step A / 4)⁻¹: exact for ``joint``;
    the other forms' random masks and partners add O(step). With a number of ``chains`` n, as step → 0: the chains'
    average moves by Λ and deviations from it by A_n = B + (keep - (1 - keep) / (n - 1)) (Λ - B), so that the covariance
    is Λ⁻¹ / n + (1 - 1/n) A_n⁻¹: few chains leave a trace of the dependence. Unit: that of θ, squared.

    Raises ``ValueError`` for a precision that is not positive definite, a keep outside [0, 1], a step that is not
    stable, and ``chains`` below 2 or together with a step.

    Source: derived here for the forms of Alexos, Boyd & Mandt 2022, "Structured stochastic gradient MCMC".
    """
    require_range("keep", keep, 0, 1)
    require_range("step", step, 0, math.inf)
    lowest = torch.linalg.eigvalsh(precision)[0]
    if not bool(lowest > 0) or not torch.allclose(precision, precision.T):
        raise ValueError(f"precision: expected a symmetric positive definite matrix, got least eigenvalue {lowest:.4g}")
    if chains is not None and (chains < 2 or step > 0):
        raise ValueError(f"chains: expected at least 2, and step = 0, got {chains} and step = {step}")
    groups = groups if groups is not None else torch.zeros(len(precision), dtype=torch.int64, device=precision.device)
    blocks = precision * (groups[:, None] == groups)
    if chains is not None:
        rest = keep - (1 - keep) / (chains - 1)
        own = torch.linalg.inv(blocks + rest * (precision - blocks))
        return torch.linalg.inv(precision) / chains + (1 - 1 / chains) * own
    averaged = keep * precision + (1 - keep) * blocks
    highest = torch.linalg.eigvalsh(averaged)[-1]
    if not bool(step * highest < 4):
        raise ValueError(f"step: expected less than 4 / {highest:.4g} for a law to exist, got {step}")
    return torch.linalg.inv(averaged - step / 4 * averaged @ averaged)


@typed
def effective_sample_size(draws: Float[Tensor, "chains draws parameters"]) -> Float[Tensor, "parameters"]:
    """n / τ: how many independent draws the n = chains · draws are worth, for the mean of each parameter.

    τ = -1 + 2 Σ_k P_k with P_k = ρ_2k + ρ_2k+1 the sums of autocorrelations at neighbouring lags, up to the first that
    is not positive and made non-increasing (Geyer's initial monotone sequence). Autocovariances are averaged over
    chains, and ρ_t = 1 - (W - c_t) / V, where V adds the variance between the chains' means. Compare forms by
    n / (τ · gradients). Parameters that never move have τ = n, one draw; τ is at least 1 / log10 n. Raises
    ``ValueError`` for fewer than 4 draws.

    Source: Geyer 1992, "Practical Markov chain Monte Carlo"; over chains as in Gelman et al. 2013, "Bayesian data
    analysis", section 11.5.
    """
    chains, length, _ = draws.shape
    if length < 4:
        raise ValueError(f"draws: expected at least 4 draws of each chain, got {length}")
    means = draws.mean(1)
    centred = draws - means[:, None]
    spectrum = torch.fft.rfft(centred, n=2 * length, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * length, dim=1)[:, :length].mean(0) / length
    between = means.var(0) if chains > 1 else torch.zeros_like(means[0])
    total = covariance[0] + between
    within = covariance[0] * length / (length - 1)
    moved = total > 0
    scale = torch.where(moved, total, torch.ones_like(total))
    correlation = 1 - (within - covariance) / scale
    correlation = torch.cat([torch.ones_like(correlation[:1]), correlation[1:]])
    pairs = correlation[: length // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    pairs = torch.where((pairs > 0).cumprod(0).bool(), pairs, torch.zeros_like(pairs)).cummin(0).values
    count = chains * length
    time = (2 * pairs.sum(0) - 1).clamp(min=1 / math.log10(max(count, 10)), max=count)
    return torch.where(moved, count / time, torch.ones_like(time))


def _linear_layers(model: MLP) -> list[tuple[int, int]]:
    """Outputs and inputs of each layer, in the order of the flat row."""
    layers = [*model.layers, model.head]
    sizes = [(int(layer.out_features), int(layer.in_features)) for layer in layers]
    if sum(p.numel() for p in model.parameters()) != sum(out * (inner + 1) for out, inner in sizes):
        raise ValueError("model: expected layers and a head only, got further parameters such as proxies")
    return sizes


@typed
def parameter_groups(model: MLP, by: Grouping) -> Int[Tensor, "parameters"]:
    """The group of each entry of an MLP's flat row: its layer, the unit it feeds (weights and bias), or itself.

    The order is that of ``Fleet.parameters``. Raises ``ValueError`` for a model with a table of proxies.
    """
    parts, count = [], 0
    for i, (out, inner) in enumerate(_linear_layers(model)):
        units = torch.arange(out) + count if by == "neuron" else torch.full((out,), i)
        parts += [units.repeat_interleave(inner), units]
        count += out
    groups = torch.cat(parts)
    return torch.arange(len(groups)) if by == "parameter" else groups


@typed
def mlp_log_density(
    model: MLP,
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "n"] | Int[Tensor, "n"],
    *,
    noise: float | None = None,
    prior: float = 1.0,
    batch: int | None = None,
) -> LogDensity:
    """log p(θ | data) up to a constant, of the flat parameters θ of an MLP: ``log_density(theta, key)``.

    Prior N(0, ``prior``² I). Real targets: one output, Gaussian with standard deviation ``noise`` (in their unit).
    Integer targets: softmax over the outputs. With ``batch`` the likelihood is estimated from that many examples drawn
    with replacement from the key, and scaled by n / batch. Only the model's architecture is used.

    Raises ``ValueError`` for labels out of range, a real target without noise or with more than one output, and a
    prior, noise or batch that is not positive. Source of the prior N(0, I) for small nets: common practice.
    """
    sizes = _linear_layers(model)
    require_positive("prior", prior)
    n, real = len(y), y.is_floating_point()
    if real != (noise is not None) or (noise is not None and not noise > 0):
        raise ValueError(f"noise: expected a positive number for real targets, None for labels, got {noise}")
    if real and sizes[-1][0] != 1:
        raise ValueError(f"model: expected one output for real targets, got {sizes[-1][0]}")
    if not real:
        require_labels("y", y, sizes[-1][0])
    if batch is not None:
        require_range("batch", batch, 1, n)
    columns = x.flatten(1).T.contiguous()  # examples last: the fastest order for chains side by side
    pieces = [part for out, inner in sizes for part in (out * inner, out)]
    target = y if real else F.one_hot(y.long(), sizes[-1][0]).T.to(x.dtype)

    def log_density(theta: Tensor, key: Tensor) -> Tensor:
        h, wanted = columns, target
        if batch is not None:
            chosen = (random.uniform(key, (batch,)) * n).long().clamp_max(n - 1)
            h, wanted = columns[:, chosen], target[..., chosen]
        parts = theta.split(pieces)
        for i, (out, inner) in enumerate(sizes):
            h = h.relu() if i else h
            h = parts[2 * i].view(out, inner) @ h + parts[2 * i + 1][:, None]
        if noise is not None:
            likelihood = (h[0] - wanted).square().sum() / (-2 * noise**2)
        else:
            likelihood = (h * wanted).sum() - h.logsumexp(0).sum()
        return likelihood * (n / wanted.shape[-1]) - theta.square().sum() / (2 * prior**2)

    return log_density


@typed
def sample_posteriors(
    start: Fleet,
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "n"] | Int[Tensor, "n"],
    forms: Mapping[str, tuple[Form, Grouping]] = DEFAULT_FORMS,
    *,
    step: float,
    steps: int,
    chains: int = 16,
    keep: float = 0.5,
    burn: int | None = None,
    thin: int = 10,
    noise: float | None = None,
    prior: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> dict[str, Fleet]:
    """Posterior samples of an MLP's weights by several forms of :func:`langevin`, each as a fleet: name → fleet.

    Chain i starts at member i of the fleet ``start`` (again from the first when they run out); a fleet that was trained
    to fit is a start near the posterior, and a deep ensemble to compare with. Members of a result are ordered with the
    draw fastest, so that ``fleet.logits(x).unflatten(0, (chains, -1))`` has a chain in each row. Average their
    probabilities for the posterior predictive, as for any ensemble. All forms see the same noise.

    Args:
        forms: name → (form, grouping of the parameters, see :func:`parameter_groups`).
        burn: steps before the first draw, by default half of them.

    Other arguments and errors are those of :func:`langevin` and :func:`mlp_log_density`; ``ValueError`` also where the
    fleet holds no MLPs. Source: Alexos, Boyd & Mandt 2022, "Structured stochastic gradient MCMC".
    """
    require_range("chains", chains, 1, math.inf)
    model = fresh(start.build)
    if not isinstance(model, MLP):
        raise ValueError(f"start: expected a fleet of MLPs, got {type(model).__name__}")
    device = start.device
    density = mlp_log_density(model, x.to(device), y.to(device), noise=noise, prior=prior, batch=batch)
    first = start.parameters[torch.arange(chains, device=device) % len(start)]
    results = {}
    for name, (form, by) in forms.items():
        draws = langevin(
            density,
            first,
            step=step,
            steps=steps,
            key=random.key(seed, device=device),
            groups=parameter_groups(model, by).to(device),
            form=form,
            keep=keep,
            burn=steps // 2 if burn is None else burn,
            thin=thin,
        )
        results[name] = Fleet(start.build, draws.flatten(0, 1))
    return results
