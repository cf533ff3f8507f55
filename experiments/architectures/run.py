"""Take architectures of timm and torchvision through every verb: each works, or one line says why not.

    python experiments/architectures/run.py experiments/architectures/results.md [ARCHITECTURE ...]

Weights are random (two steps of pretraining), images noise: nothing is measured but whether it works.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from sophon import cli

HERE = Path(__file__).parent
ATTACKS = ("lora", "last_blocks", "renormalise", "reinitialise")
COLUMNS = ("architecture", "library", "image size", "pretrain", "protect", "export", "loads alone", *ATTACKS)
# Each is among the smallest of its kind; behind some stands the smallest image size that serves, where it is not 32.
LIBRARIES = {
    "timm": (
        "resnet10t densenet121 regnetx_002 mobilenetv3_small_050 ghostnet_050 convnext_atto "
        "inception_next_atto nf_regnet_b0 test_nfnet vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 "
        "mixer_s32_224 xcit_nano_12_p16_224 poolformer_s12 edgenext_xx_small levit_128s "
        "maxvit_rmlp_pico_rw_256=64 mobilevit_xxs=64 "
    ),
    "torchvision": (
        "resnet18 mnasnet0_5 efficientnet_b0 regnet_y_400mf squeezenet1_1 shufflenet_v2_x0_5 swin_t googlenet "
        "inception_v3=299 "
    ),
}
# Looking for masking takes passes of 128 images, which at large sizes take longer than everything else together.
NO_MASKING = ("attack.masking.heads=[]",)
ARCHITECTURES: dict[str, tuple[str, int]] = {
    name: (library, int(size or 32))
    for library, names in LIBRARIES.items()
    for name, _, size in (each.partition("=") for each in names.split())
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


def command(folder: Path, *arguments: str) -> str:
    """Run a verb in this process; return ``yes``, the one line of its refusal, or what broke."""
    err = io.StringIO()
    sys.argv = ["sophon"]
    GlobalHydra.instance().clear()
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            code = cli._main(list(arguments))
        except Exception as error:
            return f"BROKEN: {type(error).__name__}: {' '.join(str(error).split())}"
    return err.getvalue().splitlines()[-1].removeprefix("sophon: ") if code else "yes"


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
        *(f"domain@domain.{role}=folder" for role in ("original", "restricted")),
        *(f"domain.{role}.root={role}" for role in ("original", "restricted")),
    )  # fmt: skip
    steps = {
        "pretrain": ("pretrain.steps=2", "pretrain.batch_size=4", "pretrain.lr=1e-4"),
        "protect": (
            *("method.rounds=1", "method.ntr_steps=1", "method.ntr_batch_size=4", "method.query_batch_size=4"),
            *("sampler.steps=[1,2]", "sampler.batch_sizes=[4]", "guard.tolerance=100", "guard.repair_steps=0"),
        ),
        "export": ("out=out",),
        "audit": (f"--config-dir={HERE / 'conf'}", "attack=four", *(NO_MASKING if size > 64 else ())),
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
        print(f"{time.process_time():.0f} s", rows[-1], flush=True)
        out.write_text(table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
