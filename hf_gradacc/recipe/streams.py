"""What a command writes where: lines for people, JSON for programs, nothing but results if asked.

A log file gets no carriage returns: where standard error is no terminal, the bars of every library
are off, and ours are lines (`tracking/progress`, `data/progress`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import IO, Any

from hf_gradacc.text import write_line

__all__ = ["Output", "opened_output"]


class Output:
    """Where a command's results go.

    Args:
        stream: For results; standard output as it was when the command began.
        as_json: Whether results are rows of JSON, and words go elsewhere.
    """

    def __init__(self, stream: IO[str], *, as_json: bool) -> None:
        self._stream = stream
        self.as_json = as_json

    def say(self, text: str) -> None:
        """Write a result for people; nothing if they are written as JSON."""
        if not self.as_json:
            write_line(text, self._stream)

    def row(self, values: Mapping[str, Any]) -> None:
        """Write a result for programs, as one line; nothing unless that was asked for."""
        if self.as_json:
            write_line(json.dumps(values, default=str, allow_nan=False), self._stream)


@contextlib.contextmanager
def opened_output(
    *, quiet: bool = False, as_json: bool = False, timestamps: bool = False
) -> Iterator[Output]:
    """Arrange standard output and error for a command, and put both back.

    Args:
        quiet: Write results, warnings and errors, nothing else.
        as_json: Write results as lines of JSON to standard output, everything else to standard
            error.
        timestamps: Begin each line for people with the local time.
    """
    before = sys.stdout, sys.stderr
    results, errors = before
    with contextlib.ExitStack() as stack:
        stack.callback(_put_back, before)
        for name, wanted in (
            ("TQDM_DISABLE", quiet or timestamps or not errors.isatty()),
            ("HF_HUB_DISABLE_PROGRESS_BARS", quiet or timestamps or not errors.isatty()),
            ("WANDB_SILENT", quiet),
        ):
            if wanted and name not in os.environ:  # read when their libraries are imported
                os.environ[name] = "1"
                stack.callback(os.environ.pop, name, None)
        if (
            not sys.warnoptions
        ):  # they are about other people's code, which a command's user has not
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)
        words: IO[str] = errors if as_json else results
        if quiet:
            from hf_gradacc.safety.waiting import silenced

            stack.enter_context(silenced())
            words = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
        if timestamps:
            words, errors = _stamped(words), _stamped(errors)
            results = results if as_json else _stamped(results)
        sys.stdout, sys.stderr = words, errors
        yield Output(results, as_json=as_json)


def _put_back(streams: tuple[IO[str], IO[str]]) -> None:
    sys.stdout, sys.stderr = streams


class _Stamped:
    """A stream whose lines begin with the time at which each was begun."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._at_begin = True

    def write(self, text: str) -> int:
        """Write a text, with the time before each of its lines."""
        stamped = ""
        for line in text.splitlines(keepends=True):
            stamp = time.strftime("%Y-%m-%d %H:%M:%S ") if self._at_begin else ""
            stamped += stamp + line
            self._at_begin = line.endswith("\n")
        self._stream.write(stamped)
        return len(text)

    def isatty(self) -> bool:
        """Whether bars may be drawn: they would not stay behind a time."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stamped(stream: IO[str]) -> Any:
    return _Stamped(stream)
