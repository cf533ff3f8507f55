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


def records(folder: Path) -> list[dict]:
    return [load(path) for path in (folder / RUNS / "audit" / "attempts").iterdir()]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["pretrain", "protect"])
def test_a_checkpoint_is_whole_and_says_what_it_is(audited: Path, verb: str) -> None:
    checkpoint, found = audited / RUNS / verb / "checkpoint", manifest(audited, verb)
    assert sorted(path.name for path in checkpoint.iterdir()) == FILES
    assert (found["format_version"], found["name"]) == (1, "quickstart")
    assert found["verb"] == found["config"]["verb"] == verb
    assert found["seed"] == found["config"]["seed"] == 0
    assert found["weights_sha256"] == weights_sha256(checkpoint)
    assert found["model"]["classes"] == found["domains"]["original"]["classes"] == CLASSES
    assert {"sophon", "python", "torch", "timm"} <= set(found["versions"])
    assert set(found["domains"]["original"]["hashes"]) == {"train", "val", "test"}
    card = (checkpoint / "README.md").read_text()
    assert found["weights_sha256"] in card
    assert all(f"{value:.2f}" in card for value in found["intactness"]["after"].values())


def test_a_protected_checkpoint_says_what_became_of_its_reference(audited: Path) -> None:
    found, reference = manifest(audited, "protect"), manifest(audited, "pretrain")
    assert found["parent_sha256"] == reference["weights_sha256"] != found["weights_sha256"]
    assert reference["parent_sha256"] is reference["method"] is reference["sampler_support"] is None
    assert found["method"] == found["config"]["method"]
    restricted = found["domains"]["restricted"]
    assert restricted["classes"] == OTHERS
    assert set(restricted["hashes"]) == {"adapt", "query", "attack", "select", "test"}
    digests = [digest for domain in found["domains"].values() for digest in domain["hashes"].values()]
    assert len(set(digests)) == len(digests) == 8
    assert found["domains"]["original"] == reference["domains"]["original"]
    assert found["history"] == {"rounds": 3, "good_round": 3, "rollbacks": 0}

    intact = found["intactness"]
    assert (intact["metric"], intact["unit"], intact["higher_is_better"]) == ("accuracy", "%", True)
    assert set(intact["before"]) == set(intact["after"]) == {"val", "test"}
    assert intact["before"] == reference["intactness"]["after"]
    assert intact["before"]["test"] > 40, "the reference did not learn, so the other tests would show nothing"
    measured = load(audited / RUNS / "audit" / "audit.json")["intactness"]  # by the audit itself
    assert (measured["before"], measured["after"]) == (intact["before"]["test"], intact["after"]["test"])
    assert measured["loss"]["low"] < measured["before"] - measured["after"] < measured["loss"]["high"]


def test_nothing_is_pickled_and_nothing_temporary_stays(audited: Path) -> None:
    names = list(tree(audited))
    assert not [name for name in names if name.endswith((".tmp", ".old", ".pt", ".pth", ".pkl", ".bin", ".ckpt"))]
    assert not [name for name in names if "outputs" in name or ".hydra" in name or "wandb" in name]


# ---- the audit ------------------------------------------------------------------------------------------------------


def test_there_is_a_whole_attempt_of_each_attack_against_each_role(audited: Path) -> None:
    found = records(audited)
    assert {(each["attack"], each["role"]) for each in found} == {(name, role) for name in ATTACKS for role in ROLES}
    assert len(found) == 9
    for record in found:
        assert record["schema_version"] == 2
        assert record["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
        steps = [point["step"] for point in record["curve"]]
        assert (steps[0], steps[-1]) == (0, record["steps"]) == (0, record["strategy"]["steps"])
        assert 0 <= record["test"] <= 100
        assert min(record["seconds"], record["flops"]) > 0
    assert {each["attack"]: (each["exposure"], each["outside"]) for each in found} == {
        "momentum_kept": ("seen", []),
        "adam_fresh": ("longer", ["steps"]),
        "adam_probed": ("held_out", ["batch_size", "data_budget"]),
    }


def test_audit_json_compares_the_roles(audited: Path) -> None:
    summary = load(audited / RUNS / "audit" / "audit.json")
    assert (summary["schema_version"], summary["attempts"]) == (3, 9)
    assert summary["verdict"]["word"] in ("BROKEN", "WEAKENED", "HOLDS", "CANNOT BE JUDGED")
    assert {attack["attack"] for attack in summary["attacks"]} == set(ATTACKS)
    for attack in summary["attacks"]:
        assert list(attack["roles"]) == ROLES
        assert all(role["seeds"] == 1 and math.isfinite(role["mean"]) for role in attack["roles"].values())
        assert {"gap_closed", "sgrc", "signed_rfd", "exposure", "strategy"} <= set(attack)
    assert set(summary["worst_case"]) == {"overall", "seen", "longer", "held_out"}
    for name, verb in (("checkpoint", "protect"), ("reference", "pretrain")):
        assert summary[name]["sha256"] == manifest(audited, verb)["weights_sha256"]
    assert summary["support"] == manifest(audited, "protect")["sampler_support"]
    assert summary["domains"] == {"original": "fashion_clothes", "restricted": "fashion_shoes_bags", "benign": None}


def test_parquet_files_hold_every_attempt_and_every_point(audited: Path) -> None:
    curves, attempts = (
        pd.read_parquet(audited / RUNS / "audit" / f"{name}.parquet") for name in ("curves", "attempts")
    )
    found = records(audited)
    expected = {(r["attack"], r["role"], r["seed"], p["step"], p["select"]) for r in found for p in r["curve"]}
    assert set(curves[["attack", "role", "seed", "step", "select"]].itertuples(index=False, name=None)) == expected
    assert dict(zip(attempts["id"], attempts["test"], strict=True)) == {r["id"]: r["test"] for r in found}


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
    assert "model resnet18: images of 1x16x16, normalised with mean [0.5] and std [0.5], from " in result.out
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
    for override, heads in (
        ("attack.masking.heads=[fresh]", {"fresh"}),
        ("attack.masking.heads=[]", None),
    ):
        result = sophon(copied, *AUDIT, override)
        assert result.code == 0, result
        after = load(path)
        measured = after["masking"]
        assert (measured and {row["head"] for row in measured["seen"]}) == heads
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
