"""What a running task reports. Tasks never print: they call `report(event)` and a face shows or stores it."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from sidestep.words import visible

STEP_TASK = "Within this step"  # the task of its progress, which goes with the step
SECONDS_OF_SILENCE = 3.0  # the longest that a task may go on without a word


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; its class name is the `event` field of a line in `events.jsonl`."""


Report = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """One sentence for the user. `level`: info, warning or error."""

    message: str
    level: str = "info"


@dataclass(frozen=True, kw_only=True)
class Decision(Event):
    """A decision that was made for the user: what, which value and why."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """How far a task of countable parts has come. `rate` is in `unit` per second, `eta_seconds` the time left.

    With `bytes` as the unit, `done` and `total` are bytes.
    """

    task: str
    done: int
    total: int
    current: str = ""
    rate: float | None = None
    unit: str = ""
    eta_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class FileFailed(Event):
    """One input that could not be used; the others go on."""

    path: str
    reason: str
    stage: str


@dataclass(frozen=True, kw_only=True)
class TrainingStarted(Event):
    """All is loaded, and the first optimizer step begins. step: how many are done already, of a run that goes on."""

    step: int
    total_steps: int
    epoch: int
    total_epochs: int


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """An optimizer step that was logged. Times in seconds, memory in bytes (None where the device has no counter)."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    steps_per_second: float
    eta_seconds: float
    memory_bytes: int | None = None
    drift: float | None = None  # with --prior-data: distance from the model itself on other music


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """An optimizer step left out because its loss or gradient was not finite."""

    step: int
    songs: tuple[str, ...]
    reason: str
    in_a_row: int


@dataclass(frozen=True, kw_only=True)
class EpochDone(Event):
    """The end of an epoch and its mean training loss."""

    epoch: int
    total_epochs: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """Loss on the fixed grid of held-out songs, noise and timesteps."""

    step: int
    epoch: int
    loss: float
    best: bool


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """Something complete is on disk now. `what`: checkpoint, best, final, preview, dataset, … `note`: what is in it."""

    what: str
    path: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table(Event):
    """Rows to show as they are: a summary, an audit, a plan."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """A task came to its end: a sentence, and the commands that make sense next."""

    message: str
    next_commands: tuple[str, ...] = ()


TELLING = 0.001  # of a task: from less than this nobody can say how long the rest takes


class LongTask:
    """Progress of a task that may be over at once: a first word after `quiet_seconds`, then one a second, and its end.

    Call it with the parts that were done since the last call. A task that ends before its first word tells nothing.
    """

    def __init__(
        self, report: Report, task: str, total: int, *, unit: str = "", quiet_seconds: float = SECONDS_OF_SILENCE
    ):
        self._report, self._task, self._total, self._unit = report, task, total, unit
        self._began = time.monotonic()
        self._next, self._done, self._is_told = self._began + quiet_seconds, 0, False
        if not quiet_seconds:
            self(0)

    def __call__(self, parts: int = 1, current: str = "") -> None:
        self._done += parts
        now = time.monotonic()
        if now < self._next and not (self._is_told and self._done >= self._total):
            return
        self._next, self._is_told = now + 1.0, True
        tells = self._done > TELLING * self._total
        left = (self._total - self._done) * (now - self._began) / self._done if tells else None
        self._report(
            Progress(
                task=self._task, done=self._done, total=self._total, current=current, unit=self._unit, eta_seconds=left
            )
        )


def as_json(event: Event) -> str:
    """One line of `events.jsonl`: the event's name, the time (seconds since the epoch) and its fields."""
    return json.dumps(
        {"event": type(event).__name__, "time": round(time.time(), 3), **dataclasses.asdict(event)}, ensure_ascii=False
    )


class EventLog:
    """Appends every event to a file, one JSON line each; use as `report` or beside one.

    The file is made at the first event: a call that is refused leaves nothing behind. On a full disk lines wait in
    memory until there is room; `warn` is told once. What still waits at the end is lost.
    """

    def __init__(self, path: Path, warn: Report = lambda _event: None):
        self._path, self._warn = path, warn
        self._file: FileIO | None = None
        self._waiting, self._is_told = b"", False
        self._lock = threading.RLock()  # keys and signals are answered from threads of their own

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._write(event)

    def _write(self, event: Event) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        self._waiting += (as_json(event) + "\n").encode(
            "utf-8", "backslashreplace"
        )  # a Linux file name may be no UTF-8
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._is_told:
                message = f"{self._path}: cannot be written now ({error.strerror or error}); its lines wait in memory."
                self._warn(Notice(message=message, level="warning"))
            self._is_told = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def tee(first: Report, second: Report) -> Report:
    """A report that goes to two places, in order."""

    def report(event: Event) -> None:
        first(event)
        second(event)

    return report


def null(_event: Event) -> None:
    """A report that nobody reads."""


def visible_event(event: Event) -> Event:
    """The event as it may be shown: names and captions from files cannot act on the terminal or forge lines."""
    return dataclasses.replace(
        event, **{field.name: _visible(getattr(event, field.name)) for field in dataclasses.fields(event)}
    )


def _visible(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_visible, value))
    return visible(value) if isinstance(value, str) else value
