"""`score` and `compare`: which adapter, at which strength, and is it any good?"""

from sidestep.tasks.score.run import compare, score

__all__ = ["compare", "score"]
