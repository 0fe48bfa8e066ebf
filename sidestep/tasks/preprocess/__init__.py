"""`preprocess`: songs into training records, in two passes that never hold the big model."""

from sidestep.tasks.preprocess.passes import Summary
from sidestep.tasks.preprocess.run import preprocess

__all__ = ["Summary", "preprocess"]
