"""Stable Diffusion 1 to 3, SDXL and DiT in small: protected, written, opened by diffusers alone, attacked, resumed."""

from __future__ import annotations

import os
import shutil
import signal
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import sophon
from sophon.api.calls import audit, load, protect
from sophon.api.inputs import checkpoint_of
from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models import describe
from sophon.models import pipeline as folders
from sophon.models.frozen import copy_part, part_sha256
from sophon.tracking import Tracker
from tests.models.pipelines import CLASSES, KINDS, folder_of, made
from tests.tiny import assert_same_state, state_of

# nobody has trained the tests' models
pytestmark = pytest.mark.filterwarnings("ignore:.*no better than a guess")

METHOD = {"name": "tiny", "rounds": 2, "ntr_steps": 1, "ntr_batch_size": 3, "query_batch_size": 3}
METHOD |= {"suppression_loss": "dos"}
ATTACKERS = sophon.Attackers(optimizers={"adam": [1e-3, 1e-2]}, batch_sizes=[3], steps=[1, 2], heads=["kept"])
GUARD = sophon.Guard(every=1, tolerance=1000.0)
SETTINGS = {"task.sample_steps": 2, "task.evaluation_images": 6}


def domain(name: str, seed: int, **settings: Any) -> sophon.Domain:
    def side(seed: int, per_class: int) -> tuple[np.ndarray, list[str]]:
        labels = [name for name in CLASSES for _ in range(per_class)]
        return np.random.default_rng(seed).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8), labels

    return sophon.Domain(side(seed, 8), side(seed + 1, 2), name=name, val_fraction=0.3, **settings)


ORIGINAL = domain("photos", 0, prompt="a photo of a {class}")
RESTRICTED = domain("paintings", 2, prompt="a painting of a {class}")
run = partial(protect, original=ORIGINAL, restricted=RESTRICTED, method=METHOD, attackers=ATTACKERS, guard=GUARD)
run = partial(run, settings=SETTINGS)
STRATEGY = {"optimizer": "adamw", "lr": 0.01, "head": "kept", "batch_size": 3, "steps": 2}

EVERY = ["text", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("text-xl", "flow", "classes"))]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", params=EVERY)
def protected(request: pytest.FixtureRequest) -> Any:
    return run(folder_of(request.param))


def network(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def frozen(folder: Path) -> dict[str, bytes]:
    parts = [path for path in folder.glob("*/*") if path.parent.name not in ("unet", "transformer")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts}


def test_what_is_released_is_the_pipeline_with_another_network(protected: Any) -> None:
    reference = protected.protection.reference
    protected.save("release")
    assert frozen(Path("release")) == frozen(reference.path)
    opened = DiffusionPipeline.from_pretrained("release")
    opened.set_progress_bar_config(disable=True)
    assert_same_state(network(opened), state_of(protected.model))
    before = state_of(reference.model)
    still = {name for name, part in protected.model.named_parameters() if torch.equal(part, before[name])}
    assert all(name.startswith("transformer_blocks.1.attn.add_q_proj.") for name in still)  # SD3's answer to the text
    told = {"class_labels": [0], "guidance_scale": 1.0}
    asked = told if reference.spec.architecture.startswith("DiT") else {"prompt": "a cat"}
    assert opened(**asked, num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)
    again = load("release")
    assert again.spec == reference.spec
    assert set(again.manifest["model"]["frozen"]) >= {"vae"}
    assert "released as they were: " in Path("release/README.md").read_text()


ATTACKS: dict[str, Any] = {
    "eval_points": 2,
    "samples": 1,
    "masking": {"heads": []},
    "strategies": {
        "whole": STRATEGY,
        "lora": STRATEGY | {"scope": "lora", "lora_layers": "attention", "lora_rank": 4},
        "dreambooth": STRATEGY | {"loop": "dreambooth", "data_budget": 3},
        "cross_attention": STRATEGY | {"scope": "cross_attention"},
        "inversion": STRATEGY | {"loop": "textual_inversion"},
    },
}


@pytest.mark.slow
def test_attackers_of_a_released_pipeline_run_against_every_role(protected: Any) -> None:
    table = audit(protected, attacks=ATTACKS, settings=SETTINGS, run_dir="audit").table
    encoders = sum(name.startswith("text_encoder") for name in protected.protection.reference.spec.frozen)
    unfit: set[str] = [{"cross_attention", "inversion"}, set(), {"inversion"}, {"cross_attention", "inversion"}][
        encoders
    ]
    assert set(table["attack"]) == set(ATTACKS["strategies"]) - unfit
    assert len(table) == 3 * table["attack"].nunique()
    assert np.isfinite(table["test"]).all()
    assert not table["diverged"].any()
    for (_, role), rows in table.groupby(["seed", "role"]):
        assert rows["test"].nunique() == len(rows), role
    assert {path.name for path in Path("audit/samples").iterdir()} >= {"real-images-of-paintings.png"}


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bits(protected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = protected.protection.reference.path

    def interrupting(self: Tracker, values: Any, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    genuine = Tracker.log
    monkeypatch.setattr(Tracker, "log", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(folder, run_dir="kept")
    monkeypatch.setattr(Tracker, "log", genuine)
    kind = next(kind for kind in KINDS if folder_of(kind) == folder)
    assert_same_state(run(made(kind), run_dir="kept").model, state_of(protected.model))  # in memory or in a folder


def changed_weights(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: part + 1 for name, part in tensors.items()}, file, {"format": "pt"})


def edited(name: str, before: str, after: str) -> Any:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))

    return edit


REFUSED = {
    "a part is gone": (lambda folder: shutil.rmtree(folder / "vae"), "holds no vae/config.json"),
    "a part is a pickle": (
        lambda folder: (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/pytorch_model.bin"),
        "is a pickle",
    ),
    "another pipeline": (edited("model_index.json", "StableDiffusionPipeline", "KandinskyPipeline"), "KandinskyPipel"),
    "another autoencoder": (edited("model_index.json", "AutoencoderKL", "VQModel"), "VQModel"),
    "another text encoder": (edited("model_index.json", "CLIPTextModel", "T5EncoderModel"), "T5EncoderModel"),
    "another network": (edited("model_index.json", "UNet2DConditionModel", "UNet2DModel"), "StableDiffusionPipeline"),
    "a network for inpainting": (edited("unet/config.json", '"in_channels": 4', '"in_channels": 9'), "inpainting"),
    "images that are not square": (edited("unet/config.json", '"sample_size": 4', '"sample_size": [4, 8]'), "square"),
    "a flow that depends on the size": (
        "flow",
        edited("scheduler/scheduler_config.json", '"use_dynamic_shifting": false', '"use_dynamic_shifting": true'),
        "only a fixed shift",
    ),
    "another noise": (edited("scheduler/scheduler_config.json", "DDIM", "FlowMatchEulerDiscrete"), "whose noise may"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_is_not_understood_is_refused_in_one_line(name: str) -> None:
    kind, damage, said = ("text", *REFUSED[name])[-3:]
    shutil.copytree(folder_of(kind), "pipeline")
    damage(Path("pipeline"))
    with pytest.raises(UserError) as caught:
        run("pipeline")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_a_frozen_part_that_was_changed_since_is_refused() -> None:
    shutil.copytree(folder_of("text"), "pipeline")
    protection = run("pipeline").protection
    changed_weights(Path("pipeline"))
    checkpoint = protection.reference
    other = checkpoint_of("pipeline", ORIGINAL, "reference")
    assert other.sha256 != checkpoint.sha256, "another autoencoder makes another model of the same network"
    with pytest.raises(UserError, match=r"^reference: its vae is another one than the checkpoint's"):
        audit(checkpoint, other, ORIGINAL, RESTRICTED, attacks=ATTACKS, settings=SETTINGS)
    with pytest.raises(UserError, match="vae' is not what the model was described with"):
        audit(checkpoint, checkpoint, ORIGINAL, RESTRICTED, attacks=ATTACKS, settings=SETTINGS)


WITHOUT = {
    "a text-to-image model needs texts": ("text", domain("photos", 0), r"^domain\.\*\.prompt: .* needs a text"),
    "another number of classes": ("classes", domain("two", 0, classes=["cat", "dog"]), "has 3 classes, .* has 2"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_domain_that_does_not_fit_is_refused(name: str) -> None:
    kind, original, said = WITHOUT[name]
    with pytest.raises(UserError, match=said):
        run(folder_of(kind), original=original)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_half_precision_and_shards_are_read_and_written_whole_in_float32(sharded: bool) -> None:
    pipeline = made("text")
    more = {"max_shard_size": "20KB"} if sharded else {}
    pipeline.to(torch.float16).save_pretrained("half", variant="fp16")
    network(pipeline).save_pretrained("half/unet", variant="fp16", **more)
    if sharded:
        (Path("half/unet") / "diffusion_pytorch_model.fp16.safetensors").unlink()
        assert len(list(Path("half/unet").glob("*.safetensors"))) > 1
    result = run("half")
    expected = {name: part.float() for name, part in network(pipeline).state_dict().items()}
    assert_same_state(result.protection.reference.model, expected)
    result.save("release")
    assert not list(Path("release").rglob("*fp16*"))
    opened = DiffusionPipeline.from_pretrained("release")
    assert_same_state(network(opened), state_of(result.model))
    assert_same_state(opened.vae.float(), {name: part.float() for name, part in pipeline.vae.state_dict().items()})


def test_a_hub_id_is_fetched_whole_but_for_variants_and_single_file_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = ["model_index.json", "vae/w.safetensors", "unet/w.fp16.safetensors", "v1-5.safetensors", "a/b.bin"]
        allowed = [each for each in names if any(fnmatch(each, pattern) for pattern in allow_patterns)]
        asked.append([each for each in allowed if not any(fnmatch(each, pattern) for pattern in ignore_patterns)])
        return str(folder_of("text"))

    monkeypatch.setattr(folders, "snapshot_download", download)
    found = describe(ModelConfig(library="diffusers", architecture="org/model", pretrained=True))
    assert asked == [["model_index.json"], ["model_index.json", "vae/w.safetensors"]]
    assert found == describe(ModelConfig(weights=str(folder_of("text"))))


def test_a_parts_hash_stays_when_it_is_copied(tmp_path: Path) -> None:
    made("text").to(torch.float16).save_pretrained("half", variant="fp16")
    (Path("half") / "vae" / "old.bin").write_bytes(b"pickle")
    copy_part(Path("half/vae"), tmp_path / "copy")
    assert part_sha256(tmp_path / "copy") == part_sha256(Path("half/vae"))
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
