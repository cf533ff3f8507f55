"""Attackers of text-to-image models against the steps of diffusers' example scripts, written out, in float64.

The scripts, of diffusers 0.40.0.dev0 (commit 58eb52c): train_text_to_image.py, train_text_to_image_lora.py,
train_dreambooth.py and textual_inversion.py; train_dreambooth_sd3.py for flow matching. Timesteps and noise are the
package's draws, latents the posterior's mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.auditing.lora import add_adapters
from sophon.config import ModelConfig
from sophon.domains import Batch, MemoryImages, batches
from sophon.errors import UserError
from sophon.finetune import loop_of
from sophon.models import create, describe
from sophon.tasks import DenoisingTask
from tests.models.pipelines import CLASSES, KINDS, Reference, batch, folder_of
from tests.tiny import assert_same_state, state_of

SEED, STEPS = 5, 3
SETTINGS = {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.01, "head": "kept"}
UNCLIPPED = FineTuneStrategy(**SETTINGS, batch_size=2, steps=STEPS)
PLAN = replace(UNCLIPPED, max_norm=1.0)
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]


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


def stream() -> Iterator[Batch]:
    return batches(images(), 2, generator())


def run(plan: FineTuneStrategy, model: nn.Module, task: DenoisingTask) -> list[float]:
    losses: list[float] = []
    torch.manual_seed(SEED)
    found = loop_of(plan)(model, plan, task, images(), generator(), lambda step, loss: losses.append(loss))
    assert found is model
    return losses


def script(
    moving: Iterable[nn.Parameter],
    loss: Callable[[], Iterable[Tensor]],
    clip: float | None = 1.0,
    after: Callable[[], object] = lambda: None,
) -> list[float]:
    """The loop that the scripts share: the losses of a step are accumulated, then AdamW steps at a constant rate."""
    parameters = list(moving)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rate = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=STEPS)
    curve = []
    torch.manual_seed(SEED)
    for _ in range(STEPS):
        values = list(loss())
        for value in values:
            (value / len(values)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        after()
        curve.append(sum(value.item() for value in values) / len(values))
    return curve


def mse(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.double(), target.double(), reduction="mean")


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("text", "all"), ("text", "cross_attention"), pytest.param("flow", "all", marks=pytest.mark.slow)],
)
def test_train_text_to_image(kind: str, scope: str) -> None:
    """A batch of one accumulated twice, clipped at 1, averaged by diffusers' own `EMAModel`."""
    model, task = made(kind)
    other, reference, parts = copy.deepcopy(model).train(), Reference(kind), stream()
    moving = [part for name, part in other.named_parameters() if scope == "all" or ".attn2." in name]
    averaged = EMAModel(other.parameters(), decay=0.5, model_cls=type(other), model_config=other.config)

    def loss() -> Iterator[Tensor]:
        for each in reference.noised(next(parts)).split():
            yield mse(other(each.latents, **each.told, return_dict=False)[0], each.target)

    expected = script(moving, loss, after=lambda: averaged.step(other.parameters()))
    averaged.copy_to(other.parameters())
    assert run(replace(PLAN, scope=scope, ema=0.5), model, task) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_train_text_to_image_lora() -> None:
    model, task = made()
    other, reference, parts = copy.deepcopy(model).train(), Reference("text"), stream()
    other.requires_grad_(False)
    torch.manual_seed(SEED)
    settings = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=ATTENTION)
    other.add_adapter(settings)  # type: ignore[operator]

    def loss() -> Iterator[Tensor]:
        each = reference.noised(next(parts))
        yield mse(other(each.latents, **each.told, return_dict=False)[0], each.target)

    moving = [part for part in other.parameters() if part.requires_grad]
    torch.manual_seed(SEED)
    add_adapters(model, 4, "attention", set(), "diffusers")
    expected = script(moving, loss)
    assert run(replace(PLAN, scope="lora"), model, task) == pytest.approx(expected, rel=1e-9)
    for name, part in model.state_dict().items():
        torch.testing.assert_close(part, other.state_dict()[name], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_train_dreambooth() -> None:
    """The model's own drawings of the class are the other half of each batch, with a loss of weight 1."""
    model, task = made()
    other, reference, draws = copy.deepcopy(model), Reference("text"), generator()
    seed = int(torch.randint(2**31, (), generator=draws))
    prompts = tuple(f"a photo of a {name}" for name in CLASSES)
    drawn = task.sample(other, 6, seed, prompts)
    prior = MemoryImages(drawn, torch.arange(6) % 3, CLASSES, tuple(islice(cycle(prompts), 6)))
    own, others = batches(images(), 2, draws), batches(prior, 2, torch.Generator().manual_seed(seed))
    other.train()

    def loss() -> Iterator[Tensor]:
        each = reference.noised(next(own)).joined(reference.noised(next(others)))
        output, output_prior = other(each.latents, **each.told, return_dict=False)[0].chunk(2)
        target, target_prior = each.target.chunk(2)
        yield mse(output, target) + 1.0 * mse(output_prior, target_prior)

    expected = script(other.parameters(), loss)
    assert run(replace(PLAN, loop="dreambooth"), model, task) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_textual_inversion() -> None:
    """The tokenizer learns a word; the whole table is trained, and all rows but the word's are put back each step."""
    model, task = made()
    before, reference, parts = state_of(model), Reference("text"), stream()
    words, encoder = reference.pipe.tokenizer, reference.pipe.text_encoder
    known = words(" ".join(CLASSES), add_special_tokens=False).input_ids
    words.add_tokens("<new>")
    encoder.resize_token_embeddings(len(words), mean_resizing=False)
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings().weight.requires_grad_()
    table.data[-1] = table.data[known].mean(0)
    kept = table.data.clone()
    text = ("a photo of <new>",) * 2

    def loss() -> Iterator[Tensor]:
        each = reference.noised(next(parts)._replace(prompts=text))
        yield mse(model.eval()(each.latents, **each.told, return_dict=False)[0], each.target)

    def put_back() -> None:
        table.data[:-1] = kept[:-1]

    model.requires_grad_(False)
    expected = script([table], loss, clip=None, after=put_back)
    assert run(replace(UNCLIPPED, loop="textual_inversion"), model, task) == pytest.approx(expected, rel=1e-9)
    assert_same_state(model, before)
    one, another = (task.evaluate(model, replace_prompts(text)) for text in ("a photo of a cat", "b"))
    assert one == another != task.evaluate(made()[0], replace_prompts("a photo of a cat"))


def replace_prompts(text: str) -> MemoryImages:
    own = images()
    return MemoryImages(own.images, own.labels, own.classes, (text,) * len(own))


LAYERS = {
    "attention": [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
}
LAYERS["transformer"] = [
    *LAYERS["attention"],
    *(f"{part}.net.{end}" for part in ("ff", "ff_context") for end in ("0.proj", "2")),
]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
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
