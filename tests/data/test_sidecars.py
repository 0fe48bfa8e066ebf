"""The text beside a song: what becomes which field, and which song it speaks for."""

import json
import os
import socket
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.data.fields import parse_field
from sidestep.data.sidecars import Sidecars, has_section_mark, parse_json, parse_txt
from sidestep.data.text import decode_text

EVERYTHING = """Caption: a dreamy song: slow
Genre: pop
BPM: 92
Key: F#m
Time Signature: 3/4
Lang: English
Trigger: zzx
is_instrumental: no
repeat: 2
prompt_override: genre
duration: 3:25
Lyrics:
[Verse]
key: of my heart
bpm: 300
"""

TXT = [
    ("only bpm, no caption (field note 31)", "bpm: 120", {"bpm": 120}),
    ("free text is the caption", "A dreamy song\nwith bells", {"caption": "A dreamy song with bells"}),
    ("free text under a section mark is lyrics", "[Verse 1]\nHello: you", {"lyrics": "[Verse 1]\nHello: you"}),
    ("lyrics before the first mark belong to them", "Oh\n[Chorus]\nOh", {"lyrics": "Oh\n[Chorus]\nOh"}),
    ("marks in any language", "[サビ]\nら\n[Aメロ]\nり", {"lyrics": "[サビ]\nら\n[Aメロ]\nり"}),
    ("one bracketed line is no proof of lyrics", "[chiptune, fast]", {"caption": "[chiptune, fast]"}),
    ("a colon below free text starts no field", "A song\nbpm: 120", {"caption": "A song bpm: 120"}),
    (
        "a caption over several lines",
        "caption: a song\n  with bells\nbpm: 90",
        {"caption": "a song with bells", "bpm": 90},
    ),
    ("free text below fields is the caption", "bpm: 90\n\nA song", {"bpm": 90, "caption": "A song"}),
    (
        "lyrics below fields need no key, but a mark",
        "bpm: 90\n[Intro]\nkey: Am",
        {"bpm": 90, "lyrics": "[Intro]\nkey: Am"},
    ),
    ("a mark ends the caption", "caption: x\n[Verse]\nkey: Am", {"caption": "x", "lyrics": "[Verse]\nkey: Am"}),
    ("lyrics on the line of their key", "lyrics: la la\nbpm: 90", {"lyrics": "la la\nbpm: 90"}),
    ("an unknown word is left out", "bpm: 90\nmood: happy\nkey: Am", {"bpm": 90, "keyscale": "A minor"}),
    ("what cannot be understood is left out", "bpm: fast\nkey: Am", {"keyscale": "A minor"}),
    ("the first of two counts", "bpm: 90\nbpm: 100", {"bpm": 90}),
    ("an empty one does not", "bpm:\nbpm: 100", {"bpm": 100}),
    ("old Mac line ends", "bpm: 90\rkey: Am", {"bpm": 90, "keyscale": "A minor"}),
    ("a colon of an East Asian keyboard", "BPM：90", {"bpm": 90}),
    (
        "text that would be lost is not guessed at",
        "caption: x\nbpm: 90\n\nI walk the line",
        {"caption": "x", "bpm": 90},
    ),
    ("a paragraph below the caption is not guessed at", "caption: x\n\nkey to my heart", {"caption": "x"}),
    ("an address is text", "caption: see\nhttp://example.com", {"caption": "see http://example.com"}),
    (
        "time marks are lyrics",
        "[00:01.50] key: of my heart\n[00:03] la",
        {"lyrics": "[00:01.50] key: of my heart\n[00:03] la"},
    ),
    ("nothing", " \n\n", {}),
]


@pytest.mark.parametrize(("text", "values"), [case[1:] for case in TXT], ids=[case[0] for case in TXT])
def test_a_text_file_becomes_fields(text, values):
    assert parse_txt(text).values == values


def test_every_field_can_be_written_and_lyrics_come_last():
    assert parse_txt(EVERYTHING).values == {
        "caption": "a dreamy song: slow",
        "genre": "pop",
        "bpm": 92,
        "keyscale": "F# minor",
        "timesignature": "3",
        "language": "en",
        "custom_tag": "zzx",
        "is_instrumental": False,
        "repeat": 2,
        "prompt_override": "genre",
        "duration": 205.0,
        "lyrics": "[Verse]\nkey: of my heart\nbpm: 300",
    }
    assert parse_txt(EVERYTHING).problems == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bpm: fast", "line 1, bpm"),
        ("bpm: 90\nmood: happy", '"mood: happy" begins with no known field'),
        ("bpm: 90\nbpm: 100", "twice"),
        ("caption: x\nbpm: 90\n\nI walk", '"I walk" is neither a field nor lyrics'),
        ("A song\nbpm: 120", '"bpm:" below free text was taken as text'),
    ],
)
def test_what_is_left_out_is_told(text, told):
    (problem,) = parse_txt(text).problems
    assert told in problem


@pytest.mark.parametrize(
    ("text", "values", "told"),
    [
        (
            '{"Caption": "x", "tempo": "90", "key": "Am", "mood": 3}',
            {"caption": "x", "bpm": 90, "keyscale": "A minor"},
            None,
        ),
        ('{"lyrics": ["a", "b"], "genre": ["pop", "rock"]}', {"lyrics": "a\nb", "genre": "pop, rock"}, None),
        (  # what `sample` wrote beside its music
            '{"audio": "a.flac", "prompt": {"caption": "x", "bpm": 90, "seed": 3}, "strength": 1.0, "sampling": {}}',
            {"caption": "x", "bpm": 90},
            None,
        ),
        ('{"prompt": "x"}', {"caption": "x"}, None),
        ("[1]", {}, "no JSON object"),
        ('{"bpm": 90', {}, "no JSON"),
        ("[" * 100_000, {}, "no JSON"),
        ('{"bpm": ' + "9" * 5000 + "}", {}, "no JSON"),
        ('{"bpm": NaN}', {}, "no tempo"),
        ('{"bpm": 1e999, "repeat": 1e23}', {}, "no tempo"),
        (r'{"caption": "a \ud800 b", "genre": "pop \ud83c\udfb5"}', {"genre": "pop 🎵"}, "half of a character"),
        ('{"metadata": {}, "samples": []}', {}, None),
    ],
)
def test_a_json_sidecar_gives_its_fields_or_says_why_not(text, values, told):
    known = parse_json(text)
    assert known.values == values
    assert told is None or told in known.problems[0]


@settings(deadline=None, max_examples=300)
@given(
    st.binary()
    | st.text().map(lambda t: t.encode("utf-8", "surrogatepass"))
    | st.text().map(lambda t: t.encode("utf-16", "surrogatepass"))
)
def test_no_bytes_at_all_crash_the_reader(data):
    text, _ = decode_text(data)
    parse_txt(text)
    parse_json(text)


line = st.sampled_from(
    ["bpm: 90", "Key: Am", "caption: c", "lyrics: l", "[Verse]", "", "mood: x", "genre: g"]
) | st.text(max_size=30)
any_text = st.lists(line, max_size=12).map("\n".join)


@settings(deadline=None, max_examples=300)
@given(any_text)
def test_no_lyrics_ever_become_a_field(lyrics):
    expected = {} if parse_field("lyrics", lyrics) is None else {"lyrics": parse_field("lyrics", lyrics)}
    header = {"caption": "c", "bpm": 100}
    assert parse_txt(f"caption: c\nbpm: 100\nlyrics:\n{lyrics}").values == header | expected
    marked = parse_field("lyrics", f"[Verse]\n{lyrics}")
    assert parse_txt(f"caption: c\nbpm: 100\n[Verse]\n{lyrics}").values == header | {"lyrics": marked}
    assert parse_txt(f"[Verse]\n{lyrics}").values == {"lyrics": marked}


@settings(deadline=None, max_examples=300)
@given(any_text)
def test_a_file_that_does_not_begin_with_a_field_has_none(text):
    assert set(parse_txt(f"My song\n{text}").values) <= {"caption", "lyrics"}
    assert len(parse_txt(f"My song\n{text}").values) == 1


@settings(deadline=None)
@given(any_text)
def test_every_value_of_any_file_is_in_its_one_form(text):
    for name, value in parse_txt(text).values.items():
        assert parse_field(name, value) == value


ENCODINGS = [
    ("utf-8", None),
    ("utf-8-sig", None),
    ("utf-16", None),
    ("utf-16-le", None),
    ("utf-16-be", None),
    ("utf-32", None),
    ("latin-1", "Latin-1"),
    ("cp1252", "Latin-1"),
]


@pytest.mark.parametrize(("encoding", "told"), ENCODINGS)
def test_editors_of_every_kind_are_read(encoding, told):
    text = "caption: Ça va, señor\nlyrics: äöü\n"
    decoded, problem = decode_text(text.encode(encoding))
    assert decoded == text
    assert (told in problem) if told else problem is None


def test_japanese_lyrics_survive_every_unicode_encoding():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode_text("[Verse]\n沈むように".encode(encoding)) == ("[Verse]\n沈むように", None)


def sources(song):
    return [
        (known.source, known.values)
        for known in Sidecars(sorted(p for p in song.parent.iterdir() if p.suffix in (".wav", ".mp3"))).of(song)
    ]


def put(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def test_sidecars_come_in_order_of_preference(tmp_path):
    texts = {
        "song.lyrics.txt": "la",
        "song.caption.txt": "c3",
        "song.txt": "caption: c2",
        "song.wav.txt": "caption: c1",
        "song.json": "{}",
        "song.wav.json": "{}",
    }
    put(tmp_path, **texts, **{"song.wav": ""})
    assert [name for name, _ in sources(tmp_path / "song.wav")] == [
        "song.wav.json",
        "song.json",
        "song.wav.txt",
        "song.txt",
        "song.caption.txt",
        "song.lyrics.txt",
    ]


def test_lyrics_alone_and_caption_alone_are_valid(tmp_path):
    put(tmp_path, **{"a.wav": "", "a.lyrics.txt": "bpm: 90\nla", "b.wav": "", "b.caption.txt": "bpm: 90"})
    assert sources(tmp_path / "a.wav") == [("a.lyrics.txt", {"lyrics": "bpm: 90\nla"})]
    assert sources(tmp_path / "b.wav") == [("b.caption.txt", {"caption": "bpm: 90"})]


def test_a_stem_speaks_for_all_of_its_songs_and_a_whole_name_for_one(tmp_path):
    put(tmp_path, **{"song.wav": "", "song.mp3": "", "song.txt": "bpm: 90", "song.wav.txt": "bpm: 100"})
    assert sources(tmp_path / "song.wav") == [("song.wav.txt", {"bpm": 100}), ("song.txt", {"bpm": 90})]
    assert sources(tmp_path / "song.mp3") == [("song.txt", {"bpm": 90})]


def test_a_file_named_after_one_song_never_speaks_for_another(tmp_path):
    put(
        tmp_path,
        **{
            "a.wav": "",
            "a.caption.wav": "",
            "a.caption.txt": "bpm: 90",
            "b.wav": "",
            "b.wav.mp3": "",
            "b.wav.txt": "bpm: 100",
        },
    )
    assert sources(tmp_path / "a.wav") == []
    assert sources(tmp_path / "a.caption.wav") == [("a.caption.txt", {"bpm": 90})]
    assert sources(tmp_path / "b.wav") == [("b.wav.txt", {"bpm": 100})]
    assert sources(tmp_path / "b.wav.mp3") == []


def test_names_match_across_systems(tmp_path):
    put(tmp_path, **{unicodedata.normalize("NFD", "é.wav"): "", unicodedata.normalize("NFC", "é.TXT"): "bpm: 90"})
    assert sources(tmp_path / unicodedata.normalize("NFD", "é.wav"))[0][1] == {"bpm": 90}


def test_what_cannot_be_read_is_told_and_the_rest_counts(tmp_path):
    put(tmp_path, **{"a.wav": "", "a.json": "{", "a.lyrics.txt": "la"})
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.caption.txt").write_bytes(b"x" * 2_000_000)
    found = Sidecars([tmp_path / "a.wav"]).of(tmp_path / "a.wav")
    assert [bool(known.problems) for known in found] == [True, True, True, False]
    assert "1 MiB" in found[2].problems[0]
    assert found[3].values == {"lyrics": "la"}


@pytest.mark.slow
def test_ten_thousand_sidecars_take_ten_times_as_long_as_a_thousand(tmp_path):
    songs = []
    for i in range(10_000):
        (tmp_path / f"song {i}.{'json' if i % 5 == 0 else 'txt'}").write_text(
            json.dumps({"caption": "x", "bpm": 90, "key": "Am"}) if i % 5 == 0 else EVERYTHING + "la la la: la\n" * 40,
            encoding="utf-8",
        )
        songs.append(tmp_path / f"song {i}.wav")

    def read(some: list[Path]) -> tuple[float, list[dict]]:
        started = time.process_time()
        sidecars = Sidecars(some)
        found = [sidecars.of(song)[0].values for song in some]
        return time.process_time() - started, found

    few = min(read(songs[:1000])[0] for _ in range(3))
    took, found = read(songs)
    assert took < 25 * few  # 10 where the time grows with the songs, 100 where with their square
    assert len(found) == 10_000
    assert all("bpm" in values for values in found)


def test_section_marks_are_told_from_other_brackets():
    assert all(has_section_mark(t) for t in ("[Verse]", "[verse 2: softly] la", " [Pre-Chorus]", "[Outro]", "[a]\n[b]"))
    assert not any(has_section_mark(t) for t in ("verse", "[introspective]", "(Verse)", "a [Verse] b", ""))


@pytest.mark.parametrize(
    ("text", "bpm", "key"),
    [
        ("melodic techno, A minor, 124 BPM, male vocal", 124, "A minor"),
        ("techno,f# Major,90bpm", 90, "F# major"),
        ("slow, about 90 BPM, in A minor, C, 124", None, None),
    ],
)
def test_tempo_and_key_among_the_tags_of_a_prompt_are_fields_too(tmp_path, text, bpm, key):
    put(tmp_path, **{"x.wav": "", "x_prompt.txt": text})
    [found] = Sidecars([tmp_path / "x.wav"]).of(tmp_path / "x.wav")
    assert found.problems == []
    assert found.values["caption"] == text
    assert (found.values.get("bpm"), found.values.get("keyscale")) == (bpm, key)


@pytest.mark.parametrize(
    ("files", "values"),
    [
        ({"x_prompt.txt": "techno, 124 BPM", "x_lyrics.txt": "[Verse]\nla"}, ("techno, 124 BPM", "[Verse]\nla")),
        ({"x.wav_prompt.txt": "techno", "x_LYRICS.TXT": "bpm: 90"}, ("techno", "bpm: 90")),
        ({"x_prompt.txt": "bpm: 90", "x.lyrics.txt": "la", "x_lyrics.txt": "lo"}, ("bpm: 90", "la")),
        ({"x.txt": "dark synthwave", "x.lyrics": "[Verse]\nla"}, ("dark synthwave", "[Verse]\nla")),
        ({"x.txt": "synthwave", "x.lyrics": "[00:01.00]la"}, ("synthwave", "[00:01.00]la")),
        ({"x.caption": "synthwave", "x.Lyrics": "caption: la"}, ("synthwave", "caption: la")),
        ({"x.caption": "techno", "x.SRT": "1\n00:00:01,000 --> 00:00:02,000\nla"}, ("techno", "[00:01.00]la")),
        ({"x.caption": "techno", "x.vtt": "WEBVTT\n\n00:01.000 --> 00:02.000\nla"}, ("techno", "[00:01.00]la")),
        ({"x.txt": "<CAPTION>\nballad\n</CAPTION>\n<LYRICS>\n[Verse]\nla\n</LYRICS>\n"}, ("ballad", "[Verse]\nla")),
        ({"x.wav.txt": "<lyrics>la</lyrics><caption>a ballad</caption>"}, ("a ballad", "la")),
    ],
)
def test_captions_of_other_programs_arrive_in_their_fields(tmp_path, files, values):
    put(tmp_path, **files, **{"x.wav": "", "readme.txt": "words"})
    sidecars = Sidecars([tmp_path / "x.wav"])
    known = {}
    for source in sidecars.of(tmp_path / "x.wav"):
        assert source.problems == []
        known = source.values | known
    assert (known["caption"], known["lyrics"]) == values
    assert sidecars.unread() == [tmp_path / "readme.txt"]


def test_a_file_of_tags_gives_numbers_too():
    assert parse_txt("<BPM>72</BPM>\n<KEYSCALE>Dm</KEYSCALE>").values == {"bpm": 72, "keyscale": "D minor"}


def test_a_tag_that_is_not_closed_is_no_text_of_the_prompt():
    assert parse_txt("<BPM>72</BPM>\n<CAPTION>\nsad <3 ballad\n").values == {"bpm": 72, "caption": "sad <3 ballad"}
    assert parse_txt("<b>bold</b> words").values == {"caption": "<b>bold</b> words"}


@pytest.mark.parametrize(
    "text",
    [
        *("key: A\nscale: minor", "Scale: minor\nKey: A", "key: Am\nscale: minor", "scale: minor\nkey: Am"),
        *('{"key": "A", "scale": "minor"}', '{"scale": "minor", "key": "A minor"}'),
    ],
)
def test_note_and_mode_in_two_fields_are_one_key(text):
    known = parse_json(text) if text.startswith("{") else parse_txt(text)
    assert (known.values, known.problems) == ({"keyscale": "A minor"}, [])


def test_a_header_may_begin_with_words_that_are_no_field():
    known = parse_txt("Title: Home\nBPM: 120\nStyle: dream pop\n\n[Verse]\nKey: of my heart")
    assert known.values == {"bpm": 120, "caption": "dream pop", "lyrics": "[Verse]\nKey: of my heart"}
    assert ["Title" in problem for problem in known.problems] == [True]
    known = parse_txt("BPM: 120\nVocal Style: breathy\nKey: Am\n[Verse]\nla")
    assert known.values == {"bpm": 120, "keyscale": "A minor", "lyrics": "[Verse]\nla"}
    assert parse_txt("You: and me\nTempo: of the night").values == {"caption": "You: and me Tempo: of the night"}


def test_a_second_name_of_a_field_counts_where_the_first_says_nothing():
    assert parse_json('{"prompt": "N/A", "description": "soft", "caption": ""}').values == {"caption": "soft"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.caption.txt", "a.lrc", "a.srt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_regular_file_is_told_and_never_opened(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "device":
        Path(name).symlink_to("/dev/zero")
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
    (known,) = Sidecars([tmp_path / "a.wav"]).of(tmp_path / "a.wav")
    assert (known.values, known.problems) == ({}, ["is a pipe or a device, not a file, and was not read"])


def test_tags_that_never_close_take_no_time():
    started = time.process_time()
    parse_txt("<a>" * 300_000)
    parse_txt("<caption>" * 100_000)
    assert time.process_time() - started < 5
