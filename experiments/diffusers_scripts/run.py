"""Run diffusers' own training scripts beside the package's attackers and compare their losses.

    python -m experiments.diffusers_scripts.run path/to/diffusers/examples

Both train the small pipeline of the tests on one image with the same timesteps and noise, in float32. So that nothing
else differs, the scripts' latents are the posterior's mean, adapters start from one seed, the prior image is given and
Textual Inversion has one sentence. `datasets`, which two scripts import, is stood in for.
"""

from __future__ import annotations

import importlib.machinery
import random
import runpy
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import diffusers
import numpy as np
import torch
import tqdm.auto
from PIL import Image
from torch import Tensor

from sophon.attacker import FineTuneStrategy
from sophon.auditing.lora import add_adapters
from sophon.config import ModelConfig
from sophon.domains import MemoryImages
from sophon.finetune import loop_of
from sophon.models import create, describe
from sophon.tasks import DenoisingTask
from tests.models.pipelines import CLASSES, folder_of

STEPS, TIMESTEPS = 6, 20
PLAN = FineTuneStrategy(
    optimizer="adamw", lr=0.01, weight_decay=0.01, max_norm=1.0, head="kept", batch_size=1, steps=STEPS
)
HALF, PRIOR = (np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in (0, 1))
IMAGE = np.concatenate([HALF[:, :4], HALF[:, 3::-1]], 1)  # symmetric, so that flips change nothing
SHARED = {"train_batch_size": 1, "max_train_steps": STEPS, "resolution": 8, "learning_rate": 0.01, "seed": 0}
SHARED |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}
GENUINE = {"randint": torch.randint, "add_adapter": diffusers.UNet2DConditionModel.add_adapter}


class Draws:
    """Gives the n-th image noised the n-th timestep and the n-th noise, in whatever batches they are asked for."""

    def __init__(self) -> None:
        self.timesteps, self.noises = (
            iter(torch.Generator().manual_seed(seed) for seed in range(first, first + 1000)) for first in (0, 1000)
        )

    def randint(self, *arguments: Any, **options: Any) -> Tensor:
        if TIMESTEPS not in arguments:
            return GENUINE["randint"](*arguments, **options)
        (count,) = next(part for part in arguments if isinstance(part, tuple))
        drawn = [GENUINE["randint"](TIMESTEPS, (1,), generator=next(self.timesteps)) for _ in range(count)]
        return torch.cat(drawn)

    def randn_like(self, images: Tensor) -> Tensor:
        return torch.stack([torch.randn(image.shape, generator=next(self.noises)) for image in images])


class OneImage(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A split of `datasets` with one image and its text."""

    column_names = ("image", "text")

    def with_transform(self, transform: Any) -> OneImage:
        self.transform = transform
        return self

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        ready = self.transform({"image": [Image.fromarray(IMAGE)], "text": ["a photo of a cat"]})
        return {name: ready[name][0] for name in ("pixel_values", "input_ids")}


def stand_in() -> types.ModuleType:
    """Return a module in place of `datasets`."""
    module: Any = types.ModuleType("datasets")
    module.load_dataset = lambda *arguments, **options: {"train": OneImage()}
    module.utils = mock.MagicMock()
    module.__spec__, module.__version__ = importlib.machinery.ModuleSpec("datasets", None), "2.19.1"
    return module


def by_script(path: Path, folder: Path, settings: dict[str, Any]) -> list[float]:
    """Return the losses of a script's steps."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # after sophon, which mends torchvision

    losses: list[float] = []
    draws, genuine_choice = Draws(), random.choice

    def postfix(bar: Any, *arguments: Any, **logs: float) -> None:
        losses.extend(value for name, value in logs.items() if "loss" in name)

    def sentence(options: Any) -> Any:
        return "a photo of {}" if "a photo of a {}" in options else genuine_choice(options)

    def adapter(network: Any, config: Any) -> None:
        torch.manual_seed(7)
        GENUINE["add_adapter"](network, config)

    given = SHARED | {"pretrained_model_name_or_path": folder_of("text"), "output_dir": folder / path.stem} | settings
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    with (
        mock.patch.multiple(torch, randint=draws.randint, randn_like=draws.randn_like),
        mock.patch.object(DiagonalGaussianDistribution, "sample", lambda found, generator=None: found.mode()),
        mock.patch.object(diffusers.UNet2DConditionModel, "add_adapter", adapter),
        mock.patch.object(accelerate.Accelerator, "init_trackers"),
        mock.patch.object(tqdm.auto.tqdm, "set_postfix", postfix),
        mock.patch.object(random, "choice", sentence),
        mock.patch.dict(sys.modules, datasets=stand_in()),
        mock.patch.object(sys, "argv", [path.name, *words]),
    ):
        runpy.run_path(str(path), run_name="__main__")
    return losses[:STEPS]


def by_package(plan: FineTuneStrategy, classes: tuple[str, ...], prompt: str) -> list[float]:
    """Return the losses of an attacker's steps."""
    draws, losses = Draws(), []
    model, spec = create(describe(ModelConfig(weights=str(folder_of("text")))), CLASSES)
    task = DenoisingTask(spec)
    images = MemoryImages(tensor_of(IMAGE), torch.zeros(1, dtype=torch.long), classes, (prompt,))
    if plan.scope == "lora":
        torch.manual_seed(7)
        add_adapters(model, plan.lora_rank, plan.lora_layers, set(), plan.lora_recipe)
    with (
        mock.patch.multiple(torch, randint=draws.randint, randn_like=draws.randn_like),
        mock.patch.object(task, "sample", lambda model, count, seed, prompts: tensor_of(PRIOR).repeat(count, 1, 1, 1)),
    ):
        generator = torch.Generator().manual_seed(3)
        loop_of(plan)(model, plan, task, images, generator, lambda step, loss: losses.append(loss))
    return losses


def tensor_of(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def pairs(examples: Path, folder: Path) -> Iterator[tuple[str, list[float], list[float]]]:
    """Give each script's name, its losses and the package's."""
    for name, pixels in (("instance", IMAGE), ("class", PRIOR)):
        (folder / name).mkdir()
        Image.fromarray(pixels).save(folder / name / "0.png")
    photo = (("cat",), "a photo of a cat")
    dataset = {"dataset_name": "x", "image_column": "image", "caption_column": "text"}
    lora = replace(PLAN, scope="lora", lora_layers="attention", lora_recipe="diffusers", lora_rank=4)
    prior = {"with_prior_preservation": True, "class_data_dir": folder / "class", "num_class_images": 1}
    prior |= {"instance_data_dir": folder / "instance", "instance_prompt": "a photo of a sks"}
    prior |= {"class_prompt": "a photo of a cat"}
    word = {"train_data_dir": folder / "instance", "placeholder_token": "<new>", "initializer_token": "c"}
    inversion = replace(PLAN, loop="textual_inversion", max_norm=None)
    for script, settings, attacker in (
        ("text_to_image/train_text_to_image.py", dataset | {"use_ema": True}, (replace(PLAN, ema=0.9999), *photo)),
        ("text_to_image/train_text_to_image_lora.py", dataset | {"rank": 4}, (lora, *photo)),
        ("dreambooth/train_dreambooth.py", prior, (replace(PLAN, loop="dreambooth"), ("cat",), "a photo of a sks")),
        ("textual_inversion/textual_inversion.py", word, (inversion, ("c",), "a photo of a c")),
    ):
        yield Path(script).name, by_script(examples / script, folder, settings), by_package(*attacker)


def main() -> None:
    """Print a row a script."""
    rows = ["| script | losses of its steps | the package's | largest relative difference |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, theirs, ours in pairs(Path(sys.argv[1]), Path(folder)):
            worst = max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))
            curves = (", ".join(f"{loss:.6f}" for loss in losses) for losses in (theirs, ours))
            rows.append(f"| {name} | {' | '.join(curves)} | {worst:.1e} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
