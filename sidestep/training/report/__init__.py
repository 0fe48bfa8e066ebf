"""`report.html`: a run at a glance, one file that needs no network, written anew after each epoch."""

from sidestep.training.report.companion import ReportPage

__all__ = ["ReportPage"]
