"""Every flow of the wizard in a real pseudo-terminal: to its review, back through its questions, and out of each."""

import json
import shutil
import time
import wave
from pathlib import Path

import pytest

from tests.pseudo_terminal import Session
from tests.training_world import run, settings, write_data

pytestmark = pytest.mark.slow
MENU, REVIEW = "What would you like to do?", "What now?"
TYPED = {"Caption": "warm piano", "Output": "exported", "Epochs": "1", "Duration": "1"}  # and Enter for all else
FLOWS = (
    "List songs",
    "Preprocess",
    "Measure ranks",
    "Train",
    "Listen",
    "Export",
    "Resume",
    "Memory",
    "Demo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoints) -> Path:
    """A user's folder with checkpoints, a song, its tensors and a finished run; all known from the last session."""
    home = tmp_path_factory.mktemp("user")
    shutil.copytree(checkpoints, home / "checkpoints")
    (home / "songs").mkdir()
    with wave.open(str(home / "songs" / "one.wav"), "wb") as file:
        file.setparams((2, 2, 48000, 0, "NONE", ""))
        file.writeframes(bytes(4 * 48000))
    write_data(home / "tensors")
    run(settings(home / "tensors", home / "runs" / "first", epochs=1))
    values = {
        "welcomed": True,
        "checkpoint_dir": "checkpoints",
        "input": "songs",
        "audio_dir": "songs",
        "dataset_dir": "tensors",
    }
    values |= {"output_dir": "runs/first", "adapter": "runs/first/final"}
    (home / "home").mkdir()
    (home / "home" / "settings.json").write_text(json.dumps({"version": 1, "values": values}), encoding="utf-8")
    return home


def _name(line: str) -> str:
    """A question by its line, without what was typed into it."""
    text = line.removeprefix("? ").split(" (number")[0]
    return next((start for start in TYPED if text.startswith(start)), text)


class Walk(Session):
    """A session that knows which question it is at. `marks`: how many were asked up to the last one, and its line."""

    marks: tuple[int, str] = (0, "")

    def question(self, seconds: float = 240) -> str:
        """The question that is asked next, once its screen has come to rest."""
        before, deadline = self.marks, time.monotonic() + seconds
        while not self._is_another(before):
            shown = "\n".join(self.lines()[-30:])
            assert time.monotonic() < deadline, f"nothing more was asked:\n{shown}"
            assert self.read(), f"it ended:\n{shown}"
        quiet = 0
        while quiet < 4:
            length = len(self.raw)
            self.read()
            quiet = quiet + 1 if len(self.raw) == length else 0
        self.marks = self.now()
        return _name(self.marks[1])

    def reaches(self, start: str) -> None:
        """Wait for the question that begins so: the one before may be drawn once more where the machine is slow."""
        while not self.question().startswith(start):
            pass

    def _is_another(self, before: tuple[int, str]) -> bool:
        """Whether the last line is a question of its own, and not the one before with its answer."""
        count, line = self.now()
        return (count, line) != before and (count > before[0] or not _name(line).startswith(_name(before[1]) or "-"))

    def now(self) -> tuple[int, str]:
        """(questions so far, the line of the last one)."""
        lines = [line for line in self.lines() if line.startswith("? ")]
        return len(lines), lines[-1] if lines else ""

    def answer(self, question: str) -> None:
        """Enter, after typing what no suggestion can know."""
        self.keys(*(["clear", TYPED[question]] if question in TYPED else []), "enter")

    def walk_to(self, title: str, stop: str = REVIEW) -> list[str]:
        """Through the menu to a flow and on by Enter up to a question that begins with `stop`; all these questions."""
        assert self.question().startswith(MENU)
        self.choose(title)
        self.marks = self.now()
        seen: list[str] = []
        while True:
            seen.append(self.question())
            if seen[-1].startswith(stop):
                return seen
            self.answer(seen[-1])


@pytest.mark.parametrize("title", FLOWS)
def test_the_review_of_every_flow_is_reached_and_left_through_all_of_its_questions(folder, title):
    with Walk(folder) as session:
        asked = session.walk_to(title)
        for question in (*reversed(asked[:-1]), MENU):
            session.keys("escape")
            session.reaches(question)
        session.choose("Exit")
        assert session.end() == 0


@pytest.mark.parametrize("title", FLOWS)
def test_ctrl_c_leaves_questions_and_the_review_without_a_traceback(folder, title):
    """At every sixth question from the last one on: every walk to one of them is a start of its own."""
    with Walk(folder) as session:
        asked = session.walk_to(title)
    for question in asked[::-6]:
        with Walk(folder) as session:
            session.walk_to(title, question)
            session.keys("ctrl-c")
            assert session.end() == 130
            text = "\n".join(session.lines())
            assert "Traceback" not in text
            assert "Stopped." in text


def test_each_step_leads_to_the_next_by_keys_alone(folder, tmp_path):
    for name in ("checkpoints", "songs", "home"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "home" / "settings.json").write_text(
        json.dumps({"version": 1, "values": {"welcomed": True, "input": "songs"}}), encoding="utf-8"
    )
    steps = ("Preprocess", "Measure ranks", "Train", "Listen", "Export")
    with Walk(tmp_path) as session:
        session.walk_to("List songs")
        session.keys("enter")
        for step in steps:
            assert session.question(300).startswith("What next?")
            session.choose(step)
            session.marks = session.now()
            while not (question := session.question()).startswith(REVIEW):
                if question.startswith("Preset") and step == "Train":
                    session.choose("quick_test")
                    session.marks = session.now()
                else:
                    session.answer(question)
            session.keys("enter")
        assert session.question(300).startswith(("What next?", MENU))
        session.choose("Exit")
        assert session.end() == 0
    assert (tmp_path / "songs" / "dataset.json").is_file()
    assert list(tmp_path.rglob("rank_map.json"))
    assert list(tmp_path.rglob("final/adapter_model.safetensors"))
    assert list(tmp_path.rglob("*strength1*.flac"))
    assert (tmp_path / "exported").exists()
