"""The commands on a GPU, in float32 and in bfloat16. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, load, own_groups, sophon

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("amp", ["none", "cuda"])
def test_the_commands_run_on_a_gpu(tmp_path: Path, amp: str) -> None:
    own_groups(tmp_path)
    for command in (PRETRAIN, PROTECT, AUDIT):
        result = sophon(tmp_path, *command, "device=cuda", f"amp={amp}")
        assert result.code == 0, result.err
    released = sophon(tmp_path, "export", f"checkpoint={RUNS}/protect", "out=release")
    assert released.code == 0, released.err
    attempts = load(tmp_path / RUNS / "audit/audit.json")["attacks"]
    assert all(score["seeds"] for attack in attempts for score in attack["roles"].values())
