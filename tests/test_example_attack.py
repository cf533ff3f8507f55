"""The worked example of ARCHITECTURE.md, done as it says there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cli_helpers import SMALL, load, make, sophon

GUIDE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()


def block(language: str) -> str:
    """Return the guide's only block of code in a language."""
    found = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.slow
def test_an_attack_is_one_function_and_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    family = tmp_path / "mine" / "attack" / "family"
    family.mkdir(parents=True)
    (family / "flipped.yaml").write_text(block("yaml"))
    (tmp_path / "my_attacks.py").write_text(block("python"))
    (family.parent / "nothing.yaml").write_text("seeds: 1\neval_points: 2\n")  # the demo's own attacks take a minute
    monkeypatch.syspath_prepend(str(tmp_path))

    command = next(line for line in re.findall(r"`(sophon audit [^`]*)`", GUIDE) if "flipped]" in line)
    result = sophon(tmp_path, *shlex.split(command)[1:], *SMALL, "attack=nothing")
    assert result.code == 0, result

    import my_attacks

    assert my_attacks.flip_signs.__module__ in sys.modules
    monkeypatch.delitem(sys.modules, "my_attacks")
    summary = load(tmp_path / "runs" / "quickstart" / "seed0" / "audit" / "audit.json")
    (attack,) = summary["attacks"]
    assert attack["attack"] == "flipped"
    assert attack["strategy"]["surgery"] == [{"operation": "my_attacks.flip_signs", "fraction": 0.05}]
    assert set(attack["roles"]) == {"protected", "unprotected", "scratch"}
    assert "surgery" in attack["outside"]
