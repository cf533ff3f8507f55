"""A denoiser's checkpoint: a diffusers pipeline that loads without us, and as safe as a classifier's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.export import read_checkpoint, write_checkpoint
from sophon.files import read_json, sha256_file, write_json
from sophon.models import ModelSpec, create
from sophon.tensor_files import read_tensors, write_tensors
from tests.test_export import CLASSES, MANIFEST, run_without_sophon, snippet_of

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = {"README.md", "model_index.json", "scheduler/scheduler_config.json", "sophon.json", "unet/config.json", WEIGHTS}
DENOISER = {
    **MANIFEST,
    "intactness": {
        "metric": "eps-MSE",
        "unit": "",
        "higher_is_better": False,
        "before": {"val": 0.0341249, "test": 0.034},
        "after": {"val": 0.0357111, "test": 0.12345678},
        "tolerance": 5.0,
        "relative": True,
    },
}


def denoiser(*, conditional: bool = False) -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(0)
    config = ModelConfig(
        library="diffusers",
        architecture="UNet2DModel",
        model_args={
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": None,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
        image_size=16,
        channels=3,
        scheduler={"num_train_timesteps": 5, "prediction_type": "v_prediction", "beta_end": 0.3},
        class_conditional=conditional,
    )
    module, spec = create(config, CLASSES)
    return module.eval(), spec


def exported(folder: Path, *, conditional: bool = False) -> tuple[nn.Module, ModelSpec]:
    module, spec = denoiser(conditional=conditional)
    write_checkpoint(folder, module, spec, DENOISER)
    return module, spec


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STRANGER = """
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

inputs = load_file(root / "inputs.safetensors")
for name in ("plain", "conditional"):
    pipeline = DiffusionPipeline.from_pretrained(root / name)
    given = {"class_labels": inputs["labels"]} if name == "conditional" else {}
    outputs = {"prediction": pipeline.unet(inputs["images"], inputs["timesteps"], **given).sample.detach()}
    if name == "plain":
        made = pipeline(batch_size=2, num_inference_steps=5, output_type="np").images
        outputs["made"] = torch.from_numpy(made).contiguous()
    save_file({**pipeline.unet.state_dict(), **outputs}, root / f"{name}.safetensors")
    (root / f"{name}.json").write_text(json.dumps(dict(pipeline.scheduler.config)))
"""


@pytest.mark.slow
def test_pipelines_load_where_sophon_does_not_exist(tmp_path: Path) -> None:
    given = {"images": torch.randn(2, 3, 16, 16), "timesteps": torch.tensor([0, 4]), "labels": torch.tensor([2, 1])}
    write_tensors(tmp_path / "inputs.safetensors", given)
    models = {name: exported(tmp_path / name, conditional=name == "conditional") for name in ("plain", "conditional")}
    run_without_sophon(STRANGER, tmp_path)
    for name, (module, spec) in models.items():
        found, _ = read_tensors(tmp_path / f"{name}.safetensors")
        labels = given["labels"] if name == "conditional" else None
        expected = module(given["images"], given["timesteps"], class_labels=labels).sample
        torch.testing.assert_close(found.pop("prediction"), expected, rtol=1e-5, atol=1e-5)
        if name == "plain":
            made = found.pop("made")
            assert made.shape == (2, 16, 16, 3)
            assert 0 <= made.min() < made.max() <= 1
        assert found.keys() == module.state_dict().keys()
        assert all(torch.equal(value, found[key]) for key, value in module.state_dict().items())
        scheduler = read_json(tmp_path / f"{name}.json")
        assert scheduler["_class_name"] == "DDPMScheduler"
        assert {key: scheduler[key] for key in spec.scheduler} == spec.scheduler


@pytest.mark.parametrize("conditional", [False, True])
def test_a_denoisers_checkpoint_reads_back_as_it_was(tmp_path: Path, conditional: bool) -> None:
    module, spec = exported(tmp_path / "out", conditional=conditional)
    assert files(tmp_path / "out").keys() == FILES
    state = torch.get_rng_state()
    read = read_checkpoint(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert read.spec == spec
    assert read.spec.scheduler["prediction_type"] == "v_prediction"
    assert not read.model.training
    assert all(torch.equal(value, read.model.state_dict()[key]) for key, value in module.state_dict().items())
    assert read.sha256 == sha256_file(tmp_path / "out" / WEIGHTS) == read.manifest["weights_sha256"]
    write_checkpoint(tmp_path / "again", read.model, read.spec, read.manifest)
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_denoisers_checkpoint_can_be_started_from(tmp_path: Path) -> None:
    module, spec = exported(tmp_path / "out", conditional=True)
    config = ModelConfig(
        library="diffusers", architecture="UNet2DModel", image_size=16, channels=3, weights=str(tmp_path / "out")
    )
    started, same = create(config, CLASSES)
    assert same.scheduler == spec.scheduler
    assert same.model_args.items() >= spec.model_args.items()
    given = torch.randn(1, 3, 16, 16), torch.tensor([3]), torch.tensor([1])
    assert torch.equal(started.eval()(*given).sample, module(*given).sample)


def test_the_loading_snippets_of_the_cards_run(tmp_path: Path) -> None:
    exported(tmp_path / "plain")
    scope: dict = {}
    exec(snippet_of(tmp_path / "plain"), scope)
    assert [(type(image), image.size) for image in scope["images"]] == [(Image.Image, (16, 16))] * 4
    exported(tmp_path / "conditional", conditional=True)
    scope = {}
    exec(snippet_of(tmp_path / "conditional"), scope)
    assert scope["images"].shape == (1, 3, 16, 16)
    assert 0 <= scope["images"].min() < scope["images"].max() <= 1


def test_the_card_of_a_denoiser(tmp_path: Path) -> None:
    exported(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    for text in (
        "library_name: diffusers\npipeline_tag: unconditional-image-generation\n",
        "A denoising diffusion model (pets), made hard to fine-tune on **faces**",
        "Images: 3 x 16 x 16, scaled to -1..1. Noise schedule: 5 steps; the network predicts `v_prediction`.",
        "Measured on the original domain: eps-MSE; lower is better.",
        "| val | 0.03412 | 0.03571 |\n| test | 0.034 | 0.1235 |\n",
        "at most 5.0 % of the value before on `val`",
        'DiffusionPipeline.from_pretrained("PATH")',
        "num_inference_steps=5",
        read_json(tmp_path / "plain" / "sophon.json")["weights_sha256"],
    ):
        assert text in card, text
    exported(tmp_path / "conditional", conditional=True)
    conditional = (tmp_path / "conditional" / "README.md").read_text()
    assert "A denoising diffusion model conditioned on 3 classes (pets)" in conditional
    assert "Classes, in the order of the labels: `cat`, `dog | fox`, `owl`." in conditional
    assert "Classes, in" not in card
    for text in ("None", "\n\n\n", "image-classification", "accuracy"):
        assert text not in card + conditional


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def truncate_honestly(folder: Path) -> None:
    truncate(folder)
    manifest = read_json(folder / "sophon.json")
    write_json(folder / "sophon.json", {**manifest, "weights_sha256": sha256_file(folder / WEIGHTS)})


def remodel(folder: Path) -> None:
    manifest = read_json(folder / "sophon.json")
    manifest["model"]["model_args"]["block_out_channels"] = [8, 24]
    write_json(folder / "sophon.json", manifest)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"^reference: .*model\.safetensors' is refused; its sha256"),
        (truncate, "is refused; its sha256"),
        (truncate_honestly, "truncated"),
        (remodel, r"^reference: .*model\.safetensors does not fit the model"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"^reference: .* holds no {WEIGHTS}"),
        (lambda folder: (folder / "model_index.json").unlink(), r"^reference: .* holds no model_index\.json"),
    ],
)
def test_damaged_denoisers_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    exported(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(tmp_path, key="reference")
    assert "\n" not in str(caught.value)


def test_a_denoiser_that_is_not_finite_is_never_exported(tmp_path: Path) -> None:
    module, spec = denoiser()
    with torch.no_grad():
        module.conv_out.bias[1] = float("nan")
    with pytest.raises(UserError, match=r"weight 'conv_out\.bias' holds NaN or infinite"):
        write_checkpoint(tmp_path / "out", module, spec, DENOISER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("succeed_first", [0, 3, 5])
def test_a_full_disk_keeps_the_old_denoiser_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, succeed_first: int
) -> None:
    module, spec = exported(tmp_path / "out")
    before, real, calls = files(tmp_path / "out"), os.fsync, []

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > succeed_first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"^cannot write [^\n]*: No space left on device$"):
        write_checkpoint(tmp_path / "out", module, spec, {**DENOISER, "seed": 4})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert files(tmp_path / "out") == before
