"""The first hour by keys alone: from a folder of songs to a judged adapter, and every screen of it as a picture.

python -m tests.wizard.walk FOLDER    draws the pictures, at 80 × 24 and at 100 × 35
"""

import shutil
import sys
import tempfile
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tests.pseudo_terminal import ROOT, Session

SIZES = ((80, 24), (100, 35))


def a_users_folder(folder: Path, checkpoints: Path) -> Path:
    """A folder with checkpoints and two short songs, as a new user would have it."""
    shutil.copytree(checkpoints, folder / "checkpoints")
    write_songs(folder / "songs")
    return folder


def write_songs(folder: Path, names: Sequence[str] = ("one", "two"), seconds: int = 2, captions: bool = True) -> None:
    """Short songs of noise, with a caption each if wanted."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name in names:
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setnchannels(2)
            file.setsampwidth(2)
            file.setframerate(48000)
            file.writeframes((noise.normal(0, 3000, 2 * 48000 * seconds)).astype("<i2").tobytes())
        if captions:
            (folder / f"{name}.txt").write_text(f"caption: {name}\nbpm: 120\n", encoding="utf-8")


def walk_to_a_judged_adapter(session: Session) -> Iterator[str]:
    """List, preprocess, train and judge with the fewest keys, then leave; yields each question that is answered."""

    def answer(question: str, *typed: str, choose: str = "", seconds: float = 240) -> Iterator[str]:
        session.asks(question, seconds)
        yield question
        if choose:
            session.choose(choose)
        else:
            session.keys(*typed, "enter")

    yield from answer("Where are the ACE-Step checkpoints?")  # found near by: Enter
    yield from answer("Try the demo first?")
    yield from answer("What would you like to do?")
    yield from answer("Folder of songs", "songs")
    yield from answer("Trigger word")
    yield from answer("What now?")
    yield from answer("What next?")
    yield from answer("What now?")
    yield from answer("What next?", seconds=600)
    yield from answer("Preset", choose="quick_test")
    yield from answer("Kind of adapter")
    yield from answer("What now?")
    yield from answer("What next?", choose="Judge", seconds=900)
    yield from answer("What now?")
    yield from answer("What next?", choose="Exit", seconds=900)


def draw_walk(out: Path, columns: int, lines: int) -> None:
    """Write `NUMBER-question.svg` of each screen of the walk."""
    from docs.render_screens import picture

    with tempfile.TemporaryDirectory() as temporary:
        folder = a_users_folder(Path(temporary), ROOT / "tests" / "fixtures" / "checkpoints")
        with Session(folder, columns=columns, lines=lines) as session:
            for number, question in enumerate(walk_to_a_judged_adapter(session), start=1):
                name = "".join(letter if letter.isalnum() else "-" for letter in question.lower()).strip("-")
                text = picture(session.screen, title=f"{columns} × {lines}")
                (out / f"{columns}-{number:02}-{name}.svg").write_text(text, encoding="utf-8", newline="\n")
            session.end()


if __name__ == "__main__":
    for size in SIZES:
        draw_walk(Path(sys.argv[1]), *size)
