"""The distribution that protection samples attackers from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sophon.attacker import SIMULATED, FineTuneStrategy, check_field, operations_from
from sophon.errors import UserError, choose
from sophon.ranges import Arguments

if TYPE_CHECKING:  # help and refusals do not wait for torch
    import torch


@dataclass
class SamplerConfig(Arguments):
    """The distribution Phi over strategies that protection simulates.

    Attributes:
        optimizers: learning-rate range [low, high] of each optimizer; rates are drawn log-uniformly in it, optimizers
            uniformly among the keys. An entry set to null is left out.
        batch_sizes: drawn uniformly.
        steps: [fewest, most] inner steps K, drawn uniformly, ends included.
        heads: drawn uniformly; repeat one to weigh it.
        scopes: drawn uniformly.
        weight_decays: drawn uniformly.
        schedules: drawn uniformly.
        augmentations: drawn uniformly.
        batch_norms: drawn uniformly: ``trained`` or ``frozen``.
        surgeries: drawn uniformly; repeat one to weigh it. Each is a list of operations on the weights as
            `FineTuneStrategy.surgery` takes it, empty for none; those of `sophon.surgery.OPERATIONS` are simulated.
    """

    optimizers: dict[str, list[float] | None] = field(default_factory=dict)
    batch_sizes: list[int] = field(default_factory=lambda: [128])
    steps: list[int] = field(default_factory=lambda: [20, 20])
    heads: list[str] = field(default_factory=lambda: ["kept", "fresh", "probed"])
    scopes: list[str] = field(default_factory=lambda: ["all"])
    weight_decays: list[float] = field(default_factory=lambda: [0.0])
    schedules: list[str] = field(default_factory=lambda: ["constant"])
    augmentations: list[str] = field(default_factory=lambda: ["none"])
    batch_norms: list[str] = field(default_factory=lambda: ["trained"])
    surgeries: list[Any] = field(default_factory=lambda: [[]])


_LISTS = {
    "batch_size": "batch_sizes",
    "head": "heads",
    "scope": "scopes",
    "weight_decay": "weight_decays",
    "schedule": "schedules",
    "augmentation": "augmentations",
    "batch_norm": "batch_norms",
}


class StrategySampler:
    """Draws strategies from a `SamplerConfig`.

    Args:
        where: the configuration key of its optimizers, for messages.
        simulated: whether protection is to simulate what is drawn.

    Raises:
        UserError: a range or a list is empty, reversed or names something unknown.
    """

    def __init__(self, config: SamplerConfig, where: str = "sampler.optimizers", *, simulated: bool = True) -> None:
        self.where = where
        self.simulated = simulated
        self.ranges = {name: limits for name, limits in config.optimizers.items() if limits is not None}
        self.config = config
        self._validate()
        self.surgeries = [
            operations_from(f"sampler.surgeries[{index}]", entries) for index, entries in enumerate(config.surgeries)
        ]

    def _validate(self) -> None:
        if not self.ranges:
            raise UserError(f"{self.where}: empty; give at least one optimizer with its range of learning rates")
        for name, limits in self.ranges.items():
            if self.simulated:
                choose(self.where, name, SIMULATED)
            else:
                check_field(self.where, "optimizer", name)
            if len(limits) != 2 or not 0 < limits[0] <= limits[1] < math.inf:
                raise UserError(f"{self.where}.{name}: {limits} is not a range; give [low, high], 0 < low <= high")
        for key in (*_LISTS.values(), "surgeries"):
            if not getattr(self.config, key):
                raise UserError(f"sampler.{key}: empty; give at least one value")
        steps = self.config.steps
        if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
            raise UserError(f"sampler.steps: {steps} is not a range; give [fewest, most], 1 <= fewest <= most")
        for name, key in _LISTS.items():
            for value in getattr(self.config, key):
                check_field(f"sampler.{key}", name, value)
        for key, value in (("scopes", "lora"), ("batch_norms", "restated")):
            if value in getattr(self.config, key):
                raise UserError(f"sampler.{key}: '{value}' is not simulated; it is for audits")

    def sample(self, generator: torch.Generator) -> FineTuneStrategy:
        """Draw one strategy; ``generator`` (on the CPU) is the only source of randomness."""
        import torch

        def pick(values: list[Any]) -> Any:
            return values[int(torch.randint(len(values), (), generator=generator))]

        optimizer = pick(sorted(self.ranges))
        low, high = (math.log(limit) for limit in self.ranges[optimizer])
        lr = math.exp(low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64)))
        steps = self.steps(generator)
        choices = self.choices()
        # last, and no draw without a choice: a sampler without these draws what it drew before there were any
        late = {name: choices.pop(name) for name in ("surgery", "batch_norm")}
        drawn = {name: pick(values) for name, values in choices.items()}
        drawn |= {name: values[0] if len(values) == 1 else pick(values) for name, values in late.items()}
        return FineTuneStrategy(optimizer=optimizer, lr=lr, steps=steps, **drawn)

    def steps(self, generator: torch.Generator) -> int:
        """Draw a number of steps."""
        import torch

        fewest, most = self.config.steps
        return int(torch.randint(fewest, most + 1, (), generator=generator))

    def choices(self) -> dict[str, list[Any]]:
        """Return the values of each field that is drawn from a list, as a strategy has them; repeats weigh."""
        return {name: list(getattr(self.config, key)) for name, key in _LISTS.items()} | {"surgery": self.surgeries}

    def support(self) -> dict[str, Any]:
        """Return what can be drawn, as plain JSON data: the form that a checkpoint's manifest stores."""
        lists = {name: sorted(set(getattr(self.config, key))) for name, key in _LISTS.items()}
        ranges = {name: [float(limit) for limit in limits] for name, limits in sorted(self.ranges.items())}
        surgeries = [[operation.plain() for operation in operations] for operations in dict.fromkeys(self.surgeries)]
        rest = {"data_budget": [None], "ema": [0.0], "surgery": surgeries}
        return {"optimizer": ranges, "steps": list(self.config.steps), **lists, **rest}
