"""What the DiT is conditioned on, from what is known of a song or asked for, exactly as at inference (spec, section 3).

Text becomes a prompt and lyrics (`Text`), these become tokens, the text encoder's states of them (of lyrics only the
embeddings) and silence in the place of a reference's timbre go through the condition encoder.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import CPU, Checkpoint
from sidestep.events import LongTask

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
        f"- bpm: {bpm or 'N/A'}\n- timesignature: {timesignature or 'N/A'}\n- keyscale: {keyscale or 'N/A'}\n"
        f"- duration: {int(duration)} seconds\n<|endoftext|>\n"
    )


def stems_caption(caption: str) -> str:
    """The form of a caption that a model for stems (`is_lego_sft`) expects, as ACE-Step's app fills it for whole music.

    The description of the whole song stays empty there, and the mask is left to the model.
    """
    return f"Global: \nLocal: {caption}\nMask Control: false"


def lyric_prompt(lyrics: str, language: str) -> str:
    """The lyric prompt; a song without lyrics is instrumental, one without a language is `unknown`."""
    return f"# Languages\n{language or 'unknown'}\n\n# Lyric\n{lyrics.strip() or INSTRUMENTAL}<|endoftext|>"


def token_ids(tokenizer, text: str, limit: int) -> tuple[Tensor, int]:
    """(ids [1, N] with N ≤ limit, how many tokens were cut off). No padding."""
    ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").input_ids
    whole = len(tokenizer(text, verbose=False).input_ids)
    return ids, whole - ids.shape[1]


@torch.inference_mode()
def encode_text(text_encoder, ids: Tensor) -> Tensor:
    """Last hidden state of the whole text encoder. ids: [1, N] → [1, N, D]."""
    return text_encoder(input_ids=ids.to(text_encoder.device)).last_hidden_state


@torch.inference_mode()
def embed_lyrics(text_encoder, ids: Tensor) -> Tensor:
    """Lyrics pass only the text encoder's embedding table. ids: [1, N] → [1, N, D]."""
    table = text_encoder.get_input_embeddings()
    return table(ids.to(table.weight.device))


@torch.inference_mode()
def encode_conditions(condition_encoder, text_states: Tensor, lyric_states: Tensor, timbre_latents: Tensor) -> Tensor:
    """Packed conditions [1, L, D]: lyrics | timbre | text, without one pad token.

    text_states, lyric_states: [1, N, D]. timbre_latents: [1, T, C], the first `timbre_fix_frame` frames of silence
    when there is no reference.
    """
    device, dtype = condition_encoder.device, condition_encoder.dtype
    text_states, lyric_states, timbre_latents = (
        x.to(device, dtype) for x in (text_states, lyric_states, timbre_latents)
    )

    def every_token(states: Tensor) -> Tensor:
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


def tiled_silence(silence: Tensor, frames: int) -> Tensor:
    """The first `frames` frames of the silence latent [1, T0, D], repeated beyond its length. → [1, frames, D]"""
    repeats = -(-frames // silence.shape[1])
    return silence.repeat(1, repeats, 1)[:, :frames] if repeats > 1 else silence[:, :frames]


# Of the mask beside the source latents. The model was trained with 0 (keep the source) and 1 (make it anew); diffusers,
# ComfyUI and acestep.cpp send 1 for text to music. Newer code of the app means 2 ("auto"), but its mask is boolean, so
# that the model gets 1 there, too.
TEXT_TO_MUSIC = 1.0


def context_latents(source: Tensor) -> Tensor:
    """What the DiT sees beside the noise: source latents (silence, hints) and the mask. [B, T, D] → [B, T, 2D]"""
    return torch.cat([source, torch.full_like(source, TEXT_TO_MUSIC)], dim=-1)


@torch.inference_mode()
def cover_hints(audio_tokenizer, audio_detokenizer, latents: Tensor, silence: Tensor) -> tuple[Tensor, Tensor]:
    """(5 Hz codes [1, ceil(T/5), 1], hints [1, T, D]) of latents [1, T, D]; silence fills up the last window."""
    device, dtype = audio_tokenizer.device, audio_tokenizer.dtype
    quantized, codes = audio_tokenizer.tokenize(latents.to(device, dtype), silence.to(device, dtype))
    return codes, audio_detokenizer(quantized)[:, : latents.shape[1]]


@torch.inference_mode()
def hints_of_codes(audio_tokenizer, audio_detokenizer, codes: Sequence[int]) -> Tensor:
    """Hints [1, 5·N, D] of N codes, such as the language model writes; those above the codebook become its last."""
    quantizer = audio_tokenizer.quantizer
    indices = torch.tensor(codes, device=audio_tokenizer.device).clamp(max=quantizer.codebook_size - 1)
    return audio_detokenizer(quantizer.get_output_from_indices(indices[None, :, None]))


@dataclass(frozen=True)
class Text:
    """What the tokenizer gets: a `text_prompt` and a `lyric_prompt`."""

    prompt: str
    lyrics: str


@dataclass(frozen=True, eq=False)
class Conditions:
    """Packed conditions [1, L, D] of a text, on the CPU, and how many tokens of it the model does not see."""

    states: Tensor
    text_tokens_lost: int
    lyric_tokens_lost: int


class TextModels:
    """Text encoders, their tokenizers and condition encoders for a job that encodes several times: each is read once.

    Between their uses they wait on the CPU. All uses are on one device and in one precision.
    """

    def __init__(self) -> None:
        self._text_encoders: dict[Path, tuple[Any, Any]] = {}
        self._condition_encoders: dict[Path, Any] = {}

    def text_encoder(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """(text encoder on the device, its tokenizer); variants beside each other share theirs."""
        place = checkpoint.layout.part("text_encoder").resolve()
        if place not in self._text_encoders:
            self._text_encoders[place] = checkpoint.load_text_encoder(device, dtype)
        model, tokenizer = self._text_encoders[place]
        return model.to(device), tokenizer

    def condition_encoder(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
        """A variant's own condition encoder, on the device."""
        place = checkpoint.layout.part("condition_encoder").resolve()
        if place not in self._condition_encoders:
            self._condition_encoders[place] = checkpoint.load_condition_encoder(device, dtype)
        return self._condition_encoders[place].to(device)


def encode_texts(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    device: torch.device,
    dtype: torch.dtype,
    models: TextModels | None = None,
) -> Generator[Conditions]:
    """The conditions of each text, in order. Text encoder and condition encoder are on the device one after the other.

    A prompt that many texts share is encoded once; states of lyrics, which are large, are looked up in their turn.
    models: where the two are kept for the next time; without, each is forgotten after its use.
    """
    text_encoder, tokenizer = (
        models.text_encoder(checkpoint, device, dtype) if models else checkpoint.load_text_encoder(device, dtype)
    )
    prompts = {text.prompt: token_ids(tokenizer, text.prompt, TEXT_TOKENS) for text in texts}
    lyrics = {text.lyrics: token_ids(tokenizer, text.lyrics, LYRIC_TOKENS) for text in texts}
    prompt_states = {}
    encoded = LongTask(checkpoint.report, "Encoding prompts", len(prompts))
    for prompt, (ids, _) in prompts.items():
        prompt_states[prompt] = encode_text(text_encoder, ids).cpu()
        encoded()
    embeddings = text_encoder.get_input_embeddings().cpu()
    if models:
        text_encoder.to(CPU)  # pyrefly: ignore[bad-argument-type] (transformers and diffusers wrap `to`)
    del text_encoder
    encoder = (
        models.condition_encoder(checkpoint, device, dtype)
        if models
        else checkpoint.load_condition_encoder(device, dtype)
    )
    timbre = tiled_silence(checkpoint.silence_latent(), checkpoint.timbre_frames)
    packed = LongTask(checkpoint.report, "Encoding lyrics", len(texts))
    try:
        for text in texts:
            ids, lyric_tokens_lost = lyrics[text.lyrics]
            states = encode_conditions(encoder, prompt_states[text.prompt], embeddings(ids), timbre)
            packed()
            yield Conditions(states.cpu(), prompts[text.prompt][1], lyric_tokens_lost)
    finally:
        if models:
            encoder.to(CPU)  # pyrefly: ignore[bad-argument-type] (transformers and diffusers wrap `to`)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request for music. duration: seconds. seed: of the noise."""

    caption: str
    lyrics: str = INSTRUMENTAL
    language: str = "unknown"
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    duration: float = 30.0
    seed: int = 42

    def text_for(self, is_stems: bool, instruction: str = TEXT2MUSIC) -> Text:
        """What a model is told of it, whose captions may have the form for stems. instruction: COVER with hints."""
        prompt = text_prompt(
            stems_caption(self.caption) if is_stems else self.caption,
            bpm=self.bpm,
            timesignature=self.timesignature,
            keyscale=self.keyscale,
            duration=self.duration,
            instruction=instruction,
        )
        return Text(prompt, lyric_prompt(self.lyrics, self.language))
