"""What a checkpoint's ``sophon.json`` says of the run that made it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from sophon import __version__
from sophon.api.common import measured
from sophon.auditing.words import format_value
from sophon.checkpoint import Checkpoint
from sophon.config import Config, plain
from sophon.domains import LoadedDomain
from sophon.errors import UserError
from sophon.tasks import Task


def manifest_of(
    config: Config, verb: str, parent: str | None, original: LoadedDomain, restricted: Sequence[LoadedDomain] = ()
) -> dict[str, Any]:
    """Return the manifest's part that all checkpoints have; ``parent`` is the sha256 of the weights it began with."""
    several = [_facts(domain) for domain in restricted]
    more = {"restricted": several[0] if len(several) == 1 else several} if several else {}
    return {
        "sophon": __version__,
        "verb": verb,
        "name": config.name,
        "config": plain(config),
        "method": None,
        "sampler_support": None,
        "domains": {"original": _facts(original), **more},
        "seed": config.seed,
        "parent_sha256": parent,
    }


def _facts(domain: LoadedDomain) -> dict[str, Any]:
    return {"name": domain.name, "classes": list(domain.classes), "hashes": dict(domain.hashes)}


def hashes_of(original: LoadedDomain, restricted: Sequence[LoadedDomain]) -> dict[str, Any]:
    """Return what says of which images a run is; of several restricted domains also their order."""
    if len(restricted) == 1:
        return {"original": original.hashes, "restricted": restricted[0].hashes}
    several = {domain.name: domain.hashes for domain in restricted}
    return {"original": original.hashes, "restricted": several, "order": [domain.name for domain in restricted]}


def mechanisms_of(manifest: Mapping[str, Any]) -> list[str] | None:
    """Return how the stages that made a checkpoint protect it, each once; None where that is not known."""
    stages = manifest.get("stages")
    return None if stages is None else list(dict.fromkeys(stage.get("mechanism") or stage["name"] for stage in stages))


def check_pretraining(
    reference: Checkpoint, filtered: Sequence[Checkpoint], restricted: Sequence[LoadedDomain]
) -> None:
    """Refuse a reference that was trained on what its attackers have, and filtered models that saw the domain."""
    unseen = {model.manifest.get("weights_sha256") for model in filtered}
    for domain in restricted:
        for model in filtered:
            if _splits_seen(model, domain) and not _is_student_of(unseen, model):
                raise UserError(f"filtered: '{model.path}' was trained on {domain.name}; give one that never saw it")
        if any(hashes != domain.hashes for hashes in _splits_seen(reference, domain)):
            raise UserError(
                f"reference: it was trained on another split of {domain.name}, and so perhaps on the attacker's "
                "images; give domain.restricted as pretrain had it"
            )


def _is_student_of(unseen: Collection[str | None], checkpoint: Checkpoint) -> bool:
    """Say whether a checkpoint was made of one of these, by stages that read no restricted images."""
    manifest = checkpoint.manifest
    reads = [stage.get("information", {}).get("restricted", ["unknown"]) for stage in manifest.get("stages", [])]
    return manifest.get("parent_sha256") in unseen and bool(reads) and not any(reads)


def _splits_seen(checkpoint: Checkpoint, domain: LoadedDomain) -> list[dict[str, str]]:
    """Return the hashes of a restricted domain's splits, as a checkpoint was made with them; the domain may be renamed.

    Whatever the splits, the test images are the same, unless ``test_per_class`` draws some of them.
    """
    manifest = checkpoint.manifest
    made_with = "pretrained_on" in manifest or manifest.get("method") is not None
    seen = manifest["domains"].get("restricted", []) if made_with else []
    return [
        facts["hashes"]
        for facts in (seen if isinstance(seen, list) else [seen])
        if facts["name"] == domain.name or facts["hashes"]["test"] == domain.hashes["test"]
    ]


def information_path(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in a sentence or two how what the reference held of the restricted domains can have reached the weights.

    Args:
        stages: by name, in their order, the fields of `sophon.protection.stage.Information`.
    """
    names = list(stages)
    fresh = [place for place, name in enumerate(names) if stages[name]["start"] == "fresh"]
    if not fresh:
        return (
            "The released weights descend from the unprotected model's, and nothing bounds what they still hold of the "
            "restricted domain."
        )
    later = names[fresh[-1] :]
    reads = " and ".join(dict.fromkeys(word for name in later for word in stages[name]["original"]))
    sentence = f"The released weights began as random ones in the stage {later[0]} and were trained on original {reads}"
    answers = "outputs and features" if any("features" in stages[name]["teacher"] for name in later) else "outputs"
    readers = [name for name in later if stages[name]["restricted"]]
    compared = [name for name in later if "weights" in stages[name]["teacher"]]
    if readers or compared:
        too = f", and on restricted images in the stage {' and '.join(readers)}" if readers else ""
        ways = ", or through those" if readers else ""
        ways += f", or through the unprotected weights, which the stage {compared[0]} reads" if compared else ""
        return (
            f"{sentence}{too}: what they hold of the restricted domain went through a teacher's {answers} on original "
            f"images{ways}."
        )
    return (
        f"{sentence} alone: what they hold of the restricted domain went through a teacher's {answers} on original "
        "images. That bounds the way, not the amount: what a student can pick up from such answers, they may hold."
    )


def both_splits(task: Task, model: nn.Module, original: LoadedDomain, key: str) -> dict[str, float]:
    """Return the task's metric on ``val`` and ``test`` of the original domain; messages name ``key``."""
    return {split: measured(task, model, original, split, key).value for split in ("val", "test")}


def figures(task: Task, values: dict[str, float]) -> str:
    """Return values by split as words."""
    return ", ".join(f"{split} {format_value(value, task.metric)}" for split, value in values.items())
