"""What can be heard in a song: loudness, and (with librosa, the extra `analyze`) tempo, key and time signature.

Loudness. Songs are brought to one level by one gain each: no limiter, no compressor, nothing that changes the sound.

Tempo. The autocorrelation of the onset strength is read at half a beat, one, two, four and eight beats of every tempo
from 40 to 220, and the sum weighed with how likely people tap it (log-normal around 105 bpm; Parncutt 1994, McKinney &
Moelants 2006). The long lags tell a beat from a dotted rhythm, which repeats as strongly from note to note but not from
bar to bar.

Key. Constant-Q chroma of five octaves of the harmonic part, correlated with the 24 rotations of the key profiles of
Albrecht & Shanahan ("The use of large corpora to train a new type of key-finding algorithm", Music Perception 2013).

Time signature. Whether onsets repeat more after three beats or after four. Two and six are not told from them.

What has no pulse or no tonality gives None. Accuracy: `benchmarks/analyze.py`.
"""

from collections import deque
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from pyloudnorm import IIRfilter
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter

from sidestep.audio.io import PIECE_SAMPLES, SAMPLE_RATE, probe, stream

# The extra may not be installed; `is_available` says so before anything is asked of it.
librosa: Any = import_module("librosa") if find_spec("librosa") else None

PEAK_DBFS = -1.0
LOUDNESS_LUFS = -14.0

TENTH = SAMPLE_RATE // 10


class LevelMeter:
    """Length, peak and integrated loudness (ITU-R BS.1770-4) of a song, of which only one piece need be in memory.

    Loudness takes most of the time, and is left out where `mode`, the one that `gain` will be asked for, needs none.
    """

    def __init__(self, mode: str = "lufs") -> None:
        if mode not in ("none", "peak", "lufs"):
            raise ValueError(f"normalization {mode!r}: must be none, peak or lufs")
        self.mode, self.samples, self.peak = mode, 0, 0.0
        # K-weighting.
        self._filters = (
            IIRfilter(4.0, 0.5**0.5, 1500.0, SAMPLE_RATE, "high_shelf"),
            IIRfilter(0.0, 0.5, 38.0, SAMPLE_RATE, "high_pass"),
        )
        self._states = [np.zeros((2, 2)) for _ in self._filters]
        self._rest = np.empty((2, 0))
        self._powers = [np.empty(0)]  # of each tenth of a second, both channels together

    def add(self, piece: np.ndarray) -> None:
        """Hear the next piece, float32 [2, n] at 48 kHz."""
        self.samples += piece.shape[1]
        self.peak = max(self.peak, float(np.abs(piece).max(initial=0.0)))
        if self.mode != "lufs":
            return
        for i, weighting in enumerate(self._filters):
            piece, self._states[i] = lfilter(weighting.b, weighting.a, piece, zi=self._states[i])
        piece = np.concatenate((self._rest, piece), axis=1)
        whole = piece.shape[1] // TENTH * TENTH
        self._powers.append(np.square(piece[:, :whole]).reshape(2, -1, TENTH).mean(axis=2).sum(axis=0))
        self._rest = piece[:, whole:]

    def loudness_lufs(self) -> float:
        """LUFS; -inf where every block of 0.4 s is below the gate or there is none."""
        tenths = np.concatenate(self._powers)
        if len(tenths) < 4:
            return -np.inf
        powers = np.convolve(tenths, np.full(4, 0.25), "valid")
        audible = powers[powers >= 10 ** ((-70 + 0.691) / 10)]
        if not len(audible):
            return -np.inf
        gated = audible[audible > audible.mean() / 10]
        return float(-0.691 + 10 * np.log10(gated.mean()))

    def gain(self) -> float:
        """The factor that brings the song to its level.

        none: 1. peak: the highest sample stands at -1 dBFS. lufs: -14 LUFS, but never above a peak of -1 dBFS, so a
        dynamic song stays below -14 rather than clip. Silence stays as it is, and with lufs also what is too short
        (0.4 s) or too quiet (-70 LUFS) to measure.
        """
        loudness = self.loudness_lufs() if self.mode == "lufs" else None
        if self.mode == "none" or not self.peak or loudness == -np.inf:
            return 1.0
        gain_db = PEAK_DBFS - 20 * np.log10(self.peak)
        if loudness is not None:
            gain_db = min(LOUDNESS_LUFS - loudness, gain_db)
        return float(10 ** (gain_db / 20))


VERSION = 1  # of the results: raised whenever they change
SECONDS = 60  # from the middle of the song: enough to hear it, and the cost stays bounded

_RATE = 22_050
_HOP = 256
_TEMPOS = np.exp(np.arange(np.log(40), np.log(220), 0.005))
_BEATS = {0.5: 0.5, 1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}  # lag in beats → weight
_USUAL_TEMPO, _SPREAD_OCTAVES = 105.0, 0.7
_LEAST_PULSE = 0.1  # a mean autocorrelation: white noise stays below 0.06, music with a beat above 0.3
_LEAST_TONALITY = 0.45  # a correlation: noise reaches 0.4, music is above 0.6
_NOTES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_MAJOR = (0.238, 0.006, 0.111, 0.006, 0.137, 0.094, 0.016, 0.214, 0.009, 0.080, 0.008, 0.081)
_MINOR = (0.220, 0.006, 0.104, 0.123, 0.019, 0.103, 0.012, 0.214, 0.062, 0.022, 0.061, 0.052)


@dataclass(frozen=True)
class Estimate:
    """What was heard; None where nothing could be told."""

    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | None = None


def is_available() -> bool:
    """Whether librosa is installed."""
    return librosa is not None


def estimate_file(path: Path) -> Estimate:
    """Tempo, key and time signature of an audio file. Raises AudioError."""
    end = round((probe(path).seconds + SECONDS) / 2 * SAMPLE_RATE)
    heard: deque[np.ndarray] = deque(maxlen=SECONDS * SAMPLE_RATE // PIECE_SAMPLES + 1)
    total = 0
    for piece in stream(path):
        heard.append(piece.mean(axis=0))
        total += piece.shape[1]
        if total >= end:
            break
    mono = np.concatenate(heard)
    middle = mono[: len(mono) - max(total - end, 0)][-SECONDS * SAMPLE_RATE :]
    return estimate(soxr.resample(middle, SAMPLE_RATE, _RATE))


def estimate(mono: np.ndarray) -> Estimate:
    """The same of float32 [S] at 22,050 Hz."""
    if len(mono) < 5 * _RATE or np.abs(mono).max() < 1e-4:
        return Estimate()
    onsets = librosa.onset.onset_strength(y=mono, sr=_RATE, hop_length=_HOP, n_mels=128, fmax=10_000)
    usual = gaussian_filter1d(onsets, 0.5 * _RATE / _HOP)
    # Onsets less what is usual around them, smoothed over 35 ms: players are not exact.
    repeats = autocorrelation(gaussian_filter1d(np.maximum(onsets - usual, 0), 3))
    bpm = tempo(repeats)
    return Estimate(
        bpm=round(bpm) if bpm else None,
        keyscale=_key(mono),
        timesignature=time_signature(repeats, bpm) if bpm else None,
    )


def autocorrelation(signal: np.ndarray) -> np.ndarray:
    """Unbiased autocorrelation over lags of up to 16 s or half of the signal, 1 at lag 0."""
    signal = signal - signal.mean()
    n = len(signal)
    power = np.abs(np.fft.rfft(signal, 2 * n)) ** 2
    lags = min(16 * _RATE // _HOP, n // 2)
    repeats = np.fft.irfft(power)[:lags] / (n - np.arange(lags))
    return repeats / max(repeats[0], 1e-12)


def _at(repeats: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The autocorrelation at lags in seconds; 0 beyond its end."""
    return np.interp(seconds * _RATE / _HOP, np.arange(len(repeats)), repeats, right=0.0)


def tempo(repeats: np.ndarray) -> float | None:
    """Beats per minute of an autocorrelation; None where nothing repeats enough."""
    beat = 60 / _TEMPOS
    strength = sum((weight * _at(repeats, beat * beats) for beats, weight in _BEATS.items()), np.zeros_like(beat))
    strength /= sum(_BEATS.values())
    liking = np.exp(-0.5 * (np.log2(_TEMPOS / _USUAL_TEMPO) / _SPREAD_OCTAVES) ** 2)
    best = int(np.argmax(strength * liking))
    return float(_TEMPOS[best]) if strength[best] >= _LEAST_PULSE else None


def time_signature(repeats: np.ndarray, bpm: float) -> str:
    """Beats in a bar, "3" or "4", of an autocorrelation."""
    threes, fours, twos = (float(_at(repeats, np.array(beats) * 60 / bpm).mean()) for beats in ((3, 6), (4, 8), (2, 4)))
    return "3" if threes > max(fours, twos) else "4"


def _key(mono: np.ndarray) -> str | None:
    harmonic = librosa.effects.harmonic(mono)
    tuning = librosa.estimate_tuning(y=harmonic, sr=_RATE, bins_per_octave=36)
    notes = np.abs(
        librosa.cqt(
            harmonic,
            sr=_RATE,
            hop_length=1024,
            fmin=librosa.note_to_hz("C1"),
            n_bins=180,
            bins_per_octave=36,
            tuning=tuning,
        )
    )
    thirds = np.roll(notes, 1, axis=0).reshape(5, 12, 3, -1)  # three bins a semitone, the middle one in tune
    chroma = thirds.sum(axis=(0, 2))
    chroma /= chroma.max(axis=0, keepdims=True) + 1e-4 * chroma.max() + 1e-9
    mean = chroma.mean(axis=1)
    best, key = -1.0, None
    for profile, mode in ((_MAJOR, "major"), (_MINOR, "minor")):
        for root in range(12):
            likeness = np.corrcoef(np.roll(profile, root), mean)[0, 1]
            if likeness > best:
                best, key = likeness, f"{_NOTES[root]} {mode}"
    return key if best >= _LEAST_TONALITY else None
