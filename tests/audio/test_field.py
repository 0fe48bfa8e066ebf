"""Audio as libraries in the wild hold it: joined, chained, without lengths, absurd, or no audio at all."""

import os
import struct
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from sidestep.audio import io
from sidestep.audio.io import SAMPLE_RATE, AudioError, content_hash, decode, find_audio, is_cut_short, probe, stream
from tests.song_library import tone, write_ffmpeg, write_sndfile


def mp3(audio: np.ndarray, rate: int, path: Path, *, quality: str | None = None, xing: bool = False) -> bytes:
    """An mp3 of float32 [S, C], at a constant bit rate or (quality) a variable one, with or without its length."""
    layout = "mono" if audio.shape[1] == 1 else "stereo"
    with av.open(str(path), "w", format="mp3", options={"write_xing": str(int(xing))}) as container:
        out = container.add_stream("libmp3lame", rate=rate, options={"global_quality": quality} if quality else {})
        out.layout = layout
        if quality:
            out.codec_context.flags |= 2
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=out.codec_context.format, layout=layout, rate=rate, frame_size=1152)
        for piece in resampler.resample(frame) + resampler.resample(None):
            container.mux(out.encode(piece))
        container.mux(out.encode(None))
    return path.read_bytes()


def pitch(audio: np.ndarray) -> float:
    """Hertz of the loudest frequency of float32 [S] at 48 kHz."""
    return float(np.argmax(np.abs(np.fft.rfft(audio * np.hanning(len(audio)))))) * SAMPLE_RATE / len(audio)


def pitches(audio: np.ndarray, parts: int) -> list[float]:
    """The pitch of the middle of each of `parts` equal parts, of both sides."""
    length = audio.shape[1] // parts
    middles = [i * length + length // 2 for i in range(parts)]
    return [pitch(side[middle - length // 4 : middle + length // 4]) for middle in middles for side in audio]


@pytest.mark.parametrize("xing", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        [(44_100, 1), (44_100, 2)],
        [(44_100, 2), (44_100, 1)],
        [(44_100, 2), (48_000, 2)],
        [(48_000, 1), (22_050, 2), (44_100, 1)],
    ],
    ids=["mono, stereo", "stereo, mono", "44.1, 48 kHz", "three kinds"],
)
def test_mp3_files_that_were_joined_are_heard_whole_at_the_right_pitch(tmp_path, parts, xing):
    path = tmp_path / "joined.mp3"
    sides = [np.repeat(tone(440, 1.0, rate, 1), channels, axis=1) for rate, channels in parts]
    pieces = (mp3(audio, rate, tmp_path / "part", xing=xing) for audio, (rate, _) in zip(sides, parts, strict=True))
    path.write_bytes(b"".join(pieces))
    audio, info = decode(path), probe(path)
    seconds = audio.shape[1] / SAMPLE_RATE
    assert seconds == pytest.approx(len(parts), abs=0.1 * len(parts))
    assert info.seconds == pytest.approx(seconds, abs=0.15)
    assert not is_cut_short(info, seconds)
    assert pitches(audio, len(parts)) == pytest.approx([440] * 2 * len(parts), abs=3)
    np.testing.assert_allclose(audio[0], audio[1], atol=0.02)


def test_aac_that_changes_its_channels_midway_is_heard_whole(tmp_path):
    for name, channels, layout in (("a", 1, "mono"), ("b", 2, "stereo")):
        audio = np.repeat(tone(440, 1.0, channels=1), channels, axis=1)
        write_ffmpeg(tmp_path / name, audio, 48_000, "aac", "adts", layout)
    path = tmp_path / "joined.aac"
    path.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    assert decode(path).shape[1] / SAMPLE_RATE == pytest.approx(2, abs=0.1)
    assert probe(path).seconds == pytest.approx(2, abs=0.1)
    assert pitches(decode(path), 2) == pytest.approx([440] * 4, abs=3)


VORBIS, OPUS, FLAC = "VORBIS", "OPUS", "FLAC"


@pytest.mark.parametrize(
    "links",
    [
        [(VORBIS, 44_100, 2), (VORBIS, 44_100, 2)],
        [(VORBIS, 44_100, 2), (OPUS, 48_000, 2)],
        [(OPUS, 48_000, 1), (OPUS, 48_000, 2)],
        [(FLAC, 22_050, 1), (VORBIS, 32_000, 2), (OPUS, 48_000, 2)],
    ],
    ids=["Vorbis", "Vorbis, Opus", "Opus", "three codecs"],
)
def test_every_link_of_a_chained_ogg_is_heard(tmp_path, links):
    path, hertz = tmp_path / "chained.ogg", [440 + 220 * i for i in range(len(links))]
    data = b""
    for hz, (codec, rate, channels) in zip(hertz, links, strict=True):
        audio = np.repeat(tone(hz, 1.0, rate, 1), channels, axis=1)
        if codec == FLAC:
            write_ffmpeg(tmp_path / "link", audio, rate, "flac", "ogg", "mono" if channels == 1 else "stereo")
        else:
            write_sndfile(tmp_path / "link", audio, rate, format="OGG", subtype=codec)
        data += (tmp_path / "link").read_bytes()
    path.write_bytes(data)
    assert probe(path).seconds == pytest.approx(len(links), abs=0.02)
    assert decode(path).shape[1] / SAMPLE_RATE == pytest.approx(len(links), abs=0.02)
    assert pitches(decode(path), len(links)) == pytest.approx([hz for hz in hertz for _ in "ab"], abs=3)
    np.testing.assert_array_equal(decode(path, 1.2), decode(path)[:, : round(1.2 * SAMPLE_RATE)])


def test_an_ogg_joined_to_itself_has_twice_its_length_and_a_broken_link_is_passed_over(tmp_path):
    write_sndfile(tmp_path / "a.ogg", tone(seconds=1.0), 48_000, format="OGG")
    data = (tmp_path / "a.ogg").read_bytes()
    (tmp_path / "twice.ogg").write_bytes(data * 2)  # the links have one serial number
    (tmp_path / "broken.ogg").write_bytes(data + data[:200])
    assert probe(tmp_path / "twice.ogg").seconds == pytest.approx(2, abs=0.02)
    assert decode(tmp_path / "broken.ogg").shape[1] == pytest.approx(SAMPLE_RATE, abs=1000)


def test_a_length_that_is_only_guessed_is_counted(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.2, (2 * 44_100, 2)).astype(np.float32)
    quiet_first = np.concatenate([np.zeros_like(noise), noise])
    mp3(quiet_first, 44_100, tmp_path / "vbr.mp3", quality="236")
    mp3(quiet_first, 44_100, tmp_path / "vbr with length.mp3", quality="236", xing=True)
    write_ffmpeg(tmp_path / "vbr.aac", quiet_first, 44_100, "aac", "adts")
    (tmp_path / "really mp3.wav").write_bytes((tmp_path / "vbr.mp3").read_bytes())
    for path in find_audio(tmp_path):
        decoded = decode(path).shape[1] / SAMPLE_RATE
        assert decoded == pytest.approx(4, abs=0.1), path.name
        assert probe(path).seconds == pytest.approx(decoded, abs=0.1), path.name


def test_a_flac_and_a_webm_of_a_live_stream_have_their_length(tmp_path):
    write_sndfile(tmp_path / "a.flac", tone(seconds=2.0), 48_000, format="FLAC")
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # the number of samples: not known
    (tmp_path / "a.flac").write_bytes(data)
    write_ffmpeg(tmp_path / "a.webm", tone(seconds=2.0), 48_000, "libopus", "webm")
    data = (tmp_path / "a.webm").read_bytes()
    at = data.index(b"\x44\x89")  # Duration becomes an element that players skip
    (tmp_path / "a.webm").write_bytes(data[:at] + b"\xec\x89" + data[at + 2 :])
    with av.open(str(tmp_path / "a.webm")) as container:
        assert container.duration is None
    for path in find_audio(tmp_path):
        assert probe(path).seconds == pytest.approx(2, abs=0.05), path.name
        assert decode(path).shape[1] / SAMPLE_RATE == pytest.approx(2, abs=0.05), path.name


def test_an_mp3_that_breaks_off_is_still_known_to(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.2, (6 * 44_100, 2)).astype(np.float32)
    data = mp3(noise, 44_100, tmp_path / "a.mp3", xing=True)
    (tmp_path / "a.mp3").write_bytes(data[: len(data) // 2])
    info = probe(tmp_path / "a.mp3")
    assert info.seconds == pytest.approx(6, abs=0.1)
    assert is_cut_short(info, decode(tmp_path / "a.mp3").shape[1] / SAMPLE_RATE)


@pytest.mark.parametrize("riff", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [0, 0x7FFFF000, 0xFFFFFFFF])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_recorder_that_never_filled_in_its_header_loses_nothing(tmp_path, riff, data, subtype):
    path = tmp_path / "a.wav"
    write_sndfile(path, tone(seconds=1.0), 48_000, subtype=subtype)
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", riff)
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", data)
    path.write_bytes(content)
    assert probe(path).seconds == pytest.approx(1, abs=0.001)
    np.testing.assert_allclose(decode(path), tone(seconds=1.0).T, atol=1e-4)


def test_an_au_of_a_pipe_has_its_length(tmp_path):
    write_sndfile(tmp_path / "a.au", tone(seconds=1.0), 48_000, format="AU")
    content = bytearray((tmp_path / "a.au").read_bytes())
    content[8:12] = b"\xff" * 4
    (tmp_path / "a.au").write_bytes(content)
    assert probe(tmp_path / "a.au").seconds == 1
    assert decode(tmp_path / "a.au").shape == (2, SAMPLE_RATE)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1e29, "up to 1e29"),
        (-3e5, "up to 300000"),
        (32_767, "up to 32767"),
        (np.nan, "not numbers"),
        (-np.inf, "not n"),
    ],
)
@pytest.mark.parametrize(("suffix", "how"), [("wav", "FLOAT"), ("aiff", "DOUBLE"), ("caf", "FLOAT")])
def test_samples_far_beyond_full_scale_are_refused_with_their_value(tmp_path, value, said, suffix, how):
    audio = tone(seconds=2.0).astype(np.float64)
    audio[70_000, 1] = value
    write_sndfile(tmp_path / f"a.{suffix}", audio, 48_000, format=suffix.upper(), subtype=how)
    with pytest.raises(AudioError, match=said) as error:
        decode(tmp_path / f"a.{suffix}")
    assert "after 1 s" in error.value.reason
    assert decode(tmp_path / f"a.{suffix}", max_seconds=1).shape == (2, SAMPLE_RATE)


def test_a_loud_mix_in_float_is_taken(tmp_path):
    write_sndfile(tmp_path / "a.wav", tone() * 30, 48_000, subtype="FLOAT")
    assert np.abs(decode(tmp_path / "a.wav")).max() == pytest.approx(9, abs=0.1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7340032\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s7340032--4d7a.mp3\n", "git annex get"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>" * 50, "web page"),
        (b"\xef\xbb\xbf\r\n  <HTML><head>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "server's message"),
        (b'{"error": "not found"}', "server's message"),
        (b"PK\x03\x04" + bytes(100), "unpack it"),
    ],
)
@pytest.mark.parametrize("suffix", ["mp3", "wav", "ogg", "m4a"])
def test_what_only_has_the_name_of_audio_is_named(tmp_path, content, said, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    for read in (probe, decode):
        with pytest.raises(AudioError, match=said):
            read(tmp_path / f"a.{suffix}")


def within_seconds(action, path: Path) -> str:
    """What an action says of a path; it has ten seconds."""
    said: list[str] = []

    def act() -> None:
        try:
            action(path)
        except AudioError as error:
            said.append(error.reason)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(10)
    return said[0] if said else "nothing"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
@pytest.mark.parametrize("action", [probe, decode, content_hash])
def test_pipes_and_devices_under_names_of_songs_are_not_opened(tmp_path, action):
    os.mkfifo(tmp_path / "pipe.mp3")
    (tmp_path / "zeros.wav").symlink_to("/dev/zero")
    (tmp_path / "link.wav").symlink_to("pipe.mp3")
    assert {within_seconds(action, path) for path in find_audio(tmp_path)} == {"is not a regular file"}


@pytest.mark.parametrize("rate", [1, 10, 4_000_000])
def test_an_absurd_sample_rate_is_refused(tmp_path, rate):
    write_sndfile(tmp_path / "a.wav", tone(), 48_000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=f"sample rate is {rate} Hz"):
        decode(tmp_path / "a.wav")


def test_a_file_that_never_ends_is_given_up_but_its_start_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "LONGEST_SECONDS", 25)
    write_sndfile(tmp_path / "a.flac", np.zeros((8_000 * 40, 1)), 8_000, format="FLAC")
    lengths = []
    with pytest.raises(AudioError, match="is longer than 0:25"):
        lengths.extend(piece.shape[1] for piece in stream(tmp_path / "a.flac"))
    assert sum(lengths) <= 25 * SAMPLE_RATE
    assert decode(tmp_path / "a.flac", max_seconds=30).shape == (2, 30 * SAMPLE_RATE)
    write_sndfile(tmp_path / "b.flac", np.zeros((8_000 * 25, 1)), 8_000, format="FLAC")
    assert decode(tmp_path / "b.flac").shape == (2, 25 * SAMPLE_RATE)


def test_damage_anywhere_is_an_audio_error_or_audio(tmp_path):
    random = np.random.default_rng(0)
    sources = []
    for container in ("WAV", "FLAC", "OGG", "AIFF"):
        write_sndfile(tmp_path / "a", tone(), 48_000, format=container)
        sources.append((tmp_path / "a").read_bytes())
    sources.append(mp3(tone(), 48_000, tmp_path / "a"))
    for codec, container in (("aac", "ipod"), ("libopus", "webm"), ("wavpack", "wv")):
        write_ffmpeg(tmp_path / "a", tone(), 48_000, codec, container)
        sources.append((tmp_path / "a").read_bytes())
    path = tmp_path / "a.wav"
    for data in sources:
        for _ in range(6):
            damaged = bytearray(data)
            for at in random.integers(0, len(data), 5):
                damaged[at] = random.integers(256)
            for at in random.integers(0, min(len(data), 300), 2):
                damaged[at] = random.integers(256)
            path.write_bytes(damaged)
            for read in (probe, decode):
                try:
                    read(path)
                except AudioError as error:
                    assert error.reason  # noqa: PT017


def test_what_is_passed_over_is_counted(tmp_path):
    for name in ("a.dsf", "b.DSF", "c.mpc", ".d.mp3.icloud", "e.txt", "._f.dsf", "g.wav"):
        (tmp_path / name).write_bytes(b"x")
    passed: io.Counter = io.Counter()
    assert [path.name for path in find_audio(tmp_path, passed_over=passed)] == ["g.wav"]
    assert passed == {".dsf": 2, ".mpc": 1, ".icloud": 1}


@pytest.mark.parametrize("tags", [1, 2])
@pytest.mark.parametrize("xing", [False, True])
def test_ffmpeg_never_reads_the_tags_before_a_song(tmp_path, monkeypatch, tags, xing):
    """It unpacks compressed ones whatever they unpack to: 1.4 GiB for a file of 300 kB."""
    plain, tagged, read = tmp_path / "plain.mp3", tmp_path / "tagged.mp3", []
    sound = mp3(tone(seconds=2.0), 48_000, plain, xing=xing)
    tag = b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + bytes(1024)
    tagged.write_bytes(tag * tags + sound)
    opened = av.open

    def watched(source, *args, **named):
        read.append(source if isinstance(source, str) else source.read(3))
        if not isinstance(source, str):
            source.seek(0)
        return opened(source, *args, **named)

    monkeypatch.setattr(av, "open", watched)
    assert probe(tagged).seconds == probe(plain).seconds
    assert np.array_equal(decode(tagged), decode(plain))
    assert read
    assert all(begins[:2] == b"\xff\xfb" for begins in read), "the song itself, as FFmpeg's own writer tags it too"
