"""The verbs, each a function of a `Config`: everything that the command line does, callable from a test."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon import __version__
from sophon.audit import metrics, report
from sophon.audit.fidelity import feature_network
from sophon.audit.gallery import image_grid, write_gallery
from sophon.audit.runner import Frechet, Runner
from sophon.audit.verdict import format_value
from sophon.config import Config, GuardConfig, MethodConfig, plain
from sophon.domains import Domain, load_original, load_restricted
from sophon.errors import UserError
from sophon.export import Checkpoint, package_versions, read_checkpoint, write_checkpoint
from sophon.finetune import fine_tune
from sophon.models import ModelSpec, create
from sophon.protect.trainer import STATE_FILE, Position, Trainer, last_good
from sophon.runs import RunDirectory, derive_seed, read_json, resolve_device, seed_all, write_bytes, write_json
from sophon.strategies import SamplerConfig, StrategySampler
from sophon.tasks import Task, kind_of, make_task
from sophon.tracking import Tracker


def pretrain(config: Config) -> None:
    """Train the unprotected reference on the original domain; write ``run_dir/checkpoint``."""
    device = resolve_device(config.device)
    original = load_original(
        config.domain.original, image_size=config.model.image_size, channels=config.model.channels
    ).to(device)
    if config.pretrain.steps == 0 and config.model.weights is None and not config.model.pretrained:
        raise UserError(
            "pretrain.steps: 0 needs model.weights or model.pretrained=true; a random model is no reference"
        )
    identity = {**plain(config, "seed", "task", "model", "pretrain"), "original": original.hashes}
    seed_all(derive_seed(config.seed, "pretrain"))
    model, spec = create(config.model, original.classes)
    model.to(device)
    task = _task(config, spec, device)
    folder = RunDirectory.open(_run_dir(config), "pretrain", identity).path
    if (folder / "checkpoint").exists():
        print(f"already done: {folder / 'checkpoint'}")
        return
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "pretrain", "batches"))
    with _tracker(config, folder) as tracker, tracker.progress("pretrain", config.pretrain.steps) as advance:

        def after_step(step: int, loss: float) -> None:
            tracker.log({"loss": loss}, step)
            advance(f"loss {loss:.3f}")

        if not fine_tune(model, config.pretrain, task, original["train"], generator, after_step):
            raise UserError(
                f"pretrain.lr: the loss stopped being finite at lr={config.pretrain.lr}; lower it, in a new run_dir"
            )
    manifest = _manifest(config, "pretrain", {"original": original}, parent=None)
    manifest["intactness"] = {**_metric(task), "after": _both_splits(task, model, original)}
    write_checkpoint(folder / "checkpoint", model, spec, manifest)
    print(f"{folder / 'checkpoint'}: {task.metric.name} {_figures(task, manifest['intactness']['after'])}")


def protect(config: Config) -> None:
    """Protect the reference against fine-tuning on the restricted domain; write ``run_dir/checkpoint``."""
    device = resolve_device(config.device)
    reference = _reference(config)
    original, restricted = _domains(config, reference.spec, device)
    sampler = StrategySampler(config.sampler)
    identity = {
        **plain(config, "seed", "task", "method", "sampler", "guard"),
        "reference": reference.sha256,
        "original": original.hashes,
        "restricted": restricted.hashes,
    }
    task = _task(config, reference.spec, device, protects=True)
    for head in config.sampler.heads:  # refused now rather than with a folder begun
        task.start_head(copy.deepcopy(reference.model), head, restricted.classes)
    for scope in config.sampler.scopes:
        task.train_mode(copy.deepcopy(reference.model), scope)
    folder = RunDirectory.open(_run_dir(config), "protect", identity).path
    if (folder / "checkpoint").exists():
        print(f"already done: {folder / 'checkpoint'}")
        return
    model = reference.model.to(device)
    with _tracker(config, folder) as tracker:
        trainer = Trainer(
            copy.deepcopy(model),
            model,
            task,
            original,
            restricted,
            sampler,
            config.method,
            config.guard,
            config.seed,
            folder,
            tracker,
        )
        position = trainer.run()
    _write_protected(folder / "checkpoint", config, reference, trainer.model, task, original, restricted, position)


def export(config: Config) -> None:
    """Copy a verified checkpoint to ``out``; from a run that is not finished, its last good state."""
    source = _required(config.checkpoint or str(_default(config, "protect")), "checkpoint")
    out = Path(config.out) if config.out is not None else _default(config, "export")
    unfinished = (Path(source) / STATE_FILE).exists() and not (Path(source) / "checkpoint").exists()
    if not unfinished:
        checkpoint = read_checkpoint(source)
        write_checkpoint(out, checkpoint.model, checkpoint.spec, checkpoint.manifest)
        print(f"exported to {out}")
    else:
        _export_unfinished(config, Path(source), out)


def _export_unfinished(config: Config, run: Path, out: Path) -> None:
    device = resolve_device(config.device)
    reference = _reference(config)
    identity = read_json(run / "run.json")["identity"]
    if identity["reference"] != reference.sha256:
        raise UserError(f"reference: not the checkpoint that '{run}' started from; give that one")
    weights, position = last_good(run)
    # what the manifest says of the run is the run's, whatever this command's configuration has
    config = replace(
        config,
        seed=identity["seed"],
        method=MethodConfig(**identity["method"]),
        sampler=SamplerConfig(**identity["sampler"]),
        guard=GuardConfig(**identity["guard"]),
    )
    original, restricted = _domains(config, reference.spec, device)
    for domain, role in ((original, "original"), (restricted, "restricted")):
        if domain.hashes != identity[role]:
            raise UserError(
                f"domain.{role}: not the images that '{run}' started from; give the run's own configuration"
            )
    task = _task(config, reference.spec, device, protects=True)
    model = copy.deepcopy(reference.model).to(device)
    model.load_state_dict(weights)
    reference.model.to(device)
    _write_protected(out, config, reference, model, task, original, restricted, position)


def audit(config: Config) -> None:
    """Attack the checkpoint, its unprotected reference and a fresh model; write the results and the reports."""
    device = resolve_device(config.device)
    protected = read_checkpoint(_required(config.checkpoint or str(_default(config, "protect")), "checkpoint"))
    reference = _reference(config)
    if reference.spec != protected.spec:
        raise UserError(
            f"reference: its model ({reference.spec.architecture}, {len(reference.spec.classes)} classes) is not built "
            f"as the checkpoint's ({protected.spec.architecture}, {len(protected.spec.classes)} classes)"
        )
    original, restricted = _domains(config, protected.spec, device)
    identity = {
        **plain(config, "seed", "task", "attack"),
        "checkpoint": protected.sha256,
        "reference": reference.sha256,
        "restricted": restricted.hashes,
    }
    task = _task(config, protected.spec, device)
    models = {"protected": protected.model.to(device), "unprotected": reference.model.to(device)}
    support = protected.manifest.get("sampler_support")
    provenance = repr([protected.sha256, reference.sha256, sorted(restricted.hashes.items()), config.seed])
    folder = _run_dir(config)
    runner = Runner(models, protected.spec, task, restricted, config.attack, support, provenance, config.seed, folder)
    RunDirectory.open(folder, "audit", identity)
    gallery = _gallery(config, task, models, restricted, folder)
    fidelity = None
    if config.attack.frechet_samples and task.sample(protected.model, 1, 0) is not None:
        fidelity = feature_network(original, restricted, seed=config.seed, folder=folder, device=device)
    real = restricted["test"].images
    frechet = None if fidelity is None else Frechet(fidelity.name, partial(fidelity.distance, real=real))
    with _tracker(config, folder) as tracker:
        attempts = runner.run(tracker, frechet)
    context = {
        "checkpoint": _origin(protected),
        "reference": _origin(reference),
        "intactness": {
            **_metric(task),
            "before": {"test": task.evaluate(models["unprotected"], original["test"])},
            "after": {"test": task.evaluate(models["protected"], original["test"])},
        },
        "support": support,
        "gallery": gallery,
        "feature_network": None if fidelity is None else fidelity.name,
        "domains": {"original": original.name, "restricted": restricted.name},
        "config": plain(config, "name", "seed", "task", "domain", "attack"),
        "packages": package_versions(),
    }
    summary = metrics.summarise(attempts, context)
    write_json(folder / "audit.json", summary)
    report.write_curves(folder, attempts)
    _write_reports(folder, summary, attempts)


def _gallery(
    config: Config, task: Task, models: dict[str, nn.Module], restricted: Domain, folder: Path
) -> list[dict[str, str]] | None:
    """Draw what there is to see before any attack; None for models that generate nothing."""
    count = config.attack.samples
    if not count:
        return None
    drawn = {role: task.sample(model, count, derive_seed(config.seed, "samples")) for role, model in models.items()}
    grids = {f"{role} model, not attacked": images for role, images in drawn.items() if images is not None}
    if not grids:
        return None
    test = restricted["test"].images
    real = test[torch.linspace(0, len(test) - 1, min(count, len(test))).long()].cpu()
    return write_gallery(folder, {f"real images of {restricted.name}": real, **grids})


def sample(config: Config) -> None:
    """Draw ``n`` images from a generating model; write them as one grid, ``run_dir/samples.png``."""
    device = resolve_device(config.device)
    checkpoint = read_checkpoint(_required(config.checkpoint or str(_default(config, "protect")), "checkpoint"))
    settings = replace(config.task, name=kind_of(checkpoint.spec))  # what the checkpoint is, needs no saying
    task = _task(replace(config, task=settings), checkpoint.spec, device)
    images = task.sample(checkpoint.model.to(device), config.n, derive_seed(config.seed, "sample"))
    if images is None:
        raise UserError(f"checkpoint: '{checkpoint.path}' is a model of {settings.name}; give a denoiser's")
    path = _run_dir(config) / "samples.png"
    write_bytes(path, image_grid(images))
    print(f"{path}: {config.n} images, {config.task.sample_steps} DDIM steps")


def render(config: Config) -> None:
    """Write an audit's reports again from its ``audit.json`` and ``attempts/``."""
    folder = Path(_required(config.run_dir or str(_default(config, "audit")), "run_dir"))
    if not (folder / "audit.json").exists():
        raise UserError(f"run_dir: '{folder}' holds no audit.json; run `sophon audit run_dir={folder} ...` first")
    summary = read_json(folder / "audit.json")
    found = summary.get("schema_version") if isinstance(summary, dict) else None
    if found != metrics.SCHEMA_VERSION:
        raise UserError(
            f"run_dir: '{folder / 'audit.json'}' is of schema version {found}; this sophon reads version "
            f"{metrics.SCHEMA_VERSION}; run `sophon audit` again"
        )
    attempts = [read_json(path) for path in sorted((folder / "attempts").glob("*.json"))]
    _write_reports(folder, summary, attempts)


VERBS = {"pretrain": pretrain, "protect": protect, "export": export, "audit": audit, "sample": sample, "report": render}


def _write_reports(folder: Path, summary: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
    report.write_reports(folder, summary, attempts)
    print(report.table(summary))
    print(summary["verdict"])
    print(f"report: {folder / 'report.html'}")


def _default(config: Config, verb: str) -> Path:
    return Path("runs") / config.name / f"seed{config.seed}" / verb


def _run_dir(config: Config) -> Path:
    return Path(config.run_dir) if config.run_dir is not None else _default(config, config.verb)


def _required(path: str, key: str) -> str:
    if not Path(path).exists():
        raise UserError(f"{key}: '{path}' does not exist; give {key}=DIR, or make it with the verb before this one")
    return path


def _reference(config: Config) -> Checkpoint:
    return read_checkpoint(_required(config.reference or str(_default(config, "pretrain")), "reference"), "reference")


def _task(config: Config, spec: ModelSpec, device: torch.device, *, protects: bool = False) -> Task:
    return make_task(config, spec, amp=config.amp and device.type == "cuda", protects=protects)


def _domains(config: Config, spec: ModelSpec, device: torch.device) -> tuple[Domain, Domain]:
    size, channels = spec.image_size, spec.channels
    original = load_original(config.domain.original, image_size=size, channels=channels)
    if original.classes != spec.classes:
        raise UserError(
            f"domain.original: its {len(original.classes)} classes ({_few(original.classes)}) are not the "
            f"{len(spec.classes)} that the reference tells apart ({_few(spec.classes)})"
        )
    restricted = load_restricted(config.domain.restricted, image_size=size, channels=channels)
    return original.to(device), restricted.to(device)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


@contextmanager
def _tracker(config: Config, folder: Path) -> Iterator[Tracker]:
    settings = config.tracking
    tracker = Tracker(
        settings.wandb,
        progress=settings.progress,
        run_dir=folder,
        project=settings.project,
        entity=settings.entity,
        name=f"{config.name}-{config.verb}-{config.seed}",
        config=plain(config),
    )
    try:
        yield tracker
    finally:
        tracker.close()


def _manifest(config: Config, verb: str, domains: dict[str, Domain], parent: str | None) -> dict[str, Any]:
    return {
        "sophon": __version__,
        "verb": verb,
        "name": config.name,
        "config": plain(config),
        "method": None,
        "sampler_support": None,
        "domains": {
            role: {"name": domain.name, "classes": list(domain.classes), "hashes": dict(domain.hashes)}
            for role, domain in domains.items()
        },
        "seed": config.seed,
        "parent_sha256": parent,
    }


def _write_protected(
    out: Path,
    config: Config,
    reference: Checkpoint,
    model: nn.Module,
    task: Task,
    original: Domain,
    restricted: Domain,
    position: Position,
) -> None:
    """Measure what the protection cost the original domain, ``test`` read once, and write the checkpoint."""
    before, after = (_both_splits(task, each, original) for each in (reference.model, model))
    guard = {"tolerance": config.guard.tolerance, "relative": config.guard.relative}
    manifest = {
        **_manifest(config, "protect", {"original": original, "restricted": restricted}, parent=reference.sha256),
        "method": asdict(config.method),
        "sampler_support": StrategySampler(config.sampler).support(),
        "intactness": {**_metric(task), "before": before, "after": after, **guard},
        "history": {"rounds": position.round, "good_round": position.good_round, "rollbacks": position.rollbacks},
    }
    write_checkpoint(out, model, reference.spec, manifest)
    print(
        f"{out}: round {position.good_round} of {position.round}, {task.metric.name} on the original domain "
        f"{_figures(task, before)} before, {_figures(task, after)} after"
    )


def _metric(task: Task) -> dict[str, Any]:
    metric = task.metric
    return {"metric": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}


def _both_splits(task: Task, model: nn.Module, original: Domain) -> dict[str, float]:
    return {split: task.evaluate(model, original[split]) for split in ("val", "test")}


def _figures(task: Task, values: dict[str, float]) -> str:
    return ", ".join(f"{split} {format_value(value, _metric(task))}" for split, value in values.items())


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    method = checkpoint.manifest.get("method")
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "name": checkpoint.manifest.get("name"),
        "method": None if method is None else method["name"],
    }
