"""Every question to the file system has an answer or one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sophon import paths
from sophon.errors import UserError

QUESTIONS = [paths.exists, paths.is_folder, paths.is_file]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("folder", (True, True, False)),
        ("file", (True, False, True)),
        ("link", (True, True, False)),
        ("broken", (False, False, False)),
        ("none", (False, False, False)),
        ("file/below", (False, False, False)),
    ],
)
def test_answers(tree: Path, name: str, answers: tuple[bool, ...]) -> None:
    assert tuple(ask(tree / name) for ask in QUESTIONS) == answers


@pytest.mark.parametrize("ask", [*QUESTIONS, paths.entries])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("n" * 300, "File name too long"), ("loop", "Too many levels of symbolic links"), ("p/" * 3000, "too long")],
)
def test_what_the_file_system_refuses_is_one_line(tree: Path, ask: Callable, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^key: cannot read .*{reason}$") as caught:
        ask(tree / name, "key")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ask", QUESTIONS)
@pytest.mark.parametrize("name", ["nu\0ll", "lone \ud800"])
def test_a_name_that_no_file_can_have_is_one_printable_line(ask: Callable, name: str) -> None:
    with pytest.raises(UserError, match=r"^key: cannot read '") as caught:
        ask(name, "key")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("ask", [*QUESTIONS, paths.entries])
def test_a_folder_that_may_not_be_searched(tree: Path, ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:  # root may search every folder
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=rf"^cannot read {re.escape(str(tree))}: Permission denied$"):
        ask(tree)
