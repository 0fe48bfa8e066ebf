"""The language model as what a run trains: its base, its songs as tokens, and the loss of what it should answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import INSTRUMENTAL
from sidestep.acestep.layout import read_config
from sidestep.acestep.lm.loss import answer_loss
from sidestep.acestep.lm.model import LanguageModel, choose_language_model, codebook_size, load_language_model
from sidestep.acestep.lm.prompts import END_OF_TURN, code_text, plan_prompt, plan_text
from sidestep.acestep.weights import Weights
from sidestep.data.batches import Item, MicroBatch, Song
from sidestep.data.lyrics import without_time_marks
from sidestep.data.records import RecordError
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, FileFailed, Notice, Report
from sidestep.flow_matching.timesteps import discrete
from sidestep.seeding import seed_for
from sidestep.settings.config import TrainConfig, TrainLmConfig
from sidestep.tasks.train.objective import ConditionMask, TrainingLaw
from sidestep.words import count, side_step

LONGEST = 8192  # tokens of a song
NEXT_TOKEN = TrainingLaw("none: each token is predicted from those before it", discrete, 0.0, "a language model")


def is_language(config: TrainConfig) -> TypeGuard[TrainLmConfig]:
    """Whether a run trains the language model."""
    return isinstance(config, TrainLmConfig)


class LanguageCheckpoint(Checkpoint):
    """The language model in the place of the DiT; VAE and variant are those that it goes with."""

    def __init__(self, dit: Checkpoint, folder: Path):
        super().__init__(dit.layout, dit.report)
        self._lm_folder, self.dit = folder, dit
        self.config = read_config(folder / "config.json")

    @property
    def folder(self) -> Path:
        return self._lm_folder

    @property
    def latent_channels(self) -> int:
        """Of the DiT that it goes with: the VAE is that one's."""
        return self.dit.latent_channels

    def identity(self, part: str = "transformer") -> str:
        """Fingerprint of the language model's weights, or of another part's."""
        return Weights(self._lm_folder).identity() if part == "transformer" else super().identity(part)


@dataclass(frozen=True, eq=False)
class Language:
    """A language model that is to be trained. trunk: what gets the adapter, inside of `lm.model`."""

    checkpoint: LanguageCheckpoint
    lm: LanguageModel

    @property
    def trunk(self) -> Any:
        return self.lm.model.model

    def usable(self, songs: list[Song], config: TrainConfig, report: Report) -> list[Song]:
        """The songs that have codes and fit. Raises UserError where codes are missing, JobError where none fits."""
        without = [song.name for song in songs if not song.has_hints]
        if without:
            make = ("preprocess", "--audio-dir", "SONGS", "--tensor-output", str(config.dataset_dir))
            raise UserError(
                f"--dataset-dir {config.dataset_dir}: {len(without)} of {len(songs)} songs have no codes, "
                f"such as {without[0]}.",
                "Make them: "
                + side_step(*make, "--checkpoint-dir", str(config.checkpoint_dir), "--regimes", "text2music", "hints"),
            )
        fitting = []
        for song in songs:
            length = len(sequence(self.lm, song)[0])
            if length > LONGEST:
                reason = f"{length} tokens, and {LONGEST} are the most that are trained on"
                report(FileFailed(path=song.name, reason=reason, stage="load"))
            else:
                fitting.append(song)
        if not fitting:
            raise JobError(f"None of the {count(len(songs), 'song')} is short enough.", "Use songs below 20 minutes.")
        return fitting


def open_language(
    config: TrainLmConfig, checkpoint: Checkpoint, device: torch.device, precision: torch.dtype, report: Report
) -> Language:
    """The language model beside a DiT, on the device. Raises UserError."""
    folder = choose_language_model(checkpoint.layout, config.lm)
    reason = "the app's own size" if config.lm == "auto" and "1.7B" in folder.name else f"--lm {config.lm}"
    report(Decision(what="language model", value=folder.name, reason=reason))
    quantised = "" if config.base_precision == "auto" else config.base_precision
    lm = load_language_model(folder, codebook_size(checkpoint), device, precision, quantised, report)
    if config.gradient_checkpointing:
        lm.model.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        report(Notice(message="Layers are not recomputed: a long song takes gigabytes more."))
    return Language(LanguageCheckpoint(checkpoint, folder), lm)


@dataclass(frozen=True)
class TokenBatch:
    """One song: ids [1, N], of which the first `n_prompt` are given."""

    ids: torch.Tensor
    n_prompt: int
    songs: tuple[str, ...]
    slots: tuple[int, ...]


def sequence(lm: LanguageModel, song: Song) -> tuple[list[int], int]:
    """(token ids of prompt, plan, codes and end of a song, how many of them are the prompt)."""
    told, codes = song.metadata, song.read().audio_codes
    if codes is None:
        raise RecordError(f"{song.name}: holds no codes.", "Preprocess it again with --regimes text2music hints.")
    caption = told.get("prompt_caption") or told.get("caption") or ""
    lyrics = without_time_marks(told.get("lyrics") or "") or INSTRUMENTAL
    fields = {name: told.get(name) for name in ("bpm", "keyscale", "timesignature", "language")}
    seconds = int(len(codes) / 5)
    plan = plan_text({**fields, "caption": caption, "duration": seconds})
    prompt = plan_prompt(caption, lyrics)
    answer = f"{plan}\n\n{code_text(codes.flatten().tolist())}{END_OF_TURN}"
    return lm.tokens.ids(prompt + answer), len(lm.tokens.ids(prompt))


class AnswerObjective:
    """The loss of plan and codes of a song. The only random thing is dropout, by the run's seed, step and slot."""

    def __init__(self, config: TrainConfig, language: Language, device: torch.device):
        self.seed, self.device, self.lm = config.seed, device, language.lm
        self.condition_mask = ConditionMask()
        self._known: dict[str, tuple[list[int], int]] = {}

    def drops_all(self, _step: int, _samples: int) -> bool:
        """Whether a step has no conditions at all: never."""
        return False

    def collate(self, songs: Sequence[Song], micro_batch: MicroBatch) -> TokenBatch:
        """The tokens of a micro-batch of one song, on the device."""
        [item] = micro_batch.items
        song = songs[item.song]
        if song.name not in self._known:
            self._known[song.name] = sequence(self.lm, song)
        ids, n_prompt = self._known[song.name]
        return TokenBatch(torch.tensor([ids], device=self.device), n_prompt, (song.name,), micro_batch.slots)

    def __call__(
        self, model: torch.nn.Module, batch: TokenBatch, step: int, _samples: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss [1], the same without a graph [1], zero [1] in the place of a timestep)."""
        torch.manual_seed(seed_for(self.seed, "dropout", step, batch.slots[0]))
        loss = self.loss(model, batch)
        return loss, loss.detach(), torch.zeros_like(loss)

    def loss(self, model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
        """Mean negative log-likelihood [1] of a song's answer."""
        states = model(input_ids=batch.ids, use_cache=False).last_hidden_state[0]
        head = self.lm.model.lm_head.weight
        return answer_loss(states.to(head.dtype), head, batch.ids[0], batch.n_prompt)[None]

    def grid(self, songs: Sequence[Song]) -> list[MicroBatch]:
        """What songs are validated on: each as it is."""
        return [MicroBatch((Item(index, 0, song.frames),), (0,)) for index, song in enumerate(songs)]

    def grid_loss(self, model: torch.nn.Module, songs: Sequence[Song], cells: MicroBatch) -> torch.Tensor:
        """Loss [1] of a held-out song."""
        return self.loss(model, self.collate(songs, cells))
