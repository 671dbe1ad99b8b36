"""Tables of words on a terminal or in a log."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table

__all__ = ["WithoutBlanks"]


@dataclass(frozen=True)
class WithoutBlanks:
    """A table whose lines end with their text: rich fills the last column with blanks.

    Attributes:
        table: What to print.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table's lines, each without the blanks at its end."""
        for line in console.render_lines(self.table, options, pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            yield from line[:-1]
            for text, style, control in line[-1:]:
                yield Segment(text.rstrip(), style, control)
            yield Segment.line()
