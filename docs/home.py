"""The README is the home page: its links into `docs/` are made links between pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Take the README for the page that holds its place; called by mkdocs for each page."""
    if page.file.src_uri != "index.md":
        return markdown
    readme = Path(page.file.abs_src_path).parents[1] / "README.md"
    return (
        readme.read_text("utf-8")
        .replace("](docs/", "](")
        .replace("](CONTRIBUTING.md", "](contributing.md")
        .replace("](CHANGELOG.md", "](changelog.md")
    )
