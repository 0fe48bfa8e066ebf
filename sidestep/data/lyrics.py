"""Lyrics with time marks, as in .lrc files: `[01:23.45] words`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

TIME_MARK = re.compile(r"[\[<](\d{1,3}):([0-5]?\d)(?:[.:](\d{1,3}))?[\]>][ \t]?")
_SEVERAL_MARKS = re.compile(r"^[ \t]*(?:\[\d{1,3}:[0-5]?\d(?:[.:]\d{1,3})?\][ \t]*){2}", re.MULTILINE)
SECTION = re.compile(r"^\s*\[[^\]]*\]\s*$")  # [Verse], [Chorus - whispered]
LAST_LINE_SECONDS = 10.0  # how long the last line is sung at most
HEARD = 0.5  # share of a line's time that must lie in a window for the line to belong to it


@dataclass(frozen=True)
class Line:
    """What is sung from one time mark to the next, in seconds. section: the heading above it, or empty."""

    start: float
    end: float
    text: str
    section: str


def without_time_marks(lyrics: str) -> str:
    """The words alone: marks are for cutting lyrics to a window and never occur in what a user types at inference.

    Where a line has several marks, all lines come in the order they are sung, each as often as it is.
    """
    if not _SEVERAL_MARKS.search(lyrics):
        return TIME_MARK.sub("", lyrics)
    return _under_sections(timed_lines(lyrics))


def has_time_marks(lyrics: str) -> bool:
    """Whether any line begins with a time mark."""
    return any(TIME_MARK.match(line.lstrip()) for line in lyrics.splitlines())


def timed_lines(lyrics: str) -> list[Line]:
    """The lines in the order they are sung: one with several marks as often, one without a mark with the one above."""
    found: list[tuple[float, str, str]] = []
    section, open_lines = "", 0
    for raw in lyrics.splitlines():
        line = raw.strip()
        marks = []
        while (match := TIME_MARK.match(line)) and (line[0] == "[" or not marks):  # <mark> after [mark] times a word
            minutes, seconds, fraction = match.groups()
            marks.append(int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}"))
            line = line[match.end() :].lstrip()
        words = without_time_marks(line).strip()  # marks within a line, one per word
        if SECTION.match(words):
            section, open_lines = words, 0
        elif marks:
            found += [(start, words, section) for start in marks]
            open_lines = len(marks)
        elif words and open_lines:
            found[-open_lines:] = [(start, f"{text}\n{words}", s) for start, text, s in found[-open_lines:]]
    found.sort(key=lambda line: line[0])
    ends = [start for start, _, _ in found[1:]] + [found[-1][0] + LAST_LINE_SECONDS] if found else []
    return [Line(start, end, text, s) for (start, text, s), end in zip(found, ends, strict=True)]


def lyrics_between(lyrics: str, start: float, end: float) -> str:
    """The lyrics of the seconds from `start` to `end`, without marks, under their section headings.

    Empty when nothing is sung there. A line belongs to the window when half of it is heard, or when it fills half of
    the window.
    """
    lines = []
    for line in timed_lines(lyrics):
        heard = min(line.end, end) - max(line.start, start)
        if heard > 0 and heard >= HEARD * min(line.end - line.start, end - start):
            lines.append(line)
    return _under_sections(lines)


def _under_sections(lines: Iterable[Line]) -> str:
    kept: list[str] = []
    section = ""
    for line in lines:
        if line.text:
            kept += [line.section, line.text] if line.section and line.section != section else [line.text]
            section = line.section
    return "\n".join(kept)
