"""Result files: benchmarks/results/<theme>_<hardware>_<date>.md, with their command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def hardware() -> str:
    """The accelerator or the CPU, in a few words."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found[1] if found else name
    return f"{os.cpu_count()}-core {name}"


def machine() -> str:
    parts = [hardware(), f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "accelerate", "trl"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_result(theme: str, head: str, sections: Sequence[str], *, notes: str = "") -> Path:
    """Write a result file and say where it is."""
    kind = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()}cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    command = "python " + shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    path = RESULTS / f"{theme}_{slug}_{date}.md"
    body = [f"# {theme}", f"    {command}", head, *sections, notes]
    RESULTS.mkdir(exist_ok=True)
    path.write_text("\n\n".join(part for part in body if part) + "\n")
    print(f"written to {path}")
    return path
