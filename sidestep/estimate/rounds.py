"""The rounds of a measurement: until two halves of the songs agree on the ranks, the batches are spent or someone stops it."""

import shlex
import time
from pathlib import Path

from sidestep.config import EstimateConfig
from sidestep.errors import Interrupted, JobError
from sidestep.estimate.decide import AGREED, Decision, decide
from sidestep.estimate.measure import Measurement, samples_in
from sidestep.estimate.sketch import Layout, watch
from sidestep.events import Notice, Progress, Report
from sidestep.options import as_arguments
from sidestep.training.stops import StopRequest

MOST_BATCHES = 512  # where auto gives up on agreement
BAD_ROUNDS = 3  # in a row, without one finite gradient


def run_rounds(measurement: Measurement, layout: Layout, budget: int, config: EstimateConfig, partial: Path, key: str, report: Report) -> Decision:
    """Rounds until both halves agree or the batches are spent. Looks at 2, 3, 4, 6, 9, … rounds, and keeps what is measured at each look.

    Raises Interrupted after a save when asked to stop, JobError when there are no finite gradients.
    """
    sums, auto = measurement.sums, config.batches == "auto"
    limit = MOST_BATCHES if auto else int(config.batches)
    meter = Meter(sums.batches, limit, report)
    decision, decided_at, bad, next_look = None, -1, 0, 2
    while next_look <= sums.rounds:
        next_look = _later(next_look)
    with StopRequest() as stop, watch(measurement.model, measurement.sketch):
        while sums.batches < limit:
            finite = one_round(measurement, meter, stop, report)
            if finite is None:
                sums.save(partial, key)
                raise Interrupted(shlex.join(["uv", "run", "train.py", "estimate", *as_arguments(config)]))
            bad = 0 if finite else bad + 1
            if bad == BAD_ROUNDS:
                raise JobError(f"{BAD_ROUNDS} rounds in a row had no finite gradient.", "Try --precision fp32.")
            if sums.rounds == next_look and all(sums.samples):
                next_look = _later(next_look)
                decision, decided_at = decide(layout, sums, budget, config), sums.rounds
                meter.agreement = decision.agreement
                report(Notice(message=f"{sums.batches} batches: the rank maps of two halves of the songs agree to {decision.agreement:.3f} (Spearman)"))
                if auto and decision.converged:
                    break
                sums.save(partial, key)
    if not all(sums.samples):
        raise JobError("A part of the songs gave no finite gradient at all.", "Try --precision fp32.")
    if decision is None or decided_at != sums.rounds:
        decision = decide(layout, sums, budget, config)
    words, level = ("converged", "info") if decision.converged else ("not converged: more songs or more --batches would make it surer", "warning")
    report(Notice(message=f"Agreement of two halves after {sums.batches} batches: {decision.agreement:.3f} (Spearman), {words}", level=level))
    return decision


def _later(look: int) -> int:
    return max(look + 1, look * 3 // 2)


def one_round(measurement: Measurement, meter: "Meter", stop: StopRequest, report: Report) -> int | None:
    """Measure one round; how many quarters of it were finite, or None when asked to stop: what was not whole is dropped."""
    plan, taken = measurement.batches_of_round(), []
    for number, micro_batches in enumerate(plan):
        for micro_batch in micro_batches:
            if stop.requested:
                return None
            measurement.step(number, micro_batch, samples_in(micro_batches))
            meter.tick()
        taken.append(measurement.take())
        if taken[-1] is None:
            names = ", ".join(measurement.songs_of(number, micro_batches))
            report(Notice(message=f"A gradient was not finite and was left out; one of these songs: {names}", level="warning"))
    measurement.sums.add(taken, plan)
    return sum(state is not None for state in taken)


class Meter:
    """Reports progress batch by batch, with the rate since this call began and the time that is left at most."""

    def __init__(self, done: int, limit: int, report: Report):
        self.first = self.done = done
        self.limit, self.report, self.started = limit, report, time.perf_counter()
        self.agreement: float | None = None

    def tick(self) -> None:
        """One more batch was measured."""
        self.done += 1
        rate = (self.done - self.first) / (time.perf_counter() - self.started)
        current = "" if self.agreement is None else f"agreement of two halves {self.agreement:.2f}, enough above {AGREED:g}"
        left = max(0, self.limit - self.done)
        self.report(
            Progress(task="estimate", done=min(self.done, self.limit), total=self.limit, current=current, rate=rate, unit="batches", eta_seconds=left / rate)
        )
