"""What became of each song, and how fast it goes."""

import time
from dataclasses import dataclass, field

from sidestep.errors import ExitStatus, JobError
from sidestep.events import FileFailed, Progress, Report
from sidestep.tasks.preprocess.claims import Claims
from sidestep.tasks.preprocess.job import Failure, WorkFolder, disk_full, is_full
from sidestep.tasks.preprocess.songs import Song


@dataclass(frozen=True)
class Summary:
    """How many songs of a job were made now, stood already (or were made by another process) and failed."""

    done: int
    skipped: int
    failed: int

    @property
    def status(self) -> ExitStatus:
        return ExitStatus.SOME_FAILED if self.failed else ExitStatus.OK


@dataclass
class Tally:
    """The job's songs by key, and what became of them in this process."""

    report: Report
    work: WorkFolder
    claims: Claims
    done: set[str] = field(default_factory=set)
    standing: set[str] = field(default_factory=set)
    failures: dict[str, Failure] = field(default_factory=dict)

    def is_settled(self, song: Song) -> bool:
        return song.key in self.done or song.key in self.standing or song.key in self.failures

    def stands(self, song: Song) -> None:
        """The song's record is as it should be and was not made here."""
        self.standing.add(song.key)
        self.claims.release(song.key)

    def fail(self, song: Song, stage: str, reason: str) -> None:
        """The song cannot be used; the others go on."""
        failure = Failure(song.name, reason, stage)
        self.work.note_failure(song.key, failure)
        self._failed(song, failure)

    def failed_elsewhere(self, song: Song) -> bool:
        """Whether another process of this job found that the song cannot be used."""
        failure = self.work.failure(song.key, since=self.claims.started)
        if failure:
            self._failed(song, failure)
        return failure is not None

    def fail_for(self, song: Song, stage: str, error: OSError) -> None:
        """A song whose files could not be read or written. Raises JobError when the disk is full: no other song would fare better."""
        if is_full(error):
            raise disk_full(self.work.folder.parent) from error
        self.fail(song, stage, f"{error.strerror or error}")

    def summary(self) -> Summary:
        return Summary(len(self.done), len(self.standing), len(self.failures))

    def _failed(self, song: Song, failure: Failure) -> None:
        self.failures[song.key] = failure
        self.claims.release(song.key)
        self.report(FileFailed(path=failure.path, reason=failure.reason, stage=failure.stage))


class Pace:
    """Progress of one stage: songs done of all, audio seconds (or another unit) per second, time left."""

    def __init__(self, report: Report, task: str, seconds: dict[str, float], unit: str = "audio s"):
        self._report, self._task, self._unit, self._seconds = (
            report,
            task,
            unit,
            seconds,
        )  # seconds of audio by key, of the songs that are left
        self._total, self._left = len(seconds), sum(seconds.values())
        self._started = time.monotonic()
        self._done, self._done_seconds = 0, 0.0

    def begin(self, song: Song) -> None:
        """A song is being worked on."""
        self._tell(song)

    def end(self, song: Song, *, worked: bool = True) -> None:
        """A song is through; `worked` when that took this process its time."""
        seconds = self._seconds.pop(song.key, 0.0)
        self._done += 1
        self._left -= seconds
        if worked:
            self._done_seconds += seconds
        self._tell(song)

    def _tell(self, song: Song) -> None:
        elapsed = time.monotonic() - self._started
        rate = self._done_seconds / elapsed if self._done_seconds and elapsed > 0 else None
        eta = max(self._left, 0.0) / rate if rate else None
        self._report(
            Progress(
                task=self._task,
                done=self._done,
                total=max(self._total, self._done),
                current=song.name,
                rate=rate,
                unit=self._unit,
                eta_seconds=eta,
            )
        )


def require_some(summary: Summary, where: str) -> Summary:
    """The summary. Raises JobError when not one song could be used."""
    if summary.failed and not summary.done and not summary.skipped:
        raise JobError(
            f"None of {summary.failed} songs could be preprocessed; {where} has the reason of each.",
            "Put the files right and give the same command again.",
        )
    return summary
