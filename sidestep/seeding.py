"""Randomness as a function of where it is used, not of what ran before.

Every random number of a run comes from a seed made of the run's seed and the keys of its use (epoch, step, slot).
Nothing has to be saved to resume exactly, and several processes draw what one would have drawn.
"""

from hashlib import blake2b


def seed_for(*keys: int | str) -> int:
    """A 63-bit seed for these keys, e.g. `seed_for(42, "noise", step, slot)`; equal on every machine."""
    digest = blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform(*keys: int | str) -> float:
    """A number in [0, 1) for these keys."""
    return seed_for(*keys) / 2**63
