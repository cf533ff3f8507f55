"""Measure one cell in a process of its own: `inner_loop.py` starts it with a job as JSON and reads the last line.

python experiments/benchmarks/measure.py '{"cell": "time", ...}'
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import Bench, Case, make
from methods import LEARNING_RATES, METHODS, Outcome, Work
from records import machine
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.protect.inner_loop import query_weights

OTHER = "other queries"  # the exact gradient of other query batches: how far apart any two draws are


@dataclass(frozen=True)
class Job:
    """A cell to measure.

    Attributes:
        cell: ``time`` or ``memory``.
        case: its sizes.
        steps: K.
        methods: keys of `METHODS`; one only for memory.
        device: ``cpu`` or ``cuda``.
        threads: of torch.
        repeats: rounds of the clock, after one that is not clocked; with 0 that one is, for cells of minutes.
        tolerance: largest difference between methods, relative to the norm of what is compared.
    """

    cell: str
    case: Case
    steps: int
    methods: tuple[str, ...]
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    tolerance: float = 1e-3

    @classmethod
    def read(cls, text: str) -> Job:
        """Make a job of what `json.dumps` made of `asdict`."""
        values = json.loads(text)
        return cls(**{**values, "case": Case(**values["case"]), "methods": tuple(values["methods"])})

    def write(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self))


class DisagreementError(Exception):
    """Methods that should find the same do not."""


class Runner:
    """One method on an attacker of its own, which starts from the same weights each time."""

    def __init__(self, name: str, bench: Bench, steps: int) -> None:
        method = METHODS[name]
        self.run = method.run
        self.bench = bench
        self.attacker = copy.deepcopy(bench.model)
        size = len(bench.adapt[0].labels)
        lr = LEARNING_RATES[method.optimizer]
        self.strategy = FineTuneStrategy(method.optimizer, lr, batch_size=size, steps=steps, head="kept")
        self.gammas = query_weights("uniform", steps, 1)

    def once(self, clock: Callable[[], float], seed: int = 0) -> tuple[float, Outcome]:
        """Run the simulation; return its seconds and what it ended with. Resetting the attacker is not clocked."""
        with torch.no_grad():
            state = self.bench.model.state_dict()
            for name, value in self.attacker.state_dict().items():
                value.copy_(state[name])
        self.attacker.zero_grad(set_to_none=True)
        work = Work(self.attacker, self.strategy, self.bench.task, *self.bench.streams(), self.gammas)
        torch.manual_seed(seed)  # a denoiser's noise
        gc.collect()  # `higher` leaves cycles behind
        start = clock()
        outcome = self.run(work)
        return clock() - start, outcome


def measure_time(job: Job) -> dict[str, Any]:
    """Clock the job's methods in turns, after a first turn that warms up and compares what they find.

    Raises:
        DisagreementError: two methods found different gradients or weights.
    """
    device = torch.device(job.device)
    bench = make(job.case, device, job.steps)
    clock = clock_of(device)
    runners = {name: Runner(name, bench, job.steps) for name in job.methods}
    gc.freeze()  # what is there now stays: collecting before each turn need not look at it
    first, found = {}, {}
    for name, runner in runners.items():
        first[name], outcome = runner.once(clock)
        found[name] = flat(outcome, bench.model)
    differences = disagreements(found)
    for what, difference in differences.items():
        if not difference <= job.tolerance:
            raise DisagreementError(f"{what} differ by {difference:.2g} of their norm; allowed is {job.tolerance:g}")
    if any(not METHODS[name].exact for name in found):
        other = replace(bench, query=make(job.case, device, job.steps, query_seed=3).query)
        found[OTHER] = flat(Runner("ours_first", other, job.steps).once(clock, seed=1)[1], bench.model)
    seconds: dict[str, list[float]] = {name: [] if job.repeats else [taken] for name, taken in first.items()}
    for _ in range(job.repeats):
        for name, runner in runners.items():
            seconds[name].append(runner.once(clock)[0])
    gc.unfreeze()
    return {
        "seconds": seconds,
        "disagreements": differences,
        "approximations": approximations(found),
        "bandwidth": bandwidth(device, clock),
    }


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return what tells seconds: of a single thread the process's own, to which other processes cannot add."""
    if device.type == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


Flat = dict[str, Tensor]


def flat(outcome: Outcome, start: nn.Module) -> Flat:
    """Copy what a simulation ended with as vectors on the CPU: the gradient, and the way that the weights went."""
    names = [name for name, _ in start.named_parameters()]
    found: Flat = {}
    with torch.no_grad():
        if outcome.gradients is not None:
            found["gradients"] = torch.cat([outcome.gradients[name].flatten() for name in names]).cpu()
        if outcome.weights:
            moved = [(outcome.weights[name] - parameter).flatten() for name, parameter in start.named_parameters()]
            found["weights"] = torch.cat(moved).cpu()
    return found


def disagreements(found: dict[str, Flat]) -> dict[str, float]:
    """Compare each exact method with the first of its kind.

    Gradients compare among methods of one order and one optimizer; weights among those of one optimizer, as the way
    that they went from the start.

    Returns:
        The norm of the difference by the norm of the first one's, by a text that names what is compared.
    """
    first: dict[tuple[object, ...], str] = {}
    differences = {}
    for name, vectors in found.items():
        method = METHODS[name]
        for what, vector in vectors.items() if method.exact else ():
            kind = (what, method.optimizer, method.order if what == "gradients" else None)
            reference = first.setdefault(kind, name)
            if reference != name:
                other = found[reference][what]
                differences[f"{what} of {name} and {reference}"] = float((vector - other).norm() / other.norm())
    return differences


def approximations(found: dict[str, Flat]) -> dict[str, dict[str, float]]:
    """Say how far the gradients of methods that are not exact, and of `OTHER`, are from the first exact one.

    Returns:
        For each the ``cosine``, and the ``difference``'s norm by the exact one's.
    """
    gradients = {name: vectors["gradients"] for name, vectors in found.items() if "gradients" in vectors}
    alike = [name for name in gradients if name != OTHER and METHODS[name].order == 1]
    exact = next((gradients[name] for name in alike if METHODS[name].exact), None)
    if exact is None:
        return {}
    return {
        name: {
            "cosine": float(torch.cosine_similarity(gradient, exact, dim=0)),
            "difference": float((gradient - exact).norm() / exact.norm()),
        }
        for name, gradient in gradients.items()
        if name == OTHER or not METHODS[name].exact
    }


def bandwidth(device: torch.device, clock: Callable[[], float], floats: int = 2**25) -> float:
    """Return the bytes/s of ``a += b`` on vectors too large for a cache: two reads and a write."""
    a, b = torch.zeros(floats, device=device), torch.ones(floats, device=device)
    best = float("inf")
    for _ in range(5):
        start = clock()
        a.add_(b)
        best = min(best, clock() - start)
    return 3 * 4 * floats / best


def measure_memory(job: Job) -> dict[str, Any]:
    """Return the bytes held before the simulation (model and batches loaded, nothing run yet) and at its peak.

    On the CPU they are the process's resident set, exact where freed blocks return to the system at once, which
    MALLOC_MMAP_THRESHOLD_ in the environment sees to; on CUDA they are what torch has allocated.
    """
    device = torch.device(job.device)
    runner = Runner(job.methods[0], make(job.case, device), job.steps)
    runner.bench.model.to("meta")  # one copy is the attacker; the other is not part of the simulation
    work = Work(runner.attacker, runner.strategy, runner.bench.task, *runner.bench.streams(), runner.gammas)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        runner.run(work)
        return {"loaded": loaded, "peak": torch.cuda.max_memory_allocated()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (proc(5))
    loaded = resident("VmRSS")
    runner.run(work)
    return {"loaded": loaded, "peak": resident("VmHWM")}


def resident(what: str) -> int:
    """Return bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak. Unlike getrusage's, no parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def measure(job: Job) -> dict[str, Any]:
    """Measure a job, and say where."""
    torch.set_num_threads(job.threads)
    found = {"time": measure_time, "memory": measure_memory}[job.cell](job)
    return {**found, "job": asdict(job), "machine": machine(torch.device(job.device))}


if __name__ == "__main__":
    try:
        print(json.dumps(measure(Job.read(sys.argv[1]))))
    except DisagreementError as disagreement:
        sys.exit(str(disagreement))
