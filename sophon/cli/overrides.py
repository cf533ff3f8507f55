"""Prepare overrides as the user typed them for Hydra."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from sophon.config.keys import ANY, content, find, optional
from sophon.errors import UserError

_OVERRIDE = re.compile(r"(\+{0,2})([^=]+)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", re.DOTALL)
_SWEEP = re.compile(r"(range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
_CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)


def split(override: str) -> tuple[str, str, str] | None:
    """Part an override into its ``+`` signs, its key or group and its value; None for a deletion or another form."""
    match = _OVERRIDE.fullmatch(override)
    return None if match is None or override.startswith("~") else (match[1], match[2], match[3])


def named(overrides: Sequence[str]) -> set[str]:
    """Return the keys and groups that overrides speak of."""
    return {parts[1] for override in overrides if (parts := split(override)) is not None}


def as_typed(override: str, groups: Collection[str], sweeps: bool) -> str:
    """Quote the text in an override, which Hydra would otherwise read by its grammar: 1e5 as a number, say.

    Args:
        override: ``key=value`` or ``group=choice``, perhaps after ``+`` signs.
        sweeps: whether commas part the values of a sweep (``--multirun``).

    Raises:
        UserError: nothing says which key is meant; Hydra answers that with a traceback.
    """
    if override.lstrip("+~").startswith(("=", "@")):
        raise UserError(f"'{override}' names no key; give key=value, without spaces around =")
    parts = split(override)
    if parts is None:
        return override
    plus, key, value = parts
    if key.split("@")[0] in groups:
        kind: Any = list[str] if value.startswith("[") else str
    elif (known := find(key)) is not None:
        kind = known.type
    else:
        return override
    if not sweeps:
        return f"{plus}{key}={quoted(value, kind)}"
    if _SWEEP.fullmatch(value):
        return override
    choice = _CHOICE.fullmatch(value)
    return f"{plus}{key}={','.join(quoted(part, kind) for part in _parted(choice[1] if choice else value))}"


def quoted(value: str, kind: Any) -> str:
    """Quote a value of type ``kind``, or the text inside one, unless it is quoted or an interpolation of OmegaConf."""
    if value == "null" and optional(kind):
        return value
    kind = content(kind)
    if kind is str:
        return value if _QUOTED.fullmatch(value) or "${" in value else text(value)
    inner = value.strip()[1:-1]
    if get_origin(kind) is list and value.startswith("[") and value.endswith("]"):
        return f"[{','.join(quoted(part.strip(), get_args(kind)[0]) for part in _parted(inner) if part.strip())}]"
    if value.startswith("{") and value.endswith("}"):
        return f"{{{','.join(_entries(inner, _type_of_entries(kind)))}}}"
    return value


def text(value: str) -> str:
    """Return text in quotes, as Hydra's grammar has them."""
    return str(QuotedString(value, Quote.single).with_quotes())


def _type_of_entries(kind: Any) -> Callable[[str], Any]:
    """Return what says of which type a mapping's values are, by their keys."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return lambda name: hints.get(name, Any)
    every = get_args(kind)[1] if get_origin(kind) is dict else Any
    return lambda name: every


def _entries(inner: str, type_of: Callable[[str], Any]) -> Iterator[str]:
    for entry in _parted(inner):
        name, colon, value = entry.partition(":")
        yield f"{name}: {quoted(value.strip(), type_of(name.strip()))}" if colon else entry


def _parted(value: str) -> list[str]:
    """Part text at its commas, but not inside quotes, brackets, braces or parentheses."""
    parts, depth, quote, escaped = [""], 0, "", False
    for letter in value:
        if not (depth or quote) and letter == ",":
            parts.append("")
            continue
        parts[-1] += letter
        if escaped or letter == "\\":
            escaped = not escaped
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and parts[-1][:-1].rstrip()[-1:] in ("", *"[{(:,"):
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
    return parts


def refuse_parted(overrides: Sequence[str]) -> None:
    """Refuse a mapping or a list that the shell has parted at its spaces.

    Raises:
        UserError: an override opens one that it does not close.
    """
    for place, override in enumerate(overrides):
        _, key, value = split(override) or ("", "", "")
        closing, known = {"{": "}", "[": "]"}.get(value[:1]), find(key)
        if closing is None or known is None or content(known.type) is str or value.rstrip().endswith(closing):
            continue
        ends = [end for end, part in enumerate(overrides) if end > place and part.endswith(closing)]
        whole = " ".join(overrides[place : ends[0] + 1]) if ends else f"{override} ...{closing}"
        raise UserError(
            f"{key}: '{value}' ends without '{closing}'; the shell parts a command at spaces: "
            f"quote the whole argument: {shlex.quote(whole)}"
        )


def of_a_model(overrides: Sequence[str]) -> list[str]:
    """Start from ``model=own`` where a command names another architecture: its arguments fit no other."""
    keys = named(overrides)
    own = keys & {"model.architecture", "model.library"} and "model" not in keys
    return ["model=own", *overrides] if own else list(overrides)


def mend_hydra() -> None:
    """Let an override's mapping replace the one that files give, and set any key of what was added by name.

    Hydra merges mappings, and asks for a ``+`` before those keys of a further domain or attack that no file mentions.
    """
    merge = ConfigLoaderImpl._apply_overrides_to_config

    def apply(overrides: list[Override], config: DictConfig) -> None:
        for override in overrides:
            key = override.key_or_group
            if override.package is None and not override.is_delete():
                node = OmegaConf.select(config, key, throw_on_missing=False)
                if isinstance(override.value(), dict) and isinstance(kind := _kind_at(key, node), type):
                    OmegaConf.update(config, key, kind if is_dataclass(kind) else {}, merge=False, force_add=True)
                    override.type = OverrideType.FORCE_ADD
                elif node is None and not override.is_add() and _is_open(config, key):
                    override.type = OverrideType.FORCE_ADD
            merge([override], config)

    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)


def _kind_at(key: str, node: object) -> type | None:
    """Return the type of the mapping at ``key``; of one that is not there yet, where the mapping around it says it."""
    if isinstance(node, DictConfig):
        return OmegaConf.get_type(node)
    around = find(key.rpartition(".")[0])
    kind = get_args(around.type)[1] if around is not None and get_origin(around.type) is dict else None
    return kind if is_dataclass(kind) and isinstance(kind, type) else None


def _is_open(config: DictConfig, key: str) -> bool:
    """Return whether ``key`` is one of what stands in the configuration under a name of the user's."""
    parent, _, last = key.rpartition(".")
    known, around = find(key), find(parent)
    named = known is not None and ANY in known.name and known.name.rpartition(".")[2] == last
    of_a_stage = around is not None and ANY in around.name and around.type is Any  # or of an objective: they check it
    return (named or of_a_stage) and OmegaConf.select(config, parent) is not None
