"""Restore global state after a call from Python: random generators, threads, precision, warnings."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def contained() -> Iterator[None]:
    """Restore the process's global state when the block ends."""
    states = random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads(threads)
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
