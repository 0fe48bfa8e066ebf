"""`build-dataset --audit`: what a data set would teach a model, before it does: a table in the terminal, a page to look at and listen to."""

from sidestep.audit.run import Audit, audit

__all__ = ["Audit", "audit"]
