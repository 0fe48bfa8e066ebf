"""Where the record of each song goes: nested like the sources, never two songs in one file, never outside the output folder."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath

OUTSIDE = "_outside"  # folder for songs that do not lie below the base folder
SUFFIX = ".pt"
MAX_NAME_BYTES = 200  # of 255, to leave room for suffixes; counted in UTF-8, as Linux does
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f]')  # on Windows, and so on any drive that may travel there
_RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$", re.IGNORECASE)


def relative_name(source: Path, base: Path) -> str:
    """The song's path as records and messages name it: relative to the base folder, `/` between folders, links not followed."""
    source, base = Path(os.path.abspath(source)), Path(os.path.abspath(base))
    if source.is_relative_to(base):
        return source.relative_to(base).as_posix()
    try:
        return Path(os.path.relpath(source, base)).as_posix()
    except ValueError:  # another drive on Windows
        return source.as_posix()


def record_names(names: list[str]) -> list[PurePosixPath]:
    """The record of each song, relative to the output folder, in the order given.

    `a/song.wav` → `a/song.wav.pt`. Songs that would share a record where upper and lower case are one (or that are listed twice) get a digest
    each, but for the first in alphabetical order. What lies outside the base folder goes below `_outside`, by a digest of its folder.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    plain = [_inside(name) for name in names]
    for i in sorted(range(len(names)), key=lambda i: (names[i], i)):
        groups[_folded(plain[i])].append(i)
    records = [PurePosixPath()] * len(names)
    taken = set(groups)
    for members in groups.values():
        for turn, i in enumerate(members):
            path = plain[i]
            again = 0
            while turn and (_folded(path) in taken or path == plain[i]):
                path = plain[i].with_name(f"{_digest(f'{names[i]}:{turn}:{again}')}~{plain[i].name}")
                again += 1
            taken.add(_folded(path))
            records[i] = path.with_name(path.name + SUFFIX)
    return records


def key_of(record: PurePosixPath) -> str:
    """A short name of a record for work files; equal on every machine."""
    return _digest(_folded(record), 16)


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:", name):
        return PurePosixPath(OUTSIDE, _digest(path.parent.as_posix()), _portable(path.name))
    return PurePosixPath(*(_portable(part) for part in path.parts))


def _portable(part: str) -> str:
    """A file name that every system takes; a digest keeps apart what had to be changed."""
    safe = part.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text, on Linux
    safe = _FORBIDDEN.sub("_", safe)
    if safe.startswith("."):
        safe = "_" + safe[1:]  # hidden files are not looked at when records are read
    if safe != safe.rstrip(" .") or _RESERVED.match(safe):
        safe = f"_{safe.rstrip(' .')}"
    while len(safe.encode()) > MAX_NAME_BYTES:
        safe = safe[1:]  # from the front: the end says which format it was
    return safe if safe == part else f"{safe}~{_digest(part)}"


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path.as_posix()).casefold())


def _digest(text: str, size: int = 5) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()
