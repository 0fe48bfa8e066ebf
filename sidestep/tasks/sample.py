"""`sample`: audio from the base model with an adapter at one or more strengths; training makes previews with it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from sidestep import __version__
from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import BlockSwap, OffloadedModule
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import (
    COVER,
    TEXT2MUSIC,
    Conditions,
    Prompt,
    context_latents,
    encode_texts,
    tiled_silence,
)
from sidestep.acestep.device import choose_device, choose_precision, precision_name, release_memory
from sidestep.acestep.fp16 import name_what_overflows
from sidestep.acestep.lm.decoding import Sampling as TokenSampling
from sidestep.acestep.lm.model import PREFIX as LM_PREFIX
from sidestep.acestep.lm.model import codebook_size
from sidestep.acestep.vae import decode, frames_per_second
from sidestep.acestep.weights import CPU
from sidestep.adapters.adapter import Adapter
from sidestep.adapters.attach import adapter_scale, load_adapter
from sidestep.adapters.read import read_adapter
from sidestep.audio.io import write_flac
from sidestep.data.fields import FieldError, parse_field
from sidestep.data.sidecars import MAX_BYTES
from sidestep.data.text import read_text
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, Finished, LongTask, Notice, Progress, Report, Saved, null
from sidestep.files import portable, write_text
from sidestep.flow_matching.guidance import guided
from sidestep.flow_matching.sampler import sample_euler, sampling_timesteps
from sidestep.flow_matching.timesteps import TURBO_STEPS
from sidestep.settings.config import SampleConfig, TrainConfig, check_streaming
from sidestep.settings.option import options_of
from sidestep.settings.path_checks import short_name
from sidestep.tasks.think import Thinking, Thought, hints_for, think
from sidestep.variants import TURBO_SHIFT, Variant
from sidestep.words import count

LONGEST_SECONDS = 600


BASE_STEPS, SFT_STEPS, GUIDANCE = 32, 50, 7.0  # as ACE-Step's app
SHIFTS = (1, 2, 3)  # which turbo was distilled for
LEAST_FRAMES = 128  # ACE-Step's app fills what is shorter than these 5.12 s up with silence
PEAK = 10 ** (-1 / 20)  # -1 dBFS, to which ACE-Step's app and diffusers bring their output


@dataclass(frozen=True)
class Sampling:
    """How noise becomes latents. guidance 1: none."""

    steps: int
    guidance: float
    shift: float = TURBO_SHIFT


def sampling_for(
    variant: Variant, steps: int | None = None, guidance: float | None = None, shift: float | None = None
) -> Sampling:
    """As ACE-Step's app samples a variant, but for what is given. Turbo takes no guidance: it is distilled into it.

    A turbo model is sampled with its own shift, the others with that of turbo.
    """
    if shift is None:
        shift = variant.shift if variant.is_turbo else TURBO_SHIFT
    if variant.is_turbo:
        return Sampling(steps or TURBO_STEPS, 1.0, shift)
    default = SFT_STEPS if "sft" in variant.name else BASE_STEPS
    return Sampling(steps or default, GUIDANCE if guidance is None else guidance, shift)


def sampling_reason(variant: Variant, config: SampleConfig) -> str:
    """Why a variant is sampled so: what its config says, what was typed, where turbo's shift comes from."""
    typed = {"--timestep-mode": config.timestep_mode != "auto", "--shift": config.shift is not None}
    given = " and ".join(flag for flag, is_typed in typed.items() if is_typed)
    own_shift = variant.shift_reason if variant.is_turbo and config.shift is None else ""
    return "; ".join(part for part in (variant.reason, f"{given} typed" if given else "", own_shift) if part)


def not_obeyed(variant: Variant, sampling: Sampling) -> list[str]:
    """What ACE-Step's own code would not do on a turbo model, which was distilled for some steps and shifts."""
    if not variant.is_turbo:
        return []
    found = []
    if sampling.steps != TURBO_STEPS:
        found.append(
            f"--steps {sampling.steps}: turbo was distilled for {TURBO_STEPS} steps; ACE-Step's app takes those "
            "whatever it is asked for, and would sound otherwise."
        )
    any_shift = "continuous" in f"{variant.name} {variant.shift_reason}" and SHIFTS[0] <= sampling.shift <= 5
    if sampling.shift not in SHIFTS and not any_shift:
        nearest = min(SHIFTS, key=lambda shift: abs(shift - sampling.shift))
        found.append(
            f"--shift {sampling.shift:g}: turbo was distilled for the shifts 1, 2 and 3; ACE-Step's app would take "
            f"--shift {nearest}, and sound otherwise."
        )
    return found


@dataclass(frozen=True)
class Sampler:
    """Makes audio with a decoder as it is at that moment, adapter included, and tells where that takes its time.

    silence: [1, T0, D] and null_condition: [1, 1, C], on the device that computes; the latter in the base's dtype.
    """

    decoder: nn.Module
    silence: Tensor
    null_condition: Tensor
    vae: OffloadedModule
    sampling: Sampling
    frames_per_second: float
    sample_rate: int
    report: Report = null

    def frames(self, prompt: Prompt) -> int:
        """The latent frames that a prompt asks for."""
        return math.ceil(prompt.duration * self.frames_per_second)

    def noise(self, prompt: Prompt) -> Tensor:
        """Noise [1, T, D] of a prompt: fp32 on the CPU, so that a seed means the same on every device.

        At least `LEAST_FRAMES`; `audio` takes off what is beyond the prompt's duration.
        """
        frames = max(self.frames(prompt), LEAST_FRAMES)
        return torch.randn(1, frames, self.silence.shape[-1], generator=torch.Generator().manual_seed(prompt.seed))

    def velocity(self, x: Tensor, t: Tensor, conditions: Tensor, hints: Tensor | None = None) -> Tensor:
        """Velocity [B, T, D] of text to music at x [B, T, D] and t [B] under conditions [B, L, C].

        hints: [1, Th, D] of a composed song; behind them there is silence, and without them nothing else.
        """
        source = tiled_silence(self.silence, x.shape[1]).to(x)
        if hints is not None:
            heard = hints[:, : x.shape[1]].to(x)
            source = torch.cat([heard, source[:, heard.shape[1] :]], dim=1)
        context = context_latents(source)
        return self.decoder(
            hidden_states=x,
            timestep=t,
            timestep_r=t,
            encoder_hidden_states=conditions,
            context_latents=context.expand(len(x), -1, -1),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def latents(self, prompt: Prompt, states: Tensor, hints: Tensor | None = None) -> Tensor:
        """Latents [1, T, D] of a prompt whose conditions are `states` [1, L, C]. Only the noise is random.

        hints: see `velocity`.
        """
        noise, conditions = (x.to(self.null_condition) for x in (self.noise(prompt), states))

        def velocity(x: Tensor, t: Tensor, conditions: Tensor = conditions) -> Tensor:
            return self.velocity(x, t, conditions, hints)

        scale = self.sampling.guidance
        field = guided(velocity, conditions, self.null_condition, scale) if scale > 1 else velocity
        timesteps = sampling_timesteps(self.sampling.steps, self.sampling.shift)
        latents = sample_euler(field, noise, timesteps, LongTask(self.report, "Making music", self.sampling.steps))
        if noise.dtype == torch.float16 and not bool(torch.isfinite(latents).all()):
            with name_what_overflows(self.decoder):
                sample_euler(field, noise, timesteps)
        return latents

    def audio(self, latents: Tensor, prompt: Prompt | None = None) -> np.ndarray:
        """float32 [2, S] with its peak at -1 dBFS, as long as the prompt asks for, or else all of the latents.

        Raises JobError when the model made values that are no numbers.
        """
        with self.vae.in_use() as vae:
            audio = decode(vae, latents, on_tile=LongTask(self.report, "Decoding the music", latents.shape[1]))[0]
        if prompt:
            audio = audio[:, : self.frames(prompt) * audio.shape[1] // latents.shape[1]]
        if not bool(torch.isfinite(audio).all()):
            raise JobError(
                "The model made values that are no numbers instead of audio.",
                "Try --precision fp32; if that does not help, the adapter is broken.",
            )
        return (audio * (PEAK / audio.abs().amax().clamp(min=1e-6))).numpy()


def open_sampler(
    checkpoint: Checkpoint,
    decoder: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    sampling: Sampling,
    offload: bool,
) -> Sampler:
    """A sampler around a decoder on `device`; the VAE is loaded when the first audio is made."""
    vae_config = checkpoint.vae_config()
    return Sampler(
        decoder,
        checkpoint.silence_latent().to(device),
        checkpoint.load_null_condition(device, dtype),
        OffloadedModule(lambda place: checkpoint.load_vae(place, dtype), device, offload),
        sampling,
        frames_per_second(vae_config),
        int(vae_config["sampling_rate"]),
        checkpoint.report,
    )


def sample(config: SampleConfig, report: Report) -> list[Path]:
    """The audio files, one for each model and strength, each with a .json of its prompt and settings beside it.

    Raises UserError and JobError.
    """
    prompt, strengths = asked_for(config)
    players = players_of(config, report)
    adapter = read_adapter(config.adapter) if config.adapter else None
    for note in adapter.notes if adapter else ():
        report(Notice(message=note, level="warning"))
    if adapter and str(adapter.metadata.get("base_model", "")).startswith(LM_PREFIX):
        problem = f"--adapter {config.adapter}: is an adapter of the language model {adapter.metadata['base_model']}."
        raise UserError(problem, f"Hear it with: --think --lm-adapter {config.adapter}")
    for other in players[1:] if adapter else ():
        require_same_modules(players[0], other)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    report(Decision(what="device", value=str(device.value), reason=device.reason))
    report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
    names = (f"{slug(prompt.caption)}-seed{prompt.seed}{again}" for again in ("", *(f"-{n}" for n in range(2, 10_000))))
    # where the models that play are named, the files are named by them too
    models = [f"-{portable(short_name(player.folder.name))}" if config.preview_variant else "" for player in players]
    ends = [f"{m}-strength{s:g}{suffix}" for m in models for s in strengths for suffix in (".flac", ".json")]
    stem = next(name for name in names if not any((config.output / f"{name}{end}").exists() for end in ends))
    thought = None
    if config.think:  # once: all models play the same song
        require_same_codes(players)
        how, place = thinking_of(config), (device.value, precision.value)
        [thought] = think(players[0], [prompt], how, *place, report, chooses_length=not config.duration)
        release_memory(device.value)
    files, seconds = [], 0.0
    for player, model in zip(players, models, strict=True):
        place = f"{stem}{model}"
        seconds, made = play(config, player, prompt, thought, adapter, place, device.value, precision.value, report)
        files += made
        release_memory(device.value)  # before the next model comes
    report(Finished(message=f"{count(len(files), 'audio file')} of {seconds:g} s in {config.output}"))
    return files


def asked_for(config: SampleConfig) -> tuple[Prompt, tuple[float, ...]]:
    """(the prompt, the strengths) that were typed. Raises UserError for what cannot be made."""
    prompt = prompt_of(_typed_prompt(config), "")
    check_thinking(config)
    check_streaming(config)
    return prompt, _strengths(config)


def players_of(config: SampleConfig | TrainConfig, report: Report) -> list[Checkpoint]:
    """The models that are to play, each once. Raises UserError for one that is not there."""
    flag = "--preview-variant" if config.preview_variant else "--model-variant"
    names = config.preview_variant or (config.model_variant,)
    found = [open_checkpoint(config.checkpoint_dir, name, report, flag) for name in names]
    return list({checkpoint.folder: checkpoint for checkpoint in found}.values())


def require_same_modules(own: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError where another model has other modules than the one that an adapter is for."""
    here, there = own.linear_shapes(), other.linear_shapes()
    if here == there:
        return
    name = min(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    shapes = [" × ".join(map(str, shapes[name])) if name in shapes else "none" for shapes in (there, here)]
    raise UserError(
        f"--preview-variant {short_name(other.folder.name)}: an adapter for {own.folder.name} does not fit on it: "
        f"{name.removesuffix('.weight')} is {shapes[0]} there, {shapes[1]} here.",
        "Name a model of the same size: turbo, base and sft are of one, xl-turbo, xl-base and xl-sft of the other.",
    )


def require_same_codes(players: Sequence[Checkpoint]) -> None:
    """Raises UserError where a composed song means other codes to one of the models."""
    for other in players[1:]:
        if codebook_size(other) != codebook_size(players[0]):
            own, name = players[0], short_name(other.folder.name)
            raise UserError(
                f"--preview-variant {name}: knows {codebook_size(other):,} codes, and {own.folder.name} "
                f"{codebook_size(own):,}: one composed song cannot be played on both.",
                f"Compose for it alone: --think --preview-variant {name}",
            )


def load_model(
    config: SampleConfig | TrainConfig,
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> tuple[nn.Module, PeftModel | None]:
    """(the decoder under the memory settings, the adapter on it). Raises UserError where the two do not fit."""
    quantised = "" if config.base_precision == "auto" else config.base_precision
    decoder = checkpoint.load_decoder(CPU if config.swap_blocks else device, dtype, quantised)
    attention = use_attention(decoder, config.attention, device, dtype)
    report(Decision(what="attention", value=attention.value, reason=attention.reason))
    model = load_adapter(decoder, adapter) if adapter else None
    if config.swap_blocks:
        BlockSwap(decoder, config.swap_blocks, device)
    return decoder, model


def play(
    config: SampleConfig,
    checkpoint: Checkpoint,
    prompt: Prompt,
    thought: Thought | None,
    adapter: Adapter | None,
    stem: str,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> tuple[float, list[Path]]:
    """(seconds, audio files) of one model, one for each strength. stem: what their names begin with.

    thought: the prompt as it was composed, which then takes its place.
    """
    strengths = _strengths(config)
    mode = config.timestep_mode
    variant = checkpoint.variant.settled(mode) if config.preview_variant else checkpoint.variant.under(mode)
    sampling = sampling_for(variant, config.steps, config.guidance, config.shift)
    report(Decision(what="sampling", value=described(sampling), reason=sampling_reason(variant, config)))
    if variant.doubt:
        message = f"{variant.doubt}: --timestep-mode discrete samples as turbo, logit-normal as base and sft."
        report(Notice(message=message, level="warning"))
    for message in not_obeyed(variant, sampling):
        report(Notice(message=message, level="warning"))
    if config.guidance is not None and config.guidance != sampling.guidance:
        report(
            Notice(
                message=f"--guidance {config.guidance:g} has no effect: turbo has its guidance built in.",
                level="warning",
            )
        )
    hints, composed, instruction = None, {}, TEXT2MUSIC
    if thought:
        [hints] = hints_for(checkpoint, [thought], device, dtype)
        prompt, composed, instruction = thought.prompt, {"composed": thought.told}, COVER
    report(Progress(task="Sampling", done=0, total=len(strengths), current="text"))
    [conditions] = encode_texts(checkpoint, [prompt.text_for(variant.is_stems, instruction)], device, dtype)
    tell_lost_tokens(prompt, conditions, report)
    decoder, model = load_model(config, checkpoint, adapter, device, dtype, report)
    sampler = open_sampler(checkpoint, decoder, device, dtype, sampling, config.offload_encoder)
    files = []
    for number, strength in enumerate(strengths):
        with adapter_scale(model, strength) if model else nullcontext():
            latents = sampler.latents(prompt, conditions.states, hints)
        path = config.output / f"{stem}-strength{strength:g}.flac"
        metadata = {
            "strength": strength,
            "adapter": str(config.adapter) if config.adapter else None,
            "checkpoint": checkpoint.folder.name,
            "precision": precision_name(dtype),
            "device": device.type,
            **composed,
        }
        write_take(path, sampler, sampler.audio(latents, prompt), prompt, metadata)
        report(Saved(what="sample", path=str(path)))
        report(Progress(task="Sampling", done=number + 1, total=len(strengths), current=f"strength {strength:g}"))
        files.append(path)
    return prompt.duration, files


def write_take(path: Path, sampler: Sampler, audio: np.ndarray, prompt: Prompt, metadata: Mapping[str, Any]) -> None:
    """A .flac of float32 [2, S], and then beside it a .json of the prompt, the sampling and `metadata`.

    Raises JobError when the disk refuses.
    """
    content = {
        "audio": path.name,
        "prompt": asdict(prompt),
        "sampling": asdict(sampler.sampling),
        **metadata,
        "made_by": f"Side-Step {__version__}",
    }
    try:
        write_flac(path, audio, sampler.sample_rate)
        write_text(path.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written ({error.strerror or error}).",
            "Free some space on that disk, or choose another folder.",
        ) from None


def prompt_of(values: Mapping[str, Any], where: str) -> Prompt:
    """A prompt from values as people write them ("Am", "4/4", "120 BPM"), brought into the form that training uses.

    where: what comes before a mistake's name, such as `prompts.json: $[0]`; empty: the values are flags.
    Raises UserError.
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
            value = parse_field(name, values.get(name))
        except FieldError as error:
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
                    message=f'"{prompt.caption[:40]}": the {what} is longer than the model reads; '
                    f"the last {lost} tokens are lost.",
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


def check_thinking(config: SampleConfig) -> None:
    """Raises UserError for settings of thinking without it."""
    if config.think:
        return
    if not config.duration:
        raise UserError("--duration 0: only a composer can choose the length.", "Add --think, or say the seconds.")
    if config.lm_adapter:
        raise UserError("--lm-adapter: nothing is composed without thinking.", "Add --think.")


def thinking_of(config: SampleConfig) -> Thinking:
    """How the composer works under these settings."""
    drawing = TokenSampling(
        temperature=config.lm_temperature,
        top_p=config.lm_top_p,
        guidance=config.lm_guidance,
        negative=config.lm_negative,
    )
    return Thinking(
        lm=config.lm,
        adapter=config.lm_adapter,
        strength=config.lm_strength,
        rewrites=config.rewrite_caption,
        base_precision=config.base_precision,
        sampling=drawing,
    )


def _typed_prompt(config: SampleConfig) -> dict[str, Any]:
    values = {
        name: getattr(config, name)
        for name in ("prompt", "language", "bpm", "keyscale", "timesignature", "duration", "seed")
    }
    values["duration"] = config.duration or None  # 0: the composer's
    if config.lyrics_file is None:
        return values | {"lyrics": typed_lyrics(config.lyrics)}
    if config.lyrics != options_of(SampleConfig)["lyrics"].default:
        raise UserError("--lyrics and --lyrics-file are both given.", "Leave one of them away.")
    lyrics, problem = read_text(config.lyrics_file, MAX_BYTES)
    if problem and not lyrics:
        raise UserError(f"--lyrics-file {config.lyrics_file} {problem}.", "Give a text file.")
    return values | {"lyrics": lyrics}


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
