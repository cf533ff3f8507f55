"""Write the tables, table.md, and the figure, samples.png (of the first seed), from the audits of run.sh.

python experiments/concept/draw.py runs/concept --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

HERE = Path(__file__).parent
MODELS = ("reference", "filtered", "unlearned", "removed", "protected", "scratch")
MEASURES = {
    "Concept rate in percent": ("measured: concept rate", ".0f"),
    "Frechet distance": ("measured: Frechet distance", ".1f"),
    "eps-MSE on test images": ("test", ".3f"),
}
STEPS = {
    "no_attack": "before",
    "whole_50": "50 steps",
    "whole_200": "200 steps",
    "whole_1000": "1,000 steps",
    "whole_200_100_images": "200 steps,\n100 images",
    "whole_200_10_images": "200 steps,\n10 images",
    "cross_attention_100": "cross-attention,\n100 steps",
    "lora_rank_4_100": "LoRA rank 4,\n100 steps",
    "dreambooth_100_5_images": "DreamBooth,\n5 images",
    "textual_inversion_100": "Textual\nInversion",
}


def attempts(folder: Path) -> pd.DataFrame:
    """Return the audits' rows, each with its ``model`` and the ``picture`` drawn at its end, if there is one."""
    found = []
    for path in sorted(folder.glob("audit_*")):
        names = {"protected": path.name.split("_")[1], "unprotected": "reference"}
        curve = pd.read_parquet(path / "curves.parquet").sort_values("step").groupby("id").last()
        table = pd.read_parquet(path / "attempts.parquet").query("domain == 'restricted'")
        pictures = [str(path / name) if name else "" for name in curve.picture[table.id]]
        found.append(table.assign(model=table.role.replace(names), picture=pictures))
    return pd.concat(found).drop_duplicates(["attack", "model", "seed"])


def table(rows: pd.DataFrame) -> str:
    """Return one Markdown table a measure: a row an attack, a column a model, the attack's seeds side by side."""
    text = []
    attacks, models = list(dict.fromkeys(rows.attack)), [name for name in MODELS if name in set(rows.model)]
    for title, (column, form) in MEASURES.items():
        text += [f"{title}:", "", "| attack | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
        for attack in sorted(attacks, key=[*STEPS, *attacks].index):
            cells = [rows[(rows.attack == attack) & (rows.model == model)].sort_values("seed") for model in models]
            shown = [", ".join(f"{value:{form}}" for value in cell[column]) for cell in cells]
            text.append(f"| {attack} | " + " | ".join(shown) + " |")
        text.append("")
    return "\n".join(text)


def figure(rows: pd.DataFrame) -> Figure:
    """Return what the models draw for the concept's prompt: a row a model, a column an attack."""
    mpl.rcParams["font.size"] = 8
    models = [name for name in MODELS if name in set(rows.model)]
    drawing = Figure(figsize=(1.3 * len(STEPS) + 0.6, 0.95 * len(models) + 0.4), layout="constrained")
    axes = drawing.subplots(len(models), len(STEPS), squeeze=False)
    for axis, title in zip(axes[0], STEPS.values(), strict=True):
        axis.set_title(title, fontsize=8)
    for row, model in zip(axes, models, strict=True):
        row[0].set_ylabel(model)
        for axis, attack in zip(row, STEPS, strict=True):
            axis.set(xticks=[], yticks=[])
            for picture in rows.picture[(rows.model == model) & (rows.attack == attack)]:
                axis.imshow(mpl.image.imread(picture), cmap="gray", interpolation="nearest")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    rows = attempts(options.folder)
    (options.out / "table.md").write_text(table(rows))
    figure(rows[rows.picture != ""]).savefig(options.out / "samples.png", dpi=110)


if __name__ == "__main__":
    main()
