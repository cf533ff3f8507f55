"""The commands of docs/models.md for latent pipelines, run as they stand there on small ones."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from tests.cli_helpers import REPOSITORY, sophon
from tests.models.pipelines import CLASSES, KINDS, folder_of
from tests.test_docs import commands

SMALL = ("tracking.progress=false", "task.sample_steps=2", "task.evaluation_images=6", "threads=1")
METHOD = ("method.rounds=1", "method.ntr_steps=1", "method.ntr_batch_size=3", "method.query_batch_size=3")
SAMPLER = ("sampler.steps=[1,1]", "sampler.batch_sizes=[3]")
STRATEGY = "{optimizer: adamw, lr: 1.0e-3, head: kept, steps: 1, batch_size: 3}"
SMALLER = {
    "protect": (*METHOD, *SAMPLER, "guard.every=1", "guard.tolerance=1000"),
    "audit": (
        *("attack.eval_points=2", "attack.samples=2", "attack.masking.heads=[]", "attack.roles=[protected]"),
        f"attack.strategies={{whole: {STRATEGY}}}",
    ),
}


def write(root: Path, seed: int) -> None:
    draws = np.random.default_rng(seed)
    for side, count in {"train": 8, "test": 2}.items():
        for name in CLASSES:
            (root / side / name).mkdir(parents=True)
            for number in range(count):
                image = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / side / name / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_commands(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "path/to/photos", 0)
    write(tmp_path / "path/to/paintings", 1)
    (tmp_path / "path/to/stable-diffusion").symlink_to(folder_of(kind))
    page = [line for line in commands(REPOSITORY / "docs" / "models.md") if "name=sd" in line or "runs/sd" in line]
    assert len(page) == 5
    for command in page:
        words = shlex.split(command)[1:]
        if kind == "classes":
            words = [word for word in words if "prompt" not in word]
        result = sophon(tmp_path, *words, *SMALL, *SMALLER.get(words[0], ()))
        assert result.code == 0, result.err
    assert DiffusionPipeline.from_pretrained(tmp_path / "sd-release").vae is not None
