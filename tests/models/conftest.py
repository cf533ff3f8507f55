"""For the tests of models: diffusers keeps quiet."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

import sophon  # noqa: F401 - before any test imports diffusers: it mends torchvision where torch has no CUDA


@pytest.fixture(autouse=True)
def _no_advice() -> Iterator[None]:
    """Fail where diffusers would write its warnings or its advice on the user's terminal."""
    logger, handler, said = logging.getLogger("diffusers"), logging.Handler(), []
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not said
