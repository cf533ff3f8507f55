"""A protection's state as one file: what a run goes on from, and what its last good weights are read out of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sophon.errors import GuardError
from sophon.tensor_files import read_tensors, write_tensors

STATE_FILE = "state.safetensors"


@dataclass
class Position:
    """Where the alternation stands.

    Attributes:
        round: rounds done.
        good_round: the last round after which the guard was satisfied; 0 is the unprotected start.
        ntr_steps: NTR steps of a round, grown by roll-backs.
        rollbacks: how often the guard rolled back.
        breaches: looks in a row at which the guard was not satisfied.
        before: the reference's metric on ``val``.
        good: the good state's metric on ``val``.
        history: one row a round: losses, and the metric where the guard looked.
    """

    round: int
    good_round: int
    ntr_steps: int
    rollbacks: int
    before: float
    good: float
    history: list[dict[str, Any]] = field(default_factory=list)
    breaches: int = 0


class State(NamedTuple):
    """All that a run has to remember.

    Attributes:
        at: where it stands.
        tensors: by name in parts: ``model`` and ``good`` weights, the heads of ``probe`` by domain, the moments of
            ``fts`` and ``ntr``, the members of the ``pool``.
        members: what `sophon.protect.pool.Pool.record` says of these.
        curriculum: what `sophon.protect.curriculum.Curriculum.record` says.
    """

    at: Position
    tensors: Mapping[str, Mapping[str, Tensor]]
    members: Mapping[str, Any]
    curriculum: Mapping[str, Any]


_PARTS = ("model", "good", "probe", "fts", "ntr", "pool")


def write_state(path: Path, state: State) -> None:
    """Write a state, atomically.

    Raises:
        UserError: the file system refuses.
    """
    flat = {f"{part}/{name}": tensor for part in _PARTS for name, tensor in state.tensors[part].items()}
    write_tensors(path, flat, {**asdict(state.at), "pool": state.members, "curriculum": state.curriculum})


def read_state(path: Path) -> State:
    """Read what `write_state` wrote; the tensors lie on the CPU.

    Raises:
        UserError: there is no readable state.
    """
    flat, metadata = read_tensors(path)
    members, curriculum = metadata.pop("pool", {}), metadata.pop("curriculum", {})
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in flat.items():
        part, name = key.split("/", 1)
        tensors[part][name] = tensor
    return State(Position(**metadata), tensors, members, curriculum)


def last_good(folder: Path) -> tuple[dict[str, Tensor], Position]:
    """Read the last good state out of a run that may still be unfinished: its weights and where it stood.

    Raises:
        UserError: there is no readable state.
        GuardError: no round's state satisfied the guard so far.
    """
    state = read_state(folder / STATE_FILE)
    if state.at.good_round == 0:
        raise GuardError(f"checkpoint: '{folder}' holds no state that satisfied the guard yet")
    return dict(state.tensors["good"]), state.at
