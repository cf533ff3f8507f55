import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sophon.config import ModelConfig
from sophon.errors import UserError
from sophon.models import ModelSpec, classifiers, create
from sophon.models.classifiers import build, head_prefix, load_weights, spec_from_config, with_fresh_head
from sophon.tensor_files import write_tensors

CONF = Path(__file__).parents[2] / "conf" / "model"
SHIPPED = sorted(path.stem for path in CONF.glob("*.yaml") if "library: diffusers" not in path.read_text())
SMALL = ("resnet_small", "resnet_tiny")
CLASSES = ("cat", "dog", "owl")


def shipped_config(name: str) -> ModelConfig:
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    )


def shipped_spec(name: str, classes=CLASSES) -> ModelSpec:
    return spec_from_config(shipped_config(name), classes)


def tiny(classes=CLASSES, **changes) -> ModelSpec:
    return dataclasses.replace(shipped_spec("resnet_tiny", classes), **changes)


def built(spec: ModelSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(spec)


def test_the_shipped_models_are_those_that_are_documented():
    assert set(SHIPPED) == {
        *SMALL,
        *("resnet18", "resnet34", "resnet50", "vgg13_bn", "caformer_m36", "resnet18_torchvision"),
    }


HEADS = {"vgg13_bn": "head.fc", "caformer_m36": "head.fc.fc2"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_builds_runs_and_takes_a_fresh_head(name):
    spec = shipped_spec(name)
    with torch.device("meta"):
        model = build(spec).eval()
        assert model(torch.empty(2, spec.channels, spec.image_size, spec.image_size)).shape == (2, 3)
        prefix = head_prefix(model, spec)
        assert prefix == HEADS.get(name, "fc")
        others = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{prefix}.")}
        fresh = with_fresh_head(model, spec, "abcde")
        assert fresh == dataclasses.replace(spec, classes=tuple("abcde"))
        assert model(torch.empty(2, spec.channels, spec.image_size, spec.image_size)).shape == (2, 5)
        assert set(model.state_dict()) == {*others, f"{prefix}.weight", f"{prefix}.bias"}
        assert head_prefix(model, fresh) == prefix


def test_torchvisions_vgg_ends_in_its_third_linear_layer():
    spec = tiny(library="torchvision", architecture="vgg13_bn", channels=3, model_args={})
    with torch.device("meta"):
        assert head_prefix(build(spec), spec) == "classifier.6"


@pytest.mark.parametrize("name", SMALL)
def test_small_models_are_small_trainable_and_channels_last(name):
    spec = shipped_spec(name)
    model = built(spec)
    images = torch.randn(4, spec.channels, 32, 32)
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    deep = next(p for p in model.layer2.parameters() if p.dim() == 4 and p.shape[2] > 1)
    assert deep.is_contiguous(memory_format=torch.channels_last)


def test_the_global_seed_decides_the_random_weights():
    first, same, other = (built(tiny(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_a_transformer_is_built_for_the_image_size_of_the_config():
    spec = tiny(architecture="test_vit", image_size=64, channels=3, model_args={})
    assert built(spec)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_spec_from_config_repeats_one_number_for_every_channel():
    config = ModelConfig(architecture="resnet18", mean=[0.1, 0.2, 0.3], std=[0.4])
    spec = spec_from_config(config, list(CLASSES))
    assert spec.mean == (0.1, 0.2, 0.3)
    assert spec.std == (0.4, 0.4, 0.4)
    assert spec.classes == CLASSES


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
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        spec_from_config(ModelConfig(**{"architecture": "resnet18", **changes}), CLASSES)


def test_unknown_libraries_are_refused():
    with pytest.raises(UserError, match=r"model\.library: 'keras' is not known; allowed: diffusers, timm, torchvision"):
        create(ModelConfig(library="keras", architecture="resnet18"), CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet81"}, "model.architecture: 'resnet81' is not known to timm; close to it: .*resnet18"),
        ({"architecture": "resnet18.no_such_tag"}, "is not known to timm"),
        ({"architecture": "local-dir:/x"}, "is not known to timm"),
        ({"architecture": "fasterrcnn_resnet50_fpn", "library": "torchvision"}, "is not known to torchvision"),
        ({"architecture": "squeezenet1_0", "library": "torchvision"}, "does not end in one linear layer"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "does not end in one linear layer"),
        ({"model_args": {"layrs": 3}}, "model.model_args: {'layrs': 3} does not fit 'resnet18': .*layrs"),
        ({"model_args": {"layers": [1]}}, r"model.model_args: .* does not fit 'resnet18'"),
    ],
)
def test_models_that_cannot_be_built_are_refused(changes, message):
    spec = tiny(**{"channels": 3, "model_args": {}, **changes})
    with torch.device("meta"), pytest.raises(UserError, match=message) as caught:
        build(spec)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_come_from_safetensors_and_get_a_fresh_head(tmp_path, monkeypatch):
    published = built(tiny([str(n) for n in range(1000)], architecture="test_resnet", channels=3, model_args={}))
    write_tensors(tmp_path / "published.safetensors", published.state_dict())
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        return str(tmp_path / "published.safetensors")

    monkeypatch.setattr(classifiers, "hf_hub_download", download)
    model = build(tiny(architecture="test_resnet", channels=3, model_args={}), pretrained=True)
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], published.state_dict()["layer1.0.conv1.weight"])
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_unreachable_pretrained_weights_are_refused_in_one_line(monkeypatch):
    def offline(repository, filename):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(classifiers, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"model\.pretrained: no weights for 'resnet18': no route to host"):
        build(shipped_spec("resnet18"), pretrained=True)
    with pytest.raises(UserError, match=r"model\.pretrained: true is not allowed with library torchvision"):
        build(shipped_spec("resnet18_torchvision"), pretrained=True)


def test_a_fresh_head_is_newly_drawn_and_the_rest_stays():
    spec = tiny()
    model = built(spec).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    assert with_fresh_head(model, spec, CLASSES) == spec
    torch.manual_seed(3)
    reference = nn.Linear(64, 3)
    assert torch.equal(model.fc.weight, reference.weight)
    assert torch.equal(model.fc.bias, reference.bias)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key[:3] != "fc.")
    assert not any(part.training for part in model.modules())
    assert model.num_classes == 3


def test_a_fresh_head_keeps_the_number_type_of_the_model():
    spec = tiny()
    model = built(spec).double().eval()
    with_fresh_head(model, spec, "ab")
    assert model(torch.zeros(1, 1, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("as_folder", [True, False])
def test_weights_load_from_a_file_or_a_folder(tmp_path, as_folder):
    source, target = built(tiny(), 1), built(tiny(), 2)
    write_tensors(tmp_path / "model.safetensors", source.state_dict())
    load_weights(target, tmp_path if as_folder else str(tmp_path / "model.safetensors"))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


def test_create_builds_the_configured_model_and_loads_the_weights_that_it_names(tmp_path):
    write_tensors(tmp_path / "model.safetensors", built(tiny(), 1).state_dict())
    config = shipped_config("resnet_tiny")
    torch.manual_seed(2)
    random, spec = create(config, CLASSES)
    config.weights = str(tmp_path)
    loaded, same = create(config, CLASSES)
    assert spec == same == tiny()
    for key, value in built(tiny(), 2).state_dict().items():
        assert torch.equal(random.state_dict()[key], value)
    for key, value in built(tiny(), 1).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_weights_of_another_class_count_say_so(tmp_path):
    write_tensors(tmp_path / "model.safetensors", built(tiny("abcde")).state_dict())
    message = "class counts do not match: checkpoint has 5 classes, original domain has 3"
    with pytest.raises(UserError, match=message):
        load_weights(built(tiny()), tmp_path)


def test_missing_and_truncated_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_weights(built(tiny()), tmp_path)
    write_tensors(tmp_path / "model.safetensors", built(tiny()).state_dict())
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_weights(built(tiny()), tmp_path)
