"""Audio files: find them, ask how long they are, stream them as float32 at 48 kHz, write 24-bit FLAC.

The content decides how a file is read, not its name: libsndfile first (wav, flac, ogg, opus, aiff, caf, w64), else
FFmpeg through PyAV (m4a, aac, alac, wma, webm, wv, …). What is mp3 or called so goes to FFmpeg, because libsndfile's
decoder writes its remarks on damaged files into the terminal; so does what libsndfile finds no length in, such as the
WAV files of recorders that never came back to fill in their headers. Rules:

- a file is heard in pieces of ten seconds, so memory holds no more than the caller keeps, however long it is or says
  that it is;
- mono is doubled, stereo is kept as it is;
- more channels are folded as in ITU-R BS.775: centre and surrounds at -3 dB, a single back channel at -6 dB on both
  sides, LFE left out; each side is then divided by the sum of its weights, so that folding never clips. Channels
  without a known position go to both sides;
- other sample rates are resampled with soxr (HQ). Rate and channels may change on the way, as in mp3 files that were
  put together and in chained Ogg files, whose links are read one after the other;
- a file that is damaged or breaks off gives what can be decoded: `probe` says what the header promises, `is_cut_short`
  compares. A length that is only guessed from a bit rate is no promise; there packets are counted;
- a file without a single decodable sample, with samples that are not numbers or far beyond full scale, or of more than
  LONGEST_SECONDS is an AudioError, and so is whatever is no regular file: opening a pipe would wait for ever.
"""

import hashlib
import io
import itertools
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr

from sidestep.files import replacing
from sidestep.settings.path_checks import AUDIO_SUFFIXES
from sidestep.words import clock

SAMPLE_RATE = 48_000
PASSED_OVER = frozenset(  # music, or what holds some, that is not taken: its user will miss it
    {
        *(".dsf", ".dff", ".mpc", ".ra", ".rm", ".shn", ".tak", ".ofr", ".m4p", ".aax", ".aa", ".icloud", ".mid"),
        *(".midi", ".mkv", ".mov", ".avi", ".3gp", ".flv", ".wmv", ".mpg", ".mpeg", ".crdownload", ".part"),
    }
)
NOT_THE_USERS = frozenset(
    {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".Trash", ".Trashes"}
)  # folders that systems make

PIECE_SAMPLES = 10 * SAMPLE_RATE
LONGEST_SECONDS = 6 * 3600  # of one file: what is made of a song is held in memory later
LOUDEST = 100.0  # where full scale is 1; mixes in float reach 10, and samples in whole numbers 32,768
SAMPLE_RATES = range(1_000, 1_000_000)  # others are damage, and resampling them would take all memory

_NOT_FOR_SNDFILE = frozenset({".mp3", ".mp2"})
_GUESSED = frozenset({"mp3", "aac", "loas", "ac3", "eac3", "dts", "truehd", "amr"})  # no container, no length
_BLOCK_SAMPLES = 8192  # small, so that one block is nothing beside a song
_HALF_POWER = 0.5**0.5
_NO_AUDIO = {  # what a file is that only has the name of audio → how it begins
    "is a Git LFS pointer, not the audio itself; fetch that with: git lfs pull": (b"version https://git-lfs",),
    "is a git-annex pointer, not the audio itself; fetch that with: git annex get": (b"/annex/objects/",),
    "is a web page or a server's message, not audio; download the song itself once more": (
        *(b"<!doctype", b"<html", b"<head", b"<!--", b"<?xml", b'{"', b"{\n"),
    ),
    "is an archive; unpack it": (b"pk\x03\x04", b"rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c", b"\x1f\x8b"),
}
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


class _Block(NamedTuple):
    """Samples float32 [n, C] with their rate and where their channels stand."""

    samples: np.ndarray
    sample_rate: int
    positions: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """An opened file. `seconds` reads what it must to tell the length; `blocks` decodes."""

    sample_rate: int
    channels: int
    format: str
    seconds: Callable[[], float]
    blocks: Callable[[], Iterator[_Block]]


def find_audio(
    folder: Path, unreadable: Callable[[Path, str], None] | None = None, passed_over: Counter[str] | None = None
) -> list[Path]:
    """Every audio file below `folder`, by suffix, in the order of their relative paths.

    Each folder is entered once, however many links lead to it. Left out: folders (whatever their name), the `._` files
    that macOS leaves and the folders in NOT_THE_USERS. A dangling link is kept, so that decoding reports it.
    `unreadable(path, reason)` hears of folders that cannot be listed; `passed_over` counts the suffixes of PASSED_OVER.
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
            elif (suffix := path.suffix.lower()) in AUDIO_SUFFIXES and not entry.name.startswith("._"):
                found.append(path)
            elif suffix in PASSED_OVER and passed_over is not None and not entry.name.startswith("._"):
                passed_over[suffix] += 1
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def probe(path: Path) -> AudioInfo:
    """Length, sample rate and channels, without decoding the file where it says them. Raises AudioError."""
    parts = [(source, source.seconds()) for source in _sources(path)]
    seconds = sum(seconds for _, seconds in parts)
    if not seconds:
        raise AudioError(path, "holds no audio")
    first = parts[0][0]
    return AudioInfo(seconds, first.sample_rate, first.channels, first.format)


def stream(path: Path, max_seconds: float = 0.0) -> Iterator[np.ndarray]:
    """The file as float32 [2, n] at 48 kHz, n being PIECE_SAMPLES but in the last piece. Raises AudioError.

    With `max_seconds` above 0 at most so much of it, equal to the start of the whole.
    """
    longest = LONGEST_SECONDS * SAMPLE_RATE
    limit = round(max_seconds * SAMPLE_RATE) if max_seconds > 0 else longest + 1
    piece, filled, total = np.empty((2, PIECE_SAMPLES), np.float32), 0, 0
    for block in _stereo(path):
        rest = block[: limit - total]
        total += len(rest)
        while len(rest):
            taken = rest[: PIECE_SAMPLES - filled]
            piece[:, filled : filled + len(taken)] = taken.T
            filled, rest = filled + len(taken), rest[len(taken) :]
            if filled == PIECE_SAMPLES:
                yield piece
                piece, filled = np.empty_like(piece), 0
        if total >= limit:
            break
    if not total:
        raise AudioError(path, "holds no audio")
    if not max_seconds and total > longest:
        raise AudioError(path, f"is longer than {clock(LONGEST_SECONDS)}; cut it into songs, or use --max-duration")
    if filled:
        yield piece[:, :filled].copy()


def decode(path: Path, max_seconds: float = 0.0) -> np.ndarray:
    """All that `stream` gives as one float32 [2, S]: 23 MB a minute. Raises AudioError."""
    return np.concatenate(list(stream(path, max_seconds)), axis=1)


def is_cut_short(info: AudioInfo, decoded_seconds: float) -> bool:
    """Whether clearly less was decoded than the header promised: more than a second and more than 1 %."""
    return info.seconds - decoded_seconds > max(1.0, 0.01 * info.seconds)


def content_hash(path: Path) -> str:
    """Hex digest of the file's bytes (blake2b, 32 digits). Raises AudioError when it cannot be read."""
    with _bytes_of(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _stereo(path: Path) -> Iterator[np.ndarray]:
    """The file as float32 [n, 2] at 48 kHz, in blocks."""
    kind, weights, resampler, seconds = None, None, None, 0.0
    nothing = np.empty((0, 2), np.float32)
    for samples, rate, positions in itertools.chain.from_iterable(source.blocks() for source in _sources(path)):
        peak = float(np.abs(samples).max(initial=0.0))
        if not peak <= LOUDEST:  # also where it is not a number
            what = f"up to {peak:g}, where full scale is 1," if np.isfinite(peak) else "that are not numbers"
            raise AudioError(path, f"has samples {what.replace('e+', 'e')} after {seconds:.0f} s")
        seconds += len(samples) / rate
        if kind != (rate, positions):
            if resampler:
                yield resampler.resample_chunk(nothing, last=True)
            if rate not in SAMPLE_RATES:
                raise AudioError(path, f"says that its sample rate is {rate} Hz")
            kind = rate, positions
            weights = np.array([_LEFT_RIGHT.get(name, (0.5, 0.5)) for name in positions], np.float32)
            weights /= np.maximum(weights.sum(0), 1e-9)
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 2, dtype="float32") if rate != SAMPLE_RATE else None
        if len(positions) != 2:
            samples = np.repeat(samples, 2, axis=1) if len(positions) == 1 else samples @ weights
        yield resampler.resample_chunk(samples) if resampler else samples
    if resampler:
        yield resampler.resample_chunk(nothing, last=True)


@contextmanager
def _bytes_of(path: Path) -> Generator[io.BufferedReader]:
    """The regular file at `path`, open for reading. Raises AudioError, also while it is read."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise AudioError(path, "is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise AudioError(path, f"cannot be read: {error.strerror or error}") from error


def _links(path: Path) -> Iterator[io.BytesIO | None]:
    """Every link of a chained Ogg file as a file of its own, one after the other; None for any other file: it is whole.

    A link starts with the pages that begin its streams (bit 2 of a page's flags, RFC 3533). Raises AudioError for
    what cannot be audio.
    """
    with _bytes_of(path) as file:
        head = file.read(1024)
        if not head:
            raise AudioError(path, "is empty (0 bytes)")
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for reason, beginnings in _NO_AUDIO.items():
            if text.startswith(beginnings):
                raise AudioError(path, reason)
        starts, begins, position = [0], True, file.seek(0)
        while (page := file.read(27)).startswith(b"OggS") and len(page) == 27:
            begun, begins = begins, bool(page[5] & 2)
            if begins and not begun:
                starts.append(position)
            position = file.seek(position + 27 + page[26] + sum(file.read(page[26])))
        if len(starts) == 1:
            yield None
            return
        for start, end in itertools.pairwise([*starts, file.seek(0, os.SEEK_END)]):
            file.seek(start)
            yield io.BytesIO(file.read(end - start))


def _sources(path: Path) -> Iterator[_Source]:
    """One source, or one for each link of a chained Ogg file in turn; it is open until the next one is asked for.

    Raises AudioError where nothing can be read. Each is opened by whichever library can.
    """
    opened, failure = False, None
    for link in _links(path):
        with ExitStack() as stack:
            file = None
            if path.suffix.lower() not in _NOT_FOR_SNDFILE:
                with suppress(soundfile.LibsndfileError, UnicodeError):
                    name: Any = link or (str(path) if sys.platform == "win32" else os.fsencode(path))
                    file = stack.enter_context(soundfile.SoundFile(name))
            try:
                if file and file.format != "MP3" and 0 < file.frames < 1 << 48:
                    source = _sndfile(path, link, file)
                else:
                    source = stack.enter_context(_ffmpeg(path, link))
            except AudioError as error:
                failure = error
                continue
            opened = True
            yield source
    if failure and not opened:
        raise failure


def _sndfile(path: Path, link: io.BytesIO | None, file: soundfile.SoundFile) -> _Source:
    rate = file.samplerate
    positions = _WAV_ORDER.get(file.channels, ("",) * file.channels)

    def blocks() -> Iterator[_Block]:
        done = 0
        try:
            while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                done += len(block)
                yield _Block(block, rate, positions)
        except soundfile.LibsndfileError:  # damaged here; FFmpeg passes over what it cannot decode
            with suppress(AudioError), _ffmpeg(path, link) as rest:
                for block in rest.blocks():
                    if (block.sample_rate, len(block.positions)) != (rate, file.channels):
                        return
                    if len(block.samples) > done:
                        yield block._replace(samples=block.samples[done:])
                    done = max(done - len(block.samples), 0)

    form = f"{file.format}/{file.subtype}"
    return _Source(rate, file.channels, form, lambda: file.frames / rate, blocks)


@contextmanager
def _ffmpeg(path: Path, link: io.BytesIO | None) -> Generator[_Source]:
    @contextmanager
    def opened() -> Generator[av.container.InputContainer]:
        with ExitStack() as stack:
            source: Any = io.BytesIO(link.getvalue()) if link else str(path)
            if not link and (start := _end_of_tags(path)):
                source = stack.enter_context(_Behind(path, start))
            try:
                container = stack.enter_context(av.open(source, "r", metadata_errors="ignore"))
            except (av.FFmpegError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise AudioError(path, f"is no audio file that can be read ({reason})") from error
            yield container

    with opened() as container:
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            raise AudioError(path, "holds no audio stream that can be decoded")
        stream = container.streams.audio[0]
        stream.codec_context.thread_type = "AUTO"

        def decoded() -> Iterator[av.AudioFrame]:
            for packet in _packets(container, stream):
                with suppress(av.FFmpegError):  # packets that do not decode are passed over, as players do
                    yield from [f for f in packet.decode() if isinstance(f, av.AudioFrame) and f.samples]

        frames = decoded()
        first = next(frames, None)
        if first is None:
            raise AudioError(path, "holds no audio that can be decoded")
        form = container.format.name.split(",")[0]

        def blocks() -> Iterator[_Block]:
            every = itertools.chain([first], frames)
            for _, alike in itertools.groupby(every, lambda f: (f.format.name, f.layout.name, f.sample_rate)):
                head = next(alike)
                rate, positions = head.sample_rate, tuple(channel.name for channel in head.layout.channels)
                convert = av.AudioResampler(format="fltp", layout=head.layout, rate=rate)
                parts, held = [], 0
                for frame in itertools.chain([head], alike, [None]):
                    try:
                        parts += [part.to_ndarray().T for part in convert.resample(frame)]
                    except (ValueError, av.FFmpegError) as error:
                        raise AudioError(path, f"cannot be decoded ({error})") from error
                    held += frame.samples if frame else 0
                    if parts and (held >= _BLOCK_SAMPLES or frame is None):
                        yield _Block(np.concatenate(parts), rate, positions)
                        parts, held = [], 0

        def seconds() -> float:
            said = float((container.duration or 0) / av.time_base)
            if stream.duration is not None and stream.time_base is not None:
                said = float(stream.duration * stream.time_base)
            if 0 < said < 1e7 and (form not in _GUESSED or (form == "mp3" and _says_its_length(path))):
                return said
            with opened() as again:
                lengths = [
                    (p.duration or 0) * (p.time_base or 0) for p in _packets(again, again.streams.audio[0]) if p.size
                ]
                if all(lengths):
                    return float(sum(lengths))
            return sum(len(block.samples) / block.sample_rate for block in blocks())

        # The rate is that of what comes out: HE-AAC says half of it in its header.
        yield _Source(
            first.sample_rate, len(first.layout.channels), f"{form}/{stream.codec_context.name}", seconds, blocks
        )


def _packets(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.Packet]:
    """Packets of one stream until the file breaks off."""
    with suppress(av.FFmpegError):
        yield from container.demux(stream)


class _Behind(io.FileIO):
    """A file from a position on: FFmpeg would unpack the tags before it, a gigabyte of them if they say so."""

    def __init__(self, path: Path, start: int):
        super().__init__(path)
        self.start = start
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(offset + (self.start if whence == os.SEEK_SET else 0), whence) - self.start

    def tell(self) -> int:
        return super().tell() - self.start


def _end_of_tags(path: Path) -> int:
    """Where the ID3 tags at a file's start end; 0 without any."""
    with _bytes_of(path) as file:
        start = 0
        while (tag := file.read(10)).startswith(b"ID3") and len(tag) == 10:
            size = sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
            start = file.seek(start + 10 + size)
        return start


def _says_its_length(path: Path) -> bool:
    """Whether an mp3 says how long it is, in a header of Xing or VBRI, and holds no more, as joined files do."""
    start = _end_of_tags(path)
    with _bytes_of(path) as file:
        file.seek(start)
        head = file.read(4096).ljust(4200, b"\0")
        size = file.seek(0, os.SEEK_END) - start
    at = max(head.find(b"Xing"), head.find(b"Info"))
    if at >= 0 and head[at + 7] & 2:  # its flags: the number of bytes is there, behind that of frames
        at += 12 if head[at + 7] & 1 else 8
    elif (at := head.find(b"VBRI")) >= 0:
        at += 10
    else:
        return False
    return int.from_bytes(head[at : at + 4], "big") >= 0.98 * size


def write_flac(path: Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write float32 [2, S] as a whole file or not at all. Raises OSError."""
    with replacing(path) as temporary:
        try:
            soundfile.write(temporary, audio.T, sample_rate, format="FLAC", subtype="PCM_24")
        except soundfile.LibsndfileError as error:
            raise OSError(None, error.error_string.rstrip("."), str(path)) from error
