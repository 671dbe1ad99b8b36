"""Run groups of checks in processes of their own, each with a limit, inside of a time budget."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CORRECTNESS, SPEED, Check
from benchmarks.gpu.results import FAILED, SKIPPED, Result

__all__ = ["NO_DEVICE", "NoDeviceError", "run_checks"]

NO_DEVICE = 76
"""Exit code of a worker that finds no device of the kind it was asked for."""

_SECONDS_TO_BEGIN = 240.0
_SECONDS_TO_END = 15.0
_POLL_SECONDS = 0.1
_TAIL_BYTES = 1500


class NoDeviceError(Exception):
    """There is no device of the kind the checks are for."""


def run_checks(
    checks: Sequence[Check],
    *,
    make_command: Callable[[Sequence[str], Path], Sequence[str]],
    record: Callable[[Result], None],
    folder: Path,
    seconds: float,
    jobs: int,
    environment: dict[str, str],
) -> None:
    """Run all checks, and record one result for each, whatever becomes of it.

    Args:
        checks: In the order of their importance.
        make_command: Makes the command line of a worker, from names of checks and the file that
            it writes its lines to.
        record: Takes each result as soon as it is known.
        folder: For the files and logs of workers.
        seconds: All that there is. The first phase leaves the second its share.
        jobs: Groups of the first phase that run side by side; in the second each is alone.
        environment: Of the workers.

    Raises:
        NoDeviceError: If a worker finds no device.
    """
    began = time.monotonic()
    phases = sorted({check.phase for check in checks})
    for phase in phases:
        of_phase = [check for check in checks if check.phase == phase]
        share = 0.55 if phase == CORRECTNESS and SPEED in phases else 1.0
        groups: dict[str, list[Check]] = {}
        for check in of_phase:
            groups.setdefault(check.group, []).append(check)
        waiting = [
            _Group(name, found, make_command, record, folder, environment)
            for name, found in groups.items()
        ]
        _run_phase(waiting, until=began + share * seconds, jobs=jobs if phase == CORRECTNESS else 1)


def _run_phase(waiting: list[_Group], *, until: float, jobs: int) -> None:
    running: list[_Group] = []
    try:
        while waiting or running:
            if time.monotonic() >= until:
                for group in [*running, *waiting]:
                    group.give_up("the time of the suite had run out")
                return
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
            for group in running:
                group.advance()
            running = [group for group in running if not group.is_done]
            time.sleep(_POLL_SECONDS)
    except BaseException as error:
        for group in [*running, *waiting]:
            group.give_up(f"the suite was ended ({type(error).__name__})")
        raise


class _Group:
    """The checks of one group that have no result yet, and the process they run in."""

    def __init__(
        self,
        name: str,
        checks: list[Check],
        make_command: Callable[[Sequence[str], Path], Sequence[str]],
        record: Callable[[Result], None],
        folder: Path,
        environment: dict[str, str],
    ) -> None:
        self.pending = list(checks)
        self._name = name
        self._make_command = make_command
        self._record = record
        self._folder = folder
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = folder / f"{name}.jsonl"
        self._log = folder / f"{name}.log"
        self._read = 0
        self._current: Check | None = None
        self._since = 0.0

    @property
    def is_done(self) -> bool:
        """Whether every check has a result and the process is gone, with what it held."""
        return not self.pending and self._process is None

    def advance(self) -> None:
        """Take in what the process has told; start one where there is none, end one that hangs."""
        if self._process is None:
            self._start()
            return
        ended = self._process.poll()  # first: what is read afterwards is then all there is
        self._take_in()
        if ended is not None:
            self._end(ended)
            return
        limit = self._current.seconds if self._current else _SECONDS_TO_BEGIN
        if not self.pending:
            if time.monotonic() - self._since > _SECONDS_TO_END:
                self._kill()
        elif time.monotonic() - self._since > limit:
            self._kill()
            what = "took longer than" if self._current else "its process did not begin within"
            self._fail(f"{what} {limit:.0f} s")

    def give_up(self, why: str) -> None:
        """End the process; every check without a result is skipped."""
        if self._process is not None:
            self._kill()
            self._take_in()
        for check in self.pending:
            ran = time.monotonic() - self._since if check is self._current else 0.0
            told = f"{why} while it ran" if check is self._current else why
            self._record(Result(check.name, SKIPPED, ran, told))
        self.pending = []

    def _start(self) -> None:
        names = [check.name for check in self.pending]
        self._lines.write_text("")
        self._read = 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._make_command(names, self._lines),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._current, self._since = None, time.monotonic()

    def _take_in(self) -> None:
        with self._lines.open("rb") as file:
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return
        self._read += len(whole) + 1
        for line in whole.splitlines():
            told: dict[str, Any] = json.loads(line)
            check = next((c for c in self.pending if c.name == told["check"]), None)
            if check is None:
                continue
            self._since = time.monotonic()
            if "status" not in told:
                self._current = check
                continue
            self._current = None
            self.pending.remove(check)
            self._record(Result(**told))

    def _end(self, code: int) -> None:
        self._process = None
        if code == NO_DEVICE:
            raise NoDeviceError(self._tail())
        if not self.pending:
            return
        if self._current is not None or (code != 0 and not self._read):
            self._fail(f"its process ended with {code}: {self._tail()}")
        elif code == 0:  # a worker that leaves checks out would be started for ever
            for check in self.pending:
                self._record(Result(check.name, FAILED, detail="its process left it out"))
            self.pending = []

    def _fail(self, why: str) -> None:
        """Fail the check that ran, or the next one; the others get another process."""
        check = self._current or self.pending[0]
        self._current = None
        self.pending.remove(check)
        self._record(Result(check.name, FAILED, time.monotonic() - self._since, why))

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _tail(self) -> str:
        data = self._log.read_bytes()[-_TAIL_BYTES:] if self._log.exists() else b""
        lines = data.decode(errors="replace").strip().splitlines()
        return " / ".join(lines[-4:])
