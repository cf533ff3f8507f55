"""What every adapter promises, whatever the library: the rest of sophon relies on this and asks for no more."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from sophon.checkpoint import read_checkpoint, write_checkpoint
from sophon.config import ModelConfig
from sophon.models import LIBRARIES, ModelAdapter, ModelSpec, adapt, adapter_of, create, describe, resize_head
from sophon.models.diffusers_models import DiffusersAdapter
from sophon.models.partition import owned
from sophon.models.transformers_models import TransformersAdapter
from tests.models import pipelines
from tests.models.own import GroupNormNet
from tests.models.unets import NETWORK
from tests.tiny import assert_same_state, slow, state_of

CLASSES = ("cat", "dog", "owl")
OWN = "tests.models.own:GroupNormNet"
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}
CLIP = VIT | {"model_type": "clip_vision_model", "image_size": 16}
SCHEDULE = {"num_train_timesteps": 20}


class Case(NamedTuple):
    """A model of a library, and how the library itself loads a folder of it."""

    spec: ModelSpec
    load: Callable[[Path], nn.Module]


def spec(library: str, architecture: str, size: int, channels: int = 3, **rest: Any) -> ModelSpec:
    of_input = {"mean": (0.25,) * channels, "std": (0.5,) * channels, "channels": channels, "image_size": size}
    return ModelSpec(**{"library": library, "architecture": architecture, "classes": CLASSES, **of_input, **rest})


def by_timm(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def by_torchvision(folder: Path) -> nn.Module:
    model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def by_transformers(folder: Path) -> nn.Module:
    transformers.AutoImageProcessor.from_pretrained(folder)
    return transformers.AutoModelForImageClassification.from_pretrained(folder)


def by_hand(folder: Path) -> nn.Module:
    model = GroupNormNet(classes=3, width=6)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def by_diffusers(folder: Path) -> nn.Module:
    return UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)


def of_transformers(architecture: str, size: int, channels: int = 3, **settings: Any) -> Case:
    plain = spec("transformers", architecture, size, channels, model_args=settings)
    return Case(TransformersAdapter.from_config(plain.config(), CLASSES).spec, by_transformers)


def of_diffusers(**more: Any) -> Case:
    usual = {"mean": (0.5,), "std": (0.5,), "model_args": {**NETWORK, **more}, "scheduler": SCHEDULE}
    plain = spec("diffusers", "UNet2DModel", 8, 1, **usual)
    return Case(DiffusersAdapter.from_config(plain.config(), CLASSES).spec, by_diffusers)


def of_pipeline(kind: str) -> Case:
    described = describe(ModelConfig(weights=str(pipelines.folder_of(kind))))
    return Case(create(described, CLASSES).spec, by_pipeline)


def by_pipeline(folder: Path) -> nn.Module:
    loaded = DiffusionPipeline.from_pretrained(folder)
    return getattr(loaded, "unet", None) or loaded.transformer


SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 8}
CASES = {
    "timm": Case(spec("timm", "resnet18", 32, 1, model_args=SMALL), by_timm),
    "timm-vit": Case(spec("timm", "test_vit", 32), by_timm),
    "timm-convnext": Case(spec("timm", "test_convnext", 32), by_timm),
    "torchvision": Case(spec("torchvision", "shufflenet_v2_x0_5", 32), by_torchvision),
    "transformers-vit": of_transformers("ViTForImageClassification", 16, 1, **VIT),
    "transformers-deit": of_transformers("DeiTForImageClassification", 16, **VIT | {"model_type": "deit"}),
    "transformers-clip": of_transformers("CLIPForImageClassification", 16, model_type="clip", vision_config=CLIP),
    "transformers-convnext": of_transformers(
        "ConvNextForImageClassification", 16, model_type="convnext", hidden_sizes=[4, 8], depths=[1, 2], num_stages=2
    ),
    "transformers-swin": of_transformers(
        "SwinForImageClassification",
        16,
        model_type="swin",
        patch_size=2,
        embed_dim=4,
        depths=[1, 2],
        num_heads=[1, 2],
        window_size=2,
    ),
    "python": Case(spec("python", OWN, 16, 1, head="fc", model_args={"classes": 3, "width": 6}), by_hand),
    "diffusers": of_diffusers(),
    "diffusers-classes": of_diffusers(num_class_embeds=3),
    **{f"latent-{kind}": of_pipeline(kind) for kind in pipelines.KINDS},
}
CLASSIFIERS = [name for name, case in CASES.items() if case.spec.library != "diffusers"]
WITH_HEAD = [*CLASSIFIERS, "diffusers-classes", "latent-classes"]
WHOLE = [name for name in CASES if not name.startswith("latent")]  # needs no more than its spec


@pytest.fixture(params=slow(CASES, ("transformers-deit", "transformers-swin", "latent-text-xl")))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str, seed: int = 0) -> tuple[ModelAdapter, nn.Module]:
    adapter = adapter_of(CASES[name].spec)
    torch.manual_seed(seed)
    model = adapter.fresh()
    assert model is not None
    return adapter, model


def run(adapter: ModelAdapter, model: nn.Module, batch: int = 2) -> Tensor:
    images = torch.randn(batch, *adapter.input_shape, generator=torch.Generator().manual_seed(0))
    conditions = {"timesteps": torch.arange(batch), "labels": torch.arange(batch) % 3}
    if adapter.frozen is not None:
        conditions |= adapter.frozen.embed(["a cat"] * batch, images, adapter.spec.image_size)
    return adapter.forward(model, images, **(conditions if adapter.kind == "denoising" else {}))


def test_every_library_has_a_case() -> None:
    assert {case.spec.library for case in CASES.values()} == set(LIBRARIES)


def test_forward_gives_logits_or_a_prediction_of_the_images_shape(name: str) -> None:
    adapter, model = made(name)
    for mode in (True, False):
        expected = (2, 3) if adapter.kind == "classification" else (2, *adapter.input_shape)
        assert run(adapter, model.train(mode)).shape == expected


def test_gradients_reach_every_parameter(name: str) -> None:
    adapter, model = made(name)
    run(adapter, model).square().sum().backward()
    missing = [key for key, part in model.named_parameters() if part.grad is None or not part.grad.isfinite().all()]
    # CLIP's classifier reads the tokens before the last norm, which belongs to its image embedding
    assert missing == [key for key, _ in model.named_parameters() if key.startswith("vision_model.post_layernorm.")]


def test_a_fresh_model_follows_torchs_generator_and_nothing_else(name: str) -> None:
    draws = random.getstate(), np.random.get_state()[1].tolist()
    adapter, model = made(name, 1)
    assert_same_state(made(name, 1)[1], state_of(model))
    other = state_of(made(name, 2)[1])
    assert any(not torch.equal(value, other[key]) for key, value in model.state_dict().items())
    state = torch.get_rng_state()
    assert adapter.head == next(iter(adapter.heads), None)
    assert set(adapter.heads) <= set(dict(model.named_modules()))
    assert adapter.classes_in(model) == (3 if adapter.heads else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == draws
    assert model.training
    assert {part.device.type for part in model.parameters()} == {"cpu"}


def test_blocks_hold_every_tensor_outside_the_head_once(name: str) -> None:
    adapter, model = made(name)
    found = adapter.blocks(model)
    assert len(found) >= 2
    for tensor in dict(chain(model.named_parameters(), model.named_buffers())):
        inside = bool(owned([tensor], adapter.heads))
        assert sum(bool(owned([tensor], block)) for block in found) == (not inside), tensor
    assert all(owned([key for key, _ in model.named_parameters()], block) for block in found)


@pytest.mark.parametrize("name", WITH_HEAD)
def test_a_new_head_is_drawn_from_the_generator_and_the_rest_stays(name: str) -> None:
    adapter, model = made(name)
    model.double().eval()
    assert adapter.head is not None
    before, old = state_of(model), model.get_submodule(adapter.head)
    torch.manual_seed(3)
    adapter.start_head(model, tuple("abcde"))
    after, new = state_of(model), model.get_submodule(adapter.head)
    torch.manual_seed(3)
    expected = nn.Linear(old.in_features, 5) if isinstance(old, nn.Linear) else nn.Embedding(5, old.embedding_dim)
    assert torch.equal(new.weight[:5].float(), expected.weight) or new.weight.dtype == torch.float64
    assert new.weight.dtype == torch.float64
    assert adapter.classes_in(model) == 5
    assert not new.training
    heads = owned(before, adapter.heads)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - heads)
    if adapter.kind == "classification":
        assert run(adapter, model.float()).shape == (2, 5)


@pytest.mark.parametrize("name", WITH_HEAD)
def test_a_head_that_grows_and_shrinks_again_keeps_its_first_outputs(name: str, tmp_path: Path) -> None:
    adapter, model = made(name)
    before = state_of(model)
    resize_head(model, adapter, ("cat", "dog", "owl", "ant", "bee"))
    assert adapter.classes_in(model) == 5
    resize_head(model, adapter, CLASSES)
    assert_same_state(model, before)
    write_checkpoint(tmp_path, model, adapter.spec, {"verb": "pretrain"})
    assert_same_state(read_checkpoint(tmp_path).model, before)
    assert_same_state(CASES[name].load(tmp_path), before)


def test_what_is_saved_loads_in_the_library_alone_and_here_again(name: str, tmp_path: Path) -> None:
    adapter, model = made(name)
    run(adapter, model)  # moves BatchNorm's statistics off their initial values
    write_checkpoint(tmp_path, model, adapter.spec, {"verb": "pretrain"})
    loaded = CASES[name].load(tmp_path)
    assert_same_state(loaded, state_of(model))
    torch.testing.assert_close(run(adapter, loaded.eval()), run(adapter, model.eval()))
    ours = read_checkpoint(tmp_path)
    assert ours.spec == adapter.spec
    assert_same_state(ours.model, state_of(model))
    (tmp_path / "sophon.json").unlink()
    state = torch.get_rng_state()
    described = describe(ModelConfig(architecture="another", image_size=99, mean=[0.9], weights=str(tmp_path)))
    again = create(described, CLASSES)
    assert again.spec == adapter.spec
    assert_same_state(again.model, state_of(model))
    torch.set_rng_state(state)


@pytest.mark.slow
def test_the_cards_code_loads_and_runs_the_model(name: str, tmp_path: Path) -> None:
    adapter, model = made(name)
    write_checkpoint(tmp_path, model.eval(), adapter.spec, {"verb": "pretrain"})
    of = adapter.spec
    place: dict[str, Any] = {"images": torch.rand(2, of.channels, of.image_size, of.image_size)}
    exec(adapter.card().loading.replace("PATH", str(tmp_path)), place)
    if adapter.kind == "classification":
        mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (of.mean, of.std))
        torch.testing.assert_close(place["logits"], adapter.forward(model, (place["images"] - mean) / std))
    else:
        assert len(place["images"]) > 0


@pytest.mark.parametrize("name", WHOLE)
def test_a_spec_is_what_its_own_configuration_makes(name: str) -> None:
    of = CASES[name].spec
    with torch.device("meta"):
        assert create(of.config(), CLASSES).spec == of


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_in_memory_is_recognised_as_what_it_is(name: str) -> None:
    adapter, model = made(name)
    of = adapter.spec
    facts: dict[str, Any] = {"classes": CLASSES, "image_size": of.image_size}
    if adapter.kind == "denoising":
        facts["scheduler"] = DDPMScheduler(**of.scheduler)
    else:
        facts |= {"mean": of.mean, "std": of.std}
    if of.library == "python":
        facts |= {"channels": 1, "model_args": of.model_args}
    module, found = adapt(model, **facts)
    assert module is model
    assert replace(found, model_args={}) == replace(of, model_args={})
    fresh = adapter_of(found).fresh()
    assert fresh is not None
    assert {key: part.shape for key, part in fresh.state_dict().items()} == {
        key: part.shape for key, part in model.state_dict().items()
    }
    assert torch.isfinite(run(adapter_of(found), fresh.eval())).all()
