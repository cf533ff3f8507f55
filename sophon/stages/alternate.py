"""SOPHON (Deng et al., 2024, arXiv 2404.12699): FTS against simulated attackers, alternating with NTR."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import Tensor

from sophon.attacker import FineTuneStrategy
from sophon.errors import UserError
from sophon.finetune import rehearse
from sophon.protection.context import Context
from sophon.protection.fixed_norms import FixedNorms
from sophon.protection.fts import FTS, FTSStep, engine_of
from sophon.protection.ntr import NTR
from sophon.protection.objectives import objectives_of
from sophon.protection.optimizer_state import optimizer_state, restore_optimizer
from sophon.protection.simulated_surgery import check_simulated
from sophon.protection.stage import Constraint, Information, Remembered, Row, Stage, under


class Alternate(Stage):
    """A round is ``fts_steps`` FTS steps, then NTR; its settings are the keys of `MethodConfig`.

    Weights that a normalisation follows may be held at their norms (``fixed_norms``), and an FTS step may follow the
    original domain's gradient as well (``fts_original_weight``).
    """

    simulates = True
    mechanism = "suppression"
    summary = (
        "[SOPHON](https://arxiv.org/abs/2404.12699)'s meta-learning: fine-tuning is simulated during training, and the "
        "weights are moved to where it makes little progress"
    )

    def check(self, context: Context) -> None:
        """Raise a `UserError` if an objective, an operation, a head or a scope does not fit, or a rank has no work."""
        super().check(context)
        method = context.method
        objectives = objectives_of(method.objectives)
        engine_of(method, objectives)
        if not any(objective.weighs for objective in objectives):
            raise UserError("method.objectives: none has a weight, so that there is nothing to ask; weigh one")
        context.ranks.require_work(method.attackers, "method.attackers")
        for index, operations in enumerate(context.sampler.surgeries):
            check_simulated(operations, f"sampler.surgeries[{index}]")
        task, sampler = context.task, context.sampler.config
        for domain, head, scope in product(
            context.restricted, dict.fromkeys(sampler.heads), dict.fromkeys(sampler.scopes)
        ):
            model = copy.deepcopy(context.model)
            task.start_head(model, head, domain.classes)
            step = FineTuneStrategy(scope=scope, batch_size=min(sampler.batch_sizes))
            rehearse(model, step, task, domain["adapt"], "sampler.batch_sizes")
            step = FineTuneStrategy(scope=scope, batch_size=method.query_batch_size)
            rehearse(model, step, task, domain["query"], "method.query_batch_size", task.suppression_loss)

    def prepare(self, context: Context) -> None:
        """Make the two loops, and remember the norms."""
        objectives = objectives_of(context.method.objectives)
        self.fts = FTS(context, objectives)
        self.ntr = NTR(context, objectives)
        self._fixed: list[Constraint] = []
        if context.method.fixed_norms != "none":
            few = context.original["train"].first(8)
            fixed = FixedNorms(context.model, context.task, few, context.method.fixed_norms)
            self._fixed.append(fixed)
            if not fixed.names:
                context.say("method.fixed_norms: no layer of this model feeds a normalisation alone; none is held")

    def step(self, context: Context, number: int) -> Row:
        """Take the FTS steps, then the NTR steps."""
        steps = [self._suppress(context, number, step) for step in range(context.method.fts_steps)]
        ntr_loss = self.ntr.run(context.ntr_steps, number, factor=context.rate(number))
        finite = [step for step in steps if math.isfinite(step.query_loss)]
        means = {
            name: sum(getattr(step, name) for step in finite) / len(finite) if finite else None
            for name in ("query_loss", "attacker_loss", "gradient_norm")
        }
        return {**means, "diverged": sum(step.diverged for step in steps), "ntr_loss": ntr_loss}

    def _suppress(self, context: Context, number: int, step: int) -> FTSStep:
        anchored = context.method.fts_original_weight > 0
        anchor = self.ntr.gradient(number, step, "anchor") if anchored else None
        done = self.fts.step(number, step, factor=context.rate(number), anchor=anchor)
        self.project()
        return done

    def constraints(self) -> Sequence[Constraint]:
        """Return the norms that are held, if any are."""
        return self._fixed

    def information(self, context: Context) -> Information:
        """Return that simulated attackers read the restricted domains with their labels."""
        return Information(teacher="reference" if context.method.distillation else "none")

    def roll_back(self) -> None:
        """Forget both optimizers' states, and the pool: its attackers are displaced from weights that are gone."""
        super().roll_back()
        self.fts.optimizer.state.clear()
        self.fts.pool.members.clear()

    def state(self, context: Context) -> Remembered:
        """Return the optimizers' states, the probed heads, the pool and what the curriculum has learnt."""
        fts, ranks = self.fts, context.ranks
        parts: dict[str, dict[str, Tensor]] = {
            "fts": optimizer_state(fts.optimizer),
            "pool": ranks.collect(fts.pool.tensors()),
            **{f"probe/{domain}": head for domain, head in enumerate(fts.attackers.probed)},
        }
        members: dict[str, Any] = {}
        for part in ranks.gather(fts.pool.record()):
            members |= part
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        return Remembered(
            {**super().state(context).tensors, **tensors}, {"pool": members, "curriculum": fts.curriculum.record()}
        )

    def restore(self, context: Context, remembered: Remembered) -> None:
        """Take all of it up again, of the pool as much as belongs here."""
        super().restore(context, remembered)
        tensors, data = remembered
        device = next(context.model.parameters()).device
        restore_optimizer(self.fts.optimizer, under("fts", tensors))
        self.fts.pool.restore(under("pool", tensors), data["pool"], device)
        self.fts.curriculum.restore(data["curriculum"])
        for domain, head in enumerate(self.fts.attackers.probed):
            head |= {name: value.to(device) for name, value in under(f"probe/{domain}", tensors).items()}
