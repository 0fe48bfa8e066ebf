"""Real music goes from files to an adapter: listed, preprocessed, trained."""

from dataclasses import replace
from importlib import resources
from pathlib import Path
from shutil import copy

import pytest
from immich_memories_music import tracks_dir

from benchmarks.analyze import labels
from sidestep.data.records import find_records, load_record
from sidestep.events import StepDone
from sidestep.settings.config import BuildDatasetConfig, PreprocessConfig
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.train.evaluation import grid_loss
from sidestep.tasks.train.loop import run_loop
from sidestep.tasks.train.setup import open_accelerator, set_up
from tests.training_world import CHECKPOINTS, Log, adapter, run, settings

pytestmark = pytest.mark.slow
FORMATS = ("flac", "mp3", "ogg", "opus", "wav")


def preprocessed(songs: Path, output: Path, **changes) -> Path:
    """The records of a folder of songs, made with the tiny checkpoint."""
    build_dataset(BuildDatasetConfig(input=songs, tag="testtag"), Log())
    config = PreprocessConfig(
        checkpoint_dir=CHECKPOINTS, device="cpu", dataset_json=songs / "dataset.json", tensor_output=output, **changes
    )
    preprocess(config, Log())
    return output


def test_one_clip_in_five_formats_becomes_an_adapter(tmp_path):
    clips = [Path(str(resources.files("pygame") / "examples" / "data" / f"house_lo.{kind}")) for kind in FORMATS]

    for clip in clips:
        (tmp_path / "songs").mkdir(exist_ok=True)
        copy(clip, tmp_path / "songs")
        (tmp_path / "songs" / f"{clip.name}.txt").write_text(
            f"caption: house music, {clip.suffix}\nbpm: 120\n", encoding="utf-8"
        )
    tensors = preprocessed(tmp_path / "songs", tmp_path / "tensors", regimes=("text2music", "hints"))
    records = [load_record(path) for path in find_records(tensors)]
    assert len(records) == 5
    log = run(settings(tensors, tmp_path / "run", val_split=0.2, chunk_duration=2.0, hints_ratio=0.3, epochs=2))
    assert len(log.of(StepDone)) == 4
    assert adapter(tmp_path / "run" / "final")
    assert "testtag" in (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")


def test_twenty_eight_clips_with_tempo_and_key_become_an_adapter(tmp_path):
    known = labels()
    for clip in sorted(tracks_dir().rglob("*.opus")):
        place = tmp_path / "songs" / clip.parent.name
        place.mkdir(parents=True, exist_ok=True)
        copy(clip, place)
        bpm, key = known[clip.name]
        (place / f"{clip.stem}.txt").write_text(
            f"caption: {clip.stem.replace('_', ' ')}\nbpm: {bpm}\nkey: {key}\n", encoding="utf-8"
        )
    tensors = preprocessed(tmp_path / "songs", tmp_path / "tensors", max_duration=8.0)
    records = [load_record(path) for path in find_records(tensors)]
    assert len(records) == 28
    assert {(r.metadata["bpm"], r.metadata["keyscale"]) for r in records} == set(known.values())
    log = run(settings(tensors, tmp_path / "run", val_split=0.2, epochs=2, gradient_accumulation=4))
    assert len(log.of(StepDone)) == 12  # 22 songs in windows of 4, twice
    assert adapter(tmp_path / "run" / "final")


def test_one_clip_is_learnt_by_heart(tmp_path):
    clip = next(Path(str(resources.files("immich_memories_music") / "tracks")).rglob("*.opus"))
    (tmp_path / "songs").mkdir()
    copy(clip, tmp_path / "songs")
    tensors = preprocessed(tmp_path / "songs", tmp_path / "tensors", max_duration=6.0)
    config = settings(
        tensors,
        tmp_path / "run",
        epochs=120,
        gradient_accumulation=1,
        lr=1e-2,
        dropout=0.0,
        target_mlp=True,
        rank=16,
        alpha=16.0,
        log_every=50,
    )
    accelerator, precision = open_accelerator(config, Log())
    trained = set_up(replace(config, save_best=False, save_every=1000), Log(), accelerator, precision)
    before = grid_loss(trained, trained.songs)
    run_loop(trained)
    assert grid_loss(trained, trained.songs) < 0.9 * before
