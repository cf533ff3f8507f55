"""A protection's state as one file: what a run goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sophon.tensor_files import read_tensors, write_tensors

STATE_FILE = "state.safetensors"


@dataclass
class Position:
    """Where a protection stands.

    Attributes:
        before: the reference's metric on ``val``.
        good: the good state's metric on ``val``.
        ntr_steps: NTR steps of a round, grown by roll-backs.
        ends: the round at which each stage ends; a stage that ends early moves those after it.
        stage: which of the stages is at work.
        whole: whether what the present stage began with is within the tolerance.
        round: rounds done, those of earlier stages among them.
        good_round: the last round after which the guard was satisfied; 0 is the unprotected start.
        rollbacks: how often the guard rolled back.
        breaches: looks in a row at which the guard was not satisfied.
        history: one row a round: what the stage tells, and the metric where the guard looked.
    """

    before: float
    good: float
    ntr_steps: int
    ends: list[int]
    stage: int = 0
    whole: bool = True
    round: int = 0
    good_round: int = 0
    rollbacks: int = 0
    breaches: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SavedRun:
    """All that a run has to remember.

    Attributes:
        at: where it stands.
        tensors: by part and name: the ``model``, the ``good`` weights, where the present stage has its ``start`` from
            an earlier one, the ``teacher`` where that is another model, and what the ``stage`` remembers.
        data: the rest of what the stage remembers, plain JSON data.
    """

    at: Position
    tensors: Mapping[str, Mapping[str, Tensor]]
    data: Mapping[str, Any]


def write_state(path: Path, state: SavedRun) -> None:
    """Write a state, atomically.

    Raises:
        UserError: the file system refuses.
    """
    flat = {f"{part}/{name}": tensor for part, tensors in state.tensors.items() for name, tensor in tensors.items()}
    write_tensors(path, flat, {"at": asdict(state.at), "data": state.data})


def read_state(path: Path) -> SavedRun:
    """Read what `write_state` wrote; the tensors lie on the CPU.

    Raises:
        UserError: there is no readable state.
    """
    flat, metadata = read_tensors(path)
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in ("model", "good", "start", "teacher", "stage")}
    for key, tensor in flat.items():
        part, name = key.split("/", 1)
        tensors[part][name] = tensor
    return SavedRun(Position(**metadata["at"]), tensors, metadata["data"])
