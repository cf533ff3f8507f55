"""The verbs that judge checkpoints: audit, report, and report compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.audit import metrics
from sophon.audit.fidelity import Fidelity, feature_network
from sophon.audit.gallery import write_gallery
from sophon.audit.plan import Scene
from sophon.audit.runner import Frechet, Runner
from sophon.audit.workers import run_jobs
from sophon.config import Config, plain
from sophon.domains import Domain, load_restricted
from sophon.errors import UserError
from sophon.export import Checkpoint, package_versions
from sophon.report import single as report
from sophon.report.compare import write_comparison
from sophon.runs import RunDirectory, derive_seed, read_json, resolve_device, write_json
from sophon.verbs.common import checkpoint_of, default, domains_of, metric_of, required, run_dir, task_of, tracker_of


@dataclass(frozen=True)
class _Stage:
    """An audit's checkpoints and domains, read and ready."""

    protected: Checkpoint
    reference: Checkpoint
    original: Domain
    scene: Scene


def audit(config: Config) -> None:
    """Attack the checkpoint, its unprotected reference and a fresh model; write the results and the reports."""
    _torch_threads(config)
    stage = _stage(config)
    scene, task = stage.scene, stage.scene.task
    folder = run_dir(config)
    runner = _runner(config, stage)  # refuses what it cannot run before a folder is begun
    RunDirectory.open(folder, "audit", _identity(config, stage))
    gallery = _gallery(config, scene, folder)
    features = _features(config, stage, folder)
    runner.measure_with(_frechet(stage, features))
    with tracker_of(config, folder) as tracker:
        for name, reason in runner.plan.left_out.items():
            tracker.say(f"left out: {name} ({reason})")
        run_jobs(runner, partial(_in_worker, config), config.workers, tracker)
    if config.attack.shards > 1:
        print(
            f"{folder}: shard {config.attack.shard} of {config.attack.shards} is done; audit without shards to finish"
        )
        return
    attempts, searches = runner.records()
    before, after = (
        {"test": task.evaluate(scene.models[role], stage.original["test"])} for role in ("unprotected", "protected")
    )
    context = {
        "checkpoint": _origin(stage.protected),
        "reference": _origin(stage.reference),
        "intactness": {**metric_of(task), "before": before, "after": after},
        "support": scene.support,
        "searches": searches,
        "left_out": runner.plan.left_out,
        "gallery": gallery,
        "feature_network": None if features is None else features.name,
        "domains": {
            "original": stage.original.name,
            "restricted": scene.restricted.name,
            "benign": None if scene.benign is None else scene.benign.name,
        },
        "hashes": {"restricted": dict(scene.restricted.hashes)},
        "config": _identifying(config, "name", "seed", "task", "domain", "model", "attack", "threads", "stack"),
        "packages": package_versions(),
    }
    summary = metrics.summarise(attempts, context)
    write_json(folder / "audit.json", summary)
    report.write_curves(folder, attempts)
    _write_reports(folder, summary, attempts)


def _torch_threads(config: Config) -> None:
    """Give each worker its share of the cores, unless the configuration says how many threads it has."""
    if config.threads == 0 and config.workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))


def _in_worker(config: Config) -> Runner:
    """Make the audit's runner again in a process of its own."""
    import sophon  # noqa: F401  (mends torchvision before anything else imports it)

    if config.threads:
        torch.set_num_threads(config.threads)
    _torch_threads(config)
    stage = _stage(config)
    runner = _runner(config, stage)
    runner.measure_with(_frechet(stage, _features(config, stage, run_dir(config))))
    return runner


def _stage(config: Config) -> _Stage:
    device = resolve_device(config.device)
    protected, reference = (
        checkpoint_of(config, *each) for each in (("checkpoint", "protect"), ("reference", "pretrain"))
    )
    if reference.spec != protected.spec:
        raise UserError(
            f"reference: its model ({reference.spec.architecture}, {len(reference.spec.classes)} classes) is not built "
            f"as the checkpoint's ({protected.spec.architecture}, {len(protected.spec.classes)} classes)"
        )
    spec = protected.spec
    original, restricted = domains_of(config, spec, device)
    benign = None
    if config.domain.benign is not None:
        benign = load_restricted(
            config.domain.benign, image_size=spec.image_size, channels=spec.channels, where="domain.benign"
        ).to(device)
    task = task_of(config, spec, device)
    models: dict[str, nn.Module] = {
        "protected": protected.model.to(device),
        "unprotected": reference.model.to(device),
    }
    measured = plain(config, "task")
    provenance = {
        "protected": repr([protected.sha256, spec, measured]),
        "unprotected": repr([reference.sha256, spec, measured]),
        "scratch": repr([spec, measured]),
    }
    support = protected.manifest.get("sampler_support")
    return _Stage(
        protected, reference, original, Scene(models, spec, task, restricted, original, benign, provenance, support)
    )


def _runner(config: Config, stage: _Stage) -> Runner:
    return Runner(stage.scene, config.attack, config.seed, run_dir(config), stack=config.stack)


def _frechet(stage: _Stage, features: Fidelity | None) -> Frechet | None:
    if features is None:
        return None
    return Frechet(features.name, partial(features.distance, real=stage.scene.restricted["test"].images))


def _features(config: Config, stage: _Stage, folder: Path) -> Fidelity | None:
    """Return what generated images are measured with; trained once, then read from the run's folder."""
    scene, device = stage.scene, resolve_device(config.device)
    if not config.attack.frechet_samples or scene.task.sample(scene.models["protected"], 1, 0) is None:
        return None
    return feature_network(stage.original, scene.restricted, seed=config.seed, folder=folder, device=device)


def _identity(config: Config, stage: _Stage) -> dict[str, Any]:
    benign = stage.scene.benign
    return {
        **_identifying(config, "seed", "task", "attack"),
        "checkpoint": stage.protected.sha256,
        "reference": stage.reference.sha256,
        "restricted": stage.scene.restricted.hashes,
        **({} if benign is None else {"benign": benign.hashes}),
        # results of attempts trained together differ in rounding, however many they are
        **({"stack": "more than 1"} if config.stack > 1 else {}),
    }


def _identifying(config: Config, *keys: str) -> dict[str, Any]:
    """Return parts of the configuration without what decides only where and by whom the work is done."""
    parts = plain(config, *keys)
    for key in ("reuse", "shard", "shards"):
        del parts["attack"][key]
    return parts


def _gallery(config: Config, scene: Scene, folder: Path) -> list[dict[str, str]] | None:
    """Draw what there is to see before any attack; None for models that generate nothing."""
    count = config.attack.samples
    if not count:
        return None
    seed = derive_seed(config.seed, "samples")
    drawn = {role: scene.task.sample(model, count, seed) for role, model in scene.models.items()}
    grids = {f"{role} model, not attacked": images for role, images in drawn.items() if images is not None}
    if not grids:
        return None
    test = scene.restricted["test"].images
    real = test[torch.linspace(0, len(test) - 1, min(count, len(test))).long()].cpu()
    return write_gallery(folder, {f"real images of {scene.restricted.name}": real, **grids})


def render(config: Config) -> None:
    """Write an audit's reports again from its ``audit.json`` and ``attempts/``."""
    folder = Path(required(config.run_dir or str(default(config, "audit")), "run_dir"))
    summary = report.read_audit(folder)
    attempts = [read_json(path) for path in sorted((folder / "attempts").glob("*.json"))]
    _write_reports(folder, summary, attempts)


def compare(config: Config) -> None:
    """Set audits side by side: ``compare.html`` and ``compare.md`` in ``out``."""
    if len(config.runs) < 2:
        raise UserError("report compare: give the run directories of two audits or more")
    folders: Sequence[Path] = [Path(required(path, "report compare")) for path in config.runs]
    print(f"comparison: {write_comparison(folders, Path(config.out or 'runs/compare'))}")


def _write_reports(folder: Path, summary: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
    report.write_reports(folder, summary, attempts)
    print(report.table(summary))
    print(summary["verdict"])
    print(f"report: {folder / 'report.html'}")


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    method = checkpoint.manifest.get("method")
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "name": checkpoint.manifest.get("name"),
        "method": None if method is None else method["name"],
    }
