"""--caption lm: what nobody has written is heard, what somebody has written stays, and nothing is heard twice."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from immich_memories_music import tracks_dir

from sidestep.acestep.lm import decoding
from sidestep.audio.io import SAMPLE_RATE, stream
from sidestep.cli.main import main
from sidestep.data.manifest import read, write
from sidestep.errors import ExitStatus
from sidestep.events import FileFailed, Notice, Progress, Table
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.build_dataset import FROM_NAME, build_dataset
from sidestep.tasks.describe import describe, listener
from sidestep.tasks.describe.listener import parts_of, put_together
from sidestep.tasks.describe.run import KEPT
from tests.song_library import tone, write_sndfile

MODEL = "acestep-5Hz-lm-0.6B"
LISTEN = ("--caption", "lm", "--model-variant", "acestep-v15-512-codes", "--device", "cpu")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(decoding, "CAPTION_TOKENS", 24)  # the tiny model finds no end for what it has not learnt


def songs(folder, number=2, **texts):
    for i in range(number):
        write_sndfile(folder / f"song {i}.wav", tone(300 + 50 * i, 2.0), 48_000)
    for name, text in texts.items():
        (folder / f"{name.replace('_', ' ')}.txt").write_text(text, encoding="utf-8")
    return folder


def run(folder, home, *more) -> ExitStatus:
    return main(["build-dataset", "--input", str(folder), "--checkpoint-dir", str(home), *LISTEN, *more])


def config(folder, home, **more) -> BuildDatasetConfig:
    return BuildDatasetConfig(
        input=folder, checkpoint_dir=home, caption="lm", model_variant="acestep-v15-512-codes", device="cpu", **more
    )


def described(folder, home, **more):
    """(the songs, the events) of a run below the command line."""
    events = []
    settings = config(folder, home, **more)
    summary = build_dataset(settings, events.append)
    describe(summary.path, settings, events.append)
    return read(summary.path).samples, events


class Saying:
    """A listener that says the same of every song."""

    def __init__(self, **answer):
        self.answer, self.heard = answer, []

    def __call__(self, config, report):
        self.name, self.identity = "tester", "1"
        return self

    def describe(self, path):
        self.heard.append(path.name)
        return {"parts": 1, **self.answer}


@pytest.fixture
def saying(monkeypatch):
    def use(**answer):
        listener = Saying(**answer)
        monkeypatch.setattr("sidestep.tasks.describe.run.LanguageModelListener", listener)
        return listener

    return use


def test_songs_get_what_they_lack_and_it_is_marked(tmp_path, lm_home):
    folder = songs(tmp_path, song_1="caption: mine\nbpm: 77\nkey: C minor\nsignature: 4")
    assert run(folder, lm_home) == ExitStatus.OK
    first, second = read(folder / "dataset.json").samples
    assert first.caption != "song 0"
    assert first.labeled
    assert {"caption", "bpm", "keyscale", "timesignature"} <= set(first.estimated)
    assert first.origins["caption"] == first.origins["bpm"] == f"by {MODEL}"
    assert first.lyrics == "[Instrumental]"
    assert (second.caption, second.bpm, second.estimated) == ("mine", 77, ())


def test_nothing_is_heard_twice_and_what_was_heard_stays_when_the_file_is_built_again(tmp_path, saying):
    saying(caption="heard", bpm=90, keyscale="A minor", timesignature="4")
    before, events = described(songs(tmp_path), tmp_path)
    assert [e.done for e in events if isinstance(e, Progress) and e.task == "Describing"] == [1, 2]
    build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None)
    after, events = described(tmp_path, tmp_path)
    assert after == before
    assert any("nothing to describe" in e.message for e in events if isinstance(e, Notice))


def test_an_edit_is_never_overwritten_and_has_no_origin(tmp_path, saying):
    saying(caption="heard", bpm=90)
    described(songs(tmp_path), tmp_path)
    path = tmp_path / "dataset.json"
    dataset = read(path)
    first, second = dataset.samples
    write(path, replace(dataset, samples=(replace(first, caption="by hand"), replace(second, bpm=None))))
    saying(caption="heard otherwise", bpm=100)
    (first, second), _ = described(tmp_path, tmp_path)
    assert (first.caption, "caption" in first.origins) == ("by hand", False)
    assert (second.caption, second.bpm) == ("heard", None)


def test_a_sidecar_that_comes_later_knows_better(tmp_path, saying):
    saying(caption="heard", bpm=90)
    described(songs(tmp_path, 1), tmp_path)
    (tmp_path / "song 0.txt").write_text("caption: written\nbpm: 60")
    ([sample], _) = described(tmp_path, tmp_path)
    assert (sample.caption, sample.bpm, sample.labeled) == ("written", 60, True)
    assert not {"caption", "bpm"} & {*sample.origins, *sample.estimated}


def test_where_measured_and_heard_differ_both_are_shown_and_the_measured_stays(tmp_path, saying):
    saying(caption="heard", bpm=90, keyscale="A minor", timesignature="4")
    songs(tmp_path, 1)
    settings = config(tmp_path, tmp_path)
    path = build_dataset(settings, lambda e: None).path
    dataset = read(path)
    measured = replace(
        dataset.samples[0], bpm=91, keyscale="C major", estimated=("bpm", "keyscale")
    )  # as --analyze leaves it
    write(path, replace(dataset, samples=(measured,)))
    events = []
    [sample] = describe(path, settings, events.append).samples
    assert (sample.bpm, sample.keyscale, sample.timesignature) == (91, "C major", "4")
    [table] = [e for e in events if isinstance(e, Table) and "differently" in e.title]
    assert table.rows == (("song 0.wav", "keyscale", "C major", "A minor"),)


def test_lyrics_are_taken_only_where_they_are_asked_for(tmp_path, saying):
    answer = {"caption": "heard", "language": "en", "lyrics": "[Verse]\nla la"}
    saying(**answer)
    ([sample], events) = described(songs(tmp_path, 1), tmp_path)
    assert (sample.lyrics, sample.language, sample.is_instrumental) == ("[Instrumental]", "unknown", True)
    assert any("tester hears singing" in e.message for e in events if isinstance(e, Notice))
    saying(**answer)
    ([sample], _) = described(tmp_path, tmp_path, lyrics="lm")
    assert (sample.lyrics, sample.language, sample.is_instrumental) == ("[Verse]\nla la", "en", False)
    assert sample.origins["lyrics"] == "by tester"
    ([sample], _) = described(tmp_path, tmp_path)
    assert (sample.lyrics, sample.is_instrumental) == ("[Verse]\nla la", False)


def test_a_song_that_somebody_calls_instrumental_stays_so(tmp_path, saying):
    saying(caption="heard", language="en", lyrics="la la")
    ([sample], _) = described(songs(tmp_path, 1, song_0="instrumental: yes"), tmp_path, lyrics="lm")
    assert (sample.lyrics, sample.is_instrumental, sample.language) == ("[Instrumental]", True, "unknown")


def test_a_value_that_means_nothing_is_told_and_left_out(tmp_path, saying):
    saying(caption="heard", bpm="fast", keyscale="H sharp", timesignature="6/8", language="no")
    ([sample], events) = described(songs(tmp_path, 1), tmp_path)
    assert (sample.caption, sample.bpm, sample.keyscale, sample.timesignature) == ("heard", None, "", "6")
    told = [e.message for e in events if isinstance(e, Notice) and "left out" in e.message]
    assert len(told) == 2


def test_a_song_that_cannot_be_heard_costs_no_other(tmp_path, lm_home):
    songs(tmp_path, 1)
    write_sndfile(tmp_path / "short.wav", tone(300, 0.1), 48_000)
    assert run(tmp_path, lm_home) == ExitStatus.SOME_FAILED
    by_name = {sample.filename: sample for sample in read(tmp_path / "dataset.json").samples}
    assert by_name["short.wav"].origins["caption"] == FROM_NAME
    assert by_name["song 0.wav"].origins["caption"] == f"by {MODEL}"


@pytest.mark.parametrize("torn", [b'{"identity": "1", "cont', b"\xff\xfe\n[]\n", b""])
def test_half_a_line_of_a_killed_run_costs_one_song(tmp_path, saying, torn):
    heard = saying(caption="heard")
    described(songs(tmp_path, 3), tmp_path)
    kept = tmp_path / KEPT
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:2]) + torn)
    heard = saying(caption="heard")
    samples, _ = described(tmp_path, tmp_path, overwrite=True)
    assert len(heard.heard) == 1
    assert [sample.caption for sample in samples] == ["heard"] * 3
    heard = saying(caption="heard")
    described(tmp_path, tmp_path, overwrite=True)
    assert heard.heard == []


def test_loading_what_hears_is_told(tmp_path, lm_home, monkeypatch):
    monkeypatch.setattr("sidestep.acestep.weights.quiet_seconds", lambda _: 0.0)
    write_sndfile(tmp_path / "song 0.wav", tone(300, 0.5), 48_000)
    _, events = described(tmp_path, lm_home)
    told = {event.task for event in events if isinstance(event, Progress)}
    assert {"Loading the vae", "Loading the language model"} <= told


def test_what_hears_is_kept_in_as_many_bits_as_are_typed(tmp_path, lm_home, monkeypatch):
    load, asked = listener.load_language_model, []
    monkeypatch.setattr(listener, "load_language_model", lambda *how: asked.append(how[4]) or load(*how))
    write_sndfile(tmp_path / "song 0.wav", tone(300, 0.5), 48_000)
    described(tmp_path, lm_home, base_precision="int8")
    assert asked == ["int8"]


def test_a_long_song_is_heard_in_parts_and_says_so(tmp_path, lm_home, monkeypatch):
    monkeypatch.setattr(listener, "HEARD_SECONDS", 1)
    monkeypatch.setattr(listener, "LEAST_SECONDS", 0.4)
    write_sndfile(tmp_path / "song 0.wav", tone(300, 2.5), 48_000)
    ([sample], _) = described(tmp_path, lm_home)
    assert sample.origins["caption"] == f"by {MODEL}, from 3 parts"


@pytest.mark.parametrize(("seconds", "lengths"), [(0.5, [0.5]), (1.0, [1.0]), (2.25, [1, 1]), (2.5, [1, 1, 0.5])])
def test_parts_hold_the_song_but_for_a_short_rest(tmp_path, monkeypatch, seconds, lengths):
    monkeypatch.setattr(listener, "HEARD_SECONDS", 1)
    monkeypatch.setattr(listener, "LEAST_SECONDS", 0.4)
    audio = tone(300, seconds)
    write_sndfile(tmp_path / "a.wav", audio, SAMPLE_RATE, subtype="FLOAT")
    parts = list(parts_of(tmp_path / "a.wav"))
    assert [part.shape[1] / SAMPLE_RATE for part in parts] == lengths
    found = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found, audio.T[:, : found.shape[1]], atol=1e-6)


def test_parts_are_put_together_by_majority():
    a = {"bpm": 90, "keyscale": "A minor", "caption": "one", "lyrics": "la"}
    b = {"bpm": 120, "keyscale": "A minor", "caption": "two"}
    c = {"bpm": 120, "keyscale": "C major", "caption": "three", "lyrics": "lo"}
    together = put_together([a, b, c])
    assert together == {"bpm": 120, "keyscale": "A minor", "caption": "two", "lyrics": "la\n\nlo", "parts": 3}


def test_the_page_of_the_audit_says_who_wrote_a_caption(tmp_path, lm_home, saying):
    saying(caption="heard by a model", bpm=90)
    assert run(songs(tmp_path, 1), lm_home, "--audit") == ExitStatus.OK
    [page] = tmp_path.glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert "heard by a model" in text
    assert "caption by tester" in text
    assert "90 bpm (estimated)" in text


def test_origins_of_another_form_are_a_mistake_with_its_place(tmp_path):
    songs(tmp_path, 1)
    path = build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None).path
    data = json.loads(path.read_text())
    data["samples"][0]["origins"] = ["x"]
    path.write_text(json.dumps(data))
    with pytest.raises(Exception, match=r"\$\.samples\[0\]\.origins: an object of names is needed"):
        read(path)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (("--caption", "lm"), "--checkpoint-dir"),
        (("--lyrics", "lm"), "--caption"),
        (("--caption", "endpoint", "--model", "x"), "--endpoint"),
        (("--caption", "endpoint", "--endpoint", "http://localhost/v1"), "--model"),
    ],
)
def test_what_is_missing_is_asked_for(tmp_path, capsys, typed, named):
    assert main(["build-dataset", "--input", str(tmp_path), *typed]) == ExitStatus.USAGE
    assert named in capsys.readouterr().err


def test_a_model_of_other_codes_is_refused_before_anything_is_heard(tmp_path, lm_home, checkpoints, capsys):
    songs(tmp_path, 1)
    command = ["build-dataset", "--input", str(tmp_path), "--caption", "lm", "--device", "cpu"]
    status = main([*command, "--checkpoint-dir", str(checkpoints), "--lm", str(lm_home / MODEL)])
    assert status == ExitStatus.USAGE
    assert "512 codes, the DiT 64,000" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / KEPT).exists()


def test_a_song_without_an_answer_keeps_what_it_had(tmp_path, saying):
    saying()
    ([sample], events) = described(songs(tmp_path, 1), tmp_path)
    assert sample.origins == {"caption": FROM_NAME, "is_instrumental": "no lyrics were found"}
    assert not [e for e in events if isinstance(e, FileFailed)]


@pytest.mark.slow
def test_every_clip_of_the_test_music_is_described(tmp_path, lm_home, monkeypatch):
    monkeypatch.setattr(decoding, "CAPTION_TOKENS", 4)  # most of the time is text,
    monkeypatch.setattr(listener, "stream", lambda path: stream(path, 2.0))  # and the rest is codes
    music = tmp_path / "music"
    shutil.copytree(tracks_dir(), music)
    assert run(music, lm_home) == ExitStatus.OK
    samples = read(music / "dataset.json").samples
    clips = {path.relative_to(music) for path in music.rglob("*.opus")}
    assert len(clips) == 28
    assert {sample.audio_path.relative_to(music) for sample in samples} == clips
    for sample in samples:
        for field in ("caption", "bpm", "keyscale", "timesignature"):
            assert getattr(sample, field), (sample.filename, field)
            assert sample.origins[field] == f"by {MODEL}"
            assert field in sample.estimated
    entries = [json.loads(line) for line in (music / KEPT).read_bytes().splitlines()]
    assert len({entry["content"] for entry in entries}) == len(entries) == 28
    assert {sample.caption for sample in samples} == {entry["answer"]["caption"] for entry in entries}


@pytest.mark.slow
def test_a_run_that_is_killed_loses_at_most_the_song_at_hand(tmp_path, lm_home):
    songs(tmp_path, 12)
    command = [sys.executable, "-m", "sidestep.cli", "build-dataset", "--input", str(tmp_path), *LISTEN]
    command += ["--checkpoint-dir", str(lm_home)]
    kept = tmp_path / KEPT
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not kept.exists() or kept.read_bytes().count(b"\n") < 2):
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = kept.read_bytes().splitlines()
    assert 2 <= len(before) < 12
    assert run(tmp_path, lm_home) == ExitStatus.OK
    after = kept.read_bytes().splitlines()
    assert after[:2] == before[:2]
    answers = [json.loads(line)["content"] for line in after if line.endswith(b"}")]
    assert len(answers) == len(set(answers)) == 12
    assert all("caption" in sample.estimated for sample in read(tmp_path / "dataset.json").samples)
