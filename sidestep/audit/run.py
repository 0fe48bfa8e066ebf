"""The audit: every song is listened to once, in threads, and what was measured is kept by content beside dataset.json."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sidestep.atomic import write_text
from sidestep.audio.io import AudioError, content_hash
from sidestep.audit.findings import Finding, Song, find
from sidestep.audit.measure import VERSION, Measurement, measure
from sidestep.audit.page import page
from sidestep.audit.tokens import prompt_tokens, token_counter
from sidestep.data.manifest import Dataset, Sample, read, relative_path
from sidestep.errors import JobError
from sidestep.events import Progress, Report, Saved, Table

CACHE = Path(".side-step") / "audit.json"
_THREADS = 4  # each holds a whole song
_REPORT_SECONDS = 0.5
_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Audit:
    """Where the page stands, every song and what was found."""

    page: Path
    songs: tuple[Song, ...]
    findings: tuple[Finding, ...]


def audit(path: Path, report: Report, checkpoint_dir: Path | None = None) -> Audit:
    """Listen to every song of the dataset.json at `path`; report a table and write `dataset-audit.html` beside it.

    With `checkpoint_dir` tokens are counted, without it guessed. Raises UserError for a wrong path, JobError when the page cannot be written.
    """
    path = Path(os.path.abspath(path))
    dataset = read(path)
    count = token_counter(checkpoint_dir)
    songs = []
    for sample, heard in _listen(dataset, path, report):
        measured, reason = (None, heard.reason) if isinstance(heard, AudioError) else (heard, "")
        seconds = measured.seconds if measured else sample.duration
        text, lyrics = prompt_tokens(sample, dataset.metadata, seconds, count)
        songs.append(Song(sample, relative_path(sample.audio_path, path.parent), measured, reason, text, lyrics, checkpoint_dir is None))
    findings = find(songs)
    report(_table(findings, len(songs)))
    target = path.with_name(f"{path.stem}-audit.html")
    try:
        write_text(target, page(dataset, songs, findings, path.parent).encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise JobError(f"{target} cannot be written: {error.strerror or error}.", "Make room or rights there, then run it again.") from error
    report(Saved(what="audit", path=str(target)))
    return Audit(target, tuple(songs), tuple(findings))


def _table(findings: list[Finding], total: int) -> Table:
    rows = [(f.what, f"{len(f.songs)} of {total}", _example(f)) for f in findings]
    return Table(title="Audit", columns=("found", "songs", "such as"), rows=tuple(rows or [("nothing amiss", f"{total} of {total}", "")]))


def _example(finding: Finding) -> str:
    name = finding.songs[0]
    return f"{name} ({finding.notes[name]})" if finding.notes[name] else name


def _listen(dataset: Dataset, path: Path, report: Report) -> Iterator[tuple[Sample, Measurement | AudioError]]:
    """Every sample with its measurement or why there is none, in order."""
    cache_path = path.parent / CACHE
    cache = _read_cache(cache_path)
    known: dict[str, Measurement] = {}

    def listen(sample: Sample) -> tuple[str, Measurement | AudioError]:
        try:
            content = content_hash(sample.audio_path)
            return content, cache.get(content) or measure(sample.audio_path)
        except AudioError as error:
            return "", error

    total, seconds = len(dataset.samples), 0.0
    started = reported = saved = time.monotonic()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for done, (sample, (content, heard)) in enumerate(zip(dataset.samples, pool.map(listen, dataset.samples), strict=True), 1):
            if isinstance(heard, Measurement):
                known[content] = heard
                seconds += heard.seconds
            yield sample, heard
            now = time.monotonic()
            if now - reported > _REPORT_SECONDS or done == total:
                eta = (total - done) * (now - started) / done
                report(
                    Progress(
                        task="Listening", done=done, total=total, current=sample.filename, rate=seconds / (now - started), unit="s of audio", eta_seconds=eta
                    )
                )
                reported = now
            if now - saved > _SAVE_SECONDS:
                _write_cache(cache_path, cache | known)
                saved = now
    _write_cache(cache_path, known)


def _read_cache(path: Path) -> dict[str, Measurement]:
    """What was measured before; nothing where it cannot be read or is of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}
        lists = ("envelope", "shape")
        return {content: Measurement(**{**values, **{name: tuple(values[name]) for name in lists}}) for content, values in data["songs"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, known: dict[str, Measurement]) -> None:
    write_text(path, json.dumps({"version": VERSION, "songs": {content: asdict(m) for content, m in sorted(known.items())}}))
