"""The verb that audits."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sophon.api.audit import Audit, identity_of, named_checkpoints, prepare, run, runner_of, share_threads
from sophon.api.common import doubt, run_dir, said_by, say_domains, say_input, tracker_of, warn
from sophon.api.results import Audited
from sophon.auditing.runner import Runner
from sophon.config import Config
from sophon.errors import UserError
from sophon.paths import exists, is_folder
from sophon.run_folder import owned, run_folder
from sophon.verbs.report import compare_domains, require, say_found


def audit(config: Config) -> None:
    """Attack the checkpoint, its unprotected reference and a fresh model; write the results and the reports.

    Several restricted domains are audited in turn, each in a folder of its name, and then compared.
    """
    share_threads(config)
    parts = _parts(config)
    audits = {
        path: replace(audit, config=parts[path])
        for path, audit in zip(parts, prepare(config, *named_checkpoints(config)), strict=True)
    }
    first = next(iter(audits.values()))
    say_domains(first.original, *(audit.scene.restricted for audit in audits.values()), first.scene.benign)
    say_input(first.protected.spec, said_by(first.protected))
    runners = {path: runner_of(audit, path) for path, audit in audits.items()}  # refuses before a folder is begun
    given = [(first.protected, "checkpoint"), (first.reference, "reference")]
    if first.reference.sha256 == first.protected.sha256 and "protected" in config.attack.roles:
        warn("reference: it has the checkpoint's own weights, so that the audit compares a model with itself")
    for checkpoint, key in (*given, *((filtered, "filtered") for filtered in first.filtered)):
        warn(doubt(first.scene.task, checkpoint.model, first.original, key))
    if len(parts) > 1 and exists(run_dir(config) / "run.json"):
        raise UserError(f"run_dir: '{run_dir(config)}' holds an audit of one domain; give another run_dir")
    with ExitStack() as ownership:
        if len(parts) > 1:
            ownership.enter_context(owned(run_dir(config), _shard(config)))
        for path in parts:
            ownership.enter_context(run_folder(path, "audit", identity_of(audits[path]), _shard(config)))
        audited_by_path = {path: _audit(audits[path], runners[path]) for path in parts}
        reports = {path: audited.report for path, audited in audited_by_path.items() if audited}  # none of a shard
        if len(parts) > 1 and reports:
            compare_domains(run_dir(config), reports)
    require(config, reports)


def _shard(config: Config) -> str:
    """Return which part of the folder is this process's; empty if it is alone."""
    return f"{config.attack.shard}of{config.attack.shards}" if config.attack.shards > 1 else ""


def _parts(config: Config) -> dict[Path, Config]:
    """Return an audit's parts by their folders: the configuration itself, or one for each of several domains."""
    folder, domains, parts = run_dir(config), config.domain, {}
    if len(domains.restricted) == 1:
        return {folder: config}
    for name, domain in domains.restricted.items():
        folders = [
            str(path) if is_folder(path := Path(other) / domain.name, "attack.reuse") else other
            for other in config.attack.reuse
        ]
        parts[folder / domain.name] = replace(
            config,
            run_dir=str(folder / domain.name),
            domain=replace(domains, restricted={name: domain}),
            attack=replace(config.attack, reuse=folders),
        )
    return parts


def _audit(audit: Audit, runner: Runner) -> Audited | None:
    attack = audit.config.attack
    with tracker_of(audit.config, runner.folder) as tracker:
        audited = run(audit, runner, tracker)
    if audited is None:
        print(f"{runner.folder}: shard {attack.shard} of {attack.shards} is done; audit without shards to finish")
    else:
        say_found(runner.folder, audited.report)
    return audited
