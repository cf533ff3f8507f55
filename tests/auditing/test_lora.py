"""Adapters: they start as nothing, weigh what theory says, and are all that moves besides the head."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import Tensor, nn

from sophon.attacker import LORA_LAYERS, FineTuneStrategy
from sophon.auditing.lora import add_adapters
from sophon.domains import ImageSet, MemoryImages
from sophon.errors import UserError
from sophon.finetune import fine_tune, flops_per_step
from sophon.models import ModelSpec, adapt, build
from sophon.tasks import ClassificationTask, DenoisingTask
from tests.tiny import (
    CLASSES,
    assert_same_state,
    state_of,
    tiny_denoising,
    tiny_images,
    tiny_model,
    tiny_task,
    tiny_unet,
)

PLAN = FineTuneStrategy(optimizer="adam", lr=0.01, batch_size=8, steps=3, scope="lora")


class Case(NamedTuple):
    model: nn.Module
    task: ClassificationTask | DenoisingTask
    images: ImageSet


def classifier(architecture: str, size: int, **arguments: object) -> Case:
    spec = ModelSpec("timm", architecture, CLASSES, 1, size, (0.5,), (0.5,), arguments)
    images = tiny_images(0, 3)
    large = nn.functional.interpolate(images.images.float(), size=(size, size)).to(torch.uint8)
    torch.manual_seed(0)
    if architecture == "metaformer":  # timm has none this small by name
        mixers, norms = [SepConv] * 2 + [Attention] * 2, [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2
        model: nn.Module = MetaFormer(1, 3, "avg", (1,) * 4, (8, 8, 32, 32), token_mixers=mixers, norm_layers=norms)
        facts = {"classes": CLASSES, "channels": 1, "image_size": size, "mean": (0.5,), "std": (0.5,)}
        spec = adapt(model, library="python", factory=lambda: copy.deepcopy(model), **facts).spec
    else:
        model = build(spec)
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts some at zero, through which no gradient passes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Case(model, ClassificationTask(spec), MemoryImages(large, images.labels, CLASSES))


def resnet() -> Case:
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 4}
    return classifier("resnet18", 32, **small)


def metaformer() -> Case:
    return classifier("metaformer", 32)


def unet(*, conditional: bool = False) -> Case:
    task = tiny_denoising(conditional=conditional)
    task.sample_steps = 2
    return Case(tiny_unet(conditional=conditional), task, tiny_images(0, 3))


def conditional_unet() -> Case:
    return unet(conditional=True)


MODELS = {"resnet": resnet, "metaformer": metaformer, "unet": unet, "conditional_unet": conditional_unet}
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def adapted(case: Case, rank: int = 2, layers: str = "all", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    add_adapters(case.model, rank, layers, case.task.head_names(case.model))
    return case.model


def sizes(model: nn.Module, rank: int, layers: str, head: str) -> dict[str, int]:
    """Work out, from the plain model, what each adapter weighs."""
    kinds = {name: type(part).__name__ for name, part in model.named_modules()}
    attention = tuple(f"{name}." for name, kind in kinds.items() if kind == "Attention")
    transformer = (*attention, *(f"{name}." for name, kind in kinds.items() if kind in ("Mlp", "FeedForward")))
    found = {}
    for name, layer in model.named_modules():
        linear, convolution = isinstance(layer, nn.Linear), isinstance(layer, nn.Conv2d) and layer.groups == 1
        if name == head or not (linear or convolution):
            continue
        chosen = {
            "all": True,
            "linears": linear,
            "convolutions": convolution,
            "attention": name.startswith(attention),
            "transformer": name.startswith(transformer),
        }
        if chosen[layers]:
            outputs, inputs = layer.weight.shape[:2]
            found[name] = rank * (inputs * layer.weight[0, 0].numel() + outputs)
    return found


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


@over_models
@pytest.mark.parametrize("layers", LORA_LAYERS)
def test_adapters_lie_where_they_are_asked_for_and_weigh_what_theory_says(make, layers: str) -> None:
    case = make()
    head = next(iter(sorted(case.task.head_names(case.model))), "").rpartition(".")[0]
    expected = sizes(case.model, 3, layers, head)
    if not expected:
        names = [name for name, _ in case.model.named_modules()]
        with pytest.raises(UserError, match=rf"^lora_layers: '{layers}' has no layer of this model"):
            adapted(case, 3, layers)
        assert [name for name, _ in case.model.named_modules()] == names
        return
    found: dict[str, int] = {}
    for name, parameter in adapters(adapted(case, 3, layers)).items():
        layer = name.partition(".lora_")[0]
        found[layer] = found.get(layer, 0) + parameter.numel()
    assert found == expected
    trained = case.task.train_mode(case.model, "lora")
    assert set(trained) == set(adapters(case.model)) | case.task.head_names(case.model)
    heads = sum(case.model.get_parameter(name).numel() for name in case.task.head_names(case.model))
    assert sum(parameter.numel() for parameter in trained.values()) == sum(expected.values()) + heads


@over_models
def test_adapters_start_as_the_identity_and_change_no_name_of_the_head(make) -> None:
    case = make()
    plain = copy.deepcopy(case.model)
    model = adapted(case, 4)
    assert case.task.head_names(model) == case.task.head_names(plain)
    assert case.task.evaluate(model, case.images) == pytest.approx(case.task.evaluate(plain, case.images), rel=1e-6)
    assert case.task.details(model, case.images) == pytest.approx(case.task.details(plain, case.images), rel=1e-6)
    samples = [case.task.sample(net, 2, 0) for net in (model, plain)]
    assert samples == [None, None] or torch.equal(*samples)
    base = {name.replace(".base_layer", ""): value for name, value in state_of(model).items() if ".lora_" not in name}
    assert_same_state(plain, base)


@over_models
def test_only_adapters_and_head_move_and_they_change_what_the_model_says(make) -> None:
    case = make()
    model = adapted(case)
    before, start = state_of(model), case.task.details(model, case.images)
    assert fine_tune(model, PLAN, case.task, case.images, torch.Generator().manual_seed(1))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(adapters(model)) | case.task.head_names(model)
    assert case.task.details(model, case.images) != pytest.approx(start, rel=1e-4)


def test_the_step_of_an_adapter_is_twice_the_product_of_its_matrices() -> None:
    model = adapted(Case(tiny_model(), tiny_task(), tiny_images(0)), 3, "convolutions")
    layer, images = model.conv2, torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    kernel = torch.einsum("or,rihw->oihw", layer.lora_B["default"].weight[:, :, 0, 0], layer.lora_A["default"].weight)
    expected = nn.functional.conv2d(images, layer.base_layer.weight + 2 * kernel, padding=1)
    torch.testing.assert_close(layer(images), expected)


def test_flops_have_the_adapters() -> None:
    case, plain = resnet(), resnet()
    model = adapted(case, 8)
    small = adapted(resnet(), 1)
    found = [flops_per_step(net, PLAN, case.task, case.images) for net in (small, model)]
    assert found[0] < found[1]
    whole = flops_per_step(plain.model, replace(PLAN, scope="all"), case.task, case.images)
    assert found[0] < whole, "the weights' own gradients are not computed"


class Odd(nn.Module):
    """Layers that an adapter does not fit, and names that end like others."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, images: images})(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(4, 4)
        self.head = nn.ModuleDict({"fc": nn.Linear(4, 3)})

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_layers_that_no_adapter_fits_are_left_out_and_the_head_is_told_from_its_namesake() -> None:
    model = Odd()
    add_adapters(model, 2, "all", {"head.fc.weight", "head.fc.bias"})
    assert {name.partition(".lora_")[0] for name in adapters(model)} == {"stem.0", "fc"}
