"""What the doctor finds, and what it keeps to itself."""

from sidestep.events import Table
from sidestep.settings.config import DoctorConfig
from sidestep.tasks.doctor import doctor


def test_it_reports_what_a_bug_report_needs(checkpoints):
    events = []
    found = {finding.what: finding for finding in doctor(DoctorConfig(checkpoint_dir=checkpoints), events.append)}
    assert {
        "device",
        "device memory",
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


def test_it_names_no_private_folder_unless_asked(checkpoints, monkeypatch, tmp_path):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path))
    private = str(checkpoints), str(tmp_path)
    quiet = str(doctor(DoctorConfig(checkpoint_dir=checkpoints), lambda event: None))
    open_ = str(doctor(DoctorConfig(checkpoint_dir=checkpoints, paths=True), lambda event: None))
    assert not any(path in quiet for path in private)
    assert all(path in open_ for path in private)


def test_no_checkpoints_is_a_finding_too(tmp_path):
    found = {
        finding.what: finding.value for finding in doctor(DoctorConfig(checkpoint_dir=tmp_path), lambda event: None)
    }
    assert found["checkpoints"] == "none found"
