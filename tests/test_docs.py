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
DOCS = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
FOR_MUSICIANS = sorted(set(DOCS) - {"reference.md", "benchmarks.md", "guarantees.md", "architecture.md", "glossary.md"})
ORDINARY = {
    "API",
    "HTTP",
    "NVIDIA",
    "OpenAI",
    "OneDrive",
    "SimpleTuner",
    "CD",
    "HTML",
    "I",
    "JSON",
    "MIT",
    "OK",
    "PC",
    "USB",
    "ZIP",
    "LICENSE",
    "ACE",
    "README",
    "DAW",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flag_table_of_each_command_equals_its_settings(command):
    found = re.search(re.escape(begin(command)) + r"\n(.*?)\n" + re.escape(END), DOCS["reference.md"], re.DOTALL)
    assert found, f"docs/reference.md has no place for the flags of {command}"
    assert found[1] == flag_table(command), "run: python -m tests.flag_tables"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_table_has_a_row_for_every_setting(command):
    table = flag_table(command)
    rows = [line for line in table.splitlines()[2:] if not line.startswith("| **")]
    assert len(rows) == len(options_of(COMMANDS[command].config))
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_tables_are_written_between_their_marks_and_nothing_else_is_touched():
    empty = "\n".join(f"## {command}\n{begin(command)}\n{END}\nbetween tables" for command in COMMANDS)
    filled = with_tables(empty)
    assert with_tables(filled) == filled
    assert all(flag_table(command) in filled for command in COMMANDS)
    assert filled.count("between tables") == len(COMMANDS)
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
    known |= {
        "--plain",
        "--yes",
        "--version",
        "--help",
        "--preprocess",
        "--preset",
        "--vram-profile",
        "--config",
        "--dry-run",
    }
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
        "--strict",
        "--only-group",
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


def test_every_built_in_preset_is_in_the_docs():
    text = DOCS["training.md"]
    assert [path.stem for path in presets.BUILT_IN.glob("*.json") if f"`{path.stem}`" not in text] == []


def test_the_readme_is_short():
    assert len(DOCS["README.md"].encode()) <= 8000


def sentences_of(text: str) -> list[str]:
    """The sentences of a page: no code, no addresses; a heading, a cell and an item of a list end one."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    parts = re.split(r"\n\s*\n|\n(?=[-|#>]|\d+\.)|\|", text)
    return [s.strip() for part in parts for s in re.split(r"(?<=[.?!:;])[*]*\s+", part.strip(" -#>\n")) if s.strip()]


def test_long_sentences_are_found():
    long = "so " * 31
    assert [len(s.split()) for s in sentences_of(f"Short. {long}end.\n\n- {long}\n| a | {long} |")] == [
        1,
        32,
        31,
        1,
        31,
    ]
    assert sentences_of(f"```\n{long}\n```\nOne [two]({long}) three: four.") == ["One two three:", "four."]


@pytest.mark.parametrize("name", FOR_MUSICIANS)
def test_sentences_for_musicians_have_at_most_thirty_words(name):
    assert [s for s in sentences_of(DOCS[name]) if len(s.split()) > 30] == []


def terms_of(text: str) -> set[str]:
    """What a page sets in italics, and abbreviations as the trade writes them (LoRA, VAE, bf16), in small letters."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    italic = re.findall(r"(?<![*\w])\*([^*\n]+)\*(?![*\w])", text)
    trade = re.findall(r"\b(?:[a-z]*[A-Z]+[a-z]*[A-Z]+\w*|bf16|fp16|fp32|int8|nf4)\b", text)
    names = {"ComfyUI", "GitHub", "TensorBoard"}
    return {term.lower() for term in [*italic, *(set(trade) - ORDINARY - names)]}


def test_terms_are_found():
    assert terms_of("a *rank* of `VAE`, **bold**, a LoRA in bf16\n```\nCFG\n```") == {"rank", "lora", "bf16"}


@pytest.mark.parametrize("name", FOR_MUSICIANS)
def test_every_term_for_musicians_is_in_the_glossary(name):
    rows = re.findall(r"^\| ([^|]+) \|", DOCS["glossary.md"], re.MULTILINE)
    known = {term.strip().lower() for row in rows for term in row.split(",")}
    assert {term for term in terms_of(DOCS[name]) if term not in known and term.removesuffix("s") not in known} == set()


def test_every_message_that_the_docs_explain_is_one_of_the_program():
    table = DOCS["training.md"].split("| message | what it means |")[1].split("\n\n")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "sidestep").rglob("*.py"))
    parts = {part.strip() for message in messages for part in re.split("…|cuda", message) if part.strip()}
    assert len(parts) >= len(messages) > 5
    assert {part for part in parts if part not in code} == set()


def test_the_architecture_names_what_is_there_and_is_short():
    text = DOCS["architecture.md"]
    assert len(text.splitlines()) <= 120
    places = [
        ROOT,
        ROOT / "sidestep",
        ROOT / "sidestep" / "tasks" / "train",
        ROOT / "sidestep" / "tasks" / "preprocess",
    ]
    named = {name for name in re.findall(r"`([\w./]+)`", text) if name.endswith((".py", ".md", ".j2", "/"))}
    assert len(named) > 50
    assert {
        name for name in named if not any((place / name).exists() for place in (*places, places[1] / "pages"))
    } == set()
    ground = {path.name for path in (ROOT / "sidestep").glob("*.py")} - {"__init__.py"}
    assert ground - named == set()


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {name for name in DOCS if name != "README.md" and name not in re.findall(r"[\w-]+\.md", site)} == set()


@pytest.mark.parametrize("name", DOCS)
def test_every_link_and_picture_within_the_docs_is_there(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", DOCS[name]) + re.findall(
        r'src="(?!https?:)([^"]+)"', DOCS[name]
    )
    assert [target for target in targets if not (folder / target).exists()] == []
