"""Text files as people's editors leave them.

What stands in the text files beside a song, and which song each of them speaks for.

Beside `song.ext`, the best source first; they are merged field by field, the first that knows a field has it:

1. `song.ext.json`, `song.json`   an object of fields
2. `song.ext.txt`, `song.txt`     `key: value` lines, or plain text
3. `song.ext.caption.txt`, `song.caption.txt`   the caption; `song.ext.lyrics.txt`, `song.lyrics.txt`, then `song.ext.lrc`, `song.lrc`   the lyrics
4. `*.csv` (see `tables`), 5. tags inside the audio file (see `tags`), 6. its name.

`song.txt` speaks for every song of that stem in its folder (song.wav and song.mp3), `song.wav.txt` for song.wav alone. A file whose name is the whole name
of one song plus a suffix never speaks for another: `a.caption.txt` beside `a.wav` and `a.caption.wav` belongs to the latter. Names are compared in Unicode's
composed form (macOS decomposes them), suffixes without regard to case.

A `.txt` file:
- Fields stand at its top, one `key: value` a line (blank lines between them are passed over; keys in any case, see `fields` for their names).
- `lyrics:` comes last: all that follows is lyrics, whatever it looks like. The same holds from a section mark such as [Verse] on.
- A line right below `caption:` or `genre:` that is no `word: value` goes on with it. A `word: value` with an unknown word is reported and left out.
- Free text below other fields is lyrics with a section mark in it, else the caption if none was given, else reported.
- A file that does not begin with a field has none: all of it is lyrics with a section mark in it, else the caption. A colon further down changes nothing.

A section mark is a line that begins with [Verse], [Chorus 2], [Intro: piano] and the like, or with a time such as [01:23.45]; two lines that are nothing but words in brackets also count, in
any language.

Encodings: see `text`. A sidecar above 1 MiB is reported and not read.
Lists of songs in `*.csv`: one row each, with a File column and any of the fields (BPM, Key, Caption, Genre, Language, …).

A list speaks for the songs of its own folder and of the folders below. File names a song by its path relative to the list, or by its bare name; the suffix
may be left out, the row then speaks for every song of that stem. A bare name that stands in several folders is meant for the list's own folder, else it is
ambiguous: reported, and no song gets the row. Lists nearer to a song come first, then by name; of two rows for one song the first counts. Columns may be
separated by comma, semicolon or tab.
"""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.data.fields import NotUnderstood, field_named, understand
from sidestep.words import count

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(data: bytes) -> tuple[str, str | None]:
    """(text, problem). UTF-8 with or without byte order mark, UTF-16 and UTF-32 with one, UTF-16 without one where every other byte is zero.

    Anything else is read as Windows' and ISO's Latin-1, which cannot fail but may be wrong: the problem says so.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding), None
            except UnicodeDecodeError:
                return data[len(mark) :].decode(
                    encoding, errors="replace"
                ), f"is damaged {encoding.upper()}; what could not be read was replaced"
    try:
        text = data.decode("utf-8")
        if "\0" not in text:
            return text, None
    except UnicodeDecodeError:
        text = None
    for encoding, zeros in (("utf-16-le", data[1::2]), ("utf-16-be", data[0::2])):
        if len(data) > 1 and len(data) % 2 == 0 and zeros.count(0) > 0.6 * len(zeros):
            try:
                return data.decode(encoding), None
            except UnicodeDecodeError:
                continue
    if text is not None:
        return text, None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text, "is no UTF-8 and was read as Latin-1; if letters look wrong, save it as UTF-8"


MAX_BYTES = 1 << 20

_FIELD_LINE = re.compile(r"^\s*([^\W\d][\w \t-]{0,30}?)\s*[:：]\s*(.*)$")
_WORD_LINE = re.compile(r"^\s*[^\W\d][\w-]{0,30}\s*[:：](?!//)")
_SECTIONS = "intro|verse|chorus|bridge|outro|hook|refrain|interlude|instrumental|inst|solo|drop|breakdown|break|build|prelude|coda|end|pre|post|rap|spoken|fade"
_SECTION_MARK = re.compile(rf"^\s*[\[［](?:(?:{_SECTIONS})(?![^\W\d])|\d{{1,3}}:\d\d)[^\]］\n]*[\]］]", re.IGNORECASE)
_SIDECAR_SUFFIX = re.compile(r"(\.caption|\.lyrics)?\.txt$|\.json$|\.lrc$", re.IGNORECASE)
_BRACKETED_LINE = re.compile(r"^\s*[\[［][^\]］\n]{1,60}[\]］]\s*$")


@dataclass
class Known:
    """What one source knows of a song, in the form of `fields`, and what in it could not be understood."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, where: str = "") -> None:
        """Take a value if it means something; note it as a problem if it cannot be understood."""
        try:
            understood = understand(name, value)
        except NotUnderstood as mistake:
            self.problems.append(f"{where or name}: {mistake}")
            return
        if understood is not None:
            self.values[name] = understood


def has_section_mark(text: str) -> bool:
    """Whether the text is set out as lyrics: a section mark such as [Verse 1], or two bracketed lines."""
    bracketed = 0
    for line in text.split("\n"):
        if "[" in line or "［" in line:
            bracketed += bool(_BRACKETED_LINE.match(line))
            if bracketed == 2 or _SECTION_MARK.match(line):
                return True
    return False


def parse_txt(text: str, source: str = "text") -> Known:
    """The fields of a `.txt` sidecar, by the rules at the top of this file. Never fails."""
    known = Known(source)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    fields: dict[str, str] = {}
    places: dict[str, str] = {}
    goes_on = ""  # the field that the next line may go on with
    lyrics, body = None, None
    for i, line in enumerate(lines):
        match = _FIELD_LINE.match(line)
        name = field_named(match[1]) if match else None
        if not line.strip():
            goes_on = ""
        elif name == "lyrics":
            lyrics = "\n".join([match[2], *lines[i + 1 :]])
            break
        elif name:
            if not fields.get(name):
                fields[name], places[name] = match[2], f"line {i + 1}, {match[1].strip()}"
            elif match[2].strip():
                known.problems.append(f"line {i + 1}: {match[1].strip()} stands here twice; the first counts")
            goes_on = name if name in ("caption", "genre") else ""
        elif (
            not fields
            or _SECTION_MARK.match(line)
            or (_BRACKETED_LINE.match(line) and has_section_mark("\n".join(lines[i:])))
        ):
            body = lines[i:]
            break
        elif _WORD_LINE.match(line):
            known.problems.append(f'line {i + 1}: "{line.strip()[:60]}" begins with no known field and was left out')
            goes_on = ""
        elif goes_on:
            fields[goes_on] += "\n" + line
        else:
            body = lines[i:]
            break
    for name, value in fields.items():
        known.add(name, value, places[name])
    if lyrics is not None:
        known.add("lyrics", lyrics)
    elif body:
        _place_body(known, "\n".join(body))
    return known


def _place_body(known: Known, body: str) -> None:
    if has_section_mark(body):
        known.add("lyrics", body)
    elif "caption" not in known.values:
        known.add("caption", body)
        stray = next(
            (m[1].strip() for line in body.split("\n")[1:] if (m := _FIELD_LINE.match(line)) and field_named(m[1])),
            None,
        )
        if stray:
            known.problems.append(f'"{stray}:" below free text was taken as text: fields stand at the top of the file')
    else:
        known.problems.append(
            f'"{body.strip()[:60]}" is neither a field nor lyrics under a section mark such as [Verse], and was left out'
        )


def parse_json(text: str, source: str = "json") -> Known:
    """The fields of a `.json` sidecar. Never fails. Keys that are no field are passed over: other programs keep their own things there."""
    known = Known(source)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        known.problems.append(f"is no JSON: {error}")
        return known
    if not isinstance(data, dict):
        known.problems.append("holds no JSON object of fields")
        return known
    if isinstance(data.get("samples"), list):  # a dataset.json beside a song called dataset
        return known
    for key, value in data.items():
        name = field_named(key)
        if name and name not in known.values:
            known.add(name, value, key)
    return known


class Sidecars:
    """The text files of the folders that hold `songs`, each folder listed once."""

    def __init__(self, songs: Iterable[Path]):
        self._listings: dict[Path, dict[str, str]] = {}
        self._names: dict[Path, set[str]] = {}
        self._stems: dict[Path, set[str]] = {}
        for song in songs:
            self._names.setdefault(song.parent, set()).add(composed(song.name))
            self._stems.setdefault(song.parent, set()).add(composed(song.stem))

    def of(self, song: Path) -> list[Known]:
        """What each sidecar of `song` knows, the best first. Never fails: what cannot be read is a problem of its source."""
        listing = self._listing(song.parent)
        names, stems = self._names.get(song.parent, set()), self._stems.get(song.parent, set())
        whole, stem = composed(song.name), composed(song.stem)
        bases = (
            [whole] if stem in names else [whole, stem]
        )  # a song that is called like our stem has that sidecar for itself
        found = []
        for suffix in (".json", ".txt", ".caption.txt", ".lyrics.txt", ".lrc"):
            for base in bases:
                owner = base + suffix.removesuffix(".txt")
                if suffix in (".caption.txt", ".lyrics.txt") and (owner in names or owner in stems):
                    continue
                if written := listing.get(base + suffix):
                    found.append(_read(song.parent / written, suffix))
        return found

    def _listing(self, folder: Path) -> dict[str, str]:
        """Composed name with its last suffixes in small letters → name on disk, of the text files in a folder."""
        if folder not in self._listings:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            listing: dict[str, str] = {}
            for name in names:
                end = _SIDECAR_SUFFIX.search(name)
                if end:
                    key = composed(name[: end.start()]) + end[0].lower()
                    if key not in listing or not end[0].isupper():  # the usual spelling wins over .TXT
                        listing[key] = name
            self._listings[folder] = listing
        return self._listings[folder]


def _read(path: Path, suffix: str) -> Known:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        return Known(path.name, problems=[f"cannot be read: {error.strerror or error}"])
    if len(data) > MAX_BYTES:
        return Known(path.name, problems=["is larger than 1 MiB and was not read"])
    text, problem = decode_text(data)
    if suffix == ".json":
        known = parse_json(text, path.name)
    elif suffix == ".txt":
        known = parse_txt(text, path.name)
    else:
        known = Known(path.name)
        known.add("caption" if suffix == ".caption.txt" else "lyrics", text)
    if problem:
        known.problems.insert(0, problem)
    return known


def composed(name: str) -> str:
    """A file name in Unicode's composed form, so that names written by different systems compare equal."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


_FILE_COLUMNS = ("file", "filename", "file name", "path", "audio_path", "audio", "song")
_MAX_BYTES = 32 * MAX_BYTES


class Tables:
    """Every list at or below `root` that stands in a song's folder or above one; `problems` are (path, what is wrong) of whole lists."""

    def __init__(self, root: Path, songs: Iterable[Path]):
        self.problems: list[tuple[Path, str]] = []
        self._rows: dict[Path, list[Known]] = defaultdict(list)
        self._songs = list(songs)
        folders = {root}
        for song in self._songs:
            folder = song.parent
            while folder not in folders and root in folder.parents:
                folders.add(folder)
                folder = folder.parent
        for folder in sorted(folders, key=lambda f: (-len(f.parts), f.as_posix())):
            try:
                lists = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and p.is_file())
            except OSError:
                continue
            if lists:
                index = _Index(folder, self._songs)
                for path in lists:
                    self._read(path, index)

    def of(self, song: Path) -> list[Known]:
        """The rows that speak for `song`, the best first."""
        return self._rows.get(song, [])

    def _read(self, path: Path, index: "_Index") -> None:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            self.problems.append((path, f"cannot be read: {error.strerror or error}"))
            return
        if len(data) > _MAX_BYTES:
            self.problems.append((path, "is larger than 32 MiB and was not read"))
            return
        text, problem = decode_text(data)
        if problem:
            self.problems.append((path, problem))
        first_line = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=first_line.count)
        try:
            rows = list(csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=delimiter))
        except csv.Error as error:
            self.problems.append((path, f"is no list that can be read: {error}"))
            return
        header = [cell.strip() for cell in rows[0]] if rows else []
        file_column = next(
            (i for name in _FILE_COLUMNS for i, cell in enumerate(header) if cell.casefold() == name), None
        )
        if file_column is None:
            self.problems.append((path, "has no File column, so it speaks for no song"))
            return
        columns = {i: name for i, cell in enumerate(header) if i != file_column and (name := field_named(cell))}
        seen: set[Path] = set()
        strangers: list[str] = []
        for number, row in enumerate(rows[1:], 2):
            written = row[file_column].strip() if file_column < len(row) else ""
            if not written:
                continue
            songs, several = index.find(written)
            if several:
                self.problems.append((path, f'row {number}: "{written}" stands in several folders; write its path'))
            elif not songs:
                strangers.append(written)
            for song in songs:
                if song in seen:
                    self.problems.append((path, f'row {number}: "{written}" has a row already; the first counts'))
                    continue
                known = Known(f"{path.name} row {number}")
                for i, name in columns.items():
                    if i < len(row):
                        known.add(name, row[i], header[i])
                self._rows[song].append(known)
            seen.update(songs)
        if strangers:
            self.problems.append(
                (
                    path,
                    f'{count(len(strangers), "row")} name no song here, such as "{strangers[0]}"',
                )
            )


class _Index:
    """The songs at and below one folder by relative path, by bare name, and both without suffix."""

    def __init__(self, folder: Path, songs: Iterable[Path]):
        self._by: tuple[dict[str, list[Path]], ...] = tuple(defaultdict(list) for _ in range(4))
        for song in songs:
            if folder not in song.parents:
                continue
            path = song.relative_to(folder)
            for table, name in zip(
                self._by, (path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem), strict=True
            ):
                table[composed(name)].append(song)

    def find(self, written: str) -> tuple[list[Path], bool]:
        """(songs, whether the name stands in several folders)."""
        name = composed(written.replace("\\", "/").removeprefix("./"))
        for table in self._by:
            if songs := table.get(name):
                return ([], True) if len({s.parent for s in songs}) > 1 else (songs, False)
        return [], False
