"""What an attacker does to the released weights before it fine-tunes them, and what it has at hand for that."""

from sophon.surgery.attacker_means import Means
from sophon.surgery.operations import NEED_FRESH, OPERATIONS, check, operate, restate

__all__ = ["NEED_FRESH", "OPERATIONS", "Means", "check", "operate", "restate"]
