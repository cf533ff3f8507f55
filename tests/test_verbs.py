"""The five verbs from end to end, on images of the package: what they write is what the contracts promise."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sophon.protection.resume import STATE_FILE, read_state
from tests.cli_helpers import (
    ATTACKS,
    AUDIT,
    PRETRAIN,
    PROTECT,
    RUNS,
    SMALL,
    load,
    refusal,
    sophon,
    tree,
    weights_sha256,
)

pytestmark = pytest.mark.slow  # whole commands

CLASSES = ["t_shirt", "trouser", "pullover", "dress", "coat"]
OTHERS = ["sandal", "shirt", "sneaker", "bag", "ankle_boot"]
ROLES = ["protected", "unprotected", "scratch"]
FILES = ["README.md", "config.json", "model.safetensors", "sophon.json"]


@pytest.fixture
def copied(audited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited, tmp_path / "copied"))


def manifest(folder: Path, verb: str) -> dict:
    return load(folder / RUNS / verb / "checkpoint" / "sophon.json")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["pretrain", "protect"])
def test_a_checkpoint_is_whole_and_says_what_it_is(audited: Path, verb: str) -> None:
    checkpoint = audited / RUNS / verb / "checkpoint"
    assert sorted(path.name for path in checkpoint.iterdir()) == FILES
    found = manifest(audited, verb)
    assert found["format_version"] == 1
    assert found["verb"] == found["config"]["verb"] == verb
    assert found["name"] == "quickstart"
    assert found["seed"] == found["config"]["seed"] == 0
    assert found["weights_sha256"] == weights_sha256(checkpoint)
    assert found["model"]["architecture"] == "resnet18"
    assert found["model"]["classes"] == found["domains"]["original"]["classes"] == CLASSES
    assert {"sophon", "python", "torch", "timm"} <= set(found["versions"])
    assert set(found["domains"]["original"]["hashes"]) == {"train", "val", "test"}
    card = (checkpoint / "README.md").read_text()
    assert found["weights_sha256"] in card
    for value in found["intactness"]["after"].values():
        assert f"{value:.2f}" in card


def test_the_manifest_of_a_protected_checkpoint(audited: Path) -> None:
    found, reference = manifest(audited, "protect"), manifest(audited, "pretrain")
    assert found["parent_sha256"] == reference["weights_sha256"]
    assert reference["parent_sha256"] is None
    assert reference["method"] is reference["sampler_support"] is None
    assert found["weights_sha256"] != reference["weights_sha256"]
    assert found["method"]["name"] == "pool_anchored"
    assert found["method"] == found["config"]["method"]
    restricted = found["domains"]["restricted"]
    assert restricted["classes"] == OTHERS
    assert set(restricted["hashes"]) == {"adapt", "query", "attack", "select", "test"}
    digests = [digest for domain in found["domains"].values() for digest in domain["hashes"].values()]
    assert len(set(digests)) == len(digests) == 8
    assert found["domains"]["original"] == reference["domains"]["original"]
    assert found["history"] == {"rounds": 3, "good_round": 3, "rollbacks": 0}


def test_intactness_is_measured_before_and_after_on_both_splits(audited: Path) -> None:
    found, reference = manifest(audited, "protect")["intactness"], manifest(audited, "pretrain")["intactness"]
    assert (found["metric"], found["unit"], found["higher_is_better"]) == ("accuracy", "%", True)
    assert found["tolerance"] == 100
    assert set(found["before"]) == set(found["after"]) == {"val", "test"}
    assert found["before"] == reference["after"]
    assert found["before"]["test"] > 40, "the reference did not learn, so the other tests would show nothing"
    assert all(0 <= value <= 100 for value in found["after"].values())


def test_nothing_is_pickled_and_nothing_temporary_stays(audited: Path) -> None:
    names = list(tree(audited))
    assert not [name for name in names if name.endswith((".tmp", ".old", ".pt", ".pth", ".pkl", ".bin", ".ckpt"))]
    assert not [name for name in names if "outputs" in name or ".hydra" in name or "wandb" in name]


# ---- the audit ------------------------------------------------------------------------------------------------------


def test_there_is_a_whole_attempt_of_each_attack_against_each_role(audited: Path) -> None:
    records = [load(path) for path in (audited / RUNS / "audit" / "attempts").iterdir()]
    assert {(r["attack"], r["role"]) for r in records} == {(attack, role) for attack in ATTACKS for role in ROLES}
    assert len(records) == 9
    for record in records:
        assert record["schema_version"] == 2
        assert record["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
        steps = [point["step"] for point in record["curve"]]
        assert steps[0] == 0
        assert steps[-1] == record["steps"] == record["strategy"]["steps"]
        assert 0 <= record["test"] <= 100
        assert record["seconds"] > 0
        assert record["flops"] > 0
        assert (audited / RUNS / "audit" / "attempts" / f"{record['id']}.json").exists()


def test_the_audit_decides_which_attacks_were_seen(audited: Path) -> None:
    records = [load(path) for path in (audited / RUNS / "audit" / "attempts").iterdir()]
    found = {record["attack"]: (record["exposure"], record["outside"]) for record in records}
    assert found == {
        "momentum_kept": ("seen", []),
        "adam_fresh": ("longer", ["steps"]),
        "adam_probed": ("held_out", ["batch_size", "data_budget"]),
    }


def test_audit_json_compares_the_roles(audited: Path) -> None:
    summary = load(audited / RUNS / "audit" / "audit.json")
    assert summary["schema_version"] == 2
    assert summary["attempts"] == 9
    assert summary["verdict"]["word"] in ("BROKEN", "WEAKENED", "HOLDS", "CANNOT BE JUDGED")
    assert {attack["attack"] for attack in summary["attacks"]} == set(ATTACKS)
    for attack in summary["attacks"]:
        assert list(attack["roles"]) == ROLES
        assert all(role["seeds"] == 1 and math.isfinite(role["mean"]) for role in attack["roles"].values())
        assert {"gap_closed", "sgrc", "signed_rfd", "exposure", "strategy"} <= set(attack)
    assert set(summary["worst_case"]) == {"overall", "seen", "longer", "held_out"}
    protected, reference = manifest(audited, "protect"), manifest(audited, "pretrain")
    assert summary["checkpoint"]["sha256"] == protected["weights_sha256"]
    assert summary["checkpoint"]["method"] == "pool_anchored"
    assert summary["reference"]["sha256"] == reference["weights_sha256"]
    assert summary["reference"]["method"] is None
    assert summary["support"] == protected["sampler_support"]
    assert summary["domains"] == {"original": "fashion_clothes", "restricted": "fashion_shoes_bags", "benign": None}


def test_the_audit_measures_intactness_itself(audited: Path) -> None:
    found, stated = (
        load(audited / RUNS / "audit" / "audit.json")["intactness"],
        manifest(audited, "protect")["intactness"],
    )
    assert found["metric"]["name"] == "accuracy"
    assert found["before"] == stated["before"]["test"]
    assert found["after"] == stated["after"]["test"]
    assert found["loss"]["value"] == pytest.approx(found["before"] - found["after"])
    assert found["loss"]["low"] < found["loss"]["value"] < found["loss"]["high"]


def test_curves_parquet_holds_every_point(audited: Path) -> None:
    frame = pd.read_parquet(audited / RUNS / "audit" / "curves.parquet")
    assert list(frame) == ["id", "attack", "domain", "role", "seed", "exposure", "step", "select", "picture"]
    records = [load(path) for path in (audited / RUNS / "audit" / "attempts").iterdir()]
    expected = {(r["attack"], r["role"], r["seed"], p["step"], p["select"]) for r in records for p in r["curve"]}
    assert set(frame[["attack", "role", "seed", "step", "select"]].itertuples(index=False, name=None)) == expected
    table = pd.read_parquet(audited / RUNS / "audit" / "attempts.parquet")
    assert dict(zip(table["id"], table["test"], strict=True)) == {r["id"]: r["test"] for r in records}
    assert (table["test_images"] > 1).all()


# ---- again ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "domains", "said"),
    [
        (PRETRAIN, 1, "already done"),
        (PROTECT, 2, "already done"),
        ((*PROTECT, "domain.memory_gb=0"), 2, "already done"),  # streamed
        (AUDIT, 2, "report.html"),
    ],
)
def test_a_finished_run_comes_to_the_same_bytes_and_says_what_it_read(
    copied: Path, command: tuple[str, ...], domains: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sophon.auditing.runner.attack", lambda *_, **__: pytest.fail("an attempt ran again"))
    before = tree(copied)
    result = sophon(copied, *command)
    assert result.code == 0, result
    assert tree(copied) == before
    assert said in result.out
    lines = [line for line in result.out.splitlines() if line.startswith("domain ")]
    assert len(lines) == len(set(lines)) == domains
    assert all(re.search(r"^domain \w+: \d+ classes \(.*\); images: \w+ \d+, ", line) for line in lines)


def test_an_audit_in_another_precision_is_another_audit(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'amp=absent, now amp="all"' in refusal(sophon(copied, *AUDIT, "amp=all"))
    monkeypatch.setattr("sophon.auditing.runner.attack", lambda *_, **__: pytest.fail("an attempt ran"))
    with pytest.raises(pytest.fail.Exception, match="an attempt ran"):
        sophon(copied, *AUDIT, "amp=all", "run_dir=precise", f"attack.reuse=[{RUNS / 'audit'}]")


def test_masking_is_measured_otherwise_without_another_attempt(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophon.auditing.runner.attack", lambda *_, **__: pytest.fail("an attempt ran again"))
    path = copied / RUNS / "audit" / "audit.json"
    before = load(path)
    for override, steps in (("attack.masking={heads: [kept], steps: 2}", [0, 2]), ("attack.masking.heads=[]", None)):
        result = sophon(copied, *AUDIT, override)
        assert result.code == 0, result
        after = load(path)
        measured = after["masking"]
        assert (measured and sorted({each["step"] for each in measured["seen"]})) == steps
        assert after["attacks"] == before["attacks"]


def test_report_renders_the_same_bytes_from_disk(copied: Path) -> None:
    folder = copied / RUNS / "audit"
    before = tree(copied)
    for name in ("report.html", "report.md"):
        (folder / name).unlink()
    result = sophon(copied, "report", *SMALL)
    assert result.code == 0, result
    assert tree(copied) == before
    assert load(folder / "audit.json")["verdict"]["sentence"] in result.out


def test_the_same_seed_gives_the_same_weights_elsewhere(audited: Path, tmp_path: Path) -> None:
    result = sophon(tmp_path, *PRETRAIN, "run_dir=here/reference")
    assert result.code == 0, result
    result = sophon(tmp_path, *PROTECT, "reference=here/reference", "run_dir=there")
    assert result.code == 0, result
    for verb, folder in (("pretrain", "here/reference"), ("protect", "there")):
        assert weights_sha256(tmp_path / folder / "checkpoint") == manifest(audited, verb)["weights_sha256"]


def test_a_loss_that_only_test_shows_is_said_last(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophon.verbs.protect.lost_on_test", lambda *values: "test lost 3")
    result = sophon(copied, *PROTECT, "run_dir=again", f"reference={RUNS / 'pretrain'}")
    assert result.code == 0, result
    assert result.out.splitlines()[-1].startswith("next: sophon ")
    assert result.err.splitlines()[-1] == "sophon: warning: test lost 3"


# ---- export ---------------------------------------------------------------------------------------------------------


def test_export_copies_a_checkpoint_to_the_byte(copied: Path) -> None:
    for source in (RUNS / "protect", RUNS / "protect" / "checkpoint"):
        result = sophon(copied, "export", f"checkpoint={source}", f"out=out-{source.name}")
        assert result.code == 0, result
        assert tree(copied / f"out-{source.name}") == tree(copied / RUNS / "protect" / "checkpoint")


def test_export_of_an_unfinished_run_gives_its_last_good_state(copied: Path) -> None:
    run = copied / RUNS / "protect"
    shutil.rmtree(run / "checkpoint")
    before = tree(run)
    state = read_state(run / STATE_FILE)
    weights, position = state.tensors["good"], state.at
    result = sophon(copied, "export", *PROTECT[1:], "out=out")
    assert result.code == 0, result
    assert tree(run) == before
    stored = load_file(copied / "out" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    found = load(copied / "out" / "sophon.json")
    assert found["verb"] == "protect"
    assert found["history"]["good_round"] == position.good_round
    assert found["weights_sha256"] == weights_sha256(copied / "out")
    assert found["parent_sha256"] == manifest(copied, "pretrain")["weights_sha256"]
