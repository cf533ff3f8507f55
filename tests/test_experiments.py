"""Commands in the READMEs of experiments/ compose, from the repository's root; its scripts import what there is."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from tests.cli_helpers import REPOSITORY, sophon

SCRIPTS = sorted((REPOSITORY / "experiments").rglob("*.py"))
READMES = sorted((REPOSITORY / "experiments").rglob("README.md"))


def commands(readme: Path) -> list[str]:
    """Return the indented lines that run sophon, continued lines joined and shell variables put in."""
    text = readme.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    variables = {"seed": "0"}
    for line in lines:
        if match := re.fullmatch(r'(\w+)="?([^"]*)"?', line):
            variables[match[1]] = match[2]
    expanded = [re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line) for line in lines]
    return [line for line in expanded if line.startswith("sophon ")]


COMMANDS = [(readme.parent.name, command) for readme in READMES for command in commands(readme)]


@pytest.mark.parametrize(("experiment", "command"), COMMANDS)
def test_a_command_composes(experiment: str, command: str) -> None:
    if command.startswith("sophon report compare"):
        pytest.skip("has no configuration of its own")
    result = sophon(REPOSITORY, *shlex.split(command, comments=True)[1:], "--cfg", "job")
    assert result.code == 0, result.err


def test_there_are_commands_to_compose() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_a_script_imports_what_there_is(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert runpy.run_path(str(script), run_name="imported")["__doc__"]
