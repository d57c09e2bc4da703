"""Claims: verdicts at their boundaries, the ledger, predictions, and what a notebook keeps of them."""

import math

import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from toolkit import evidence
from toolkit.evidence import (
    Interval,
    claim,
    interval,
    ledger,
    predict,
    record,
    score_prediction,
)

VALUES = np.array([0.031, 0.029, 0.035, 0.030, 0.028, 0.036, 0.0305, 0.027])


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> None:
    """Each test has its own claims and predictions."""
    monkeypatch.setattr(evidence, "_claims", {})
    monkeypatch.setattr(evidence, "_predictions", {})


# --- claims ----------------------------------------------------------------------------------------------------------

BOUNDARIES: dict[str, dict[tuple[float, float], str]] = {
    "> 0": {(0.1, 1): "holds", (0, 1): "undecided", (-1, 1): "undecided", (-1, 0): "fails", (-2, -1): "fails"},
    ">= 0": {(0.1, 1): "holds", (0, 1): "holds", (-1, 1): "undecided", (-1, 0): "undecided", (-2, -1): "fails"},
    "< 0": {(0.1, 1): "fails", (0, 1): "fails", (-1, 1): "undecided", (-1, 0): "undecided", (-2, -1): "holds"},
    "<= 0": {(0.1, 1): "fails", (0, 1): "undecided", (-1, 1): "undecided", (-1, 0): "holds", (-2, -1): "holds"},
    "in [-1, 1]": {
        (-1, 1): "holds",
        (0, 0.5): "holds",
        (-1.1, 1): "undecided",
        (-1, 1.1): "undecided",
        (1, 2): "undecided",
        (1.1, 2): "fails",
        (-3, -1.1): "fails",
        (-3, 3): "undecided",
    },
}


@pytest.mark.parametrize(
    ("expect", "ends", "verdict"), [(e, ends, v) for e, cases in BOUNDARIES.items() for ends, v in cases.items()]
)
def test_verdicts_at_their_boundaries(expect, ends, verdict) -> None:
    low, high = ends
    effect = Interval((low + high) / 2, low, high, 8, 0.95, "t")
    assert claim("c", effect, expect, source="s").verdict == verdict


@given(st.floats(-5, 5), st.floats(0, 5), st.floats(-5, 5), st.sampled_from([">", ">=", "<", "<="]))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_verdict_is_what_all_points_say(low, width, limit, sign) -> None:
    compare = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}[sign]
    points = compare(np.linspace(low, low + width, 50), limit)
    found = evidence._verdict(
        Interval(low, low, float(np.linspace(low, low + width, 50)[-1]), 2, 0.95, "t"), f"{sign} {limit}"
    )
    assert found == ("holds" if points.all() else "undecided" if points.any() else "fails")


@pytest.mark.parametrize("expect", ["", "0", "= 0", "> x", "about 3", "in [1]", "in (0, 1)", "> 0 < 1", "> nan"])
def test_bad_expectations(expect) -> None:
    with pytest.raises(ValueError, match="expect: expected text such as"):
        claim("c", VALUES, expect, source="s")


def test_bad_claims() -> None:
    with pytest.raises(ValueError, match="expect: expected a range"):
        claim("c", VALUES, "in [1, 0]", source="s")
    with pytest.raises(ValueError, match="source: expected"):
        claim("c", VALUES, "> 0", source=" ")
    with pytest.raises(ValueError, match="name: expected text"):
        claim("", VALUES, "> 0", source="s")
    with pytest.raises(ValueError, match="effect: 1 of 2 values are not finite"):
        claim("c", [1.0, math.nan], "> 0", source="s")
    assert len(ledger()) == 0


@pytest.mark.parametrize("text", [">0.02", " >  2e-2 ", "> +.02"])
def test_spellings_of_a_limit(text) -> None:
    assert claim("c", VALUES, text, source="s").verdict == "holds"
    assert claim("d", VALUES + 1, text.replace(">", "<"), source="s").verdict == "fails"


def test_the_level_of_a_claim() -> None:
    effect = [-0.2, 1.0, 1.2, 0.6]
    assert claim("c", effect, "> 0", source="s", level=0.8).verdict == "holds"
    assert claim("c", effect, "> 0", source="s", level=0.99).verdict == "undecided"
    assert claim("c", interval(effect, 0.8), "> 0", source="s", level=0.99).verdict == "holds"


def test_the_ledger_lists_claims_in_order_and_replaces() -> None:
    claim("first <b>", VALUES, "> 0", source="A & B 2017")
    claim("second", VALUES, "< 0", source="B")
    claim("third", VALUES - VALUES.mean(), "> 0", source="C", note="too few members")
    assert ledger().summary() == "3 claims: 1 holds, 1 fails, 1 undecided"
    claim("second", -VALUES, "< 0", source="B")
    book = ledger()
    assert [verdict.name for verdict in book] == ["first <b>", "second", "third"]
    assert [verdict.verdict for verdict in book] == ["holds", "holds", "undecided"]
    page = book._repr_html_()
    assert "first &lt;b&gt;" in page
    assert "A &amp; B 2017" in page
    assert page.count("✔ holds") == 2
    assert page.count("? undecided") == 1
    assert "too few members" in str(book)
    assert str(ledger()) == repr(ledger())


def test_outside_a_notebook_they_print(capsys) -> None:
    found = record("ece", VALUES, unit="probability", baseline=0.1)
    assert found == interval(VALUES)
    assert capsys.readouterr().out == f"ece = {found.numbers('probability')} (n = 8)\n"
    claim("c", VALUES, "> 0", source="s", note="n")
    assert capsys.readouterr().out == f"✔ holds: c: {found}, expected > 0 [s] - n\n"


def test_bad_records() -> None:
    with pytest.raises(ValueError, match="name: expected text"):
        record("", VALUES)
    with pytest.raises(ValueError, match="baseline: expected a finite number"):
        record("a", VALUES, baseline=math.nan)
    with pytest.raises(ValueError, match="baseline: 1 of 2 values are not finite"):
        record("a", VALUES, baseline=[math.nan, 1.0])
    with pytest.raises(ValueError, match="exempt: expected reasons for zero, baseline, shuffled, got null"):
        record("a", VALUES, exempt={"null": "why"})
    with pytest.raises(ValueError, match="values: expected at least 2"):
        record("a", [1.0])


# --- predictions -----------------------------------------------------------------------------------------------------


def test_predictions_are_scored() -> None:
    truth = Interval(0.05, 0.04, 0.06, 8, 0.95, "t")
    predict("ece", 0.1)
    score = score_prediction("ece", truth)
    assert not score.hit
    assert score.error == pytest.approx(0.05)
    assert "off by 0.05 (5.0 half-widths), too high" in str(score)
    predict("ece", 0.01)
    assert "off by 0.04 (4.0 half-widths), too low" in str(score_prediction("ece", truth))
    predict("ece", 0.06)
    assert score_prediction("ece", truth).hit
    assert "inside the interval" in str(score_prediction("ece", truth))


def test_predicted_choices() -> None:
    predict("who wins", "focal", choices=("focal", "plain"))
    assert score_prediction("who wins", "focal").hit
    assert not score_prediction("who wins", "plain").hit
    with pytest.raises(ValueError, match="value: expected one of 'focal', 'plain', got 'other'"):
        predict("who wins", "other", choices=("focal", "plain"))
    with pytest.raises(ValueError, match="truth: expected the kind of the prediction"):
        score_prediction("who wins", interval(VALUES))


def test_no_prediction_yet(capsys) -> None:
    predict("ece", None)
    assert "no prediction yet" in capsys.readouterr().out
    score = score_prediction("ece", interval(VALUES))
    assert (score.hit, score.guess, score.error) == (False, None, None)
    assert "no prediction was made" in str(score)
    for value in (math.nan, "a lot"):
        with pytest.raises(ValueError, match="value: expected a finite number"):
            predict("ece", value)


# --- in a notebook ---------------------------------------------------------------------------------------------------

CELLS = (
    "from toolkit.evidence import claim, interval, ledger, predict, record, score_prediction\n"
    "values = [0.031, 0.029, 0.035, 0.03]",
    'record("ece", values, unit="probability", baseline=0.1, exempt={"zero": "small"})',
    'ece = record("again", values)\nece',
    "ece",
    'claim("low", values, "< 0.05", source="Guo 2017", note="n")\n'
    'found = claim("high", values, "> 0.05", source="Guo 2017")',
    'predict("p", 0.03)\nscore_prediction("p", ece)',
    "ledger()",
)


def test_an_executed_notebook_keeps_them(tmp_path) -> None:
    import papermill

    source, target = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    cells = [new_code_cell(text, id=f"c{number}") for number, text in enumerate(CELLS)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), source)
    papermill.execute_notebook(str(source), str(target), progress_bar=False)
    book = nbformat.read(target, as_version=4)
    nbformat.validate(book)
    outputs = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    assert [len(shown) for shown in outputs] == [0, 1, 1, 1, 2, 2, 1]
    values = [0.031, 0.029, 0.035, 0.03]
    found = interval(values)
    assert dict(outputs[1][0].data[evidence.RECORD_MIME]) == {
        "name": "ece",
        "values": values,
        "unit": "probability",
        "mean": found.estimate,
        "low": found.low,
        "high": found.high,
        "n": 4,
        "baseline": 0.1,
        "exempt": {"zero": "small"},
    }
    assert outputs[2][0].data[evidence.RECORD_MIME]["exempt"] is None
    assert found.numbers() in outputs[3][0].data["text/html"]
    assert evidence.RECORD_MIME not in outputs[3][0].data
    low, high = (shown.data[evidence.CLAIM_MIME] for shown in outputs[4])
    assert dict(low) == {
        "name": "low",
        "verdict": "holds",
        "mean": found.estimate,
        "low": found.low,
        "high": found.high,
        "n": 4,
        "expect": "< 0.05",
        "source": "Guo 2017",
        "note": "n",
    }
    assert high["verdict"] == "fails"
    assert "✘ fails" in outputs[4][1].data["text/html"]
    assert "inside the interval" in outputs[5][1].data["text/plain"]
    assert "2 claims: 1 holds, 1 fails, 0 undecided" in outputs[6][0].data["text/html"]
