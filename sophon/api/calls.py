"""The calls: protect, audit and load, from Python."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from sophon.api import audit as auditing
from sophon.api import protect as protecting
from sophon.api.common import doubt
from sophon.api.contained import contained
from sophon.api.inputs import Choice, Data, Model, checkpoint_of, config_of, domain_of, domains_by_name, in_memory
from sophon.api.protect import Protection
from sophon.api.results import Audited, Protected
from sophon.checkpoint import Checkpoint, read_checkpoint
from sophon.config import Config
from sophon.devices import resolve_device
from sophon.errors import UserError
from sophon.paths import exists
from sophon.protection.resume import STATE_FILE, read_state
from sophon.run_folder import run_folder
from sophon.tasks import kind_of
from sophon.tracking import Tracker


def protect(
    model: Model,
    original: Data,
    restricted: Data,
    *,
    method: Choice = None,
    attackers: Choice = None,
    guard: Choice = None,
    settings: Mapping[str, Any] | None = None,
    name: str = "protected",
    seed: int = 0,
    device: str = "auto",
    run_dir: str | PathLike[str] | None = None,
    progress: bool = False,
) -> Protected:
    """Make a model hard to fine-tune on the restricted domain, within what the guard allows the original one to lose.

    The model that is given stays as it is, and so does everything that is global: random generators, threads, signals.

    Args:
        model: a ``torch.nn.Module`` (of timm, torchvision, transformers or diffusers; any other one through `adapt`),
            a diffusers pipeline, what `load` or `adapt` returned, or the folder of a checkpoint or of a pipeline.
        original: what the model was made for: a folder of ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``, a torch
            ``Dataset`` of (image, label), a pair of arrays, a Hugging Face ``Dataset``, or a `Domain` of one of these.
        restricted: what it is to be hard to fine-tune for, likewise; several as a list of `Domain`.
        method: the name of a file of ``conf/method``, the path of one's own, or a mapping; None for what is usual.
        attackers: whom the protection simulates, likewise of ``conf/sampler``, or an `Attackers`.
        guard: the constraint on the original domain, likewise of ``conf/guard``, or a `Guard`.
        settings: further values by dotted key, ``{"method.rounds": 200}``.
        name: what reports call it.
        seed: every random choice derives from it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        run_dir: a folder of the run's own, in which the same call goes on where it stopped; None keeps nothing.
        progress: show progress on stderr.

    Raises:
        UserError: something that was given is wrong; one line says what, where and what is allowed.
        GuardError: no state kept the original domain within the guard's tolerance.
    """
    data = domain_of(original, "original")
    with contained(), _folder(run_dir) as folder:
        reference = checkpoint_of(model, data, "model")
        config = config_of(
            "protect",
            reference.spec,
            kind_of(reference.spec),
            data,
            domains_by_name(restricted, "restricted"),
            choices={"method": method, "sampler": attackers, "guard": guard},
            settings=settings,
            facts={"name": name, "seed": seed, "device": device},
        )
        _threads(config)
        protection = protecting.prepare(config, reference, resolve_device(device))
        with run_folder(folder, "protect", protection.identity):
            if exists(folder / "checkpoint"):
                return _already(protection, folder)
            _warn(doubt(protection.context.task, reference.model, protection.context.original, "model"))
            tracker = Tracker(progress=progress)
            if protection.note:
                tracker.say(protection.note)
            protected = protecting.run(protection, folder, tracker)
            assert protected is not None  # there is but one rank
            if run_dir is not None:
                protected.save(folder / "checkpoint")
        return protected


def audit(
    model: Model | Protected,
    reference: Model | None = None,
    original: Data = None,
    restricted: Data = None,
    *,
    filtered: Model | list[Model] | None = None,
    benign: Data = None,
    attacks: Choice = None,
    settings: Mapping[str, Any] | None = None,
    name: str = "audit",
    seed: int = 0,
    device: str = "auto",
    run_dir: str | PathLike[str] | None = None,
    progress: bool = False,
) -> Audited:
    """Attack a protected model, its unprotected reference and a fresh one, and say how well the protection holds.

    Args:
        model: the protected model: what `protect` returned, or as there any other one, with ``reference``, ``original``
            and ``restricted``. Of a checkpoint that `protect` or the command line made the audit also says which
            attacks the protection has seen.
        reference: the model before its protection.
        original: what both were made for; see `protect`.
        restricted: what the protected one is to be hard to fine-tune for.
        filtered: a model, or a list of them, of the same pre-training without the restricted classes, to measure
            removal against; of several the one counts that attackers get most out of.
        benign: what it may be fine-tuned for, to see that this is not harmed.
        attacks: the name of a file of ``conf/attack``, the path of one's own, or a mapping; None for the standard ones.
        settings: further values by dotted key, ``{"attack.seeds": 3}``.
        name: what reports call it.
        seed: every random choice derives from it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        run_dir: a folder of the audit's own, in which the same call goes on where it stopped; None keeps nothing.
        progress: show progress on stderr.

    Raises:
        UserError: something that was given is wrong; one line says what, where and what is allowed.
    """
    if isinstance(model, Protected):
        protection = model.protection
        reference = protection.reference if reference is None else reference
        original = protection.config.domain.original if original is None else original
        restricted = list(protection.config.domain.restricted.values()) if restricted is None else restricted
        model = in_memory(model.model, protection.reference.spec, model.manifest, "model")
    missing = {"reference": reference, "original": original, "restricted": restricted}
    if reference is None or original is None or restricted is None:
        lacking = ", ".join(key for key, value in missing.items() if value is None)
        raise UserError(f"{lacking}: missing; give it, or as model what sophon.protect returned")
    data, attacked = domain_of(original, "original"), domains_by_name(restricted, "restricted")
    if len(attacked) > 1:
        raise UserError(f"restricted: {', '.join(attacked)} are several; audit one at a time")
    with contained(), _folder(run_dir) as folder:
        others = [] if filtered is None else filtered if isinstance(filtered, list) else [filtered]
        checkpoints = [
            checkpoint_of(model, data, "model"),
            checkpoint_of(reference, data, "reference"),
            *(checkpoint_of(other, data, "filtered") for other in others),
        ]
        protected = checkpoints[0]
        config = config_of(
            "audit",
            protected.spec,
            kind_of(protected.spec),
            data,
            attacked,
            benign=None if benign is None else domain_of(benign, "benign"),
            choices={"attack": attacks},
            settings=settings,
            facts={"name": name, "seed": seed, "device": device},
        )
        _threads(config)
        if config.workers > 1:
            _require_portable(config, *checkpoints)
        auditing.share_threads(config)
        [prepared] = auditing.prepare(config, *checkpoints)
        runner = auditing.runner_of(prepared, folder)
        keys = ("model", "reference", *("filtered" for _ in others))
        for checkpoint, key in zip(checkpoints, keys, strict=True):
            _warn(doubt(prepared.scene.task, checkpoint.model, prepared.original, key))
        with run_folder(folder, "audit", auditing.identity_of(prepared)):
            audited = auditing.run(prepared, runner, Tracker(progress=progress), checkpoints)
        assert audited is not None  # there is but one shard
        return audited


def load(folder: str | PathLike[str]) -> Checkpoint:
    """Read a checkpoint that sophon wrote, and verify it; its ``model`` is on the CPU, in evaluation mode.

    Raises:
        UserError: something is missing or corrupt, or the weights are not those that were written.
    """
    return read_checkpoint(Path(folder).expanduser(), "folder")


@contextmanager
def _folder(run_dir: str | PathLike[str] | None) -> Iterator[Path]:
    if run_dir is not None:
        yield Path(run_dir).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="sophon-") as folder:
        yield Path(folder) / "run"


def _threads(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)


def _require_portable(*handed_over: object) -> None:
    try:
        ForkingPickler.dumps(handed_over)  # as it is sent to the processes
    except Exception as error:
        raise UserError(
            f"workers: a model or data in memory cannot be handed to other processes ({error}); give folders, or 1"
        ) from error


def _already(protection: Protection, folder: Path) -> Protected:
    checkpoint = read_checkpoint(folder / "checkpoint", "run_dir")
    history = read_state(folder / STATE_FILE).at.history
    return Protected(checkpoint.model, history, checkpoint.manifest, protection)


def _warn(line: str | None) -> None:
    if line is not None:
        warnings.warn(line, stacklevel=3)
