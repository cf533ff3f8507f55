"""What may import what, and that nothing is ever pickled."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sophon

PACKAGE = Path(sophon.__file__).parent
PROJECT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if path.name == "arguments.py":
                continue  # imports a user's own function by the name that it is given
            yield ast.literal_eval(node.args[0])


def importers(package: str) -> set[str]:
    found = (path for path in FILES if package in {name.split(".")[0] for name in imported(path)})
    return {path.relative_to(PACKAGE).as_posix() for path in found}


def test_contracts_of_pyproject_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlinter.cli import lint_imports

    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(os.fspath(PROJECT))
    code = lint_imports(config_filename=os.fspath(PROJECT / "pyproject.toml"), no_cache=True)
    output = capsys.readouterr().out
    assert code == 0, output
    assert re.search(r"[1-9]\d* kept, 0 broken", output)


@pytest.mark.parametrize(("package", "only"), [("hydra", "cli"), ("wandb", "tracking.py")])
def test_one_importer_each(package: str, only: str) -> None:
    assert {path.split("/")[0] for path in importers(package)} == {only}


def test_losses_import_nothing_of_ours() -> None:
    assert not [name for name in imported(PACKAGE / "losses.py") if name.startswith("sophon")]


@pytest.mark.parametrize(("room", "other"), [("audit", "protect"), ("protect", "audit")])
def test_audit_and_protection_are_strangers(room: str, other: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith(f"sophon.{other}")], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_pickled(path: Path) -> None:
    picklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not picklers & {name.split(".")[0] for name in imported(path)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.save"), f"{path}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {"load", "save"} & {alias.name for alias in node.names}, f"{path}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.literal_eval(node.value) is False, f"{path}:{node.value.lineno}"
