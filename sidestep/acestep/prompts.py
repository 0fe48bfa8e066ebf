"""A request for music, and the conditions that the DiT gets for it: the same ones, made by the same code, as in preprocessing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import (
    INSTRUMENTAL,
    LYRIC_TOKENS,
    TEXT_TOKENS,
    embed_lyrics,
    encode_conditions,
    encode_text,
    lyric_prompt,
    text_prompt,
    tiled_silence,
    token_ids,
)
from sidestep.acestep.residence import Part


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked for. duration: seconds. seed: of the noise."""

    caption: str
    lyrics: str = INSTRUMENTAL
    language: str = "unknown"
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    duration: float = 30.0
    seed: int = 42


@dataclass(frozen=True, eq=False)
class Conditions:
    """Packed conditions [1, L, C] of a prompt, on the CPU, and how many tokens of its text and lyrics the model does not see."""

    states: Tensor
    text_tokens_lost: int
    lyric_tokens_lost: int


def encode_prompts(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], device: torch.device, dtype: torch.dtype, offload: bool = False
) -> tuple[Conditions, ...]:
    """Conditions of each prompt. Text encoder and condition encoder are loaded one after the other and freed: never both are on the device."""
    tokenizer = checkpoint.load_tokenizer()
    texts, lyrics, lost = [], [], []
    encoder = Part(lambda place: checkpoint.load_text_encoder(place, dtype)[0], device, offload)
    with encoder.in_use() as model:
        for prompt in prompts:
            text = text_prompt(prompt.caption, bpm=prompt.bpm, timesignature=prompt.timesignature, keyscale=prompt.keyscale, duration=prompt.duration)
            text_ids, text_lost = token_ids(tokenizer, text, TEXT_TOKENS)
            lyric_ids, lyrics_lost = token_ids(tokenizer, lyric_prompt(prompt.lyrics, prompt.language), LYRIC_TOKENS)
            texts.append(encode_text(model, text_ids))
            lyrics.append(embed_lyrics(model, lyric_ids))
            lost.append((text_lost, lyrics_lost))
    del model
    encoder.free()
    timbre = tiled_silence(checkpoint.silence_latent(), checkpoint.timbre_frames)
    encoder = Part(lambda place: checkpoint.load_condition_encoder(place, dtype), device, offload)
    with encoder.in_use() as model:
        states = [encode_conditions(model, *pair, timbre).cpu() for pair in zip(texts, lyrics, strict=True)]
    return tuple(Conditions(state, *counts) for state, counts in zip(states, lost, strict=True))
