"""Draw README's figure: what an attacker's model reaches in the course of some of the demo's attacks, over seeds.

python experiments/quickstart/curves.py runs/quickstart/seed{4,5,6}/audit
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from sophon.auditing.words import ROLES
from sophon.report.drawing import COLOURS, STYLE, dashes, standalone, svg

PANELS = {
    "momentum_1e-2_fresh": "simulated: momentum 0.01",
    "adam_5e-3_fresh": "simulated: Adam 0.005",
    "nadam_5e-3": "held out: NAdam 0.005",
    "lora_rank_16": "held out: LoRA of rank 16",
    "reset_affine": "knows: affine parameters reset",
    "reinitialise_last_1": "knows: last block made anew",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("audits", type=Path, nargs="+", help="run directories of audits, one a seed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("curves.svg"))
    options = parser.parse_args()
    points = pd.concat(pd.read_parquet(folder / "curves.parquet").assign(run=folder) for folder in options.audits)
    means = points.groupby(["attack", "role", "run", "step"]).select.mean()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        grid = figure.subplots(2, 3, sharex=True, sharey=True)
        for axes, (attack, title) in zip(grid.T.flat, PANELS.items(), strict=True):
            for role in ROLES:
                if role not in means[attack]:
                    continue
                runs = means[attack, role].unstack("run")
                look = {"color": COLOURS[role], "linestyle": dashes(role)}
                axes.plot(runs.index, runs, linewidth=0.7, alpha=0.5, **look)
                axes.plot(runs.index, runs.mean(axis=1), linewidth=2, label=role, **look)
            axes.set_title(title, fontsize=8)
            axes.grid(visible=True, axis="y")
        figure.supxlabel("fine-tuning steps", fontsize=8)
        figure.supylabel("accuracy on the restricted domain (%)", fontsize=8)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        what = "accuracy of attacked models on the restricted domain over fine-tuning steps, six attacks"
        options.out.write_text(standalone(svg(figure, what)))


if __name__ == "__main__":
    main()
