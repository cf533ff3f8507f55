"""Kill an audit at random moments, go on, and compare with one that was left alone.

    python experiments/cifar10_audit/killed.py KILLS SEED sophon audit ... run_dir=DIR

runs the command once in DIR/whole, and again and again in DIR/killed, ended by SIGKILL at KILLS random moments that are
spread over its length; then it compares the two audit.json, times aside. Exit code 1 if they differ.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    # a group of its own: a kill reaches the audit alone, and its workers have to notice by themselves
    return subprocess.Popen([*command, f"run_dir={folder}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def without_times(value: Any) -> Any:
    """Leave out what depends on how fast the machine was."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if not key.startswith("seconds")}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def main(kills: int, seed: int, command: list[str]) -> int:
    out = next(Path(each.removeprefix("run_dir=")) for each in command if each.startswith("run_dir="))
    command = [each for each in command if not each.startswith("run_dir=")]
    draw = random.Random(seed)
    start = time.monotonic()
    if run(command, out / "whole").wait():
        return 1
    whole = time.monotonic() - start
    print(f"left alone: {whole:.0f} s", flush=True)
    killed = 0
    while True:
        process = run(command, out / "killed")
        try:
            process.wait(draw.uniform(0.05, 0.6) * whole if killed < kills else None)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            attempts = len(list((out / "killed" / "attempts").glob("*.json")))
            print(f"kill {killed}: {attempts} attempts are whole", flush=True)
            continue
        break
    one, other = (json.loads((out / name / "audit.json").read_text()) for name in ("whole", "killed"))
    same = without_times(one) == without_times(other)
    print(f"{killed} kills, {one['attempts']} attempts: audit.json {'is the same' if same else 'DIFFERS'}")
    return 0 if same and process.returncode == 0 else 1


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
