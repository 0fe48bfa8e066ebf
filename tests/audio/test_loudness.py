"""One gain brings a song to one level, and never clips."""

import tracemalloc

import numpy as np
import pyloudnorm
import pytest

from sidestep.audio.io import PIECE_SAMPLES
from sidestep.audio.signals import LevelMeter

RATE = 48_000


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0, level, (2, round(seconds * RATE)))).astype(np.float32).clip(-1, 1)


def heard(audio: np.ndarray, piece_samples: int = PIECE_SAMPLES, mode: str = "lufs") -> LevelMeter:
    meter = LevelMeter(mode)
    for start in range(0, audio.shape[1], piece_samples):
        meter.add(audio[:, start : start + piece_samples])
    return meter


def normalize(audio: np.ndarray, mode: str) -> np.ndarray:
    return audio * np.float32(heard(audio, mode=mode).gain())


@pytest.mark.parametrize("level", [0.001, 0.05, 0.3])
def test_peak_puts_the_highest_sample_at_minus_one_dbfs(level):
    assert np.abs(normalize(noise(1, level), "peak")).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)


@pytest.mark.parametrize("level", [0.001, 0.02, 0.1])
def test_lufs_brings_a_song_to_minus_fourteen(level):
    loud = normalize(noise(3, level).clip(-2 * level, 2 * level), "lufs")
    assert pyloudnorm.Meter(RATE).integrated_loudness(loud.T) == pytest.approx(-14, abs=0.05)


def test_lufs_of_a_dynamic_song_stops_below_clipping():
    audio = noise(3, 0.001)
    audio[:, RATE] = 0.9
    loud = normalize(audio, "lufs")
    assert np.abs(loud).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    assert heard(loud).loudness_lufs() < -14


def test_a_gain_is_all_that_changes():
    audio = noise(1, 0.1)
    for mode in ("peak", "lufs"):
        ratio = normalize(audio, mode) / audio
        assert np.ptp(ratio) < 1e-5


@pytest.mark.parametrize("mode", ["none", "peak", "lufs"])
def test_silence_stays_silence(mode):
    audio = np.zeros((2, RATE), np.float32)
    assert not normalize(audio, mode).any()


def test_lufs_leaves_what_is_too_short_or_too_quiet_to_measure():
    for audio in (noise(0.3, 0.1), noise(1, 1e-6), np.zeros((2, 0), np.float32)):
        np.testing.assert_array_equal(normalize(audio, "lufs"), audio)


@pytest.mark.parametrize("seconds", [0.4, 0.5, 9.9, 10.0, 11.0, 61.0])
@pytest.mark.parametrize("piece_samples", [PIECE_SAMPLES, 7_777])
def test_loudness_measured_in_pieces_equals_the_whole(seconds, piece_samples):
    audio = noise(seconds, 0.1) * np.linspace(0.01, 1, round(seconds * RATE), dtype=np.float32)
    assert heard(audio, piece_samples).loudness_lufs() == pytest.approx(
        pyloudnorm.Meter(RATE).integrated_loudness(audio.T), abs=1e-6
    )


def test_what_is_heard_is_not_kept():
    piece, meter = noise(10, 0.1), LevelMeter()
    tracemalloc.start()
    for _ in range(10):
        meter.add(piece)
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert meter.samples == 10 * PIECE_SAMPLES
    assert largest < 12 * piece.nbytes


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="none, peak or lufs"):
        normalize(noise(1, 0.1), "loud")
