"""`fixed --preprocess`: songs into training records, in two passes that never hold the big model."""

from sidestep.preprocess.run import preprocess
from sidestep.preprocess.tally import Summary

__all__ = ["Summary", "preprocess"]
