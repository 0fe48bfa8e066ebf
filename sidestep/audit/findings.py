"""What in a data set deserves a look: each kind of finding, why it matters, and the songs it is about."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS
from sidestep.audit.measure import Measurement, same_recording
from sidestep.data.manifest import Sample, duration_differs

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
        _finding("break off", "the file is damaged; what is left is used", ((s, _clock(s.measured.seconds)) for s in heard if s.measured.cut_short)),
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
            ((s, _clock(s.measured.seconds)) for s in heard if s.measured.seconds > LONGEST_SECONDS),
        ),
        _finding(
            "shorter than 10 s",
            "the model makes no shorter songs",
            ((s, f"{s.measured.seconds:.1f} s") for s in heard if s.measured.seconds < SHORTEST_SECONDS),
        ),
        _finding(
            "no caption", "the prompt is a title or a file name: write song.txt beside it", ((s, s.sample.caption) for s in songs if not s.sample.labeled)
        ),
        _finding(
            "sung, but no lyrics", "the model is told that nobody sings", ((s, "") for s in songs if not s.sample.is_instrumental and not s.sample.lyrics)
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
            ((s, f"{_clock(s.measured.seconds)}, not {_clock(s.sample.duration)}") for s in heard if duration_differs(s.sample, s.measured.seconds)),
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
    return measured.silence > MOSTLY_SILENT or (measured.loudness_lufs is not None and measured.loudness_lufs < QUIET_LUFS)


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


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
