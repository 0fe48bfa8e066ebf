"""Text beside songs: what each sidecar file and each list (CSV, JSON Lines) knows of which song.

Sources of a song `song.ext`, the best first; they are merged field by field, the first that knows a field has it:

1. `song.ext.json`, `song.json`   an object of fields, or what `sample` wrote, with the fields under "prompt"
2. `song.ext.txt`, `song.txt`     `key: value` lines, or plain text
3. `song.ext.caption.txt`, `song.caption.txt`   the caption, as `song.caption` and `song_prompt.txt` (ACE-Step
   1: also tempo and key, where they are tags of their own);
   `song.ext.lyrics.txt`, `song.lyrics.txt`, then `song_lyrics.txt` (ACE-Step 1), `song.lyrics` (SimpleTuner), `.lrc`
   and the subtitles `.srt` and `.vtt`   the lyrics
   `song.caption.2.txt`, `.3.` and on without a gap, or `captions`, a list in the .json: further captions
4. rows of `*.csv`, `*.tsv` and `*.jsonl`, 5. tags inside the audio file (see `tags`), 6. its name.

`song.txt` speaks for every song of that stem in its folder (song.wav and song.mp3), `song.wav.txt` for song.wav alone.
A file whose name is the whole name of one song plus a suffix never speaks for another: `a.caption.txt` beside `a.wav`
and `a.caption.wav` belongs to the latter. Names are compared in Unicode's composed form (macOS decomposes them),
suffixes without regard to case. For encodings see `text`; a sidecar above 1 MiB is reported and not read.

A `.txt` file:
- Fields stand at its top, one `key: value` a line (blank lines between them are passed over; keys in any case, see
  `fields` for their names). A first block of such lines is a header even where some of their words are no fields.
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

A list is a `.csv` or `.tsv` file with one row per song, a File column and any of the fields (BPM, Key, Caption, Genre,
Language, …), separated by comma, semicolon, tab or what Excel's first line `sep=;` says; or a `.jsonl` file with one
object of fields a line, `file_name` among them. It speaks for the songs of its own folder and of the folders below.
File names a song by its path, absolute or relative to the list, or by its bare name; the suffix may be left out, the
row then speaks for every song of that stem. A bare name that stands in several folders is meant for
the list's own folder, else it is ambiguous: reported, and no song gets the row. Lists nearer to a song come first, then
by name; of two rows for one song the first counts. A list above 32 MiB is reported and not read.
"""

import csv
import io
import itertools
import json
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.data.fields import FieldError, field_named, fields_of, joined_key, parse_field
from sidestep.data.text import read_text
from sidestep.words import count

MAX_BYTES = 1 << 20
MOST_CAPTIONS = 20  # of a song
MAX_LIST_BYTES = 32 * MAX_BYTES

_FIELD_LINE = re.compile(r"^\s*([^\W\d][\w \t-]{0,30}?)\s*[:：](?!//)\s*(.*)$")
_WORD_LINE = re.compile(r"^\s*[^\W\d][\w-]{0,30}\s*[:：](?!//)")
_SECTIONS = (
    "intro|verse|chorus|bridge|outro|hook|refrain|interlude|instrumental|inst|solo|drop|breakdown|break|build|prelude"
    "|coda|end|pre|post|rap|spoken|fade"
)
_SECTION_MARK = re.compile(rf"^\s*[\[［](?:(?:{_SECTIONS})(?![^\W\d])|\d{{1,3}}:\d\d)[^\]］\n]*[\]］]", re.IGNORECASE)
_BRACKETED_LINE = re.compile(r"^\s*[\[［][^\]］\n]{1,60}[\]］]\s*$")
_SIDECAR_SUFFIXES = {  # what a file is, the best first
    ".json": "json",
    ".txt": "txt",
    ".caption.txt": "caption",
    "_prompt.txt": "tags",
    ".caption": "caption",
    ".lyrics.txt": "lyrics",
    "_lyrics.txt": "lyrics",
    ".lyrics": "lyrics",
    ".lrc": "lyrics",
    ".srt": "lyrics",
    ".vtt": "lyrics",
}
_SIDECAR_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, sorted(_SIDECAR_SUFFIXES, reverse=True)))})$", re.IGNORECASE)
_LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")
_TAG_FIELDS = {
    "bpm": re.compile(r"\d{2,3}(\.\d+)?\s*bpm", re.IGNORECASE),
    "keyscale": re.compile(r"[A-G][#♯b♭]?\s+(major|minor)", re.IGNORECASE),
}
_TAG = re.compile(r"<(/?)([A-Za-z_]+)>")
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

    def add_all(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Take every value whose key stands for a field; what other programs keep there is passed over."""
        for name, (key, value) in fields_of(pairs).items():
            self.add(name, value, key)


def has_section_mark(text: str) -> bool:
    """Whether the text is set out as lyrics: a section mark such as [Verse 1], or two bracketed lines."""
    bracketed = 0
    for line in text.split("\n"):
        if "[" in line or "［" in line:
            bracketed += bool(_BRACKETED_LINE.match(line))
            if bracketed == 2 or _SECTION_MARK.match(line):
                return True
    return False


def parse_tags(text: str, source: str) -> Known:
    """The caption of ACE-Step 1's `_prompt.txt`, a list of tags; a tag that is a tempo or a key is its field, too."""
    known = Known(source)
    known.add("caption", text)
    for tag in map(str.strip, text.split(",")):
        for name, form in _TAG_FIELDS.items():
            if form.fullmatch(tag):
                known.add(name, tag)
    return known


def parse_txt(text: str, source: str = "text") -> Known:
    """The fields of a `.txt` sidecar, by the rules at the top of this file. Never fails."""
    known = Known(source)
    if text.lstrip().startswith("<") and (tagged := _tagged(text)):
        known.add_all(tagged)
        return known
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    header = list(itertools.takewhile(_FIELD_LINE.match, lines))
    probe = Known("header")
    probe.add_all((match[1], match[2]) for match in map(_FIELD_LINE.match, header) if match)
    header_end = len(header) if probe.values else 0
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
        elif i >= header_end and (
            not fields
            or _SECTION_MARK.match(line)
            or (_BRACKETED_LINE.match(line) and has_section_mark("\n".join(lines[i:])))
        ):
            body = "\n".join(lines[i:])
            break
        elif i < header_end or _WORD_LINE.match(line):
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


def _tagged(text: str) -> list[tuple[str, str]]:
    """(field, text) of <FIELD>text</FIELD>, whatever stands between; one that is not closed goes on to the end."""
    found, opened = [], None
    for tag in _TAG.finditer(text):
        if opened and tag[1] and tag[2] == opened[2]:
            found.append((tag[2], text[opened.end() : tag.start()].strip("\r\n")))
            opened = None
        elif not opened and not tag[1] and field_named(tag[2]):
            opened = tag
    if opened:  # and never closed
        found.append((opened[2], text[opened.end() :].strip("\r\n")))
    return found


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
        if isinstance(prompt := data.get("prompt"), dict):  # beside what `sample` played
            data = {name: value for name, value in data.items() if name != "prompt"} | prompt
        known.add_all(data.items())
        captions = data.get("captions")
        if isinstance(captions, list) and (texts := tuple(t for t in captions if isinstance(t, str) and t.strip())):
            known.values["captions"] = texts
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
        # Of each folder: composed name, its suffixes in small letters → file
        self._files: dict[Path, dict[str, Path]] = defaultdict(dict)
        for folder in self._names:
            for path in _listed(folder):
                if end := _SIDECAR_SUFFIX.search(path.name):
                    if path.suffix.lower() != ".json":
                        self._text_files.append(path)
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
                if kind in ("caption", "tags", "lyrics") and (owner in names or owner in stems):
                    continue
                if path := self._files[song.parent].get(base + suffix):
                    text, problem = read_text(path, MAX_BYTES)
                    known = Known(path.name)
                    if kind == "json" and (text or not problem):
                        known = parse_json(text, path.name)
                    elif kind == "txt":
                        known = parse_txt(text, path.name)
                    elif kind == "tags":
                        known = parse_tags(text, path.name)
                    elif kind != "json":
                        known.add(kind, text)
                    known.problems[:0] = [problem] if problem else []
                    found.append(known)
                    self._read_files.add(path)
        for base in bases:
            names = (f"{base}.caption.{number}.txt" for number in range(2, MOST_CAPTIONS + 1))
            paths = [*itertools.takewhile(bool, (self._files[song.parent].get(name) for name in names))]
            further = Known(f"{base}.caption.N.txt")
            for path in filter(None, paths):
                text, problem = read_text(path, MAX_BYTES)
                further.add("caption", text)
                further.problems += [f"{path.name} {problem}"] if problem else []
                if caption := further.values.pop("caption", ""):
                    further.values["captions"] = (*further.values.get("captions", ()), caption)
                self._read_files.add(path)
            found += [further] if further.values or further.problems else []
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
        below: dict[Path, list[Path]] = {root: []}
        for song in songs:
            for folder in song.parents:
                below.setdefault(folder, []).append(song)
                if folder == root:
                    break
        for folder in sorted(below, key=lambda f: (-len(f.parts), f.as_posix())):
            lists = [path for path in _listed(folder) if path.suffix.lower() in _LIST_SUFFIXES and not path.is_dir()]
            # The songs at and below the folder by absolute and relative path, by that without suffix, by name and stem.
            names: list[dict[str, list[Path]]] = [defaultdict(list) for _ in range(5)]
            for song in below[folder] if lists else []:
                path = song.relative_to(folder)
                spellings = song.absolute().as_posix(), path.as_posix(), path.with_suffix("").as_posix()
                for by_name, spelling in zip(names, (*spellings, path.name, path.stem), strict=True):
                    by_name[composed(spelling)].append(song)
            for path in lists:
                self.problems += ((path, problem) for problem in self._read_list(path, names))

    def of(self, song: Path) -> list[Known]:
        """The rows that speak for `song`, the best first."""
        return self._rows.get(song, [])

    def _read_list(self, path: Path, names: list[dict[str, list[Path]]]) -> Iterator[str]:
        """Take the rows of one list; yields what is wrong with it."""
        text, problem = read_text(path, MAX_LIST_BYTES)
        if problem:
            yield problem
            if not text:
                return
        try:
            rows = list(_rows(path, text))
        except (csv.Error, ValueError, RecursionError) as error:
            yield f"is no list that can be read: {error}"
            return
        seen: set[Path] = set()
        unmatched: list[str] = []
        is_list = False
        for number, row in rows:
            titled = {key.casefold(): key for key in reversed(row)}
            column = next((titled[name] for name in _FILE_COLUMNS if name in titled), None)
            written = str(row.pop(column)).strip() if column is not None else ""
            if not written:
                continue
            is_list = True
            wanted = composed(posixpath.normpath(written.replace("\\", "/")))
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
                known.add_all(row.items())
                self._rows[song].append(known)
            seen.update(songs)
        if not is_list:
            yield "names no song: it has no File column, or nothing in it"
        if unmatched:
            verb = "names" if len(unmatched) == 1 else "name"
            yield f'{count(len(unmatched), "row")} {verb} no song here, such as "{unmatched[0]}"'


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values by title) of each row of a list. Raises csv.Error, and ValueError for what is no JSON object."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield number, row
        return
    first_line, _, rest = text.partition("\n")
    delimiter, first = max(",;\t", key=first_line.count), 2
    if said := re.fullmatch(r"\s*sep=(.)\s*", first_line, re.IGNORECASE):  # Excel's own, not a row
        delimiter, text, first = said[1], rest, 3
    rows = csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=delimiter)
    titles = [title.strip() for title in next(rows, [])]
    for number, row in enumerate(rows, first):
        yield number, dict(zip(titles, row, strict=False))


def composed(name: str) -> str:
    """A file name in Unicode's composed form, so that names written by different systems compare equal."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
