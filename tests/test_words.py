"""Durations, bytes, plurals and commands as people read and paste them."""

import shlex
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    ("word", "cmd", "powershell", "windows_powershell"),
    [
        ("My Songs", '"My Songs"', '"My Songs"', '"My Songs"'),
        ("C:\\My Songs\\", '"C:\\My Songs\\\\"', '"C:\\My Songs\\\\"', '"C:\\My Songs\\\\"'),
        ("", '""', '""', '""'),
        ("R&B", '"R&B"', '"R&B"', '"R&B"'),
        ("a,b", '"a,b"', '"a,b"', '"a,b"'),
        ("it's", '"it\'s"', '"it\'s"', '"it\'s"'),
        ("100%", '^"100^%^"', "'100%'", "'100%'"),
        ("$HOME", '^"$HOME^"', "'$HOME'", "'$HOME'"),
        ('say "hi"', '^"say \\^"hi\\^"^"', "'say \"hi\"'", "'say \\\"hi\\\"'"),
        ("it's $5", '^"it\'s $5^"', "'it''s $5'", "'it''s $5'"),
    ],
)
def test_words_are_quoted_for_the_shells_of_windows(word, cmd, powershell, windows_powershell):
    assert words.paste([word], "cmd") == cmd
    assert words.paste([word], "powershell") == powershell
    assert words.paste([word], "windows-powershell") == windows_powershell


def test_words_are_quoted_for_a_posix_shell():
    nasty = ["My Songs", "it's", 'say "hi"', "$HOME", "a\nb", "", "*", "R&B"]
    assert shlex.split(words.paste(nasty, "posix")) == nasty


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell is asked")
def test_a_posix_shell_hands_a_pasted_command_on_word_by_word():
    nasty = ["My Songs", "it's", 'say "hi"', "$HOME", "", "*", "R&B", "a\\"]
    command = words.paste([sys.executable, "-c", "import sys; print(sys.argv[1:])", *nasty])
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)  # noqa: S602 (it is what is tested)
    assert done.stdout == f"{nasty}\n"


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
