"""Results of a run of the suite: JSON lines, and one page of Markdown made of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.speed_page import speed_section

__all__ = ["Result", "Results", "page"]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Result:
    """What became of one check.

    Attributes:
        check: Its name.
        status: "passed", "failed" or "skipped".
        seconds: It took.
        detail: Why it failed or was skipped.
        figures: What it measured.
    """

    check: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


class Results:
    """Results on the disk: each is there before the next check begins.

    Args:
        folder: Gets ``results.jsonl`` and ``results.md``; what an earlier run left is replaced.
        title: The first line of the page.
    """

    def __init__(self, folder: Path, *, title: str) -> None:
        self.folder = folder
        self.title = title
        self.found: list[Result] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.jsonl").write_text("")
        self._write_page()

    def add(self, result: Result) -> None:
        """Write a result down, and the page anew."""
        self.found.append(result)
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._write_page()

    def counts(self) -> Counter[str]:
        """Count results by status."""
        return Counter(result.status for result in self.found)

    def _write_page(self) -> None:
        target = self.folder / "results.md"
        fresh = target.with_suffix(".new")
        fresh.write_text(page(self.title, self.found))
        fresh.replace(target)


def page(title: str, results: list[Result]) -> str:
    """Render results as Markdown: counts, the machine, what failed, the speed table, all checks."""
    count = Counter(result.status for result in results)
    machine = next((r.figures for r in results if r.check == "machine"), {})
    parts = [
        f"# {title}",
        ", ".join(f"{count[status]} {status}" for status in (PASSED, FAILED, SKIPPED)) + ".",
    ]
    if machine:
        parts.append(", ".join(f"{key} {value}" for key, value in machine.items()) + ".")
    failed = [result for result in results if result.status == FAILED]
    if failed:
        parts.append("## Failed")
        parts += [f"- `{r.check}`: {_one_line(r.detail)}" for r in failed]
    if section := speed_section({r.check: r.figures for r in results if r.status == PASSED}):
        parts.append(section)
    lines = ["| check | result | s | figures, or why not |", "|---|---|---|---|"]
    for r in results:
        if r.check == "machine":
            continue
        told = _one_line(r.detail) if r.status != PASSED else _figures(r.figures)
        lines.append(f"| {r.check} | {r.status} | {r.seconds:.1f} | {told} |")
    parts += ["## All checks", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _figures(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in figures.items())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "/")


def _one_line(text: str, *, most: int = 300) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= most else line[:most] + " ..."
