"""Run the commands of README and docs/ in their order, on tiny data and with small settings; write log.md.

    PYTHONPATH=. python experiments/docs_commands/run.py             # all pages
    PYTHONPATH=. python experiments/docs_commands/run.py docs/models # one; the others' lines of the log stay

What a page calls `path/to/...` or `DIR` is made here from random images and weights. Settings that only make a command
small are added at its end. Commands that other tests run as they stand, or that need data or machines which are not
here, are listed with the reason. Exits with 1 if a command does not end as its page says.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.test_docs import commands

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = ("README", "docs/quickstart", "docs/audit", "docs/models", "docs/data", "docs/scaling", "docs/extending")
BUNDLED = " ".join(
    f"domain.{role}.{key}" for role in ("original", "restricted") for key in ("per_class=40", "test_per_class=20")
)
ROUNDS = (
    "method.rounds=2 method.ntr_steps=1 method.ntr_batch_size=8 method.query_batch_size=8 sampler.steps=[1,2] "
    "sampler.batch_sizes=[8] guard.every=1 guard.tolerance=100"
)
ATTACKS = "attack.seeds=1 attack.eval_points=2"
SHORTER = {"pretrain": "pretrain.steps=20 pretrain.batch_size=16", "protect": ROUNDS, "audit": ATTACKS}
ONE = "{one:{optimizer:adam,lr:1.0e-3,steps:2,batch_size:8}}"
CODES = {"gate.": (0, 4)}  # a gate that does not hold ends with 4
ELSEWHERE = {
    r"^docs/extending": "tests/test_extending.py runs it as it stands",
    r"(name|runs/|sd-)=?sd": "tests/test_latent_commands.py runs it as it stands",
    r"experiment=(cifar10|paper)": "needs CIFAR-10 or larger data; composed by tests/test_docs.py",
    r"--multirun": "needs a cluster",
}
BEFORE = {  # what a page expects to be there already, by the first words of a command
    "sophon report compare": (
        "sophon audit experiment=quickstart seed=1 attack=smoke reference=runs/quickstart/seed0/pretrain "
        "checkpoint=runs/quickstart/seed0/protect",
    ),
    "sophon sample checkpoint=runs/quickstart_diffusion": (
        "sophon pretrain experiment=quickstart_diffusion",
        "sophon protect experiment=quickstart_diffusion",
    ),
}


def images(folder: Path, seed: int) -> None:
    """Write random images of two classes."""
    draws = np.random.default_rng(seed)
    for side, count in {"train": 60, "test": 20}.items():
        for name in ("cat", "dog"):
            (folder / side / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / side / name / f"{number}.png")


def prepare(folder: Path) -> None:
    """Make what pages call their reader's own: images, timm's folder of a model, two state dicts."""
    for number, name in enumerate(("path/to/original", "path/to/restricted", "DIR")):
        images(folder / name, number)
    import timm  # after sophon, which mends torchvision's usual wheel beside a torch for CPUs

    torch.manual_seed(0)
    small = timm.create_model("resnet18", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    timm.models.save_for_hf(small, folder / "path/to/weights", safe_serialization=True)
    large = timm.create_model("resnet50", num_classes=2)
    for name in ("original", "theirs"):
        save_file(large.state_dict(), folder / f"{name}.safetensors")


def shortened(command: str) -> str:
    """Return the overrides that make a command small; none that it has itself."""
    verb = command.split()[1]
    more = SHORTER.get(verb, "").split()
    if verb in SHORTER and "domain@" not in command:
        more += BUNDLED.split()
    if verb in SHORTER:
        more += ["tracking.progress=false"]
    given = {word.split("=")[0] for word in shlex.split(command)}
    if verb == "audit" and "domain@" in command:
        more += ["attack.masking.heads=[]", f"attack.strategies={ONE}"]
    if "attack=standard" in command:  # of a ResNet-50
        more += ["attack=smoke", "model.image_size=32"]
    return " ".join(word for word in more if word.split("=")[0] not in given - {"attack", "method.rounds"})


def run(command: str, folder: Path) -> tuple[int, float, str]:
    """Run a command; return its exit code, seconds, and the last line that it printed."""
    words = shlex.split(command, comments=True)
    if {"attack=standard", "attack=smoke"} <= set(words):
        words.remove("attack=standard")
    if sum(word.startswith("method.rounds=") for word in words) > 1:
        words.remove(next(word for word in words if word.startswith("method.rounds=")))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode, time.monotonic() - began, lines[-1]


def rows(folder: Path, pages: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the page, the command, how it ended, and what shortened it or why it was not run."""
    for page in pages:
        for command in commands(ROOT / f"{page}.md"):
            reason = next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, f"{page} {command}")), None)
            if reason:
                yield page, command, "-", reason
                continue
            for first in next((firsts for start, firsts in BEFORE.items() if command.startswith(start)), ()):
                run(f"{first} {shortened(first)}", folder)
            if command.startswith("sophon audit"):  # one suite's audit does not go on as another's
                shutil.rmtree(folder / "runs/quickstart/seed0/audit", ignore_errors=True)
            if "method=pool_anchored" in command:  # nor one method's run as another's
                shutil.rmtree(folder / "runs/mine/seed0/protect", ignore_errors=True)
            small = shortened(command)
            code, seconds, last = run(f"{command} {small}", folder)
            allowed = next((codes for key, codes in CODES.items() if key in command), (0,))
            ended = f"{code}, {seconds:.0f} s" if code in allowed else f"**{code}**: {last}"
            print(f"{page}: {command}: {ended}", flush=True)
            yield page, command, ended, small
            if command.endswith("out=release") and "audit=" in command:  # pages go on with README's release
                shutil.copytree(
                    folder / "runs/quickstart/seed0/pretrain/checkpoint", folder / "reference", dirs_exist_ok=True
                )


def main() -> None:
    pages = sys.argv[1:] or PAGES
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        table = list(rows(Path(name), pages))
    lines = {page: [] for page in PAGES}
    for page, command, ended, small in table:
        lines[page].append(f"| {page} | `{command}` | {ended} | {f'`{small}`' if ended != '-' and small else small} |")
    log = HERE / "log.md"
    for line in log.read_text().splitlines()[2:] if log.exists() else ():
        if (page := line.split(" | ")[0].removeprefix("| ")) not in pages:
            lines[page].append(line)
    head = ["| page | command | exit code, time | made small by, or why not run |", "|---|---|---|---|"]
    log.write_text("\n".join([*head, *(line for page in PAGES for line in lines[page])]) + "\n")
    sys.exit(any("**" in ended for _, _, ended, _ in table))


if __name__ == "__main__":
    main()
