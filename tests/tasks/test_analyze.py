"""--analyze: what is missing is heard, what is known stands, and nothing is heard twice."""

import json
import os

import numpy as np
import pytest

from sidestep.audio import signals
from sidestep.audio.io import content_hash
from sidestep.audio.signals import VERSION, Estimate, autocorrelation, estimate, estimate_file, tempo, time_signature
from sidestep.cli.main import main
from sidestep.data.manifest import read
from sidestep.errors import ExitStatus
from sidestep.events import FileFailed, Notice, Progress, Table
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks import build_dataset as build_module
from sidestep.tasks.build_dataset import CACHE, analyze, build_dataset
from tests.song_library import tone, write_sndfile

HOPS_PER_SECOND = 22_050 / 256


def onsets(bpm: float, pattern: str, seconds: float = 40) -> np.ndarray:
    """Onset strength of a bar that repeats: one digit a sixteenth, its loudness."""
    strength = np.random.default_rng(0).uniform(0, 0.3, round(seconds * HOPS_PER_SECOND))
    for i in range(int(seconds * bpm / 15)):
        place = round(i * 15 / bpm * HOPS_PER_SECOND)
        if place < len(strength) - 3:
            strength[place : place + 3] += int(pattern[i % len(pattern)]) * np.array([0.5, 1, 0.5])
    return strength


FOUR = "9050505070505050"


@pytest.mark.parametrize("bpm", [62, 75, 90, 100, 120, 140])
@pytest.mark.parametrize(
    "pattern", [FOUR, "9000700080007000", "9005009080057000"], ids=["straight", "quarters", "dotted"]
)
def test_atempo_is_found_whatever_the_rhythm(bpm, pattern):
    found = tempo(autocorrelation(onsets(bpm, pattern)))
    assert any(abs(found * octave / bpm - 1) < 0.02 for octave in (0.5, 1, 2))


@pytest.mark.parametrize("bpm", [80, 100, 120])
def test_a_usualtempo_is_found_in_its_octave(bpm):
    assert tempo(autocorrelation(onsets(bpm, FOUR))) == pytest.approx(bpm, rel=0.02)


@pytest.mark.parametrize(
    ("pattern", "signature"), [("900050005000", "3"), ("900050506050", "3"), (FOUR, "4"), ("9000500070005000", "4")]
)
def test_three_beats_are_told_from_four(pattern, signature):
    assert time_signature(autocorrelation(onsets(110, pattern)), 110) == signature


def test_what_has_no_pulse_has_notempo():
    assert tempo(autocorrelation(np.random.default_rng(0).uniform(0, 1, 3000))) is None
    assert estimate(np.zeros(300_000, np.float32)) == estimate(np.ones(100, np.float32)) == Estimate()


def piece(bpm: float, root: float, minor: bool, seconds: float = 16) -> np.ndarray:
    """Float32 [S, 2] at 48 kHz: the chords I-IV-V-I with a click on every beat."""
    n = np.arange(round(seconds * 48_000))
    beat = 60 / bpm * 48_000
    chords = [[0, 3 if minor else 4, 7], [5, 8 if minor else 9, 12], [7, 11, 14], [0, 3 if minor else 4, 7]]
    notes = np.array([chords[i % 4] for i in range(int(len(n) / (4 * beat)) + 1)])
    phase = 2 * np.pi * n / 48_000
    bar = (n / (4 * beat)).astype(int)
    sound = sum(np.sin(phase * root * 2 ** (notes[bar, voice] / 12)) for voice in range(3)) + np.sin(
        phase * root / 2 * 2 ** (notes[bar, 0] / 12)
    )
    click = np.exp(-(n % beat) / 600) * np.random.default_rng(0).normal(0, 1, len(n))
    return np.repeat((0.1 * sound + 0.3 * click)[:, None], 2, axis=1).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bpm", "root", "minor", "key"),
    [(100, 261.63, False, "C major"), (120, 220.0, True, "A minor"), (90, 185.0, False, "F# major")],
)
def test_a_piece_of_knowntempo_and_key_is_heard_right(tmp_path, bpm, root, minor, key):
    write_sndfile(tmp_path / "a.wav", piece(bpm, root, minor), 48_000)
    heard = estimate_file(tmp_path / "a.wav")
    assert heard.bpm == pytest.approx(bpm, rel=0.02)
    assert heard.keyscale == key


def library(folder, **texts):
    """Two songs and a dataset.json of them; what would be heard of the first is in the cache."""
    for i, name in enumerate(("a.wav", "b.wav")):
        write_sndfile(folder / name, tone(400 + i), 48_000)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    build_dataset(BuildDatasetConfig(input=folder), lambda e: None)
    remember(folder, Estimate(90, "A minor", "3"))
    return folder / "dataset.json"


def remember(folder, estimate):
    known = {content_hash(folder / name): vars(estimate) for name in ("a.wav", "b.wav") if (folder / name).exists()}
    (folder / CACHE).parent.mkdir(exist_ok=True)
    (folder / CACHE).write_text(json.dumps({"version": VERSION, "songs": known}), encoding="utf-8")


def test_only_what_is_missing_is_filled_in_and_marked(tmp_path):
    path = library(tmp_path, **{"a.txt": "bpm: 100"})
    events = []
    analyze(path, events.append)
    a, b = read(path).samples
    assert (a.bpm, a.keyscale, a.timesignature, a.estimated) == (100, "A minor", "3", ("keyscale", "timesignature"))
    assert (b.bpm, b.keyscale, b.timesignature, b.estimated) == (
        90,
        "A minor",
        "3",
        ("bpm", "keyscale", "timesignature"),
    )
    assert [e.rows for e in events if isinstance(e, Table)] == [
        (("bpm", "1", "0"), ("keyscale", "2", "0"), ("timesignature", "2", "0"))
    ]


def test_a_rebuild_keeps_estimates_until_somebody_knows_better(tmp_path):
    path = library(tmp_path)
    analyze(path, lambda e: None)
    (tmp_path / "a.txt").write_text("key: C", encoding="utf-8")
    build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None)
    a = read(path).samples[0]
    assert (a.bpm, a.keyscale, a.estimated) == (90, "C major", ("bpm", "timesignature"))


def test_an_estimate_that_is_edited_is_one_no_more_and_one_that_is_emptied_stays_so(tmp_path):
    path = library(tmp_path)
    analyze(path, lambda e: None)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["samples"][0].update(bpm=91, keyscale="")
    path.write_text(json.dumps(data), encoding="utf-8")
    build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None)
    analyze(path, lambda e: None)
    a = read(path).samples[0]
    assert (a.bpm, a.keyscale, a.estimated) == (91, "", ("timesignature",))


def test_a_song_without_pulse_is_heard_once_and_left_open(tmp_path):
    path = library(tmp_path)
    remember(tmp_path, Estimate())
    events = []
    for _ in range(2):
        analyze(path, events.append)
    assert read(path).samples[0].bpm is None
    assert read(path).samples[0].estimated == ()
    assert not any(isinstance(e, Progress) for e in events)


def test_there_may_be_nothing_to_do(tmp_path):
    path = library(tmp_path, **{"a.txt": "bpm: 100\nkey: Am\nsignature: 4", "b.txt": "bpm: 100\nkey: Am\nsignature: 4"})
    events = []
    analyze(path, events.append)
    assert "nothing to analyze" in events[0].message
    assert isinstance(events[0], Notice)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"version": 0, "songs": {}}', f'{{"version": {VERSION}, "songs": {{"x": {{"tempo": 3}}}}}}']
)
def test_a_damaged_cache_is_no_failure(tmp_path, damage):
    path = library(tmp_path)
    (tmp_path / CACHE).write_text(damage, encoding="utf-8")
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b.wav").write_bytes(b"words")
    events = []
    analyze(path, events.append, workers=1)
    assert {e.reason.split(" ")[0] for e in events if isinstance(e, FileFailed)} == {"is"}


def test_a_song_that_cannot_be_analyzed_is_told_by_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    audio = tone()
    audio[1000] = np.nan
    write_sndfile(tmp_path / "songs" / "a.wav", audio, 48_000, subtype="FLOAT")
    words = ["build-dataset", "--input", str(tmp_path / "songs")]
    assert main(words) == ExitStatus.OK
    assert main([*words, "--analyze"]) == ExitStatus.SOME_FAILED
    assert "a.wav: has samples that are not numbers" in "".join(capsys.readouterr())


def test_without_librosa_it_is_refused_before_a_song_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sidestep.tasks.build_dataset.is_available", lambda: False)
    write_sndfile(tmp_path / "songs" / "a.wav", tone(), 48_000)
    assert main(["build-dataset", "--input", str(tmp_path / "songs"), "--analyze"]) == ExitStatus.USAGE
    assert "--analyze needs librosa" in capsys.readouterr().err
    assert not (tmp_path / "songs" / "dataset.json").exists()


def test_what_is_heard_is_the_middle_of_a_song_however_long(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(signals, "estimate", lambda mono: heard.append(mono) or Estimate())
    monkeypatch.setattr(signals.soxr, "resample", lambda mono, *rates: mono)
    for seconds in (4, 61, 95):
        ramp = np.arange(seconds * 8000) / 2**20
        write_sndfile(tmp_path / "a.flac", ramp, 8_000, format="FLAC", subtype="PCM_24")
        estimate_file(tmp_path / "a.flac")
        assert heard[-1].shape == (min(seconds, 60) * 48_000,)
        assert heard[-1].mean() == pytest.approx(ramp.mean(), rel=1e-3)


class Dies:
    """What listens to a song, and ends its process at one of them."""

    def __call__(self, path):
        if path.name == "b.wav":
            os._exit(1)
        return Estimate(bpm=100)


@pytest.mark.slow
def test_a_song_that_ends_its_process_is_left_out_and_the_others_are_heard(tmp_path, monkeypatch):
    for i, name in enumerate(("a.wav", "b.wav", "c.wav")):
        write_sndfile(tmp_path / name, tone(400 + i), 48_000)
    path = build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None).path
    monkeypatch.setattr(build_module, "estimate_file", Dies())
    events = []
    assert [sample.bpm for sample in analyze(path, events.append, workers=2).samples] == [100, None, 100]
    assert [(e.path, "died" in e.reason) for e in events if isinstance(e, FileFailed)] == [
        (str(tmp_path / "b.wav"), True)
    ]


@pytest.mark.slow
def test_songs_are_heard_in_parallel_and_the_same_content_once(tmp_path):
    for name, bpm in (("a.wav", 100), ("b.wav", 120), ("copy/of a.wav", 100)):
        write_sndfile(tmp_path / name, piece(bpm, 220.0, True), 48_000)
    (tmp_path / "bad.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    path = build_dataset(BuildDatasetConfig(input=tmp_path), lambda e: None).path
    (tmp_path / "bad.wav").write_bytes(b"words")
    events = []
    analyze(path, events.append, workers=2)
    found = {s.filename: s for s in read(path).samples}
    assert found["a.wav"].bpm == found["of a.wav"].bpm == pytest.approx(100, abs=2)
    assert found["b.wav"].bpm == pytest.approx(120, abs=2)
    assert [e.total for e in events if isinstance(e, Progress)] == [3, 3, 3]
    assert [e.path for e in events if isinstance(e, FileFailed)] == [str(tmp_path / "bad.wav")]
    events.clear()
    analyze(path, events.append)
    assert [e.current for e in events if isinstance(e, Progress)] == ["bad.wav"]  # what was heard is not heard again
