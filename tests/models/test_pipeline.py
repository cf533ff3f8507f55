"""A denoiser that starts from what diffusers saved or the Hub holds is that denoiser, or it is said why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sophon.errors import UserError
from sophon.files import read_json, write_json
from sophon.models import adapter_of
from sophon.models import pipeline as folders
from sophon.tensor_files import read_tensors, write_tensors
from tests.models.unets import INPUT, NETWORK, WEIGHTS, pipeline, predict, small
from tests.tiny import assert_same_state, state_of

Damage = Callable[[Path], object]


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": None}, {"sample_size": [8, 8], "freq_shift": 1}])
def test_a_pipeline_that_diffusers_saved_is_started_from_as_it_is(tmp_path: Path, changes: dict) -> None:
    unet = pipeline(tmp_path, **changes)
    module, spec = small(weights=str(tmp_path), model_args={}, scheduler={"beta_end": 0.5})
    assert_same_state(module, state_of(unet))
    assert torch.equal(predict(module), predict(unet))
    assert spec.scheduler["num_train_timesteps"] == 7
    assert spec.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert spec.scheduler["beta_end"] == 0.02
    assert not any(name.startswith("_") or name in (*INPUT, "num_class_embeds") for name in spec.model_args)


def test_a_conditional_pipeline_brings_its_classes(tmp_path: Path) -> None:
    unet = pipeline(tmp_path, num_class_embeds=3)
    module, spec = small(weights=str(tmp_path))
    assert torch.equal(predict(module, 2), predict(unet, 2))
    assert spec.model_args["num_class_embeds"] == 3


def test_a_state_dict_alone_fits_the_configured_network(tmp_path: Path) -> None:
    unet = pipeline(tmp_path)
    module, spec = small(weights=str(tmp_path / WEIGHTS))
    assert_same_state(module, state_of(unet))
    assert spec.model_args.items() >= NETWORK.items()
    assert spec.scheduler["num_train_timesteps"] == 1000


def as_the_hub_has_it(folder: Path) -> None:
    """Make of a pipeline what google/ddpm-cifar10-32 is: all files beside the index, attention under older names."""
    tensors, _ = read_tensors(folder / WEIGHTS)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    write_tensors(folder / Path(WEIGHTS).name, tensors)
    (folder / "unet" / "config.json").rename(folder / "config.json")
    (folder / "scheduler" / "scheduler_config.json").rename(folder / "scheduler_config.json")
    for part in ("unet", "scheduler"):
        shutil.rmtree(folder / part)


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_a_hub_id_is_fetched_once_and_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    unet = pipeline(tmp_path)
    if older:
        as_the_hub_has_it(tmp_path)
    asked = []

    def download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(repository)
        assert all(pattern.endswith((".json", ".safetensors")) for pattern in allow_patterns)
        assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(folders, "snapshot_download", download)
    module, spec = small(pretrained=True, architecture="google/ddpm", model_args={})
    assert asked == ["google/ddpm"]
    assert spec.architecture == "UNet2DModel"
    assert torch.equal(predict(module), predict(unet))


def test_an_unreachable_hub_id_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(folders, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"^model\.pretrained: no pipeline 'google/ddpm': no route to host$"):
        small(pretrained=True, architecture="google/ddpm")


def edit(name: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        write_json(folder / name, {**read_json(folder / name), **changes})

    return damage


def rename(name: str, new: str) -> Damage:
    return lambda folder: (folder / name).rename(folder / new)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (None, {"image_size": 16}, "takes 1 channels of 8 pixels and gives 1, not model.channels=1 of .*image_size=16"),
        (None, {"channels": 3}, "takes 1 channels of 8 pixels and gives 1, not model.channels=3"),
        (None, {"class_conditional": True}, "^model.class_conditional: true, but model.weights: .* has no classes"),
        (edit("unet/config.json", out_channels=2), {}, "takes 1 channels of 8 pixels and gives 2"),
        (edit("unet/config.json", num_class_embeds=4), {}, "pipeline has 4 classes, original domain has 3"),
        (edit("unet/config.json", class_embed_type="timestep"), {}, "class_embed_type 'timestep'"),
        (edit("unet/config.json", block_out_channels=[8, 24]), {}, "does not fit the model: .* not "),
        (edit("unet/config.json", layers_per_block=2), {}, "does not fit the model: it lacks .* and .* more"),
        (edit("unet/config.json", new_setting=1), {}, "model.model_args: .*'new_setting'"),
        (edit("model_index.json", unet=["diffusers", "UNet2DConditionModel"]), {}, "UNet2DConditionModel'.; give a"),
        (edit("model_index.json", unet=None), {}, "has unet None; give a pipeline whose unet is diffusers' UNet2DMod"),
        (edit("scheduler/scheduler_config.json", _class_name="ScoreSdeVeScheduler"), {}, "scheduler ScoreSdeVeSched"),
        (edit("scheduler/scheduler_config.json", prediction_type="flow"), {}, "scheduler_config.json.prediction_type"),
        (rename("model_index.json", "index.json"), {}, "^model.weights: .* holds no model_index.json; give the folder"),
        (rename("scheduler/scheduler_config.json", "x"), {}, "^model.weights: .* holds no scheduler/scheduler_config"),
        (rename(WEIGHTS, "unet/diffusion_pytorch_model.bin"), {}, "bin' is a pickle.*safe_serialization"),
        (
            rename(WEIGHTS, "unet/diffusion_pytorch_model-00001-of-00002.safetensors"),
            {},
            "holds no unet/diffusion_pytorch_model.safetensors; save it again",
        ),
        (lambda folder: (folder / "model_index.json").write_text("[]"), {}, "model_index.json is not a JSON object"),
        (lambda folder: (folder / "unet" / "config.json").write_text('{"act'), {}, "config.json: it is truncated"),
        (truncate, {}, "model.safetensors: it is truncated"),
    ],
)
def test_pipelines_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, damage: Damage | None, changes: dict, message: str
) -> None:
    pipeline(tmp_path)
    if damage:
        damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        small(weights=str(tmp_path), **changes)
    assert "\n" not in str(caught.value)


def test_a_conditional_denoiser_embeds_the_original_classes() -> None:
    module, spec = small(class_conditional=True)
    assert spec.model_args.items() >= {**NETWORK, "num_class_embeds": 3}.items()
    assert adapter_of(spec).head == "class_embedding"
    assert not torch.equal(predict(module, 0), predict(module, 2))
    assert "num_class_embeds" not in NETWORK
