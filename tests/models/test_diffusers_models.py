"""Denoisers: what is asked for is what is built, and all of it is in one block."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from omegaconf import OmegaConf

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models import adapter_of, create
from sophon.models import pipeline as folders
from sophon.models.partition import attention
from tests.models.unets import CLASSES, NETWORK, PLAIN, config_of, predict, small

CONF = Path(__file__).parents[2] / "conf" / "model"
# parameters of each shipped model; DDPM's paper counts 35.7 million for its 32x32 images
SHIPPED = {
    "unet16": 1_113_955,
    "unet16_tiny": 686_769,
    "unet32": 35_746_307,
    "unet32_small": 1_086_515,
    "unet64": 71_436_803,
}
# ---- from a configuration -------------------------------------------------------------------------------------------


def test_the_shipped_denoisers_are_those_that_are_documented() -> None:
    assert {path.stem for path in CONF.glob("*.yaml") if "library: diffusers" in path.read_text()} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_denoiser_builds_at_its_size_and_attends_at_16_or_below(name: str) -> None:
    loaded = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    with torch.device("meta"):
        module, spec = create(OmegaConf.to_object(loaded), CLASSES)
        images = torch.empty(2, spec.channels, spec.image_size, spec.image_size)
        assert module(images, 0).sample.shape == images.shape
    assert sum(parameter.numel() for parameter in module.parameters()) == SHIPPED[name]
    levels = {
        int(part.split(".")[1])
        for part, layer in module.named_modules()
        if isinstance(layer, Attention) and part.startswith("down")
    }
    assert {spec.image_size // 2**level for level in levels} <= {16, 8, 4}
    assert spec.scheduler["num_train_timesteps"] == 1000
    assert adapter_of(spec).head is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_spec_holds_every_setting_of_the_noise_schedule(prediction: str) -> None:
    _, spec = small(scheduler={"num_train_timesteps": 9, "prediction_type": prediction})
    settings = {name: value for name, value in DDPMScheduler().config.items() if name[0] != "_" and value is not None}
    assert spec.scheduler == {**settings, "num_train_timesteps": 9, "prediction_type": prediction}
    assert spec.model_args.items() >= NETWORK.items()


def test_a_conditional_denoiser_embeds_the_original_classes() -> None:
    module, spec = small(class_conditional=True)
    assert spec.model_args.items() >= {**NETWORK, "num_class_embeds": 3}.items()
    assert adapter_of(spec).head == "class_embedding"
    assert not torch.equal(predict(module, 0), predict(module, 2))
    assert "num_class_embeds" not in NETWORK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "UNet3D"}, "model.architecture: 'UNet3D' is not known; allowed: UNet2DModel"),
        ({"mean": [0.4]}, r"model.mean: \[0.4\] and std \[0.5\] are not allowed with library diffusers"),
        ({"std": [0.25]}, r"model.mean: \[0.5\] and std \[0.25\] are not allowed"),
        ({"image_size": 0}, "model.image_size: 0 is not allowed"),
        ({"image_size": 9}, "model.image_size: 9 cannot be halved 1 times, as this U-Net does; give a multiple of 2"),
        *(
            ({"model_args": {name: 1}}, f"model.model_args.{name}: set by sophon")
            for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")
        ),
        ({"model_args": {"layrs": 1}}, "model.model_args: {'layrs': 1} does not make a UNet2DModel: .*'layrs'"),
        ({"model_args": {"block_out_channels": 8}}, "model.model_args: .* does not make a UNet2DModel"),
        ({"model_args": {"dropout": "a"}}, "model.model_args: .* does not make a UNet2DModel"),
        ({"model_args": {**NETWORK, "norm_num_groups": 3}}, "model.model_args: .*divisible"),
        ({"model_args": {**NETWORK, "downsample_padding": 5}}, "model.model_args: .* does not make a UNet2DModel"),
        ({"model_args": {"time_embedding_type": "fourier"}}, "time_embedding_type: 'fourier' .* allowed: positional"),
        ({"scheduler": {"betas": 1}}, "model.scheduler: 'betas' is not known .*allowed: beta_end, beta_schedule"),
        ({"scheduler": {"prediction_type": "x0"}}, "model.scheduler.prediction_type: 'x0' is not known; allowed: eps"),
        ({"scheduler": {"beta_schedule": ["linear"]}}, "model.scheduler.beta_schedule: .* is not known"),
        ({"scheduler": {"variance_type": "learned"}}, "model.scheduler.variance_type: 'learned' is not known"),
        ({"scheduler": {"num_train_timesteps": 1e3}}, "num_train_timesteps: 1000.0 is not allowed; give a int such as"),
        ({"scheduler": {"clip_sample": "no"}}, "model.scheduler.clip_sample: 'no' is not allowed; give a bool"),
        ({"scheduler": {"num_train_timesteps": 0}}, "model.scheduler: .* is no noise schedule"),
        ({"scheduler": {"num_train_timesteps": -1}}, "model.scheduler: .* does not make a noise schedule"),
        ({"scheduler": {"beta_end": 2}}, "model.scheduler: .* is no noise schedule; its betas must be"),
        ({"scheduler": {"beta_end": math.nan}}, "model.scheduler: .* is no noise schedule"),
        ({"scheduler": {"trained_betas": [0.1, 0.2]}}, "model.scheduler: .* num_train_timesteps numbers"),
        ({"scheduler": {"trained_betas": "a"}}, "model.scheduler: .* does not make a noise schedule"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "with prediction_type epsilon leave a part of the image"),
        ({"pretrained": True}, "model.architecture: 'UNet2DModel' has no pretrained weights; .* Hub id"),
        ({"pretrained": True, "architecture": "a/b", "weights": "x"}, "model.weights: 'x' contradicts"),
        ({"weights": "nowhere.safetensors"}, "cannot read nowhere.safetensors: no such file"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(changes: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "snapshot_download", lambda *args, **kwargs: "nowhere")
    with pytest.raises(UserError, match=message) as caught:
        create(config_of(**changes), CLASSES)
    assert "\n" not in str(caught.value)


# ---- their parts ----------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_denoiser() -> None:
    module, spec = small(class_conditional=True)
    assert adapter_of(spec).blocks(module) == [
        ("conv_in", "time_embedding", "down_blocks.0"),
        ("down_blocks.1",),
        ("mid_block",),
        ("up_blocks.0",),
        ("up_blocks.1", "conv_norm_out", "conv_out"),
    ]


def test_a_denoiser_may_have_no_middle() -> None:
    module, spec = small(model_args={**NETWORK, "mid_block_type": None})
    assert len(adapter_of(spec).blocks(module)) == 4


def test_attention_is_what_diffusers_calls_so() -> None:
    module, _ = small()
    expected = tuple(name for name, part in module.named_modules() if isinstance(part, Attention))
    assert attention(module) == expected
    assert {name.split(".attentions.")[0] for name in expected} == {"down_blocks.1", "mid_block", "up_blocks.0"}
    assert attention(small(model_args={**NETWORK, **PLAIN})[0]) == ()


def test_a_new_class_embedding_is_saved_with_its_classes(tmp_path: Path) -> None:
    module, spec = small(class_conditional=True)
    adapter_of(spec).start_head(module, "abcde")
    adapter_of(spec).save(module, tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    assert torch.equal(predict(loaded, 4), predict(module, 4))
