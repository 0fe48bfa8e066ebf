"""Lyrics with time marks, as in .lrc files: `[01:23.45] words`; subtitles (SRT, VTT) are brought into that form."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

_TIME = r"(\d{1,3}):([0-5]?\d)(?:[.:,](\d{1,3}))?"
TIME_MARK = re.compile(rf"[\[<]{_TIME}[\]>][ \t]?")
_HOUR_MARK = re.compile(r"(?<=[\[<])(\d{1,2}):([0-5]\d)(?=:[0-5]\d[.,]\d{1,3}[\]>])")  # [1:02:03.45]
_SEVERAL_MARKS = re.compile(rf"^[ \t]*\[{_TIME}\][ \t]*\[{_TIME}\]", re.MULTILINE)
_HEADER = re.compile(r"^\s*\[(?:ar|ti|al|au|by|re|ve|length|offset|la|lr|tool|id)\s*:[^\]]*\]\s*$", re.IGNORECASE)
_OFFSET = re.compile(r"^\s*\[offset\s*:\s*([+-]?\d{1,7})\s*\]\s*$", re.IGNORECASE)
_CUE_TIME = r"(?:(\d{1,2}):)?(\d{1,2}):(\d\d[.,]\d{1,3})"
_CUE = re.compile(rf"^[ \t]*{_CUE_TIME}[ \t]*-->[ \t]*{_CUE_TIME}(?:[ \t].*)?$")
_CUE_STYLE = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # <i>, <c.red>, <00:01.000>, {\an8}
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


def time_mark(seconds: float) -> str:
    """[01:23.45], not before the start."""
    minutes, hundredths = divmod(max(round(seconds * 100), 0), 6000)
    return f"[{minutes:02}:{hundredths / 100:05.2f}]"


def lrc_of(sung: list[tuple[str, int]]) -> str:
    """LRC of (words, milliseconds), which may be lines, or words and syllables with line breaks among them."""
    lines: list[str] = []
    by_words = any("\n" in words for words, _ in sung)
    before = ""
    for words, milliseconds in sung:
        if lines and by_words and not words.startswith("\n") and not before.endswith("\n"):
            lines[-1] += words.rstrip("\n")
        else:
            lines.append(time_mark(milliseconds / 1000) + words.lstrip().rstrip("\n"))
        before = words
    return "\n".join(lines)


def cleaned(text: str) -> str:
    """Lyrics in their one form: without trailing spaces and the blank lines around them, timed only as LRC is.

    Subtitles get time marks. With time marks, headers such as [ar: artist] go and [offset: ms] is applied (a positive
    one makes lines appear sooner).
    """
    text = _HOUR_MARK.sub(lambda mark: f"{60 * int(mark[1]) + int(mark[2]):02}", text)
    lines = [line.rstrip() for line in text.split("\n")]
    if "-->" in text and any(map(_CUE.match, lines)):
        lines = _subtitles(lines)
    elif "[" in text and has_time_marks(text):
        offset = next((int(match[1]) / 1000 for match in map(_OFFSET.match, lines) if match), 0.0)
        lines = [line for line in lines if not _HEADER.match(line)]
        if offset:
            lines = [
                TIME_MARK.sub(lambda mark: re.sub(_TIME, time_mark(_seconds(mark) - offset)[1:-1], mark[0]), line)
                for line in lines
            ]
    return "\n".join(lines).strip("\n")


def _seconds(mark: re.Match[str]) -> float:
    minutes, seconds, fraction = mark.groups()
    return int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}")


def _subtitles(lines: list[str]) -> list[str]:
    """The cues of an SRT or VTT file as lines of LRC; a pause between two becomes a mark without words."""
    found: list[str] = []
    sung_until, is_cue, mark = 0.0, False, ""
    for line in lines:
        if match := _CUE.match(line):
            start, end = (
                int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
                for hours, minutes, seconds in (match.groups()[:3], match.groups()[3:])
            )
            if found and start > sung_until:
                found.append(time_mark(sung_until))
            sung_until, is_cue, mark = end, True, time_mark(start)
        elif not line.strip():
            is_cue = False
        elif is_cue and (words := html.unescape(_CUE_STYLE.sub("", line)).strip(" \t♪♫")):
            is_section = bool(SECTION.match(words))
            found.append(words if is_section else mark + words)
            mark = mark if is_section else ""  # further lines of a cue belong to the first
    return found


def without_time_marks(lyrics: str) -> str:
    """The words alone: marks are for cutting lyrics to a window and never occur in what a user types at inference.

    Where a line has several marks, all lines come in the order they are sung, each as often as it is.
    """
    if not _SEVERAL_MARKS.search(lyrics):
        return TIME_MARK.sub(_space_of, lyrics)
    return _under_sections(timed_lines(lyrics))


def _space_of(mark: re.Match[str]) -> str:
    """The space behind a mark where it is the only one between two words, as in `soft<00:01.50> rain`."""
    before = mark.string[mark.start() - 1 : mark.start()]
    return mark[0][-1] if mark[0][-1] in " \t" and before.strip(" \t\n]>") else ""


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
            marks.append(_seconds(match))
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
