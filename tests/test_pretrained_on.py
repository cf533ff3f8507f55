"""`pretrain` on the original and the restricted classes together: what it reads, and what is released."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, load, own_groups, refused, sophon
from tests.denoising_commands import CONDITIONAL
from tests.denoising_commands import PRETRAIN as PRETRAIN_DENOISER
from tests.denoising_commands import RUNS as DENOISER

pytestmark = pytest.mark.slow  # whole commands

BOTH = ("domain.pretrained_on=both", "pretrain.steps=2")
KEPT = "domain.restricted_outputs=true"


def pretrained(folder: Path, *command: str, runs: Path = RUNS) -> dict:
    result = sophon(folder, *command, *BOTH)
    assert result.code == 0, result
    return load(folder / runs / "pretrain" / "checkpoint" / "sophon.json")


@pytest.mark.parametrize(
    ("command", "runs", "kept", "classes"),
    [
        (PRETRAIN, RUNS, (), 5),
        (PRETRAIN, RUNS, (KEPT,), 10),
        (PRETRAIN_DENOISER, DENOISER, (), 5),
        ((*PRETRAIN_DENOISER, CONDITIONAL), DENOISER, (), 5),
        ((*PRETRAIN_DENOISER, CONDITIONAL), DENOISER, (KEPT,), 15),
    ],
)
def test_what_is_released(tmp_path: Path, command: tuple[str, ...], runs: Path, kept: tuple[str], classes: int) -> None:
    found = pretrained(tmp_path, *command, *kept, runs=runs)
    original, restricted = found["domains"]["original"], found["domains"]["restricted"]
    assert found["pretrained_on"] == {original["name"]: ["train"], restricted["name"]: ["adapt", "query"]}
    assert set(restricted["hashes"]) == {"adapt", "query", "attack", "select", "test"}
    assert len(found["model"]["classes"]) == classes
    assert found["model"]["classes"][:5] == original["classes"]
    assert found["model"]["model_args"].get("num_class_embeds", classes) == classes


def test_a_reference_with_all_outputs_is_protected_and_audited(tmp_path: Path) -> None:
    own_groups(tmp_path)
    pretrained(tmp_path, *PRETRAIN, KEPT)
    fresh = ("sampler.heads=[fresh]", "method.rounds=1")
    for command in ((*PROTECT, *fresh), (*AUDIT, "attack.roles=[protected]")):
        result = sophon(tmp_path, *command)
        assert result.code == 0, result
    assert "momentum_kept" in load(tmp_path / RUNS / "audit" / "audit.json")["left_out"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.steps=0", ["domain.pretrained_on", "pretrain.steps=0"]),
        ("domain.restricted.labels=none", ["domain.restricted.labels", "none", "given"]),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refused(tmp_path, *PRETRAIN, *BOTH, override)
    assert all(word in message for word in words)
