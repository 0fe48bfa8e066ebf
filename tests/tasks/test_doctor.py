"""What the doctor finds, and what it keeps to itself."""

import pytest

from sidestep.cli.main import main
from sidestep.errors import ExitStatus
from sidestep.events import Table
from sidestep.settings.config import DoctorConfig
from sidestep.tasks.doctor import doctor, training_here


def test_it_reports_what_a_bug_report_needs(checkpoints):
    events = []
    found = {finding.what: finding for finding in doctor(DoctorConfig(checkpoint_dir=checkpoints), events.append)}
    assert {
        "device",
        "device memory",
        "training",
        "precision",
        "attention",
        "main memory",
        "free disk",
        "torch",
        "Side-Step",
        "packages",
        "checkpoints",
    } <= set(found)
    assert found["device"].note
    assert found["precision"].note
    assert found["attention"].note
    assert "acestep-v15-turbo (turbo" in found["checkpoints"].value
    assert type(events[0]) is Table
    assert len(events) == 1


@pytest.mark.parametrize(
    ("device", "gib", "value", "note"),
    [
        ("cpu", 64, "the demo", "graphics card of 8 GB"),
        ("mps", 64, "not tried yet", "mps"),
        ("cuda", 79.2, "preset comfortable", "24 GB and more"),
        ("cuda", 11.9, "preset tight", "12 to 16 GB"),
        ("cuda", 7.8, "preset minimal", "8 to 12 GB"),
        ("cuda", 5.9, "preset minimal", "smaller than"),
    ],
)
def test_it_says_what_a_device_means_for_who_wants_to_train(device, gib, value, note):
    finding = training_here(device, int(gib * 2**30))
    assert finding.value == value
    assert note in finding.note


def test_it_names_no_private_folder_unless_asked(checkpoints, monkeypatch, tmp_path):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    private = str(checkpoints), str(tmp_path)
    quiet = str(doctor(DoctorConfig(checkpoint_dir=checkpoints), lambda event: None))
    open_ = str(doctor(DoctorConfig(checkpoint_dir=checkpoints, paths=True), lambda event: None))
    assert not any(path in quiet for path in private)
    assert all(path in open_ for path in private)


@pytest.mark.parametrize(
    ("there", "problem"),
    [
        (lambda folder: None, "There is no such folder or file"),
        (lambda folder: (folder / "music").mkdir(parents=True), "No ACE-Step model here (folders: music)"),
        (lambda folder: folder.write_text("x"), "That is a file"),
    ],
)
def test_a_folder_without_checkpoints_is_an_error_of_the_call(there, problem, tmp_path, capsys):
    there(folder := tmp_path / "nope")
    assert main(["doctor", "--checkpoint-dir", str(folder)]) == ExitStatus.USAGE
    assert f"--checkpoint-dir {folder}: {problem}" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_used_are_shown_and_a_failure(tmp_path, capsys):
    (tmp_path / "acestep-v15-turbo").mkdir()
    (tmp_path / "acestep-v15-turbo" / "config.json").write_text('{"is_turbo": true}', encoding="utf-8")
    assert main(["doctor", "--checkpoint-dir", str(tmp_path)]) == ExitStatus.FAILED
    shown = capsys.readouterr()
    assert "no weights: download again" in shown.out
    assert "none of its models can be used" in shown.err
