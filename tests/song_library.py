"""A music library as people have them, written small: every format, odd names, nested duplicates and broken files."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

SECONDS = 0.5


@dataclass(frozen=True)
class Entry:
    """One file of the library: readable as audio, or a part of the reason why not; `folder` entries are no files."""

    readable: bool
    reason: str = ""
    listed: bool = True
    channels: int = 2
    rate: int = 48_000


def tone(hz: float = 440.0, seconds: float = SECONDS, rate: int = 48_000, channels: int = 2) -> np.ndarray:
    """Float32 [S, C]; each channel a little higher than the one before."""
    n = np.arange(round(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * (hz + 20 * c) * n) for c in range(channels)], axis=1).astype(np.float32)


def write_sndfile(path: Path, audio: np.ndarray, rate: int, **how: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        soundfile.write(file, audio, rate, **how)


def write_ffmpeg(path: Path, audio: np.ndarray, rate: int, codec: str, container: str, layout: str = "stereo") -> None:
    """float32 [S, C] through one of FFmpeg's encoders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        if codec not in ("alac", "flac", "wavpack", "tta"):
            stream.bit_rate = 64_000 * audio.shape[1]
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        fifo = av.AudioFifo()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            part.pts = None
            fifo.write(part)
        size = stream.codec_context.frame_size or 1024
        written = 0
        while part := fifo.read(size, partial=True):
            part.pts, part.time_base = written, Fraction(1, rate)
            written += part.samples
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def make_library(root: Path) -> dict[str, Entry]:
    """Write the library below `root` and say what each entry is, by its relative path."""
    entries: dict[str, Entry] = {}

    def song(name: str, audio: np.ndarray, rate: int, **how: str) -> None:
        write_sndfile(root / name, audio, rate, **how)
        entries[name] = Entry(True, channels=audio.shape[1], rate=rate)

    def through_ffmpeg(
        name: str, codec: str, container: str, rate: int = 48_000, channels: int = 2, layout: str = "stereo"
    ) -> None:
        write_ffmpeg(root / name, tone(channels=channels, rate=rate), rate, codec, container, layout)
        entries[name] = Entry(True, channels=channels, rate=rate)

    def broken(name: str, data: bytes, reason: str) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        entries[name] = Entry(False, reason)

    for suffix, container, subtype in [
        ("wav", "WAV", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
        ("aiff", "AIFF", "PCM_16"),
        ("aif", "AIFF", "PCM_24"),
        ("caf", "CAF", "PCM_16"),
        ("w64", "W64", "PCM_16"),
        ("au", "AU", "PCM_16"),
    ]:
        song(f"formats/plain.{suffix}", tone(), 48_000, format=container, subtype=subtype)
    for suffix, codec, container in [
        ("m4a", "aac", "ipod"),
        ("aac", "aac", "adts"),
        ("mp4", "aac", "mp4"),
        ("wma", "wmav2", "asf"),
        ("webm", "libopus", "webm"),
        ("mka", "flac", "matroska"),
        ("wv", "wavpack", "wv"),
        ("ac3", "ac3", "ac3"),
        ("tta", "tta", "tta"),
    ]:
        through_ffmpeg(f"formats/coded.{suffix}", codec, container)
    through_ffmpeg("formats/lossless.m4a", "alac", "ipod")
    through_ffmpeg("formats/surround.m4a", "aac", "ipod", channels=6, layout="5.1")
    for name, rate, channels, subtype in [
        ("mono", 48_000, 1, "PCM_16"),
        ("eight kHz", 8_000, 2, "PCM_16"),
        ("192 kHz", 192_000, 2, "PCM_24"),
        ("44.1 kHz", 44_100, 2, "PCM_16"),
        ("24 bit", 48_000, 2, "PCM_24"),
        ("float", 48_000, 2, "FLOAT"),
        ("double", 48_000, 2, "DOUBLE"),
        ("8 bit", 48_000, 1, "PCM_U8"),
        ("quad", 48_000, 4, "PCM_16"),
        ("5.1", 48_000, 6, "PCM_16"),
        ("7.1", 48_000, 8, "PCM_16"),
    ]:
        song(f"kinds/{name}.wav", tone(rate=rate, channels=channels), rate, subtype=subtype)
    song("kinds/mono 11 kHz.mp3", tone(rate=11_025, channels=1), 11_025, format="MP3", subtype="MPEG_LAYER_III")
    song("kinds/5.1.flac", tone(channels=6), 48_000, format="FLAC")
    song("kinds/LOUD.WAV", tone(), 48_000, format="WAV")
    song("kinds/really an ogg.mp3", tone(), 48_000, format="OGG", subtype="VORBIS")
    for name in [
        "日本語/夜に駆ける.flac",
        "Ünïcödé/Ça va – ñandú.wav",
        "emoji 🎵/🎸 solo.wav",
        "spaces and [brackets]/song [live] (2019) {x} 'q' #1 %20 & co;.wav",
        "a.b.c/v1.2.final.wav",
        "...And Justice/...Baby.wav",
        "-dash/--help.wav",
        "twins/song.wav",
        "twins/song.flac",
        "album 1/song.wav",
        "album 2/song.wav",
        "album 2/song.caption.wav",
        "album 2/disc/song.wav",
    ]:
        song(name, tone(300 + 10 * len(entries)), 48_000, format="FLAC" if name.endswith("flac") else "WAV")

    broken("broken/zero.wav", b"", "empty")
    broken("broken/zero.mp3", b"", "empty")
    broken("broken/text.wav", b"These are only words.\n" * 20, "no audio")
    broken("broken/text.mp3", "歌詞だけ\n".encode() * 20, "")
    broken("broken/picture.flac", bytes(range(256)) * 8, "")
    broken("broken/header only.wav", (root / "formats/plain.wav").read_bytes()[:44], "holds no audio")
    broken("broken/no index.m4a", (root / "formats/coded.m4a").read_bytes()[:600], "")
    for source in ("plain.wav", "plain.mp3", "plain.flac"):  # half of it is there: that half is used
        name = f"broken/half {source}"
        data = (root / "formats" / source).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
        entries[name] = Entry(True)
    (root / "folder.mp3").mkdir()
    song("folder.mp3/inside.wav", tone(), 48_000)
    broken("__MACOSX/._plain.wav", b"\0\5\26\7", "")
    broken("._plain.wav", b"\0\5\26\7", "")
    for name in ("__MACOSX/._plain.wav", "._plain.wav"):
        entries[name] = Entry(False, listed=False)
    (root / "album 1" / "loop").symlink_to(root, target_is_directory=True)
    (root / "album 2" / "same again").symlink_to(root / "album 1", target_is_directory=True)
    (root / "broken" / "itself.wav").symlink_to("itself.wav")
    entries["broken/itself.wav"] = Entry(False, "cannot be read")
    (root / "broken" / "dangling.wav").symlink_to("gone.wav")
    entries["broken/dangling.wav"] = Entry(False, "cannot be read")
    return entries
