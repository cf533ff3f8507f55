"""Steps that wait for one another, several at a time, as processes whose processor time is known."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from sophon.tracking import Tracker


class StepFailed(Exception):  # noqa: N818 - says what happened, as GuardError does not
    """A step could not be done; what needs it is left out, and all else goes on."""


@dataclass(frozen=True)
class Step:
    """A piece of work.

    Attributes:
        name: of the step.
        minutes: of a core that it takes, for the time left.
        done: whether an earlier start did it.
        work: does it and returns a line on what came of it; raises `StepFailed`.
        needs: names of steps that come before.
    """

    name: str
    minutes: float
    done: Callable[[], bool]
    work: Callable[[], str]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, its processor time and its duration in seconds."""

    code: int
    core_seconds: float
    seconds: float


class Processes:
    """Commands that run side by side, each on one thread, and can be stopped together."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path) -> Outcome:
        """Run a command to its end, its output appended to ``log``.

        The processor time is the user and system time of the process and of those that it waited for.

        Raises:
            StepFailed: `stop` came before.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            start = time.monotonic()
            with self._lock:
                if self._stopped:
                    raise StepFailed("stopped")
                # a group of its own: an interrupt at the terminal reaches it once, through `stop`
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
                self._running.add(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                self._running.discard(process.pid)
            process.returncode = os.waitstatus_to_exitcode(status)
        return Outcome(process.returncode, usage.ru_utime + usage.ru_stime, time.monotonic() - start)

    def stop(self) -> None:
        """Ask what runs to save its state and end, and start nothing more."""
        with self._lock:
            self._stopped = True
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pid, signal.SIGTERM)


def run_steps(steps: Sequence[Step], jobs: int, processes: Processes, tracker: Tracker) -> dict[str, str]:
    """Do every step that is not done yet, ``jobs`` at a time, the first ones that can be done first.

    Returns:
        Why steps failed, by name.

    Raises:
        KeyboardInterrupt: after what was running has ended.
    """
    failed: dict[str, str] = {}
    over = {step.name for step in steps if step.done()}
    waiting = [step for step in steps if step.name not in over]
    running: dict[Future[str], Step] = {}
    past = sum(step.minutes for step in steps if step.name in over)
    shown = _Shown(past)
    total = round(past + sum(step.minutes for step in waiting))
    with ThreadPoolExecutor(jobs) as pool, tracker.progress("core-minutes", total, shown.whole) as advance:
        try:
            while waiting or running:
                for step in _ready(waiting, over)[: jobs - len(running)]:
                    waiting.remove(step)
                    lost = next((need for need in step.needs if need in failed), None)
                    running[pool.submit(_left_out if lost else step.work)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    step = running.pop(future)
                    over.add(step.name)
                    try:
                        note = future.result()
                    except StepFailed as error:
                        note = failed[step.name] = str(error)
                    tracker.say(f"{step.name}: {note}")
                    advance(step.name, shown.further(step.minutes))
        except BaseException:
            processes.stop()
            raise
    return failed


def _ready(waiting: Sequence[Step], over: set[str]) -> list[Step]:
    return [step for step in waiting if over.issuperset(step.needs)]


def _left_out() -> str:
    raise StepFailed("left out, since a step that it needs failed")


class _Shown:
    """Whole minutes for a bar that counts whole steps."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.whole = round(minutes)

    def further(self, minutes: float) -> int:
        before = self.whole
        self.minutes += minutes
        self.whole = round(self.minutes)
        return self.whole - before
