"""Memory in use over a step, cut into stretches that can be put together again for any number of blocks."""

from dataclasses import dataclass

from sidestep.memory.tracker import LiveBytes


@dataclass(frozen=True)
class Stretch:
    """A part of a step. rise: bytes in use at its end less those at its beginning; peak: the most in use during it, above its beginning."""

    rise: int = 0
    peak: int = 0

    def then(self, following: "Stretch") -> "Stretch":
        """This stretch and the one that follows it, as one."""
        return Stretch(self.rise + following.rise, max(self.peak, self.rise + following.peak))


def joined(stretches: list[Stretch]) -> Stretch:
    """Stretches one after the other, as one."""
    whole = Stretch()
    for stretch in stretches:
        whole = whole.then(stretch)
    return whole


class Cuts:
    """Cuts what `memory` counts into stretches, each from the last cut to the next."""

    def __init__(self, memory: LiveBytes):
        self._memory, self._begun_at = memory, memory.now
        memory.restart_peak()

    def cut(self) -> Stretch:
        """The stretch that ends here."""
        stretch = Stretch(self._memory.now - self._begun_at, self._memory.peak - self._begun_at)
        self._begun_at = self._memory.now
        self._memory.restart_peak()
        return stretch
