"""A small disk of its own, to be filled for real."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def why_no_disk() -> str | None:
    """Say why no file system can be mounted here, None if one can."""
    if shutil.which("unshare") is None:
        return "there is no unshare"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return tried.stderr.strip() or None if tried.returncode else None


@contextlib.contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """Mount a file system of that size; it is gone when the context ends."""
    folder.mkdir()
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Ballast(TrainerCallback):
    """Fills a disk before one update, to the last byte, and frees it before another."""

    def __init__(self, disk: Path, *, full_from: int, free_from: int | None = None) -> None:
        self.file, self.full_from, self.free_from = disk / "ballast", full_from, free_from

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        update = state.global_step + 1
        if update == self.full_from:
            with self.file.open("wb", buffering=0) as file:
                for size in (65536, 1):
                    with contextlib.suppress(OSError):
                        while file.write(b"x" * size):
                            pass
        if update == self.free_from:
            self.file.unlink()
