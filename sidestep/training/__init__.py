"""Training an adapter: set up a run, loop over its plan, keep its state."""

from sidestep.training.task import TrainResult, train

__all__ = ["TrainResult", "train"]
