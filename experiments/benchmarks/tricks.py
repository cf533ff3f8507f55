"""What makes the first-order engine cheaper, and what does not: each trick against the same work without it.

    python experiments/benchmarks/tricks.py --threads 1                    # all but torch.compile, on resnet_small
    python experiments/benchmarks/tricks.py --case resnet18 --only 'fused*'
    python experiments/benchmarks/tricks.py --compile                      # minutes: it compiles first

The work with and without a trick takes turns in one process, so that whatever else the machine does meets both alike.
With one thread on the CPU the clock is the process's own time, which other processes cannot add to; else the wall's.
Results: tricks_<device>.json, a cell for each trick of a case, replaced alone, and its table, tricks_<device>.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import same_weights
import torch
import trick_pairs
from cases import CASES, Bench, make
from measure import clock_of
from records import machine, machines, markdown, put_cell, read_cells
from torch import Tensor
from trick_pairs import Pair, Work, engine, stepper

from sophon.devices import resolve_device
from sophon.files import write_text

HERE = Path(__file__).parent
SHORTEST = 0.02  # seconds: shorter work is repeated until its turn takes this long


@dataclass(frozen=True)
class Trick:
    """One trick.

    Attributes:
        what: it is.
        unit: of work that it is measured on.
        pair: makes that work without and with it.
        kept: whether the package does it.
        compiles: whether it takes minutes before it begins.
    """

    what: str
    unit: str
    pair: Callable[[Bench], Pair]
    kept: str
    compiles: bool = False


TRICKS = {
    **{
        f"engine/{name}": Trick(
            "the engine; without: its lower bound", f"4 steps, {name}", partial(engine, kind=name), "-"
        )
        for name in ("sgd", "adam")
    },
    "query_every": Trick("a query every 4th step", "4 steps, sgd", trick_pairs.query_every, "method.query_every"),
    "layers_once": Trick("BatchNorm layers looked up once", "freeze statistics", trick_pairs.layers_once, "yes"),
    "added_by_autograd": Trick("autograd adds to the total in place", "pass", trick_pairs.added_by_autograd, "yes"),
    "first_is_total": Trick("the total begins as the first gradient", "2 passes", trick_pairs.first_is_total, "yes"),
    "no_graph": Trick("no graph of what does not move", "pass, scope head", trick_pairs.no_graph_of_the_rest, "yes"),
    **{
        f"fused/{name}": Trick(f"fused {name}", "optimizer step", partial(stepper, kind=name, fused=True), kept)
        for name, kept in {"adam": "yes", "adamw": "yes", "momentum": "no", "adagrad": "yes"}.items()
    },
    **{
        f"foreach/{name}": Trick(f"foreach {name}", "optimizer step", partial(stepper, kind=name, foreach=True), "no")
        for name in ("momentum", "rmsprop", "adadelta")
    },
    "gradients_reused": Trick("the attacker's gradients in kept buffers", "pass", trick_pairs.gradients_reused, "no"),
    "optimizer_reused": Trick("one optimizer for all attackers", "4 Adam steps", trick_pairs.optimizer_reused, "no"),
    "layout": Trick("weights in channels_last", "pass", trick_pairs.layout, "yes"),
    "half": Trick("bfloat16 autocast", "pass", trick_pairs.half, "amp=all"),
    "marked": Trick("marks for a profiler", "2 passes", trick_pairs.marked, "yes"),
    "one_forward": Trick("query and attacker: one forward pass", "both gradients", same_weights.one_forward, "no"),
    "mapped": Trick("query and attacker: vmap", "both gradients", same_weights.mapped, "no"),
    "compiled": Trick("torch.compile", "pass", trick_pairs.compiled, "no", compiles=True),
}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    path = HERE / f"tricks_{device.type}.json"
    for name, trick in TRICKS.items():
        if fnmatch.fnmatch(name, arguments.only) and (arguments.compile or not trick.compiles):
            cell = measured(trick, arguments.case, device, arguments.turns)
            print(f"{arguments.case}/{name}: {cell['ratio']:.3f}", flush=True)
            put_cell(path, f"{arguments.case}/{name}", cell)
    write_text(path.with_suffix(".md"), page(read_cells(path)))


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, default="resnet_small", help="a classifier's")
    parser.add_argument("--only", default="*", help="a pattern of tricks")
    parser.add_argument("--compile", action="store_true", help="those that compile too")
    parser.add_argument("--turns", type=int, default=15, help="of each side")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def measured(trick: Trick, case: str, device: torch.device, turns: int) -> dict[str, Any]:
    """Measure one trick.

    Returns:
        ``seconds`` of the work without and with the trick, medians over the turns; the ``ratio`` of these and its
        ``quartiles`` over pairs of turns; the ``difference`` of what the two find, by its norm; the
        ``first_seconds`` of the wall clock that the trick's first run takes.
    """
    without, within, found = trick.pair(make(CASES[case], device))
    without()
    start = time.perf_counter()
    within()
    first = time.perf_counter() - start
    difference = relative(*found()) if found else None
    seconds = interleaved(without, within, turns, clock_of(device))
    middle = [statistics.median(side) for side in seconds]
    pairs = statistics.quantiles([b / a for a, b in zip(*seconds, strict=True)], n=4)
    return {
        "case": case,
        "seconds": middle,
        "ratio": middle[1] / middle[0],
        "quartiles": [pairs[0], pairs[2]],
        "difference": difference,
        "first_seconds": first,
        "machine": machine(device),
    }


def interleaved(without: Work, within: Work, turns: int, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Let two works take turns, the first to begin changing each time; return the seconds of each."""
    repeats = max(1, round(SHORTEST / max(timed(without, 1, clock), 1e-7)))
    timed(within, repeats, clock)
    seconds: tuple[list[float], list[float]] = [], []
    for turn in range(turns):
        for side in (0, 1) if turn % 2 else (1, 0):
            seconds[side].append(timed((without, within)[side], repeats, clock))
    return seconds


def timed(work: Work, repeats: int, clock: Callable[[], float]) -> float:
    """Return the seconds of one run of the work."""
    start = clock()
    for _ in range(repeats):
        work()
    return (clock() - start) / repeats


def relative(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference by the norm of the first."""
    return float((other.double() - one.double()).norm() / one.double().norm())


def page(cells: dict[str, Any]) -> str:
    """Return the table of all cells as Markdown."""
    head = ["case", "trick", "measured on", "without, ms", "with / without (quartiles)", "difference", "kept"]
    rows = []
    for name, cell in cells.items():
        trick = TRICKS[name.split("/", 1)[1]]
        low, high = cell["quartiles"]
        difference = "-" if cell["difference"] is None else f"{cell['difference']:.1g}"
        ratio = f"{cell['ratio']:.3f} ({low:.3f} to {high:.3f})"
        without = f"{1e3 * cell['seconds'][0]:.3g}"
        unit = f"{trick.unit}, the first takes {cell['first_seconds']:.0f} s" if trick.compiles else trick.unit
        rows.append([cell["case"], trick.what, unit, without, ratio, difference, trick.kept])
    lines = "".join(f"Measured on {line}.\n" for line in machines(cells))
    return f"# Tricks of the first-order engine\n\n{lines}\n{markdown(head, rows)}"


if __name__ == "__main__":
    main()
