"""The flag tables of docs/reference.md, made from the settings. `python -m tests.flag_tables` writes them."""

import re
from pathlib import Path

from sidestep.settings.config import COMMANDS
from sidestep.settings.option import Option, options_of
from sidestep.terminal.terminal import as_typed

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


def begin(command: str) -> str:
    """The mark before a command's table."""
    return f"<!-- flags of {command} -->"


END = "<!-- end of flags -->"


def flag_table(command: str) -> str:
    """The flags of a command as a markdown table: flag, default, what it does."""
    lines = ["| flag | default | |", "|---|---|---|"]
    options = options_of(COMMANDS[command].config).values()
    section = ""
    several = len({o.group for o in options}) > 1
    for o in options:
        if several and o.group != section:
            section = o.group
            lines.append(f"| **{section}** | | |")
        lines.append(f"| {_names(o)} | {_default(o)} | {_help(o)} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The text with every table between marks brought up to date. Raises ValueError for a command without marks."""
    for command in COMMANDS:
        pattern = re.compile(re.escape(begin(command)) + r".*?" + re.escape(END), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(
                f"docs/reference.md has no place for the flags of {command}: add the lines\n{begin(command)}\n{END}"
            )
        text = pattern.sub(lambda _, command=command: f"{begin(command)}\n{flag_table(command)}\n{END}", text)
    return text


def _names(o: Option) -> str:
    if not o.flag.startswith("-"):
        return f"`{o.flag.upper()}`"
    names = [f"`{flag}`" for flag in o.flags]
    return ", ".join([*names, f"`--no-{o.flag.removeprefix('--')}`"] if o.type is bool and o.default is True else names)


def _default(o: Option) -> str:
    if o.required:
        return "required"
    return "" if as_typed(o.default) in ("-", "none") and o.default != "none" else as_typed(o.default)


def _help(o: Option) -> str:
    named = o.choices and not all(choice in o.help for choice in o.choices)
    text = o.help + (f" ({', '.join(o.choices)})" if named else "")
    text += "".join(f"<br>*{words}*" for words in (o.plain, o.more) if words and words != o.help)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("&lt;br>", "<br>")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
