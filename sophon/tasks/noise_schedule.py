"""Noise schedules: how images are noised, what the network predicts of it, and the sampler's way back to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Noised(NamedTuple):
    """Images on their way to noise.

    Attributes:
        images: x_t, float [B, C, H, W].
        timesteps: t, int64 [B], from little noise to much.
        noise: epsilon, float [B, C, H, W].
        clean: x_0, float [B, C, H, W].
        told: what the network is told of t, [B].
    """

    images: Tensor
    timesteps: Tensor
    noise: Tensor
    clean: Tensor
    told: Tensor


class NoiseSchedule:
    """The forward process of DDPM (Ho et al., 2020); its length is the number of timesteps.

    Args:
        settings: of diffusers' `DDPMScheduler`.
        dtype: of images and noise.
    """

    def __init__(self, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        from diffusers import DDPMScheduler  # not above: classifiers need not wait for it

        self.scheduler = DDPMScheduler.from_config(dict(settings))
        self.dtype = dtype
        self._signal = self.scheduler.alphas_cumprod.to(torch.float64)
        self._predicted = self.scheduler.config.prediction_type

    def __len__(self) -> int:
        return len(self._signal)

    def add_noise(self, clean: Tensor, timesteps: Tensor, noise: Tensor) -> Noised:
        """Noise x_0 to x_t: sqrt(a_t) x_0 + sqrt(1 - a_t) epsilon, a_t the scheduler's cumulative product."""
        signal, spread = self._scales(timesteps)
        return Noised(signal * clean + spread * noise, timesteps, noise, clean, self._told(timesteps))

    def draw(self, clean: Tensor, until: int | None = None) -> Noised:
        """Noise x_0 with noise and uniform timesteps below ``until`` (default: all) from the global generator."""
        timesteps = torch.randint(until or len(self), (len(clean),), device=clean.device)
        return self.add_noise(clean, timesteps, torch.randn_like(clean))

    def _told(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of x_0 and of epsilon in x_t, [B, 1, 1, 1]."""
        kept = self._signal.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt().to(self.dtype), (1 - kept).sqrt().to(self.dtype)

    def target(self, noised: Noised) -> Tensor:
        """Return what the network is trained to predict: noise, velocity or clean images; [B, C, H, W]."""
        if self._predicted == "epsilon":
            return noised.noise
        signal, spread = self._scales(noised.timesteps)
        return signal * noised.noise - spread * noised.clean if self._predicted == "v_prediction" else noised.clean

    def as_noise(self, output: Tensor, noised: Noised) -> Tensor:
        """Turn the network's output into the noise that it implies; [B, C, H, W]."""
        if self._predicted == "epsilon":
            return output
        signal, spread = self._scales(noised.timesteps)
        if self._predicted == "v_prediction":
            return signal * output + spread * noised.images
        return (noised.images - signal * output) / spread

    def denoise(self, noise: Tensor, steps: int, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Turn noise into images by deterministic DDIM (Song et al., 2021), or Euler's steps of a flow.

        Args:
            noise: x_T, [B, C, H, W].
            steps: of the sampler, at most all timesteps.
            predict: (x_t, what the network is told of t [B]) to the network's output.
        """
        scheduler, most = self._sampler()
        scheduler.set_timesteps(min(steps, most), device=noise.device)
        images = noise
        for timestep in scheduler.timesteps:
            output = predict(images, timestep.expand(len(images)))
            images = scheduler.step(output, timestep, images).prev_sample
        return images

    def _sampler(self) -> tuple[Any, int]:
        """Return a fresh sampler and the most steps that it takes."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        return scheduler, max(1, len(self) - scheduler.config.steps_offset)  # an offset moves the first step on


class FlowSchedule(NoiseSchedule):
    """Flow matching as in Stable Diffusion 3 (Esser et al., 2024, arXiv 2403.03206).

    x_t = (1 - sigma_t) x_0 + sigma_t epsilon, the network predicts the velocity epsilon - x_0 and is told sigma_t times
    the number of timesteps; their logits are drawn from a standard normal distribution before ``shift`` moves sigma.

    Args:
        settings: ``num_train_timesteps`` and ``shift`` of diffusers' `FlowMatchEulerDiscreteScheduler`.
        dtype: of images and noise.
    """

    def __init__(self, settings: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler(settings["num_train_timesteps"], settings["shift"])
        self.dtype = dtype
        self._signal = 1 - self.scheduler.sigmas.to(torch.float64).flip(0)

    def draw(self, clean: Tensor, until: int | None = None) -> Noised:
        """Noise x_0 with noise and timesteps below ``until`` (default: all) from the global generator."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        count = until or len(self)
        place = {"batch_size": len(clean), "device": clean.device}
        drawn = compute_density_for_timestep_sampling("logit_normal", logit_mean=0.0, logit_std=1.0, **place)
        return self.add_noise(clean, count - 1 - (drawn * count).long(), torch.randn_like(clean))

    def _told(self, timesteps: Tensor) -> Tensor:
        told: Tensor = self.scheduler.timesteps.flip(0).to(timesteps.device)[timesteps]
        return told

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        signal = self._signal.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return signal.to(self.dtype), (1 - signal).to(self.dtype)

    def target(self, noised: Noised) -> Tensor:
        """Return the velocity, [B, C, H, W]."""
        return noised.noise - noised.clean

    def as_noise(self, output: Tensor, noised: Noised) -> Tensor:
        """Turn a velocity into the noise that it implies; [B, C, H, W]."""
        return noised.images + self._scales(noised.timesteps)[0] * output

    def _sampler(self) -> tuple[Any, int]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config), len(self)


def noise_schedule(settings: Mapping[str, Any], dtype: torch.dtype) -> NoiseSchedule:
    """Make the schedule that a spec's ``scheduler`` describes."""
    return (FlowSchedule if settings.get("prediction_type") == "flow" else NoiseSchedule)(settings, dtype)
