"""The verbs that make checkpoints: pretrain, protect, export."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon import __version__
from sophon.attacker import FineTuneStrategy
from sophon.audit.verdict import format_value
from sophon.config import ClampConfig, Config, GuardConfig, MethodConfig, keyed, plain
from sophon.devices import resolve_device
from sophon.domains import LoadedDomain, load_original
from sophon.errors import GuardError, UserError
from sophon.export import Checkpoint, read_checkpoint, write_checkpoint
from sophon.files import read_json
from sophon.finetune import Loss, fine_tune, rehearse
from sophon.losses import READS_LABELS, SUPPRESSION_LOSSES
from sophon.models import ModelSpec, create
from sophon.paths import exists
from sophon.protect import coordinates
from sophon.protect.distributed import Ranks, join, require_work
from sophon.protect.starts import check_simulated
from sophon.protect.state import STATE_FILE, Position, last_good
from sophon.protect.trainer import Trainer
from sophon.run_folder import owned_place, run_folder
from sophon.sampler import SamplerConfig, StrategySampler
from sophon.seeds import derive_seed, seed_all
from sophon.tasks import Task
from sophon.tracking import Tracker
from sophon.verbs.common import (
    as_loaded,
    asked_precision,
    default,
    domains_of,
    doubt,
    measured,
    metric_of,
    reference_of,
    require_float32,
    required,
    run_dir,
    say_domains,
    task_of,
    tracker_of,
    warn,
    with_pseudo_labels,
)

# points of accuracy on val that a model may differ by from itself in other coordinates
ROUNDING = 1.0


def pretrain(config: Config) -> None:
    """Train the unprotected reference on the original domain; write ``run_dir/checkpoint``."""
    device = resolve_device(config.device)
    original = load_original(
        config.domain.original,
        image_size=config.model.image_size,
        channels=config.model.channels,
        memory_gb=config.domain.memory_gb,
    ).to(device)
    say_domains(original)
    if config.pretrain.steps == 0 and config.model.weights is None and not config.model.pretrained:
        raise UserError(
            "pretrain.steps: 0 needs model.weights or model.pretrained=true; a random model is no reference"
        )
    identity = {
        **plain(config, "seed", "task", "model", "pretrain"),
        **asked_precision(config),
        "original": original.hashes,
    }
    seed_all(derive_seed(config.seed, "pretrain"))
    model, spec = create(config.model, original.classes)
    model.to(device)
    task = task_of(config, spec, device)
    rehearse(copy.deepcopy(model), config.pretrain, task, original["train"], "pretrain.batch_size")
    with run_folder(run_dir(config), "pretrain", identity) as folder:
        if exists(folder / "checkpoint"):
            print(f"already done: {folder / 'checkpoint'}")
        else:
            _pretrain(config, model, spec, task, original, folder)


def _pretrain(
    config: Config, model: nn.Module, spec: ModelSpec, task: Task, original: LoadedDomain, folder: Path
) -> None:
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "pretrain", "batches"))
    with tracker_of(config, folder) as tracker, tracker.progress("pretrain", config.pretrain.steps) as advance:

        def after_step(step: int, loss: float) -> None:
            tracker.log({"loss": loss}, step)
            advance(f"loss {loss:.3f}")

        if not fine_tune(model, config.pretrain, task, original["train"], generator, after_step):
            raise UserError(
                f"pretrain.lr: the loss stopped being finite at lr={config.pretrain.lr}; lower it, in a new run_dir"
            )
    origin = {key: getattr(config.model, key) for key in ("weights", "pretrained", "strip_prefix")}
    manifest = _manifest(replace(config, model=replace(spec.config(), **origin)), "pretrain", None, original)
    key = "pretrain.lr" if config.pretrain.steps else "model.weights"
    manifest["intactness"] = {**metric_of(task), "after": _both_splits(task, model, original, key)}
    if config.pretrain.steps == 0:
        warn(doubt(task, model, original, key))
    write_checkpoint(folder / "checkpoint", model, spec, manifest)
    print(f"{folder / 'checkpoint'}: {task.metric.name} {_figures(task, manifest['intactness']['after'])}")


def protect(config: Config) -> None:
    """Protect the reference against fine-tuning on the restricted domains; write ``run_dir/checkpoint``.

    Started by torchrun the ranks share the work; the first one alone writes and reports.
    """
    ranks, device = join(config.device)
    with ranks.together():
        require_work(config.method, ranks)
        stage = _stage(config, device)
        doubted = doubt(stage.task, stage.reference.model, stage.original, "reference")
    if len({json.dumps(identity) for identity in ranks.gather(stage.identity)}) > 1:
        raise UserError("the ranks differ in configuration, checkpoint or images; give all of them the same")
    if ranks.rank == 0:
        say_domains(stage.original, *stage.restricted)
    with ExitStack() as ownership:

        def begin() -> bool:
            folder = ownership.enter_context(run_folder(run_dir(config), "protect", stage.identity))
            return not exists(folder / "checkpoint")

        if ranks.first(begin):
            if ranks.rank == 0:
                warn(doubted)
            _protect(config, stage, ranks)
        elif ranks.rank == 0:
            print(f"already done: {run_dir(config) / 'checkpoint'}")


@dataclass(frozen=True)
class _Stage:
    """What a protection starts from, read and ready."""

    reference: Checkpoint
    original: LoadedDomain
    restricted: tuple[LoadedDomain, ...]
    task: Task
    identity: dict[str, Any]


def _stage(config: Config, device: torch.device) -> _Stage:
    reference = reference_of(config)
    task = task_of(config, reference.spec, device, protects=True)
    original, restricted = _domains(config, reference, task, device)
    identity = {
        **plain(config, "seed", "task", "method", "sampler", "guard"),
        **asked_precision(config),
        "reference": reference.sha256,
        **_hashes(original, restricted),
    }
    require_float32(config.method.gains, task)
    if config.method.gains:
        coordinates.gains_for(reference.model, config.method.gains)
    for index, operations in enumerate(StrategySampler(config.sampler).surgeries):
        check_simulated(operations, f"sampler.surgeries[{index}]")
    _rehearse(config, task, reference.model, original, restricted)
    return _Stage(reference, original, restricted, task, identity)


def _rehearse(
    config: Config, task: Task, reference: nn.Module, original: LoadedDomain, restricted: Sequence[LoadedDomain]
) -> None:
    """Refuse now, rather than with a folder begun, what the model and its simulated attackers cannot do."""
    method, sampler = config.method, config.sampler
    step = FineTuneStrategy(batch_size=method.ntr_batch_size)
    loss: Loss = partial(task.original_loss, reference=reference)
    rehearse(copy.deepcopy(reference), step, task, original["train"], "method.ntr_batch_size", loss)
    for domain, head, scope in product(restricted, dict.fromkeys(sampler.heads), dict.fromkeys(sampler.scopes)):
        model = copy.deepcopy(reference)
        task.start_head(model, head, domain.classes)
        step = FineTuneStrategy(scope=scope, batch_size=min(sampler.batch_sizes))
        rehearse(model, step, task, domain["adapt"], "sampler.batch_sizes")
        step = FineTuneStrategy(scope=scope, batch_size=method.query_batch_size)
        rehearse(model, step, task, domain["query"], "method.query_batch_size", task.suppression_loss)


def _domains(
    config: Config, reference: Checkpoint, task: Task, device: torch.device
) -> tuple[LoadedDomain, tuple[LoadedDomain, ...]]:
    """Load the domains, and put the reference where they are: it says what to learn of those without labels."""
    configs, loss = keyed(config.domain.restricted), config.method.suppression_loss
    for key, each in configs.items():
        if each.labels == "none" and loss in READS_LABELS:
            allowed = ", ".join(sorted(set(SUPPRESSION_LOSSES) - READS_LABELS))
            raise UserError(f"method.suppression_loss: '{loss}' reads labels and {key} has none; allowed: {allowed}")
    original, loaded = domains_of(config, reference.spec, device)
    reference.model.to(device)
    restricted = (
        with_pseudo_labels(domain, each, key, task, reference.model)
        for domain, (key, each) in zip(loaded, configs.items(), strict=True)
    )
    return original, tuple(restricted)


def _hashes(original: LoadedDomain, restricted: Sequence[LoadedDomain]) -> dict[str, Any]:
    """Return what says of which images a run is; of several restricted domains also their order."""
    if len(restricted) == 1:
        return {"original": original.hashes, "restricted": restricted[0].hashes}
    several = {each.name: each.hashes for each in restricted}
    return {"original": original.hashes, "restricted": several, "order": [each.name for each in restricted]}


def _protect(config: Config, stage: _Stage, ranks: Ranks) -> None:
    folder, model = run_dir(config), stage.reference.model
    with ExitStack() as stack:
        with ranks.together():
            tracker = stack.enter_context(tracker_of(config, folder)) if ranks.rank == 0 else Tracker()
        trainer = Trainer(
            _start(config, model),
            model,
            stage.task,
            stage.original,
            stage.restricted,
            StrategySampler(config.sampler),
            config.method,
            config.guard,
            config.seed,
            folder,
            tracker,
            ranks,
            config.profile,
        )
        position = trainer.run()
    if ranks.rank == 0:
        _write_protected(
            folder / "checkpoint",
            config,
            stage.reference,
            _released(config, trainer.model, model, stage.task, stage.original),
            stage.task,
            stage.original,
            stage.restricted,
            position,
        )


def _start(config: Config, reference: nn.Module) -> nn.Module:
    """Return the copy of the reference that the loops work on."""
    return coordinates.linear(reference) if config.method.gains else copy.deepcopy(reference)


def _released(config: Config, model: nn.Module, reference: nn.Module, task: Task, original: LoadedDomain) -> nn.Module:
    """Return the model to release of what the loops have made.

    Raises:
        GuardError: it loses what the loops' own model had kept, for the gains are more than float32 can carry.
    """
    if not config.method.gains:
        return model
    images, gains = original["train"], config.method.gains
    made = coordinates.release(model, reference, task, images, gains, config.method.spread, config.seed)
    kept, found = (task.evaluate(each, original["val"]) for each in (model, made))
    if not abs(found - kept) <= ROUNDING:
        raise GuardError(
            f"method.gains: {list(gains)} drowns the original work in rounding: {task.metric.name} on val "
            f"{found:.4g} instead of {kept:.4g}; lower them"
        )
    return made


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
    original, restricted = _domains(config, reference, task, device)
    say_domains(original, *restricted)
    for key, value in _hashes(original, restricted).items():
        if value != identity.get(key):
            role = "original" if key == "original" else "restricted"
            raise UserError(
                f"domain.{role}: not the images that '{run}' started from; give the run's own configuration"
            )
    model = _start(config, reference.model)
    model.load_state_dict(weights)
    model = _released(config, model, reference.model, task, original)
    _write_protected(out, config, reference, model, task, original, restricted, position)


def _manifest(
    config: Config, verb: str, parent: str | None, original: LoadedDomain, restricted: Sequence[LoadedDomain] = ()
) -> dict[str, Any]:
    several = [_facts(each) for each in restricted]
    more = {"restricted": several[0] if len(several) == 1 else several} if several else {}
    return {
        "sophon": __version__,
        "verb": verb,
        "name": config.name,
        "config": plain(config),
        "method": None,
        "sampler_support": None,
        "domains": {"original": _facts(original), **more},
        "seed": config.seed,
        "parent_sha256": parent,
    }


def _facts(domain: LoadedDomain) -> dict[str, Any]:
    return {"name": domain.name, "classes": list(domain.classes), "hashes": dict(domain.hashes)}


def _write_protected(
    out: Path,
    config: Config,
    reference: Checkpoint,
    model: nn.Module,
    task: Task,
    original: LoadedDomain,
    restricted: Sequence[LoadedDomain],
    position: Position,
) -> None:
    """Measure what the protection cost the original domain, ``test`` read once, and write the checkpoint."""
    before = _both_splits(task, reference.model, original, "reference")
    after = _both_splits(task, model, original, "method.fts_lr")
    guard = {"tolerance": config.guard.tolerance, "relative": config.guard.relative}
    manifest = {
        **_manifest(as_loaded(config, reference.spec), "protect", reference.sha256, original, restricted),
        "method": asdict(config.method),
        # without FTS steps nobody was simulated, so that nothing was seen
        "sampler_support": StrategySampler(config.sampler).support() if config.method.fts_steps else None,
        "intactness": {**metric_of(task), "before": before, "after": after, **guard},
        "history": {"rounds": position.round, "good_round": position.good_round, "rollbacks": position.rollbacks},
    }
    write_checkpoint(out, model, reference.spec, manifest)
    print(
        f"{out}: round {position.good_round} of {position.round}, {task.metric.name} on the original domain "
        f"{_figures(task, before)} before, {_figures(task, after)} after"
    )
    warn(lost_on_test(config.guard, task, before["test"], after["test"]))


def lost_on_test(guard: GuardConfig, task: Task, before: float, after: float) -> str | None:
    """Return a line of warning if ``test`` lost more than the guard, which reads ``val``, lets pass."""
    loss = before - after if task.metric.higher_is_better else after - before
    if guard.relative:
        loss *= 100 / (abs(before) or 1)
    if loss <= guard.tolerance:
        return None
    unit = " %" if guard.relative else ""
    return f"test lost {loss:.3g}{unit}, more than guard.tolerance={guard.tolerance:g}{unit}, which val keeps"


def _both_splits(task: Task, model: nn.Module, original: LoadedDomain, key: str) -> dict[str, float]:
    return {split: measured(task, model, original, split, key) for split in ("val", "test")}


def _figures(task: Task, values: dict[str, float]) -> str:
    return ", ".join(f"{split} {format_value(value, metric_of(task))}" for split, value in values.items())
