"""dataset.json: the songs of a data set and what is known of each, in ACE-Step's own schema.

    {"metadata": {name, custom_tag, tag_position, created_at, num_samples, all_instrumental, genre_ratio},
     "samples": [{id, audio_path, filename, caption, genre, lyrics, bpm, keyscale, timesignature, duration, language, is_instrumental,
                  custom_tag, labeled, prompt_override, repeat}, …]}

Rules:
- `audio_path` stands relative to the file, with forward slashes, so that folder and file can move together; absolute paths and backslashes are read too.
  A bare list of samples is read like {"samples": …}; a sample without `audio_path` is found by its `filename`.
- Values are brought into one form on reading ("Am" → "A minor", "4/4" → "4", "120" → 120); a value that means nothing is a mistake, and all mistakes
  are told at once, each with its JSON path. Keys that are not known are kept and written back.
- `duration` is written in whole seconds as ACE-Step writes it. It is a note, not a measure: what reaches the prompt is the length of the audio trained on.
- The caption that reaches the prompt (`prompt_caption`): the genre instead of the caption where `prompt_override` says so, or, where that is null, for
  `genre_ratio` percent of the songs, chosen by a hash of their id and so the same in every run; whichever is empty gives way to the other. Then the tag:
  the song's own, else the data set's, before, after or instead of it.
- `estimated` lists the fields of a song that --analyze guessed.

Building dataset.json again without losing what was edited by hand in it.

Beside the samples the file keeps, under "sidestep", a fingerprint of every value as it was built. A value that no longer has its fingerprint was edited and
stays; all others follow the sidecars and tags as they are now. In a file without fingerprints (ACE-Step's own, an older one) every value that says
something counts as edited. Further rules:

- Guesses of --analyze stay until a sidecar or a tag knows better; a guess that was edited is a guess no more.
- Lyrics written by hand make a song sung, unless is_instrumental was edited too.
- A sample that was taken out of the list by hand stays out ("removed").
- A sample whose file is not found moves to "absent" with all it has, and comes back with the file. One whose file stands elsewhere than in the folder
  that is built from stays in the list.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sidestep.data.fields import FIELDS, INSTRUMENTAL, FieldError, field_named, parse_field
from sidestep.data.text import decode_text
from sidestep.errors import UserError
from sidestep.files import write_text
from sidestep.words import count

TAG_POSITIONS = ("prepend", "append", "replace")
_MISTAKES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One song. `audio_path` is absolute; `duration` in seconds, 0 when not known; empty text and None mean not known."""

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
    estimated: tuple[str, ...] = ()
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
    by_genre = sample.prompt_override == "genre" or (
        sample.prompt_override is None and _share(sample.id) < metadata.genre_ratio
    )
    text = (sample.genre or sample.caption) if by_genre else (sample.caption or sample.genre)
    tag = sample.custom_tag or metadata.custom_tag
    if not tag or not text:
        return tag or text
    return {"prepend": f"{tag}, {text}", "append": f"{text}, {tag}", "replace": tag}[metadata.tag_position]


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
    """`audio` relative to `folder` with forward slashes; absolute where no relative path leads there (another drive)."""
    try:
        return Path(os.path.relpath(audio, folder)).as_posix()
    except ValueError:
        return audio.as_posix()


def _share(identity: str) -> float:
    """A number in [0, 100) that depends on the id alone."""
    return (
        int.from_bytes(hashlib.blake2b(b"genre:" + identity.encode("utf-8", "replace"), digest_size=4).digest())
        % 10_000
        / 100
    )


def write(path: Path, dataset: Dataset) -> None:
    """Write the whole file or leave the old one."""
    folder = path.absolute().parent
    samples = [_sample_as_json(s, folder) for s in dataset.samples]
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
    text = json.dumps({"metadata": metadata, "samples": samples, **dataset.extra}, ensure_ascii=False, indent=2)
    write_text(
        path, text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"
    )  # a file name that is no UTF-8 becomes \udcXX, which JSON reads back


def _sample_as_json(sample: Sample, folder: Path) -> dict[str, Any]:
    known = {
        f.name: getattr(sample, f.name)
        for f in fields(sample)
        if f.name not in ("extra", "id", "estimated", "audio_path")
    }
    known["duration"] = int(sample.duration) if sample.duration >= 1 else round(sample.duration, 3)
    if sample.estimated:
        known["estimated"] = list(sample.estimated)
    return {"id": sample.id, "audio_path": relative_path(sample.audio_path, folder), **known, **sample.extra}


def read(path: Path) -> Dataset:
    """The data set in `path`. Raises UserError: not there, no JSON, or every mistake in it with its JSON path. Whether the audio exists is not asked."""
    try:
        text, _ = decode_text(path.read_bytes())
        data = json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"There is no {path}.", "Build it: uv run train.py build-dataset --input FOLDER_OF_SONGS"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no JSON: {error}.",
            "Put it right at that place, or build it anew: uv run train.py build-dataset --overwrite …",
        ) from error
    return _Reading(path).dataset(data)


class _Reading:
    """One file on its way in; collects the mistakes."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.absolute().parent
        self.mistakes: list[str] = []

    def dataset(self, data: Any) -> Dataset:
        if isinstance(data, list):
            data = {"samples": data}
        if not isinstance(data, dict):
            raise UserError(f"{self.path}: $: an object with metadata and samples, or a list of samples, is needed.")
        metadata = self._metadata(data.get("metadata") or {})
        listed = data.get("samples")
        if not isinstance(listed, list):
            self.mistakes.append("$.samples: a list of samples is needed")
            listed = []
        samples = [self._sample(entry, f"$.samples[{i}]") for i, entry in enumerate(listed)]
        self._find_twins(samples)
        if self.mistakes:
            more = len(self.mistakes) - _MISTAKES_SHOWN
            shown = self.mistakes[:_MISTAKES_SHOWN] + ([f"… and {more} more"] if more > 0 else [])
            problem = "\n".join([f"{self.path} has {count(len(self.mistakes), 'mistake')}:", *shown])
            raise UserError(problem, 'Put these right, or set them to null or "" where they are not known.')
        extra = {key: value for key, value in data.items() if key not in ("metadata", "samples")}
        return Dataset(
            metadata=metadata, samples=tuple(self._with_tag(s, metadata, extra) for s in samples if s), extra=extra
        )

    @staticmethod
    def _with_tag(sample: Sample, metadata: Metadata, extra: Mapping[str, Any]) -> Sample:
        """ACE-Step looks for the tag in each sample, so it is written there; when it is then edited in the metadata alone, that edit holds."""
        notes = extra.get("sidestep")
        inherited = notes.get("tag") if isinstance(notes, dict) else None
        if inherited is not None and sample.custom_tag == inherited != metadata.custom_tag:
            return replace(sample, custom_tag=metadata.custom_tag)
        return sample

    def _metadata(self, data: Any) -> Metadata:
        if not isinstance(data, dict):
            self.mistakes.append("$.metadata: an object is needed")
            return Metadata()
        data = dict(data)
        text = {
            name: self._text(data.pop(name, None), f"$.metadata.{name}")
            for name in ("name", "custom_tag", "created_at")
        }
        position = data.pop("tag_position", None) or "prepend"
        if position not in TAG_POSITIONS:
            self.mistakes.append(
                f"$.metadata.tag_position: {json.dumps(position)} is none of {', '.join(TAG_POSITIONS)}"
            )
            position = "prepend"
        ratio = data.pop("genre_ratio", None) or 0
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 100:
            self.mistakes.append(f"$.metadata.genre_ratio: {json.dumps(ratio)} is no percentage (0 to 100)")
            ratio = 0
        for derived in ("num_samples", "all_instrumental"):
            data.pop(derived, None)
        return Metadata(**text, tag_position=position, genre_ratio=round(ratio), extra=data)

    def _text(self, value: Any, where: str) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        self.mistakes.append(f"{where}: {json.dumps(value)[:60]} is no text")
        return ""

    def _sample(self, data: Any, where: str) -> Sample | None:
        if not isinstance(data, dict):
            self.mistakes.append(f"{where}: an object is needed")
            return None
        data = dict(data)
        filename = self._text(data.pop("filename", None), f"{where}.filename")
        written = self._text(data.pop("audio_path", None), f"{where}.audio_path") or filename
        if not written or "\0" in written:
            self.mistakes.append(f"{where}.audio_path: the path of an audio file is needed")
            return None
        audio = self._locate(written)
        identity = data.pop("id", None)
        identity = str(identity) if isinstance(identity, int) else self._text(identity, f"{where}.id")
        identity = identity or sample_id(relative_path(audio, self.folder))
        labeled = bool(data.pop("labeled", False))
        guessed = data.pop("estimated", None) or []
        if not isinstance(guessed, list) or not all(isinstance(g, str) for g in guessed):
            self.mistakes.append(f"{where}.estimated: a list of field names is needed")
            guessed = []
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in data.items():
            name = key if key in FIELDS else field_named(key)
            if name is None or (name != key and name in data):
                extra[key] = value
                continue
            try:
                understood = parse_field(name, value)
            except FieldError as mistake:
                self.mistakes.append(f"{where}.{key}: {mistake}")
                continue
            if understood is not None:
                known[name] = understood
        known.setdefault(
            "is_instrumental", known.get("lyrics", INSTRUMENTAL).strip().casefold() == INSTRUMENTAL.casefold()
        )
        return Sample(
            audio_path=audio,
            id=identity,
            filename=filename or audio.name,
            labeled=labeled,
            estimated=tuple(guessed),
            extra=extra,
            **known,
        )

    def _locate(self, written: str) -> Path:
        """An absolute path; a backslash separates folders where no file has it in its name."""
        path = self.folder / written
        if "\\" in written and os.sep == "/" and not os.path.lexists(path):
            path = self.folder / written.replace("\\", "/")
        return Path(os.path.normpath(path))

    def _find_twins(self, samples: list[Sample | None]) -> None:
        for what in ("id", "audio_path"):
            first: dict[Any, int] = {}
            for i, sample in enumerate(samples):
                if sample and (earlier := first.setdefault(getattr(sample, what), i)) != i:
                    hint = "" if what == "id" else '; to train on it more often, say "repeat"'
                    self.mistakes.append(f"$.samples[{i}].{what}: the same as $.samples[{earlier}].{what}{hint}")


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
_PRINT = re.compile(r"(\w+):([0-9a-f]*)")
_EDITED = ""  # the fingerprint of no value
_SAYS_NOTHING = {None, "", "unknown", INSTRUMENTAL}


@dataclass(frozen=True)
class Rebuilt:
    """The songs of the new file, and what became of the old ones.

    `kept_out`: paths of songs taken out by hand; `absent`: songs without their file; `edits`: how many values edited by hand stayed; `notes`: the section
    for the new file, but for its tag.
    """

    samples: tuple[Sample, ...]
    kept_out: tuple[str, ...]
    absent: tuple[Sample, ...]
    edits: int
    notes: Mapping[str, Any]


def merge(old: Dataset, fresh: Iterable[Sample], folder: Path) -> Rebuilt:
    """`fresh`, as just built, with all that was edited in `old` (an empty Dataset where there was none); `folder` is the one of dataset.json."""
    notes = _notes(old)
    built: dict[str, Mapping[str, str]] = {}
    earlier = {s.audio_path: s for s in [*absent_samples(old, folder), *old.samples]}
    samples, kept_out, edits = [], [], 0
    for sample in fresh:
        path = relative_path(sample.audio_path, folder)
        before = earlier.pop(sample.audio_path, None)
        if before:
            song, edited = _merge_one(before, sample, notes["built"].get(path), old.metadata.custom_tag)
            edits += sum(getattr(song, name) != getattr(sample, name) for name in edited)
            sample = song
        elif path in notes["built"] or path in notes["removed"]:
            kept_out.append(path)
            continue
        else:
            edited = set()
        samples.append(sample)
        built[path] = {name: _EDITED if name in edited else _print(getattr(sample, name)) for name in EDITABLE}
    absent = []
    for before in earlier.values():
        (samples if before.audio_path.is_file() else absent).append(before)
        path = relative_path(before.audio_path, folder)
        built[path] = notes["built"].get(path, {})
    removed = sorted({p for p in notes["removed"] if isinstance(p, str) and p not in built} | set(kept_out))
    listed = {"built": _packed(built), "removed": removed, "absent": [_as_json(s, folder) for s in absent]}
    return Rebuilt(tuple(samples), tuple(kept_out), tuple(absent), edits, listed)


def filled_in(dataset: Dataset, samples: Iterable[Sample], names: Iterable[str], folder: Path) -> Dataset:
    """`dataset` with other samples, whose fields `names` a program may have filled in: what differs there is no edit by hand."""
    samples, names = tuple(samples), tuple(names)
    notes = _notes(dataset)
    before = {s.audio_path: s for s in dataset.samples}
    built = {path: dict(prints) for path, prints in notes["built"].items()}
    for sample in samples:
        prints = built.setdefault(relative_path(sample.audio_path, folder), {})
        prints.update(
            {
                n: _print(getattr(sample, n))
                for n in names
                if getattr(sample, n) != getattr(before[sample.audio_path], n)
            }
        )
    return replace(dataset, samples=samples, extra={**dataset.extra, SECTION: {**notes, "built": _packed(built)}})


def emptied_by_hand(dataset: Dataset, sample: Sample, folder: Path) -> set[str]:
    """The fields of a sample that had a value as built and have none now: somebody wants it so."""
    prints = _notes(dataset)["built"].get(relative_path(sample.audio_path, folder), {})
    nothing = {name: getattr(sample, name) for name in EDITABLE if getattr(sample, name) in _SAYS_NOTHING}
    return {name for name, value in nothing.items() if name in prints and prints[name] != _print(value)}


def absent_samples(dataset: Dataset, folder: Path) -> list[Sample]:
    """The samples that wait for their file to come back; what cannot be read of them is passed over."""
    samples = []
    names = {f.name for f in dataclasses.fields(Sample)}
    for entry in _notes(dataset)["absent"]:
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("audio_path"), str)
            and isinstance(entry.get("id"), str)
            and set(entry) <= names
        ):
            samples.append(
                Sample(
                    **{
                        **entry,
                        "audio_path": folder / entry["audio_path"],
                        "estimated": tuple(entry.get("estimated", ())),
                    }
                )
            )
    return samples


def _merge_one(before: Sample, fresh: Sample, built: Mapping[str, str] | None, tag: str) -> tuple[Sample, set[str]]:
    """The merged sample and the names of its values that stay because they were edited."""
    values: dict[str, Any] = {}
    estimated, edited = [], set()
    for name in EDITABLE:
        old, new = getattr(before, name), getattr(fresh, name)
        values[name] = new
        if name == "custom_tag" and old == tag:  # inherited, not typed
            continue
        if _is_edited(before, name, built):
            values[name] = old
            edited.add(name)
        elif name in before.estimated and new in _SAYS_NOTHING:
            values[name] = old
            estimated.append(name)
    if "lyrics" in edited and "is_instrumental" not in edited:
        values["is_instrumental"] = values["lyrics"] in _SAYS_NOTHING
    if {"caption", "genre"} & edited and "labeled" not in edited:
        values["labeled"] = bool(values["caption"] or values["genre"])
    return replace(
        fresh, id=before.id, estimated=tuple(estimated), extra={**fresh.extra, **before.extra}, **values
    ), edited


def _is_edited(before: Sample, name: str, built: Mapping[str, str] | None) -> bool:
    value = getattr(before, name)
    if built is not None and name in built:
        return built[name] != _print(value)
    if name in before.estimated or (name == "labeled" and not value) or (name == "repeat" and value == 1):
        return False
    return value not in _SAYS_NOTHING


def _print(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=4).hexdigest()


def _packed(built: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """One line a song: "caption:1a2b3c4d genre:…"; a value that was edited has nothing after its colon."""
    return {path: " ".join(f"{name}:{value}" for name, value in prints.items()) for path, prints in built.items()}


def _as_json(sample: Sample, folder: Path) -> dict[str, Any]:
    return {**dataclasses.asdict(sample), "audio_path": relative_path(sample.audio_path, folder)}


def _notes(dataset: Dataset) -> dict[str, Any]:
    """The "sidestep" section; whatever in it is not of its form counts as not there."""
    notes = dataset.extra.get(SECTION)
    notes = notes if isinstance(notes, dict) else {}
    packed = notes.get("built")
    built = (
        {path: dict(_PRINT.findall(prints)) for path, prints in packed.items() if isinstance(prints, str)}
        if isinstance(packed, dict)
        else {}
    )
    removed, absent = notes.get("removed"), notes.get("absent")
    return {
        **notes,
        "built": built,
        "removed": removed if isinstance(removed, list) else [],
        "absent": absent if isinstance(absent, list) else [],
    }
