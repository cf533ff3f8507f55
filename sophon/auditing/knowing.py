"""The attacker who knows how a model was protected: which of the attacks that were run do, and what they come to.

What holds only against those who do not know it is obscurity. So every verdict has a line on the attacks that the
configuration says are made against the protection's mechanism, or says that none was run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sophon.auditing.results import Results
from sophon.auditing.words import listed
from sophon.auditing.worst_case import WorstCase, worst_case

# The mechanisms that stages name and that shipped families of attacks, ``knowing_NAME``, are made against.
MECHANISMS = ("suppression", "reparameterisation", "removal")


@dataclass(frozen=True)
class Knowing:
    """The attacks that know the protection's mechanism.

    Attributes:
        mechanisms: of the protection; where it is not known, all that some attack was made against.
        missing: those of them that no attack was run against.
        worst_case: of the attacks that know one; None without any.
    """

    mechanisms: list[str]
    missing: list[str]
    worst_case: WorstCase | None


def knowing_of(results: Results, mechanisms: Sequence[str] | None, known: Mapping[str, Sequence[str]]) -> Knowing:
    """Find the attacks that know the mechanism.

    Args:
        mechanisms: of the protection; None where they are not known.
        known: the mechanisms that each attack is made against, by its name. What protection has simulated is none.
    """
    if mechanisms is None:
        mechanisms = list(dict.fromkeys(name for names in known.values() for name in names))
    attacks = [
        attack
        for attack in results.attacks
        if attack.exposure != "seen" and set(known.get(attack.attack, ())) & set(mechanisms)
    ]
    mechanisms_met = {name for attack in attacks for name in known[attack.attack]}
    worst = worst_case(attacks, results.metric, results.best_filtered) if attacks else None
    return Knowing(list(mechanisms), [name for name in mechanisms if name not in mechanisms_met], worst)


def not_run(missing: Sequence[str]) -> str:
    """Say what to do for an attacker who knows these mechanisms."""
    shipped = [f"knowing_{name}" for name in missing if name in MECHANISMS]
    if shipped:
        return f"add +attack/family=[{','.join(shipped)}]"
    against = f" made against {listed(missing)}" if missing else ""
    return f"name attacks{against} in attack.knowing"
