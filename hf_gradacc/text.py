"""Words for people: the nearest name, quantities, durations, texts of others made harmless."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import IO, Any

__all__ = [
    "SECRET_KEY",
    "byte_size",
    "common_length",
    "count_updates",
    "duration",
    "nearest",
    "printable",
    "quantity",
    "write_line",
]

SECRET_KEY = re.compile(r"secret|passw|api_?key|credential|(hub|auth|access)_token", re.IGNORECASE)
"""Names of options whose values are never saved, logged or shown."""

_LONGEST_NAME = 100


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None if nothing comes close.

    >>> nearest("learning_rat", ["learning_rate", "warmup_steps"])
    'learning_rate'
    """
    if len(word) > _LONGEST_NAME:  # comparing texts takes the product of their lengths
        return None
    names = [name for name in choices if len(name) <= _LONGEST_NAME]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    longer = [name for name in names if word and (word in name or name in word)]
    return min(longer, key=len) if longer else None


def byte_size(number: float) -> str:
    """Write a number of bytes in units of 1000.

    >>> byte_size(1_234_567), byte_size(12_340_000_000)
    ('1.23 MB', '12.3 GB')
    """
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def quantity(value: float | None) -> str:
    """Write a number so that it is read at a glance.

    >>> quantity(1_234_567), quantity(0.00005), quantity(2.71828), quantity(64)
    ('1.23M', '5e-05', '2.718', '64')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def count_updates(count: int) -> str:
    """Write a number of updates.

    >>> count_updates(1), count_updates(1_200)
    ('1 update', '1,200 updates')
    """
    return f"{count:,} update{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a time span for people.

    >>> duration(103.4), duration(7_400)
    ('1 min 43 s', '2 h 3 min')
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the elements that two sequences begin with alike.

    >>> common_length("answer", "ankle"), common_length([1, 2], [1, 2, 3])
    (2, 2)
    """
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((index for index, (a, b) in pairs if a != b), shorter)


_JOINERS = "\u200c\u200d"
"""Format characters that letters of some scripts, and emoji, are made with."""


def printable(text: str) -> str:
    """Write what a terminal would act upon as its code; line breaks and tabs stay.

    Use it for every text that others wrote: rows, file names, answers of servers. A row that holds
    an escape sequence could otherwise move the cursor, or write lines that we never said.

    >>> printable("one\\ntwo\\x1b[31m")
    'one\\ntwo\\\\x1b[31m'
    """
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character in "\n\t":
        return character
    # Cc controls, Cf changes the direction of writing, Cs cannot be written at all, Zl and Zp break
    # lines where nothing shows it.
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in _JOINERS):
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character


def write_line(text: str, stream: IO[str]) -> None:
    """Write a line and its end in one piece.

    `print` writes the end by itself. Where output is not buffered (PYTHONUNBUFFERED, as containers
    set it), another thread or rank that writes in between puts its line behind this one.

    Args:
        text: The line, or several.
        stream: Where to.
    """
    stream.write(f"{text}\n")
    stream.flush()
