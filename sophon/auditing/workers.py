"""An audit's jobs, one after the other or side by side in processes of one machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from sophon.errors import UserError
from sophon.tracking import Tracker

if TYPE_CHECKING:
    from sophon.auditing.runner import Runner

_SIGN_OF_LIFE = 5.0  # seconds: after that a word that jobs are running, as often as the tracker says one


def run_jobs(runner: Runner, make: Callable[[], Runner], workers: int, tracker: Tracker) -> None:
    """Run what is missing of an audit.

    Args:
        make: makes the same runner again in another process; picklable.
        workers: processes; 1 runs the jobs in this one. The results do not depend on it.

    Raises:
        UserError: as a job's; or a process died.
    """
    missing = runner.missing()
    total = sum(job.cost for job in runner.jobs.values())
    left = sum(runner.jobs[path].cost for path in missing)
    with tracker.progress("audit", total, total - left) as advance:
        if workers == 1 or len(missing) < 2:
            _in_turn(runner, missing, advance)
        else:
            _side_by_side(runner, missing, make, min(workers, len(missing)), advance)


def _in_turn(runner: Runner, paths: Sequence[Path], advance: Callable[..., None]) -> None:
    for path in paths:
        trials = 0

        def on_trial(note: str) -> None:
            nonlocal trials
            trials += 1
            advance(note)

        note = runner.run(path, on_trial, lambda note: advance(note, steps=0))
        advance(note, steps=runner.jobs[path].cost - trials)


def _side_by_side(
    runner: Runner,
    paths: Sequence[Path],
    make: Callable[[], Runner],
    workers: int,
    advance: Callable[..., None],
) -> None:
    context = get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    reading, writing = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, _begin, (make, reading))
    try:
        paths_by_job = {executor.submit(_run, path): path for path in paths}
        running = set(paths_by_job)
        while running:
            done, running = wait(running, _SIGN_OF_LIFE, FIRST_COMPLETED)
            for job in done:
                advance(job.result(), steps=runner.jobs[paths_by_job[job]].cost)
            if not done:
                advance(f"{min(workers, len(running))} running", steps=0)
    except BrokenProcessPool as error:
        writing.close()
        raise UserError(
            "workers: a process could not begin or died, perhaps for want of memory; the same command goes on, "
            "and fewer workers need less"
        ) from error
    except BaseException:
        writing.close()  # tells the workers to end at once, whatever they are at
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        for end in (writing, reading):
            end.close()


_runner: Runner | UserError


def _begin(make: Callable[[], Runner], ended: Connection) -> None:
    """Set a worker up: it ends when the other end of ``ended`` is closed, also by the death of who held it."""
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted is the parent; it tells us
    threading.Thread(target=_end_with, args=(ended,), daemon=True).start()
    try:  # what gets out of here the executor prints as a traceback; so it is the first job that raises it
        _runner = make()
    except UserError as error:
        _runner = error
    except Exception as error:
        reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
        _runner = UserError(
            f"workers: a process could not begin ({reason}); the same command goes on, and fewer workers need less"
        )


def _end_with(ended: Connection) -> None:
    ended.poll(None)
    os._exit(1)


def _run(path: Path) -> str:
    if isinstance(_runner, UserError):
        raise _runner
    return _runner.run(path)
