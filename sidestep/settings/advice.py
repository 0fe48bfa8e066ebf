"""How long to train, at which rank and on which windows: what suits so much music. No torch, and nothing is set by it.

A rule of thumb that follows what people report of adapters for this model and for image models; it was not measured on
full-size models here. What is heard, in previews or by `score`, goes before it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.settings.path_checks import RECORDS_INDEX, count_tensors, variant_of
from sidestep.variants import FRAMES_PER_SECOND
from sidestep.words import clock, count

VISITS = 320  # of all songs together, times the square root of their number: a hundred each for ten songs, 32 for 100
PIECE_MINUTES = 4.0  # a longer song counts as several
OTHER_LAWS = 1.5  # as many steps for base and sft: all timesteps instead of eight, and captions that are dropped
RANKS = ((20.0, 16), (90.0, 32), (math.inf, 64))  # up to so many minutes of music
LOW_RANK_TYPES = ("lora", "dora", "loha")  # of the others --rank is another kind of number
FEW_SONGS, WINDOW_SECONDS = 10, 60.0  # fewer than so many are heard in windows, if they are twice as long as one
LONGEST_SECONDS = 600.0  # of a song that the model makes
# Words of music, and of those who try something out: the model knows what they mean.
ORDINARY = (
    "acoustic ambient artist band bass beat blues chill choir classical country dance dark disco drums "
    "drum edm electronic female folk funk genre guitar happy hip-hop hiphop house instrumental jazz latin "
    "lofi lo-fi lora love male melody metal model music my my_style mystyle orchestra piano pop punk rap "
    "reggae rnb rock sad singer slow song songs soul style synth techno test trance trap vocal vocals "
    "voice "
)
SUGGESTED = ("rank", "epochs", "chunk_duration")  # the settings that it has something to say about


@dataclass(frozen=True)
class Advice:
    """Suggested optimizer steps, the epochs that they are, rank (None: leave it) and windows (0: whole songs)."""

    steps: int
    epochs: int
    rank: int | None
    window_seconds: float
    reason: str

    @property
    def value(self) -> str:
        """In words, without the reason."""
        rank = "" if self.rank is None else f", rank {self.rank}"
        windows = f"windows of {self.window_seconds:g} s" if self.window_seconds else "whole songs"
        return f"{count(self.steps, 'optimizer step')} ({count(self.epochs, 'epoch')}){rank}, {windows}"

    @property
    def flags(self) -> str:
        """What to type for it."""
        rank = "" if self.rank is None else f"--rank {self.rank} --alpha {2 * self.rank} "
        return f"{rank}--epochs {self.epochs} --chunk-duration {self.window_seconds:g}"

    def of(self, name: str) -> Any:
        """The suggested value of a setting of SUGGESTED, None where there is none."""
        return {"rank": self.rank, "epochs": self.epochs, "chunk_duration": self.window_seconds}[name]


def advise(songs: int, minutes: float, is_turbo: bool, samples: int = 4, adapter_type: str = "lora") -> Advice:
    """What suits so many songs of so many minutes in all. samples: in an optimizer step (batch times accumulation)."""
    pieces = max(songs, round(minutes / PIECE_MINUTES))
    epochs = max(1, round(VISITS * math.sqrt(pieces) * (1 if is_turbo else OTHER_LAWS) / songs))
    rank = next(rank for most, rank in RANKS if minutes <= most) if adapter_type in LOW_RANK_TYPES else None
    mean = 60 * minutes / songs
    few, long = songs < FEW_SONGS and mean >= 2 * WINDOW_SECONDS, mean > LONGEST_SECONDS
    window = WINDOW_SECONDS if few or long else 0.0
    reasons = [f"{count(songs, 'song')}, {clock(60 * minutes)} of music", f"each is heard {count(epochs, 'time')}"]
    reasons.append("turbo learns eight timesteps" if is_turbo else f"{OTHER_LAWS:g} times turbo's, for all timesteps")
    if window:
        later = "few songs are copied later where every round hears another part of them"
        reasons.append(later if few else "the model makes no longer songs than 10 minutes")
    return Advice(epochs * math.ceil(songs / samples), epochs, rank, window, "; ".join((*reasons, "a rule of thumb")))


def advice_for(settings: Mapping[str, Any]) -> Advice | None:
    """The advice under settings or answers so far; None where the folder of tensors does not say how much music it is.

    It does once it was preprocessed or trained on by this program.
    """
    variant, folder = variant_of(settings), settings.get("dataset_dir")
    if variant is None or not folder or (music := music_in(Path(folder))) is None:
        return None
    is_turbo = variant.under(settings.get("timestep_mode", "auto")).is_turbo
    samples = settings.get("batch_size", 1) * settings.get("gradient_accumulation", 4)
    return advise(*music, is_turbo, samples, settings.get("adapter_type", "lora"))


def music_in(folder: Path) -> tuple[int, float] | None:
    """(songs, minutes) of a folder of tensors by the index beside them, repeats counted; None where it does not hold.

    It does not where there is none, or records were added or taken away since.
    """
    try:
        body = (folder / RECORDS_INDEX).read_text(encoding="utf-8").partition("\n")[2]
        infos = json.loads(body).values()
        repeats = [int(info["metadata"].get("repeat") or 1) for info in infos]
        frames = sum(info["frames"] * repeat for info, repeat in zip(infos, repeats, strict=True))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if not infos or len(infos) != count_tensors(folder):
        return None
    return sum(repeats), frames / FRAMES_PER_SECOND / 60


def doubt_about_tag(tag: str) -> str:
    """What speaks against a trigger word: it is a path, or has a meaning already. Empty for a good one."""
    tag = tag.strip()
    better = "A made-up word, such as mrnglght, means nothing else."
    if set("/\\") & set(tag) or Path(tag).suffix.lower() in (".wav", ".mp3", ".flac", ".ogg", ".json", ".txt"):
        return f"The trigger word {tag!r} looks like a path; it would stand in every prompt. {better}"
    if tag and all(word.lower() in ORDINARY.split() for word in tag.replace(",", " ").split()):
        return f"The trigger word {tag!r} already means something to the model. {better}"
    return ""
