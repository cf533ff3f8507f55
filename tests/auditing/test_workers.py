"""Jobs in processes of their own: the same results, and what happens when a job or a process goes wrong."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sophon.auditing.runner import Runner
from sophon.auditing.workers import run_jobs
from sophon.config import AttackConfig
from sophon.errors import UserError
from sophon.files import read_json
from sophon.tracking import Tracker
from tests.auditing.staging import (
    BENIGN,
    CONFIG,
    DISTILLED,
    FRESH,
    SEARCH,
    die,
    maker,
    refuse,
    staged,
)

pytestmark = pytest.mark.usefixtures("buildable")

EVERYTHING = replace(
    CONFIG,
    seeds=1,
    strategies={
        "a": FRESH,
        "b": replace(FRESH, steps=9, augmentation="strong", head="probed", probe_steps=2),
        "lora": replace(FRESH, scope="lora", lora_rank=1),
        "distilled": DISTILLED,
    },
    search={"tuned": SEARCH},
    benign=["a"],
    oracle="a",
)
# the trouble is the shortest job, so it comes last
TROUBLE = AttackConfig(seeds=2, eval_points=2, strategies={"a": FRESH, "trouble": replace(FRESH, steps=1)})


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """What an audit wrote, in the order of the keys, but for how fast the machine was."""
    return {
        str(path.relative_to(folder)): {key: value for key, value in read_json(path).items() if key != "seconds"}
        for path in sorted(folder.glob("*/*.json"))
    }


# --- one process --------------------------------------------------------------------------------------------------


def never() -> Runner:
    raise AssertionError("no process is needed")


def test_one_worker_needs_no_process(tmp_path: Path) -> None:
    stage = staged(tmp_path, replace(CONFIG, seeds=1))
    run_jobs(stage, never, 1, Tracker())
    assert stage.missing() == []
    assert not multiprocessing.active_children()


def test_neither_does_what_is_nearly_done(tmp_path: Path) -> None:
    stage = staged(tmp_path, replace(CONFIG, seeds=1))
    for path in list(stage.jobs)[:-1]:
        stage.run(path)
    for _ in range(2):  # with one job left, then with none
        run_jobs(stage, never, 4, Tracker())
        assert stage.missing() == []


def test_progress_goes_on_from_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = staged(tmp_path, replace(CONFIG, seeds=1))
    for path in list(stage.jobs)[:5]:
        stage.run(path)
    run_jobs(stage, never, 1, Tracker(progress=True))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("audit 6/6")


def test_a_refused_job_keeps_what_is_done(tmp_path: Path) -> None:
    stage = maker(tmp_path, TROUBLE, refuse)()
    with pytest.raises(UserError, match=r"^attack\.strategies\.trouble: refused$"):
        run_jobs(stage, never, 1, Tracker())
    assert len(files(tmp_path)) == 6


# --- several ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_results_do_not_depend_on_the_number_of_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = staged(tmp_path / "one", EVERYTHING, benign=BENIGN)
    run_jobs(alone, never, 1, Tracker())
    two = staged(tmp_path / "two", EVERYTHING, benign=BENIGN)
    # as an audit that was interrupted, so that some of it is there
    two.run(list(two.jobs)[5])
    capsys.readouterr()
    run_jobs(two, maker(tmp_path / "two", EVERYTHING), 2, Tracker(progress=True))
    assert capsys.readouterr().err.splitlines()[-1].startswith("audit 34/34")
    assert two.missing() == []
    found = files(tmp_path / "two")
    assert found == files(tmp_path / "one")
    assert [list(record) for record in found.values()] == [list(record) for record in files(tmp_path / "one").values()]
    assert len(found) == 4 * 3 + 3 + 1 + 3 * (1 + 2)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            die,
            "^workers: a process could not begin or died, perhaps for want of memory; the same command goes on, "
            "and fewer workers need less$",
        ),
        (refuse, r"^attack\.strategies\.trouble: refused$"),
    ],
)
def test_a_job_that_goes_wrong_ends_the_audit_in_one_line_and_what_is_finished_stays(
    trouble: Any, message: str, tmp_path: Path
) -> None:
    stage = staged(tmp_path, TROUBLE, benign=BENIGN)
    with pytest.raises(UserError, match=message):
        run_jobs(stage, maker(tmp_path, TROUBLE, trouble), 2, Tracker())
    assert not multiprocessing.active_children()
    # one of the others may have been under way
    assert 5 <= len(files(tmp_path)) <= 6
    run_jobs(stage, never, 1, Tracker())
    assert len(files(tmp_path)) == 12


SCRIPT = """
import signal
import sys
from pathlib import Path

from sophon.auditing.workers import run_jobs
from sophon.tracking import Tracker
from tests.auditing.staging import maker, wait
from tests.auditing.test_workers import TROUBLE

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background with SIGINT ignored
make = maker(Path(sys.argv[1]), TROUBLE, wait)
try:
    run_jobs(make(), make, 2, Tracker())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_audit_whatever_they_are_at(how: signal.Signals, tmp_path: Path) -> None:
    """Also when it is killed and can tell them nothing. All of them hold the pipe that is read here to its end."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
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
    assert len(files(tmp_path)) == 6
