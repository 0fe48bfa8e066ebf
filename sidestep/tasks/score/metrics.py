"""What an adapter is judged by, as pure mathematics on numbers that were measured, each with its spread.

A figure is computed from units (songs, captions) that are drawn anew, with replacement, many times: the
bootstrap (Efron 1979). All candidates of a comparison are drawn the same units, so two figures are compared by the
spread of their difference, which is narrower than either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sidestep.seeding import seed_for

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Figure:
    """A value and the values [DRAWS] that it had on units drawn anew."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the draws."""
        low, high = np.quantile(self.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def equals(self, other: "Figure") -> bool:
        """Whether the interval of the difference holds zero."""
        low, high = Figure(self.value - other.value, self.draws - other.draws).interval
        return low <= 0 <= high


def bootstrap(units: int, statistic: Callable[[np.ndarray], float]) -> Figure:
    """A statistic of unit indices [units], with its draws. The same number of units is always drawn the same way."""
    generator = np.random.default_rng(seed_for("bootstrap", units))
    draws = [statistic(generator.integers(units, size=units)) for _ in range(DRAWS)]
    return Figure(statistic(np.arange(units)), np.array(draws))


def gain(losses: Sequence[float], base: Sequence[float]) -> Figure:
    """By which share the loss is lower than the base's: 1 − mean(losses) / mean(base). One loss for each unit."""
    own, other = np.asarray(losses), np.asarray(base)
    return bootstrap(len(own), lambda i: float(1 - own[i].mean() / other[i].mean()))


def relative_change(velocity: Tensor, base: Tensor) -> float:
    """‖velocity − base‖ / ‖base‖ over all elements of [N, T, D]. Exactly 0 for equal ones."""
    return float((velocity.double() - base.double()).norm() / base.double().norm().clamp(min=1e-12))


def drift(changes: Sequence[float]) -> Figure:
    """Root mean square of the relative changes, one for each caption."""
    squares = np.square(np.asarray(changes))
    return bootstrap(len(squares), lambda i: float(np.sqrt(squares[i].mean())))
