"""What an audit attacks, and whether an attack can be tried on it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing.lora import add_adapters
from sophon.domains import LoadedDomain, few_shot
from sophon.errors import UserError
from sophon.finetune import rehearse
from sophon.models import ModelSpec, adapter_of
from sophon.surgery import NEED_FRESH
from sophon.tasks import Task


@dataclass(frozen=True)
class Scene:
    """What an audit attacks, and what its attackers have.

    Attributes:
        models: ``protected``, ``unprotected`` and those filtered ones that are given; never changed.
        spec: of both; ``scratch`` is built from it.
        task: the model kind.
        restricted: the domain that is attacked.
        original: for attackers who train on it first.
        benign: for benign transfer, and for attackers who train on it first; None without.
        relative: a public model of the same architecture that attackers have; None without.
        provenance: by role (``scratch`` too), what identifies the model and how it is measured.
        support: of protection's sampler, from the checkpoint's manifest; None if it was not protected by sophon.
    """

    models: Mapping[str, nn.Module]
    spec: ModelSpec
    task: Task
    restricted: LoadedDomain
    original: LoadedDomain | None = None
    benign: LoadedDomain | None = None
    relative: nn.Module | None = None
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    support: Mapping[str, Any] | None = None

    @cached_property
    def buildable(self) -> bool:
        """Whether there can be a model with random weights: a module in memory may have nothing that builds it."""
        with torch.random.fork_rng(devices=[]):
            return adapter_of(self.spec).fresh() is not None


def unfit(strategy: FineTuneStrategy, scene: Scene, domain: LoadedDomain) -> str | None:
    """Return why a strategy cannot be tried on these models and this domain; None if it can."""
    model = copy.deepcopy(scene.models["protected"])
    with torch.random.fork_rng(devices=[]):
        try:
            few_shot(domain["attack"], strategy.data_budget, torch.Generator())
            for operation in strategy.surgery:
                _check_means(operation, model, scene)
            scene.task.start_head(model, strategy.head, domain.classes)
            if strategy.scope == "lora":
                add_adapters(model, strategy.lora_rank, strategy.lora_layers, scene.task.head_names(model))
            rehearse(model, strategy, scene.task, domain["attack"], "batch_size")
        except UserError as error:
            return str(error)
    return None


def _check_means(operation: Operation, model: nn.Module, scene: Scene) -> None:
    """Refuse an operation whose means are not there, and leave ``model`` with the head that it would have after it."""
    given = dict(operation.arguments)
    if operation.name in NEED_FRESH and not scene.buildable:
        raise UserError(f"surgery: {operation.name} needs a model with random weights, and this one has no factory")
    if operation.name == "interpolate" and scene.relative is None:
        raise UserError("surgery: interpolate needs a public relative; set attack.relative")
    if given.get("domain") == "benign":
        if scene.benign is None:
            raise UserError(f"surgery: {operation.name} needs a benign domain; set domain.benign")
        if operation.name == "heal" and scene.task.head_names(model):
            scene.task.start_head(model, "fresh", scene.benign.classes)
    blocks = len(scene.task.blocks(model))
    if operation.name == "reinitialise" and given.get("blocks", 1) > blocks:
        raise UserError(f"surgery: reinitialise has {given['blocks']} blocks to replace; the model has only {blocks}")
