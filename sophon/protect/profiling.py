"""Profile mode: where the time of a round goes, and how much of what the device can do it gets out of it.

torch's profiler records a few rounds; the table is computed from its trace alone. Times and FLOPs so come from the same
operators (rounds differ: attackers are sampled), and nothing but the clock tells a profiled run from another.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from sophon.errors import UserError
from sophon.protect.trace import ELSE, ROUND, Cost, Summary, summarise
from sophon.runs import write_bytes, write_text

TRACE_FILE = "profile.json.gz"
TABLE_FILE = "profile.txt"
WARM_UP = 1  # rounds of this call before the recorded ones
RECORDED = 2  # rounds
IDLE = "device idle"
_OPERATORS_SHOWN = 5
_PEAK_SIZES = {"cpu": 2048, "cuda": 8192}
_PEAK_SECONDS = 0.5
_WIDTH, _NAME = 100, 50


@dataclass(frozen=True)
class Profile:
    """Records `RECORDED` rounds after `WARM_UP` of them, then switches itself off.

    Attributes:
        folder: gets `TRACE_FILE` (for chrome://tracing or ui.perfetto.dev) and `TABLE_FILE`, those of an earlier call
            replaced.
        device: where the rounds compute.
        enabled: whether to record at all.
        amp: they compute in bfloat16.
        say: told the table.
        rank: which process of the run this is; only 0 records.
    """

    folder: Path
    device: torch.device
    enabled: bool = True
    amp: bool = False
    say: Callable[[str], None] = print
    rank: int = 0

    @contextmanager
    def over(self, done: int, rounds: int) -> Iterator[Callable[[], None]]:
        """Yield what is to be called at the end of each round.

        The last round is recorded however few there are: without warm-up if it is the only one. A run that ends in the
        middle of a recording leaves no files.

        Args:
            done: rounds done before this call.
            rounds: of the whole run.

        Raises:
            UserError: from the yielded function: a file cannot be written.
        """
        if not self.enabled or self.rank or done >= rounds:
            yield lambda: None
            return
        recording = self._record(done, rounds)
        next(recording)
        try:
            yield lambda: next(recording)
        finally:
            recording.close()

    def _record(self, done: int, rounds: int) -> Generator[None]:
        """Advance by a round each time; see `over`."""
        warm_up = min(WARM_UP, rounds - done - 1)
        first = done + warm_up + 1
        for _ in range(warm_up):
            yield
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its start and stop appear on stderr
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, record_shapes=True) as recorded:
            self._wait()
            for number in range(first, min(first + RECORDED, rounds + 1)):
                with record_function(f"{ROUND}{number}"):
                    yield
                    self._wait()
        self._write(recorded, f"after {warm_up} round of warm-up" if warm_up else "without warm-up")
        while True:
            yield

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write(self, recorded: profile, started: str) -> None:
        trace = _trace_of(recorded)
        dtype = torch.bfloat16 if self.amp else torch.float32
        size, peak = measure_peak(self.device, dtype)
        where = f"CPU, {torch.get_num_threads()} thread(s)"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        measured = f"matmul, {str(dtype).removeprefix('torch.')}, {size} x {size}"
        text = table(summarise(json.loads(trace)), peak, measured, f"{where}, {started}")
        write_bytes(self.folder / TRACE_FILE, gzip.compress(trace))
        write_text(self.folder / TABLE_FILE, text)
        self.say(text.rstrip())


OFF = Profile(Path(), torch.device("cpu"), enabled=False)


def _trace_of(recorded: profile) -> bytes:
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"profile: no trace can be written below {tempfile.gettempdir()} ({error.strerror}); set TMPDIR, or false"
        ) from error


def measure_peak(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """Return the size of a square matrix product that fits, and the FLOP/s of the fastest of several.

    The global generators stay as they are.
    """
    size = _PEAK_SIZES[device.type]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        while size > 1 and 3 * size**2 * dtype.itemsize > free / 2:
            size //= 2
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    product = a @ b
    best, end = math.inf, time.perf_counter() + _PEAK_SECONDS
    while best == math.inf or time.perf_counter() < end:
        product[0, 0].item()  # waits for the device
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return size, 2 * size**3 / best


def table(summary: Summary, peak: float, measured: str, setting: str) -> str:
    """Lay a summary out on one screen.

    Args:
        summary: the figures.
        peak: FLOP/s of the device, > 0.
        measured: what that was measured with.
        setting: of the recorded rounds, for the title.
    """
    busy = math.fsum(cost.device_seconds for cost in summary.costs.values())
    whole = max(summary.seconds, busy)
    flop = sum(cost.flop for cost in summary.costs.values())
    grid = Table("region", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("calls", "seconds", *(["on device"] if summary.on_device else []), "share", "GFLOP", "GFLOP/s"):
        grid.add_column(name, justify="right")
    for name, cost in summary.costs.items():
        calls = "" if name == ELSE else str(cost.calls)
        grid.add_row(name, calls, *_cells(cost, whole, summary.on_device))
    if summary.on_device:
        grid.add_row(IDLE, "", "", f"{whole - busy:.3f}", _percent(whole - busy, whole))
    grid.add_section()
    grid.add_row("total", "", *_cells(Cost(0, summary.seconds, whole, flop), whole, summary.on_device))
    achieved = flop / summary.seconds
    dearest = sorted(summary.operators.items(), key=lambda item: -item[1])[:_OPERATORS_SHOWN]
    lines = [
        f"Peak {_giga(peak)} GFLOP/s ({measured}); achieved {_giga(achieved)}, {_percent(achieved, peak)} of it.",
        "GFLOP: matrix products, convolutions, attention. Dearest operators (self time):",
        *(f"{_percent(spent, whole):>9} {spent:10.3f} s  {name[:_NAME]}" for name, spent in dearest),
    ]
    return _plain(f"Profile of {', '.join(summary.rounds)}; {setting}", grid, "\n".join(lines))


def _plain(*parts: str | Table) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=_WIDTH, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines()) + "\n"


def _cells(cost: Cost, whole: float, on_device: bool) -> list[str]:
    spent = cost.device_seconds if on_device else cost.seconds
    return [
        f"{cost.seconds:.3f}",
        *([f"{cost.device_seconds:.3f}"] if on_device else []),
        _percent(spent, whole),
        _giga(cost.flop),
        _giga(cost.flop / spent) if cost.flop and spent else "",
    ]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _giga(value: float) -> str:
    return f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:.3g}"
