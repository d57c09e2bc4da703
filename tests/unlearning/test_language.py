"""Language-model unlearning against explicit decoding, brute-force ranks, conjugates by search, and plain gradients."""

import math
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from toolkit.fleet import SGD, Adam, Fleet, train
from toolkit.models import ByteTransformer
from toolkit.unlearning import language
from toolkit.unlearning.language import (
    answer_log_probability,
    answer_probability,
    exposure,
    flat,
    flat_loss,
    next_byte_loss,
    npo,
    npo_loss,
    recall,
)
from toolkit.unlearning.texts import IGNORED, TEMPLATES, canary, facts, join

SHORT = {"home": ("{name} in {answer}.", "so {name}: {answer}.")}
TEXT = facts(5, SHORT, pool=4, seed=3)
FORGET = TEXT.fact == 1
DIVERGENCES = ("tv", "kl", "js", "pearson")


def build() -> ByteTransformer:
    return ByteTransformer(TEXT.x.shape[1], 128, 16, 1, 2)


def loss(model, batch, hyper):
    return next_byte_loss(model(batch.x), batch.y)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return train(
        build, loss, TEXT, members=2, steps=80, batch=10, optimiser=Adam(0.015), seed=1, progress=False, device="cpu"
    )


@pytest.fixture(scope="module")
def fresh() -> Fleet:
    return train(build, loss, TEXT, members=2, steps=0, seed=2, progress=False, device="cpu")


def sample(rows: int = 6, length: int = 7, symbols: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, length, symbols, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, symbols, (rows, length), generator=generator)
    start = torch.arange(rows) % 4
    asked = (torch.arange(length) > start[:, None]) & (torch.arange(length) < start[:, None] + 3)
    return logits, torch.where(asked, targets, IGNORED)


def test_facts_are_stated_in_every_form_with_the_same_answer():
    text = facts(6, pool=3, seed=0)
    lines = text.lines()
    assert len(lines) == len(text) == 6 * 2 * 3
    answers: dict[int, set[str]] = {}
    for row, (line, fact, form) in enumerate(zip(lines, text.fact.tolist(), text.form.tolist(), strict=True)):
        kind = ("home", "pet")[fact % 2]
        asked = "".join(chr(b) for b in text.y[row][text.answer[row]].tolist())
        name = next(word for word in line.replace(".", "").split() if word in {ln.split()[0] for ln in lines[::3]})
        assert line == TEMPLATES[kind][form].format(name=name, answer=asked[:-1])
        assert asked[4:] == "."
        answers.setdefault(fact, set()).add(asked)
    assert [len(said) for said in answers.values()] == [1] * 12
    homes = {a for fact, said in answers.items() if fact % 2 == 0 for a in said}
    pets = {a for fact, said in answers.items() if fact % 2 for a in said}
    assert 1 < len(homes) <= 3
    assert 1 < len(pets) <= 3
    assert not homes & pets


def test_rows_are_aligned_and_padded():
    text = facts(4, SHORT, pool=2, length=30, seed=1)
    assert text.x.shape == text.y.shape == (8, 30)
    asked = text.answer[:, :-1]
    inside = asked & text.answer[:, 1:]  # all but the last answer byte come back as the next input
    assert torch.equal(text.y[:, :-1][inside], text.x[:, 1:][inside])
    assert torch.equal(facts(4, SHORT, pool=2, length=30, seed=1).x, text.x)
    assert not torch.equal(facts(4, SHORT, pool=2, length=30, seed=2).x, text.x)


def test_join_pads_and_keeps_facts_apart():
    secret = canary("k ", "01", 2, copies=3)
    both = join(TEXT, secret.text)
    assert both.lines() == TEXT.lines() + secret.text.lines()
    assert both.fact.tolist() == [*TEXT.fact.tolist(), 5, 5, 5]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: facts(1), "people"),
        (lambda: facts(4, pool=0), "pool"),
        (lambda: facts(4, {"a": ("{answer} of {name}",)}), "templates"),
        (lambda: facts(4, length=8), "length"),
        (lambda: facts(5000), "people"),
        (lambda: canary(alphabet="00"), "alphabet"),
        (lambda: canary(symbols=6), "symbols"),
        (lambda: canary(copies=0), "copies"),
        (lambda: canary(""), "prefix"),
        (lambda: join(), "texts"),
    ],
)
def test_bad_settings_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_answer_likelihoods_are_loops_over_the_answer():
    logits, targets = sample()
    for i in range(len(logits)):
        logs = [
            logits[i, t].log_softmax(-1)[targets[i, t]] for t in range(targets.shape[1]) if targets[i, t] != IGNORED
        ]
        together = torch.stack(logs)
        torch.testing.assert_close(answer_log_probability(logits, targets)[i], together.sum())
        torch.testing.assert_close(answer_probability(logits, targets)[i], together.exp().mean())
        torch.testing.assert_close(next_byte_loss(logits, targets)[i], -together.mean())
        torch.testing.assert_close(next_byte_loss(logits, targets)[i], F.cross_entropy(logits[i], targets[i]))
    none = torch.full_like(targets, IGNORED)
    assert not next_byte_loss(logits, none).any()
    assert not answer_probability(logits, none).any()


def test_losses_vmap_and_keep_precision():
    logits, targets = sample()
    batch = torch.stack([logits, logits.flip(0)])
    for function in (next_byte_loss, answer_probability, answer_log_probability):
        torch.testing.assert_close(vmap(function, (0, None))(batch, targets)[1], function(batch[1], targets))
        assert function(logits.float(), targets).dtype == torch.float32
        slopes = vmap(grad(lambda z, f=function: f(z, targets).sum()))(batch)
        torch.testing.assert_close(slopes[0], grad(lambda z, f=function: f(z, targets).sum())(logits))


def test_npo_is_its_formula_and_its_slope_the_stated_weight():
    now = torch.tensor([-9.0, -3.0, -1.0, -0.2], dtype=torch.float64)
    before = torch.tensor([-1.0, -3.0, -2.0, -0.1], dtype=torch.float64)
    for beta in (0.1, 1.0, 3.0):
        formula = -2 / beta * torch.sigmoid(-beta * (now - before)).log()
        torch.testing.assert_close(npo_loss(now, before, beta), formula)
        ratio = (now - before).exp() ** beta
        torch.testing.assert_close(grad(lambda z, b=beta: npo_loss(z, before, b).sum())(now), 2 * ratio / (ratio + 1))
    slope = grad(lambda z: npo_loss(z, before, 0.7).sum())(now)
    assert slope[1] == 1  # as likely as in the reference
    assert slope[0] < 0.03
    assert slope[2] > 1


def test_npo_with_a_small_beta_is_gradient_ascent():
    logits, targets = sample()
    before = answer_log_probability(logits.flip(1), targets)
    slope = grad(lambda z: npo_loss(answer_log_probability(z, targets), before, 1e-8).sum())(logits)
    ascent = grad(lambda z: answer_log_probability(z, targets).sum())(logits)  # minus cross-entropy
    torch.testing.assert_close(slope, ascent, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="beta"):
        npo_loss(before, before, 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_flat_is_the_published_formula_and_monotone(divergence):
    e, f = torch.linspace(0, 1, 21, dtype=torch.float64), torch.linspace(1, 0, 21, dtype=torch.float64).square()
    formula = {
        "tv": -e.tanh() / 2 + f.tanh() / 2,
        "kl": -e + (f - 1).exp(),
        "js": (1 + (-e).exp()).log() + f + (1 + (-f).exp()).log() - 2 * math.log(2),
        "pearson": -e + f**2 / 4 + f,
    }[divergence]
    torch.testing.assert_close(flat_loss(e, f, divergence), formula)
    assert bool((flat_loss(e, f[:1].expand(21), divergence).diff() < 0).all())
    assert bool((flat_loss(e[:1].expand(21), f.flip(0), divergence).diff() > 0).all())


def test_flat_with_total_variation_is_bounded_and_the_bound_is_reached():
    bound = math.tanh(1) / 2
    corner = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(flat_loss(corner, corner.flip(0)), torch.tensor([bound, -bound], dtype=torch.float64))
    grid = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert flat_loss(grid.repeat(50), grid.repeat_interleave(50)).abs().max() <= bound


GENERATORS: dict[str, Any] = {  # f of D_f(P ‖ Q) = Σ q f(p / q), and its derivative
    "tv": (lambda t: (t - 1).abs() / 2, lambda t: (t - 1).sign() / 2),
    "kl": (lambda t: t * t.log(), lambda t: 1 + t.log()),
    "js": (lambda t: t * t.log() - (t + 1) * ((1 + t) / 2).log(), lambda t: (2 * t / (1 + t)).log()),
    "pearson": (lambda t: (t - 1).square(), lambda t: 2 * (t - 1)),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_conjugates_are_suprema_and_the_bound_is_tight_at_the_optimal_critic(divergence):
    generator, slope = GENERATORS[divergence]
    t = torch.logspace(-6, 6, 200_001, dtype=torch.float64)
    u = language._critic(torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64), divergence)
    searched = (u[:, None] * t - generator(t)).amax(1)
    torch.testing.assert_close(language._conjugate(u, divergence), searched, atol=1e-5, rtol=1e-5)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = (q * generator(p / q)).sum()
    critic = slope(p / q)
    best = p @ critic - q @ language._conjugate(critic, divergence)
    torch.testing.assert_close(best, exact)
    # minus the loss, with any critic value put in the place of the probabilities, is never above the divergence
    for seed in range(20):
        v = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        joint = sum(
            p[i] * q[j] * -flat_loss(v[[i]], v[[j]], divergence)[0] for i in range(3) for j in range(3)
        )  # E_p g(v) - E_q f*(g(v))
        assert joint <= exact + 1e-12


def greedy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Decode from the prompt, feeding back what was decoded."""
    places = (y != IGNORED).nonzero()[:, 0].tolist()
    given = x[: places[0] + 1].tolist()
    for _ in places:
        given.append(int(model(torch.tensor([given]))[0, -1].argmax()))
    return given[places[0] + 1 :] == y[places].tolist()


def test_recall_is_greedy_decoding(fleet):
    half = train(build, loss, TEXT, members=2, steps=25, batch=10, optimiser=Adam(0.015), progress=False, device="cpu")
    for each_fleet in (fleet, half):
        found = recall(each_fleet, TEXT)
        for member in range(2):
            with torch.no_grad():
                module = each_fleet[member]
                decoded = [greedy(module, x, y) for x, y in zip(TEXT.x, TEXT.y, strict=True)]
                likely = answer_probability(module(TEXT.x), TEXT.y)
            assert found.exact[member].tolist() == decoded
            torch.testing.assert_close(found.probability[member], likely)
    assert recall(fleet, TEXT).exact.float().mean() > 0.8
    assert 0 < recall(half, TEXT).exact.sum() < 20  # both cases were met


def test_exposure_is_the_rank_among_all(fleet):
    secret = canary("code ", "0123", 2, length=TEXT.x.shape[1], seed=5)
    found = exposure(fleet, secret)
    with torch.no_grad():
        for member in range(2):
            module = fleet[member]
            values = []
            for first in "0123":
                for second in "0123":
                    row = torch.tensor([list(f"code {first}{second}".encode())])
                    logs = module(row)[0].log_softmax(-1)
                    values.append(float(logs[4, row[0, 5]] + logs[5, row[0, 6]]))
            mine = values[secret.index]
            rank = 1 + sum(value > mine for value in values)
            assert found[member].item() == pytest.approx(4 - math.log2(rank), abs=1e-5)
    assert secret.text.lines()[0] == secret.alternatives.lines()[secret.index]
    assert len(set(secret.alternatives.lines())) == 16


def test_a_model_that_knows_nothing_exposes_nothing(fresh):
    """With the rank counted as 1 + the number of likelier ones, a constant model would seem to know every secret."""
    dead = Fleet(build, torch.zeros_like(fresh.parameters))
    secret = canary("k", "0123456789", 2, length=TEXT.x.shape[1])
    torch.testing.assert_close(exposure(dead, secret), torch.full((2,), math.log2(100) - math.log2(50.5)))


def test_a_repeated_canary_is_exposed_and_unlearning_it_hides_it():
    secret = canary("so k: ", "0123456789", 2, copies=3, length=TEXT.x.shape[1], seed=2)
    both = join(TEXT, secret.text)
    mask = torch.arange(len(both)) >= len(TEXT)
    options: dict[str, Any] = {"batch": 13, "progress": False, "device": "cpu"}
    knowing = train(build, loss, both, members=2, steps=80, optimiser=Adam(0.015), **options)
    assert bool((exposure(knowing, secret) > 5.5).all())  # of log₂ 100 = 6.6 bits
    after = npo(knowing, both, mask, beta=0.1, retain_weight=5.0, steps=40, optimiser=Adam(0.01), batch=10)
    assert bool((exposure(after, secret) < exposure(knowing, secret) - 2).all())


def one_step(fleet: Fleet, objective: Any, rate: float) -> torch.Tensor:
    rows = []
    for member in range(len(fleet)):
        module = fleet[member]
        start = {name: p.detach() for name, p in module.named_parameters()}

        def value(parameters, module=module, member=member):
            return objective(lambda x: functional_call(module, parameters, (x,)), member)

        slope = grad(value)(start)
        rows.append(torch.cat([(start[name] - rate * slope[name]).flatten() for name in start]))
    return torch.stack(rows)


def test_npo_takes_the_step_of_its_objective(fleet, fresh):
    beta, weight = torch.tensor([0.3, 2.0]), torch.tensor([0.5, 1.5])
    x, y = TEXT.x, TEXT.y
    reference = [answer_log_probability(fleet[i](x[FORGET]), y[FORGET]).detach() for i in range(2)]

    def objective(model, member):
        before = reference[member]
        now = answer_log_probability(model(x[FORGET]), y[FORGET])
        away = (-2 / beta[member] * F.logsigmoid(-beta[member] * (now - before))).mean()
        return away + weight[member] * next_byte_loss(model(x[~FORGET]), y[~FORGET]).mean()

    got = npo(fleet, TEXT, FORGET, beta=beta, retain_weight=weight, steps=1, batch=8, optimiser=SGD(0.1))
    torch.testing.assert_close(got.parameters, one_step(fleet, objective, 0.1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_flat_takes_the_step_of_its_objective(fresh, divergence):
    told = []
    for line in (line for line, lost in zip(TEXT.lines(), FORGET.tolist(), strict=True) if lost):
        told.append(line[:-5] + "gone")  # every answer is four letters and a full stop

    def objective(model, member):
        wanted = []
        for line in told:
            row = torch.tensor([list(line.encode())])
            p = model(row[:, :-1])[0].softmax(-1)
            wanted.append(torch.stack([p[t, row[0, t + 1]] for t in range(row.shape[1] - 5, row.shape[1] - 1)]).mean())
        lost = answer_probability(model(TEXT.x[FORGET]), TEXT.y[FORGET])
        keep = next_byte_loss(model(TEXT.x[~FORGET]), TEXT.y[~FORGET]).mean()
        return flat_loss(torch.stack(wanted), lost, divergence).mean() + 0.3 * keep

    options: dict[str, Any] = {"steps": 1, "batch": 8, "optimiser": SGD(0.1)}
    got = flat(fresh, TEXT, FORGET, template="gone", divergence=divergence, retain_weight=0.3, **options)
    torch.testing.assert_close(got.parameters, one_step(fresh, objective, 0.1), atol=2e-6, rtol=1e-5)


def test_unlearned_facts_are_gone_and_others_stay(fleet):
    before = recall(fleet, TEXT)
    assert before.exact[:, FORGET].all()
    for after in (
        npo(fleet, TEXT, FORGET, beta=0.5, retain_weight=5.0, steps=30, batch=8, optimiser=Adam(0.003)),
        flat(fleet, TEXT, FORGET, retain_weight=1.0, steps=30, batch=8, optimiser=Adam(0.003)),
    ):
        found = recall(after, TEXT)
        assert not found.exact[:, FORGET].any()
        assert found.exact[:, ~FORGET].float().mean() >= before.exact[:, ~FORGET].float().mean() - 0.1


def test_members_have_their_own_forget_sets_and_are_independent(fleet):
    masks = torch.stack([TEXT.fact == 0, TEXT.fact == 2])
    together = npo(fleet, TEXT, masks, steps=2, batch=4)
    alone = npo(fleet[[1]], TEXT, masks[[1]], steps=2, batch=4)
    torch.testing.assert_close(together.parameters[1], alone.parameters[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"forget": torch.zeros(10, dtype=torch.bool)}, "forget"),
        ({"forget": torch.ones(10, dtype=torch.bool)}, "forget"),
        ({"forget": torch.ones(9, dtype=torch.bool)}, "forget"),
        ({"retain": FORGET}, "retain"),
        ({"data": {"x": TEXT.x, "y": TEXT.fact}}, "data"),
    ],
)
def test_bad_input_is_named(fresh, change, name):
    given = {"data": TEXT, "forget": FORGET} | change
    for method in (npo, flat):
        with pytest.raises(ValueError, match=name):
            method(fresh, **given, steps=1)
    with pytest.raises(ValueError, match="beta"):
        npo(fresh, TEXT, FORGET, beta=0.0)
    with pytest.raises(ValueError, match="template"):
        flat(fresh, TEXT, FORGET, template="a very long way of saying nothing at all")
