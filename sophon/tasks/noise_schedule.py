"""DDPM's noise schedule: how images are noised, what the network predicts of it, and DDIM's way back to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Noised(NamedTuple):
    """Images on their way to noise.

    Attributes:
        images: x_t, float [B, C, H, W].
        timesteps: t, int64 [B].
        noise: epsilon, float [B, C, H, W].
        clean: x_0, float [B, C, H, W].
    """

    images: Tensor
    timesteps: Tensor
    noise: Tensor
    clean: Tensor


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
        return Noised(signal * clean + spread * noise, timesteps, noise, clean)

    def draw(self, clean: Tensor, until: int | None = None) -> Noised:
        """Noise x_0 with noise and uniform timesteps below ``until`` (default: all) from the global generator."""
        timesteps = torch.randint(until or len(self), (len(clean),), device=clean.device)
        return self.add_noise(clean, timesteps, torch.randn_like(clean))

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
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
        """Turn noise into images by deterministic DDIM (Song et al., 2021).

        Args:
            noise: x_T, [B, C, H, W].
            steps: of DDIM, at most all timesteps.
            predict: (x_t, t int64 [B]) to the network's output.
        """
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        most = max(1, len(self) - scheduler.config.steps_offset)  # an offset moves the first step beyond the last
        scheduler.set_timesteps(min(steps, most), device=noise.device)
        images = noise
        for timestep in scheduler.timesteps:
            output = predict(images, timestep.expand(len(images)))
            images = scheduler.step(output, timestep, images).prev_sample
        return images
