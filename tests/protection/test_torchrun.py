"""protect under torchrun, from the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sophon.protection.resume import STATE_FILE, read_state
from sophon.protection.runner import Runner
from tests.cli_helpers import PRETRAIN, PROTECT, RUNS, load, refusal, sophon
from tests.protection.scenarios import SIZE
from tests.protection.test_distributed import environment


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}"]
    return subprocess.Popen(
        [*launcher, "-m", "sophon", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(err: str) -> set[str]:
    """The lines that are ours, each once."""
    return {line for line in err.splitlines() if line.startswith("sophon: ")}


TWO = (*PROTECT, "method.attackers=2", "device=cpu")


@pytest.mark.slow
def test_torchrun_protects(made: Path, tmp_path: Path) -> None:
    """It writes one checkpoint, reports once, and weights that are near those of one process."""
    reference = f"reference={made / RUNS / 'pretrain'}"
    process = torchrun(tmp_path, *TWO, reference, "run_dir=two")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("round 3 of 3") == 1, out
    assert sophon(tmp_path, *TWO, reference, "run_dir=one").code == 0
    states = [read_state(tmp_path / name / STATE_FILE) for name in ("one", "two")]
    assert states[0].at.history[0]["query_loss"] == pytest.approx(states[1].at.history[0]["query_loss"])
    for name, value in states[0].tensors["good"].items():
        torch.testing.assert_close(states[1].tensors["good"][name], value, rtol=0.1, atol=0.05)
    manifests = [load(tmp_path / name / "checkpoint" / "sophon.json") for name in ("one", "two")]
    assert manifests[0]["history"] == manifests[1]["history"]
    assert "already done" in sophon(tmp_path, *TWO, reference, "run_dir=two").out


@pytest.mark.slow
def test_torchrun_is_interrupted_and_one_process_goes_on(made: Path, tmp_path: Path) -> None:
    reference = f"reference={made / RUNS / 'pretrain'}"
    long = (*TWO, reference, "run_dir=run", "method.rounds=4000", "sampler.steps=[1,1]", "guard.every=2")
    process = torchrun(tmp_path, *long)
    try:
        while process.poll() is None and not (tmp_path / "run" / STATE_FILE).exists():
            signal.sigtimedwait((), 0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert said(err) == {"sophon: interrupted; the same command goes on"}, err
    done = read_state(tmp_path / "run" / STATE_FILE).at.round
    assert 0 < done < 4000
    result = sophon(tmp_path, "export", reference, "checkpoint=run", "out=out", *long[1 : len(long) - 5])
    assert result.code == 0, result
    process = start_alone(tmp_path, long)
    assert "going on" not in process.err
    assert process.code == 130, process
    assert said(process.err) == {"sophon: interrupted; the same command goes on"}
    assert read_state(tmp_path / "run" / STATE_FILE).at.round > done


def start_alone(folder: Path, command: tuple[str, ...]) -> Any:
    """Let one process go on with the run, and stop it once it has saved another state."""
    before = (folder / "run" / STATE_FILE).read_bytes()
    make = Runner.save

    def saved(self: Runner) -> None:
        make(self)
        if (folder / "run" / STATE_FILE).read_bytes() != before:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "save", saved)
        return sophon(folder, *command)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_verbs_run_in_one_process(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank says so for all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    result = sophon(tmp_path, *PRETRAIN)
    assert not list(tmp_path.iterdir())
    if rank == "0":
        message = refusal(result)
        assert message == "pretrain: runs as one process, but WORLD_SIZE is 2; only protect spreads over ranks"
    else:
        assert (result.code, result.err) == (2, "")
