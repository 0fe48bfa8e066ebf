"""`demo`: the whole pipeline on a tiny model and on music made here, through the functions that a user's own songs take."""

from sidestep.tasks.demo.task import demo

__all__ = ["demo"]
