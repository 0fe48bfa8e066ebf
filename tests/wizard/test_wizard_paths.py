"""Paths in a real pseudo-terminal: typing never waits for a disk, a scan can be left, and reasons are read in full."""

import io
import json
import time
from pathlib import Path

import pytest

from sidestep.cli import outside as the_outside
from sidestep.terminal import terminal as terminals
from sidestep.terminal.terminal import Terminal
from sidestep.wizard.session import Wizard
from tests.pseudo_terminal import Session
from tests.wizard_world import Screen, Script, World, welcomed

SLOW_DISK = """
import os, time

def slow(real, seconds, where):
    def call(path=".", *rest, **more):
        if where in str(path):
            time.sleep(seconds)
        return real(path, *rest, **more)
    return call

os.listdir = slow(os.listdir, 6, "library")  # what completes a path that is typed
os.stat = slow(os.stat, 6, "library/alb")  # what checks it
os.scandir = slow(os.scandir, 0.5, "library")  # what looks for songs
"""


@pytest.fixture
def user(tmp_path) -> Path:
    """A folder whose library lies on a disk that answers slowly, of someone who has been here before."""
    for number in range(100):
        (tmp_path / "library" / f"album {number}").mkdir(parents=True)
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_DISK, encoding="utf-8")
    (tmp_path / "home").mkdir()
    values = {"version": 1, "values": {"welcomed": True}}
    (tmp_path / "home" / "settings.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_typing_does_not_wait_for_the_disk_and_a_scan_is_left_by_ctrl_c(user):
    with Session(user, PYTHONPATH=str(user / "slow")) as session:
        session.asks("What would you like to do?")
        session.choose("Preprocess")
        session.asks("Songs")
        session.keys(*"library/alb")
        session.until("library/alb", seconds=5)  # less than what one call to that disk takes
        session.keys("clear", *"library", "enter")
        session.until("Looking at library (Ctrl-C: stop)")
        session.keys("ctrl-c")
        session.until("Not taken: Stopped looking at library.")
        session.asks("Songs")
        session.keys("escape")
        session.asks("What would you like to do?")
        session.choose("Exit")
        assert session.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_reason_why_a_path_is_not_taken_is_read_to_its_end(user, columns):
    folder = user / "a folder with a name that goes on and on" / "and another one with such a name in it"
    folder.mkdir(parents=True)
    with Session(user, columns=columns) as session:

        def shows(text: str) -> None:
            """Wait until the screen holds this text, broken into lines anywhere."""
            deadline = time.monotonic() + 240
            while text.replace(" ", "") not in "".join(session.lines()).replace(" ", ""):
                assert time.monotonic() < deadline
                session.read()

        session.asks("What would you like to do?")
        session.choose("Train")
        session.asks("Folder of the checkpoints")
        session.keys("clear", f"{folder}/nowhere")
        shows(f"There is no such folder or file; {folder} is there.")
        session.keys("clear", str(folder), "enter")  # the real check, with what to do
        shows("Not taken: No ACE-Step model here")
        shows("uv run hf download ACE-Step/Ace-Step1.5 --local-dir checkpoints")
        assert all(len(line) <= columns for line in session.lines())


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    welcomed(tmp_path / "home")
    return World(tmp_path / "world")


def test_ctrl_c_in_a_scan_asks_again_and_what_lasts_is_said(world, monkeypatch):
    out, scans = io.StringIO(), []

    def songs_in(folder: Path) -> str:
        scans.append(folder)
        if len(scans) == 1:
            while "Looking at" not in out.getvalue():
                pass
            raise KeyboardInterrupt
        return "1 song"

    monkeypatch.setattr(the_outside, "songs_in", songs_in)
    monkeypatch.setattr(terminals, "MOMENT_SECONDS", 0.01)
    script = Script(
        {"menu": "preprocess", "checkpoint_dir": world.path_for("checkpoint_dir"), "songs": str(world.songs)}
    )
    config = Wizard(script, Screen(), the_outside.outside(Terminal(out))).next().config
    assert config.audio_dir == world.songs
    assert [prompt.error for prompt in script.asked if prompt.name == "songs"] == [
        "",
        f"Stopped looking at {world.songs}. Name a folder nearer to the files, or press Enter to look again.",
    ]
    assert out.getvalue().startswith(f"Looking at {world.songs} (Ctrl-C: stop) ...\n")  # a slow one may say more


@pytest.mark.parametrize("name", ["Songs of the 60s'", "a (live) & more", "100% “best”"])
@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "& '{}'", "“{}”", "file://{}"])
def test_a_folder_dropped_on_the_wizard_is_the_folder(world, name, form):
    folder = world.root / name
    folder.mkdir()
    (folder / "one.wav").touch()
    path = folder.as_uri().removeprefix("file://") if form.startswith("file") else str(folder)
    dropped = form.format(path.replace("'", "''") if form == "& '{}'" else path)
    script = Script({"menu": "preprocess", "checkpoint_dir": world.path_for("checkpoint_dir"), "songs": dropped})
    assert Wizard(script, Screen(), world.outside()).next().config.audio_dir == folder
