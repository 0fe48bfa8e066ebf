"""install_windows.bat, as far as it can be checked without Windows."""

import re
from pathlib import Path

import pytest

BYTES = (Path(__file__).parents[1] / "install_windows.bat").read_bytes()
LINES = BYTES.decode("ascii").split("\r\n")
CODE = [line.strip() for line in LINES if line.strip() and not line.strip().startswith("rem ")]


def test_lines_end_as_cmd_needs_them():
    assert BYTES.count(b"\n") == BYTES.count(b"\r\n")


def test_it_is_readable():
    assert max(map(len, LINES)) < 250
    assert sum(line.startswith("rem ") for line in LINES) >= 8


def test_every_jump_has_its_label_and_every_block_ends():
    jumps, labels = set(re.findall(r"goto (\w+)", "\n".join(CODE))), {line[1:] for line in CODE if line.startswith(":")}
    assert jumps <= labels
    depth = 0
    for line in CODE:
        depth -= line.startswith(")")
        depth += line.endswith("(")
        assert depth >= 0
    assert depth == 0


def test_words_in_a_block_hold_no_bare_parenthesis_that_would_end_it():
    depth = 0
    for line in CODE:
        depth -= line.startswith(")")
        if depth and line.startswith("echo "):
            assert not re.search(r"(?<!\^)[()]", re.sub(r'"[^"]*"', "", line)), line
        depth += line.endswith("(")


@pytest.mark.parametrize(
    "words",
    [
        "where uv",
        "uv sync --inexact",
        'uv --no-config pip install "torch>=2.11,<2.15" --torch-backend=auto',
        "LongPathsEnabled",
        "nvidia-smi",
        "train.py --plain doctor",
        "CreateShortcut",
        "uv run --no-sync train.py %%*",
        "%~dp0",
    ],
)
def test_it_does_each_of_its_steps(words):
    assert any(words in line for line in CODE)


def test_a_second_run_destroys_nothing():
    assert not [line for line in CODE if re.match(r"(del|erase|rmdir|rd|move|format|git)\b", line, re.IGNORECASE)]


def test_each_step_that_can_fail_is_checked_and_the_window_stays_open():
    commands = [number for number, line in enumerate(CODE) if re.match(r"uv (sync|run|--no-config)", line)]
    assert all(CODE[number + 1].startswith("if errorlevel 1") for number in commands)
    assert CODE[-2:] == ["pause", "exit /b 1"]


def test_the_versions_of_torch_are_those_of_the_project():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"torch([^";]+)"', project)[1] in "\n".join(CODE)
