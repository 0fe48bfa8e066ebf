"""Lists of songs in `*.csv`: one row each, with a File column and any of the fields (BPM, Key, Caption, Genre, Language, …).

A list speaks for the songs of its own folder and of the folders below. File names a song by its path relative to the list, or by its bare name; the suffix
may be left out, the row then speaks for every song of that stem. A bare name that stands in several folders is meant for the list's own folder, else it is
ambiguous: reported, and no song gets the row. Lists nearer to a song come first, then by name; of two rows for one song the first counts. Columns may be
separated by comma, semicolon or tab.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sidestep.data.fields import field_named
from sidestep.data.sidecars import MAX_BYTES, Known, composed
from sidestep.data.text import decode_text

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
        file_column = next((i for name in _FILE_COLUMNS for i, cell in enumerate(header) if cell.casefold() == name), None)
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
            self.problems.append((path, f'{len(strangers)} row{"s" if len(strangers) > 1 else ""} name no song here, such as "{strangers[0]}"'))


class _Index:
    """The songs at and below one folder by relative path, by bare name, and both without suffix."""

    def __init__(self, folder: Path, songs: Iterable[Path]):
        self._by: tuple[dict[str, list[Path]], ...] = tuple(defaultdict(list) for _ in range(4))
        for song in songs:
            if folder not in song.parents:
                continue
            path = song.relative_to(folder)
            for table, name in zip(self._by, (path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem), strict=True):
                table[composed(name)].append(song)

    def find(self, written: str) -> tuple[list[Path], bool]:
        """(songs, whether the name stands in several folders)."""
        name = composed(written.replace("\\", "/").removeprefix("./"))
        for table in self._by:
            if songs := table.get(name):
                return ([], True) if len({s.parent for s in songs}) > 1 else (songs, False)
        return [], False
