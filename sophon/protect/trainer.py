"""The protection: rounds of FTS alternating with NTR, under a guard, resumable to the bit.

Every random choice derives from the run's seed and the round's number, so a state needs no generator states and no
position in a data loader: going on from round r is the same computation as never having stopped there.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sophon.attacker import SCHEDULES
from sophon.config import GuardConfig, MethodConfig
from sophon.domains import LoadedDomain
from sophon.errors import GuardError, UserError
from sophon.protect.coordinates import BlindReaders
from sophon.protect.distributed import ALONE, Ranks
from sophon.protect.fixed_norms import FixedNorms
from sophon.protect.fts import FTS, FTSStep
from sophon.protect.ntr import NTR
from sophon.protect.optimizer_state import optimizer_state, restore_optimizer
from sophon.protect.profiling import profiled
from sophon.protect.state import STATE_FILE, Position, State, read_state, write_state
from sophon.sampler import StrategySampler
from sophon.tasks import Task
from sophon.tracking import Tracker


class Trainer:
    """Protects a model.

    Args:
        model: a copy of the reference, `sophon.protect.coordinates.linear` if the method has gains; protected in place.
        reference: the unprotected model.
        task: the model kind.
        original: domain with ``train`` and ``val``.
        restricted: the domains, each with ``adapt`` and ``query``.
        sampler: the attackers to simulate.
        method: the loops.
        guard: the constraint on the original domain.
        seed: the run's.
        folder: where the state is kept.
        tracker: told of every round.
        ranks: who shares the work. All end every round alike; the first alone measures, and writes the state.
        profile: record some of the rounds; the first rank does.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        task: Task,
        original: LoadedDomain,
        restricted: Sequence[LoadedDomain],
        sampler: StrategySampler,
        method: MethodConfig,
        guard: GuardConfig,
        seed: int,
        folder: Path,
        tracker: Tracker,
        ranks: Ranks = ALONE,
        profile: bool = False,
    ) -> None:
        self.model = model
        self.task = task
        self.val = original["val"]
        self.method = method
        self.guard = guard
        self.tracker = tracker
        self.ranks = ranks
        self.profile = profile and ranks.rank == 0
        self.folder = folder
        self.state_path = folder / STATE_FILE
        self.fts = FTS(model, task, restricted, sampler, method, seed, ranks, original)
        self.ntr = NTR(model, reference, task, original["train"], method, seed, ranks)
        self.kept: list[FixedNorms | BlindReaders] = []
        if method.fixed_norms != "none":
            fixed = FixedNorms(model, task, original["train"].first(8), method.fixed_norms)
            self.kept.append(fixed)
            if not fixed.names:
                tracker.say("method.fixed_norms: no layer of this model feeds a normalisation alone; none is held")
        if method.gains:
            self.kept.append(BlindReaders(model))
        self.at, self.good = self._start(reference)

    def run(self) -> Position:
        """Alternate until the last round; leave the model in the last state that the guard accepted.

        Raises:
            GuardError: no round's state satisfied the guard.
            UserError: a loss stopped being finite; the state of the last guard check is kept.
            KeyboardInterrupt: on SIGINT or SIGTERM to any rank, after the round in progress was finished and saved.
        """
        rounds, left = self.method.rounds, self.method.rounds - self.at.round
        with (
            _stop_requests() as stop,
            self.tracker.progress("protect", rounds, self.at.round) as advance,
            profiled(self.folder, left, self.tracker.say) if self.profile and left else nullcontext() as round_done,
        ):
            while self.at.round < rounds:
                row = self._round()
                due = self.at.round % self.guard.every == 0 or self.at.round == rounds
                if due:
                    row |= self._check()
                self.at.history.append({"round": self.at.round, **row})
                self.tracker.log({name: v for name, v in row.items() if v is not None}, self.at.round)
                stopping = self.ranks.any(stop.is_set())
                if due or stopping:
                    self.save()
                advance(f"query loss {_show(row['query_loss'])}, val {_show(self.at.good)}")
                if round_done:
                    round_done()
                if stopping and self.at.round < rounds:
                    raise KeyboardInterrupt
        if self.at.good_round == 0:
            raise GuardError(
                f"guard.tolerance: no round kept {self.task.metric.name} on val within {self.guard.tolerance}"
                f"{' %' if self.guard.relative else ''} of {self.at.before:.4g}; "
                "raise it, lower method.fts_lr or give NTR more steps"
            )
        self.model.load_state_dict(self.good)
        return self.at

    def _round(self) -> dict[str, Any]:
        number = self.at.round
        factor = SCHEDULES[self.method.schedule](number, self.method.rounds)
        steps = [self._suppress(number, step, factor) for step in range(self.method.fts_steps)]
        ntr_loss = self.ntr.run(self.at.ntr_steps, number, factor=factor)
        self._restore()
        self.at.round += 1
        finite = [step for step in steps if math.isfinite(step.query_loss)]
        means = {
            name: sum(getattr(step, name) for step in finite) / len(finite) if finite else None
            for name in ("query_loss", "attacker_loss", "gradient_norm")
        }
        return {**means, "diverged": sum(step.diverged for step in steps), "ntr_loss": ntr_loss}

    def _suppress(self, number: int, step: int, factor: float) -> FTSStep:
        anchored = self.method.fts_original_weight > 0
        anchor = self.ntr.gradient(number, step, "anchor") if anchored else None
        done = self.fts.step(number, step, factor=factor, anchor=anchor)
        self._restore()
        return done

    def _restore(self) -> None:
        """Put the weights back to where the method wants them: norms of the reference, readers that are blind."""
        for each in self.kept:
            each.restore()

    def _check(self) -> dict[str, Any]:
        """Look at ``val``: keep the state if it is within tolerance, else repair it, else go back to the good one."""
        value, loss = self._measure()
        # a metric that is NaN is within no tolerance
        repaired = not loss <= self.guard.tolerance and self.guard.repair_steps > 0
        if repaired:
            self.ntr.run(self.guard.repair_steps, self.at.round, "repair", anneal=True)
            self._restore()
            value, loss = self._measure()
        accepted = loss <= self.guard.tolerance
        if accepted:
            self.good = _copied(self.model.state_dict())
            self.at.good_round, self.at.good, self.at.breaches = self.at.round, value, 0
        else:
            self.at.breaches += 1
            if self.at.breaches > self.guard.patience:
                self._roll_back()
        measured = {name: v if math.isfinite(v) else None for name, v in (("val", value), ("val_loss", loss))}
        return {**measured, "repaired": repaired, "accepted": accepted}

    def _measure(self) -> tuple[float, float]:
        value = self.ranks.first(lambda: self.task.evaluate(self.model, self.val))
        worse = self.at.before - value if self.task.metric.higher_is_better else value - self.at.before
        return value, 100 * worse / abs(self.at.before) if self.guard.relative else worse

    def _roll_back(self) -> None:
        """Restore the good state, drop the moments that led away from it, and give NTR more weight."""
        self.model.load_state_dict(self.good)
        self.fts.optimizer.state.clear()
        self.fts.pool.members.clear()  # displaced from weights that are gone
        self.ntr.optimizer.state.clear()
        self.at.rollbacks += 1
        self.at.breaches = 0
        grown = math.ceil(self.at.ntr_steps * self.guard.growth)
        self.at.ntr_steps = max(self.at.ntr_steps, min(grown, self.guard.max_ntr_steps))
        self.tracker.say(
            f"guard: val broke the tolerance after round {self.at.round}; back to round {self.at.good_round}, "
            f"now {self.at.ntr_steps} NTR steps a round"
        )

    def save(self) -> None:
        """Write the whole state as one file, atomically."""
        pool = self.fts.pool
        tensors = {
            "model": self.model.state_dict(),
            "good": self.good,
            "probe": {
                f"{domain}/{name}": value
                for domain, head in enumerate(self.fts.attackers.probed)
                for name, value in head.items()
            },
            "fts": optimizer_state(self.fts.optimizer),
            "ntr": optimizer_state(self.ntr.optimizer),
            "pool": self.ranks.collect(pool.tensors()),
        }
        members = {place: facts for part in self.ranks.gather(pool.record()) for place, facts in part.items()}
        self.ranks.first(
            lambda: write_state(self.state_path, State(self.at, tensors, members, self.fts.curriculum.record()))
        )

    def _start(self, reference: nn.Module) -> tuple[Position, dict[str, Tensor]]:
        """Return the position and the good state to go on from: the saved ones, or the reference itself."""
        if not self.ranks.first(self.state_path.exists):
            before = self.ranks.first(lambda: self.task.evaluate(reference, self.val))
            if self.guard.relative and before == 0:
                raise UserError("guard.relative: the reference's value on val is 0; give an absolute tolerance")
            return Position(0, 0, self.method.ntr_steps, 0, before, before), _copied(self.model.state_dict())
        with self.ranks.together():
            saved = read_state(self.state_path)
        device = next(self.model.parameters()).device
        self.fts.pool.restore(saved.tensors["pool"], saved.members, device)
        parts = {
            part: {name: value.to(device) for name, value in tensors.items()}
            for part, tensors in saved.tensors.items()
            if part != "pool"  # of which only a part may live here
        }
        self.model.load_state_dict(parts["model"])
        for key, value in parts["probe"].items():
            domain, name = key.split("/", 1)
            self.fts.attackers.probed[int(domain)][name] = value
        self.fts.curriculum.restore(saved.curriculum)
        restore_optimizer(self.fts.optimizer, parts["fts"])
        restore_optimizer(self.ntr.optimizer, parts["ntr"])
        self.tracker.say(f"going on after round {saved.at.round}")
        return saved.at, parts["good"]


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return copy.deepcopy({name: tensor.detach() for name, tensor in state.items()})


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a request to stop after this round; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
