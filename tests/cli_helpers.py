"""Run the command line inside the test's own process, and say what a folder holds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from sophon import cli

RUNS = Path("runs/quickstart/seed0")
REPOSITORY = Path(__file__).parents[1]

# The demonstration, at a size that takes a second.
SMALL = (
    "experiment=quickstart",
    "tracking=disabled",
    "tracking.progress=false",
    "threads=1",
    "domain.original.per_class=40",
    "domain.original.test_per_class=20",
    "domain.restricted.per_class=40",
    "domain.restricted.test_per_class=20",
)
PRETRAIN = (
    "pretrain",
    *SMALL,
    "pretrain.optimizer=adam",
    "pretrain.lr=0.005",
    "pretrain.steps=60",
    "pretrain.batch_size=32",
    "pretrain.augmentation=none",
)
PROTECT = (
    "protect",
    *SMALL,
    "method.rounds=3",
    "method.ntr_steps=2",
    "method.ntr_batch_size=16",
    "method.query_batch_size=16",
    "sampler=mixed",
    "sampler.steps=[1,2]",
    "sampler.batch_sizes=[16]",
    "guard.every=1",
    "guard.tolerance=100",
)
# `--config-dir` is how users bring groups of their own; `own_groups` writes this one.
AUDIT = ("audit", "--config-dir=own", *SMALL, "attack=tiny")
ATTACKS = {
    "momentum_kept": "{optimizer: momentum, lr: 0.01, head: kept, batch_size: 16, steps: 2}",
    "adam_fresh": "{optimizer: adam, lr: 0.005, head: fresh, batch_size: 16, steps: 4}",
    "adam_probed": "{optimizer: adam, lr: 0.005, head: probed, probe_steps: 2, steps: 2, data_budget: 20}",
}


@dataclass(frozen=True)
class Result:
    """What a command left behind: its exit code and its output."""

    code: int
    out: str
    err: str


def sophon(folder: Path | None, *arguments: str) -> Result:
    """Run ``sophon arguments...`` in ``folder`` (None: what writes nothing); undo what it does to this process."""
    argv, environment, threads = sys.argv, dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        sys.argv = ["sophon"]
        with contextlib.chdir(folder or Path()), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli._main(list(arguments))
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        GlobalHydra.instance().clear()
        cli._failed.clear()
        cli._finished.clear()
    return Result(code, out.getvalue(), err.getvalue())


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``sophon arguments...`` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sophon", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a process of `start`."""
    out, err = process.communicate(timeout=300)
    return Result(process.returncode, out, err)


def refusal(result: Result, code: int = 2) -> str:
    """Return the message of a command that failed as the contract says: its code, one line, no traceback."""
    assert result.code == code, result
    assert result.err.startswith("sophon: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n"), result.err
    assert len(result.err) > len("sophon: x\n"), result.err
    return result.err.removeprefix("sophon: ").rstrip("\n")


def tree(folder: Path) -> dict[str, str]:
    """Return every file and folder below ``folder``, hidden ones too, with a file's sha256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *command: str) -> str:
    """Run a command that must be refused and leave ``folder`` as it was; return its message."""
    before = tree(folder)
    message = refusal(sophon(folder, *command))
    assert tree(folder) == before
    return message


def load(path: Path) -> Any:
    """Read a JSON file that must hold no NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


def weights_sha256(checkpoint: Path) -> str:
    """Return the sha256 of a checkpoint's weights file."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def own_groups(folder: Path) -> None:
    """Write the attacks that `AUDIT` names."""
    group = folder / "own" / "attack"
    group.mkdir(parents=True)
    lines = [f"  {name}: {strategy}" for name, strategy in ATTACKS.items()]
    # as it ships, looking for masking takes longer than all of these attacks together
    general = ["seeds: 1", "eval_points: 2", "masking: {heads: [kept]}"]
    (group / "tiny.yaml").write_text("\n".join([*general, "strategies:", *lines, ""]))


def make(folder: Path) -> Path:
    """Make the reference and the protected checkpoint in their default folders; return ``runs/quickstart/seed0``."""
    own_groups(folder)
    for command in (PRETRAIN, PROTECT):
        result = sophon(folder, *command)
        assert result.code == 0, result
    return folder / RUNS


def image_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 12) -> Path:
    """Write small images in ``train/CLASS`` and ``test/CLASS``, no two alike."""
    generator = torch.Generator().manual_seed(len(classes))
    for side in ("train", "test"):
        for name in classes:
            (root / side / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / side / name / f"{index}.png")
    return root
