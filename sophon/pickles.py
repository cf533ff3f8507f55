"""Pickles of weights: known by their suffix or their first bytes, and never read."""

from __future__ import annotations

from pathlib import Path

from sophon import paths
from sophon.errors import UserError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
# how pickles begin, and the archives that torch makes of them
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def refuse_pickle(path: Path, key: str, library: str = "timm", target: Path | None = None) -> None:
    """Raise a `UserError` with the way out if a file is a pickle, by its suffix or its first bytes.

    Args:
        library: which library's loader the message shows.
        target: the safetensors file that the message's code writes; beside ``path`` by default.
    """
    if not paths.is_file(path, key):
        return
    with paths.explained(path, "read", key), path.open("rb") as file:
        begins = file.read(9)
    # a safetensors file begins with its header's length, which may look alike, and goes on with the header
    pickled = begins.startswith(_PICKLED) and begins[8:] != b"{"
    if not pickled and path.suffix.lower() not in PICKLES:
        return
    if library == "diffusers":
        folder = str(path.parent.parent if path.parent.name == "unet" else path.parent)
        code = (
            "from diffusers import DiffusionPipeline; "
            f"DiffusionPipeline.from_pretrained({folder!r}).save_pretrained({folder!r}, safe_serialization=True)"
        )
    else:  # timm reads torchvision's as well
        out = target or path.with_suffix(".safetensors" if path.suffix != ".safetensors" else ".converted.safetensors")
        code = (
            "from safetensors.torch import save_file; from timm.models import load_state_dict; "
            f"state = load_state_dict({str(path)!r}, weights_only=True); "
            f"save_file({{name: tensor.contiguous() for name, tensor in state.items()}}, {str(out)!r})"
        )
    raise UserError(f"{key}: '{path}' is a pickle, which can run any code; if you trust it, convert it first: {code}")
