"""`build-dataset --analyze`: tempo, key and time signature of the songs for which nobody has told them.

Only what is missing is filled in, and listed under `estimated` of its sample; what a sidecar, a tag or a hand has written stands, and so does a value that
was emptied by hand. Songs are heard in parallel processes. Results are kept by content in `.side-step/analysis.json` beside dataset.json, so that a song is
heard once whatever it is called and however often the command runs; stopped half-way, the command goes on where it was.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

from sidestep.atomic import write_text
from sidestep.audio.estimation import VERSION, Estimate, estimate_file, is_available
from sidestep.audio.io import AudioError, content_hash
from sidestep.data.manifest import Dataset, Sample, read, relative_path, write
from sidestep.data.rebuild import emptied_by_hand, filled_in
from sidestep.errors import JobError, UserError
from sidestep.events import FileFailed, Notice, Progress, Report, Table

FIELDS = ("bpm", "keyscale", "timesignature")
CACHE = Path(".side-step") / "analysis.json"
_SAVE_SECONDS = 20.0


def analyze(path: Path, report: Report, workers: int = 0) -> Dataset:
    """Fill in what is missing in the dataset.json at `path` and write it again. `workers`: processes, 0 for one a core.

    Raises UserError when librosa is missing or the file cannot be read, JobError when a process died.
    """
    if not is_available():
        raise UserError("--analyze needs librosa, which is not installed.", "uv sync --extra analyze (or: pip install librosa), then the same command again")
    path = Path(os.path.abspath(path))
    dataset = read(path)
    wanted = {s.audio_path: _missing(dataset, s, path.parent) for s in dataset.samples}
    wanted = {song: names for song, names in wanted.items() if names}
    if not wanted:
        report(Notice(message="Tempo, key and time signature of every song are known; there is nothing to analyze."))
        return dataset
    heard = _hear(list(wanted), path, report, workers or os.cpu_count() or 1)
    samples = [_filled(s, wanted[s.audio_path], heard[s.audio_path]) if s.audio_path in heard else s for s in dataset.samples]
    dataset = filled_in(dataset, samples, FIELDS, path.parent)
    write(path, dataset)
    rows = [(name, str(sum(name in s.estimated for s in samples)), str(sum(not getattr(s, name) for s in samples))) for name in FIELDS]
    report(Table(title="Analysis", columns=("", "estimated", "still not known"), rows=tuple(rows)))
    return dataset


def _missing(dataset: Dataset, sample: Sample, folder: Path) -> tuple[str, ...]:
    emptied = emptied_by_hand(dataset, sample, folder)
    return tuple(name for name in FIELDS if not getattr(sample, name) and name not in emptied)


def _filled(sample: Sample, names: tuple[str, ...], estimate: Estimate) -> Sample:
    found = {name: value for name in names if (value := getattr(estimate, name)) is not None}
    return replace(sample, **found, estimated=tuple(dict.fromkeys([*sample.estimated, *found])))


def _hear(songs: list[Path], dataset_path: Path, report: Report, workers: int) -> dict[Path, Estimate]:
    """The estimate of every song that can be read; those of the cache are not heard again."""
    cache_path = dataset_path.parent / CACHE
    cache = _read_cache(cache_path)
    heard: dict[Path, Estimate] = {}
    same: dict[str, list[Path]] = {}
    for song in songs:
        try:
            same.setdefault(content_hash(song), []).append(song)
        except AudioError as error:
            report(FileFailed(path=str(song), reason=error.reason, stage="analyze"))
    for content in same.keys() & cache.keys():
        heard.update(dict.fromkeys(same.pop(content), cache[content]))
    started = saved = time.monotonic()
    try:
        for done, (content, result) in enumerate(_estimates(same, min(workers, len(same))), 1):
            name = relative_path(same[content][0], dataset_path.parent)
            if isinstance(result, AudioError):
                report(FileFailed(path=str(same[content][0]), reason=result.reason, stage="analyze"))
            else:
                cache[content] = result
                heard.update(dict.fromkeys(same[content], result))
            rate = done / (time.monotonic() - started)
            report(Progress(task="Analyzing", done=done, total=len(same), current=name, rate=rate, unit="songs", eta_seconds=(len(same) - done) / rate))
            if time.monotonic() - saved > _SAVE_SECONDS:
                _write_cache(cache_path, cache)
                saved = time.monotonic()
    finally:
        if same:
            _write_cache(cache_path, cache)
    return heard


def _estimates(songs: dict[str, list[Path]], workers: int) -> Iterator[tuple[str, Estimate | AudioError]]:
    """(content, estimate) as they come; one song in this process, more in processes of their own."""
    if workers <= 1:
        for content, paths in songs.items():
            try:
                yield content, estimate_file(paths[0])
            except AudioError as error:
                yield content, error
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting: dict[Future, str] = {pool.submit(estimate_file, paths[0]): content for content, paths in songs.items()}
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except AudioError as error:
                yield waiting[future], error
            except BrokenProcessPool as error:
                raise JobError("A process of --analyze died, most likely for want of memory.", "The same command goes on where it was.") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read_cache(path: Path) -> dict[str, Estimate]:
    """The results kept from before; none where they cannot be read or are of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}
        return {content: Estimate(**values) for content, values in data["songs"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, cache: dict[str, Estimate]) -> None:
    write_text(path, json.dumps({"version": VERSION, "songs": {content: asdict(e) for content, e in sorted(cache.items())}}, indent=0))
