"""The language model on disk and in memory: found beside the DiT, read into transformers' own Qwen3 class.

Source: spec, lm-facts section 1.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sidestep.acestep.checkpoint import END_OF_TEXT, QWEN3_FIELDS, Checkpoint
from sidestep.acestep.layout import Layout, read_config
from sidestep.acestep.lm.prompts import END_OF_TURN
from sidestep.acestep.quantize import make_quantizable
from sidestep.acestep.weights import CPU, Weights, fill, loading
from sidestep.errors import UserError
from sidestep.events import Report, null
from sidestep.variants import download_command

PREFIX = "acestep-5Hz-lm-"
SIZES = {"1.7B": "3.7 GB", "0.6B": "1.3 GB", "4B": "8.4 GB"}  # what to take first, and the size of its download
CODES_PER_SECOND = 5
_CODE_TOKEN = re.compile(r"<\|audio_code_(\d+)\|>")


class Tokens:
    """The tokenizer, and the ids that have a meaning here. codebook: how many codes the DiT knows."""

    def __init__(self, folder: Path, codebook: int):
        file = folder / "tokenizer.json"
        read_config(file)  # a missing or cut file gets our message, not the library's
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(file)), pad_token=END_OF_TEXT)
        self._vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        by_code = {
            int(match[1]): id_ for text, id_ in self._vocabulary.items() if (match := _CODE_TOKEN.fullmatch(text))
        }
        self.all_code_ids = torch.tensor(sorted(by_code.values()))
        if missing := [code for code in range(codebook) if code not in by_code]:
            raise UserError(
                f"{folder}: its tokenizer has {len(by_code):,} codes, the DiT {codebook:,} "
                f"(<|audio_code_{missing[0]}|> is missing).",
                "Use a language model and a DiT of the same release.",
            )
        self.code_ids = torch.tensor([by_code[code] for code in range(codebook)])
        unknown = [
            text for text in (END_OF_TURN, "<|im_start|>", "<think>", "</think>") if text not in self._vocabulary
        ]
        if unknown:
            raise UserError(f"{folder}: its tokenizer does not know {unknown[0]}.", "Download this folder again.")
        self.end_id = self._vocabulary[END_OF_TURN]

    @property
    def codebook(self) -> int:
        return len(self.code_ids)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def text(self, ids: list[int] | Tensor) -> str:
        """The text of tokens, special ones too."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def added_ids(self) -> set[int]:
        """Tokens that are marks and no text."""
        return set(self.tokenizer.get_added_vocab().values())

    def with_text(self, part: str) -> set[int]:
        """Tokens whose text, in the bytes' alphabet of the vocabulary, holds this character."""
        return {id_ for text, id_ in self._vocabulary.items() if part in text and id_ not in self.added_ids}

    def beginning_with(self, *parts: str) -> set[int]:
        """Tokens whose text, in the bytes' alphabet of the vocabulary, begins so."""
        return {id_ for text, id_ in self._vocabulary.items() if text.startswith(parts) and id_ not in self.added_ids}


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A language model ready to write. model: Qwen3 for causal language modelling, with or without an adapter."""

    folder: Path
    model: Any
    tokens: Tokens

    @property
    def size(self) -> str:
        """0.6B, 1.7B or 4B, by the folder's name, as the original app reads it."""
        return size_of(self.folder)


def size_of(folder: Path) -> str:
    """The size in a folder's name; 0.6B where it has none, as the original app takes it."""
    return next((size for size in ("0.6B", "1.7B", "4B") if size in folder.name), "0.6B")


def find_language_models(layout: Layout) -> list[Path]:
    """The folders of language models beside a DiT, by name."""
    roots = {layout.folder.parent, layout.vae.parent}
    folders = {path for root in roots if root.is_dir() for path in root.iterdir() if path.name.startswith(PREFIX)}
    return sorted(path for path in folders if (path / "config.json").is_file())


def choose_language_model(layout: Layout, wanted: str) -> Path:
    """The folder of a language model. wanted: auto, a size, a folder's name beside the DiT, or a path.

    auto takes 1.7B, the app's own, else 0.6B, 4B, else whatever is there. Raises UserError that says which to fetch.
    """
    found = find_language_models(layout)
    if wanted != "auto":
        path = Path(wanted)
        own = [path for path in found if wanted in (path.name, path.name.removeprefix(PREFIX))]
        if own or (path / "config.json").is_file():
            return own[0] if own else path
    else:
        order = {PREFIX + size: rank for rank, size in enumerate(SIZES)}
        if found:
            return min(found, key=lambda path: (order.get(path.name, len(order)), path.name))
    place = layout.vae.parent
    there = f"there: {', '.join(path.name for path in found)}" if found else "there is none"
    size = wanted.removeprefix(PREFIX) if wanted.removeprefix(PREFIX) in SIZES else next(iter(SIZES))
    sizes = ", ".join(f"{PREFIX}{size} ({download})" for size, download in SIZES.items())
    what = "A language model" if wanted == "auto" else f"--lm {wanted}: this language model"
    raise UserError(
        f"{what} was not found in {place} ({there}).",
        f"Download it: {download_command(PREFIX + size, place)}\n"
        f"ACE-Step 1.5 has {sizes}. In bf16 each takes as much memory.",
    )


def codebook_size(checkpoint: Checkpoint) -> int:
    """How many codes the DiT's tokenizer has."""
    return math.prod(int(level) for level in checkpoint.config.get("fsq_input_levels") or (8, 8, 8, 5, 5, 5))


def load_language_model(
    folder: Path,
    codebook: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    quantize: str = "",
    report: Report = null,
) -> LanguageModel:
    """A language model in evaluation mode, frozen. quantize: int8 or nf4 for the layers' matrices.

    Raises UserError for a broken folder and for a tokenizer without the DiT's codes.
    """
    tokens = Tokens(folder, codebook)
    return LanguageModel(folder, load_qwen3(folder, device, dtype, quantize, report), tokens)


def load_qwen3(
    folder: Path, device: torch.device, dtype: torch.dtype, quantize: str = "", report: Report = null
) -> Qwen3ForCausalLM:
    """The weights of a folder in transformers' class. The three ways in which their keys are named are all read."""
    read = read_config(folder / "config.json")
    if read.get("model_type") != "qwen3":
        raise UserError(f"{folder}: a {read.get('model_type')} model, not qwen3.", "Name a folder of ACE-Step 1.5.")
    config = Qwen3Config(**{name: value for name, value in read.items() if name in QWEN3_FIELDS})
    config._attn_implementation = "sdpa"
    config.tie_word_embeddings = True
    weights = Weights(folder)
    with init_empty_weights(include_buffers=False):
        model: Any = Qwen3ForCausalLM(config)
        if quantize:
            make_quantizable(model.model, quantize, dtype)
            model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantize == "int8", quantize == "nf4"
    keys = {key.removeprefix("model."): key for key in weights.shapes if key != "lm_head.weight"}
    done = loading(report, "language model", weights, keys, dtype, quantize)
    fill(model.model, weights, keys, dtype, device, "language model", done=done)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval().requires_grad_(False)
