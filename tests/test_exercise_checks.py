"""The checks of exercises: solutions, stubs and mistakes of every lab; calibration's solutions against oracles.

The oracles of the other labs' solutions stand with the tests of their topic.
"""

import inspect
import math
import pkgutil
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toolkit.exercises
from toolkit.exercises import (
    EXERCISES,
    Exercise,
    calibration,
    check,
    distillation,
    metric_learning,
    museum,
    museum_distillation,
    scaling_laws,
    uncertainty,
    unlearning,
)

LABS = (calibration, distillation, metric_learning, scaling_laws, uncertainty, unlearning)
MUSEUMS = (museum, museum_distillation)  # mistakes of public code: as many as were found, beside a lab's own exercises
ROOMS = (*LABS, *MUSEUMS)
NAMES = list(EXERCISES)
MISTAKES = [(name, mistake) for name in NAMES for mistake in EXERCISES[name].misconceptions]


def written(exercise: Exercise, source: str):
    """The function that ``source`` defines, with what the notebook has imported."""
    space = {"math": math, "torch": torch, "Tensor": torch.Tensor, "one_hot": torch.nn.functional.one_hot}
    exec(source, space)
    return space[exercise.reference.__name__]


def outcomes(exercise: Exercise, function) -> list:
    return [function(*case) for case in exercise.cases]


# --- every exercise --------------------------------------------------------------------------------------------------


def test_there_are_enough() -> None:
    assert all(len(lab.__all__) >= 7 for lab in LABS)
    assert all(room.__name__.rpartition(".")[2].startswith("museum") == (room in MUSEUMS) for room in ROOMS)
    assert all(room.__all__ for room in MUSEUMS)
    assert sorted(NAMES) == sorted(getattr(room, name).name for room in ROOMS for name in room.__all__)


def test_every_lab_is_here() -> None:
    assert {room.__name__.rpartition(".")[2] for room in ROOMS} == {
        module.name for module in pkgutil.iter_modules(toolkit.exercises.__path__)
    }


@pytest.mark.parametrize("name", NAMES)
def test_solution_and_stub(name) -> None:
    exercise = EXERCISES[name]
    assert check(name, exercise.reference).status == "passed"
    for source in (exercise.solution, exercise.cell):
        assert check(exercise, written(exercise, source)).status == "passed"
    waiting = check(exercise, written(exercise, exercise.stub))
    assert (waiting.status, waiting.misconception) == ("not attempted", None)
    assert exercise.reference.__doc__ == written(exercise, exercise.stub).__doc__
    assert inspect.signature(exercise.reference) == inspect.signature(written(exercise, exercise.stub))
    assert exercise.prompt.strip().endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_is_what_nbgrader_makes(name) -> None:
    from nbformat.v4 import new_code_cell, new_notebook
    from nbgrader.preprocessors import ClearSolutions

    marks = {"schema_version": 3, "solution": True, "grade": False, "locked": False, "grade_id": "a"}
    cell = new_code_cell(EXERCISES[name].cell.rstrip("\n"), metadata={"nbgrader": marks})
    book, _ = ClearSolutions().preprocess(new_notebook(cells=[cell]), {})
    assert book.cells[0].source == EXERCISES[name].stub.rstrip("\n")
    assert len(EXERCISES[name].cell.splitlines()) <= 20


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_each_mistake_gets_its_own_message(name, mistake) -> None:
    function, message = EXERCISES[name].misconceptions[mistake]
    outcome = check(name, function)
    assert (outcome.status, outcome.misconception, outcome.message) == ("failed", mistake, message)


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_differ_by_far(name) -> None:
    """No two answers, the right one included, come near the tolerance of the comparison."""
    exercise = EXERCISES[name]
    functions = {"solution": exercise.reference, **{key: pair[0] for key, pair in exercise.misconceptions.items()}}
    assert len(functions) >= 4
    assert len({message for _, message in exercise.misconceptions.values()}) == len(exercise.misconceptions)
    found = {key: outcomes(exercise, function) for key, function in functions.items()}
    for first in found:
        for second in found:
            if first < second:
                apart = max(distance(a, b) for a, b in zip(found[first], found[second], strict=True))
                assert apart > 20 * exercise.tolerance, (first, second)


def distance(a, b) -> float:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if a.shape != b.shape:
        return math.inf
    apart = torch.nan_to_num((a - b).abs(), posinf=1.0)
    return torch.where(a.isnan() == b.isnan(), apart, 1.0).max().item()


# --- the framework ---------------------------------------------------------------------------------------------------


def double(x: torch.Tensor) -> torch.Tensor:
    """Twice x."""
    return 2 * x


@pytest.fixture
def doubling(monkeypatch) -> Exercise:
    monkeypatch.setattr("toolkit.exercises.EXERCISES", {})
    cases = [(torch.tensor([1.0, 2.0, 3.0]),), (torch.tensor([0.5, -4.0]),)]
    return Exercise("double", "Double.", double, cases, {"squared": (lambda x: x**2, "You square.")})


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (lambda x: x + x, "passed", "Equal"),
        (lambda x: (2 * x).tolist(), "passed", "Equal"),
        (lambda x: (2 * x).numpy(), "passed", "Equal"),
        (lambda x: (2 * x).requires_grad_(), "passed", "Equal"),
        (lambda x: (2 * x).half(), "passed", "Equal"),
        (lambda x: x.mul_(2), "passed", "Equal"),
        (lambda x: 2 * x + 1e-6, "passed", "Equal"),
        (
            lambda x: 2 * x + 1e-2,
            "failed",
            r"Case 1 of 2: expected \[2, 4, 6\], got \[2.01, 4.01, 6.01\]\nwith x = \[1, 2",
        ),
        (lambda x: x * x, "failed", "You square."),
        (lambda x: torch.where(x > 0, 2 * x, x), "failed", r"Case 2 of 2: expected \[1, -8\], got \[1, -4\]"),
        (lambda x: (2 * x).sum(), "failed", r"Case 1: expected shape \(3,\), got a single number"),
        (lambda x: 2 * x[:2], "failed", r"Case 1: expected shape \(3,\), got shape \(2,\)"),
        (lambda x: "six", "failed", r"Expected shape \(3,\), got str 'six'"),
        (lambda x: {"a": 1}, "failed", "got dict"),
        (lambda x: [x, x[:1]], "failed", "got list"),
        (lambda x: x / 0 * 0, "failed", r"Case 1 of 2: expected \[2, 4, 6\], got \[nan, nan, nan\]"),
        (lambda x: x[7], "failed", r"Case 1 raised IndexError: .*\nwith x = \[1, 2, 3\]"),
        (lambda x, y: x, "failed", "Case 1 raised TypeError"),
        (lambda x: None, "not attempted", "returns nothing yet"),
        (lambda x: ..., "not attempted", "returns nothing yet"),
        (lambda x: None if len(x) == 2 else 2 * x, "failed", "Case 2 returned nothing"),
        (3.0, "failed", "Expected a function, got float"),
    ],
)
def test_outcomes(doubling, function, status, message) -> None:
    outcome = check(doubling, function)
    assert outcome.status == status
    assert re.search(message, outcome.message), outcome.message


def test_cases_stay_as_they_are(doubling) -> None:
    check(doubling, lambda x: x.zero_())
    assert doubling.cases[0][0].tolist() == [1.0, 2.0, 3.0]


def test_not_implemented_and_unknown(doubling) -> None:
    def stub(x):
        raise NotImplementedError

    assert check("double", stub).status == "not attempted"
    with pytest.raises(ValueError, match="exercise: expected one of double, got 'triple'"):
        check("triple", double)
    with pytest.raises(ValueError, match="cases: expected at least one"):
        Exercise("empty", "Nothing.", double, [], {})


def test_under_nbgrader_only_what_passes_passes(doubling, monkeypatch) -> None:
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    check(doubling, double)
    with pytest.raises(AssertionError, match=r"failed\. You square"):
        check(doubling, lambda x: x**2)
    with pytest.raises(AssertionError, match="not attempted"):
        check(doubling, lambda x: None)


def test_what_the_notebook_keeps(doubling, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr("toolkit.exercises.show", lambda *arguments: shown.append(arguments))
    check(doubling, lambda x: x**2)
    ((outcome, mime, payload),) = shown
    assert mime == "application/vnd.fleetlab.exercise+json"
    assert payload == {"name": "double", "status": "failed", "message": "You square.", "misconception": "squared"}
    assert "✘ failed" in outcome._repr_html_()
    assert "&lt;" in check(doubling, lambda x: "<").__class__("a", "failed", "<")._repr_html_()


# --- the solutions against oracles -----------------------------------------------------------------------------------


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def examples(rng: np.random.Generator, n: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(0, 2, (n, classes)), rng.integers(0, classes, n)


def nll(z: np.ndarray, y: np.ndarray, t: float) -> float:
    from scipy.special import logsumexp

    return float(np.mean(logsumexp(z / t, axis=1) - z[np.arange(len(y)), y] / t))


@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
def test_temperature_against_scipy(t, rng) -> None:
    from scipy.special import softmax

    z, _ = examples(rng)
    found = calibration.temperature_probabilities(torch.tensor(100 * z), t)
    assert found.numpy() == pytest.approx(softmax(100 * z / t, axis=1), abs=1e-12)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.5])
def test_slope_against_a_difference_quotient(t, rng) -> None:
    z, y = examples(rng)
    quotient = (nll(z, y, t + 1e-5) - nll(z, y, t - 1e-5)) / 2e-5
    assert calibration.nll_slope(torch.tensor(z), torch.tensor(y), t) == pytest.approx(quotient, rel=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 8, 15])
def test_ece_against_torchmetrics(bins, rng) -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    confidence = torch.tensor(rng.random(200)).float()
    correct = torch.tensor(rng.random(200) < 0.6).float()
    oracle = binary_calibration_error(confidence, correct.long(), n_bins=bins).item()
    assert calibration.ece_by_hand(confidence, correct, bins) == pytest.approx(oracle, abs=1e-6)


def test_ece_at_the_edges() -> None:
    assert calibration.ece_by_hand(torch.tensor([1.0]), torch.tensor([0.0]), 10) == 1.0
    pair = torch.tensor([0.5, 0.75]), torch.tensor([1.0, 0.0])
    assert calibration.ece_by_hand(*pair, 2) == pytest.approx(0.5 * 0.5 + 0.5 * 0.75)


def test_brier_against_scikit_learn(rng) -> None:
    from scipy.special import softmax
    from sklearn.metrics import brier_score_loss

    z, y = examples(rng, 60, 2)
    p = softmax(z, axis=1)
    found = calibration.brier_score(torch.tensor(p), torch.tensor(y))
    assert found == pytest.approx(2 * brier_score_loss(y, p[:, 1]), rel=1e-12)
    z, y = examples(rng)
    p = softmax(z, axis=1)
    loop = np.mean([sum((p[i, k] - (k == y[i])) ** 2 for k in range(4)) for i in range(len(y))])
    assert calibration.brier_score(torch.tensor(p), torch.tensor(y)) == pytest.approx(loop, rel=1e-12)


@given(st.integers(1, 30), st.sampled_from([1 / 32, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 7 / 8]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_conformal_threshold_is_the_least_that_covers(n, alpha) -> None:
    """The smallest with at least (n + 1)(1 - alpha) of n + 1 scores at or below it, where the new score is infinite."""
    scores = torch.tensor(np.random.default_rng(n).random(n))
    candidates = [*sorted(scores.tolist()), math.inf]
    covered = [(scores <= c).sum().item() + (c == math.inf) for c in candidates]
    oracle = next(c for c, k in zip(candidates, covered, strict=True) if k >= (n + 1) * (1 - alpha))
    assert calibration.conformal_threshold(scores, alpha) == oracle


def test_smoothed_targets_against_torch(rng) -> None:
    z, y = examples(rng)
    target = calibration.smoothed_targets(torch.tensor(y), 4, 0.2)
    assert target.sum(1).numpy() == pytest.approx(np.ones(len(y)))
    logits = torch.tensor(z)
    oracle = torch.nn.functional.cross_entropy(logits, torch.tensor(y), label_smoothing=0.2, reduction="none")
    assert (-(target * logits.log_softmax(1)).sum(1)).numpy() == pytest.approx(oracle.numpy(), rel=1e-6)


def test_half_width_against_scipy(rng) -> None:
    from scipy import stats

    a, b = rng.normal(size=7), rng.normal(size=7)
    oracle = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = calibration.half_width(torch.tensor(a), torch.tensor(b), float(stats.t.ppf(0.975, 6)))
    assert found == pytest.approx((oracle.high - oracle.low) / 2, rel=1e-9)


def test_expected_bias_by_simulation(rng) -> None:
    confidence, count = np.array([0.3, 0.5, 0.75]), np.array([400, 900, 700])
    right = rng.binomial(count, confidence, (20000, 3)) / count
    errors = (np.abs(right - confidence) * count / count.sum()).sum(1)
    found = calibration.expected_bias(torch.tensor(confidence), torch.tensor(count).double())
    assert abs(found - errors.mean()) < 4 * errors.std() / math.sqrt(20000) + 2e-5


def test_aurc_by_a_loop(rng) -> None:
    confidence, correct = rng.random(25), (rng.random(25) < 0.7).astype(float)
    order = sorted(range(25), key=lambda index: -confidence[index])
    risks = [np.mean([1 - correct[index] for index in order[:k]]) for k in range(1, 26)]
    found = calibration.aurc_by_hand(torch.tensor(confidence), torch.tensor(correct))
    assert found == pytest.approx(np.mean(risks), rel=1e-12)
