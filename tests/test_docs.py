"""The words of the docs are true."""

import re
import shlex
from pathlib import Path

import pytest

from sidestep.cli.parser import options_for, parse
from sidestep.errors import UserError
from sidestep.settings import presets
from sidestep.settings.config import COMMANDS
from sidestep.settings.option import options_of
from tests.flag_tables import END, begin, flag_table, with_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {"README.md": README} | {
    path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flag_table_of_each_command_equals_its_settings(command):
    found = re.search(re.escape(begin(command)) + r"\n(.*?)\n" + re.escape(END), README, re.DOTALL)
    assert found, f"README.md has no place for the flags of {command}"
    assert found[1] == flag_table(command), "run: python -m tests.flag_tables"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_table_has_a_row_for_every_setting(command):
    table = flag_table(command)
    rows = [line for line in table.splitlines()[2:] if not line.startswith("| **")]
    assert len(rows) == len(options_of(COMMANDS[command].config))
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_tables_are_written_between_their_marks_and_nothing_else_is_touched():
    empty = "\n".join(f"## {command}\n{begin(command)}\n{END}\nwords" for command in COMMANDS)
    filled = with_tables(empty)
    assert with_tables(filled) == filled
    assert all(flag_table(command) in filled for command in COMMANDS)
    assert filled.count("words") == len(COMMANDS)
    with pytest.raises(ValueError, match="no place for the flags of fixed"):
        with_tables("")


def commands_in(text: str) -> list[str]:
    """Every `train.py …` line of the code blocks, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [
        line.partition("train.py")[2].partition(" #")[0].strip()
        for line in lines
        if re.match(r"(\$ )?(uv run |python |torchrun .*|accelerate launch .*)?train\.py ", line)
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (name, line)
        for name, text in DOCS.items()
        for line in commands_in(text)
        if "…" not in line and "..." not in line
    ],
)
def test_every_command_of_the_docs_is_understood(name, line):
    words = shlex.split(line)
    if "--help" in words or "--version" in words:
        return
    try:
        parse(words)
    except UserError as error:
        pytest.fail(f"{name}: train.py {line}\n{error}")


def test_every_flag_that_the_docs_name_exists():
    known = {
        flag
        for command in COMMANDS
        for o in options_for(command).values()
        for flag in (*o.flags, "--no-" + o.flag.removeprefix("--"))
    }
    known |= {"--plain", "--yes", "--version", "--help", "--preprocess", "--preset", "--vram-profile"}
    others = {
        "--no-config",
        "--torch-backend",
        "--local-dir",
        "--extra",
        "--quick",
        "--nproc-per-node",
        "--nnodes",
        "--no-sync",
        "--group",
        "--all-extras",
    }
    named = {flag for text in DOCS.values() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)}
    programs = {
        flag
        for text in DOCS.values()
        for line in re.findall(r"^.*\b(?:uv |benchmarks/|accelerate launch|torchrun|nvidia-smi).*$", text, re.MULTILINE)
        for flag in re.findall(r"--[a-z][a-z-]*[a-z]", line)
    }
    assert named - known - others - programs == set()


def test_every_built_in_preset_is_in_the_readme():
    assert [path.stem for path in presets.BUILT_IN.glob("*.json") if f"`{path.stem}`" not in README] == []


@pytest.mark.parametrize("name", DOCS)
def test_every_link_and_picture_within_the_docs_is_there(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", DOCS[name]) + re.findall(
        r'src="(?!https?:)([^"]+)"', DOCS[name]
    )
    assert [target for target in targets if not (folder / target).exists()] == []
