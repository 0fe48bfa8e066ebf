"""Presets: plain partial configs, checked, never executed."""

import json
import os
import threading
from pathlib import Path

import pytest

from sidestep.errors import UserError
from sidestep.settings import presets
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import options_of, resolve

NEEDED = {"checkpoint_dir": "c", "dataset_dir": "d", "output_dir": "o"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
def test_a_preset_from_a_pipe_is_refused_and_the_pipe_never_opened(tmp_path):
    os.mkfifo(tmp_path / "mine.json")
    threading.Thread(target=lambda: (tmp_path / "mine.json").open("wb").close(), daemon=True).start()
    with pytest.raises(UserError, match="is no file"):
        presets.import_file(tmp_path / "mine.json")
    os.close(os.open(tmp_path / "mine.json", os.O_RDONLY | os.O_NONBLOCK))  # the thread ends


def test_the_built_in_presets_are_there_with_recommended_first():
    names = [preset.name for preset in presets.list_presets()]
    assert names[0] == "recommended"
    assert {"quick_test", "high_quality", "comfortable", "standard", "tight", "minimal"} <= set(names)


@pytest.mark.parametrize("path", sorted(presets.BUILT_IN.glob("*.json")), ids=lambda path: path.stem)
def test_each_built_in_preset_makes_a_valid_config_and_says_what_it_is_for(path):
    preset = presets.read(path)
    assert preset.description
    assert not preset.unknown
    assert preset.built_in
    known = {name: value for name, value in preset.values.items() if name in options_of(TrainConfig)}
    assert resolve(TrainConfig, NEEDED, known)


def test_saved_settings_come_back_without_folders_and_files():
    config = TrainConfig(
        checkpoint_dir=Path("c"),
        dataset_dir=Path("d"),
        output_dir=Path("o"),
        rank=8,
        alpha=16.0,
        target_modules=("q_proj",),
    )
    saved = presets.save("My preset", presets.settings_of(config), "for piano")
    assert presets.find("My preset").values == {"rank": 8, "target_modules": ("q_proj",)}
    assert (saved.description, saved.built_in) == ("for piano", False)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "con", "NUL.txt", "aux .x", "-x", "x" * 80, "a\nb", " a"]
)
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(UserError):
        presets.save(name, {"rank": 8})


def test_built_in_presets_are_read_only():
    for change in (
        lambda: presets.save("minimal", {}),
        lambda: presets.delete("minimal"),
        lambda: presets.rename("minimal", "x"),
    ):
        with pytest.raises(UserError, match="built-in"):
            change()


def test_an_existing_preset_is_replaced_only_when_asked():
    presets.save("mine", {"rank": 8})
    with pytest.raises(UserError, match="already"):
        presets.save("mine", {"rank": 16})
    assert presets.save("mine", {"rank": 16}, replace=True).values == {"rank": 16}


def test_renamed_and_deleted():
    presets.save("mine", {"rank": 8})
    presets.save("other", {})
    with pytest.raises(UserError, match="already"):
        presets.rename("mine", "other")
    assert presets.rename("mine", "new").values == {"rank": 8}
    presets.delete("new")
    with pytest.raises(UserError, match="no preset of that name"):
        presets.find("new")


def test_export_and_import_return_the_same_settings(home):
    presets.save("mine", {"rank": 8, "lr": 1e-3}, "words")
    file = presets.export_file("mine", home)
    presets.delete("mine")
    assert presets.import_file(file).values == {"rank": 8, "lr": 1e-3}
    with pytest.raises(UserError, match="exists already"):
        presets.export_file("mine", home)


def test_unknown_keys_are_named_and_ignored(home):
    file = home / "p.json"
    file.write_text('{"rank": 8, "colour": "red", "__class__": "os.system", "output_dir": "/"}', encoding="utf-8")
    preset = presets.read(file)
    assert preset.values == {"rank": 8}
    assert preset.unknown == ("__class__", "colour", "output_dir")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1]", "not a preset"),
        ("{", "not valid JSON"),
        ('{"rank": "__import__(\'os\')"}', "--rank"),
        ('{"rank": 1e400}', "--rank"),
        ('{"rank": true}', "--rank"),
        ("[" * 100_000, "not valid JSON"),
        (" " * 1_000_001, "too large"),
    ],
)
def test_a_file_that_is_no_preset_is_refused_with_the_reason(home, text, problem):
    file = home / "p.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        presets.read(file)
    assert problem in raised.value.problem


def test_a_broken_preset_of_the_user_hides_no_other():
    presets.save("mine", {"rank": 8})
    (presets.user_folder() / "broken.json").write_text("{", encoding="utf-8")
    names = [preset.name for preset in presets.list_presets()]
    assert "mine" in names
    assert "broken" not in names


def test_nothing_half_written_is_left(home):
    presets.save("mine", {"rank": 8})
    assert [path.name for path in presets.user_folder().iterdir()] == ["mine.json"]
    assert json.loads((presets.user_folder() / "mine.json").read_text(encoding="utf-8"))["rank"] == 8
