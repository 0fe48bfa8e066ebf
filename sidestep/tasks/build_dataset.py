"""`build-dataset`: a folder of songs, and the text beside and inside them, into dataset.json; `--analyze`.

Each field of a song comes from the best source that knows it: sidecars, lists, tags (see `data.sidecars`, `data.tags`).
Beyond that:

- A song without a caption is called by what its tags say ("rock, Title by Artist"), else by its file name without track
  number; `labeled` is then false.
- A song is instrumental when a source says so, or when none has lyrics. Lyrics of a song that a source calls
  instrumental are left out and reported.
- The duration is the file's. One in a sidecar that differs by a second or more is reported, and not used.
- A file that cannot be read as audio is reported, and the others go on.

`--analyze` hears tempo, key and time signature of the songs for which nobody has told them. Only what is missing is
filled in, and listed under `estimated` of its sample; what a sidecar, a tag or a hand has written stays, and so does a
value that was emptied by hand. Songs are heard in parallel processes. Results are kept by content in
`.side-step/analysis.json` beside dataset.json, so that a song is heard once whatever it is called and however often the
command runs; stopped half-way, the command goes on where it was.
"""

import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sidestep.audio.io import AudioError, AudioInfo, content_hash, find_audio, probe
from sidestep.audio.signals import VERSION, Estimate, estimate_file, is_available
from sidestep.data.fields import INSTRUMENTAL
from sidestep.data.manifest import (
    MAX_BYTES,
    SECTION,
    Dataset,
    Sample,
    duration_differs,
    emptied_by_hand,
    filled_in,
    merge,
    read,
    relative_path,
    sample_id,
    write,
)
from sidestep.data.sidecars import Known, Sidecars, Tables
from sidestep.data.tags import Tags, read_tags
from sidestep.data.text import read_text
from sidestep.errors import JobError, UserError
from sidestep.events import FileFailed, Finished, Notice, Progress, Report, Saved, Table
from sidestep.files import write_text
from sidestep.settings.advice import doubt_about_tag
from sidestep.settings.config import BuildDatasetConfig
from sidestep.settings.path_checks import AUDIO_SUFFIXES
from sidestep.words import clock, count, side_step

MODEL_SECONDS = 600  # the longest song the model knows
ANALYZED = ("bpm", "keyscale", "timesignature")
FROM_TAGS, FROM_NAME, NO_LYRICS = "from genre and title", "from the file name", "no lyrics were found"
CACHE = Path(".side-step") / "analysis.json"
_SAVE_SECONDS = 20.0
_THREADS = 8  # headers and tags wait for the disk
_REPORT_SECONDS = 0.5
_TRACK_NUMBER = re.compile(r"^\s*(?:\d{1,2}-)?\d{1,3}\s*[-._)]\s*|^\s*\d{2}\s+(?=\D)")


@dataclass(frozen=True)
class BuildSummary:
    """What was built: the file, its data set, and (path, reason) of every file that could not be read."""

    path: Path
    dataset: Dataset
    failed: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class _Song:
    """A song as found: its path, what its header says and every source of text, the best first, its tags the last."""

    path: Path
    info: AudioInfo
    sources: list[Known]
    tags: Tags


def build_dataset(config: BuildDatasetConfig, report: Report) -> BuildSummary:
    """Index `config.input` and write dataset.json.

    Raises UserError for paths that cannot be, JobError when no song could be read.
    """
    output = output_path(config)
    old = read(output, report) if output.exists() and not config.overwrite else Dataset()
    before = old.metadata
    metadata = replace(  # what was typed, else what the file says, else the default
        before,
        name=config.name or before.name or config.input.resolve().name,
        custom_tag=before.custom_tag if config.tag is None else config.tag.strip(),
        tag_position=config.tag_position or before.tag_position,
        genre_ratio=before.genre_ratio if config.genre_ratio is None else config.genre_ratio,
        created_at=before.created_at or datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    if doubt := doubt_about_tag(config.tag or ""):
        report(Notice(message=doubt, level="warning"))
    songs, failed = _find_songs(config.input, report)
    origins: Counter[str] = Counter()
    fresh = [_describe(song, config.input, output.parent, metadata.custom_tag, origins, report) for song in songs]
    songs_folder = Path(os.path.abspath(config.input))  # noqa: PTH100 - resolve() would follow links
    rebuilt = merge(old, fresh, output.parent, songs_folder)
    notes = {**rebuilt.notes, "tag": metadata.custom_tag}
    dataset = Dataset(metadata=metadata, samples=rebuilt.samples, extra={**old.extra, SECTION: notes})
    try:
        write(output, dataset)
    except OSError as error:
        problem = f"{output} cannot be written: {error.strerror or error}."
        raise UserError(problem, "Name another place: --output FILE") from error
    if rebuilt.edits:
        kept = (
            f"Edited by hand in {output.name} and kept: {count(rebuilt.edits, 'value')} (--overwrite builds it anew)."
        )
        report(Notice(message=kept))
    if rebuilt.excluded:
        excluded = f"{len(rebuilt.excluded)} songs that were taken out of {output.name} by hand stay out"
        report(Notice(message=f"{excluded}, such as {rebuilt.excluded[0]}."))
    if absent := rebuilt.absent:
        gone = (
            f"{absent[0].audio_path} is"
            if len(absent) == 1
            else f"{absent[0].audio_path} and {len(absent) - 1} more are"
        )
        kept = f"what {output.name} knows of missing songs is kept aside until they are back"
        report(Notice(level="warning", message=f"{gone} not there; {kept}."))
    report(_summary(dataset, origins, len(failed)))
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    report(Saved(what="dataset", path=str(shown)))
    preprocess = side_step(
        *("preprocess", "--dataset-json", str(shown)),
        *("--tensor-output", "tensors", "--checkpoint-dir", "CHECKPOINTS"),
    )
    report(Finished(message=f"{len(dataset.samples)} songs in {shown}", next_commands=(preprocess,)))
    return BuildSummary(output, dataset, tuple(failed))


def output_path(config: BuildDatasetConfig) -> Path:
    """Where dataset.json stands or will stand. Raises UserError when --input is no folder."""
    if not config.input.is_dir():
        there = "is a file" if config.input.is_file() else "does not exist"
        raise UserError(
            f"--input {config.input} {there}; a folder of songs is needed.",
            side_step("build-dataset", "--input", "FOLDER_OF_SONGS"),
        )
    output = config.output or config.input / "dataset.json"
    # Not resolve(): links in the path to the songs are the user's own and stay.
    return Path(os.path.abspath(output / "dataset.json" if output.is_dir() else output))  # noqa: PTH100


def _find_songs(folder: Path, report: Report) -> tuple[list[_Song], list[tuple[Path, str]]]:
    """Every song that can be read, and (path, reason) of those that cannot."""
    failed: list[tuple[Path, str]] = []

    def fail(path: Path, reason: str, stage: str) -> None:
        failed.append((path, reason))
        report(FileFailed(path=str(path), reason=reason, stage=stage))

    def read_one(path: Path) -> _Song | AudioError:
        try:
            info = probe(path)
        except AudioError as error:
            return error
        sources = [*sidecars.of(path), *tables.of(path)]
        tags = read_tags(path, next((s.values["language"] for s in sources if "language" in s.values), ""))
        return _Song(path, info, [*sources, tags], tags)

    passed: Counter[str] = Counter()
    paths = find_audio(folder, lambda path, reason: fail(path, f"folder cannot be listed: {reason}", "search"), passed)
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in passed.most_common())
    passed_over = f"passed over, because their kind is not read: {kinds}" if passed else ""
    if not paths:
        suffixes = " ".join(sorted(AUDIO_SUFFIXES))
        problem = f"No audio file in {folder} or below it" + (f" ({passed_over})." if passed else ".")
        raise JobError(problem, f"Songs are known by their suffix: {suffixes}")
    if passed:
        report(Notice(level="warning", message=f"{count(passed.total(), 'file')} {passed_over}."))
    sidecars, tables = Sidecars(paths), Tables(folder, paths)
    for path, problem in tables.problems:
        report(Notice(level="warning", message=f"{relative_path(path, folder)}: {problem}"))
    songs: list[_Song] = []
    started = last = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:  # reads ahead
        for done, (path, song) in enumerate(zip(paths, pool.map(read_one, paths), strict=True), 1):
            if isinstance(song, AudioError):
                fail(path, song.reason, "read")
            else:
                songs.append(song)
            now = time.monotonic()
            if now - last >= _REPORT_SECONDS or done == len(paths):
                name = relative_path(path, folder)
                report(_progress("Reading songs", done, len(paths), name, max(now - started, 1e-6)))
                last = now
    if unread := sidecars.unread():
        names = ", ".join(relative_path(path, folder) for path in unread[:3])
        verb, more = "was" if len(unread) == 1 else "were", ", …" if len(unread) > 3 else ""
        report(Notice(message=f"{count(len(unread), 'text file')} beside songs {verb} not read: {names}{more}"))
    if not songs:
        first, reason = failed[0]
        raise JobError(
            f"None of the {len(paths)} audio files in {folder} can be read.", f"The first: {first}: {reason}"
        )
    return songs, failed


def _progress(task: str, done: int, total: int, current: str, seconds: float) -> Progress:
    return Progress(
        task=task,
        done=done,
        total=total,
        current=current,
        rate=done / seconds,
        unit="songs",
        eta_seconds=(total - done) * seconds / done,
    )


def _describe(
    song: _Song, folder: Path, output_folder: Path, tag: str, origins: Counter[str], report: Report
) -> Sample:
    """One song with every field from the best source that has it. `origins` counts where captions come from."""
    name = relative_path(song.path, folder)
    audio_path = Path(os.path.abspath(song.path))  # noqa: PTH100 - resolve() would follow links
    values: dict[str, Any] = {}
    for source in song.sources:
        for problem in source.problems:
            report(Notice(level="warning", message=f"{name}: {source.source}: {problem}"))
        values = {**source.values, **values}
    lyrics, instrumental = values.get("lyrics", ""), values.get("is_instrumental")
    has_words = bool(lyrics) and lyrics.strip().casefold() not in ("[instrumental]", "[inst]", "instrumental")
    if instrumental and has_words:
        left_out = "is said to be instrumental and has lyrics; the lyrics were left out."
        report(Notice(level="warning", message=f"{name}: {left_out}"))
        has_words = False
    made_up: dict[str, str] = {}
    if instrumental is None:
        instrumental = not has_words
        if instrumental:
            made_up["is_instrumental"] = NO_LYRICS
    caption, genre, title = values.get("caption", ""), values.get("genre", ""), song.tags.title
    labeled = bool(caption or genre)
    origins["written" if caption else FROM_TAGS if genre or title else FROM_NAME] += 1
    if not caption:
        made_up["caption"] = FROM_TAGS if genre or title else FROM_NAME
        called = f"{title} by {song.tags.artist}" if title and song.tags.artist else title
        caption = ", ".join(part for part in (genre, called) if part)
    if not caption:
        words = _TRACK_NUMBER.sub("", song.path.stem).replace("_", " ").encode("utf-8", "replace").decode("utf-8")
        caption = " ".join(words.split()) or "music"
    sample = Sample(
        audio_path=audio_path,
        id=sample_id(relative_path(audio_path, output_folder)),
        filename=song.path.name,
        caption=caption,
        genre=genre,
        captions=values.get("captions", ()),
        lyrics=lyrics if has_words else INSTRUMENTAL if instrumental else "",
        bpm=values.get("bpm"),
        keyscale=values.get("keyscale", ""),
        timesignature=values.get("timesignature", ""),
        duration=values.get("duration", 0.0),
        language=values.get("language", "unknown"),
        is_instrumental=instrumental,
        custom_tag=values.get("custom_tag", tag),
        labeled=labeled,
        prompt_override=values.get("prompt_override"),
        repeat=values.get("repeat", 1),
        origins=made_up,
    )
    seconds = song.info.seconds
    if duration_differs(sample, seconds):
        lengths = f"is {seconds:.1f} s long, not {sample.duration:g} s as written; the file's length counts."
        report(Notice(level="warning", message=f"{name}: {lengths}"))
    return replace(sample, duration=seconds)


def _summary(dataset: Dataset, origins: Counter[str], failed: int) -> Table:
    samples = dataset.samples
    seconds = [s.duration for s in samples] or [0.0]
    known = {
        "genre": [s.genre for s in samples],
        "lyrics": [s.lyrics not in ("", INSTRUMENTAL) for s in samples],
        "tempo": [s.bpm is not None for s in samples],
        "key": [s.keyscale for s in samples],
        "time signature": [s.timesignature for s in samples],
        "language": [s.language != "unknown" for s in samples],
    }
    rows = (
        ("songs", str(len(samples))),
        ("length", f"{clock(sum(seconds))} in all, {clock(min(seconds))} to {clock(max(seconds))}"),
        ("longer than the model's 10 minutes", str(sum(s > MODEL_SECONDS for s in seconds))),
        ("captions", ", ".join(f"{count} {origin}" for origin, count in origins.most_common())),
        *((what, f"{sum(map(bool, values))} of {len(samples)}") for what, values in known.items()),
        ("could not be read", str(failed)),
    )
    return Table(title=f"Dataset {dataset.metadata.name}", columns=("", ""), rows=rows)


def check_analysis() -> None:
    """Raises UserError where librosa is missing."""
    if not is_available():
        raise UserError(
            "--analyze needs librosa, which is not installed.",
            "uv sync --extra analyze (or: pip install librosa), then the same command again",
        )


def analyze(path: Path, report: Report, workers: int = 0) -> Dataset:
    """Fill in what is missing in the dataset.json at `path` and write it again. `workers`: processes, 0 for one a core.

    Raises UserError when librosa is missing or the file cannot be read.
    """
    check_analysis()
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    dataset = read(path, report)
    wanted: dict[Path, list[str]] = {}
    for sample in dataset.samples:
        emptied = emptied_by_hand(dataset, sample, path.parent)
        if names := [name for name in ANALYZED if not getattr(sample, name) and name not in emptied]:
            wanted[sample.audio_path] = names
    if not wanted:
        report(Notice(message="Tempo, key and time signature of every song are known; there is nothing to analyze."))
        return dataset
    heard = _hear(list(wanted), path, report, workers or os.cpu_count() or 1)
    samples = []
    for sample in dataset.samples:
        if estimate := heard.get(sample.audio_path):
            names = wanted[sample.audio_path]
            found: dict[str, Any] = {name: value for name in names if (value := getattr(estimate, name)) is not None}
            sample = replace(sample, **found, estimated=tuple(dict.fromkeys([*sample.estimated, *found])))
        samples.append(sample)
    dataset = filled_in(dataset, samples, ANALYZED, path.parent)
    write(path, dataset)
    rows = [
        (name, str(sum(name in s.estimated for s in samples)), str(sum(not getattr(s, name) for s in samples)))
        for name in ANALYZED
    ]
    report(Table(title="Analysis", columns=("", "estimated", "still not known"), rows=tuple(rows)))
    return dataset


def _hear(songs: list[Path], dataset_path: Path, report: Report, workers: int) -> dict[Path, Estimate]:
    """The estimate of every song that can be read; those of the cache are not heard again."""
    cache_path = dataset_path.parent / CACHE
    try:
        kept = json.loads(read_text(cache_path, MAX_BYTES)[0])
        songs_kept = kept["songs"].items() if kept["version"] == VERSION else ()
        cache = {content: Estimate(**values) for content, values in songs_kept}
    except (ValueError, LookupError, TypeError, AttributeError):  # not there, or not as we wrote it
        cache = {}
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
            first = same[content][0]
            if isinstance(result, AudioError):
                report(FileFailed(path=str(first), reason=result.reason, stage="analyze"))
            else:
                cache[content] = result
                heard.update(dict.fromkeys(same[content], result))
            name = relative_path(first, dataset_path.parent)
            report(_progress("Analyzing", done, len(same), name, max(time.monotonic() - started, 1e-6)))
            if time.monotonic() - saved > _SAVE_SECONDS:
                _write_cache(cache_path, cache)
                saved = time.monotonic()
    finally:
        if same:
            _write_cache(cache_path, cache)
    return heard


def _estimates(songs: dict[str, list[Path]], workers: int) -> Iterator[tuple[str, Estimate | AudioError]]:
    """(content, estimate) in order; one song in this process, more in processes of their own.

    When one of those dies the rest is heard in one process, so that it is known which song did it.
    """
    if workers <= 1:
        for content, paths in songs.items():
            try:
                yield content, estimate_file(paths[0])
            except AudioError as error:
                yield content, error
        return
    left = dict(songs)
    while left:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            futures = {content: pool.submit(estimate_file, paths[0]) for content, paths in left.items()}
            for content, future in futures.items():
                try:
                    result: Estimate | AudioError = future.result()
                except AudioError as error:
                    result = error
                del left[content]
                yield content, result
        except BrokenProcessPool:
            if workers == 1:  # then songs are heard in turn, and this is the one
                content = next(iter(left))
                [path, *_] = left.pop(content)
                yield content, AudioError(path, "the process that listened to it died, most likely for want of memory")
            workers = 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_cache(path: Path, cache: dict[str, Estimate]) -> None:
    songs = {content: asdict(estimate) for content, estimate in sorted(cache.items())}
    write_text(path, json.dumps({"version": VERSION, "songs": songs}, indent=0))
