"""Seeds: every random choice of a run derives from its own."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: object) -> int:
    """Return a seed in 0 .. 2**63 - 1 that depends on the ``repr`` of every part: the same in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_torch(seed: int) -> None:
    """Seed torch's global generators: the CPU's, and those of CUDA devices that are in use.

    As `torch.manual_seed`, which without a CUDA device notes a traceback for every kind of device and so takes longer
    than some of the steps that are seeded by it.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
