"""Any audio file a library may hold becomes float32 [2, S] at 48 kHz, or a reason why not."""

import os
import pickle
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from immich_memories_music import tracks_dir

from sidestep.audio.io import (
    PIECE_SAMPLES,
    SAMPLE_RATE,
    AudioError,
    content_hash,
    decode,
    find_audio,
    is_cut_short,
    probe,
    stream,
)
from tests.song_library import SECONDS, make_library, tone, write_ffmpeg, write_sndfile


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    return root, make_library(root)


def test_a_library_of_sixty_files_is_found_whole_and_each_once(library):
    root, entries = library
    listed = {name for name, entry in entries.items() if entry.listed}
    assert len(listed) >= 50
    assert len(entries) >= 60
    assert [p.relative_to(root).as_posix() for p in find_audio(root)] == sorted(listed)


def test_every_readable_file_is_decoded_with_its_own_length_and_level(library):
    root, entries = library
    for name, entry in entries.items():
        if not entry.readable:
            continue
        info, audio = probe(root / name), decode(root / name)
        assert (info.sample_rate, info.channels) == (entry.rate, entry.channels), name
        assert audio.dtype == np.float32, name
        assert audio.shape[0] == 2, name
        assert audio.flags.c_contiguous, name
        if not name.startswith("broken/half"):
            assert audio.shape[1] == pytest.approx(SECONDS * SAMPLE_RATE, abs=5000), name  # lossy coders pad
            assert info.seconds == pytest.approx(SECONDS, abs=0.1), name
        assert 0.1 < np.abs(audio).max() < 0.5, name


def test_every_broken_file_says_why(library):
    root, entries = library
    for name, entry in entries.items():
        if entry.readable or not entry.listed:
            continue
        for read in (probe, decode):
            with pytest.raises(AudioError) as error:
                read(root / name)
            assert entry.reason in error.value.reason, name
            assert error.value.path == root / name, name


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_and_a_folder_without_permission_are_reported():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        write_sndfile(root / "song.wav", tone(), 48_000)
        write_sndfile(root / "closed" / "song.wav", tone(), 48_000)
        (root / "song.wav").chmod(0)
        (root / "closed").chmod(0)
        heard = []
        os.seteuid(65534)
        try:
            found = find_audio(root, lambda path, reason: heard.append((path.name, reason)))
            with pytest.raises(AudioError, match="cannot be read: Permission denied"):
                decode(found[0])
            with pytest.raises(AudioError, match="Permission denied"):
                content_hash(found[0])
        finally:
            os.seteuid(0)
        assert heard == [("closed", "Permission denied")]


def test_mono_is_doubled_and_stereo_kept_as_it_is(tmp_path):
    write_sndfile(tmp_path / "mono.wav", tone(channels=1), 48_000, subtype="FLOAT")
    write_sndfile(tmp_path / "stereo.wav", tone(), 48_000, subtype="FLOAT")
    np.testing.assert_array_equal(decode(tmp_path / "mono.wav"), np.repeat(tone(channels=1).T, 2, axis=0))
    np.testing.assert_array_equal(decode(tmp_path / "stereo.wav"), tone().T)


@pytest.mark.parametrize(
    ("channel", "left", "right"),
    [(0, 1, 0), (1, 0, 1), (2, 0.5**0.5, 0.5**0.5), (3, 0, 0), (4, 0.5**0.5, 0), (5, 0, 0.5**0.5)],
    ids=["front left", "front right", "centre", "LFE", "back left", "back right"],
)
def test_surround_is_folded_by_the_stated_weights(tmp_path, channel, left, right):
    audio = np.zeros((4800, 6), np.float32)
    audio[:, channel] = 0.5
    write_sndfile(tmp_path / "5.1.wav", audio, 48_000, subtype="FLOAT")
    sides = decode(tmp_path / "5.1.wav")[:, 2400]
    np.testing.assert_allclose(sides, 0.5 * np.array([left, right]) / (1 + 2 * 0.5**0.5), atol=1e-6)


def test_folding_full_scale_surround_never_clips_and_is_the_same_in_both_readers(tmp_path):
    audio = np.ones((9600, 6), np.float32)
    write_sndfile(tmp_path / "ones.wav", audio, 48_000, subtype="FLOAT")
    assert np.abs(decode(tmp_path / "ones.wav")).max() <= 1.0 + 1e-6
    surround = tone(channels=6)
    write_sndfile(tmp_path / "a.flac", surround, 48_000, format="FLAC")
    write_ffmpeg(tmp_path / "a.m4a", surround, 48_000, "alac", "ipod", "5.1")
    np.testing.assert_allclose(
        decode(tmp_path / "a.flac"), decode(tmp_path / "a.m4a")[:, : round(SECONDS * 48_000)], atol=1e-3
    )


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000, 192_000])
def test_resampling_keeps_pitch_level_and_length(tmp_path, rate):
    write_sndfile(tmp_path / "a.wav", tone(1000, 2.0, rate), rate, subtype="FLOAT")
    audio = decode(tmp_path / "a.wav")
    assert audio.shape == (2, 96_000)
    np.testing.assert_allclose(audio[:, 9600:-9600], tone(1000, 2.0, 48_000).T[:, 9600:-9600], atol=2e-4)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.m4a"])
def test_the_first_seconds_equal_the_start_of_the_whole(tmp_path, name):
    audio, rate = tone(seconds=5, rate=44_100), 44_100
    if name == "a.m4a":
        write_ffmpeg(tmp_path / name, audio, rate, "aac", "ipod")
    else:
        write_sndfile(tmp_path / name, audio, rate, format=name[2:].upper())
    part, whole = decode(tmp_path / name, max_seconds=1.5), decode(tmp_path / name)
    assert part.shape == (2, 72_000)
    np.testing.assert_array_equal(part, whole[:, :72_000])
    np.testing.assert_array_equal(decode(tmp_path / name, max_seconds=100), whole)


def test_a_file_that_breaks_off_gives_what_is_there_and_can_be_told(tmp_path):
    write_sndfile(
        tmp_path / "whole.flac",
        np.random.default_rng(0).normal(0, 0.1, (480_000, 2)).astype(np.float32),
        48_000,
        format="FLAC",
    )
    data = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(data[: len(data) // 2])
    info, audio = probe(tmp_path / "half.flac"), decode(tmp_path / "half.flac")
    assert 4 < audio.shape[1] / SAMPLE_RATE < 6
    assert is_cut_short(info, audio.shape[1] / SAMPLE_RATE)
    assert not is_cut_short(probe(tmp_path / "whole.flac"), 10.0)


def test_a_file_damaged_in_the_middle_gives_its_end_too(tmp_path):
    write_sndfile(
        tmp_path / "a.flac",
        np.random.default_rng(0).normal(0, 0.1, (480_000, 2)).astype(np.float32),
        48_000,
        format="FLAC",
    )
    whole, data = decode(tmp_path / "a.flac"), bytearray((tmp_path / "a.flac").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    (tmp_path / "a.flac").write_bytes(data)
    audio = decode(tmp_path / "a.flac")
    assert audio.shape[1] > 9 * SAMPLE_RATE
    np.testing.assert_array_equal(audio[:, : 4 * SAMPLE_RATE], whole[:, : 4 * SAMPLE_RATE])


def test_a_file_with_samples_that_are_not_numbers_is_refused(tmp_path):
    audio = tone()
    audio[1000, 0] = np.nan
    write_sndfile(tmp_path / "nan.wav", audio, 48_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="not numbers"):
        decode(tmp_path / "nan.wav")


def test_a_broken_header_that_promises_terabytes_costs_no_memory(tmp_path):
    write_sndfile(tmp_path / "a.wav", tone(), 48_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\x7f"
    (tmp_path / "a.wav").write_bytes(data)
    assert decode(tmp_path / "a.wav").shape == (2, 24_000)


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_streaming_holds_a_piece_and_little_else(tmp_path, rate):
    write_sndfile(tmp_path / "a.wav", tone(seconds=120, rate=rate), rate)
    decode(tmp_path / "a.wav", max_seconds=1)
    tracemalloc.start()
    lengths = [piece.shape[1] for piece in stream(tmp_path / "a.wav")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [PIECE_SAMPLES] * 12
    assert peak < 3 * 2 * 4 * PIECE_SAMPLES


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_file_name_that_is_no_unicode_is_read_like_any_other(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    write_sndfile(path, tone(), 48_000)
    write_ffmpeg(tmp_path / "a.m4a", tone(), 48_000, "aac", "ipod")
    (tmp_path / "a.m4a").rename(path.with_suffix(".m4a"))
    assert [decode(p).shape[0] for p in find_audio(tmp_path)] == [2, 2]


def test_real_music_is_decoded_as_libsndfile_has_it():
    path = sorted(tracks_dir().rglob("*.opus"))[0]
    expected, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE
    np.testing.assert_array_equal(decode(path), expected.T)


def test_one_clip_in_five_formats_has_one_length_and_sound():
    pygame = pytest.importorskip("pygame")
    folder = Path(pygame.__file__).parent / "examples" / "data"
    reference = decode(folder / "house_lo.wav")
    for suffix in ("flac", "ogg", "opus", "mp3", "wv"):
        audio = decode(folder / f"house_lo.{suffix}")
        assert abs(audio.shape[1] - reference.shape[1]) < 0.2 * SAMPLE_RATE, suffix
        start = max(
            range(0, 12_000, 20), key=lambda s: float(reference[0, 48_000:96_000] @ audio[0, 48_000 + s : 96_000 + s])
        )
        likeness = np.corrcoef(reference[0, 48_000:96_000], audio[0, 48_000 + start : 96_000 + start])[0, 1]
        assert likeness > 0.85, suffix  # the mp3 is cut to 4 kHz


def test_the_content_hash_follows_the_bytes_not_the_name(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    (tmp_path / "c").write_bytes(b"x" * 3_000_001)
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b") != content_hash(tmp_path / "c")


def test_an_audio_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(AudioError(Path("a.wav"), "is empty")))  # noqa: S301  our own bytes
    assert (error.path, error.reason) == (Path("a.wav"), "is empty")


def test_a_codec_that_nobody_knows_is_told(tmp_path):
    write_ffmpeg(tmp_path / "a.m4a", tone(), 48_000, "aac", "ipod")
    data = (tmp_path / "a.m4a").read_bytes()
    (tmp_path / "a.m4a").write_bytes(data.replace(b"mp4a", b"zzzz").replace(b"esds", b"zzzz"))
    with pytest.raises(AudioError, match="no audio stream that can be decoded"):
        probe(tmp_path / "a.m4a")
