"""What is known of an audit besides its attempts: where its models are from, what protection cost, what they draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophon.api.common import as_loaded, measured, task_of
from sophon.api.manifests import mechanisms_of
from sophon.auditing.gallery import write_gallery
from sophon.auditing.geometry import measure as measure_geometry
from sophon.auditing.masking import Masking
from sophon.auditing.masking import measure as measure_masking
from sophon.auditing.scene import Scene
from sophon.auditing.words import filtered_roles
from sophon.checkpoint import Checkpoint, package_versions
from sophon.config import Config, plain
from sophon.devices import resolve_device
from sophon.seeds import derive_seed
from sophon.tasks import kind_of
from sophon.tracking import Tracker

if TYPE_CHECKING:  # scores need libraries that take long to load, and that no attack uses
    from sophon.api.audit import Audit
    from sophon.auditing.summary import Context


def context_of(audit: Audit, tracker: Tracker) -> Context:
    """Return what is known of an audit before its attempts, measuring intactness, masking and geometry."""
    from sophon.auditing.summary import Context, Intactness

    scene = audit.scene
    with tracker.progress("measure", 3) as advance:
        before, after = (
            measured(scene.task, scene.models[role], audit.original, "test", key)
            for role, key in (("unprotected", "reference"), ("protected", "checkpoint"))
        )
        advance("the original domain")
        masking = _masking(audit)
        advance("masking")
        geometry = _geometry(audit)
        advance("distance to the reference")
    return Context(
        date=datetime.now(UTC).date().isoformat(),
        checkpoint=_origin(audit.protected),
        reference=_origin(audit.reference),
        filtered=dict(_filtered(audit)),
        domains={
            "original": audit.original.name,
            "restricted": scene.restricted.name,
            "benign": None if scene.benign is None else scene.benign.name,
        },
        hashes=dict(scene.restricted.hashes),
        support=None if scene.support is None else dict(scene.support),
        mechanisms=mechanisms_of(audit.protected.manifest),
        intactness=Intactness.of(scene.task.metric, before, after),
        masking=masking,
        geometry=geometry,
        config=identifying(
            as_loaded(audit.config, scene.spec), "name", "seed", "task", "domain", "model", "attack", "threads"
        ),
        packages=package_versions(),
    )


def _filtered(audit: Audit) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield of each filtered model its role, where it is from, and how well it does on the original domain."""
    for role, checkpoint in zip(filtered_roles(len(audit.filtered)), audit.filtered, strict=True):
        value = measured(audit.scene.task, checkpoint.model, audit.original, "test", "filtered").value
        yield role, {**_origin(checkpoint), "original": value}


def _geometry(audit: Audit) -> list[dict[str, Any]]:
    config, scene = audit.config, audit.scene
    return measure_geometry(
        scene.models, scene.spec, scene.task, audit.original, scene.restricted, derive_seed(config.seed, "geometry")
    )


def _masking(audit: Audit) -> Masking | None:
    config, scene = audit.config, audit.scene
    exact = task_of(replace(config, amp="none"), scene.spec, resolve_device(config.device))
    seed = derive_seed(config.seed, "masking")
    return measure_masking(scene.models, scene.spec, exact, scene.restricted, config.attack.masking, seed)


def identifying(config: Config, *keys: str) -> dict[str, Any]:
    """Return parts of the configuration without what decides only where and by whom the work is done."""
    parts = plain(config, *keys)
    for key in ("reuse", "shard", "shards"):
        del parts["attack"][key]
    return parts


def gallery_of(config: Config, scene: Scene, folder: Path, tracker: Tracker) -> list[dict[str, str]]:
    """Draw a grid of images of every model before any attack; return [] for models that generate nothing."""
    count = config.attack.samples
    if not count or kind_of(scene.spec) != "denoising":
        return []
    seed = derive_seed(config.seed, "samples")
    real = scene.restricted["test"].spread(count)
    prompts = real.prompts or ()
    grids = {}
    with tracker.progress("samples", len(scene.models)) as advance:
        for role, model in scene.models.items():
            images = scene.task.sample(model, count, seed, prompts)
            assert images is not None  # a denoiser draws
            grids[f"{role} model, not attacked"] = images
            advance(role)
    return write_gallery(folder, {f"real images of {scene.restricted.name}": real.images.cpu(), **grids})


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    method = checkpoint.manifest.get("method")
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "name": checkpoint.manifest.get("name"),
        "method": None if method is None else method["name"],
    }
