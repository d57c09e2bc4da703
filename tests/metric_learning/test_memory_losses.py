"""Losses with a state per example against loops, closed forms and the optimum that they look for."""

import math
from typing import Any, cast

import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import stats
from torch.func import grad, vmap

from toolkit.fleet import Adam, train
from toolkit.metric_learning.memory import bad_pair_weights, isogclr, isogclr_state
from toolkit.metric_learning.similarities import cosine, euclidean, precomputed
from toolkit.models import MLP

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 3, 1])  # class 3 has one example


def sample(size=8, dim=4, seed=0, dtype=torch.float64):
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def visited(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tau, mean, momentum = torch.rand(3, size, generator=generator, dtype=torch.float64)
    return {"tau": 0.1 + 0.4 * tau, "log_mean": mean, "momentum": momentum - 0.5}


def loop(s, labels, state, views, rho=6.0, step=1e-3, decay=0.8, momentum=0.9):
    """The update of one batch, with plain exponentials, as the sheet has it; values and new state."""
    n = len(state["tau"])
    y = labels.repeat(views).tolist()
    values, after = [], {name: state[name].clone() for name in state}
    for i in range(n):
        tau, old = state["tau"][i], state["log_mean"][i].exp()
        value, means, slopes = 0.0, [], []
        for a in range(i, n * views, n):
            own = [j for j in range(n * views) if j != a and y[j] == y[a]]
            rest = [j for j in range(n * views) if y[j] != y[a]]
            if not own or not rest:
                continue
            g = (s[a, rest] / tau).exp().mean().detach()
            mean = g if old == 0 else (1 - decay) * old + decay * g
            w = ((s[a, rest] / tau).exp() / mean).detach()
            value = value + ((w * s[a, rest]).mean() - s[a, own].mean()) / views
            means.append(mean)
            slopes.append(mean.log() + rho - (w * s[a, rest] / tau).mean().detach())
        values.append(torch.as_tensor(value, dtype=s.dtype))
        if means:
            pull = max(-3.0, min(3.0, (sum(slopes) / views).item()))
            after["log_mean"][i] = (sum(means) / views).log()
            after["momentum"][i] = momentum * pull + (1 - momentum) * state["momentum"][i]
            after["tau"][i] = (tau - step * after["momentum"][i]).clamp(0.05, 1)
    return torch.stack(values), after


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("labels", "views"), [(LABELS, 1), (LABELS, 2), (torch.arange(8), 2), (torch.arange(8), 3)])
def test_isogclr_is_its_loop(labels, views, fresh):
    state = {n: v.double() for n, v in isogclr_state(8).items()} if fresh else visited()
    for rho, step in ((6.0, 1e-3), (0.2, 5e-2)):
        x = sample(8 * views).requires_grad_()
        values, written = isogclr(x, labels, state, rho, step)
        expected, after = loop(cosine(x), labels, state, views, rho, step)
        torch.testing.assert_close(values, expected)
        (slope,) = torch.autograd.grad(values.mean(), x)
        torch.testing.assert_close(slope, torch.autograd.grad(expected.mean(), x)[0])
        assert set(written) == set(after)
        for name in after:
            torch.testing.assert_close(written[name], after[name], rtol=1e-9, atol=1e-11)
            assert not written[name].requires_grad


def test_isogclr_moves_the_temperature_to_where_the_divergence_is_rho():
    x, rho, state = sample(24), 0.4, isogclr_state(12, 0.3)
    state = {name: value.double() for name, value in state.items()}
    labels = torch.arange(12)
    for step in (5e-2, 2e-2, 5e-3):
        for _ in range(100):
            _, state = isogclr(x, labels, state, rho, step, 1.0)
    s = cosine(x)
    inner = (state["tau"] > 0.051) & (state["tau"] < 0.999)
    assert inner.sum() >= 10
    for i in inner.nonzero()[:, 0].tolist():
        rest = [j for j in range(24) if j % 12 != i]
        divergence = []
        for a in (i, i + 12):
            p = (s[a, rest] / state["tau"][i]).softmax(0)
            divergence.append((p * (p * 22).log()).sum())
        torch.testing.assert_close(sum(divergence) / 2, torch.tensor(rho, dtype=torch.float64), rtol=1e-3, atol=1e-4)


def test_isogclr_at_one_temperature_pulls_like_info_nce_without_the_positive():
    table, tau = cosine(sample(12)), 0.3
    state = {n: v.double() for n, v in isogclr_state(6, tau).items()}
    weight = grad(lambda s: isogclr(s, torch.arange(6), state, similarity=precomputed)[0].sum())(table)
    pairs = torch.arange(12) % 6
    same = pairs[:, None] == pairs
    softmax = (table / tau).masked_fill(same, -math.inf).softmax(-1)
    expected = torch.where(same & ~torch.eye(12, dtype=torch.bool), -1.0, softmax) / 2  # the mean of two views
    torch.testing.assert_close(weight, expected)


def test_isogclr_under_vmap_is_the_loop():
    x = torch.stack([sample(seed=seed) for seed in range(2)])
    labels = torch.stack([LABELS, LABELS.flip(0)])
    states = [visited(seed=seed) for seed in range(2)]
    state = {name: torch.stack([one[name] for one in states]) for name in states[0]}
    rho = torch.tensor([0.5, 6.0], dtype=torch.float64)
    together, written = vmap(isogclr)(x, labels, state, rho)
    slopes = vmap(grad(lambda *a: isogclr(*a)[0].mean()))(x, labels, state, rho)
    for member in range(2):
        one = x[member].clone().requires_grad_()
        values, rows = isogclr(one, labels[member], states[member], rho[member])
        torch.testing.assert_close(together[member], values.detach())
        torch.testing.assert_close(slopes[member], torch.autograd.grad(values.mean(), one)[0])
        for name in rows:
            torch.testing.assert_close(written[name][member], rows[name])


def test_isogclr_in_a_fleet_remembers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=generator)

    def loss(model, batch, hyper):
        views = torch.cat([batch.x + 0.1 * batch.x.roll(1, -1), batch.x - 0.1 * batch.x.roll(1, -1)])
        state = {name: batch[name] for name in ("log_mean", "tau", "momentum")}
        return isogclr(model(views), batch.index, state, hyper.rho, 0.01)

    fleet = train(
        lambda: MLP(8, (16,), 4),
        loss,
        {"x": x},
        epochs=6,
        batch=16,
        optimiser=Adam(lr=1e-2),
        hyper={"rho": torch.tensor([0.05, 6.0])},
        memory=isogclr_state(32, 0.3),
        progress=False,
    )
    assert not fleet.failures()
    assert fleet.memory["log_mean"].isfinite().all()
    assert fleet.memory["tau"][0].mean() > 0.3 + 0.02  # six visits, each against a slope cut off at 3
    torch.testing.assert_close(fleet.memory["tau"][1], torch.full((32,), 0.3 - 0.17), rtol=0, atol=0.02)


BATCHES = {
    "one class": (sample(6), torch.zeros(6, dtype=torch.long)),
    "no positives": (sample(6), torch.arange(6)),
    "one example": (sample(1), torch.tensor([4])),
    "duplicates": (sample(3).repeat(2, 1), torch.tensor([0, 0, 1, 0, 1, 1])),
    "zero rows": (sample(6) * torch.tensor([1, 0, 0, 1, 1, 0])[:, None], torch.tensor([0, 0, 1, 1, 2, 2])),
    "far": (1e4 * sample(6), torch.tensor([0, 0, 1, 1, 2, 2])),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_isogclr_on_bad_batches(batch):
    x, labels = BATCHES[batch]
    for dtype in (torch.float32, torch.float64):
        for similarity in (cosine, euclidean):
            given = x.to(dtype).requires_grad_()
            state = isogclr_state(len(labels))
            for _ in range(3):
                values, state = isogclr(given, labels, state, similarity=similarity)
            (slope,) = torch.autograd.grad(values.mean(), given)
            assert values.isfinite().all()
            assert slope.isfinite().all()
            assert state["tau"].isfinite().all()
            assert state["momentum"].isfinite().all()
            if batch in ("one class", "no positives", "one example"):
                assert values.abs().max() == 0
                assert slope.abs().max() == 0
                assert (state["log_mean"] == -math.inf).all()  # still to be visited
                assert (state["tau"] == torch.tensor(0.07)).all()
            else:
                assert state["log_mean"].isfinite().all()


def test_isogclr_refuses_bad_input():
    x, state = sample(), visited()
    broken = x.clone()
    broken[0, 0] = math.nan
    with pytest.raises(ValueError, match="embeddings: expected finite"):
        isogclr(broken, LABELS, state)
    with pytest.raises(ValueError, match="embeddings: expected whole views of 8"):
        isogclr(sample(12), LABELS, state)
    with pytest.raises(ValueError, match=r"state: expected .* got no \['tau'\]"):
        isogclr(x, LABELS, {n: v for n, v in state.items() if n != "tau"})
    with pytest.raises(ValueError, match=r"state\['.*'\]: expected one value per label, 7"):
        isogclr(x[:7], LABELS[:7], state)
    with pytest.raises(ValueError, match=r"state\['tau'\]: expected values greater than 0"):
        isogclr(x, LABELS, state | {"tau": 0 * state["tau"]})
    for name in ("rho", "step", "decay", "momentum", "lowest", "highest"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            isogclr(x, LABELS, state, **cast(Any, {name: -1.0}))
    with pytest.raises(ValueError, match="temperature: expected"):
        isogclr_state(3, 0.0)


def history(epochs=5, pairs=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + 0.5 * torch.randn(epochs, pairs, generator=generator, dtype=torch.float64)


def test_bad_pair_weights_are_their_loop():
    table, total = history(), 8
    table[:, 3], table[:, 7] = 0.1, 6.0
    losses = history(1, seed=1)[0].clone()
    losses[3], losses[7] = 1.1, 1.2
    means = [sum((t + 1) / total * table[t, i].item() for t in range(5)) / 5 for i in range(200)]
    middle = sum(means) / 200
    spread = math.sqrt(sum((m - middle) ** 2 for m in means) / 200)
    expected = [
        math.exp(-(((losses[i].item() - middle) / spread) ** 2) / 2)
        if m <= middle - 1.5 * spread or m >= middle + 2.5 * spread
        else 1.0
        for i, m in enumerate(means)
    ]
    weights = bad_pair_weights(table, losses, total, 1.5, 2.5)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert 0 < weights[3] < 1
    assert 0 < weights[7] < 1
    density = stats.norm.pdf(losses[7].item(), middle, spread) * spread * math.sqrt(2 * math.pi)
    assert weights[7].item() == pytest.approx(density, rel=1e-9)  # the public code's weight over its peak


def test_bad_pair_weights_flag_the_share_that_the_normal_law_says():
    means = torch.tensor(stats.norm.ppf((torch.arange(20000).numpy() + 0.5) / 20000))[None]
    for noisy, faulty in ((2.0, 3.0), (1.0, 1.5)):
        weights = bad_pair_weights(means, means[0], 1, noisy, faulty)
        low, high = (weights[:10000] < 1).double().mean() / 2, (weights[10000:] < 1).double().mean() / 2
        assert low.item() == pytest.approx(stats.norm.cdf(-noisy), abs=2e-4)
        assert high.item() == pytest.approx(stats.norm.cdf(-faulty), abs=2e-4)
    edge = weights[weights < 1].max().item()
    assert edge == pytest.approx(math.exp(-0.5), abs=2e-3)  # at the bound exp(-c²/2)


def test_bad_pair_weights_of_equal_losses_and_without_bounds_are_one():
    flat = torch.full((4, 10), 1.3)
    assert (bad_pair_weights(flat, flat[0]) == 1).all()
    assert (bad_pair_weights(flat, flat[0], noisy=0.0, faulty=0.0) == 1).all()
    assert (bad_pair_weights(history(), history()[0], noisy=math.inf, faulty=math.inf) == 1).all()
    assert (bad_pair_weights(history(1, 1), history(1, 1)[0]) == 1).all()


def test_bad_pair_weights_are_constants_and_vmap():
    tables = torch.stack([history(seed=seed) for seed in range(2)])
    now = torch.stack([history(1, seed=seed)[0] for seed in (5, 6)])
    noisy = torch.tensor([1.0, 2.0], dtype=torch.float64)
    together = vmap(lambda t, now, c: bad_pair_weights(t, now, 9, c))(tables, now, noisy)
    for member in range(2):
        expected = bad_pair_weights(tables[member], now[member], 9, noisy[member].item())
        torch.testing.assert_close(together[member], expected)
    slope = vmap(grad(lambda now, t: (bad_pair_weights(t, now) * now).sum()))(now, tables)
    torch.testing.assert_close(slope, torch.stack([bad_pair_weights(tables[i], now[i]) for i in range(2)]))


def test_bad_pair_weights_refuse_bad_input():
    table, now = history(), history()[0]
    broken = table.clone()
    broken[1, 1] = math.nan
    with pytest.raises(ValueError, match="history: expected finite"):
        bad_pair_weights(broken, now)
    with pytest.raises(ValueError, match="losses: expected finite"):
        bad_pair_weights(table, broken[1])
    with pytest.raises(ValueError, match="history: expected from 1 to 4 epochs, got 5"):
        bad_pair_weights(table, now, 4)
    with pytest.raises(ValueError, match="history: expected from 1 to 0 epochs, got 0"):
        bad_pair_weights(table[:0], now)
    with pytest.raises(ValueError, match="noisy: expected"):
        bad_pair_weights(table, now, noisy=-1.0)
    with pytest.raises(ValueError, match="faulty: expected"):
        bad_pair_weights(table, now, faulty=-1.0)
    with pytest.raises(TypeCheckError):
        bad_pair_weights(table, now[:-1])
