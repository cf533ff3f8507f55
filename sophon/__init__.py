"""Make pre-trained models non-fine-tunable in a restricted domain, and audit how well that holds.

From Python: `protect` makes a model hard to fine-tune on a domain, `audit` says how hard, `load` reads a checkpoint
back, and `adapt` says of any ``nn.Module`` what the others need to know.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

from sophon._torchvision import mend_on_import

if TYPE_CHECKING:
    from sophon.api.calls import audit, load, protect
    from sophon.config import GuardConfig as Guard
    from sophon.domains import Domain
    from sophon.errors import GuardError, UserError
    from sophon.models import adapt
    from sophon.sampler import SamplerConfig as Attackers

__all__ = ["Attackers", "Domain", "Guard", "GuardError", "UserError", "adapt", "audit", "load", "protect"]
__version__ = "0.1.0"

mend_on_import()

_HOMES = {
    "Attackers": "sophon.sampler:SamplerConfig",
    "Domain": "sophon.domains:Domain",
    "Guard": "sophon.config:GuardConfig",
    "GuardError": "sophon.errors:GuardError",
    "UserError": "sophon.errors:UserError",
    "adapt": "sophon.models:adapt",
    "audit": "sophon.api.calls:audit",
    "load": "sophon.api.calls:load",
    "protect": "sophon.api.calls:protect",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only now: ``import sophon`` alone waits for nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sophon' has no attribute '{name}'")
    return pkgutil.resolve_name(_HOMES[name])
