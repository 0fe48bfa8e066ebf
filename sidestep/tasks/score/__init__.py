"""`score`: which checkpoint of a run, at which strength, and is it any good?"""

from sidestep.tasks.score.run import score

__all__ = ["score"]
