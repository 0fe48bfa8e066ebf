"""Tags inside audio files (ID3, Vorbis comments, MP4, ASF, APE) as fields of a song, read by mutagen."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutagen

from sidestep.data.fields import language_code, parse_field
from sidestep.data.sidecars import MAX_BYTES, Known

_KEYS = {  # field → its names in the various kinds of tags, compared without regard to case
    "title": ("TIT2", "title", "©nam"),
    "artist": ("TPE1", "artist", "©ART", "author"),
    "genre": ("TCON", "genre", "©gen", "wm/genre"),
    "bpm": ("TBPM", "bpm", "tempo", "tmpo", "wm/beatsperminute"),
    "keyscale": ("TKEY", "initialkey", "initial key", "key", "----:com.apple.itunes:initialkey", "wm/initialkey"),
    "language": ("TLAN", "language", "wm/language"),
    "lyrics": ("SYLT", "USLT", "lyrics", "unsyncedlyrics", "unsynced lyrics", "©lyr", "wm/lyrics"),
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
    written: dict[str, str] = {}  # every text tag as one string by its key in small letters; several values are joined
    try:
        file = mutagen.File(path)
        content = file.tags if file is not None and file.tags is not None else {}
        sung_in = language_code(str(content["TLAN"])) if "TLAN" in content else None
        for key in content.keys():
            value = content[key]
            name = key.split(":", 1)[0] if key[:4] in ("USLT", "SYLT") else key.removeprefix("TXXX:")
            genres = getattr(value, "genres", None)  # ID3 may hold numbers there; mutagen knows their names
            texts = _texts(genres or getattr(value, "text", value))
            if name == "SYLT":
                if value.format != 2:  # its times are not in milliseconds
                    continue
                times = [(f"{ms // 60_000:02}:{ms % 60_000 / 1000:05.2f}", line.strip()) for line, ms in value.text]
                texts = ["\n".join(f"[{time}]{line}" for time, line in times)]
            if name == "USLT" and sung_in and language_code(value.lang) == sung_in:
                written[name.casefold()] = ", ".join(texts)
            written.setdefault(name.casefold(), ", ".join(texts))
    except _DAMAGE as error:
        tags.problems.append(f"cannot be read: {error}")
        return tags
    for name, keys in _KEYS.items():
        value = next((written[key.casefold()] for key in keys if written.get(key.casefold())), None)
        if value is not None and name in ("title", "artist"):
            setattr(tags, name, parse_field("caption", value) or "")
        elif value is not None and len(value) > MAX_BYTES:
            tags.problems.append(f"{name}: is larger than 1 MiB and was not read")
        elif value is not None and not (name == "keyscale" and value == "o"):  # ID3's word for no key
            tags.add(name, value)
    return tags


def _texts(values: Any) -> list[str]:
    texts = []
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, bytes):
            texts.append(value.decode("utf-8", "replace"))
        elif (
            isinstance(value, str | int | float) or hasattr(value, "value") or type(value).__str__ is not object.__str__
        ):
            texts.append(str(value))
    return texts
