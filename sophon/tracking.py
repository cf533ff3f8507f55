"""Progress on the terminal, and Weights & Biases."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sophon.errors import UserError

_SECONDS_BETWEEN_LINES = 15.0


class Advance(Protocol):
    """Says that ``steps`` more steps are done, 0 if it is in the middle of one, with a short note on how it stands."""

    def __call__(self, note: str = "", steps: int = 1) -> None:
        """Advance."""


class Tracker:
    """A run's progress bars and its wandb run, if it has one.

    Args:
        wandb_mode: ``disabled``, ``offline`` or ``online``.
        progress: show progress on stderr: a bar on a terminal, a line every 15 s elsewhere.
        run_dir: wandb writes below it.
        config: what wandb stores as the run's configuration.

    Raises:
        UserError: wandb refuses, for instance online without a key.
    """

    def __init__(
        self,
        wandb_mode: str = "disabled",
        *,
        progress: bool = False,
        run_dir: Path | None = None,
        project: str = "sophon",
        name: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._console = Console(stderr=True)
        self.shows = progress
        self._run: Any = None
        if wandb_mode != "disabled":
            self._run = _start_wandb(wandb_mode, run_dir, project, name, config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record ``values`` at ``step`` in wandb."""
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def say(self, line: str) -> None:
        """Print one line on stderr, above any bar."""
        if self.shows:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show ``what`` going from ``done`` to ``total``, with the time it has left."""
        if not self.shows:
            yield lambda note="", steps=1: None
        elif self._console.is_terminal:
            with _bar(self._console) as bar:
                task = bar.add_task(what, total=total, completed=done, note="")
                yield lambda note="", steps=1: bar.update(task, advance=steps, note=note)
        else:
            yield _lines(what, total, done)

    def close(self) -> None:
        """End the wandb run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _start_wandb(mode: str, run_dir: Path | None, project: str, name: str, config: Mapping[str, Any] | None) -> Any:
    import wandb  # slow to import, and most tests run without it

    try:
        return wandb.init(
            project=project,
            name=name,
            # absolute: wandb's service keeps the working folder of the process's first run
            dir=None if run_dir is None else run_dir.resolve(),
            mode=mode,  # type: ignore[arg-type]
            config=dict(config or {}),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.errors.Error, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"tracking.wandb: '{mode}' failed ({reason}); use offline, disabled, or log in first"
        ) from error


class _Note(ProgressColumn):
    """What was said last, cut where the terminal ends: neither the count nor the time gives way to it."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        _Note(),
        console=console,
    )


def _lines(what: str, total: int, done: int) -> Advance:
    """Print a line now and then: for logs, where a bar would be noise."""
    start = last = time.monotonic()
    first = current = done

    def advance(note: str = "", steps: int = 1) -> None:
        nonlocal last, current
        current += steps
        now = time.monotonic()
        if (current < total or not steps) and now - last < _SECONDS_BETWEEN_LINES:
            return
        last, done = now, current - first
        left = f", ETA {(now - start) / done * (total - current):.0f} s" if done else ""
        print(f"{what} {current}/{total}, {now - start:.0f} s{left} {note}".rstrip(), file=sys.stderr)

    return advance
