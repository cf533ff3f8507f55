"""Run the worked examples of docs/extending.md.

An example is a paragraph that begins in bold, with the code blocks up to the next such paragraph. A block with a
comment ``# path/of/file.yaml`` among its lines becomes that file; the lines of a ``console`` block run in the same
folder, which is on the Python path and holds a reference and a protected checkpoint of `quickstart`: ``sophon ...``
at the tests' size, or ``python FILE``. To add one, write it there and, if need be, a function of its folder into
`BEFORE` or `AFTER`.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli_helpers import SMALL, image_folder, load, sophon

GUIDE = (Path(__file__).parents[1] / "docs/extending.md").read_text()
EXAMPLES = {
    part.split("**")[1]: blocks
    for part in re.split(r"^(?=\*\*)", GUIDE, flags=re.MULTILINE)
    if (blocks := re.findall(r"^```(\w+)\n(.*?)^```", part, re.DOTALL | re.MULTILINE))
}
SIZES = {  # what is added to a command to make it small
    "pretrain": (*SMALL, "pretrain.steps=5"),
    "protect": (*SMALL, "method.rounds=2", "method.ntr_steps=2", "method.ntr_batch_size=16", "guard.tolerance=100"),
    "audit": (*SMALL, "attack=nothing", "attack.eval_points=2"),
    "export": (),
}


def an_attack(folder: Path) -> None:
    (attack,) = load(folder / "runs/quickstart/seed0/audit/audit.json")["attacks"]
    assert attack["attack"] == "flipped"
    assert attack["strategy"]["surgery"] == [{"operation": "my_attacks.flip_signs", "fraction": 0.05}]
    assert set(attack["roles"]) == {"protected", "unprotected", "scratch"}
    assert "surgery" in attack["outside"]


def a_loss(folder: Path) -> None:
    assert load(folder / "runs/margin/checkpoint/sophon.json")["method"]["suppression_loss"] == "my_losses.margin"


def an_objective(folder: Path) -> None:
    asked = load(folder / "runs/short_steps/checkpoint/sophon.json")["method"]["objectives"]
    assert list(asked) == ["suppression", "short_steps"]


def a_stage(folder: Path) -> None:
    manifest = load(folder / "runs/noisy/checkpoint/sophon.json")
    assert [stage["name"] for stage in manifest["stages"]] == ["noise", "alternate"]
    assert manifest["history"]["rounds"] == 1 + 2


def an_optimizer(folder: Path) -> None:
    (attack,) = load(folder / "runs/quickstart/seed0/audit/audit.json")["attacks"]
    assert attack["strategy"]["optimizer_args"] == {"beta": 0.95}
    assert "optimizer" in attack["outside"]


def a_loop(folder: Path) -> None:
    (attack,) = load(folder / "runs/quickstart/seed0/audit/audit.json")["attacks"]
    assert attack["strategy"]["loop"] == "my_loops.sharpness"
    assert "loop" in attack["outside"]


def a_data_set(folder: Path) -> None:
    manifest = load(folder / "runs/cats/checkpoint/sophon.json")
    assert manifest["domains"]["restricted"]["classes"] == ["cat", "dog"]


def a_model(folder: Path) -> None:
    import timm

    loaded = timm.create_model("local-dir:" + str(folder / "release"), pretrained=True)
    assert type(loaded).__name__ == "MobileNetV3"
    assert loaded.conv_stem.in_channels == 1


def a_model_of_your_own(folder: Path) -> None:
    from safetensors.torch import load_file

    scope = runpy.run_path(str(folder / "my_nets.py"))
    scope["Plain"]().load_state_dict(load_file(folder / "release/model.safetensors"))
    assert load(folder / "release/sophon.json")["config"]["model"]["head"] == "fc"


BEFORE: dict[str, Callable[[Path], object]] = {"A data set": lambda folder: image_folder(folder / "data/cats")}
AFTER: dict[str, Callable[[Path], None]] = {
    "An attack": an_attack,
    "An optimizer": an_optimizer,
    "An attack loop": a_loop,
    "A suppression loss": a_loss,
    "An objective": an_objective,
    "A stage": a_stage,
    "A data set": a_data_set,
    "A model": a_model,
    "A model of your own": a_model_of_your_own,
}


def run(folder: Path, line: str) -> None:
    """Run one line of a console block."""
    command, *words = shlex.split(line)
    if command == "python":
        with contextlib.chdir(folder):
            runpy.run_path(words[0], run_name="__main__")
        return
    assert command == "sophon", f"{line}: an example runs sophon or python"
    result = sophon(folder, *words, *SIZES[words[0]])
    assert result.code == 0, result


@pytest.mark.slow
@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_does_what_it_says(title: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    for language, text in EXAMPLES[title]:
        for path in re.findall(r"^# (\S+\.\w+)$", text, re.MULTILINE)[: language != "console"]:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
    # an example of an attack brings its own; the demo's take a minute
    nothing = tmp_path / "mine/attack/nothing.yaml"
    nothing.parent.mkdir(parents=True, exist_ok=True)
    nothing.write_text("seeds: 1\nmasking: {heads: []}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    BEFORE.get(title, lambda folder: None)(tmp_path)
    try:
        for language, text in EXAMPLES[title]:
            for line in text.splitlines() if language == "console" else ():
                run(tmp_path, line)
    finally:
        for name in set(sys.modules) - known:  # the next example may name a file alike
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    AFTER.get(title, lambda folder: None)(tmp_path)


def test_what_is_checked_afterwards_is_in_the_guide() -> None:
    assert {*BEFORE, *AFTER} <= set(EXAMPLES)
