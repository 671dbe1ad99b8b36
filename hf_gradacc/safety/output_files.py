"""Look whether a file can be written and drawn, before the work that it is the result of."""

from __future__ import annotations

import io
import os
from pathlib import Path

from hf_gradacc.errors import ConfigError

__all__ = ["check_drawing", "check_output", "picture_type"]


def check_output(path: Path, *, option: str) -> None:
    """Look whether a file or a new folder can be written; nothing is made.

    A folder that is not there is no fault if it can be made.

    Args:
        path: Where.
        option: What names it, such as `--html`.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        why = _why_not_written(path)
    except (OSError, ValueError) as error:  # too long a name, or one with a NUL
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if why:
        raise ConfigError(f"{option} = {str(path)!r}: {why}: name another.")


def check_drawing(path: Path, *, option: str) -> None:
    """As `check_output`, for a picture whose type its ending tells; `.png` if it has none.

    Raises:
        ConfigError: If it cannot be written, or matplotlib draws no such type here.
    """
    from matplotlib.figure import Figure  # who draws nothing need not have it

    check_output(path, option=option)
    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "text")
    try:  # a type that is listed may need a program or a package that is not there, as pgf does
        figure.savefig(io.BytesIO(), format=picture_type(path))
    except Exception as error:
        kinds = figure.canvas.get_supported_filetypes()
        common = ", ".join(f".{kind}" for kind in ("png", "svg", "pdf") if kind in kinds)
        known = picture_type(path) in kinds
        why = str(error).splitlines()[0] if known and str(error) else "no type of pictures"
        raise ConfigError(
            f"{option} = {str(path)!r}: {path.suffix} cannot be drawn ({why}): use {common}."
        ) from None


def picture_type(path: Path) -> str:
    """Tell the type of a picture by its ending.

    >>> picture_type(Path("plan.SVG")), picture_type(Path("plan"))
    ('svg', 'png')
    """
    return path.suffix.removeprefix(".").lower() or "png"


def _why_not_written(path: Path) -> str | None:
    if _is_there(path):
        if path.is_dir():
            return "is a folder"
        return None if os.access(path, os.W_OK) else "cannot be written"
    folder = path.parent
    while not _is_there(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
