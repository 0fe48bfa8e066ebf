"""Text files as people's editors leave them."""

import codecs

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(data: bytes) -> tuple[str, str | None]:
    """(text, problem). UTF-8 with or without byte order mark, UTF-16 and UTF-32 with one, UTF-16 without one where every other byte is zero.

    Anything else is read as Windows' and ISO's Latin-1, which cannot fail but may be wrong: the problem says so.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding), None
            except UnicodeDecodeError:
                return data[len(mark) :].decode(encoding, errors="replace"), f"is damaged {encoding.upper()}; what could not be read was replaced"
    try:
        text = data.decode("utf-8")
        if "\0" not in text:
            return text, None
    except UnicodeDecodeError:
        text = None
    for encoding, zeros in (("utf-16-le", data[1::2]), ("utf-16-be", data[0::2])):
        if len(data) > 1 and len(data) % 2 == 0 and zeros.count(0) > 0.6 * len(zeros):
            try:
                return data.decode(encoding), None
            except UnicodeDecodeError:
                continue
    if text is not None:
        return text, None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text, "is no UTF-8 and was read as Latin-1; if letters look wrong, save it as UTF-8"
