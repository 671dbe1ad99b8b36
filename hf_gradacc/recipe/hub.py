"""Say so when the hub does not answer: its libraries retry for minutes without a word."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hf_gradacc.safety.waiting import TellOfWait

__all__ = ["telling_of_hub"]

TELL_AFTER_SECONDS = 15.0

P = ParamSpec("P")
R = TypeVar("R")


def telling_of_hub(function: Callable[P, R]) -> Callable[P, R]:
    """Write a line while a call of `function` has been waiting for the hub for a while.

    Preparing rows and loading weights take long as well, so the line is written only if the thread
    is inside of huggingface_hub at that moment, and not in a download, which draws a bar.
    """

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        thread = threading.get_ident()

        def describe(seconds: float) -> str | None:
            return _line(seconds) if _asks_hub(thread) else None

        with TellOfWait(describe, after=TELL_AFTER_SECONDS):
            return function(*args, **kwargs)

    return told


def _line(seconds: float) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return (
        f"waiting for {endpoint}, which has not answered yet ({seconds:.0f} s since the start): "
        "it is tried again for some minutes; HF_HUB_OFFLINE=1 takes what is cached."
    )


def _asks_hub(thread: int) -> bool:
    """Whether a thread is inside of huggingface_hub, and not in a download."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("huggingface_hub."):
            return frame.f_code.co_name not in ("http_get", "xet_get")
        frame = frame.f_back
    return False
