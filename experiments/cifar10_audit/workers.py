"""How much faster two workers are than one: the same audit with each, in turns, on an idle machine of two cores.

    python experiments/cifar10_audit/workers.py sophon audit ... threads=1 run_dir=DIR

Prints the seconds of each pair and their ratio, start-up included, and whether both wrote the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from killed import without_times

PAIRS = 2


def seconds(command: list[str], workers: int, folder: Path) -> float:
    start = time.monotonic()
    subprocess.run([*command, f"workers={workers}", f"run_dir={folder}"], check=True, capture_output=True)
    return time.monotonic() - start


def main(command: list[str]) -> None:
    out = next(Path(each.removeprefix("run_dir=")) for each in command if each.startswith("run_dir="))
    command = [each for each in command if not each.startswith("run_dir=")]
    for pair in range(PAIRS):
        times = {workers: seconds(command, workers, out / f"{pair}-{workers}") for workers in (1, 2)}
        files = (out / f"{pair}-{workers}" / "audit.json" for workers in (1, 2))
        one, two = (without_times(json.loads(file.read_text())) for file in files)
        print(
            f"one {times[1]:.0f} s, two {times[2]:.0f} s, ratio {times[1] / times[2]:.2f}, same: {one == two}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1:])
