"""The page for people who come from elsewhere says what the code does, and names what holds it."""

import itertools
import re
from pathlib import Path

import pytest

from hf_gradacc.elsewhere.axolotl import AXOLOTL
from hf_gradacc.elsewhere.llamafactory import LLAMAFACTORY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "elsewhere.md").read_text("utf-8")


def rows_of(table):
    """The rows of a table of keys: neighbours of one target, then those without one."""
    with_target = [(name, key) for name, key in table.items() if key.target]
    for target, group in itertools.groupby(with_target, lambda pair: pair[1].target):
        names = ", ".join(f"`{name}`" for name, _ in group)
        yield f"| {names} | `{target}` |"
    left = [(name, key) for name, key in table.items() if not key.target]
    whys = dict.fromkeys((key.why, key.changes) for _, key in left)
    for why, changes in whys:
        names = ", ".join(f"`{n}`" for n, key in left if (key.why, key.changes) == (why, changes))
        said = why or "said with the keys beside it"
        yield f"| {names} | – ({'**differs**: ' if changes else ''}{said}) |"


@pytest.mark.parametrize(("heading", "table"), [
    ("Axolotl", AXOLOTL), ("LLaMA-Factory", LLAMAFACTORY)
])  # fmt: skip
def test_the_tables_of_keys_are_those_of_the_code(heading, table):
    part = PAGE.split(f"### Keys of {heading}\n")[1].split("\n#")[0]
    shown = [line for line in part.splitlines() if line.startswith("| `")]
    assert shown == list(rows_of(table))


def features():
    part = PAGE.split("## What the others have")[1]
    lines = [line for line in part.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_each_feature_of_ours_is_held_by_a_test_that_exists():
    assert len(features()) >= 12
    for feature, ours, *_, held_by in features():
        if ours == "–":
            assert held_by == "", feature
            continue
        found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", held_by)
        assert found, f"{feature}: {held_by}"
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text("utf-8"), held_by


def test_the_table_of_features_says_when_and_where_others_were_read():
    part = PAGE.split("## What the others have")[1]
    assert re.search(r"\b2026-11-\d\d\b", part)
    for feature, *cells in features():
        assert len(cells) == 7, feature
        assert all(cells[:-1]), f"{feature} leaves a cell empty"
