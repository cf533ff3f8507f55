"""Protect, stop at each budget of processor time, export and audit what there is by then.

    python experiments/bench_f/run.py runs/bench_f --seeds 0 1 2 --minutes 1 4 15

A seed is one run, which goes on after each audit; the same command goes on where it stopped. All processor time of
`sophon protect` counts, its start-up too. A budget at which the guard has accepted nothing yet has no audit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STOPPED, NO_CHECKPOINT = 130, 3  # exit codes that are results
TICKS = os.sysconf("SC_CLK_TCK")


def start(options: argparse.Namespace, verb: str, *overrides: str) -> subprocess.Popen[bytes]:
    """Start a verb on one thread."""
    shared = (f"experiment={options.experiment}", "device=cpu", "threads=1", "tracking=disabled", *options.set)
    return subprocess.Popen(
        [sys.executable, "-m", "sophon", verb, f"--config-dir={HERE / 'conf'}", *shared, *overrides]
    )


def sophon(options: argparse.Namespace, verb: str, *overrides: str) -> int:
    """Run a verb; return its exit code, 0 or that there is no checkpoint."""
    code = start(options, verb, *overrides).wait()
    if code not in (0, NO_CHECKPOINT):
        sys.exit(f"bench_f: sophon {verb} ended with {code}; the same command goes on")
    return code


def begun_from(options: argparse.Namespace) -> list[str]:
    """Return the override that lets protection start elsewhere than at the bench's reference."""
    return [f"reference='{options.start}'"] if options.start else []


def protect(options: argparse.Namespace, folder: Path, seed: int, seconds: float) -> float:
    """Protect, or go on, for so much processor time; return what it took."""
    process = start(options, "protect", f"run_dir='{folder}'", f"seed={seed}", *begun_from(options))
    used = 0.0
    while process.poll() is None:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        used = (int(fields[11]) + int(fields[12])) / TICKS
        if used >= seconds:
            process.send_signal(signal.SIGINT)
            process.wait()
        time.sleep(0.2)
    if process.returncode != STOPPED:
        sys.exit(f"bench_f: sophon protect ended with {process.returncode}; the same command goes on")
    return used


def audit(options: argparse.Namespace, folder: Path, *overrides: str) -> None:
    """Audit once; all audits have one seed, so that they share the attempts against the reference and scratch."""
    if not (folder / "audit.json").exists():
        sophon(options, "audit", f"run_dir='{folder}'", "seed=0", *overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the bench's folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 4, 15], help="budgets")
    parser.add_argument("--row", default="pool_anchored", help="name of the runs, for other settings by --set")
    parser.add_argument("--experiment", default="bench_f")
    parser.add_argument("--start", metavar="CHECKPOINT", help="protect this one, not the reference, which audits keep")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every command")
    options = parser.parse_args()
    controls = options.runs / "controls"
    reference = options.runs / "seed0" / "pretrain"
    audit(options, controls, "attack.roles=[unprotected,scratch]", f"checkpoint='{reference}'")
    for seed in options.seeds:
        run, spent = options.runs / options.row / f"seed{seed}", 0.0
        for minutes in sorted(options.minutes):
            folder = run / f"{minutes:g}min"
            facts = folder / "budget.json"
            if not facts.exists():
                folder.mkdir(parents=True, exist_ok=True)
                used = spent + protect(options, run / "protect", seed, 60 * minutes - spent)
                paths = (f"checkpoint='{run / 'protect'}'", f"out='{folder / 'export'}'")
                code = sophon(options, "export", *paths, *begun_from(options))
                facts.write_text(json.dumps({"seconds": used, "exit_code": code}) + "\n")
            budget = json.loads(facts.read_text())
            spent = budget["seconds"]
            if not budget["exit_code"]:
                checkpoint = f"checkpoint='{folder / 'export'}'"
                audit(options, folder / "audit", checkpoint, f"attack.reuse=['{controls}']")


if __name__ == "__main__":
    main()
