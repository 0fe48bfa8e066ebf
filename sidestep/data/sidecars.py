"""Text beside songs: what each sidecar file and each list (CSV) knows of which song.

Sources of a song `song.ext`, the best first; they are merged field by field, the first that knows a field has it:

1. `song.ext.json`, `song.json`   an object of fields
2. `song.ext.txt`, `song.txt`     `key: value` lines, or plain text
3. `song.ext.caption.txt`, `song.caption.txt`   the caption, as `song_prompt.txt` (ACE-Step 1);
   `song.ext.lyrics.txt`, `song.lyrics.txt`, then `song_lyrics.txt` (ACE-Step 1), `song.lyrics` (SimpleTuner) and
   `song.ext.lrc`, `song.lrc`   the lyrics
4. rows of `*.csv`, 5. tags inside the audio file (see `tags`), 6. its name.

`song.txt` speaks for every song of that stem in its folder (song.wav and song.mp3), `song.wav.txt` for song.wav alone.
A file whose name is the whole name of one song plus a suffix never speaks for another: `a.caption.txt` beside `a.wav`
and `a.caption.wav` belongs to the latter. Names are compared in Unicode's composed form (macOS decomposes them),
suffixes without regard to case. For encodings see `text`; a sidecar above 1 MiB is reported and not read.

A `.txt` file:
- Fields stand at its top, one `key: value` a line (blank lines between them are passed over; keys in any case, see
  `fields` for their names).
- `lyrics:` comes last: all that follows is lyrics, whatever it looks like. The same holds from a section mark such as
  [Verse] on.
- A line right below `caption:` or `genre:` that is no `word: value` goes on with it. A `word: value` with an unknown
  word is reported and left out.
- Free text below other fields is lyrics with a section mark in it, else the caption if none was given, else reported.
- A file that begins with neither a field nor a block of `word: value` lines with a field among them has none: all of it
  is lyrics with a section mark in it, else the caption. A colon further down changes nothing.
- Fields may also stand in tags, as ai-toolkit writes them: <CAPTION>…</CAPTION>, <LYRICS>…</LYRICS>, <BPM>72</BPM>.

A section mark is a line that begins with [Verse], [Chorus 2], [Intro: piano] and the like, or with a time such as
[01:23.45]; two lines that are nothing but words in brackets also count, in any language.

A list is a `.csv` file with one row per song, a File column and any of the fields (BPM, Key, Caption, Genre, Language,
…), separated by comma, semicolon, tab or what Excel's first line `sep=;` says. It speaks for the songs of its own
folder and of the folders below. File names a song by its path relative to the list, or by its bare name; the suffix may
be left out, the row then speaks for every song of that stem. A bare name that stands in several folders is meant for
the list's own folder, else it is ambiguous: reported, and no song gets the row. Lists nearer to a song come first, then
by name; of two rows for one song the first counts. A list above 32 MiB is reported and not read.
"""

import csv
import io
import itertools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.data.fields import FieldError, field_named, joined_key, parse_field
from sidestep.data.text import decode_text
from sidestep.words import count

MAX_BYTES = 1 << 20
MAX_LIST_BYTES = 32 * MAX_BYTES

_FIELD_LINE = re.compile(r"^\s*([^\W\d][\w \t-]{0,30}?)\s*[:：]\s*(.*)$")
_WORD_LINE = re.compile(r"^\s*[^\W\d][\w-]{0,30}\s*[:：](?!//)")
_SECTIONS = (
    "intro|verse|chorus|bridge|outro|hook|refrain|interlude|instrumental|inst|solo|drop|breakdown|break|build|prelude"
    "|coda|end|pre|post|rap|spoken|fade"
)
_SECTION_MARK = re.compile(rf"^\s*[\[［](?:(?:{_SECTIONS})(?![^\W\d])|\d{{1,3}}:\d\d)[^\]］\n]*[\]］]", re.IGNORECASE)
_SIDECAR_SUFFIX = re.compile(r"((\.caption|\.lyrics|_prompt|_lyrics)?\.txt|\.json|\.lrc|\.lyrics)$", re.IGNORECASE)
_BRACKETED_LINE = re.compile(r"^\s*[\[［][^\]］\n]{1,60}[\]］]\s*$")
_SIDECAR_SUFFIXES = {  # what a file is, the best first
    ".json": "json",
    ".txt": "txt",
    ".caption.txt": "caption",
    "_prompt.txt": "caption",
    ".lyrics.txt": "lyrics",
    "_lyrics.txt": "lyrics",
    ".lyrics": "lyrics",
    ".lrc": "lyrics",
}
_TAGGED_FIELD = re.compile(r"<([A-Za-z_]+)>(.*?)</\1>", re.DOTALL)
_FILE_COLUMNS = ("file", "filename", "file name", "file_name", "path", "audio_path", "audio", "song")


@dataclass
class Known:
    """What one source knows of a song, in the form of `fields`, and what in it has no meaning."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, where: str = "") -> None:
        """Take a value if it means something; note it as a problem if it means nothing in its field."""
        try:
            parsed = parse_field(name, value)
        except FieldError as error:
            self.problems.append(f"{where or name}: {error}")
        else:
            if parsed is not None:
                self.values[name] = parsed


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
    tagged = [(tag, value) for tag, value in _TAGGED_FIELD.findall(text) if field_named(tag)]
    if tagged and text.lstrip().startswith("<"):
        for tag, value in tagged:
            known.add(field_named(tag) or "", value.strip("\r\n"), tag)
        return known
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    header = list(itertools.takewhile(_FIELD_LINE.match, lines))
    is_header = any(_says_something(line) for line in header)
    fields: dict[str, str] = {}
    written_at: dict[str, str] = {}
    goes_on = ""  # the field that the next line may go on with
    lyrics, body = None, ""
    for i, line in enumerate(lines):
        match = _FIELD_LINE.match(line)
        key, value = (match[1].strip(), match[2]) if match else ("", "")
        name = field_named(key)
        if not line.strip():
            goes_on = ""
        elif name == "lyrics":
            lyrics = "\n".join([value, *lines[i + 1 :]])
            break
        elif name:
            if name == "keyscale" and (whole := joined_key(fields.get(name), value)):
                fields[name] = whole
            elif not fields.get(name):
                fields[name], written_at[name] = value, f"line {i + 1}, {key}"
            elif value.strip():
                known.problems.append(f"line {i + 1}: {key} stands here twice; the first counts")
            goes_on = name if name in ("caption", "genre") else ""
        elif (
            (not fields and not (is_header and i < len(header)))
            or _SECTION_MARK.match(line)
            or (_BRACKETED_LINE.match(line) and has_section_mark("\n".join(lines[i:])))
        ):
            body = "\n".join(lines[i:])
            break
        elif _WORD_LINE.match(line):
            known.problems.append(f'line {i + 1}: "{line.strip()[:60]}" begins with no known field and was left out')
            goes_on = ""
        elif goes_on:
            fields[goes_on] += "\n" + line
        else:
            body = "\n".join(lines[i:])
            break
    for name, value in fields.items():
        known.add(name, value, written_at[name])
    if lyrics is not None or has_section_mark(body):
        known.add("lyrics", body if lyrics is None else lyrics)
    elif "caption" in known.values and body:
        what = f'"{body.strip()[:60]}" is neither a field nor lyrics under a section mark such as [Verse]'
        known.problems.append(f"{what}, and was left out")
    elif body:
        known.add("caption", body)
        keys = [match[1].strip() for line in body.split("\n")[1:] if (match := _FIELD_LINE.match(line))]
        if stray := next(filter(field_named, keys), ""):
            known.problems.append(f'"{stray}:" below free text was taken as text: fields stand at the top of the file')
    return known


def _says_something(line: str) -> bool:
    """Whether a line is a field with a value that has a meaning in it."""
    match = _FIELD_LINE.match(line)
    name = field_named(match[1]) if match else None
    try:
        return bool(match and name and parse_field(name, match[2]) is not None)
    except FieldError:
        return False


def parse_json(text: str, source: str = "json") -> Known:
    """The fields of a `.json` sidecar. Never fails. Keys of other programs, which are no fields, are passed over."""
    known = Known(source)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        known.problems.append(f"is no JSON: {error}")
        return known
    if not isinstance(data, dict):
        known.problems.append("holds no JSON object of fields")
    elif not isinstance(data.get("samples"), list):  # that would be a dataset.json beside a song called dataset
        for key, value in data.items():
            name = field_named(key)
            if name == "keyscale" and (whole := joined_key(data.get("key"), data.get("scale"))):
                known.add(name, whole, key)
            elif name and name not in known.values:
                known.add(name, value, key)
    return known


class Sidecars:
    """The text files of the folders that hold `songs`, each folder listed once."""

    def __init__(self, songs: Iterable[Path]):
        self._names: dict[Path, set[str]] = defaultdict(set)
        self._stems: dict[Path, set[str]] = defaultdict(set)
        for song in songs:
            self._names[song.parent].add(composed(song.name))
            self._stems[song.parent].add(composed(song.stem))
        self._text_files: list[Path] = []
        self._read_files: set[Path] = set()
        self._files: dict[Path, dict[str, Path]] = defaultdict(
            dict
        )  # composed name, its suffixes in small letters → file
        for folder in self._names:
            for path in _listed(folder):
                if path.suffix.lower() in (".txt", ".lrc", ".lyrics"):
                    self._text_files.append(path)
                if end := _SIDECAR_SUFFIX.search(path.name):
                    key = composed(path.name[: end.start()]) + end[0].lower()
                    if key not in self._files[folder] or not end[0].isupper():  # the usual spelling wins over .TXT
                        self._files[folder][key] = path

    def of(self, song: Path) -> list[Known]:
        """What each sidecar of `song` knows, the best first; what cannot be read is a problem of its source."""
        names, stems = self._names[song.parent], self._stems[song.parent]
        bases = [composed(song.name)]
        if composed(song.stem) not in names:  # a song that is called like our stem has that sidecar for itself
            bases.append(composed(song.stem))
        found = []
        for suffix, kind in _SIDECAR_SUFFIXES.items():
            for base in bases:
                owner = base + suffix.removesuffix(".txt")
                if kind in ("caption", "lyrics") and (owner in names or owner in stems):
                    continue
                if path := self._files[song.parent].get(base + suffix):
                    text, problem = _read(path, MAX_BYTES, "1 MiB")
                    known = Known(path.name)
                    if kind == "json" and (text or not problem):
                        known = parse_json(text, path.name)
                    elif kind == "txt":
                        known = parse_txt(text, path.name)
                    elif kind != "json":
                        known.add(kind, text)
                    known.problems[:0] = [problem] if problem else []
                    found.append(known)
                    self._read_files.add(path)
        return found

    def unread(self) -> list[Path]:
        """The text files beside songs that no song was asked for, once `of` was called for all songs."""
        return [path for path in self._text_files if path not in self._read_files and path.is_file()]


class Tables:
    """Every list at or below `root` that stands in a song's folder or above one.

    `problems` are (path, what is wrong) of whole lists and of rows that speak for no song.
    """

    def __init__(self, root: Path, songs: Iterable[Path]):
        self.problems: list[tuple[Path, str]] = []
        self._rows: dict[Path, list[Known]] = defaultdict(list)
        songs = list(songs)
        folders = {root}.union(*({p for p in song.parents if root in p.parents} for song in songs))
        for folder in sorted(folders, key=lambda f: (-len(f.parts), f.as_posix())):
            lists = [p for p in _listed(folder) if p.suffix.lower() == ".csv" and p.is_file()]
            # The songs at and below the folder by relative path, by that without suffix, by name and by stem.
            names: list[dict[str, list[Path]]] = [defaultdict(list) for _ in range(4)]
            for song in songs if lists else []:
                if folder in song.parents:
                    path = song.relative_to(folder)
                    spellings = path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem
                    for by_name, spelling in zip(names, spellings, strict=True):
                        by_name[composed(spelling)].append(song)
            for path in lists:
                self.problems += ((path, problem) for problem in self._read_list(path, names))

    def of(self, song: Path) -> list[Known]:
        """The rows that speak for `song`, the best first."""
        return self._rows.get(song, [])

    def _read_list(self, path: Path, names: list[dict[str, list[Path]]]) -> Iterator[str]:
        """Take the rows of one list; yields what is wrong with it."""
        text, problem = _read(path, MAX_LIST_BYTES, "32 MiB")
        if problem:
            yield problem
            if not text:
                return
        first_line, _, rest = text.partition("\n")
        delimiter = max(",;\t", key=first_line.count)
        if said := re.fullmatch(r"\s*sep=(.)\s*", first_line, re.IGNORECASE):  # Excel's own, not a row
            delimiter, text = said[1], rest
        try:
            rows = list(csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=delimiter))
        except csv.Error as error:
            yield f"is no list that can be read: {error}"
            return
        header = [cell.strip() for cell in rows[0]] if rows else []
        titles = [cell.casefold() for cell in header]
        file_column = next((titles.index(name) for name in _FILE_COLUMNS if name in titles), None)
        if file_column is None:
            yield "has no File column, so it speaks for no song"
            return
        columns = {i: name for i, cell in enumerate(header) if i != file_column and (name := field_named(cell))}
        seen: set[Path] = set()
        unmatched: list[str] = []
        for number, row in enumerate(rows[1:], 3 if said else 2):
            written = row[file_column].strip() if file_column < len(row) else ""
            if not written:
                continue
            wanted = composed(written.replace("\\", "/").removeprefix("./"))
            songs = next((by_name[wanted] for by_name in names if wanted in by_name), [])
            if len({song.parent for song in songs}) > 1:
                yield f'row {number}: "{written}" stands in several folders; write its path'
                continue
            if not songs:
                unmatched.append(written)
            for song in songs:
                if song in seen:
                    yield f'row {number}: "{written}" has a row already; the first counts'
                    continue
                known = Known(f"{path.name} row {number}")
                for i, name in columns.items():
                    if i < len(row):
                        known.add(name, row[i], header[i])
                self._rows[song].append(known)
            seen.update(songs)
        if unmatched:
            verb = "names" if len(unmatched) == 1 else "name"
            yield f'{count(len(unmatched), "row")} {verb} no song here, such as "{unmatched[0]}"'


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(path: Path, limit: int, limit_in_words: str) -> tuple[str, str | None]:
    """(text, problem) of a file; no text where it cannot be read or is larger than `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        return "", f"cannot be read: {error.strerror or error}"
    if len(data) > limit:
        return "", f"is larger than {limit_in_words} and was not read"
    return decode_text(data)


def composed(name: str) -> str:
    """A file name in Unicode's composed form, so that names written by different systems compare equal."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
