"""Load: what large libraries, long runs and years of use take, in one table.

    uv run --group dev python -m benchmarks.load                 all parts
    uv run --group dev python -m benchmarks.load --only songs    one part; the others keep their figures

Writes load.json and load.md to benchmarks/results. Commands run in processes of their own, as a user starts them: told
are wall-clock seconds and the most memory that the process held. Each part is a function of a scratch folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.measure import ROOT
from sidestep.settings.option import as_arguments
from sidestep.words import gib
from tests.pseudo_terminal import Session
from tests.training_world import WIDTH, record, settings, write_data

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was done, what it took, and what it may take ("" where nothing is asked)."""

    what: str
    measured: str
    at_most: str = ""


def run_command(*words: str, cwd: Path = ROOT) -> tuple[float, int]:
    """(seconds, peak bytes) of a command of this program. Raises CalledProcessError where it fails."""
    command = [sys.executable, str(ROOT / "train.py"), "--plain", "--yes", *words]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL) as process:
        if not hasattr(os, "wait4"):  # Windows
            process.wait()
            return time.perf_counter() - started, 0
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def took(seconds: float, peak: int) -> str:
    """Seconds and memory as the table tells them."""
    return f"{seconds:.1f} s, {gib(peak, 2)}"


def make_songs(folder: Path, number: int) -> None:
    """So many songs of a second in albums of twelve, each with a text beside it."""
    times = np.arange(48_000) / 48_000
    for i in range(number):
        album = folder / f"album {i // 12}"
        album.mkdir(parents=True, exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * (200 + i / 5) * times)
        soundfile.write(album / f"{i:04} song.flac", np.stack([tone, tone], axis=1), 48_000)
        words = "la la la\n" * 40
        text = f"caption: a song with the number {i}\nbpm: {60 + i % 100}\nlyrics:\n[Verse]\n{words}"
        (album / f"{i:04} song.txt").write_text(text, encoding="utf-8")


def songs(folder: Path) -> list[Row]:
    """5,000 songs indexed, indexed again and audited; a dataset.json of a million entries."""
    make_songs(folder / "songs", 5000)
    build = ("build-dataset", "--input", str(folder / "songs"))
    rows = [
        Row("5,000 songs: build-dataset", took(*run_command(*build)), "60 s"),
        Row("… again, with 5,000 entries to keep", took(*run_command(*build)), "60 s"),
        Row("… and audited", took(*run_command(*build, "--audit"))),
        Row("… and audited again", took(*run_command(*build, "--audit"))),
    ]
    make_songs(folder / "few", 1)
    entries = [{"audio_path": f"gone/{i}.wav", "caption": f"song {i}"} for i in range(1_000_000)]
    (folder / "few" / "dataset.json").write_text(json.dumps(entries), encoding="utf-8")
    rows.append(
        Row(
            "a dataset.json of a million songs that are gone: build-dataset",
            took(*run_command("build-dataset", "--input", str(folder / "few"))),
        )
    )
    return rows


def make_runs(folder: Path, number: int) -> None:
    """So many runs of which each has three checkpoints."""
    settings = json.dumps({"dataset_dir": "tensors/a", "checkpoint_dir": "checkpoints", "rank": 64})
    for i in range(number):
        for epoch in (10, 20, 30):
            checkpoint = folder / f"run-{i:04}" / "checkpoints" / f"epoch_{epoch:04}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "complete.json").write_text(json.dumps({"position": {"step": epoch}}), encoding="utf-8")
        (folder / f"run-{i:04}" / "config.json").write_text(settings, encoding="utf-8")


def runs(folder: Path) -> list[Row]:
    """The wizard beside 5,000 runs: how soon its menu is there, and how soon it asks which of them goes on."""
    make_runs(folder / "runs", 5000)
    known = {"version": 1, "values": {"welcomed": True, "output_dir": str(folder / "runs" / "run-0000")}}
    (folder / "home").mkdir()
    (folder / "home" / "settings.json").write_text(json.dumps(known), encoding="utf-8")
    with Session(folder) as session:
        session.asks("What would you like to do?")
        menu = time.monotonic() - session.began
        session.choose("Resume a run")
        chosen = time.monotonic()
        session.asks("Run")
        return [
            Row("5,000 past runs: the wizard's menu", f"{menu:.1f} s", "1 s"),
            Row("… and which of them to go on with", f"{time.monotonic() - chosen:.1f} s", "1 s"),
        ]


def records(folder: Path) -> list[Row]:
    """20,000 records of half a minute to the first optimizer step, with and without their index."""
    made = record(1, 750, lyrics="la la la\n" * 60)
    made = replace(made, encoder_hidden_states=torch.randn(200, WIDTH))
    for i in range(20_000):
        path = folder / "tensors" / f"album {i // 12}" / f"{i:05} song.flac.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {name: getattr(made, name) for name in ("target_latents", "encoder_hidden_states", "metadata")}, path
        )

    def first_step(data: Path, name: str) -> str:
        config = settings(data, folder / name, epochs=1, max_steps=1)
        return took(*run_command("fixed", *as_arguments(config)))

    few = folder / "few"
    few.mkdir()
    for path in sorted((folder / "tensors").rglob("*.pt"))[:5]:
        shutil.copy(path, few)
    return [
        Row("5 records: a run of one step, for comparison", first_step(few, "run-few")),
        Row("20,000 records: the same", first_step(folder / "tensors", "run-cold"), "23 s"),
        Row("… again, with their index", first_step(folder / "tensors", "run-warm"), "23 s"),
    ]


def epochs(folder: Path) -> list[Row]:
    """Memory over 2,000 epochs of one song, against that over 20."""
    data = write_data(folder / "tensors", (20,))
    peaks = {}
    for number in (20, 2000):
        config = settings(
            data, folder / f"run-{number}", epochs=number, log_every=100, save_every=1000, save_best=False
        )
        seconds, peaks[number] = run_command("fixed", *as_arguments(config))
    grown = f"{(peaks[2000] - peaks[20]) / 2**20:+.0f} MiB against 20 epochs"
    return [Row("2,000 epochs of one song: memory", f"{took(seconds, peaks[2000])} ({grown})", "flat")]


PARTS: dict[str, Callable[[Path], list[Row]]] = {"songs": songs, "runs": runs, "records": records, "epochs": epochs}


def table(stored: dict[str, list[dict[str, str]]]) -> str:
    """All stored rows as a page."""
    rows = [Row(**row) for part in PARTS for row in stored.get(part, [])]
    lines = [f"| {row.what} | {row.measured} | {row.at_most} |" for row in rows]
    head = [
        *(
            "# Load",
            "",
            "Rebuilt by `python -m benchmarks.load`. Wall-clock seconds and peak memory of the process.",
            "",
        ),
        *("| | measured | at most |", "|---|---|---|"),
    ]
    return "\n".join([*head, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "load.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in options.only:
        with tempfile.TemporaryDirectory() as folder:
            stored[part] = [asdict(row) for row in PARTS[part](Path(folder))]
        path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (options.output / "load.md").write_text(table(stored), encoding="utf-8")
    print(table(stored))


if __name__ == "__main__":
    main()
