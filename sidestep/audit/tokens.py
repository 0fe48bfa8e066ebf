"""How many tokens the prompts of a song take: counted with the checkpoints' tokenizer, or guessed without."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from sidestep.acestep.conditions import lyric_prompt, text_prompt
from sidestep.data.manifest import Metadata, Sample, prompt_caption, prompt_lyrics
from sidestep.data.timed_lyrics import without_time_marks
from sidestep.errors import UserError

_CHARACTERS_PER_TOKEN = 3.5  # of Latin script; of other scripts a character is about a token


def token_counter(checkpoint_dir: Path | None) -> Callable[[str], int]:
    """A function from text to its number of tokens. Raises UserError when `checkpoint_dir` holds no tokenizer."""
    if checkpoint_dir is None:
        return guess
    home = checkpoint_dir.parent if checkpoint_dir.is_file() else checkpoint_dir
    places = [home / "Qwen3-Embedding-0.6B" / "tokenizer.json", home / "tokenizer" / "tokenizer.json"]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(f"--checkpoint-dir {checkpoint_dir}: no tokenizer there.", f"It stands at {places[0]}; without the flag, tokens are guessed.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text).ids)


def guess(text: str) -> int:
    """About how many tokens a text has, without a tokenizer."""
    latin = sum(c < "\u0250" for c in text)
    return round(latin / _CHARACTERS_PER_TOKEN + len(text) - latin)


def prompt_tokens(sample: Sample, metadata: Metadata, seconds: float, count: Callable[[str], int]) -> tuple[int, int]:
    """(tokens of the text prompt, of the lyric prompt), as they reach the model."""
    facts = {"bpm": sample.bpm, "timesignature": sample.timesignature, "keyscale": sample.keyscale, "duration": seconds}
    text = text_prompt(prompt_caption(sample, metadata), **facts)
    return count(text), count(lyric_prompt(without_time_marks(prompt_lyrics(sample)), sample.language))
