"""What a command leaves open follows from the run's model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from sophon.cli.follow import following
from tests.tiny import slow

DENOISER = {"task": "denoising", "method": "sophon_dos", "relative": True, "optimizer": "adam"}
CLASSIFIER = {"task": "classification", "method": "sophon_klu", "relative": False, "optimizer": "nesterov"}


def composed(folder: Path, *arguments: str) -> dict[str, Any]:
    verb, *overrides = arguments
    with contextlib.chdir(folder):
        _, config = following([f"verb={verb}", *overrides], [])
    return {
        "task": config["task"]["name"],
        "method": config["method"]["name"],
        "relative": config["guard"]["relative"],
        "optimizer": config["pretrain"]["optimizer"],
    }


def checkpoint(folder: Path, library: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "sophon.json").write_text(json.dumps({"model": {"library": library}}))
    return folder


COMMANDS = [
    ["pretrain", "model=unet16_tiny"],
    ["protect", "name=mine", "seed=3"],
    ["protect", "reference=pipeline"],
    ["pretrain", "model.library=diffusers", "model.architecture=UNet2DModel"],
    ["pretrain", "model.weights=pipeline"],
    ["pretrain", "model.weights=a run"],
    ["protect", "reference=denoiser"],
    ["protect", "reference=a run"],
    ["audit", "checkpoint=denoiser"],
    ["sample", "checkpoint=denoiser"],
]


@pytest.mark.parametrize("arguments", slow(COMMANDS, COMMANDS[3:]), ids=" ".join)  # half a second each
def test_a_denoisers_task_loss_guard_and_pretraining_follow(tmp_path: Path, arguments: list[str]) -> None:
    checkpoint(tmp_path / "denoiser", "diffusers")
    checkpoint(tmp_path / "a run" / "checkpoint", "diffusers")
    checkpoint(tmp_path / "runs" / "mine" / "seed3" / "pretrain" / "checkpoint", "diffusers")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    assert composed(tmp_path, *arguments) == DENOISER


@pytest.mark.slow  # a third of a second each
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["protect", "reference=denoiser", "method=dos_pool"], DENOISER | {"method": "dos_pool"}),
        (["protect", "reference=denoiser", "guard=points"], DENOISER | {"relative": False}),
        (["protect", "reference=denoiser", "task=classification"], CLASSIFIER),
        (["protect", "reference=classifier"], CLASSIFIER),
        (["protect", "reference=classifier", "model=unet16_tiny"], CLASSIFIER),
        (["protect", "reference=nowhere"], CLASSIFIER),
        (["protect", "reference=broken"], CLASSIFIER),
        (["pretrain"], CLASSIFIER),
    ],
)  # fmt: skip
def test_what_is_chosen_stays(tmp_path: Path, arguments: list[str], expected: dict[str, Any]) -> None:
    checkpoint(tmp_path / "denoiser", "diffusers")
    checkpoint(tmp_path / "classifier", "timm")
    checkpoint(tmp_path / "broken", "timm").joinpath("sophon.json").write_text("{")
    assert composed(tmp_path, *arguments) == expected
