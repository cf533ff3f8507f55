"""The audit on the command line: searches, workers, shards, reuse, foreign checkpoints, kills, comparisons."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli_helpers import RUNS, SMALL, load, sophon, start

# Every kind of job: plain, after surgery, with adapters, a search, benign transfer, the oracle.
SUITE = """
seeds: 1
eval_points: 2
masking: {heads: [kept]}
oracle: adam_fresh
benign: [adam_fresh]
strategies:
  adam_fresh: {optimizer: adam, lr: 0.005, batch_size: 16, steps: 4}
  untouched: {steps: 0, head: kept}
  healed: {optimizer: adam, lr: 0.005, batch_size: 16, steps: 4, surgery: [{operation: heal, steps: 2}]}
  lora: {optimizer: adam, lr: 0.005, batch_size: 16, steps: 2, scope: lora, lora_rank: 2}
  linears: {scope: lora, lora_layers: attention}
search:
  searching:
    trials: 3
    steps: 2
    seeds: 1
    startup: 2
    eval_points: 2
    optimizers: {adam: [0.001, 0.01], sgd: [0.01, 1.0]}
    choices: {batch_size: [8, 16], surgery: [[], [{operation: renormalise}]]}
"""
AUDIT = (
    "audit",
    "--config-dir=own",
    *SMALL,
    "attack=everything",
    "+domain@domain.benign=mnist_digits",
    "domain.benign.per_class=40",
    "domain.benign.test_per_class=20",
)


@pytest.fixture(scope="module")
def everything(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pretrain, protect and the whole audit have run; never written to again."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("everything") / "copy"))
    (folder / "own" / "attack" / "everything.yaml").write_text(SUITE)
    result = sophon(folder, *AUDIT)
    assert result.code == 0, result
    return folder


@pytest.fixture
def copied(everything: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(everything, tmp_path / "copied"))


def audit_of(folder: Path) -> Any:
    """Return ``audit.json`` without what depends on the clock."""
    return {key: value for key, value in load(folder / "audit.json").items() if key not in ("seconds_total", "date")}


pytestmark = pytest.mark.slow


def test_every_kind_of_job_is_in_the_result(everything: Path) -> None:
    summary = load(everything / RUNS / "audit" / "audit.json")
    assert {attack["attack"] for attack in summary["attacks"]} == {"adam_fresh", "healed", "lora", "searching"}
    assert set(summary["no_attack"]) == {"untouched"}
    assert summary["oracle"]["attack"] == "adam_fresh"
    assert summary["oracle"]["data_ratio"] > 1
    assert [attack["attack"] for attack in summary["benign"]] == ["adam_fresh"]
    [search] = summary["searches"]
    assert search["name"] == "searching"
    trials = {role: len(course["trials"]) for role, course in search["roles"].items()}
    assert trials == dict.fromkeys(("protected", "unprotected", "scratch"), 3)
    assert set(summary["left_out"]) == {"linears"}
    page = (everything / RUNS / "audit" / "report.html").read_text()
    assert all(words in page for words in ("searching", "healed", "mnist_digits", "linears"))
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_shards_and_workers_write_what_one_run_does(copied: Path) -> None:
    result = sophon(copied, *AUDIT, "run_dir=parts", "attack.shards=3", "attack.shard=1")
    assert result.code == 0, result
    assert not (copied / "parts" / "audit.json").exists()
    result = sophon(copied, *AUDIT, "run_dir=parts", "workers=2")
    assert result.code == 0, result
    assert audit_of(copied / "parts") == audit_of(copied / RUNS / "audit")
    mine, theirs = (sorted((copied / folder / "attempts").iterdir()) for folder in ("parts", RUNS / "audit"))
    for one, other in zip(mine, theirs, strict=True):
        assert list((load(one) | {"seconds": 0}).items()) == list((load(other) | {"seconds": 0}).items())


def test_another_audit_takes_over_the_other_roles_and_is_compared(copied: Path) -> None:
    """The reference passed off as protected: only the role ``protected`` has to be run."""
    passed_off = (f"checkpoint={RUNS / 'pretrain'}", f"attack.reuse=[{RUNS / 'audit'}]", "run_dir=off")
    result = sophon(copied, *AUDIT, *passed_off)
    assert result.code == 0, result
    mine, theirs = (copied / folder / "attempts" for folder in ("off", RUNS / "audit"))
    shared = {path.name for path in mine.iterdir()} & {path.name for path in theirs.iterdir()}
    assert shared == {path.name for path in theirs.iterdir() if "-protected-" not in path.name}
    for attack in load(copied / "off" / "audit.json")["attacks"]:
        if attack["attack"] != "searching":  # its winners' seeds are the same too, but their names are of another role
            assert attack["roles"]["protected"]["values"] == attack["roles"]["unprotected"]["values"]
    # and the two audits are compared
    result = sophon(copied, "report", "compare", str(RUNS / "audit"), "off", "out=both")
    assert result.code == 0, result
    assert "both" in result.out
    page, text = (copied / "both" / "compare.html").read_text(), (copied / "both" / "compare.md").read_text()
    for folder in (RUNS / "audit", Path("off")):
        assert load(copied / folder / "audit.json")["verdict"]["sentence"] in text
    assert "healed" in page


def test_an_audit_that_was_killed_ends_the_same(copied: Path) -> None:
    attempts = copied / "killed" / "attempts"
    process = start(copied, *AUDIT, "run_dir=killed")
    while len(list(attempts.glob("*.json"))) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (copied / "killed" / "audit.json").exists()
    result = sophon(copied, *AUDIT, "run_dir=killed")
    assert result.code == 0, result
    assert audit_of(copied / "killed") == audit_of(copied / RUNS / "audit")


def test_foreign_checkpoints_give_the_same_numbers(copied: Path) -> None:
    """The same weights without sophon's own file: nothing can be called seen, all else is the same."""
    for verb in ("pretrain", "protect"):
        shutil.copytree(copied / RUNS / verb / "checkpoint", copied / "foreign" / verb)
        (copied / "foreign" / verb / "sophon.json").unlink()
    state_dict = "foreign/protect/model.safetensors"
    result = sophon(copied, *AUDIT, f"checkpoint={state_dict}", "reference=foreign/pretrain", "run_dir=stranger")
    assert result.code == 0, result
    ours, theirs = load(copied / RUNS / "audit" / "audit.json"), load(copied / "stranger" / "audit.json")
    assert theirs["support"] is None
    assert [attack["roles"] for attack in theirs["attacks"]] == [
        attack["roles"] for attack in sorted(ours["attacks"], key=lambda each: each["attack"])
    ]
