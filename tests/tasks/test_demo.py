"""The demo's folder: whole, or made anew by the next demo there; never another's. The pipeline itself: test_wizard."""

from pathlib import Path

import pytest

from sidestep.cli.main import main
from sidestep.errors import UserError
from sidestep.events import Notice
from sidestep.files import one_writer
from sidestep.settings.config import DemoConfig
from sidestep.tasks import demo as module
from sidestep.tasks.demo import UNFINISHED, demo
from tests.dying import Dies


def dies(*_args, **_how) -> None:
    raise Dies


@pytest.mark.parametrize("step", ["write_music", "build_dataset", "preprocess", "train"])
def test_a_demo_that_was_killed_is_made_anew_and_nothing_else_is_touched(tmp_path, monkeypatch, step):
    config, seen = DemoConfig(output_dir=tmp_path / "demo"), []
    for name in ("write_tiny_checkpoint", "write_music", "build_dataset", "preprocess", "train"):
        part = {"write_tiny_checkpoint": "checkpoints", "write_music": "songs", "preprocess": "tensors"}.get(
            name, "run"
        )
        monkeypatch.setattr(module, name, lambda *_a, part=part: (config.output_dir / part).mkdir(exist_ok=True))
    monkeypatch.setattr(module, step, dies)
    with pytest.raises(Dies):
        demo(config, seen.append)
    (config.output_dir / "mine.txt").write_text("mine", encoding="utf-8")
    left = {path.name for path in config.output_dir.iterdir()}
    assert UNFINISHED in left
    assert left & {"checkpoints", "songs", "tensors", "run"}

    def whole(home: Path, _report) -> int:
        assert {path.name for path in home.iterdir()} - {".lock", ".lock-holder"} == {UNFINISHED, "mine.txt"}
        return 4

    monkeypatch.setattr(module, "run_pipeline", whole)
    demo(config, seen.append)
    assert any("made anew" in event.message for event in seen if isinstance(event, Notice))
    with pytest.raises(UserError, match="overwrites nothing"):
        demo(config, seen.append)


def test_a_second_demo_in_the_same_folder_at_the_same_time_is_refused(tmp_path, capsys):
    with one_writer(tmp_path / "demo"):
        assert main(["--plain", "demo", "--output-dir", str(tmp_path / "demo")]) == 2
    assert "another process is writing there" in capsys.readouterr().err


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "songs").mkdir()
    assert main(["--plain", "demo", "--output-dir", str(tmp_path)]) == 2
    assert "overwrites nothing" in capsys.readouterr().err
    assert (tmp_path / "songs").is_dir()
