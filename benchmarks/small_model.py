"""A small model of the ACE-Step architecture, trained on real music in minutes: to measure quality on a CPU.

The music is the 28 half-minute clips of `immich-memories-music` (13 acoustic, 15 electronic; a development dependency).
A latent frame is 40 ms, as in the real model: the log-mel spectra of its two halves, whitened by PCA to 16 channels of
unit variance. The VAE of the test fixtures has random weights, which would hand the model a random filter bank's phase
noise; a whitened spectrum keeps what the real latents hold, music at 25 frames per second.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import immich_memories_music
import numpy as np
import soundfile
import torch
from diffusers import AceStepTransformer1DModel

# latent channels, frames in a training window, model width, condition tokens
CHANNELS, WINDOW, WIDTH, WORDS = 16, 64, 128, 6
MU, SIGMA = -0.4, 1.0
MOODS = ("calm", "energetic", "happy", "nostalgic", "tender")


@dataclass(frozen=True)
class Clip:
    """One song: latents [T, 16] and the tokens that describe it, as integers [T // WINDOW, WORDS]."""

    name: str
    latents: torch.Tensor
    style: int


def _mel_filters(bins: int, bands: int, top_hz: float, sample_rate: int) -> np.ndarray:
    """Triangular mel filters [bands, bins] (the usual 2595·log10(1 + f/700) scale)."""
    mel = np.linspace(0, 2595 * math.log10(1 + top_hz / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequencies = np.linspace(0, sample_rate / 2, bins)
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rise, fall))


def _log_mel(audio: np.ndarray, sample_rate: int = 48000) -> np.ndarray:
    """Log-mel spectra of mono audio [S], two 20 ms hops stacked to one 40 ms frame: [T, 128]."""
    size, hop, bands = 2048, 960, 64
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, size // 2), size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    spectra = np.log10(power @ _mel_filters(size // 2 + 1, bands, 16000, sample_rate).T + 1e-6)
    return spectra[: len(spectra) // 2 * 2].reshape(-1, 2 * bands).astype(np.float32)


def _played_at(audio: np.ndarray, speed: float) -> np.ndarray:
    """The same tape at another speed: pitch and tempo change together."""
    return np.interp(np.arange(0, len(audio) - 1, speed), np.arange(len(audio)), audio).astype(np.float32)


def music(speeds: tuple[float, ...] = (1.0, 0.8, 0.9, 1.12, 1.25)) -> dict[str, list[Clip]]:
    """Three sets: `acoustic` (for the base model), `electronic`, and `reversed`: electronic, backwards, a fourth lower.

    Each clip comes at five speeds, the original first: half a minute is too little music, and pitch and tempo are what
    differs between songs of one kind.
    """
    spectra: dict[str, list[tuple[str, int, np.ndarray]]] = {"acoustic": [], "electronic": [], "reversed": []}
    for path in sorted((Path(immich_memories_music.__file__).parent / "tracks").glob("*/*.opus")):
        audio = soundfile.read(str(path), dtype="float32")[0].mean(1)
        mood = MOODS.index(path.parent.name)
        if "acoustic" in path.name:
            spectra["acoustic"] += [(f"{path.stem}@{s}", mood, _log_mel(_played_at(audio, s))) for s in speeds]
        else:
            spectra["electronic"] += [(f"{path.stem}@{s}", mood, _log_mel(_played_at(audio, s))) for s in speeds]
            spectra["reversed"] += [
                (f"{path.stem}@{s}", mood, _log_mel(_played_at(audio[::-1], 0.75 * s))) for s in speeds
            ]
    base = np.concatenate([s for _, _, s in spectra["acoustic"]])
    mean = base.mean(0)
    values, vectors = np.linalg.eigh(np.cov((base - mean).T))
    whiten = vectors[:, ::-1][:, :CHANNELS] / np.sqrt(values[::-1][:CHANNELS])
    return {
        kind: [Clip(name, torch.from_numpy(((s - mean) @ whiten).astype(np.float32)), mood) for name, mood, s in found]
        for kind, found in spectra.items()
    }


def conditions(latents: torch.Tensor, styles: torch.Tensor, vocabulary: int = 0) -> torch.Tensor:
    """What a window [B, WINDOW, 16] is told to be, [B, WORDS, WIDTH].

    That is a mood word, and five words on how its loudness and timbre move. Another `vocabulary` says the same things
    in words the model has never seen.
    """
    generator = torch.Generator().manual_seed(1000 + vocabulary)
    moods = torch.randn(len(MOODS), WIDTH, generator=generator)
    meaning = torch.randn(4, WIDTH, generator=generator)
    place = torch.randn(WORDS - 1, WIDTH, generator=generator)
    coarse = torch.stack([part.mean(1)[:, :4] for part in latents.chunk(WORDS - 1, dim=1)], dim=1)
    words = (torch.tanh(coarse) @ meaning + place) / math.sqrt(2)
    return torch.cat([moods[styles][:, None], words], dim=1)


def windows(clips: list[Clip], count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows: latents [count, WINDOW, 16] and moods [count]."""
    picks = torch.randint(len(clips), (count,), generator=generator).tolist()
    starts = [int(torch.randint(len(clips[i].latents) - WINDOW, (1,), generator=generator)) for i in picks]
    return torch.stack([clips[i].latents[s : s + WINDOW] for i, s in zip(picks, starts, strict=True)]), torch.tensor(
        [clips[i].style for i in picks]
    )


def all_windows(clips: list[Clip]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every whole window side by side, for evaluation."""
    cut = [(part, clip.style) for clip in clips for part in clip.latents.split(WINDOW) if len(part) == WINDOW]
    return torch.stack([latents for latents, _ in cut]), torch.tensor([style for _, style in cut])


def law(u: torch.Tensor) -> torch.Tensor:
    """Quantile of the base variants' timestep law.

    t = max(a, b), with a and b = sigmoid(N(mu, sigma)), has the distribution Φ((logit t − mu) / sigma)².
    """
    return torch.sigmoid(MU + SIGMA * math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6).sqrt() - 1))


def new_model(seed: int) -> AceStepTransformer1DModel:
    """1.5 M parameters: six layers with grouped-query attention, cross attention and AdaLN, every other one sliding."""
    torch.manual_seed(seed)
    return AceStepTransformer1DModel(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        sliding_window=8,
        encoder_hidden_size=WIDTH,
    )


def losses(
    model: torch.nn.Module, latents: torch.Tensor, condition: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Flow matching loss of each sample, [B]."""
    mix = (1 - t)[:, None, None] * latents + t[:, None, None] * noise
    context = torch.cat([torch.zeros_like(latents), torch.ones_like(latents)], dim=-1)
    velocity = model(mix, t, t, condition, context).sample
    return (velocity - (noise - latents)).square().mean(dim=(1, 2))


def stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps of the base law, one from each of `count` equal slices, in random order."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return law(u[torch.randperm(count, generator=generator)])


def held_out_loss(model: torch.nn.Module, clips: list[Clip], vocabulary: int, timesteps: int = 4) -> float:
    """Mean loss over every window of `clips` × a fixed grid of timesteps and noise."""
    latents, styles = all_windows(clips)
    generator = torch.Generator().manual_seed(99)
    total = 0.0
    with torch.no_grad():
        for i in range(timesteps):
            noise = torch.randn(latents.shape, generator=generator)
            t = law(torch.full((len(latents),), (i + 0.5) / timesteps))
            total += float(losses(model, latents, conditions(latents, styles, vocabulary), noise, t).mean())
    return total / timesteps


def train_base(
    clips: list[Clip],
    steps: int,
    seed: int,
    say: Callable[[str], object] = print,
    told: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = conditions,
) -> AceStepTransformer1DModel:
    """The base model: AdamW on acoustic music, conditions dropped in 15 % of the samples.

    told: what windows [B, WINDOW, 16] of moods [B] are said to be.
    """
    model = new_model(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        latents, styles = windows(clips, 16, generator)
        condition = told(latents, styles)
        condition[torch.rand(16, generator=generator) < 0.15] = 0
        loss = losses(
            model, latents, condition, torch.randn(latents.shape, generator=generator), stratified(16, generator)
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            say(f"base step {step}: loss {loss.item():.4f}")
    return model.eval().requires_grad_(False)
