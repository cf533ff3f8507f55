"""Shared by all tests: one thread, no network, no wandb unless a test asks for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import sophon  # noqa: F401  (mends torchvision beside a CPU-only torch, before anything imports diffusers)

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# neither a loaded machine nor coverage is a fault of the code
settings.register_profile("suite", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch  # not by the process that only hands out tests

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pretrain and protect have run; never written to again."""
    from tests.cli_helpers import make  # most tests run no command

    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def audited(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that folder in which audit has run, too; never written to again."""
    from tests.cli_helpers import AUDIT
    from tests.cli_helpers import sophon as command

    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("audited") / "copy"))
    result = command(folder, *AUDIT)
    assert result.code == 0, result
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of ``made`` to write to."""
    return Path(shutil.copytree(made, tmp_path / "copied"))
