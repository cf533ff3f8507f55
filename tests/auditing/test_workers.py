"""Jobs in processes of their own, and what happens when a job or a process goes wrong.

That audits come to the same results in several processes: tests/test_cli_audit.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sophon.auditing.workers import run_jobs
from sophon.errors import UserError
from sophon.tracking import Tracker
from tests.auditing.jobs import COSTS, Jobs, die, maker, refuse, unmakable
from tests.cli_helpers import REPOSITORY


def never() -> Any:
    raise AssertionError("no process is needed")


@pytest.mark.parametrize(("done", "workers"), [(0, 1), (5, 4), (6, 4)])
def test_one_worker_or_one_job_needs_no_process(done: int, workers: int, tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    for path in list(jobs.jobs)[:done]:
        jobs.run(path)
    run_jobs(jobs, never, workers, Tracker())
    assert jobs.missing() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_goes_on_from_what_is_done(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs(tmp_path)
    for path in list(jobs.jobs)[:2]:
        jobs.run(path)
    run_jobs(jobs, maker(tmp_path), workers, Tracker(progress=True))
    assert jobs.missing() == []
    assert capsys.readouterr().err.splitlines()[-1].startswith("audit 8/8")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("workers", "sign"), [(1, "a: step 0"), (2, "2 running")])
def test_long_jobs_give_a_sign_of_life(
    workers: int, sign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sophon.auditing.workers._SIGN_OF_LIFE", 0.01)
    monkeypatch.setattr("sophon.tracking._SECONDS_BETWEEN_LINES", 0.0)
    run_jobs(Jobs(tmp_path), maker(tmp_path), workers, Tracker(progress=True))
    assert sign in capsys.readouterr().err


DIED = "^workers: a process could not begin or died, perhaps for want of memory; the same command goes on, and fewer "


@pytest.mark.parametrize(
    ("workers", "make", "message", "done"),
    [
        (1, partial(maker, trouble=refuse), r"^attack\.strategies\.trouble: refused$", {4}),
        (2, partial(maker, trouble=refuse), r"^attack\.strategies\.trouble: refused$", {3, 4}),  # one may be under way
        (2, partial(maker, trouble=die), DIED, {3, 4}),
        (2, lambda folder: partial(unmakable, folder), r"^workers: .* begin \(RuntimeError: no memory\); ", {0}),
    ],
)
def test_what_goes_wrong_ends_in_one_line_and_what_is_finished_stays(
    workers: int, make: Any, message: str, done: set[int], tmp_path: Path
) -> None:
    jobs = Jobs(tmp_path, refuse)
    with pytest.raises(UserError, match=message):
        run_jobs(jobs, make(tmp_path), workers, Tracker())
    assert not multiprocessing.active_children()
    assert len(list(tmp_path.iterdir())) in done
    run_jobs(Jobs(tmp_path), never, 1, Tracker())
    assert len(list(tmp_path.iterdir())) == len(COSTS)


SCRIPT = """
import signal
import sys
from pathlib import Path

from sophon.auditing.workers import run_jobs
from sophon.tracking import Tracker
from tests.auditing.jobs import maker, wait

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background with SIGINT ignored
make = maker(Path(sys.argv[1]), wait)
try:
    run_jobs(make(), make, 2, Tracker())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_audit_whatever_they_are_at(how: signal.Signals, tmp_path: Path) -> None:
    """Also when it is killed and can tell them nothing. All of them hold the pipe that is read here to its end."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as audit:
        try:
            assert audit.stdout is not None
            assert [audit.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
            # a terminal sends Ctrl-C to all of them
            (os.killpg if how == signal.SIGINT else os.kill)(audit.pid, how)
            out, errors = audit.communicate(timeout=120)  # on a loaded machine an interpreter takes long to end
        finally:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(audit.pid, signal.SIGKILL)
    assert out == ""
    assert "Traceback" not in errors
    assert audit.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 4
