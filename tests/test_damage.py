"""Files and folders that are damaged or not ours: refused in one line, and left as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli_helpers import AUDIT, PROTECT, RUNS, SMALL, refused

NEW = "run_dir=new"

pytestmark = pytest.mark.slow  # whole commands


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated weights": ("model.safetensors", truncate, "sha256"),
    "no weights": ("model.safetensors", Path.unlink, "holds no model.safetensors"),
    "truncated manifest": ("sophon.json", truncate, "sophon.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused(copied: Path, case: str) -> None:
    name, damage, word = DAMAGE[case]
    damage(copied / RUNS / "protect" / "checkpoint" / name)
    message = refused(copied, "export", f"checkpoint={RUNS / 'protect'}", "out=out")
    assert message.startswith(("checkpoint: ", "cannot read "))
    assert word in message


@pytest.mark.parametrize(("verb", "command"), [("pretrain", PROTECT), ("pretrain", AUDIT), ("protect", AUDIT)])
def test_no_verb_takes_weights_that_are_not_those_exported(copied: Path, verb: str, command: tuple[str, ...]) -> None:
    flip_last_byte(copied / RUNS / verb / "checkpoint" / "model.safetensors")
    message = refused(copied, *command, NEW)
    assert message.startswith("reference: " if verb == "pretrain" else "checkpoint: ")
    assert "sha256" in message


@pytest.mark.parametrize("name", ["run.json", "state.safetensors"])
def test_a_damaged_run_is_refused_and_kept(copied: Path, name: str) -> None:
    run = copied / RUNS / "protect"
    shutil.rmtree(run / "checkpoint")
    truncate(run / name)
    assert name in refused(copied, *PROTECT)


@pytest.mark.parametrize(
    ("command", "damaged"),
    [(AUDIT, "attempts/*.json"), (("report", *SMALL), "attempts.parquet")],
    ids=["audit", "report"],
)
def test_a_damaged_file_of_an_audit_is_refused_by_name(
    audited: Path, tmp_path: Path, command: tuple[str, ...], damaged: str
) -> None:
    folder = Path(shutil.copytree(audited, tmp_path / "copied"))
    file = min((folder / RUNS / "audit").glob(damaged))
    truncate(file)
    assert file.name in refused(folder, *command)


def test_report_needs_an_audit(copied: Path) -> None:
    message = refused(copied, "report", f"run_dir={RUNS / 'protect'}")
    assert message.startswith("run_dir: ")
    assert "audit.json" in message
