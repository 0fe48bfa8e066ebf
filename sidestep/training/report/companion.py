"""Writes the page, and to TensorBoard what belongs beside its curves, after each epoch."""

import numpy as np

from sidestep.atomic import write_text
from sidestep.events import Notice, Saved
from sidestep.training.history import History
from sidestep.training.report.facts import facts_of, ranks_of
from sidestep.training.report.page import page
from sidestep.training.run import Run

NAME = "report.html"


class ReportPage:
    """Companion of a run that keeps `report.html` in its folder up to date."""

    def __init__(self) -> None:
        self._ranks_told = False

    def after_epoch(self, run: Run, epoch: int) -> None:
        """Write the page anew, whole or not at all."""
        if run.is_main:
            self._tensorboard(run)
            self._write(run, finished=False)

    def at_end(self, run: Run) -> None:
        """The page of a finished run."""
        if run.is_main:
            self._write(run, finished=True)
            run.report(Saved(what="report", path=str(run.config.output_dir / NAME)))

    def _write(self, run: Run, finished: bool) -> None:
        path = run.config.output_dir / NAME
        try:
            write_text(path, page(facts_of(run, finished)))
        except OSError as error:  # a browser or a scanner may hold it; the next epoch tries again
            run.report(Notice(message=f"{path}: not written this time ({error.strerror or error}).", level="warning"))

    def _tensorboard(self, run: Run) -> None:
        step = run.position.step
        if sum(run.history.bin_count):
            add_timesteps(run.tensorboard, run.history, step)
        if not self._ranks_told:
            ranks = ranks_of(run.model)
            run.tensorboard.add_histogram("ranks", np.array(list(ranks.values())), step)
            run.tensorboard.add_text("ranks", "\n".join(["| module | rank |", "|---|---|", *(f"| {name} | {rank} |" for name, rank in ranks.items())]), step)
            self._ranks_told = True


def add_timesteps(tensorboard, history: History, step: int) -> None:
    """How often each timestep was trained so far, as a histogram whose buckets are the history's bins, and the mean loss of each."""
    counts = history.bin_count
    edges = [(i + 1) / len(counts) for i in range(len(counts))]
    middles = [edge - 0.5 / len(counts) for edge in edges]
    total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
    squares = sum(count * middle**2 for count, middle in zip(counts, middles, strict=True))
    tensorboard.add_histogram_raw(
        "timesteps", min=0.0, max=1.0, num=sum(counts), sum=total, sum_squares=squares, bucket_limits=edges, bucket_counts=counts, global_step=step
    )
    for edge, loss, count in zip(edges, history.bin_loss, counts, strict=True):
        if count:
            tensorboard.add_scalar(f"loss by timestep/{edge - 1 / len(counts):.1f}-{edge:.1f}", loss / count, step)
