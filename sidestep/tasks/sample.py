"""`sample`: audio from the base model with an adapter at one or more strengths. Training makes its previews with the same pieces."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep import __version__
from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import Part
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import Conditions, Prompt, encode_prompts
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.acestep.pipeline import Denoiser, Sampling, at_full_level, denoise, denoiser, sampling_for
from sidestep.acestep.vae import decode
from sidestep.adapters.load import at_strength, put_on
from sidestep.adapters.read import read_adapter
from sidestep.audio.io import write_flac
from sidestep.data.fields import NotUnderstood, understand
from sidestep.data.sidecars import decode_text
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, Finished, Notice, Progress, Report, Saved
from sidestep.files import write_text
from sidestep.settings.config import SampleConfig
from sidestep.settings.option import options_of
from sidestep.words import count

LONGEST_SECONDS = 600


@dataclass(frozen=True)
class Studio:
    """What makes audio: a pipeline around the decoder, the VAE, and how to sample."""

    pipeline: Denoiser
    vae: Part
    sampling: Sampling

    def latents(self, prompt: Prompt, states: Tensor) -> Tensor:
        """[1, T, D] for a prompt and its conditions [1, L, C], with the decoder as it is now."""
        return denoise(self.pipeline, prompt, states, self.sampling)

    def audio(self, latents: Tensor) -> np.ndarray:
        """float32 [2, S] with its peak at -1 dBFS. Raises JobError when the model made values that are no numbers."""
        with self.vae.in_use() as vae:
            audio = at_full_level(decode(vae, latents)[0])
        if not bool(torch.isfinite(audio).all()):
            raise JobError(
                "The model made values that are no numbers instead of audio.",
                "Try --precision fp32; if that does not help, the adapter is broken.",
            )
        return audio.numpy()

    @property
    def sample_rate(self) -> int:
        return self.pipeline.sample_rate


def sample(config: SampleConfig, report: Report) -> list[Path]:
    """The audio files, one for each strength, each with a .json of its prompt and settings beside it. Raises UserError and JobError."""
    prompt = prompt_of(_typed_prompt(config), "")
    strengths = _strengths(config)
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    adapter = read_adapter(config.adapter) if config.adapter else None
    device, precision = (
        choose_device(config.device),
        choose_precision(config.precision, choose_device(config.device).value),
    )
    report(Decision(what="device", value=str(device.value), reason=device.reason))
    report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
    sampling = sampling_for(checkpoint.variant, config.steps, config.guidance, config.shift)
    report(Decision(what="sampling", value=described(sampling), reason=checkpoint.variant.reason))
    if config.guidance is not None and config.guidance != sampling.guidance:
        report(
            Notice(
                message=f"--guidance {config.guidance:g} has no effect: turbo has its guidance built in.",
                level="warning",
            )
        )
    report(Progress(task="Sampling", done=0, total=len(strengths), current="text"))
    [conditions] = encode_prompts(checkpoint, [prompt], device.value, precision.value, config.offload_encoder)
    tell_lost_tokens(prompt, conditions, report)
    decoder = checkpoint.load_decoder(device.value, precision.value)
    attention = use_attention(decoder, config.attention)
    report(Decision(what="attention", value=attention.value, reason=attention.reason))
    model = put_on(decoder, adapter) if adapter else None
    studio = studio_for(checkpoint, decoder, device.value, precision.value, sampling, config.offload_encoder)
    stem = _free_stem(config.output, f"{slug(prompt.caption)}-seed{prompt.seed}", strengths)
    files = []
    for number, strength in enumerate(strengths):
        if model is None:
            latents = studio.latents(prompt, conditions.states)
        else:
            with at_strength(model, strength):
                latents = studio.latents(prompt, conditions.states)
        path = config.output / f"{stem}-strength{strength:g}.flac"
        facts = {
            "strength": strength,
            "adapter": str(config.adapter) if config.adapter else None,
            "checkpoint": checkpoint.folder.name,
            "precision": precision_name(precision.value),
            "device": device.value.type,
        }
        write_take(path, studio, studio.audio(latents), prompt, facts)
        report(Saved(what="sample", path=str(path)))
        report(Progress(task="Sampling", done=number + 1, total=len(strengths), current=f"strength {strength:g}"))
        files.append(path)
    report(Finished(message=f"{count(len(files), 'audio file')} of {prompt.duration:g} s in {config.output}"))
    return files


def studio_for(
    checkpoint: Checkpoint, decoder, device: torch.device, dtype: torch.dtype, sampling: Sampling, offload: bool
) -> Studio:
    """A studio around a decoder on `device`; the VAE is loaded when the first audio is made."""
    silence, null_condition = checkpoint.silence_latent().to(device), checkpoint.load_null_condition(device, dtype)
    vae = Part(lambda place: checkpoint.load_vae(place, dtype), device, offload)
    return Studio(denoiser(checkpoint, decoder, silence, null_condition), vae, sampling)


def write_take(path: Path, studio: Studio, audio: np.ndarray, prompt: Prompt, facts: Mapping[str, Any]) -> None:
    """A .flac of float32 [2, S], and then beside it a .json of the prompt, the sampling and `facts`. Raises JobError when the disk refuses."""
    said = {
        "audio": path.name,
        "prompt": asdict(prompt),
        "sampling": asdict(studio.sampling),
        **facts,
        "made_by": f"Side-Step {__version__}",
    }
    try:
        write_flac(path, audio, studio.sample_rate)
        write_text(path.with_suffix(".json"), json.dumps(said, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written ({error.strerror or error}).",
            "Free some space on that disk, or choose another folder.",
        ) from None


def prompt_of(values: Mapping[str, Any], where: str) -> Prompt:
    """A prompt from values as people write them ("Am", "4/4", "120 BPM"), brought into the form that training uses.

    where: what stands before a mistake's name, such as `prompts.json: $[0]`; empty: the values are flags. Raises UserError.
    """

    def wrong(name: str, why: str) -> UserError:
        return UserError(f"{where}.{name}: {why}." if where else f"--{name.replace('caption', 'prompt')}: {why}.")

    known = {f.name for f in fields(Prompt)}
    values = {("caption" if name == "prompt" else name): value for name, value in values.items() if value is not None}
    for name in values:
        if name not in known:
            raise wrong(name, f"no such key; known are prompt, {', '.join(sorted(known - {'caption'}))}")
    read: dict[str, Any] = {}
    for name in ("caption", "lyrics", "language", "bpm", "keyscale", "timesignature"):
        try:
            value = understand(name, values.get(name))
        except NotUnderstood as error:
            raise wrong(name, str(error)) from None
        if value is not None:
            read[name] = value
    if not read.get("caption"):
        raise wrong("caption", "is empty; say what the music is like")
    for name, kind, low, high in (("duration", float, 1, LONGEST_SECONDS), ("seed", int, 0, 2**63 - 1)):
        value = values.get(name, getattr(Prompt, name))
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != kind(value)
            or not low <= value <= high
        ):
            raise wrong(
                name,
                f"{value} is not a {'number of seconds' if kind is float else 'whole number'} from {low} to {high}",
            )
        read[name] = kind(value)
    return Prompt(**read)


def typed_lyrics(text: str) -> str:
    """Lyrics as typed in a shell, where a line break is often a backslash and an n."""
    return text.replace("\\n", "\n")


def tell_lost_tokens(prompt: Prompt, conditions: Conditions, report: Report) -> None:
    """Say where a prompt is longer than what the model reads."""
    for what, lost in (("prompt", conditions.text_tokens_lost), ("lyrics", conditions.lyric_tokens_lost)):
        if lost:
            report(
                Notice(
                    message=f'"{prompt.caption[:40]}": the {what} is longer than the model reads; the last {lost} tokens are lost.',
                    level="warning",
                )
            )


def described(sampling: Sampling) -> str:
    """`8 steps, shift 3, no guidance`."""
    return f"{sampling.steps} steps, shift {sampling.shift:g}, " + (
        f"guidance {sampling.guidance:g}" if sampling.guidance > 1 else "no guidance"
    )


def slug(text: str, limit: int = 40) -> str:
    """Letters and digits of a text with hyphens between its words: part of a file name on every system."""
    words = re.sub(r"[^\w]+", "-", text.lower(), flags=re.UNICODE).strip("-_")
    return words.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore").strip("-_") or "music"


def _typed_prompt(config: SampleConfig) -> dict[str, Any]:
    values = {
        name: getattr(config, name)
        for name in ("prompt", "language", "bpm", "keyscale", "timesignature", "duration", "seed")
    }
    if config.lyrics_file is None:
        return values | {"lyrics": typed_lyrics(config.lyrics)}
    if config.lyrics != options_of(SampleConfig)["lyrics"].default:
        raise UserError("--lyrics and --lyrics-file are both given.", "Leave one of them away.")
    try:
        return values | {"lyrics": decode_text(config.lyrics_file.read_bytes())[0]}
    except OSError as error:
        raise UserError(
            f"--lyrics-file {config.lyrics_file}: cannot be read ({error.strerror}).", "Give a text file."
        ) from None


def _strengths(config: SampleConfig) -> tuple[float, ...]:
    if config.adapter:
        if not config.strength:
            raise UserError("--strength: no strength is given.", "For example: --strength 0,0.5,1")
        return tuple(dict.fromkeys(config.strength))
    if config.strength != options_of(SampleConfig)["strength"].default and set(config.strength) != {0.0}:
        raise UserError(
            "--strength: without an adapter there is nothing to make stronger or weaker.", "Add --adapter FOLDER."
        )
    return (0.0,)


def _free_stem(folder: Path, stem: str, strengths: tuple[float, ...]) -> str:
    """The stem, or the stem with a number, for which no file stands there yet."""
    candidates = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(
        c
        for c in candidates
        if not any((folder / f"{c}-strength{s:g}{suffix}").exists() for s in strengths for suffix in (".flac", ".json"))
    )
