"""Four short pieces of music made of sines and noise, with the text that a musician would put beside them."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 48000
SECONDS = 8.0
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}

# name: bpm, key, chords (root and third in semitones above it), beats per note, brightness, caption, lyrics
PIECES = {
    "morning walk": (
        96,
        "C major",
        (("C", 4), ("G", 4), ("A", 3), ("F", 4)),
        0.5,
        4,
        "bright plucked arpeggios, light and friendly",
        "",
    ),
    "night drive": (
        120,
        "A minor",
        (("A", 3), ("F", 4), ("C", 4), ("G", 4)),
        0.25,
        7,
        "driving synth sequence, steady pulse",
        "",
    ),
    "slow harbour": (
        66,
        "D minor",
        (("D", 3), ("A", 3), ("D", 3), ("G", 3)),
        2.0,
        2,
        "calm organ chords, dark and wide",
        "[Verse]\nlights go out along the water\n[Chorus]\nhold the line and wait for morning",
    ),
    "paper planes": (
        140,
        "G major",
        (("G", 4), ("D", 4), ("E", 3), ("C", 4)),
        0.5,
        5,
        "fast chiptune melody with noise drums",
        "",
    ),
}


def write_music(folder: Path) -> list[Path]:
    """Write the pieces as 48 kHz stereo wav with a text file beside each, and return the audio files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (bpm, key, chords, beats, brightness, caption, lyrics) in PIECES.items():
        path = folder / f"{name}.wav"
        soundfile.write(path, piece(bpm, chords, beats, brightness).T, RATE, subtype="PCM_16")
        text = f"caption: {caption}\nbpm: {bpm}\nkey: {key}\nsignature: 4/4\n"
        text += f"language: en\nlyrics:\n{lyrics}\n" if lyrics else "is_instrumental: true\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def piece(bpm: int, chords: tuple[tuple[str, int], ...], beats: float, brightness: int) -> np.ndarray:
    """A bar of each chord in turn: a broken chord, its bass, a noise drum on every beat. → float32 [2, S] at 48 kHz"""
    beat = 60 / bpm
    audio = np.zeros((2, round(SECONDS * RATE)), dtype=np.float32)
    noise = np.random.default_rng(bpm)
    for number in range(int(SECONDS / (beats * beat))):
        start = number * beats * beat
        root, third = chords[int(start / (4 * beat)) % len(chords)]
        semitone = SEMITONES[root] + (0, third, 7, 12)[number % 4]
        _add(audio, start, note(60 + semitone, 1.5 * beats * beat, brightness), pan=0.3 + 0.4 * (number % 2))
    for number in range(int(SECONDS / beat)):
        root, _ = chords[(number // 4) % len(chords)]
        _add(audio, number * beat, 0.8 * note(36 + SEMITONES[root], beat, 2), pan=0.5)
        hit = noise.standard_normal(round(0.08 * RATE)) * np.exp(-np.linspace(0, 9, round(0.08 * RATE)))
        _add(audio, number * beat, 0.15 * hit, pan=0.5)
    return 0.7 * audio / np.abs(audio).max()


def note(midi: int, seconds: float, brightness: int) -> np.ndarray:
    """A decaying tone of `brightness` partials. → [S]"""
    time = np.arange(round(seconds * RATE)) / RATE
    frequency = 440 * 2 ** ((midi - 69) / 12)
    tone = sum(np.sin(2 * np.pi * frequency * n * time) / n**1.5 for n in range(1, brightness + 1))
    return 0.3 * tone * np.exp(-3 * time / seconds) * np.minimum(time / 0.005, 1)


def _add(audio: np.ndarray, start_seconds: float, sound: np.ndarray, pan: float) -> None:
    first = round(start_seconds * RATE)
    sound = sound[: audio.shape[1] - first]
    audio[0, first : first + len(sound)] += (1 - pan) * sound
    audio[1, first : first + len(sound)] += pan * sound
