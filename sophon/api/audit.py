"""Prepare an audit and run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.api.common import (
    asked_precision,
    checkpoint_of,
    domains_of,
    opened,
    require_float32,
    task_of,
)
from sophon.api.facts import context_of, gallery_of, identifying
from sophon.api.manifests import check_pretraining
from sophon.api.results import Audited
from sophon.auditing.fidelity import Fidelity, feature_network
from sophon.auditing.forecast import forecast
from sophon.auditing.runner import Frechet, Runner
from sophon.auditing.scene import Scene
from sophon.auditing.words import filtered_roles
from sophon.auditing.workers import run_jobs
from sophon.checkpoint import Checkpoint
from sophon.config import Config, plain
from sophon.devices import resolve_device
from sophon.domains import LoadedDomain, load_restricted
from sophon.errors import UserError
from sophon.models import ModelSpec
from sophon.tracking import Tracker


@dataclass(frozen=True)
class Audit:
    """An audit's checkpoints and domains, read and ready.

    Attributes:
        config: the run's, with one restricted domain.
        protected: the checkpoint that is judged.
        reference: the unprotected one.
        filtered: those of the same pre-training without the restricted classes.
        original: the domain that both were made for.
        scene: what the attackers meet.
    """

    config: Config
    protected: Checkpoint
    reference: Checkpoint
    filtered: Sequence[Checkpoint]
    original: LoadedDomain
    scene: Scene


Checkpoints = Sequence[Checkpoint]


def named_checkpoints(config: Config) -> Checkpoints:
    """Read the checkpoints that the configuration names: the protected one, its reference and the filtered ones."""
    return (
        checkpoint_of(config, "checkpoint", "protect"),
        checkpoint_of(config, "reference", "pretrain"),
        *(opened(config, path, "filtered") for path in config.filtered),
    )


def _difference(other: ModelSpec, spec: ModelSpec) -> str:
    """Say in which field two specs differ first, and how."""
    name = next(
        field.name
        for field in fields(spec)
        if field.compare and getattr(other, field.name) != getattr(spec, field.name)
    )
    values = [getattr(other, name), getattr(spec, name)]
    if isinstance(values[0], tuple):
        differing = [pair for pair in zip(*values, strict=False) if pair[0] != pair[1]]
        values = list(differing[0]) if differing else [len(value) for value in values]
    return f"of {name} it has {values[0]!s:.60}, the checkpoint {values[1]!s:.60}"


def prepare(config: Config, protected: Checkpoint, reference: Checkpoint, *filtered: Checkpoint) -> list[Audit]:
    """Load the domains once, and prepare the audit of each of the restricted ones.

    Raises:
        UserError: the checkpoints, the domains and the attacks do not go together.
    """
    device = resolve_device(config.device)
    spec = protected.spec
    relative = opened(config, config.attack.relative, "attack.relative") if config.attack.relative else None
    public = [] if relative is None else [("attack.relative", relative)]
    for key, other in (("reference", reference), *(("filtered", checkpoint) for checkpoint in filtered), *public):
        if differing := [name for name, part in spec.frozen.items() if other.spec.frozen.get(name) != part]:
            raise UserError(
                f"{key}: its {differing[0]} is another one than the checkpoint's; give the same pipeline, unprotected"
            )
        if other.spec != spec:
            raise UserError(
                f"{key}: its model is not built as the checkpoint's: {_difference(other.spec, spec)}; give one that "
                "differs in its weights only"
            )
    task = task_of(config, spec, device)
    require_float32(bool(protected.manifest.get("float32")), task)
    original, restricted = domains_of(config, spec, device)
    check_pretraining(reference, filtered, restricted)
    benign = None
    if config.domain.benign is not None:
        benign = load_restricted(
            config.domain.benign,
            image_size=spec.image_size,
            channels=spec.channels,
            where="domain.benign",
            memory_gb=config.domain.memory_gb,
        ).to(device)
    by_role = dict(zip(filtered_roles(len(filtered)), filtered, strict=True))
    models: dict[str, nn.Module] = {
        "protected": protected.model.to(device),
        "unprotected": reference.model.to(device),
        **{role: checkpoint.model.to(device) for role, checkpoint in by_role.items()},
    }
    measured = plain(config, "task") | asked_precision(config)
    provenance = {
        "protected": repr([protected.sha256, spec, measured]),
        "unprotected": repr([reference.sha256, spec, measured]),
        "scratch": repr([spec, measured]),
        **{role: repr([checkpoint.sha256, spec, measured]) for role, checkpoint in by_role.items()},
    }
    if relative is not None:
        provenance["relative"] = relative.sha256
    scene = partial(
        Scene,
        models,
        spec,
        task,
        original=original,
        benign=benign,
        relative=None if relative is None else relative.model.to(device),
        provenance=provenance,
        support=protected.manifest.get("sampler_support"),
    )
    scenes = [scene(domain) for domain in restricted]
    parts = [
        replace(config, domain=replace(config.domain, restricted={name: domain}))
        for name, domain in config.domain.restricted.items()
    ]
    return [
        Audit(part, protected, reference, filtered, original, scene) for part, scene in zip(parts, scenes, strict=True)
    ]


def run(audit: Audit, runner: Runner, tracker: Tracker, checkpoints: Checkpoints | None = None) -> Audited | None:
    """Run what is missing in the runner's folder; return what was found, None if this is only a shard of it.

    Args:
        checkpoints: what workers attack, the protected one first; None for those that the configuration names.
    """
    config, folder = audit.config, runner.folder
    gallery = gallery_of(config, audit.scene, folder, tracker)
    features = _features(audit, folder)
    runner.measure_with(_frechet(audit, features))
    for name, reason in runner.plan.left_out.items():
        tracker.say(f"left out: {name} ({reason})")
    if tracker.shows:
        tracker.say(forecast(runner, runner.missing(), config.workers))
    run_jobs(runner, partial(_in_worker, config, folder, checkpoints), config.workers, tracker)
    if config.attack.shards > 1:
        return None
    from sophon.auditing.summary import AuditReport
    from sophon.auditing.table import tabulate
    from sophon.report.audit import write_reports

    attempts, searches = runner.records()
    report = AuditReport.of(
        tabulate(attempts),
        replace(
            context_of(audit, tracker),
            searches=searches,
            left_out=runner.plan.left_out,
            gallery=gallery,
            feature_network=None if features is None else features.name,
        ),
    )
    report.write(folder)
    return Audited(report, write_reports(folder, report))


def share_threads(config: Config) -> None:
    """Give each worker its share of the cores, unless the configuration says how many threads it has."""
    if config.threads == 0 and config.workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))


def _in_worker(config: Config, folder: Path, checkpoints: Checkpoints | None) -> Runner:
    """Make the audit's runner again in a process of its own."""
    import sophon  # noqa: F401  (mends torchvision before anything else imports it)

    if config.threads:
        torch.set_num_threads(config.threads)
    share_threads(config)
    [audit] = prepare(config, *(checkpoints or named_checkpoints(config)))
    runner = runner_of(audit, folder)
    runner.measure_with(_frechet(audit, _features(audit, folder)))
    return runner


def runner_of(audit: Audit, folder: Path) -> Runner:
    """Return the audit's attacks, each to leave its result in ``folder``.

    Raises:
        UserError: one is not well formed, or none fits the models.
    """
    return Runner(audit.scene, audit.config.attack, audit.config.seed, folder)


def _frechet(audit: Audit, features: Fidelity | None) -> Frechet | None:
    if features is None:
        return None
    distance = partial(features.distance, real=audit.scene.restricted["test"])
    return Frechet(features.name, distance, features.concept_rate)


def _features(audit: Audit, folder: Path) -> Fidelity | None:
    """Return what generated images are measured with; trained once, then read from the run's folder."""
    config, scene = audit.config, audit.scene
    device = resolve_device(config.device)
    if not config.attack.frechet_samples or scene.task.sample(scene.models["protected"], 1, 0) is None:
        return None
    return feature_network(audit.original, scene.restricted, seed=config.seed, folder=folder, device=device)


def identity_of(audit: Audit) -> dict[str, Any]:
    """Return everything that decides the results, as plain JSON data."""
    config, benign = audit.config, audit.scene.benign
    parts = identifying(config, "seed", "task", "attack")
    for key in ("masking", "knowing", "relative"):  # they look at what the attacks leave alone
        del parts["attack"][key]
    return {
        **parts,
        **asked_precision(config),
        "checkpoint": audit.protected.sha256,
        "reference": audit.reference.sha256,
        **({"filtered": [checkpoint.sha256 for checkpoint in audit.filtered]} if audit.filtered else {}),
        **({"relative": audit.scene.provenance["relative"]} if audit.scene.relative is not None else {}),
        "restricted": audit.scene.restricted.hashes,
        **({} if benign is None else {"benign": benign.hashes}),
    }
