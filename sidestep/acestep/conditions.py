"""From what is known of a song to what the DiT is conditioned on, exactly as at inference (spec, section 3).

A request for music, and the conditions that the DiT gets for it: the same ones, made by the same code, as in preprocessing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.acestep.blocks import Part
from sidestep.acestep.checkpoint import Checkpoint

TEXT2MUSIC = "Fill the audio semantic mask based on the given conditions:"
COVER = "Generate audio semantic tokens based on the given conditions:"
TEXT_TOKENS = 256
LYRIC_TOKENS = 2048
INSTRUMENTAL = "[Instrumental]"


def text_prompt(
    caption: str, *, bpm: int | None, timesignature: str, keyscale: str, duration: float, instruction: str = TEXT2MUSIC
) -> str:
    """The text prompt. duration: seconds of the audio that is trained on or made; the prompt states whole ones."""
    return (
        f"# Instruction\n{instruction}\n\n# Caption\n{caption}\n\n# Metas\n"
        f"- bpm: {bpm or 'N/A'}\n- timesignature: {timesignature or 'N/A'}\n- keyscale: {keyscale or 'N/A'}\n- duration: {int(duration)} seconds\n<|endoftext|>\n"
    )


def lyric_prompt(lyrics: str, language: str) -> str:
    """The lyric prompt; a song without lyrics is instrumental, one without a language is `unknown`."""
    return f"# Languages\n{language or 'unknown'}\n\n# Lyric\n{lyrics.strip() or INSTRUMENTAL}<|endoftext|>"


def token_ids(tokenizer, text: str, limit: int) -> tuple[torch.Tensor, int]:
    """(ids [1, N] with N ≤ limit, how many tokens were cut off). No padding."""
    ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").input_ids
    whole = len(tokenizer(text, verbose=False).input_ids)
    return ids, whole - ids.shape[1]


@torch.inference_mode()
def encode_text(text_encoder, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden state of the whole text encoder. ids: [1, N] → [1, N, D]."""
    return text_encoder(input_ids=ids.to(text_encoder.device)).last_hidden_state


@torch.inference_mode()
def embed_lyrics(text_encoder, ids: torch.Tensor) -> torch.Tensor:
    """Lyrics pass only the text encoder's embedding table. ids: [1, N] → [1, N, D]."""
    table = text_encoder.get_input_embeddings()
    return table(ids.to(table.weight.device))


@torch.inference_mode()
def encode_conditions(
    condition_encoder, text_states: torch.Tensor, lyric_states: torch.Tensor, timbre_latents: torch.Tensor
) -> torch.Tensor:
    """Packed conditions [1, L, D]: lyrics | timbre | text, without one pad token.

    text_states, lyric_states: [1, N, D]. timbre_latents: [1, T, C], the first `timbre_fix_frame` frames of silence when there is no reference.
    """
    device, dtype = condition_encoder.device, condition_encoder.dtype
    text_states, lyric_states, timbre_latents = (
        x.to(device, dtype) for x in (text_states, lyric_states, timbre_latents)
    )

    def every_token(states: torch.Tensor) -> torch.Tensor:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=device)

    states, _ = condition_encoder(
        text_hidden_states=text_states,
        text_attention_mask=every_token(text_states),
        lyric_hidden_states=lyric_states,
        lyric_attention_mask=every_token(lyric_states),
        refer_audio_acoustic_hidden_states_packed=timbre_latents,
        refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
    )
    return states


def tiled_silence(silence: torch.Tensor, frames: int) -> torch.Tensor:
    """The first `frames` frames of the silence latent [1, T0, D], repeated beyond its length. → [1, frames, D]"""
    repeats = -(-frames // silence.shape[1])
    return silence.repeat(1, repeats, 1)[:, :frames] if repeats > 1 else silence[:, :frames]


def context_latents(source: torch.Tensor) -> torch.Tensor:
    """What the DiT sees beside the noise: source latents (silence, or hints) [B, T, D] and a mask of ones. → [B, T, 2D]"""
    return torch.cat([source, torch.ones_like(source)], dim=-1)


@torch.inference_mode()
def cover_hints(
    audio_tokenizer, audio_detokenizer, latents: torch.Tensor, silence: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(5 Hz codes [1, ceil(T/5), 1], hints [1, T, D]) of latents [1, T, D]; the last window is filled up with silence."""
    device, dtype = audio_tokenizer.device, audio_tokenizer.dtype
    quantized, codes = audio_tokenizer.tokenize(latents.to(device, dtype), silence.to(device, dtype))
    return codes, audio_detokenizer(quantized)[:, : latents.shape[1]]


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
            text = text_prompt(
                prompt.caption,
                bpm=prompt.bpm,
                timesignature=prompt.timesignature,
                keyscale=prompt.keyscale,
                duration=prompt.duration,
            )
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
