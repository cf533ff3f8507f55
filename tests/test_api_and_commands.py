"""The command line and the calls from Python: the same inputs give the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import sophon
from sophon.config import DomainConfig
from sophon.config.shipped import chosen
from tests.cli_helpers import RUNS, SMALL, load, weights_sha256

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*no better than a guess")]  # whole commands


def identity(folder: Path) -> dict:
    return load(folder / "run.json")["identity"]


def bundled(name: str, role: str) -> DomainConfig:
    given = dict(part.split("=") for part in SMALL)
    limits = {key: int(given[f"domain.{role}.{key}"]) for key in ("per_class", "test_per_class")}
    split = {"val_fraction": 0.2} if role == "original" else {}  # as experiment=quickstart has it
    return DomainConfig(**chosen("domain", name) | limits | split)


def test_both_make_the_same_model_and_the_same_audit(
    audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(audited, tmp_path / "copied"))
    original, restricted = bundled("fashion_clothes", "original"), bundled("fashion_shoes_bags", "restricted")
    asked = identity(RUNS / "protect")
    choices = {"method": asked["method"], "attackers": asked["sampler"], "guard": asked["guard"]}
    result = sophon.protect(RUNS / "pretrain", original, restricted, **choices, run_dir="mine")
    assert identity(Path("mine")) == asked
    assert weights_sha256(Path("mine/checkpoint")) == weights_sha256(RUNS / "protect" / "checkpoint")
    # so that one goes on where the other was
    taken_over = sophon.protect(RUNS / "pretrain", original, restricted, **choices, run_dir=RUNS / "protect")
    assert all(map(torch.equal, taken_over.model.state_dict().values(), result.model.state_dict().values()))

    report = sophon.audit(result, attacks=identity(RUNS / "audit")["attack"], run_dir="audited")
    assert identity(Path("audited")) == identity(RUNS / "audit")
    ours, theirs = (
        {path.name: json.loads(path.read_text()) | {"seconds": 0} for path in (folder / "attempts").iterdir()}
        for folder in (Path("audited"), RUNS / "audit")
    )
    assert ours == theirs
    assert report.verdict.sentence == load(RUNS / "audit" / "audit.json")["verdict"]["sentence"]
