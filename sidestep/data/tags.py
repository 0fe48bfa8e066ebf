"""Tags inside audio files (ID3, Vorbis comments, MP4, ASF, APE) as fields of a song, read by mutagen."""

import io
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutagen
from mutagen.id3 import _frames

from sidestep.data.fields import language_code
from sidestep.data.lyrics import lrc_of
from sidestep.data.sidecars import MAX_BYTES, Known

MAX_TAG_BYTES = 64 * MAX_BYTES  # of a file, pictures included
_KEYS = {  # field → its names in the various kinds of tags, compared without regard to case
    "title": ("TIT2", "title", "©nam"),
    "artist": ("TPE1", "artist", "©ART", "author"),
    "genre": ("TCON", "genre", "©gen", "wm/genre"),
    "bpm": ("TBPM", "bpm", "tempo", "tmpo", "wm/beatsperminute"),
    "keyscale": ("TKEY", "initialkey", "initial key", "key", "wm/initialkey"),
    "language": ("TLAN", "language", "wm/language"),
    "lyrics": ("lyrics", "unsyncedlyrics", "unsynced lyrics", "©lyr", "wm/lyrics"),
}
_OWN_NAMES = ("txxx:", "----:com.apple.itunes:")  # before names that programs give themselves
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


class _BoundedFile(io.BufferedReader):
    """A file of which at most MAX_TAG_BYTES are read, whatever its tags promise. Raises OSError beyond that."""

    def __init__(self, path: Path):
        super().__init__(path.open("rb", buffering=0))
        self.size, self.left = path.stat().st_size, MAX_TAG_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        most = min(self.size, self.left + 1)  # memory for all that is asked for would be taken at once
        data = super().read(most if size is None or size < 0 else min(size, most))
        self.left -= len(data)
        if self.left < 0:
            raise OSError(f"its tags are larger than {MAX_TAG_BYTES >> 20} MiB")
        return data


class _BoundedZlib(threading.local):
    """zlib as mutagen calls it for compressed frames, which it unpacks whole: a frame to 1 MiB at most, a file to 16.

    `left`: how many bytes the frames of this thread's file may still have; `refused`: whether one had more.
    """

    error = zlib.error
    left = 0
    refused = False

    def decompress(self, data: bytes) -> bytes:
        unpacker, limit = zlib.decompressobj(), min(self.left, MAX_BYTES)
        unpacked = unpacker.decompress(data, limit + 1)
        if len(unpacked) > limit:
            self.refused = True
        if len(unpacked) > limit or not unpacker.eof:
            raise zlib.error("too large or incomplete")
        self.left -= len(unpacked)
        return unpacked


_zlib = _BoundedZlib()
vars(_frames)["zlib"] = _zlib


def read_tags(path: Path, language: str = "") -> Tags:
    """The tags of an audio file; nothing where it has none. Never fails: damage is a problem of the source.

    Of lyrics in several languages those in `language` (a code that a better source gave, else the tags' own) are taken.
    """
    tags = Tags("tags")
    written: dict[str, list[str]] = {}  # texts by their key in small letters
    sung: list[tuple[str | None, list[str]]] = []  # (language, lyrics) of ID3, the timed ones first
    _zlib.left, _zlib.refused = 16 * MAX_BYTES, False
    try:
        with _BoundedFile(path) as file:
            opened = mutagen.File(file)
        content = {} if opened is None or opened.tags is None else opened.tags
        for key in content.keys():
            value, name = content[key], key.casefold()
            for prefix in _OWN_NAMES:
                name = name.removeprefix(prefix)
            if name.startswith("uslt"):
                sung.append((language_code(value.lang), [value.text]))
            elif name.startswith("sylt") and value.format == 2:  # its times are in milliseconds
                sung.insert(0, (language_code(value.lang), [lrc_of(value.text)]))
            elif any(name == known.casefold() for names in _KEYS.values() for known in names):
                values = getattr(value, "genres", None) or getattr(value, "text", value)  # mutagen names ID3's numbers
                written.setdefault(name, []).extend(
                    part
                    for text in (values if isinstance(values, list | tuple) else [values])
                    for part in (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).split("\0")
                )
    except _DAMAGE as error:
        tags.problems.append(f"cannot be read: {error}")
        return tags
    if _zlib.refused:
        tags.problems.append("a compressed tag unpacks to more than 1 MiB and was not read")
    language = language or language_code("".join(written.get("tlan", []))) or ""
    if sung:
        code, written["lyrics"] = next((words for words in sung if words[0] == language), sung[0])
        languages = sorted({each for each, _ in sung if each})
        others = [each for each in languages if each != code]
        if code != language and others and len(languages) > 1:
            taken = f"those in {code}" if code else "those of no language"
            tags.problems.append(
                f"lyrics stand there in {' and '.join(languages)}; {taken} were taken "
                f"(a sidecar with language: {others[0]} takes the others)"
            )
    for name, keys in _KEYS.items():
        texts = next((written[key.casefold()] for key in keys if any(written.get(key.casefold(), ()))), None)
        if not texts:
            continue
        value: Any = texts if name in ("title", "artist", "genre", "lyrics") else texts[0]
        if name in ("title", "artist"):
            called = Known(name)
            called.add("caption", value)
            setattr(tags, name, called.values.get("caption", ""))
        elif sum(map(len, texts)) > MAX_BYTES:
            tags.problems.append(f"{name}: is larger than 1 MiB and was not read")
        elif not (name == "keyscale" and value == "o"):  # ID3's word for no key
            tags.add(name, value)
    return tags
