"""What can be measured of one song: length, level, silence, clipping, and two fingerprints of its sound.

How many tokens the prompts of a song take: counted with the checkpoints' tokenizer, or guessed without.
What in a data set deserves a look: each kind of finding, why it matters, and the songs it is about.
Plots as inline SVG: no script, no file beside the page, sharp at every size.
The audit as one HTML page: plots, findings and a player for each song. Nothing is loaded from elsewhere but the songs, by relative URL.
The audit: every song is listened to once, in threads, and what was measured is kept by content beside dataset.json.
"""

import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from tokenizers import Tokenizer

from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS, lyric_prompt, text_prompt
from sidestep.audio.io import SAMPLE_RATE, AudioError, AudioInfo, content_hash, decode, is_cut_short, probe
from sidestep.audio.signals import integrated_loudness
from sidestep.data.fields import INSTRUMENTAL
from sidestep.data.lyrics import without_time_marks
from sidestep.data.manifest import (
    Dataset,
    Metadata,
    Sample,
    duration_differs,
    prompt_caption,
    prompt_lyrics,
    read,
    relative_path,
)
from sidestep.errors import JobError, UserError
from sidestep.events import Progress, Report, Saved, Table
from sidestep.files import write_text
from sidestep.words import clock

VERSION = 1  # of the measurements: raised whenever they change
SILENCE_DBFS = -60.0  # a block of 0.1 s below this is silent
ENVELOPE_POINTS = 160

_BLOCK = SAMPLE_RATE // 10
_FLAT_SAMPLES = 3  # so many samples in a row at one song's own peak are a peak that was cut off
_FRAME = 2 * SAMPLE_RATE
_BANDS = 12


@dataclass(frozen=True)
class Measurement:
    """One song. Levels in dB, `silence` a share of its length, `clipped` in samples; `sound` is equal for equal samples, whatever the format.

    `envelope`: peaks of ENVELOPE_POINTS equal parts, 0 to 1. `shape`: level in 12 bands every two seconds, for finding the same recording in another coding.
    """

    seconds: float
    sample_rate: int
    channels: int
    format: str
    cut_short: bool
    peak_db: float
    loudness_lufs: float | None
    silence: float
    clipped: int
    sound: str
    envelope: tuple[float, ...]
    shape: tuple[int, ...]


def measure(path: Path) -> Measurement:
    """Decode one song and measure it. Raises AudioError."""
    info, audio = probe(path), decode(path)
    return measure_audio(info, audio)


def measure_audio(info: AudioInfo, audio: np.ndarray) -> Measurement:
    """The same of float32 [2, S] at 48 kHz that was decoded from a file with header `info`."""
    seconds = audio.shape[1] / SAMPLE_RATE
    peak = float(max(audio.max(), -audio.min(), 1e-6))
    loudness = integrated_loudness(audio, SAMPLE_RATE)
    return Measurement(
        seconds=seconds,
        sample_rate=info.sample_rate,
        channels=info.channels,
        format=info.format,
        cut_short=is_cut_short(info, seconds),
        peak_db=20 * float(np.log10(peak)),
        loudness_lufs=float(loudness) if np.isfinite(loudness) else None,
        silence=_silence(audio),
        clipped=_clipped(audio, peak),
        sound=_sound(audio),
        envelope=_envelope(audio),
        shape=_shape(audio),
    )


def _silence(audio: np.ndarray) -> float:
    """The share of blocks of 0.1 s whose level is below SILENCE_DBFS."""
    count = max(audio.shape[1] // _BLOCK, 1)
    blocks = audio[:, : count * _BLOCK].reshape(2, count, -1)
    power = np.einsum("cbs,cbs->b", blocks, blocks, dtype=np.float64) / (2 * blocks.shape[2])
    return float(np.mean(power < 10 ** (SILENCE_DBFS / 10)))


def _clipped(audio: np.ndarray, peak: float) -> int:
    """Samples in runs of three and more at the highest level, where that is within 1 dB of full scale or above; and all beyond full scale."""
    if peak < 10 ** (-1 / 20):
        return 0
    clipped = 0
    for channel in audio:
        flat = np.abs(channel) >= min(peak, 1.0) * 0.9999
        edges = np.flatnonzero(np.diff(np.concatenate(([False], flat, [False])).astype(np.int8)))
        runs = edges[1::2] - edges[::2]
        clipped += int(runs[runs >= _FLAT_SAMPLES].sum())
    return clipped


def _sound(audio: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, audio.shape[1], SAMPLE_RATE * 10):
        part = audio[:, start : start + SAMPLE_RATE * 10]
        digest.update((part * 32767).round().astype(np.int32).tobytes())
    return digest.hexdigest()


def _envelope(audio: np.ndarray) -> tuple[float, ...]:
    edges = np.linspace(0, audio.shape[1], ENVELOPE_POINTS + 1).astype(int)[:-1]
    starts = np.unique(edges)
    highest = np.maximum(np.maximum.reduceat(audio, starts, axis=1), -np.minimum.reduceat(audio, starts, axis=1)).max(
        axis=0
    )
    return tuple(round(float(min(v, 1.0)), 3) for v in highest)


def _shape(audio: np.ndarray) -> tuple[int, ...]:
    """Decibels in 12 bands from 60 Hz to 12 kHz, one frame every two seconds, frame after frame."""
    count = audio.shape[1] // _FRAME
    edges = np.searchsorted(np.fft.rfftfreq(_FRAME, 1 / SAMPLE_RATE), np.geomspace(60, 12_000, _BANDS + 1))
    window = np.hanning(_FRAME).astype(np.float32)
    levels = []
    for i in range(count):
        mono = audio[:, i * _FRAME : (i + 1) * _FRAME].mean(axis=0) * window
        power = np.abs(np.fft.rfft(mono)) ** 2
        levels += [round(10 * float(np.log10(power[a:b].mean() + 1e-6))) for a, b in itertools.pairwise(edges)]
    return tuple(levels)


def same_recording(a: Measurement, b: Measurement) -> bool:
    """Whether two songs are one recording in two codings: equally long within a second, and their levels rise and fall together in every band."""
    if abs(a.seconds - b.seconds) > 1.0:
        return False
    length = min(len(a.shape), len(b.shape)) // _BANDS
    if length < 5:
        return False
    first, second = (np.array(m.shape[: length * _BANDS], np.float64).reshape(length, _BANDS) for m in (a, b))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return bool(scale > 0 and (first * second).sum() / scale > 0.97)


_CHARACTERS_PER_TOKEN = 3.5  # of Latin script; of other scripts a character is about a token


def token_counter(checkpoint_dir: Path | None) -> Callable[[str], int]:
    """A function from text to its number of tokens. Raises UserError when `checkpoint_dir` holds no tokenizer."""
    if checkpoint_dir is None:
        return guess
    home = checkpoint_dir.parent if checkpoint_dir.is_file() else checkpoint_dir
    places = [home / "Qwen3-Embedding-0.6B" / "tokenizer.json", home / "tokenizer" / "tokenizer.json"]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(
            f"--checkpoint-dir {checkpoint_dir}: no tokenizer there.",
            f"It stands at {places[0]}; without the flag, tokens are guessed.",
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def guess(text: str) -> int:
    """About how many tokens a text has, without a tokenizer."""
    latin = sum(c < "\u0250" for c in text)
    return round(latin / _CHARACTERS_PER_TOKEN + len(text) - latin)


def prompt_tokens(sample: Sample, metadata: Metadata, seconds: float, count: Callable[[str], int]) -> tuple[int, int]:
    """(tokens of the text prompt, of the lyric prompt), as they reach the model."""
    facts = {"bpm": sample.bpm, "timesignature": sample.timesignature, "keyscale": sample.keyscale, "duration": seconds}
    text = text_prompt(prompt_caption(sample, metadata), **facts)
    return count(text), count(lyric_prompt(without_time_marks(prompt_lyrics(sample)), sample.language))


LONGEST_SECONDS = 600.0
SHORTEST_SECONDS = 10.0
QUIET_LUFS = -45.0
MOSTLY_SILENT = 0.5
CLIPPED_SAMPLES = 50
LOW_RATE = 32_000


@dataclass(frozen=True)
class Song:
    """One sample with what was measured of it; `reason` says why nothing could be. `same_as`: a name shared by all copies of one recording."""

    sample: Sample
    name: str
    measured: Measurement | None
    reason: str = ""
    text_tokens: int = 0
    lyric_tokens: int = 0
    tokens_guessed: bool = False


@dataclass(frozen=True)
class Finding:
    """A kind of finding: its name, why it matters, the names of its songs; `notes` says more of a song by its name."""

    what: str
    why: str
    songs: tuple[str, ...]
    notes: dict[str, str]


def find(songs: Sequence[Song]) -> list[Finding]:
    """All findings that there are, the gravest first."""
    heard = [s for s in songs if s.measured]
    guessed = "about " if any(s.tokens_guessed for s in songs) else ""
    found = [
        _finding("cannot be read", "left out of training", ((s, s.reason) for s in songs if not s.measured)),
        _finding(
            "break off",
            "the file is damaged; what is left is used",
            ((s, clock(s.measured.seconds)) for s in heard if s.measured.cut_short),
        ),
        _finding("same sound", "one of them is enough; to train on it more often, say repeat", _copies(heard)),
        _finding("same recording in another coding", "likewise", _recodings(heard)),
        _finding(
            "near-silence",
            f"below {QUIET_LUFS:g} LUFS, or silent for more than half of its length",
            ((s, _level(s.measured)) for s in heard if _is_quiet(s.measured)),
        ),
        _finding(
            "clipping",
            f"{CLIPPED_SAMPLES} samples and more cut off at the top: the model learns the distortion",
            ((s, f"{s.measured.clipped} samples") for s in heard if s.measured.clipped >= CLIPPED_SAMPLES),
        ),
        _finding(
            "longer than 10 minutes",
            "the model knows no longer songs",
            ((s, clock(s.measured.seconds)) for s in heard if s.measured.seconds > LONGEST_SECONDS),
        ),
        _finding(
            "shorter than 10 s",
            "the model makes no shorter songs",
            ((s, f"{s.measured.seconds:.1f} s") for s in heard if s.measured.seconds < SHORTEST_SECONDS),
        ),
        _finding(
            "no caption",
            "the prompt is a title or a file name: write song.txt beside it",
            ((s, s.sample.caption) for s in songs if not s.sample.labeled),
        ),
        _finding(
            "sung, but no lyrics",
            "the model is told that nobody sings",
            ((s, "") for s in songs if not s.sample.is_instrumental and not s.sample.lyrics),
        ),
        _finding(
            f"prompt of more than {TEXT_TOKENS} tokens",
            "its end is cut off",
            ((s, f"{guessed}{s.text_tokens - TEXT_TOKENS} too many") for s in songs if s.text_tokens > TEXT_TOKENS),
        ),
        _finding(
            f"lyrics of more than {LYRIC_TOKENS} tokens",
            "their end is cut off",
            ((s, f"{guessed}{s.lyric_tokens - LYRIC_TOKENS} too many") for s in songs if s.lyric_tokens > LYRIC_TOKENS),
        ),
        _finding(
            "other length than noted",
            "the file's own length is used",
            (
                (s, f"{clock(s.measured.seconds)}, not {clock(s.sample.duration)}")
                for s in heard
                if duration_differs(s.sample, s.measured.seconds)
            ),
        ),
        _finding(
            "low sample rate",
            f"below {LOW_RATE // 1000} kHz there is no treble to learn",
            ((s, f"{s.measured.sample_rate / 1000:g} kHz") for s in heard if s.measured.sample_rate < LOW_RATE),
        ),
    ]
    return [f for f in found if f.songs]


def _finding(what: str, why: str, songs: Iterable[tuple[Song, str]]) -> Finding:
    notes = {song.name: note for song, note in songs}
    return Finding(what, why, tuple(notes), notes)


def _is_quiet(measured: Measurement) -> bool:
    return measured.silence > MOSTLY_SILENT or (
        measured.loudness_lufs is not None and measured.loudness_lufs < QUIET_LUFS
    )


def _level(measured: Measurement) -> str:
    level = "silent" if measured.loudness_lufs is None else f"{measured.loudness_lufs:.0f} LUFS"
    return f"{level}, {measured.silence:.0%} silence"


def _copies(songs: Iterable[Song]) -> list[tuple[Song, str]]:
    by_sound: dict[str, list[Song]] = defaultdict(list)
    for song in songs:
        by_sound[song.measured.sound].append(song)
    return [(song, f"like {group[0].name}") for group in by_sound.values() for song in group[1:]]


def _recodings(songs: Sequence[Song]) -> list[tuple[Song, str]]:
    """Songs that are a song before them in another coding; songs of like length are neighbours, so that few pairs are compared."""
    first_of: dict[str, int] = {}
    for i, song in enumerate(songs):
        first_of.setdefault(song.measured.sound, i)
    ordered = sorted(first_of.values(), key=lambda i: songs[i].measured.seconds)
    like: dict[int, int] = {}
    for place, i in enumerate(ordered):
        for j in reversed(ordered[:place]):
            if songs[i].measured.seconds - songs[j].measured.seconds > 1.0:
                break
            if same_recording(songs[i].measured, songs[j].measured):
                later, earlier = max(i, j), min(i, j)
                like[later] = min(earlier, like.get(later, earlier))
    return [(songs[later], f"like {songs[earlier].name}") for later, earlier in sorted(like.items())]


WIDTH, HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 10, 36


def histogram(values: Sequence[float], unit: str, title: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """An SVG of how often values occur, in up to about twenty round steps; `marks` are (value, label) of limits that matter."""
    low, high = min(values), max(values)
    step = _round_step((high - low) / 16) if high > low else max(abs(high) / 10, 1.0)
    first = math.floor(low / step)
    counts = [0] * (max(math.floor(high / step) - first, 0) + 1)
    for value in values:
        counts[math.floor(value / step) - first] += 1
    edges = [(first + i) * step for i in range(len(counts) + 1)]
    names = [f"{edges[i]:g} to {edges[i + 1]:g} {unit}" for i in range(len(counts))]
    every = max(math.ceil(len(edges) / 7), 1)
    ticks = [(i / len(counts), f"{edge:g}") for i, edge in enumerate(edges) if i % every == 0]
    lines = [
        ((value - edges[0]) / (edges[-1] - edges[0]), label) for value, label in marks if edges[0] <= value <= edges[-1]
    ]
    return _bars(counts, names, ticks, unit, title, lines)


def bars(counts: dict[str, int], unit: str, title: str) -> str:
    """An SVG of one bar per name, in the order given."""
    names = list(counts)
    ticks = [((i + 0.5) / len(names), name) for i, name in enumerate(names)]
    return _bars(list(counts.values()), names, ticks, unit, title, [])


def waveform(envelope: Sequence[float]) -> str:
    """A small SVG of a song's peaks, 0 to 1, mirrored as audio programs draw them."""
    if not envelope:
        return ""
    top = " ".join(f"{i},{20 - 19 * v:.1f}" for i, v in enumerate(envelope))
    bottom = " ".join(f"{i},{20 + 19 * v:.1f}" for i, v in reversed(list(enumerate(envelope))))
    return f'<svg class="wave" viewBox="0 0 {len(envelope)} 40" preserveAspectRatio="none" aria-hidden="true"><polygon points="{top} {bottom}"/></svg>'


def _bars(
    counts: Sequence[int],
    names: Sequence[str],
    ticks: Sequence[tuple[float, str]],
    unit: str,
    title: str,
    marks: Sequence[tuple[float, str]],
) -> str:
    wide, high = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    most = max(counts)
    step = max(_round_step(most / 4), 1)
    top = math.ceil(most / step) * step
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for level in range(0, int(top) + 1, int(step)):
        y = _TOP + high * (1 - level / top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{level}</text>')
    each = wide / len(counts)
    gap = min(each * 0.12, 6)
    for i, (count, name) in enumerate(zip(counts, names, strict=True)):
        tall = high * count / top
        if count:
            place = f'x="{_LEFT + i * each + gap / 2:.1f}" y="{_TOP + high - tall:.1f}" width="{max(min(each - gap, 60), 1):.1f}" height="{tall:.1f}"'
            parts.append(
                f'<rect class="bar" {_centred(place, each, gap)} rx="1.5"><title>{escape(name)}: {count}</title></rect>'
            )
    for share, label in marks:
        x = _LEFT + share * wide
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + high}"/>')
        side = "end" if share > 0.6 else "start"
        parts.append(
            f'<text class="mark" x="{x + (-4 if side == "end" else 4):.1f}" y="{_TOP + 9}" text-anchor="{side}">{escape(label)}</text>'
        )
    for share, label in ticks:
        side = ' style="text-anchor: end"' if share > 0.97 else ""
        parts.append(
            f'<text class="x" x="{_LEFT + share * wide:.1f}" y="{HEIGHT - _BOTTOM + 15}"{side}>{escape(label)}</text>'
        )
    parts.append(f'<text class="x unit" x="{_LEFT + wide / 2:.1f}" y="{HEIGHT - 4}">{escape(unit)}</text></svg>')
    return "".join(parts)


def _centred(place: str, each: float, gap: float) -> str:
    """Bars wider than 60 are cut to it; they stay over the middle of their place."""
    spare = each - gap - 60
    return f'{place} transform="translate({spare / 2:.1f} 0)"' if spare > 0 else place


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --line: #e3e6eb; --card: #fff; --back: #f6f7f9; --main: #3b6fd4; --warn: #b54708; --warn-back: #fff4e5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --soft: #98a2b3; --line: #2c3340; --card: #1a1f28; --back: #12161d; --main: #7aa5f5; --warn: #f5b56b; --warn-back: #33260f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 34px 0 10px; } h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
.soft, .x, .y { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 120px; }
.tile b { display: block; font-size: 20px; font-weight: 600; } .tile span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 12px; }
.plots figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px 6px; }
.plot { width: 100%; display: block; }
.plot text { font-size: 11px; fill: var(--soft); } .plot .x { text-anchor: middle; } .plot .y { text-anchor: end; }
.plot .grid { stroke: var(--line); } .plot .bar { fill: var(--main); } .plot line.mark { stroke: var(--warn); stroke-dasharray: 4 3; } .plot text.mark { fill: var(--warn); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 6px 0; padding: 8px 14px; }
summary { cursor: pointer; } summary b { font-weight: 600; } details ul { margin: 8px 0 4px; padding-left: 20px; max-height: 320px; overflow: auto; }
a { color: var(--main); text-decoration: none; } a:hover { text-decoration: underline; }
.search { width: 100%; padding: 8px 12px; font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin-bottom: 8px; }
.song { display: grid; grid-template-columns: minmax(220px, 1fr) 300px; gap: 4px 20px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; margin: 6px 0; content-visibility: auto; contain-intrinsic-size: auto 96px; }
.song:target { outline: 2px solid var(--main); }
.song[hidden] { display: none; }
.name { font-weight: 600; overflow-wrap: anywhere; } .caption { max-height: 4.4em; overflow: auto; } .facts { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.flag { display: inline-block; background: var(--warn-back); color: var(--warn); border-radius: 4px; padding: 0 6px; margin: 2px 4px 0 0; font-size: 12px; }
.sound { display: flex; flex-direction: column; gap: 4px; } audio { width: 100%; height: 34px; } .wave { width: 100%; height: 30px; } .wave polygon { fill: var(--main); opacity: .75; }
@media (max-width: 640px) { .song { grid-template-columns: 1fr; } }
"""
_SCRIPT = """
const players = [...document.querySelectorAll('audio')];
for (const player of players) {
  player.addEventListener('play', () => players.forEach(other => { if (other !== player) other.pause(); }));
  player.addEventListener('error', () => { player.nextElementSibling.hidden = false; }, true);
}
const songs = [...document.querySelectorAll('.song')];
document.querySelector('.search').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase().split(/\\s+/);
  for (const song of songs) song.hidden = !wanted.every(word => song.textContent.toLowerCase().includes(word));
});
"""


def page(dataset: Dataset, songs: Sequence[Song], findings: Sequence[Finding], folder: Path) -> str:
    """The whole page; it is to stand in `folder`, from where the songs are found."""
    name = escape(dataset.metadata.name or folder.name)
    flags: dict[str, list[str]] = {}
    for finding in findings:
        for song in finding.songs:
            note = finding.notes[song]
            flags.setdefault(song, []).append(f"{finding.what}: {note}" if note else finding.what)
    numbers = {song.name: i for i, song in enumerate(songs)}
    body = [
        f"<h1>{name}</h1>",
        f'<div class="soft">{len(songs)} songs as a model will hear them</div>',
        _tiles(dataset, songs),
        "<h2>Findings</h2>",
        *(_finding_page(f, numbers) for f in findings),
        "" if findings else "<p>Nothing amiss.</p>",
        "<h2>At a glance</h2>",
        f'<div class="plots">{"".join(_plots(songs))}</div>',
        "<h2>Songs</h2>",
        '<input class="search" type="search" placeholder="Filter by name, caption, key, finding …" aria-label="Filter songs">',
        *(_song(song, dataset, numbers[song.name], flags.get(song.name, []), folder) for song in songs),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Audit of {name}</title><link rel="icon" href="data:,"><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{chr(10).join(body)}\n</main><script>{_SCRIPT}</script></body></html>\n'


def url(audio: Path, folder: Path) -> str:
    """The URL of a song for a page in `folder`: relative, so that both can move; absolute only where another drive leaves no choice."""
    path = relative_path(audio, folder)
    if Path(path).is_absolute():
        return audio.as_uri()
    quoted = quote(path if sys.platform == "win32" else os.fsencode(path))
    return f"./{quoted}"  # a first folder with a colon in its name would read as a scheme


def _tiles(dataset: Dataset, songs: Sequence[Song]) -> str:
    samples = dataset.samples
    seconds = sum(s.measured.seconds for s in songs if s.measured)
    tiles = [
        (str(len(songs)), "songs"),
        (clock(seconds), "of music"),
        (f"{sum(s.labeled for s in samples)}", "with caption or genre"),
        (f"{sum(bool(s.lyrics) and s.lyrics != INSTRUMENTAL for s in samples)}", "with lyrics"),
        (f"{sum(s.bpm is not None for s in samples)}", "with tempo"),
        (f"{sum(bool(s.keyscale) for s in samples)}", "with key"),
        (f"{sum(bool(s.estimated) for s in samples)}", "with estimates"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
        + "</div>"
    )


def _plots(songs: Sequence[Song]) -> list[str]:
    """Every plot for which there is data."""
    heard = [s.measured for s in songs if s.measured]
    rates = Counter(m.sample_rate for m in heard)
    kinds = Counter(m.format.split("/")[0].lower() for m in heard)
    keys = Counter(s.sample.keyscale for s in songs if s.sample.keyscale)
    plots = [
        ("Length", [m.seconds / 60 for m in heard], "minutes", [(LONGEST_SECONDS / 60, "the model's limit")]),
        (
            "Loudness",
            [m.loudness_lufs for m in heard if m.loudness_lufs is not None],
            "LUFS",
            [(-14.0, "--normalize lufs")],
        ),
        ("Highest sample", [m.peak_db for m in heard], "dBFS", [(0.0, "full scale")]),
        ("Tempo", [float(s.sample.bpm) for s in songs if s.sample.bpm], "bpm", []),
        (
            "Lyrics",
            [float(s.lyric_tokens) for s in songs if s.sample.lyrics not in ("", INSTRUMENTAL)],
            "tokens",
            [(2048, "limit")],
        ),
    ]
    drawn = [_figure(title, histogram(values, unit, title, marks)) for title, values, unit, marks in plots if values]
    named = [
        ("Sample rate", {f"{rate / 1000:g}": count for rate, count in sorted(rates.items())}, "kHz"),
        ("Format", dict(kinds.most_common(10)), "files"),
        (
            "Key",
            {key.replace(" minor", "m").replace(" major", ""): count for key, count in keys.most_common(14)},
            "m: minor",
        ),
    ]
    return (
        drawn[:1] + [_figure(title, bars(counts, unit, title)) for title, counts, unit in named if counts] + drawn[1:]
    )


def _figure(title: str, svg: str) -> str:
    return f"<figure><h3>{title}</h3>{svg}</figure>"


def _finding_page(finding: Finding, numbers: dict[str, int]) -> str:
    items = []
    for name in finding.songs:
        note = f' <span class="soft">{escape(finding.notes[name])}</span>' if finding.notes[name] else ""
        items.append(f'<li><a href="#song-{numbers[name]}">{escape(name)}</a>{note}</li>')
    return f'<details><summary><b>{escape(finding.what)}: {_songs(len(finding.songs))}</b> <span class="soft">– {escape(finding.why)}</span></summary><ul>{"".join(items)}</ul></details>'


def _songs(count: int) -> str:
    return "1 song" if count == 1 else f"{count} songs"


def _song(song: Song, dataset: Dataset, number: int, flags: Sequence[str], folder: Path) -> str:
    sample, measured = song.sample, song.measured
    guessed = set(sample.estimated)

    def fact(name: str, shown: str) -> str:
        return f"{shown} (estimated)" if name in guessed else shown

    facts = [
        fact("bpm", f"{sample.bpm} bpm") if sample.bpm else "",
        fact("keyscale", sample.keyscale),
        fact("timesignature", f"{sample.timesignature} beats") if sample.timesignature else "",
        "" if sample.is_instrumental else f"sung ({sample.language})",
        f"{sample.repeat} times" if sample.repeat > 1 else "",
    ]
    if measured:
        level = f"{measured.loudness_lufs:.1f} LUFS" if measured.loudness_lufs is not None else "silent"
        channels = {1: "mono", 2: "stereo"}.get(measured.channels, f"{measured.channels} channels")
        facts = [
            clock(measured.seconds),
            f"{measured.sample_rate / 1000:g} kHz {channels}",
            level,
            f"peak {measured.peak_db:.1f} dB",
            *facts,
        ]
    caption = prompt_caption(sample, dataset.metadata)
    lyrics = ""
    if sample.lyrics and sample.lyrics != INSTRUMENTAL:
        lyrics = f'<details><summary class="facts">Lyrics</summary><div class="facts" style="white-space:pre-wrap">{escape(sample.lyrics)}</div></details>'
    sound = ""
    if measured:
        cannot = '<span class="facts" hidden>This browser cannot play this format.</span>'
        sound = f'{waveform(measured.envelope)}<audio controls preload="none" src="{escape(url(sample.audio_path, folder))}"></audio>{cannot}'
    marks = "".join(f'<span class="flag">{escape(flag)}</span>' for flag in flags)
    return (
        f'<article class="song" id="song-{number}"><div><div class="name">{escape(song.name)}</div><div class="caption">{escape(caption)}</div>'
        f'<div class="facts">{escape(" · ".join(f for f in facts if f))}</div>{marks}{lyrics}</div><div class="sound">{sound}</div></article>'
    )


CACHE = Path(".side-step") / "audit.json"
_THREADS = 4  # each holds a whole song
_REPORT_SECONDS = 0.5
_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Audit:
    """Where the page stands, every song and what was found."""

    page: Path
    songs: tuple[Song, ...]
    findings: tuple[Finding, ...]


def audit(path: Path, report: Report, checkpoint_dir: Path | None = None) -> Audit:
    """Listen to every song of the dataset.json at `path`; report a table and write `dataset-audit.html` beside it.

    With `checkpoint_dir` tokens are counted, without it guessed. Raises UserError for a wrong path, JobError when the page cannot be written.
    """
    path = Path(os.path.abspath(path))
    dataset = read(path)
    count = token_counter(checkpoint_dir)
    songs = []
    for sample, heard in _listen(dataset, path, report):
        measured, reason = (None, heard.reason) if isinstance(heard, AudioError) else (heard, "")
        seconds = measured.seconds if measured else sample.duration
        text, lyrics = prompt_tokens(sample, dataset.metadata, seconds, count)
        songs.append(
            Song(
                sample,
                relative_path(sample.audio_path, path.parent),
                measured,
                reason,
                text,
                lyrics,
                checkpoint_dir is None,
            )
        )
    findings = find(songs)
    report(_table(findings, len(songs)))
    target = path.with_name(f"{path.stem}-audit.html")
    try:
        write_text(target, page(dataset, songs, findings, path.parent).encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise JobError(
            f"{target} cannot be written: {error.strerror or error}.", "Make room or rights there, then run it again."
        ) from error
    report(Saved(what="audit", path=str(target)))
    return Audit(target, tuple(songs), tuple(findings))


def _table(findings: list[Finding], total: int) -> Table:
    rows = [(f.what, f"{len(f.songs)} of {total}", _example(f)) for f in findings]
    return Table(
        title="Audit",
        columns=("found", "songs", "such as"),
        rows=tuple(rows or [("nothing amiss", f"{total} of {total}", "")]),
    )


def _example(finding: Finding) -> str:
    name = finding.songs[0]
    return f"{name} ({finding.notes[name]})" if finding.notes[name] else name


def _listen(dataset: Dataset, path: Path, report: Report) -> Iterator[tuple[Sample, Measurement | AudioError]]:
    """Every sample with its measurement or why there is none, in order."""
    cache_path = path.parent / CACHE
    cache = _read_cache(cache_path)
    known: dict[str, Measurement] = {}

    def listen(sample: Sample) -> tuple[str, Measurement | AudioError]:
        try:
            content = content_hash(sample.audio_path)
            return content, cache.get(content) or measure(sample.audio_path)
        except AudioError as error:
            return "", error

    total, seconds = len(dataset.samples), 0.0
    started = reported = saved = time.monotonic()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for done, (sample, (content, heard)) in enumerate(
            zip(dataset.samples, pool.map(listen, dataset.samples), strict=True), 1
        ):
            if isinstance(heard, Measurement):
                known[content] = heard
                seconds += heard.seconds
            yield sample, heard
            now = time.monotonic()
            if now - reported > _REPORT_SECONDS or done == total:
                eta = (total - done) * (now - started) / done
                report(
                    Progress(
                        task="Listening",
                        done=done,
                        total=total,
                        current=sample.filename,
                        rate=seconds / (now - started),
                        unit="s of audio",
                        eta_seconds=eta,
                    )
                )
                reported = now
            if now - saved > _SAVE_SECONDS:
                _write_cache(cache_path, cache | known)
                saved = now
    _write_cache(cache_path, known)


def _read_cache(path: Path) -> dict[str, Measurement]:
    """What was measured before; nothing where it cannot be read or is of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            return {}
        lists = ("envelope", "shape")
        return {
            content: Measurement(**{**values, **{name: tuple(values[name]) for name in lists}})
            for content, values in data["songs"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, known: dict[str, Measurement]) -> None:
    write_text(
        path, json.dumps({"version": VERSION, "songs": {content: asdict(m) for content, m in sorted(known.items())}})
    )
