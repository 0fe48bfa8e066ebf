"""Prior preservation: other music in every optimizer step, on which the adapter is to change nothing.

Its target is the velocity that the frozen model itself predicts there, with the adapter off (after DreamBooth, Ruiz et
al. 2022, arXiv 2208.12242, with the model's own prediction in the place of samples that it made).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import TextModels
from sidestep.audio.io import find_audio
from sidestep.data.batches import MicroBatch, Song, item_of
from sidestep.data.records import ReadIndex, find_records
from sidestep.errors import UserError
from sidestep.events import Decision, Notice, Report
from sidestep.files import files_below
from sidestep.seeding import seed_for
from sidestep.settings.config import TrainConfig
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.songs import load_songs, with_windows
from sidestep.words import count, paste, side_step

FLAG = "--prior-data"
TEXTS = (".json", ".txt", ".jsonl", ".csv", ".tsv", ".md")  # what prompts are kept in


@dataclass(frozen=True)
class Prior:
    """The other music of a run.

    weight: its share of the loss and, as near as whole samples come, of them. most: samples of it in a full step.
    """

    songs: list[Song]
    weight: float
    most: int
    seed: int

    def samples(self, own: int) -> int:
        """How many samples of it go with so many of the run's own songs into an optimizer step."""
        return samples_for(self.weight, own)

    def micro_batches(self, step: int, own: int) -> tuple[MicroBatch, ...]:
        """What an optimizer step of so many own samples hears of it: all of it in turn, each round in another order."""
        batches = []
        for slot in range(self.samples(own)):
            turn, place = divmod(step * self.most + slot, len(self.songs))
            generator = torch.Generator().manual_seed(seed_for(self.seed, "prior order", turn))
            index = int(torch.randperm(len(self.songs), generator=generator)[place])
            batches.append(MicroBatch((item_of(self.songs[index], index, turn, self.seed),), (slot,)))
        return tuple(batches)


def samples_for(weight: float, own: int) -> int:
    """Samples of other music beside `own` ones, so that they are the share `weight` of all; at least one."""
    return max(1, round(own * weight / (1 - weight)))


def extra_time(config: TrainConfig) -> float:
    """By how much an optimizer step takes longer, as a share: each of these samples is predicted once more.

    A forward pass counts one, a backward pass two, recomputation one.
    """
    own = config.gradient_accumulation * config.batch_size
    passes = 4 if config.gradient_checkpointing else 3
    return samples_for(config.prior_weight, own) / own * (passes + 1) / passes


def require_music(config: TrainConfig, given: Path) -> None:
    """Raises UserError where `--prior-data` names texts and no music: velocities are compared at noisy latents."""
    if given.is_dir():  # where .json may be anything, such as what preprocessing leaves
        texts = any(path.suffix.lower() in TEXTS[1:] for path in files_below(given, hidden=False))
        if not texts or find_records(given) or find_audio(given):
            return
    elif not given.is_file() or given.suffix.lower() not in TEXTS:
        return
    music = given.with_name(f"{given.stem}-music")
    tensors = music.with_name(f"{music.name}-tensors")
    model = ("--checkpoint-dir", config.checkpoint_dir, "--model-variant", config.model_variant)
    play = side_step("sample", *model, "--prompt", "…", "--output", music)
    preprocess = side_step("preprocess", *model, "--audio-dir", music, "--tensor-output", tensors)
    raise UserError(
        f"{FLAG} {given}: these are prompts alone, and what the model is to keep is compared on music.",
        f"Let the model play them, each with its own seed: {play}\npreprocess that: {preprocess}\n"
        f"then train with {paste((FLAG, str(tensors)))}",
    )


def load_prior(
    config: TrainConfig,
    checkpoint: Checkpoint,
    own: Sequence[Song],
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
    report: Report,
    models: TextModels,
    index: ReadIndex | None = None,
) -> Prior | None:
    """The music of `--prior-data` in windows like those of the songs, None without.

    Raises UserError where it is the music that is trained on, or none.
    """
    if config.prior_data is None:
        return None
    require_music(config, config.prior_data)
    there = replace(config, dataset_dir=config.prior_data, batch_size=1)
    songs = load_songs(there, checkpoint, report, FLAG, index)
    known = {song.digests["audio"] for song in own}
    same = [song.name for song in songs if song.digests["audio"] in known]
    if len(same) == len(songs):
        raise UserError(
            f"{FLAG} {config.prior_data}: it holds only songs that are trained on, which would undo the training.",
            "Give a folder of other music, preprocessed for the same model.",
        )
    if same:
        message = f"{FLAG}: {count(len(same), 'song')} trained on are in it too and are left out there: {same[0]} …"
        report(Notice(message=message, level="warning"))
    others = [song for song in songs if song.name not in same]
    songs, _ = with_windows(others, [], there, checkpoint, device, dtype, processes, report, models)
    full = config.gradient_accumulation * processes.count * config.batch_size
    prior = Prior(songs, config.prior_weight, samples_for(config.prior_weight, full), config.seed)
    value = f"{prior.most} samples of {count(len(songs), 'other song')} beside {full} in an optimizer step"
    reason = f"--prior-weight {config.prior_weight:g}; about {extra_time(config):.0%} more time"
    report(Decision(what="prior", value=value, reason=reason))
    return prior
