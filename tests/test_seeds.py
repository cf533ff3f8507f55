import random

import numpy as np
import pytest
import torch

from sophon.devices import resolve_device
from sophon.errors import UserError
from sophon.seeds import derive_seed, seed_all


def test_derived_seeds_are_pinned_distinct_and_in_range():
    assert derive_seed("a", 1) == derive_seed("a", 1)
    assert derive_seed("a", 1) != derive_seed("a", "1")
    assert derive_seed("ab") != derive_seed("a", "b")
    assert all(0 <= derive_seed(n) < 2**63 for n in range(200))
    # Pinned, because seeds that drift between processes or versions would silently unpair resumed runs.
    assert derive_seed("trial", 3) == 2541830553584509582


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_seed_all_repeats_every_generator(seed):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_all(seed)
    first = draw()
    assert draw() != first
    seed_all(seed)
    assert draw() == first


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device: 'cuda:2' is not available"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(UserError, match="device: 'cuda' is not available"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UserError, match=f"device: '{name}' is not known; allowed: auto, cpu, cuda"):
        resolve_device(name)
