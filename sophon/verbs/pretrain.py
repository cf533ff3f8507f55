"""The verb that makes the unprotected reference."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sophon.api.common import (
    asked_precision,
    doubt,
    metric_of,
    original_of,
    restricted_of,
    run_dir,
    say_domains,
    say_input,
    task_of,
    tracker_of,
    warn,
)
from sophon.api.manifests import both_splits, figures, hashes_of, manifest_of
from sophon.checkpoint import write_checkpoint
from sophon.config import Config, ModelConfig, plain
from sophon.devices import resolve_device
from sophon.domains import ImageSet, LoadedDomain, classes_of_all, defenders_images
from sophon.errors import UserError
from sophon.finetune import check, loop_of, rehearse
from sophon.models import ModelSpec, create, describe, resize_head
from sophon.models.weights import load_state
from sophon.paths import exists, is_folder
from sophon.run_folder import run_folder
from sophon.seeds import derive_seed, seed_all
from sophon.tasks import Task


def pretrain(config: Config) -> None:
    """Train the unprotected reference on the original domain, or on both; write ``run_dir/checkpoint``."""
    device = resolve_device(config.device)
    asked, config = config.model, replace(config, model=describe(config.model))
    original = original_of(config, config.model.image_size, config.model.channels).to(device)
    restricted = _seen(config, device)
    say_domains(original, *restricted)
    if config.pretrain.steps == 0 and config.model.weights is None and not config.model.pretrained:
        raise UserError(
            "pretrain.steps: 0 needs model.weights or model.pretrained=true; a random model is no reference"
        )
    identity = {
        **plain(config, "seed", "task", "model", "pretrain"),
        **asked_precision(config),
        **(hashes_of(original, restricted) if restricted else {"original": original.hashes}),
        **({"restricted_outputs": config.domain.restricted_outputs} if restricted else {}),
    }
    seed_all(derive_seed(config.seed, "pretrain"))
    all_classes = classes_of_all(original, restricted)
    model, spec = create(config.model, all_classes if config.domain.restricted_outputs else original.classes)
    say_input(spec, _source(asked))
    task = task_of(config, spec, device)
    resize_head(model, task.adapter, all_classes)
    model.to(device)
    load_state(model, dict(model.state_dict()), "model.architecture")
    check(config.pretrain, "pretrain")
    images = defenders_images(original, restricted) if restricted else original["train"]
    rehearse(copy.deepcopy(model), config.pretrain, task, images, "pretrain.batch_size")
    with run_folder(run_dir(config), "pretrain", identity) as folder:
        if exists(folder / "checkpoint"):
            print(f"already done: {folder / 'checkpoint'}")
        else:
            _train(config, model, task, images, folder)
            resize_head(model, task.adapter, spec.classes)
            _release(config, model, spec, task, original, restricted, folder)


def _source(model: ModelConfig) -> str:
    """Return who says how images are normalised."""
    if model.weights is not None and is_folder(model.weights):
        return model.weights
    if model.mean is not None and model.std is not None:
        return "model.mean and model.std"
    return f"{model.library}'s published weights" if model.pretrained else "the defaults, model.mean and model.std"


def _seen(config: Config, device: torch.device) -> tuple[LoadedDomain, ...]:
    """Load the restricted domains that the reference is trained on, too."""
    if config.domain.pretrained_on == "original":
        return ()
    if config.pretrain.steps == 0:
        raise UserError("domain.pretrained_on: 'both' is not allowed with pretrain.steps=0, which trains on nothing")
    return tuple(domain.to(device) for domain in restricted_of(config, config.model.image_size, config.model.channels))


def _train(config: Config, model: nn.Module, task: Task, images: ImageSet, folder: Path) -> None:
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "pretrain", "batches"))
    with tracker_of(config, folder) as tracker, tracker.progress("pretrain", config.pretrain.steps) as advance:

        def after_step(step: int, loss: float) -> None:
            tracker.log({"loss": loss}, step)
            advance(f"loss {loss:.3f}")

        try:
            loop_of(config.pretrain)(model, config.pretrain, task, images, generator, after_step)
        except FloatingPointError as error:
            raise UserError(
                f"pretrain.lr: the loss stopped being finite at lr={config.pretrain.lr}; lower it, in a new run_dir"
            ) from error


def _release(
    config: Config,
    model: nn.Module,
    spec: ModelSpec,
    task: Task,
    original: LoadedDomain,
    restricted: Sequence[LoadedDomain],
    folder: Path,
) -> None:
    origin = {key: getattr(config.model, key) for key in ("weights", "pretrained", "strip_prefix")}
    manifest = manifest_of(
        replace(config, model=replace(spec.config(), **origin)), "pretrain", None, original, restricted
    )
    manifest["pretrained_on"] = {original.name: ["train"], **{domain.name: ["adapt", "query"] for domain in restricted}}
    key = "pretrain.lr" if config.pretrain.steps else "model.weights"
    manifest["intactness"] = {**metric_of(task), "after": both_splits(task, model, original, key)}
    if config.pretrain.steps == 0:
        warn(doubt(task, model, original, key))
    write_checkpoint(folder / "checkpoint", model, spec, manifest)
    print(f"{folder / 'checkpoint'}: {task.metric.name} {figures(task, manifest['intactness']['after'])}")
