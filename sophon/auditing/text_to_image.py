"""Attack loops of text-to-image models: DreamBooth with prior preservation, and Textual Inversion."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import Batch, ImageSet, MemoryImages, batches
from sophon.errors import UserError
from sophon.finetune import OnStep, fine_tune
from sophon.models.concept import Concept
from sophon.tasks import Task

PRIOR_IMAGES = 200  # as the example script of diffusers recommends
PRIOR_PROMPT = "a photo of a {}"


def dreambooth(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    on_step: OnStep,
) -> nn.Module:
    """Fine-tune with prior preservation (DreamBooth: Ruiz et al., 2023, arXiv 2208.12242).

    Before the first step the model draws images of the classes' names (`PRIOR_PROMPT`), at most `PRIOR_IMAGES` and no
    more than are used. A batch of them joins each of the attacker's, with the same weight. The attacker's images go
    with the domain's prompt, which should name what is new by a rare word: "a photo of a sks {class}".

    Raises:
        UserError: the model generates nothing.
    """
    count = min(PRIOR_IMAGES, max(1, strategy.steps * strategy.batch_size))
    prompts = tuple(PRIOR_PROMPT.format(name) for name in images.classes)
    seed = int(torch.randint(2**31, (), generator=generator))
    samples = task.sample(model, count, seed, prompts)
    if samples is None:
        raise UserError("loop: 'dreambooth' needs a model that generates images; use fine_tune")
    device = images.labels.device
    labels = torch.arange(count, device=device) % len(prompts)
    prior = MemoryImages(samples.to(device), labels, images.classes, tuple(islice(cycle(prompts), count)))
    stream = batches(prior, strategy.batch_size, torch.Generator().manual_seed(seed))

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return task.attacker_loss(network, batch) + task.attacker_loss(network, next(stream))

    return fine_tune(model, strategy, task, images, generator, on_step, loss=loss)


def textual_inversion(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    on_step: OnStep,
) -> nn.Module:
    """Train the embedding of a new word alone (Textual Inversion: Gal et al., 2022, arXiv 2208.01618).

    One word stands for the whole domain: from here on the model is told "a photo of *" whatever the prompt. The
    network's weights stay as they are.

    Raises:
        UserError: the model has not exactly one text encoder.
    """
    frozen = task.adapter.frozen
    if frozen is None or not frozen.reads_prompts:
        raise UserError("loop: 'textual_inversion' needs a text-to-image model; use fine_tune")
    concept = Concept(model.requires_grad_(False).eval(), frozen, images.classes)
    fine_tune(concept, replace(strategy, scope="all"), task, images, generator, on_step)
    return model
