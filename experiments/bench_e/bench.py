"""Pre-train, remove, attack: one row after the other, and a table of what came of them. See README.md.

    python experiments/bench_e/bench.py runs/bench_e --seeds 0 --rows unlearn undo_06 fresh_half

The same command goes on where it stopped. A row that no round of satisfies the guard is a result.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

HERE = Path(__file__).parent
DONE, NO_CHECKPOINT = 0, 3  # exit codes that are results
STUDENT = ("method=distil", "method.stages.distil.rounds=108")


def sophon(verb: str, run_dir: Path, *overrides: str) -> int:
    """Run a verb on one thread, unless it was run before; return its exit code. Its processor time is kept."""
    outcome = run_dir / f"{verb}.seconds.json"
    if outcome.exists():
        return int(json.loads(outcome.read_text())["exit_code"])
    shared = ("experiment=bench_e", "device=cpu", "threads=1", "tracking=disabled", f"run_dir='{run_dir}'")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sophon", verb, f"--config-dir={HERE / 'conf'}", *shared, *overrides]
    code = subprocess.run(command, check=False).returncode
    if code not in (DONE, NO_CHECKPOINT):
        sys.exit(f"bench: {run_dir}: sophon {verb} ended with {code}; the same command goes on")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    outcome.write_text(json.dumps({"exit_code": code, "core_seconds": round(seconds, 1)}) + "\n")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the bench's folder")
    parser.add_argument("--rows", nargs="+", help="rows of rows.yaml; all if none is given")
    parser.add_argument("--knowing", nargs="*", default=[], help="rows that attackers who know attack, too")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    rows = OmegaConf.to_container(OmegaConf.load(HERE / "rows.yaml"))
    for seed in options.seeds:
        folder, seeded = options.runs / f"seed{seed}", f"seed={seed}"
        reference, filtered, student = (folder / name for name in ("reference", "filtered", "filtered_student"))
        sophon("pretrain", reference, seeded, "domain.pretrained_on=both")
        sophon("pretrain", filtered, seeded)
        sophon("protect", student, seeded, *STUDENT, "guard.tolerance=5", f"reference='{filtered}'")
        known = (seeded, f"reference='{reference}'", f"filtered=['{filtered}','{student}']")
        controls = folder / "controls"
        sophon("audit", controls, *known, f"checkpoint='{reference}'", "attack.roles=[unprotected,scratch]")
        for name in options.rows or rows:
            made = folder / name
            code = sophon("protect", made, seeded, "guard.tolerance=5", f"reference='{reference}'", *rows[name])
            if code == DONE:
                audit = folder / f"{name}_audit"
                sophon("audit", audit, *known, f"checkpoint='{made}'", f"attack.reuse=['{controls}']")
            if code == DONE and name in options.knowing:
                reuse = sorted(str(path.parent) for path in folder.glob("*_knowing/audit.json"))[:1]
                knowing = (f"checkpoint='{made}'", "attack=bench_e_knowing", f"attack.reuse={reuse}")
                sophon("audit", folder / f"{name}_knowing", *known, *knowing)


if __name__ == "__main__":
    main()
