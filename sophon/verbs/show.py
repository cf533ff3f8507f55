"""The verb that says what a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sophon.api.common import required
from sophon.checkpoint import Checkpoint, read_checkpoint
from sophon.config import Config, default_folder


def show(config: Config) -> None:
    """Verify a checkpoint, and print what it is: model, domains, method, intactness, audits."""
    checkpoint = read_checkpoint(required(config.checkpoint or str(default_folder(config, "protect")), "checkpoint"))
    rows = list(_rows(checkpoint))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _rows(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    spec, manifest = checkpoint.spec, checkpoint.manifest
    method, history = manifest.get("method"), manifest.get("history") or {}
    yield "checkpoint", f"{checkpoint.path}, weights verified (sha256 {checkpoint.sha256[:12]})"
    size = f"{spec.channels} x {spec.image_size} x {spec.image_size}"
    yield "model", f"{spec.library} {spec.architecture}, {size}, {len(spec.classes)} classes"
    if method is None:
        yield "protected", "no: the unprotected reference"
    else:
        rounds = f", {history['rounds']} rounds" if "rounds" in history else ""
        yield "protected", f"with {method['name']}{rounds}, seed {manifest.get('seed')}"
    for role, group in (manifest.get("domains") or {}).items():
        for domain in [group] if isinstance(group, Mapping) else group:
            yield role, f"{domain['name']}, {len(domain['classes'])} classes"
    yield "original work", _intactness(manifest.get("intactness") or {})
    if method is not None:
        yield from (("audit", f"{audit['word']}: {audit['sentence']}") for audit in manifest.get("audits") or [])
        if not manifest.get("audits"):
            yield "audit", "not audited, or not written into it (export with audit=RUN_DIR)"
    yield "versions", ", ".join(f"{name} {number}" for name, number in (manifest.get("versions") or {}).items())


def _intactness(measured: Mapping[str, Any]) -> str:
    after, before = measured.get("after") or {}, measured.get("before") or {}
    if "test" not in after:
        return "not measured"
    unit = f" {measured['unit']}" if measured.get("unit") else ""
    earlier = f", before protection {before['test']:.4g}{unit}" if "test" in before else ""
    return f"{measured.get('metric', 'accuracy')} on test {after['test']:.4g}{unit}{earlier}"
