"""Time and peak memory of simulating one attacker, against the bare lower bound and what one would otherwise take.

    python experiments/benchmarks/inner_loop.py --threads 1                       # everything, hours
    python experiments/benchmarks/inner_loop.py --only 'time/resnet18/K50'        # one cell; the others stay
    python experiments/benchmarks/inner_loop.py --only 'memory/*/learn2learn' --missing
    python experiments/benchmarks/inner_loop.py --quick --list

A cell is ``time/CASE/K<K>``, all methods in turns in one process, or ``memory/CASE/K<K>/METHOD``, a process of its own.
Results: inner_loop_<device>.json and the table of it, inner_loop_<device>.md; see README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, facts, make
from formulas import Model, Round
from measure import Job
from methods import METHODS
from records import put_cell, read_cells
from tables import inner_loop_page

from sophon.devices import resolve_device
from sophon.errors import UserError
from sophon.files import write_text
from sophon.tracking import Tracker

HERE = Path(__file__).parent
# glibc then returns every large block to the system when it is freed, so that the resident set is what is in use
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
GB = 1e9

Measure = Callable[[Job], dict[str, Any]]


def in_a_process(job: Job) -> dict[str, Any]:
    """Measure a job in a process of its own.

    Raises:
        UserError: it failed; what it said stands above.
    """
    threads = {"OMP_NUM_THREADS": str(job.threads)}
    environment = {**os.environ, **threads, **(EXACT if job.cell == "memory" else {})}
    command = [sys.executable, str(HERE / "measure.py"), job.write()]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the process ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cells(options: argparse.Namespace, cases: dict[str, Case]) -> Iterator[tuple[str, Job]]:
    """Give each cell's name with its job, whatever it needs."""
    settings = {
        "device": options.device,
        "threads": options.threads,
        "repeats": options.repeats,
        "tolerance": options.tolerance,
    }
    for name, case in cases.items():
        for steps in case.steps:
            timed = tuple(method for method, each in METHODS.items() if each.timed)
            yield f"time/{name}/K{steps}", Job("time", case, steps, timed, **settings)
            for method, each in METHODS.items():
                if each.weighed:
                    yield f"memory/{name}/K{steps}/{method}", Job("memory", case, steps, (method,), **settings)


def fitting(job: Job, model: Model, limit: float, unwanted: Sequence[str] = ()) -> tuple[Job, dict[str, str]]:
    """Leave out unwanted methods and those that need more than ``limit`` bytes; return the rest, and the reasons."""
    left_out = {}
    for name in job.methods:
        if name in unwanted:
            left_out[name] = "left out to save time"
            continue
        work = Round(job.steps, job.case.adapt, job.case.query, optimizer=METHODS[name].optimizer)
        needed = METHODS[name].needs(model, work)
        if needed > limit:
            left_out[name] = f"needs about {needed / GB:.0f} GB, allowed are {limit / GB:.0f}"
    return dataclasses.replace(job, methods=tuple(m for m in job.methods if m not in left_out)), left_out


def run(chosen: dict[str, Job], options: argparse.Namespace, measure: Measure = in_a_process) -> bool:
    """Measure cells one after another, each written when it is done; return whether all could be measured."""
    sizes = {case: _facts(case, options.device) for case in dict.fromkeys(job.case for job in chosen.values())}
    costs = {name: max(1, round(_cost(job, sizes[job.case]) / GB)) for name, job in chosen.items()}
    good = True
    tracker = Tracker(progress=True)
    with tracker.progress("inner loop", sum(costs.values())) as advance:
        for name, job in chosen.items():
            model = sizes[job.case]
            fits, left_out = fitting(job, model, options.limit * GB, options.without)
            try:
                found = measure(fits) if fits.methods else {}
            except UserError as error:
                tracker.say(f"{name}: not measured: {error}")
                good = False
            else:
                last = put_cell(options.out, name, {**found, "not_run": left_out, "model": asdict(model)})
                write_text(options.out.with_suffix(".md"), inner_loop_page(last))
            advance(name, costs[name])
    tracker.close()
    return good


def _facts(case: Case, device: str) -> Model:
    return facts(make(dataclasses.replace(case, adapt=4, query=4), torch.device(device)))


def _cost(job: Job, model: Model) -> float:
    """FLOPs of a cell, roughly: what the time that is left is estimated by."""
    passes = 3 * job.steps * (job.case.adapt + job.case.query) * model.flops
    return passes * len(job.methods) * (job.repeats + 1 if job.cell == "time" else 1)


def available() -> float:
    """Return four fifths of the bytes that the machine has left, in GB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return 0.8 * 1024 * kilobytes / GB


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="cells to measure, such as 'time/*/K50'")
    parser.add_argument("--missing", action="store_true", help="leave out cells that the file has")
    parser.add_argument("--list", action="store_true", help="print the cells' names and measure nothing")
    parser.add_argument("--quick", action="store_true", help="batches of 4, K 1 and 2, two repeats: does it run?")
    parser.add_argument("--without", action="append", choices=list(METHODS), default=[], help="leave a method out")
    parser.add_argument(
        "--repeats", type=int, help="clocked turns of each method (5); 0: the first turn, which warms up"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit", type=float, help="GB that a method may need (four fifths of what is free)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference between methods (1e-3)")
    parser.add_argument("--out", type=Path, help="the results' file")
    options = parser.parse_args(arguments)
    resolve_device(options.device)
    if options.repeats is None:
        options.repeats = 2 if options.quick else 5
    if options.limit is None:
        options.limit = available() if options.device == "cpu" else 0.8 * torch.cuda.mem_get_info()[0] / GB
    if options.out is None:
        options.out = HERE / f"inner_loop_{options.device}{'_quick' if options.quick else ''}.json"
    return options


def main(arguments: list[str]) -> int:
    """Measure what the command line asks for; return the exit code."""
    options = parsed(arguments)
    cases = CASES
    if options.quick:
        small = {name: dataclasses.replace(case, adapt=4, query=4, steps=(1, 2)) for name, case in CASES.items()}
        cases = {name: small[name] for name in ("resnet_small", "resnet18", "unet32_small")}
    patterns = options.only or ["*"]
    known = read_cells(options.out) if options.missing else {}
    chosen = {
        name: job
        for name, job in cells(options, cases)
        if name not in known and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if options.list:
        print("\n".join(chosen))
        return 0
    if not chosen and not options.missing:
        print(f"--only: {', '.join(patterns)} names no cell; --list shows them", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    return 0 if run(chosen, options) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
