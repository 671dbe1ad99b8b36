"""`hf-gradacc plan --show-rows`: prepared rows as the loss sees them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from hf_gradacc.data.section import Task
from hf_gradacc.text import printable
from hf_gradacc.tracking.preview import BETWEEN, REJECTED, RowPreview, preview_row

__all__ = ["has_colour", "make_visible", "show_rows"]

TARGET_STYLE = "bold green"
_BLANKS = re.compile(r"^ +| +$| {2,}", re.MULTILINE)


def show_rows(
    rows: Any,
    *,
    num_rows: int,
    tokenizer: Any,
    task: Task,
    label_names: Sequence[str] = (),
    console: Console,
) -> None:
    """Print the first prepared rows with their targets marked.

    Colour marks targets on a terminal, ⟦ and ⟧ where there is no colour.

    Args:
        rows: Prepared rows; a stream is read from its beginning, and can be read again.
        num_rows: How many.
        tokenizer: Turns tokens back into text.
        task: What a target is.
        label_names: Classification: the classes in order of their ids.
        console: Where to print.
    """
    console.print(f"\n[bold]The first rows[/bold], targets {_legend(console)}")
    names = dict(enumerate(label_names))
    for number, row in enumerate(itertools.islice(iter(rows), num_rows), start=1):
        shown = preview_row(
            row, tokenizer=tokenizer, is_seq2seq=task == "seq2seq", label_names=names
        )
        if shown is None:
            continue
        counts = f"{shown.num_inputs:,} input tokens, {shown.num_targets or 0:,} targets"
        console.print(f"row {number}: {counts}", style="dim", highlight=False)
        console.print(_draw(shown, has_colour(console)), soft_wrap=True, highlight=False)


def has_colour(console: Console) -> bool:
    """Whether colour reaches whoever reads it."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def make_visible(text: str) -> str:
    """Show blanks that are easily missed, and keep every control character from the terminal.

    A line break is ⏎ and a line break, a tab ⇥; blanks at the ends of a line, and several in a row,
    are dots. Everything else that a terminal would act upon is written as its code.

    >>> make_visible("  two  words\\tand\\x1b[31m")
    '··two··words⇥and\\\\x1b[31m'
    """
    dotted = _BLANKS.sub(lambda found: "·" * len(found[0]), text)
    return printable(dotted).replace("\n", "⏎\n").replace("\t", "⇥")


def _draw(shown: RowPreview, coloured: bool) -> Text:
    drawn = Text()
    for piece in shown.pieces:
        text = piece.text if piece.text in (BETWEEN, REJECTED) else make_visible(piece.text)
        if piece.is_target and not coloured:
            drawn.append(f"⟦{text}⟧")
        else:
            drawn.append(text, style=TARGET_STYLE if piece.is_target else None)
    return drawn


def _legend(console: Console) -> str:
    return f"[{TARGET_STYLE}]in this colour[/]" if has_colour(console) else "in ⟦ ⟧"
