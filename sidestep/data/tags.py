"""What an audio file says of itself in its tags (ID3, Vorbis comments, MP4, ASF, APE), read by mutagen."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutagen

from sidestep.data.fields import FieldError, parse_field
from sidestep.data.sidecars import Known

_KEYS = {  # field → its names in the various kinds of tags, compared without regard to case
    "title": ("TIT2", "title", "©nam"),
    "artist": ("TPE1", "artist", "©ART", "author"),
    "genre": ("TCON", "genre", "©gen", "wm/genre"),
    "bpm": ("TBPM", "bpm", "tempo", "tmpo", "wm/beatsperminute"),
    "keyscale": ("TKEY", "initialkey", "initial key", "key", "----:com.apple.itunes:initialkey", "wm/initialkey"),
    "language": ("TLAN", "language", "wm/language"),
    "lyrics": ("USLT", "lyrics", "unsyncedlyrics", "unsynced lyrics", "©lyr", "wm/lyrics"),
}
# What mutagen lets through on damaged files, besides its own error.
_DAMAGE = (
    mutagen.MutagenError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    struct.error,
)


@dataclass
class Tags(Known):
    """The fields of the tags; `title` and `artist` are no fields of a prompt but may make a caption."""

    title: str = ""
    artist: str = ""


def read_tags(path: Path) -> Tags:
    """The tags of an audio file; nothing where it has none. Never fails: damage is a problem of the source."""
    tags = Tags("tags")
    try:
        file = mutagen.File(path)
        written = _by_key(file.tags) if file is not None and file.tags is not None else {}
    except _DAMAGE as error:
        tags.problems.append(f"cannot be read: {error}")
        return tags
    for name, keys in _KEYS.items():
        value = next((written[key.casefold()] for key in keys if written.get(key.casefold())), None)
        if value is None:
            continue
        if name in ("title", "artist"):
            try:
                setattr(tags, name, parse_field("caption", value) or "")
            except FieldError:
                continue
        else:
            tags.add(name, value)
    return tags


def _by_key(tags: Any) -> dict[str, str]:
    """Every text tag as one string by its key in small letters; several values are joined."""
    found = {}
    for key in tags.keys():
        value = tags[key]
        name = key.split(":", 1)[0] if key.startswith("USLT") else key
        genres = getattr(value, "genres", None)  # ID3 may hold numbers there; mutagen knows their names
        values = genres if genres else getattr(value, "text", value)
        found.setdefault(name.casefold(), ", ".join(_texts(values)))
    return found


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list | tuple):
        values = [values]
    texts = []
    for value in values:
        if isinstance(value, bytes):
            value = bytes(value).decode("utf-8", "replace")
        if isinstance(value, str | int | float) or hasattr(value, "value") or type(value).__str__ is not object.__str__:
            texts.append(str(value))
    return texts
