"""Building dataset.json again without losing what was edited by hand in it.

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
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidestep.data.fields import INSTRUMENTAL
from sidestep.data.manifest import Dataset, Sample, relative_path

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
        prints.update({n: _print(getattr(sample, n)) for n in names if getattr(sample, n) != getattr(before[sample.audio_path], n)})
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
        if isinstance(entry, dict) and isinstance(entry.get("audio_path"), str) and isinstance(entry.get("id"), str) and set(entry) <= names:
            samples.append(Sample(**{**entry, "audio_path": folder / entry["audio_path"], "estimated": tuple(entry.get("estimated", ()))}))
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
    return replace(fresh, id=before.id, estimated=tuple(estimated), extra={**fresh.extra, **before.extra}, **values), edited


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
    built = {path: dict(_PRINT.findall(prints)) for path, prints in packed.items() if isinstance(prints, str)} if isinstance(packed, dict) else {}
    removed, absent = notes.get("removed"), notes.get("absent")
    return {**notes, "built": built, "removed": removed if isinstance(removed, list) else [], "absent": absent if isinstance(absent, list) else []}
