"""The protection: rounds of FTS alternating with NTR, under a guard, resumable to the bit.

Every random choice derives from the run's seed and the round's number, so a state needs no generator states and no
position in a data loader: going on from round r is the same computation as never having stopped there.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sophon.config import GuardConfig, MethodConfig
from sophon.domains import Domain
from sophon.errors import GuardError, UserError
from sophon.protect.moments import moments_of, restore_moments
from sophon.protect.reinforce import Reinforcer
from sophon.protect.suppress import SuppressionStep, Suppressor
from sophon.runs import read_tensors, write_tensors
from sophon.strategies import SCHEDULES, StrategySampler
from sophon.tasks import Task
from sophon.tracking import Tracker

STATE_FILE = "state.safetensors"


@dataclass
class Position:
    """Where the alternation stands.

    Attributes:
        round: rounds done.
        good_round: the last round after which the guard was satisfied; 0 is the unprotected start.
        ntr_steps: NTR steps of a round, grown by roll-backs.
        rollbacks: how often the guard rolled back.
        breaches: looks in a row at which the guard was not satisfied.
        before: the reference's metric on ``val``.
        good: the good state's metric on ``val``.
        history: one row a round: losses, and the metric where the guard looked.
    """

    round: int
    good_round: int
    ntr_steps: int
    rollbacks: int
    before: float
    good: float
    history: list[dict[str, Any]] = field(default_factory=list)
    breaches: int = 0


class Trainer:
    """Protects a model.

    Args:
        model: a copy of the reference; protected in place.
        reference: the unprotected model.
        task: the model kind.
        original: domain with ``train`` and ``val``.
        restricted: domain with ``adapt`` and ``query``.
        sampler: the attackers to simulate.
        method: the loops.
        guard: the constraint on the original domain.
        seed: the run's.
        folder: where the state is kept.
        tracker: told of every round.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        task: Task,
        original: Domain,
        restricted: Domain,
        sampler: StrategySampler,
        method: MethodConfig,
        guard: GuardConfig,
        seed: int,
        folder: Path,
        tracker: Tracker,
    ) -> None:
        self.model = model
        self.task = task
        self.val = original["val"]
        self.method = method
        self.guard = guard
        self.tracker = tracker
        self.state_path = folder / STATE_FILE
        self.suppressor = Suppressor(model, task, restricted, sampler, method, seed)
        self.reinforcer = Reinforcer(model, reference, task, original["train"], method, seed)
        self.at, self.good = self._start(reference)

    def run(self) -> Position:
        """Alternate until the last round; leave the model in the last state that the guard accepted.

        Raises:
            GuardError: no round's state satisfied the guard.
            UserError: a loss stopped being finite; the state of the last guard check is kept.
            KeyboardInterrupt: on SIGINT or SIGTERM, after the round in progress was finished and saved.
        """
        rounds = self.method.rounds
        with _stop_requests() as stop, self.tracker.progress("protect", rounds, self.at.round) as advance:
            while self.at.round < rounds:
                row = self._round()
                due = self.at.round % self.guard.every == 0 or self.at.round == rounds
                if due:
                    row |= self._check()
                self.at.history.append({"round": self.at.round, **row})
                self.tracker.log({name: v for name, v in row.items() if v is not None}, self.at.round)
                if due or stop.is_set():
                    self.save()
                advance(f"query loss {_show(row['query_loss'])}, val {_show(self.at.good)}")
                if stop.is_set() and self.at.round < rounds:
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
        ntr_loss = self.reinforcer.run(self.at.ntr_steps, number, factor=factor)
        self.at.round += 1
        finite = [step for step in steps if math.isfinite(step.query_loss)]
        means = {
            name: sum(getattr(step, name) for step in finite) / len(finite) if finite else None
            for name in ("query_loss", "attacker_loss", "gradient_norm")
        }
        return {**means, "diverged": sum(step.diverged for step in steps), "ntr_loss": ntr_loss}

    def _suppress(self, number: int, step: int, factor: float) -> SuppressionStep:
        if not self.method.fts_original_weight:
            return self.suppressor.step(number, step, factor=factor)
        anchor = self.reinforcer.gradient(number, step, "anchor")
        return self.suppressor.step(number, step, factor=factor, anchor=anchor)

    def _check(self) -> dict[str, Any]:
        """Look at ``val``: keep the state if it is within tolerance, else repair it, else go back to the good one."""
        value, loss = self._measure()
        # a metric that is NaN is within no tolerance
        repaired = not loss <= self.guard.tolerance and self.guard.repair_steps > 0
        if repaired:
            self.reinforcer.run(self.guard.repair_steps, self.at.round, "repair", anneal=True)
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
        value = self.task.evaluate(self.model, self.val)
        worse = self.at.before - value if self.task.metric.higher_is_better else value - self.at.before
        return value, 100 * worse / abs(self.at.before) if self.guard.relative else worse

    def _roll_back(self) -> None:
        """Restore the good state, drop the moments that led away from it, and give NTR more weight."""
        self.model.load_state_dict(self.good)
        self.suppressor.optimizer.state.clear()
        self.suppressor.pool.members.clear()  # displaced from weights that are gone
        self.reinforcer.optimizer.state.clear()
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
        tensors = {
            **_prefixed("model", self.model.state_dict()),
            **_prefixed("good", self.good),
            **_prefixed("probe", self.suppressor.probed_head),
            **_prefixed("fts", moments_of(self.suppressor.optimizer)),
            **_prefixed("ntr", moments_of(self.reinforcer.optimizer)),
            **_prefixed("pool", self.suppressor.pool.tensors()),
        }
        write_tensors(self.state_path, tensors, {**asdict(self.at), "pool": self.suppressor.pool.record()})

    def _start(self, reference: nn.Module) -> tuple[Position, dict[str, Tensor]]:
        """Return the position and the good state to go on from: the saved ones, or the reference itself."""
        if not self.state_path.exists():
            before = self.task.evaluate(reference, self.val)
            if self.guard.relative and before == 0:
                raise UserError("guard.relative: the reference's value on val is 0; give an absolute tolerance")
            return Position(0, 0, self.method.ntr_steps, 0, before, before), _copied(self.model.state_dict())
        tensors, metadata = read_tensors(self.state_path)
        device = next(self.model.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.model.load_state_dict(_within("model", tensors))
        self.suppressor.probed_head = _within("probe", tensors)
        restore_moments(self.suppressor.optimizer, _within("fts", tensors))
        restore_moments(self.reinforcer.optimizer, _within("ntr", tensors))
        self.suppressor.pool.restore(_within("pool", tensors), metadata.pop("pool", {}))
        position = Position(**metadata)
        self.tracker.say(f"going on after round {position.round}")
        return position, _within("good", tensors)


def last_good(folder: Path) -> tuple[dict[str, Tensor], Position]:
    """Read the last good state out of a run that may still be unfinished: its weights and where it stood.

    Raises:
        UserError: there is no readable state.
        GuardError: no round's state satisfied the guard so far.
    """
    tensors, metadata = read_tensors(folder / STATE_FILE)
    metadata.pop("pool", None)
    position = Position(**metadata)
    if position.good_round == 0:
        raise GuardError(f"checkpoint: '{folder}' holds no state that satisfied the guard yet")
    return _within("good", tensors), position


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


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
