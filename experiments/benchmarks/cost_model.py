"""Predict the benchmark's cells from the cost model, and what a far larger model would need.

    python experiments/benchmarks/cost_model.py [experiments/benchmarks/inner_loop_cpu.json]

Prints Markdown. Formulas: `formulas.py`, explained in README.md.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from formulas import (
    Device,
    Model,
    Round,
    achieved,
    communicated,
    protection_memory,
    round_flops,
    round_seconds,
    second_order_memory,
    second_order_seconds,
    simulation_seconds,
)
from methods import METHODS, root
from records import markdown, read_cells

CALIBRATION = 5  # the K whose bound says what the device achieves on a case, or the nearest that was measured
H200 = Device(flops=0.4 * 989e12, bandwidth=0.7 * 4.8e12, link=0.5 * 450e9)
H200_MEMORY = 141e9
DAY = 86_400
ROUNDS = 800


def _root_seconds(model: Model, work: Round, device: Device) -> float:
    return second_order_seconds(model, work, device, root(work.steps))


SECONDS: dict[str, Callable[[Model, Round, Device], float]] = {
    **dict.fromkeys(("ours_first", "learn2learn", "higher_first", "ours_first_adam"), simulation_seconds),
    "ours_second": partial(second_order_seconds, segment=1),
    "ours_second_root": _root_seconds,
    "higher_second": second_order_seconds,
}


def time_rows(cells: Mapping[str, Any]) -> list[list[str]]:
    """Predict every method's seconds from one measured bound of each case; one row a cell and method."""
    timed = {name: cell for name, cell in cells.items() if "seconds" in cell}
    rows = []
    for case in dict.fromkeys(name.split("/")[1] for name in timed):
        own = {name: cell for name, cell in timed.items() if name.split("/")[1] == case}
        nearest = min(own, key=lambda name: abs(own[name]["job"]["steps"] - CALIBRATION))
        device = _calibrated(own[nearest])
        for cell in sorted(own.values(), key=lambda cell: cell["job"]["steps"]):
            for method, predict in SECONDS.items():
                if method in cell["seconds"]:
                    predicted = predict(Model(**cell["model"]), _round(cell, method), device)
                    rows.append(_row(case, cell, method, predicted, statistics.median(cell["seconds"][method]), "s"))
    return rows


def _calibrated(cell: Mapping[str, Any]) -> Device:
    bound = statistics.median(cell["seconds"]["bound"])
    return achieved(Model(**cell["model"]), _round(cell, "bound"), bound, cell["bandwidth"])


def memory_rows(cells: Mapping[str, Any]) -> list[list[str]]:
    """Predict every measured peak above the loaded model, from the model's sizes alone."""
    rows = []
    for name, cell in cells.items():
        if "peak" in cell:
            method = name.split("/")[3]
            predicted = METHODS[method].needs(Model(**cell["model"]), _round(cell, method))
            rows.append(
                _row(name.split("/")[1], cell, method, predicted / 1e6, (cell["peak"] - cell["loaded"]) / 1e6, "MB")
            )
    return rows


def _round(cell: Mapping[str, Any], method: str) -> Round:
    job = cell["job"]
    return Round(job["steps"], job["case"]["adapt"], job["case"]["query"], optimizer=METHODS[method].optimizer)


def _row(case: str, cell: Mapping[str, Any], method: str, predicted: float, measured: float, unit: str) -> list[str]:
    values = [f"{predicted:.3g} {unit}", f"{measured:.3g} {unit}", f"{predicted / measured:.2f}"]
    return [case, str(cell["job"]["steps"]), method, *values]


def large_unet(parameters: float = 2e9, positions: float = 1024, fan_in: float = 2000, kept: float = 4) -> Model:
    """Guess a large diffusion U-Net's sizes.

    Args:
        parameters: how many.
        positions: of the image at which a weight is used, on average over the weights: two FLOPs each.
        fan_in: inputs of an output value; a forward pass so writes FLOPs / (2 fan_in) values.
        kept: tensors that the backward pass needs of each such value (product, normalised, activated, summed), bf16.
    """
    flops = 2 * parameters * positions
    activations = flops / (2 * fan_in) * kept * 2
    return Model(flops, parameters, activations, graph=2 * activations)


def forecast(model: Model, work: Round, device: Device, memory: float, rounds: int) -> list[tuple[str, str]]:
    """Say what a protection needs, one image in a pass (gradients accumulate: fit for models without BatchNorm)."""
    alone = Round(**{**vars(work), "ranks": 1})
    spread = Round(**{**vars(work), "ranks": work.attackers})
    held = protection_memory(model, work, micro=1)
    whole = rounds * round_seconds(model, alone, device)
    exact = min(second_order_memory(model, Round(work.steps, 1, 1, optimizer=work.optimizer), s) for s in range(1, 51))
    return [
        ("forward pass of an image", f"{model.flops / 1e12:.1f} TFLOP, keeps {model.activations / 1e9:.1f} GB"),
        ("a round", f"{round_flops(model, alone):.2g} FLOP"),
        ("a round on one device", f"{round_seconds(model, alone, device):.0f} s"),
        (f"a round on {spread.ranks} ranks", f"{round_seconds(model, spread, device):.0f} s"),
        (f"sent by each of {spread.ranks} ranks in a round", f"{communicated(model, spread) / 1e9:.0f} GB"),
        (f"{rounds} rounds on {spread.ranks} ranks", f"{rounds * round_seconds(model, spread, device) / DAY:.1f} days"),
        ("memory of a rank", f"{held / 1e9:.0f} GB"),
        ("devices by memory", f"{math.ceil(held / memory)} a rank"),
        (f"devices by time, {rounds} rounds in a day", str(math.ceil(whole / DAY))),
        ("second order, at the best segment, besides", f"{exact / 1e9:.0f} GB"),
    ]


def main(arguments: list[str]) -> None:
    """Print the comparison, if there are results, and the forecast."""
    path = Path(arguments[0]) if arguments else Path(__file__).with_name("inner_loop_cpu.json")
    cells = read_cells(path)
    head = ["case", "K", "method", "predicted", "measured", "predicted / measured"]
    for title, rows in (("Time", time_rows(cells)), ("Memory", memory_rows(cells))):
        if rows:
            print(f"## {title}\n\n{markdown(head, rows)}")
    work = Round(50, 130, 20, attackers=8, ntr_steps=1, ntr_batch=150, optimizer="adam")
    rows = [list(row) for row in forecast(large_unet(), work, H200, H200_MEMORY, ROUNDS)]
    print("## A U-Net of two billion parameters\n\n" + markdown(["what", "figure"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
