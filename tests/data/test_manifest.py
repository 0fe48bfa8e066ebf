"""dataset.json: ACE-Step's schema, read strictly, written so that a folder can move."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.data.manifest import (
    Dataset,
    Metadata,
    Sample,
    duration_differs,
    genre_share,
    prompt_caption,
    prompt_lyrics,
    read,
    sample_id,
    write,
)
from sidestep.errors import ExitStatus, UserError
from sidestep.events import LongTask

ACE_STEP_METADATA = [
    "name",
    "custom_tag",
    "tag_position",
    "created_at",
    "num_samples",
    "all_instrumental",
    "genre_ratio",
]
ACE_STEP_SAMPLE = [
    "id",
    "audio_path",
    "filename",
    "caption",
    "genre",
    "lyrics",
    "bpm",
    "keyscale",
    "timesignature",
    "duration",
    "language",
    "is_instrumental",
    "custom_tag",
    "labeled",
    "prompt_override",
    "repeat",
]


def song(path: Path = Path("a.wav"), **known) -> Sample:
    return Sample(**{"audio_path": path, "id": "1", "filename": path.name, "caption": "soft", "genre": "pop", **known})


def stored(folder: Path, data) -> Path:
    (folder / "dataset.json").write_text(json.dumps(data), encoding="utf-8")
    return folder / "dataset.json"


def test_the_file_has_the_keys_of_ace_step_in_their_order(tmp_path):
    write(tmp_path / "dataset.json", Dataset(samples=(song(tmp_path / "a.wav"),)))
    data = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    assert list(data) == ["metadata", "samples"]
    assert list(data["metadata"]) == ACE_STEP_METADATA
    assert list(data["samples"][0]) == ACE_STEP_SAMPLE


def test_what_is_written_is_read_back(tmp_path):
    dataset = Dataset(
        metadata=Metadata(
            name="n", custom_tag="t", tag_position="append", created_at="now", genre_ratio=20, extra={"x": 1}
        ),
        samples=(
            song(
                tmp_path / "a ü" / "[1].wav",
                lyrics="[Verse]\nla",
                bpm=90,
                keyscale="A minor",
                timesignature="3",
                duration=205.0,
                language="ja",
                custom_tag="own",
                labeled=True,
                prompt_override="genre",
                repeat=3,
                estimated=("bpm",),
                extra={"raw_lyrics": "la"},
            ),
            song(tmp_path.parent / "outside.wav", id="2", is_instrumental=True),
        ),
        extra={"of another program": [1]},
    )
    write(tmp_path / "dataset.json", dataset)
    assert read(tmp_path / "dataset.json") == dataset


def test_folder_and_file_move_together(tmp_path):
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "dataset.json", Dataset(samples=(song(tmp_path / "here" / "x" / "a.wav"),)))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert read(tmp_path / "there" / "dataset.json").samples[0].audio_path == tmp_path / "there" / "x" / "a.wav"
    assert (
        json.loads((tmp_path / "there" / "dataset.json").read_text(encoding="utf-8"))["samples"][0]["audio_path"]
        == "x/a.wav"
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [("x/a.wav", "x/a.wav"), ("./x/a.wav", "x/a.wav"), ("x\\a.wav", "x/a.wav"), ("x/../y/a.wav", "y/a.wav")],
)
def test_paths_of_every_system_are_read(tmp_path, written, meant):
    assert read(stored(tmp_path, [{"audio_path": written}])).samples[0].audio_path == tmp_path / meant


def test_absolute_paths_are_read(tmp_path):
    assert (
        read(stored(tmp_path, [{"audio_path": "/music/a.wav" if os.sep == "/" else "C:\\music\\a.wav"}]))
        .samples[0]
        .audio_path.is_absolute()
    )


def test_a_bare_list_with_names_of_other_programs_is_read_and_normalised(tmp_path):
    (sample,) = read(
        stored(
            tmp_path,
            [{"filename": "a.wav", "key": "Am", "Time Signature": "4/4", "tempo": "120.4", "lang": "English", "id": 7}],
        )
    ).samples
    assert (sample.keyscale, sample.timesignature, sample.bpm, sample.language, sample.id) == (
        "A minor",
        "4",
        120,
        "en",
        "7",
    )


def test_a_sample_without_id_gets_one_from_its_path(tmp_path):
    first, second = read(stored(tmp_path, [{"audio_path": "x/a.wav"}, {"audio_path": "y/a.wav"}])).samples
    assert first.id == sample_id("x/a.wav") != second.id


MISTAKES = [
    ({"samples": 3}, "$.samples: a list"),
    ({}, "$.samples: a list"),
    ({"metadata": [], "samples": []}, None),
    ({"metadata": 3, "samples": []}, "$.metadata: an object"),
    ({"metadata": {"tag_position": "middle"}, "samples": []}, '$.metadata.tag_position: "middle"'),
    ({"metadata": {"genre_ratio": 120}, "samples": []}, "$.metadata.genre_ratio: 120"),
    ({"metadata": {"name": 3}, "samples": []}, "$.metadata.name: 3 is no text"),
    ([{}], "$.samples[0].audio_path"),
    ([{"audio_path": "\ud800.wav"}], r'$.samples[0].audio_path: "\ud800.wav" is no name of a file'),
    ([{"audio_path": "a.wav", "filename": "\ud800.wav"}], "$.samples[0].filename"),
    ([{"audio_path": "a.wav", "id": "\udfff"}], "$.samples[0].id"),
    ([{"audio_path": "a.wav", "caption": "\ud83d"}], "$.samples[0].caption"),
    ([{"audio_path": "a.wav", "lyrics": "la \udc80"}], "$.samples[0].lyrics"),
    ([{"audio_path": "a.wav", "repeat": 1e23}], "$.samples[0].repeat"),
    ([{"audio_path": "a.wav", "bpm": 10**400}], "$.samples[0].bpm"),
    ({"metadata": {"custom_tag": "\ud800"}, "samples": []}, "$.metadata.custom_tag"),
    ({"metadata": {"genre_ratio": 1e999}, "samples": []}, "$.metadata.genre_ratio"),
    ([3], "$.samples[0]: an object"),
    ([{"audio_path": "a.wav", "bpm": "fast"}], '$.samples[0].bpm: "fast"'),
    ([{"audio_path": "a.wav", "timesignature": "5/4"}], '$.samples[0].timesignature: "5/4"'),
    ([{"audio_path": "a.wav", "caption": {}}], "$.samples[0].caption"),
    ([{"audio_path": "a.wav", "estimated": "bpm"}], "$.samples[0].estimated"),
    (
        [{"audio_path": "a.wav", "id": "x"}, {"audio_path": "b.wav", "id": "x"}],
        "$.samples[1].id: the same as $.samples[0].id",
    ),
    (
        [{"audio_path": "a.wav"}, {"audio_path": "./a.wav"}],
        '$.samples[1].audio_path: the same as $.samples[0].audio_path; to train on it more often, say "repeat"',
    ),
]


@pytest.mark.parametrize(("data", "told"), MISTAKES)
def test_each_mistake_is_told_with_its_json_path(tmp_path, data, told):
    if told is None:
        assert read(stored(tmp_path, data)) == Dataset()
        return
    with pytest.raises(UserError) as error:
        read(stored(tmp_path, data))
    assert told in error.value.problem
    assert error.value.status == ExitStatus.USAGE


@pytest.mark.parametrize("name", ["a" * 300, "ü" * 130, "a/" * 1500])
def test_a_name_that_no_file_can_have_is_told_with_its_json_path(tmp_path, name):
    """Asked for, such a file is an error of the system that ended the job."""
    with pytest.raises(UserError, match=r"\$.samples\[0\].audio_path: .* is longer than"):
        read(stored(tmp_path, [{"audio_path": f"{name}.wav"}]))
    longest = f"{'a' * 251}.wav"
    assert read(stored(tmp_path, [{"audio_path": longest}])).samples[0].filename == longest


def test_all_mistakes_are_told_at_once_but_no_more_than_can_be_read(tmp_path):
    with pytest.raises(UserError) as error:
        read(stored(tmp_path, [{"audio_path": f"{i}.wav", "bpm": "x", "keyscale": "x"} for i in range(30)]))
    assert "has 60 mistakes" in error.value.problem
    assert "… and 40 more" in error.value.problem


@pytest.mark.parametrize(("text", "told"), [("{", "is no JSON"), ("[" * 100_000, "is no JSON"), ("3", "$: an object")])
def test_what_is_no_data_set_is_told(tmp_path, text, told):
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="dataset.json") as error:
        read(tmp_path / "dataset.json")
    assert told in error.value.problem


def test_a_file_that_is_not_there_is_told_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "dataset.json")
    assert "build-dataset" in error.value.fix


@pytest.mark.parametrize(
    ("names", "known", "kept"),
    [
        ({"prompt": "soft", "description": "a long text"}, "soft", {"description": "a long text"}),
        ({"description": "a long text", "prompt": "soft"}, "a long text", {"prompt": "soft"}),
        ({"prompt": "", "description": "a long text"}, "a long text", {"prompt": ""}),
        ({"description": "x", "caption": "soft", "prompt": "y"}, "soft", {"description": "x", "prompt": "y"}),
    ],
)
def test_of_two_names_for_one_field_neither_is_lost(tmp_path, names, known, kept):
    for _ in range(2):
        dataset = read(stored(tmp_path, {"samples": [{"audio_path": "a.wav", "id": "1", **names}]}))
        write(tmp_path / "dataset.json", dataset)
        (sample,) = read(tmp_path / "dataset.json").samples
        assert (sample.caption, sample.extra) == (known, kept)


def test_key_and_scale_are_one_key(tmp_path):
    (sample,) = read(stored(tmp_path, [{"audio_path": "a.wav", "key": "A", "scale": "minor"}])).samples
    assert sample.keyscale == "A minor"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_never_opened(tmp_path, kind):
    path = tmp_path / "dataset.json"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with pytest.raises(UserError, match="not a file, and was not read"):
        read(path)


def test_a_long_list_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep.data.manifest.LongTask", partial(LongTask, quiet_seconds=0))
    events = []
    read(stored(tmp_path, [{"audio_path": f"{i}.wav"} for i in range(5)]), events.append)
    assert [(event.done, event.total) for event in events][-1] == (5, 5)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_saved_by_a_windows_editor_is_read(tmp_path, encoding):
    (tmp_path / "dataset.json").write_text('[{"audio_path": "ü.wav"}]', encoding=encoding)
    assert read(tmp_path / "dataset.json").samples[0].filename == "ü.wav"


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_file_name_that_is_no_unicode_comes_back_as_it_was(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    write(tmp_path / "dataset.json", Dataset(samples=(song(path),)))
    assert read(tmp_path / "dataset.json").samples[0].audio_path == path


PROMPTS = [
    (song(), Metadata(), "soft"),
    (song(), Metadata(custom_tag="zz"), "zz, soft"),
    (song(), Metadata(custom_tag="zz", tag_position="append"), "soft, zz"),
    (song(), Metadata(custom_tag="zz", tag_position="replace"), "zz"),
    (song(custom_tag="own"), Metadata(custom_tag="zz"), "own, soft"),
    (song(caption="", genre=""), Metadata(custom_tag="zz"), "zz"),
    (song(), Metadata(genre_ratio=100), "pop"),
    (song(prompt_override="caption"), Metadata(genre_ratio=100), "soft"),
    (song(prompt_override="genre"), Metadata(genre_ratio=0), "pop"),
    (song(genre=""), Metadata(genre_ratio=100), "soft"),
    (song(caption=""), Metadata(), "pop"),
    (song(caption="", genre=""), Metadata(), ""),
]


@pytest.mark.parametrize(("sample", "metadata", "caption"), PROMPTS)
def test_the_caption_reaches_the_prompt_with_tag_and_genre(sample, metadata, caption):
    assert prompt_caption(sample, metadata) == caption


@pytest.mark.parametrize(
    ("sample", "ratio", "share", "caption"),
    [
        (song(), 0, 0, "soft"),
        (song(), 30, 30, "soft"),
        (song(), 99, 99, "soft"),
        (song(), 100, 100, "pop"),
        (song(genre=""), 30, 0, "soft"),
        (song(caption=""), 30, 0, "pop"),
        (song(prompt_override="caption"), 30, 0, "soft"),
        (song(prompt_override="genre"), 30, 0, "pop"),
    ],
)
def test_the_genre_ratio_is_a_share_of_visits_where_a_song_has_both_texts(sample, ratio, share, caption):
    metadata = Metadata(genre_ratio=ratio)
    assert (genre_share(sample, metadata), prompt_caption(sample, metadata)) == (share, caption)


def test_lyrics_reach_the_prompt_as_written_and_none_are_instrumental():
    assert prompt_lyrics(song(lyrics="la")) == "la"
    assert prompt_lyrics(song()) == "[Instrumental]"


@pytest.mark.parametrize(
    ("noted", "real", "differs"),
    [(0, 200, False), (200, 200.9, False), (200, 201, True), (200, 30, True), (0.5, 0.5, False)],
)
def test_a_duration_that_differs_is_noticed(noted, real, differs):
    assert duration_differs(song(duration=noted), real) is differs


def test_a_tag_edited_in_the_metadata_alone_holds_for_the_songs_that_had_it(tmp_path):
    samples = [{"audio_path": "a.wav", "custom_tag": "old"}, {"audio_path": "b.wav", "custom_tag": "own"}]
    dataset = read(
        stored(tmp_path, {"metadata": {"custom_tag": "new"}, "samples": samples, "sidestep": {"tag": "old"}})
    )
    assert [s.custom_tag for s in dataset.samples] == ["new", "own"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=8,
)
near_samples = st.dictionaries(st.sampled_from([*ACE_STEP_SAMPLE, "key", "x", "estimated"]), json_values)


@settings(deadline=None, max_examples=50)
@given(
    st.fixed_dictionaries(
        {
            "metadata": st.dictionaries(st.sampled_from(ACE_STEP_METADATA), json_values) | json_values,
            "samples": st.lists(near_samples),
        }
    )
)
def test_any_json_at_all_is_read_or_told(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any", numbered=True)
    try:
        dataset = read(stored(folder, data))
    except UserError:
        return
    write(folder / "again.json", dataset)
    again = read(folder / "again.json")
    assert [replace(s, duration=0, extra={}) for s in again.samples] == [
        replace(s, duration=0, extra={}) for s in dataset.samples
    ]
