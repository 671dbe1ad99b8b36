"""Two pages of the site are made from other files, so that what they hold is said once.

The README is the home page, and the table of options is read from ``hf_gradacc/arguments.py``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in a page that is made from another file; called by mkdocs for each page."""
    if page.file.src_uri == "index.md":
        return read_home()
    if page.file.src_uri == "options.md":
        return markdown.replace("{options}", list_options())
    return markdown


def read_home() -> str:
    """Read the README, with its links into ``docs/`` made links between pages."""
    return (
        (ROOT / "README.md")
        .read_text("utf-8")
        .replace("](docs/", "](")
        .replace("](CONTRIBUTING.md", "](contributing.md")
        .replace("](CHANGELOG.md", "](changelog.md")
    )


def list_options() -> str:
    """Make a table of the fields of ``GradAccOptions`` from its source: name, default, meaning."""
    tree = ast.parse((ROOT / "hf_gradacc" / "arguments.py").read_text("utf-8"))
    fields = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "GradAccOptions"
    )
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in fields:
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in field.value.keywords}
            meaning = ast.literal_eval(given["metadata"])["help"]
            name, default = ast.unparse(field.target), ast.unparse(given["default"])
            rows.append(f"| `{name}` | `{default}` | {meaning} |")
    return "\n".join(rows)
