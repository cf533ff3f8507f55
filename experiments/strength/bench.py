"""Protect with every row of a table under one budget of processor time, and audit what comes of it.

    python experiments/strength/bench.py runs/strength --seeds 0 1 2 --methods sophon_klu pool coordinates

All rows with the first seed, then with the next; the same command goes on where it stopped. A row's rounds are what the
budget buys, told from a short run and one of three times as many rounds. A protection of which no round satisfies the
guard is a result. In the end `sophon report compare` sets all audits side by side. See README.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

HERE = Path(__file__).parent
ACCEPTABLE, NO_CHECKPOINT = 0, 3  # exit codes that are results


def sophon(options: argparse.Namespace, verb: str, run_dir: Path, *overrides: str) -> tuple[int, float]:
    """Run a verb on one thread; return its exit code and the processor time in seconds."""
    shared = (f"experiment={options.experiment}", "device=cpu", "threads=1", "tracking=disabled", *options.set)
    where = (f"--config-dir={HERE / 'conf'}", f"run_dir='{run_dir}'", f"reference='{options.reference}'")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "sophon", verb, *where, *shared, *overrides], check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (ACCEPTABLE, NO_CHECKPOINT):
        sys.exit(f"bench: {run_dir}: sophon {verb} ended with {done.returncode}; the same command goes on")
    return done.returncode, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rounds_of(options: argparse.Namespace, method: str, overrides: list[str]) -> int:
    """Return how many rounds of a method the budget buys; timed once, for all seeds.

    What the two timed runs have in common (start-up, reading images, the last evaluation) is not charged.
    """
    file = options.runs / method / "budget.json"
    if not file.exists():
        seconds = []
        for rounds in (options.looks, 3 * options.looks):
            folder = file.with_name(f"timed_{rounds}")
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted start: only a whole run can be timed
            seconds.append(sophon(options, "protect", folder, *overrides, f"method.rounds={rounds}")[1])
            shutil.rmtree(folder)
        per_round = (seconds[1] - seconds[0]) / (2 * options.looks)
        if per_round <= 0:
            sys.exit(
                f"bench: {method}: {3 * options.looks} rounds took no longer than a third of them; give more --looks"
            )
        budget = {"overrides": overrides, "seconds_per_round": per_round, "rounds": 60 * options.minutes / per_round}
        file.write_text(json.dumps(budget, indent=1) + "\n")
    budget = json.loads(file.read_text())
    if budget["overrides"] != overrides:
        sys.exit(f"bench: {file} was made with {budget['overrides']}; give another folder, or the row another name")
    return max(1, int(budget["rounds"]))


def audit(options: argparse.Namespace, folder: Path, *overrides: str) -> Path:
    """Audit once; all audits have one seed, so that they share the attempts against the reference and scratch."""
    if not (folder / "audit.json").exists():
        sophon(options, "audit", folder, f"attack={options.attack}", "seed=0", *overrides)
    return folder


def cell(options: argparse.Namespace, method: str, overrides: list[str], seed: int, controls: Path) -> Path | None:
    """Protect with a method and a seed and audit it; return the audit's folder, None if there is no checkpoint."""
    folder = options.runs / method / f"seed{seed}"
    outcome = folder / "protect.json"
    if not outcome.exists():
        rounds = rounds_of(options, method, overrides)
        code, seconds = sophon(
            options, "protect", folder / "protect", *overrides, f"method.rounds={rounds}", f"seed={seed}"
        )
        outcome.write_text(json.dumps({"exit_code": code, "core_minutes": seconds / 60, "rounds": rounds}) + "\n")
    if json.loads(outcome.read_text())["exit_code"] == NO_CHECKPOINT:
        return None
    return audit(options, folder / options.attack, f"checkpoint='{folder / 'protect'}'", f"attack.reuse=['{controls}']")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the bench's folder")
    parser.add_argument("--experiment", default="bench_c", help="bench_c or bench_d")
    parser.add_argument("--rows", type=Path, default=HERE / "methods.yaml", help="the table of methods")
    parser.add_argument("--methods", nargs="+", help="rows of it; all of its group `methods` if none is given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="processor time of each defender")
    parser.add_argument("--looks", type=int, default=4, help="rounds of the shorter run by which a method is timed")
    parser.add_argument("--attack", help="instead of the experiment's own, such as bench_c_screen")
    parser.add_argument("--reference", type=Path, help="the unprotected checkpoint, instead of the experiment's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every command")
    options = parser.parse_args()
    options.attack = options.attack or options.experiment
    options.reference = options.reference or Path("runs") / options.experiment / "seed0" / "pretrain"
    groups = OmegaConf.to_container(OmegaConf.load(options.rows))
    rows = {name: row for group in groups.values() for name, row in group.items()}
    controls = audit(
        options,
        options.runs / "controls" / options.attack,
        "attack.roles=[unprotected,scratch]",
        f"checkpoint='{options.reference}'",
    )
    audits = [
        cell(options, method, rows[method], seed, controls)
        for seed in options.seeds
        for method in options.methods or groups["methods"]
    ]
    done = [str(folder) for folder in audits if folder]
    return subprocess.call(
        [sys.executable, "-m", "sophon", "report", "compare", *done, f"out='{options.runs / 'comparison'}'"]
    )


if __name__ == "__main__":
    sys.exit(main())
