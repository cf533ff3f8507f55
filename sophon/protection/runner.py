"""Runs the stages of a protection one after the other, under one guard, resumable to the bit."""

from __future__ import annotations

import copy
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor, nn

from sophon.config import GuardConfig, MethodConfig
from sophon.errors import UserError
from sophon.protection.context import Context
from sophon.protection.guard import Guard, copied
from sophon.protection.profiling import profiled
from sophon.protection.resume import STATE_FILE, Position, SavedRun, read_state, write_state
from sophon.protection.stage import Remembered, Stage
from sophon.seeds import derive_seed
from sophon.tasks import Task
from sophon.tracking import Advance, Tracker

_QUIET = 5.0  # seconds of a round before it shows where it is
_LONG = 3600.0  # seconds that are left after the first round, from which on shorter settings are named


class Planned(NamedTuple):
    """A stage of a protection, and what is its own of the context: the method's keys, and the task with its losses."""

    name: str
    stage: Stage
    method: MethodConfig
    task: Task


class Runner:
    """Protects a model.

    Args:
        plan: the stages, one or more.
        context: for the first stage, with the reference as its model, which stays as it is.
        folder: where the state is kept, and read from if there is one.
        profile: record some of the rounds; the first rank does.

    Attributes:
        at: where the run stands.
        context: the present stage's.
    """

    def __init__(
        self,
        plan: Sequence[Planned],
        context: Context,
        guard: GuardConfig,
        folder: Path,
        tracker: Tracker,
        profile: bool = False,
    ) -> None:
        self.plan = plan
        self.tracker = tracker
        self.folder = folder
        self.profile = profile and context.ranks.rank == 0
        self.seed = context.seed
        self._advance: Advance = lambda note="", steps=1: None
        self.context = replace(context, say=tracker.say, show=self._show)
        self.guard = Guard(guard, self.context)
        if context.ranks.first((folder / STATE_FILE).exists):
            self._resume()
        else:
            tracker.say("measuring the reference on the original domain's split val")
            before = self.guard.reference(context.reference)
            ends = list(accumulate(planned.method.rounds for planned in plan))
            self._begin(Position(before, before, 0, ends), context.reference, context.reference)

    def run(self) -> nn.Module:
        """Run the stages to their end; return the last one's release of the last state that the guard accepted.

        Raises:
            GuardError: none of a stage's rounds satisfied the guard.
            UserError: a loss stopped being finite; the state of the last guard check is kept.
            KeyboardInterrupt: on SIGINT or SIGTERM to any rank, after the round in progress was finished and saved.
        """
        rounds, left = self.at.ends[-1], self.at.ends[-1] - self.at.round
        if self.at.round:
            self.tracker.say(f"going on after round {self.at.round}")
        with (
            _stop_requests(self.context.ranks.rank == 0) as stop,
            self.tracker.progress("protect", rounds, self.at.round) as self._advance,
            profiled(self.folder, left, self.tracker.say) if self.profile and left else nullcontext() as round_done,
        ):
            while True:
                while self.at.round < self.at.ends[self.at.stage]:
                    stopping = self._round(stop)
                    self._advance(self._shown())
                    if self.at.round == rounds - left + 1:
                        self._forecast(left - 1)
                    if round_done:
                        round_done()
                    if stopping and self.at.round < self.at.ends[-1]:
                        raise KeyboardInterrupt
                if self._damages():
                    released, teacher = self.stage.release(self.context), self.context.teacher
                else:
                    self.guard.require_acceptance(self._started())
                    released = teacher = self.released()
                if self.at.round == self.at.ends[-1]:
                    return released
                at = replace(self.at, stage=self.at.stage + 1, breaches=0, whole=teacher is released)
                self.context.ranks.broadcast(released.state_dict())  # unlike hardware differs in the last bits
                self._begin(at, released, teacher)

    def released(self) -> nn.Module:
        """Return the present stage's release of the last state that the guard accepted.

        Raises:
            GuardError: there is none, or the stage cannot release it.
        """
        if self.at.good_round <= self._started() and self.start is not None and self.at.whole:
            return self.start  # what the stage before has released
        self.guard.require_acceptance(0 if self.at.whole else self._started())
        self.context.model.load_state_dict(self.guard.good)
        return self.stage.release(self.context)

    @property
    def at(self) -> Position:
        """Where the run stands."""
        return self.guard.at

    @property
    def stage(self) -> Stage:
        """The stage at work."""
        return self.plan[self.at.stage].stage

    def save(self) -> None:
        """Write the whole state as one file, atomically."""
        remembered = self.stage.state(self.context)
        tensors = {
            "model": self.context.model.state_dict(),
            "good": self.guard.good,
            "start": {} if self.start is None else self.start.state_dict(),
            "teacher": {} if self.at.whole else self.context.teacher.state_dict(),
            "stage": remembered.tensors,
        }
        state = SavedRun(self.at, tensors, remembered.data)
        self.context.ranks.first(lambda: write_state(self.folder / STATE_FILE, state))

    def _started(self) -> int:
        """Return the rounds of earlier stages."""
        return ([0, *self.at.ends])[self.at.stage]

    def _damages(self) -> bool:
        """Say whether the present stage may end outside the tolerance; the last one may not."""
        return self.stage.damages and self.at.stage + 1 < len(self.plan)

    def _round(self, stop: threading.Event) -> bool:
        """Do a round, look and save if it is time to; return whether any rank was asked to stop."""
        at, number = self.at, self.at.round - self._started()
        self._began = time.monotonic()
        row = self.stage.step(self.context, number)
        if not isinstance(cast(object, row), dict):  # a class of the user's own may forget
            kind, name = type(self.stage), self.plan[at.stage].name
            raise UserError(
                f"method.stages.{name}: step of {kind.__module__}.{kind.__qualname__} returned {row!r}; it must return "
                "a dict, such as {'ntr_loss': loss}"
            )
        self.stage.project()
        at.round += 1
        due = (number + 1) % self.guard.config.every == 0 or at.round in at.ends
        if due:
            lenient = self.stage.lenient or self._damages()
            row |= self.guard.check(self.stage, self.context, number + 1, lenient=lenient)
            if self.stage.ended(row):
                left_out = at.ends[at.stage] - at.round
                at.ends = [end - left_out if place >= at.stage else end for place, end in enumerate(at.ends)]
        at.history.append({"round": at.round, "stage": self.plan[at.stage].name, **row})
        self.tracker.log({name: value for name, value in row.items() if value is not None}, at.round)
        stopping = self.context.ranks.any(stop.is_set())
        if due or stopping:
            self.save()
        return stopping

    def _show(self, note: str) -> None:
        """Show how far the present round is, if it takes long."""
        if time.monotonic() - self._began > _QUIET:
            self._advance(f"round {self.at.round + 1}: {note}", 0)

    def _forecast(self, left: int) -> None:
        """After the first round, say how long ``left`` more take if that is long, and what takes less."""
        seconds = time.monotonic() - self._began
        if seconds * left > _LONG:
            self.tracker.say(
                f"the first round took {seconds:.0f} s, the {left} that are left take about "
                f"{seconds * left / 3600:.1f} hours; method=pool_anchored has shorter rounds, and so have smaller "
                "sampler.batch_sizes, method.query_batch_size and method.ntr_batch_size; method.rounds sets how many; "
                "other settings need another run_dir=DIR"
            )

    def _shown(self) -> str:
        """Return the stage if there are several, the first figure of the last round, and the guard's last good one."""
        stage = f"{self.plan[self.at.stage].name}: " if len(self.plan) > 1 else ""
        figures = {name: value for name, value in self.at.history[-1].items() if name not in ("round", "stage")}
        name, value = next(iter(figures.items()), ("nothing measured", None))
        at = "" if self.at.good_round == self.at.round else f" at round {self.at.good_round}"
        said = "none" if value is None else f"{value:.3g}"
        return f"{stage}{name.replace('_', ' ')} {said}, val {self.at.good:.3g}{at}"

    def _begin(self, at: Position, start: nn.Module, teacher: nn.Module) -> None:
        """Enter the stage of ``at``, from what the one before has released."""
        planned = self.plan[at.stage]
        self.guard.at = replace(at, ntr_steps=planned.method.ntr_steps)
        self._prepare(start, teacher)
        self.guard.good = copied(self.context.model.state_dict())

    def _prepare(self, start: nn.Module, teacher: nn.Module) -> None:
        """Prepare the present stage; both models stay as they are."""
        self.start = start if self.at.stage else None
        planned, index = self.plan[self.at.stage], self.at.stage
        seed = derive_seed(self.seed, "stage", index) if index else self.seed
        self.context = replace(
            self.context, model=copy.deepcopy(start), teacher=teacher, task=planned.task, method=planned.method,
            seed=seed, ntr_steps=self.at.ntr_steps,
        )  # fmt: skip
        planned.stage.prepare(self.context)

    def _resume(self) -> None:
        with self.context.ranks.together():
            saved = read_state(self.folder / STATE_FILE)
        self.guard.at = saved.at
        start = self._reference_with(saved.tensors["start"])
        self._prepare(start, start if saved.at.whole else self._reference_with(saved.tensors["teacher"]))
        self.context.model.load_state_dict(saved.tensors["model"])
        self.stage.restore(self.context, Remembered(saved.tensors["stage"], saved.data))
        self.guard.good = dict(saved.tensors["good"])

    def _reference_with(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the reference with other weights; itself without any."""
        if not state:
            return self.context.reference
        model = copy.deepcopy(self.context.reference)
        model.load_state_dict(state)
        return model


@contextmanager
def _stop_requests(says: bool) -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a request to stop after this round; a second one interrupts at once.

    Args:
        says: whether this process tells the user so.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if says:
            with suppress(RuntimeError):  # the signal came in the middle of a line
                print("interrupted: this round is finished and saved first; again to stop at once", file=sys.stderr)

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
