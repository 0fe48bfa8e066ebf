"""What the passes of preprocessing share: songs are taken under their locks, written in a thread, and counted."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from sidestep.data.records import RecordError
from sidestep.errors import ExitStatus
from sidestep.events import FileFailed, Notice, Progress, Report
from sidestep.tasks.preprocess.job import FULL, Failure, Inspection, Job, Stage, WorkFolder, disk_full
from sidestep.tasks.preprocess.songs import Song
from sidestep.words import clock

WRITES_BEHIND = 4


@dataclass(frozen=True)
class Summary:
    """How many songs of a job were made now, were up to date already (or made by another process) and failed."""

    done: int
    skipped: int
    failed: int

    @property
    def status(self) -> ExitStatus:
        return ExitStatus.SOME_FAILED if self.failed else ExitStatus.OK


@dataclass
class Results:
    """What became of the job's songs in this process, by their keys."""

    report: Report
    work: WorkFolder
    done: set[str] = field(default_factory=set)
    up_to_date: set[str] = field(default_factory=set)  # not made here
    failures: dict[str, Failure] = field(default_factory=dict)
    encoded: Counter[str] = field(default_factory=Counter)  # how often a song's audio was

    def is_settled(self, song: Song) -> bool:
        return song.key in self.done or song.key in self.up_to_date or song.key in self.failures

    def fail(self, song: Song, stage: str, reason: str) -> None:
        """The song cannot be used; the others go on, and the other processes of this job hear of it."""
        failure = Failure(song.name, reason, stage)
        self.work.note_failure(song.key, failure)
        self.note(song, failure)

    def note(self, song: Song, failure: Failure) -> None:
        """The song cannot be used, as this or another process found."""
        self.failures[song.key] = failure
        self.report(FileFailed(path=failure.path, reason=failure.reason, stage=failure.stage))

    def fail_for(self, song: Song, stage: str, error: OSError) -> None:
        """A song whose files could not be read or written. Raises JobError when the disk is full."""
        if error.errno in FULL:
            raise disk_full(self.work.folder.parent) from error
        self.fail(song, stage, f"{error.strerror or error}")

    def summary(self) -> Summary:
        return Summary(len(self.done), len(self.up_to_date), len(self.failures))


class Pass:
    """One pass over songs, as a context manager: locks, a thread that writes, and progress (songs, rate, time left).

    sizes: the work of each song by its key, in `unit`.
    """

    def __init__(
        self, job: Job, results: Results, task: str, stages: Sequence[Stage], sizes: Mapping[str, float], unit: str
    ):
        self.job, self.results, self.task, self.stages, self.sizes, self.unit = job, results, task, stages, sizes, unit
        self._total, self._left = len(sizes), sum(sizes.values())
        self._through, self._worked, self._started = 0, 0.0, time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writes: deque[tuple[Song, Future[None]]] = deque()

    def __enter__(self) -> "Pass":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if error is None:
            self._settle(0)

    def take(self, song: Song) -> Inspection | None:
        """Take the song's lock and look again what it needs. None when another process has it, or at another stage."""
        if not self.job.locks.take(song.key):
            return None
        found = self.job.inspect(song)
        if found.stage == Stage.NOTHING:
            self.results.up_to_date.add(song.key)
        return found if found.stage in self.stages else None

    def each(self, songs: Sequence[Song]) -> Iterator[tuple[Song, Inspection]]:
        """The songs that are at this pass's stage, one by one, under their locks."""
        for song in songs:
            found = self.take(song)
            if found:
                self.begin(song)
                yield song, found
            else:
                self.end(song, worked=False)

    def begin(self, song: Song, done: float = 0.0) -> None:
        """A song is being worked on. done: seconds of it that are through."""
        elapsed, worked = time.monotonic() - self._started, self._worked + done
        rate = worked / elapsed if worked and elapsed > 0 else None
        self.results.report(
            Progress(
                task=self.task,
                done=self._through,
                total=self._total,
                current=f"{song.name}, {clock(done)}" if done else song.name,
                rate=rate,
                unit=self.unit,
                eta_seconds=max(self._left - done, 0.0) / rate if rate else None,
            )
        )

    def warn(self, song: Song, message: str) -> None:
        """Say something of the song that the user should know."""
        self.results.report(Notice(message=f"{song.name}: {message}", level="warning"))

    def write(self, song: Song, write: Callable[[], None]) -> None:
        """Write what was made of the song, in a thread; the song is through then. Raises JobError on a full disk."""
        self.job.watch_disk()
        self._writes.append((song, self._writer.submit(write)))
        self._settle(WRITES_BEHIND)

    def fail(self, song: Song, stage: str, reason: str) -> None:
        """The song cannot be used, and is through."""
        self.results.fail(song, stage, reason)
        self.end(song)

    def end(self, song: Song, *, worked: bool = True) -> None:
        """A song is through and its lock given back; `worked` when that took this process its time."""
        self.job.locks.release(song.key)
        self._through += 1
        self._left -= self.sizes[song.key]
        if worked:
            self._worked += self.sizes[song.key]
        self.begin(song)

    def _settle(self, waiting_at_most: int) -> None:
        while self._writes and (len(self._writes) > waiting_at_most or self._writes[0][1].done()):
            song, written = self._writes.popleft()
            try:
                written.result()
            except RecordError as error:
                self.results.fail(song, "conditions", error.problem)
            except OSError as error:
                self.results.fail_for(song, "write", error)
            self.end(song)
