"""Randomness as a function of where it is used, not of what ran before.

Every random number of a run comes from a seed made of the run's seed and a place (epoch, step, slot). Nothing has to be saved to resume
exactly, and several processes draw what one would have drawn.
"""

from hashlib import blake2b


def seed_for(*place: int | str) -> int:
    """A 63-bit seed for a place, e.g. `seed_for(42, "noise", step, slot)`; equal on every machine."""
    digest = blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*place: int | str) -> float:
    """A number in [0, 1) for a place."""
    return seed_for(*place) / 2**63
