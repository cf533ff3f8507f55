"""The verb that copies a checkpoint to where it is released from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sophon.api.common import default, reference_of, required, say_domains, task_of
from sophon.api.protecting import Protection, hashes_of, loops_model, protected_domains, release
from sophon.config import ClampConfig, Config, GuardConfig, MethodConfig
from sophon.devices import resolve_device
from sophon.errors import UserError
from sophon.export import read_checkpoint, write_checkpoint
from sophon.files import read_json
from sophon.paths import exists
from sophon.protect.state import STATE_FILE, last_good
from sophon.run_folder import owned_place
from sophon.sampler import SamplerConfig
from sophon.verbs.protect import say_released


def export(config: Config) -> None:
    """Copy a verified checkpoint to ``out``; from a run that is not finished, its last good state."""
    source = required(config.checkpoint or str(default(config, "protect")), "checkpoint")
    out = Path(config.out) if config.out is not None else default(config, "export")
    unfinished = exists(Path(source) / STATE_FILE) and not exists(Path(source) / "checkpoint")
    with owned_place(out):
        if not unfinished:
            checkpoint = read_checkpoint(source)
            write_checkpoint(out, checkpoint.model, checkpoint.spec, checkpoint.manifest)
            print(f"exported to {out}")
        else:
            _export_unfinished(config, Path(source), out)


def _export_unfinished(config: Config, run: Path, out: Path) -> None:
    device = resolve_device(config.device)
    reference = reference_of(config)
    identity = read_json(run / "run.json")["identity"]
    if identity["reference"] != reference.sha256:
        raise UserError(f"reference: not the checkpoint that '{run}' started from; give that one")
    weights, position = last_good(run)
    # what the manifest says of the run is the run's, whatever this command's configuration has
    config = replace(
        config,
        seed=identity["seed"],
        method=MethodConfig(**identity["method"] | {"clamp": ClampConfig(**identity["method"].get("clamp", {}))}),
        sampler=SamplerConfig(**identity["sampler"]),
        guard=GuardConfig(**identity["guard"]),
    )
    task = task_of(config, reference.spec, device, protects=True)
    original, restricted = protected_domains(config, reference, task, device)
    say_domains(original, *restricted)
    for key, value in hashes_of(original, restricted).items():
        if value != identity.get(key):
            role = "original" if key == "original" else "restricted"
            raise UserError(
                f"domain.{role}: not the images that '{run}' started from; give the run's own configuration"
            )
    protection = Protection(config, reference, original, restricted, task, identity)
    model = loops_model(config, reference.model)
    model.load_state_dict(weights)
    released = release(protection, model, position)
    released.save(out)
    say_released(out, config, task, released)
