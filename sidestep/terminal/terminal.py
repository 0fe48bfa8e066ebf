"""A plain terminal, passed in as an object, and events as lines of text: no escape sequences, a line every few seconds.

Rich stays away from here: help and plain mode never wait for it. `rich_terminal` adds colours and the live view.
"""

import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TextIO

from sidestep.events import (
    Decision,
    EpochDone,
    Event,
    FileFailed,
    Finished,
    Notice,
    Progress,
    Report,
    Saved,
    StepDone,
    StepSkipped,
    Table,
    TrainingStarted,
    Validated,
    visible_event,
)
from sidestep.words import clock, count, gib, visible

SECONDS_BETWEEN_LINES = 3.0
SECONDS_BETWEEN_BESTS = 60.0  # a training gets better with almost every epoch
MOMENT_SECONDS = 0.4


def as_typed(value: object) -> str:
    """A setting's value as a person types it: on, off, 1e-04, a list in one line; a dash for none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple | list) else str(value)


def as_lines(event: Event) -> list[str]:
    """An event as lines of text, in full."""
    match event:
        case Notice(message=message, level=level):
            return [message if level == "info" else f"{level}: {message}"]
        case Decision(what=what, value=value, reason=reason):
            return [f"{what}: {value} ({reason})"]
        case Progress():
            return [progress_line(event)]
        case FileFailed(path=path, reason=reason, stage=stage):
            return [f"failed ({stage}): {path}: {reason}"]
        case StepDone():
            return [step_line(event)]
        case StepSkipped(step=step, songs=songs, reason=reason, in_a_row=in_a_row):
            return [
                f"warning: step {step} skipped ({in_a_row} in a row): {reason}; songs: {', '.join(songs) or 'unknown'}"
            ]
        case TrainingStarted(step=step, total_steps=total, total_epochs=epochs):
            since = f", from step {step}" if step else ""
            return [f"training: {count(total, 'optimizer step')}, {count(epochs, 'epoch')}{since}"]
        case EpochDone(epoch=epoch, total_epochs=total, loss=loss, seconds=seconds):
            return [f"epoch {epoch}/{total} done: mean loss {loss:.4f}, {clock(seconds)}"]
        case Validated(step=step, loss=loss, best=best):
            return [f"validation at step {step}: loss {loss:.4f}" + (" (best so far)" if best else "")]
        case Saved(what=what, path=path, note=note):
            return [f"saved {what}: {path}" + (f" ({note})" if note else "")]
        case Table():
            return table_lines(event)
        case Finished(message=message, next_commands=commands):
            return [message] + (["Next:", *(f"  {command}" for command in commands)] if commands else [])
    fields = ", ".join(f"{f.name}={getattr(event, f.name)}" for f in dataclasses.fields(event))
    return [f"{type(event).__name__}: {fields}"]


def progress_line(event: Progress) -> str:
    """`preprocess 3/12 (25%), 4.1 s/s, 0:32 left, song.wav`; bytes as `Merging 1.2/4.5 GiB (26%)`."""
    share = f" ({100 * event.done // event.total}%)" if event.total else ""
    goes_on = event.eta_seconds is not None and event.done < event.total
    parts = (
        f"{event.task} {done_of(event)}{share}",
        rate(event),
        f"{clock(event.eta_seconds)} left" if goes_on else "",
        event.current,
    )
    return ", ".join(part for part in parts if part)


def done_of(event: Progress) -> str:
    """How much of a task is done: `3/12`, or `1.2/4.5 GiB`."""
    if event.unit == "bytes":
        return f"{event.done / 2**30:.1f}/{gib(event.total)}"
    return f"{event.done}/{event.total}"


def pace(steps_per_second: float) -> str:
    """How fast steps go: `2.1 steps/s`, or `14 s per step` where one takes longer than a second."""
    if 0 < steps_per_second < 1:
        return f"{1 / steps_per_second:.3g} s per step"
    return f"{steps_per_second:.3g} steps/s"


def rate(event: Progress) -> str:
    """How fast a task goes, `4.1 s/s`, or nothing where that is not known."""
    return "" if event.rate is None else f"{event.rate:.3g} {event.unit}/s".replace(" /", "/")


def step_line(event: StepDone) -> str:
    """`step 10/500, epoch 1, loss 0.8120, lr 1.0e-04, grad norm 0.31, 2.1 steps/s, 3:55 left, 3.2 GiB`."""
    parts = (
        f"step {event.step}/{event.total_steps}",
        f"epoch {event.epoch}",
        f"loss {event.loss:.4f}",
        f"lr {event.lr:.1e}",
        f"grad norm {event.grad_norm:.3g}",
        pace(event.steps_per_second),
        f"{clock(event.eta_seconds)} left" if event.step < event.total_steps else "",
        gib(event.memory_bytes),
    )
    return ", ".join(part for part in parts if part)


def table_lines(event: Table) -> list[str]:
    """A table in columns; the widest cell sets a column's width."""
    rows = [event.columns, *event.rows] if any(event.columns) else list(event.rows)
    count = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(count)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    if any(event.columns):
        lines.insert(1, "  ".join("-" * width for width in widths))
    return [event.title, *(f"  {line}" for line in lines)] if event.title else lines


class UnderWay(dict[str, Progress]):
    """The last word of each task that goes on, in the order in which they began: each is a part of those before it.

    A part that failed has no end of its own: it goes with the end of what it was a part of.
    """

    def take(self, event: Progress) -> None:
        """Keep the last word of a task; at its end, drop it."""
        if event.done < event.total:
            self[event.task] = event
        elif event.task in self:
            for task in list(self)[list(self).index(event.task) :]:
                del self[task]


class PlainView:
    """Shows events as lines. Progress, steps and epochs come at most every few seconds.

    The last one always comes, but for that of a task inside another, which never does. That a training wrote a better
    best/ comes at most every minute: its end says which one it is.
    """

    def __init__(self, show: Callable[[str], None], now: Callable[[], float] = time.monotonic):
        self._show, self._now = show, now
        self._last: dict[str, float] = {}
        self._under_way = UnderWay()

    def __call__(self, event: Event) -> None:
        kind, is_last, pause = "", True, SECONDS_BETWEEN_LINES
        match event:
            case Progress():
                kind, is_last = f"progress {event.task}", event.done >= event.total
                self._under_way.take(event)
                if is_last and self._under_way:
                    return
            case StepDone():
                kind, is_last = "step", event.step >= event.total_steps
                self._under_way.clear()  # no task goes on across a step; one that failed has no end
            case EpochDone():
                kind, is_last = "epoch", event.epoch >= event.total_epochs
                self._under_way.clear()
            case Saved(what="best") if event.note:
                kind, is_last, pause = "best", False, SECONDS_BETWEEN_BESTS
        now = self._now()
        if is_last or now - self._last.get(kind, float("-inf")) >= pause:
            self._last[kind] = now
            for line in as_lines(visible_event(event)):
                self._show(line)


class Terminal:
    """A plain terminal: lines of text, no escape sequences. `RichTerminal` adds colours and the live view."""

    plain = True
    says_yes = False  # --yes: every question has its answer

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, source: TextIO | None = None):
        self.out, self.err, self.source = out or sys.stdout, err or sys.stderr, source or sys.stdin
        for stream in (self.out, self.err):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a song's name never stops a job on a console that cannot show it

    @property
    def interactive(self) -> bool:
        """True when a person can answer questions."""
        return is_tty(self.source) and is_tty(self.out)

    @property
    def width(self) -> int:
        """Columns, at least 40."""
        return max(40, shutil.get_terminal_size((80, 24)).columns)

    def print(self, text: str = "") -> None:
        """A line or paragraph of output."""
        print(visible(text, lines=True), file=self.out, flush=True)

    def error(self, problem: str, fix: str = "") -> None:
        """An error, on the error stream: what is wrong, then what helps."""
        text = f"error: {visible(problem)}" + (f"\n{visible(fix, lines=True)}" if fix else "")
        with suppress(OSError):  # nobody reads it; the exit status says it too
            print(text, file=self.err, flush=True)

    def note(self, text: str) -> None:
        """What is no error and no output either, on the error stream: it never lands in a file of results."""
        with suppress(OSError):
            print(visible(text, lines=True), file=self.err, flush=True)

    def confirm(self, question: str) -> bool:
        """A yes/no question on one line; Enter and the end of input mean no. Nobody is asked under `--yes`."""
        if self.says_yes:
            return True
        print(f"{question} [y/N] ", end="", file=self.out, flush=True)
        return self.source.readline().strip().lower() in ("y", "yes")

    def view(self) -> AbstractContextManager[Report]:
        """What shows a task's events while it runs."""
        return nullcontext(PlainView(self.print))

    def waiting(self, text: str) -> AbstractContextManager[None]:
        """Says what is going on while a block runs, once that takes longer than a moment."""
        return after_a_moment(lambda: self.print(text))


@contextmanager
def after_a_moment(start: Callable[[], object], stop: Callable[[], object] = lambda: None) -> Iterator[None]:
    """While a block runs: start something once it takes longer than a moment, and stop it with the block."""
    timer = threading.Timer(MOMENT_SECONDS, start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        stop()


def is_tty(stream: TextIO) -> bool:
    """True for a stream that leads to a terminal."""
    return getattr(stream, "isatty", lambda: False)()


def wants_plain(out: TextIO) -> bool:
    """True where Rich output would be noise: the output is no terminal, or one that says it is dumb."""
    return not is_tty(out) or os.environ.get("TERM") == "dumb"
