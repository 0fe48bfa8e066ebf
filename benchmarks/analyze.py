"""How often `build-dataset --analyze` is right, on the 28 clips of immich-memories-music.

    uv run python benchmarks/analyze.py

The clips are 30 s each, made by ACE-Step 1.5 itself. The labels are what they were asked for, not what a musician heard
in them. Also told: how often librosa's own `feature.tempo` and the profiles of Krumhansl and Kessler on plain chroma
are right, as a measure of the measure.
"""

import re
import time
from importlib.metadata import files

import librosa
import numpy as np
import soxr
from immich_memories_music import tracks_dir

from sidestep.audio.io import SAMPLE_RATE, decode
from sidestep.audio.signals import estimate

NOTES = {
    "C": 0,
    "C#": 1,
    "Db": 1,
    "D": 2,
    "D#": 3,
    "Eb": 3,
    "E": 4,
    "F": 5,
    "F#": 6,
    "Gb": 6,
    "G": 7,
    "G#": 8,
    "Ab": 8,
    "A": 9,
    "A#": 10,
    "Bb": 10,
    "B": 11,
}
KRUMHANSL = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}


def labels() -> dict[str, tuple[int, str]]:
    """(bpm, key) by file name, from the licence file of the clips."""
    text = next(f for f in files("immich-memories-music") if f.name == "LICENSE-MUSIC").read_text()
    return {
        m[1]: (int(m[2]), m[3])
        for m in re.finditer(r"^\s+(\S+\.opus)\s+(\d+) bpm\s+(\S+ (?:major|minor))", text, re.MULTILINE)
    }


def same_key(found: str | None, label: str, relative: bool = False) -> bool:
    """Whether two keys are the same, or relatives of each other."""
    if not found:
        return False
    (a, mode_a), (b, mode_b) = ((NOTES[k.split()[0]], k.split()[1]) for k in (found, label))
    if mode_a == mode_b:
        return a == b
    return relative and (b - a) % 12 == (9 if mode_a == "major" else 3)


def same_tempo(found: float | None, label: int, octaves: bool = False) -> bool:
    """Whether two tempos are within 4 %, or so when halved or doubled."""
    return found is not None and any(
        abs(found * factor / label - 1) <= 0.04 for factor in ((1, 2, 0.5) if octaves else (1,))
    )


def plain_key(mono: np.ndarray) -> str:
    """The key by the textbook: mean chroma and Krumhansl's profiles."""
    chroma = librosa.feature.chroma_cqt(y=mono, sr=22_050).mean(axis=1)
    scores = {
        (root, mode): np.corrcoef(np.roll(profile, root), chroma)[0, 1]
        for mode, profile in KRUMHANSL.items()
        for root in range(12)
    }
    root, mode = max(scores, key=lambda key: scores[key])
    return f"{next(n for n, i in NOTES.items() if i == root)} {mode}"


def main() -> None:
    known = labels()
    rows, seconds = [], 0.0
    for path in sorted(tracks_dir().rglob("*.opus")):
        mono = soxr.resample(decode(path).mean(axis=0), SAMPLE_RATE, 22_050)
        started = time.perf_counter()
        found = estimate(mono)
        seconds += time.perf_counter() - started
        plain = float(librosa.feature.tempo(y=mono, sr=22_050)[0]), plain_key(mono)
        rows.append((path.name, known[path.name], found, plain))
        bpm, key = known[path.name]
        print(
            f"{path.name:32} {bpm:4} {key:9}  found {found.bpm or '-':>4} {found.keyscale or '-':9} "
            f"{found.timesignature or '-'}/4",
            flush=True,
        )
    count = len(rows)
    print(f"\n{'':28}{'Side-Step':>12}{'textbook':>12}")
    tempos = [(label[0], found.bpm, plain[0]) for _, label, found, plain in rows]
    keys = [(label[1], found.keyscale, plain[1]) for _, label, found, plain in rows]
    for name, same, answers, loosely in (
        ("bpm within 4 %", same_tempo, tempos, False),
        ("bpm within an octave", same_tempo, tempos, True),
        ("key", same_key, keys, False),
        ("key or relative", same_key, keys, True),
    ):
        ours = sum(same(found, label, loosely) for label, found, _ in answers)
        plain = sum(same(textbook, label, loosely) for label, _, textbook in answers)
        print(f"{name:28}{ours:9}/{count}{plain:9}/{count}")
    in_four = sum(found.timesignature == "4" for _, _, found, _ in rows)
    print(f"\ntime signature said to be 4/4 (no labels): {in_four}/{count}; {seconds / count:.1f} s a clip")


if __name__ == "__main__":
    main()
