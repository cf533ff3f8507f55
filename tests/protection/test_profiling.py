"""Profile mode: a table and a trace of the rounds asked for, and a run that does not notice."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch

from sophon.errors import UserError
from sophon.protection.profiling import RECORDED, TABLE_FILE, TRACE_FILE, profiled


def rounds_of(folder: Path, rounds: int, every: int = 1) -> list[str]:
    said: list[str] = []
    with profiled(folder, rounds, said.append) as round_done:
        for _ in range(0, rounds, every):
            torch.ones(4, 4) @ torch.ones(4, 4)
            round_done()
    return said


@pytest.mark.parametrize("rounds", [1, 3, 6])
def test_rounds_are_recorded_however_few(rounds: int, tmp_path: Path) -> None:
    (text,) = rounds_of(tmp_path, rounds)
    assert (tmp_path / TABLE_FILE).read_text() == text
    events = json.loads(gzip.decompress((tmp_path / TRACE_FILE).read_bytes()))["traceEvents"]
    products = [event for event in events if event["name"] == "aten::mm"]
    assert "aten::mm" in text
    assert len(products) == max(1, min(RECORDED, rounds - 1))


def test_a_profile_draws_nothing(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    rounds_of(tmp_path, 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", _refuse)
    with pytest.raises(UserError, match=r"^profile: cannot write to .*; set TMPDIR$"):
        rounds_of(tmp_path, 3)


def _refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")
