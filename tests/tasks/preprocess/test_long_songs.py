"""Songs of any length and kind: what is long streams, what cannot be taken is one line in failures.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sidestep.acestep.vae import ENCODER_HALO_FRAMES, encode_mean
from sidestep.audio import io
from sidestep.errors import ExitStatus
from sidestep.events import Notice, null
from sidestep.tasks.preprocess import Summary, preprocess
from sidestep.tasks.preprocess import first_pass as latents
from tests.preprocessing import Events, contents, job, make_library, tone

HOP = 1920


@pytest.mark.parametrize("frames", [3, 8, 9, 11, 12, 13, 20, 24, 40])
@pytest.mark.parametrize("piece_samples", [700, HOP * 5, 10**6])
def test_segments_have_every_frame_once_and_the_neighbours_of_each(frames, piece_samples):
    audio = np.arange(frames * HOP + 100, dtype=np.float32)[None].repeat(2, axis=0)
    pieces = (audio[:, i : i + piece_samples] for i in range(0, audio.shape[1], piece_samples))
    own, reach = [], 2
    for segment, first, end in latents.segments(pieces, 8, reach, HOP):
        starts = segment[0, : segment.shape[1] // HOP * HOP : HOP] / HOP
        own += [int(start) for start in starts[first:end]]
        assert starts[0] == max(own[0] if first == 0 else starts[first] - reach, 0)
        if end is not None:
            assert starts[-1] == starts[end - 1] + reach
    assert own == list(range(frames))


def test_a_song_too_long_to_be_held_gets_the_latents_of_one_that_is(tmp_path, monkeypatch):
    library = make_library(tmp_path / "lib", ["a.wav"], seconds=1.7)
    held = {"normalize": "lufs"}
    assert preprocess(job(library, tmp_path / "held", **held), null).done == 1
    monkeypatch.setattr(latents, "HELD_SECONDS", 1)
    monkeypatch.setattr(latents, "SEGMENT_FRAMES", 20)
    monkeypatch.setattr(io, "PIECE_SAMPLES", 24_000)
    encoded = []

    def watched(vae, audio, tile_frames, *more):
        encoded.append(audio.shape[-1] // HOP)
        return encode_mean(vae, audio, tile_frames, *more)

    monkeypatch.setattr(latents, "encode_mean", watched)
    assert preprocess(job(library, tmp_path / "streamed", **held), null).done == 1
    assert encoded == [20 + ENCODER_HALO_FRAMES, 22 + ENCODER_HALO_FRAMES]
    (whole,), (streamed,) = (contents(tmp_path / name).values() for name in ("held", "streamed"))
    assert whole[0][:2] == streamed[0][:2]
    values = [torch.frombuffer(bytearray(record[0][2]), dtype=torch.float32) for record in (whole, streamed)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_a_long_song_that_is_replaced_while_it_is_read_fails_alone(tmp_path, monkeypatch):
    library = make_library(tmp_path / "lib", ["a.wav", "b.wav"], seconds=1.0)
    monkeypatch.setattr(latents, "HELD_SECONDS", 0.5)
    original = latents.again

    def replaced(path, limit, stat):
        if path.name == "a.wav":
            soundfile.write(path, tone(0.7), 48_000)
        yield from original(path, limit, stat)

    monkeypatch.setattr(latents, "again", replaced)
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=1, skipped=0, failed=1)
    assert reasons(tmp_path / "out") == {"a.wav": "changed while it was read"}


def reasons(output: Path) -> dict[str, str]:
    failures = json.loads((output / "failures.json").read_text(encoding="utf-8"))["failures"]
    return {failure["path"]: failure["reason"] for failure in failures}


def test_no_kind_of_song_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "LONGEST_SECONDS", 5)
    names = ["absurd.wav", "good.wav", "hours.flac", "html.mp3", "pipe.ogg", "pointer.mp3", "rate.wav"]
    library = make_library(tmp_path / "lib", [n for n in names if n != "html.mp3" and n != "pointer.mp3"])
    absurd = tone(0.3)
    absurd[500] = 1e29
    soundfile.write(library / "absurd.wav", absurd, 48_000, subtype="FLOAT")
    soundfile.write(library / "hours.flac", np.zeros(8_000 * 12), 8_000)
    (library / "html.mp3").write_bytes(b"<!doctype html><html>")
    (library / "pointer.mp3").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    wav = bytearray((library / "rate.wav").read_bytes())
    wav[24:28] = (1).to_bytes(4, "little")
    (library / "rate.wav").write_bytes(wav)
    (library / "pipe.ogg").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(library / "pipe.ogg")
    (library / "dataset.json").write_text(
        json.dumps({"samples": [{"audio_path": name, "caption": "x"} for name in names]}), encoding="utf-8"
    )
    summary = preprocess(job(library, tmp_path / "out"), null)
    assert summary == Summary(done=1, skipped=0, failed=6)
    assert summary.status == ExitStatus.SOME_FAILED
    said = reasons(tmp_path / "out")
    assert sorted(said) == [name for name in names if name != "good.wav"]
    assert "up to 1e29" in said["absurd.wav"]
    assert "web page" in said["html.mp3"]
    assert "longer than 0:05" in said["hours.flac"]
    assert "git lfs pull" in said["pointer.mp3"]
    assert "sample rate is 1 Hz" in said["rate.wav"]


def test_the_start_of_a_file_that_is_too_long_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "LONGEST_SECONDS", 5)
    library = make_library(tmp_path / "lib", ["a.flac"])
    soundfile.write(library / "a.flac", np.zeros(8_000 * 12), 8_000)
    assert preprocess(job(library, tmp_path / "out", max_duration=1.0), null).done == 1


def test_files_that_are_passed_over_are_counted_in_one_line(tmp_path):
    library = make_library(tmp_path / "lib", ["a.wav"])
    (library / "dataset.json").unlink()
    for name in ("a.dsf", "b.dsf", "c.mkv"):
        (library / name).write_bytes(b"x")
    events = Events()
    preprocess(job(library, tmp_path / "out"), events)
    said = [e.message for e in events.of(Notice) if "passed over" in e.message]
    assert said == ["3 files passed over, because their kind is not read: 2 .dsf, 1 .mkv."]


# The VAE of the fixtures takes three hours for three hours of audio, so a strided mean stands in for it.
MEASURED = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.settings.config import BuildDatasetConfig, PreprocessConfig
from sidestep.tasks.audit import audit
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.preprocess import preprocess

class Vae(torch.nn.Conv1d):
    def __init__(self, config):
        super().__init__(2, 8, 1920, stride=1920)
        self.config = config
    def encode(self, audio):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: self(audio)))

torch.set_num_threads(1)
Checkpoint.load_vae = lambda self, device, dtype, to_encode: Vae(self.vae_config()).to(device, dtype)
command, songs, output, checkpoints = sys.argv[1], *map(Path, sys.argv[2:])
if command == "audit":
    audit(build_dataset(BuildDatasetConfig(input=songs), print).path, print)
else:
    preprocess(PreprocessConfig(checkpoint_dir=checkpoints, model_variant="turbo", device="cpu", audio_dir=songs,
                                tensor_output=output, normalize="peak"), print)
status = Path("/proc/self/status").read_text()
print("PEAK", next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def silence(path: Path, hours: float) -> None:
    with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(round(hours * 60)):
            file.write(np.zeros(8_000 * 60, np.int16))


def peak_bytes(command: str, folder: Path, checkpoints: Path) -> int:
    arguments = [command, str(folder), str(folder.parent / "out"), str(checkpoints)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.rsplit("PEAK", 1)[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("command", ["preprocess", "audit"])
def test_three_hours_stay_below_two_gib(tmp_path, checkpoints, command):
    folder = make_library(tmp_path / "lib", ["a good one.wav"])
    (folder / "dataset.json").unlink()
    silence(folder / "three hours.flac", 3)
    peak = peak_bytes(command, folder, checkpoints)
    assert peak < 2 * 1024**3, f"{peak / 1024**3:.2f} GiB"
    if command == "preprocess":
        assert sorted(contents(tmp_path / "out")) == ["a good one.wav.pt", "three hours.flac.pt"]
