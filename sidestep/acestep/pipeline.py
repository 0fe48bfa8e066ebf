"""diffusers' AceStepPipeline on a decoder that is already in memory, with conditions that are already made.

The pipeline denoises; nothing of a checkpoint but the decoder has to be loaded for it. Decoding to audio is `vae.decode`, in tiles.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import Prompt
from sidestep.acestep.vae import frames_per_second
from sidestep.variants import Variant

TURBO_STEPS = 8  # what it was distilled for
STEPS, GUIDANCE = 32, 7.0  # ACE-Step's app for base and sft
SHIFT = 3.0
PEAK = 10 ** (-1 / 20)  # -1 dBFS, to which ACE-Step's app and diffusers bring their output


@dataclass(frozen=True)
class Sampling:
    """How noise becomes latents. guidance 1: none."""

    steps: int
    guidance: float
    shift: float = SHIFT


def sampling_for(
    variant: Variant, steps: int | None = None, guidance: float | None = None, shift: float = SHIFT
) -> Sampling:
    """What a variant was made for, but for what is given. Turbo has its guidance distilled into the weights and takes none."""
    default_steps, default_guidance = (TURBO_STEPS, 1.0) if variant.is_turbo else (STEPS, GUIDANCE)
    return Sampling(
        steps or default_steps, default_guidance if guidance is None or variant.is_turbo else guidance, shift
    )


class ReadyConditions(nn.Module):
    """Stands in for the condition encoder: returns conditions that were made before. silence: [1, T0, D], null_condition: [1, 1, C]."""

    def __init__(self, silence: Tensor, null_condition: Tensor):
        super().__init__()
        self.register_buffer("silence_latent", silence, persistent=False)
        self.register_buffer("null_condition_emb", null_condition, persistent=False)
        self.states: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.null_condition_emb.device

    def forward(self, **_: object) -> tuple[Tensor | None, None]:
        return self.states, None


class Denoiser(AceStepPipeline):
    """AceStepPipeline whose prompt was encoded before."""

    def encode_prompt(self, *args: object, **kwargs: object) -> tuple[None, None, None, None]:
        return None, None, None, None


def denoiser(
    checkpoint: Checkpoint, decoder: AceStepTransformer1DModel, silence: Tensor, null_condition: Tensor
) -> Denoiser:
    """A pipeline around the decoder (with or without an adapter inside); silence and null condition on the decoder's device."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1, shift=1.0
    )  # the pipeline hands it shifted sigmas in 0 … 1
    conditions = ReadyConditions(silence, null_condition)
    pipeline = Denoiser(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=decoder,
        condition_encoder=conditions,
        scheduler=scheduler,
    )
    pipeline.is_turbo = checkpoint.variant.is_turbo  # the decoder's own config does not say
    vae_config = checkpoint.vae_config()
    pipeline.sample_rate, pipeline.latents_per_second = int(vae_config["sampling_rate"]), frames_per_second(vae_config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_for(pipeline: Denoiser, prompt: Prompt) -> Tensor:
    """The noise [1, T, D] of a prompt: fp32, drawn on the CPU, so that a seed means the same on every device and in all numbers."""
    shape = (
        1,
        math.ceil(prompt.duration * pipeline.latents_per_second),
        pipeline.transformer.config.audio_acoustic_hidden_dim,
    )
    return torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))


@torch.no_grad()
def denoise(pipeline: Denoiser, prompt: Prompt, states: Tensor, sampling: Sampling) -> Tensor:
    """Latents [1, T, D] for a prompt whose conditions are `states` [1, L, C]. Draws no random number but those of the prompt's seed."""
    decoder = pipeline.transformer
    pipeline.condition_encoder.states = states.to(decoder.device, decoder.dtype)
    try:
        return pipeline(
            prompt=prompt.caption,
            audio_duration=prompt.duration,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            shift=sampling.shift,
            latents=noise_for(pipeline, prompt),
            output_type="latent",
        ).audios
    finally:
        pipeline.condition_encoder.states = None


def at_full_level(audio: Tensor) -> Tensor:
    """Audio [.., 2, S] with its peak at -1 dBFS, as ACE-Step's app and diffusers finish theirs."""
    return audio * (PEAK / audio.abs().amax().clamp(min=1e-6))
