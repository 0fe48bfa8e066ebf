"""Lyrics with time marks, as in .lrc files: `[01:23.45] words`."""

import re

TIME_MARK = re.compile(r"[\[<]\d{1,3}:[0-5]?\d(?:[.:]\d{1,3})?[\]>][ \t]?")


def without_time_marks(lyrics: str) -> str:
    """The words alone: marks are for cutting lyrics to a window and never occur in what a user types at inference."""
    return TIME_MARK.sub("", lyrics)
