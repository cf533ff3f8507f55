"""Seconds of a round of two attackers on one rank and on two: whole `sophon protect` runs, in turns.

    python experiments/benchmarks/ranks.py FOLDER

FOLDER, which must be new, gets the runs. One thread a rank, so two free cores are needed. A run of few rounds is taken
from one of many: what is left are rounds alone, without starting and loading. Results: ranks.json beside this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from records import machine

from sophon.files import write_json

HERE = Path(__file__).parent
PAIRS = 3
FEW, MANY = 2, 12
ROUND = [
    "experiment=quickstart",
    "device=cpu",
    "threads=1",
    "tracking.wandb=disabled",
    "method.attackers=2",
    # the guard looks once, after the last round, and accepts everything
    "guard.every=1000000",
    "guard.tolerance=100",
]


def command(ranks: int, verb: str, *overrides: str) -> list[str]:
    """Return a `sophon` command, under torchrun where there is more than one rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "sophon", verb, *overrides]


def seconds(arguments: list[str]) -> float:
    """Run a command; return how long it took."""
    start = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def compare(folder: Path, clock: Callable[[list[str]], float] = seconds) -> dict[str, list[float]]:
    """Return the seconds of a round by ranks, one for each pair of runs."""
    reference = folder / "pretrain"
    clock(command(1, "pretrain", *ROUND, "pretrain.steps=1", f"run_dir={reference}"))
    found: dict[str, list[float]] = {"1": [], "2": []}
    for pair in range(PAIRS):
        for ranks in (1, 2):
            took = {}
            for rounds in (FEW, MANY):
                own = [f"reference={reference}/checkpoint", f"method.rounds={rounds}"]
                out = folder / f"{pair}-{ranks}-{rounds}"
                took[rounds] = clock(command(ranks, "protect", *ROUND, *own, f"run_dir={out}"))
            found[str(ranks)].append((took[MANY] - took[FEW]) / (MANY - FEW))
            print(f"pair {pair + 1} of {PAIRS}, {ranks} ranks: {found[str(ranks)][-1]:.2f} s a round", file=sys.stderr)
    return found


def main(folder: Path) -> None:
    """Compare, print and write."""
    found = compare(folder)
    one, two = (statistics.median(found[ranks]) for ranks in ("1", "2"))
    print(f"a round of two attackers: {one:.2f} s on one rank, {two:.2f} s on two, {one / two:.2f} times as fast")
    torch.set_num_threads(1)
    write_json(HERE / "ranks.json", {"seconds": found, "machine": machine(torch.device("cpu"))})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    chosen: Path = parser.parse_args().folder
    if chosen.exists():
        parser.error(f"FOLDER: '{chosen}' is there already; give a new one")
    main(chosen)
