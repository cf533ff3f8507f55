"""Protect with every method under one budget, and audit what comes of it.

    python experiments/strength/bench.py --runs runs/strength --reference runs/bench_c/seed0/pretrain \
        --minutes 3 --looks 4 --methods methods --seeds 0 1 2 --jobs 2

Breadth first: all methods with the first seed, then with the next. The same command goes on where it stopped, also with
more methods or seeds. A method of which no checkpoint satisfies the guard is a result; any other failure is said at the
end, leaves out what needs it, and is tried again by the next start. See README.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from cells import Bench, Budget, Cell, Controls
from rows import ROWS, chosen, read_rows
from schedule import Processes, Step, run_steps

import sophon  # noqa: F401 - declares torchvision's operators where its compiled part cannot load
from sophon.errors import UserError
from sophon.files import sha256_file
from sophon.models import classifiers, pipeline
from sophon.run_folder import run_folder
from sophon.tracking import Tracker

SOPHON = (sys.executable, "-m", "sophon")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="the bench's folder")
    parser.add_argument("--reference", type=Path, required=True, help="the unprotected checkpoint, or its run_dir")
    parser.add_argument("--minutes", type=float, default=3.0, help="processor time of each defender")
    parser.add_argument("--methods", nargs="+", default=["methods"], help="rows of methods.yaml, or groups of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--screen", action="store_true", help="a short audit, in a folder of its own")
    parser.add_argument("--jobs", type=int, default=1, help="commands side by side, each on one core")
    parser.add_argument("--rows", type=Path, default=ROWS, help="another table of methods")
    parser.add_argument("--experiment", default="bench_c")
    parser.add_argument("--attack", help="instead of bench_c, or with --screen of bench_c_screen")
    parser.add_argument("--looks", type=int, default=10, help="rounds of the shorter run by which a method is timed")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every command")
    options = parser.parse_args(arguments)
    for key, least in (("jobs", 1), ("looks", 1)):
        if getattr(options, key) < least:
            parser.error(f"--{key}: {getattr(options, key)} is not allowed; it must be >= {least}")
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes: {options.minutes} is not allowed; it must be > 0")
    return options


def bench_of(options: argparse.Namespace, program: Sequence[str], processes: Processes) -> Bench:
    """Open the bench's folder, or refuse one that was begun with another reference, budget or experiment."""
    identity = {
        "reference": sha256_file(_weights(options.reference)),
        "minutes": options.minutes,
        "looks": options.looks,
        "experiment": options.experiment,
        "attack": options.attack,
        "set": options.set,
    }
    with run_folder(options.runs, "strength", identity):  # only to see that it is this bench's: parts run side by side
        pass
    return Bench(
        options.runs,
        options.reference,
        options.minutes,
        "screen" if options.screen else "audit",
        options.attack or ("bench_c_screen" if options.screen else "bench_c"),
        options.experiment,
        tuple(options.set),
        options.looks,
        tuple(program),
        processes,
    )


def _weights(reference: Path) -> Path:
    for folder, name in product((reference, reference / "checkpoint"), (classifiers.WEIGHTS, pipeline.WEIGHTS)):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"--reference: '{reference}' holds no {classifiers.WEIGHTS}; give the run_dir of a sophon pretrain")


def steps_of(bench: Bench, rows: dict[str, list[str]], seeds: Sequence[int]) -> list[Step]:
    """Return all steps in the order in which they are wanted."""
    controls = Controls(bench)
    steps = [controls.step()]
    for index, seed in enumerate(dict.fromkeys(seeds)):
        for method, overrides in rows.items():
            budget = Budget(bench, method, tuple(overrides))
            steps += [budget.step()] if index == 0 else []
            steps += Cell(bench, method, tuple(overrides), seed).steps(budget, controls)
    return steps


def main(arguments: Sequence[str], program: Sequence[str] = SOPHON) -> int:
    """Run the bench; return its exit code: 0, 1 if a step failed, 2 for wrong input, 130 if interrupted."""
    options = parsed(arguments)
    processes, tracker = Processes(), Tracker(progress=True)
    try:
        rows = chosen(read_rows(options.rows), options.methods)
        bench = bench_of(options, program, processes)
        failed = run_steps(steps_of(bench, rows, options.seeds), options.jobs, processes, tracker)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"bench: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what runs in its background with SIGINT ignored
        signal.signal(number, _interrupt)
    sys.exit(main(sys.argv[1:]))
