"""The verbs that judge checkpoints: audit, report, and report compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.audit import metrics
from sophon.audit.fidelity import Fidelity, feature_network
from sophon.audit.gallery import write_gallery
from sophon.audit.masking import measure as measure_masking
from sophon.audit.plan import Scene
from sophon.audit.runner import Frechet, Runner
from sophon.audit.workers import run_jobs
from sophon.config import Config, keyed, plain
from sophon.devices import resolve_device
from sophon.domains import LoadedDomain, load_restricted
from sophon.errors import UserError
from sophon.export import Checkpoint, package_versions
from sophon.files import read_json, write_json
from sophon.paths import entries, exists, is_folder
from sophon.report import single as report
from sophon.report.compare import write_comparison
from sophon.run_folder import owned, run_folder
from sophon.seeds import derive_seed
from sophon.verbs.common import (
    as_loaded,
    asked_precision,
    checkpoint_of,
    default,
    domains_of,
    doubt,
    measured,
    metric_of,
    require_float32,
    required,
    run_dir,
    say_domains,
    task_of,
    tracker_of,
    warn,
)


@dataclass(frozen=True)
class _Stage:
    """An audit's checkpoints and domains, read and ready."""

    protected: Checkpoint
    reference: Checkpoint
    original: LoadedDomain
    scene: Scene


def audit(config: Config) -> None:
    """Attack the checkpoint, its unprotected reference and a fresh model; write the results and the reports.

    Several restricted domains are audited in turn, each in a folder of its name, and then compared.
    """
    _torch_threads(config)
    parts = _parts(config)
    stages = dict(zip(parts, _stages(config), strict=True))
    first = next(iter(stages.values()))
    say_domains(first.original, *(stage.scene.restricted for stage in stages.values()), first.scene.benign)
    runners = {path: _runner(parts[path], stage) for path, stage in stages.items()}  # refuses before a folder is begun
    first = next(iter(stages.values()))
    for checkpoint, key in ((first.protected, "checkpoint"), (first.reference, "reference")):
        warn(doubt(first.scene.task, checkpoint.model, first.original, key))
    if len(parts) > 1 and exists(run_dir(config) / "run.json"):
        raise UserError(f"run_dir: '{run_dir(config)}' holds an audit of one domain; give another run_dir")
    with ExitStack() as ownership:
        if len(parts) > 1:
            ownership.enter_context(owned(run_dir(config), _shard(config)))
        for path, part in parts.items():
            ownership.enter_context(run_folder(path, "audit", _identity(part, stages[path]), _shard(config)))
        summaries = {path: _audit(part, stages[path], runners[path]) for path, part in parts.items()}
        if len(parts) > 1 and config.attack.shards == 1:
            _compare_domains(run_dir(config), summaries)


def _shard(config: Config) -> str:
    """Return which part of the folder is this process's; empty if it is alone."""
    return f"{config.attack.shard}of{config.attack.shards}" if config.attack.shards > 1 else ""


def _parts(config: Config) -> dict[Path, Config]:
    """Return an audit's parts by their folders: the configuration itself, or one for each of several domains."""
    folder, domains, parts = run_dir(config), config.domain, {}
    if len(domains.restricted) == 1:
        return {folder: config}
    for name, each in domains.restricted.items():
        inside = [
            str(path) if is_folder(path := Path(other) / each.name, "attack.reuse") else other
            for other in config.attack.reuse
        ]
        parts[folder / each.name] = replace(
            config,
            run_dir=str(folder / each.name),
            domain=replace(domains, restricted={name: each}),
            attack=replace(config.attack, reuse=inside),
        )
    return parts


def _audit(config: Config, stage: _Stage, runner: Runner) -> dict[str, Any]:
    """Audit one restricted domain; return what was found, nothing yet if this is only a shard of it."""
    scene, task = stage.scene, stage.scene.task
    folder = run_dir(config)
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
        return {}
    attempts, searches = runner.records()
    before, after = (
        {"test": measured(task, scene.models[role], stage.original, "test", key)}
        for role, key in (("unprotected", "reference"), ("protected", "checkpoint"))
    )
    context = {
        "checkpoint": _origin(stage.protected),
        "reference": _origin(stage.reference),
        "intactness": {**metric_of(task), "before": before, "after": after},
        "support": scene.support,
        "searches": searches,
        "left_out": runner.plan.left_out,
        "gallery": gallery,
        "masking": _masking(config, stage),
        "feature_network": None if features is None else features.name,
        "domains": {
            "original": stage.original.name,
            "restricted": scene.restricted.name,
            "benign": None if scene.benign is None else scene.benign.name,
        },
        "hashes": {"restricted": dict(scene.restricted.hashes)},
        "config": _identifying(
            as_loaded(config, scene.spec), "name", "seed", "task", "domain", "model", "attack", "threads"
        ),
        "packages": package_versions(),
    }
    summary = metrics.summarise(attempts, context)
    write_json(folder / "audit.json", summary)
    report.write_curves(folder, attempts)
    _write_reports(folder, summary, attempts)
    return summary


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
    [stage] = _stages(config)
    runner = _runner(config, stage)
    runner.measure_with(_frechet(stage, _features(config, stage, run_dir(config))))
    return runner


def _stages(config: Config) -> list[_Stage]:
    """Read everything once, and set the stage for each of the restricted domains."""
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
    task = task_of(config, spec, device)
    require_float32((protected.manifest.get("method") or {}).get("gains", []), task)
    for key, each in keyed(config.domain.restricted).items():
        if each.labels == "none" and task.head_names(protected.model):
            raise UserError(
                f"{key}.labels: 'none' is not allowed in an audit, whose attackers learn labels; give given"
            )
    original, restricted = domains_of(config, spec, device)
    benign = None
    if config.domain.benign is not None:
        benign = load_restricted(
            config.domain.benign,
            image_size=spec.image_size,
            channels=spec.channels,
            where="domain.benign",
            memory_gb=config.domain.memory_gb,
        ).to(device)
    models: dict[str, nn.Module] = {
        "protected": protected.model.to(device),
        "unprotected": reference.model.to(device),
    }
    measured = plain(config, "task") | asked_precision(config)
    provenance = {
        "protected": repr([protected.sha256, spec, measured]),
        "unprotected": repr([reference.sha256, spec, measured]),
        "scratch": repr([spec, measured]),
    }
    support = protected.manifest.get("sampler_support")
    scenes = [Scene(models, spec, task, each, original, benign, provenance, support) for each in restricted]
    return [_Stage(protected, reference, original, scene) for scene in scenes]


def _runner(config: Config, stage: _Stage) -> Runner:
    return Runner(stage.scene, config.attack, config.seed, run_dir(config))


def _frechet(stage: _Stage, features: Fidelity | None) -> Frechet | None:
    if features is None:
        return None
    return Frechet(features.name, partial(features.distance, real=stage.scene.restricted["test"]))


def _features(config: Config, stage: _Stage, folder: Path) -> Fidelity | None:
    """Return what generated images are measured with; trained once, then read from the run's folder."""
    scene, device = stage.scene, resolve_device(config.device)
    if not config.attack.frechet_samples or scene.task.sample(scene.models["protected"], 1, 0) is None:
        return None
    return feature_network(stage.original, scene.restricted, seed=config.seed, folder=folder, device=device)


def _masking(config: Config, stage: _Stage) -> dict[str, Any] | None:
    scene = stage.scene
    exact = task_of(replace(config, amp="none"), scene.spec, resolve_device(config.device))
    seed = derive_seed(config.seed, "masking")
    return measure_masking(scene.models, scene.spec, exact, scene.restricted, config.attack.masking, seed)


def _identity(config: Config, stage: _Stage) -> dict[str, Any]:
    benign = stage.scene.benign
    parts = _identifying(config, "seed", "task", "attack")
    del parts["attack"]["masking"]  # looks at what the attacks leave alone
    return {
        **parts,
        **asked_precision(config),
        "checkpoint": stage.protected.sha256,
        "reference": stage.reference.sha256,
        "restricted": stage.scene.restricted.hashes,
        **({} if benign is None else {"benign": benign.hashes}),
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
    test = scene.restricted["test"]
    real = test.batch(torch.linspace(0, len(test) - 1, min(count, len(test))).long()).images.cpu()
    return write_gallery(folder, {f"real images of {scene.restricted.name}": real, **grids})


def render(config: Config) -> None:
    """Write an audit's reports again from its ``audit.json`` and ``attempts/``."""
    folder = Path(required(config.run_dir or str(default(config, "audit")), "run_dir"))
    several = exists(folder / "comparison.html", "run_dir")
    parts = [each for each in entries(folder, "run_dir") if exists(each / "audit.json")] if several else [folder]
    with ExitStack() as ownership:
        for each in {folder, *parts}:
            ownership.enter_context(owned(each))
        summaries = {each: _render(each) for each in parts}
        if several:
            _compare_domains(folder, summaries)


def _render(folder: Path) -> dict[str, Any]:
    summary = report.read_audit(folder)
    attempts = [read_json(path) for path in entries(folder / "attempts") if path.suffix == ".json"]
    _write_reports(folder, summary, attempts)
    return summary


def _compare_domains(folder: Path, summaries: Mapping[Path, dict[str, Any]]) -> None:
    paths = sorted(summaries)
    page = write_comparison(paths, folder, "comparison")
    for path in paths:
        print(f"{path.name}: {summaries[path]['verdict']}")
    print(f"comparison: {page}")


def compare(config: Config) -> None:
    """Set audits side by side: ``compare.html`` and ``compare.md`` in ``out``."""
    if len(config.runs) < 2:
        raise UserError("report compare: give the run directories of two audits or more")
    folders: Sequence[Path] = [Path(required(path, "report compare")) for path in config.runs]
    with owned(config.out or "runs/compare", key="out") as out:
        print(f"comparison: {write_comparison(folders, out)}")


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
