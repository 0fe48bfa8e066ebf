"""Nothing that a file says acts on the terminal or forges a line of output."""

import io

import pytest

from sidestep.events import Decision, FileFailed, Finished, Notice, Progress, Saved, StepSkipped, Table
from sidestep.terminal.rich_terminal import RichTerminal
from sidestep.terminal.terminal import Terminal
from sidestep.words import visible

HOSTILE = "a\x1b[2J\x1b]0;title\x07\x9b31m\x1b]8;;http://x\x1b\\b\nsaved final/: forged\r\u202ec\ud83d"
SHOWN = r"a\x1b[2J\x1b]0;title\x07\x9b31m\x1b]8;;http://x\x1b\b\nsaved final/: forged\r\u202ec\ud83d"
EVENTS = [
    Notice(message=HOSTILE),
    Notice(message=HOSTILE, level="warning"),
    Decision(what="variant", value=HOSTILE, reason=HOSTILE),
    Progress(task="preprocess", done=1, total=1, current=HOSTILE),
    FileFailed(path=HOSTILE, reason=HOSTILE, stage="decode"),
    StepSkipped(step=1, songs=(HOSTILE,), reason="not finite", in_a_row=1),
    Saved(what="preset", path=HOSTILE),
    Table(title=HOSTILE, columns=("name", HOSTILE), rows=((HOSTILE, "x"),)),
    Finished(message=HOSTILE, next_commands=(HOSTILE,)),
]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def acts(text: str) -> set[str]:
    """Control characters in it, but for line breaks."""
    return {c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2028")}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_plain_lines_hold_no_control_characters_and_no_lines_of_a_name(event):
    out = io.StringIO()
    with Terminal(out=out).view() as report:
        report(event)
    assert acts(out.getvalue()) == set()
    assert SHOWN in out.getvalue()
    assert not any(line.startswith("saved final/") for line in out.getvalue().splitlines())


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_rich_output_holds_only_escape_sequences_of_its_own(event, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    with RichTerminal(out=screen).view() as report:
        report(event)
    assert "\x1b[2J" not in screen.getvalue()
    assert "\x1b]" not in screen.getvalue()
    assert acts(screen.getvalue()) <= {"\x1b", "\r"}
    assert not any(line.startswith("saved final/") for line in screen.getvalue().splitlines())


@pytest.mark.parametrize("kind", [Terminal, RichTerminal])
def test_errors_and_plain_output_are_cleaned_too(kind):
    out, err = io.StringIO(), io.StringIO()
    terminal = kind(out=out, err=err)
    terminal.print(HOSTILE)
    terminal.error(HOSTILE, "first\nsecond " + HOSTILE)
    assert acts(out.getvalue() + err.getvalue()) == set()
    assert err.getvalue().splitlines()[0] == f"error: {SHOWN}"
    assert err.getvalue().splitlines()[1] == "first"


def test_ordinary_text_stays_as_it_is():
    text = "Ærøskøbing – 日本語\t[x] 🎵 e\u0301"
    assert visible(text) == text
    assert visible("two\nlines", lines=True) == "two\nlines"
