"""`--dry-run` says what every command would do, and changes nothing on the disk."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidestep.acestep.device import GIB, GpuMemory, with_overhead
from sidestep.acestep.layout import read_config
from sidestep.cli.main import main
from sidestep.errors import UserError
from sidestep.events import null
from sidestep.settings.config import COMMANDS, BuildDatasetConfig, PreprocessConfig, SampleConfig, command_words
from sidestep.tasks.dry_run import dry_run
from sidestep.tasks.plan.language import describing_bytes
from sidestep.tasks.train.setup import train
from sidestep.words import gib
from tests.training_world import CHECKPOINTS, Log, settings, write_data
from tests.wizard.walk import write_songs


def everything_below(folder: Path) -> dict[str, tuple]:
    """Name, kind and content of all that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(folder).as_posix()] = (path.is_dir(), content, path.stat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with songs, tensors without an index, and a run that was trained on others."""
    folder = tmp_path_factory.mktemp("work")
    write_songs(folder / "songs")
    shutil.copytree(CHECKPOINTS, folder / "checkpoints")
    shutil.copytree(CHECKPOINTS.parent / "lm" / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
    data = write_data(folder / "tensors")
    train(settings(data, folder / "run"), Log())
    for index in data.glob(".*"):
        shutil.rmtree(index) if index.is_dir() else index.unlink()
    return folder


CALLS = {
    "fixed": "--dataset-dir tensors --output-dir new {base} --chunk-duration 1 --val-split 0.2",
    "train-lm": "--dataset-dir tensors --output-dir new {base}",
    "preprocess": "--audio-dir songs --tensor-output new {base}",
    "build-dataset": "--input songs --audit",
    "estimate": "--dataset-dir tensors {base}",
    "plan": "--vram 12",
    "sample": "--adapter run/final --prompt x --duration 5 {base}",
    "score": "run --keep",
    "compare": "run/final run/checkpoints/epoch_0002 --output new",
    "export": "run/final --output new --format diffusers",
    "inspect": "run/final",
    "history": ".",
    "clean": "run --keep 0 --delete",
    "demo": "--output-dir new",
    "presets": "import file.json",
    "doctor": "",
    "completion": "bash",
}


def test_every_command_is_in_the_table_above():
    assert set(CALLS) == set(COMMANDS)


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] if c == "score" else []) for c in CALLS])
def test_a_dry_run_says_what_would_happen_and_leaves_every_byte_as_it_is(work, monkeypatch, capsys, command):
    monkeypatch.chdir(work)
    monkeypatch.setenv("SIDE_STEP_HOME", str(work / "home"))
    words = CALLS[command].format(base="--checkpoint-dir checkpoints").split()
    before = everything_below(work)
    assert main([command, *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert everything_below(work) == before
    assert "Dry run: nothing is written" in said
    assert "writes" in said or "deletes" in said


def test_what_a_command_tells_of_its_flags_stands_in_its_dry_run_too(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    monkeypatch.setenv("SIDE_STEP_HOME", str(work / "home"))
    words = [*CALLS["fixed"].format(base="--checkpoint-dir checkpoints").split(), "--rank", "8", "--lokr-factor", "4"]
    assert main(["fixed", *words, "--dry-run"]) == 0
    said = "".join(capsys.readouterr())
    assert "--lokr-factor is not used" in said
    assert "follows --rank" in said
    assert main(["fixed", *words, "--dry-run-as-json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_steps_and_the_disk_of_a_dry_run_are_those_of_the_run(work, tmp_path):
    for changes in ({}, {"chunk_duration": 1.0, "batch_size": 2}, {"max_steps": 3}, {"val_split": 0.2}):
        config = settings(work / "tensors", tmp_path / "-".join(changes), **changes)
        lines = {line.what: line.value for line in dry_run(config, null)}
        log = Log()
        train(config, log)
        assert lines["steps"].startswith(f"{log.events[-1].message.split()[1]} optimizer step")
        told = next(event for event in log.events if getattr(event, "what", "") == "disk")
        real, foreseen = told.value.split(","), lines["disk"].split(";")[0].split(", ")
        (checkpoints, each), (foreseen_checkpoints, foreseen_each) = real[0].split(" of "), foreseen[1].split(" of ")
        assert checkpoints == foreseen_checkpoints
        assert float(foreseen_each.split()[0]) == pytest.approx(float(each.split()[0]), rel=0.1)  # KiB


def test_a_rank_map_that_a_training_would_read_is_said(work, tmp_path):
    data = Path(shutil.copytree(work / "tensors", tmp_path / "tensors"))
    config = settings(data, tmp_path / "next")

    def reads(config) -> list[str]:
        return [line.value for line in dry_run(config, null) if line.what == "reads"]

    before = reads(config)
    (data / "rank_map.json").write_text("{}", encoding="utf-8")
    assert reads(config) == [*before, f"the rank of each module, in {data / 'rank_map.json'}"]
    assert reads(replace(config, ignore_rank_map=True)) == before


def test_the_time_is_that_of_a_run_alike_beside_it_and_of_no_other(work):
    config = settings(work / "tensors", work / "next")

    def time_of(config) -> str:
        return next(line.value for line in dry_run(config, null) if line.what == "time")

    (work / "run" / "events.jsonl").write_text('{"event": "StepDone", "steps_per_second": 0.01}\nhalf a li')
    assert time_of(config) == "known after the first steps"  # a damaged log tells nothing
    (work / "run" / "events.jsonl").write_text('{"event": "StepDone", "steps_per_second": 0.01}\n')
    assert time_of(config) == "10 min, at the pace of run"
    assert time_of(replace(config, batch_size=2)) == "known after the first steps"


def test_short_songs_and_files_that_cannot_be_read_are_said_before_preprocessing(work):
    (work / "songs" / "broken.wav").write_bytes(b"RIFF")
    config = PreprocessConfig(checkpoint_dir=CHECKPOINTS, audio_dir=work / "songs", tensor_output=work / "new")
    lines = [f"{line.what} {line.value}" for line in dry_run(config, null)]
    assert any("1 file that cannot be read: broken.wav" in line for line in lines)
    assert any(line.startswith("songs one.wav and 1 more: shorter than 10 s") for line in lines)
    (work / "songs" / "broken.wav").unlink()


@pytest.mark.slow
def test_memory_is_told_against_the_card(work, monkeypatch):
    card = GpuMemory(8 * GIB, "a card")
    monkeypatch.setattr("sidestep.tasks.dry_run.gpu_memory", lambda _device: card)
    fits = [line.value for line in dry_run(settings(work / "tensors", work / "next"), null) if line.what == "memory"]
    assert "of 8.0 GiB (a card), fits" in fits[0]
    card = GpuMemory(GIB // 4, "a small card")
    none = [line.value for line in dry_run(settings(work / "tensors", work / "next"), null) if line.what == "memory"]
    assert "DOES NOT FIT" in none[0]
    sample = SampleConfig(checkpoint_dir=CHECKPOINTS, prompt="x")
    assert any("DOES NOT FIT" in line.value for line in dry_run(sample, null) if line.what == "memory")


def test_who_listens_and_what_it_takes_is_told_before_songs_are_described(work, lm_home, monkeypatch):
    card = GpuMemory(8 * GIB, "a card")
    monkeypatch.setattr("sidestep.tasks.dry_run.gpu_memory", lambda _device: card)
    asked = BuildDatasetConfig(
        **{"input": work / "songs", "caption": "lm", "checkpoint_dir": lm_home, "device": "cpu"},
        model_variant="acestep-v15-512-codes",
    )
    folder = lm_home / "acestep-5Hz-lm-0.6B"
    lines = {line.what: line.value for line in dry_run(asked, null)}
    sizes, dit = (read_config(path / "config.json") for path in (folder, lm_home / "acestep-v15-512-codes"))
    needed = with_overhead(describing_bytes(sizes, dit, "auto", torch.float32))
    assert lines["reads"] == f"the model {folder}, which listens"
    assert lines["memory"].startswith(f"{gib(needed)} of 8.0 GiB (a card), fits")
    monkeypatch.setattr("sidestep.tasks.plan.language.describing_bytes", lambda *of: (9 if of[-1] else 2) * GIB)
    for lyrics, verdict in (("none", "fits"), ("lm", "DOES NOT FIT")):
        lines = {line.what: line.value for line in dry_run(replace(asked, lyrics=lyrics), null)}
        assert f"(a card), {verdict};" in lines["memory"]
    elsewhere = replace(asked, caption="endpoint", endpoint="http://me.example:80/v1", endpoint_model="ears")
    lines = {line.what: line.value for line in dry_run(elsewhere, null)}
    assert lines["sends"] == "each song that lacks something to me.example"
    assert "memory" not in lines


def test_a_program_gets_json_alone(work, capsys, monkeypatch):
    monkeypatch.chdir(work)
    config = settings(work / "tensors", work / "next")
    assert main([*command_words(config), "--dry-run-as-json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {"reads", "writes", "steps", "time", "memory", "disk"} == {line["what"] for line in lines}


def test_what_would_be_refused_is_refused(work, capsys):
    missing = ["fixed", "--dataset-dir", str(work / "nowhere"), "--output-dir", str(work / "new")]
    assert main([*missing, "--checkpoint-dir", str(CHECKPOINTS), "--dry-run"]) == 2
    assert "--dataset-dir" in capsys.readouterr().err
    assert not os.path.lexists(work / "new")


def test_a_dry_run_refuses_what_the_training_would(work, tmp_path):
    config = settings(work / "tensors", tmp_path / "next")
    (tmp_path / "next" / "best").mkdir(parents=True)
    refused = {
        "already stands there": config,
        "--resume-from": replace(config, resume_from=tmp_path / "none"),
        "none": replace(config, output_dir=tmp_path / "new", init_from=tmp_path / "none"),
    }
    for words, wrong in refused.items():
        with pytest.raises(UserError, match=words):
            dry_run(wrong, null)


@pytest.mark.parametrize("wrong", [{"duration": 0.01}, {"keyscale": "xyz"}, {"timesignature": "7"}])
def test_a_dry_run_refuses_what_sample_would(tmp_path, wrong):
    sample = SampleConfig(checkpoint_dir=CHECKPOINTS, prompt="x", output=tmp_path, **wrong)
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        dry_run(sample, null)
