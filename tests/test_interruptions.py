"""Commands that are stopped, killed or out of space: nothing half-written, and the same command goes on to the bit."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sophon.protection.ntr import NTR
from sophon.protection.resume import STATE_FILE, read_state
from sophon.tasks import ClassificationTask
from tests.cli_helpers import (
    AUDIT,
    PRETRAIN,
    PROTECT,
    RUNS,
    SMALL,
    finish,
    load,
    refusal,
    refused,
    sophon,
    start,
    tree,
    weights_sha256,
)

NEW = "run_dir=new"

pytestmark = pytest.mark.slow  # whole commands


def protected_sha256(made: Path) -> str:
    return weights_sha256(made / RUNS / "protect" / "checkpoint")


def full_disk(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let so many files be written, and no more."""
    left, fsync = writes, os.fsync

    def filling(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", filling)


def out_of_space(folder: Path, writes: int, *command: str) -> None:
    """Run ``command`` on a disk that fills up; everything that was there, or was finished since, must be whole."""
    before = tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, writes)
        message = refusal(sophon(folder, *command))
    assert "No space left on device" in message
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if ".tmp" in name or ".old" in name]


# run.json; the state after each of three rounds; then the checkpoint's weights, config, manifest and card
@pytest.mark.parametrize("writes", [2, 7])
def test_protect_goes_on_after_the_disk_was_full(made: Path, copied: Path, writes: int) -> None:
    out_of_space(copied, writes, *PROTECT, NEW)
    assert not (copied / "new" / "checkpoint").exists()
    if writes > 1:
        assert read_state(copied / "new" / STATE_FILE).at.round == min(writes - 1, 3)
    assert sophon(copied, *PROTECT, NEW).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == protected_sha256(made)


@pytest.mark.parametrize("writes", [1, 4])
def test_pretrain_starts_again_after_the_disk_was_full(made: Path, tmp_path: Path, writes: int) -> None:
    out_of_space(tmp_path, writes, *PRETRAIN)
    assert sophon(tmp_path, *PRETRAIN).code == 0
    checkpoint = RUNS / "pretrain" / "checkpoint"
    assert weights_sha256(tmp_path / checkpoint) == weights_sha256(made / checkpoint)


def test_a_full_disk_leaves_an_older_export_whole(copied: Path) -> None:
    assert sophon(copied, "export", f"checkpoint={RUNS / 'pretrain'}", "out=out").code == 0
    out_of_space(copied, 1, "export", f"checkpoint={RUNS / 'protect'}", "out=out")


@pytest.mark.parametrize("writes", [3, 11, 13])
def test_an_audit_goes_on_after_the_disk_was_full(copied: Path, writes: int) -> None:
    out_of_space(copied, writes, *AUDIT)
    assert sophon(copied, *AUDIT).code == 0
    out_of_space(copied, 0, "report", *SMALL)


def test_a_write_that_fails_before_its_end_leaves_no_trace(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("sophon.files.Path.replace", refuse)
    assert "Disk quota exceeded" in refused(copied, "export", *SMALL, "out=out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_protection_saves_and_goes_on_to_the_bit(made: Path, copied: Path, number: int) -> None:
    command = (*PROTECT, NEW, "guard.every=3")  # no state is due before the end
    whole, calls = NTR.run, 0

    def interrupting(self: NTR, *arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        return whole(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NTR, "run", interrupting)
        result = sophon(copied, *command)
    assert result.code == 130, result
    assert [line.split(";")[0] for line in result.err.splitlines()] == [
        "interrupted: this round is finished and saved first",
        "sophon: interrupted",
    ]
    assert calls == 2, "the round in progress is the last"
    assert read_state(copied / "new" / STATE_FILE).at.round == 2
    assert not (copied / "new" / "checkpoint").exists()
    assert sophon(copied, *command).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == protected_sha256(made)


def untimed(folder: Path) -> Any:
    """Return ``audit.json`` without what depends on how fast the machine was."""
    return {key: value for key, value in load(folder / "audit.json").items() if key not in ("seconds_total", "date")}


def test_an_interrupted_audit_goes_on_with_what_is_missing(copied: Path, audited: Path) -> None:
    from sophon.auditing import runner

    whole, calls = runner.attack, 0

    def interrupting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "attack", interrupting)
        refusal(sophon(copied, *AUDIT, NEW), 130)
        finished = tree(copied / "new" / "attempts")
        assert len(finished) == 2
        assert not (copied / "new" / "audit.json").exists()
        assert sophon(copied, *AUDIT, NEW).code == 0
    assert calls == 3 + 7, "what was complete did not run again"
    assert finished.items() <= tree(copied / "new" / "attempts").items()
    assert untimed(copied / "new") == untimed(audited / RUNS / "audit")


def test_a_process_that_is_killed_goes_on_to_the_bit(copied: Path) -> None:
    long = (*PROTECT, "method.rounds=24", "guard.every=2")
    process = start(copied, *long, NEW)
    state = copied / "new" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    result = finish(process)
    assert result.code == -signal.SIGKILL, result
    assert 0 < read_state(state).at.round < 24
    assert not (copied / "new" / "checkpoint").exists()
    for folder in ("new", "straight"):
        assert sophon(copied, *long, f"run_dir={folder}").code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == weights_sha256(copied / "straight" / "checkpoint")


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(made: Path, copied: Path) -> None:
    whole, losses = ClassificationTask.original_loss, 0

    def poisoned(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal losses
        losses += 1
        # one loss in the rehearsal; then in each round one in the FTS step and two NTR steps
        return whole(self, *arguments, **options) * (float("nan") if losses > 4 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "original_loss", poisoned)
        message = refusal(sophon(copied, *PROTECT, NEW))
    assert "last good state is kept" in message
    assert set(tree(copied / "new")) == {"run.json", "state.safetensors"}
    assert read_state(copied / "new" / STATE_FILE).at.good_round == 1
    assert sophon(copied, "export", *PROTECT[1:], "checkpoint=new", "out=out").code == 0
    assert sophon(copied, *PROTECT, NEW).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == protected_sha256(made)
