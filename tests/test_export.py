import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sophon.errors import UserError
from sophon.export import FORMAT_VERSION, read_checkpoint, write_checkpoint
from sophon.files import read_json, sha256_file, write_json
from sophon.models import ModelSpec, adapter_of, build
from sophon.tensor_files import read_tensors, write_tensors

CLASSES = ("cat", "dog | fox", "owl")
TIMM = ModelSpec(
    library="timm",
    architecture="resnet18",
    classes=CLASSES,
    channels=1,
    image_size=32,
    mean=(0.25,),
    std=(0.75,),
    model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 8},
)
VIT = dataclasses.replace(TIMM, architecture="test_vit", image_size=64, model_args={})
TORCHVISION = dataclasses.replace(
    TIMM,
    library="torchvision",
    architecture="resnet18",
    channels=3,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    model_args={"zero_init_residual": True},
)
MANIFEST = {
    "verb": "protect",
    "config": {"seed": 3},
    "method": {"suppression": "kl_uniform", "rounds": 7},
    "sampler_support": {"optimizer": {"momentum": [0.001, 0.1]}, "steps": [10, 20], "head": ["fresh", "kept"]},
    "domains": {
        "original": {"name": "pets", "classes": list(CLASSES), "hashes": {"train": "aa"}},
        "restricted": {"name": "faces", "classes": ["a", "b"], "hashes": {"attack": "bb"}},
    },
    "seed": 3,
    "parent_sha256": "cc",
    "intactness": {
        "metric": "accuracy",
        "unit": "%",
        "higher_is_better": True,
        "before": {"val": 91.25, "test": 90.5},
        "after": {"val": 90.75, "test": 89.125},
        "tolerance": 1.0,
    },
}
PRETRAIN = {
    **MANIFEST,
    "verb": "pretrain",
    "method": None,
    "sampler_support": None,
    "domains": {"original": MANIFEST["domains"]["original"]},
    "parent_sha256": None,
    "intactness": {"metric": "accuracy", "unit": "%", "higher_is_better": True, "after": {"val": 91.25, "test": 90.5}},
}


def model_of(spec: ModelSpec) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(spec)
    images = torch.randn(8, spec.channels, spec.image_size, spec.image_size)
    model(images)  # moves BatchNorm's statistics off their initial values
    return model.eval()


def snippet_of(folder: Path) -> str:
    """Return the card's code, told where the checkpoint lies."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("PATH", str(folder))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    write_checkpoint(tmp_path / "out", model_of(TIMM), TIMM, MANIFEST)
    return tmp_path / "out"


# Runs where sophon cannot be imported. A torchvision built for CUDA beside a torch for CPUs lacks two operators.
WITHOUT_SOPHON = """
import importlib.util, json, pathlib, sys
sys.modules["sophon"] = None
import torch
for library in pathlib.Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so"):
    try:
        torch.ops.load_library(str(library))
    except OSError:
        operators = torch.library.Library("torchvision", "FRAGMENT")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
root = pathlib.Path(sys.argv[1])
"""
STRANGER = """
import timm
from safetensors.torch import load_file, save_file
from torchvision.models import get_model

images, logits, data = load_file(root / "images.safetensors"), {}, {}
for name in ("timm", "vit"):
    model = timm.create_model(f"local-dir:{root / name}", pretrained=True).eval()
    logits[name] = model(images[name]).detach()
    data[name] = timm.data.resolve_model_data_config(model)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog | fox", "owl"], model.pretrained_cfg
other = timm.create_model(f"local-dir:{root / 'timm'}", pretrained=True, num_classes=7)
assert other(images["timm"]).shape[1] == 7
config = json.loads((root / "torchvision" / "config.json").read_text())
assert config["library"] == "torchvision"
model = get_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
model.load_state_dict(load_file(root / "torchvision" / "model.safetensors"))
logits["torchvision"] = model(images["torchvision"]).detach()
data["torchvision"] = config["pretrained_cfg"]
save_file(logits, root / "logits.safetensors")
(root / "data.json").write_text(json.dumps(data))
"""


def run_without_sophon(code: str, folder: Path) -> None:
    """Run ``code`` in a process of its own, where ``root`` is ``folder``."""
    command = [sys.executable, "-I", "-c", WITHOUT_SOPHON + code, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_exports_load_where_sophon_does_not_exist(tmp_path):
    specs = {"timm": TIMM, "vit": VIT, "torchvision": TORCHVISION}
    images, expected = {}, {}
    for name, spec in specs.items():
        model = model_of(spec)
        images[name] = torch.randn(2, spec.channels, spec.image_size, spec.image_size)
        expected[name] = model(images[name]).detach()
        write_checkpoint(tmp_path / name, model, spec, MANIFEST)
    write_tensors(tmp_path / "images.safetensors", images)
    run_without_sophon(STRANGER, tmp_path)
    logits, _ = read_tensors(tmp_path / "logits.safetensors")
    data = read_json(tmp_path / "data.json")
    for name, spec in specs.items():
        torch.testing.assert_close(logits[name], expected[name], rtol=1e-5, atol=1e-5)
        assert tuple(data[name]["mean"]) == spec.mean
        assert tuple(data[name]["std"]) == spec.std
        assert data[name]["input_size"] == [spec.channels, spec.image_size, spec.image_size]
    assert data["timm"]["crop_pct"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("spec", [TIMM, VIT, TORCHVISION], ids=["timm", "vit", "torchvision"])
def test_a_checkpoint_reads_back_as_it_was(tmp_path, spec):
    model = model_of(spec)
    write_checkpoint(tmp_path / "run" / "checkpoint", model, spec, MANIFEST)
    state = torch.get_rng_state()
    for path in (tmp_path / "run", str(tmp_path / "run" / "checkpoint")):
        read = read_checkpoint(path)
        assert read.path == tmp_path / "run" / "checkpoint"
        assert read.spec == spec
        assert not read.model.training
        assert all(torch.equal(value, read.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert read.sha256 == sha256_file(read.path / "model.safetensors") == read.manifest["weights_sha256"]
    assert {key: read.manifest[key] for key in MANIFEST} == MANIFEST
    assert read.manifest["format_version"] == FORMAT_VERSION
    assert {"sophon", "python", "torch", "timm"} <= read.manifest["versions"].keys()


def test_a_checkpoint_from_before_there_were_denoisers_still_reads(checkpoint):
    manifest = read_json(checkpoint / "sophon.json")
    assert manifest["model"].pop("scheduler") == {}
    write_json(checkpoint / "sophon.json", manifest)
    assert FORMAT_VERSION == 1
    assert read_checkpoint(checkpoint).spec == TIMM


def test_a_model_with_a_fresh_head_exports_with_its_new_classes(tmp_path):
    model = model_of(TIMM)
    adapter_of(TIMM).start_head(model, "abcd")
    spec = dataclasses.replace(TIMM, classes=tuple("abcd"))
    write_checkpoint(tmp_path / "out", model, spec, PRETRAIN)
    assert read_json(tmp_path / "out" / "config.json")["num_classes"] == 4
    assert read_checkpoint(tmp_path / "out").spec.classes == ("a", "b", "c", "d")


def test_a_read_checkpoint_exports_again_to_the_same_weights(checkpoint, tmp_path):
    first = read_checkpoint(checkpoint)
    write_checkpoint(tmp_path / "again", first.model, first.spec, first.manifest)
    assert read_checkpoint(tmp_path / "again").manifest == first.manifest
    for name in names(checkpoint):
        assert (tmp_path / "again" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_folder_holds_the_contracts_files_and_timms_config_tells_no_foreign_story(checkpoint):
    assert names(checkpoint) == ["README.md", "config.json", "model.safetensors", "sophon.json"]
    config = read_json(checkpoint / "config.json")
    assert config["architecture"] == "resnet18"
    assert config["num_classes"] == 3
    assert config["num_features"] == 16
    assert config["label_names"] == list(CLASSES)
    assert config["model_args"].items() >= {**TIMM.model_args, "in_chans": 1}.items()
    # The published resnet18 is of ImageNet, Apache-licensed and from a paper; these weights are not.
    assert config["pretrained_cfg"].keys().isdisjoint({"tag", "license", "origin_url", "paper_ids", "url", "hf_hub_id"})


def test_the_card_of_a_protected_model(checkpoint):
    card = (checkpoint / "README.md").read_text()
    for text in (
        "library_name: timm\n",
        "license: other\n",
        "- non-fine-tunable\n",
        "|---|---|---|\n| val | 91.25 | 90.75 |\n| test | 90.50 | 89.12 |\n",
        "Measured on the original domain: accuracy, in %; higher is better.",
        "at most 1.0 on `val`",
        "A classifier of 3 classes (pets), made hard to fine-tune on **faces**",
        "| rounds | `7` |",
        "| momentum, learning rate | 0.001 to 0.1 |",
        "| steps | 10 to 20 |",
        "| head | fresh, kept |",
        "not a guarantee",
        "sophon audit",
        'timm.create_model("local-dir:PATH", pretrained=True)',
        "mean = torch.tensor([0.25])",
        "`cc`",
        "| original domain | pets, 3 classes |",
        "`dog | fox`",
        read_json(checkpoint / "sophon.json")["weights_sha256"],
    ):
        assert text in card, text
    assert "None" not in card
    assert "\n\n\n" not in card


def test_the_card_of_a_reference_promises_nothing(tmp_path):
    write_checkpoint(tmp_path, model_of(TIMM), TIMM, PRETRAIN)
    card = (tmp_path / "README.md").read_text()
    assert "**not protected**" in card
    assert "|---|---|\n| val | 91.25 |\n| test | 90.50 |\n" in card
    for text in ("non-fine-tunable", "before protection", "Threat model", "parent", "None", "\n\n\n"):
        assert text not in card


@pytest.mark.slow
def test_the_loading_snippet_of_the_card_runs(tmp_path):
    for name, spec in (("timm", TIMM), ("torchvision", TORCHVISION)):
        model = model_of(spec)
        write_checkpoint(tmp_path / name, model, spec, MANIFEST)
        images = torch.rand(2, spec.channels, spec.image_size, spec.image_size)
        scope = {"images": images}
        exec(snippet_of(tmp_path / name), scope)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
        torch.testing.assert_close(scope["logits"], model((images - mean) / std), rtol=1e-5, atol=1e-5)


def break_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def truncate_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()[:100]
    (folder / "model.safetensors").write_bytes(data)


def truncate_honestly(folder: Path) -> None:
    truncate_weights(folder)
    edit_manifest(folder, weights_sha256=sha256_file(folder / "model.safetensors"))


def edit_manifest(folder: Path, **changes: object) -> None:
    write_json(folder / "sophon.json", {**read_json(folder / "sophon.json"), **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "^reference: .*model.safetensors' is refused; its sha256"),
        (truncate_weights, "is refused; its sha256"),
        (truncate_honestly, "truncated"),
        (lambda folder: (folder / "config.json").unlink(), "^reference: .* holds no config.json"),
        (lambda folder: (folder / "sophon.json").unlink(), "^reference: .* holds no sophon.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "sophon.json").write_text('{"format'), "sophon.json: it is truncated"),
        (lambda folder: (folder / "sophon.json").write_text("[]"), "format version None"),
        (lambda folder: edit_manifest(folder, format_version=99), "format version 99; this sophon reads version 1"),
        (lambda folder: edit_manifest(folder, model=None), "does not describe a model"),
        (lambda folder: edit_manifest(folder, model={"classes": []}), "does not describe a model"),
        (
            lambda folder: edit_manifest(folder, model={**TIMM.plain(), "library": "keras"}),
            "^reference: .*sophon.json': library: 'keras' is not known; allowed: diffusers, python, timm, torchvision",
        ),
        (lambda folder: edit_manifest(folder, weights_sha256=None), "is refused"),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(checkpoint, key="reference")
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^checkpoint: .*none' is not a folder"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no sophon\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_exported(tmp_path, value):
    model = model_of(TIMM)
    with torch.no_grad():
        model.fc.bias[1] = value
    with pytest.raises(UserError, match=r"weight 'fc\.bias' holds NaN or infinite"):
        write_checkpoint(tmp_path / "out", model, TIMM, MANIFEST)
    assert names(tmp_path) == []


def test_foreign_folders_are_not_overwritten_and_checkpoints_are(checkpoint, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^out: .*foreign' is not empty and holds no sophon checkpoint"):
        write_checkpoint(tmp_path / "foreign", model_of(TIMM), TIMM, MANIFEST)
    assert names(tmp_path / "foreign") == ["thesis.txt"]
    write_checkpoint(checkpoint, model_of(TIMM), TIMM, {**MANIFEST, "seed": 4})
    assert read_checkpoint(checkpoint).manifest["seed"] == 4


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("succeed_first", [0, 2])
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_else(checkpoint, monkeypatch, call, succeed_first):
    before = {name: (checkpoint / name).read_bytes() for name in names(checkpoint)}
    real, calls = getattr(os, call), []

    def refuse(*args, **kwargs):
        calls.append(args)
        if len(calls) > succeed_first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=r"^cannot write [^\n]*: No space left on device$"):
        write_checkpoint(checkpoint, model_of(TIMM), TIMM, {**MANIFEST, "seed": 4})
    assert names(checkpoint.parent) == [checkpoint.name]
    assert {name: (checkpoint / name).read_bytes() for name in names(checkpoint)} == before


def test_the_manifest_is_plain_json_in_the_order_it_was_given(checkpoint):
    loaded = json.loads((checkpoint / "sophon.json").read_text(), parse_constant=pytest.fail)
    assert list(loaded) == ["format_version", *MANIFEST, "model", "versions", "weights_sha256"]
