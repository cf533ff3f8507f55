"""How many rounds a defender's budget buys: a method is run for a few rounds and for more, and timed."""

from __future__ import annotations

from dataclasses import dataclass

from sophon.errors import UserError


@dataclass(frozen=True)
class Calibration:
    """Two runs that differ in their rounds alone, so that what starting and ending cost cancels out.

    Attributes:
        rounds: of the short run and of the longer one.
        core_seconds: processor time (user and system) of each.
    """

    rounds: tuple[int, int]
    core_seconds: tuple[float, float]

    @property
    def seconds_per_round(self) -> float:
        """Return the processor time of a round.

        Raises:
            UserError: the longer run took no more of it.
        """
        fewer, more = self.rounds
        short, long = self.core_seconds
        if not (fewer < more and short < long):
            raise UserError(
                f"calibration: {more} rounds took {long:.1f} s and {fewer} took {short:.1f} s, so a round's time "
                "cannot be told; give more --looks"
            )
        return (long - short) / (more - fewer)

    def rounds_for(self, minutes: float) -> int:
        """Return how many whole rounds ``minutes`` of processor time buy, at least one.

        Reading data, loading the reference and the last evaluation are not charged to the defender.
        """
        return max(1, int(60 * minutes / self.seconds_per_round))
