"""How commands fail and stop: one line, the right code, nothing half-written, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from sophon import __version__
from sophon.protection.ntr import NTR
from sophon.protection.runner import Runner
from sophon.protection.state import STATE_FILE, read_state
from sophon.surgery.equalise import equalise_channels
from sophon.tasks import ClassificationTask
from sophon.tensor_files import read_tensors
from sophon.verbs import VERBS
from tests.cli_helpers import (
    AUDIT,
    PRETRAIN,
    PROTECT,
    RUNS,
    SMALL,
    finish,
    image_folder,
    load,
    make,
    refusal,
    refused,
    sophon,
    start,
    tree,
    weights_sha256,
)

NEW = "run_dir=new"

pytestmark = pytest.mark.slow  # whole commands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pretrain and protect have run; never written to again."""
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def protected_sha256(made: Path) -> str:
    return weights_sha256(made / RUNS / "protect" / "checkpoint")


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_verbs_and_the_exit_codes(tmp_path: Path, flag: str) -> None:
    result = sophon(tmp_path, flag)
    assert result.code == 0
    assert not result.err
    for words in (*(f"sophon {verb} " for verb in VERBS), "Exit codes", "130", "--multirun"):
        assert words in result.out


def test_no_verb_is_wrong_input_answered_with_the_usage(tmp_path: Path) -> None:
    result = sophon(tmp_path)
    assert result.code == 2
    assert "sophon protect" in result.out + result.err


def test_version(tmp_path: Path) -> None:
    result = sophon(tmp_path, "--version")
    assert (result.code, result.out, result.err) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_lists_groups_and_keys_and_runs_nothing(tmp_path: Path, verb: str) -> None:
    result = sophon(tmp_path, verb, "--help")
    assert result.code == 0
    assert not result.err
    for words in ("resnet_tiny", "sophon_klu", "quickstart", "fts_lr:", "tolerance:", "--multirun"):
        assert words in result.out
    assert not tree(tmp_path)


def test_cfg_prints_what_would_run_and_runs_nothing(tmp_path: Path) -> None:
    result = sophon(tmp_path, *PROTECT, "--cfg", "job")
    assert result.code == 0
    printed = yaml.safe_load(result.out)
    assert printed["verb"] == "protect"
    assert printed["method"]["rounds"] == 3
    assert not tree(tmp_path)


# ---- wrong words ----------------------------------------------------------------------------------------------------

WRONG = {
    "no equals sign": ("seed", ["seed"]),
    "unknown key": ("method.foo=1", ["method.foo"]),
    "unknown top key": ("foo=1", ["foo"]),
    "appended key": ("+method.foo=1", ["foo", "MethodConfig"]),
    "unknown option": ("--bogus", ["--bogus"]),
    "unknown model": ("model=nope", ["nope", "resnet_tiny", "vgg13_bn"]),
    "unknown architecture": ("model.architecture=resnet19", ["model.architecture", "resnet19"]),
    "wrong model arguments": ("+model.model_args.foo=1", ["model.model_args", "foo"]),
    "missing weights": ("model.weights=nowhere.safetensors", ["nowhere.safetensors"]),
    "unknown domain": ("domain@domain.original=nope", ["nope", "fashion_clothes"]),
    "unknown class": ("domain.original.classes=[dress,hat]", ["domain.original.classes", "hat"]),
    "unknown source": ("domain.original.source=cloud", ["domain.original.source", "cloud", "imagefolder"]),
    "absent data": ("domain@domain.original=cifar10", ["domain.original.root", "cifar-10-batches-py"]),
    "absent folder": ("domain@domain.original=cinic10", ["domain.original.root", "train"]),
    "too few images": ("domain.original.per_class=1", ["domain.original.val_fraction"]),
    "wrong type": ("seed=abc", ["seed", "abc"]),
    "missing value": ("model.architecture=???", ["model.architecture"]),
    "negative rate": ("pretrain.lr=-1", ["pretrain.lr", "-1"]),
    "unknown optimizer": ("pretrain.optimizer=lion", ["pretrain.optimizer", "lion", "adamw"]),
    "unknown augmentation": ("pretrain.augmentation=magic", ["augmentation", "magic", "standard"]),
    "unknown task": ("task=juggling", ["task", "juggling", "classification"]),
    "unknown device": ("device=abacus", ["device", "abacus", "cpu"]),
    "absent device": ("device=cuda:99", ["device", "cuda:99"]),
    "unknown tracking": ("tracking.wandb=sometimes", ["tracking.wandb", "sometimes", "offline"]),
    "unknown tracking group": ("tracking=nope", ["nope", "offline"]),
    "name that leaves runs": ("name=../x", ["name", "../x"]),
    "bad interpolation": ("name=${nowhere}", ["nowhere"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_one_line_that_names_it_and_writes_nothing(tmp_path: Path, case: str) -> None:
    override, words = WRONG[case]
    message = refused(tmp_path, *PRETRAIN, override)
    for word in words:
        assert word in message


def test_flags_that_exclude_each_other_are_refused_in_one_line(tmp_path: Path) -> None:
    message = refused(tmp_path, *PRETRAIN, "--cfg", "job", "--multirun")
    assert "--multirun and --cfg: not allowed together" in message


def test_an_unknown_verb_is_answered_with_the_verbs(tmp_path: Path) -> None:
    message = refused(tmp_path, "train", *SMALL)
    assert all(word in message for word in ("'train'", *VERBS))


WRONG_FOR_PROTECT = {
    "head kept with other classes": (
        ("domain.restricted.classes=[sandal,bag,sneaker]",),
        ["'kept'", "5", "3"],
    ),
    "other original classes": (
        ("domain@domain.original=mnist_digits",),
        ["domain.original", "10 classes", "5", "t_shirt"],
    ),
    "original classes in another order": (
        ("domain.original.classes=[trouser,t_shirt,pullover,dress,coat]",),
        ["domain.original", "trouser"],
    ),
    "unknown loss": (("method.suppression_loss=magic",), ["method.suppression_loss", "magic", "klu"]),
    "no attackers": (("method.fts_steps=0",), ["method.fts_steps", "0", ">= 1"]),
    "an objective of no such name": (("+method.objectives.magic={}",), ["method.objectives.magic", "clamp"]),
    "gains for another number of interfaces": (
        ("+method.stages.reparameterise.gains=[1,2]",),
        ["method.stages.reparameterise.gains", "1 or 6"],
    ),
    "a stage in bfloat16": (("+method.stages.reparameterise={}", "amp=all"), ["amp", "none"]),
    "unknown NTR augmentation": (("method.ntr_augmentation=magic",), ["augmentation", "magic", "standard"]),
    "unknown simulated augmentation": (("sampler.augmentations=[magic]",), ["augmentation", "magic", "standard"]),
    "sampler without optimizers": (("sampler.steps=[5,2]",), ["sampler.steps"]),
    "fractions above one": (("domain.restricted.fractions.adapt=0.9",), ["domain.restricted.fractions"]),
    "missing reference": (("reference=nowhere",), ["reference", "nowhere"]),
    "reference that is no checkpoint": (("reference=own",), ["reference", "sophon.json"]),
}


@pytest.mark.parametrize("case", WRONG_FOR_PROTECT)
def test_protect_refuses_what_does_not_fit_before_it_writes(copied: Path, case: str) -> None:
    overrides, words = WRONG_FOR_PROTECT[case]
    message = refused(copied, *PROTECT, NEW, *overrides)
    for word in words:
        assert word in message


WRONG_FOR_AUDIT = {
    "other original classes": (("domain@domain.original=mnist_digits",), ["domain.original", "10 classes"]),
    "missing checkpoint": (("checkpoint=nowhere",), ["checkpoint", "nowhere"]),
    "missing reference": (("reference=nowhere",), ["reference", "nowhere"]),
    "unknown attack": (("attack=nope",), ["nope", "tiny", "grid"]),
    "unknown optimizer": (("+attack.strategies.mine={optimizer: lion}",), ["attack.strategies.mine", "lion"]),
    "unfit name": (("+attack.strategies.my attack={lr: 0.1}",), ["my attack"]),
    "unknown augmentation": (
        ("++attack.strategies.adam_fresh.augmentation=magic",),
        ["augmentation", "magic", "standard"],
    ),
    "nothing that fits": (
        (
            "domain.restricted.classes=[sandal,bag,sneaker]",
            "++attack.strategies.adam_fresh.head=kept",
            "++attack.strategies.adam_probed.data_budget=100000",
        ),
        ["attack.strategies.momentum_kept", "'kept'", "5", "3"],
    ),
    "unknown operation": (
        ("++attack.strategies.adam_fresh.surgery=[{operation: amputate}]",),
        ["attack.strategies.adam_fresh.surgery", "amputate", "renormalise"],
    ),
}


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


@pytest.mark.parametrize("case", WRONG_FOR_AUDIT)
def test_audit_refuses_what_does_not_fit_before_it_writes(copied: Path, case: str) -> None:
    overrides, words = WRONG_FOR_AUDIT[case]
    message = refused(copied, *AUDIT, *overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (PROTECT, "reference"),
        (("audit", *SMALL), "checkpoint"),
        (("export", *SMALL), "checkpoint"),
        (("report", *SMALL), "run_dir"),
    ],
)
def test_what_the_verb_before_should_have_made_is_asked_for(tmp_path: Path, command: tuple[str, ...], key: str) -> None:
    message = refused(tmp_path, *command)
    assert message.startswith(f"{key}: ")
    assert "does not exist" in message


# ---- damaged files --------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated weights": ("model.safetensors", truncate, "sha256"),
    "one bit of a weight": ("model.safetensors", flip_last_byte, "sha256"),
    "no weights": ("model.safetensors", Path.unlink, "holds no model.safetensors"),
    "no config": ("config.json", Path.unlink, "holds no config.json"),
    "truncated manifest": ("sophon.json", truncate, "sophon.json"),
    "manifest of another kind": ("sophon.json", lambda path: path.write_text("[]"), "format version"),
    "manifest of another version": ("sophon.json", edit(format_version=99), "99"),
    "manifest without its model": ("sophon.json", edit(model=None), "sophon.json"),
    "manifest of another model": ("sophon.json", edit(model={"library": "timm"}), "sophon.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused(copied: Path, case: str) -> None:
    name, damage, word = DAMAGE[case]
    damage(copied / RUNS / "protect" / "checkpoint" / name)
    message = refused(copied, "export", f"checkpoint={RUNS / 'protect'}", "out=out")
    assert message.startswith(("checkpoint: ", "cannot read "))
    assert word in message


@pytest.mark.parametrize(("verb", "command"), [("pretrain", PROTECT), ("pretrain", AUDIT), ("protect", AUDIT)])
def test_no_verb_takes_weights_that_are_not_those_exported(copied: Path, verb: str, command: tuple[str, ...]) -> None:
    flip_last_byte(copied / RUNS / verb / "checkpoint" / "model.safetensors")
    message = refused(copied, *command, NEW)
    assert message.startswith("reference: " if verb == "pretrain" else "checkpoint: ")
    assert "sha256" in message


@pytest.mark.parametrize("name", ["run.json", "state.safetensors"])
def test_a_damaged_run_is_refused_and_kept(copied: Path, name: str) -> None:
    run = copied / RUNS / "protect"
    shutil.rmtree(run / "checkpoint")
    truncate(run / name)
    assert name in refused(copied, *PROTECT)


def test_a_damaged_attempt_is_refused_by_name(copied: Path) -> None:
    assert sophon(copied, *AUDIT).code == 0
    attempt = sorted((copied / RUNS / "audit" / "attempts").iterdir())[0]
    truncate(attempt)
    for command in (AUDIT, ("report", *SMALL)):
        assert attempt.name in refused(copied, *command)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema_version": 99}'])
def test_report_refuses_an_audit_that_it_cannot_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    assert "audit.json" in refused(tmp_path, "report", "run_dir=.")


def test_report_needs_an_audit(copied: Path) -> None:
    message = refused(copied, "report", f"run_dir={RUNS / 'protect'}")
    assert message.startswith("run_dir: ")
    assert "audit.json" in message


# ---- image folders --------------------------------------------------------------------------------------------------

FOLDER = (*PRETRAIN, "domain@domain.original=cinic10", "domain.original.root=images", "pretrain.steps=2")


def test_an_image_folder_is_a_domain(tmp_path: Path) -> None:
    image_folder(tmp_path / "images")
    assert sophon(tmp_path, *FOLDER).code == 0
    manifest = json.loads((tmp_path / RUNS / "pretrain" / "checkpoint" / "sophon.json").read_text())
    assert manifest["model"]["classes"] == ["cat", "dog"]


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    truncate(image_folder(tmp_path / "images") / "train" / "dog" / "7.png")
    message = refused(tmp_path, *FOLDER)
    assert message.startswith("domain.original.root: ")
    assert str(Path("train", "dog", "7.png")) in message


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    for image in (image_folder(tmp_path / "images") / "train" / "cat").iterdir():
        image.unlink()
    message = refused(tmp_path, *FOLDER)
    assert message.startswith("domain.original.root: ")
    assert "cat" in message


@pytest.mark.parametrize("folders", [(), ("train",), ("train", "test")])
def test_an_empty_folder_is_refused(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
    assert refused(tmp_path, *FOLDER).startswith("domain.original.root: ")


# ---- folders that are not ours --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        (PRETRAIN, "pretrain.steps=61", ["pretrain.steps=60", "pretrain.steps=61"]),
        (PROTECT, "method.fts_lr=0.5", ["method.fts_lr", "0.5"]),
        (PROTECT, f"run_dir={RUNS}/pretrain", ["pretrain", "protect"]),
        (PROTECT, "domain.restricted.split_seed=1", ["restricted."]),
        (PROTECT, "seed=7", ["seed=0", "seed=7"]),
        (PRETRAIN, "amp=all", ["amp=absent", 'amp="all"']),
        (PROTECT, "amp=all", ["amp=absent", 'amp="all"']),
    ],
)
def test_a_run_dir_of_another_run_is_refused(
    copied: Path, command: tuple[str, ...], override: str, words: list[str]
) -> None:
    verb = command[0]
    here = () if "run_dir" in override else (f"run_dir={RUNS / verb}", f"reference={RUNS / 'pretrain'}")
    message = refused(copied, *command, *here, override)
    assert message.startswith("run_dir: ")
    assert "give another run_dir" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("command", [PRETRAIN, PROTECT, AUDIT])
def test_a_run_dir_with_foreign_files_is_refused(copied: Path, command: tuple[str, ...]) -> None:
    (copied / "new").mkdir()
    (copied / "new" / "thesis.txt").write_text("years of work")
    message = refused(copied, *command, NEW)
    assert message.startswith("run_dir: ")
    assert "new" in message


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("years of work")
    assert "new" in refused(tmp_path, *PRETRAIN, NEW)


@pytest.mark.parametrize("out", ["thesis", "thesis/chapter.txt"])
def test_export_replaces_nothing_but_a_checkpoint(copied: Path, out: str) -> None:
    (copied / "thesis").mkdir()
    (copied / "thesis" / "chapter.txt").write_text("years of work")
    assert out in refused(copied, "export", *SMALL, f"out={out}")


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


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(made: Path, copied: Path) -> None:
    whole, losses = ClassificationTask.original_loss, 0

    def poisoned(self: Any, *arguments: Any) -> Any:
        nonlocal losses
        losses += 1
        return whole(self, *arguments) * (float("nan") if losses > 2 else 1)  # two NTR steps a round

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "original_loss", poisoned)
        message = refusal(sophon(copied, *PROTECT, NEW))
    assert "last good state is kept" in message
    assert set(tree(copied / "new")) == {"run.json", "state.safetensors"}
    assert read_state(copied / "new" / STATE_FILE).at.good_round == 1
    assert sophon(copied, "export", *PROTECT[1:], "checkpoint=new", "out=out").code == 0
    assert sophon(copied, *PROTECT, NEW).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == protected_sha256(made)


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


# ---- a full disk ----------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let so many files be written, and no more."""
    left, fsync = writes, os.fsync

    def filling(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", filling)


def out_of_space(folder: Path, writes: int, *command: str) -> None:
    """Run ``command`` on a disk that fills up; everything that was there, or was finished since, must be whole."""
    before = tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, writes)
        message = refusal(sophon(folder, *command))
    assert "No space left on device" in message
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if ".tmp" in name or ".old" in name]


# run.json; the state after each of three rounds; then the checkpoint's weights, config, manifest and card
@pytest.mark.parametrize("writes", [0, 2, 5, 7])
def test_protect_goes_on_after_the_disk_was_full(made: Path, copied: Path, writes: int) -> None:
    out_of_space(copied, writes, *PROTECT, NEW)
    assert not (copied / "new" / "checkpoint").exists()
    if writes > 1:
        assert read_tensors(copied / "new" / "state.safetensors")[1]["round"] == min(writes - 1, 3)
    assert sophon(copied, *PROTECT, NEW).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == protected_sha256(made)


@pytest.mark.parametrize("writes", [0, 1, 4])
def test_pretrain_starts_again_after_the_disk_was_full(made: Path, tmp_path: Path, writes: int) -> None:
    out_of_space(tmp_path, writes, *PRETRAIN)
    assert sophon(tmp_path, *PRETRAIN).code == 0
    checkpoint = RUNS / "pretrain" / "checkpoint"
    assert weights_sha256(tmp_path / checkpoint) == weights_sha256(made / checkpoint)


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_full_disk_leaves_an_older_export_whole(copied: Path, writes: int) -> None:
    assert sophon(copied, "export", f"checkpoint={RUNS / 'pretrain'}", "out=out").code == 0
    out_of_space(copied, writes, "export", f"checkpoint={RUNS / 'protect'}", "out=out")


@pytest.mark.parametrize("writes", [0, 3, 10, 11, 13])
def test_an_audit_goes_on_after_the_disk_was_full(copied: Path, writes: int) -> None:
    out_of_space(copied, writes, *AUDIT)
    assert sophon(copied, *AUDIT).code == 0
    out_of_space(copied, 0, "report", *SMALL)


def test_a_write_that_fails_before_its_end_leaves_no_trace(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("sophon.files.Path.replace", refuse)
    assert "Disk quota exceeded" in refused(copied, "export", *SMALL, "out=out")


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


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_protection_saves_and_goes_on_to_the_bit(made: Path, copied: Path, number: int) -> None:
    command = (*PROTECT, NEW, "guard.every=3")  # no state is due before the end
    whole, calls = NTR.run, 0

    def interrupting(self: NTR, *arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), number)
        return whole(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NTR, "run", interrupting)
        assert "interrupted" in refusal(sophon(copied, *command), 130)
    assert calls == 2, "the round in progress is the last"
    assert read_tensors(copied / "new" / "state.safetensors")[1]["round"] == 2
    assert not (copied / "new" / "checkpoint").exists()
    assert sophon(copied, *command).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == protected_sha256(made)


def audited(folder: Path) -> Any:
    """Return ``audit.json`` without what depends on how fast the machine was."""
    return {key: value for key, value in load(folder / "audit.json").items() if key not in ("seconds_total", "date")}


@pytest.fixture(scope="module")
def uninterrupted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("uninterrupted") / "copied"))
    assert sophon(folder, *AUDIT, NEW).code == 0
    return audited(folder / "new")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_audit_goes_on_with_what_is_missing(copied: Path, uninterrupted: Any, number: int) -> None:
    from sophon.auditing import runner

    whole, calls = runner.attack, 0

    def interrupting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), number)
        return whole(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "attack", interrupting)
        refusal(sophon(copied, *AUDIT, NEW), 130)
        finished = tree(copied / "new" / "attempts")
        assert len(finished) == 2
        assert not (copied / "new" / "audit.json").exists()
        assert sophon(copied, *AUDIT, NEW).code == 0
    assert calls == 3 + 7, "what was complete did not run again"
    assert finished.items() <= tree(copied / "new" / "attempts").items()
    assert audited(copied / "new") == uninterrupted


LONG = (*PROTECT, "method.rounds=24", "guard.every=2")


@pytest.fixture(scope="module")
def straight(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights' sha256 of a long protection that nothing interrupts."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("straight") / "copied"))
    assert sophon(folder, *LONG, NEW).code == 0
    return weights_sha256(folder / "new" / "checkpoint")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_process_that_is_stopped_goes_on_to_the_bit(copied: Path, straight: str, number: int, code: int) -> None:
    process = start(copied, *LONG, NEW)
    state = copied / "new" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    result = finish(process)
    assert result.code == code, result
    if number == signal.SIGINT:
        assert "interrupted" in refusal(result, 130)
    assert 0 < read_tensors(state)[1]["round"] < 24
    assert not (copied / "new" / "checkpoint").exists()
    assert sophon(copied, *LONG, NEW).code == 0
    assert weights_sha256(copied / "new" / "checkpoint") == straight


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_value_in_a_folder_of_its_own(made: Path, tmp_path: Path) -> None:
    result = sophon(tmp_path, *PRETRAIN, "--multirun", "seed=0,1")
    assert result.code == 0, result
    digests = [weights_sha256(tmp_path / RUNS.with_name(f"seed{seed}") / "pretrain/checkpoint") for seed in (0, 1)]
    assert digests[0] == weights_sha256(made / RUNS / "pretrain" / "checkpoint")
    assert digests[0] != digests[1]


def test_a_sweep_with_a_wrong_value_exits_with_2(tmp_path: Path) -> None:
    result = sophon(tmp_path, *PRETRAIN, "--multirun", "pretrain.batch_size=16,0")
    assert result.code == 2
    assert "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("sophon: pretrain.batch_size: 0 ")
