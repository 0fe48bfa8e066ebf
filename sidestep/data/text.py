"""The bytes of a text file into text, whatever encoding an editor saved it in.

UTF-8, UTF-16 and UTF-32 are told by their byte order marks, their validity or their zeros. For anything else
charset-normalizer says in which encodings the bytes can be text at all; a few lines of lyrics are too little for its
measure of language to decide, so among those the encoding counts whose text holds the fewest unusual words.
"""

import codecs
import re
import stat
from contextlib import suppress
from pathlib import Path

from charset_normalizer import from_bytes

from sidestep.words import size

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_GUESSED = {  # what editors save in where they do not save in Unicode, in words; of equals the first counts
    "cp1252": "Latin-1",
    "cp1251": "Cyrillic (Windows)",
    "cp932": "Japanese (Shift JIS)",
    "gb18030": "Chinese (GBK)",
    "big5": "Chinese (Big5)",
    "cp949": "Korean (EUC-KR)",
    "euc_jp": "Japanese (EUC)",
    "koi8_r": "Cyrillic (KOI8-R)",
    "cp1250": "Central European (Windows)",
    "cp1253": "Greek (Windows)",
    "cp1254": "Turkish (Windows)",
    "cp1255": "Hebrew (Windows)",
    "cp1256": "Arabic (Windows)",
    "cp874": "Thai (Windows)",
    "cp1257": "Baltic (Windows)",
    "cp1258": "Vietnamese (Windows)",
}
_LATIN = frozenset({"cp1252", "cp1250", "cp1254", "cp1257", "cp1258"})
_HAN_ROWS = {  # two bytes between which a character set keeps the ideographs and syllables in daily use
    "cp932": ("shift_jis", b"\x88\x9f", b"\x98\x72"),
    "euc_jp": ("euc_jp", b"\xb0\xa1", b"\xcf\xd3"),
    "gb18030": ("gb2312", b"\xb0\xa1", b"\xd7\xf9"),
    "big5": ("big5", b"\xa4\x40", b"\xc6\x7e"),
    "cp949": ("euc_kr", b"\xb0\xa1", b"\xc8\xfe"),
}
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_KANA = re.compile("[\u3041-\u30ff]")
_BETWEEN_WORDS = re.compile(r"[\s!-/:-@\[-`{-~«»‹›„“”‚‘’´…–—¿¡]+")
_MOST_CONTROLS = 0.1  # of all characters: more of them is no text, though it may be valid UTF-8
_MOST_UNUSUAL = 0.5  # of all words beyond ASCII: what has more of them was not written in that encoding
_LEAST_VALID = 2  # letters that are valid UTF-8 for each byte that is not: chance makes fewer
_JUDGED_BYTES = 1 << 16  # what is looked at to tell an encoding: of a list of megabytes that is enough
UNREADABLE = "is in no encoding that can be told and was not read; save it as UTF-8"


def is_text(value: str) -> bool:
    """Whether a string holds no half of a surrogate pair, which no file can keep as UTF-8."""
    return value.encode("utf-8", "ignore") == value.encode("utf-8", "surrogatepass")


def read_text(path: Path, limit: int) -> tuple[str, str | None]:
    """(text, problem) of a file, as `decode_text` gives it.

    Only a regular file is opened, for a pipe or a device may never end, and one of more than `limit` bytes is not read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return "", f"is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file, and was not read"
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        return "", f"cannot be read: {error.strerror or error}"
    if len(data) > limit:
        return "", f"is larger than {size(limit)} and was not read"
    return decode_text(data)


def decode_text(data: bytes) -> tuple[str, str | None]:
    """(text, problem). A guessed encoding is a problem that names it; bytes that are no text give "" and UNREADABLE."""
    text, problem = _decode_marked(data) or _guess(data)
    if len(_CONTROLS.findall(text)) > max(_MOST_CONTROLS * len(text), 1):
        return "", UNREADABLE
    return text, problem


def _decode_marked(data: bytes) -> tuple[str, str | None] | None:
    """(text, problem) of bytes that say or prove that they are Unicode."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decode_damaged(data[len(mark) :], encoding)
    candidates = ["utf-8"]
    for encoding, zeros in (("utf-16-le", data[1::2]), ("utf-16-be", data[0::2])):
        if len(data) > 1 and len(data) % 2 == 0 and zeros.count(0) > 0.6 * len(zeros):
            candidates.insert(0, encoding)
    for encoding in candidates:
        try:
            return data.decode(encoding), None
        except UnicodeDecodeError:
            continue
    damaged = _decode_damaged(data, "utf-8")
    own_letters = sum(not c.isascii() for c in damaged[0])
    lost = len(data) - len(damaged[0].encode())
    return damaged if own_letters >= _LEAST_VALID * lost else None


def _decode_damaged(data: bytes, encoding: str) -> tuple[str, str | None]:
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError:
        problem = f"is damaged {encoding.upper()}; what could not be read was left out"
        return data.decode(encoding, "ignore"), problem


def _guess(data: bytes) -> tuple[str, str | None]:
    """(text, problem) in the encoding in which the text has the fewest unusual words."""
    judged = data
    if len(data) > _JUDGED_BYTES:
        judged = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
        judged = judged[: max(judged.rfind(b"\n", 0, _JUDGED_BYTES), 0) or _JUDGED_BYTES]
    found = from_bytes(judged, cp_isolation=list(_GUESSED), enable_fallback=False)
    doubts = {name: m.chaos - m.coherence / 4 for m in found for name in (m.encoding, *m.could_be_from_charset)}
    if doubts:
        doubts.setdefault("cp1252", 0.1)  # a few typographic marks and nothing else are too little for the library
    readings = []
    for place, (encoding, called) in enumerate(_GUESSED.items()):
        with suppress(UnicodeDecodeError):
            if encoding in doubts:
                text = data.decode(encoding)
                unusual = _unusual(judged.decode(encoding, "ignore"), encoding)
                readings.append((unusual + doubts[encoding], place, called, unusual, text))
    _, _, called, unusual, text = min(readings, default=(0, 0, "", 1.0, ""))
    if unusual > _MOST_UNUSUAL:
        return "", UNREADABLE
    return text, f"is no UTF-8 and was read as {called}; if letters look wrong, save it as UTF-8"


def _unusual(text: str, encoding: str) -> float:
    """The share of unusual words (characters where writing has no spaces) among those beyond ASCII."""
    if encoding in _HAN_ROWS:
        name, first, last = _HAN_ROWS[encoding]
        letters = [c for c in text if c > "\x7f" and c.isalpha()]
        kana = len(_KANA.findall(text))
        if (name in ("shift_jis", "euc_jp")) != bool(kana):
            return 1.0
        usual = sum(first <= c.encode(name, "ignore") <= last for c in letters)
        return 1 - (usual + 1.2 * kana) / max(len(letters), 1)  # kana is a proof, where ideographs may be a chance
    words = [word for word in _BETWEEN_WORDS.split(text) if not word.isascii() and any(map(str.isalpha, word))]
    unusual = 0.0
    for word in words:
        own_letters = sum(not c.isascii() for c in word)
        has_case = word.lower() != word.upper()
        if not word.isalpha():  # a sign in the middle of a word
            unusual += 1
        elif encoding in _LATIN:
            unusual += len(word) > 3 and own_letters > len(word) / 2  # hardly anything but accents
        elif own_letters < len(word):  # two scripts in one word
            unusual += 1
        elif has_case and not (word.islower() or word.istitle()):
            unusual += 0.25 if word.isupper() else 1
    return unusual / max(len(words), 1)
