"""A vision transformer of transformers and the same one of timm: protection, attacks and figures agree to rounding."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import sophon
from sophon.api.calls import audit, protect
from sophon.attacker import FineTuneStrategy
from sophon.domains import MemoryImages, batches
from sophon.errors import UserError
from sophon.finetune import loop_of
from sophon.models import AdaptedModel
from sophon.tasks import ClassificationTask
from tests.tiny import assert_same_state, state_of

# nobody has trained the tests' models
pytestmark = pytest.mark.filterwarnings("ignore:.*no better than a guess")

CLASSES = ("cat", "dog", "owl")
INPUT = {"mean": [0.5] * 3, "std": [0.5] * 3, "classes": CLASSES, "image_size": 16}
SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


def of_timm() -> AdaptedModel:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE, num_classes=3)
    with torch.no_grad():
        for part in model.parameters():  # what begins at zero would hide a mistake
            part.add_(0.1 * torch.randn_like(part))
    return sophon.adapt(model, architecture="vit_tiny_patch16_224", model_args=SHAPE, **INPUT)


def of_transformers() -> AdaptedModel:
    settings = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**settings, intermediate_size=32, layer_norm_eps=1e-6, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    model.load_state_dict(renamed(of_timm().model.state_dict()))
    return sophon.adapt(model, **INPUT)


NAMES = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "norm": "vit.layernorm",
    "head": "classifier",
}
PARTS = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give timm's tensors transformers' names; queries, keys and values are one matrix there and three here."""
    found = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if "attn.qkv" in name:
            block = path.removesuffix("attn.qkv").replace("blocks", "vit.layers")
            found |= {
                f"{block}attention.{part}_proj.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)
            }
        elif name.startswith("blocks."):
            _, number, part = path.split(".", 2)
            found[f"vit.layers.{number}.{PARTS.get(part, part)}.{kind}"] = tensor
        else:
            found[NAMES.get(name) or f"{NAMES[path]}.{kind}"] = tensor
    return found


def domain(name: str, seed: int) -> sophon.Domain:
    def side(seed: int, per_class: int) -> tuple[np.ndarray, list[str]]:
        labels = [name for name in CLASSES for _ in range(per_class)]
        return np.random.default_rng(seed).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8), labels

    return sophon.Domain(side(seed, 12), side(seed + 1, 6), name=name, val_fraction=0.3)


USUAL = {"optimizer": "adam", "lr": 0.005, "batch_size": 8, "steps": 3}
ATTACKS = {
    "eval_points": 2,
    "masking": {"heads": []},
    "roles": ["protected", "unprotected"],
    "strategies": {
        "all": USUAL | {"head": "kept"},
        "probe": USUAL | {"scope": "head"},
        "prompts": USUAL | {"loop": "visual_prompts"},
    },
}
METHOD = {"name": "tiny", "rounds": 2, "ntr_steps": 1, "ntr_batch_size": 8, "query_batch_size": 8}
METHOD |= {"suppression_loss": "klu"}
ATTACKERS = sophon.Attackers(optimizers={"adam": [1e-3, 1e-2]}, batch_sizes=[8], steps=[2, 2], heads=["kept", "fresh"])


def figures(model: AdaptedModel) -> tuple[dict[str, Tensor], Any]:
    result = protect(
        model,
        domain("photos", 0),
        domain("paintings", 2),
        method=METHOD,
        attackers=ATTACKERS,
        guard=sophon.Guard(every=1, tolerance=100.0),
    )
    return dict(result.model.state_dict()), audit(result, attacks=ATTACKS).table


@pytest.mark.slow
def test_both_end_with_the_same_weights_and_figures() -> None:
    (state, table), (other_state, other) = figures(of_timm()), figures(of_transformers())
    torch.testing.assert_close(renamed(state), other_state, rtol=1e-3, atol=1e-4)
    assert list(table["attack"]) == list(other["attack"])
    assert set(table["attack"]) == set(ATTACKS["strategies"])
    for column in ("test", "select", "measured: cross-entropy"):
        assert other[column].tolist() == pytest.approx(table[column].tolist(), rel=1e-3), column


PLAN = FineTuneStrategy(optimizer="adam", lr=0.01, batch_size=4, steps=3, loop="visual_prompts", head="kept")


def images() -> MemoryImages:
    pixels = torch.randint(0, 256, (9, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return MemoryImages(pixels, torch.arange(9) % 3, CLASSES)


@pytest.mark.parametrize("make", [of_timm, of_transformers])
def test_prompts_and_head_are_all_that_prompt_tuning_trains(make: Any) -> None:
    model, spec = make()
    task, model = ClassificationTask(spec, dtype=torch.float64), model.double()
    other, before, losses = copy.deepcopy(model).eval(), state_of(model), []
    found = loop_of(PLAN)(
        model, PLAN, task, images(), torch.Generator().manual_seed(0), lambda _, loss: losses.append(loss)
    )
    head = task.adapter.heads[0]
    prompts = found.get_submodule(head).prompts
    moved = {name for name, part in before.items() if not torch.equal(part, found.state_dict()[name])}
    assert moved == {f"{head}.weight", f"{head}.bias"}

    # written out: the tokens go into the first block behind the image's own
    draws = torch.Generator().manual_seed(0)
    tokens = (torch.randn(1, 10, 8, generator=draws) * 0.02).double().requires_grad_()
    blocks = other.blocks if hasattr(other, "blocks") else other.vit.layers
    blocks[0].register_forward_pre_hook(lambda _, inputs: (torch.cat([inputs[0], tokens.expand(4, -1, -1)], 1),))
    trained = [*other.get_submodule(head).parameters(), tokens]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    stream, expected = batches(images(), 4, draws), []
    for _ in range(3):
        batch = next(stream)
        logits = other((batch.images.double() / 255 - 0.5) / 0.5)
        loss = nn.functional.cross_entropy(getattr(logits, "logits", logits), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(prompts.data, tokens.data, rtol=1e-7, atol=1e-10)


def test_a_network_without_tokens_is_refused_and_left_as_it_was() -> None:
    model = timm.create_model("resnet10t", num_classes=3, stem_width=8)
    adapted = sophon.adapt(model, architecture="resnet10t", **INPUT)
    before = state_of(model)
    task = ClassificationTask(adapted.spec)
    with pytest.raises(UserError, match="needs a vision transformer"):
        loop_of(PLAN)(model, PLAN, task, images(), torch.Generator(), lambda *_: None)
    assert_same_state(model, before)
