"""What the language model is asked and what it answers, as text, byte for byte as in the original.

Source: spec, lm-facts section 2 (prompts) and 4 (reading answers).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from sidestep.acestep.conditions import COVER

UNDERSTAND = "Understand the given musical conditions and describe the audio semantics accordingly:"
CREATE = "Expand the user's input into a more detailed and specific musical description:"
FORMAT = "Format the user's input into a more detailed and specific musical description:"
NO_INPUT = "NO USER INPUT"
END_OF_TURN = "<|im_end|>"
FIELDS = ("bpm", "caption", "duration", "keyscale", "language", "timesignature")  # in the order of a plan
EMPTY_PLAN = "<think>\n\n</think>"
_KNOWN = {*FIELDS, "genres"}
_CODE = re.compile(r"<\|audio_code_(\d+)\|>")
_PLAN = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_LYRIC_HEADING = re.compile(r"^#\s*lyric[ \t]*\n", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """What the model has written. metadata: its fields as they stand there; codes: within the codebook."""

    metadata: dict[str, Any]
    codes: tuple[int, ...]
    lyrics: str


def turns(instruction: str, user: str) -> str:
    """The system's and the user's turn, and the beginning of the answer."""
    return (
        f"<|im_start|>system\n# Instruction\n{instruction}\n\n{END_OF_TURN}\n"
        f"<|im_start|>user\n{user}{END_OF_TURN}\n<|im_start|>assistant\n"
    )


def plan_prompt(caption: str, lyrics: str) -> str:
    """Asks for a plan of a song."""
    return turns(COVER, f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n")


def codes_prompt(caption: str, lyrics: str, plan: str) -> str:
    """Asks for the codes of a planned song. plan: of `plan_text`."""
    return f"{plan_prompt(caption, lyrics)}{plan}\n\n"


def negative_prompt(text: str = "") -> str:
    """The other side of guidance: no song, or what the music should not be."""
    return f"{turns(COVER, (text.strip() and text) or NO_INPUT)}{EMPTY_PLAN}\n\n"


def understand_prompt(codes: Iterable[int]) -> str:
    """Asks what is heard in codes."""
    return turns(UNDERSTAND, code_text(codes) or NO_INPUT)


def create_prompt(idea: str, instrumental: bool) -> str:
    """Asks for a song from an idea."""
    return turns(CREATE, f"{(idea.strip() and idea) or NO_INPUT}\n\ninstrumental: {str(instrumental).lower()}")


def format_prompt(caption: str, lyrics: str) -> str:
    """Asks for a fuller caption."""
    return turns(FORMAT, f"# Caption\n{caption}\n\n# Lyric\n{lyrics}")


def code_text(codes: Iterable[int]) -> str:
    """Codes as the tokenizer knows them."""
    return "".join(f"<|audio_code_{code}|>" for code in codes)


def plan_text(metadata: Mapping[str, Any]) -> str:
    """A plan as the model writes it, `<think>` to `</think>`. Fields that are None or empty are left out."""
    fields: dict[str, Any] = {}
    for name in FIELDS:
        value = metadata.get(name)
        if value is None or value == "":
            continue
        if name == "timesignature" and str(value).endswith("/4"):
            value = str(value).split("/")[0]
        fields[name] = int(value) if isinstance(value, str) and value.isdigit() else value
    if not fields:
        return EMPTY_PLAN
    return f"<think>\n{yaml.dump(fields, allow_unicode=True, sort_keys=True).strip()}\n</think>"


def parse_answer(text: str, codebook: int) -> Answer:
    """Reads an answer, as the original does. codebook: how many codes there are; larger ones become the last."""
    codes = tuple(min(int(code), codebook - 1) for code in _CODE.findall(text))
    plan = _PLAN.search(text)
    metadata = _fields(plan[1] if plan else _CODE.split(text, maxsplit=1)[0])
    _, _, lyrics = text.partition("</think>")
    lyrics = _LYRIC_HEADING.sub("", lyrics.strip()).strip().removesuffix(END_OF_TURN).strip()
    return Answer(metadata, codes, lyrics)


def _fields(plan: str) -> dict[str, Any]:
    """`key: value` lines; what is indented goes on with the value before it. The last of a name counts."""
    written: list[tuple[str, list[str]]] = []
    for line in plan.split("\n"):
        if line.strip().startswith("<"):
            continue
        if line[:1].strip() and ":" in line:
            name, _, value = line.partition(":")
            written.append((name.strip().lower(), [value] if value.strip() else []))
        elif line[:1] in (" ", "\t") and written:
            written[-1][1].append(line)
    found: dict[str, Any] = {}
    for name, lines in written:
        value: Any = "\n".join(lines).strip()
        if name not in _KNOWN or not value:
            continue
        if name == "caption":
            value = " ".join(line.strip() for line in lines if line.strip())
        elif name in ("bpm", "duration"):
            value = int(value) if re.fullmatch(r"[+-]?\d+", value) else value
        found[name] = value
    return found


def unquoted(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without the quotes that YAML needs; the original keeps them and so quotes them twice."""
    plain = {}
    for name, value in metadata.items():
        if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            try:
                read = yaml.safe_load(value)
            except yaml.YAMLError:
                read = value[1:-1]
            value = read if isinstance(read, str) else value[1:-1]
        plain[name] = value
    return plain
