"""The audit as one HTML page: plots, findings and a player for each song. Nothing is loaded from elsewhere but the songs, by relative URL."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from sidestep.audit.findings import LONGEST_SECONDS, Finding, Song
from sidestep.audit.plots import bars, histogram, waveform
from sidestep.data.fields import INSTRUMENTAL
from sidestep.data.manifest import Dataset, prompt_caption, relative_path

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
        *(_finding(f, numbers) for f in findings),
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
        (_clock(seconds), "of music"),
        (f"{sum(s.labeled for s in samples)}", "with caption or genre"),
        (f"{sum(bool(s.lyrics) and s.lyrics != INSTRUMENTAL for s in samples)}", "with lyrics"),
        (f"{sum(s.bpm is not None for s in samples)}", "with tempo"),
        (f"{sum(bool(s.keyscale) for s in samples)}", "with key"),
        (f"{sum(bool(s.estimated) for s in samples)}", "with estimates"),
    ]
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles) + "</div>"


def _plots(songs: Sequence[Song]) -> list[str]:
    """Every plot for which there is data."""
    heard = [s.measured for s in songs if s.measured]
    rates = Counter(m.sample_rate for m in heard)
    kinds = Counter(m.format.split("/")[0].lower() for m in heard)
    keys = Counter(s.sample.keyscale for s in songs if s.sample.keyscale)
    plots = [
        ("Length", [m.seconds / 60 for m in heard], "minutes", [(LONGEST_SECONDS / 60, "the model's limit")]),
        ("Loudness", [m.loudness_lufs for m in heard if m.loudness_lufs is not None], "LUFS", [(-14.0, "--normalize lufs")]),
        ("Highest sample", [m.peak_db for m in heard], "dBFS", [(0.0, "full scale")]),
        ("Tempo", [float(s.sample.bpm) for s in songs if s.sample.bpm], "bpm", []),
        ("Lyrics", [float(s.lyric_tokens) for s in songs if s.sample.lyrics not in ("", INSTRUMENTAL)], "tokens", [(2048, "limit")]),
    ]
    drawn = [_figure(title, histogram(values, unit, title, marks)) for title, values, unit, marks in plots if values]
    named = [
        ("Sample rate", {f"{rate / 1000:g}": count for rate, count in sorted(rates.items())}, "kHz"),
        ("Format", dict(kinds.most_common(10)), "files"),
        ("Key", {key.replace(" minor", "m").replace(" major", ""): count for key, count in keys.most_common(14)}, "m: minor"),
    ]
    return drawn[:1] + [_figure(title, bars(counts, unit, title)) for title, counts, unit in named if counts] + drawn[1:]


def _figure(title: str, svg: str) -> str:
    return f"<figure><h3>{title}</h3>{svg}</figure>"


def _finding(finding: Finding, numbers: dict[str, int]) -> str:
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
        facts = [_clock(measured.seconds), f"{measured.sample_rate / 1000:g} kHz {channels}", level, f"peak {measured.peak_db:.1f} dB", *facts]
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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
