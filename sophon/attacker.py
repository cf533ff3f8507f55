"""`FineTuneStrategy`, the one vocabulary of an attacker.

The protection samples strategies and simulates them; the audit takes strategies from its configuration and runs them.
Because both speak of the same dataclass, `sophon.held_out` can say whether protection has seen an attack.

Help and refusals read this module: it does not wait for torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sophon.errors import UserError, choose
from sophon.ranges import check_value, limited


@dataclass(frozen=True)
class Operation:
    """A change to the released weights before fine-tuning; what it does is in `sophon.surgery`.

    Attributes:
        name: a key of `sophon.surgery.OPERATIONS`, or the dotted path of a function like those.
        arguments: of that function: pairs of name and value (numbers, strings, booleans or null), sorted by name.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return the form that configurations and result files have, such as ``{operation: noise, scale: 0.1}``."""
        return {"operation": self.name, **dict(self.arguments)}


def operations_from(key: str, entries: Any) -> tuple[Operation, ...]:
    """Make operations of plain data: a list of mappings, each with ``operation`` and its arguments.

    Raises:
        UserError: it has another form; the message names ``key``.
    """
    if not isinstance(entries, list | tuple):
        raise UserError(f"{key}: {entries} is not allowed; give a list such as [{{operation: noise, scale: 0.1}}]")
    operations = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Operation):
            operations.append(entry)
            continue
        if not isinstance(entry, Mapping) or not isinstance(entry.get("operation"), str):
            raise UserError(f"{key}[{index}]: {entry} names no operation; write {{operation: NAME, ...}}")
        rest = {str(name): value for name, value in entry.items() if name != "operation"}
        operations.append(Operation(entry["operation"], _arguments(f"{key}[{index}]", rest)))
    return tuple(operations)


def _arguments(key: str, values: Any, *, lists: bool = False) -> tuple[tuple[str, Any], ...]:
    """Make sorted pairs of a mapping of arguments, and tuples of its lists: the form that can be hashed."""
    if isinstance(values, tuple):
        return values
    if not isinstance(values, Mapping):
        raise UserError(f"{key}: {values} is not allowed; give a mapping such as {{momentum: 0.9}}")
    pairs = []
    for name, value in values.items():
        parts = value if lists and isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str | int | float | None) for part in parts):
            raise UserError(f"{key}.{name}: {value} is not allowed; give a number, a word, true or false")
        pairs.append((str(name), tuple(parts) if parts is value else value))
    return tuple(sorted(pairs))


SCOPES = ("all", "head", "first_blocks", "last_blocks", "attention", "cross_attention", "lora")
BATCH_NORMS = ("trained", "frozen", "restated")
LORA_LAYERS = ("all", "convolutions", "linears", "attention", "transformer")
LORA_RECIPES = ("peft", "diffusers")
HEADS = ("kept", "fresh", "probed")
AUGMENTATIONS = ("none", "crop", "standard", "strong")  # what they do: sophon.domains.AUGMENTATIONS
# Optimizers by name: the dotted path of the factory, and the arguments that the name implies; those not named are the
# factory's own. Both engines of the simulation take the steps of `SIMULATED`; the others are for audits.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("torch.optim.SGD", {}),
    "momentum": ("torch.optim.SGD", {"momentum": 0.9}),
    "nesterov": ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True}),
    "adam": ("torch.optim.Adam", {}),
    "adamw": ("torch.optim.AdamW", {}),
    "adagrad": ("torch.optim.Adagrad", {}),
    "adadelta": ("torch.optim.Adadelta", {}),
    "rmsprop": ("torch.optim.RMSprop", {}),
    "kfac": ("sophon.kfac.KFAC", {}),
    "muon": ("sophon.muon.Muon", {}),
}
SIMULATED = tuple(name for name in OPTIMIZERS if name not in ("kfac", "muon"))
# Training loops by name.
LOOPS = {
    "fine_tune": "sophon.finetune.fine_tune",
    "dreambooth": "sophon.auditing.text_to_image.dreambooth",
    "textual_inversion": "sophon.auditing.text_to_image.textual_inversion",
    "visual_prompts": "sophon.auditing.visual_prompts.visual_prompts",
}


def _warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1, round(0.1 * steps)))


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


# Factor on the learning rate at step 0 .. steps - 1.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1.0 - step / steps,
    "cosine": _cosine,
    "warmup": _warmup,
    "warmup_cosine": lambda step, steps: _warmup(step, steps) * _cosine(step, steps),
}


@dataclass(frozen=True)
class FineTuneStrategy:
    """How somebody fine-tunes: everything that an attacker may choose. Immutable and hashable.

    Attributes:
        optimizer: a key of `OPTIMIZERS`, or the dotted path of a factory of (parameters, lr=, weight_decay=, ...) that
            returns a torch optimizer. One that has an argument ``model`` is given the model.
        lr: peak learning rate, > 0.
        weight_decay: >= 0; decoupled for AdamW, as an L2 term for the others.
        schedule: a key of `SCHEDULES`, applied to ``lr`` over ``steps``.
        batch_size: images a step, >= 1.
        steps: optimizer steps, >= 0 (none: what the released weights do as they are); those of ``probe_steps`` and of
            ``surgery`` come on top.
        scope: which parameters move: ``all``; ``head``; the ``first_blocks`` or the ``last_blocks`` with the head;
            ``attention`` (with a classifier's head); ``cross_attention``, the layers that read a text; or ``lora``,
            adapters of low rank with the head.
        head: what a classifier's last layer, or a conditional denoiser's class embedding, starts from: ``kept`` (the
            released one), ``fresh`` (newly initialised) or ``probed`` (fresh, then trained alone for ``probe_steps``
            steps with Adam at ``probe_lr``). A simulated ``probed`` attacker starts from a head that the defender keeps
            fitted to its own data instead.
        probe_steps: see ``head``; ignored unless it is ``probed``.
        probe_lr: see ``head``; ignored unless it is ``probed``.
        augmentation: a key of `sophon.domains.AUGMENTATIONS`.
        data_budget: images the attacker owns, drawn class-balanced from its split; None for all of them.
        ema: decay of an exponential moving average of the weights, whose value replaces them at the end, 0 <= ema < 1;
            0 for none. Early on the decay is held down to (1 + step) / (10 + step).
        max_norm: the gradient's norm is clipped to this, > 0; None for no clipping.
        batch_norm: what becomes of running statistics: ``trained``, they follow the batches; ``frozen``, they stay as
            released, and normalise in training too; or ``restated``, they follow the batches, but wherever the attacker
            measures, and at the end, it estimates them anew from its images with the weights as they are by then.
        blocks: how many blocks the scopes ``first_blocks`` and ``last_blocks`` have, >= 1.
        lora_rank: rank of the adapters, >= 1; as the next two, ignored unless the scope is ``lora``.
        lora_layers: which layers get one: a key of `LORA_LAYERS`.
        lora_recipe: their factor and their start: a key of `LORA_RECIPES`.
        surgery: what is done to the weights before the head is started, in this order.
        optimizer_args: the optimizer's other arguments: pairs of name and value, sorted by name.
        loop: a key of `LOOPS`, or the dotted path of a function like `sophon.finetune.fine_tune`.
    """

    optimizer: str = "momentum"
    lr: float = limited(0.01, gt=0)
    weight_decay: float = limited(0.0, ge=0)
    schedule: str = limited("constant", choices=SCHEDULES)
    batch_size: int = limited(128, ge=1)
    steps: int = limited(200, ge=0)
    scope: str = limited("all", choices=SCOPES)
    head: str = limited("fresh", choices=HEADS)
    probe_steps: int = limited(50, ge=1)
    probe_lr: float = limited(0.005, gt=0)
    augmentation: str = limited("none", choices=AUGMENTATIONS)
    data_budget: int | None = limited(None, ge=1)
    ema: float = limited(0.0, ge=0, lt=1)
    max_norm: float | None = limited(None, gt=0)
    batch_norm: str = limited("trained", choices=BATCH_NORMS)
    blocks: int = limited(1, ge=1)
    lora_rank: int = limited(8, ge=1)
    lora_layers: str = limited("all", choices=LORA_LAYERS)
    lora_recipe: str = limited("peft", choices=LORA_RECIPES)
    surgery: tuple[Operation, ...] = ()
    optimizer_args: tuple[tuple[str, Any], ...] = ()
    loop: str = "fine_tune"

    def plain(self) -> dict[str, Any]:
        """Return the strategy as plain JSON data: the form that result files and configurations have."""
        arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in self.optimizer_args}
        surgery = [operation.plain() for operation in self.surgery]
        return {**dataclasses.asdict(self), "optimizer_args": arguments, "surgery": surgery}

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "strategy") -> FineTuneStrategy:
        """Make a strategy of plain data, as `plain` returns it; ``where`` is for messages."""
        surgery = operations_from(f"{where}.surgery", values.get("surgery", ()))
        arguments = _arguments(f"{where}.optimizer_args", values.get("optimizer_args", ()), lists=True)
        return cls(**{**values, "surgery": surgery, "optimizer_args": arguments})

    def validate(self, where: str) -> None:
        """Raise a `UserError` that names ``where`` and the field if a value is outside its range."""
        for part in dataclasses.fields(self):
            check_field(f"{where}.{part.name}", part.name, getattr(self, part.name))


def learning_rate(strategy: FineTuneStrategy, step: int) -> float:
    """Return the learning rate that the strategy uses at ``step`` (0 .. strategy.steps - 1)."""
    return strategy.lr * SCHEDULES[strategy.schedule](step, strategy.steps)


def check_field(key: str, name: str, value: Any) -> None:
    """Raise a `UserError` that names ``key`` unless ``value`` is one that the strategy's field ``name`` can have.

    What a dotted path names is looked at by `sophon.finetune.check`.
    """
    if name == "surgery":
        operations_from(key, value)
    elif name == "optimizer_args":
        _arguments(key, value, lists=True)
    elif name not in ("optimizer", "loop"):
        check_value(key, value, _FIELDS[name])
    elif not isinstance(value, str) or "." not in value:
        choose(key, value, (*(OPTIMIZERS if name == "optimizer" else LOOPS), "a dotted path"))


_FIELDS = {part.name: part for part in dataclasses.fields(FineTuneStrategy)}
# What decides only where the scope asks for it.
OF_SCOPE: dict[str, tuple[str, ...]] = {"blocks": ("first_blocks", "last_blocks")}
OF_SCOPE |= dict.fromkeys(("lora_rank", "lora_layers", "lora_recipe"), ("lora",))
