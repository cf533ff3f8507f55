"""Three of the architectures of experiments/architectures, one of which no verb takes, through every verb."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "architectures" / "run.py"
pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("default")  # libraries' own, of architectures that they consider old
@pytest.mark.parametrize(
    ("architecture", "refusal"),
    [("test_nfnet", None), ("googlenet", None), ("squeezenet1_1", "does not end in one linear layer")],
)
def test_every_step_works_or_one_line_says_why_not(architecture: str, refusal: str | None, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    row = script.examine(architecture, tmp_path)
    if refusal is None:
        assert {row.get(name) for name in script.COLUMNS[3:]} == {"yes"}, row
    else:
        assert refusal in row["pretrain"]
    assert "| no (1) |" in script.table([row]) or refusal is None
