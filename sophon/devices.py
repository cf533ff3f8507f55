"""Devices by their names."""

from __future__ import annotations

import torch

from sophon.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device; ``auto`` prefers CUDA.

    Raises:
        UserError: the name is unknown or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not (index.isascii() and index.isdigit()))):
        raise UserError(f"device: '{name}' is not known; allowed: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: '{name}' is not available; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)
