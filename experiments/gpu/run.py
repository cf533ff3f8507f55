"""Measure what only a GPU can show: the paper's setting, precision, a compiled step, two ranks, the `cuda` tests.

    python experiments/gpu/run.py gpu.json                        # on a GPU
    python experiments/gpu/run.py cpu.json --device cpu           # minutes: shows that every part starts

Each part is one row of the file, written when it is done; a part that fails leaves its error there. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import sophon

ROOT = Path(__file__).parents[2]
PAPER = {"model": "caformer_m36", "images": 64, "batch": 150, "steps": 50, "rounds": 800}
STAND_IN = {"model": "resnet10t", "images": 32, "batch": 8, "steps": 2, "rounds": 4}


def random_data(size: int, seed: int) -> sophon.Domain:
    """Return random images of ten classes: they cost what real ones do."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (4000, size, size, 3), dtype=np.uint8)
    return sophon.Domain((images, np.arange(len(images)) % 10))


def seconds(name: str, size: dict[str, Any], device: str, rounds: int, amp: str) -> float:
    """Return the seconds of `sophon.protect` with the paper's loop, from its call to its return."""
    import timm

    model = timm.create_model(name, num_classes=10)
    sampler = {"optimizers": {"sgd": [1e-4, 1e-4]}, "steps": [size["steps"]] * 2, "heads": ["kept"]}
    start = time.perf_counter()
    sophon.protect(
        sophon.adapt(model, image_size=size["images"]),
        original=random_data(size["images"], 0),
        restricted=random_data(size["images"], 1),
        method="sophon_ice",
        attackers=sampler | {"batch_sizes": [size["batch"]]},
        guard={"tolerance": 100.0, "every": 10_000},
        settings={
            "method.rounds": rounds,
            "method.ntr_batch_size": size["batch"],
            "method.query_batch_size": size["batch"],
            "amp": amp,
        },
        device=device,
    )
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def projected(name: str, size: dict[str, Any], device: str, amp: str) -> dict[str, float]:
    """Time a few rounds and a few more; project the whole run by their difference, which leaves out the set-up."""
    few, more = 1, 1 + max(1, size["rounds"] // 40)
    short = seconds(name, size, device, few, amp)
    a_round = (seconds(name, size, device, more, amp) - short) / (more - few)
    return {"seconds a round": a_round, "minutes of all rounds, projected": (short + a_round * size["rounds"]) / 60}


def step(size: dict[str, Any], device: str, amp: bool, mode: str | None) -> dict[str, float]:
    """Return milliseconds of an attacker's step (forward, backward, SGD): eager, compiled, or as CUDA graphs."""
    import timm

    model = timm.create_model("resnet18" if device == "cuda" else size["model"], num_classes=10).to(device)
    images = torch.rand(size["batch"], 3, size["images"], size["images"], device=device)
    labels = torch.arange(size["batch"], device=device) % 10
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    backend = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}  # needs no compiler
    run = torch.compile(model, **backend) if mode else model

    def once() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    turns = 50 if device == "cuda" else 2
    for _ in range(turns):
        once()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(turns):
        once()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"milliseconds a step": (time.perf_counter() - start) * 1e3 / turns}


def two_ranks(device: str) -> dict[str, float]:
    """Protect the demo's model with two processes on one device and with one; return how far the weights are apart."""
    from safetensors.torch import load_file

    small = ["experiment=quickstart", f"device={device}", "guard.tolerance=100", "tracking.progress=false", "amp=none"]
    protect = ["protect", *small, "method.rounds=2", "method.attackers=2", "reference=reference"]
    with tempfile.TemporaryDirectory() as folder:

        def start(*words: str, **environment: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "sophon", *words]
            return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})

        def finish(*processes: subprocess.Popen[bytes]) -> None:
            codes = [process.wait() for process in processes]
            if any(codes):
                raise RuntimeError("a process failed; its message stands above")

        finish(start("pretrain", *small, "pretrain.steps=20", "run_dir=reference"))
        finish(start(*protect, "run_dir=one"))
        group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        finish(*(start(*protect, "run_dir=two", RANK=str(rank), **group) for rank in range(2)))
        one, two = (load_file(f"{folder}/{name}/checkpoint/model.safetensors") for name in ("one", "two"))
        return {"largest difference": max(float((one[name] - two[name]).abs().max()) for name in one)}


def tests() -> dict[str, float]:
    """Run the tests that need a GPU; without one they are skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", str(ROOT / "tests/test_cuda.py")]
    return {"exit code": subprocess.run(command, cwd=ROOT, check=False).returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = options.device
    size = PAPER if device == "cuda" else STAND_IN
    bfloat16 = "cuda" if device == "cuda" else "all"
    small = "resnet18" if device == "cuda" else size["model"]
    parts: dict[str, Callable[[], dict[str, float]]] = {
        f"{small}, all rounds": lambda: {"minutes": seconds(small, size, device, size["rounds"], bfloat16) / 60},
        **{
            f"{size['model']}, amp={amp}": partial(projected, size["model"], size, device, amp)
            for amp in ("none", bfloat16)
        },
        **{
            f"a step, {'bfloat16' if amp else 'float32'}, {mode or 'eager'}": partial(step, size, device, amp, mode)
            for amp in (False, True)
            for mode in (None, "default", "reduce-overhead")
        },
        "two ranks on one device": partial(two_ranks, device),
        "pytest -m cuda": tests,
    }
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, stand-in sizes"
    rows = []
    for name, measure in parts.items():
        try:
            found: dict[str, Any] = measure()
        except Exception as error:  # the other parts are worth having
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        rows.append({"part": name, **found, "machine": where, "torch": torch.__version__, "date": time.strftime("%F")})
        print(rows[-1], flush=True)
        options.results.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
