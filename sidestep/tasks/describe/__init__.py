"""`build-dataset --caption`: what a song is like, told by a model that listens."""

from sidestep.tasks.describe.run import describe

__all__ = ["describe"]
