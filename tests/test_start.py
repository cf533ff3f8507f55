"""What a command imports before it works: help and refusals must not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec
from pathlib import Path

import pytest

from sophon._torchvision import OnFirstImport
from sophon.errors import UserError
from sophon.verbs import VERBS
from tests.cli_helpers import REPOSITORY

LIBRARIES = {
    "torchvision",
    "timm",
    "diffusers",
    "transformers",
    "optuna",
    "peft",
    "scipy",
    "matplotlib",
    "pandas",
    "wandb",
}

FOLDER = [f"domain@domain.{role}=folder" for role in ("original", "restricted")]
COMMANDS = [
    ["--help"],
    ["protect", "--help"],
    ["train"],
    ["protect", "method.round=1"],
    ["audit", "attack=smok"],
    ["protect", "method.rounds=0"],
    ["audit", "experiment=quickstart", "--cfg", "job"],
    ["pretrain", *FOLDER, "domain.original.root=nowhere"],
    ["protect", *FOLDER, "domain.original.root=."],  # and no folder data for the restricted one
    ["pretrain", *FOLDER, "domain.original.root=.", "model.weights=a.pth"],
    ["audit", *FOLDER, "domain.original.root=.", "domain.restricted.root=.", "checkpoint=a.pth"],
]
CODE = f"""
import contextlib, sys
from sophon import cli

for arguments in {COMMANDS}:
    with contextlib.suppress(SystemExit):
        cli._main(arguments)
    print(*{{name.split(".")[0] for name in sys.modules}}, file=sys.stderr)
"""


def loaded(folder: Path, code: str) -> list[set[str]]:
    """Run code in a process of its own; return the packages of each line that it wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stderr.splitlines() if not line.startswith("sophon: ")]


@pytest.mark.slow
def test_help_and_refusals_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    for arguments, packages in zip(COMMANDS, loaded(tmp_path, CODE), strict=True):
        assert "hydra" in packages
        assert not packages & {"torch", "numpy", *LIBRARIES}, arguments


@pytest.mark.slow
def test_a_verb_waits_for_no_library_before_it_knows_which_it_needs(tmp_path: Path) -> None:
    imports = "\n".join(f"import {module.split(':')[0]}" for module in VERBS.values())
    [packages] = loaded(tmp_path, f"{imports}\nimport sys\nprint(*sys.modules, file=sys.stderr)")
    assert "torch" in packages
    assert not packages & LIBRARIES


def test_a_torchvision_that_does_not_fit_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    finder = OnFirstImport()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    spec = finder.find_spec("torchvision", [str(tmp_path)])
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(
        UserError, match=r"^torchvision .* beside torch .* cannot be imported \(operator .*\); install a m"
    ):
        spec.loader.exec_module(module_from_spec(spec))
