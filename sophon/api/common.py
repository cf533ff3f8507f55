"""What the verbs share: where a run reads and writes, and what it is made of."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.auditing.words import format_value
from sophon.checkpoint import Checkpoint, is_ours, read_checkpoint
from sophon.config import Config, default_folder, keyed, plain
from sophon.domains import LoadedDomain, classes_of_all, load_original, load_restricted
from sophon.domains.names import few
from sophon.errors import UserError
from sophon.foreign import described, open_foreign
from sophon.models import ModelSpec
from sophon.paths import exists, is_folder
from sophon.tasks import Measured, Task, make_task
from sophon.tracking import Tracker


def run_dir(config: Config) -> Path:
    """Return the folder that this run writes to."""
    return Path(config.run_dir) if config.run_dir is not None else default_folder(config, config.verb)


def required(path: str, key: str) -> str:
    """Return a path that has to exist.

    Raises:
        UserError: it does not; the message names ``key``.
    """
    if not exists(path, key):
        raise UserError(f"{key}: '{path}' does not exist; give {key}=DIR, or make it with the verb before this one")
    return path


def checkpoint_of(config: Config, key: str, verb: str) -> Checkpoint:
    """Read ``config.checkpoint`` or ``config.reference``, also one that sophon did not make.

    Args:
        config: says where it is, and for a foreign one which model it holds and what it tells apart.
        key: ``checkpoint`` or ``reference``.
        verb: whose default folder is read where the key is not set.
    """
    return opened(config, getattr(config, key) or str(default_folder(config, verb)), key)


def opened(config: Config, path: str, key: str) -> Checkpoint:
    """Read the checkpoint at ``path``, also one that sophon did not make; messages name ``key``."""
    path = required(path, key)
    if is_ours(path):
        return read_checkpoint(path, key)
    model = described(path, config.model, key)
    return open_foreign(path, model, original_of(config, model.image_size, model.channels).classes, key)


def task_of(config: Config, spec: ModelSpec, device: torch.device, *, protects: bool = False) -> Task:
    """Make the run's task; ``protects`` if it is asked for a suppression loss."""
    return make_task(config, spec, amp=config.amp in ("all", device.type), protects=protects)


def as_loaded(config: Config, spec: ModelSpec) -> Config:
    """Return the configuration as documents have it: with the model that was loaded, not the command's own default."""
    return replace(config, model=spec.config())


def require_float32(needed: bool, task: Task) -> None:
    """Compute in full float32 from here on where weights ask for it; an attacker would.

    Raises:
        UserError: they do, and the task's passes are autocast.
    """
    if not needed:
        return
    if task.amp:
        raise UserError("amp: bfloat16 drowns what this method makes small; give amp=none")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def asked_precision(config: Config) -> dict[str, str]:
    """Return what a run's identity says of its precision: with ``amp=all`` it has another one on every device."""
    return {"amp": config.amp} if config.amp == "all" else {}


def domains_of(config: Config, spec: ModelSpec, device: torch.device) -> tuple[LoadedDomain, tuple[LoadedDomain, ...]]:
    """Load the original and the restricted domains as the model takes them.

    Raises:
        UserError: the original domain's classes are not the model's, or a domain cannot be loaded.
    """
    original = original_of(config, spec.image_size, spec.channels)
    restricted = restricted_of(config, spec.image_size, spec.channels)
    if spec.classes not in (original.classes, classes_of_all(original, restricted)):
        raise UserError(
            f"domain.original: its {len(original.classes)} classes ({few(original.classes)}) are not the "
            f"{len(spec.classes)} that the reference tells apart ({few(spec.classes)})"
        )
    return original.to(device), tuple(domain.to(device) for domain in restricted)


def original_of(config: Config, image_size: int, channels: int) -> LoadedDomain:
    """Load the original domain, on the CPU."""
    memory_gb = config.domain.memory_gb
    return load_original(config.domain.original, image_size=image_size, channels=channels, memory_gb=memory_gb)


def restricted_of(config: Config, image_size: int, channels: int) -> tuple[LoadedDomain, ...]:
    """Load the restricted domains, on the CPU."""
    return tuple(
        load_restricted(domain, image_size=image_size, channels=channels, where=key, memory_gb=config.domain.memory_gb)
        for key, domain in keyed(config.domain.restricted).items()
    )


def say_domains(*domains: LoadedDomain | None) -> None:
    """Print what each domain holds and what is worth noting of how it was read, a line each."""
    for domain in filter(None, domains):
        print(domain)


def say_input(spec: ModelSpec, source: str) -> None:
    """Print what the model is given, and who says so: a wrong normalisation is no error, only worse figures."""
    mean, std = ([float(f"{value:.4g}") for value in values] for values in (spec.mean, spec.std))
    size = f"{spec.channels}x{spec.image_size}x{spec.image_size}"
    print(f"model {spec.architecture}: images of {size}, normalised with mean {mean} and std {std}, from {source}")


def said_by(checkpoint: Checkpoint) -> str:
    """Return who says how a checkpoint's images are normalised: its folder, or for a state dict the command."""
    return str(checkpoint.path) if is_folder(checkpoint.path) else "model.mean and model.std"


@contextmanager
def tracker_of(config: Config, folder: Path) -> Iterator[Tracker]:
    """Give the run's tracker, and close it."""
    settings = config.tracking
    tracker = Tracker(
        settings.wandb,
        progress=settings.progress,
        run_dir=folder,
        project=settings.project,
        name=f"{config.name}-{config.verb}-{config.seed}",
        config=plain(config),
    )
    try:
        yield tracker
    finally:
        tracker.close()


def measured(task: Task, model: nn.Module, original: LoadedDomain, split: str, key: str) -> Measured:
    """Measure a model on a split of the original domain.

    Raises:
        UserError: an output is not finite; the message names ``key``.
    """
    measurement = task.measure(model, original[split])
    if not math.isfinite(measurement.value):
        raise UserError(f"{key}: the model's outputs on {split} of {original.name} are not finite; give other weights")
    return measurement


def doubt(task: Task, model: nn.Module, original: LoadedDomain, key: str) -> str | None:
    """Return a line of warning if a model's figure on ``val`` is not what the guard is to go by.

    That is where it does no better than a guess, within two standard errors, or better than on ``test`` by more than
    four: then it was trained on images of ``val``.

    Raises:
        UserError: an output is not finite; the message names ``key``.
    """
    val, test = (measured(task, model, original, split, key) for split in ("val", "test"))
    guess, error, images = task.chance(original["val"])
    result, other, guessed = (format_value(number, task.metric) for number in (val.value, test.value, guess))
    if task.metric.sign * (val.value - guess) > 2 * error:
        if task.metric.sign * (val.value - test.value) <= 4 * math.hypot(val.standard_error, test.standard_error):
            return None
        return (
            f"{key}: {task.metric.name} is {result} on val and {other} on test: the model was trained on images of "
            "val, and the guard, which looks there, sees what it remembers of them; give domain.original other images"
        )
    return (
        f"{key}: {task.metric.name} on {images} images of val is {result}, no better than a guess "
        f"({guessed}, standard error {error:.2g}); if the model was trained, check {task.suspects}"
    )


def warn(line: str | None) -> None:
    """Print a line of warning, if there is one, on stderr."""
    if line is not None:
        print(f"sophon: warning: {line}", file=sys.stderr)


def metric_of(task: Task) -> dict[str, Any]:
    """Return the task's primary metric as plain JSON data."""
    metric = task.metric
    return {"metric": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}
