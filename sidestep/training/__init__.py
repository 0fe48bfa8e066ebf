"""Training an adapter: set up a run, loop over its plan, keep its state."""

from sidestep.training.run import train

__all__ = ["train"]
