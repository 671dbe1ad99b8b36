"""Lines of a table end with their text."""

import io

from rich.console import Console
from rich.table import Table

from hf_gradacc.recipe.tables import WithoutBlanks


def print_table(rows, *, width=40, **options):
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(WithoutBlanks(table))
    return console.file.getvalue()


def test_no_line_ends_in_blanks_and_columns_stand_where_they_stood():
    rows = [("a", "long enough", "x"), ("bb", "", ""), ("", "", ""), ("c", "short", "a longer one")]
    assert print_table(rows).split("\n") == [
        "a   long enough  x",
        "bb",
        "",
        "c   short        a longer one",
        "",
    ]


def test_a_text_that_is_wrapped_ends_without_blanks_as_well():
    text = print_table([("a", "one two three four five six"), ("b", "x")], width=14)
    assert text.count("\n") > 3
    assert all(line == line.rstrip() for line in text.split("\n"))


def test_colours_stay():
    assert "\x1b[1mx\x1b[0m" in print_table([("[bold]x[/bold]", "")], force_terminal=True)
