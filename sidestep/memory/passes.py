"""Peaks of the two preprocessing passes and of a preview, on fake tensors like the training step."""

import torch
from diffusers import AutoencoderOobleck
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

from sidestep.acestep.checkpoint import accepted, encoder_sizes
from sidestep.acestep.conditions import LYRIC_TOKENS, TEXT_TOKENS, encode_conditions, encode_text
from sidestep.acestep.vae import ENCODER_HALO_FRAMES, TILE_FRAMES, encode_mean, samples_per_frame
from sidestep.memory.fake_model import fake_mode, make_fake
from sidestep.memory.tracker import LiveBytes

# The parts that all official variants share: diffusers' defaults for the VAE, Qwen3-Embedding-0.6B.
VAE = {"encoder_hidden_size": 128, "decoder_channels": 128, "decoder_input_channels": 64, "downsampling_ratios": [2, 4, 4, 6, 10], "sampling_rate": 48000}
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
    """Peak bytes of the first pass: the VAE's encoder (fp32) on one tile of a song of so many seconds, later the text encoder (`dtype`); never both."""
    with torch.device("meta"):
        vae = AutoencoderOobleck(**VAE).eval().requires_grad_(False)
        vae.decoder = torch.nn.Identity()
        text_encoder = _in_dtype(Qwen3Model(Qwen3Config(**TEXT_ENCODER)), dtype)
    samples = round(seconds * VAE["sampling_rate"])
    tile_samples = samples_per_frame(VAE) * (tile_frames + 2 * ENCODER_HALO_FRAMES)
    with fake_mode():
        make_fake(vae)
        make_fake(text_encoder)
        encoding, reading = LiveBytes(), LiveBytes()
        encoding.count(list(vae.parameters()))
        with encoding:
            encode_mean(vae, torch.empty(1, 2, min(samples, tile_samples)), 0)
        reading.count(list(text_encoder.parameters()))
        with reading:
            encode_text(text_encoder, torch.zeros(1, TEXT_TOKENS, dtype=torch.long))
    return max(encoding.peak, reading.peak)


def second_pass_peak(sizes: dict, dtype: torch.dtype) -> int:
    """Peak bytes with the condition encoder alone and the longest prompt and lyrics there are."""
    with torch.device("meta"):
        encoder = _in_dtype(AceStepConditionEncoder(**accepted(AceStepConditionEncoder, encoder_sizes(sizes))), dtype)
    with fake_mode():
        make_fake(encoder)
        memory = LiveBytes()
        memory.count([*encoder.parameters(), *encoder.buffers()])
        text, lyrics = (torch.empty(1, n, sizes["text_hidden_dim"], dtype=dtype) for n in (TEXT_TOKENS, LYRIC_TOKENS))
        # the original counts references on the host, which fake tensors cannot; here there is one
        encoder.timbre_encoder.unpack_timbre_embeddings = lambda packed, order: (packed[:, None], torch.ones(packed.shape[0], 1, dtype=torch.bool))
        timbre = torch.empty(1, sizes.get("timbre_fix_frame", 750), sizes["timbre_hidden_dim"], dtype=dtype)
        with memory:
            encode_conditions(encoder, text, lyrics, timbre)
        return memory.peak


def _in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)
