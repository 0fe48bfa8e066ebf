"""The fields of a song: the names people write them under, and the one form in which each reaches a prompt.

bpm           whole number 30–300: 120, "120.4", "120 BPM", "120,5"
keyscale      "A minor", "F# major", "Bb minor": also "Am", "a min", "F♯maj", a bare "C" (major), Camelot "8A",
              Open Key "1m"
timesignature "2", "3", "4" or "6": also "4/4", "6/8"
language      a code of the languages that the model sings: also "English", "eng", "en-US"
duration      seconds: also "3:25"; only ever compared with the file, which has the last word
caption, genre, custom_tag   one line: line breaks and runs of spaces become one space
lyrics        as they are, but for what `lyrics.cleaned` takes out or brings into LRC's form

Ways of saying "not known" ("", "N/A", "unknown", "none", "-", null; 0 as a bpm) give nothing and are no mistake.
Whatever else has no meaning raises a FieldError, whose words go to the user; the value never reaches a prompt.
"""

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sidestep.data.lyrics import cleaned
from sidestep.metadata import BPM_RANGE, LANGUAGE_NAMES, TIME_SIGNATURES

FIELDS = (
    "caption",
    "genre",
    "lyrics",
    "bpm",
    "keyscale",
    "timesignature",
    "duration",
    "language",
    "is_instrumental",
    "custom_tag",
    "prompt_override",
    "repeat",
)
INSTRUMENTAL = "[Instrumental]"

_ALIASES = {
    "tempo": "bpm",
    "key": "keyscale",
    "scale": "keyscale",
    "signature": "timesignature",
    "meter": "timesignature",
    "lang": "language",
    "vocallanguage": "language",
    "tag": "custom_tag",
    "trigger": "custom_tag",
    "triggerword": "custom_tag",
    "instrumental": "is_instrumental",
    "repeats": "repeat",
    "lyric": "lyrics",
    "description": "caption",
    "prompt": "caption",
    "style": "caption",
    "genres": "genre",
}
_BY_NAME = {**{name.replace("_", ""): name for name in FIELDS}, **_ALIASES}
_NOTHING = {"", "n/a", "na", "none", "null", "unknown", "-", "--", "?", "tbd"}
_NUMBER = re.compile(r"^[~≈]?\s*(\d{1,9}(?:[.,]\d{1,9})?)\s*(?:bpm|beats per minute|s|sec|seconds)?\.?$", re.IGNORECASE)
_CLOCK = re.compile(r"^(?:(\d{1,3}):)?(\d{1,3}):(\d{2}(?:\.\d{1,6})?)$")
_KEY = re.compile(r"^([A-Ga-g])\s*(♯|♭|#|b|-?sharp|-?flat)?\s*[-_]?\s*(major|maj|dur|minor|min|moll|m|M)?$")
_NOTE = re.compile(r"^[A-Ga-g]\s*(♯|♭|#|b|-?sharp|-?flat)?$")
_MODE = re.compile(r"^(major|maj|dur|minor|min|moll)$", re.IGNORECASE)
_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f]")
_LINE_ENDS = re.compile("\\r\\n?|[\\x85\\u2028\\u2029]")
_UNPAIRED = re.compile("[\\ud800-\\udfff]")  # as JSON may hold them: no tokenizer and no file takes them
_CAMELOT = re.compile(r"^(\d{1,2})\s*([ABabdmDM])$")
_ENERGY = re.compile(r"\s*[-/]\s*(?:energy\s*)?\d+$", re.IGNORECASE)  # Mixed In Key: "8A - Energy 7", "Am - 7"
_CIRCLE_OF_FIFTHS = ("C", "G", "D", "A", "E", "B", "F#", "Db", "Ab", "Eb", "Bb", "F")  # clockwise from C
_RELATIVE_MINORS = ("A", "E", "B", "F#", "C#", "G#", "D#", "Bb", "F", "C", "G", "D")

_CODE_OF = {name: code for code, names in LANGUAGE_NAMES.items() for name in (code, *names.split())}


class FieldError(Exception):
    """A value that means nothing in its field; the text says what would."""


@lru_cache(maxsize=4096)
def field_named(key: str) -> str | None:
    """The field that a written key stands for ("Tempo", "time signature", "Custom-Tag"), or None."""
    return _BY_NAME.get(re.sub(r"[\s_-]+", "", key).casefold())


def language_code(text: str) -> str | None:
    """The model's code of a language: "EN", "eng", "English", "en-US" → "en"; None where it has no such language."""
    text = text.strip().casefold().replace("_", "-")
    return _CODE_OF.get(text) or _CODE_OF.get(text.split("-")[0])


def parse_field(name: str, value: Any) -> Any:
    """`value`, as written, in the one form of the field `name`; None where it says nothing. Raises FieldError."""
    if isinstance(value, list) and name in ("genre", "lyrics", "caption") and all(isinstance(v, str) for v in value):
        value = ("\n" if name == "lyrics" else ", ").join(value)
    elif isinstance(value, dict | list):
        raise FieldError(f"{_quoted(value)} is no {name}")
    if isinstance(value, str):
        if not value.isprintable():
            value = _CONTROLS.sub("", _LINE_ENDS.sub("\n", value))
            if _UNPAIRED.search(value):
                raise FieldError(f"{value[:60]!a} holds half of a character (an unpaired surrogate)")
        if name != "lyrics" and value.strip().casefold() in _NOTHING:
            return None
    if value is None:
        return None
    match name:
        case "caption" | "genre" | "custom_tag":
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise FieldError(f"{_quoted(value)} is no text")
            return " ".join(str(value).split()) or None
        case "lyrics":
            if not isinstance(value, str):
                raise FieldError(f"{_quoted(value)} is no text")
            text = cleaned(value)
            return None if text.strip().casefold() in ("", "n/a", "none", "null") else text
        case "bpm":
            number = _number(value, "tempo; a number of beats per minute is, such as 120")
            bpm = math.floor(number + 0.5)
            if number and not BPM_RANGE[0] <= bpm <= BPM_RANGE[1]:
                raise FieldError(f"a tempo of {number:g} is outside {BPM_RANGE[0]}–{BPM_RANGE[1]}")
            return bpm if number else None
        case "keyscale":
            text = _ENERGY.sub("", str(value).strip())
            if (match := _CAMELOT.match(text)) and 1 <= int(match[1]) <= 12:
                number, letter = int(match[1]), match[2].lower()
                fifths = (number - 8) % 12 if letter in "ab" else number - 1  # 8B and 1d are C major
                return f"{_RELATIVE_MINORS[fifths]} minor" if letter in "am" else f"{_CIRCLE_OF_FIFTHS[fifths]} major"
            match = _KEY.match(text) or _KEY.match(text[:1] + text[1:].casefold())
            if not match:
                raise FieldError(f'{_quoted(value)} is no key; "A minor", "F# major" or "Bbm" is')
            sign, mode = match[2] or "", match[3] or ""
            accidental = "#" if sign in ("♯", "#") or "sharp" in sign else "b" if sign else ""
            is_minor = mode == "m" or mode.casefold() in ("minor", "min", "moll")
            return f"{match[1].upper()}{accidental} {'minor' if is_minor else 'major'}"
        case "timesignature":
            text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
            beats = re.sub(r"[/:](2|4|8|16)$", "", re.sub(r"\s", "", text))
            if isinstance(value, bool) or beats not in TIME_SIGNATURES:
                raise FieldError(f"{_quoted(value)} is no time signature that the model knows (2, 3, 4 or 6)")
            return beats
        case "duration":
            if isinstance(value, str) and (match := _CLOCK.match(value.strip())):
                value = int(match[1] or 0) * 3600 + int(match[2]) * 60 + float(match[3])
            seconds = _number(value, "duration; a number of seconds is")
            if seconds < 0:
                raise FieldError(f"a duration of {seconds:g} seconds is negative")
            return seconds or None
        case "repeat":
            number = _number(value, "number of repeats")
            if not number.is_integer() or not 1 <= number <= 10_000:
                raise FieldError(f"{_quoted(value)} repeats: a whole number from 1 to 10000 is needed")
            return int(number)
    word = str(value).strip().casefold()
    match name:
        case "language" if word in ("instrumental", "und", "zxx", "xxx", "mul", "unk"):
            return None
        case "language" if code := language_code(word):
            return code
        case "language":
            example = "a code such as en, ja or es is"
            raise FieldError(f"{_quoted(value)} is no language that the model knows; {example}")
        case "is_instrumental" if word in ("true", "yes", "y", "1", "on"):
            return True
        case "is_instrumental" if word in ("false", "no", "n", "0", "off"):
            return False
        case "is_instrumental":
            raise FieldError(f"{_quoted(value)} is neither true nor false")
        case "prompt_override" if word in ("caption", "genre"):
            return word
        case "prompt_override":
            raise FieldError(f"{_quoted(value)} is neither caption nor genre")
    raise KeyError(name)


def joined_key(first: Any, second: Any) -> str | None:
    """The key of which one field has the note, or all, and another the mode ("key: A", "scale: minor"), else None."""
    key, mode = (str(word or "").strip() for word in (first, second))
    if _MODE.match(key):
        key, mode = mode, key
    if not key or not _MODE.match(mode):
        return None
    return f"{key} {mode}" if _NOTE.match(key) else key


def fields_of(pairs: Iterable[tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Field → (key, value) of what is written under any names; of several the first counts that says something."""
    found: dict[str, tuple[str, Any]] = {}
    for key, value in pairs:
        name = field_named(key)
        if name == "keyscale" and name in found and (whole := joined_key(found[name][1], value)):
            found[name] = (key, whole)
        elif name and (name not in found or found[name][1] is None or str(found[name][1]).casefold() in _NOTHING):
            found[name] = (key, value)
    return found


def _number(value: Any, what: str) -> float:
    if isinstance(value, str) and (match := _NUMBER.match(value.strip())):
        value = float(match[1].replace(",", "."))
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e12 < value < 1e12:
        raise FieldError(f"{_quoted(value)} is no {what}")
    return float(value)


def _quoted(value: Any) -> str:
    text = str(value)
    return f'"{text if len(text) <= 60 else text[:57] + "…"}"'
