"""Marks: copies of the adapter alone, when the smoothed training loss first passes steps that the run sets for itself.

So that a person can hear where it begins to sound right. When they are made follows from the epochs' losses alone, so a
run that goes on makes the same ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SMOOTHED_EPOCHS = 5  # the smoothed loss is the mean loss of so many epochs
ERRORS_APART = 2.0  # standard errors of the smoothed loss from one mark to the next, at least


@dataclass(frozen=True)
class Mark:
    """Where a mark was made. loss: the smoothed training loss; below: the share by which it was under the first one."""

    step: int
    epoch: int
    loss: float
    below: float


def smoothed(losses: Sequence[float]) -> float | None:
    """Mean of the last epochs' losses; None until there are enough, and where one of them is not finite."""
    last = losses[-SMOOTHED_EPOCHS:]
    return sum(last) / len(last) if len(last) == SMOOTHED_EPOCHS and all(map(math.isfinite, last)) else None


def passed(losses: Sequence[float], drop: float) -> tuple[int, float]:
    """(how many steps the smoothed loss has passed so far, the share by which it is now below the first one).

    losses: mean of each epoch. A step is the share `drop` of the first smoothed loss, or twice its standard error where
    that is more, so that chance alone makes no mark. The error is that of differences of neighbouring epochs, which
    know no trend (von Neumann 1941). (0, 0.0) before there are two smoothed losses.
    """
    ends = range(SMOOTHED_EPOCHS, len(losses) + 1)
    known = [(end, s) for end in ends if (s := smoothed(losses[:end])) is not None]
    if len(known) < 2 or not known[0][1] > 0:
        return 0, 0.0
    end, first = known[0]
    squares = [(b - a) ** 2 for a, b in pairwise(losses[end - SMOOTHED_EPOCHS : end])]
    error = math.sqrt(sum(squares) / (2 * len(squares)) / SMOOTHED_EPOCHS)
    step = max(drop * first, ERRORS_APART * error)
    return int((first - min(s for _, s in known)) / step), 1 - known[-1][1] / first
