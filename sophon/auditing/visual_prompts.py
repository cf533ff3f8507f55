"""The attack loop of visual prompt tuning: learned tokens beside an image's own, in front of a frozen transformer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sophon.attacker import FineTuneStrategy
from sophon.domains import ImageSet
from sophon.errors import UserError
from sophon.finetune import OnStep, fine_tune
from sophon.models.partition import attention
from sophon.tasks import Task, evaluating

TOKENS = 10


def visual_prompts(
    model: nn.Module,
    strategy: FineTuneStrategy,
    task: Task,
    images: ImageSet,
    generator: torch.Generator,
    on_step: OnStep,
) -> nn.Module:
    """Train `TOKENS` prompts and the head alone (VPT-shallow: Jia et al., 2022, arXiv 2203.12119).

    The prompts follow the image's tokens into the first block, so the class token stays where it is; they begin as
    normal noise of deviation 0.02. As part of the head they are what the scope ``head`` trains: all else is frozen.

    Raises:
        UserError: the model is no classifier whose blocks take tokens [B, T, D].
    """
    block, width = _entrance(model, task, images)
    first = next(model.parameters())
    noise = torch.randn(1, TOKENS, width, generator=generator) * 0.02
    prompts = nn.Parameter(noise.to(first.device, first.dtype))
    model.get_submodule(task.adapter.heads[0]).register_parameter("prompts", prompts)

    def prompted(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.cat([inputs[0], prompts.expand(len(inputs[0]), -1, -1)], 1), *inputs[1:]

    block.register_forward_pre_hook(prompted)
    return fine_tune(model, replace(strategy, scope="head"), task, images, generator, on_step)


def _entrance(model: nn.Module, task: Task, images: ImageSet) -> tuple[nn.Module, int]:
    """Return the first of a transformer's blocks, and the width of its tokens."""
    stacks = (part for part in model.modules() if isinstance(part, nn.ModuleList | nn.Sequential) and len(part))
    first_blocks = (part[0] for part in stacks if any(attention(block) for block in part))
    block, entries = next(first_blocks, None), []
    if block is not None:
        hook = block.register_forward_pre_hook(lambda _, inputs: entries.append(inputs[0]))
        with evaluating(model):
            task.features(model, images.first(1).images)
        hook.remove()
    if block is None or not entries or not isinstance(entries[0], Tensor) or entries[0].dim() != 3:
        raise UserError("loop: 'visual_prompts' needs a vision transformer whose blocks take tokens; use fine_tune")
    return block, entries[0].shape[-1]
