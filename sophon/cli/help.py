"""What the command line explains: its verbs, and the keys of a group."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import is_dataclass
from typing import Any

import omegaconf

from sophon.cli.groups import choices, groups
from sophon.config.keys import ANY, below, content, keys, type_name
from sophon.errors import UserError, likely

USAGE = """sophon: make pre-trained models non-fine-tunable in a restricted domain, and audit how well that holds

  sophon pretrain experiment=NAME ...                 make the unprotected reference
  sophon protect  experiment=NAME [run_dir=DIR] ...   protect it; the same command goes on where it stopped
  sophon export   checkpoint=DIR out=DIR [audit=DIR]  copy a verified checkpoint, or an unfinished run's last good
                                                      state; its card says what the audit found
  sophon audit    experiment=NAME [checkpoint=DIR] [reference=DIR] [attack=NAME] [run_dir=DIR] ...
                                                      attack it, its reference and a fresh model
  sophon sample   checkpoint=DIR [n=64] [run_dir=DIR]
                                                      draw images from a denoiser, as one grid
  sophon report   run_dir=DIR                         write an audit's reports again
  sophon report compare DIR DIR ... [out=DIR]         set audits side by side
  sophon show     checkpoint=DIR                      say what a checkpoint is, and verify it
  sophon push     checkpoint=DIR repo=ORG/NAME [dry_run=false]
                                                      upload a protected checkpoint to the Hugging Face Hub
  sophon list     methods|attacks|models|domains|experiments|samplers
                                                      what there is, with a line on each
  sophon init     DIR                                 write an experiment, its domains and its model to begin with

Folders default to runs/<name>/seed<seed>/<verb>. Every key of the configuration can be overridden, as in
`sophon protect experiment=quickstart method.rounds=50 seed=1`. A value that is text is taken as typed; a mapping,
`model.model_args={depth: 4}`, replaces the one that the configuration had.

  sophon VERB --help          the groups, their choices and the whole configuration
  sophon VERB --help GROUP    what the keys of a group mean: method, guard, sampler, attack, domain, strategy, ...
  sophon VERB ... --cfg job   what a command would run
  sophon VERB ... --multirun  one run for each of several values, as in seed=0,1,2
  sophon --completion bash    completion of verbs, groups, keys and their values: eval "$(sophon --completion bash)"

Exit codes: 0 done; 2 the input is wrong; 3 no checkpoint satisfies the guard; 4 an audit does not come to what
`gate.*` asks for; 130 interrupted (a protect or an audit goes on with the same command).
"""
# Words for `--help` that are no key themselves, and the keys that they stand for.
_WORDS = {"strategy": f"attack.strategies.{ANY}", "run": ""}


def explain(name: str) -> str:
    """Return what the keys of a group mean, with their types and defaults.

    Args:
        name: a group; a key; ``strategy``, for what an attacker may choose; or ``run``, for the keys in no group.

    Raises:
        UserError: there is no such group or key.
    """
    if name not in {**keys(), **_WORDS}:
        groups_of_keys = sorted({key.partition(".")[0] for key in keys() if "." in key})
        raise UserError(
            f"--help: '{name}' is not known{likely(name, [*keys(), *_WORDS])}; "
            f"allowed: {', '.join([*groups_of_keys, *_WORDS])}, or a key"
        )
    lines = [f"{name}={'|'.join(choices(name))}\n"] if name in groups() else []
    explained: dict[Any, str] = {}  # what the keys of a type mean is said once
    skipped: tuple[str, ...] = ()
    for key in below(_WORDS.get(name, name)).values():
        kind = content(key.type)
        if key.name.startswith(skipped) or not key.meaning:
            continue
        if not is_dataclass(kind):
            lines.append(f"{key.name}: {type_name(key.type)}{_default(key.default)}\n{_wrapped(key.meaning)}")
        elif name != "run":
            lines.append(f"{key.name}: {key.meaning}")
            if kind in explained:
                lines.append(_wrapped(f"The keys of {explained[kind]}."))
                skipped += (f"{key.name}.",)
            explained.setdefault(kind, key.name)
    return "\n".join(lines)


def _wrapped(words: str) -> str:
    return textwrap.fill(words, 120, initial_indent="    ", subsequent_indent="    ")


def _default(value: Any) -> str:
    if value is dataclasses.MISSING or value == omegaconf.MISSING:
        return ""
    if isinstance(value, str) and value:
        return f" = {value}"
    return "" if isinstance(value, dict) and omegaconf.MISSING in value.values() else f" = {json.dumps(value)}"
