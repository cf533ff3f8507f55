"""Denoising diffusion and flow matching: the objective, a fixed error to measure by, and samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophon import losses
from sophon.attacker import SCOPES
from sophon.config import MethodConfig, TaskConfig
from sophon.domains import Batch, ImageSet
from sophon.errors import UserError, choose
from sophon.models import ModelSpec
from sophon.models.partition import owned
from sophon.tasks.inputs import Inputs
from sophon.tasks.noise_schedule import Noised, noise_schedule
from sophon.tasks.task import Measured, Metric, Task, evaluating, within_scope

Conditions = Mapping[str, Tensor]


class DenoisingTask(Task):
    """Denoising diffusion (DDPM, Ho et al., 2020); the primary metric is the error of the predicted noise.

    Args:
        spec: the model's; its scheduler says how images are noised and what the network predicts.
        suppression_timesteps: part of the noise schedule, from its start, that the suppression loss draws from.
        evaluation_images: at most so many (image, timestep, noise) triples are measured.
        sample_steps: DDIM steps of a generated image.
        gradient_checkpointing: compute activations again on the way back.
        frozen_dtype: torch's name of the type that autoencoder and text encoders compute in; None for ``dtype``.
        dtype: of the images; float64 serves gradient checks.
    """

    kind = "denoising"
    suppression_losses = losses.DENOISING_SUPPRESSION_LOSSES
    metric = Metric("eps-MSE", "", higher_is_better=False)
    reads_labels = False
    suspects = "model.scheduler, model.image_size, the range and the order of the colour channels"
    most_bands = 4

    def __init__(
        self,
        spec: ModelSpec,
        *,
        suppression_loss: str | None = None,
        suppression_timesteps: float = 1.0,
        distillation: float = 0.0,
        evaluation_images: int = 1000,
        sample_steps: int = 25,
        gradient_checkpointing: bool = False,
        frozen_dtype: str | None = None,
        amp: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(spec, suppression_loss, distillation, amp)
        self.evaluation_images = evaluation_images
        self.sample_steps = sample_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.dtype = dtype
        self.schedule = noise_schedule(spec.scheduler, dtype)
        frozen = None if frozen_dtype is None else getattr(torch, frozen_dtype)
        self.inputs = Inputs(self.adapter, spec.image_size, dtype, frozen)
        self.evaluation_batch_size = 250 if self.adapter.frozen is None else 16  # networks on latents are large
        self._suppressed = max(1, round(suppression_timesteps * len(self.schedule)))

    @classmethod
    def from_config(cls, spec: ModelSpec, settings: TaskConfig, method: MethodConfig | None, *, amp: bool) -> Self:
        """Make the task of a run; ``method`` is None where nothing is protected."""
        shared = {name: value for name, value in vars(settings).items() if name != "name"}
        if method is not None:
            names = ("suppression_loss", "suppression_timesteps", "distillation")
            shared |= {name: getattr(method, name) for name in names}
        return cls(spec, **shared, amp=amp)

    def prepare(self, images: Tensor) -> Tensor:
        """Return x_0 of uint8 images [B, C, H, W]: scaled to -1 .. 1, or the latents of that."""
        return self.inputs.clean(images)

    def warm(self, batch: Batch) -> None:
        """Make latents and embeddings of a batch, which later passes over it find made."""
        self.prepare(batch.images)
        self.inputs.conditions(batch)

    def _output(self, model: nn.Module, images: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Return what the network says: noise, velocity or clean images, as the scheduler has it; [B, C, H, W]."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            output = self.adapter.forward(model, images, timesteps=timesteps, **conditions)
        return output.float() if self.amp else output

    def _ask(self, model: nn.Module, batch: Batch, until: int | None = None) -> tuple[Tensor, Noised, Conditions]:
        """Return what the network says of a batch that is noised anew, and what it was asked."""
        noised, conditions = self.schedule.draw(self.prepare(batch.images), until), self.inputs.conditions(batch)
        return self._output(model, noised.images, noised.told, conditions), noised, conditions

    def _teach(self, reference: nn.Module, noised: Noised, conditions: Conditions) -> Tensor:
        with evaluating(reference):
            return self._output(reference, noised.images, noised.told, conditions)

    def attacker_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean squared error of the scheduler's target at drawn timesteps (DDPM's simple loss)."""
        output, noised, _ = self._ask(model, batch)
        return F.mse_loss(output, self.schedule.target(noised))

    def suppression_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the configured suppression loss of the predicted noise."""
        output, noised, _ = self._ask(model, batch, self._suppressed)
        return self._suppress(self.schedule.as_noise(output, noised), noised.noise)

    def original_loss(
        self, model: nn.Module, batch: Batch, reference: nn.Module | None = None, labels: float = 1.0
    ) -> Tensor:
        """Return DDPM's loss times ``labels``, plus the weighted squared distance to the reference's output."""
        output, noised, conditions = self._ask(model, batch)
        loss = labels * F.mse_loss(output, self.schedule.target(noised))
        if reference is None or self.distillation == 0:
            return loss
        return loss + self.distillation * F.mse_loss(output, self._teach(reference, noised, conditions))

    def imitation_loss(self, model: nn.Module, batch: Batch, reference: nn.Module) -> Tensor:
        """Return the squared distance to the reference's output on freshly noised images; labels are not read.

        Where there are classes, both networks are asked for ones drawn uniformly among the reference's.
        """
        noised = self.schedule.draw(self.prepare(batch.images))
        labels = torch.randint(max(1, self._classes(reference)), (len(batch.images),), device=batch.images.device)
        conditions = self.inputs.conditions(batch._replace(labels=labels))
        output = self._output(model, noised.images, noised.told, conditions)
        return F.mse_loss(output, self._teach(reference, noised, conditions))

    def erasure_loss(
        self, model: nn.Module, batch: Batch, reference: nn.Module, base: Batch, guidance: float
    ) -> Tensor:
        """Return the squared distance to the reference's output under negative guidance (ESD, arXiv 2303.07345)."""
        output, noised, conditions = self._ask(model, batch)
        unasked, asked = (self._teach(reference, noised, told) for told in (self.inputs.conditions(base), conditions))
        return F.mse_loss(output, unasked - guidance * (asked - unasked))

    def chance_loss(self, model: nn.Module) -> float:
        """Return 1: the mean square of unit noise, which is the error of predicting none."""
        return 1.0

    def evaluate(self, model: nn.Module, images: ImageSet) -> float:
        """Return the mean squared error of the predicted noise over the images' fixed triples."""
        return float(self._errors(model, images)[1].mean())

    def measure(self, model: nn.Module, images: ImageSet) -> Measured:
        """Return the mean squared error with its sampling error over the images.

        Timesteps are spread evenly over the images, not drawn, so their share of the scatter is no sampling error: the
        variance comes from successive differences along the timesteps, the usual estimate for a systematic sample.
        """
        timesteps, errors = self._errors(model, images)
        steps = errors[timesteps.argsort()].diff()
        variance = float(steps.square().mean()) / 2 if len(steps) else math.nan
        return Measured(float(errors.mean()), math.sqrt(variance / len(errors)), len(errors))

    def chance(self, images: ImageSet) -> Measured:
        """Return the error of predicting no noise, about 1, over the images' fixed triples."""
        noises = [noised.noise.double() for noised, _ in self._triples(images)]
        squares = torch.cat([noise.square().mean((1, 2, 3)).cpu() for noise in noises])
        return Measured(float(squares.mean()), float(squares.std()) / math.sqrt(len(squares)), len(squares))

    def details(self, model: nn.Module, images: ImageSet) -> dict[str, float]:
        """Return the same error by band of timesteps, from little noise to much."""
        timesteps, errors = self._errors(model, images)
        bands = min(self.most_bands, len(self.schedule))
        edges = [round(len(self.schedule) * band / bands) for band in range(bands + 1)]
        return {
            f"eps-MSE t {low}-{high - 1}": float(errors[(timesteps >= low) & (timesteps < high)].mean())
            for low, high in pairwise(edges)
        }

    def _errors(self, model: nn.Module, images: ImageSet) -> tuple[Tensor, Tensor]:
        """Return the timestep (int64 [N]) and the mean squared error (float64 [N]) of every fixed triple."""
        timesteps, errors = [], []
        with evaluating(model):
            for noised, conditions in self._triples(images):
                output = self._output(model, noised.images, noised.told, conditions)
                squared = (self.schedule.as_noise(output, noised) - noised.noise).double().square()
                timesteps.append(noised.timesteps.cpu())
                errors.append(squared.mean((1, 2, 3)).cpu())
        return torch.cat(timesteps), torch.cat(errors)

    def _triples(self, images: ImageSet) -> Iterator[tuple[Noised, dict[str, Tensor]]]:
        """Give (image, timestep, noise) triples, the same ones every time.

        Images are taken evenly from the whole set; the timesteps are spread evenly over them in a shuffled order, so
        that a set sorted by class meets every timestep. All is drawn on the CPU: the same on every device.
        """
        count = min(len(images), self.evaluation_images)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.arange(count) * len(images) // count
        timesteps = torch.randperm(count, generator=generator) * len(self.schedule) // count
        noise = torch.randn((count, *self.adapter.input_shape), generator=generator, dtype=torch.float32)
        parts = torch.split(torch.arange(count), self.evaluation_batch_size)
        for part, batch in zip(parts, images.stream(chosen[part] for part in parts), strict=True):
            clean = self.prepare(batch.images)
            noised = self.schedule.add_noise(clean, timesteps[part].to(clean.device), noise[part].to(clean))
            yield noised, self.inputs.conditions(batch)

    def sample(self, model: nn.Module, count: int, seed: int, prompts: Sequence[str] = ()) -> Tensor:
        """Generate images by deterministic DDIM, or a flow's Euler steps; the same seed starts from the same noise.

        A class-conditional model gets its classes in turn, a text-to-image model the prompts: empty ones if there are
        none. Nothing is guided.

        Returns:
            uint8 [count, C, H, W] on the CPU.
        """
        generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        noise = torch.randn(count, *self.adapter.input_shape, generator=generator, dtype=torch.float32).to(
            device, self.dtype
        )
        labels = torch.arange(count, device=device) % max(1, self._classes(model))
        texts = tuple(islice(cycle(prompts or ("",)), count))
        size = self.evaluation_batch_size
        parts = []
        with evaluating(model):
            for start in range(0, count, size):
                chosen = slice(start, start + size)
                conditions = self.inputs.conditions(Batch(noise[chosen], labels[chosen], texts[chosen]))
                predict = partial(self._output, model, conditions=conditions)
                parts.append(self.inputs.images(self.schedule.denoise(noise[chosen], self.sample_steps, predict)))
        return torch.cat(parts)

    def train_mode(self, model: nn.Module, scope: str, blocks: int = 1) -> dict[str, nn.Parameter]:
        """Put the model in training mode; return the parameters that ``scope`` trains, by name.

        The class embedding enters with the input: it moves with ``first_blocks`` but not with ``last_blocks``.

        Raises:
            UserError: the model has nothing of that scope, or fewer ``blocks``.
        """
        choose("scope", scope, SCOPES)
        names = within_scope(self, model, scope, blocks)
        if scope in ("head", "first_blocks", "lora"):
            names |= self.head_names(model)
        if not names:
            raise UserError(
                f"scope: '{scope}' trains nothing of this denoiser; it has no such layers; use all or last_blocks"
            )
        model.train()
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        return {name: parameter for name, parameter in model.named_parameters() if name in names}

    def head_names(self, model: nn.Module) -> set[str]:
        """Name the class embedding's parameters: all that belongs to a domain; none if the model has no classes."""
        names = {name for name, _ in model.named_parameters()}
        return owned(names, self.adapter.heads) if self._classes(model) else set()

    def _classes(self, model: nn.Module) -> int:
        """Return how many classes the model is conditioned on; 0 for an unconditional one."""
        return self.adapter.classes_in(model) or 0

    def start_head(self, model: nn.Module, head: str, classes: Sequence[str]) -> None:
        """Replace the class embedding unless it is ``kept``.

        Raises:
            UserError: the model has no classes to embed anew, or is to keep another number of them.
        """
        count = self._classes(model)
        if head != "kept" and not count:
            raise UserError(
                f"head: '{head}' needs a class-conditional denoiser; this one has no classes; allowed: kept"
            )
        if head != "kept":
            self.adapter.start_head(model, classes)
        elif count:
            self._require_classes(count, classes)
