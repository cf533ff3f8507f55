"""Suggest the commands that follow a verb, ready to be pasted."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from sophon.config import Config, default_folder

_EVERYWHERE = {"experiment", "name", "seed", "device", "amp", "threads", "domain", "task", "tracking"}
# What of a command matters to the one after it, beside that.
_OF = {
    "protect": _EVERYWHERE | {"reference", "method", "sampler", "guard"},
    "audit": _EVERYWHERE | {"reference", "attack", "workers", "model"},
}


def next_steps(config: Config, overrides: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the lines that a verb ends with.

    Args:
        overrides: as the user typed them.
        flags: ``--config-dir`` and the like, as typed.
    """

    def command(verb: str, *more: str) -> str:
        kept = [override for override in overrides if _root(override) in _OF[verb] and "attack.shard" not in override]
        return shlex.join(["sophon", verb, *flags, *kept, *more])

    folder = config.run_dir or str(default_folder(config, config.verb))
    folders = [] if config.run_dir is None else [folder]  # what the next verb does not find by itself
    match config.verb:
        case "pretrain":
            commands = [command("protect", *_restricted(overrides), *(f"reference={path}" for path in folders))]
        case "protect":
            chosen = any(_root(override) in ("attack", "experiment") for override in overrides)
            look = [] if chosen else ["attack=smoke"]  # the default, so that one sees what may stand there
            commands = [
                command("audit", *look, *(f"checkpoint={path}" for path in folders)),
                _export(default_folder(config, "export"), folder),
            ]
        case "export":
            return _loading(config.out or str(default_folder(config, "export")))
        case "audit" if config.attack.shards > 1:
            commands = [command("audit")]  # of all shards
        case "audit" | "report":
            folder = config.run_dir or str(default_folder(config, "audit"))
            commands = [shlex.join(["sophon", "report", f"run_dir={folder}"])] if config.verb == "audit" else []
            commands += _comparison(folder)
            if audited := _audited(Path(folder)):
                commands.append(_export(Path(folder).parent / "export", audited, f"audit={folder}"))
        case "sample":
            commands = [command("audit", *([] if config.checkpoint is None else [f"checkpoint={config.checkpoint}"]))]
        case _:
            commands = []
    return [f"next: {line}" for line in commands]


def _restricted(overrides: Sequence[str]) -> list[str]:
    """Return a restricted domain to fill in where the original one is the user's own and this one is the default."""
    own = any("domain.original" in override for override in overrides)
    if not own or any("experiment=" in override or "domain.restricted" in override for override in overrides):
        return []
    return ["domain@domain.restricted=folder", "domain.restricted.root=path/to/restricted"]


def _export(out: str | Path, checkpoint: str, *more: str) -> str:
    return shlex.join(["sophon", "export", f"checkpoint={checkpoint}", *more, f"out={out}"])


def _audited(folder: Path) -> str | None:
    """Return the checkpoint that an audit attacked; None where several audits lie below ``folder``."""
    record = folder / "audit.json"
    return json.loads(record.read_bytes())["checkpoint"]["path"] if record.exists() else None


def _root(override: str) -> str:
    """Return the group or key that an override is about: ``domain`` of ``+domain@domain.benign=people``."""
    return re.split(r"[.@/=]", override.lstrip("+~"), maxsplit=1)[0]


def _comparison(folder: str) -> list[str]:
    """Return the command that sets an audit beside those of other seeds."""
    audits = sorted(Path(folder).parent.parent.glob(f"*/{Path(folder).name}/audit.json"))
    others = [str(audit.parent) for audit in audits if audit.parent != Path(folder)]
    return [shlex.join(["sophon", "report", "compare", folder, *others])] if others else []


def _loading(out: str) -> list[str]:
    """Return the code of the model card that loads a checkpoint without sophon."""
    card = (Path(out) / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    place = out.replace("\\", "\\\\").replace('"', '\\"')
    return ["next, in Python, without sophon:", *block[1].replace("PATH", place).splitlines()] if block else []
