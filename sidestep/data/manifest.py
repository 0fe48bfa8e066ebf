"""dataset.json: the songs of a data set and what is known of each, in ACE-Step's own schema; read, written, rebuilt.

    {"metadata": {name, custom_tag, tag_position, created_at, num_samples, all_instrumental, genre_ratio},
     "samples": [{id, audio_path, filename, caption, genre, lyrics, bpm, keyscale, timesignature, duration, language,
                  is_instrumental, custom_tag, labeled, prompt_override, repeat}, …]}

- `audio_path` stands relative to the file, with forward slashes, so that folder and file can move together; absolute
  paths and backslashes are read too. A bare list of samples is read like {"samples": …}; a sample without `audio_path`
  is found by its `filename`.
- Values are brought into one form on reading ("Am" → "A minor", "4/4" → "4", "120" → 120); a value that means nothing
  is a mistake, and all mistakes are told at once, each with its JSON path. Unknown keys are kept and written back.
- `duration` is written in whole seconds as ACE-Step writes it. It is a note, not a measure: what reaches the prompt is
  the length of the audio trained on.
- The caption that reaches the prompt (`prompt_caption`): the genre instead of the caption where `prompt_override` says
  so, or, where that is null, where `genre_ratio` is 100; whichever is empty gives way to the other. Then the tag: the
  song's own, else the data set's, before, after or instead of it.
- `captions` are further captions of a song, a list of texts; training draws one of all for each visit, and in
  `genre_ratio` percent of the visits the genre instead (`genre_share`). They get the tag too.
- `estimated` lists the fields of a song that a program guessed: --analyze, or who stands under its name in `origins`.
- `origins` says where values come from that nobody has written: a caption made of a file's name or of genre and title,
  what a language model or a server has heard.

Building the file again (`merge`) loses nothing that was edited by hand in it. Beside the samples the file keeps, under
"sidestep", a fingerprint of every value as it was built. A value that no longer has its fingerprint was edited and
stays; all others follow the sidecars and tags as they are now. In a file without fingerprints (ACE-Step's own, an older
one) every value that says something counts as edited. Further rules:

- Guesses of --analyze stay until a sidecar or a tag knows better; a guess that was edited is a guess no more.
- Lyrics written by hand make a song sung, unless is_instrumental was edited too.
- A sample that was taken out of the list by hand stays out ("removed").
- A sample whose file is not found moves to "absent" with all it has, and comes back with the file. One whose file
  stands elsewhere than in the folder that is built from stays in the list.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sidestep.data.fields import FIELDS, INSTRUMENTAL, FieldError, field_named, fields_of, parse_field
from sidestep.data.text import is_text, read_text
from sidestep.errors import UserError
from sidestep.events import LongTask, Report, null
from sidestep.files import write_text
from sidestep.words import count, side_step

TAG_POSITIONS = ("prepend", "append", "replace")
MAX_BYTES = 512 << 20
_MISTAKES_SHOWN = 20
SECTION = "sidestep"
EDITABLE = (
    "caption",
    "genre",
    "lyrics",
    "bpm",
    "keyscale",
    "timesignature",
    "language",
    "is_instrumental",
    "custom_tag",
    "prompt_override",
    "repeat",
    "labeled",
)
_FINGERPRINTS = re.compile(r"(\w+):([0-9a-f]*)")
_EDITED = ""  # the fingerprint of no value
_SAYS_NOTHING = {None, "", "unknown", INSTRUMENTAL}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One song. `audio_path` is absolute; `duration` in seconds, 0 when unknown; empty text and None mean unknown."""

    audio_path: Path
    id: str
    filename: str = ""
    caption: str = ""
    genre: str = ""
    lyrics: str = ""
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    duration: float = 0.0
    language: str = "unknown"
    is_instrumental: bool = False
    custom_tag: str = ""
    labeled: bool = False
    prompt_override: str | None = None
    repeat: int = 1
    captions: tuple[str, ...] = ()  # further ones, which training draws from beside the caption
    estimated: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)  # by field, of values that nobody has written
    extra: Mapping[str, Any] = field(default_factory=dict)  # keys of other programs


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What holds for the whole data set. `genre_ratio` is a percentage."""

    name: str = ""
    custom_tag: str = ""
    tag_position: str = "prepend"
    created_at: str = ""
    genre_ratio: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set as it stands in its file. `extra`: further top-level keys."""

    metadata: Metadata = field(default_factory=Metadata)
    samples: tuple[Sample, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def prompt_caption(sample: Sample, metadata: Metadata) -> str:
    """The caption as it reaches the prompt, by the rules at the top of this file."""
    by_genre = sample.prompt_override == "genre" or genre_share(sample, metadata) == 100
    text = (sample.genre or sample.caption) if by_genre else (sample.caption or sample.genre)
    return with_tag(text, sample.custom_tag or metadata.custom_tag, metadata.tag_position)


def genre_share(sample: Sample, metadata: Metadata) -> int:
    """In how many percent of its visits a song is described by its genre: `genre_ratio`, where it has a choice."""
    return metadata.genre_ratio if sample.genre and sample.caption and sample.prompt_override is None else 0


def with_tag(text: str, tag: str, position: str) -> str:
    """A caption with the trigger word before, after or instead of it; whichever is empty gives way to the other."""
    if not tag or not text:
        return tag or text
    return {"prepend": f"{tag}, {text}", "append": f"{text}, {tag}", "replace": tag}[position]


def prompt_lyrics(sample: Sample) -> str:
    """The lyrics as they reach the prompt: as written, [Instrumental] where there are none."""
    return sample.lyrics or INSTRUMENTAL


def duration_differs(sample: Sample, seconds: float) -> bool:
    """Whether the noted duration is wrong by a second or more (0 is no note)."""
    return sample.duration > 0 and abs(sample.duration - seconds) >= 1.0


def sample_id(relative_path: str) -> str:
    """The id of a song by its path relative to dataset.json: the same on every machine and in every build."""
    return hashlib.blake2b(relative_path.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def relative_path(audio: Path, folder: Path) -> str:
    """`audio` relative to `folder` with forward slashes; absolute where it lies on another drive."""
    written, inside = str(audio), os.path.join(folder, "")  # noqa: PTH118 (a million of them are made)
    if written.startswith(inside) and ".." not in written:
        return written[len(inside) :].replace(os.sep, "/")
    try:
        return Path(os.path.relpath(audio, folder)).as_posix()
    except ValueError:
        return audio.as_posix()


def write(path: Path, dataset: Dataset) -> None:
    """Write the whole file or leave the old one."""
    folder = path.absolute().parent
    samples = [f"    {_block(_as_json(sample, folder), '    ')}" for sample in dataset.samples]
    metadata = {
        "name": dataset.metadata.name,
        "custom_tag": dataset.metadata.custom_tag,
        "tag_position": dataset.metadata.tag_position,
        "created_at": dataset.metadata.created_at,
        "num_samples": len(samples),
        "all_instrumental": all(s.is_instrumental for s in dataset.samples),
        "genre_ratio": dataset.metadata.genre_ratio,
        **dataset.metadata.extra,
    }
    blocks = {"metadata": _block(metadata, "  "), "samples": "[\n" + ",\n".join(samples) + "\n  ]"}
    blocks |= {key: _block(value, "  ") for key, value in dataset.extra.items()}
    text = "{\n" + ",\n".join(f"  {json.dumps(key)}: {block}" for key, block in blocks.items()) + "\n}"
    # A file name that is no UTF-8 becomes \\udcXX, which JSON reads back.
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")


def _block(value: Any, indent: str) -> str:
    """JSON with each item of an object or a list on a line of its own; many times faster than the library's indent."""
    text = json.JSONEncoder(ensure_ascii=False, separators=(f",\n{indent}  ", ": ")).encode(value)
    return (
        f"{text[0]}\n{indent}  {text[1:-1]}\n{indent}{text[-1]}" if value and isinstance(value, dict | list) else text
    )


def read(path: Path, report: Report = null) -> Dataset:
    """The data set in `path`; whether its audio exists is not asked.

    Raises UserError: no such file, no JSON, or every mistake in it with its JSON path.
    """
    if not path.exists():
        raise UserError(f"There is no {path}.", f"Build it: {side_step('build-dataset', '--input', 'FOLDER_OF_SONGS')}")
    text, problem = read_text(path, MAX_BYTES)
    if problem and not text:
        raise UserError(f"{path} {problem}.", "Check the path and its permissions.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        build = side_step("build-dataset", "--overwrite")
        fix = f"Put it right at that place, or build it anew: {build} …"
        raise UserError(f"{path} is no JSON: {error}.", fix) from error
    if isinstance(data, list):
        data = {"samples": data}
    if not isinstance(data, dict):
        raise UserError(f"{path}: $: an object with metadata and samples, or a list of samples, is needed.")
    mistakes: list[str] = []
    metadata = _read_metadata(data.pop("metadata", None) or {}, mistakes)
    listed = data.pop("samples", None)
    if not isinstance(listed, list):
        mistakes.append("$.samples: a list of samples is needed")
        listed = []
    samples: list[Sample] = []
    first: dict[tuple[str, Any], int] = {}
    read = LongTask(report, f"Reading {path.name}", len(listed))
    for i, entry in enumerate(listed):
        read()
        if sample := _read_sample(entry, f"$.samples[{i}]", path.absolute().parent, mistakes):
            samples.append(sample)
            for name, hint in (("id", ""), ("audio_path", '; to train on it more often, say "repeat"')):
                if (earlier := first.setdefault((name, getattr(sample, name)), i)) != i:
                    mistakes.append(f"$.samples[{i}].{name}: the same as $.samples[{earlier}].{name}{hint}")
    if mistakes:
        more = len(mistakes) - _MISTAKES_SHOWN
        shown = mistakes[:_MISTAKES_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
        problem = "\n".join([f"{path} has {count(len(mistakes), 'mistake')}:", *shown])
        raise UserError(problem, 'Put these right, or set them to null or "" where they are not known.')
    # ACE-Step looks for the tag in each sample, so it is written there; edited in the metadata alone, that edit holds.
    notes = data.get(SECTION)
    inherited = notes.get("tag") if isinstance(notes, dict) else None
    if inherited is not None and inherited != metadata.custom_tag:
        tag = metadata.custom_tag
        samples = [replace(s, custom_tag=tag) if s.custom_tag == inherited else s for s in samples]
    return Dataset(metadata=metadata, samples=tuple(samples), extra=data)


def _read_metadata(data: Any, mistakes: list[str]) -> Metadata:
    if not isinstance(data, dict):
        mistakes.append("$.metadata: an object is needed")
        return Metadata()
    text = {
        name: _text(data.pop(name, None), f"$.metadata.{name}", mistakes)
        for name in ("name", "custom_tag", "created_at")
    }
    position = data.pop("tag_position", None) or "prepend"
    if position not in TAG_POSITIONS:
        mistakes.append(f"$.metadata.tag_position: {json.dumps(position)} is none of {', '.join(TAG_POSITIONS)}")
    ratio = data.pop("genre_ratio", None) or 0
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 100:
        mistakes.append(f"$.metadata.genre_ratio: {json.dumps(ratio)} is no percentage (0 to 100)")
        ratio = 0
    extra = {key: value for key, value in data.items() if key not in ("num_samples", "all_instrumental")}
    return Metadata(**text, tag_position=position, genre_ratio=round(ratio), extra=extra)


def _read_sample(data: Any, where: str, folder: Path, mistakes: list[str]) -> Sample | None:
    """One entry of `samples`; None where its song cannot be told, which is a mistake like all others."""
    if not isinstance(data, dict):
        mistakes.append(f"{where}: an object is needed")
        return None
    filename = _text(data.pop("filename", None), f"{where}.filename", mistakes, is_path=True)
    written = _text(data.pop("audio_path", None), f"{where}.audio_path", mistakes, is_path=True) or filename
    if not written or "\0" in written:
        mistakes.append(f"{where}.audio_path: the path of an audio file is needed")
        return None
    if len(written) > 60 and (len(encoded := os.fsencode(written)) > 2000 or max(map(len, encoded.split(b"/"))) > 255):
        mistakes.append(f"{where}.audio_path: {written[:40]}… is longer than the name of a file can be")
        return None
    if "\\" in written and os.sep == "/" and not os.path.lexists(folder / written):  # no file has it in its name
        written = written.replace("\\", "/")
    audio = Path(os.path.normpath(os.path.join(folder, written)))  # noqa: PTH118 (a million of them are made)
    identity = data.pop("id", None)
    identity = str(identity) if isinstance(identity, int) else _text(identity, f"{where}.id", mistakes)
    labeled = bool(data.pop("labeled", False))
    origins = data.pop("origins", None) or {}
    if not isinstance(origins, dict) or not all(isinstance(origin, str) for origin in origins.values()):
        mistakes.append(f"{where}.origins: an object of names is needed")
        origins = {}
    estimated = data.pop("estimated", None) or []
    if not isinstance(estimated, list) or not all(isinstance(name, str) for name in estimated):
        mistakes.append(f"{where}.estimated: a list of field names is needed")
        estimated = []
    # A field's own name comes before others for it; of two such ("prompt", "description") the second is kept as it is.
    chosen = fields_of((key, value) for key, value in data.items() if key in FIELDS or field_named(key) not in data)
    extra = {key: value for key, value in data.items() if (key, value) not in chosen.values()}
    captions = extra.pop("captions", None) or []
    if not isinstance(captions, list) or not all(isinstance(text, str) and is_text(text) for text in captions):
        mistakes.append(f"{where}.captions: a list of texts is needed")
        captions = []
    known: dict[str, Any] = {"captions": tuple(text.strip() for text in captions if text.strip())}
    for name, (key, value) in chosen.items():
        try:
            parsed = parse_field(name, value)
        except FieldError as error:
            mistakes.append(f"{where}.{key}: {error}")
            continue
        if parsed is not None:
            known[name] = parsed
    lyrics = known.get("lyrics", INSTRUMENTAL).strip().casefold()
    known.setdefault("is_instrumental", lyrics == INSTRUMENTAL.casefold())
    return Sample(
        audio_path=audio,
        id=identity or sample_id(relative_path(audio, folder)),
        filename=filename or audio.name,
        labeled=labeled,
        estimated=tuple(estimated),
        origins=origins,
        extra=extra,
        **known,
    )


def _text(value: Any, where: str, mistakes: list[str], is_path: bool = False) -> str:
    try:
        if value is None or isinstance(value, str):
            # Half of a surrogate pair is no text; in a path it may stand for a byte that is no UTF-8.
            (os.fsencode if is_path else str.encode)(value or "")
            return value or ""
    except UnicodeEncodeError:
        pass
    mistakes.append(f"{where}: {json.dumps(value)[:60]} is no {'name of a file' if is_path else 'text'}")
    return ""


@dataclass(frozen=True)
class Rebuilt:
    """The songs of the new file, and what became of the old ones.

    `excluded`: paths of songs taken out by hand; `absent`: songs without their file; `edits`: how many values edited by
    hand stayed; `notes`: the section for the new file, but for its tag.
    """

    samples: tuple[Sample, ...]
    excluded: tuple[str, ...]
    absent: tuple[Sample, ...]
    edits: int
    notes: Mapping[str, Any]


def merge(old: Dataset, fresh: Sequence[Sample], folder: Path, songs_folder: Path) -> Rebuilt:
    """`fresh`, as just built from `songs_folder`, with all that was edited in `old` (empty where there was none).

    `folder` is the one of dataset.json.
    """
    notes = _notes(old)
    earlier: dict[Path, Sample] = {}
    for entry in notes["absent"]:  # what cannot be read of it is passed over
        mistakes: list[str] = []
        before = _read_sample(entry, "", folder, mistakes)
        if before and not mistakes:
            earlier[before.audio_path] = before
    earlier |= {s.audio_path: s for s in old.samples}
    for sample in fresh:  # a file kept elsewhere may name its songs as they lie in their own folder
        named = folder / sample.audio_path.relative_to(songs_folder)
        if sample.audio_path not in earlier and named in earlier and not named.is_file():
            earlier[sample.audio_path] = replace(earlier.pop(named), audio_path=sample.audio_path)
    built: dict[str, Mapping[str, str]] = {}
    samples, excluded, edits = [], [], 0
    for sample in fresh:
        path = relative_path(sample.audio_path, folder)
        edited: set[str] = set()
        if before := earlier.pop(sample.audio_path, None):
            song, edited = _merge_one(before, sample, notes["built"].get(path, {}), old.metadata.custom_tag)
            edits += sum(getattr(song, name) != getattr(sample, name) for name in edited)
            sample = song
        elif path in notes["built"] or path in notes["removed"]:
            excluded.append(path)
            continue
        samples.append(sample)
        built[path] = {name: _EDITED if name in edited else _fingerprint(getattr(sample, name)) for name in EDITABLE}
    absent = []
    for before in earlier.values():
        (samples if before.audio_path.is_file() else absent).append(before)
        path = relative_path(before.audio_path, folder)
        built[path] = notes["built"].get(path, {})
    removed = sorted({p for p in notes["removed"] if isinstance(p, str) and p not in built} | set(excluded))
    listed = {"built": _packed(built), "removed": removed, "absent": [_as_json(s, folder) for s in absent]}
    return Rebuilt(tuple(samples), tuple(excluded), tuple(absent), edits, listed)


def _merge_one(before: Sample, fresh: Sample, built: Mapping[str, str], tag: str) -> tuple[Sample, set[str]]:
    """The merged sample and the names of its values that stay because they were edited."""
    values: dict[str, Any] = {}
    estimated, edited = [], set()
    for name in EDITABLE:
        old, new = getattr(before, name), getattr(fresh, name)
        values[name] = new
        if name == "custom_tag" and old == tag:  # inherited, not typed
            continue
        if name in built:
            is_edited = built[name] != _fingerprint(old)
        else:
            usual = name in before.estimated or (name, old) in (("labeled", False), ("repeat", 1))
            is_edited = not usual and old not in _SAYS_NOTHING
        if is_edited:
            values[name] = old
            edited.add(name)
        elif name in before.estimated and (new in _SAYS_NOTHING or name in fresh.origins):
            values[name] = old
            estimated.append(name)
    if "lyrics" in edited and "is_instrumental" not in edited:
        values["is_instrumental"] = values["lyrics"] in _SAYS_NOTHING
    if {"caption", "genre"} & edited and "labeled" not in edited:
        values["labeled"] = bool(values["caption"] or values["genre"])
    if "caption" in estimated and "labeled" not in edited:
        values["labeled"] = True
    origins = {name: origin for name, origin in fresh.origins.items() if name not in edited}
    origins |= {name: before.origins[name] for name in estimated if name in before.origins}
    extra = {**fresh.extra, **before.extra}
    values["captions"] = fresh.captions or before.captions
    merged = replace(fresh, id=before.id, estimated=tuple(estimated), origins=origins, extra=extra, **values)
    return merged, edited


def filled_in(dataset: Dataset, samples: Iterable[Sample], names: Iterable[str], folder: Path) -> Dataset:
    """`dataset` with other samples, in whose fields `names` a program may have filled in something.

    What differs there is no edit by hand.
    """
    samples, names = tuple(samples), tuple(names)
    notes = _notes(dataset)
    before = {s.audio_path: s for s in dataset.samples}
    built = notes["built"]
    for sample in samples:
        fingerprints = built.setdefault(relative_path(sample.audio_path, folder), {})
        for name in names:
            if (value := getattr(sample, name)) != getattr(before[sample.audio_path], name):
                fingerprints[name] = _fingerprint(value)
    return replace(dataset, samples=samples, extra={**dataset.extra, SECTION: {**notes, "built": _packed(built)}})


def emptied_by_hand(dataset: Dataset, sample: Sample, folder: Path) -> set[str]:
    """The fields of a sample that had a value as built and have none now: somebody wants it so."""
    built = _notes(dataset)["built"].get(relative_path(sample.audio_path, folder), {})
    empty = {name: value for name in EDITABLE if (value := getattr(sample, name)) in _SAYS_NOTHING}
    return {name for name, value in empty.items() if name in built and built[name] != _fingerprint(value)}


def _fingerprint(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=4).hexdigest()


def _packed(built: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """One line a song: "caption:1a2b3c4d genre:…"; a value that was edited has nothing after its colon."""
    return {path: " ".join(f"{name}:{value}" for name, value in prints.items()) for path, prints in built.items()}


def _as_json(sample: Sample, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": sample.id, **vars(sample), "audio_path": relative_path(sample.audio_path, folder)}
    entry["duration"] = int(sample.duration) if sample.duration >= 1 else round(sample.duration, 3)
    for name in ("captions", "estimated", "origins"):
        if not entry[name]:
            del entry[name]
    del entry["extra"]
    return {**entry, **sample.extra}


def _notes(dataset: Dataset) -> dict[str, Any]:
    """The "sidestep" section; whatever in it is not of its form counts as not there."""
    notes = dataset.extra.get(SECTION)
    notes = notes if isinstance(notes, dict) else {}
    built, removed, absent = notes.get("built"), notes.get("removed"), notes.get("absent")
    packed = built.items() if isinstance(built, dict) else ()
    return {
        **notes,
        "built": {path: dict(_FINGERPRINTS.findall(prints)) for path, prints in packed if isinstance(prints, str)},
        "removed": removed if isinstance(removed, list) else [],
        "absent": absent if isinstance(absent, list) else [],
    }
