"""The examples of the documentation, run from top to bottom."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text())


def examples(page):
    """The page's examples with the line each begins in; one may say what it needs."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        source = match.group(1)
        needs = re.match(r"# needs (\w+)\n", source)
        if needs is None or importlib.util.find_spec(needs.group(1)) is not None:
            yield text[: match.start(1)].count("\n"), source


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Dataclasses, and checkpoints that pickle them, look for the module they are in.
    module = types.ModuleType("examples")
    monkeypatch.setitem(sys.modules, "examples", module)
    ran = 0
    for line, source in examples(page):
        exec(compile("\n" * line + source, str(page), "exec"), vars(module))
        ran += 1
    assert ran >= page.read_text().count("```python") - page.read_text().count("# needs ")


def test_the_page_on_subclassing_is_among_them():
    assert "subclassing.md" in [page.name for page in PAGES]
    assert len(list(examples(DOCS / "subclassing.md"))) >= 10
