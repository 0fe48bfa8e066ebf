"""The tutorial and the README, word by word: commands run in order, end as the page says, leave what it names."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from immich_memories_music import tracks_dir

from sidestep.audio.io import SAMPLE_RATE, decode
from sidestep.cli.main import main
from sidestep.errors import ExitStatus
from tests.song_library import write_sndfile

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(text)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CAPTION = re.compile(r"^> (.+)$", re.MULTILINE)


def steps_of(text: str) -> list[tuple[list[str], list[str]]]:
    """The commands of a page, each with the lines that it prints by the `text` block that follows it."""
    steps: list[tuple[list[str], list[str]]] = []
    for kind, block in BLOCK.findall(text):
        if kind:
            steps[-1][1].extend(block.splitlines())
        else:
            steps += [
                (shlex.split(line.removeprefix("uv run train.py")), [])
                for line in block.splitlines()
                if line.startswith("uv run train.py ")
            ]
    return steps


def as_pattern(line: str) -> str:
    """The line with any number, time or name of a checkpoint or song in place of its own."""
    line = re.sub(r"[\d,.:]*\d", "0", line).replace("morning.flac.pt", "0.flac.pt")
    return re.escape(line).replace("0", r"[\d,.:]*\d").replace(r"[\d,.:]*\d\.flac\.pt", r"\S+\.pt")


def said_in_order(lines: list[str], output: str) -> list[str]:
    """Which of the lines the output does not have after those before them."""
    missing = []
    for line in lines:
        if found := re.search(as_pattern(line), output):
            output = output[found.end() :]
        else:
            missing.append(line)
    return missing


def test_lines_are_known_by_their_words_in_their_order_whatever_their_numbers():
    output = "10 checkpoints of runs/first\n3 songs, 0.2 minutes\nepoch 7/100 done: mean loss 1.2, 0:01\n"
    assert said_in_order(["9 checkpoints of runs/first", "epoch 10/100 done: mean loss 0.8943, 2:07"], output) == []
    assert said_in_order(["9 songs, 4.8 minutes", "12 checkpoints of runs/first"], output) == [
        "12 checkpoints of runs/first"
    ]
    assert said_in_order(["9 songs, 4.8 hours"], output) == ["9 songs, 4.8 hours"]
    assert steps_of("```\nuv run train.py doctor\n```\n\n```text\nfine\n```\n```\nuv sync\n```\n") == [
        (["doctor"], ["fine"])
    ]


@pytest.fixture
def studio(tmp_path, monkeypatch, checkpoints) -> Path:
    """A folder as the tutorial has it: checkpoints, and short pieces of real music with the text it says to write."""
    songs = tmp_path / "songs"
    for path, name in zip(sorted(tracks_dir().rglob("*acoustic*.opus"))[:3], ("morning", "b", "c"), strict=True):
        audio = decode(path, max_seconds=3).T
        write_sndfile(songs / f"{name}.flac", np.ascontiguousarray(audio), SAMPLE_RATE, format="FLAC")
    caption = CAPTION.search((ROOT / "docs" / "first-adapter.md").read_text(encoding="utf-8"))
    (songs / "morning.caption.txt").write_text(caption[1], encoding="utf-8")
    (songs / "morning.lyrics.txt").write_text("[Verse]\nGood morning, old guitar", encoding="utf-8")
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "heading", "count"), [("docs/first-adapter.md", "", 5), ("README.md", "## Five steps", 5)]
)
def test_the_commands_of_a_page_run_in_their_order_and_leave_what_it_names(studio, capsys, page, heading, count):
    text = (
        (ROOT / page).read_text(encoding="utf-8").partition(heading)[2] if heading else (ROOT / page).read_text("utf-8")
    )
    steps = steps_of(text)
    assert len(steps) == count
    for words, lines in steps:
        fewer = ["--epochs", "10"] if words[0] == "train" else []  # of a hundred, which would take minutes
        assert main(["--plain", *words, *fewer]) == ExitStatus.OK, words
        output = capsys.readouterr().out
        assert said_in_order(lines, output) == [], output
    named = re.findall(r"`((?:songs|runs|samples|tensors)(?:/[\w.-]+)*)/?`", text)
    assert named
    assert [name for name in named if not (studio / name).exists()] == []
