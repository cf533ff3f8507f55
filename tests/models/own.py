"""A network of one's own, as a reader of the README has it: convolutions with GroupNorm, and a linear layer ``fc``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(images)))


class GroupNormNet(nn.Module):
    def __init__(self, classes: int = 3, width: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(Block(channels, width), Block(width, 2 * width))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(images).mean((2, 3)))


def read_back(path: Path) -> GroupNormNet:
    """Load what was exported, as its owner does."""
    model = GroupNormNet(3, 8, 3)
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model


class Tokens(nn.Module):
    """Has a parameter that no module of torch's initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.token + images.mean((1, 2, 3))[:, None])


def no_module() -> str:
    return "no module"
