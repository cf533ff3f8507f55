"""Project a whole protection, FTS and NTR, from a few measured rounds on random images.

    python experiments/benchmarks/whole_run.py --model resnet18 --device cuda --amp
    python experiments/benchmarks/whole_run.py --model caformer_m36 --device cuda --amp --compile --rounds 5
    python experiments/benchmarks/whole_run.py --model resnet18 --threads 2 --rounds 1 --k 5

The defaults are the SOPHON paper's setting: K 50, batch 150 (130 to adapt, 20 to query, as its public code cuts it),
one attacker and one NTR step a round, plain SGD, 800 rounds. Looks of the guard are not in it. Results:
whole_run_<device>.json, a cell for each setting, and the table of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CLASSES, forward_flops, make_model, random_batch
from formulas import Model, Round, round_flops
from records import machine, machines, markdown, put_cell

from sophon.config import MethodConfig
from sophon.devices import resolve_device
from sophon.domains import Domain, ImageSet
from sophon.errors import UserError
from sophon.files import write_text
from sophon.protect.fts import FTS
from sophon.protect.ntr import NTR
from sophon.strategies import SamplerConfig, StrategySampler
from sophon.tracking import Tracker

HERE = Path(__file__).parent
IMAGES = 2_000  # of each split
WHOLE = 800  # rounds of the paper
MATRIX = {"cpu": 1536, "cuda": 8192}


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of five; in float32 with TF32, as convolutions run."""
    size = MATRIX[device.type]
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    best = min(_clocked(lambda: matrix @ matrix, device) for _ in range(5))
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / best


def _clocked(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternation(options: argparse.Namespace, device: torch.device) -> tuple[Callable[[int], None], float]:
    """Make what takes one round, and count a round's FLOPs."""
    model, spec, task = make_model(options.model, device, amp=options.amp)
    reference, _, _ = make_model(options.model, device, amp=options.amp)
    generator = torch.Generator().manual_seed(0)
    images = {
        split: ImageSet(*random_batch(spec, IMAGES, generator, device), CLASSES)
        for split in ("adapt", "query", "train")
    }
    adapt = options.batch - options.query
    sampler = SamplerConfig({"sgd": [1e-4, 1e-4]}, batch_sizes=[adapt], steps=[options.k, options.k], heads=["kept"])
    method = MethodConfig(
        name="whole run",
        ntr_steps=1,
        attackers=options.attackers,
        query_batch_size=options.query,
        ntr_batch_size=options.batch,
    )
    work = Round(options.k, adapt, options.query, attackers=options.attackers, ntr_steps=1, ntr_batch=options.batch)
    task.train_mode(model, "all")
    few = random_batch(spec, 2, generator, device)
    size = Model(forward_flops(model, task, few), sum(parameter.numel() for parameter in model.parameters()), 0)
    restricted = Domain("random", CLASSES, images, {})
    fts = FTS(model, task, [restricted], StrategySampler(sampler), method, seed=0)
    ntr = NTR(model, reference, task, images["train"], method, seed=0)
    if options.compile:
        # the copies that attackers run on; a copy of a compiled model would not be compiled
        for module in (model, *fts.attackers.copies()):
            module.compile()

    def one(number: int) -> None:
        fts.step(number, 0)
        ntr.run(1, number)

    return one, round_flops(size, work)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Take the rounds of a setting; return the seconds of each, the first one (which warms up) apart."""
    device = resolve_device(options.device)
    one, flops = alternation(options, device)
    seconds = []
    tracker = Tracker(progress=True)
    with tracker.progress(f"rounds of {options.model}", options.rounds + 1) as advance:
        for number in range(options.rounds + 1):
            seconds.append(_clocked(lambda: one(number), device))  # noqa: B023 - called at once
            advance(f"{seconds[-1]:.2f} s")
    tracker.close()
    dtype = torch.bfloat16 if options.amp else torch.float32
    return {
        "first": seconds[0],
        "seconds": seconds[1:],
        "flops": flops,
        "peak": peak(device, dtype),
        "peak_memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "machine": machine(device),
    }


def page(cells: dict[str, Any]) -> str:
    """Return all settings as a Markdown table."""
    rows = []
    for name, cell in cells.items():
        a_round = statistics.median(cell["seconds"])
        memory = f"{cell['peak_memory'] / 1e9:.1f} GB" if cell["peak_memory"] else "-"
        rows.append(
            [
                name,
                f"{a_round:.3g} ({min(cell['seconds']):.3g} to {max(cell['seconds']):.3g}, n {len(cell['seconds'])})",
                f"{cell['first']:.3g}",
                f"{cell['flops'] / a_round / 1e12:.3g}",
                f"{cell['peak'] / 1e12:.3g}",
                f"{100 * cell['flops'] / a_round / cell['peak']:.0f} %",
                f"{WHOLE * a_round / 60:.3g} min",
                memory,
            ]
        )
    head = ["setting", "round, s", "first, s", "TFLOP/s", "peak", "of it", f"{WHOLE} rounds", "memory"]
    about = "".join(f"Measured on {line}.\n" for line in machines(cells))
    return f"# Whole run\n\n{about}\n{markdown(head, rows)}"


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: a value is out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a file of conf/model (resnet18)")
    parser.add_argument("--rounds", type=int, default=3, help="measured, after one that warms up (3)")
    parser.add_argument("--k", type=int, default=50, help="steps of an attacker (50)")
    parser.add_argument("--batch", type=int, default=150, help="images of an inner step, the query's among them (150)")
    parser.add_argument("--query", type=int, default=20, help="of these, those of the query (20)")
    parser.add_argument("--attackers", type=int, default=1, help="of a round (1)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="the results' file")
    options = parser.parse_args(arguments)
    if not 0 < options.query < options.batch:
        raise UserError(f"--query: {options.query} is not allowed; it must be 1 to {options.batch - 1}")
    options.out = options.out or HERE / f"whole_run_{options.device}.json"
    return options


def main(arguments: list[str]) -> None:
    """Measure one setting and put it into the results."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    adapt = options.batch - options.query
    name = f"{options.model}, K {options.k}, {adapt} + {options.query} images, N {options.attackers}"
    name += ", bf16" * options.amp + ", compiled" * options.compile
    cells = put_cell(options.out, name, measure(options))
    text = page(cells)
    write_text(options.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
