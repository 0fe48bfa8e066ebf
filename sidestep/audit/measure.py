"""What can be measured of one song: length, level, silence, clipping, and two fingerprints of its sound."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sidestep.audio.io import SAMPLE_RATE, AudioInfo, decode, is_cut_short, probe
from sidestep.audio.loudness import integrated_loudness

VERSION = 1  # of the measurements: raised whenever they change
SILENCE_DBFS = -60.0  # a block of 0.1 s below this is silent
ENVELOPE_POINTS = 160

_BLOCK = SAMPLE_RATE // 10
_FLAT_SAMPLES = 3  # so many samples in a row at one song's own peak are a peak that was cut off
_FRAME = 2 * SAMPLE_RATE
_BANDS = 12


@dataclass(frozen=True)
class Measurement:
    """One song. Levels in dB, `silence` a share of its length, `clipped` in samples; `sound` is equal for equal samples, whatever the format.

    `envelope`: peaks of ENVELOPE_POINTS equal parts, 0 to 1. `shape`: level in 12 bands every two seconds, for finding the same recording in another coding.
    """

    seconds: float
    sample_rate: int
    channels: int
    format: str
    cut_short: bool
    peak_db: float
    loudness_lufs: float | None
    silence: float
    clipped: int
    sound: str
    envelope: tuple[float, ...]
    shape: tuple[int, ...]


def measure(path: Path) -> Measurement:
    """Decode one song and measure it. Raises AudioError."""
    info, audio = probe(path), decode(path)
    return measure_audio(info, audio)


def measure_audio(info: AudioInfo, audio: np.ndarray) -> Measurement:
    """The same of float32 [2, S] at 48 kHz that was decoded from a file with header `info`."""
    seconds = audio.shape[1] / SAMPLE_RATE
    peak = float(max(audio.max(), -audio.min(), 1e-6))
    loudness = integrated_loudness(audio, SAMPLE_RATE)
    return Measurement(
        seconds=seconds,
        sample_rate=info.sample_rate,
        channels=info.channels,
        format=info.format,
        cut_short=is_cut_short(info, seconds),
        peak_db=20 * float(np.log10(peak)),
        loudness_lufs=float(loudness) if np.isfinite(loudness) else None,
        silence=_silence(audio),
        clipped=_clipped(audio, peak),
        sound=_sound(audio),
        envelope=_envelope(audio),
        shape=_shape(audio),
    )


def _silence(audio: np.ndarray) -> float:
    """The share of blocks of 0.1 s whose level is below SILENCE_DBFS."""
    count = max(audio.shape[1] // _BLOCK, 1)
    blocks = audio[:, : count * _BLOCK].reshape(2, count, -1)
    power = np.einsum("cbs,cbs->b", blocks, blocks, dtype=np.float64) / (2 * blocks.shape[2])
    return float(np.mean(power < 10 ** (SILENCE_DBFS / 10)))


def _clipped(audio: np.ndarray, peak: float) -> int:
    """Samples in runs of three and more at the highest level, where that is within 1 dB of full scale or above; and all beyond full scale."""
    if peak < 10 ** (-1 / 20):
        return 0
    clipped = 0
    for channel in audio:
        flat = np.abs(channel) >= min(peak, 1.0) * 0.9999
        edges = np.flatnonzero(np.diff(np.concatenate(([False], flat, [False])).astype(np.int8)))
        runs = edges[1::2] - edges[::2]
        clipped += int(runs[runs >= _FLAT_SAMPLES].sum())
    return clipped


def _sound(audio: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, audio.shape[1], SAMPLE_RATE * 10):
        part = audio[:, start : start + SAMPLE_RATE * 10]
        digest.update((part * 32767).round().astype(np.int32).tobytes())
    return digest.hexdigest()


def _envelope(audio: np.ndarray) -> tuple[float, ...]:
    edges = np.linspace(0, audio.shape[1], ENVELOPE_POINTS + 1).astype(int)[:-1]
    starts = np.unique(edges)
    highest = np.maximum(np.maximum.reduceat(audio, starts, axis=1), -np.minimum.reduceat(audio, starts, axis=1)).max(axis=0)
    return tuple(round(float(min(v, 1.0)), 3) for v in highest)


def _shape(audio: np.ndarray) -> tuple[int, ...]:
    """Decibels in 12 bands from 60 Hz to 12 kHz, one frame every two seconds, frame after frame."""
    count = audio.shape[1] // _FRAME
    edges = np.searchsorted(np.fft.rfftfreq(_FRAME, 1 / SAMPLE_RATE), np.geomspace(60, 12_000, _BANDS + 1))
    window = np.hanning(_FRAME).astype(np.float32)
    levels = []
    for i in range(count):
        mono = audio[:, i * _FRAME : (i + 1) * _FRAME].mean(axis=0) * window
        power = np.abs(np.fft.rfft(mono)) ** 2
        levels += [round(10 * float(np.log10(power[a:b].mean() + 1e-6))) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return tuple(levels)


def same_recording(a: Measurement, b: Measurement) -> bool:
    """Whether two songs are one recording in two codings: equally long within a second, and their levels rise and fall together in every band."""
    if abs(a.seconds - b.seconds) > 1.0:
        return False
    length = min(len(a.shape), len(b.shape)) // _BANDS
    if length < 5:
        return False
    first, second = (np.array(m.shape[: length * _BANDS], np.float64).reshape(length, _BANDS) for m in (a, b))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return bool(scale > 0 and (first * second).sum() / scale > 0.97)
