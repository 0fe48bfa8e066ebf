"""Audio files: find them, ask how long they are, decode them to float32 [2, S] at 48 kHz, write 24-bit FLAC.

The content decides how a file is read, not its name: libsndfile first (wav, flac, ogg, opus, aiff, caf, w64), else
FFmpeg through PyAV (m4a, aac, alac, wma, webm, wv, …). What is called mp3 goes to FFmpeg at once, because libsndfile's
decoder writes its remarks on damaged files into the terminal. Rules:

- mono is doubled, stereo is kept as it is;
- more channels are folded as in ITU-R BS.775: centre and surrounds at -3 dB, a single back channel at -6 dB on both
  sides, LFE left out; each side is then divided by the sum of its weights, so that folding never clips. Channels
  without a known position go to both sides;
- other sample rates are resampled with soxr (HQ) while the file streams through, so memory holds the result and one
  block, never the source too;
- a file that is damaged or breaks off gives what can be decoded: `probe` says what the header promises, `is_cut_short`
  compares;
- a file without a single decodable sample, or with samples that are not numbers, is an AudioError.
"""

import hashlib
import itertools
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr

from sidestep.files import replacing

SAMPLE_RATE = 48_000
AUDIO_SUFFIXES = frozenset(
    {
        *(".wav", ".wave", ".w64", ".rf64", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".spx", ".m4a", ".m4b"),
        *(".mp4", ".aac", ".aif", ".aiff", ".aifc", ".caf", ".au", ".snd", ".wma", ".asf", ".wv", ".ape", ".tta"),
        *(".mka", ".webm", ".ac3", ".eac3", ".dts", ".amr"),
    }
)
NOT_THE_USERS = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".Trash", ".Trashes"}
)  # folders that systems make

_NOT_FOR_SNDFILE = frozenset({".mp3", ".mp2", ".raw"})  # a raw file has no header; soundfile asks for its format
_BLOCK_SAMPLES = 8192  # small, so that one block is nothing beside a song
_HALF_POWER = 0.5**0.5
_LEFT_RIGHT = {  # channel name -> weight on (left, right)
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "DL": (1.0, 0.0),
    "DR": (0.0, 1.0),
    "FC": (_HALF_POWER, _HALF_POWER),
    "FLC": (_HALF_POWER, 0.0),
    "FRC": (0.0, _HALF_POWER),
    "BL": (_HALF_POWER, 0.0),
    "BR": (0.0, _HALF_POWER),
    "SL": (_HALF_POWER, 0.0),
    "SR": (0.0, _HALF_POWER),
    "BC": (0.5, 0.5),
    "LFE": (0.0, 0.0),
    "LFE2": (0.0, 0.0),
}
_WAV_ORDER = {  # what libsndfile hands out, by number of channels
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


class AudioError(Exception):
    """A file that cannot be used as audio, and why, in words for the user."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self):
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself. `seconds`: as its header says, or counted; `format`: such as mov/aac."""

    seconds: float
    sample_rate: int
    channels: int
    format: str


@dataclass(frozen=True)
class _Source:
    """An opened file. `blocks` yields float32 [n, C]; `frames`: the promised number of samples per channel or None."""

    sample_rate: int
    positions: tuple[str, ...]
    frames: int | None
    format: str
    blocks: Callable[[], Iterator[np.ndarray]]


def find_audio(folder: Path, unreadable: Callable[[Path, str], None] | None = None) -> list[Path]:
    """Every audio file below `folder`, by suffix, in the order of their relative paths.

    Each folder is entered once, however many links lead to it. Left out: folders (whatever their name), the `._` files
    that macOS leaves and the folders in NOT_THE_USERS. A dangling link is kept, so that decoding reports it.
    `unreadable(path, reason)` hears of folders that cannot be listed.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    links: list[Path] = []
    waiting = [folder]
    while waiting or links:
        if not waiting:  # real folders first: a link to one of them adds nothing
            waiting.append(links.pop(0))
        here = waiting.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                listing = sorted(entries, key=lambda e: e.name)
        except OSError as error:
            if unreadable:
                unreadable(here, error.strerror or str(error))
            continue
        for entry in listing:
            path = here / entry.name
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that points at itself
                is_folder = False
            if is_folder:
                if entry.name not in NOT_THE_USERS:
                    (links if entry.is_symlink() else waiting).append(path)
            elif path.suffix.lower() in AUDIO_SUFFIXES and not entry.name.startswith("._"):
                found.append(path)
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def probe(path: Path) -> AudioInfo:
    """Length, sample rate and channels, without decoding the file where its header says them. Raises AudioError."""
    with _opened(path) as source:
        frames = source.frames if source.frames is not None else sum(len(block) for block in source.blocks())
        if not frames:
            raise AudioError(path, "holds no audio")
        return AudioInfo(
            seconds=frames / source.sample_rate,
            sample_rate=source.sample_rate,
            channels=len(source.positions),
            format=source.format,
        )


def decode(path: Path, max_seconds: float = 0.0) -> np.ndarray:
    """The file as float32 [2, S] at 48 kHz. Raises AudioError.

    With `max_seconds` above 0 at most so much of it, equal to the start of the whole.
    """
    limit = round(max_seconds * SAMPLE_RATE) if max_seconds > 0 else sys.maxsize
    with _opened(path) as source:
        weights = np.array([_LEFT_RIGHT.get(name, (0.5, 0.5)) for name in source.positions], np.float32)
        weights /= np.maximum(weights.sum(0), 1e-9)
        resampler = None
        if source.sample_rate != SAMPLE_RATE:
            resampler = soxr.ResampleStream(source.sample_rate, SAMPLE_RATE, 2, dtype="float32")
        promised = round((source.frames or 0) * SAMPLE_RATE / source.sample_rate) + 1
        result = _Growing(min(promised, limit, 20 * 60 * SAMPLE_RATE))  # a broken header may promise terabytes
        for block in source.blocks():
            if block.shape[1] != 2:
                block = np.repeat(block, 2, axis=1) if block.shape[1] == 1 else block @ weights
            result.append(resampler.resample_chunk(block) if resampler else block)
            if result.length >= limit:
                break
        else:
            if resampler:
                result.append(resampler.resample_chunk(np.empty((0, 2), np.float32), last=True))
    audio = result.samples(limit)
    if not audio.shape[1]:
        raise AudioError(path, "holds no audio")
    for start in range(0, audio.shape[1], SAMPLE_RATE * 10):
        if not np.isfinite(audio[:, start : start + SAMPLE_RATE * 10]).all():
            seconds = start / SAMPLE_RATE
            raise AudioError(path, f"has samples that are not numbers (NaN or infinite) after {seconds:.0f} s")
    return audio


def is_cut_short(info: AudioInfo, decoded_seconds: float) -> bool:
    """Whether clearly less was decoded than the header promised: more than a second and more than 1 %."""
    return info.seconds - decoded_seconds > max(1.0, 0.01 * info.seconds)


def content_hash(path: Path) -> str:
    """Hex digest of the file's bytes (blake2b, 32 digits). Raises AudioError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise AudioError(path, f"cannot be read: {error.strerror or error}") from error


class _Growing:
    """A [2, S] buffer that is filled block by block, so that the result never exists twice."""

    def __init__(self, expected: int):
        self._buffer = np.empty((2, max(expected, 1)), np.float32)
        self.length = 0

    def append(self, block: np.ndarray) -> None:
        """Add float32 [n, 2]."""
        end = self.length + len(block)
        if end > self._buffer.shape[1]:
            larger = np.empty((2, max(end, self._buffer.shape[1] * 3 // 2)), np.float32)
            larger[:, : self.length] = self._buffer[:, : self.length]
            self._buffer = larger
        self._buffer[:, self.length : end] = block.T
        self.length = end

    def samples(self, limit: int) -> np.ndarray:
        """Float32 [2, min(S, limit)], contiguous: the second row is moved up to the first within the buffer."""
        length, capacity = min(self.length, limit), self._buffer.shape[1]
        flat = self._buffer.reshape(-1)
        if length < capacity:
            for start in range(0, length, SAMPLE_RATE):
                end = min(start + SAMPLE_RATE, length)
                flat[length + start : length + end] = flat[capacity + start : capacity + end]
        return flat[: 2 * length].reshape(2, length)


@contextmanager
def _opened(path: Path) -> Generator[_Source, None, None]:
    """The file, opened by whichever library can read it. Every failure of either is an AudioError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        if not status.st_size:
            raise AudioError(path, "is empty (0 bytes)")
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise AudioError(path, f"cannot be read: {error.strerror or error}") from error
    with ExitStack() as stack:
        file = None
        if path.suffix.lower() not in _NOT_FOR_SNDFILE:
            with suppress(soundfile.LibsndfileError, UnicodeError):
                name: Any = str(path) if sys.platform == "win32" else os.fsencode(path)  # bytes are taken too
                file = stack.enter_context(soundfile.SoundFile(name))
        yield _sndfile(path, file) if file else stack.enter_context(_ffmpeg(path))


def _sndfile(path: Path, file: soundfile.SoundFile) -> _Source:
    def blocks() -> Iterator[np.ndarray]:
        done = 0
        try:
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                done += len(block)
                yield block
        except soundfile.LibsndfileError:  # damaged here; FFmpeg passes over what it cannot decode
            with suppress(AudioError), _ffmpeg(path) as rest:
                if (rest.sample_rate, len(rest.positions)) != (file.samplerate, file.channels):
                    return
                for block in rest.blocks():
                    if len(block) > done:
                        yield block[done:]
                    done = max(done - len(block), 0)

    names = _WAV_ORDER.get(file.channels, tuple(f"channel {i}" for i in range(file.channels)))
    frames = file.frames if 0 < file.frames < 1 << 48 else None
    return _Source(file.samplerate, names, frames, f"{file.format}/{file.subtype}", blocks)


@contextmanager
def _ffmpeg(path: Path) -> Generator[_Source, None, None]:
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(path, f"is no audio file that can be read ({reason})") from error
    with container:
        if not container.streams.audio:
            raise AudioError(path, "holds no audio stream")
        stream = container.streams.audio[0]
        stream.codec_context.thread_type = "AUTO"
        decoded = _decoded(container, stream)
        first = next(decoded, None)
        if first is None:
            raise AudioError(path, "holds no audio that can be decoded")
        rate = first.sample_rate  # of what comes out: HE-AAC says half of it in its header
        positions = tuple(channel.name for channel in first.layout.channels)
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / av.time_base
        frames = round(seconds * rate) if 0 < seconds < 1e7 else None
        convert = av.AudioResampler(format="fltp", layout=first.layout, rate=rate)

        def blocks() -> Iterator[np.ndarray]:
            parts, held = [], 0
            for frame in itertools.chain([first], decoded):
                try:
                    converted = convert.resample(frame)
                except (ValueError, av.FFmpegError) as error:
                    raise AudioError(path, "changes its sample rate or channels midway") from error
                for part in converted:
                    parts.append(part.to_ndarray().T)
                    held += len(parts[-1])
                if held >= _BLOCK_SAMPLES:
                    yield np.concatenate(parts)
                    parts, held = [], 0
            if parts:
                yield np.concatenate(parts)

        form = f"{container.format.name.split(',')[0]}/{stream.codec_context.name}"
        yield _Source(rate, positions, frames, form, blocks)


def _decoded(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """Frames of one stream until the file breaks off; packets that do not decode are passed over, as players do."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError):
            return
        with suppress(av.FFmpegError):
            yield from [frame for frame in packet.decode() if frame.samples]


def write_flac(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write float32 [2, S] as a whole file or not at all. Raises OSError."""
    with replacing(path) as temporary:
        try:
            soundfile.write(temporary, audio.T, sample_rate, format="FLAC", subtype="PCM_24")
        except soundfile.LibsndfileError as error:
            raise OSError(f"{path}: cannot be written ({error.error_string})") from error
