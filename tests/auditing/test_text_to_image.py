"""Attackers of text-to-image models do what diffusers' example scripts do, step by step, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing.lora import add_adapters
from sophon.config import ModelConfig
from sophon.domains import Batch, MemoryImages, batches
from sophon.errors import UserError
from sophon.finetune import loop_of
from sophon.models import create, describe
from sophon.tasks import DenoisingTask
from tests.models.pipelines import CLASSES, Reference, batch, folder_of
from tests.tiny import assert_same_state, state_of

SEED, STEPS = 5, 3
SETTINGS = {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.01, "max_norm": 1.0, "head": "kept"}
PLAN = FineTuneStrategy(**SETTINGS, batch_size=2, steps=STEPS)


def images() -> MemoryImages:
    drawn = [batch(seed) for seed in range(2)]
    prompts = tuple(prompt for part in drawn for prompt in part.prompts or ())
    labels = torch.cat([part.labels for part in drawn])
    return MemoryImages(torch.cat([part.images for part in drawn]), labels, CLASSES, prompts)


def made(kind: str = "text") -> tuple[nn.Module, DenoisingTask]:
    model, spec = create(describe(ModelConfig(weights=str(folder_of(kind)))), CLASSES)
    return model.double(), DenoisingTask(spec, dtype=torch.float64, sample_steps=2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def run(plan: FineTuneStrategy, model: nn.Module, task: DenoisingTask) -> list[float]:
    losses: list[float] = []
    torch.manual_seed(SEED)
    found = loop_of(plan)(model, plan, task, images(), generator(), lambda step, loss: losses.append(loss))
    assert found is model
    return losses


def written_out(model: nn.Module, parameters: list[Tensor], loss: Callable[[], Tensor]) -> list[float]:
    """The loop of the scripts: AdamW, gradients clipped at 1."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    losses = []
    torch.manual_seed(SEED)
    for _ in range(STEPS):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def mse(reference: Reference, model: nn.Module, part: Batch) -> Tensor:
    predicted, noise = reference.predicted(model, dict(model.named_parameters()), part)
    return (predicted - noise).square().mean()


@pytest.mark.parametrize("scope", ["all", "cross_attention"])
def test_the_whole_network_or_its_cross_attention(scope: str) -> None:
    model, task = made()
    other, reference = copy.deepcopy(model).train(), Reference("text")
    stream = batches(images(), 2, generator())
    moving = [part for name, part in other.named_parameters() if scope == "all" or ".attn2." in name]
    expected = written_out(other, moving, lambda: mse(reference, other, next(stream)))
    assert run(replace(PLAN, scope=scope), model, task) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)


def test_dreambooth_adds_the_loss_of_what_the_model_drew_before() -> None:
    model, task = made()
    other, reference = copy.deepcopy(model), Reference("text")
    draws = generator()
    seed = int(torch.randint(2**31, (), generator=draws))
    prompts = tuple(f"a photo of a {name}" for name in CLASSES)
    drawn = task.sample(other, 6, seed, prompts)
    prior = MemoryImages(drawn, torch.arange(6) % 3, CLASSES, tuple(islice(cycle(prompts), 6)))
    own, others = batches(images(), 2, draws), batches(prior, 2, torch.Generator().manual_seed(seed))
    other.train()
    expected = written_out(
        other, list(other.parameters()), lambda: mse(reference, other, next(own)) + mse(reference, other, next(others))
    )
    assert run(replace(PLAN, loop="dreambooth"), model, task) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)


def test_textual_inversion_trains_the_embedding_of_a_new_word_alone() -> None:
    """As the script: the tokenizer learns a word, and only its row of the text encoder's table moves."""
    model, task = made()
    before, reference = state_of(model), Reference("text")
    pipe = reference.pipe
    pipe.tokenizer.add_tokens("<new>")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    known = pipe.tokenizer(" ".join(CLASSES), add_special_tokens=False).input_ids
    word = table.detach()[known].mean(0).requires_grad_()
    pipe.text_encoder.requires_grad_(False)
    number = pipe.tokenizer.convert_tokens_to_ids("<new>")
    stream = batches(images(), 2, generator())

    def loss() -> Tensor:
        rows = torch.cat([table.detach()[:number], word[None]])
        ids = pipe.tokenizer("a photo of <new>", padding="max_length", max_length=20, return_tensors="pt").input_ids
        functional = torch.func.functional_call
        name = next(name for name, part in pipe.text_encoder.named_parameters() if part.shape == table.shape)
        states = functional(pipe.text_encoder, {name: rows}, (ids,))[0]
        part = next(stream)
        clean = reference.latents(part.images)
        timesteps = torch.randint(20, (len(clean),))
        noise = torch.randn_like(clean)
        noised = pipe.scheduler.add_noise(clean, noise, timesteps)
        output = model.eval()(noised, timesteps, states.expand(len(clean), -1, -1), return_dict=False)[0]
        return (output - noise).square().mean()

    expected = written_out(model, [word], loss)
    points: list[float] = []
    plan = replace(PLAN, loop="textual_inversion")
    torch.manual_seed(SEED)
    loop_of(plan)(model, plan, task, images(), generator(), lambda step, loss: points.append(loss))
    assert points == pytest.approx(expected, rel=1e-9)
    assert_same_state(model, before)
    one, another = (task.evaluate(model, replace_prompts(text)) for text in ("a photo of a cat", "b"))
    assert one == another != task.evaluate(made()[0], replace_prompts("a photo of a cat"))


def replace_prompts(text: str) -> MemoryImages:
    own = images()
    return MemoryImages(own.images, own.labels, own.classes, (text,) * len(own))


LAYERS = {
    "attention": {"to_q", "to_k", "to_v", "to_out.0"},
    "transformer": {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"},
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["text", "text-xl", "classes"])
def test_adapters_lie_where_the_scripts_put_them(kind: str, layers: str) -> None:
    model, _ = made(kind)
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    add_adapters(model, 4, layers, set())
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")
    }
    assert adapted == {name for name in linear if name.endswith(tuple(f".{end}" for end in LAYERS[layers]))}


REFUSED: dict[str, tuple[str, str, str]] = {
    "a word for two encoders": ("text-xl", "textual_inversion", "2 text encoders"),
    "a word for classes": ("classes", "textual_inversion", "needs a text-to-image model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_that_does_not_fit_is_refused(name: str) -> None:
    kind, loop, said = REFUSED[name]
    model, task = made(kind)
    with pytest.raises(UserError, match=said):
        run(replace(PLAN, loop=loop), model, task)
