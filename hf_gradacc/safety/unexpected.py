"""What nobody foresaw: one line on the terminal, the traceback in a file to report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from hf_gradacc.text import SECRET_KEY

__all__ = ["DEBUG_VARIABLE", "UNEXPECTED_EXIT_CODE", "explain_unexpected"]

UNEXPECTED_EXIT_CODE = 70
"""``EX_SOFTWARE`` of sysexits.h: neither a failed check (1) nor something to correct (2)."""

DEBUG_VARIABLE = "HF_GRADACC_DEBUG"
"""Set to anything, it lets the traceback appear on the terminal, too."""

_PACKAGES = ("hf_gradacc", "torch", "transformers", "accelerate", "datasets", "peft", "wandb")


def explain_unexpected(error: BaseException, command: Sequence[str]) -> str:
    """Write the traceback of an error into a file, and say in one line where, and what to do.

    Args:
        error: What got out of a command.
        command: The command line; values of keys that look like secrets are not written.

    Returns:
        The line. Without a disk to write to it holds the traceback itself.
    """
    first = next(iter(str(error).strip().splitlines()), "")
    name = type(error).__name__
    what = f"{name}: {first[:200]}" if first else name
    text = _describe(error, command)
    path = _write(text)
    if path is None or os.environ.get(DEBUG_VARIABLE):
        print(text, file=sys.stderr)
    place = "above" if path is None else f"in {path}"
    return (
        f"{what}. This is a fault of hf_gradacc: please report it to its maintainers with the "
        f"traceback {place} ({DEBUG_VARIABLE}=1 shows it here)."
    )


def _describe(error: BaseException, command: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
    shown = [re.sub("=.*", "=...", part) if SECRET_KEY.search(part) else part for part in command]
    trace = "".join(traceback.format_exception(error))
    return (
        f"command: {' '.join(shown)}\n"
        f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}, "
        f"Python {platform.python_version()}, {platform.platform()}\n{versions}\n\n{trace}"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(text: str) -> Path | None:
    """Write into the current folder, or into that of temporary files; None if neither takes it."""
    name = f"gradacc_error_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.txt"
    for folder in (Path.cwd, tempfile.gettempdir):
        try:
            path = Path(folder()) / name
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return path
    return None
