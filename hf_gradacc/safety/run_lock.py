"""One process at a time trains into a folder.

A POSIX record lock: the system drops it when its process ends, however that happens, and children
do not inherit it. It holds between the hosts of an NFS folder if the server has locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

__all__ = ["LOCK_NAME", "hold_folder"]

LOCK_NAME = ".gradacc_lock"
_BUSY = (errno.EACCES, errno.EAGAIN)
_held: set[Path] = set()
"""Folders that this process holds: a lock is the process's, not the trainer's."""


@contextlib.contextmanager
def hold_folder(folder: str | Path) -> Iterator[str | None]:
    """Hold a folder while a run lasts.

    Yields:
        None if it is held; who holds it if that is another process; "" if nothing can be locked
        there.
    """
    path = Path(folder, LOCK_NAME)
    key = path.absolute()
    if key in _held:  # a run inside a run; a second lock would end with the inner one
        yield None
        return
    if fcntl is None:
        yield ""
        return
    try:
        file, holder = _lock(path)
    except OSError:
        yield ""
        return
    if file is None:
        yield holder
        return
    _held.add(key)
    try:
        yield None
    finally:
        _held.discard(key)
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked, so that nobody's newer file goes
        os.close(file)


def _lock(path: Path) -> tuple[int | None, str]:
    """Lock a file; return its descriptor, or None and who has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(file)
            os.close(file)
            if error.errno in _BUSY:
                return None, holder
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # its holder removed it between our two calls
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %H:%M")}
    os.truncate(file, 0)
    os.pwrite(file, json.dumps(about).encode(), 0)
    return file, ""


def _read_holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
