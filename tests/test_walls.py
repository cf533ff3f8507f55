"""Nothing is ever pickled, and a file fits a sitting. (What may import what is held by import-linter: `make lint`.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sophon

PACKAGE = Path(sophon.__file__).parent


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


def test_nothing_is_pickled() -> None:
    picklers = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in PACKAGE.rglob("*.py"):
        assert not picklers & {name.split(".")[0] for name in imported(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "torch.save"), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not {"load", "save"} & {alias.name for alias in node.names}, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.literal_eval(node.value) is False, f"{path}:{node.value.lineno}"


def test_no_file_has_more_than_300_lines() -> None:
    files = [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 300} == {}
