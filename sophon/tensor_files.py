"""Tensors in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sophon.errors import UserError
from sophon.files import write_bytes
from sophon.paths import explained

_METADATA_KEY = "sophon"


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None
) -> None:
    """Write tensors as a safetensors file, as `write_bytes` does.

    Args:
        tensors: on any device, of any memory format; views and shared storage are written out in full.
        metadata: plain JSON data kept in the file's header.

    Raises:
        UserError: see `write_bytes`.
    """
    # clone: safetensors refuses tensors that share storage; contiguous_format: and those in channels_last.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    header = {_METADATA_KEY: json.dumps(dict(metadata), allow_nan=False)} if metadata is not None else {}
    # Hub tools (transformers among them) refuse a file whose header does not say which framework wrote it.
    write_bytes(path, save(plain, metadata={"format": "pt", **header}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: tensors on the CPU, and the metadata (empty if none was given).

    Raises:
        UserError: the file is missing, unreadable, truncated or corrupt.
    """
    try:
        with explained(path, "read"), safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, json.loads(metadata.get(_METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: it is truncated or not a safetensors file") from error
