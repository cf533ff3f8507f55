"""Weights from outside: a safetensors file is read, held against the model that it is to fill, and only then loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sophon import paths
from sophon.errors import UserError, one_line
from sophon.files import read_json, sha256_file
from sophon.pickles import PICKLES, refuse_pickle
from sophon.tensor_files import read_tensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SHOWN = 3  # as many names as fit into a message of one line


def find_weights(path: Path, name: str, key: str, library: str) -> Path:
    """Return the safetensors file that ``path`` is, or has as ``name`` if it is a folder.

    Where it has none of that name, the index of its shards will do, or the half-precision variant of either.

    Raises:
        UserError: it is a pickle, or a folder without that file; the message names ``key``.
    """
    if not paths.is_folder(path, key):
        refuse_pickle(path, key, library)
        return path
    file = path / name
    if not paths.is_file(file, key):
        stem = name.removesuffix(".safetensors")
        for another in (f"{name}.index.json", f"{stem}.fp16.safetensors", f"{name}.index.fp16.json"):
            if paths.is_file(path / another, key):
                return path / another
        for other in paths.entries(file.parent, key) if paths.is_folder(file.parent, key) else []:
            if other.suffix.lower() in PICKLES:
                refuse_pickle(other, key, library, file)
        raise UserError(f"{key}: '{path}' holds no {name}; save it again as a safetensors file")
    return file


def shards(path: Path) -> list[Path]:
    """Return the files that a safetensors file is, or that the index of a sharded one lists.

    Raises:
        UserError: the index is none.
    """
    if path.suffix != ".json":
        return [path]
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"'{path}' does not list the shards of a state dict; save it again")
    return [path.parent / Path(name).name for name in sorted(set(names.values()))]


def weights_sha256(path: Path) -> str:
    """Return the sha256 of a safetensors file; of shards, that of their own in order."""
    digests = [sha256_file(file) for file in shards(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_state(path: Path, key: str, strip_prefix: str = "") -> dict[str, Tensor]:
    """Read a state dict from a file or from shards; of names that begin with ``strip_prefix`` it is taken away.

    Raises:
        UserError: the file cannot be read, no name begins with the prefix, or two names become one.
    """
    tensors = {name: tensor for file in shards(path) for name, tensor in read_tensors(file)[0].items()}
    if not strip_prefix:
        return tensors
    stripped = {name.removeprefix(strip_prefix): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors) or stripped.keys() == tensors.keys():
        raise UserError(f"model.strip_prefix: '{strip_prefix}' does not fit the names in {path}: {_few([*tensors])}")
    return stripped


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    model: str = "the model",
    explain: Callable[[Sequence[str]], str | None] = lambda wrong: None,
) -> None:
    """Load a state dict into a model: all of it, and nothing that cannot be what a training left.

    Half and double precision become the model's own. What a number means decides whether it is taken: weights are
    finite floating-point numbers, variances are not negative, counters are whole.

    Args:
        where: what it was read from; messages begin with it.
        model: what messages call it.
        explain: given the names whose shapes differ, may say why in better words than a list of shapes.

    Raises:
        UserError: names, shapes, types or values are not the model's. The model is unchanged.
    """
    state = module.state_dict()
    _check_names(where, tensors, state, model)
    wrong = [name for name in state if tensors[name].shape != state[name].shape]
    if wrong:
        shapes = [f"{name} {tuple(tensors[name].shape)}, not {tuple(state[name].shape)}" for name in wrong]
        raise UserError(f"{where}{explain(wrong) or f' does not fit {model}: {_few(shapes)}'}")
    for name, own in state.items():
        if fault := _fault(name, tensors[name], own.dtype):
            raise UserError(f"{where}: weight '{name}' {fault}; give the weights as they were trained")
    try:
        module.load_state_dict(tensors)
    except Exception as error:  # a module may ask for what only a pickle holds, as torchvision's MNASNet does
        raise UserError(
            f"{where}: the model cannot be loaded from plain tensors, which is what safetensors files hold "
            f"({one_line(error)}); choose another architecture"
        ) from error


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that cannot be a model's, going by their names, where a library casts and renames what it loads.

    Raises:
        UserError: see `load_state`.
    """
    for name, tensor in tensors.items():
        whole = name.endswith(("num_batches_tracked", "_index", "_ids"))
        if fault := _fault(name, tensor, torch.int64 if whole else torch.float32):
            raise UserError(f"{where}: weight '{name}' {fault}; give the weights as they were trained")


def _fault(name: str, tensor: Tensor, own: torch.dtype) -> str | None:
    """Say why a tensor cannot be what the model calls ``name``; None if it can."""
    if own.is_floating_point:
        if tensor.dtype not in FLOATS:
            return f"is of type {_type(tensor)}, not floating point of 16, 32 or 64 bits"
        if not torch.isfinite(tensor.to(own)).all():
            return "holds NaN or infinite numbers"
        if name.rpartition(".")[2] == "running_var" and (tensor < 0).any():
            return "is a variance and holds negative numbers"
    elif own == torch.bool and tensor.dtype != torch.bool:
        return f"is of type {_type(tensor)}, not bool"
    elif own in _INTEGERS:
        if tensor.dtype not in _INTEGERS:
            return f"is of type {_type(tensor)}, not whole numbers"
        if name.rpartition(".")[2] == "num_batches_tracked" and (tensor < 0).any():
            return "is a counter and is negative"
    return None


def require_finite(model: nn.Module, where: str) -> None:
    """Raise a `UserError` that begins with ``where`` if the model has weights that are no numbers."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: weight '{name}' holds NaN or infinite numbers")


def _check_names(where: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], model: str) -> None:
    parts = []
    if missing := [name for name in state if name not in tensors]:
        if prefix := _shared_prefix(tensors, state):
            raise UserError(
                f"{where}: its names begin with '{prefix}', the model's do not; give model.strip_prefix='{prefix}'"
            )
        parts.append(f"it lacks {_few(missing)}")
    if unexpected := [name for name in tensors if name not in state]:
        parts.append(f"the model has no {_few(unexpected)}")
    if parts:
        raise UserError(f"{where} does not fit {model}: {'; '.join(parts)}")


def _shared_prefix(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Return what a wrapper, such as DataParallel or torch.compile, has put before all of the model's names."""
    first = next(iter(state))
    prefixes = (name.removesuffix(first) for name in tensors if name.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if all(prefix + name in tensors for name in state)), None)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
