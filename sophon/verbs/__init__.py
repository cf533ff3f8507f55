"""The verbs, each a function of a `Config`: everything that the command line does, callable from a test."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import cast

from sophon.config import Config

VERBS = {
    "pretrain": "sophon.verbs.making:pretrain",
    "protect": "sophon.verbs.making:protect",
    "export": "sophon.verbs.making:export",
    "audit": "sophon.verbs.auditing:audit",
    "sample": "sophon.verbs.sampling:sample",
    "report": "sophon.verbs.auditing:render",
}
_ACTIONS = {**VERBS, "compare": "sophon.verbs.auditing:compare"}  # on the command line `report compare`


def action(verb: str) -> Callable[[Config], None]:
    """Return the function of a verb; only now is anything imported that computes."""
    return cast(Callable[[Config], None], pkgutil.resolve_name(_ACTIONS[verb]))
