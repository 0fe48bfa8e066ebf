"""The listening page: clips side by side, the figures as charts, and what is a copy beside what it was copied from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sidestep.acestep.vae import decode, frames_per_second
from sidestep.audio.signals import LOUDNESS_LUFS
from sidestep.pages import render
from sidestep.pages.charts import Interval, intervals
from sidestep.tasks.score.clips import Clip, Heard, Place, Request, Songs, read_clip, write_clip
from sidestep.tasks.score.judge import Judge
from sidestep.tasks.score.metrics import Figure
from sidestep.tasks.score.recommend import Row, Verdict
from sidestep.words import clock

NAME = "listen.html"
MOST_COPIES = 24  # that are shown beside their songs, the nearest
MOST_SOFTENED_DB = 6.0  # what is quieter by more than that is left quieter, lest all others can hardly be heard
FIGURES = {  # name → (factor, unit, what it says)
    "gain": (100, " %", "how much of the songs was learned: by how much the loss is lower than without an adapter"),
    "drift": (100, " %", "how much everything else changes: less is better"),
    "style": (1, "", "distance of its music from how the songs sound: less is nearer"),
    "copying": (100, " %", "clips that are nearer to a song than songs are to each other: none is best"),
}


@dataclass(frozen=True, eq=False)
class Copy:
    """A clip that is a copy: of which row, by which prompt, where in it and where in which song, and both to hear."""

    row: Row
    number: int
    at_seconds: float
    song: str
    start_seconds: float
    seconds: float
    distance: float
    clip: Clip
    window: Clip | None

    @property
    def where(self) -> str:
        """`3 from 0:04 is like night drive.pt from 1:12`."""
        at, start = clock(self.at_seconds), clock(self.start_seconds)
        return f"{self.number + 1} from {at} is like {self.song} from {start}"


def copies_of(
    judge: Judge, songs: Songs, rows: Sequence[Row], heard: Mapping[Place, Heard], limit: float
) -> list[Copy]:
    """The clips of adapters that are copies, nearest first; the windows of the nearest are decoded, once.

    Raises JobError when the disk refuses.
    """
    rate = frames_per_second(judge.checkpoint.vae_config())
    near = [
        (match, row, number)
        for row in rows
        for number, match in enumerate(heard[row.name, row.strength].matches)
        if match.distance < limit
    ]
    near.sort(key=lambda found: found[0].distance)
    vae, windows, found = None, {}, []
    for match, row, number in near:
        place = (match.song, match.start)
        if place not in windows and len(windows) < MOST_COPIES:
            latents = songs.latents[match.song][match.start : match.start + songs.piece_frames]
            stem = judge.folder / "clips" / judge.key("window", judge.trained[match.song].digests["audio"], *place[1:])
            windows[place] = read_clip(stem)
            if windows[place] is None:
                vae = vae or judge.checkpoint.load_vae(judge.device, judge.dtype)
                audio = decode(vae, latents[None])[0].numpy()
                sample_rate = int(judge.checkpoint.vae_config()["sampling_rate"])
                windows[place] = write_clip(stem, latents, audio, sample_rate)
        found.append(
            Copy(
                row=row,
                number=number,
                at_seconds=match.at / rate,
                song=songs.names[match.song],
                start_seconds=match.start / rate,
                seconds=songs.piece_frames / rate,
                distance=match.distance,
                clip=heard[row.name, row.strength].clips[number],
                window=windows.get(place),
            )
        )
    return found


def volumes(clips: Sequence[Clip]) -> list[float]:
    """The volume, at most 1, at which each of some clips is played so that all are equally loud.

    That is -14 LUFS, or as loud as the quietest; a clip that is silent or quieter by far is no measure for the others.
    """
    known = [clip.loudness for clip in clips if clip.loudness is not None]
    floor = LOUDNESS_LUFS - MOST_SOFTENED_DB
    target = min([LOUDNESS_LUFS, *(loudness for loudness in known if loudness >= floor)])
    return [1.0 if c.loudness is None else min(10 ** ((target - c.loudness) / 20), 1.0) for c in clips]


def page(
    title: str,
    what: str,
    folder: Path,
    base: Row,
    rows: Sequence[Row],
    verdict: Verdict,
    requests: Sequence[Request] = (),
    clips: Mapping[Place, Sequence[Clip]] | None = None,
    copies: Sequence[Copy] = (),
) -> str:
    """The whole page. folder: in which it will lie, and below which the clips do. base: the first row of the grid."""
    every = [base, *rows]
    clips = clips or {}
    columns = (
        [volumes([clips[row.name, row.strength][n] for row in every]) for n in range(len(requests))] if clips else []
    )

    def url(clip: Clip) -> str:
        return quote(clip.audio.relative_to(folder).as_posix())

    def shown(row: Row, number: int) -> dict[str, Any]:
        heard = [
            {"src": url(clip), "volume": round(columns[n][number], 4)}
            for n, clip in enumerate(clips.get((row.name, row.strength), ()))
        ]
        figures = [as_text(getattr(row, name), *FIGURES[name][:2]) for name in drawn]
        return {
            "name": "without an adapter" if row is base else row.name,
            "strength": "" if row is base else f"{row.strength:g}",
            "title": "without an adapter" if row is base else row.title,
            "clips": heard,
            "figures": figures,
            "recommended": row is verdict.row or (row.name, row.strength) == (verdict.row.name, verdict.row.strength),
        }

    drawn = [name for name in FIGURES if getattr(rows[0], name) is not None]
    return render(
        "listen.html.j2",
        title=title,
        what=what,
        verdict=verdict,
        rows=[shown(row, number) for number, row in enumerate(every)],
        names=drawn,
        strengths=list(dict.fromkeys(f"{row.strength:g}" for row in rows)),
        prompts=[{"caption": r.prompt.caption, "song": r.song.name, "seed": r.prompt.seed} for r in requests],
        charts_of=[
            {
                "name": name,
                "unit": "," * bool(FIGURES[name][1]) + FIGURES[name][1],
                "says": FIGURES[name][2],
                "chart": chart(name, base, rows, verdict.row),
            }
            for name in drawn
        ],
        copies=[
            {
                "title": c.row.title,
                "number": c.number + 1,
                "at": clock(c.at_seconds),
                "song": c.song,
                "start": clock(c.start_seconds),
                "distance": f"{c.distance:.2f}",
                "clip": f"{url(c.clip)}#t={c.at_seconds:g},{c.at_seconds + c.seconds:g}",
                "window": url(c.window) if c.window else None,
                "volumes": volumes([c.clip, c.window]) if c.window else None,
            }
            for c in copies
        ],
    )


def as_text(figure: Figure | None, factor: float, unit: str) -> dict[str, str]:
    """A figure with its interval, for a table."""
    if figure is None:
        return {"value": "–", "interval": ""}
    low, high = (factor * end for end in figure.interval)
    digits = 1 if unit else 2
    return {
        "value": f"{factor * figure.value:.{digits}f}{unit}",
        "interval": f"{low:.{digits}f} to {high:.{digits}f}",
    }


def chart(name: str, base: Row, rows: Sequence[Row], recommended: Row) -> dict[str, Any]:
    """A figure over the checkpoints and strengths, with a line where the base model has one that is not zero."""
    factor, unit, _ = FIGURES[name]
    found = []
    for row in rows:
        figure = getattr(row, name)
        low, high = figure.interval
        is_marked = (row.name, row.strength) == (recommended.name, recommended.strength)
        found.append(Interval(row.name, row.title, factor * figure.value, factor * low, factor * high, is_marked))
    reference = getattr(base, name)
    return intervals(found, name, unit, factor * reference.value if reference else None)
