"""What an adapter is judged by, as pure mathematics on numbers that were measured, each with its spread.

A figure is computed from units (songs, captions, clips) that are drawn anew, with replacement, many times: the
bootstrap (Efron 1979). All candidates of a comparison are drawn the same units, so two figures are compared by the
spread of their difference, which is narrower than either.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.seeding import seed_for

DRAWS = 1000
LEVEL = 0.95
TOO_NEAR = 0.05  # of the distances between songs: a clip nearer to a song than all but these counts as a copy
UNRELATED = math.sqrt(2)  # the distance of windows that have nothing to do with each other
LEAST_SPREAD = 1e-3  # of a channel: what is as still as that says nothing
STILL = 0.05  # of the songs' mean power: a window that moves less is silence or one long note, and no copy


@dataclass(frozen=True, eq=False)
class Figure:
    """A value and the values [DRAWS] that it had on units drawn anew."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the draws."""
        low, high = np.quantile(self.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def equals(self, other: "Figure") -> bool:
        """Whether the interval of the difference holds zero."""
        low, high = Figure(self.value - other.value, self.draws - other.draws).interval
        return low <= 0 <= high


def bootstrap(units: int, statistic: Callable[[np.ndarray], float]) -> Figure:
    """A statistic of unit indices [units], with its draws. The same number of units is always drawn the same way."""
    generator = np.random.default_rng(seed_for("bootstrap", units))
    draws = [statistic(generator.integers(units, size=units)) for _ in range(DRAWS)]
    return Figure(statistic(np.arange(units)), np.array(draws))


def gain(losses: Sequence[float], base: Sequence[float]) -> Figure:
    """By which share the loss is lower than the base's: 1 − mean(losses) / mean(base). One loss for each unit."""
    own, other = np.asarray(losses), np.asarray(base)
    return bootstrap(len(own), lambda i: float(1 - own[i].mean() / other[i].mean()))


def relative_change(velocity: Tensor, base: Tensor) -> float:
    """‖velocity − base‖ / ‖base‖ over all elements of [N, T, D]. Exactly 0 for equal ones."""
    return float((velocity.double() - base.double()).norm() / base.double().norm().clamp(min=1e-12))


def drift(changes: Sequence[float]) -> Figure:
    """Root mean square of the relative changes, one for each caption."""
    squares = np.square(np.asarray(changes))
    return bootstrap(len(squares), lambda i: float(np.sqrt(squares[i].mean())))


def features(latents: Tensor) -> Tensor:
    """What a clip [T, D] sounds like, whatever its notes, [3 D]: each channel's mean, spread and mean step."""
    latents = latents.double()
    return torch.cat([latents.mean(0), latents.std(0, correction=0), latents.diff(dim=0).abs().mean(0)])


def style(clips: Tensor, songs: Tensor, song_of: Sequence[str]) -> Figure:
    """Energy distance (Székely & Rizzo 2013) of clips' features [N, F] from songs' [M, F], unbiased, N ≥ 2.

    (2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖) / E‖y − y′‖ with x, x′ of clips and y, y′ of songs, in the songs' own spread:
    the kernel distance whose kernel is −‖·‖ (Sejdinovic et al. 2013), which tells far from farther. song_of: of each
    window; two of one song are not independent and are no pair, unless there is one song only. 0 is no difference;
    below 0 is what chance makes of that.
    """
    spread = songs.std(0, correction=0).clamp(min=LEAST_SPREAD)
    x, y = clips / spread, songs / spread
    names = np.asarray(song_of)
    apart = torch.from_numpy(names[:, None] != names[None, :])
    if not apart.any():
        apart = ~torch.eye(len(y), dtype=torch.bool)
    reference = float(torch.cdist(y, y)[apart].mean()) if apart.any() else 0.0
    own, cross = torch.cdist(x, x).numpy(), torch.cdist(x, y).mean(1).numpy()
    usual = own[~np.eye(len(x), dtype=bool)].mean()

    def distance(i: np.ndarray) -> float:
        different = i[:, None] != i[None, :]  # a clip that was drawn twice is no pair
        alike = own[np.ix_(i, i)][different].mean() if different.any() else usual
        return float((2 * cross[i].mean() - alike - reference) / max(reference, LEAST_SPREAD))

    return bootstrap(len(x), distance)


@dataclass(frozen=True)
class Match:
    """The window of a song that is nearest to a clip: it begins at frame `start`, the clip's piece at frame `at`."""

    distance: float
    song: int
    start: int
    at: int


def standardized(latents: Tensor, songs: Sequence[Tensor]) -> Tensor:
    """Latents [T, D] with each channel measured from the songs' mean in their spread."""
    every = torch.cat(list(songs))
    return (latents - every.mean(0)) / every.std(0, correction=0).clamp(min=LEAST_SPREAD)


def nearest_window(clip: Tensor, songs: Sequence[Tensor], frames: int) -> Match:
    """The nearest of all windows of all songs, wherever they begin, to any of the clip's pieces.

    clip: [T, D], cut into pieces of `frames`, at least one. songs: [T, D] each; both as `standardized` makes them.
    distance: root of ‖piece − window‖² over the mean of the two's ‖·‖², each without its mean over time, so that it is
    movement that is compared: 0 is a copy, √2 has nothing in common. A song shorter than a piece has no window; raises
    ValueError where none has one.
    """
    if all(len(song) < frames for song in songs):
        raise ValueError(f"no song has a window of {frames} frames")
    starts = range(0, len(clip) - frames + 1, frames)
    pieces = torch.stack([clip[at : at + frames] for at in starts]).float()  # [P, W, D]
    pieces = pieces - pieces.mean(1, keepdim=True)
    energy, least = pieces.double().square().sum((1, 2)), STILL * frames * clip.shape[1]
    nearest = Match(UNRELATED, 0, 0, 0)
    for number, song in enumerate(songs):
        if len(song) < frames:
            continue
        products = F.conv1d(song.float().T[None], pieces.transpose(1, 2))[0]  # [P, T − W + 1]
        sums = F.pad(song.double().cumsum(0), (0, 0, 1, 0))
        squares = F.pad(song.double().square().sum(1).cumsum(0), (1, 0))
        means = (sums[frames:] - sums[:-frames]).square().sum(1) / frames
        moving = squares[frames:] - squares[:-frames] - means
        mean = 0.5 * (energy[:, None] + moving)
        distances = (2 - 2 * products / mean.clamp(min=1e-9)).clamp(min=0).sqrt()
        distances[(energy[:, None] < least) | (moving < least)] = UNRELATED
        piece, start = divmod(int(distances.argmin()), distances.shape[1])
        if distances[piece, start] < nearest.distance:
            nearest = Match(float(distances[piece, start]), number, start, starts[piece])
    return nearest


def between_songs(
    songs: Sequence[Tensor], song_of: Sequence[str], clip_frames: int, frames: int, most: int
) -> list[float]:
    """The distance of clip-long parts of each song, at most `most` in all, to the nearest window of other songs.

    song_of: two records with one name are of one song. Empty where there is only one.
    """
    parts = [
        (number, start)
        for number, song in enumerate(songs)
        for start in range(0, max(len(song) - clip_frames, 0) + 1, clip_frames)
        if len(song) >= frames
    ]
    found = []
    for number, start in parts[:: max(1, math.ceil(len(parts) / most))]:
        others = [song for n, song in enumerate(songs) if song_of[n] != song_of[number]]
        if any(len(other) >= frames for other in others):
            found.append(nearest_window(songs[number][start : start + clip_frames], others, frames).distance)
    return found


def too_near(usual: Sequence[float]) -> float:
    """The distance below which a clip counts as a copy: at most one of twenty of the usual distances is smaller.

    So of fewer than twenty none is.
    """
    return float(np.quantile(np.asarray(usual), TOO_NEAR, method="lower"))


def copying(distances: Sequence[float], limit: float) -> Figure:
    """The share of the clips that are nearer to a song than the limit."""
    near = np.asarray(distances) < limit
    return bootstrap(len(near), lambda i: float(near[i].mean()))
