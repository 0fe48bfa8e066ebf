"""The wizard in a real pseudo-terminal: screens, keys, ways out, and whole chains by keys alone."""

import json
import os
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pseudo_terminal import ROOT, Session
from tests.training_world import write_data
from tests.wizard.walk import a_users_folder, walk_to_a_judged_adapter

SCREENS = Path(__file__).parents[1] / "screens"
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, checkpoints) -> Path:
    """A user's folder: checkpoints, two short songs, nobody welcomed yet."""
    return a_users_folder(tmp_path, checkpoints)


@pytest.fixture
def known(folder) -> Path:
    """The same for someone who has been here before."""
    (folder / "home").mkdir()
    values = {"welcomed": True, "checkpoint_dir": "checkpoints", "input": "songs", "audio_dir": "songs"}
    (folder / "home" / "settings.json").write_text(json.dumps({"version": 1, "values": values}), encoding="utf-8")
    return folder


def compare(name: str, session: Session) -> None:
    """The screen equals the stored one. SIDE_STEP_STORE_SCREENS=1 stores it anew, to be looked at before a commit."""
    text = "\n".join(session.lines()) + "\n"
    path = SCREENS / f"{name}.txt"
    if os.environ.get("SIDE_STEP_STORE_SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_screens_at_80_columns_are_as_stored(known):
    with Session(known) as session:
        session.asks("What would you like to do?")
        compare("menu", session)
        session.choose("Preprocess")
        session.asks("Songs")
        session.keys("enter")
        session.asks("Folder of the checkpoints")
        session.keys("enter")
        session.asks("Model")
        session.keys("enter")
        session.asks("Folder for the training tensors")
        compare("preprocess", session)
        session.keys("enter")
        session.asks("What now?")
        compare("review", session)


def test_plain_screens_are_ascii_without_escape_sequences_and_as_stored(known):
    with Session(known, "--plain") as session:
        session.until("(b: back, ?: more) >")
        session.keys("3", "enter")
        session.until("Songs (")
        session.keys("nowhere", "enter")
        session.until("Not taken: There is no such folder or file.")
        compare("plain", session)
        assert b"\x1b" not in session.raw
        assert session.raw.isascii()


def test_no_color_is_obeyed(known):
    with Session(known, NO_COLOR="1") as session:
        session.asks("What would you like to do?")
        assert b"\x1b[36" not in session.raw
        assert b"\x1b[0;36" not in session.raw


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_every_question_of_training_is_reached_and_left_by_escape(known, columns):
    (known / "tensors").mkdir()
    (known / "tensors" / "one.pt").write_bytes(b"")
    questions = (
        "Folder of the checkpoints",
        "Model",
        "Folder of training tensors",
        "Folder for the results",
        "Preset",
        "Kind of adapter",
        "What now?",
    )
    with Session(known, columns=columns) as session:
        session.asks("What would you like to do?")
        session.choose("Train")
        for question in questions:
            session.asks(question)
            assert all(len(line) <= columns for line in session.lines())
            if question == "Folder of training tensors":
                session.keys("tensors")
            if question != "What now?":
                session.keys("enter")
        for question in reversed(questions[:-1]):
            session.keys("escape")
            session.asks(question)
        session.keys("escape")
        session.asks("What would you like to do?")
        session.choose("Exit")
        assert session.end() == 0


def test_a_digit_chooses_and_b_goes_back_from_a_list_a_text_and_a_path(known):
    with Session(known) as session:
        session.asks("What would you like to do?")
        session.keys("3")
        session.asks("Songs")
        session.keys("enter")
        session.asks("Folder of the checkpoints")
        session.keys("enter")
        session.asks("Model")
        session.keys("b")
        session.asks("Folder of the checkpoints")
        session.keys("clear", "b", "enter")
        session.asks("Songs")


def test_many_fine_tunes_are_searched_by_typing(known):
    for number in range(20):
        shutil.copytree(known / "checkpoints" / "acestep-v15-turbo", known / "checkpoints" / f"tune-{number:02}")
    with Session(known) as session:
        session.asks("What would you like to do?")
        session.choose("Preprocess")
        session.asks("Songs")
        session.keys("enter")
        session.asks("Folder of the checkpoints")
        session.keys("enter")
        session.until("type to search", "tune-19")
        session.keys("-", "1", "7")
        session.until("> tune-17")
        session.keys("enter")
        session.asks("Folder for the training tensors")


def test_a_refused_path_says_why_on_the_spot(known):
    with Session(known) as session:
        session.asks("What would you like to do?")
        session.choose("Preprocess")
        session.asks("Songs")
        session.keys("clear", "nowhere", "enter")
        session.until("There is no such folder or file.")


@pytest.mark.parametrize("arguments", [(), ("--plain",)])
def test_ctrl_c_at_each_question_leaves_without_a_traceback(folder, arguments):
    for stop in range(4):
        shutil.rmtree(folder / "home", ignore_errors=True)
        with Session(folder, *arguments) as session:
            for question in (
                "Where are the ACE-Step checkpoints",
                "Try the demo",
                "What would you like",
                "Folder of songs",
            )[: stop + 1]:
                session.until(question)
                time.sleep(0.3)
                if (
                    question
                    != ("Where are the ACE-Step checkpoints", "Try the demo", "What would you like", "Folder of songs")[
                        stop
                    ]
                ):
                    session.keys("enter")
            session.keys("ctrl-c")
            assert session.end() == 130
            text = "\n".join(session.lines())
            assert "Traceback" not in text
            assert "Stopped." in text


def at_best(measured: Callable[[], float], *libraries: str) -> float:
    """How many times the bare import of `libraries` something takes, in the best of a few pairs.

    A share and not seconds: the machine may be slow, and other work on it must fail no test.
    """
    ratios = []
    while len(ratios) < 12 and (not ratios or ratios[-1] >= 3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {', '.join(libraries)}"], check=True)
        libraries_take = time.monotonic() - began
        ratios.append(measured() / libraries_take)
    return min(ratios)


def test_the_first_prompt_comes_before_three_times_the_start_of_its_libraries(known):
    def first_prompt() -> float:
        with Session(known) as session:
            while b"What would you like" not in session.raw:
                session.read()
            return time.monotonic() - session.began

    assert at_best(first_prompt, "questionary", "rich.console", "rich.markdown") < 3  # 1.7; with torch more than 10


def test_from_the_menu_to_a_trained_demo_adapter_by_keys_alone(known):
    with Session(known) as session:
        session.asks("What would you like to do?")
        session.choose("Demo")
        session.asks("Folder for the results")
        session.keys("enter")
        session.asks("What now?")
        session.keys("enter")
        session.asks("What would you like to do?", seconds=900)
        session.choose("Exit")
        assert session.end() == 0
    assert list((known / "side-step-demo").rglob("final/adapter_model.safetensors"))


def test_a_new_user_reaches_a_judged_adapter_and_leaves_with_fifteen_answers(folder):
    with Session(folder, lines=24) as session:
        answers = sum(1 for _ in walk_to_a_judged_adapter(session))
        assert session.end() == 0
        seen = "\n".join(session.lines())
        assert "Recommended: " in seen
        assert "Next:" not in seen  # the commands of what the wizard offers itself
    assert answers <= 15
    assert (folder / "runs" / "songs" / "final" / "adapter_model.safetensors").is_file()
    assert "--max-steps 40" in (folder / "runs" / "songs" / "command.txt").read_text(encoding="utf-8")
    verdict = json.loads((folder / "runs" / "songs" / "score" / "results.json").read_text(encoding="utf-8"))
    assert verdict["recommended"]


def test_keys_preview_save_and_stop_a_training_and_the_terminal_is_as_before(known):
    write_data(known / "tensors")
    files = ("--checkpoint-dir", "checkpoints", "--dataset-dir", "tensors", "--output-dir", "runs/keys")
    settings = (
        "--rank",
        "4",
        "--epochs",
        "2000",
        "--save-every",
        "2000",
        "--preview-duration",
        "1",
        "--log-every",
        "1",
    )
    with Session(known, "fixed", *files, *settings, lines=24) as session:
        before = termios.tcgetattr(session.process.fileno())
        session.until("Training", "q stop after saving", "s per step")
        session.keys("s")
        session.until("saved checkpoint: runs/keys/checkpoints/step_")
        session.keys("p")
        session.until("last preview")
        assert all(len(line) <= 80 for line in session.lines())
        session.keys("q")
        assert session.end() == 130
        assert "Stopped; saved. Go on with:" in "\n".join(session.lines())
        assert termios.tcgetattr(session.process.fileno()) == before
    assert len(list((known / "runs" / "keys" / "checkpoints").glob("step_*"))) == 2


def test_without_a_terminal_the_help_is_printed_with_status_2(known):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=known,
    )
    assert done.returncode == 2
    assert "commands:" in done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["build-dataset", "--help"]])
def test_help_returns_before_three_times_the_start_of_its_library(argv):
    def seconds() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], capture_output=True, check=True)
        return time.monotonic() - began

    assert at_best(seconds, "rich.console", "rich.markdown") < 3  # 1.7, 0.26 s; with torch more than 15
