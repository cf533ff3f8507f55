"""A cell is a method with a seed: its steps, their commands, and what is kept of them.

In the bench's folder: ``controls/<suite>`` (the audit of the reference and of scratch), ``<method>/budget.json``, and
for each seed ``<method>/seed<seed>/`` with ``protect``, ``audit`` and ``screen``, a log of each, and ``cell.json``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from budget import Calibration
from schedule import Outcome, Processes, Step, StepFailed

sys.path.append(str(Path(__file__).parents[1]))
from audited import machine, today

from sophon.errors import UserError
from sophon.files import read_json, write_json

PROTECTED, UNACCEPTABLE = 0, 3  # exit codes that are results
# For the time left, in minutes of a core; of `controls` there are two roles.
AUDIT_MINUTES = {"audit": 6.0, "screen": 1.5}
# One seed for all audits: they share the attempts against the reference and against scratch, which are made once.
AUDIT_SEED = 0


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        runs: the bench's folder.
        reference: the unprotected checkpoint.
        minutes: of a core that each defender has.
        suite: ``audit`` or ``screen``: the folder of a cell's audit.
        attack: the configuration's attacks that it runs.
        experiment: the configuration's experiment.
        changes: overrides of every command.
        looks: rounds of the shorter run by which a method is timed; the longer one has three times as many.
        program: the command line of sophon.
        processes: run the commands.
    """

    runs: Path
    reference: Path
    minutes: float
    suite: str
    attack: str
    experiment: str
    changes: tuple[str, ...]
    looks: int
    program: tuple[str, ...]
    processes: Processes

    def command(self, verb: str, folder: Path, *overrides: str) -> list[str]:
        """Return the command line of a verb that writes to ``folder``: on the CPU, on one thread."""
        shared = (f"experiment={self.experiment}", "device=cpu", "threads=1", "tracking=disabled", *self.changes)
        where = (f"reference={quoted(self.reference)}", f"run_dir={quoted(folder)}")
        return [*self.program, verb, *shared, *overrides, *where]

    def audit_command(self, folder: Path, checkpoint: Path, *overrides: str, reuse: Sequence[Path] = ()) -> list[str]:
        """Return the command line of an audit that takes over what the folders of ``reuse`` have of it."""
        known = ",".join(quoted(each) for each in reuse if each.is_dir())
        own = (f"attack={self.attack}", f"seed={AUDIT_SEED}", f"attack.reuse=[{known}]", *overrides)
        return self.command("audit", folder, *own, f"checkpoint={quoted(checkpoint)}")


def quoted(path: Path) -> str:
    """Write a path as an override's value."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


# ---- the reference and scratch ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Controls:
    """The audit of the two roles that no method changes."""

    bench: Bench

    @property
    def folder(self) -> Path:
        return self.bench.runs / "controls"

    @property
    def name(self) -> str:
        return f"controls/{self.bench.suite}"

    def step(self) -> Step:
        audit = self.folder / self.bench.suite
        return Step(self.name, 2 * AUDIT_MINUTES[self.bench.suite], (audit / "audit.json").exists, self._work)

    def _work(self) -> str:
        bench, others = self.bench, [self.folder / suite for suite in AUDIT_MINUTES if suite != self.bench.suite]
        roles = "attack.roles=[unprotected,scratch]"
        command = bench.audit_command(self.folder / bench.suite, bench.reference, roles, reuse=others)
        outcome = bench.processes.run(command, self.folder / f"{bench.suite}.log")
        if outcome.code:
            raise StepFailed(_ended(outcome, self.folder / f"{bench.suite}.log"))
        return f"attacked in {outcome.core_seconds / 60:.1f} core-minutes"


# ---- a method's budget -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How many rounds a method's minutes buy, found once for all seeds."""

    bench: Bench
    method: str
    overrides: tuple[str, ...]

    @property
    def file(self) -> Path:
        return self.bench.runs / self.method / "budget.json"

    @property
    def name(self) -> str:
        return f"{self.method}/budget"

    def step(self) -> Step:
        return Step(self.name, self.bench.minutes / 3, self._done, self._work)

    def _done(self) -> bool:
        if not self.file.exists():
            return False
        known = read_json(self.file)["overrides"]
        if known != list(self.overrides):
            raise UserError(
                f"{self.method}: '{self.file}' was made with {known}, now {list(self.overrides)}; give another --runs, "
                "or the row another name"
            )
        return True

    def _work(self) -> str:
        rounds = (self.bench.looks, 3 * self.bench.looks)
        timed = Calibration(rounds, (self._timed(rounds[0]), self._timed(rounds[1])))
        try:
            found = timed.rounds_for(self.bench.minutes)
        except UserError as error:
            raise StepFailed(str(error)) from error
        facts = {"overrides": list(self.overrides), "minutes": self.bench.minutes, "rounds": found}
        seconds = {"seconds_per_round": timed.seconds_per_round, "calibration": asdict(timed)}
        write_json(self.file, {**facts, **seconds, "machine": machine(), "date": today()})
        return f"{timed.seconds_per_round:.2f} s a round, so {found} rounds"

    def _timed(self, rounds: int) -> float:
        folder = self.file.parent / f"timed_{rounds}"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start: only a whole run can be timed
        settings = (f"method.rounds={rounds}", "seed=0", "tracking.progress=false")
        command = self.bench.command("protect", folder, *self.overrides, *settings)
        outcome = self.bench.processes.run(command, self.file.parent / "budget.log")
        if outcome.code not in (PROTECTED, UNACCEPTABLE):
            raise StepFailed(_ended(outcome, self.file.parent / "budget.log"))
        shutil.rmtree(folder, ignore_errors=True)
        return outcome.core_seconds


# ---- a method with a seed --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A method's protection with one seed, and its audit."""

    bench: Bench
    method: str
    overrides: tuple[str, ...]
    seed: int

    @property
    def folder(self) -> Path:
        return self.bench.runs / self.method / f"seed{self.seed}"

    def steps(self, budget: Budget, controls: Controls) -> list[Step]:
        name = f"{self.method}/seed{self.seed}"
        suite, minutes = self.bench.suite, AUDIT_MINUTES[self.bench.suite]
        protect = Step(f"{name}/protect", self.bench.minutes, self._protected, self._protect, (budget.name,))
        audit = Step(f"{name}/{suite}", minutes, self._audited, self._audit, (protect.name, controls.name))
        return [protect, audit]

    def _record(self) -> dict[str, Any]:
        return read_json(self.folder / "cell.json") if (self.folder / "cell.json").exists() else {}

    def _note(self, part: str, outcome: Outcome, **facts: Any) -> None:
        """Keep how a command ended; the time of an interrupted one counts with what goes on from there."""
        record = self._record()
        before = record.get(part, {"core_seconds": 0.0, "seconds": 0.0})
        record |= {"method": self.method, "seed": self.seed, "overrides": list(self.overrides), **facts}
        record[part] = {
            "exit_code": outcome.code,
            "core_seconds": before["core_seconds"] + outcome.core_seconds,
            "seconds": before["seconds"] + outcome.seconds,
            "date": today(),
            "machine": machine(),
        }
        write_json(self.folder / "cell.json", record)

    def _protected(self) -> bool:
        return self._record().get("protect", {}).get("exit_code") in (PROTECTED, UNACCEPTABLE)

    def _protect(self) -> str:
        budget = read_json(self.bench.runs / self.method / "budget.json")
        settings = (f"method.rounds={budget['rounds']}", f"seed={self.seed}")
        command = self.bench.command("protect", self.folder / "protect", *self.overrides, *settings)
        outcome = self.bench.processes.run(command, self.folder / "protect.log")
        kept = {key: budget[key] for key in ("rounds", "minutes", "seconds_per_round")}
        self._note("protect", outcome, budget=kept)
        if outcome.code == UNACCEPTABLE:
            return "no acceptable checkpoint"
        if outcome.code != PROTECTED:
            raise StepFailed(_ended(outcome, self.folder / "protect.log"))
        return f"{budget['rounds']} rounds in {self._record()['protect']['core_seconds'] / 60:.1f} core-minutes"

    def _audited(self) -> bool:
        record = self._record()
        nothing = record.get("protect", {}).get("exit_code") == UNACCEPTABLE
        return nothing or record.get(self.bench.suite, {}).get("exit_code") == 0

    def _audit(self) -> str:
        if self._audited():
            return "nothing to audit"
        bench, controls = self.bench, self.bench.runs / "controls"
        others = [*(controls / suite for suite in AUDIT_MINUTES), *(self.folder / suite for suite in AUDIT_MINUTES)]
        folder, log = self.folder / bench.suite, self.folder / f"{bench.suite}.log"
        reuse = [each for each in others if each != folder]
        outcome = bench.processes.run(bench.audit_command(folder, self.folder / "protect", reuse=reuse), log)
        self._note(bench.suite, outcome)
        if outcome.code:
            raise StepFailed(_ended(outcome, log))
        return str(read_json(folder / "audit.json")["verdict"])


def _ended(outcome: Outcome, log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return f"exit code {outcome.code}, {lines[-1] if lines else 'no output'} (see {log})"
