"""How durations, bytes, numbers of things and commands are written for people: the one formatter of each."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

# How this program is called: from its folder, or as the installed command.
PROGRAM = ("uv", "run", "train.py") if (Path(__file__).parents[1] / "train.py").is_file() else ("side-step",)

# A quote inside of a program's quotes, with the backslashes before it, and how it is written there.
ESCAPED, SLASHED = r'(\\*)"', r'\1\1\\"'

# Control characters but for the tab, marks that reverse the direction of text, line separators, and halves of pairs.
INVISIBLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clock(seconds: float | None) -> str:
    """A duration as a player shows it: 0:42, 12:03, 3:05:00; a question mark where it is not known."""
    if seconds is None or seconds != seconds or seconds < 0:
        return "?"
    minutes, seconds = divmod(round(min(seconds, 1e9)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def hours(seconds: float) -> str:
    """A duration to the minute: 2 min, 3 h 05 min."""
    full, minutes = divmod(round(seconds / 60), 60)
    return f"{full} h {minutes:02} min" if full else f"{minutes} min"


def size(number: float) -> str:
    """Bytes in the unit that suits them: 12 bytes, 3 KiB, 410 MiB, 1.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def gib(number: float | None, digits: int = 1) -> str:
    """Bytes as memory is counted, always in GiB, or nothing where the device has no counter: 0.4 GiB, 11.9 GiB."""
    return "" if number is None else f"{number / 2**30:.{digits}f} GiB"


def count(number: int, thing: str, things: str = "") -> str:
    """A number of things: 1 song, 1,204 songs, 2 entries (`things` where the plural is not made with an s)."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def visible(text: str, lines: bool = False) -> str:
    r"""Text that does nothing to a terminal but appear: what would move, colour, retitle or reorder is shown as \x1b….

    `lines`: line breaks are the text's own and stay; else they too come from a name and are shown.
    """
    return INVISIBLE.sub(lambda found: found[0] if lines and found[0] == "\n" else ascii(found[0])[1:-1], text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the one or two of the known words that are nearest, or nothing where none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def paste(words: Iterable[str], shell: str = "") -> str:
    """A command as one line that can be pasted into a shell, by default the one this program was started from.

    `shell`: posix, cmd, powershell (7 and later) or windows-powershell (5), whose rules for quotes differ.
    """
    shell = shell or _shell_at_hand()
    return " ".join(_quoted(word, shell) for word in words)


def side_step(*words: str | Path) -> str:
    """The line that runs a command of this program: its name and these words, quoted for the shell at hand."""
    return paste((*PROGRAM, *map(as_word, words)))


def as_word(value: object) -> str:
    """A value as a word of a command. A path with a dash in front would be read as a flag and gets a `./`."""
    return f"./{value}" if isinstance(value, Path) and str(value).startswith("-") else str(value)


def _shell_at_hand() -> str:
    if sys.platform != "win32" or "MSYSTEM" in os.environ:  # Git Bash sets MSYSTEM
        return "posix"
    if "PROMPT" in os.environ:  # cmd hands it to what it starts, PowerShell does not
        return "cmd"
    modules = os.environ.get("PSModulePath", "")  # noqa: SIM112 (its name on Windows)
    return "powershell" if "PowerShell\\7" in modules else "windows-powershell"


def _quoted(word: str, shell: str) -> str:
    """A word that the shell and then the program's own argument parsing read as what it is."""
    if shell == "posix":
        if not INVISIBLE.search(word):
            return shlex.quote(word)
        # shown as they are, such characters would not arrive: bash and zsh read them by their bytes
        escaped = re.sub(r"[\\']", r"\\\g<0>", word)
        return "$'" + INVISIBLE.sub(lambda found: "".join(f"\\x{b:02x}" for b in os.fsencode(found[0])), escaped) + "'"
    trailing = "\\" * (len(word) - len(word.rstrip("\\")))  # before a closing quote they count double
    if shell == "cmd":
        if not re.search(r"[^\w\-+./:\\=~]", word):
            return word or '""'
        if not re.search(r'["%!]', word):  # in double quotes cmd takes the rest literally
            return f'"{word}{trailing}"'
        # quotes for the program, and a caret before all that cmd would act on, those quotes included
        return re.sub(r'([()%!^"<>&|])', r"^\1", f'"{re.sub(ESCAPED, SLASHED, word)}{trailing}"')
    # PowerShell splits -a.b and takes a ~ in front for the home folder
    if word and not re.search(r"[^\w\-+./:\\=~]|^~|^-.*[.:]", word):
        return word
    if shell == "windows-powershell":  # it hands on what it read unescaped, in quotes where it sees a space
        if not word:
            word = '""'
        elif re.search(r"\s", re.sub(r'"[^"]*("|$)', "", word)):  # a space that is not between quotes of the word
            word = re.sub(ESCAPED, SLASHED, word) + trailing
        elif re.search(r"\s", word):
            word = '"' + re.sub(ESCAPED, r'\1\1""', word) + trailing + '"'
        else:
            word = re.sub(ESCAPED, SLASHED, word)
    if not re.search(r'["$`“”„]', word):
        return f'"{word}"'
    return "'" + re.sub("(['‘’‚‛])", r"\1\1", word) + "'"  # PowerShell ends a literal at any of these quotes
