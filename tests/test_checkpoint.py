"""A checkpoint's folder: whole and verified, the same after a round trip, loadable where sophon does not exist."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sophon.checkpoint import read_checkpoint, write_checkpoint
from sophon.errors import UserError
from sophon.files import read_json, sha256_file, write_json
from sophon.models import ModelSpec, adapter_of
from sophon.tensor_files import read_tensors, write_tensors
from tests.cli_helpers import tree
from tests.models.test_adapter_contract import CASES, made

KINDS = ("timm", "diffusers-classes")  # one file beside another; folders within a folder
DOMAINS = {
    "original": {"name": "pets", "classes": ["cat", "dog", "owl"], "hashes": {"train": "aa"}},
    "restricted": {"name": "faces", "classes": ["a", "b"], "hashes": {"attack": "bb"}},
}
MANIFEST = {
    "verb": "protect",
    "config": {"seed": 3},
    "method": {"suppression": "kl_uniform", "rounds": 7},
    "sampler_support": {"optimizer": {"momentum": [0.001, 0.1]}, "steps": [10, 20], "head": ["fresh", "kept"]},
    "domains": DOMAINS,
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


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def weights(kind: str) -> str:
    return adapter_of(CASES[kind].spec).weights


@pytest.fixture
def checkpoint(kind: str, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "run" / "checkpoint", model_of(kind), CASES[kind].spec, MANIFEST)
    return tmp_path / "run" / "checkpoint"


def model_of(kind: str) -> nn.Module:
    return made(kind)[1].eval()


# ---- round trip -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_reads_back_as_it_was_and_exports_again_to_the_same_bytes(
    kind: str, checkpoint: Path, weights: str, tmp_path: Path
) -> None:
    state, model = torch.get_rng_state(), model_of(kind)
    torch.set_rng_state(state)
    for path in (checkpoint.parent, str(checkpoint)):
        read = read_checkpoint(path)
        assert (read.path, read.spec) == (checkpoint, CASES[kind].spec)
        assert not read.model.training
        assert all(torch.equal(value, read.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert read.sha256 == sha256_file(checkpoint / weights) == read.manifest["weights_sha256"]
    assert {key: read.manifest[key] for key in MANIFEST} == MANIFEST
    assert {"sophon", "python", "torch", "timm"} <= read.manifest["versions"].keys()
    write_checkpoint(tmp_path / "again", read.model, read.spec, read.manifest)
    assert tree(tmp_path / "again") == tree(checkpoint)


def test_a_model_with_a_fresh_head_exports_with_its_new_classes(tmp_path: Path) -> None:
    adapter, model = made("timm")
    adapter.start_head(model, "abcd")
    write_checkpoint(tmp_path, model, dataclasses.replace(adapter.spec, classes=tuple("abcd")), MANIFEST)
    config = read_json(tmp_path / "config.json")
    assert (config["num_classes"], config["label_names"]) == (4, list("abcd"))
    assert read_checkpoint(tmp_path).spec.classes == tuple("abcd")
    # the published resnet18 is of ImageNet, Apache-licensed and from a paper; these weights are not
    assert config["pretrained_cfg"].keys().isdisjoint({"tag", "license", "origin_url", "paper_ids", "url", "hf_hub_id"})


# A process where sophon cannot be imported. A torchvision built for CUDA beside a torch for CPUs lacks two operators.
ALONE = """
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
import timm
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torchvision.models import get_model

root = pathlib.Path(sys.argv[1])
given, outputs = load_file(root / "given.safetensors"), {}
for name in ("timm", "timm-vit"):
    model = timm.create_model(f"local-dir:{root / name}", pretrained=True).eval()
    outputs[name] = model(given[name])
    data = timm.data.resolve_model_data_config(model)
    assert [*data["mean"], *data["std"], *data["input_size"]] == given[name + " data"].tolist(), data
config = json.loads((root / "torchvision" / "config.json").read_text())
model = get_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
model.load_state_dict(load_file(root / "torchvision" / "model.safetensors"))
outputs["torchvision"] = model(given["torchvision"])
for name in ("diffusers", "diffusers-classes"):
    pipeline = DiffusionPipeline.from_pretrained(root / name)
    labels = {"class_labels": torch.tensor([2, 1])} if name == "diffusers-classes" else {}
    outputs[name] = pipeline.unet(given[name], torch.tensor([0, 4]), **labels).sample
    if not labels:
        assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
save_file({name: value.detach() for name, value in outputs.items()}, root / "outputs.safetensors")
"""


@pytest.mark.slow
def test_checkpoints_load_where_sophon_does_not_exist(tmp_path: Path) -> None:
    given: dict[str, torch.Tensor] = {}
    expected = {}
    for name in ("timm", "timm-vit", "torchvision", "diffusers", "diffusers-classes"):
        adapter, model = made(name)
        of: ModelSpec = adapter.spec
        given[name] = torch.randn(2, of.channels, of.image_size, of.image_size)
        given[f"{name} data"] = torch.tensor(
            [*of.mean, *of.std, of.channels, of.image_size, of.image_size], dtype=torch.float64
        )
        conditions = {"timesteps": torch.tensor([0, 4]), "labels": torch.tensor([2, 1])}
        expected[name] = adapter.forward(
            model.eval(), given[name], **(conditions if adapter.kind == "denoising" else {})
        ).detach()
        write_checkpoint(tmp_path / name, model, of, MANIFEST)
    write_tensors(tmp_path / "given.safetensors", given)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    outputs, _ = read_tensors(tmp_path / "outputs.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-5, atol=1e-5)


# ---- refusals -------------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: object) -> None:
    write_json(folder / "sophon.json", {**read_json(folder / "sophon.json"), **changes})


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def truncated_honestly(folder: Path, weights: str) -> None:
    truncated(folder / weights)
    edited(folder, weights_sha256=sha256_file(folder / weights))


def of_keras(folder: Path) -> None:
    edited(folder, model={**read_json(folder / "sophon.json")["model"], "library": "keras"})


DAMAGE: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "a bit of the weights": (lambda at, weights: flipped(at / weights), "model.safetensors' is refused; its sha256"),
    "half the weights": (lambda at, weights: truncated(at / weights), "is refused; its sha256"),
    "half, with their sha256": (truncated_honestly, "truncated"),
    "no weights": (lambda at, weights: (at / weights).unlink(), "holds no .*model.safetensors"),
    "no manifest": (lambda at, _: (at / "sophon.json").unlink(), "holds no sophon.json"),
    "half a manifest": (lambda at, _: (at / "sophon.json").write_text('{"format'), "sophon.json: it is truncated"),
    "another manifest": (lambda at, _: (at / "sophon.json").write_text("[]"), "format version None"),
    "a later format": (lambda at, _: edited(at, format_version=99), "format version 99; this sophon reads version 1"),
    "no model": (lambda at, _: edited(at, model=None), "does not describe a model"),
    "half a model": (lambda at, _: edited(at, model={"classes": []}), "does not describe a model"),
    "another library": (lambda at, _: of_keras(at), "library: 'keras' is not known.*; allowed: diffusers, python, ti"),
    "no sha256": (lambda at, _: edited(at, weights_sha256=None), "is refused"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint: Path, weights: str, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(checkpoint, weights)
    with pytest.raises(UserError, match=f"^(reference:|cannot read) .*{message}") as caught:
        read_checkpoint(checkpoint, key="reference")
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_the_librarys_own_file_is_refused(checkpoint: Path, kind: str) -> None:
    file = adapter_of(CASES[kind].spec).settings
    (checkpoint / file).unlink()
    with pytest.raises(UserError, match=f"^reference: .* holds no {file}"):
        read_checkpoint(checkpoint, key="reference")


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^checkpoint: .*none' is not a folder"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no sophon\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_exported(tmp_path: Path, kind: str, value: float) -> None:
    model = model_of(kind)
    with torch.no_grad():
        list(model.parameters())[-1][0] = value
    with pytest.raises(UserError, match=r"weight '[\w.]+' holds NaN or infinite"):
        write_checkpoint(tmp_path / "out", model, CASES[kind].spec, MANIFEST)
    assert not list(tmp_path.iterdir())


def test_foreign_folders_are_not_overwritten_and_checkpoints_are(checkpoint: Path, kind: str, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^out: .*foreign' is not empty and holds no sophon checkpoint"):
        write_checkpoint(tmp_path / "foreign", model_of(kind), CASES[kind].spec, MANIFEST)
    assert list(tree(tmp_path / "foreign")) == ["thesis.txt"]
    write_checkpoint(checkpoint, model_of(kind), CASES[kind].spec, {**MANIFEST, "seed": 4})
    assert read_checkpoint(checkpoint).manifest["seed"] == 4


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("succeed_first", [0, 2])
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_else(
    checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch, call: str, succeed_first: int
) -> None:
    before, real, calls = tree(checkpoint.parent), getattr(os, call), []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > succeed_first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=r"^cannot write [^\n]*: No space left on device$"):
        write_checkpoint(checkpoint, model_of(kind), CASES[kind].spec, {**MANIFEST, "seed": 4})
    monkeypatch.undo()
    assert tree(checkpoint.parent) == before
