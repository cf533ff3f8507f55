"""What the scripts of this folder share: the original domain, and training by labels and a reference's answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.config import DomainConfig
from sophon.domains import Batch, ImageSet, LoadedDomain, load_original, load_restricted
from sophon.errors import UserError
from sophon.finetune import fine_tune
from sophon.models import ModelSpec
from sophon.tasks import ClassificationTask
from sophon.tracking import Tracker

DOMAINS = Path(__file__).parents[2] / "conf" / "domain"


def add_options(parser: argparse.ArgumentParser, *, steps: int, lr: float) -> None:
    """Add what both commands are told; ``steps`` and ``lr`` are their defaults."""
    parser.add_argument("--reference", type=Path, required=True, help="the unprotected checkpoint, or its run_dir")
    parser.add_argument("--steps", type=int, default=steps, help=f"of 128 images ({steps})")
    parser.add_argument("--lr", type=float, default=lr, help=f"Nesterov's, warmed up and along a cosine ({lr})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--original", default="cifar10_folder", help="a file of conf/domain")
    parser.add_argument("--no-amp", dest="amp", action="store_false", help="float32 instead of bfloat16")


def add_attack_options(parser: argparse.ArgumentParser) -> None:
    """Add what the scripts are told that attack weights."""
    parser.add_argument("--reference", type=Path, required=True, help="the unprotected checkpoint, or its run_dir")
    parser.add_argument("--restricted", default="objects_a", help="a file of conf/domain")
    parser.add_argument("--seed", type=int, default=0)


def original_domain(name: str, spec: ModelSpec) -> LoadedDomain:
    """Load the original domain of a file of conf/domain, for a model's images.

    Raises:
        UserError: there is no such file, or its images are not there.
    """
    return load_original(_domain(name, "--original"), image_size=spec.image_size, channels=spec.channels)


def restricted_domain(name: str, spec: ModelSpec) -> LoadedDomain:
    """Load a restricted domain; as `original_domain`."""
    config = _domain(name, "--restricted")
    return load_restricted(config, image_size=spec.image_size, channels=spec.channels, where="--restricted")


def _domain(name: str, option: str) -> Any:
    path = DOMAINS / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"{option}: '{name}' is no file of {DOMAINS}")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DomainConfig), OmegaConf.load(path)))


def grow(
    model: nn.Module,
    reference: nn.Module,
    task: ClassificationTask,
    images: ImageSet,
    options: argparse.Namespace,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train in place on labels and on the reference's answers; ``after_step`` is called after each step.

    Raises:
        UserError: the loss stopped being finite.
    """
    strategy = FineTuneStrategy(
        optimizer="nesterov",
        lr=options.lr,
        weight_decay=5e-4,
        schedule="warmup_cosine",
        batch_size=128,
        steps=options.steps,
        head="kept",
        augmentation="standard",
    )

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        return task.original_loss(student, batch, reference)

    tracker = Tracker(progress=True)
    with tracker.progress("grow", options.steps) as advance:

        def after(step: int, value: float) -> None:
            after_step()
            advance(f"loss {value:.3f}")

        generator = torch.Generator().manual_seed(options.seed)
        if not fine_tune(model, strategy, task, images, generator, after, loss):
            raise UserError(f"--lr: the loss stopped being finite at {options.lr}; lower it")


def compare(task: ClassificationTask, original: LoadedDomain, models: dict[str, nn.Module]) -> None:
    """Print the accuracy of each model on ``val`` and ``test``."""
    for name, model in models.items():
        values = ", ".join(f"{split} {task.evaluate(model, original[split]):.1f} %" for split in ("val", "test"))
        print(f"{name}: {values}", flush=True)
