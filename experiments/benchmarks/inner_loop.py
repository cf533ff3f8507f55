"""Time and peak memory of simulating one attacker, against the bare lower bound and what one would otherwise take.

    python experiments/benchmarks/inner_loop.py inner_loop.json                   # everything, hours on a CPU
    python experiments/benchmarks/inner_loop.py r.json --cases resnet_small --steps 5 20 --methods bound ours_first

Time: all methods of a case and K in turns in one process; memory: a process for each method. A cell is written when it
is done and not measured again, so the same command goes on; a table of all is printed in the end. See README.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import higher
import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophon.attacker import FineTuneStrategy, learning_rate
from sophon.config import ModelConfig
from sophon.domains import Batch
from sophon.models import create
from sophon.optimizers import build_optimizer
from sophon.protection.inner_loop import query_weights
from sophon.protection.meta_gradient.first_order import first_order
from sophon.protection.meta_gradient.second_order import second_order
from sophon.tasks import TASKS, Task, kind_of

CONF = Path(__file__).parents[2] / "conf" / "model"
# conf/model's name, images of an attacker's step, images of a query
CASES = {
    "resnet_small": ("resnet_small", 128, 128),
    "resnet18": ("resnet18", 16, 16),
    "unet32_small": ("unet32_small", 16, 16),
    "resnet18_150": ("resnet18", 150, 150),
}
# small, so that rounding does not grow along the trajectory into a difference between methods
RATE = 1e-3
TOLERANCE = 2e-2  # of the gradient's norm: after 50 steps another order of sums differs by 0.3 %
MB = 1e6


class Work(NamedTuple):
    """The arguments of the package's engines."""

    attacker: nn.Module
    strategy: FineTuneStrategy
    task: Task
    adapt: Iterator[Batch]
    query: Iterator[Batch]
    gammas: Sequence[float]

    def optimizer(self) -> torch.optim.Optimizer:
        """Put the attacker in training mode; return its optimizer."""
        return build_optimizer(self.strategy, self.task.train_mode(self.attacker, self.strategy.scope).values())

    def own_loss(self, model: nn.Module) -> Tensor:
        return self.task.attacker_loss(model, next(self.adapt))

    def query_loss(self, model: nn.Module) -> Tensor:
        return self.task.suppression_loss(model, next(self.query))


Gradients = Mapping[str, Tensor] | None


def plain(work: Work) -> Gradients:
    """Train as anyone would, without queries."""
    optimizer = work.optimizer()
    for _ in work.gammas:
        optimizer.zero_grad()
        work.own_loss(work.attacker).backward()
        optimizer.step()
    return None


def bound(work: Work) -> Gradients:
    """Train, with a forward and a backward pass on a query after each step; its gradients are thrown away."""
    optimizer = work.optimizer()
    for _ in work.gammas:
        work.own_loss(work.attacker).backward()
        optimizer.step()
        optimizer.zero_grad()
        work.query_loss(work.attacker).backward()
        optimizer.zero_grad()
    return None


class _Clone(nn.Module):
    """A module that runs with weights and buffers of its own instead of those of the module that it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.wrapped = module
        self.fast = {name: parameter.clone() for name, parameter in module.named_parameters()}
        self.statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.wrapped, {**self.fast, **self.statistics}, args, kwargs)


def learn2learn(work: Work) -> Gradients:
    """Do what learn2learn's first-order MAML does: out-of-place steps of a clone, all query losses backward at once."""
    work.task.train_mode(work.attacker, work.strategy.scope)
    clone, losses = _Clone(work.attacker), []
    for step, gamma in enumerate(work.gammas):
        gradients = torch.autograd.grad(work.own_loss(clone), list(clone.fast.values()))
        lr = learning_rate(work.strategy, step)
        moved = zip(clone.fast.items(), gradients, strict=True)
        clone.fast = {name: weight - lr * gradient for (name, weight), gradient in moved}
        losses.append(gamma * work.query_loss(clone))
    parameters = dict(work.attacker.named_parameters())
    meta = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
    return dict(zip(parameters, meta, strict=True))


def with_higher(work: Work, *, track: bool) -> Gradients:
    """Use `higher` as its README does; without ``track`` query gradients are summed as they come."""
    optimizer, parameters = work.optimizer(), dict(work.attacker.named_parameters())
    settings = {"copy_initial_weights": False, "track_higher_grads": track}
    # flash attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH), higher.innerloop_ctx(work.attacker, optimizer, **settings) as (model, steps):
        for module in model.modules():  # diffusers slices its lists of modules, which are of `higher`'s classes here
            if isinstance(module, nn.ModuleList):
                type(module).__getitem__ = lambda modules, index: list(modules)[index]  # type: ignore[method-assign]
        losses: list[Tensor] = []
        total = [torch.zeros_like(parameter) for parameter in parameters.values()]
        for gamma in work.gammas:
            steps.step(work.own_loss(model))
            losses.append(gamma * work.query_loss(model))
            if not track:
                gradients = torch.autograd.grad(losses.pop(), list(model.parameters()))
                total = [a + b for a, b in zip(total, gradients, strict=True)]
        meta = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values())) if track else total
    return dict(zip(parameters, meta, strict=True))


def ours_first(work: Work, *, every: int = 1, amp: bool = False) -> Gradients:
    """Use the package's first-order engine; with fewer queries or in bfloat16 it finds another gradient."""
    task = copy.copy(work.task)
    task.amp = amp
    return first_order(
        *work._replace(task=task, gammas=query_weights("uniform", len(work.gammas), every=every))
    ).gradients


METHODS: dict[str, Callable[[Work], Gradients]] = {
    "plain": plain,
    "bound": bound,
    "ours_first": ours_first,
    "ours_first_fifth": lambda work: ours_first(work, every=5),
    "ours_first_bf16": lambda work: ours_first(work, amp=True),
    "ours_first_fifth_bf16": lambda work: ours_first(work, every=5, amp=True),
    "learn2learn": learn2learn,
    "higher_first": lambda work: with_higher(work, track=False),
    "ours_second": lambda work: second_order(*work).gradients,
    "ours_second_root": lambda work: second_order(*work, segment=math.isqrt(len(work.gammas))).gradients,
    "higher_second": lambda work: with_higher(work, track=True),
}
SAME = (("ours_first", "learn2learn", "higher_first"), ("ours_second", "ours_second_root", "higher_second"))


class Bench:
    """A case made: random weights (seed 0) and random images, the same on every call."""

    def __init__(self, case: str, steps: int, batch: int | None, distinct: int) -> None:
        name, adapt, query = CASES[case]
        settings = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"))
        torch.manual_seed(0)
        self.model, self.spec = create(OmegaConf.to_object(settings), tuple("0123456789"))
        kind = kind_of(self.spec)
        self.task = TASKS[kind](self.spec, suppression_loss={"classification": "ice", "denoising": "dos"}[kind])
        size = batch or adapt
        self.strategy = FineTuneStrategy("sgd", RATE, batch_size=size, steps=steps, head="kept")
        self.gammas = query_weights("uniform", steps, 1)
        self.adapt = [self.batch(size) for _ in range(distinct)]
        self.query = [self.batch(batch or query) for _ in range(distinct)]

    def batch(self, count: int) -> Batch:
        shape = (count, self.spec.channels, self.spec.image_size, self.spec.image_size)
        return Batch(torch.randint(0, 256, shape, dtype=torch.uint8), torch.randint(0, 10, (count,)))

    def work(self) -> Work:
        torch.manual_seed(0)  # a denoiser's noise
        attacker = copy.deepcopy(self.model)
        return Work(attacker, self.strategy, self.task, cycle(self.adapt), cycle(self.query), self.gammas)


def measure_time(bench: Bench, methods: Sequence[str], turns: int) -> dict[str, list[float]]:
    """Return seconds of the process by method; a turn before the clock starts warms up and compares gradients."""
    meta = {name: METHODS[name](bench.work()) for name in methods}
    for alike in SAME:
        first, *others = [name for name in alike if name in meta] or [""]
        for other in others:
            apart = math.sqrt(sum(float((meta[first][key] - meta[other][key]).square().sum()) for key in meta[first]))
            norm = math.sqrt(sum(float(value.square().sum()) for value in meta[first].values()))
            if not apart <= TOLERANCE * norm:
                sys.exit(f"{other} differs from {first} by {apart / norm:.2g} of its norm; allowed is {TOLERANCE:g}")
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for name in list(methods) * turns:
        work = bench.work()
        gc.collect()  # `higher` leaves cycles behind
        start = time.process_time()
        METHODS[name](work)
        seconds[name].append(time.process_time() - start)
    return seconds


def measure_memory(bench: Bench, method: str) -> dict[str, list[float]]:
    """Return the bytes of the process's resident set when model and batches are loaded, and at the peak."""
    work = bench.work()
    bench.model.to("meta")  # one copy is the attacker; the other is not part of the simulation
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (proc(5))
    loaded = _resident("VmRSS")
    METHODS[method](work)
    return {method: [loaded, _resident("VmHWM")]}


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def child(cell: Mapping[str, Any]) -> None:
    """Measure one cell in this process and print it."""
    torch.set_num_threads(1)
    memory, methods = cell["kind"] == "memory", cell["methods"]
    bench = Bench(cell["case"], cell["steps"], cell["batch"], 4 if memory else cell["steps"])
    values = measure_memory(bench, *methods) if memory else measure_time(bench, methods, cell["turns"])
    where = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps({**cell, "values": values, "machine": where, "date": time.strftime("%Y-%m-%d", time.gmtime())}))


def table(cells: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each case and K, a column for each method: its time by the bound's (median), or MB."""
    rows = []
    for cell in cells:
        for method, values in cell["values"].items():
            if cell["kind"] == "memory":
                value = (values[1] - values[0]) / MB
            else:
                least = cell["values"].get("bound", [1.0] * len(values))
                value = statistics.median(own / other for own, other in zip(values, least, strict=True))
            what = "MB above the loaded model" if cell["kind"] == "memory" else "time by the bound's"
            rows.append({"what": what, "case": cell["case"], "K": cell["steps"], "method": method, "value": value})
    return pd.DataFrame(rows).pivot_table(index=["what", "case", "K"], columns="method", values="value", sort=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON line for each cell")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5, 20, 50, 200])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, help="images of a step and of a query, instead of the case's")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    shared = {key: getattr(options, key) for key in ("batch", "turns")}
    for kind, case, steps in product(("time", "memory"), options.cases, options.steps):
        for methods in [[name] for name in options.methods] if kind == "memory" else [options.methods]:
            cell = {"kind": kind, "case": case, "steps": steps, "methods": methods, **shared}
            if any(cell.items() <= done.items() for done in known):
                continue
            # glibc then returns every large block when it is freed: what is resident is in use
            exact = {"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "memory" else {}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **exact}
            command = [sys.executable, __file__, json.dumps(cell)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{kind} {case} K={steps} {' '.join(methods)}: not measured", file=sys.stderr)
                continue
            known.append(json.loads(done.stdout.splitlines()[-1]))
            options.results.write_text("".join(json.dumps(cell) + "\n" for cell in known))
    print(table(known).to_string(float_format="{:.3g}".format, na_rep="-"))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        child(json.loads(sys.argv[1]))
    else:
        main()
