"""Everything that is needed to read an audit and to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping

from sophon.audit.verdict import Record, printable
from sophon.report import tables
from sophon.report.document import Code, Fold, Note, Part, Table, Terms

_TERMS = {
    "Exposure": "seen: protection could have simulated this attacker. longer: only its number of steps lies outside "
    "what was simulated. held out: something else does, named after the colon.",
    "Gap closed": "(unprotected - protected) / (unprotected - scratch): 0 is no protection, 1 no better a start than "
    "scratch. A worst case gives each role its best attack, chosen on the attacker's select split.",
    f"Steps to {tables.OVERHEAD_LEVEL} % of scratch": "How many times scratch's steps the protected model needs to go "
    "so far from scratch's start to scratch's end; > means that it never got there.",
    "SGRC": "(unprotected - protected) / unprotected: what protection takes off the result.",
    "Signed area": "Unprotected minus protected, averaged over the steps of the curve; positive where protection hurts "
    "the attacker.",
    "Harm": "Unprotected minus protected after fine-tuning on the benign domain; positive where protection hurts.",
    "Failed": "Attempts that diverged. They are left out of the means: an attacker would try again.",
    "Intervals": "± is half the width of Student's 95 % interval of the mean over seeds; [ ] is a 95 % bootstrap over "
    "seeds, too narrow if they are few.",
}
_FACTS = {
    "support": "What protection simulated (the sampler's support)",
    "domains": "Domains",
    "hashes": "Hashes of the domains' splits",
    "packages": "Package versions",
    "thresholds": "Thresholds",
}


def repeat(summary: Record) -> Iterator[Part]:
    """Yield the command, the checkpoints, and folded away all that stands behind them."""
    yield Note(f"{summary['attempts']} attempts, {summary['seconds_total']:.0f} s of attacking in all.")
    if checkpoints := _checkpoints(summary):
        yield checkpoints
    if summary["config"]:
        yield Note("To run it again, save the configuration below as conf/experiment/repeat.yaml, and call")
        yield Code(command(summary))
    if left_out := summary.get("left_out"):
        terms = {printable(attack): printable(str(reason)) for attack, reason in left_out.items()}
        yield Fold("Attacks that were left out", [Terms(terms)], open=True)
    yield Fold("What the numbers mean", [Terms(_TERMS)])
    if summary["config"]:
        yield Fold("Configuration", [Code(experiment(summary["config"]), "yaml")])
    for key, title in _FACTS.items():
        if summary.get(key):
            yield Fold(title, [Code("\n".join(_yaml(summary[key])), "yaml")])


def command(summary: Record) -> str:
    """Return the command line that repeats an audit with its `experiment` in ``conf/experiment/repeat.yaml``."""
    given = {key: (summary[key] or {}).get("path") for key in ("checkpoint", "reference")}
    words = ["sophon", "audit", "--config-dir=conf", "experiment=repeat"]
    words += [shlex.quote(f"{key}={printable(path)}") for key, path in given.items() if path]
    return " ".join([*words, "run_dir=repeat"])


def experiment(config: Record) -> str:
    """Return an audit's configuration as an experiment file of Hydra's."""
    # the default attacks would add to those that were run
    head = ["# @package _global_", "defaults:", "- override /attack: null"]
    return "\n".join([*head, *_yaml(config)])


def _yaml(data: Record, indent: str = "") -> Iterator[str]:
    """Yield YAML with each innermost mapping on a line of its own; JSON's scalars leave no doubt of their type."""
    for key, value in data.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            yield f"{indent}{json.dumps(key)}:"
            yield from _yaml(value, f"{indent}  ")
        else:
            yield f"{indent}{json.dumps(key)}: {json.dumps(value)}"


def _checkpoints(summary: Record) -> Table | None:
    found = {role: summary[key] for role, key in (("protected", "checkpoint"), ("unprotected", "reference"))}
    rows = [
        [
            role,
            *(printable(str(origin.get(key) or "-")) for key in ("name", "method")),
            f"{printable(str(origin.get('path') or '-'))}\nsha256 {printable(str(origin.get('sha256') or '-'))}",
        ]
        for role, origin in found.items()
        if origin
    ]
    return Table(["model", "name", "method", "checkpoint"], rows, 4) if rows else None
