"""Two processes (gloo, CPU) train the same adapter as one with twice the accumulation."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidestep.data.records import save_record
from sidestep.events import null
from sidestep.settings.option import as_arguments
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.train.checkpoints import read_checkpoint
from sidestep.tasks.train.setup import train
from tests.several_processes import FSDP, ROOT, ended, finish, start
from tests.tasks.train.test_language import settings as language_settings
from tests.tasks.train.test_language import write_songs
from tests.training_world import adapter, base_beside_turbo, record, run, settings, write_data

pytestmark = pytest.mark.slow
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # torchrun


def largest_difference(a: Path, b: Path) -> float:
    first, second = adapter(a), adapter(b)
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def gradient_norms(folder: Path) -> list[float]:
    """Of each logged step: a loss of the wrong size moves it, and Adam's weights hardly."""
    state, _ = read_checkpoint(complete_checkpoints(folder)[-1])
    return [point["grad_norm"] for point in state["history"]["points"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))  # 5 songs: the last step has one for two processes


# adamw's first steps turn rounding of a near-zero gradient into a full step, so this compares under a rate where
# rounding stays rounding
CHANGES = {"chunk_duration": 1.0, "val_split": 0.2, "ema_decay": 0.9, "lr": 1e-3}


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("environment", [None, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_with_twice_the_accumulation(data, tmp_path, environment, kind):
    one = run(settings(data, tmp_path / "one", adapter_type=kind, gradient_accumulation=2, **CHANGES))
    first, second = finish(
        start(data, tmp_path / "two", environment, adapter_type=kind, gradient_accumulation=1, **CHANGES),
        environment is FSDP,
    )
    (alone, _), (both, _) = (read_checkpoint(complete_checkpoints(tmp_path / n)[-1]) for n in ("one", "two"))
    assert both["history"]["bin_count"] == alone["history"]["bin_count"]  # of both processes' samples
    assert both["history"]["bin_loss"] == pytest.approx(alone["history"]["bin_loss"], rel=1e-3)
    for folder in ("final", "ema"):
        assert largest_difference(tmp_path / "one" / folder, tmp_path / "two" / folder) < 1e-5
    assert gradient_norms(tmp_path / "two") == pytest.approx(gradient_norms(tmp_path / "one"), rel=1e-3)
    losses = [
        event["loss"]
        for line in first.splitlines()
        if (event := json.loads(line))["event"] in ("StepDone", "Validated")
    ]
    expected = [event.loss for event in one.events if type(event).__name__ in ("StepDone", "Validated")]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert second == ""  # only the first process speaks, and only it writes
    assert len(list((tmp_path / "two" / "runs").rglob("events.out*"))) == 1


@pytest.mark.parametrize("environment", [None, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_hear_the_other_music_the_captions_and_the_timesteps_that_one_would(tmp_path, environment):
    for i, frames in enumerate((30, 44, 70)):
        save_record(tmp_path / "other" / f"other {i}.pt", record(100 + i, frames))
    changes = {"chunk_duration": 1.0, "lr": 1e-3, "prior_data": str(tmp_path / "other"), "prior_weight": 0.4}
    varied = {"custom_tag": "sks", "prompt_caption": "sks, one", "caption": "one", "captions": ["two", "three"]}
    data = write_data(tmp_path / "varied", **varied, genre="techno", genre_ratio=30)
    changes |= {"caption_dropout": 0.3, "tag_dropout": 0.3, "metadata_dropout": 0.3}  # what is told is drawn alike, too
    merge = "acestep-v15-merge-base-turbo"  # of base's config, trained as turbo of another shift
    (base_beside_turbo(tmp_path / "models") / "acestep-v15-base").rename(tmp_path / "models" / merge)
    changes |= {"checkpoint_dir": str(tmp_path / "models"), "model_variant": merge}
    changes |= {"timestep_mode": "discrete", "timestep_shift": 1.0}
    heard = {}
    if environment is not FSDP:  # under which the trained model alone can play
        heard = {"preview_every": 2, "preview_prompt": "x", "preview_duration": 1.0, "preview_variant": ["turbo"]}
    finish(start(data, tmp_path / "two", environment, gradient_accumulation=1, **changes, **heard), environment is FSDP)
    one = changes | {name: Path(changes[name]) for name in ("prior_data", "checkpoint_dir")}
    log = run(settings(data, tmp_path / "one", gradient_accumulation=2, **one))
    assert largest_difference(tmp_path / "one" / "final", tmp_path / "two" / "final") < 1e-5
    assert gradient_norms(tmp_path / "two") == pytest.approx(gradient_norms(tmp_path / "one"), rel=1e-3)
    assert bool(heard) == (tmp_path / "two" / "previews" / "on-turbo" / "epoch_0002" / "01-x.flac").is_file()
    (alone, _), (both, _) = (read_checkpoint(complete_checkpoints(tmp_path / n)[-1]) for n in ("one", "two"))
    drifts = [event.drift for event in log.events if type(event).__name__ == "StepDone"]
    assert [point["drift"] for point in both["history"]["points"]] == pytest.approx(drifts, rel=1e-3, abs=1e-9)
    drawn = both["history"]["bin_count"]  # tenths of t; of them shift 1 leaves out two, and shift 3 the lowest three
    assert drawn == alone["history"]["bin_count"]
    assert drawn[0] == drawn[4] == 0
    assert drawn[1] + drawn[2] > 0
    watched, known = (state["history"]["watch"] for state in (both, alone))  # the songs' losses against their history
    assert watched["counts"] == known["counts"]
    assert watched["songs"].keys() == known["songs"].keys()
    for name, entry in known["songs"].items():
        assert watched["songs"][name] == pytest.approx(entry, rel=1e-2, abs=1e-4), name


def test_a_run_of_two_sharded_processes_goes_on_in_one(data, tmp_path):
    finish(start(data, tmp_path / "two", FSDP, gradient_accumulation=1, epochs=1, **CHANGES), sharded=True)
    run(settings(data, tmp_path / "two", gradient_accumulation=2, epochs=2, resume_from=Path("latest"), **CHANGES))
    run(settings(data, tmp_path / "one", gradient_accumulation=2, epochs=1, **CHANGES))
    run(settings(data, tmp_path / "one", gradient_accumulation=2, epochs=2, resume_from=Path("latest"), **CHANGES))
    assert largest_difference(tmp_path / "one" / "final", tmp_path / "two" / "final") < 1e-5


def test_a_run_of_one_process_goes_on_sharded_over_two(data, tmp_path):
    config = settings(data, tmp_path / "one", gradient_accumulation=2, epochs=1, **CHANGES)
    run(config)
    finish(
        start(
            data,
            tmp_path / "two",
            FSDP,
            gradient_accumulation=1,
            resume_from=str(complete_checkpoints(tmp_path / "one")[-1]),
            **CHANGES,
        ),
        sharded=True,
    )
    run(replace(config, epochs=2, resume_from=Path("latest")))
    assert largest_difference(tmp_path / "one" / "final", tmp_path / "two" / "final") < 1e-5


def test_ctrl_c_to_one_of_two_stops_both_after_one_save(data, tmp_path):
    processes = start(data, tmp_path, gradient_accumulation=1, epochs=5000)
    for line in processes[0].stdout:
        if json.loads(line).get("step", 0) >= 20:
            break
    processes[1].send_signal(signal.SIGTERM)  # it is likely to be waiting for the first one, which also writes
    errors = [err for _, err in ended(processes, 60)]
    assert all("Interrupted" in error for error in errors)
    saved = complete_checkpoints(tmp_path)
    assert len(saved) == 1
    state = torch.load(saved[0] / "training_state.pt", weights_only=True)
    assert state["micro_batches"] == 2


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_a_launchers_two_processes_train_the_language_model_as_one_does(tmp_path, lm_home, environment):
    one = language_settings(write_songs(tmp_path / "data", 5), tmp_path / "one", lm_home, lr=1e-3)
    train(one, null)
    two = replace(one, output_dir=tmp_path / "two", gradient_accumulation=1)
    launched = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    launched.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)  # it is the DiT's, and ours to find
    arguments = ["--plain", "train-lm", *as_arguments(two)]
    done = subprocess.run(
        [*LAUNCHER, "train.py", *arguments], cwd=ROOT, env=os.environ | launched, capture_output=True, timeout=120
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, said[-3000:]
    assert f"processes: 2 (as launched, {'fsdp' if environment else 'multi_cpu'})" in said
    assert largest_difference(tmp_path / "one" / "final", tmp_path / "two" / "final") < 1e-6
    assert gradient_norms(tmp_path / "two") == pytest.approx(gradient_norms(tmp_path / "one"), rel=1e-3)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_alone_saves_once(data, tmp_path, number):
    """As a terminal's Ctrl-C does it: the processes are in sessions of their own, and torchrun sends them SIGTERM."""
    config = settings(data, tmp_path / "run", gradient_accumulation=1, epochs=5000)
    launched = subprocess.Popen(
        [*LAUNCHER, "train.py", "--plain", "train", *as_arguments(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in launched.stdout:
        if line.startswith("step "):
            break
    launched.send_signal(number)
    [(said, _)] = ended([launched], 60)
    assert said.count("Saving optimizer step") == 1, said
    assert "torchrun --nproc-per-node 2" in said
    assert len(complete_checkpoints(tmp_path / "run")) == 1
    assert launched.returncode != 0


def test_previews_that_cannot_be_written_cost_a_sharded_run_nothing_else(data, tmp_path):
    """Only the first process writes, and the others must not wait for it inside the model."""
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "epoch_0001").write_text("in the way", encoding="utf-8")
    heard = {"preview_every": 1, "preview_duration": 1.0}  # of two songs, so that there is another take after the first
    said, _ = finish(start(data, tmp_path, FSDP, gradient_accumulation=1, epochs=2, **heard), sharded=True)
    warnings = [event["message"] for event in map(json.loads, said.splitlines()) if event.get("level") == "warning"]
    assert [text for text in warnings if text.startswith("No previews this time")], warnings
    assert len(list((tmp_path / "previews" / "epoch_0002").glob("*.flac"))) == 2
    assert (tmp_path / "final").is_dir()
