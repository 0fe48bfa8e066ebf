"""The audio codec in tiles: as exact as in one piece, at the memory of one tile."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Receptive fields, in latent frames, rounded up: the encoder reaches 12,165 samples to each side (spec, section 1).
ENCODER_HALO_FRAMES = 7
DECODER_HALO_FRAMES = 16
TILE_FRAMES = 500
CPU_TILE_FRAMES = 125  # as fast there in a quarter of the memory, and progress is heard of four times as often
DECODER_TILE_FRAMES = 250  # 10 s of audio, which keeps its memory far below the DiT's


def samples_per_frame(vae_config: Mapping[str, Any]) -> int:
    """Audio samples that one latent frame stands for (1920)."""
    return math.prod(vae_config["downsampling_ratios"])


def frames_per_second(vae_config: Mapping[str, Any]) -> float:
    """Latent frames per second of audio (25)."""
    return vae_config["sampling_rate"] / samples_per_frame(vae_config)


def tile_frames_for(device: torch.device) -> int:
    """Latent frames that the encoder makes at once on a device."""
    return CPU_TILE_FRAMES if device.type == "cpu" else TILE_FRAMES


@torch.inference_mode()
def encode_mean(
    vae: Any, audio: Tensor, tile_frames: int | None = None, on_tile: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Mean of the VAE's posterior. audio: [1, 2, S] at the VAE's rate, anywhere → [1, T, D] on the VAE's device.

    The mean, because one frozen draw of the posterior would be learnt as if it were music. tile_frames: by default
    what suits the device; 0: in one piece. on_tile is told how many frames are done after each tile.
    """
    if tile_frames is None:
        tile_frames = tile_frames_for(next(vae.parameters()).device)
    hop = samples_per_frame(vae.config)
    total_frames = audio.shape[-1] // hop
    if not tile_frames or total_frames <= tile_frames + ENCODER_HALO_FRAMES:
        return _mean(vae, audio)
    tiles = []
    for start in range(0, total_frames, tile_frames):
        first = max(start - ENCODER_HALO_FRAMES, 0)
        is_last = start + tile_frames >= total_frames
        stop = audio.shape[-1] if is_last else (start + tile_frames + ENCODER_HALO_FRAMES) * hop
        mean = _mean(vae, audio[..., first * hop : stop])
        tiles.append(mean[:, start - first :] if is_last else mean[:, start - first : start - first + tile_frames])
        on_tile(min(start + tile_frames, total_frames))
    return torch.cat(tiles, dim=1)


def _mean(vae: Any, audio: Tensor) -> Tensor:
    parameter = next(vae.parameters())
    return vae.encode(audio.to(parameter.device, parameter.dtype)).latent_dist.mode().transpose(1, 2)


@torch.inference_mode()
def decode(
    vae: Any,
    latents: Tensor,
    tile_frames: int = DECODER_TILE_FRAMES,
    on_tile: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """Audio [1, 2, T·1920] on the CPU, fp32, of latents [1, T, D]. on_tile is told the frames of each tile."""
    hop = samples_per_frame(vae.config)
    parameter = next(vae.parameters())
    latents = latents.to(parameter.device, parameter.dtype).transpose(1, 2)
    frames = latents.shape[-1]
    tiles = []
    for start in range(0, frames, tile_frames or frames):
        stop = min(start + (tile_frames or frames), frames)
        first, last = max(start - DECODER_HALO_FRAMES, 0), min(stop + DECODER_HALO_FRAMES, frames)
        audio = vae.decode(latents[..., first:last]).sample
        tiles.append(audio[..., (start - first) * hop : (stop - first) * hop].float().cpu())
        on_tile(stop - start)
    return torch.cat(tiles, dim=-1)
