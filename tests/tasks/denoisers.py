"""Small denoisers that record what they are asked, or know the answer, for the tests of the denoising task."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sophon.domains import Batch, ImageSet, MemoryImages
from sophon.models import ModelSpec, build
from sophon.tasks import DenoisingTask

CLASSES = ("a", "b", "c")
SIZE, STEPS = 8, 20
PIXELS = SIZE * SIZE
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULE = {"num_train_timesteps": STEPS, "beta_schedule": "linear"}
NETWORK = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
BLOCKS = {
    "plain": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}


def spec(kind: str = "epsilon", *, conditional: bool = False, blocks: str = "attention", **schedule: Any) -> ModelSpec:
    network = NETWORK | BLOCKS[blocks] | ({"num_class_embeds": len(CLASSES)} if conditional else {})
    schedule = SCHEDULE | {"prediction_type": kind} | schedule
    return ModelSpec("diffusers", "UNet2DModel", CLASSES, 1, SIZE, (0.5,), (0.5,), network, schedule)


def task_of(of: ModelSpec, **options: Any) -> DenoisingTask:
    return DenoisingTask(of, **({"dtype": torch.float64} | options))


def unet(of: ModelSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build(of).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_of(per_class: int = 10, seed: int = 0) -> ImageSet:
    """Return random images sorted by class."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(labels), 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return MemoryImages(pixels, labels, CLASSES)


def batch_of(size: int = 12, seed: int = 1) -> Batch:
    images = images_of(size // len(CLASSES), seed)
    return Batch(images.images, images.labels)


def scales(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a_t) and sqrt(1 - a_t), [B, 1, 1, 1], as diffusers has them."""
    kept = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


class Recorder(nn.Module):
    """Remembers what it was asked; its answer is a multiple of x_t that a parameter sets (zero at first)."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.images: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.labels: list[Tensor | None] = []
        self.modes: list[tuple[bool, bool]] = []

    def answer(self, images: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        return self.factor * images

    def forward(
        self, images: Tensor, timesteps: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        assert not return_dict
        self.images.append(images.detach().clone())
        self.timesteps.append(timesteps.clone())
        self.labels.append(class_labels)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return (self.answer(images, timesteps, class_labels),)

    def noise(self, clean: Tensor) -> Tensor:
        """Work out the noise of the last question from x_t and the clean images."""
        signal, spread = scales(self.timesteps[-1])
        return (self.images[-1] - signal * clean) / spread


class Oracle(Recorder):
    """Knows the clean image (of each class), and says what the prediction type asks for."""

    def __init__(self, kind: str, clean: Tensor) -> None:
        super().__init__()
        self.kind, self.clean = kind, clean

    def answer(self, images: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        clean = self.clean[labels] if labels is not None else self.clean.expand_as(images)
        signal, spread = scales(timesteps)
        noise = (images - signal * clean) / spread
        velocity = DDPMScheduler(**SCHEDULE).get_velocity(clean, noise, timesteps)
        return {"epsilon": noise, "v_prediction": velocity, "sample": clean}[self.kind]


def pixel(value: int, count: int = 1) -> Tensor:
    return torch.full((count, 1, SIZE, SIZE), value, dtype=torch.uint8)


def hooked(model: nn.Module) -> Recorder:
    """Let a recorder see what ``model`` is asked."""
    seen = Recorder()
    model.register_forward_hook(
        lambda module, arguments, named, output: seen.train(module.training)(*arguments, **named) and None,
        with_kwargs=True,
    )
    return seen


def written_out(kind: str, model: nn.Module, seen: Recorder, clean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output and target, predicted and true noise of the last question that ``model`` was asked."""
    x, t, labels = seen.images[-1], seen.timesteps[-1], seen.labels[-1]
    signal, spread = scales(t)
    noise = seen.noise(clean)
    output = model(x, t, class_labels=labels, return_dict=False)[0]
    if kind == "epsilon":
        return output, noise, output, noise
    if kind == "sample":
        return output, clean, (x - signal * output) / spread, noise
    return output, signal * noise - spread * clean, signal * output + spread * x, noise
