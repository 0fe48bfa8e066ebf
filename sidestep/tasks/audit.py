"""`build-dataset --audit`: what deserves attention in a data set before training, as a table and an HTML page.

In this order: every song is decoded once and measured (length, level, silence, clipping, and two fingerprints of its
sound that find copies); its prompts are counted in tokens, and the captions compared word by word; from all follow the
findings; the page shows them with charts and a player per song, and a file beside it has them as JSON. `audit` runs all
of it, in threads, and keeps the measurements by content beside dataset.json.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tokenizers import Tokenizer

from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS, lyric_prompt, text_prompt
from sidestep.audio.io import SAMPLE_RATE, AudioError, AudioInfo, content_hash, is_cut_short, probe, stream
from sidestep.audio.signals import TENTH, LevelMeter
from sidestep.data.fields import INSTRUMENTAL
from sidestep.data.lyrics import without_time_marks
from sidestep.data.manifest import (
    MAX_BYTES,
    Dataset,
    Metadata,
    Sample,
    duration_differs,
    prompt_caption,
    prompt_lyrics,
    read,
    relative_path,
    with_tag,
)
from sidestep.data.text import read_text
from sidestep.errors import JobError, UserError
from sidestep.events import FileFailed, Progress, Report, Saved, Table
from sidestep.files import write_text
from sidestep.pages import render
from sidestep.pages.charts import bars, histogram, waveform
from sidestep.words import clock, count

VERSION = 2  # of the measurements: raised whenever they change
CACHE = Path(".side-step") / "audit.json"

# How a song is measured.
SILENCE_DBFS = -60.0  # a tenth of a second below this is silent
CLIPPED_PEAK = 10 ** (-1 / 20)  # a song whose peak is lower is not clipped; all samples beyond full scale are
FLAT_SAMPLES = 3  # so many samples in a row at one song's own peak are a peak that was cut off
ENVELOPE_POINTS = 160
ENVELOPE_SAMPLES = SAMPLE_RATE // 100
SHAPE_SAMPLES = 2 * SAMPLE_RATE
SHAPE_BANDS = 12  # from 60 Hz to 12 kHz
SHAPE_WINDOW = np.hanning(SHAPE_SAMPLES).astype(np.float32)
SHAPE_EDGES = np.searchsorted(
    np.fft.rfftfreq(SHAPE_SAMPLES, 1 / SAMPLE_RATE), np.geomspace(60, 12_000, SHAPE_BANDS + 1)
)
LEAST_FRAMES = 5  # shorter songs are not compared by their shape
SAME_RECORDING = 0.97  # correlation of two shapes
CHARACTERS_PER_TOKEN = 3.5  # of Latin script; of other scripts a character is about a token

# What is found.
LONGEST_SECONDS = 600.0
SHORTEST_SECONDS = 10.0
QUIET_LUFS = -45.0
MOSTLY_SILENT = 0.5
CLIPPED_SAMPLES = 50
LOW_RATE = 32_000

THREADS = 4
REPORT_SECONDS = 0.5
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Measurement:
    """One song. Levels in dB, `silence` a share of its length, `clipped` in samples.

    `sound`: equal for equal samples, whatever the format. `envelope`: peaks of ENVELOPE_POINTS equal parts, 0 to 1.
    `shape`: level in 12 bands every two seconds, for finding the same recording in another coding.
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
    """Decode one song and measure it, piece by piece. Raises AudioError."""
    return measure_pieces(probe(path), stream(path))


def measure_pieces(info: AudioInfo, pieces: Iterable[np.ndarray]) -> Measurement:
    """The same of pieces, float32 [2, n] at 48 kHz, that were decoded from a file with header `info`.

    Each piece is whole seconds long, an even number of them, but for the last.
    """
    meter, digest, clipped = LevelMeter(), hashlib.blake2b(digest_size=16), 0
    silent: list[np.ndarray] = []
    peaks: list[np.ndarray] = []
    shape: list[int] = []
    for piece in pieces:
        top_before = min(meter.peak, 1.0)
        meter.add(piece)
        top = min(meter.peak, 1.0) * 0.9999
        if top > top_before:  # what was flat before did not reach it
            clipped = 0
        if meter.peak >= CLIPPED_PEAK:
            edges = np.flatnonzero(np.diff(np.pad(np.abs(piece) >= top, ((0, 0), (1, 1))).ravel()))
            runs = edges[1::2] - edges[::2]
            clipped += int(runs[runs >= FLAT_SAMPLES].sum())
        digest.update((piece * 32767).round().astype(np.int32).tobytes())
        tenths = max(piece.shape[1] // TENTH, 1)
        blocks = piece[:, : tenths * TENTH].reshape(2, tenths, -1)
        silent.append(np.square(blocks, dtype=np.float64).mean(axis=(0, 2)) < 10 ** (SILENCE_DBFS / 10))
        peaks.append(np.maximum.reduceat(np.abs(piece).max(axis=0), np.arange(0, piece.shape[1], ENVELOPE_SAMPLES)))
        for end in range(SHAPE_SAMPLES, piece.shape[1] + 1, SHAPE_SAMPLES):
            power = np.abs(np.fft.rfft(piece[:, end - SHAPE_SAMPLES : end].mean(axis=0) * SHAPE_WINDOW)) ** 2
            bands = (power[a:b].mean() for a, b in itertools.pairwise(SHAPE_EDGES))
            shape += [round(10 * float(np.log10(band + 1e-6))) for band in bands]
    seconds, loudness = meter.samples / SAMPLE_RATE, meter.loudness_lufs()
    envelope = np.concatenate(peaks).clip(0, 1)
    starts = np.unique(np.linspace(0, len(envelope), ENVELOPE_POINTS + 1).astype(int)[:-1])
    return Measurement(
        seconds=seconds,
        sample_rate=info.sample_rate,
        channels=info.channels,
        format=info.format,
        cut_short=is_cut_short(info, seconds),
        peak_db=20 * float(np.log10(max(meter.peak, 1e-6))),
        loudness_lufs=loudness if np.isfinite(loudness) else None,
        silence=float(np.concatenate(silent).mean()),
        clipped=clipped,
        sound=digest.hexdigest(),
        envelope=tuple(round(float(peak), 3) for peak in np.maximum.reduceat(envelope, starts)),
        shape=tuple(shape),
    )


def same_recording(a: Measurement, b: Measurement) -> bool:
    """Whether two songs are one recording in two codings.

    They are when they are equally long within a second and their levels rise and fall together in every band.
    """
    frames = min(len(a.shape), len(b.shape)) // SHAPE_BANDS
    if abs(a.seconds - b.seconds) > 1.0 or frames < LEAST_FRAMES:
        return False
    return bool(_movement(a, frames) @ _movement(b, frames) > SAME_RECORDING)


def _movement(measured: Measurement, frames: int) -> np.ndarray:
    """How the levels of so many frames rise and fall around each band's mean, as a vector of length 1 or 0."""
    levels = np.array(measured.shape[: frames * SHAPE_BANDS], np.float32).reshape(frames, SHAPE_BANDS)
    levels -= levels.mean(axis=0)
    return levels.ravel() / max(float(np.linalg.norm(levels)), 1e-9)


def token_counter(checkpoint_dir: Path | None) -> Callable[[str], int]:
    """A function from text to its number of tokens. Raises UserError when `checkpoint_dir` holds no tokenizer."""
    if checkpoint_dir is None:
        return guess
    home = checkpoint_dir.parent if checkpoint_dir.is_file() else checkpoint_dir
    paths = [home / folder / "tokenizer.json" for folder in ("Qwen3-Embedding-0.6B", "tokenizer")]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise UserError(
            f"--checkpoint-dir {checkpoint_dir}: no tokenizer there.",
            f"It belongs at {paths[0]}; without the flag, tokens are guessed.",
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def guess(text: str) -> int:
    """About how many tokens a text has, without a tokenizer."""
    latin = sum(c < "\u0250" for c in text)
    return round(latin / CHARACTERS_PER_TOKEN + len(text) - latin)


@dataclass(frozen=True)
class Variety:
    """How varied captions are. different: how many there are word by word, whatever their case and punctuation.

    shared: a word of one caption stands in this share of the others, in the mean; None for a single caption.
    """

    captions: int
    different: int
    shared: float | None

    @property
    def told(self) -> str:
        """What is said of the captions of one song."""
        shared = "" if self.shared is None else f", {self.shared:.0%} of words in common"
        return f"{self.captions} captions, {self.different} different{shared}"


def words_of(caption: str) -> tuple[str, ...]:
    """The words of a caption in order, in small letters."""
    return tuple(re.findall(r"\w+", caption.casefold()))


def variety(captions: Sequence[str]) -> Variety:
    """How varied these captions are."""
    spoken = [words_of(caption) for caption in captions]
    standing_in = Counter(word for words in spoken for word in set(words))
    pairs = standing_in.total() * (len(spoken) - 1)
    shared = sum(n * (n - 1) for n in standing_in.values()) / pairs if pairs > 0 else None
    return Variety(len(spoken), len(set(spoken)), shared)


def captions_of(sample: Sample) -> tuple[str, ...]:
    """All captions of a song that training draws from, its own first."""
    return (sample.caption or sample.genre, *sample.captions)


def captions_told(samples: Sequence[Sample]) -> dict[str, str]:
    """What is to be said of the captions of a data set, in words; nothing of fewer than two."""
    songs = [captions_of(sample) for sample in samples]
    every, varied = variety([c for captions in songs for c in captions]), [variety(c) for c in songs if len(c) > 1]
    between = variety([captions[0] for captions in songs])
    if every.captions < 2:
        return {}
    told = {
        "songs with several captions": f"{len(varied)} of {len(songs)}",
        "different captions": f"{every.different} of {every.captions}",
    }
    within = [v.shared for v in varied if v.shared is not None]
    if within:
        mean = sum(within) / len(within)
        told["words in common, captions of a song"] = f"{mean:.0%} ({min(within):.0%} to {max(within):.0%})"
    if between.shared is not None:
        told["words in common, songs"] = f"{between.shared:.0%}"
    return told


@dataclass(frozen=True)
class Song:
    """One sample with what was measured of it; `reason` says why nothing could be."""

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


def find(songs: Sequence[Song], left_out: Sequence[Song] = ()) -> list[Finding]:
    """All findings that there are, the gravest first. left_out: files that are no songs, since they cannot be read."""
    heard = [(s, s.measured) for s in songs if s.measured]
    by_sound: dict[str, list[Song]] = defaultdict(list)
    for song, measured in heard:
        by_sound[measured.sound].append(song)
    copies = [(song, f"like {group[0].name}") for group in by_sound.values() for song in group[1:]]
    by_caption: dict[tuple[str, ...], list[Song]] = defaultdict(list)
    for song in songs:
        by_caption[words_of(captions_of(song.sample)[0])].append(song)
    alike = [(song, f"like {group[0].name}") for group in by_caption.values() for song in group[1:]]
    guessed = "about " if any(s.tokens_guessed for s in songs) else ""
    found = [
        _finding(
            "cannot be read", "left out of training", ((s, s.reason) for s in (*songs, *left_out) if not s.measured)
        ),
        _finding(
            "break off",
            "the file is damaged; what is left is used",
            ((s, clock(m.seconds)) for s, m in heard if m.cut_short),
        ),
        _finding("same sound", "one of them is enough; to train on it more often, say repeat", copies),
        _finding("same recording in another coding", "likewise", _recodings(heard)),
        _finding(
            "near-silence",
            f"below {QUIET_LUFS:g} LUFS, or silent for more than half of its length",
            (
                (s, f"{_loudness(m, digits=0)}, {m.silence:.0%} silence")
                for s, m in heard
                if m.silence > MOSTLY_SILENT or (m.loudness_lufs is not None and m.loudness_lufs < QUIET_LUFS)
            ),
        ),
        _finding(
            "clipping",
            f"{CLIPPED_SAMPLES} samples and more cut off at the top: the model learns the distortion",
            ((s, f"{m.clipped} samples") for s, m in heard if m.clipped >= CLIPPED_SAMPLES),
        ),
        _finding(
            "longer than 10 minutes",
            "the model knows no longer songs",
            ((s, clock(m.seconds)) for s, m in heard if m.seconds > LONGEST_SECONDS),
        ),
        _finding(
            "shorter than 10 s",
            "the model makes no shorter songs",
            ((s, f"{m.seconds:.1f} s") for s, m in heard if m.seconds < SHORTEST_SECONDS),
        ),
        _finding(
            "no caption",
            "the prompt is a title or a file name: write song.txt beside it",
            ((s, s.sample.caption) for s in songs if not s.sample.labeled),
        ),
        _finding(
            "caption of another song, word by word",
            "the model is told that they sound alike: say what differs",
            alike,
        ),
        _finding(
            "one caption several times",
            "it only comes more often: say it in other words",
            (
                (s, f"{v.different} of {v.captions} are different")
                for s in songs
                if (v := variety(captions_of(s.sample))).different < v.captions
            ),
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
                (s, f"{clock(m.seconds)}, not {clock(s.sample.duration)}")
                for s, m in heard
                if duration_differs(s.sample, m.seconds)
            ),
        ),
        _finding(
            "low sample rate",
            f"below {LOW_RATE // 1000} kHz there is no treble to learn",
            ((s, f"{m.sample_rate / 1000:g} kHz") for s, m in heard if m.sample_rate < LOW_RATE),
        ),
    ]
    return [f for f in found if f.songs]


def _finding(what: str, why: str, songs: Iterable[tuple[Song, str]]) -> Finding:
    notes = {song.name: note for song, note in songs}
    return Finding(what, why, tuple(notes), notes)


def _loudness(measured: Measurement, digits: int) -> str:
    return "silent" if measured.loudness_lufs is None else f"{measured.loudness_lufs:.{digits}f} LUFS"


def _recodings(heard: Sequence[tuple[Song, Measurement]]) -> list[tuple[Song, str]]:
    """Songs that are a song before them in another coding.

    Only songs of like length are compared, each with all of them at once.
    """
    first_of: dict[str, int] = {}
    by_frames: dict[int, list[int]] = defaultdict(list)
    for i, (_, measured) in enumerate(heard):
        if first_of.setdefault(measured.sound, i) == i:
            by_frames[len(measured.shape) // SHAPE_BANDS].append(i)
    like: dict[int, int] = {}
    for frames in sorted(by_frames):
        if frames < LEAST_FRAMES:
            continue
        shorter = sorted(by_frames[frames], key=lambda i: heard[i][1].seconds)
        seconds = [heard[i][1].seconds for i in shorter]
        movements = np.stack([_movement(heard[i][1], frames) for i in shorter])
        for i in (*shorter, *by_frames.get(frames + 1, ())):
            measured = heard[i][1]
            start, end = bisect_left(seconds, measured.seconds - 1.0), bisect_right(seconds, measured.seconds + 1.0)
            for k in np.flatnonzero(movements[start:end] @ _movement(measured, frames) > SAME_RECORDING):
                earlier, later = sorted((i, shorter[start + int(k)]))
                if earlier < later:
                    like[later] = min(earlier, like.get(later, earlier))
    return [(heard[later][0], f"like {heard[earlier][0].name}") for later, earlier in sorted(like.items())]


def page(dataset: Dataset, songs: Sequence[Song], findings: Sequence[Finding], folder: Path) -> str:
    """The page as HTML: findings, charts and a player for each song, whose file it finds from `folder`, where it is.

    Files of findings that are none of the songs stand there by their names alone.
    """
    numbers = {song.name: i for i, song in enumerate(songs)}
    flags: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        for name in finding.songs:
            flags[name].append(f"{finding.what}: {finding.notes[name]}" if finding.notes[name] else finding.what)
    samples = dataset.samples
    figures = [
        ("Songs", len(songs), ""),
        ("Music", clock(sum(song.measured.seconds for song in songs if song.measured)), ""),
        ("With caption or genre", sum(s.labeled for s in samples), ""),
        ("With lyrics", sum(s.lyrics not in ("", INSTRUMENTAL) for s in samples), ""),
        ("With tempo", sum(s.bpm is not None for s in samples), ""),
        ("With key", sum(bool(s.keyscale) for s in samples), ""),
        ("With estimates", sum(bool(s.estimated) for s in samples), ""),
    ]
    return render(
        "audit.html.j2",
        name=dataset.metadata.name or folder.name,
        figures=figures,
        findings=[
            {
                "what": f.what,
                "why": f.why,
                "count": count(len(f.songs), "song"),
                "songs": [{"name": name, "number": numbers.get(name), "note": f.notes[name]} for name in f.songs],
            }
            for f in findings
        ],
        captions=captions_told(samples),
        plots=_plots(songs),
        songs=[_song(song, dataset.metadata, flags[song.name], folder) for song in songs],
    )


def url(audio: Path, folder: Path) -> str:
    """The URL of a song for a page in `folder`: relative, so that both can move; absolute only across drives."""
    path = relative_path(audio, folder)
    if Path(path).is_absolute():
        return audio.as_uri()
    quoted = quote(path if sys.platform == "win32" else os.fsencode(path))
    return f"./{quoted}"  # a first folder with a colon in its name would read as a scheme


def _plots(songs: Sequence[Song]) -> list[dict[str, Any]]:
    """Every chart for which there is data."""
    heard = [song.measured for song in songs if song.measured]
    rates = Counter(m.sample_rate for m in heard)
    formats = Counter(m.format.split("/")[0].lower() for m in heard)
    keys = Counter(s.sample.keyscale.replace(" minor", "m").replace(" major", "") for s in songs if s.sample.keyscale)
    loudness = [m.loudness_lufs for m in heard if m.loudness_lufs is not None]
    tempos = [float(s.sample.bpm) for s in songs if s.sample.bpm]
    lyrics = [float(s.lyric_tokens) for s in songs if s.sample.lyrics not in ("", INSTRUMENTAL)]
    unit = 60 if any(m.seconds >= 120 for m in heard) else 1
    limit = [(LONGEST_SECONDS / unit, "the model's limit")]
    plots: list[Any] = [
        heard and histogram([m.seconds / unit for m in heard], "minutes" if unit == 60 else "seconds", "Length", limit),
        heard and bars({f"{rate / 1000:g}": rates[rate] for rate in sorted(rates)}, "kHz", "Sample rate"),
        heard and bars(dict(formats.most_common(10)), "files", "Format"),
        keys and bars(dict(keys.most_common(14)), "m: minor", "Key"),
        loudness and histogram(loudness, "LUFS", "Loudness", [(-14.0, "--normalize lufs")]),
        heard and histogram([m.peak_db for m in heard], "dBFS", "Highest sample", [(0.0, "full scale")]),
        tempos and histogram(tempos, "bpm", "Tempo"),
        lyrics and histogram(lyrics, "tokens", "Lyrics", [(LYRIC_TOKENS, "limit")]),
    ]
    return [plot for plot in plots if plot]


def _song(song: Song, metadata: Metadata, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """What the page shows of a song."""
    sample, measured = song.sample, song.measured

    def described(name: str, shown: str) -> str:
        return f"{shown} (estimated)" if name in sample.estimated else shown

    parts = []
    if measured:
        channels = {1: "mono", 2: "stereo"}.get(measured.channels, f"{measured.channels} channels")
        parts = [
            clock(measured.seconds),
            f"{measured.sample_rate / 1000:g} kHz {channels}",
            _loudness(measured, digits=1),
            f"peak {measured.peak_db:.1f} dB",
        ]
    parts += [
        variety(captions_of(sample)).told if sample.captions else "",
        f"caption {sample.origins['caption']}" if "caption" in sample.origins else "",
        f"lyrics {sample.origins['lyrics']}" if "lyrics" in sample.origins else "",
        described("bpm", f"{sample.bpm} bpm") if sample.bpm else "",
        described("keyscale", sample.keyscale),
        described("timesignature", f"{sample.timesignature} beats") if sample.timesignature else "",
        "" if sample.is_instrumental else f"sung ({sample.language})",
        f"{sample.repeat} times" if sample.repeat > 1 else "",
    ]
    return {
        "name": song.name,
        "caption": prompt_caption(sample, metadata),
        "captions": sample.captions,
        "metadata": " · ".join(part for part in parts if part),
        "flags": flags,
        "lyrics": "" if sample.lyrics == INSTRUMENTAL else sample.lyrics,
        "url": url(sample.audio_path, folder) if measured else "",
        "waveform": waveform(measured.envelope) if measured else "",
        "length": len(measured.envelope) if measured else 0,
    }


def as_json(dataset: Dataset, songs: Sequence[Song], findings: Sequence[Finding]) -> dict[str, Any]:
    """What the page shows, for programs: captions of the whole, findings, and of each song what was measured."""
    own = [captions_of(song.sample)[0] for song in songs]
    every = [caption for song in songs for caption in captions_of(song.sample)]
    of_songs = []
    for song in songs:
        measured = (
            {k: v for k, v in vars(song.measured).items() if k not in ("envelope", "shape")} if song.measured else None
        )
        told = {"name": song.name, "caption": prompt_caption(song.sample, dataset.metadata), "measured": measured}
        of_songs.append(told | {"reason": song.reason, "captions": vars(variety(captions_of(song.sample)))})
    return {
        "captions": {"all": vars(variety(every)), "between_songs": vars(variety(own))},
        "findings": [
            {"what": f.what, "why": f.why, "songs": [{"name": name, "note": f.notes[name]} for name in f.songs]}
            for f in findings
        ],
        "songs": of_songs,
    }


@dataclass(frozen=True)
class Audit:
    """Where the page is, every song and what was found."""

    page: Path
    songs: tuple[Song, ...]
    findings: tuple[Finding, ...]


def audit(
    path: Path,
    report: Report,
    checkpoint_dir: Path | None = None,
    unreadable: Sequence[tuple[Path, str]] = (),
) -> Audit:
    """Listen to every song of the dataset.json at `path`; report a table and write `dataset-audit.html` beside it.

    The same stands in `dataset-audit.json`, for programs.

    With `checkpoint_dir` tokens are counted, without it guessed. `unreadable`: (file, reason) of each file that is no
    song of the data set since it cannot be read; it is among the findings. Raises UserError for a wrong path, JobError
    when the page cannot be written.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (links stay as they are)
    dataset = read(path, report)
    tokens_in = token_counter(checkpoint_dir)
    songs = []
    for sample, heard in _listen(dataset, path, report):
        measured, reason = (None, heard.reason) if isinstance(heard, AudioError) else (heard, "")
        if reason:
            report(FileFailed(path=str(sample.audio_path), reason=reason, stage="audit"))
        seconds = measured.seconds if measured else sample.duration
        tag, position = sample.custom_tag or dataset.metadata.custom_tag, dataset.metadata.tag_position
        further = (with_tag(caption, tag, position) for caption in sample.captions)
        texts = [
            text_prompt(
                caption,
                bpm=sample.bpm,
                timesignature=sample.timesignature,
                keyscale=sample.keyscale,
                duration=seconds,
            )
            for caption in (prompt_caption(sample, dataset.metadata), *further)
        ]
        lyrics = lyric_prompt(without_time_marks(prompt_lyrics(sample)), sample.language)
        name = relative_path(sample.audio_path, path.parent)
        tokens = max(map(tokens_in, texts)), tokens_in(lyrics)
        songs.append(Song(sample, name, measured, reason, *tokens, tokens_guessed=checkpoint_dir is None))
    left_out = [
        Song(Sample(audio_path=file, id=""), relative_path(file.absolute(), path.parent), None, reason)
        for file, reason in unreadable
    ]
    findings = find(songs, left_out)
    rows = []
    for f in findings:
        example = f"{f.songs[0]} ({f.notes[f.songs[0]]})" if f.notes[f.songs[0]] else f.songs[0]
        rows.append((f.what, f"{len(f.songs)} of {len(songs) + len(left_out)}", example))
    rows = rows or [("nothing amiss", f"{len(songs)} of {len(songs)}", "")]
    report(Table(title="Audit", columns=("found", "songs", "such as"), rows=tuple(rows)))
    if told := captions_told(dataset.samples):
        report(Table(title="Captions", columns=("", ""), rows=tuple(told.items())))
    target = path.with_name(f"{path.stem}-audit.html")
    try:
        write_text(target, page(dataset, songs, findings, path.parent))
        told = as_json(dataset, songs, findings)
        write_text(target.with_suffix(".json"), json.dumps(told, indent=2) + "\n")
    except OSError as error:
        raise JobError(
            f"{target} cannot be written: {error.strerror or error}.", "Make room or rights there, then run it again."
        ) from error
    shown = target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target
    report(Saved(what="audit", path=str(shown)))
    return Audit(target, tuple(songs), tuple(findings))


def _listen(dataset: Dataset, path: Path, report: Report) -> Iterator[tuple[Sample, Measurement | AudioError]]:
    """Every sample with its measurement or why there is none, in order."""
    cache_path = path.parent / CACHE
    cache: dict[str, Measurement] = {}
    try:
        data = json.loads(read_text(cache_path, MAX_BYTES)[0])
        if data["version"] == VERSION:
            for content, values in data["songs"].items():
                lists = {name: tuple(values[name]) for name in ("envelope", "shape")}
                cache[content] = Measurement(**values | lists)
    except (ValueError, LookupError, TypeError, AttributeError):  # not there, or not as we wrote it
        cache = {}
    known: dict[str, Measurement] = {}

    def listen(sample: Sample) -> tuple[str, Measurement | AudioError]:
        try:
            content = content_hash(sample.audio_path)
            return content, cache.get(content) or measure(sample.audio_path)
        except AudioError as error:
            return "", error

    total, seconds = len(dataset.samples), 0.0
    started = reported = saved = time.monotonic()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for done, (sample, (content, heard)) in enumerate(
            zip(dataset.samples, pool.map(listen, dataset.samples), strict=True), 1
        ):
            if isinstance(heard, Measurement):
                known[content] = heard
                seconds += heard.seconds
            yield sample, heard
            now = time.monotonic()
            if now - reported > REPORT_SECONDS or done == total:
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
            if now - saved > SAVE_SECONDS:
                _write_cache(cache_path, cache | known)
                saved = now
    _write_cache(cache_path, known)


def _write_cache(path: Path, known: dict[str, Measurement]) -> None:
    songs = {content: vars(measured) for content, measured in sorted(known.items())}
    write_text(path, json.dumps({"version": VERSION, "songs": songs}))
