"""Profile mode: some rounds under torch's profiler, its table and its trace beside the run's other files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sophon.errors import UserError
from sophon.files import write_bytes, write_text

TRACE_FILE = "profile.json.gz"  # for chrome://tracing or ui.perfetto.dev
TABLE_FILE = "profile.txt"
RECORDED = 2  # rounds, after one of warm-up
_ROWS = 30


@contextmanager
def profiled(folder: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Record `RECORDED` of ``rounds`` rounds; write `TABLE_FILE` and `TRACE_FILE` into ``folder``, and say the table.

    Yields:
        What is to be called at the end of each round. Results stay the same to the bit. A run that ends before the
        last recorded round writes nothing.

    Raises:
        UserError: a file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its start and stop appear on stderr
    on_cuda = torch.cuda.is_available()
    order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"

    def write(recorded: profile) -> None:
        table = recorded.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=40)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / TRACE_FILE
            try:
                recorded.export_chrome_trace(str(path))  # compressed, by its name
                trace = path.read_bytes()
            except OSError as error:
                raise UserError(f"profile: cannot write to {place} ({error.strerror}); set TMPDIR") from error
        write_bytes(folder / TRACE_FILE, trace)
        write_text(folder / TABLE_FILE, table)
        say(table)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    plan = schedule(wait=0, warmup=1, active=min(RECORDED, rounds - 1), repeat=1) if rounds > 1 else None
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
