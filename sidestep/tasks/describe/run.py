"""Songs without a caption described by a model: the language model beside the DiT, or one behind a server.

Caption, tempo, key, meter and language fill what nobody has written. Lyrics are taken only where they are asked for:
the models invent words. A value that a hand, a sidecar or a tag has given stays. Where --analyze has measured something
else than the model has heard, the measured value stays and both are shown.

Answers are kept by the song's content in `.side-step/descriptions.jsonl` beside dataset.json, one line each, as soon as
they are there: a run that was killed goes on behind the last whole line.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sidestep.audio.io import AudioError, content_hash
from sidestep.data.fields import INSTRUMENTAL, FieldError, parse_field
from sidestep.data.manifest import Dataset, Sample, emptied_by_hand, filled_in, read, relative_path, write
from sidestep.events import FileFailed, Notice, Progress, Report, Table
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.describe.endpoint import Endpoint
from sidestep.tasks.describe.listener import LanguageModelListener
from sidestep.words import count

KEPT = Path(".side-step") / "descriptions.jsonl"
FILLED = ("bpm", "keyscale", "timesignature", "language")
CHANGED = (*FILLED, "caption", "lyrics", "is_instrumental", "labeled")


class Listener(Protocol):
    """Something that tells what a song is like. name: of the model; identity: changes when its answers would."""

    name: str
    identity: str

    def describe(self, path: Path) -> dict[str, Any]:
        """The fields of a song, and `parts`: of how many it was heard. Raises AudioError where it cannot be told."""
        ...


def describe(path: Path, config: BuildDatasetConfig, report: Report) -> Dataset:
    """Fill in what is missing in the dataset.json at `path` and write it again. Raises UserError and JobError."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    dataset = read(path, report)
    with_lyrics = config.lyrics != "none"
    wanted = {
        sample.audio_path: names
        for sample in dataset.samples
        if (names := missing(sample, emptied_by_hand(dataset, sample, path.parent), with_lyrics))
    }
    if not wanted:
        report(Notice(message="Every song has its caption, tempo, key and meter; there is nothing to describe."))
        return dataset
    listener: Listener = LanguageModelListener(config, report) if config.caption == "lm" else Endpoint(config, report)
    heard = listen(list(wanted), listener, path, report)
    counts, disagreements, sung = Counter[str](), [], 0
    samples = []
    for sample in dataset.samples:
        answer = heard.get(sample.audio_path)
        if answer is not None:
            name = relative_path(sample.audio_path, path.parent)
            values = usable(answer, name, report)
            disagreements += [(name, *row) for row in compared(sample, values)]
            sung += sample.is_instrumental and "language" in values and not with_lyrics
            sample = filled(sample, values, wanted[sample.audio_path], origin_of(listener, answer))
            counts.update(name for name in sample.estimated if sample.origins.get(name, "").startswith("by "))
        samples.append(sample)
    dataset = filled_in(dataset, samples, CHANGED, path.parent)
    write(path, dataset)
    if disagreements:
        title = "Measured and heard differently; the measured value stays"
        report(Table(title=title, columns=("song", "", "--analyze", listener.name), rows=tuple(disagreements)))
    if sung:
        message = (
            f"{count(sung, 'song')} without lyrics count as instrumental, and {listener.name} hears singing there."
        )
        report(Notice(message=f"{message} Write the lyrics beside them, or try --lyrics lm.", level="warning"))
    rows = [(name, str(counts[name])) for name in ("caption", *FILLED, *(["lyrics"] if with_lyrics else []))]
    title = f"Described by {listener.name}: {len(heard)} of {count(len(wanted), 'song')}"
    report(Table(title=title, columns=("", "filled in"), rows=tuple(rows)))
    return dataset


def missing(sample: Sample, emptied: set[str], with_lyrics: bool) -> set[str]:
    """The fields of a song that nobody has written and nobody has emptied on purpose."""
    names = {name for name in FILLED if getattr(sample, name) in (None, "", "unknown")}
    if sample.is_instrumental and "is_instrumental" not in sample.origins:
        names.discard("language")  # somebody says that there is none
    if not sample.caption or ("caption" in sample.origins and "caption" not in sample.estimated):
        names.add("caption")
    is_silent = not sample.is_instrumental or "is_instrumental" in sample.origins
    if with_lyrics and is_silent and sample.lyrics in ("", INSTRUMENTAL):
        names.add("lyrics")
    elif sample.is_instrumental:
        names.discard("language")
    return names - emptied


def listen(songs: list[Path], listener: Listener, dataset_path: Path, report: Report) -> dict[Path, dict[str, Any]]:
    """What is heard in each song that can be read; what was heard before is not heard again."""
    kept_path = dataset_path.parent / KEPT
    kept = read_kept(kept_path, listener.identity)
    kept_path.parent.mkdir(parents=True, exist_ok=True)
    heard: dict[Path, dict[str, Any]] = {}
    started, new = time.monotonic(), 0
    for number, song in enumerate(songs, 1):
        name = relative_path(song, dataset_path.parent)
        try:
            content = content_hash(song)
            if content not in kept:
                new += 1
                kept[content] = listener.describe(song)
                keep(kept_path, {"identity": listener.identity, "content": content, "answer": kept[content]})
            heard[song] = kept[content]
        except AudioError as error:
            report(FileFailed(path=str(song), reason=error.reason, stage="describe"))
        seconds = max(time.monotonic() - started, 1e-6)
        report(
            Progress(
                task="Describing",
                done=number,
                total=len(songs),
                current=name,
                rate=new / seconds,
                unit="songs",
                eta_seconds=(len(songs) - number) * seconds / new if new else None,
            )
        )
    return heard


def read_kept(path: Path, identity: str) -> dict[str, dict[str, Any]]:
    """Answers by content, of one model; lines that are not whole are passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["identity"] == identity and isinstance(entry["answer"], dict):
                found[str(entry["content"])] = entry["answer"]
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return found


def keep(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line; one that a kill has left half is closed first."""
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def usable(answer: Mapping[str, Any], name: str, report: Report) -> dict[str, Any]:
    """The fields of an answer in the form that dataset.json has; what means nothing is told and left out."""
    values = {}
    for field in ("caption", "lyrics", *FILLED):
        try:
            value = parse_field(field, answer.get(field))
        except FieldError as error:
            report(Notice(message=f"{name}: the model's {field}: {error}; it was left out.", level="warning"))
            continue
        if value is not None and not (field == "lyrics" and value.strip().casefold() == INSTRUMENTAL.casefold()):
            values[field] = value
    return values


def compared(sample: Sample, values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, measured, heard) where --analyze has another value than the model. A tempo may be off by a fiftieth."""
    rows = []
    for name in ("bpm", "keyscale", "timesignature"):
        measured, heard = getattr(sample, name), values.get(name)
        if name not in sample.estimated or name in sample.origins or not measured or not heard:
            continue
        same = abs(measured - heard) <= 0.02 * measured if name == "bpm" else measured == heard
        if not same:
            rows.append((name, str(measured), str(heard)))
    return rows


def origin_of(listener: Listener, answer: Mapping[str, Any]) -> str:
    """Who has said it, and of how much of the song."""
    parts = answer.get("parts", 1)
    heard = f", from {parts} parts" if parts > 1 else ""
    return f"by {listener.name}{heard}{', ' + answer['heard'] if answer.get('heard') else ''}"


def filled(sample: Sample, values: Mapping[str, Any], names: set[str], origin: str) -> Sample:
    """The song with what was missing, marked with its origin."""
    new = {name: value for name, value in values.items() if name in names}
    if "lyrics" in new:
        new["is_instrumental"] = False
    else:
        new.pop("language", None) if sample.is_instrumental else None
    if "caption" in new:
        new["labeled"] = True
    marked = [name for name in new if name != "labeled"]
    estimated = tuple(dict.fromkeys([*sample.estimated, *marked]))
    return replace(sample, **new, estimated=estimated, origins={**sample.origins, **dict.fromkeys(marked, origin)})
