"""A protection, from what it starts with to the model that is released."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophon.api.common import (
    as_loaded,
    asked_precision,
    domains_of,
    metric_of,
    require_float32,
    task_of,
    with_pseudo_labels,
)
from sophon.api.manifests import both_splits, manifest_of
from sophon.attacker import FineTuneStrategy
from sophon.config import Config, GuardConfig, keyed, plain
from sophon.domains import LoadedDomain
from sophon.errors import GuardError, UserError
from sophon.export import Checkpoint, write_checkpoint
from sophon.finetune import Loss, rehearse
from sophon.losses import READS_LABELS, SUPPRESSION_LOSSES
from sophon.protect import coordinates
from sophon.protect.distributed import ALONE, Ranks
from sophon.protect.starts import check_simulated
from sophon.protect.state import Position
from sophon.protect.trainer import Trainer
from sophon.sampler import StrategySampler
from sophon.tasks import Task
from sophon.tracking import Tracker

# points of accuracy on val that a model may differ by from itself in other coordinates
ROUNDING = 1.0


@dataclass(frozen=True)
class Protection:
    """What a protection starts from, read and ready.

    Attributes:
        config: the run's.
        reference: the unprotected checkpoint.
        original: its domain, with ``train``, ``val`` and ``test``.
        restricted: the domains that are to be hard to learn, each with ``adapt`` and ``query``.
        task: the model kind.
        identity: everything that decides the result, plain JSON data.
    """

    config: Config
    reference: Checkpoint
    original: LoadedDomain
    restricted: tuple[LoadedDomain, ...]
    task: Task
    identity: dict[str, Any]


def prepare(config: Config, reference: Checkpoint, device: torch.device) -> Protection:
    """Load the domains, and refuse what the model and its simulated attackers cannot do.

    Args:
        config: the run's.
        reference: the unprotected checkpoint; moved to ``device``.
        device: where to compute.

    Raises:
        UserError: the domains, the method and the model do not go together.
    """
    task = task_of(config, reference.spec, device, protects=True)
    original, restricted = protected_domains(config, reference, task, device)
    identity = {
        **plain(config, "seed", "task", "method", "sampler", "guard"),
        **asked_precision(config),
        "reference": reference.sha256,
        **hashes_of(original, restricted),
    }
    require_float32(config.method.gains, task)
    if config.method.gains:
        coordinates.gains_for(reference.model, config.method.gains)
    for index, operations in enumerate(StrategySampler(config.sampler).surgeries):
        check_simulated(operations, f"sampler.surgeries[{index}]")
    _rehearse(config, task, reference.model, original, restricted)
    return Protection(config, reference, original, restricted, task, identity)


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


def protected_domains(
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


def hashes_of(original: LoadedDomain, restricted: Sequence[LoadedDomain]) -> dict[str, Any]:
    """Return what says of which images a run is; of several restricted domains also their order."""
    if len(restricted) == 1:
        return {"original": original.hashes, "restricted": restricted[0].hashes}
    several = {each.name: each.hashes for each in restricted}
    return {"original": original.hashes, "restricted": several, "order": [each.name for each in restricted]}


@dataclass(frozen=True)
class Protected:
    """A protected model.

    Attributes:
        model: in evaluation mode.
        history: a row a round: losses, and the metric on ``val`` where the guard looked.
        manifest: what ``sophon.json`` says of it: ``intactness`` what the protection cost the original domain.
        protection: what it was made from.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    manifest: dict[str, Any]
    protection: Protection

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint: the library's own files, ``sophon.json`` and the model card.

        Raises:
            UserError: ``folder`` holds something else, or the file system refuses.
        """
        write_checkpoint(folder, self.model, self.protection.reference.spec, self.manifest)


def run(protection: Protection, folder: Path, tracker: Tracker, ranks: Ranks = ALONE) -> Protected | None:
    """Protect the model, or go on where ``folder`` says; None on all ranks but the first.

    Raises:
        GuardError: no round's state satisfied the guard.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the round in progress was finished and saved.
    """
    config, reference = protection.config, protection.reference.model
    trainer = Trainer(
        loops_model(config, reference),
        reference,
        protection.task,
        protection.original,
        protection.restricted,
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
    return release(protection, trainer.model, position) if ranks.rank == 0 else None


def loops_model(config: Config, reference: nn.Module) -> nn.Module:
    """Return the copy of the reference that the loops work on."""
    return coordinates.linear(reference) if config.method.gains else copy.deepcopy(reference)


def release(protection: Protection, model: nn.Module, position: Position) -> Protected:
    """Return what is released of what the loops have made, with what it cost the original domain; reads ``test``.

    Raises:
        GuardError: it loses what the loops' own model had kept, for the gains are more than float32 can carry.
    """
    config, task, original = protection.config, protection.task, protection.original
    reference = protection.reference
    if config.method.gains:
        model = _in_other_coordinates(config, model, reference.model, task, original)
    before = both_splits(task, reference.model, original, "reference")
    after = both_splits(task, model, original, "method.fts_lr")
    guard = {"tolerance": config.guard.tolerance, "relative": config.guard.relative}
    general = manifest_of(
        as_loaded(config, reference.spec), "protect", reference.sha256, original, protection.restricted
    )
    manifest = {
        **general,
        "method": asdict(config.method),
        # without FTS steps nobody was simulated, so that nothing was seen
        "sampler_support": StrategySampler(config.sampler).support() if config.method.fts_steps else None,
        "intactness": {**metric_of(task), "before": before, "after": after, **guard},
        "history": {"rounds": position.round, "good_round": position.good_round, "rollbacks": position.rollbacks},
    }
    return Protected(model.eval(), position.history, manifest, protection)


def _in_other_coordinates(
    config: Config, model: nn.Module, reference: nn.Module, task: Task, original: LoadedDomain
) -> nn.Module:
    images, gains = original["train"], config.method.gains
    made = coordinates.release(model, reference, task, images, gains, config.method.spread, config.seed)
    kept, found = (task.evaluate(each, original["val"]) for each in (model, made))
    if not abs(found - kept) <= ROUNDING:
        raise GuardError(
            f"method.gains: {list(gains)} drowns the original work in rounding: {task.metric.name} on val "
            f"{found:.4g} instead of {kept:.4g}; lower them"
        )
    return made


def lost_on_test(guard: GuardConfig, task: Task, before: float, after: float) -> str | None:
    """Return a line of warning if ``test`` lost more than the guard, which reads ``val``, lets pass."""
    loss = before - after if task.metric.higher_is_better else after - before
    if guard.relative:
        loss *= 100 / (abs(before) or 1)
    if loss <= guard.tolerance:
        return None
    unit = " %" if guard.relative else ""
    return f"test lost {loss:.3g}{unit}, more than guard.tolerance={guard.tolerance:g}{unit}, which val keeps"
