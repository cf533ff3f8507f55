"""Two "protections" that are none, for an audit to expose: see this folder's README.

    python experiments/cifar10_audit/disguise.py REFERENCE OUT

writes OUT/unchanged.safetensors, the reference's weights under another name, and OUT/times_1000.safetensors: every
convolution before a BatchNorm multiplied by 1000, with the running statistics that make up for it. Plain state dicts,
as a stranger would hand them over.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FACTOR = 1000.0


def times(state: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    """Multiply what a BatchNorm follows: in a timm ResNet every convolution, the norm being the next entry.

    The output changes by no more than what BatchNorm's eps is worth.
    """
    changed = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        if value.ndim == 4:
            mean, variance = (f"{norm_after(name)}.running_{what}" for what in ("mean", "var"))
            changed[name] = factor * value
            changed[mean] = factor * state[mean]
            changed[variance] = factor**2 * state[variance]
    return changed


def norm_after(convolution: str) -> str:
    """Name the norm after a convolution of timm's ResNet with a deep stem."""
    *block, layer, _ = convolution.split(".")
    if layer.isdigit():  # conv1 and downsample are sequences: convolution, norm, ...; the stem's last one has bn1
        return "bn1" if block == ["conv1"] and layer == "6" else ".".join([*block, str(int(layer) + 1)])
    return ".".join([*block, layer.replace("conv", "bn")])


def main(reference: Path, out: Path) -> None:
    folder = reference if (reference / "model.safetensors").exists() else reference / "checkpoint"
    state = load_file(folder / "model.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "unchanged.safetensors")
    save_file(times(state, FACTOR), out / "times_1000.safetensors")
    print(f"{out}: unchanged.safetensors, times_1000.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python disguise.py REFERENCE OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
