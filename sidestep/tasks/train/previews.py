"""Previews: audio of fixed prompts and seeds while a run goes on, with the adapter as it is now and, once, without it.

They take no part in the training: the same model object is used in evaluation mode and put back, and no random number is drawn but from the
prompts' own seeds. Conditions are made once, before the decoder is loaded; the VAE is all that stays.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import Conditions, Prompt, encode_texts
from sidestep.adapters.attach import adapter_scale
from sidestep.data.batches import Song
from sidestep.data.lyrics import without_time_marks
from sidestep.errors import JobError, UserError
from sidestep.events import Notice, Progress, Report, Saved
from sidestep.settings.config import TrainConfig
from sidestep.tasks.sample import (
    Sampler,
    described,
    open_sampler,
    prompt_of,
    sampling_for,
    slug,
    tell_lost_tokens,
    typed_lyrics,
    write_take,
)
from sidestep.tasks.train.run import Companion, NoCompanion, Run
from sidestep.words import count

FOLDER = "previews"
BASE = "base"  # its subfolder of audio without the adapter
SONGS_AS_PROMPTS = 2


def previews_for(
    config: TrainConfig,
    checkpoint: Checkpoint,
    songs: Sequence[Song],
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> Companion:
    """The previews that the settings ask for. Call it before the decoder is loaded: the encoders then have the device for themselves.

    Raises UserError for prompts that cannot be used.
    """
    prompts = prompts_for(config, songs)
    if not prompts:
        return NoCompanion()
    checkpoint.vae_config()  # a missing VAE is told now, not after the first epochs
    conditions = list(encode_texts(checkpoint, [prompt.text for prompt in prompts], device, dtype))
    for prompt, states in zip(prompts, conditions, strict=True):
        tell_lost_tokens(prompt, states, report)
    when = f"every {config.preview_every} epochs and at the end" if config.preview_every else "at the end"
    report(
        Notice(
            message=f"Previews {when}: {count(len(prompts), 'prompt')}, {described(sampling_for(checkpoint.variant))}"
        )
    )
    return Previews(config, prompts, conditions, dtype)


def prompts_for(config: TrainConfig, songs: Sequence[Song]) -> list[Prompt]:
    """What to listen to: the file's prompts, the typed one, or with `--preview-every` alone the first songs' own. Raises UserError."""
    shared = {"duration": config.preview_duration, "seed": config.preview_seed}
    if config.preview_prompts:
        if config.preview_prompt:
            raise UserError("--preview-prompt and --preview-prompts are both given.", "Leave one of them away.")
        return [
            prompt_of(shared | values, f"{config.preview_prompts}: $[{i}]")
            for i, values in enumerate(_read(config.preview_prompts))
        ]
    if config.preview_prompt:
        return [
            prompt_of(shared | {"prompt": config.preview_prompt, "lyrics": typed_lyrics(config.preview_lyrics)}, "")
        ]
    if not config.preview_every:
        return []
    described_songs = [
        song.metadata for song in songs if song.metadata.get("prompt_caption") or song.metadata.get("caption")
    ]
    if not described_songs:
        raise UserError(
            "--preview-every: the training tensors do not say what their songs are, so there is nothing to ask the model for.",
            "Say it: --preview-prompt 'warm lofi hip hop'",
        )
    return [
        prompt_of(shared | _of_song(metadata), "training tensors") for metadata in described_songs[:SONGS_AS_PROMPTS]
    ]


def _of_song(metadata: dict[str, Any]) -> dict[str, Any]:
    values = {name: metadata.get(name) for name in ("language", "bpm", "keyscale", "timesignature")}
    return values | {
        "caption": metadata.get("prompt_caption") or metadata["caption"],
        "lyrics": without_time_marks(metadata.get("lyrics") or ""),
    }


def _read(path: Path) -> list[dict[str, Any]]:
    example = 'A list of prompts: [{"prompt": "warm lofi hip hop", "lyrics": "…", "language": "en", "duration": 30, "seed": 42}, …]'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--preview-prompts {path}: cannot be read ({error.strerror}).", example) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--preview-prompts {path}: no JSON ({error}).", example) from None
    content = content.get("prompts", content) if isinstance(content, dict) else content
    entries = (
        [{"prompt": entry} if isinstance(entry, str) else entry for entry in content]
        if isinstance(content, list)
        else []
    )
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"--preview-prompts {path}: holds no list of prompts.", example)
    return entries


class Previews:
    """Writes `previews/base/` once and `previews/epoch_NNNN/` each time: a .flac for each prompt, its .json beside it."""

    def __init__(
        self, config: TrainConfig, prompts: Sequence[Prompt], conditions: Sequence[Conditions], dtype: torch.dtype
    ):
        self.folder, self.every, self.offload, self.dtype = (
            config.output_dir / FOLDER,
            config.preview_every,
            config.offload_encoder,
            dtype,
        )
        self.prompts, self.conditions = prompts, conditions
        self.names = [f"{number:02}-{slug(prompt.caption, 30)}" for number, prompt in enumerate(prompts, 1)]
        self.sampler: Sampler | None = None
        self._made_at = -1  # optimizer step of the last previews

    def after_epoch(self, run: Run, epoch: int) -> None:
        """Make previews if it is time for them."""
        if self.every and epoch % self.every == 0 and not run.position.step_in_epoch:
            self.make(run)

    def at_end(self, run: Run) -> None:
        """Make previews of the finished adapter, unless they stand already."""
        if self._made_at != run.position.step:
            self.make(run)

    def make(self, run: Run) -> None:
        """Previews of the adapter as it is now. A failure (memory, disk) costs the previews, not the run."""
        spread = run.accelerator.is_fsdp2
        if run.is_main or spread:  # spread over processes, the model only works when all of them call it
            try:
                self._make(run, spread)
            except (torch.OutOfMemoryError, OSError, JobError) as error:
                run.report(Notice(message=f"No previews this time: {str(error).splitlines()[0]}", level="warning"))
        self._made_at = run.position.step
        run.processes.wait()

    def _make(self, run: Run, spread: bool) -> None:
        place = f"step_{run.position.step:06}" if run.position.step_in_epoch else f"epoch_{run.position.epoch:04}"
        sampler = self.sampler or self._open(run, spread)
        takes = [(BASE, 0.0, number) for number in range(len(self.prompts)) if not self._stands(sampler, number)]
        if spread:
            takes = [
                (BASE, 0.0, number) for number in run.processes.gather([number for _, _, number in takes])[0]
            ]  # all must call the model equally often
        takes += [(place, 1.0, number) for number in range(len(self.prompts))]
        with undisturbed(run):
            for done, (folder, strength, number) in enumerate(takes):
                run.report(Progress(task="Previews", done=done, total=len(takes), current=self.names[number]))
                with adapter_scale(run.model, strength):
                    latents = sampler.latents(self.prompts[number], self.conditions[number].states)
                if run.is_main:
                    self._keep(
                        run, sampler, self.folder / folder / f"{self.names[number]}.flac", strength, number, latents
                    )
        run.report(Progress(task="Previews", done=len(takes), total=len(takes)))
        run.report(Saved(what="previews", path=str(self.folder / place)))

    def _open(self, run: Run, spread: bool) -> Sampler:
        # where the weights are spread over processes, the wrapper gathers them
        decoder = run.wrapped if spread else run.model.get_base_model()
        self.sampler = open_sampler(
            run.checkpoint, decoder, run.device, self.dtype, sampling_for(run.checkpoint.variant), self.offload
        )
        return self.sampler

    def _stands(self, sampler: Sampler, number: int) -> bool:
        """Whether the base model's audio of a prompt is there from before, made from the same prompt in the same way."""
        path = self.folder / BASE / f"{self.names[number]}.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        same = (said.get("prompt"), said.get("sampling")) == (asdict(self.prompts[number]), asdict(sampler.sampling))
        return same and path.with_suffix(".flac").is_file()

    def _keep(
        self, run: Run, sampler: Sampler, path: Path, strength: float, number: int, latents: torch.Tensor
    ) -> None:
        step, epoch = (run.position.step, run.position.epoch) if strength else (0, 0)
        audio = sampler.audio(latents)
        write_take(
            path,
            sampler,
            audio,
            self.prompts[number],
            {"strength": strength, "step": step, "epoch": epoch, "checkpoint": run.checkpoint.folder.name},
        )
        run.tensorboard.add_audio(
            f"previews/{self.names[number]}/strength {strength:g}", audio.mean(axis=0)[None], step, sampler.sample_rate
        )


@contextmanager
def undisturbed(run: Run) -> Iterator[None]:
    """The model in evaluation mode, every condition token visible, layers not compiled for these lengths; all of it put back afterwards."""
    mask, was_training = run.objective.condition_mask, run.model.training
    hidden, mask.mask = mask.mask, None
    run.model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if run.config.compile else nullcontext():
            yield
    finally:
        run.model.train(was_training)
        mask.mask = hidden
