"""The verb that protects."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from sophon.api.common import checkpoint_of, doubt, run_dir, said_by, say_domains, say_input, tracker_of, warn
from sophon.api.manifests import figures
from sophon.api.protect import lost_on_test, prepare, run
from sophon.api.results import Protected
from sophon.config import Config
from sophon.errors import UserError
from sophon.paths import exists
from sophon.protection.distributed import join
from sophon.run_folder import run_folder
from sophon.tasks import Task
from sophon.tracking import Tracker


def protect(config: Config) -> str | None:
    """Protect the reference against fine-tuning on the restricted domains; write ``run_dir/checkpoint``.

    Started by torchrun the ranks share the work; the first one alone writes and reports.

    Returns:
        A warning if the original domain's ``test`` lost more than the guard, which reads ``val``, lets pass.
    """
    ranks, device = join(config.device)
    with ranks.together():
        protection = prepare(config, checkpoint_of(config, "reference", "pretrain"), device, ranks)
        context = protection.context
        doubted = doubt(context.task, context.reference, context.original, "reference")
    if len({json.dumps(identity) for identity in ranks.gather(protection.identity)}) > 1:
        raise UserError("the ranks differ in configuration, checkpoint or images; give all of them the same")
    if ranks.rank == 0:
        if protection.note:
            print(protection.note)
        say_domains(context.original, *context.restricted)
        say_input(protection.reference.spec, said_by(protection.reference))
    folder = run_dir(config)
    with ExitStack() as stack:

        def begin() -> bool:
            stack.enter_context(run_folder(folder, "protect", protection.identity))
            return not exists(folder / "checkpoint")

        if not ranks.first(begin):
            if ranks.rank == 0:
                print(f"already done: {folder / 'checkpoint'}")
            return None
        if ranks.rank == 0:
            warn(doubted)
        with ranks.together():
            tracker = stack.enter_context(tracker_of(config, folder)) if ranks.rank == 0 else Tracker()
        released = run(protection, folder, tracker)
        if released is None:
            return None
        released.save(folder / "checkpoint")
        return say_released(folder / "checkpoint", config, context.task, released)


def say_released(out: Path, config: Config, task: Task, released: Protected) -> str | None:
    """Print where the checkpoint lies and what it cost; return a warning if ``test`` lost too much."""
    rounds, intactness = released.manifest["history"], released.manifest["intactness"]
    before, after = intactness["before"], intactness["after"]
    print(
        f"{out}: round {rounds['good_round']} of {rounds['rounds']}, {task.metric.name} on the original domain "
        f"{figures(task, before)} before, {figures(task, after)} after"
    )
    return lost_on_test(config.guard, task, before["test"], after["test"])
