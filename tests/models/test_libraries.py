"""What the libraries have of their own: the models that are shipped as configurations, published weights, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models import ModelSpec, adapter_of, build, create, timm_models
from sophon.tensor_files import write_tensors
from tests.tiny import slow

CONF = Path(__file__).parents[2] / "conf" / "model"
SHIPPED = [path.stem for path in sorted(CONF.glob("*.yaml")) if "architecture:" in path.read_text()]
CLASSES = ("cat", "dog", "owl")


def shipped(name: str, **changes: Any) -> ModelConfig:
    schema = OmegaConf.structured(ModelConfig)
    config: Any = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(CONF / f"{name}.yaml")))
    return dataclasses.replace(config, **changes)


def spec_of(name: str, **changes: Any) -> ModelSpec:
    with torch.device("meta"):
        return create(shipped(name, **changes), CLASSES).spec


TINY = shipped("resnet_tiny")


@pytest.mark.parametrize("name", slow(SHIPPED, ("caformer_m36", "unet32", "unet64")))
def test_every_shipped_model_runs_and_takes_a_fresh_head(name: str) -> None:
    with torch.device("meta"):
        model, spec = create(shipped(name), CLASSES)
        adapter = adapter_of(spec)
        images = torch.empty(2, spec.channels, spec.image_size, spec.image_size)
        if adapter.kind == "denoising":
            assert model(images, 0).sample.shape == images.shape
            return
        assert adapter.forward(model.eval(), images).shape == (2, 3)
        adapter.start_head(model, "abcde")
        assert adapter.forward(model, images).shape == (2, 5)


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


@pytest.mark.parametrize(
    ("given", "mean"),
    [({}, (0.485, 0.456, 0.406)), ({"mean": [0.3]}, (0.3,) * 3), ({"channels": 1}, (pytest.approx(0.449),))],
)
def test_published_weights_bring_their_normalisation(given: dict[str, Any], mean: Any) -> None:
    config = ModelConfig(architecture="resnet18", pretrained=True, **given)
    assert timm_models.TimmAdapter.from_config(config, CLASSES).spec.mean == mean


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


def test_a_constructor_that_computes_with_tensors_is_built_whole() -> None:
    spec = ModelSpec("torchvision", "regnet_y_400mf", ("a", "b"), 3, 32, (0.5,) * 3, (0.5,) * 3)
    before = torch.get_rng_state()
    assert adapter_of(spec).head == "fc"
    assert torch.equal(torch.get_rng_state(), before)
