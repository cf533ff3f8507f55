"""The tricks' benchmark runs at a tiny size, and what it compares is the same work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"


@pytest.fixture
def tricks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the script as it is when it is run, with a case of a few milliseconds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tricks
    from cases import Case

    monkeypatch.setitem(tricks.CASES, "tiny", Case("resnet_tiny", 4, 4))
    monkeypatch.setattr(tricks, "SHORTEST", 0.0)
    return tricks


@pytest.mark.slow
def test_both_sides_find_the_same(tricks: Any) -> None:
    for name, trick in tricks.TRICKS.items():
        if trick.compiles:
            continue
        cell = tricks.measured(trick, "tiny", torch.device("cpu"), 2)
        assert min(cell["seconds"]) > 0
        assert cell["ratio"] == pytest.approx(cell["seconds"][1] / cell["seconds"][0])
        if cell["difference"] is not None:
            assert cell["difference"] < (0.5 if name == "half" else 1e-3), name
        if name == "half":
            assert cell["difference"] > 1e-4  # bfloat16 was in effect


def test_command_adds_to_its_results(
    tricks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tricks, "HERE", tmp_path)
    for only in ("layers_once", "fused/adam*"):
        command = ["tricks.py", "--case", "tiny", "--only", only, "--turns", "2", "--device", "cpu", "--threads"]
        monkeypatch.setattr(sys, "argv", [*command, str(torch.get_num_threads())])
        tricks.main()
    assert capsys.readouterr().out.count("tiny/") == 3
    lines = (tmp_path / "tricks_cpu.md").read_text().splitlines()
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| tiny")] == [
        "BatchNorm layers looked up once",
        "fused adam",
        "fused adamw",
    ]
