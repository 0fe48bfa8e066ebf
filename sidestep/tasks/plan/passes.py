"""Memory of the two preprocessing passes and of a preview, on unfilled tensors like the training step.

Without gradients a layer leaves nothing behind: few layers show the peak of many, the weights of the others are added.
"""

import functools
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Config, Qwen3Model

from sidestep.acestep.attention import use_attention
from sidestep.acestep.checkpoint import accepted, encoder_sizes
from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS, encode_conditions, encode_text
from sidestep.acestep.fp16 import wide
from sidestep.acestep.fused import fuse_layers, fuse_vae
from sidestep.acestep.vae import (
    DECODER_HALO_FRAMES,
    DECODER_TILE_FRAMES,
    ENCODER_HALO_FRAMES,
    TILE_FRAMES,
    encode_mean,
    samples_per_frame,
)
from sidestep.adapters.attach import attach
from sidestep.settings.config import TrainConfig
from sidestep.tasks.plan.step import unpack_weights
from sidestep.tasks.plan.unfilled import CPU, META, UnfilledBytes, bytes_of, unfill
from sidestep.variants import detect

FEW_LAYERS = 2
# The parts that all official variants share: diffusers' defaults for the VAE, Qwen3-Embedding-0.6B.
VAE = {
    "encoder_hidden_size": 128,
    "decoder_channels": 128,
    "decoder_input_channels": 64,
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "sampling_rate": 48000,
}
TEXT_ENCODER = {
    "vocab_size": 151669,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def first_pass_peak(dtype: torch.dtype, seconds: float, tile_frames: int = TILE_FRAMES) -> int:
    """Peak bytes of the first pass.

    First the VAE's encoder (fp32) on one tile of a song of so many seconds, then the text encoder (`dtype`); never
    both.
    """
    encoding = encoding_peak(torch.float32, seconds, tile_frames)
    with META:
        text_encoder = Qwen3Model(Qwen3Config.from_dict(TEXT_ENCODER | {"num_hidden_layers": FEW_LAYERS}))
    _freeze(text_encoder, wide(dtype))
    others = _other_layers(text_encoder.layers, TEXT_ENCODER["num_hidden_layers"])
    with _loaded(text_encoder) as reading:
        encode_text(text_encoder, torch.zeros(1, TEXT_TOKENS, dtype=torch.long))
    return max(encoding, reading.peak + others)


@functools.cache
def encoding_peak(dtype: torch.dtype, seconds: float, tile_frames: int = TILE_FRAMES, whole: bool = False) -> int:
    """Peak bytes of the VAE that encodes a song of so many seconds, tile by tile. whole: its decoder is there, too."""
    vae, encoding = _vae(dtype), UnfilledBytes()
    samples = round(seconds * VAE["sampling_rate"])
    tile_samples = samples_per_frame(VAE) * (tile_frames + 2 * ENCODER_HALO_FRAMES)
    encoding.count(list((vae if whole else vae.encoder).parameters()))
    with encoding:
        encode_mean(vae, torch.empty(1, 2, min(samples, tile_samples), dtype=dtype), 0)
    return encoding.peak


@functools.cache
def decoding_peak(dtype: torch.dtype, frames: int) -> int:
    """Peak bytes of the VAE that makes music of a tile of so many latent frames, as `vae.decode` does on the device."""
    vae, decoding = _vae(dtype), UnfilledBytes()
    decoding.count(list(vae.parameters()))
    with decoding, torch.inference_mode():
        vae.decode(torch.empty(1, VAE["decoder_input_channels"], frames, dtype=dtype)).sample.float()
    return decoding.peak


def vae_bytes(dtype: torch.dtype) -> int:
    """Bytes of the whole VAE's weights."""
    return sum(parameter.numel() for parameter in _vae(dtype).parameters()) * dtype.itemsize


def codes_bytes(sizes: dict, dtype: torch.dtype) -> int:
    """Bytes of the weights between latents and codes, there and back. sizes: the DiT's config."""
    whole = encoder_sizes(sizes)
    with META:
        parts = [kind(**accepted(kind, whole)) for kind in (AceStepAudioTokenizer, AceStepAudioTokenDetokenizer)]
    return sum(parameter.numel() for part in parts for parameter in part.parameters()) * dtype.itemsize


def second_pass_peak(sizes: dict, dtype: torch.dtype) -> int:
    """Peak bytes with the condition encoder alone and the longest prompt and lyrics there are."""
    whole = encoder_sizes(sizes)
    few = {
        name: min(count, FEW_LAYERS)
        for name, count in whole.items()
        if name in ("num_lyric_encoder_hidden_layers", "num_timbre_encoder_hidden_layers")
    }
    with META:
        encoder = AceStepConditionEncoder(**accepted(AceStepConditionEncoder, whole | few))
    dtype = wide(dtype)
    _freeze(encoder, dtype)
    others = _other_layers(encoder.lyric_encoder.layers, whole["num_lyric_encoder_hidden_layers"])
    others += _other_layers(encoder.timbre_encoder.layers, whole["num_timbre_encoder_hidden_layers"])
    # the original counts references on the host, which unfilled tensors cannot; here there is one
    # pyrefly: ignore[bad-assignment] (its arguments have names, by which nobody calls it)
    encoder.timbre_encoder.unpack_timbre_embeddings = lambda packed, _: (packed[:, None], torch.ones(1, 1).bool())
    with _loaded(encoder) as memory:
        text, lyrics = (torch.empty(1, n, sizes["text_hidden_dim"], dtype=dtype) for n in (TEXT_TOKENS, LYRIC_TOKENS))
        timbre = torch.empty(1, sizes.get("timbre_fix_frame", 750), sizes["timbre_hidden_dim"], dtype=dtype)
        encode_conditions(encoder, text, lyrics, timbre)
    return memory.peak + others


def preview_peak(sizes: dict, config: TrainConfig, dtype: torch.dtype, frames_per_second: float, tokens: int) -> int:
    """Bytes that a preview takes beside the weights, the adapter and the optimizer.

    The denoising DiT with the VAE waiting, or the VAE at work.
    """
    # but for turbo, guidance denoises with and without the condition at once
    few = sizes | {"num_hidden_layers": FEW_LAYERS, "layer_types": ["sliding_attention", "full_attention"]}
    batch, frames = 1 if detect(sizes).is_turbo else 2, round(config.preview_duration * frames_per_second)
    decoding = decoding_peak(dtype, min(frames, DECODER_TILE_FRAMES + 2 * DECODER_HALO_FRAMES))
    waiting = 0 if config.offload_encoder else bytes_of(_vae(dtype).parameters())
    with META:
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, few))
        _freeze(decoder, dtype)
        fuse_layers(decoder)
        model = attach(decoder, config).eval()
    use_attention(decoder, config.attention, CPU, dtype)
    if config.base_precision != "auto":
        unpack_weights(model, dtype)
    with _loaded(model) as denoising, torch.no_grad():
        loaded = denoising.now
        latents = torch.empty(batch, frames, sizes["audio_acoustic_hidden_dim"], dtype=dtype)
        t = torch.empty(batch, dtype=dtype)
        conditions = torch.empty(batch, tokens, sizes.get("encoder_hidden_size") or sizes["hidden_size"], dtype=dtype)
        decoder(latents, t, t, conditions, torch.cat([latents, latents], dim=-1), return_dict=False)
    return max(decoding, waiting + denoising.peak - loaded)


def _vae(dtype: torch.dtype) -> Any:
    """The VAE on `meta`, where it computes; one for all, as it takes longer to make than to run."""
    vae = _any_vae()
    _freeze(vae, dtype)
    return vae


class Directions(TorchFunctionMode):
    """While entered: a weight is its direction, whose shape it has, and so is its norm, which nothing keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_norm = func in (torch._weight_norm, torch.norm_except_dim)
        return args[0].clone() if is_norm else func(*args, **(kwargs or {}))


@functools.cache
def _any_vae() -> AutoencoderOobleck:
    with META, Directions():
        vae = AutoencoderOobleck(**VAE)
        fuse_vae(vae)
        return vae


def _freeze(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.eval().requires_grad_(False)


def _other_layers(layers: nn.ModuleList, count: int) -> int:
    """Bytes of the weights of all but the layers that are there, if there were `count`."""
    return (count - len(layers)) * bytes_of(layers[0].parameters())


def _loaded(model: nn.Module) -> UnfilledBytes:
    """A counter that has counted a model's weights, unfilled tensors in the place of those on `meta`."""
    memory = UnfilledBytes()
    unfill(model)
    memory.count([*model.parameters(), *model.buffers()])
    return memory
