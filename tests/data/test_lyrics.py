"""Lyrics with time marks follow the window."""

import pytest

from sidestep.data.fields import parse_field
from sidestep.data.lyrics import has_time_marks, lyrics_between, timed_lines, without_time_marks

SONG = """[Verse 1]
[00:10.00] soft rain
[00:14.50] on the window
and on the roof
[Chorus]
[00:20.00] stay
[00:24.00] a little longer"""


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 60, "[Verse 1]\nsoft rain\non the window\nand on the roof\n[Chorus]\nstay\na little longer"),
        (0, 9, ""),  # nothing is sung yet
        (8, 15, "[Verse 1]\nsoft rain"),
        (12, 21, "[Verse 1]\nsoft rain\non the window\nand on the roof"),  # more than half of the first line is heard
        (13, 21, "[Verse 1]\non the window\nand on the roof"),
        (22, 30, "[Chorus]\nstay\na little longer"),
        (20.5, 21.5, "[Chorus]\nstay"),  # a window within one line
        (40, 50, ""),  # long after the last line
    ],
)
def test_a_window_has_the_lines_that_are_heard_in_it(start, end, expected):
    assert lyrics_between(SONG, start, end) == expected


@pytest.mark.parametrize(
    ("lyrics", "expected"),
    [
        ("[00:01.00][00:09.00] twice", [(1.0, "twice"), (9.0, "twice")]),
        ("[1:02] a\n[1:03:50] b", [(62.0, "a"), (63.5, "b")]),
        ("[00:01.00] <00:01.00> word <00:01.50> by <00:02.00> word", [(1.0, "word by word")]),
        ("[00:05.00] late\n[00:02.00] early", [(2.0, "early"), (5.0, "late")]),
        ("no marks\nat all", []),
    ],
)
def test_lines_are_read_as_lrc_files_write_them(lyrics, expected):
    assert [(line.start, line.text) for line in timed_lines(lyrics)] == expected


def test_only_marks_at_the_beginning_of_a_line_time_it():
    assert has_time_marks(SONG)
    assert not has_time_marks("[Verse]\nmeet me at 10:30\n[Chorus]")
    assert without_time_marks("[00:10.00] soft rain") == "soft rain"


def test_a_line_with_several_marks_stands_in_the_whole_as_often_as_it_is_sung():
    lyrics = "[Verse]\n[00:05.00]First\n[Chorus]\n[00:20.00][00:45.00]Again\n[Verse]\n[00:30.00]Second\n[00:30.00]echo"
    expected = "[Verse]\nFirst\n[Chorus]\nAgain\n[Verse]\nSecond\necho\n[Chorus]\nAgain"
    assert without_time_marks(lyrics) == expected


@pytest.mark.parametrize(
    ("lyrics", "expected"),
    [
        ("[00:01][00:03][00:05]La\n[00:02]one\n[00:04]two", "La\none\nLa\ntwo\nLa"),
        ("[00:20.00] [00:05.00] Late and early\n[00:10.00]between", "Late and early\nbetween\nLate and early"),
        ("[00:01.00][00:09.00]Again\nand again\n[00:05.00]once", "Again\nand again\nonce\nAgain\nand again"),
        ("[00:01.00][00:09.00]<00:01.00>A<00:01.50> line\n[00:05.00]once", "A line\nonce\nA line"),
    ],
    ids=["three marks", "spaces, not in order", "a line without a mark", "marks of words"],
)
def test_repeated_lines_stand_in_the_whole_in_the_order_they_are_sung(lyrics, expected):
    assert without_time_marks(lyrics) == expected


@pytest.mark.parametrize(
    "line",
    [
        "[00:01.00]soft<00:01.50> rain<00:02.00> falls",
        "[00:01.00]<00:01.00>soft <00:01.50>rain <00:02.00>falls",
        "[00:01.00] <00:01.00> soft <00:01.50> rain <00:02.00> falls",
        "<00:01.00> soft<00:01.50> rain<00:02.00> <00:02.20>fal<00:02.40>ls",
    ],
)
def test_words_with_marks_stay_apart_and_syllables_together(line):
    assert without_time_marks(line) == "soft rain falls"
    assert lyrics_between(line, 0, 10) == "soft rain falls"


@pytest.mark.parametrize(("offset", "sung"), [("-10000", "One"), ("0", "Two"), ("10000", "Three")])
def test_windows_follow_an_offset(offset, sung):
    lyrics = parse_field("lyrics", f"[offset:{offset}]\n[00:05]One\n[00:15]Two\n[00:25]Three\n[00:35]Four")
    assert lyrics_between(lyrics, 15, 25) == sung


def test_marks_with_hours_are_those_of_their_minutes():
    lyrics = "[00:59:59.50]One\n[1:00:05.00]<1:00:05.00>Two\n[01:03:50]minutes, seconds, hundredths"
    expected = "[59:59.50]One\n[60:05.00]<60:05.00>Two\n[01:03:50]minutes, seconds, hundredths"
    assert parse_field("lyrics", lyrics) == expected
    assert [line.start for line in timed_lines(expected)] == [63.5, 3599.5, 3605.0]


@pytest.mark.parametrize(
    ("offset", "moved"),
    [
        ("-10000", "[00:15.00]One\n[01:05.00]Two"),
        ("+2500", "[00:02.50]One\n[00:52.50]Two"),
        ("9000", "[00:00.00]One\n[00:46.00]Two"),
    ],
)
def test_an_offset_moves_the_marks(offset, moved):
    assert parse_field("lyrics", f"[offset: {offset}]\n[00:05.00]One\n[00:55.00]Two") == moved


SRT = """1
00:00:05,000 --> 00:00:08,500
<i>One</i> &amp; only
with an echo

2
01:00:10,250 --> 01:00:12,000
♪ Two ♪
"""
VTT = """WEBVTT - a song

NOTE
not sung

STYLE
::cue { color: red }

verse
00:05.000 --> 00:08.500 align:start position:10%
[Verse]
<v Singer>One

00:08.500 --> 00:10.000
Two
"""


@pytest.mark.parametrize(
    ("text", "lyrics", "words"),
    [
        (
            SRT,
            "[00:05.00]One & only\nwith an echo\n[00:08.50]\n[60:10.25]Two",
            "One & only\nwith an echo\n\nTwo",
        ),
        (SRT.replace("\n", "\r\n"), "[00:05.00]One & only\nwith an echo\n[00:08.50]\n[60:10.25]Two", None),
        (VTT, "[Verse]\n[00:05.00]One\n[00:08.50]Two", "[Verse]\nOne\nTwo"),
        ("we go --> there\n1 --> 2", "we go --> there\n1 --> 2", None),
    ],
    ids=["SRT", "SRT of Windows", "VTT", "an arrow in lyrics"],
)
def test_subtitles_become_timed_lyrics(text, lyrics, words):
    assert parse_field("lyrics", text) == lyrics
    assert parse_field("lyrics", lyrics) == lyrics
    assert words is None or without_time_marks(lyrics) == words


def test_the_pause_after_a_subtitle_is_not_sung_through():
    lyrics = parse_field("lyrics", SRT)
    assert lyrics_between(lyrics, 4, 9) == "One & only\nwith an echo"
    assert lyrics_between(lyrics, 20, 60) == ""


def test_an_offset_moves_the_marks_of_words_too():
    assert parse_field("lyrics", "[offset:500]\n[00:05.00] <00:05.00> a <00:06.50> b") == (
        "[00:04.50] <00:04.50> a <00:06.00> b"
    )
