"""The verbs, each a function of a `Config`: everything that the command line does, callable from a test."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import cast

from sophon.config import Config

VERBS = {
    "pretrain": "sophon.verbs.pretrain:pretrain",
    "protect": "sophon.verbs.protect:protect",
    "export": "sophon.verbs.export:export",
    "audit": "sophon.verbs.audit:audit",
    "sample": "sophon.verbs.sample:sample",
    "report": "sophon.verbs.report:report",
    "show": "sophon.verbs.show:show",
    "push": "sophon.verbs.push:push",
}
_ACTIONS = {**VERBS, "compare": "sophon.verbs.report:compare"}  # on the command line `report compare`


def action(verb: str) -> Callable[[Config], str | None]:
    """Return the function of a verb, which may return a warning to end with; only now is what computes imported."""
    return cast(Callable[[Config], str | None], pkgutil.resolve_name(_ACTIONS[verb]))
