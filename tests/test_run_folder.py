"""A run folder belongs to one run, and to one process at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from sophon.errors import UserError
from sophon.files import read_json
from sophon.locks import lock
from sophon.run_folder import owned, owned_place, refuse_another, run_folder

IDENTITY: dict[str, Any] = {"seed": 1, "model": {"architecture": "resnet18", "args": [1, 2]}}
HOLD = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
from sophon.run_folder import owned, owned_place, run_folder
with {block}:
    print("held", flush=True)
    sys.stdin.read()
"""


def visit(folder: Path, identity: dict[str, Any] = IDENTITY, verb: str = "protect", part: str = "") -> None:
    with run_folder(folder, verb, identity, part):
        pass


@contextmanager
def held(block: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold what ``block`` opens, until its standard input ends or it is killed."""
    command = [sys.executable, "-c", HOLD.format(block=block)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# ---- whose it is ----------------------------------------------------------------------------------------------------


def test_the_same_run_returns_to_its_folder(tmp_path: Path) -> None:
    with run_folder(tmp_path / "run", "protect", IDENTITY) as folder:
        assert folder == tmp_path / "run"
        record = read_json(folder / "run.json")
        (folder / "work").write_text("kept")
    assert {key: record[key] for key in ("format_version", "verb", "identity")} == {
        "format_version": 1,
        "verb": "protect",
        "identity": IDENTITY,
    }
    visit(tmp_path / "run", {"model": {"args": (1, 2), "architecture": "resnet18"}, "seed": 1})
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "work"]


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({**IDENTITY, "seed": 2}, "seed=1, now seed=2"),
        ({**IDENTITY, "model": {"architecture": "vgg", "args": [1, 2]}}, 'model.architecture="resnet18", now'),
        ({**IDENTITY, "model": {"architecture": "resnet18"}}, r"model.args=\[1, 2\], now model.args=absent"),
        ({**IDENTITY, "extra": None}, "extra=absent, now extra=null"),
    ],
)
def test_another_run_is_refused_with_the_key_that_differs(
    tmp_path: Path, identity: dict[str, Any], message: str
) -> None:
    visit(tmp_path)
    (tmp_path / "work").touch()
    for refusing in (visit, lambda folder, new: refuse_another(folder, "protect", new)):
        with pytest.raises(UserError, match=f"run_dir: .*{message}.*another run_dir"):
            refusing(tmp_path, identity)
    refuse_another(tmp_path, "protect", {"seed": 1})  # the rest is not decided yet


def test_where_nothing_was_saved_other_settings_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visit(tmp_path)
    refuse_another(tmp_path, "protect", {"seed": 2})
    with pytest.raises(UserError, match="now seed=2"):
        visit(tmp_path, {**IDENTITY, "seed": 2}, part="0of2")  # another part may be at work
    assert capsys.readouterr().err == ""
    visit(tmp_path, {**IDENTITY, "seed": 2})
    line = f"run_dir: '{tmp_path}' was made with seed=1, now seed=2; nothing was saved there, so it starts anew\n"
    assert capsys.readouterr().err == line
    assert read_json(tmp_path / "run.json")["identity"]["seed"] == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.json": '{"format_version": 1, "verb": "audit"}'}, "belongs to verb 'audit', not 'protect'"),
        ({"thesis.txt": ""}, r"not empty and holds no run\.json"),
        ({"run.json": "{"}, "truncated"),
        ({"run.json": "[]"}, "format version 1"),
        ({"run.json": '{"format_version": 9}'}, "format version 1"),
    ],
)
def test_other_folders_are_refused_and_left_as_they_are(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        visit(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run_dir: cannot (read|write) [^\n]*$"):
        visit(tmp_path / name)


def test_what_a_killed_process_had_begun_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".run.json.123.tmp").touch()
    (tmp_path / ".lock").write_text("process 1 on another machine")
    visit(tmp_path)
    (tmp_path / ".checkpoint.ab.tmp").mkdir()
    (tmp_path / ".checkpoint.ab.tmp" / "half").touch()
    (tmp_path / ".lock.0of2").touch()
    visit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_new_folder_stays_only_if_something_was_written(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        with owned(tmp_path / name) as folder:
            if name == "full":
                (folder / "work").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# ---- one at a time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "mine", "refused"),
    [
        ("owned(Path('run'))", lambda: owned("run"), True),
        ("owned(Path('run'))", lambda: run_folder("run", "audit", IDENTITY), True),
        ("run_folder('run', 'audit', {})", lambda: run_folder("run", "audit", {}, "0of2"), True),
        ("run_folder('run', 'audit', {}, '0of2')", lambda: run_folder("run", "audit", {}), True),
        ("run_folder('run', 'audit', {}, '0of2')", lambda: run_folder("run", "audit", {}, "0of2"), True),
        ("run_folder('run', 'audit', {}, '0of2')", lambda: run_folder("run", "audit", {}, "1of2"), False),
        ("owned(Path('run'))", lambda: owned("other"), False),
        ("owned_place('run')", lambda: owned_place("run"), True),
        ("owned_place('run')", lambda: owned_place("other"), False),
    ],
)
def test_a_second_process_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str, mine: Any, refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sophon.locks._PATIENCE", 0.1)
    expected = (
        pytest.raises(UserError, match=r"^(run_dir|out): 'run' is in use by .*; wait .*") if refused else nullcontext()
    )
    with held(theirs) as process:
        with expected as caught, mine():
            pass
        if caught and "of2" not in theirs:
            assert f"process {process.pid} on " in str(caught.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with mine():  # its lock died with it
            pass


def test_threads_of_one_process_are_two_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophon.locks._PATIENCE", 0.1)
    with owned(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), owned(tmp_path):
        pass


def test_a_child_does_not_keep_the_lock_of_a_parent_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with held("owned(Path('run')) as _, nullcontext(os.fork() or os._exit(len(sys.stdin.read())))") as process:
        process.kill()
        process.wait()
        with owned("run"):
            pass


def test_without_locks_the_work_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owned(tmp_path):
        pass
    assert capsys.readouterr().err == f"sophon: {tmp_path} has no locks; start no second process on it\n"


def test_who_waits_comes_next_and_locks_never_overlap(tmp_path: Path) -> None:
    inside, overlaps, rounds = [], [], 25

    def work() -> None:
        for _ in range(rounds):
            with lock(tmp_path / "lock", wait=True):
                inside.append(1)
                overlaps.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [1] * 4 * rounds
    assert not (tmp_path / "lock").exists()
