"""What is on disk, read without torch."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from sidestep.errors import UserError
from sidestep.settings import path_checks
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import as_json_values


def test_the_models_of_a_download_are_found_with_variant_and_size(checkpoints):
    found = path_checks.find_models(checkpoints)
    assert [(m.name, m.variant, m.is_turbo, m.problem) for m in found] == [
        ("acestep-v15-turbo", "turbo", True, ""),
        ("acestep-v15-xl-turbo", "xl-turbo", True, ""),
    ]
    assert [m.parameters > 50_000 for m in found] == [True, True]  # the XL one is in two files


def test_a_model_folder_itself_is_a_checkpoint_folder_too(checkpoints):
    assert [m.name for m in path_checks.find_models(checkpoints / "acestep-v15-turbo")] == ["acestep-v15-turbo"]


def test_a_fine_tune_is_known_by_its_config_and_listed_after_the_official_ones(checkpoints, tmp_path):
    for name in ("aa-mine", "acestep-v15-turbo"):
        shutil.copytree(checkpoints / "acestep-v15-turbo", tmp_path / name)
    assert [(m.name, m.variant) for m in path_checks.find_models(tmp_path)] == [
        ("acestep-v15-turbo", "turbo"),
        ("aa-mine", "turbo"),
    ]
    assert [path_checks.short_name(n) for n in ("acestep-v15-turbo", "aa-mine")] == ["turbo", "aa-mine"]


def test_the_diffusers_layout_is_found(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "acestep-v15-turbo", tmp_path / "mine" / "transformer")
    (tmp_path / "mine" / "model_index.json").write_text("{}", encoding="utf-8")
    assert [(m.name, m.layout) for m in path_checks.find_models(tmp_path)] == [("mine", "diffusers")]


def test_a_single_file_offers_every_model_it_may_descend_from_or_the_one_beside_it(checkpoints, tmp_path):
    file = Path(shutil.copy(checkpoints / "acestep-v15-turbo" / "model.safetensors", tmp_path / "aio.safetensors"))
    assert [model.variant for model in path_checks.find_models(file)] == [
        "turbo",
        "base",
        "sft",
        "xl-turbo",
        "xl-base",
        "xl-sft",
    ]
    shutil.copy(checkpoints / "acestep-v15-turbo" / "config.json", tmp_path / "aio.json")
    assert [(model.variant, model.problem) for model in path_checks.find_models(file)] == [("turbo", "")]
    file.write_bytes(b"version https://git-lfs")
    assert "LFS" in path_checks.find_models(file)[0].problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x10", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (None, "no weights"),
        ("cut", "cut short"),
    ],
)
def test_weights_that_cannot_be_used_are_said_so(checkpoints, tmp_path, content, problem):
    source, folder = checkpoints / "acestep-v15-turbo", tmp_path / "m"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    if content == "cut":
        content = (source / "model.safetensors").read_bytes()[:-100]
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    assert problem in path_checks.find_models(tmp_path)[0].problem


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "llama"}'])
def test_other_folders_are_no_models(tmp_path, text):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(text, encoding="utf-8")
    assert path_checks.find_models(tmp_path) == []
    assert path_checks.find_models(tmp_path / "nowhere") == []


def test_checkpoints_near_by_are_found(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "acestep-v15-turbo", tmp_path / "checkpoints" / "acestep-v15-turbo")
    assert path_checks.likely_checkpoint_dirs(tmp_path)[0] == tmp_path / "checkpoints"


def test_runs_are_found_with_their_whole_checkpoints_newest_first(tmp_path):
    for age, name in enumerate(("new", "old")):
        folder = tmp_path / name
        for step, checkpoint in ((40, "epoch_0010"), (5, "step_000005"), (None, "epoch_0020")):
            (folder / "checkpoints" / checkpoint).mkdir(parents=True)
            if step is not None:
                (folder / "checkpoints" / checkpoint / "complete.json").write_text(
                    json.dumps({"position": {"step": step}, "files": {}}), encoding="utf-8"
                )
        config = TrainConfig(checkpoint_dir=Path("c"), dataset_dir=Path("d"), output_dir=folder)
        (folder / "config.json").write_text(json.dumps(as_json_values(config)), encoding="utf-8")
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    whole = ("step_000005", "epoch_0010")
    runs = list(path_checks.find_runs(tmp_path))
    assert [(run.folder.name, run.checkpoints, run.finished) for run in runs] == [
        ("new", whole, False),
        ("old", whole, False),
    ]
    assert list(path_checks.find_runs(tmp_path / "nowhere")) == []


def test_a_folder_of_a_data_set_is_not_offered_as_one_of_its_own(tmp_path):
    home = tmp_path / "tensors"
    for record in ("a.pt", "album/b.pt", "other/c.pt"):
        (home / record).parent.mkdir(parents=True, exist_ok=True)
        (home / record).touch()
    (home / "other" / "events.jsonl").touch()  # preprocessing wrote there
    assert set(path_checks.tensors_near(tmp_path)) == {home, home / "other"}
    (home / "a.pt").unlink()
    assert set(path_checks.tensors_near(tmp_path)) == {home / "album", home / "other"}


def test_a_state_of_which_a_file_is_short_or_gone_is_none(tmp_path):
    (tmp_path / "state").write_bytes(bytes(9))
    said = {"position": {"step": 3}, "files": {"state": 9}}
    (tmp_path / "complete.json").write_text(json.dumps(said), encoding="utf-8")
    assert path_checks.saved_facts(tmp_path) == said
    (tmp_path / "state").write_bytes(bytes(8))
    assert path_checks.saved_facts(tmp_path) is None
    (tmp_path / "state").unlink()
    assert path_checks.saved_facts(tmp_path) is None


def test_tensors_are_counted_in_subfolders_too(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "1.pt", tmp_path / "a" / "2.pt", tmp_path / ".tmp-x.pt"):
        path.write_bytes(b"")
    assert path_checks.count_tensors(tmp_path) == 2


# What a path must hold


def no_songs(folder):
    raise UserError("No audio files in there.")


@pytest.fixture
def home(tmp_path, checkpoints, monkeypatch) -> Path:
    """Songs, their list, tensors, a run with one saved state, a run without, and other things."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoints, tmp_path / "models")
    for folder in ("songs", "tensors", "empty", "run/checkpoints/epoch_0010", "run/final", "fresh", "lora"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "songs" / "dataset.json").write_text('{"samples": [{}, {}]}', encoding="utf-8")
    (tmp_path / "nothing.json").write_text("[]", encoding="utf-8")
    lengths = json.dumps([{"duration": seconds} for seconds in (2, 9.9, 10)])
    (tmp_path / "short.json").write_text(lengths, encoding="utf-8")
    (tmp_path / "tensors" / "a.pt").write_bytes(b"")
    (tmp_path / "lora" / "x.safetensors").write_bytes(b"")
    (tmp_path / "run" / "final" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "checkpoints" / "epoch_0010" / "complete.json").write_text(
        '{"position": {"step": 10}, "files": {}}', encoding="utf-8"
    )
    for name in ("run", "fresh"):
        (tmp_path / name / "config.json").write_text('{"dataset_dir": "tensors"}', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("holds", "path", "line"),
    [
        ("checkpoints", "models", "2 models"),
        ("songs", "songs", "2 songs"),
        ("songs or dataset.json", "songs", "2 songs; choose its dataset.json to use the captions in there"),
        ("songs or dataset.json", "songs/dataset.json", "2 songs listed"),
        ("dataset.json", "short.json", "3 songs listed, 2 of them under 10 s, which teaches little"),
        ("dataset.json", "songs/dataset.json", "2 songs listed"),
        ("tensors", "tensors", "1 song as tensors"),
        ("adapter", "run/final", ""),
        ("adapter", "lora", ""),
        ("adapter", "lora/x.safetensors", ""),
        ("run", "run", "saved: epoch_0010"),
        ("saved state", "latest", ""),
        ("saved state", "run", "saved: epoch_0010"),
        ("saved state", "run/checkpoints/epoch_0010", "saved: epoch_0010"),
        ("new run", "runs/new", "a new folder"),
        ("new run", "empty", ""),
        ("new folder", "other/new", "a new folder"),
        ("new folder", "tensors", "1 song there already: what is unchanged is kept"),
    ],
)
def test_a_path_that_holds_what_it_must_is_taken_with_a_line_about_it(home, holds, path, line):
    path_checks.glance(holds, Path(path))
    assert path_checks.verify(holds, Path(path), lambda folder: "2 songs") == line


@pytest.mark.parametrize(
    ("holds", "path", "problem"),
    [
        ("checkpoints", "empty", "No ACE-Step model here"),
        ("songs", "empty", "No audio files"),
        ("dataset.json", "nothing.json", "No songs are listed"),
        ("dataset.json", "tensors/a.pt", "Not readable as JSON|No songs are listed"),
        ("tensors", "empty", "No .pt tensors here"),
        ("adapter", "run", "No adapter here"),
        ("run", "empty", "No run here"),
        ("run", "fresh", "no checkpoint to go on from"),
        ("new run", "run", "A run stands there already"),
    ],
)
def test_a_path_that_holds_something_else_is_refused_once_it_is_entered(home, holds, path, problem):
    path_checks.glance(holds, Path(path))
    with pytest.raises(UserError, match=problem):
        path_checks.verify(holds, Path(path), no_songs)


@pytest.mark.parametrize(
    ("holds", "path", "problem"),
    [
        ("checkpoints", "nowhere", "There is no such folder or file"),
        ("checkpoints", "nothing.json", "That is a file"),
        ("dataset.json", "songs", "That is a folder"),
        ("tensors", "tensors/a.pt", "That is a file"),
        ("new run", "nothing.json", "That is a file"),
        ("new folder", "nothing.json/below", "is a file"),
        ("songs", "x" * 5000, "too long"),
    ],
)
def test_a_path_that_cannot_be_one_is_refused_while_it_is_typed(home, holds, path, problem):
    with pytest.raises(UserError, match=problem):
        path_checks.glance(holds, Path(path))


def test_while_a_path_is_typed_nothing_is_read(home, monkeypatch):
    def read(*_):
        raise AssertionError("a file was opened")

    for name in ("open", "read_text", "read_bytes", "rglob", "glob", "iterdir"):
        monkeypatch.setattr(Path, name, read)
    for holds in path_checks.CONTENTS:
        for path in ("models", "songs", "run", "tensors", "nothing.json", "nowhere"):
            with contextlib.suppress(UserError):
                path_checks.glance(holds, Path(path))


DROPPED = [  # (what a terminal makes of a file that is dropped on it, or a person types, the path)
    ("/music/My Songs", "/music/My Songs"),
    (r"/music/My\ Songs", "/music/My Songs"),
    (r"/music/Don\'t\ \(live\)\ \&\ more/ ", "/music/Don't (live) & more/"),
    (r"/music/100\%\ \#1\ \[mix\]", "/music/100% #1 [mix]"),
    ("'/music/My Songs'", "/music/My Songs"),
    ('"/music/My Songs" ', "/music/My Songs"),
    (r"'/music/Don'\''t stop'", "/music/Don't stop"),
    ("& '/music/It''s mine'", "/music/It's mine"),
    ('& "/music/My Songs"', "/music/My Songs"),
    ("“/music/My Songs”", "/music/My Songs"),
    ("‘/music/My Songs’", "/music/My Songs"),
    ("„/music/Meine Lieder“", "/music/Meine Lieder"),
    ("«/music/Mes chansons»", "/music/Mes chansons"),
    ("file:///music/My%20Songs", "/music/My Songs"),
    ("'file:///music/My%20Songs'", "/music/My Songs"),
    ("file://localhost/music/100%25%20%E6%97%A5", "/music/100% 日"),
    ("FILE:/music/a#b?c", "/music/a#b?c"),
    ("file://host/music/x", "/music/x"),
    ("/music/Songs of the 60s'", "/music/Songs of the 60s'"),
    ("/music/Songs of the 60s’", "/music/Songs of the 60s’"),
    ('"/music/Songs of the 60s\'"', "/music/Songs of the 60s'"),
    ("'Til Dawn", "'Til Dawn"),
    ("Rock'n'Roll'", "Rock'n'Roll'"),
    ("& Juliet", "& Juliet"),
    ("/music/100%20", "/music/100%20"),
    ("/music/it\\ s two words", "/music/it\\ s two words"),
    ("'", "'"),
    ("", ""),
]
DROPPED_ON_WINDOWS = [
    (r'"C:\My Songs"', r"C:\My Songs"),
    ('"C:\\My Songs\\"', "C:\\My Songs\\"),
    (r'"C:\My Songs', r"C:\My Songs"),
    (r"& 'C:\Songs of the 60s''\It''s'", r"C:\Songs of the 60s'\It's"),
    (r"C:\Songs of the 60s'", r"C:\Songs of the 60s'"),
    (r'"C:\a & b\100%"', r"C:\a & b\100%"),
    ("file:///C:/My%20Songs/%C3%BC", "C:/My Songs/ü"),
    ("file:///c|/x", "c:/x"),
    ("file://server/share/My%20Songs", "//server/share/My Songs"),
    (r"\\server\share\a b", r"\\server\share\a b"),
    (r"“C:\My Songs”", r"C:\My Songs"),
]


@pytest.mark.parametrize(
    ("typed", "path", "windows"),
    [(*case, False) for case in DROPPED] + [(*case, True) for case in DROPPED_ON_WINDOWS],
)
def test_a_path_is_read_as_every_terminal_drops_it(typed, path, windows):
    assert path_checks.path_of(typed, windows) == path


@pytest.mark.parametrize("name", ["'quoted'", "a\\ b", "& 'x'", "“x”", "60s'", "file:"])
def test_a_name_that_is_there_is_taken_as_it_stands(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert path_checks.path_of(f" {name} ", windows=False) == name
    assert path_checks.path_of(str(tmp_path / name), windows=False) == str(tmp_path / name)


def test_of_thousands_of_runs_only_those_asked_for_are_read(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"run-{number}").mkdir()
        config = tmp_path / f"run-{number}" / "config.json"
        config.write_text('{"dataset_dir": "x"}', encoding="utf-8")
        os.utime(config, (number, number))
    read, read_run = [], path_checks.read_run
    monkeypatch.setattr(path_checks, "read_run", lambda folder: read.append(folder.name) or read_run(folder))
    assert next(path_checks.find_runs(tmp_path)).folder.name == "run-49"
    assert read == ["run-49"]
