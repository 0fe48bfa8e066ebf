"""LoKr as its files state it: the settings from which a program rebuilds the shapes of the factors."""

from collections import Counter
from dataclasses import dataclass

from peft.tuners.lokr.layer import factorization

from sidestep.adapters.adapter import Adapter, kronecker_shape, shape_of, whole
from sidestep.errors import UserError


@dataclass(frozen=True)
class LokrSettings:
    """factor, decompose_both and a rank per module with which peft and LyCORIS make factors of exactly the adapter's shapes."""

    factor: int
    decompose_both: bool
    ranks: dict[str, int]

    @property
    def rank(self) -> int:
        """The most common rank."""
        return Counter(self.ranks.values()).most_common(1)[0][0]


def settings_of(adapter: Adapter) -> LokrSettings:
    """Raises UserError for shapes that no settings of peft or LyCORIS give."""
    shapes = {name: (*shape_of(f), *kronecker_shape(f, "lokr_w1")) for name, f in adapter.modules.items()}
    sizes = {size for _, _, a, b in shapes.values() for size in (a, b)} | {size for o, i, a, b in shapes.values() for size in (o // a, i // b)}
    fits = [f for f in (-1, *sorted(sizes)) if all((factorization(o, f)[0], factorization(i, f)[0]) == (a, b) for o, i, a, b in shapes.values())]
    decompose_both = any("lokr_w1_a" in factors for factors in adapter.modules.values())
    if fits:
        ranks = {name: _rank(adapter, name, decompose_both) for name in adapter.modules}
        if None not in ranks.values():
            return LokrSettings(fits[0], decompose_both, ranks)
    raise UserError(
        "The factors of this LoKr have shapes that no one set of LoKr settings gives; programs that rebuild them from settings cannot load it.",
        "Merge it into the base instead: --format merged --base CHECKPOINT_DIR",
    )


def _rank(adapter: Adapter, name: str, decompose_both: bool) -> int | None:
    """A rank that makes this module's factors full or low-rank just as they are; the rank it was trained with where that does."""
    factors = adapter.modules[name]
    half_w1, half_w2 = (max(kronecker_shape(factors, part)) / 2 for part in ("lokr_w1", "lokr_w2"))

    def fits(rank: int) -> bool:
        full_w1, full_w2 = not (decompose_both and rank < half_w1), not rank < half_w2
        widths = {factors[f"{part}_b"].shape[0] for part in ("lokr_w1", "lokr_w2") if part not in factors}
        return full_w1 == ("lokr_w1" in factors) and full_w2 == ("lokr_w2" in factors) and widths <= {rank}

    candidates = (adapter.ranks[name], -(-max(kronecker_shape(factors, "lokr_w2")) // 2), -(-int(max(half_w1, half_w2) * 2) // 2))
    return next((rank for rank in candidates if fits(rank)), None)


def with_full_factors(adapter: Adapter) -> Adapter:
    """The same change with W1 and W2 as whole matrices: what LyCORIS' `full_matrix` loads whatever the ranks are."""
    modules = {}
    for name, factors in adapter.modules.items():
        rest = {key: tensor for key, tensor in factors.items() if not key.startswith("lokr_")}
        modules[name] = {part: factors[part] if part in factors else whole(factors, part) for part in ("lokr_w1", "lokr_w2")} | rest
    return Adapter(adapter.kind, modules, adapter.ranks, adapter.facts)
