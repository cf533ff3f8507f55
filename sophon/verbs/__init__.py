"""The verbs, each a function of a `Config`: everything that the command line does, callable from a test."""

from sophon.verbs.auditing import audit, compare, render
from sophon.verbs.making import export, pretrain, protect
from sophon.verbs.sampling import sample

VERBS = {
    "pretrain": pretrain,
    "protect": protect,
    "export": export,
    "audit": audit,
    "sample": sample,
    "report": render,
}
ACTIONS = {**VERBS, "compare": compare}  # on the command line `report compare`
