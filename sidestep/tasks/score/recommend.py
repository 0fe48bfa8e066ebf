"""Which adapter to take, and why: the smallest drift among those that are as good as the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidestep.tasks.score.metrics import Figure


@dataclass(frozen=True, eq=False)
class Row:
    """A checkpoint at a strength, and its figures; those of its music are None where none was made."""

    name: str
    strength: float
    gain: Figure
    drift: Figure
    style: Figure | None = None
    copying: Figure | None = None

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


def copies(row: Row, base: Figure | None) -> bool:
    """Whether more of a row's clips are copies than of the base model's, beyond chance."""
    if row.copying is None or base is None:
        return False
    return row.copying.value > base.value and not row.copying.equals(base)


def as_good_as_the_best(rows: Sequence[Row]) -> list[Row]:
    """The rows whose gain equals the highest, and whose style equals that of the nearest to the songs among those."""
    highest = max(rows, key=lambda row: row.gain.value)
    equal = [row for row in rows if row.gain.equals(highest.gain)]
    styles = [row.style for row in equal if row.style]
    if len(styles) < len(equal):
        return equal
    nearest = min(styles, key=lambda style: style.value)
    return [row for row in equal if row.style and row.style.equals(nearest)]


def recommend(rows: Sequence[Row], base_copying: Figure | None = None) -> Verdict:
    """The verdict on rows that were judged on the same units. base_copying: of the base model's own clips.

    What copies is only taken where everything does.
    """
    own = [row for row in rows if not copies(row, base_copying)]
    best = as_good_as_the_best(own or rows)
    row = min(best, key=lambda candidate: candidate.drift.value)
    others, what = len(best) - 1, "gain and style" if row.style else "gain"
    if len(rows) == 1:
        reason = "it is the only one"
    elif others:
        equal = "another equals" if others == 1 else f"{others} others equal"
        reason = f"{equal} its {what} within the intervals, and it changes least of everything else"
    else:
        reason = f"no other equals its {what}"
    if own and len(own) < len(rows):
        reason += f"; {len(rows) - len(own)} that copy the songs were left out"
    doubts = []
    if row.gain.interval[0] <= 0:
        doubts.append("its loss is not surely lower than the base model's: it may have learned nothing of the songs")
    if not own and row.copying:
        share = f"{100 * row.copying.value:.0f} % of its clips"
        doubts.append(f"{share} are nearer to a song than songs are to each other: it copies, as all the others do")
    return Verdict(row, reason, tuple(doubts))
