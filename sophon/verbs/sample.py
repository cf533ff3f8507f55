"""The verb that lets a generating model draw."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sophon.api.common import required, run_dir, task_of, tracker_of
from sophon.auditing.gallery import image_grid
from sophon.checkpoint import read_checkpoint
from sophon.config import Config, default_folder
from sophon.devices import resolve_device
from sophon.errors import UserError
from sophon.files import write_bytes
from sophon.run_folder import owned
from sophon.seeds import derive_seed
from sophon.tasks import kind_of


def sample(config: Config) -> None:
    """Draw ``n`` images from a generating model; write them as one grid, ``run_dir/samples.png``."""
    with owned(run_dir(config)) as folder:
        path = folder / "samples.png"
        write_bytes(path, image_grid(_drawn(config, folder)))
    print(f"{path}: {config.n} images, {config.task.sample_steps} steps")


def _drawn(config: Config, folder: Path) -> Tensor:
    device = resolve_device(config.device)
    checkpoint = read_checkpoint(required(config.checkpoint or str(default_folder(config, "protect")), "checkpoint"))
    settings = replace(config.task, name=kind_of(checkpoint.spec))  # what the checkpoint is, needs no saying
    if settings.name != "denoising":
        raise UserError(f"checkpoint: '{checkpoint.path}' is a model of {settings.name}; give a denoiser's")
    task = task_of(replace(config, task=settings), checkpoint.spec, device)
    model = checkpoint.model.to(device)
    passes = math.ceil(config.n / task.evaluation_batch_size) * config.task.sample_steps
    with tracker_of(config, folder) as tracker, tracker.progress("sample", passes) as advance:
        hook = model.register_forward_hook(lambda *_: advance())
        images = task.sample(model, config.n, derive_seed(config.seed, "sample"), config.prompts)
        hook.remove()
    assert images is not None  # a denoiser draws
    return images
