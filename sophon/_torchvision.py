"""Let torchvision import beside a torch that its compiled part was not built for.

torchvision's ordinary wheel is a CUDA build. Next to a CPU-only torch its ``_C`` library cannot load, and
``import torchvision`` (so also timm and torchmetrics) raises "operator torchvision::nms does not exist". Models,
transforms and data sets need no operator of that library, so declaring the two that torchvision refers to while it is
imported is enough. Where the library loads, nothing is done. It happens when torchvision is first imported, by
whomever, so that ``import sophon`` itself waits for neither.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sophon.errors import UserError, one_line

if TYPE_CHECKING:
    import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library unregisters its schemas when it is collected


class OnFirstImport:
    """A finder of torchvision alone: it declares what its import needs, and says which pair does not work."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        _declare_operators()
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def explained(module: ModuleType) -> None:
                try:
                    execute(module)
                except Exception as error:  # whatever the first thing that torch lacks leads to
                    from importlib.metadata import version

                    pair = f"torchvision {version('torchvision')} beside torch {version('torch')}"
                    raise UserError(
                        f"{pair} cannot be imported ({one_line(error)}); install a matching pair"
                    ) from error

            spec.loader.exec_module = explained  # type: ignore[method-assign]
        return spec


def mend_on_import() -> None:
    """Let the first ``import torchvision`` of this process succeed."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, OnFirstImport())


def _declare_operators() -> None:
    """Declare torchvision's operators when its compiled library is there but cannot be loaded."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            return
    declared = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            declared.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(declared)
