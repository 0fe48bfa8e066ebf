"""Lists of songs in CSV files, and what audio files say of themselves."""

import json
import os
import tracemalloc
import zlib

import mutagen
import mutagen.id3
import pytest
from mutagen.mp4 import MP4FreeForm

from sidestep.data.sidecars import Tables
from sidestep.data.tags import read_tags
from tests.song_library import tone, write_ffmpeg, write_sndfile


def tables(root, songs, **lists):
    for name, text in lists.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return Tables(root, [root / song for song in songs])


def values(found, song):
    return [known.values for known in found.of(song)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_list_speaks_for_its_songs(tmp_path, separator):
    text = 'File,Title,BPM,Key,Caption\na.wav,A,120,Am,"soft, slow"\nb,B,90.4,8B,\n'.replace(",", separator).replace(
        f"soft{separator}", "soft,"
    )
    found = tables(tmp_path, ["a.wav", "b.wav", "b.mp3", "c.wav"], **{"key_bpm.csv": text})
    assert values(found, tmp_path / "a.wav") == [{"bpm": 120, "keyscale": "A minor", "caption": "soft, slow"}]
    assert (
        values(found, tmp_path / "b.wav") == values(found, tmp_path / "b.mp3") == [{"bpm": 90, "keyscale": "C major"}]
    )
    assert values(found, tmp_path / "c.wav") == []
    assert found.problems == []


def test_paths_in_a_list_are_relative_to_it_and_a_bare_name_is_never_guessed(tmp_path):
    songs = ["one/song.wav", "two/song.wav", "two/other.wav", "three/x.wav", "x.wav"]
    text = "File,BPM\none\\song.wav,100\nsong.wav,110\nother.wav,120\nx.wav,130\ntwo/x.wav,140\n"
    found = tables(tmp_path, songs, **{"list.csv": text})
    assert {song: values(found, tmp_path / song) for song in songs} == {
        "one/song.wav": [{"bpm": 100}],
        "two/song.wav": [],
        "two/other.wav": [{"bpm": 120}],
        "three/x.wav": [],
        "x.wav": [{"bpm": 130}],
    }
    told = [problem for _, problem in found.problems]
    assert any('"song.wav" stands in several folders' in p for p in told)
    assert any('"two/x.wav"' in p for p in told)


def test_a_nearer_list_comes_first_and_the_first_of_two_rows_counts(tmp_path):
    found = tables(
        tmp_path,
        ["x/a.wav"],
        **{"far.csv": "File,BPM\nx/a.wav,100\n", "x/near.csv": "File,BPM\na.wav,110\na.wav,120\n"},
    )
    assert values(found, tmp_path / "x/a.wav") == [{"bpm": 110}, {"bpm": 100}]
    assert [p for _, p in found.problems] == ['row 3: "a.wav" has a row already; the first counts']


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"Title,BPM\na,100\n", "no File column"),
        (b"", "no File column"),
        ("File,Caption\na.wav,é\n".encode("latin-1"), "Latin-1"),
        (b"File,BPM\n" + b'"' + b"x" * 200_000 + b'",1\n', "no list that can be read"),
        (b"File\0,BPM\na.wav,fast\n", None),
    ],
)
def test_a_list_that_is_none_is_told(tmp_path, data, told):
    found = tables(tmp_path, ["a.wav"], **{"l.csv": data})
    assert (told in found.problems[0][1]) if told else values(found, tmp_path / "a.wav") == [{}]


def id3(tags):
    for frame in (
        mutagen.id3.TIT2(3, "Night"),
        mutagen.id3.TPE1(3, "Me"),
        mutagen.id3.TCON(3, "(17)"),
        mutagen.id3.TBPM(3, "128"),
        mutagen.id3.TKEY(3, "Am"),
        mutagen.id3.TLAN(3, "eng"),
        mutagen.id3.USLT(3, "eng", "", "[Verse]\nla"),
    ):
        tags.add(frame)


def vorbis(tags):
    for key, value in {
        "TITLE": "Night",
        "Artist": "Me",
        "genre": "Rock",
        "TEMPO": "128",
        "initialkey": "8A",
        "LANGUAGE": "English",
        "lyrics": "[Verse]\nla",
    }.items():
        tags[key] = value


def mp4(tags):
    tags["©nam"], tags["©ART"], tags["©gen"], tags["tmpo"], tags["©lyr"] = (
        ["Night"],
        ["Me"],
        ["Rock"],
        [128],
        ["[Verse]\nla"],
    )
    tags["----:com.apple.iTunes:initialkey"] = [MP4FreeForm(b"Am")]


def asf(tags):
    tags["Title"], tags["Author"], tags["WM/Genre"], tags["WM/BeatsPerMinute"], tags["WM/InitialKey"] = (
        "Night",
        "Me",
        "Rock",
        "128",
        "Am",
    )
    tags["WM/Lyrics"], tags["WM/Language"] = "[Verse]\nla", "eng"


@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("a.mp3", id3),
        ("a.wav", id3),
        ("a.aiff", id3),
        ("a.flac", vorbis),
        ("a.ogg", vorbis),
        ("a.opus", vorbis),
        ("a.m4a", mp4),
        ("a.wma", asf),
    ],
)
def test_tags_of_every_kind_are_read(tmp_path, name, put):
    path = tmp_path / name
    if name == "a.m4a":
        write_ffmpeg(path, tone(), 48_000, "aac", "ipod")
    elif name == "a.wma":
        write_ffmpeg(path, tone(), 48_000, "wmav2", "asf")
    else:
        write_sndfile(
            path,
            tone(),
            48_000,
            **({"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {"format": name[2:].upper()}),
        )
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    put(file.tags)
    file.save()
    tags = read_tags(path)
    expected = {"genre": "Rock", "bpm": 128, "keyscale": "A minor", "language": "en", "lyrics": "[Verse]\nla"}
    if name == "a.m4a":
        del expected["language"]
    assert (tags.values, tags.title, tags.artist, tags.problems) == (expected, "Night", "Me", [])


def test_damaged_or_missing_tags_are_no_failure(tmp_path):
    (tmp_path / "a.mp3").write_bytes(b"ID3\x04\x00\x00\x00\x00\x7f\x7f" + b"\xff" * 100)
    (tmp_path / "b.wav").write_bytes(b"words")
    write_sndfile(tmp_path / "c.wav", tone(), 48_000)
    for name in ("a.mp3", "b.wav", "c.wav", "gone.wav"):
        assert read_tags(tmp_path / name).values == {}


def test_every_cut_of_a_tagged_file_is_survived(tmp_path):
    write_sndfile(tmp_path / "a.flac", tone(seconds=0.01), 48_000, format="FLAC")
    file = mutagen.File(tmp_path / "a.flac")
    vorbis(file)
    file.save()
    data = (tmp_path / "a.flac").read_bytes()
    for cut in range(0, 600, 7):
        (tmp_path / "b.flac").write_bytes(data[:cut])
        read_tags(tmp_path / "b.flac")


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\nFile;Caption;BPM\r\none.wav;warm, soft;124,5\r\n",
        'SEP=,\nFile,BPM,Caption\none.wav,124.5,"warm, soft"\n',
        "sep=\t\r\nFile\tCaption\tBPM\r\none.wav\twarm, soft\t124,5\r\n",
        " sep=| \nBPM|File|Caption\n124,5|one|warm, soft\n",
    ],
)
def test_the_first_line_of_excel_names_the_separator(tmp_path, text):
    found = tables(tmp_path, ["one.wav"], **{"l.csv": text.encode("utf-8-sig")})
    assert values(found, tmp_path / "one.wav") == [{"caption": "warm, soft", "bpm": 125}]
    assert found.problems == []


def test_an_audiofolder_names_its_files(tmp_path):
    found = tables(tmp_path, ["one.wav"], **{"metadata.csv": "file_name,caption\n./one.wav,warm\n"})
    assert values(found, tmp_path / "one.wav") == [{"caption": "warm"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "one.wav", "caption": "warm", "key": "A", "scale": "minor"}\n\n'),
        ("metadata.csv", "file_name,caption,key,scale\n./x/../one.wav,warm,A,minor\n"),
        ("metadata.tsv", "caption\tscale\tFile\tkey\nwarm\tminor\tone\tA\n"),
        ("metadata.csv", "{folder}/one.wav"),
        ("metadata.jsonl", "{folder}/one.wav"),
    ],
)
def test_lists_of_every_kind_name_songs_by_any_path(tmp_path, name, text):
    if "{folder}" in text:
        path = text.format(folder=tmp_path)
        row = {"file_name": path, "caption": "warm", "scale": "minor", "key": "A"}
        text = json.dumps(row) if name.endswith("jsonl") else f"{','.join(row)}\n{','.join(row.values())}\n"
    found = tables(tmp_path, ["one.wav", "two.wav"], **{name: text})
    assert values(found, tmp_path / "one.wav") == [{"caption": "warm", "keyscale": "A minor"}]
    assert values(found, tmp_path / "two.wav") == []
    assert found.problems == []


@pytest.mark.parametrize("line", ["[1]", "{", "3", "[" * 100_000])
def test_a_line_that_is_no_object_is_told(tmp_path, line):
    found = tables(tmp_path, ["one.wav"], **{"m.jsonl": '{"file_name": "one.wav", "bpm": 90}\n' + line})
    assert "is no list that can be read" in found.problems[0][1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
def test_a_pipe_under_the_name_of_a_list_is_told(tmp_path):
    os.mkfifo(tmp_path / "l.csv")
    (tmp_path / "folder.csv").mkdir()
    assert [problem for _, problem in tables(tmp_path, ["one.wav"]).problems] == [
        "is a pipe or a device, not a file, and was not read"
    ]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([("TKEY", "", "Am - 7"), ("TXXX", "TEMPO", "90")], {"keyscale": "A minor", "bpm": 90}),
        ([("TXXX", "Initial Key", "8A/Energy 6"), ("TBPM", "", "128.00")], {"keyscale": "A minor", "bpm": 128}),
        ([("TKEY", "", "o"), ("TXXX", "LYRICS", "la\nla")], {"lyrics": "la\nla"}),
        ([("TCON", "", "(17)(26)")], {"genre": "Rock, Ambient"}),
        ([("TXXX", "INITIALKEY", "Am"), ("TXXX", "BPM", "121")], {"keyscale": "A minor", "bpm": 121}),
        ([("TKEY", "", "o")], {}),
        ([("TKEY", "", "8A - Energy 7")], {"keyscale": "A minor"}),
        (
            [("TLAN", "", "spa"), ("USLT", "eng", "Line"), ("USLT", "spa", "Linea")],
            {"language": "es", "lyrics": "Linea"},
        ),
        (
            [("TLAN", "", "eng"), ("USLT", "eng", "Line"), ("USLT", "spa", "Linea")],
            {"language": "en", "lyrics": "Line"},
        ),
    ],
)
def test_tags_as_programs_for_djs_and_singers_write_them(tmp_path, frames, expected):
    tags = mutagen.id3.ID3()
    for kind, name, text in frames:
        frame = getattr(mutagen.id3, kind)
        if kind == "TXXX":
            tags.add(frame(encoding=3, desc=name, text=[text]))
        elif kind == "USLT":
            tags.add(frame(encoding=3, lang=name, desc="", text=text))
        else:
            tags.add(frame(encoding=3, text=[text]))
    write_sndfile(tmp_path / "a.mp3", tone(), 48_000, format="MP3")
    tags.save(tmp_path / "a.mp3")
    read = read_tags(tmp_path / "a.mp3")
    assert (read.values, read.problems) == (expected, [])  # "o" is no key and no mistake


def test_timed_lyrics_of_a_tag_become_time_marks(tmp_path):
    write_sndfile(tmp_path / "a.mp3", tone(), 48_000, format="MP3")
    tags = mutagen.id3.ID3()
    tags.add(mutagen.id3.SYLT(encoding=3, lang="eng", format=2, type=1, desc="", text=[("One", 1000), ("Two", 65_500)]))
    tags.save(tmp_path / "a.mp3")
    assert read_tags(tmp_path / "a.mp3").values == {"lyrics": "[00:01.00]One\n[01:05.50]Two"}


def with_lyrics(path, *frames):
    write_sndfile(path, tone(), 48_000, format="MP3")
    tags = mutagen.id3.ID3()
    for kind, language, text in frames:
        timed = {"format": 2, "type": 1} if kind == "SYLT" else {}
        tags.add(getattr(mutagen.id3, kind)(encoding=3, lang=language, desc="", text=text, **timed))
    tags.save(path)
    return path


THREE = ("USLT", "eng", "Line"), ("USLT", "spa", "A long line in Spanish"), ("SYLT", "eng", [("Line", 1000)])


@pytest.mark.parametrize(
    ("language", "lyrics", "told"),
    [("es", "A long line in Spanish", 0), ("en", "[00:01.00]Line", 0), ("fr", "[00:01.00]Line", 1)],
)
def test_of_lyrics_in_several_languages_the_songs_own_are_taken(tmp_path, language, lyrics, told):
    read = read_tags(with_lyrics(tmp_path / "a.mp3", *THREE), language)
    assert (read.values, len(read.problems)) == ({"lyrics": lyrics}, told)
    said = "lyrics stand there in en and es; those in en were taken (a sidecar with language: es takes the others)"
    assert read.problems == [said] * told


@pytest.mark.parametrize(
    "words",
    [
        [("Soft ", 1000), ("rain", 1500), ("\non the ", 4000), ("roof", 4500)],
        [("Soft ", 1000), ("rain\n", 1500), ("on the ", 4000), ("roof\n", 4500)],
        [("\nSoft rain", 1000), ("\non the roof", 4000)],
    ],
)
def test_timed_words_make_timed_lines(tmp_path, words):
    read = read_tags(with_lyrics(tmp_path / "a.mp3", ("SYLT", "eng", words)))
    assert read.values == {"lyrics": "[00:01.00]Soft rain\n[00:04.00]on the roof"}


def compressed(identity, data, version=4):
    payload, length = zlib.compress(data, 9), len(data)
    sizes = (21, 14, 7, 0) if version == 4 else (24, 16, 8, 0)
    number = lambda n: bytes((n >> s) & (127 if version == 4 else 255) for s in sizes)  # noqa: E731
    flags = b"\0\x09" if version == 4 else b"\0\x80"
    return identity + number(len(payload) + 4) + flags + number(length) + payload


def with_frames(path, frames, version=4):
    size = bytes((len(frames) >> s) & 127 for s in (21, 14, 7, 0))
    write_sndfile(path, tone(), 48_000, format="MP3")
    path.write_bytes(b"ID3" + bytes([version, 0, 0]) + size + frames + path.read_bytes())
    return path


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("kind", ["one frame", "many frames", "chapter"])
def test_what_unpacks_beyond_a_mebibyte_is_refused_in_bounds_of_memory(tmp_path, version, kind):
    title = compressed(b"TIT2", b"\x03Night", version)
    if kind == "one frame":
        bombs = compressed(b"USLT", b"\x03eng\0" + b"a" * (64 << 20), version)
    elif kind == "many frames":
        bombs = b"".join(compressed(b"TXXX", f"\x03{i}\0".encode() + b"a" * 1_000_000, version) for i in range(64))
    else:
        bombs = compressed(b"CHAP", b"a\0" + bytes(16) + compressed(b"TIT2", b"a" * (64 << 20), version), version)
    path = with_frames(tmp_path / "a.mp3", title + bombs, version)
    tracemalloc.start()
    read = read_tags(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (read.title, read.problems) == ("Night", ["a compressed tag unpacks to more than 1 MiB and was not read"])
    assert peak < 60 << 20


def test_a_file_after_one_that_was_refused_is_read(tmp_path):
    read_tags(with_frames(tmp_path / "a.mp3", compressed(b"USLT", b"\x03eng\0" + b"a" * (2 << 20))))
    read = read_tags(with_frames(tmp_path / "b.mp3", compressed(b"USLT", b"\x03eng\0la")))
    assert (read.values, read.problems) == ({"lyrics": "la"}, [])


def test_a_tag_of_more_than_a_mebibyte_reaches_no_prompt(tmp_path):
    write_sndfile(tmp_path / "a.mp3", tone(), 48_000, format="MP3")
    tags = mutagen.id3.ID3()
    tags.add(mutagen.id3.USLT(encoding=3, lang="eng", desc="", text="a" * 1_100_000))
    tags.save(tmp_path / "a.mp3")
    read = read_tags(tmp_path / "a.mp3")
    assert (read.values, read.problems) == ({}, ["lyrics: is larger than 1 MiB and was not read"])
