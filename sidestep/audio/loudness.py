"""Bring songs to one level. Gains only: no limiter, no compressor, nothing that changes the sound."""

import numpy as np
import pyloudnorm

PEAK_DBFS = -1.0
LOUDNESS_LUFS = -14.0

_BLOCKS_AT_ONCE = 100  # ten seconds
_WARM_UP_BLOCKS = 10  # the K-weighting filter has forgotten its start well before


def normalize(audio: np.ndarray, mode: str, sample_rate: int) -> np.ndarray:
    """`audio` float32 [2, S] times one gain, changed in place and returned: a long song is not held twice.

    none: as it is. peak: the highest sample stands at -1 dBFS. lufs: -14 LUFS integrated (ITU-R BS.1770-4), but never above a peak of -1 dBFS, so a
    dynamic song stays below -14 rather than clip. Silence stays as it is, and with lufs also what is too short (0.4 s) or too quiet (-70 LUFS) to measure.
    """
    if mode == "none":
        return audio
    if mode not in ("peak", "lufs"):
        raise ValueError(f"normalization {mode!r}: must be none, peak or lufs")
    peak = float(max(audio.max(initial=0.0), -audio.min(initial=0.0)))
    if peak <= 0:
        return audio
    to_peak_db = PEAK_DBFS - 20 * np.log10(peak)
    gain_db = to_peak_db
    if mode == "lufs":
        loudness = integrated_loudness(audio, sample_rate)
        if not np.isfinite(loudness):
            return audio
        gain_db = min(LOUDNESS_LUFS - loudness, to_peak_db)
    audio *= np.float32(10 ** (gain_db / 20))
    return audio


def integrated_loudness(audio: np.ndarray, sample_rate: int) -> float:
    """LUFS of float32 [2, S]; -inf where every block of 0.4 s is below the gate or there is none.

    pyloudnorm filters and measures the blocks, ten seconds at a time (it would otherwise hold the song several times over); the two gates of
    BS.1770-4 are then applied to the blocks of the whole song.
    """
    meter = pyloudnorm.Meter(sample_rate)
    step = sample_rate // 10  # blocks of 0.4 s start every 0.1 s
    whole_blocks = max((audio.shape[1] - 4 * step) // step + 1, 0)
    blocks: list[float] = []
    for first in range(0, whole_blocks, _BLOCKS_AT_ONCE):
        last = min(first + _BLOCKS_AT_ONCE, whole_blocks) - 1
        warm_up = min(first, _WARM_UP_BLOCKS)
        meter.integrated_loudness(audio[:, (first - warm_up) * step : (last + 4) * step].T)
        blocks += meter.blockwise_loudness[warm_up : warm_up + last - first + 1]
    powers = 10 ** ((np.array(blocks, np.float64) + 0.691) / 10)
    audible = powers[powers >= 10 ** ((-70 + 0.691) / 10)]
    if not len(audible):
        return -np.inf
    gated = audible[audible > audible.mean() / 10]
    return float(-0.691 + 10 * np.log10(gated.mean()))
