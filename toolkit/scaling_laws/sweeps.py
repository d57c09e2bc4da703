"""Recorded sweeps: many runs made once, on any machine, as a table with a card that says where it comes from.

A sweep ``name`` is two files side by side: the table, ``name.csv`` (exact to the last digit, read by anything) or
``name.safetensors`` (numbers only, for large ones), and the data card ``name.json``: script, its settings, seed,
device, versions, each column with its type and unit, and the table's SHA-256. The card is written last, so that a sweep
is there as a whole or not at all, and a table that is cut short or altered is refused.
"""

import csv
import hashlib
import io
import json
import os
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sweep", "load_sweep", "run_sweep", "save_sweep"]

FORMAT = "fleetlab-sweep-1"
_PACKAGES = ("fleetlab", "numpy", "torch")
_TYPES = {"int": torch.int64, "float": torch.float64}
_CARD = {
    "format": str,
    "table": str,
    "sha256": str,
    "rows": int,
    "columns": list,
    "script": str,
    "settings": dict,
    "seed": int,
    "device": str,
    "versions": dict,
    "about": str,
}

Column = Tensor | list[str]


@dataclass(frozen=True, eq=False)
class Sweep:
    """A table of runs, one per row, and its data card.

    Attributes:
        columns: name → int64 or float64 tensor ``(rows,)``, or a list of strings. A float may be NaN (a failed run).
        card: the data card; ``card["columns"]`` has name, type and unit of each.
    """

    columns: dict[str, Column]
    card: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns:
            raise ValueError(f"name: expected one of the columns {sorted(self.columns)}, got {name!r}")
        return self.columns[name]

    def __len__(self) -> int:
        return self.card["rows"]

    @property
    def units(self) -> dict[str, str]:
        """Column → unit; empty for a plain number or a name."""
        return {column["name"]: column["unit"] for column in self.card["columns"]}

    def where(self, **values: float | str) -> "Sweep":
        """The rows in which these columns have these values."""
        keep = torch.ones(len(self), dtype=torch.bool)
        for name, value in values.items():
            column = self[name]
            keep &= column == value if isinstance(column, Tensor) else torch.tensor([v == value for v in column])
        if not bool(keep.any()):
            raise ValueError(f"values: expected some that the sweep has together, got {values}, found in no row")
        rows = keep.nonzero().flatten().tolist()
        columns: dict[str, Column] = {
            name: column[keep] if isinstance(column, Tensor) else [column[row] for row in rows]
            for name, column in self.columns.items()
        }
        return Sweep(columns, self.card | {"rows": len(rows)})


def _column(name: str, values: Any) -> Column:
    """As it is stored: int64, float64 or strings."""
    if not name.isidentifier():
        raise ValueError(f"columns: expected names of letters, digits and underscores, got {name!r}")
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise ValueError(f"columns[{name!r}]: expected one value per row, got {values!r}")
    if not isinstance(values, Tensor) and len(values) and all(isinstance(value, str) for value in values):
        for value in values:
            if "\r" in value or "\n" in value or not value:
                raise ValueError(f"columns[{name!r}]: expected strings of one line, not empty, got {value!r}")
        return list(values)
    try:
        tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"columns[{name!r}]: expected only numbers or only strings, got another mixture") from error
    if tensor.ndim != 1 or tensor.is_complex():
        got = f"shape {tuple(tensor.shape)} of {tensor.dtype}"
        raise ValueError(f"columns[{name!r}]: expected real numbers (rows,), got {got}")
    tensor = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64)
    if tensor.is_floating_point() and bool(tensor.isinf().any()):
        raise ValueError(f"columns[{name!r}]: expected finite numbers (NaN for a failed run), got an infinite one")
    return tensor.contiguous()


def _type(column: Column) -> str:
    return "str" if isinstance(column, list) else "float" if column.is_floating_point() else "int"


def _table(columns: Mapping[str, Column], suffix: str) -> bytes:
    if suffix == ".safetensors":
        from safetensors.torch import save

        if names := [name for name, column in columns.items() if isinstance(column, list)]:
            raise ValueError(
                f"columns: expected only numbers in a .safetensors sweep, got strings in {names}; use .csv"
            )
        return save({name: column for name, column in columns.items() if isinstance(column, Tensor)})
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    rows = [column if isinstance(column, list) else [repr(v) for v in column.tolist()] for column in columns.values()]
    writer.writerows(zip(*rows, strict=True))
    return file.getvalue().encode()


def _paths(path: str | os.PathLike) -> tuple[Path, Path]:
    table = Path(path)
    if table.suffix not in (".csv", ".safetensors"):
        raise ValueError(f"path: expected a name that ends in .csv or .safetensors, got {table.name}")
    return table, table.with_suffix(".json")


def save_sweep(
    path: str | os.PathLike,
    columns: Mapping[str, Any],
    units: Mapping[str, str],
    *,
    script: str,
    seed: int,
    device: str,
    settings: Mapping[str, Any] | None = None,
    about: str = "",
    overwrite: bool = False,
) -> Sweep:
    """Write a sweep: the table at ``path`` (.csv or .safetensors) and its card beside it (.json).

    Args:
        columns: name → one value per row: numbers (integers, floats, a tensor) or strings.
        units: column → unit, for every column; ``""`` for a plain number or a name.
        script: what made it, for instance a module's name.
        seed, device, settings: what it was called with; ``settings`` must be fit for JSON.
        about: one or two sentences on what the rows are.
        overwrite: replace a sweep that is there. Its card goes first, so that an interruption leaves no false pair.

    Everything is checked and encoded before a file is touched. Raises ``ValueError`` for columns of different length,
    types or names that cannot be stored, missing units or an existing sweep.
    """
    table, card_path = _paths(path)
    stored = {name: _column(name, values) for name, values in columns.items()}
    lengths = {name: len(column) for name, column in stored.items()}
    if not stored or 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"columns: expected at least one row in each, and the same number, got {lengths}")
    if set(units) != set(stored):
        odd = sorted(set(units) ^ set(stored))
        raise ValueError(f"units: expected one for each column ('' for a plain number), got a difference in {odd}")
    if not script:
        raise ValueError("script: expected the name of what made the sweep, got an empty one")
    content = _table(stored, table.suffix)
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
    card = {
        "format": FORMAT,
        "table": table.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": next(iter(lengths.values())),
        "columns": [{"name": name, "type": _type(c), "unit": units[name]} for name, c in stored.items()],
        "script": script,
        "settings": dict(settings or {}),
        "seed": seed,
        "device": device,
        "versions": versions,
        "about": about,
    }
    try:
        text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: expected what JSON can hold, got {settings}") from error
    if not overwrite and (table.exists() or card_path.exists()):
        raise ValueError(f"path: expected a new sweep, got {table}, which is there; overwrite=True replaces it")
    table.parent.mkdir(parents=True, exist_ok=True)
    card_path.unlink(missing_ok=True)
    _write(table, content)
    _write(card_path, text.encode())
    return Sweep(stored, json.loads(text))


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def load_sweep(path: str | os.PathLike) -> Sweep:
    """Read a sweep that :func:`save_sweep` wrote, by its table's path, and check it against its card.

    Raises ``FileNotFoundError`` where table or card is missing, ``ValueError`` where the card is incomplete, the
    checksum is another one, or columns, types or rows are not those of the card.
    """
    table, card_path = _paths(path)
    for what, file in (("table", table), ("data card", card_path)):
        if not file.is_file():
            raise FileNotFoundError(f"path: expected a recorded sweep, got {table} without its {what} {file.name}")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: expected a data card in JSON, got {card_path}, which is damaged") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"path: expected a data card of format {FORMAT!r}, got {card_path} with another")
    if odd := [name for name, kind in _CARD.items() if type(card.get(name)) is not kind]:
        raise ValueError(f"path: expected a complete data card, got {card_path} without {odd} as they should be")
    if card["table"] != table.name:
        raise ValueError(f"path: expected the card of {table.name}, got {card_path}, which is that of {card['table']}")
    content = table.read_bytes()
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise ValueError(f"path: expected the table that its card describes, got {table} with another SHA-256")
    try:
        types = {column["name"]: column["type"] for column in card["columns"] if isinstance(column["unit"], str)}
        columns = _parsed(content, types, table.suffix)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected the columns that the card of {table} names, got others: {error}") from error
    if any(len(column) != card["rows"] for column in columns.values()):
        raise ValueError(f"path: expected {card['rows']} rows, as the card of {table} says, got another number")
    return Sweep(columns, card)


def _parsed(content: bytes, types: Mapping[str, str], suffix: str) -> dict[str, Column]:
    if suffix == ".safetensors":
        from safetensors.torch import load

        found = load(content)
        if {name: _type(column) for name, column in found.items()} != dict(types):
            raise ValueError(f"{sorted(found)}")
        return {name: found[name] for name in types}
    header, *rows = csv.reader(io.StringIO(content.decode(), newline=""))
    if header != list(types):
        raise ValueError(f"{header}")
    columns: dict[str, Column] = {}
    for (name, kind), values in zip(types.items(), zip(*rows, strict=True), strict=True):
        read = {"str": str, "int": int, "float": float}[kind]
        parsed = [read(value) for value in values]
        columns[name] = parsed if kind == "str" else torch.tensor(parsed, dtype=_TYPES[kind])
    return columns


def run_sweep(
    function: Callable[..., Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
    *,
    jobs: int = 1,
    backend: str | None = None,
) -> dict[str, list[Any]]:
    """``function(**setting)`` for every setting, through joblib; the rows of all of them as columns.

    Args:
        function: returns columns of equal length (a number or a string counts as one for all rows of the call). With
            ``jobs`` or a ``backend`` it runs in other processes, so it must be importable there.
        settings: keyword arguments of each call, in the order that the rows come in.
        jobs: calls at a time, each with one thread; -1 for as many as there are cores.
        backend: joblib's; None for ``loky``, processes on this machine. ``dask`` goes to the workers of the
            ``distributed.Client`` that is open, on any number of machines; ``jobs`` must then be -1 or above 1.

    The result does not depend on ``jobs`` and ``backend``, as long as the function depends on its setting alone.
    Raises ``ValueError`` for no settings, or where calls return other columns or lengths; an error inside a call is
    raised as it is, with a note that names the setting.
    """
    import joblib

    if not settings:
        raise ValueError("settings: expected at least one, got none")
    if jobs == 0 or jobs < -1:
        raise ValueError(f"jobs: expected a number of at least 1, or -1 for all cores, got {jobs}")
    calls = [joblib.delayed(_called)(function, dict(setting)) for setting in settings]
    with joblib.parallel_config(backend=backend or "loky", n_jobs=jobs):
        results = joblib.Parallel()(calls)
    columns: dict[str, list[Any]] = {}
    for i, result in enumerate(results):
        if i and set(result) != set(columns):
            odd = sorted(set(result) ^ set(columns))
            raise ValueError(f"function: expected the same columns from every call, got {odd} in some only")
        for name, values in result.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _called(function: Callable[..., Mapping[str, Any]], setting: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns of one call as lists, which every process can read."""
    try:
        found = function(**setting)
    except Exception as error:
        error.add_note(f"in run_sweep, with the setting {setting}")
        raise
    plain = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in found.items()}
    lengths = {len(values) for values in plain.values() if isinstance(values, Sequence) and not isinstance(values, str)}
    if len(lengths) > 1:
        raise ValueError(f"function: expected columns of one length, got {sorted(lengths)} with the setting {setting}")
    rows = lengths.pop() if lengths else 1
    return {
        name: list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values] * rows
        for name, values in plain.items()
    }
