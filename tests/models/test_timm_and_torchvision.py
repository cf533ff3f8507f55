"""What timm and torchvision have of their own: names, published weights, the layer that is the head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models import ModelSpec, adapter_of, build, create, timm_models
from sophon.tensor_files import write_tensors

CONF = Path(__file__).parents[2] / "conf" / "model"
TEXTS = {path.stem: path.read_text() for path in sorted(CONF.glob("*.yaml"))}
SHIPPED = [name for name, text in TEXTS.items() if "architecture:" in text and "library: diffusers" not in text]
CLASSES = ("cat", "dog", "owl")
HEADS = {"vgg13_bn": "head.fc", "caformer_m36": "head.fc.fc2"}


def shipped(name: str, **changes: Any) -> ModelConfig:
    schema = OmegaConf.structured(ModelConfig)
    config: Any = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(CONF / f"{name}.yaml")))
    return dataclasses.replace(config, **changes)


def spec_of(name: str, **changes: Any) -> ModelSpec:
    with torch.device("meta"):
        return create(shipped(name, **changes), CLASSES).spec


TINY = shipped("resnet_tiny")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_classifier_runs_and_takes_a_fresh_head(name: str) -> None:
    with torch.device("meta"):
        model, spec = create(shipped(name), CLASSES)
        adapter = adapter_of(spec)
        images = torch.empty(2, spec.channels, spec.image_size, spec.image_size)
        assert adapter.forward(model.eval(), images).shape == (2, 3)
        assert adapter.head == HEADS.get(name, "fc")
        before = set(model.state_dict())
        adapter.start_head(model, "abcde")
        assert adapter.forward(model, images).shape == (2, 5)
        assert set(model.state_dict()) == before


def test_torchvisions_vgg_ends_in_its_third_linear_layer() -> None:
    spec = ModelSpec("torchvision", "vgg13_bn", CLASSES, 3, 32, (0.5,) * 3, (0.5,) * 3)
    assert adapter_of(spec).head == "classifier.6"


def test_classifiers_are_channels_last() -> None:
    model = build(spec_of("resnet_tiny"))
    deep = next(part for part in model.layer2.parameters() if part.dim() == 4 and part.shape[2] > 1)
    assert deep.is_contiguous(memory_format=torch.channels_last)


def test_a_transformer_is_built_for_the_image_size_of_the_configuration() -> None:
    changes = {"architecture": "test_vit", "image_size": 64, "channels": 3, "model_args": {}}
    assert build(spec_of("resnet_tiny", **changes))(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_one_number_serves_every_channel() -> None:
    spec = spec_of("resnet18", mean=[0.1, 0.2, 0.3], std=[0.4])
    assert (spec.mean, spec.std, spec.classes) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4), CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "model.image_size: 0 is not allowed"),
        ({"channels": -1}, "model.channels: -1 is not allowed"),
        ({"library": "torchvision", "channels": 1}, "model.channels: 1 is not allowed with library torchvision"),
        ({"mean": [0.5, 0.5]}, r"model.mean: \[0.5, 0.5\] has 2 numbers; give 1 or 3"),
        ({"mean": [float("nan")]}, "model.mean: .* give finite numbers"),
        ({"std": []}, "model.std: .* has 0 numbers"),
        ({"std": [0.5, 0.0, 0.5]}, "model.std: .* finite numbers above 0"),
        ({"std": [float("inf")]}, "model.std: .* finite numbers above 0"),
        ({"pretrained": True, "weights": "x"}, "model.weights: 'x' contradicts model.pretrained"),
        ({"model_args": {"num_classes": 3}}, "model.model_args.num_classes: set by sophon"),
        ({"scheduler": {"beta_end": 0.01}}, "model.scheduler: only models of library diffusers have one; leave it out"),
        ({"class_conditional": True}, "model.class_conditional: only models of library diffusers have one"),
        ({"architecture": "resnet81"}, "model.architecture: 'resnet81' is not known to timm; close to it: .*resnet18"),
        ({"architecture": "resnet18.no_such_tag"}, "is not known to timm"),
        ({"architecture": "local-dir:/x"}, "is not known to timm"),
        ({"architecture": "fasterrcnn_resnet50_fpn", "library": "torchvision"}, "is not known to torchvision"),
        ({"architecture": "squeezenet1_0", "library": "torchvision"}, "does not end in one linear layer"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "does not end in one linear layer"),
        ({"model_args": {"layrs": 3}}, "model.model_args: {'layrs': 3} does not fit 'resnet18': .*layrs"),
        ({"model_args": {"layers": [1]}}, r"model.model_args: .* does not fit 'resnet18'"),
        ({"library": "torchvision", "pretrained": True}, "model.pretrained: true is not allowed with library torchv"),
    ],
)
def test_what_is_not_a_classifier_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    config = ModelConfig(**{"architecture": "resnet18", **changes})
    with torch.device("meta"), pytest.raises(UserError, match=message) as caught:
        create(config, CLASSES)
    assert "\n" not in str(caught.value)


def test_published_weights_come_from_safetensors_and_get_a_fresh_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(architecture="test_resnet", image_size=64)
    published = build(create(config, [str(n) for n in range(1000)]).spec)
    write_tensors(tmp_path / "published.safetensors", published.state_dict())
    asked = []

    def download(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        return str(tmp_path / "published.safetensors")

    monkeypatch.setattr(timm_models, "hf_hub_download", download)
    model, _ = create(dataclasses.replace(config, pretrained=True), CLASSES)
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], published.state_dict()["layer1.0.conv1.weight"])
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_published_weights_that_cannot_be_had_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repository: str, filename: str) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm_models, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"^model\.pretrained: no weights for 'resnet18': no route to host$"):
        create(ModelConfig(architecture="resnet18", pretrained=True), CLASSES)


def test_weights_load_from_a_file_or_a_folder_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    spec = spec_of("resnet_tiny")
    source, path = build(spec), tmp_path / "model.safetensors"
    write_tensors(path, source.state_dict())
    for weights in (tmp_path, path):
        loaded, _ = create(dataclasses.replace(TINY, weights=str(weights)), CLASSES)
        assert all(torch.equal(part, loaded.state_dict()[name]) for name, part in source.state_dict().items())
    with pytest.raises(UserError, match="class counts do not match: checkpoint has 3 classes, original domain has 5"):
        create(dataclasses.replace(TINY, weights=str(path)), tuple("abcde"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        create(dataclasses.replace(TINY, weights=str(path)), CLASSES)
    path.unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        create(dataclasses.replace(TINY, weights=str(tmp_path)), CLASSES)


def test_a_fresh_head_initialises_itself_as_a_linear_layer_does() -> None:
    spec = spec_of("resnet_tiny")
    model = build(spec).eval()
    torch.manual_seed(3)
    adapter_of(spec).start_head(model, CLASSES)
    torch.manual_seed(3)
    expected = nn.Linear(64, 3)
    assert torch.equal(model.fc.weight, expected.weight)
    assert torch.equal(model.fc.bias, expected.bias)
    assert model.num_classes == 3


def test_a_constructor_that_computes_with_tensors_is_built_whole() -> None:
    spec = ModelSpec("torchvision", "regnet_y_400mf", ("a", "b"), 3, 32, (0.5,) * 3, (0.5,) * 3)
    before = torch.get_rng_state()
    assert adapter_of(spec).head == "fc"
    assert torch.equal(torch.get_rng_state(), before)
