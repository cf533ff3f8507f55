"""The shipped configuration files, and how they are composed where there is no command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sophon.errors import UserError, choose
from sophon.paths import is_file

# The group choices of conf/config.yaml for each kind of model.
USUAL = {
    "classification": {
        "task": "classification",
        "pretrain": "sgd",
        "method": "sophon_klu",
        "sampler": "mixed",
        "guard": "points",
    },
    "denoising": {
        "task": "denoising",
        "pretrain": "adam_ema",
        "method": "sophon_dos",
        "sampler": "denoiser",
        "guard": "relative",
    },
}
# The suite that shows what an audit should show at least.
STANDARD = {"classification": "standard", "denoising": "standard_diffusion"}


def conf_dir() -> Path:
    """Return the folder of the shipped configuration: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if is_file(inside / "config.yaml") else package.parent / "conf"


def chosen(group: str, choice: str | Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """Return a group of the configuration as plain data.

    Args:
        group: ``method``, ``attack``, ...
        choice: the name of a file of the group, the path of a ``.yaml`` file of one's own, or the data itself.
        key: what messages call it; by default the group.

    Raises:
        UserError: there is no such file, or it is not YAML.
    """
    if not isinstance(choice, str):
        return dict(choice)
    file = Path(choice).expanduser() if choice.endswith((".yaml", ".yml")) else conf_dir() / group / f"{choice}.yaml"
    if not is_file(file, key or group):
        choose(key or group, choice, [path.stem for path in (conf_dir() / group).glob("*.yaml")])
    composed: Any = _composed(file, group)
    for part in group.split("/"):
        composed = composed[part]
    return dict(composed)


def _composed(file: Path, package: str) -> dict[str, Any]:
    """Return a file below the package that it belongs to, merged with those that its defaults list names."""
    try:
        own: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the YAML parser's own
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    merged: dict[str, Any] = {}
    defaults = own.pop("defaults", [])
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            nested: Any = own
            for part in reversed(package.split(".")):
                nested = {part: nested}
            merged = _merged(merged, nested)
            continue
        [(group, names)] = entry.items() if isinstance(entry, dict) else [(".", entry)]
        group, _, at = group.partition("@")
        folder = conf_dir() / group[1:] if group.startswith("/") else file.parent / group
        for name in [names] if isinstance(names, str) else names:
            below = folder / f"{name}.yaml"
            here = package if at == "_here_" or group == "." else _package(below)
            merged = _merged(merged, _composed(below, here))
    return merged


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings, and those in them, as OmegaConf does, which takes a second for a suite's files."""
    both = {key: _merged(one[key], other[key]) for key in one.keys() & other if _are_mappings(one[key], other[key])}
    return {**one, **other, **both}


def _are_mappings(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _package(file: Path) -> str:
    """Return where a file's keys belong: what its header says, else its group."""
    header = re.match(r"# @package (\S+)", file.read_text())
    return header[1] if header else ".".join(file.parent.relative_to(conf_dir()).parts)
