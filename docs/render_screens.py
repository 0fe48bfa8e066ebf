"""Draw the screens of the docs: real sessions in a pseudo-terminal, as SVG by Rich.

uv run python -m docs.render_screens
"""

import io
import re
import shutil
import tempfile
from itertools import groupby
from pathlib import Path
from string import hexdigits

import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tests.pseudo_terminal import ROOT, Session
from tests.training_world import write_data
from tests.wizard.walk import write_songs

# Rich's own drawing fetches a font from elsewhere; every system has a font of even width.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "font-family: Fira Code, monospace", "font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
)
OUT = Path(__file__).parent / "screens"
COLUMNS = 96
COLOURS = {"default": None, "brown": "yellow"}  # pyte's names where Rich's differ


def draw(session: Session, name: str, title: str, last: int = 40) -> None:
    """Write the last lines of a session as `screens/NAME.svg`."""
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.svg").write_text(picture(session.screen, title, last), encoding="utf-8", newline="\n")


def picture(screen: pyte.HistoryScreen, title: str, last: int | None = None) -> str:
    """The last lines of an emulator's screen as SVG, those scrolled away included; without `last` what is in sight."""
    shown = [screen.buffer[y] for y in range(screen.lines)]
    lines = [_line(row, screen.columns) for row in ([*screen.history.top, *shown] if last else shown)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    console = Console(record=True, width=screen.columns, file=io.StringIO(), force_terminal=True)
    for line in lines[-(last or 0) :]:
        console.print(line, no_wrap=True, crop=True)
    console.print()  # the drawing cuts what hangs below its last line, such as _
    return console.export_svg(title=title, code_format=FORMAT)


def _line(row: dict, columns: int) -> Text:
    """A row of the emulator's screen, neighbours of one style as one piece."""
    text = Text()
    for style, cells in groupby(
        (row[x] for x in range(columns)), key=lambda char: (char.fg, char.bg, char.bold, char.reverse)
    ):
        text.append("".join(char.data for char in cells), _style(*style))
    text.rstrip()
    return text


def _style(letters: str, ground: str, bold: bool, reverse: bool) -> Style:
    return Style(color=_colour(letters), bgcolor=_colour(ground), bold=bold, reverse=reverse)


def _colour(name: str) -> str | None:
    if len(name) == 6 and set(name) <= set(hexdigits):
        return f"#{name}"
    return COLOURS.get(name, name.replace("bright", "bright_"))


def wizard(folder: Path) -> None:
    """From the first question to a training, ready to start."""
    with Session(folder, columns=COLUMNS, lines=44) as session:
        session.asks("Where are the ACE-Step checkpoints?")
        session.keys("enter")
        session.asks("Try the demo first?")
        session.keys("enter")
        session.asks("What would you like to do?", seconds=120)
        draw(session, "first-run", "uv run train.py", last=50)
        session.choose("Preprocess")
        session.asks("Songs")
        session.keys("clear", "songs", "enter")
        for question in ("Folder of the checkpoints", "Model", "Folder for the training tensors"):
            session.asks(question)
            session.keys("enter")
        session.asks("What now?")
        draw(session, "preprocess", "Preprocess")
        session.keys("enter")
        session.asks("What next?", seconds=600)
        session.choose("Train")
        session.asks("Preset")
        draw(session, "chain", "The next step, filled in", last=30)
        session.choose("quick_test")
        session.asks("Kind of adapter")
        session.keys("enter")
        session.asks("What now?")
        session.until("for the longest song", seconds=300)
        session.asks("What now?")
        draw(session, "review", "Review", last=37)
        session.keys("ctrl-c")
        session.end()


def training(folder: Path) -> None:
    """A training that learns, most of its way."""
    write_data(folder / "learnable", (50,) * 6)
    files = ("--checkpoint-dir", "checkpoints", "--dataset-dir", "learnable", "--output-dir", "runs/learnable")
    settings = ("--rank", "16", "--lr", "0.01", "--epochs", "40", "--warmup-steps", "0", "--log-every", "1")
    with Session(folder, "fixed", *files, *settings, columns=COLUMNS, lines=44) as session:
        session.until("checkpoints/epoch_0030", seconds=600)
        for _ in range(3):  # until the panel below is drawn
            session.read()
        draw(session, "training", "uv run train.py fixed …", last=16)
        session.end(seconds=60)


def commands(folder: Path) -> None:
    """Commands that answer at once."""
    for name, arguments in (
        ("doctor", ("doctor",)),
        ("presets", ("presets", "list")),
        ("plan", ("plan", "--model-variant", "xl-turbo", "--vram", "12")),
    ):
        with Session(folder, *arguments, columns=COLUMNS, lines=60) as session:
            session.end(seconds=300)
            draw(session, name, f"uv run train.py {' '.join(arguments)}", last=60)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        shutil.copytree(ROOT / "tests" / "fixtures" / "checkpoints", home / "checkpoints")
        write_songs(home / "songs", ("morning walk", "night drive"), seconds=4, captions=False)
        wizard(home)
        training(home)
        commands(home)
