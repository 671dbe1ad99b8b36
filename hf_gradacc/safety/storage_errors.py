"""Tell a disk that cannot be written from a fault of the program, by number and by place.

Python's own errors carry the system's number. Libraries in Rust (safetensors, tokenizers) end their
text with it. torch's writer in C++ keeps none: it says "Parent directory does not exist" on a disk
that has become read-only, and "unexpected pos" on a full one. So an error that comes out of it
counts, and the folder is written to, once, to learn the number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_errno", "find_storage_fault"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_NUMBERS = {*_FULL, *_GONE, *_CLOSED, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}
_IN_RUST = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)\b")
_PROBE_BYTES = 2**20


def find_storage_fault(error: BaseException, folder: str | Path | None = None) -> str | None:
    """Return what the disk said to a write that failed; None if the error is of another kind.

    Args:
        error: What writing raised.
        folder: Where it wrote. It is written to if the error says nothing of its cause.

    >>> find_storage_fault(OSError(28, "No space left on device"))
    'No space left on device (ENOSPC)'
    >>> find_storage_fault(ValueError("a pen that cannot write")) is None
    True
    """
    number = find_errno(error)
    if number is not None and number in _NUMBERS:
        return _described(number)
    fault = None if folder is None else _probe(Path(folder))
    if fault is None and any(_is_of_torchs_writer(link) for link in _chain(error)):
        return f"torch could not write: {error}"
    return fault


def find_errno(error: BaseException) -> int | None:
    """Return the system's number of an error, or of the first it came from that has one.

    >>> find_errno(RuntimeError("I/O error: No space left on device (os error 28)"))
    28
    """
    numbers = (_number_of(link) for link in _chain(error))
    return next((number for number in numbers if number is not None), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    is_of_rust = type(error).__module__ != "builtins" or type(error) is RuntimeError
    found = _IN_RUST.search(str(error)) if is_of_rust else None
    return None if found is None else int(found[1] or found[2])


def _is_of_torchs_writer(error: BaseException) -> bool:
    """Return whether an error was raised below ``torch.save``, with no Python in between."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if type(error) is not RuntimeError or trace is None:
        return False
    return bool(trace.tb_frame.f_globals.get("__name__") == "torch.serialization")


def _probe(folder: Path) -> str | None:
    """Write a file, wait until it is on the disk, delete it; return why that failed."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    file = folder / f".gradacc-probe-{uuid.uuid4().hex}"
    try:
        with file.open("wb") as opened:
            opened.write(bytes(_PROBE_BYTES))
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        return _described(error.errno or errno.EIO)
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    return None


def _described(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
