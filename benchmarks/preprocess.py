"""What preprocessing costs beside the VAE itself: speed of the first pass and of tiles, and peak memory.

    uv run python -m benchmarks.preprocess

A few minutes on two CPU cores; writes benchmarks/results/preprocess.json. The VAE has the real architecture with few
channels and random weights, so everything around it weighs more than with the real one. Songs are compressed and at
44.1 kHz, so that decoding and resampling have something to hide. Memory is the resident set's peak (Linux), by length
and number of songs.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from diffusers import AutoencoderOobleck

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.vae import TILE_FRAMES, encode_mean
from sidestep.audio.io import decode
from sidestep.events import null
from sidestep.settings.config import PreprocessConfig
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.preprocess import run as running

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "tests" / "fixtures" / "checkpoints"
RESULT = ROOT / "benchmarks" / "results" / "preprocess.json"
CHANNELS = 16  # of the VAE's first layer: twice the channels that the tiny checkpoint's model works on
SHAPES = {"8 songs of 18 s": (8, 18.0), "2 songs of 3 min": (2, 180.0), "1 song of 10 min": (1, 600.0)}


def make_checkpoints(folder: Path, encoder_channels: int) -> Path:
    """The tiny checkpoint with a random VAE of so many channels in its first layer (128 in the real one)."""
    shutil.copytree(CHECKPOINTS, folder)
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    AutoencoderOobleck(**known | {"encoder_hidden_size": encoder_channels, "decoder_channels": 4}).save_pretrained(
        folder / "vae"
    )
    return folder


def make_songs(folder: Path, count: int, seconds: float, suffix: str = ".mp3") -> Path:
    """Noisy chords, compressed, at 44.1 kHz."""
    folder.mkdir(parents=True)
    n = np.arange(round(seconds * 44100)) / 44100
    random = np.random.default_rng(0)
    for i in range(count):
        audio = sum(
            0.1 * np.sin(2 * np.pi * (110 + 13 * i) * k * n) for k in (2, 3, 5)
        ) + 0.02 * random.standard_normal(len(n))
        soundfile.write(folder / f"{i}{suffix}", np.stack([audio, audio[::-1]], 1).astype(np.float32), 44100)
    return folder


def config_of(checkpoints: Path, songs: Path, output: Path) -> PreprocessConfig:
    return PreprocessConfig(
        checkpoint_dir=checkpoints, audio_dir=songs, tensor_output=output, device="cpu", normalize="lufs"
    )


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_throughput(folder: Path, channels: int, songs: int, seconds: float, rounds: int) -> dict:
    """Pass 1 over audio (decoding, resampling, loudness, tiles, writing) against diffusers' `vae.encode`, in turns."""
    checkpoints = make_checkpoints(folder / "checkpoints", channels)
    library = make_songs(folder / "songs", songs, seconds)
    vae: Any = AutoencoderOobleck.from_pretrained(checkpoints / "vae").eval().requires_grad_(False)
    decoded = [torch.from_numpy(decode(path))[None] for path in sorted(library.glob("*.mp3"))]
    real_encode, real_load = running.encode_songs, Checkpoint.load_vae
    spent, loading = [], []

    def bare() -> None:
        with torch.inference_mode():
            for audio in decoded:
                vae.encode(audio).latent_dist.mode()

    def timed_encode(*arguments):
        start = time.perf_counter()
        ready = real_encode(*arguments)
        spent.append(time.perf_counter() - start)
        return ready

    def timed_load(*arguments):
        start = time.perf_counter()
        model = real_load(*arguments)
        loading.append(time.perf_counter() - start)
        return model

    running.encode_songs, Checkpoint.load_vae = timed_encode, timed_load
    rows = []
    bare()
    for turn in range(rounds):
        before = timed(bare)
        spent.clear(), loading.clear()
        preprocess(config_of(checkpoints, library, folder / f"out{turn}"), null)
        after = timed(bare)
        rows.append({"bare_seconds": (before + after) / 2, "pass_seconds": spent[0] - loading[0]})
        print(
            f"  bare vae.encode {before:.2f} s and {after:.2f} s, pass 1 {rows[-1]['pass_seconds']:.2f} s", flush=True
        )
    running.encode_songs, Checkpoint.load_vae = real_encode, real_load
    ratio = statistics.median(row["bare_seconds"] / row["pass_seconds"] for row in rows)
    return {"audio_seconds": songs * seconds, "throughput_of_bare": round(ratio, 3), "rounds": rows}


def measure_tiles(folder: Path, channels: int, seconds: float, rounds: int) -> dict:
    """The same song in tiles and in one piece, in turns."""
    checkpoints = make_checkpoints(folder / "checkpoints", channels)
    vae = running.open_job(config_of(checkpoints, folder, folder / "none"), null).checkpoint.load_vae()
    audio = torch.randn(1, 2, round(seconds * 48000)) * 0.1
    encode_mean(vae, audio), encode_mean(vae, audio, 0)
    tiles, whole = zip(
        *((timed(lambda: encode_mean(vae, audio)), timed(lambda: encode_mean(vae, audio, 0))) for _ in range(rounds)),
        strict=True,
    )
    difference = (encode_mean(vae, audio) - encode_mean(vae, audio, 0)).abs().max().item()
    ratio = statistics.median(t / w for t, w in zip(tiles, whole, strict=True))
    print(f"  in tiles {statistics.median(tiles):.2f} s, in one piece {statistics.median(whole):.2f} s", flush=True)
    return {
        "audio_seconds": seconds,
        "tile_frames": TILE_FRAMES,
        "tiles_over_whole": round(ratio, 3),
        "largest_difference": difference,
    }


PEAK = """
import sys
from pathlib import Path
import torch
from benchmarks.preprocess import config_of, resident_mib
from sidestep.events import null
from sidestep.tasks.preprocess import preprocess
checkpoints, warm, songs, output = map(Path, sys.argv[1:])
preprocess(config_of(checkpoints, warm, output / "warm"), null)  # libraries and kernels are in memory now
before = resident_mib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
preprocess(config_of(checkpoints, songs, output / "songs"), null)
print(resident_mib("VmHWM") - before)
"""


def resident_mib(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return int(line.split()[1]) / 1024


def measure_peak(folder: Path, cases: dict[str, tuple[int, float]]) -> dict:
    """MiB that a whole run adds to a process that is warm, and the same without the samples of its longest song."""
    checkpoints = make_checkpoints(folder / "checkpoints", CHANNELS)
    warm = make_songs(folder / "warm", 1, 30)
    rows = {}
    for name, (count, seconds) in cases.items():
        songs = make_songs(folder / name.replace(" ", "_"), count, seconds)
        command = [
            sys.executable,
            "-c",
            PEAK,
            str(checkpoints),
            str(warm),
            str(songs),
            str(folder / "out" / name.replace(" ", "_")),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        added = float(done.stdout.splitlines()[-1])
        samples = seconds * 48000 * 2 * 4 / 2**20
        rows[name] = {
            "added_mib": round(added, 1),
            "samples_mib": round(samples, 1),
            "beyond_samples_mib": round(added - samples, 1),
        }
        print(f"  {name}: {added:.0f} MiB, its samples {samples:.0f} MiB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("throughput", "shapes", "tiles", "memory"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--channels", type=int, default=CHANNELS, help="of the VAE's first layer, for throughput")
    asked = parser.parse_args()
    # parts that are not run keep their figures
    stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    results = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "vae_channels": CHANNELS,
    }
    with tempfile.TemporaryDirectory() as folder:
        if asked.only in (None, "throughput"):
            print("Pass 1 against bare vae.encode:", flush=True)
            results["throughput"] = measure_throughput(
                Path(folder, "throughput"), asked.channels, songs=8, seconds=18, rounds=asked.rounds
            )
        if asked.only in (None, "shapes"):
            results["shapes"] = stored.get("shapes", {})
            for number, name in enumerate(asked.shapes):
                print(f"Pass 1 against bare vae.encode, {name}:", flush=True)
                where = Path(folder, f"shape {number}")
                found = measure_throughput(where, asked.channels, *SHAPES[name], asked.rounds)
                results["shapes"][name] = {"channels": asked.channels} | found
        if asked.only in (None, "tiles"):
            print("Tiles against one piece:", flush=True)
            results["tiles"] = measure_tiles(Path(folder, "tiles"), CHANNELS, seconds=40, rounds=asked.rounds)
        if asked.only in (None, "memory"):
            print("Memory added at the peak:", flush=True)
            cases: dict[str, tuple[int, float]] = {
                "one song of 1 min": (1, 60),
                "one song of 10 min": (1, 600),
                "4 songs of 20 s": (4, 20),
                "16 songs of 20 s": (16, 20),
            }
            results["memory"] = measure_peak(Path(folder, "memory"), cases)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(stored | results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
