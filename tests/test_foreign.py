"""Checkpoints that sophon did not make open as what they are, or are refused in one line that names the key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from sophon.checkpoint import Checkpoint
from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.files import read_json, sha256_file, write_json
from sophon.foreign import open_foreign
from sophon.models import ModelSpec

CLASSES = ("cat", "dog", "owl")
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 8}
INPUT = {"input_size": (1, 32, 32), "mean": (0.25,), "std": (0.75,)}
# what a command line that says nothing of the model has: another architecture, size and normalisation
OTHER = ModelConfig(architecture="vgg13_bn", image_size=64, mean=[0.1], std=[0.9], pretrained=True)
PLAIN = ModelConfig(
    architecture="resnet18", model_args=SMALL, image_size=32, channels=1, mean=[0.25], std=[0.75], weights="elsewhere"
)
NETWORK: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def resnet(**changes: Any) -> nn.Module:
    """Build what a stranger would: by timm alone."""
    torch.manual_seed(1)
    return timm.create_model("resnet18", **{"num_classes": 3, "in_chans": 1, **SMALL, **changes})


def timm_folder(folder: Path, model: nn.Module, **model_config: Any) -> Path:
    save_for_hf(model, folder, model_config={"pretrained_cfg": INPUT, **model_config}, safe_serialization=True)
    return folder


def state_dict(path: Path, model: nn.Module) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(1)
    return UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, **NETWORK, **changes})


def pipeline(folder: Path, model: UNet2DModel, scheduler: Any = None, **options: Any) -> Path:
    DDPMPipeline(unet=model, scheduler=scheduler or DDPMScheduler(num_train_timesteps=50)).save_pretrained(
        folder, **options
    )
    return folder


def assert_opened(opened: Checkpoint, model: nn.Module, path: Path, weights: Path) -> None:
    found = opened.model.state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in opened.model.modules())
    assert opened.path == path
    assert opened.sha256 == opened.manifest["weights_sha256"] == sha256_file(weights)
    assert opened.manifest["foreign"] is True
    assert opened.manifest["name"] == path.name
    assert opened.manifest.keys().isdisjoint({"method", "sampler_support", "intactness"})
    assert json.loads(json.dumps(opened.manifest))["model"]["architecture"] == opened.spec.architecture


def refusal(path: Path, model: ModelConfig = PLAIN, classes: tuple[str, ...] = CLASSES, key: str = "reference") -> str:
    with pytest.raises(UserError) as caught:
        open_foreign(path, model, classes, key)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    assert "model.weights" not in message
    return message


# ---- what opens -----------------------------------------------------------------------------------------------------


def test_a_timm_folder_speaks_for_itself(tmp_path: Path) -> None:
    model = resnet()
    folder = timm_folder(tmp_path / "theirs", model)
    opened = open_foreign(folder, OTHER, CLASSES, "checkpoint")
    assert_opened(opened, model, folder, folder / "model.safetensors")
    assert opened.spec == ModelSpec("timm", "resnet18", CLASSES, 1, 32, (0.25,), (0.75,), SMALL)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(opened.model(images), again(images), rtol=1e-5, atol=1e-5)


def test_statistics_of_colours_become_one_for_a_grey_model_as_in_timm(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, resnet())
    config = read_json(folder / "config.json")
    config["pretrained_cfg"] |= {"mean": [0.2, 0.3, 0.7], "std": [0.5, 0.5, 0.5]}
    write_json(folder / "config.json", config)
    spec = open_foreign(folder, OTHER, CLASSES).spec
    assert spec.mean == pytest.approx((0.4,))
    assert spec.std == (0.5,)


def test_a_config_of_older_timm_keeps_everything_on_one_level(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, timm.create_model("test_resnet", num_classes=3, in_chans=1))
    older = {"architecture": "test_resnet", "num_classes": 3, "input_size": [1, 40, 40], "mean": [0.4], "std": [0.2]}
    write_json(folder / "config.json", older)
    spec = open_foreign(folder, PLAIN, CLASSES).spec
    assert (spec.image_size, spec.mean, spec.std, spec.model_args) == (40, (0.4,), (0.2,), {})


def test_the_tag_of_the_same_architecture_is_taken_from_the_model_group(tmp_path: Path) -> None:
    tagged = dataclasses.replace(OTHER, architecture="resnet18.a1_in1k")
    assert open_foreign(timm_folder(tmp_path, resnet()), tagged, CLASSES).spec.architecture == "resnet18.a1_in1k"


def test_arguments_that_somebody_chose_stay(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, resnet(global_pool="max"))
    assert open_foreign(folder, OTHER, CLASSES).spec.model_args == {**SMALL, "global_pool": "max"}


def test_a_state_dict_of_timm_is_what_the_model_group_says(tmp_path: Path) -> None:
    model = resnet()
    path = state_dict(tmp_path / "weights.safetensors", model)
    opened = open_foreign(str(path), PLAIN, CLASSES)
    assert_opened(opened, model, path, path)
    assert opened.spec == open_foreign(timm_folder(tmp_path / "folder", model), OTHER, CLASSES).spec


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_a_pipeline_carries_its_network_and_noise(tmp_path: Path, scheduler: Any) -> None:
    model = unet()
    noise = scheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    folder = pipeline(tmp_path / "theirs", model, noise)
    opened = open_foreign(folder, OTHER, CLASSES)
    assert_opened(opened, model, folder, folder / "unet" / "diffusion_pytorch_model.safetensors")
    spec = opened.spec
    assert (spec.library, spec.channels, spec.image_size, spec.mean, spec.std) == ("diffusers", 1, 8, (0.5,), (0.5,))
    assert spec.classes == CLASSES
    assert spec.scheduler["num_train_timesteps"] == 50
    assert spec.scheduler["prediction_type"] == "v_prediction"
    assert "num_class_embeds" not in spec.model_args


def test_opening_draws_nothing(tmp_path: Path) -> None:
    places = [
        timm_folder(tmp_path / "folder", resnet()),
        state_dict(tmp_path / "weights.safetensors", resnet()),
        pipeline(tmp_path / "pipeline", unet()),
    ]
    state = torch.get_rng_state()
    for path in places:
        open_foreign(path, PLAIN, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)


# ---- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_timm_folder_that_lacks_a_file(tmp_path: Path, missing: str) -> None:
    folder = timm_folder(tmp_path, resnet())
    (folder / missing).unlink()
    assert missing in refusal(folder)


def test_a_path_that_is_nothing(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    assert "is not a checkpoint; give a folder of sophon, timm, transformers" in refusal(tmp_path / "notes.txt")
    assert "holds neither sophon.json nor config.json nor model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_a_config_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (timm_folder(tmp_path, resnet()) / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": None},
        {"pretrained_cfg": None},
        {"pretrained_cfg": {"input_size": 32, "mean": [0.5], "std": [0.5]}},
        {"pretrained_cfg": {"input_size": [1, 32, 32], "mean": 0.5, "std": [0.5]}},
        {"pretrained_cfg": {"input_size": [1, 32, 32], "mean": [], "std": []}},
        {"model_args": 3},
    ],
)
def test_a_config_that_is_not_timms(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = timm_folder(tmp_path, resnet())
    config = {**read_json(folder / "config.json"), **change}
    if change == {"architecture": None}:
        del config["architecture"]
    write_json(folder / "config.json", config)
    assert "config.json' is not timm's" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "resnet17"}, "'resnet17' is not known to timm; close to it: "),
        ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "is not known to timm"),
        ({"library": "keras"}, "library: 'keras' is not known; allowed: diffusers, python, timm"),
        ({"model_args": {"stem": "deep"}}, "does not fit 'resnet18'"),
        ({"model_args": {}}, "does not fit timm's resnet18 (model.library, model.architecture): "),
        ({"label_names": ["dog", "cat", "owl"]}, "in another order (dog, cat, owl, ...)"),
    ],
)
def test_a_timm_folder_that_fits_nothing(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = timm_folder(tmp_path, resnet())
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **change})
    assert expected in refusal(folder)


def test_label_names_of_another_vocabulary_are_no_contradiction(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, resnet(), label_names=["n01440764", "n02102040", "n02979186"])
    assert open_foreign(folder, OTHER, CLASSES).spec.classes == CLASSES


def test_images_that_are_not_square(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, resnet())
    config = read_json(folder / "config.json")
    config["pretrained_cfg"]["input_size"] = [1, 32, 48]
    write_json(folder / "config.json", config)
    assert "32 x 48 pixels" in refusal(folder)


@pytest.mark.slow
def test_a_config_cannot_make_timm_load_another_file(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path, resnet())
    config = read_json(folder / "config.json")
    config["model_args"] |= {"checkpoint_path": str(tmp_path / "evil.pth"), "pretrained": True}
    write_json(folder / "config.json", config)
    assert open_foreign(folder, OTHER, CLASSES).spec.model_args == SMALL


@pytest.mark.parametrize("kind", ["file", "folder", "pipeline"])
def test_truncated_weights(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        path = weights = state_dict(tmp_path / "weights.safetensors", resnet())
    elif kind == "folder":
        path = timm_folder(tmp_path, resnet())
        weights = path / "model.safetensors"
    else:
        path = pipeline(tmp_path, unet())
        weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert f"cannot read {weights}: it is truncated or not a safetensors file" in refusal(path)


def test_a_pipeline_without_a_size(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, unet())
    settings = read_json(folder / "unet" / "config.json")
    for size in (None, [8, 16], "8"):
        write_json(folder / "unet" / "config.json", {**settings, "sample_size": size})
        assert f"takes 1 channels of {size} pixels" in refusal(folder)
    write_json(folder / "unet" / "config.json", {**settings, "sample_size": [8, 8]})
    assert open_foreign(folder, OTHER, CLASSES).spec.image_size == 8
