"""The music that is made to judge an adapter by: clips from the prompts of songs, kept on the disk one by one.

A clip's name is a digest of all that it depends on, so what was made is never made again. Its latents are judged; its
audio, at one loudness for all, is for listening.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidestep.acestep.conditions import Prompt
from sidestep.acestep.vae import frames_per_second
from sidestep.adapters.attach import adapter_scale
from sidestep.adapters.read import digest_of
from sidestep.audio.io import PIECE_SAMPLES, write_flac
from sidestep.audio.signals import LevelMeter
from sidestep.data.batches import Song
from sidestep.errors import JobError
from sidestep.events import Notice, Progress
from sidestep.files import replacing, write_text
from sidestep.seeding import uniform
from sidestep.tasks.sample import sampling_for
from sidestep.tasks.score.judge import Candidate, Judge
from sidestep.tasks.score.metrics import (
    UNRELATED,
    Figure,
    Match,
    between_songs,
    copying,
    features,
    nearest_window,
    standardized,
    style,
    too_near,
)
from sidestep.words import clock, count

BASE = "base"
PIECE_SECONDS = 4.0  # of what is looked for in the songs: long enough to be nobody else's, short enough to be found
PIECES = 4  # of a clip, at least: who plays back a song joins parts of it, so whole clips are hardly ever copies
MOST_PARTS = 48  # of the songs, whose distances from other songs are what is usual
WINDOWS_OF_A_SONG = 8  # at most, whose features say how songs sound
Place = tuple[str, float]  # a candidate's name and its strength


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip of music: its latents fp32 [T, D], where its audio is, and its loudness in LUFS, None for silence."""

    latents: Tensor
    audio: Path
    loudness: float | None


@dataclass(frozen=True, eq=False)
class Request:
    """What a clip is asked for: the words of a song, and a seed. conditions: [1, L, C]."""

    song: Song
    prompt: Prompt
    conditions: Tensor


@dataclass(frozen=True, eq=False)
class Heard:
    """The clips of an adapter at a strength, the song window that is nearest to each, and their two figures."""

    clips: list[Clip]
    matches: list[Match]
    style: Figure | None
    copying: Figure


@dataclass(frozen=True, eq=False)
class Songs:
    """The songs that clips are compared with: latents of each, its name, and the recording that it is of.

    clip_frames: of a clip; piece_frames: of what is looked for of it. trained: the first so many were trained on.
    """

    latents: list[Tensor]
    names: list[str]
    recordings: list[str]
    trained: int
    clip_frames: int
    piece_frames: int

    @cached_property
    def features(self) -> tuple[Tensor, list[str]]:
        """(features [M, F] of windows of the trained songs, the recording of each)."""
        found, of = [], []
        for latents, recording in zip(self.latents[: self.trained], self.recordings, strict=False):
            starts = range(0, max(len(latents) - self.clip_frames, 0) + 1, self.clip_frames)
            for start in starts[:: math.ceil(len(starts) / WINDOWS_OF_A_SONG)]:
                found.append(features(latents[start : start + self.clip_frames]))
                of.append(recording)
        return torch.stack(found), of

    @cached_property
    def standard(self) -> list[Tensor]:
        """The latents as `standardized` makes them."""
        return [standardized(latents, self.latents) for latents in self.latents]

    def nearest(self, clip: Tensor) -> Match:
        """The nearest window of a trained song to a clip's latents [T, D]."""
        return nearest_window(standardized(clip, self.latents), self.standard[: self.trained], self.piece_frames)


def songs_of(judge: Judge) -> Songs:
    """The songs of a comparison, and how long clips are."""
    held_out = [song for song in judge.judged if song not in judge.trained]
    every = [*judge.trained, *held_out]
    rate = frames_per_second(judge.checkpoint.vae_config())
    clip = min(round(judge.config.clip_seconds * rate), max(song.frames for song in judge.trained))
    shortest = min(song.frames for song in judge.trained)
    return Songs(
        latents=[song.read().target_latents.float() for song in every],
        names=[song.name for song in every],
        recordings=[str(song.metadata.get("content") or song.name) for song in every],
        trained=len(judge.trained),
        clip_frames=clip,
        piece_frames=min(round(PIECE_SECONDS * rate), max(clip // PIECES, 1), max(shortest, round(rate))),
    )


def requests_of(judge: Judge, frames: int) -> list[Request]:
    """What all adapters of a comparison are asked for: the trained songs in turn, in an order that is drawn once."""
    order = sorted(judge.trained, key=lambda song: uniform(0, "clips", song.name))
    seconds = frames / frames_per_second(judge.checkpoint.vae_config())
    found = []
    for seed in range(judge.config.clips):
        song = order[seed % len(order)]
        told = song.windows.conditions[0] if song.windows else song.read().encoder_hidden_states
        caption = str(song.metadata.get("prompt_caption") or song.metadata.get("caption") or Path(song.name).stem)
        found.append(Request(song, Prompt(caption=caption, duration=seconds, seed=seed), told[None]))
    return found


def make_all(
    judge: Judge, candidates: Sequence[Candidate], strengths: Sequence[float], requests: Sequence[Request]
) -> dict[Place, list[Clip]]:
    """The clips of the base and of each candidate at each strength, from the disk where they were made before.

    Raises JobError when the disk refuses or the model makes no numbers.
    """
    sampling = sampling_for(judge.checkpoint.variant, judge.config.steps, judge.config.guidance)
    told = [digest_of({"conditions": request.conditions}, {}) for request in requests]

    def stem_of(digest: str, strength: float, number: int) -> Path:
        prompt = requests[number].prompt
        parts = (digest, strength, told[number], prompt.duration, prompt.seed, asdict(sampling))
        return judge.folder / "clips" / judge.key("clip", *parts)

    stems = {(BASE, 0.0): [stem_of(BASE, 0.0, n) for n in range(len(requests))]}
    stems |= {
        (c.name, s): [stem_of(c.digest, s, n) for n in range(len(requests))] for c in candidates for s in strengths
    }
    clips = {place: [read_clip(stem) for stem in some] for place, some in stems.items()}
    missing = {place: [n for n, clip in enumerate(some) if clip is None] for place, some in clips.items()}
    total, left = sum(map(len, clips.values())), sum(map(len, missing.values()))
    if left:
        seconds = requests[0].prompt.duration
        before = f"; {total - left} were made before" if total > left else ""
        judge.report(Notice(message=f"{count(left, 'clip')} of {seconds:g} s to make, for style and copying{before}"))
    adapters = {candidate.name: candidate.adapter for candidate in candidates}
    began, made = time.monotonic(), 0
    for name in dict.fromkeys(name for name, _ in clips):
        places = [place for place in clips if place[0] == name and missing[place]]
        if not places:
            continue
        sampler, _, model = judge.open(adapters.get(name), sampling)
        for place in places:
            for number in missing[place]:
                judge.report(Progress(task="Clips", done=total - left + made, total=total, current=name))
                with adapter_scale(model, place[1]) if model else nullcontext():
                    latents = sampler.latents(requests[number].prompt, requests[number].conditions)
                latents = latents[:, : sampler.frames(requests[number].prompt)]
                audio = sampler.audio(latents)
                about = {"prompt": asdict(requests[number].prompt)}
                clips[place][number] = write_clip(stems[place][number], latents[0], audio, sampler.sample_rate, about)
                made += 1
                if made == 1 and left > 1:
                    rest = (time.monotonic() - began) * (left - 1)
                    judge.report(
                        Notice(message=f"The other {left - 1:,} take about {clock(rest)}; --clips says how many")
                    )
    if left:
        judge.report(Progress(task="Clips", done=total, total=total))
    return {place: [clip for clip in some if clip] for place, some in clips.items()}


def read_clip(stem: Path) -> Clip | None:
    """A clip that was made before; None where it was not, or its files are damaged."""
    try:
        said = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        latents = load_file(stem.with_suffix(".safetensors"))["latents"]
        loudness = said["loudness_lufs"]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return Clip(latents, stem.with_suffix(".flac"), loudness) if stem.with_suffix(".flac").is_file() else None


def write_clip(
    stem: Path, latents: Tensor, audio: np.ndarray, sample_rate: int, about: Mapping[str, Any] = MappingProxyType({})
) -> Clip:
    """Audio [2, S], latents [T, D] and, last, what is known of a clip. Raises JobError when the disk refuses."""
    latents = latents.float().cpu().contiguous()
    try:
        loudness = write_audio(stem.with_suffix(".flac"), audio, sample_rate)
        with replacing(stem.with_suffix(".safetensors")) as temporary:
            save_file({"latents": latents}, temporary)
        write_text(stem.with_suffix(".json"), json.dumps({"loudness_lufs": loudness, **about}) + "\n")
    except OSError as error:
        raise JobError(
            f"{stem}: cannot be written ({error.strerror or error}).",
            "Free some space on that disk, then repeat the command: what was made is kept.",
        ) from None
    return Clip(latents, stem.with_suffix(".flac"), loudness)


def write_audio(path: Path, audio: np.ndarray, sample_rate: int) -> float | None:
    """Audio [2, S] at -14 LUFS, or as near as a peak of -1 dBFS lets it come; its loudness, None where it has none.

    Raises OSError.
    """
    meter = LevelMeter()
    for start in range(0, audio.shape[1], PIECE_SAMPLES):
        meter.add(audio[:, start : start + PIECE_SAMPLES])
    gain, loudness = meter.gain(), meter.loudness_lufs()
    write_flac(path, (audio * gain).astype(np.float32), sample_rate)
    return loudness + 20 * math.log10(gain) if math.isfinite(loudness) else None


def listen(songs: Songs, clips: dict[Place, list[Clip]]) -> tuple[dict[Place, Heard], float]:
    """(the figures of each adapter's clips, the distance below which a clip counts as a copy).

    Too near is what few distances between different songs are, or where there is one song alone, few of the base
    model's clips.
    """
    matches = {place: [songs.nearest(clip.latents) for clip in some] for place, some in clips.items()}
    usual = between_songs(songs.standard, songs.recordings, songs.clip_frames, songs.piece_frames, MOST_PARTS)
    limit = too_near(usual or [match.distance for match in matches[BASE, 0.0]])
    limit = min(limit, UNRELATED)
    windows, of = songs.features
    heard = {}
    for place, some in clips.items():
        own = torch.stack([features(clip.latents) for clip in some])
        found = copying([match.distance for match in matches[place]], limit)
        heard[place] = Heard(some, matches[place], style(own, windows, of) if len(some) > 1 else None, found)
    return heard, limit
