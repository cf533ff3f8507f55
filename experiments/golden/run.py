"""Record short runs to the bit, through the command line, and compare later ones with the record.

    OMP_NUM_THREADS=1 python experiments/golden/run.py experiments/golden/golden.json             # record
    OMP_NUM_THREADS=1 python experiments/golden/run.py --compare experiments/golden/golden.json   # print what differs

The comparison exits with 1 if anything differs; names of runs behind it (`tar audit`) leave out the others.

A run's weights are recorded as a hash of each tensor of its checkpoint, an audit as the test value of each attempt.
Bits depend on torch and on the CPU's instructions, which are recorded too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

COMMON = (
    "threads=1 tracking=disabled guard.tolerance=100 domain.original.per_class=40 domain.original.test_per_class=20 "
    "domain.restricted.per_class=20 domain.restricted.test_per_class=20"
)
CLASSIFIER = f"experiment=quickstart {COMMON}"
DENOISER = (
    f"experiment=quickstart_diffusion {COMMON} "
    "model=unet16_tiny pretrain.lr=2.0e-3 method.fts_lr=0.0003 method.fts_original_weight=6.0"
)
PROTECT = "method.rounds=3 method.ntr_steps=2 sampler.steps=[3,4]"
AUDIT = "attack.seeds=1 attack.eval_points=2 attack.masking.heads=[]"

# name, verb, its overrides, the run that is the reference; an audit also names the run whose checkpoint it attacks
RUNS: list[tuple[str, str, str, str, str]] = [
    ("classifier", "pretrain", f"{CLASSIFIER} pretrain.steps=20", "", ""),
    ("sophon_klu", "protect", f"{CLASSIFIER} {PROTECT} method=sophon_klu", "classifier", ""),
    (
        "sophon_klu_second_order",
        "protect",
        f"{CLASSIFIER} {PROTECT} method=sophon_klu method.engine=second_order",
        "classifier",
        "",
    ),
    ("pool_fixed", "protect", f"{CLASSIFIER} {PROTECT} method=pool_fixed method.rounds=6", "classifier", ""),
    ("pool_anchored", "protect", f"{CLASSIFIER} {PROTECT} method.rounds=6", "classifier", ""),
    ("coordinates", "protect", f"{CLASSIFIER} {PROTECT} method=coordinates", "classifier", ""),
    ("clamp_pool", "protect", f"{CLASSIFIER} {PROTECT} method=clamp_pool", "classifier", ""),
    ("tar", "protect", f"{CLASSIFIER} {PROTECT} method=tar sampler=tar", "classifier", ""),
    ("denoiser", "pretrain", f"{DENOISER} pretrain.steps=10", "", ""),
    ("sophon_dos", "protect", f"{DENOISER} {PROTECT} method=sophon_dos", "denoiser", ""),
    (
        "sophon_dos_second_order",
        "protect",
        f"{DENOISER} {PROTECT} method=sophon_dos method.engine=second_order",
        "denoiser",
        "",
    ),
    (
        "audit",
        "audit",
        f"{CLASSIFIER} {AUDIT} attack=smoke +attack.strategies.lora="
        "{optimizer:adam,lr:0.005,steps:40,batch_size:64,scope:lora,lora_rank:4}",
        "classifier",
        "sophon_klu",
    ),
    (
        "audit_denoiser",
        "audit",
        f"{DENOISER} {AUDIT} attack.samples=0 attack.frechet_samples=0 attack.roles=[protected,unprotected] "
        "attack.strategies.momentum_1e-2_160.steps=24 attack.strategies.adam_1e-3_160.steps=24",
        "denoiser",
        "sophon_dos",
    ),
]


def tensors(checkpoint: Path) -> dict[str, str]:
    """Return a hash of each tensor of a checkpoint folder, by name, of its dtype, shape and bytes."""
    hashes = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
                content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                hashes[name] = hashlib.sha256(head + content).hexdigest()[:16]
    return hashes


def attempts(run_dir: Path) -> dict[str, float]:
    """Return the test value of each attempt of an audit, by attack, role and seed."""
    records = [json.loads(path.read_text()) for path in sorted((run_dir / "attempts").glob("*.json"))]
    return {f"{record['attack']} {record['role']} {record['seed']}": record["test"] for record in records}


def result(name: str, verb: str, overrides: str, reference: str, attacked: str) -> dict[str, Any]:
    """Run one command in the current folder and return its values; ``{"failed": last line}`` if it fails."""
    command = [sys.executable, "-m", "sophon", verb, *overrides.split(), f"run_dir={name}"]
    command += [f"reference={reference}/checkpoint"] if reference else []
    command += [f"checkpoint={attacked}/checkpoint"] if attacked else []
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{name}: exit code {done.returncode}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return attempts(Path(name)) if verb == "audit" else tensors(Path(name, "checkpoint"))


def record(names: list[str]) -> dict[str, Any]:
    """Do the named runs (all if none is named) and those they need in a temporary folder and return the record."""
    home, needed = Path.cwd(), set(names or [run[0] for run in RUNS])
    for name, _, _, reference, attacked in reversed(RUNS):
        needed |= {reference, attacked} if name in needed else set()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs = {run[0]: result(*run) for run in RUNS if run[0] in needed}
        os.chdir(home)
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "runs": runs}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a line for each value that differs between two records."""
    lines = [
        f"{key}: {before[key]} -> {after[key]} (bits may differ for this alone)"
        for key in ("torch", "cpu")
        if before[key] != after[key]
    ]
    for run in after["runs"]:
        old, new = (record["runs"].get(run, {}) for record in (before, after))
        lines += [f"{run} {key}: {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--compare", action="store_true", help="run again and print what differs from the record")
    parser.add_argument("names", nargs="*", help="of the runs to do; all if none is given")
    options = parser.parse_args()
    if not options.compare:
        found = record(options.names)
        options.record.write_text(json.dumps(found, indent=1) + "\n")
        return int(any("failed" in run for run in found["runs"].values()))
    lines = differences(json.loads(options.record.read_text()), record(options.names))
    print("\n".join(lines) if lines else "equal to the bit")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
