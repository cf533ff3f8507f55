"""Two processes of any verb on one folder: the second is refused in one line and changes nothing."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from sophon.run_folder import owned, owned_place
from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, SMALL, refusal, sophon, tree

pytestmark = pytest.mark.slow  # whole commands

SHARD = (*AUDIT, "attack.shards=2", "attack.shard=0")


@pytest.fixture(scope="module")
def copied(audited: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(audited, tmp_path_factory.mktemp("ownership") / "copied"))
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
    copied: Path, command: tuple[str, ...], in_use: contextlib.AbstractContextManager[object]
) -> None:
    with contextlib.chdir(copied), in_use:
        before = tree(copied)
        message = refusal(sophon(copied, *command))
        assert tree(copied) == before
    assert "is in use by" in message
    assert "\n" not in message


def test_shards_share_a_folder(copied: Path) -> None:
    with contextlib.chdir(copied), owned(RUNS / "audit", "1of2"):
        assert sophon(copied, *SHARD).code == 0
