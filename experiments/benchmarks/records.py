"""Results that are gathered in pieces: one JSON file, a cell of it replaced at a time, and the machine of each cell."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sophon.files import read_json, write_json


def machine(device: torch.device) -> dict[str, Any]:
    """Say what measures: nothing that names a person or a folder."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def described(where: dict[str, Any]) -> str:
    """Return `machine` without its date as one line."""
    gpu = f"{where['gpu']}, " if where["gpu"] else ""
    return (
        f"{gpu}{where['cpu']}, {where['cores']} cores, {where['threads']} threads, torch {where['torch']}, "
        f"Python {where['python']}"
    )


def read_cells(path: Path) -> dict[str, Any]:
    """Return the cells of a file by name; none if there is no file.

    Raises:
        UserError: the file is not JSON.
    """
    return read_json(path)["cells"] if path.exists() else {}


def put_cell(path: Path, name: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Replace one cell and leave the others alone, atomically; return all of them."""
    cells = {**read_cells(path), name: cell}
    write_json(path, {"format": 1, "cells": cells})
    return cells


def machines(cells: dict[str, Any]) -> Iterator[str]:
    """Give one line for each machine that the cells were measured on, with the first and the last date."""
    dates: dict[str, list[str]] = {}
    for cell in cells.values():
        dates.setdefault(described(cell["machine"]), []).append(cell["machine"]["date"])
    for text, days in dates.items():
        first, last = min(days), max(days)
        yield f"{text}; {first}" + (f" to {last}" if last > first else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
