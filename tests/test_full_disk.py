"""A disk that fills up at any write: the command says so and fails, what was there stays, the same command mends it.

Every file of this program is flushed before it gets its name (`files.py`), so the n-th flush is the n-th write.
"""

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from sidestep.cli.main import main
from sidestep.data.records import Record, save_record
from sidestep.errors import ExitStatus
from sidestep.events import Saved
from sidestep.settings.option import as_arguments
from sidestep.tasks.train.checkpoints import positions
from sidestep.tasks.train.setup import train
from tests.song_library import tone, write_sndfile
from tests.training_world import CHECKPOINTS, run, settings, write_data

MOMENTS = 10
pytestmark = pytest.mark.slow


class Disk:
    """Counts writes; from the n-th on there is no room."""

    def __init__(self, monkeypatch):
        self.writes, self.room, fsync = 0, 10**9, os.fsync

        def flushed(descriptor: int) -> None:
            self.writes += 1
            if self.writes > self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", flushed)

    def fills_after(self, room: int) -> None:
        self.writes, self.room = 0, room


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def build_dataset(folder: Path) -> tuple[list[str], Path, list[str]]:
    songs = folder / "songs"
    songs.mkdir(exist_ok=True)
    write_sndfile(songs / "a.wav", tone(), 48_000)
    return ["build-dataset", "--input", str(songs), "--output", str(folder / "out" / "dataset.json")], songs, []


def export(folder: Path) -> tuple[list[str], Path, list[str]]:
    if not (folder / "run").exists():
        run(settings(write_data(folder / "data", frames=(30,)), folder / "run", epochs=1))
    words = ["export", str(folder / "run" / "final"), "--output", str(folder / "out" / "peft")]
    return [*words, "--format", "peft"], folder / "run", ["--overwrite"]


def estimate(folder: Path) -> tuple[list[str], Path, list[str]]:
    tensors = folder / "tensors"
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        latents = torch.randn(30 + i, 8, generator=generator).cumsum(0) / 10 + 0.5
        save_record(tensors / f"song{i}.pt", Record(latents, torch.randn(10 + i, 32, generator=generator), {}))
    words = ["estimate", "--checkpoint-dir", str(CHECKPOINTS), "--dataset-dir", str(tensors), "--device", "cpu"]
    words += ["--output", str(folder / "out" / "rank_map.json"), "--rank", "4", "--rank-min", "1"]
    words += ["--rank-max", "16", "--batches", "8"]
    return words, tensors, []


def files_of(folder: Path) -> dict[Path, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".records.json"]  # an index
    return {path: path.read_bytes() for path in found}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith((".tmp-", ".saving-", ".replaced-"))]


@pytest.mark.parametrize("command", [build_dataset, export, estimate])
def test_a_command_whose_disk_fills_up_fails_and_says_so_and_the_same_command_mends_it(tmp_path, disk, capsys, command):
    words, inputs, again = command(tmp_path)
    before = files_of(inputs)
    disk.fills_after(10**9)
    assert main(["--plain", "--yes", *words]) == ExitStatus.OK
    good, needed = files_of(tmp_path / "out"), disk.writes
    draw = random.Random(1)
    for _ in range(MOMENTS):
        capsys.readouterr()
        for path in files_of(tmp_path / "out"):
            path.unlink()
        disk.fills_after(draw.randrange(max(1, needed // 2)))
        assert main(["--plain", "--yes", *words, *again]) in (ExitStatus.FAILED, ExitStatus.USAGE)
        assert "No space left" in capsys.readouterr().err
        assert not leftovers(tmp_path)
        assert files_of(inputs) == before
    disk.fills_after(10**9)
    assert main(["--plain", "--yes", *words, *again]) == ExitStatus.OK
    assert set(files_of(tmp_path / "out")) >= set(good)


def test_a_run_whose_disk_fills_up_ends_with_its_last_checkpoint_and_goes_on_from_it(tmp_path, disk, capsys):
    shared = {"epochs": 4, "save_every": 1, "keep_checkpoints": 0}
    data = write_data(tmp_path / "data", frames=(30, 40))
    needed, draw = [], random.Random(2)

    def look(event) -> None:
        if isinstance(event, Saved) and event.what == "final":
            needed.append(disk.writes)  # what comes after it, the report's last page, costs no adapter

    for name in ("first", "straight"):  # the first one also writes down what it has read of the records
        disk.fills_after(10**9)
        train(settings(data, tmp_path / name, **shared), look)
    for moment in range(MOMENTS):
        config = settings(data, tmp_path / f"run {moment}", **shared)
        disk.fills_after(draw.randrange(3, needed[-1]))
        assert main(["--plain", "fixed", *as_arguments(config)]) in (ExitStatus.FAILED, ExitStatus.USAGE), disk.writes
        said = capsys.readouterr().err
        assert "the disk is full" in said or "cannot be written" in said
        saved = list(positions(config.output_dir))
        assert not saved or str(saved[-1]) in said
        assert not leftovers(config.output_dir)
        disk.fills_after(10**9)
        resume = ["--resume-from", "latest"] if saved or (config.output_dir / "final").exists() else []
        assert main(["--plain", "fixed", *as_arguments(config), *resume]) == ExitStatus.OK
        assert files_of(config.output_dir / "final").keys()
