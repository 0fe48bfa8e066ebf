"""Which adapter to take, and why: the smallest drift among those that are as good as the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidestep.tasks.score.metrics import Figure


@dataclass(frozen=True, eq=False)
class Row:
    """A checkpoint at a strength, and its figures."""

    name: str
    strength: float
    gain: Figure
    drift: Figure

    @property
    def title(self) -> str:
        """`epoch_0010`, `epoch_0010 at strength 0.75`."""
        return self.name if self.strength == 1 else f"{self.name} at strength {self.strength:g}"


@dataclass(frozen=True)
class Verdict:
    """The row to take, the reason in a sentence, and what speaks against it, if anything does."""

    row: Row
    reason: str
    doubts: tuple[str, ...] = ()


def as_good_as_the_best(rows: Sequence[Row]) -> list[Row]:
    """The rows whose gain equals the highest."""
    highest = max(rows, key=lambda row: row.gain.value)
    return [row for row in rows if row.gain.equals(highest.gain)]


def recommend(rows: Sequence[Row]) -> Verdict:
    """The verdict on rows that were judged on the same units."""
    best = as_good_as_the_best(rows)
    row = min(best, key=lambda candidate: candidate.drift.value)
    others = len(best) - 1
    if len(rows) == 1:
        reason = "it is the only one"
    elif others:
        equal = "another equals" if others == 1 else f"{others} others equal"
        reason = f"{equal} its gain within the intervals, and it changes least of everything else"
    else:
        reason = "no other equals its gain"
    doubts = []
    if row.gain.interval[0] <= 0:
        doubts.append("its loss is not surely lower than the base model's: it may have learned nothing of the songs")
    return Verdict(row, reason, tuple(doubts))
