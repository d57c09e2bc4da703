"""The files around the code: dependencies that agree with each other, a light import, floors that stay floors."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import toolkit
from toolkit.labs.reading import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for pin in [Requirement(line)]
}
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_constraints_are_exact_versions_from_the_index() -> None:
    for name, pin in PINS.items():
        assert re.fullmatch(r"==[^*+@]+", str(pin.specifier)), f"{name}: expected one public version, got {pin}"
        assert pin.url is None
        assert pin.marker is None
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINS)


@pytest.mark.parametrize("text", [*PROJECT["project"]["dependencies"], *EXTRAS["test"]])
def test_each_dependency_has_a_pin_in_its_range(text) -> None:
    needed = Requirement(text)
    pin = PINS[canonicalize_name(needed.name)]
    version = str(pin.specifier).removeprefix("==")
    assert needed.specifier.contains(version), f"{needed} does not admit {pin}"


def test_what_is_installed_is_what_is_pinned() -> None:
    from importlib.metadata import distributions

    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in distributions()}
    needed = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    for name in sorted(needed):
        assert PINS[name].specifier.contains(installed[name]), f"{name}: {installed[name]} is installed"


@pytest.mark.parametrize("text", EXTRAS["bench"])
def test_benchmark_peers_are_pinned_where_they_are_named(text) -> None:
    peer = Requirement(text)
    assert str(peer.specifier).startswith("==")
    assert canonicalize_name(peer.name) not in PINS


def test_environment_installs_the_same_package_with_the_same_constraints() -> None:
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    python, pip, through_pip = ENVIRONMENT["dependencies"]
    assert pip == "pip"
    assert through_pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    version = python.removeprefix("python=")
    assert re.fullmatch(r"\d+\.\d+", version)
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)
    assert PROJECT["tool"]["mypy"]["python_version"] == version
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{version.replace('.', '')}"
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt -e" in makefile


def test_version_is_said_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "toolkit.__version__"}
    assert Version(toolkit.__version__)


def test_every_import_of_the_toolkit_is_a_declared_dependency() -> None:
    # Names that differ from their package's, and what a declared dependency brings along.
    names = {"IPython": "ipywidgets", "cycler": "matplotlib", "requests": "pooch", "sklearn": "scikit-learn"}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    for path in (ROOT / "toolkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = {node.module.split(".")[0]}
            else:
                continue
            for name in found - sys.stdlib_module_names - {"toolkit"}:
                package = canonicalize_name(names.get(name, name))
                assert package in declared, (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not name"
                )


@cache
def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in result.stdout.split()}


def test_importing_the_toolkit_loads_nothing() -> None:
    assert not {"torch", "numpy", "scipy", "sklearn", "matplotlib", "plotly", "papermill"} & loaded_by("import toolkit")


@pytest.mark.parametrize("room", ["fleet", "calibration", "models", "evidence"])
def test_importing_a_room_adds_little_to_torch(room) -> None:
    slow = {"sklearn", "matplotlib", "plotly", "ipywidgets", "papermill", "nbformat", "pandas", "mlxtend", "scipy"}
    assert not slow & (loaded_by(f"import toolkit; toolkit.{room}") - loaded_by("import torch"))


def test_rooms_are_found_by_name() -> None:
    assert toolkit.labs.find.__module__ == "toolkit.labs.reading"
    assert {"checks", "labs", "random"} <= set(dir(toolkit))
    with pytest.raises(AttributeError, match="'toolkit' has no attribute 'cellar'"):
        toolkit.cellar  # noqa: B018


FLOORS = {
    **dict.fromkeys(("checks", "random", "sorting"), 0),
    **dict.fromkeys(("fleet", "data", "models", "evidence", "intervals", "diffusion"), 0),
    **dict.fromkeys(("calibration", "metric_learning", "unlearning", "scaling_laws", "distillation"), 1),
    **dict.fromkeys(("explore", "figures", "exercises"), 2),
    "labs": 3,
}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "toolkit":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.split(".")[1] for alias in node.names if (name := alias.name).startswith("toolkit.")}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "toolkit").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_its_floor_and_below_and_no_other_topic(path) -> None:
    room = path.relative_to(ROOT / "toolkit").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in FLOORS, f"{room}: on which floor is it?"
    for other in imported_rooms(path) - {room}:
        assert FLOORS[other] <= FLOORS[room], f"{path.name} imports {other} from a floor above"
        assert FLOORS[room] != 1 or FLOORS[other] != 1, f"{path.name} imports the topic {other}"


def test_continuous_integration_installs_chromium_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_top_level() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {name.split("/")[0] for name in listed.stdout.splitlines() if not name.startswith(".")}
    rooms = {"notebooks", "toolkit", "data", "tests", "environment.yml", "README.md"}
    assert top == rooms | {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE"}
