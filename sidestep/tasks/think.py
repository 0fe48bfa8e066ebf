"""Thinking, as in ACE-Step's app: the language model composes a song before the DiT hears of it.

Request → plan and codes → hints, which stand in the DiT's context in the place of silence. The language model is
loaded, used and gone before anything of the DiT is loaded. Source: spec, lm-facts 3 and 4.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.conditions import Prompt, hints_of_codes
from sidestep.acestep.layout import Layout
from sidestep.acestep.lm.decoding import Composition, Sampling, compose
from sidestep.acestep.lm.model import LanguageModel, choose_language_model, codebook_size, load_language_model
from sidestep.acestep.lm.prompts import FIELDS
from sidestep.adapters.attach import adapter_scale, load_adapter
from sidestep.adapters.read import Adapter, read_adapter
from sidestep.errors import UserError
from sidestep.events import Decision, LongTask, Notice, Report, Table
from sidestep.variants import DIT_PREFIX
from sidestep.words import side_step

LONGEST_SECONDS = 240  # that the model may choose by itself, as the app allows it on most cards


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Which language model composes, and how. rewrites: the DiT gets the model's caption; off in the app's page.

    adapter: of `train-lm`, at `strength`, and the flag that names it. base_precision: auto, int8 or nf4.
    """

    lm: str = "auto"
    adapter: Path | None = None
    flag: str = "--lm-adapter"
    strength: float = 1.0
    rewrites: bool = False
    base_precision: str = "auto"
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, eq=False)
class Thought:
    """What became of a request. prompt: what the DiT is told. codes: five a second.

    told: model, adapter and what it wrote, as plain values.
    """

    prompt: Prompt
    codes: tuple[int, ...]
    told: dict[str, Any]


def think(
    checkpoint: Checkpoint,
    requests: Sequence[Prompt],
    thinking: Thinking,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    chooses_length: bool = False,
) -> list[Thought]:
    """A thought for each request. chooses_length: the plan's duration counts instead of the request's.

    Raises UserError for a missing language model and for an adapter of another.
    """
    adapter = read_adapter(thinking.adapter) if thinking.adapter else None
    for note in adapter.notes if adapter else ():
        report(Notice(message=note, level="warning"))
    folder = composer_of(checkpoint.layout, thinking.lm, adapter, thinking.flag)
    report(Decision(what="composer", value=folder.name, reason=described(thinking, base_of(adapter))))
    quantised = "" if thinking.base_precision == "auto" else thinking.base_precision
    lm = load_language_model(folder, codebook_size(checkpoint), device, dtype, quantised, report)
    model = load_adapter(lm.model.model, adapter, "--lm") if adapter else None
    with adapter_scale(model, thinking.strength) if model else nullcontext():
        return composed(lm, requests, thinking, report, chooses_length)


def composer_of(layout: Layout, lm: str, adapter: Adapter | None, flag: str = "--lm-adapter") -> Path:
    """The folder of the language model that composes; auto is the one that the adapter was trained on.

    flag: what names the adapter. Raises UserError for a missing model and for an adapter of the DiT.
    """
    trained_on = base_of(adapter)
    if adapter and trained_on.startswith(DIT_PREFIX):
        raise UserError(
            f"{flag} {adapter.path}: was not trained on a language model but on {trained_on}.",
            f"Name an adapter of train-lm there. This one is heard with: "
            f"{side_step('sample', '--adapter', str(adapter.path))}",
        )
    return choose_language_model(layout, trained_on if lm == "auto" and trained_on else lm)


def base_of(adapter: Adapter | None) -> str:
    """The folder's name of the model that an adapter was trained on; empty where that is not known."""
    return str(adapter.metadata.get("base_model", "")) if adapter else ""


def composed(
    lm: LanguageModel, requests: Sequence[Prompt], thinking: Thinking, report: Report, chooses_length: bool = False
) -> list[Thought]:
    """A thought for each request, by the language model as it is at that moment. Tells what it wrote."""
    thoughts = []
    for request in requests:
        song = compose(
            lm,
            request.caption,
            request.lyrics,
            replace(thinking.sampling, seed=request.seed),
            given_of(request),
            None if chooses_length else request.duration,
            [name for name in FIELDS if name != "caption" or thinking.rewrites],
            LONGEST_SECONDS,
            partial(LongTask, report, "Composing"),
        )
        told = {
            "model": lm.folder.name,
            "adapter": str(thinking.adapter) if thinking.adapter else None,
            "strength": thinking.strength if thinking.adapter else None,
            **vars(thinking.sampling),
            "seed": request.seed,
            "wrote": song.metadata,
            "codes": list(song.codes),
        }
        report(written(request, song, thinking))
        thoughts.append(Thought(told_to_the_dit(request, song, thinking.rewrites), song.codes, told))
    return thoughts


def hints_for(
    checkpoint: Checkpoint, thoughts: Sequence[Thought], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """What the codes are to this DiT: hints [1, 5 · codes, D] of each thought, on the CPU."""
    tokenizer = checkpoint.load_audio_tokenizer(device, dtype)
    detokenizer = checkpoint.load_audio_detokenizer(device, dtype)
    return [hints_of_codes(tokenizer, detokenizer, thought.codes).cpu() for thought in thoughts]


def given_of(request: Prompt) -> dict[str, Any]:
    """What a request says of the plan's fields; the model is held to it."""
    language = "" if request.language == "unknown" else request.language
    return {
        "bpm": request.bpm,
        "keyscale": request.keyscale,
        "timesignature": request.timesignature,
        "language": language,
    }


def told_to_the_dit(request: Prompt, song: Composition, rewrites: bool) -> Prompt:
    """The request with what the model wrote where the request says nothing.

    The language is not among it, as in the app, whose reader looks for it under another name.
    """
    wrote: Mapping[str, Any] = song.metadata
    return replace(
        request,
        caption=(wrote.get("caption") if rewrites else None) or request.caption,
        bpm=request.bpm or wrote.get("bpm"),
        keyscale=request.keyscale or wrote.get("keyscale", ""),
        timesignature=request.timesignature or str(wrote.get("timesignature", "")),
        duration=song.seconds,
    )


def described(thinking: Thinking, trained_on: str) -> str:
    """Why this model, and how it draws."""
    sampling = thinking.sampling
    why = "the adapter's own" if thinking.lm == "auto" and trained_on else f"--lm {thinking.lm}"
    how = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, guidance {sampling.guidance:g}"
    with_adapter = f"; adapter {thinking.adapter} at {thinking.strength:g}" if thinking.adapter else ""
    return f"{why}; {how}{with_adapter}"


def written(request: Prompt, song: Composition, thinking: Thinking) -> Table:
    """What the model wrote, for a person."""
    rows = [(name, str(value)) for name, value in song.metadata.items()]
    rows.append(("codes", f"{len(song.codes)}, for {song.seconds:g} s"))
    without = ", without the adapter" if thinking.adapter and not thinking.strength else ""
    return Table(title=f'Composed for "{request.caption[:40]}"{without}', columns=("", "written"), rows=tuple(rows))
