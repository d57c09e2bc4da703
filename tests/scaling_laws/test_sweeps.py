"""Sweeps come back as they were saved or not at all; the same numbers on every backend; the recording script."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_cases import broken, numbers

from toolkit.random import key, uniform
from toolkit.scaling_laws import record as recording
from toolkit.scaling_laws.record import UNITS, byte_models, main, markov_text
from toolkit.scaling_laws.sweeps import load_sweep, run_sweep, save_sweep

ROOT = Path(__file__).parents[2]
LOSS = [0.1 + 0.2, 1e-300, float("nan"), -2.5e17]
COLUMNS: dict[str, Any] = {
    "width": torch.tensor([4, 8, 8, 2**60]),
    "loss": LOSS,
    "model": ["mlp", "a,b", 'say "x"', "é ü"],
}
UNIT = {"width": "hidden units", "loss": "nats/byte", "model": ""}
CARD: dict[str, Any] = {
    "script": "tests",
    "seed": 3,
    "device": "cpu",
    "settings": {"lr": [0.1, 0.2]},
    "about": "Four rows.",
}


def save(path, columns=COLUMNS, units=UNIT, **card):
    return save_sweep(path, columns, units, **CARD | card)


SETTINGS: list[dict[str, Any]] = [{"width": width, "seeds": 3, "scale": 0.1} for width in (2, 4, 6, 8, 10)]


def test_what_is_saved_comes_back_to_the_last_digit(tmp_path):
    path = tmp_path / "new" / "runs.csv"
    saved, found = save(path), load_sweep(path)
    assert found.card == saved.card
    assert list(found.columns) == list(COLUMNS)
    assert found.units == UNIT
    assert len(found) == 4
    for sweep in (saved, found):
        assert sweep["width"].tolist() == [4, 8, 8, 2**60]
        assert sweep["width"].dtype == torch.int64
        torch.testing.assert_close(
            sweep["loss"], torch.tensor(LOSS, dtype=torch.float64), rtol=0, atol=0, equal_nan=True
        )
        assert sweep["model"] == COLUMNS["model"]
    assert sorted(os.listdir(path.parent)) == ["runs.csv", "runs.json"]
    card = json.loads((path.parent / "runs.json").read_text())
    assert {name: card[name] for name in CARD} == CARD
    assert card["versions"]["torch"] == torch.__version__
    assert card["rows"] == 4
    with pytest.raises(ValueError, match=r"name: expected one of .*got 'lost'"):
        found["lost"]


def test_large_sweeps_go_into_safetensors(tmp_path):
    path, columns = tmp_path / "runs.safetensors", {"width": COLUMNS["width"], "loss": LOSS}
    save(path, columns, {"width": "", "loss": ""})
    found = load_sweep(path)
    assert list(found.columns) == ["width", "loss"]
    assert found["width"].tolist() == [4, 8, 8, 2**60]
    assert found["loss"].tolist()[:2] == LOSS[:2]
    with pytest.raises(ValueError, match=r"columns: expected only numbers.*\['model'\]"):
        save(tmp_path / "other.safetensors")


def test_rows_are_chosen_by_value(tmp_path):
    chosen = save(tmp_path / "runs.csv").where(width=8, model="a,b")
    assert len(chosen) == 1
    assert chosen["loss"].tolist() == [1e-300]
    assert chosen["model"] == ["a,b"]
    with pytest.raises(ValueError, match=r"values: expected some.*'width': 4"):
        chosen.where(width=4)


def test_an_existing_sweep_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "runs.csv"
    save(path)
    with pytest.raises(ValueError, match=r"path: expected a new sweep.*overwrite=True"):
        save(path, seed=4)
    assert load_sweep(path).card["seed"] == 3
    save(path, {"loss": [1.0]}, {"loss": ""}, overwrite=True)
    assert load_sweep(path)["loss"].tolist() == [1.0]


def test_nothing_is_half_written(tmp_path, monkeypatch):
    """Whichever of the renames fails, what is left is no sweep, and no scratch file."""
    path, replace = tmp_path / "runs.csv", os.replace
    with pytest.raises(ValueError, match="units"):
        save(path, units={})
    assert os.listdir(tmp_path) == []
    for failing in (1, 2):
        save(path, overwrite=True, seed=9)
        calls: list[Any] = []

        def fail(source, target, failing=failing, calls=calls):
            calls.append(target)
            if len(calls) == failing:
                raise OSError("disk full")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save(path, overwrite=True)
        monkeypatch.setattr(os, "replace", replace)
        assert not list(tmp_path.glob(".*"))
        assert not path.with_suffix(".json").exists()
        with pytest.raises(FileNotFoundError, match="without its"):
            load_sweep(path)
    save(path, overwrite=True)
    assert len(load_sweep(path)) == 4


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({}, "columns: expected at least one row"),
        ({"a": []}, "columns: expected at least one row"),
        ({"a": [1, 2], "b": [1]}, "the same number, got {'a': 2, 'b': 1}"),
        ({"a b": [1]}, "names of letters.*'a b'"),
        ({"a": 3}, r"columns\['a'\]: expected one value per row"),
        ({"a": "text"}, r"columns\['a'\]: expected one value per row"),
        ({"a": [1, "x"]}, r"columns\['a'\]: expected only numbers or only strings"),
        ({"a": [1.0, float("inf")]}, r"columns\['a'\]: expected finite"),
        ({"a": ["two\nlines"]}, r"columns\['a'\]: expected strings of one line"),
        ({"a": torch.zeros(2, 2)}, r"columns\['a'\]: expected real numbers.*\(2, 2\)"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"columns\['a'\]: expected real numbers.*complex64"),
    ],
)
def test_columns_that_cannot_be_kept(tmp_path, columns, match):
    with pytest.raises(ValueError, match=match):
        save(tmp_path / "runs.csv", columns, dict.fromkeys(columns, ""))
    assert os.listdir(tmp_path) == []


def test_cards_that_cannot_be_kept(tmp_path):
    with pytest.raises(ValueError, match=r"units: .*\['loss', 'other'\]"):
        save(tmp_path / "runs.csv", units={"width": "", "model": "", "other": ""})
    with pytest.raises(ValueError, match="script"):
        save(tmp_path / "runs.csv", script="")
    with pytest.raises(ValueError, match="settings: expected what JSON"):
        save(tmp_path / "runs.csv", settings={"x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"path: .*\.csv or \.safetensors, got runs\.txt"):
        save(tmp_path / "runs.txt")
    assert os.listdir(tmp_path) == []


def test_what_is_damaged_is_refused(tmp_path):
    path, card_path = tmp_path / "runs.csv", tmp_path / "runs.json"
    with pytest.raises(FileNotFoundError, match=r"without its table runs\.csv"):
        load_sweep(path)
    save(path)
    table, card = path.read_bytes(), json.loads(card_path.read_text())

    def refused(match, **changes):
        card_path.write_text(json.dumps(card | changes))
        with pytest.raises(ValueError, match=match):
            load_sweep(path)

    path.write_bytes(table[:-1])
    refused("another SHA-256")
    path.write_bytes(table.replace(b"1e-300", b"2e-300"))
    refused("another SHA-256")
    path.write_bytes(table)
    refused("format", format="other")
    refused(r"without \['seed'\]", seed="three")
    refused(r"without \['rows'\]", rows=True)
    refused("rows, as the card", rows=5)
    refused(r"which is that of other\.csv", table="other.csv")
    names = [column | {"name": column["name"] + "x"} for column in card["columns"]]
    refused("expected the columns", columns=names)
    kinds = [column | {"type": "int"} for column in card["columns"]]
    refused("expected the columns", columns=kinds)
    refused("expected the columns", columns=[{"name": "width"}])
    card_path.write_text("{")
    with pytest.raises(ValueError, match="data card in JSON"):
        load_sweep(path)
    card_path.unlink()
    with pytest.raises(FileNotFoundError, match=r"without its data card runs\.json"):
        load_sweep(path)


def test_a_sweep_is_its_calls_in_order():
    found = run_sweep(numbers, SETTINGS)
    calls = [numbers(**setting) for setting in SETTINGS]
    assert found["width"] == [width for width in (2, 4, 6, 8, 10) for _ in range(3)]
    assert found["value"] == [value for call in calls for value in call["value"].tolist()]
    assert found["kind"][:4] == ["odd", "odd", "odd", "even"]
    assert found["seed"] == [0, 1, 2] * 5
    assert run_sweep(broken, [{"width": 3}, {"width": 4}]) == {"width": [3, 4]}


def test_the_same_numbers_from_two_threads():
    assert run_sweep(numbers, SETTINGS, jobs=2, backend="threading") == run_sweep(numbers, SETTINGS)


def test_the_same_numbers_from_two_dask_workers():
    """Both in this process: workers of their own need ten seconds to import torch, and give the same."""
    distributed = pytest.importorskip("distributed")
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "processes": False}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2)
        assert len(client.nthreads()) == 2
        found = run_sweep(numbers, SETTINGS, jobs=-1, backend="dask")
    assert found == run_sweep(numbers, SETTINGS)


def test_sweeps_that_cannot_run():
    with pytest.raises(ValueError, match="settings: expected at least one"):
        run_sweep(numbers, [])
    with pytest.raises(ValueError, match=r"jobs: .*got 0"):
        run_sweep(numbers, SETTINGS, jobs=0)
    with pytest.raises(ArithmeticError) as caught:
        run_sweep(broken, [{"width": 1}, {"width": 2}])
    assert caught.value.__notes__ == ["in run_sweep, with the setting {'width': 2}"]
    with pytest.raises(ValueError, match=r"the same columns from every call, got \['b'\]"):
        run_sweep(lambda i: {"a": i} | ({"b": 1} if i else {}), [{"i": 0}, {"i": 1}])
    with pytest.raises(ValueError, match=r"columns of one length, got \[2, 3\]"):
        run_sweep(lambda i: {"a": [1, 2], "b": [1, 2, 3]}, [{"i": 0}])


def test_markov_text_has_the_transitions_it_was_drawn_with():
    text = markov_text(30_000, symbols=3, seed=1)
    assert torch.equal(text[:100], markov_text(100, symbols=3, seed=1))
    assert not torch.equal(text, markov_text(30_000, symbols=3, seed=2))
    table = uniform(key(1, 0), (3, 3, 3), torch.float64).pow(8)
    expected = table / table.sum(-1, keepdim=True)
    counts = torch.zeros(3, 3, 3, dtype=torch.float64)
    triples = text.long().unfold(0, 3, 1)
    counts.index_put_(tuple(triples.T), torch.ones(len(triples), dtype=torch.float64), accumulate=True)
    total = counts.sum(-1, keepdim=True)
    spread = (expected * (1 - expected) / total.clamp_min(1)).sqrt()
    assert bool(
        ((counts / total.clamp_min(1) - expected).abs() <= 4.5 * spread + 2 / total.clamp_min(1))[
            total[..., 0] > 50
        ].all()
    )
    with pytest.raises(ValueError, match="got 2 and 8"):
        markov_text(2)


TINY: dict[str, Any] = {
    "windows": (40, 400),
    "seeds": 2,
    "steps": (5, 60),
    "context": 3,
    "tested": 300,
    "device": "cpu",
}


@pytest.mark.parametrize(("model", "last"), [("mlp", 200), ("transformer", 60)])
def test_byte_models_learn_and_data_helps(model, last):
    text = markov_text(4_000, symbols=6)
    found = {
        name: torch.tensor(values)
        for name, values in byte_models(text, 8, model=model, **TINY | {"steps": (5, last)}).items()
        if name != "model"
    }
    assert found["step"].tolist() == [5] * 4 + [last] * 4
    assert found["windows"].tolist() == [40, 40, 400, 400] * 2
    assert found["seed"].tolist() == [0, 1] * 4
    per_window = 1 if model == "mlp" else 3
    assert found["bytes"].tolist() == (found["windows"] * per_window).tolist()
    early, late = found["test_loss"].view(2, 2, 2)
    assert bool((late[1] < early[1]).all())
    assert float(late[1].mean()) < float(late[0].mean()) - 0.03
    assert bool((late > 0.3).all())
    gap = late - found["train_loss"].view(2, 2, 2)[1]
    assert bool((gap[0] > gap[1]).all())  # of little data more is learnt by heart
    again = byte_models(text + 7, 8, model=model, **TINY | {"steps": (5, last)})  # only the ranks of the bytes count
    torch.testing.assert_close(torch.tensor(again["test_loss"]), found["test_loss"])
    if model == "mlp":
        assert found["parameters"].unique().tolist() == [3 * 6 * 8 + 8 + 8 * 6 + 6]


def test_bad_byte_models():
    text = markov_text(500)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "rnn"}, "model: .*'rnn'"),
        ({"windows": ()}, "windows, steps"),
        ({"steps": (0,)}, "windows, steps"),
        ({"windows": (4000,)}, "text: expected at least 4000 training windows"),
    ]
    for change, match in cases:
        with pytest.raises(ValueError, match=match):
            byte_models(text, 4, **TINY | change)
    with pytest.raises(ValueError, match=r"text: expected bytes.*float32"):
        byte_models(text.float(), 4, **TINY)


def test_the_script_records_a_sweep(tmp_path, monkeypatch, capsys):
    small: dict[str, Any] = {"widths": [4, 8], "windows": [30, 120], "seeds": 2, "steps": [10, 30], "text": 1500}
    monkeypatch.setitem(recording.SIZES, "small", small)
    main([str(tmp_path / "runs.csv"), "--device", "cpu", "--seed", "2"])
    assert "16 rows" in capsys.readouterr().out
    sweep = load_sweep(tmp_path / "runs.csv")
    assert len(sweep) == 16
    assert sweep.units == UNITS
    assert sweep.card["settings"]["text"] == "markov_text(1500, seed=2)"
    assert sweep.card["seed"] == 2
    one = byte_models(markov_text(1500, seed=2), 8, windows=[30, 120], seeds=2, steps=[10, 30], seed=2, device="cpu")
    assert sweep.where(width=8)["test_loss"].tolist() == one["test_loss"]
    (tmp_path / "own.txt").write_bytes(b"the cat sat on the mat. " * 60)
    main([str(tmp_path / "own.csv"), "--text", str(tmp_path / "own.txt"), "--device", "cpu"])
    own = load_sweep(tmp_path / "own.csv")
    assert own.card["settings"]["text"] == "own.txt, 1440 bytes"


def test_sweeps_of_the_repository_are_whole():
    found = sorted(path for path in (ROOT / "data" / "sweeps").iterdir() if path.suffix in (".csv", ".safetensors"))
    assert found
    for path in found:
        sweep = load_sweep(path)
        assert sweep.card["script"] == "toolkit.scaling_laws.record"
        assert sweep.card["about"]


def test_the_example_is_what_the_script_makes_here():
    """One width of it, at fewer steps: the same losses up to what another machine's arithmetic may change."""
    sweep = load_sweep(ROOT / "data" / "sweeps" / "byte_models.csv").where(width=4, step=200)
    given = {name: sweep.card["settings"][name] for name in ("windows", "seeds")}
    text = markov_text(50_000, seed=0)
    found = byte_models(text, 4, steps=[200], device="cpu", seed=0, **given)
    torch.testing.assert_close(
        torch.tensor(found["test_loss"], dtype=torch.float64), sweep["test_loss"], rtol=0.02, atol=0
    )
