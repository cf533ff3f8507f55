"""Stand-ins for the jobs of an audit, without torch: processes begin fast; a job is done when its file is there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from sophon.errors import UserError

COSTS = {"a": 1, "b": 3, "c": 1, "d": 1, "trouble": 1, "trouble again": 1}


class Jobs:
    """What `sophon.auditing.workers.run_jobs` asks of a runner.

    Args:
        folder: of the jobs' files.
        trouble: what the last two do besides.
    """

    def __init__(self, folder: Path, trouble: Callable[[], object] = bool) -> None:
        self.jobs = {folder / name: SimpleNamespace(cost=cost) for name, cost in COSTS.items()}
        self.trouble = trouble

    def missing(self) -> list[Path]:
        return [path for path in self.jobs if not path.exists()]

    def run(
        self, path: Path, on_trial: Callable[[str], object] = bool, on_point: Callable[[str], object] = bool
    ) -> str:
        on_point(f"{path.name}: step 0")
        for trial in range(self.jobs[path].cost - 1):
            on_trial(f"{path.name}: trial {trial}")
        if path.name.startswith("trouble"):
            self.trouble()
        path.write_text(path.name)
        return f"{path.name} is done"


def maker(folder: Path, trouble: Callable[[], object] = bool) -> partial[Jobs]:
    """Return what makes them again in another process."""
    return partial(Jobs, folder, trouble)


def unmakable(folder: Path) -> Jobs:
    raise RuntimeError("no memory\nfor it")


def die() -> None:
    os._exit(3)


def refuse() -> None:
    raise UserError("attack.strategies.trouble: refused")


def wait() -> None:
    os.write(1, b"waiting\n")  # in one piece, for two processes write to one pipe
    time.sleep(600)
