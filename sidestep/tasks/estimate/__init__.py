"""`estimate`, Preprocessing++: which modules respond to this music, and what rank each deserves."""

from sidestep.tasks.estimate.run import estimate

__all__ = ["estimate"]
