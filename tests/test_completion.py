"""Completion as bash asks for it, and the explanations of `--help GROUP`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sophon.cli.completion import complete
from sophon.cli.groups import choices
from sophon.config.keys import ANY, keys
from sophon.verbs import VERBS
from tests.cli_helpers import REPOSITORY, sophon


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("sophon ", VERBS),
        ("sophon pr", ["pretrain", "protect"]),
        ("sophon protect meth", ["method=", "method."]),
        ("sophon protect method.ntr_s", ["method.ntr_steps="]),
        ("sophon protect seed=1 ++method.rou", ["++method.rounds="]),
        ("sophon audit attack.mask", ["attack.masking."]),
        ("sophon audit attack.masking.h", ["attack.masking.heads="]),
        ("sophon protect +domain.original.ro", ["+domain.original.root="]),
        # bash replaces what stands after the last = or @
        ("sophon protect experiment=quickstart_d", ["quickstart_diffusion"]),
        ("sophon protect domain@domain.orig", ["domain.original="]),
        ("sophon protect domain@domain.original=", choices("domain")),
        ("sophon audit attack/family=lora", ["lora", "lora_attention"]),
        ("sophon protect profile=", ["true", "false"]),
        ("sophon protect method.engine=", ["first_order", "second_order"]),
        ("sophon protect --help samp", ["sampler", "sampler.heads"]),
        ("sophon protect --mul", ["--multirun"]),
        ("sophon protect nonsense", []),
        ("sophon protect run_dir=", []),
    ],
)
def test_the_last_word_is_completed(line: str, some: list[str]) -> None:
    found = complete(line)
    assert set(some) <= set(found)
    assert bool(some) is bool(found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path) -> None:
    """As a terminal does: the function that is installed fills in what follows the last word break."""
    (tmp_path / "sophon").write_text(f'#!/bin/bash\nexec {sys.executable} -m sophon "$@"\n')
    (tmp_path / "sophon").chmod(0o755)
    script = """
eval "$(sophon --completion bash)"
for line in "sophon prot" "sophon protect experiment=quickstart_d" "sophon protect method.ntr_s"; do
    COMP_LINE=$line COMP_POINT=${#line}
    _sophon 2>/dev/null
    echo "${COMPREPLY[*]}"
done
complete -p sophon
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:3] == ["protect", "quickstart_diffusion", "method.ntr_steps="]
    assert "-F _sophon sophon" in done.stdout


@pytest.mark.parametrize(
    ("word", "some"),
    [
        ("method", ["|sophon_klu|", "method.rounds: int = 100\n    how many alternations."]),
        ("gate", ["gate.worst_case: float | None = null", "gate.removal: float | None = null"]),
        ("guard", ["guard.relative: bool = false", "in percent of the reference's value"]),
        ("sampler", ["sampler.optimizers: dict[str, list[float] | None]"]),
        ("attack", ["attack.masking.heads: list[str]", "attack.search.NAME.trials: int = 64"]),
        ("domain", ["domain.original.classes: list[str] | None = null", "The keys of domain.original."]),
        ("model", ["model.library: str = timm"]),
        ("pretrain", ["pretrain.ema: float = 0.0"]),
        ("task", ["task=classification|denoising"]),
        ("tracking", ["tracking.wandb: str = disabled"]),
        ("strategy", ["attack.strategies.NAME.lr: float = 0.01\n    peak learning rate, > 0."]),
        ("run", ["seed: int = 0", "workers: int = 1"]),
        ("method.rounds", ["method.rounds: int = 100"]),
    ],
)
def test_help_explains_the_keys_of_a_group(word: str, some: list[str]) -> None:
    result = sophon(None, "protect", "--help", word)
    assert (result.code, result.err) == (0, "")
    for words in some:
        assert words in result.out
    assert "MISSING" not in result.out
    assert "???" not in result.out


def test_every_key_has_a_meaning() -> None:
    assert not [key.name for key in keys().values() if not key.meaning and not key.name.endswith(ANY)]
