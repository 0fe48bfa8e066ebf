"""From sketches to ranks: the spectra of all modules, the budget spent on them, and whether two halves of the data agree on it."""

from collections.abc import Mapping
from dataclasses import dataclass

from sidestep.config import EstimateConfig
from sidestep.errors import JobError
from sidestep.estimate.allocate import allocate, rank_correlation
from sidestep.estimate.measure import Sums
from sidestep.estimate.sketch import Layout
from sidestep.estimate.spectrum import Spectrum, spectrum

AGREED = 0.9  # Spearman correlation between the ranks from two halves at which the map counts as converged


@dataclass(frozen=True)
class Decision:
    """Ranks of all modules (0: none) and what they rest on."""

    ranks: dict[str, int]
    spectra: dict[str, Spectrum]
    agreement: float

    @property
    def converged(self) -> bool:
        return self.agreement > AGREED


def ranks_from(spectra: Mapping[str, Spectrum], costs: Mapping[str, int], caps: Mapping[str, int], budget: int, config: EstimateConfig) -> dict[str, int]:
    """The budget spent on the modules whose gradient the other half of the data confirms at all; the others get rank 0."""
    values = {name: found.values(min(config.rank_max, caps[name])) for name, found in spectra.items() if found.score > 0}
    return dict.fromkeys(spectra, 0) | allocate(values, costs, budget, config.rank_min, config.rank_max)


def decide(layout: Layout, sums: Sums, budget: int, config: EstimateConfig) -> Decision:
    """Ranks from all four quarters, and the agreement between the ranks that either half alone would give.

    Each half's ranks come from the same procedure as the whole's: its own two parts confirm each other.
    Raises JobError when no module shows a gradient that repeats.
    """
    costs = {name: slot.out_features + slot.in_features for name, slot in layout.slots.items()}
    caps = {name: slot.columns for name, slot in layout.slots.items()}

    def measured(first: tuple[int, ...], second: tuple[int, ...]) -> dict[str, Spectrum]:
        one, two = sums.mean(*first), sums.mean(*second)
        return {name: spectrum(layout, name, one, two) for name in layout.slots}

    whole, first, second = measured((0, 1), (2, 3)), measured((0,), (1,)), measured((2,), (3,))
    if not any(found.score > 0 for found in whole.values()):
        raise JobError(
            "No module shows a gradient that repeats in both halves of the songs: there is nothing to allocate by.",
            "Measure more batches (--batches 256) or more songs, or train without a rank map.",
        )
    by_half = [ranks_from(found, costs, caps, budget, config) for found in (first, second)]
    agreement = rank_correlation(*(list(ranks.values()) for ranks in by_half))
    return Decision(ranks_from(whole, costs, caps, budget, config), whole, agreement)


def captured(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Share of the confirmed energy that some ranks capture."""
    total = sum(found.score for found in spectra.values())
    return sum(sum(spectra[name].confirmed[:rank]) for name, rank in ranks.items()) / total if total else 0.0
