"""Run case after case of a long sweep: a log to go on from, a time limit, progress on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from support import zoo

__all__ = ["group_of", "number", "quiet", "say", "sweep"]

SECONDS_PER_CASE = 90

Result = TypeVar("Result")


def sweep(
    cases: Iterable[zoo.Case],
    log: Path | None,
    *,
    measure: Callable[[zoo.Case], Result],
    result: Callable[..., Result],
    line: Callable[[Result], str],
) -> list[Result]:
    """Measure every case that the log does not hold already.

    Args:
        cases: What to run.
        log: A file of JSON lines; None for none.
        measure: Runs one case.
        result: The dataclass it returns: of a case, a verdict and a note.
        line: What to print of a result at once, empty for nothing.

    Returns:
        The results of the log, and then those measured now.
    """
    cases = list(cases)
    results = _read(log, result)
    done = {found.case for found in results}  # type: ignore[attr-defined]
    started = time.monotonic()
    for i, case in enumerate(case for case in cases if case not in done):
        try:
            with _time_limit(SECONDS_PER_CASE), contextlib.redirect_stdout(io.StringIO()):
                found = measure(case)
        except TimeoutError:
            found = result(case, "not run", note=f"longer than {SECONDS_PER_CASE} s")
        results.append(found)
        if log:
            with log.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(found)) + "\n")  # type: ignore[call-overload]
        if told := line(found):
            print(told, flush=True)
        if i % 50 == 49:
            took = time.monotonic() - started
            print(f"... {len(results)} of {len(cases)}, {took:.0f} s", file=sys.stderr, flush=True)
    return results


def quiet() -> None:
    """One thread, and nothing of what libraries have to say about models of random weights."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_gradacc").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def group_of(case: zoo.Case) -> str:
    """Name the line of a table that a case belongs to."""
    return case.head + (", router loss on" if case.router_loss else "")


def number(value: float | None, form: str = ".1e") -> str:
    """Write a figure that may be missing."""
    return "–" if value is None else f"{value:{form}}"


def say(error: Exception) -> str:
    """Write an error in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def _read(log: Path | None, result: Callable[..., Any]) -> list[Any]:
    if log is None or not log.exists():
        return []
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [result(**{**row, "case": zoo.Case(**row["case"])}) for row in rows]


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
