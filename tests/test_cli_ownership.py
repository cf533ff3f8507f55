"""Two processes of any verb on one folder: the second is refused in one line and changes nothing."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from sophon.run_folder import owned, owned_place
from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, SMALL, make, refusal, sophon, tree

pytestmark = pytest.mark.slow  # whole commands

SHARD = (*AUDIT, "attack.shards=2", "attack.shard=0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pretrain, protect and audit have run."""
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    assert sophon(folder, *AUDIT).code == 0
    shutil.copytree(folder / RUNS / "audit", folder / "second")
    return folder


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophon.locks._PATIENCE", 0.0)


@pytest.mark.parametrize(
    ("command", "in_use"),
    [
        (PRETRAIN, owned(RUNS / "pretrain")),
        (PROTECT, owned(RUNS / "protect")),
        (AUDIT, owned(RUNS / "audit")),
        (AUDIT, owned(RUNS / "audit", "1of2")),
        (SHARD, owned(RUNS / "audit")),
        (SHARD, owned(RUNS / "audit", "0of2")),
        (("report", *SMALL), owned(RUNS / "audit")),
        (("report", "compare", str(RUNS / "audit"), "second"), owned(Path("runs/compare"))),
        (("export", *SMALL), owned_place(RUNS / "export")),
    ],
)
def test_the_second_one_is_refused(
    made: Path, command: tuple[str, ...], in_use: contextlib.AbstractContextManager[object]
) -> None:
    with contextlib.chdir(made), in_use:
        before = tree(made)
        message = refusal(sophon(made, *command))
        assert tree(made) == before
    assert "is in use by" in message
    assert "\n" not in message


def test_shards_share_a_folder(made: Path) -> None:
    with contextlib.chdir(made), owned(RUNS / "audit", "1of2"):
        assert sophon(made, *SHARD).code == 0
