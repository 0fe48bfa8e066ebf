"""What the language model may write, as logits processors of transformers' `generate`, and the three things it writes.

A plan's field names are forced and its values chosen from those that exist; codes are counted. Source: spec, lm-facts
section 4.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sidestep.acestep.lm.model import CODES_PER_SECOND, LanguageModel, Tokens
from sidestep.acestep.lm.prompts import (
    FIELDS,
    Answer,
    codes_prompt,
    negative_prompt,
    parse_answer,
    plan_prompt,
    plan_text,
    understand_prompt,
    unquoted,
)
from sidestep.metadata import BPM_RANGE, LANGUAGES, TIME_SIGNATURES

KEYSCALES = tuple(
    f"{note}{sign} {mode}" for note in "ABCDEFG" for sign in ("", "#", "b", "♯", "♭") for mode in ("major", "minor")
)
SHORTEST_SECONDS, LONGEST_SECONDS = 10, 600
HEARD_SECONDS = 240  # of a song, at once
CAPTION_TOKENS = 512
ANSWER_TOKENS = 2048  # of a description with lyrics
NEWLINE, BLANK, TAB = "Ċ", "Ġ", "ĉ"  # in the alphabet in which a byte-level vocabulary writes bytes
Trie = dict[int, "Trie"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn, in the app's order: guidance, penalty, top-k, top-p, temperature. 0 draws the likeliest.

    guidance: of codes only; 1 is none. The values are those of the app.
    """

    temperature: float = 0.85
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    guidance: float = 2.0
    negative: str = ""
    seed: int = 42


class Forced:
    """Tokens that come one after the other."""

    def __init__(self, ids: list[int]):
        self._left = ids

    def allowed(self, _logits: Tensor) -> list[int] | None:
        """The next token; None when all are written."""
        return self._left[:1] or None

    def accept(self, _token: int) -> None:
        """Go on behind the token."""
        self._left = self._left[1:]


class OneOf:
    """One of many values. likeliest_first: its first token is not drawn."""

    def __init__(self, values: Iterable[list[int]], likeliest_first: bool = False):
        self._node: Trie = {}
        self._likeliest = likeliest_first
        for ids in values:
            node = self._node
            for token in ids:
                node = node.setdefault(token, {})

    def allowed(self, logits: Tensor) -> list[int] | None:
        """The tokens that go on with a value; None at its end."""
        tokens = [*self._node]
        if self._likeliest and tokens:
            return [max(tokens, key=lambda token: float(logits[token]))]
        return tokens or None

    def accept(self, token: int) -> None:
        """Go on behind the token."""
        self._node, self._likeliest = self._node[token], False


class Caption:
    """Free text up to a line break behind which no blank comes. Marks and backticks are no text."""

    def __init__(self, tokens: Tokens, width: int):
        self._breaks, self._blanks = tokens.with_text(NEWLINE), tokens.beginning_with(BLANK, TAB)
        self._newline = tokens.ids("\n")
        is_text = torch.zeros(width, dtype=torch.bool)
        is_text[: len(tokens.tokenizer)] = True
        is_text[[*tokens.added_ids, *tokens.with_text("`")]] = False
        self._text = is_text
        self._written, self._after_break = 0, False

    def allowed(self, logits: Tensor) -> list[int] | Tensor | None:
        """Tokens of text, or None when the caption has ended."""
        if self._after_break and (self._written > CAPTION_TOKENS or int(logits.argmax()) not in self._blanks):
            return None
        return self._newline if self._written >= CAPTION_TOKENS else self._text

    def accept(self, token: int) -> None:
        """Count the token."""
        self._written += 1
        self._after_break = token in self._breaks


class PlanGrammar(LogitsProcessor):
    """Lets a plan be written, and nothing else. For one sequence at a time.

    names: the fields asked for, others are left out unless `given`. goes_on: after `</think>` text follows, without
    codes; else the turn ends in its place, as in the original.
    """

    def __init__(
        self,
        tokens: Tokens,
        width: int,
        names: Iterable[str] = FIELDS,
        given: Mapping[str, Any] | None = None,
        goes_on: bool = False,
        longest_seconds: int = LONGEST_SECONDS,
    ):
        names, given = set(names), given or {}
        values: dict[str, Iterable[object]] = {
            "bpm": range(BPM_RANGE[0], BPM_RANGE[1] + 1),
            "duration": range(SHORTEST_SECONDS, longest_seconds + 1),
            "keyscale": KEYSCALES,
            "language": (*LANGUAGES, "unknown"),
            "timesignature": TIME_SIGNATURES,
        }

        def value_of(name: str) -> Callable[[], Any]:
            if given.get(name) is not None:
                return lambda: Forced(tokens.ids(f" {given[name]}\n"))
            if name == "caption":
                return lambda: Caption(tokens, width)
            written = [tokens.ids(f" {value}\n") for value in values[name]]
            return lambda: OneOf(written, likeliest_first=name == "language")

        self._parts: list[Any] = [Forced(tokens.ids("<think>\n"))]
        for name in FIELDS:
            if name in names or given.get(name) is not None:
                self._parts += [Forced(tokens.ids(f"{name}:")), value_of(name)()]
        self._parts.append(Forced(tokens.ids("</think>") if goes_on else [tokens.end_id]))
        after = torch.ones(width, dtype=torch.bool)
        after[tokens.all_code_ids] = False
        self._after = after
        self._length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [1, V] with -inf for all that may not come next. input_ids: [1, N], prompt and what was written."""
        if self._length is not None and self._parts:
            self._parts[0].accept(int(input_ids[0, -1]))
        self._length = input_ids.shape[1]
        while self._parts:
            allowed = self._parts[0].allowed(scores[0])
            if allowed is not None:
                return only(scores, allowed)
            self._parts.pop(0)
        return only(scores, self._after)


class CodesGrammar(LogitsProcessor):
    """Lets exactly `count` codes be written, then the end of the turn."""

    def __init__(self, tokens: Tokens, prompt_length: int, count: int):
        self._codes, self._end, self._last = tokens.code_ids, [tokens.end_id], prompt_length + count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [1, V] with -inf for all that may not come next."""
        return only(scores, self._end if input_ids.shape[1] >= self._last else self._codes)


class Guidance(LogitsProcessor):
    """u + s · (c − u) in fp32: away from what the model would write for the negative prompt, whose cache it keeps."""

    def __init__(self, model: Any, negative_ids: list[int], scale: float):
        self._model, self._scale, self._cache = model, scale, None
        self._next = torch.tensor([negative_ids], device=model.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [1, V]."""
        new = self._next if self._cache is None else input_ids[:, -1:]
        out = self._model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        without = out.logits[:, -1].float()
        return without + self._scale * (scores.float() - without)


def only(scores: Tensor, allowed: list[int] | Tensor) -> Tensor:
    """scores [B, V] with -inf but for the allowed: ids, or a mask [V]."""
    ids = torch.as_tensor(allowed, device=scores.device)
    kept = torch.full_like(scores, -torch.inf)
    kept[:, ids] = scores[:, ids]
    return kept


class Told(StoppingCriteria):
    """Tells of each token, and never stops."""

    def __init__(self, tell: Callable[[], object]):
        self._tell = tell

    def __call__(self, input_ids: Tensor, scores: Tensor, **_more: Any) -> Any:  # noqa: ARG002  as generate calls it
        """[B] of False."""
        self._tell()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def write(
    lm: LanguageModel,
    prompt: list[int],
    grammar: LogitsProcessor | None,
    limit: int,
    sampling: Sampling,
    guidance: Guidance | None = None,
    tell: Callable[[], object] | None = None,
) -> list[int]:
    """What the model writes after a prompt: at most `limit` token ids, the end of the turn the last. tell: of each."""
    chain: list[Any] = [*((guidance,) if guidance else ()), *((grammar,) if grammar else ())]
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        chain += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=bool(sampling.temperature),
        temperature=1.0,  # the chain above has its own, in the app's order
        top_k=0,
        top_p=1.0,
        eos_token_id=lm.tokens.end_id,
        pad_token_id=lm.tokens.end_id,
        use_cache=True,
    )
    device = lm.model.device
    ids = torch.tensor([prompt], device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=True):
        torch.manual_seed(sampling.seed)
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList(chain),
            stopping_criteria=StoppingCriteriaList([Told(tell)] if tell else []),
        )
    return out[0, len(prompt) :].tolist()


def write_plan(
    lm: LanguageModel,
    caption: str,
    lyrics: str,
    sampling: Sampling,
    given: Mapping[str, Any] | None = None,
    names: Iterable[str] = FIELDS,
    longest_seconds: int = LONGEST_SECONDS,
) -> str:
    """The plan of a song, as the model writes it, without the end of its turn. No guidance. given: forced values."""
    prompt = lm.tokens.ids(plan_prompt(caption, lyrics))
    grammar = PlanGrammar(lm.tokens, width_of(lm), names, given, longest_seconds=longest_seconds)
    return lm.tokens.text(write(lm, prompt, grammar, CAPTION_TOKENS + 128, sampling)[:-1])


def write_codes(
    lm: LanguageModel,
    caption: str,
    lyrics: str,
    plan: str,
    seconds: float,
    sampling: Sampling,
    tell: Callable[[int], Callable[[], object]] | None = None,
) -> list[int]:
    """int(5 · seconds) codes of a planned song. plan: of `plan_text`. tell: of their number, and then of each."""
    prompt = lm.tokens.ids(codes_prompt(caption, lyrics, plan))
    count = int(CODES_PER_SECOND * seconds)
    grammar = CodesGrammar(lm.tokens, len(prompt), count)
    guidance = None
    if sampling.guidance != 1:
        guidance = Guidance(lm.model, lm.tokens.ids(negative_prompt(sampling.negative)), sampling.guidance)
    ids = write(lm, prompt, grammar, count + 1, sampling, guidance, tell(count + 1) if tell else None)
    code_of = {id_: code for code, id_ in enumerate(lm.tokens.code_ids.tolist())}
    return [code_of[id_] for id_ in ids if id_ in code_of]


def understand(
    lm: LanguageModel, codes: Iterable[int], sampling: Sampling, with_lyrics: bool = True
) -> tuple[Answer, str]:
    """(what the model hears in codes, its words as they stand there)."""
    prompt = lm.tokens.ids(understand_prompt(codes))
    grammar = PlanGrammar(lm.tokens, width_of(lm), goes_on=with_lyrics)
    limit = CAPTION_TOKENS + 128 + (ANSWER_TOKENS if with_lyrics else 0)
    raw = lm.tokens.text(write(lm, prompt, grammar, limit, sampling))
    return parse_answer(raw, lm.tokens.codebook), raw


def width_of(lm: LanguageModel) -> int:
    """How many logits the model gives."""
    return lm.model.config.vocab_size


@dataclass(frozen=True)
class Composition:
    """What the model made of a request. metadata: of its plan or the user's; seconds: how long the song is to be."""

    metadata: dict[str, Any]
    plan: str
    seconds: float
    codes: tuple[int, ...]


def compose(
    lm: LanguageModel,
    caption: str,
    lyrics: str,
    sampling: Sampling,
    given: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    names: Iterable[str] = FIELDS,
    longest_seconds: int = LONGEST_SECONDS,
    tell: Callable[[int], Callable[[], object]] | None = None,
) -> Composition:
    """Plan, then codes, as the app's thinking mode. given: what the user has said of the song; seconds likewise.

    Where the user gives tempo, key, meter and duration there is no planning, as in the app. names, longest_seconds: of
    the plan; tell: see `write_codes`.
    """
    user = {name: value for name, value in (given or {}).items() if value not in (None, "")}
    if seconds is not None:
        user["duration"] = int(seconds)
    if all(name in user for name in ("bpm", "keyscale", "timesignature", "duration")):
        metadata = {name: user[name] for name in ("bpm", "duration", "keyscale", "timesignature")}
    else:
        raw = write_plan(lm, caption, lyrics, sampling, user, names, longest_seconds)
        metadata = unquoted(parse_answer(raw, lm.tokens.codebook).metadata)
    plan = plan_text(metadata)
    length = seconds if seconds is not None else float(metadata["duration"])
    codes = write_codes(lm, caption, lyrics, plan, length, sampling, tell)
    return Composition(metadata, plan, length, tuple(codes))
