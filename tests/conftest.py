"""Shared by all tests: one thread, no network, no wandb unless a test asks for it."""

from __future__ import annotations

import os

import pytest
import torch

import sophon  # noqa: F401  (mends torchvision beside a CPU-only torch, before anything imports diffusers)

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
