"""`clean`: which checkpoints go, what stays, and who is asked."""

import io
import json
from pathlib import Path

import pytest

from sidestep.cli.main import main
from sidestep.errors import UserError
from sidestep.files import one_writer
from sidestep.settings.config import CleanConfig
from sidestep.settings.path_checks import digest_of, read_run, seal_of
from sidestep.tasks.clean import clean
from sidestep.terminal.terminal import Terminal
from tests.wizard_world import Screen, World


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with three checkpoints, its adapter and its best."""
    run = World(tmp_path).run
    for number in (20, 30):
        folder = run / "checkpoints" / f"epoch_00{number}"
        folder.mkdir()
        (folder / "complete.json").write_text(json.dumps({"position": {"step": number}, "files": {}}), encoding="utf-8")
        (folder / "state").write_bytes(bytes(2**20))
    (run / "best").mkdir()
    (run / "checkpoints" / "mine").mkdir()  # no checkpoint
    return run


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_without_delete_it_only_says_which_and_how_much(run):
    screen = Screen()
    found = clean(CleanConfig(folder=run, keep=0), screen)
    assert [Path(path).name for path in found["checkpoints"]] == ["epoch_0010", "epoch_0020", "epoch_0030"]
    assert left(run) == ["epoch_0010", "epoch_0020", "epoch_0030", "mine"]
    text = screen.text()
    assert "3 checkpoints, 2 MiB. Nothing was changed." in text
    assert "clean" in text
    assert "--delete" in text


@pytest.mark.parametrize(
    ("keep", "names"), [(1, ["epoch_0030"]), (2, ["epoch_0020", "epoch_0030"]), (9, None), (0, [])]
)
def test_the_newest_stay_and_so_does_all_else(run, keep, names):
    before = left(run)
    clean(CleanConfig(folder=run, keep=keep, delete=True), Screen())
    assert left(run) == (before if names is None else [*names, "mine"])
    assert (run / "final" / "adapter_config.json").is_file()
    assert (run / "best").is_dir()


def test_the_last_checkpoint_of_a_run_that_is_not_finished_stays(run):
    (run / "final" / "adapter_config.json").unlink()
    assert read_run(run).finished is False
    with pytest.raises(UserError, match="cannot go on"):
        clean(CleanConfig(folder=run, keep=0, delete=True), Screen())
    assert len(left(run)) == 4


def test_a_folder_without_a_run_and_a_run_in_use_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="no run there"):
        clean(CleanConfig(folder=tmp_path, delete=True), Screen())
    with one_writer(run), pytest.raises(UserError):
        clean(CleanConfig(folder=run, delete=True), Screen())
    assert len(left(run)) == 4


class Person(Terminal):
    interactive = True


@pytest.mark.parametrize(("typed", "count"), [("y\n", 2), ("\n", 4), ("n\n", 4)])
def test_a_person_is_asked_before_anything_goes(run, typed, count):
    out = io.StringIO()
    assert main(["clean", str(run)], Person(out, out, io.StringIO(typed))) == 0
    assert "Delete them now? [y/N]" in out.getvalue()
    assert len(left(run)) == count


def test_without_a_person_nothing_goes_unless_it_is_said(run):
    out = io.StringIO()
    assert main(["clean", str(run)], Terminal(out, out, io.StringIO())) == 0
    assert len(left(run)) == 4
    assert main(["clean", str(run), "--delete"], Terminal(out, out, io.StringIO())) == 0
    assert left(run) == ["epoch_0030", "mine"]


@pytest.mark.parametrize("kind", [Person, Terminal])
def test_yes_is_the_answer_where_it_was_given_beforehand(run, kind):
    out = io.StringIO()
    assert main(["--yes", "clean", str(run)], kind(out, out, io.StringIO())) == 0
    assert "[y/N]" not in out.getvalue()
    assert left(run) == ["epoch_0030", "mine"]


def damage(path: Path, how: str) -> None:
    """A state whose file is shorter, has another byte, or whose last file is changed."""
    if how == "shorter":
        (path / "state").write_bytes(bytes(2**20 - 1))
    elif how == "another byte":
        (path / "state").write_bytes(bytes(2**20 - 1) + b"x")
    else:
        said = (path / "complete.json").read_text(encoding="utf-8")
        (path / "complete.json").write_text(said.replace('"step": 30', '"step": 31'), encoding="utf-8")


@pytest.mark.parametrize("how", ["shorter", "another byte", "its last file"])
def test_a_damaged_checkpoint_is_none_of_those_that_are_kept(run, how):
    for number in (20, 30):
        path = run / "checkpoints" / f"epoch_00{number}"
        facts = {
            "position": {"step": number},
            "files": {"state": 2**20},
            "digests": {"state": digest_of(path / "state")},
        }
        (path / "complete.json").write_text(json.dumps(facts | {"seal": seal_of(facts)}), encoding="utf-8")
    damage(run / "checkpoints" / "epoch_0030", how)
    clean(CleanConfig(folder=run, keep=1, delete=True), Screen())
    assert left(run) == ["epoch_0020", "epoch_0030", "mine"]
    damage(run / "checkpoints" / "epoch_0020", "shorter")
    clean(CleanConfig(folder=run, keep=1, delete=True), Screen())
    assert left(run) == ["epoch_0020", "epoch_0030", "mine"], "none is whole: nothing goes"
