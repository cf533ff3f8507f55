"""Take architectures of timm and torchvision through every verb: each works, or one line says why not.

    python experiments/architectures/run.py experiments/architectures/results.md [ARCHITECTURE ...]

Weights are random (two steps of pretraining), images noise: nothing is measured but whether it works.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import sophon  # noqa: F401  (mends torchvision beside a torch without CUDA)

HERE = Path(__file__).parent
ATTACKS = ("lora", "last_blocks", "renormalise", "reinitialise")
COLUMNS = ("architecture", "library", "image size", "pretrain", "protect", "export", "loads alone", *ATTACKS)
# The library and the smallest image size that serves; each is among the smallest of its kind.
ARCHITECTURES: dict[str, tuple[str, int]] = {
    "resnet10t": ("timm", 32),
    "vgg11_bn": ("timm", 32),
    "densenet121": ("timm", 32),
    "regnetx_002": ("timm", 32),
    "mobilenetv3_small_050": ("timm", 32),
    "ghostnet_050": ("timm", 32),
    "convnext_atto": ("timm", 32),
    "inception_next_atto": ("timm", 32),
    "nf_resnet26": ("timm", 32),
    "nfnet_l0": ("timm", 32),
    "vit_tiny_patch16_224": ("timm", 32),
    "deit_tiny_distilled_patch16_224": ("timm", 32),
    "swin_tiny_patch4_window7_224": ("timm", 32),
    "mixer_s32_224": ("timm", 32),
    "maxvit_rmlp_pico_rw_256": ("timm", 64),
    "xcit_nano_12_p16_224": ("timm", 32),
    "poolformer_s12": ("timm", 32),
    "mobilevit_xxs": ("timm", 64),
    "resnet18": ("torchvision", 32),
    "alexnet": ("torchvision", 64),
    "squeezenet1_1": ("torchvision", 32),
    "shufflenet_v2_x0_5": ("torchvision", 32),
    "googlenet": ("torchvision", 32),
    "inception_v3": ("torchvision", 299),
    "efficientnet_b0": ("torchvision", 32),
    "swin_t": ("torchvision", 32),
}


def images(root: Path, classes: tuple[str, ...]) -> None:
    """Write noise as ``train/CLASS/N.png`` and ``test/CLASS/N.png``."""
    generator = torch.Generator().manual_seed(0)
    for side, count in (("train", 20), ("test", 4)):
        for name in classes:
            (root / side / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / side / name / f"{index}.png")


def command(folder: Path, verb: str, *overrides: str) -> str:
    """Run a verb; return ``yes``, the one line of its refusal, or what broke."""
    done = subprocess.run(
        [sys.executable, "-m", "sophon", verb, *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines() or [""]
    if done.returncode == 0:
        return "yes"
    return lines[-1].removeprefix("sophon: ") if "Traceback" not in done.stderr else f"BROKEN: {lines[-1]}"


def loads_alone(checkpoint: Path, size: int) -> str:
    """Run the model card's own code, which names the library alone."""
    code = re.findall(r"```python\n(.*?)```", (checkpoint / "README.md").read_text(), re.DOTALL)[0]
    scope = {"images": None}
    exec(
        f"import torch\nimages = torch.zeros(2, 3, {size}, {size})\n" + code.replace("PATH", str(checkpoint)),
        scope,
    )
    logits = scope["logits"]
    assert isinstance(logits, torch.Tensor)
    return "yes" if logits.shape == (2, 2) and bool(logits.isfinite().all()) else "BROKEN: logits"


def examine(architecture: str, folder: Path) -> dict[str, str]:
    """Return a row of the table: what each step came to, up to the first that does not work."""
    library, size = ARCHITECTURES[architecture]
    images(folder / "original", ("cat", "dog"))
    images(folder / "restricted", ("fox", "owl"))
    model_args = "{init_weights: false}" if architecture in ("googlenet", "inception_v3") else "{}"
    common = (
        "name=x", "model=resnet18", f"model.library={library}", f"model.architecture={architecture}",
        f"++model.model_args={model_args}", f"model.image_size={size}", "tracking=disabled", "threads=1",
        *(f"domain@domain.{role}=cifar10_folder" for role in ("original", "restricted")),
        *(f"domain.{role}.root={role}" for role in ("original", "restricted")),
    )  # fmt: skip
    steps = {
        "pretrain": ("pretrain.steps=2", "pretrain.batch_size=4", "pretrain.lr=1e-4"),
        "protect": (
            *("method.rounds=1", "method.ntr_steps=1", "method.ntr_batch_size=4", "method.query_batch_size=4"),
            *("sampler.steps=[1,2]", "sampler.batch_sizes=[4]", "guard.tolerance=100", "guard.repair_steps=0"),
        ),
        "export": ("out=out",),
        "audit": (f"--config-dir={HERE / 'conf'}", "attack=four"),
    }
    row = {"architecture": architecture, "library": library, "image size": str(size)}
    for verb, overrides in steps.items():
        row[verb] = command(folder, verb, *common, *overrides)
        if row[verb] != "yes":
            return row
        if verb == "export":
            row["loads alone"] = loads_alone(folder / "out", size)
    [summary] = [json.loads(path.read_text()) for path in folder.glob("runs/**/audit.json")]
    return row | dict.fromkeys(ATTACKS, "yes") | summary["left_out"]


def table(rows: list[dict[str, str]]) -> str:
    """Return the rows as a Markdown table; reasons are its notes."""
    notes: list[str] = []

    def cell(text: str) -> str:
        if text in ("yes", "") or (len(text) < 40 and not text.startswith("BROKEN")):
            return text
        if text not in notes:
            notes.append(text)
        return f"no ({notes.index(text) + 1})"

    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [
        f"| {' | '.join(cell(row.get(name, row.get('audit', '') if name in ATTACKS else '')) for name in COLUMNS)} |"
        for row in rows
    ]
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""])


def main(out: Path, *chosen: str) -> None:
    rows = []
    for architecture in chosen or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(examine(architecture, Path(folder)))
        print(rows[-1], flush=True)
        out.write_text(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
