"""`sophon init`: configuration of one's own to begin with, which runs as it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from sophon.errors import UserError
from sophon.files import write_text
from sophon.paths import entries, exists

# where each template goes
_FILES = {
    "experiment.yaml": "experiment/NAME.yaml",
    "original.yaml": "domain/NAME_original.yaml",
    "restricted.yaml": "domain/NAME_restricted.yaml",
    "model.yaml": "model/NAME.yaml",
}


def init(arguments: Sequence[str]) -> str:
    """Write an experiment, its two domains and its model into a new folder; return what to do with them.

    Args:
        arguments: the folder; its last part names the files.

    Raises:
        UserError: the name is no name of a file, the folder holds something, or it cannot be written.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("init: give one folder to make, as in `sophon init my_project`")
    try:
        folder = Path(arguments[0]).expanduser()
    except RuntimeError as error:
        raise UserError(f"init: '{arguments[0]}' has no such home; give another folder") from error
    name = folder.name
    if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
        raise UserError(f"init: '{name}' is not allowed; give a name of letters, digits, _ and -, a letter first")
    if exists(folder, "init") and entries(folder, "init"):
        raise UserError(f"init: '{folder}' is not empty; give a new folder")
    for template, place in _FILES.items():
        path = folder / place.replace("NAME", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = files("sophon").joinpath("templates", "project", template).read_text(encoding="utf-8")
        write_text(path, text.replace("NAME", name))
    paths = "\n".join(f"  {folder / place.replace('NAME', name)}" for place in _FILES.values())
    command = shlex.join(["sophon", "pretrain", "--config-dir", str(folder), f"experiment={name}"])
    return f"{folder} holds, each file commented:\n{paths}\nnext: {command}"
