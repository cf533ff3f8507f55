"""What an audit runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sophon.attacker import HEADS
from sophon.errors import UserError
from sophon.ranges import limited
from sophon.sampler import SamplerConfig, StrategySampler


@dataclass
class SearchConfig:
    """An attacker who searches: the same search, with the same budget, against every role.

    Every trial is an attempt of ``steps`` steps, judged on the attacker's ``select`` split; the best one is run again
    on ``seeds`` seeds and only then measured on ``test``.

    Attributes:
        sampler: how optuna proposes trials: ``tpe`` or ``random``.
        trials: how many, pruned ones included, >= 1.
        steps: fine-tuning steps of each, >= 1.
        seeds: attempts of the winner, >= 1.
        startup: random trials before ``tpe`` begins to model, and before anything is pruned.
        prune: stop a trial that at a point of its curve is worse than the median of the trials before it.
        eval_points: points of a trial's curve, the start and the end included, >= 2.
        optimizers: learning-rate range [low, high] of each optimizer; drawn as by the sampler of protection.
        choices: further fields of `FineTuneStrategy`, each with the values to choose from; others keep their defaults.
    """

    sampler: str = limited("tpe", choices=("tpe", "random"))
    trials: int = limited(64, ge=1)
    steps: int = limited(200, ge=1)
    seeds: int = limited(3, ge=1)
    startup: int = limited(10, ge=0)
    prune: bool = True
    eval_points: int = limited(5, ge=2)
    optimizers: dict[str, list[float] | None] = field(default_factory=dict)
    choices: dict[str, list[Any]] = field(default_factory=dict)

    def validate(self, key: str) -> None:
        """Raise a `UserError` that names ``key`` if the optimizers' ranges are none."""
        StrategySampler(SamplerConfig(self.optimizers), f"{key}.optimizers", simulated=False)


@dataclass
class MaskingConfig:
    """How an audit looks for gradient masking once the attacks have run (see `sophon.auditing.masking`).

    It only looks, so that changing this does not make other attacks of an audit, which may go on in its run directory.

    Attributes:
        heads: head starts from which the attacker's gradient is measured, before its first step: ``fresh``, ``kept``,
            ``probed``. One that does not fit the model is left out; an empty list leaves the whole measurement out.
    """

    heads: list[str] = limited(["fresh", "kept"], choices=HEADS)


@dataclass
class GateConfig:
    """What an audit has to come to, for scripts: else ``audit`` and ``report`` end with exit code 4. Null asks nothing.

    Attributes:
        worst_case: least gap closed of the worst case, as in 0.9; one that cannot be judged is not enough.
        intactness: greatest loss on the original domain's test split: points of a percentage, else percent of the
            value before.
        removal: least R of the worst case, against a model that never saw the restricted domain (``filtered``).
    """

    worst_case: float | None = None
    removal: float | None = None
    intactness: float | None = limited(None, ge=0)


@dataclass
class AttackConfig:
    """What the audit runs.

    Attributes:
        seeds: attempts of each strategy against each role, >= 1.
        roles: which models are attacked: ``protected``, ``unprotected``, ``scratch``. Comparisons need all three;
            filtered models are attacked wherever they are given.
        eval_points: points of each curve on the ``select`` split, the start and the end included, >= 2.
        samples: images that a generating model draws at each of these points, for the report's grids; 0 for none.
        frechet_samples: images drawn at the end for the Frechet distance to the test split; 0 for none.
        strategies: the attacks by name, each with the fields of `FineTuneStrategy`.
        grid: further attacks: every combination of these lists: of values of the `FineTuneStrategy` field that is the
            list's key; or, under any key, of mappings with a ``name`` and several fields that go together.
        shots: by the name of an attack how many images of each class it is tried with besides, as in [1, 5, 20, 100];
            these are called NAME_5_shot, and batches are no larger than the images.
        search: attackers who search, by name; the winner's attempts are recorded under that name.
        benign: names of the strategies that are also run on ``domain.benign``, if there is one.
        knowing: by the name of an attack the mechanisms of protection that it is made against: ``suppression``,
            ``reparameterisation``, ``removal`` or what a stage of one's own says. The verdict has a line on those
            attacks that know the mechanism of the model that is audited.
        relative: a checkpoint of the same architecture that is public, such as an earlier release or the model that the
            reference began with: attackers go towards it by the surgery ``interpolate``. Null for none.
        masking: how gradient masking is looked for.
        oracle: name of a strategy that the unprotected model also suffers with ten times the data (as far as there
            are so many) for as many epochs, as the ceiling of what an attacker could have; null for none.
        reuse: run directories of other audits; what they hold of the same attempts is copied instead of run again.
        shard: run only every ``shards``-th part of the attempts, counted from 0, for several machines that share a
            run directory; the audit without shards then finds them done and writes the result.
        shards: see ``shard``, >= 1.
    """

    seeds: int = limited(1, ge=1)
    roles: list[str] = field(default_factory=lambda: ["protected", "unprotected", "scratch"])
    eval_points: int = limited(6, ge=2)
    samples: int = limited(16, ge=0)
    frechet_samples: int = limited(0, ge=0)
    strategies: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    shots: dict[str, list[int]] = limited({}, ge=1)
    search: dict[str, SearchConfig] = field(default_factory=dict)
    benign: list[str] = field(default_factory=list)
    knowing: dict[str, list[str]] = field(default_factory=dict)
    relative: str | None = limited(None, path=True)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    oracle: str | None = None
    reuse: list[str] = limited([], path=True)
    shard: int = limited(0, ge=0)
    shards: int = limited(1, ge=1)

    def validate(self, key: str) -> None:
        """Raise a `UserError` that names ``key`` if a value is not allowed beside the others."""
        if self.frechet_samples == 1:
            raise UserError(f"{key}.frechet_samples: 1 is not allowed; give 0, or at least 2")
        if self.shard >= self.shards:
            raise UserError(f"{key}.shard: {self.shard} is not allowed; it must be 0 to {self.shards - 1}")
