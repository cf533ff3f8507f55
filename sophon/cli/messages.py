"""Turn the errors of Hydra and OmegaConf into one line, with what the user may have meant."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra.errors import HydraException

from sophon.cli.groups import ROLES, choices, groups
from sophon.config.keys import find, keys, type_name
from sophon.errors import likely

_INTERNAL = (
    "object_type=", "reference_type=", "full_key:", "Set the environment variable", "To append to your config", "See https://",
    "Did you mean to override", "Key '",
)  # fmt: skip


def one_line(error: Exception, searched: Iterable[str] = ()) -> str:
    """Return an error's message as one line."""
    whole = str(error)
    if isinstance(error, HydraException) and error.__cause__ is not None:
        whole += "\n" + str(error.__cause__)
    match = re.match(r"Could not override '([\w./@-]+)'", whole)
    if match and find(match[1]) is None and match[1] not in groups(searched):
        return _no_such_key(match[1], searched)
    if match := re.search(r"Could not (?:find|load) '([\w./-]+)/([^'/]+)'", whole):
        return _no_such_choice(match[1], match[2], searched)
    if match := re.search(r"Key '\S+' not in .*\s+full_key: (\S+)", whole):
        return _no_such_key(match[1], searched)
    merging = re.match(r"Error merging override \+*([\w.]+)=(.*)", whole)
    within = re.search(r"full_key: (\S+)", whole) or merging
    if merging and within and (key := find(within[1])) is not None:
        domains = within[1] == "domain.restricted"
        allowed = "choose by domain@domain.restricted=NAME" if domains else f"it must be {type_name(key.type)}"
        return f"{within[1]}: {merging[2]} is not allowed; {allowed}"
    if "Ambiguous value" in whole or "mismatched input" in whole or "no viable alternative" in whole:
        advice = "--multirun sweeps over several values; a value with special letters is quoted, as in \"key='a,b'\""
        whole = f"{whole.splitlines()[0]}\n{advice}"
    lines = [line.strip().rstrip(":.") for line in whole.split("Config search path:")[0].splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(_INTERNAL)))


def _no_such_key(name: str, searched: Iterable[str]) -> str:
    known = [*keys(), *groups(searched), *(f"domain@domain.{role}" for role in ROLES)]
    return f"{name}: no such key{likely(name, known)}; `sophon VERB --help GROUP` explains the keys"


def _no_such_choice(group: str, name: str, searched: Iterable[str]) -> str:
    known = choices(group, searched)
    return f"{group}: '{name}' is not known{likely(name, known)}; allowed: {', '.join(known)}"
