"""The verb that copies a checkpoint to where it is released from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sophon.api.common import checkpoint_of, required, say_domains
from sophon.api.protect import last_good, prepare
from sophon.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sophon.config import Config, GuardConfig, MethodConfig, default_folder
from sophon.devices import resolve_device
from sophon.errors import UserError
from sophon.files import read_json
from sophon.paths import exists
from sophon.protection.resume import STATE_FILE
from sophon.run_folder import owned_place
from sophon.sampler import SamplerConfig
from sophon.verbs.protect import say_released
from sophon.verbs.report import parts_of


def export(config: Config) -> str | None:
    """Copy a verified checkpoint to ``out``; of a run that is not finished, its last good state, as `protect` does.

    With ``audit`` the model card says what that audit found.
    """
    source = required(config.checkpoint or str(default_folder(config, "protect")), "checkpoint")
    out = Path(config.out) if config.out is not None else default_folder(config, "export")
    unfinished = exists(Path(source) / STATE_FILE) and not exists(Path(source) / "checkpoint")
    with owned_place(out):
        if unfinished:
            if config.audit is not None:
                raise UserError("audit: this run is not finished, so nothing of it was audited; leave the key out")
            return _export_unfinished(config, Path(source), out)
        checkpoint = read_checkpoint(source)
        manifest = checkpoint.manifest
        if config.audit is not None:
            manifest = {**manifest, "audits": _audits(Path(config.audit), checkpoint)}
        write_checkpoint(out, checkpoint.model, checkpoint.spec, manifest)
        print(f"exported to {out}")
        return None


def _audits(folder: Path, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return what the card says of the audit in a folder, by restricted domain; it has to be of this checkpoint."""
    from sophon.auditing.card import facts  # pandas, scipy
    from sophon.auditing.summary import AuditReport

    audits = [AuditReport.read(part, "audit") for part in parts_of(Path(required(str(folder), "audit")), "audit")]
    for audit in audits:
        attacked = audit.context.checkpoint["sha256"]
        if attacked != checkpoint.sha256:
            raise UserError(
                f"audit: '{folder}' attacked other weights (sha256 {attacked[:12]}) than those of '{checkpoint.path}' "
                f"({checkpoint.sha256[:12]}); give the audit of this checkpoint"
            )
    return [facts(audit) for audit in audits]


def _export_unfinished(config: Config, run: Path, out: Path) -> str | None:
    reference = checkpoint_of(config, "reference", "pretrain")
    identity = read_json(run / "run.json")["identity"]
    if identity["reference"] != reference.sha256:
        raise UserError(f"reference: not the checkpoint that '{run}' started from; give that one")
    # what the manifest says of the run is the run's, whatever this command's configuration has
    config = replace(
        config,
        seed=identity["seed"],
        method=MethodConfig(**identity["method"]),
        sampler=SamplerConfig(**identity["sampler"]),
        guard=GuardConfig(**identity["guard"]),
    )
    protection = prepare(config, reference, resolve_device(config.device))
    context = protection.context
    say_domains(context.original, *context.restricted)
    for key in ("original", "restricted", "order"):
        if protection.identity.get(key) != identity.get(key):
            role = "original" if key == "original" else "restricted"
            raise UserError(
                f"domain.{role}: not the images that '{run}' started from; give the run's own configuration"
            )
    released = last_good(protection, run)
    released.save(out)
    return say_released(out, config, context.task, released)
