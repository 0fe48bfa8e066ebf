"""Durations, bytes, plurals and commands as people read and paste them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep import words

SHELLS = ("posix", "cmd", "powershell", "windows-powershell")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (41.6, "0:42"),
        (61.4, "1:01"),
        (11105, "3:05:05"),
        (None, "?"),
        (float("nan"), "?"),
        (-1, "?"),
        (float("inf"), "277777:46:40"),
    ],
)
def test_a_duration_is_written_as_a_clock(seconds, text):
    assert words.clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(20, "0 min"), (130, "2 min"), (3600, "1 h 00 min"), (11100, "3 h 05 min")]
)
def test_a_long_duration_is_written_in_hours_and_minutes(seconds, text):
    assert words.hours(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (3 << 10, "3 KiB"), (410 << 20, "410 MiB"), (5 << 29, "2.5 GiB")],
)
def test_bytes_are_written_in_the_unit_that_suits_them(number, text):
    assert words.size(number) == text


def test_memory_is_always_written_in_gib_and_left_out_where_it_is_not_known():
    assert words.gib(1 << 29) == "0.5 GiB"
    assert words.gib(1 << 28, digits=2) == "0.25 GiB"
    assert words.gib(None) == ""


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 entries"), (1, "1 entry"), (2, "2 entries"), (1204, "1,204 entries")]
)
def test_things_are_counted_with_their_plural(number, text):
    assert words.count(number, "entry", "entries") == text
    assert words.count(number, "song") == f"{number:,} song{'' if number == 1 else 's'}"


@pytest.mark.parametrize("shell", SHELLS)
def test_plain_words_are_pasted_as_they_are(shell):
    assert words.paste(["uv", "run", "train.py", "--lr", "1e-4"], shell) == "uv run train.py --lr 1e-4"


def program_reads(line: str) -> list[str]:
    """The arguments that a Windows program finds in its command line, by the rules of Microsoft's C runtime."""
    arguments, i = [], 0
    while i < len(line):
        if line[i] in " \t":
            i += 1
            continue
        word, quoted = "", False
        while i < len(line) and (quoted or line[i] not in " \t"):
            slashes = len(line[i:]) - len(line[i:].lstrip("\\"))
            i += slashes
            if line[i : i + 1] == '"':
                word += "\\" * (slashes // 2)
                if slashes % 2:
                    word += '"'
                elif quoted and line[i + 1 : i + 2] == '"':
                    word += '"'
                    i += 1
                else:
                    quoted = not quoted
                i += 1
            else:
                word += "\\" * slashes
                if not slashes:
                    word += line[i]
                    i += 1
        arguments.append(word)
    return arguments


def cmd_reads(line: str) -> list[str]:
    """The arguments of a line typed into cmd: variables, carets and quotes, then the program's own reading."""
    line = re.sub(r"%(\w+)%", "REPLACED", line)
    passed, quoted, i = "", False, 0
    while i < len(line):
        if line[i] == "^" and not quoted:
            i += 1
        elif line[i] == '"':
            quoted = not quoted
        else:
            assert quoted or line[i] not in "&|<>()", f"cmd acts on {line[i]}"
        passed += line[i]
        i += 1
    return program_reads(passed)


def powershell_reads(line: str) -> list[str]:
    """The words of a line typed into PowerShell, as it hands them to a program."""
    words, i = [], 0
    while i < len(line):
        if line[i] == " ":
            i += 1
            continue
        opening, word = line[i], ""
        if opening in "'‘’‚‛":
            found = re.compile(r"'((?:[^'‘’‚‛]|['‘’‚‛]{2})*)['‘’‚‛]").match(line, i)
            assert found, "a literal without an end"
            word = re.sub(r"['‘’‚‛](['‘’‚‛])", r"\1", found[1])
        elif opening == '"':
            found = re.compile(r'"([^"“”„$`]*)"').match(line, i)
            assert found, "something is replaced in there"
            word = found[1]
        else:
            found = re.compile(r"[^ ]+").match(line, i)
            assert found
            word = found[0]
            assert not re.search(r"[\"'“”„‘’‚‛`$(){};,|&<>@#%\[\]*?]|^~|^-.*[.:]", word), f"PowerShell acts on {word}"
        i = found.end()
        assert line[i : i + 1] in (" ", ""), "words that touch"
        words.append(word)
    return words


def windows_powershell_reads(line: str) -> list[str]:
    """The same for Windows PowerShell 5, which joins words as they are, in quotes where it sees a space."""
    passed = []
    for word in powershell_reads(line):
        quotes = 0
        spaces = [quotes % 2 == 0 for c in word if (quotes := quotes + (c == '"')) >= 0 and c.isspace()]
        passed.append(f'"{word}"' if any(spaces) else word)
    return program_reads(" ".join(passed))


READERS = {
    "cmd": cmd_reads,
    "powershell": powershell_reads,
    "windows-powershell": windows_powershell_reads,
}
NASTY = [
    *("My Songs", "C:\\My Songs\\", "C:\\songs\\", "", "R&B", "a,b", "it's", "100%", "%PATH%", "$HOME", "`x`"),
    *('say "hi"', 'a"b c"d', '"', '\\"', 'end\\"', "-x.y", "--alpha=1.5", "--tag=a:b", "~", "~/x", "(a)", "a;b", "a|b"),
    *("<a>", "^", "!", "it's $5", 'it\'s "100%" & $5', "“quoted”", "‘it’s’", "#1", "@home", "{x}", "a  b", "café"),
    *("日本", "*", "?", "--%", "[x]"),
]


@pytest.mark.parametrize("shell", READERS)
@pytest.mark.parametrize("word", NASTY)
def test_a_shell_of_windows_hands_on_the_word_that_was_meant(word, shell):
    assert READERS[shell](words.paste(["uv", word, "--tag", word, "end"], shell)) == ["uv", word, "--tag", word, "end"]


@pytest.mark.parametrize("shell", READERS)
@given(st.lists(st.text("ab %&^\"<>|()!,;=\\'$`~-.:“’#@", max_size=8), max_size=4))
@settings(max_examples=300, deadline=None)
def test_so_does_it_with_any_words(shell, any_words):
    assert READERS[shell](words.paste(["uv", *any_words], shell)) == ["uv", *any_words]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is asked")
def test_bash_hands_a_pasted_command_on_word_by_word():
    nasty = [*NASTY, "a\nb", "a\\", "tab\there", "esc\x1b[2J", "\u202eturned", "caf\udce9", "it's\r", "\x9b\\'"]
    command = words.paste([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *nasty], "posix")
    assert words.visible(command) == command
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == f"{nasty!a}\n"


def test_a_path_with_a_dash_in_front_is_not_read_as_a_flag():
    assert words.side_step("history", Path("-runs")).endswith(" history ./-runs")
    assert words.side_step("plan", "--json").endswith(" plan --json")


@pytest.mark.parametrize(
    ("environment", "shell"),
    [
        ({"PROMPT": "$P$G"}, "cmd"),
        ({"MSYSTEM": "MINGW64", "PROMPT": "$P$G"}, "posix"),
        ({"PSModulePath": "C:\\Program Files\\PowerShell\\7\\Modules"}, "powershell"),
        ({"PSModulePath": "C:\\Windows\\System32\\WindowsPowerShell\\v1.0\\Modules"}, "windows-powershell"),
    ],
)
def test_on_windows_the_shell_at_hand_is_told_by_its_environment(environment, shell, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("PROMPT", "MSYSTEM", "PSModulePath"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = words.paste(["it's 100% $5"], shell)
    assert words.paste(["it's 100% $5"]) == expected
