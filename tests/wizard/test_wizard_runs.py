"""Jobs that the wizard really runs, one after another in its own process."""

import io
import json
from pathlib import Path

import pytest
import torch

from sidestep.acestep.device import Choice
from sidestep.cli import main
from sidestep.tasks.train.setup import open_accelerator
from sidestep.terminal.terminal import Terminal
from sidestep.wizard.session import Outside
from tests.training_world import CHECKPOINTS, adapter, settings, write_data
from tests.wizard_world import Screen, Script, welcomed


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_wizard(monkeypatch, **replies) -> tuple[int, Screen, str]:
    """The wizard of the command line with scripted replies: (exit status, what it showed, errors)."""
    screen, errors = Screen(), io.StringIO()
    monkeypatch.setattr(main, "asking", lambda _terminal: (Script(replies), screen))
    monkeypatch.setattr(main, "outside", lambda *_: Outside())
    return main.run_wizard(Terminal(io.StringIO(), errors, io.StringIO())), screen, errors.getvalue()


def test_two_trainings_of_different_precision_run_in_one_wizard(home, monkeypatch):
    data = write_data(home / "tensors", (50, 41))
    welcomed(home / "home", checkpoint_dir=str(CHECKPOINTS), dataset_dir=str(data), device="cpu")
    status, _, errors = run_wizard(
        monkeypatch,
        menu=["settings", "train", "settings", "train", "exit"],
        precision=["fp32", "bf16"],
        next="",
        preset="",
        rank="4",
        epochs="1",
        output_dir=["one", "two"],
    )
    assert (status, errors) == (0, "")
    assert adapter(home / "one" / "final").keys() == adapter(home / "two" / "final").keys()
    for folder, precision in (("one", "fp32"), ("two", "bf16")):
        assert json.loads((home / folder / "config.json").read_text(encoding="utf-8"))["precision"] == precision


def test_a_job_on_the_cpu_leaves_the_next_one_its_own_device_and_precision(home, monkeypatch):
    open_accelerator(settings(home, home / "one", precision="bf16"), lambda _event: None)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")  # in the place of a GPU
    monkeypatch.setattr("sidestep.tasks.train.setup.choose_device", lambda _: Choice(torch.device("meta"), "asked"))
    accelerator, _ = open_accelerator(settings(home, home / "two", precision="fp32"), lambda _event: None)
    assert (accelerator.device.type, accelerator.mixed_precision) == ("meta", "no")


@pytest.mark.slow
def test_the_demo_and_then_a_training_in_another_precision_run_in_one_wizard(home, monkeypatch):
    data = write_data(home / "tensors", (50, 41))
    welcomed(home / "home", checkpoint_dir=str(CHECKPOINTS), dataset_dir=str(data))
    status, _, errors = run_wizard(
        monkeypatch,
        menu=["demo", "settings", "train", "exit"],
        precision="bf16",
        next="",
        preset="",
        rank="4",
        epochs="1",
        output_dir=["demo", "two"],
    )
    assert (status, errors) == (0, "")
    assert (home / "two" / "final" / "adapter_model.safetensors").is_file()
