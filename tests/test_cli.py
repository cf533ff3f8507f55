"""What whole commands do: help, guards, losses that are not finite, wandb, sweeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from sophon import __version__
from sophon.protection.runner import Runner
from sophon.surgery.equalise import equalise_channels
from sophon.verbs import VERBS
from tests.cli_helpers import AUDIT, PRETRAIN, PROTECT, RUNS, load, refusal, refused, sophon, tree, weights_sha256

NEW = "run_dir=new"

pytestmark = pytest.mark.slow  # whole commands


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_the_usage_lists_the_verbs_and_the_exit_codes(arguments: list[str], code: int) -> None:
    result = sophon(None, *arguments)
    assert (result.code, result.err) == (code, "")
    for words in (*(f"sophon {verb} " for verb in VERBS), "Exit codes", "130", "--multirun"):
        assert words in result.out


def test_version() -> None:
    result = sophon(None, "--version")
    assert (result.code, result.out, result.err) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_lists_groups_and_keys_and_runs_nothing(tmp_path: Path, verb: str) -> None:
    result = sophon(tmp_path, verb, "--help")
    assert result.code == 0
    assert not result.err
    for words in ("resnet_tiny", "sophon_klu", "quickstart", "fts_lr:", "tolerance:", "--multirun"):
        assert words in result.out
    assert not tree(tmp_path)


# ---- wrong words ----------------------------------------------------------------------------------------------------


def test_an_attack_that_does_not_fit_is_left_out_and_said_so(copied: Path) -> None:
    three = ("domain.restricted.classes=[sandal,bag,sneaker]", "++attack.strategies.adam_fresh.data_budget=100000")
    result = sophon(copied, *AUDIT, NEW, *three, "tracking.progress=true")
    assert result.code == 0, result
    summary = load(copied / "new" / "audit.json")
    assert [attack["attack"] for attack in summary["attacks"]] == ["adam_probed"]
    assert set(summary["left_out"]) == {"momentum_kept", "adam_fresh"}
    page = (copied / "new" / "report.html").read_text()
    for words in ("as many classes", "data_budget: 100000"):
        assert any(words in reason for reason in summary["left_out"].values())
        assert words in result.err
        assert words in page


# ---- losses that are not finite -------------------------------------------------------------------------------------


def test_a_diverging_pretraining_says_what_to_lower(tmp_path: Path) -> None:
    result = sophon(tmp_path, *PRETRAIN, "pretrain.optimizer=sgd", "pretrain.lr=1e30")
    message = refusal(result)
    assert message.startswith("pretrain.lr: ")
    assert not list(tmp_path.rglob("checkpoint"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_diverging_reinforcement_says_what_to_lower_each_time(copied: Path) -> None:
    for _ in range(2):
        message = refusal(sophon(copied, *PROTECT, NEW, "method.ntr_lr=1e30", "method.ntr_steps=20"))
        assert message.startswith("method.ntr_lr: ")
        assert "fts_lr" in message
        assert set(tree(copied / "new")) == {"run.json"}


# ---- the guard ------------------------------------------------------------------------------------------------------


def test_a_guard_that_accepts_nothing_exits_with_3_and_writes_no_checkpoint(copied: Path) -> None:
    command = (*PROTECT, NEW, "guard.tolerance=0", "guard.repair_steps=0", "method.fts_lr=10")
    for _ in range(2):
        message = refusal(sophon(copied, *command), 3)
        assert message.startswith("guard.tolerance: ")
        assert not (copied / "new" / "checkpoint").exists()
    before = tree(copied)
    refusal(sophon(copied, "export", *PROTECT[1:], "checkpoint=new", "out=out"), 3)
    assert tree(copied) == before


# ---- other coordinates ----------------------------------------------------------------------------------------------

COORDINATES = ("+method.stages.reparameterise={gains:[100],spread:64}", "method.rounds=4")


def test_other_coordinates_are_released_as_an_ordinary_model_also_from_a_run_that_is_not_finished(copied: Path) -> None:
    stopped, whole = Runner._round, 0

    def interrupted(self: Runner, stop: Any) -> Any:
        nonlocal whole
        whole += 1
        if whole == 3:
            raise KeyboardInterrupt
        return stopped(self, stop)

    command = (*PROTECT, NEW, *COORDINATES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_round", interrupted)
        assert sophon(copied, *command).code == 130
    assert sophon(copied, "export", *PROTECT[1:], *COORDINATES, "checkpoint=new", "out=out").code == 0
    assert sophon(copied, *command).code == 0
    for folder, rounds in (("out", 2), ("new/checkpoint", 4)):
        manifest = json.loads((copied / folder / "sophon.json").read_text())
        assert manifest["method"]["stages"] == {"reparameterise": {"gains": [100], "spread": 64}}
        assert manifest["sampler_support"] is None, "nobody was simulated"
        card = (copied / folder / "README.md").read_text()
        assert "**Compute in float32.**" in card
        assert "population above" not in card
        assert manifest["history"]["rounds"] == rounds
        model = timm.create_model(f"local-dir:{copied / folder}", pretrained=True).eval()
        # a stem whose ReLU stays open, and readers that are blind to what all channels have in common, scales aside
        features = model.act1(model.bn1(model.conv1(torch.zeros(1, 1, 32, 32))))
        assert features.min() > 100
        equalise_channels(model)
        assert model.layer1[0].conv1.weight.sum(1).abs().max() < 1e-4
    message = refused(copied, *AUDIT, "checkpoint=new/checkpoint", "amp=all", "run_dir=other")
    assert message.startswith("amp: ")


# ---- wandb ----------------------------------------------------------------------------------------------------------


def test_wandb_online_without_a_key_is_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**settings: Any) -> None:
        assert settings["mode"] == "online"
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    message = refusal(sophon(tmp_path, *PRETRAIN, "tracking=online", "tracking.progress=false"))
    assert message.startswith("tracking.wandb: ")
    assert "No API key" in message
    assert not list(tmp_path.rglob("checkpoint"))
    assert sophon(tmp_path, *PRETRAIN).code == 0, "tracking is no part of what a run is"


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_value_in_a_folder_of_its_own(made: Path, tmp_path: Path) -> None:
    result = sophon(tmp_path, *PRETRAIN, "--multirun", "seed=0,1")
    assert result.code == 0, result
    digests = [weights_sha256(tmp_path / RUNS.with_name(f"seed{seed}") / "pretrain/checkpoint") for seed in (0, 1)]
    assert digests[0] == weights_sha256(made / RUNS / "pretrain" / "checkpoint")
    assert digests[0] != digests[1]


def test_an_audit_that_does_not_come_to_what_is_asked_ends_with_4(audited: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(audited, tmp_path / "copied"))
    for verb in (AUDIT, ("report", f"run_dir={RUNS}/audit")):
        message = refusal(sophon(copied, *verb, "gate.worst_case=1000", "gate.intactness=100"), 4)
        assert message.startswith("gate.worst_case: gap closed ")
        assert "gate.intactness" not in message
        result = sophon(copied, *verb, "gate.intactness=100")
        assert result.code == 0, result


def test_export_writes_the_audit_of_this_checkpoint_into_the_card(audited: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(audited, tmp_path / "copied"))
    of_protected, of_reference = (
        ("export", f"checkpoint={RUNS}/{verb}", f"audit={RUNS}/audit", "out=out") for verb in ("protect", "pretrain")
    )
    assert "attacked other weights" in refused(copied, *of_reference)
    assert "audit: 'nowhere' does not exist" in refused(copied, *of_protected, "audit=nowhere")
    result = sophon(copied, *of_protected)
    assert result.code == 0, result
    verdict = load(copied / RUNS / "audit" / "audit.json")["verdict"]
    assert f"**{verdict['word']}**: {verdict['sentence']}" in (copied / "out" / "README.md").read_text()
