"""What a command imports before it works: help and refusals must not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "torchvision", "timm", "diffusers", "transformers", "torchmetrics", "optuna", "peft")
HEAVIER = ("matplotlib", "pandas", "scipy", "wandb", "sklearn", "PIL")

COMMAND = """
import sys
from sophon import cli

try:
    cli._main({arguments})
except SystemExit:
    pass
print(*{{name.split(".")[0] for name in sys.modules}}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["protect", "--help"],
        ["train"],
        ["protect", "method.round=1"],
        ["audit", "attack=smok"],
        ["protect", "method.rounds=0"],
        ["audit", "experiment=quickstart", "--cfg", "job"],
    ],
    ids=" ".join,
)
def test_help_and_refusals_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", COMMAND.format(arguments=arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "hydra" in loaded
    assert not loaded & {*HEAVY, *HEAVIER}
