"""build-dataset: a folder of songs and text into dataset.json, and again without losing anything."""

import json
import os
import shutil
import time
from pathlib import Path

import mutagen
import mutagen.id3
import pytest
from immich_memories_music import tracks_dir

from sidestep.data.manifest import Sample, prompt_caption, read
from sidestep.errors import ExitStatus, JobError, UserError
from sidestep.events import FileFailed, Finished, Notice, Progress, Saved, Table
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.build_dataset import build_dataset
from tests.song_library import make_library, tone, write_sndfile


def build(folder: Path, **settings) -> tuple[dict[str, Sample], list]:
    """(samples by relative path, events) of one build."""
    events = []
    summary = build_dataset(BuildDatasetConfig(input=folder, **settings), events.append)
    return {s.audio_path.relative_to(folder).as_posix(): s for s in read(summary.path).samples}, events


def songs(folder: Path, *names: str, **texts: str) -> None:
    for name in names:
        write_sndfile(folder / name, tone(), 48_000, format="FLAC" if name.endswith("flac") else "WAV")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def edit(path: Path, name: str, **values) -> None:
    """What a person does in an editor."""
    data = json.loads(path.read_text(encoding="utf-8"))
    next(s for s in data["samples"] if s["audio_path"] == name).update(values)
    path.write_text(json.dumps(data), encoding="utf-8")


def messages(events) -> str:
    return "\n".join(e.message for e in events if isinstance(e, Notice))


def test_the_library_of_sixty_files_is_indexed_whole(tmp_path):
    entries = make_library(tmp_path)
    found, events = build(tmp_path)
    assert sorted(found) == sorted(name for name, e in entries.items() if e.readable)
    assert {Path(e.path).relative_to(tmp_path).as_posix() for e in events if isinstance(e, FileFailed)} == {
        name for name, e in entries.items() if e.listed and not e.readable
    }
    assert len({s.id for s in found.values()}) == len(found)
    assert all(s.caption and s.duration > 0 and s.filename == s.audio_path.name for s in found.values())


def test_real_music_is_indexed(tmp_path):
    shutil.copytree(tracks_dir(), tmp_path / "music")
    found, events = build(tmp_path / "music")
    assert len(found) == 28
    assert all(25 < s.duration < 40 for s in found.values())
    assert found["calm/calm_acoustic_1.opus"].caption == "calm acoustic 1"
    assert [type(e) for e in events][-3:] == [Table, Saved, Finished]
    assert isinstance(events[0], Progress)


def test_fields_merge_from_the_best_source_on(tmp_path):
    songs(
        tmp_path,
        "song.flac",
        **{
            "song.json": '{"bpm": 100, "key": "zz"}',
            "song.txt": "bpm: 90\nkey: Am",
            "song.caption.txt": "soft",
            "song.lyrics.txt": "[Verse]\nla",
        },
    )
    (tmp_path / "list.csv").write_text("File,Caption,Signature\nsong.flac,hard,3/4\n", encoding="utf-8")
    file = mutagen.File(tmp_path / "song.flac")
    file["title"], file["genre"], file["bpm"] = "Night", "Rock", "80"
    file.save()
    found, events = build(tmp_path)
    song = found["song.flac"]
    assert (song.bpm, song.keyscale, song.caption, song.lyrics) == (100, "A minor", "soft", "[Verse]\nla")
    assert (song.timesignature, song.genre, song.is_instrumental, song.labeled) == ("3", "Rock", False, True)
    assert 'song.json: key: "zz" is no key' in messages(events)


@pytest.mark.parametrize(
    ("name", "tags", "text", "caption", "labeled"),
    [
        ("01 - Night_Drive.flac", {}, "", "Night Drive", False),
        ("1-07. Night.flac", {}, "", "Night", False),
        ("99 Luftballons.flac", {}, "", "Luftballons", False),
        ("7.flac", {}, "", "7", False),
        ("x.flac", {"title": "Night", "artist": "Me"}, "", "Night by Me", False),
        ("x.flac", {"title": "Night", "genre": "Rock"}, "", "Rock, Night", True),
        ("x.flac", {"artist": "Me"}, "genre: pop", "pop", True),
        ("x.flac", {"title": "Night"}, "caption: soft", "soft", True),
    ],
)
def test_a_song_without_caption_is_called_by_its_tags_or_its_name(tmp_path, name, tags, text, caption, labeled):
    songs(tmp_path, name, **({"x.txt": text} if text else {}))
    file = mutagen.File(tmp_path / name)
    file.update(tags)
    file.save()
    (song,) = build(tmp_path)[0].values()
    assert (song.caption, song.labeled) == (caption, labeled)


@pytest.mark.parametrize(
    ("text", "lyrics", "instrumental"),
    [
        ("bpm: 90", "[Instrumental]", True),
        ("lyrics: la", "la", False),
        ("lyrics: [Instrumental]", "[Instrumental]", True),
        ("is_instrumental: true\nlyrics: la", "[Instrumental]", True),
        ("is_instrumental: false", "", False),
    ],
)
def test_a_song_is_instrumental_when_it_is_said_or_when_it_has_no_words(tmp_path, text, lyrics, instrumental):
    songs(tmp_path, "a.wav", **{"a.txt": text})
    song = build(tmp_path)[0]["a.wav"]
    assert (song.lyrics, song.is_instrumental) == (lyrics, instrumental)


def test_two_songs_of_one_name_never_share_what_is_theirs(tmp_path):
    songs(tmp_path, "one/song.wav", "two/song.wav", "two/song.flac")
    songs(tmp_path / "one", **{"song.txt": "bpm: 90"})
    songs(tmp_path / "two", **{"song.wav.txt": "bpm: 100"})
    found, _ = build(tmp_path)
    assert {name: s.bpm for name, s in found.items()} == {
        "one/song.wav": 90,
        "two/song.flac": None,
        "two/song.wav": 100,
    }


def test_a_duration_that_differs_is_reported_and_not_used(tmp_path):
    songs(tmp_path, "a.wav", **{"a.txt": "duration: 3:25"})
    found, events = build(tmp_path)
    assert found["a.wav"].duration == 0.5
    assert "0.5 s long, not 205 s" in messages(events)


def test_flags_reach_the_prompt_and_stay_until_typed_anew(tmp_path):
    songs(tmp_path, "a.wav", "b.wav", **{"a.txt": "caption: soft\ntrigger: own", "b.txt": "caption: hard"})
    build(tmp_path, tag="zz", tag_position="append", name="mine", genre_ratio=30)
    for settings, prompt in ({}, "hard, zz"), ({"tag": "yy"}, "hard, yy"), ({"tag_position": "prepend"}, "yy, hard"):
        found, _ = build(tmp_path, **settings)
        metadata = read(tmp_path / "dataset.json").metadata
        assert prompt_caption(found["b.wav"], metadata) == prompt
        assert prompt_caption(found["a.wav"], metadata) in ("soft, own", "own, soft")
        assert (metadata.name, metadata.genre_ratio) == ("mine", 30)


def test_building_twice_changes_nothing(tmp_path):
    songs(tmp_path, "a.wav", "b/c.wav", **{"a.txt": "caption: soft\nlyrics: la"})
    build(tmp_path, tag="zz")
    before = (tmp_path / "dataset.json").read_bytes()
    build(tmp_path)
    assert (tmp_path / "dataset.json").read_bytes() == before


def test_a_rebuild_keeps_what_was_edited_and_follows_what_was_not(tmp_path):
    songs(tmp_path, "a.wav", **{"a.txt": "caption: soft\nbpm: 90\nkey: Am"})
    build(tmp_path)
    edit(tmp_path / "dataset.json", "a.wav", caption="by hand", language="ja", my_note=1)
    songs(tmp_path, **{"a.txt": "caption: changed\nbpm: 100\nlyrics: la"})
    for _ in range(2):
        found, events = build(tmp_path)
        song = found["a.wav"]
        assert (song.caption, song.language, song.bpm, song.keyscale, song.lyrics, song.is_instrumental) == (
            "by hand",
            "ja",
            100,
            "",
            "la",
            False,
        )
        assert song.extra == {"my_note": 1}
        assert "kept: 2 values" in messages(events)
    assert build(tmp_path, overwrite=True)[0]["a.wav"].caption == "changed"


@pytest.mark.parametrize("value", ["", None])
def test_emptying_a_value_is_an_edit_too(tmp_path, value):
    songs(tmp_path, "a.wav", **{"a.txt": "caption: soft\nkey: Am"})
    build(tmp_path)
    edit(tmp_path / "dataset.json", "a.wav", keyscale=value)
    assert build(tmp_path)[0]["a.wav"].keyscale == ""


def test_lyrics_written_by_hand_make_a_song_sung(tmp_path):
    songs(tmp_path, "a.wav")
    build(tmp_path)
    edit(tmp_path / "dataset.json", "a.wav", lyrics="la")
    song = build(tmp_path)[0]["a.wav"]
    assert (song.lyrics, song.is_instrumental) == ("la", False)


def test_what_another_program_wrote_counts_as_edited(tmp_path):
    songs(tmp_path, "a.wav", **{"a.txt": "caption: soft\nbpm: 90"})
    sample = {
        "id": "abc",
        "audio_path": "a.wav",
        "caption": "of the app",
        "raw_lyrics": "x",
        "labeled": True,
        "duration": 3,
    }
    (tmp_path / "dataset.json").write_text(
        json.dumps({"metadata": {"name": "n"}, "samples": [sample]}), encoding="utf-8"
    )
    song = build(tmp_path)[0]["a.wav"]
    assert (song.id, song.caption, song.bpm, song.extra, song.duration) == (
        "abc",
        "of the app",
        90,
        {"raw_lyrics": "x"},
        0.5,
    )


def test_a_song_taken_out_by_hand_stays_out(tmp_path):
    songs(tmp_path, "a.wav", "b.wav")
    build(tmp_path)
    data = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    data["samples"] = data["samples"][:1]
    (tmp_path / "dataset.json").write_text(json.dumps(data), encoding="utf-8")
    for _ in range(2):
        found, events = build(tmp_path)
        assert list(found) == ["a.wav"]
        assert "taken out" in messages(events)
    assert len(build(tmp_path, overwrite=True)[0]) == 2


def test_a_song_whose_file_is_away_comes_back_with_its_edits(tmp_path):
    songs(tmp_path, "a.wav", "b.wav")
    build(tmp_path)
    edit(tmp_path / "dataset.json", "b.wav", caption="by hand")
    (tmp_path / "b.wav").rename(tmp_path / "away")
    for _ in range(2):
        found, events = build(tmp_path)
        assert list(found) == ["a.wav"]
        assert "b.wav is not there" in messages(events)
    (tmp_path / "away").rename(tmp_path / "b.wav")
    assert build(tmp_path)[0]["b.wav"].caption == "by hand"


def test_a_song_from_elsewhere_stays_in_the_list(tmp_path):
    songs(tmp_path, "in/a.wav", "out/b.wav")
    build(tmp_path / "out", output=tmp_path / "dataset.json")
    build_dataset(BuildDatasetConfig(input=tmp_path / "in", output=tmp_path / "dataset.json"), lambda e: None)
    assert [s.filename for s in read(tmp_path / "dataset.json").samples] == ["a.wav", "b.wav"]


def test_a_file_kept_elsewhere_is_rebuilt_with_what_it_says_of_songs_in_their_own_folder(tmp_path):
    songs(tmp_path, "music/a.wav", "music/x/b.wav", "lists/c.wav")
    written = [{"audio_path": "a.wav", "caption": "soft", "id": "7"}, {"filename": "x/b.wav", "caption": "hard"}]
    (tmp_path / "lists" / "dataset.json").write_text(json.dumps([*written, {"filename": "c.wav"}]), encoding="utf-8")
    for _ in range(2):
        events = []
        config = BuildDatasetConfig(input=tmp_path / "music", output=tmp_path / "lists")
        summary = build_dataset(config, events.append)
        assert [(s.audio_path.relative_to(tmp_path).as_posix(), s.caption) for s in summary.dataset.samples] == [
            ("music/a.wav", "soft"),
            ("music/x/b.wav", "hard"),
            ("lists/c.wav", ""),
        ]
        assert summary.dataset.samples[0].id == "7"
        assert "is not there" not in messages(events)


def test_files_of_kinds_that_are_not_read_are_one_line(tmp_path):
    for name in ("a.dsf", "b.dsf", "c.mkv", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    said = "passed over, because their kind is not read: 2 .dsf, 1 .mkv"
    with pytest.raises(JobError, match=said):
        build(tmp_path)
    songs(tmp_path, "a.wav")
    assert f"3 files {said}." in messages(build(tmp_path)[1])


def test_text_files_beside_songs_that_no_song_used_are_named(tmp_path):
    songs(tmp_path, "a.wav", **{"a.txt": "caption: a song", "readme.txt": "read me"})
    assert "1 text file beside songs was not read: readme.txt" in messages(build(tmp_path)[1])
    for name in ("b.lrc", "b_prompt.txt", "c.lyrics", "d.srt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    said = "5 text files beside songs were not read: b.lrc, b_prompt.txt, c.lyrics, …"
    assert said in messages(build(tmp_path, overwrite=True)[1])


def test_many_songs_that_are_away_are_one_line(tmp_path):
    songs(tmp_path, "a.wav")
    (tmp_path / "dataset.json").write_text(json.dumps([{"filename": f"{i}.wav"} for i in range(9)]), encoding="utf-8")
    _, events = build(tmp_path)
    assert messages(events).count("not there") == 1
    assert "0.wav and 8 more are not there" in messages(events)


def test_the_language_of_a_sidecar_chooses_among_the_lyrics_of_the_tags(tmp_path):
    for name, language in (("a", "es"), ("b", "English")):
        path = tmp_path / f"{name}.mp3"
        write_sndfile(path, tone(), 48_000, format="MP3")
        tags = mutagen.id3.ID3()
        for code, text in (("eng", "English line"), ("spa", "Linea")):
            tags.add(mutagen.id3.USLT(encoding=3, lang=code, desc="", text=text))
        tags.save(path)
        (tmp_path / f"{name}.txt").write_text(f"language: {language}", encoding="utf-8")
    found, events = build(tmp_path)
    assert {name: song.lyrics for name, song in found.items()} == {"a.mp3": "Linea", "b.mp3": "English line"}
    assert "languages" not in messages(events)


def test_a_song_called_dataset_is_not_described_by_the_output(tmp_path):
    songs(tmp_path, "dataset.wav")
    for _ in range(2):
        assert build(tmp_path)[0]["dataset.wav"].caption == "dataset"


def test_the_output_may_stand_elsewhere_and_is_relative_to_itself(tmp_path, monkeypatch):
    songs(tmp_path, "music/a.wav")
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path / "music")
    build_dataset(BuildDatasetConfig(input=Path(), output=Path("../lists")), lambda e: None)
    data = json.loads((tmp_path / "lists" / "dataset.json").read_text(encoding="utf-8"))
    assert data["samples"][0]["audio_path"] == "../music/a.wav"
    assert data["metadata"]["name"] == "music"


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda p: None, UserError, "does not exist"),
        (lambda p: p.write_bytes(b""), UserError, "is a file"),
        (lambda p: p.mkdir(), JobError, "No audio file"),
        (lambda p: (p.mkdir(), (p / "a.wav").write_bytes(b"")), JobError, "None of the 1 audio files"),
    ],
)
def test_what_cannot_be_built_is_told(tmp_path, make, error, told):
    make(tmp_path / "songs")
    with pytest.raises(error, match=told) as raised:
        build_dataset(BuildDatasetConfig(input=tmp_path / "songs"), lambda e: None)
    assert raised.value.status == (ExitStatus.FAILED if error is JobError else ExitStatus.USAGE)
    assert not (tmp_path / "songs" / "dataset.json").exists()


def test_a_file_that_is_no_data_set_is_never_written_over(tmp_path):
    songs(tmp_path, "a.wav", **{"dataset.json": '{"precious": 1}'})
    with pytest.raises(UserError, match="a list of samples is needed"):
        build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None)
    assert json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8")) == {"precious": 1}


@pytest.mark.slow
def test_three_thousand_songs_are_indexed_in_under_a_minute(tmp_path):
    songs(tmp_path, "0.wav")
    for i in range(1, 3000):
        folder = tmp_path / f"album {i % 100}"
        folder.mkdir(exist_ok=True)
        os.link(tmp_path / "0.wav", folder / "song.wav" if i < 100 else folder / f"{i}.wav")
        (folder / f"{i}.txt").write_text(f"bpm: {30 + i % 270}", encoding="utf-8")
    started = time.monotonic()
    found, _ = build(tmp_path)
    assert time.monotonic() - started < 60
    assert len(found) == 3000
    assert all(
        s.bpm == 30 + int(s.audio_path.stem) % 270 for s in found.values() if s.filename not in ("song.wav", "0.wav")
    )
