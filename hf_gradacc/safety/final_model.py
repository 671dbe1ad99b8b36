"""A model saved outside of checkpoints: written aside, then moved into its folder file by file.

The folder may hold much else: checkpoints, logs, what a user put there. So it cannot be renamed as
a whole. The new files are written aside and flushed; a rename says that they are complete; only
then do they take the places of the old ones. A process that is killed before the rename leaves the
old model, one that is killed after it leaves moves that the next start, or save, completes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["complete_model", "written_aside"]

_LIST = ".model-files"
_WRITING, _COMPLETE = ".model-being-saved", ".model-complete"
_WEIGHTS = re.compile(
    r"(adapter_|pytorch_|)model(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?"
)
_INDEX = re.compile(r".*\.index\.json")


@contextlib.contextmanager
def written_aside(
    folder: str | Path, *, is_mover: bool, is_first_here: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """Give a folder to save a model into, whose files then move to where they belong.

    Args:
        folder: Where the model belongs; what else is there stays.
        is_mover: Whether this process moves the files.
        is_first_here: Whether it moves those that the mover cannot see, on a disk of this machine.
        wait: Returns once all processes that write have come as far.
    """
    folder = Path(folder)
    staged = folder / _WRITING
    if is_mover:
        complete_model(folder)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    wait()
    try:
        yield staged
    except BaseException:
        if is_mover:
            shutil.rmtree(staged, ignore_errors=True)
        raise
    wait()
    if is_mover:
        _move(staged)
    wait()
    if is_first_here and staged.is_dir():
        _move(staged)


def _move(staged: Path) -> None:
    files = [path for path in staged.rglob("*") if path.is_file()]
    (staged / _LIST).write_text("\n".join(path.name for path in files), "utf-8")
    for path in (*files, staged / _LIST):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staged.rename(staged.parent / _COMPLETE)
    complete_model(staged.parent)


def complete_model(folder: str | Path) -> None:
    """Complete the moves of a model whose files are complete; nothing to do if there is none."""
    folder = Path(folder)
    complete = folder / _COMPLETE
    if not complete.is_dir():
        return
    # The moves may have begun before.
    names = set((complete / _LIST).read_text("utf-8").split("\n"))
    files = [path for path in complete.rglob("*") if path.is_file() and path.name != _LIST]
    # An index is read before the files it lists, so it moves when they are there.
    files.sort(key=lambda path: (_INDEX.fullmatch(path.name) is not None, str(path)))
    for path in files:
        place = folder / path.relative_to(complete)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    kinds = {found[1] for name in names if (found := _WEIGHTS.fullmatch(name))}
    for old in folder.iterdir():  # weights in other pieces, which would be read instead of these
        found = _WEIGHTS.fullmatch(old.name)
        if found is not None and found[1] in kinds and old.name not in names:
            old.unlink()
    shutil.rmtree(complete, ignore_errors=True)
