"""Training an adapter: set up a run, loop over its plan, keep its state."""

from sidestep.tasks.train.setup import TrainResult, train

__all__ = ["TrainResult", "train"]
