"""A CUDA device that is this host: lines for CUDA run, and what they call is checked.

Tensors that are asked for on the device, or moved there, stay where they are. Functions of
`torch.cuda` are stand-ins with the signatures of the real ones, so a call that torch would refuse
is refused here. What such lines give on a real device is seen there alone (``make gpu``).
"""

from __future__ import annotations

import ast
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import TrainingArguments

import hf_gradacc

__all__ = ["CUDA", "PACKAGE", "cuda_lines", "lines_run", "pretend_cuda"]

CUDA = torch.device("cuda", 0)
PACKAGE = Path(hf_gradacc.__file__).parent
PEAK_BYTES = 123 * 2**20
_DEVICE_NAME = "NVIDIA H200"


class OnTheHost(TorchFunctionMode):
    """Keeps tensors on the host that are asked for on the device.

    Attributes:
        copies: What was pinned or moved there, in order: ``"pin"``, or whether the host may go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str | bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and any(_on_host(arg) is not arg for arg in args):
            self.copies.append(bool((kwargs or {}).get("non_blocking")))
        if func is Tensor.pin_memory:
            self.copies.append("pin")
            return args[0].clone()
        if func is Tensor.is_pinned:
            return False
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs or {})
        kwargs = {key: _on_host(value) for key, value in (kwargs or {}).items()}
        return func(*map(_on_host, args), **kwargs)


def _on_host(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    is_device = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_device else value


class HostEvent:
    """What `torch.cuda.Event` does, on the host's clock."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        assert enable_timing
        self.time: float | None = None

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return self.time is not None

    def synchronize(self) -> None:
        assert self.time is not None

    def elapsed_time(self, end_event: HostEvent) -> float:
        assert self.time is not None
        assert end_event.time is not None
        return (end_event.time - self.time) * 1e3


@contextlib.contextmanager
def pretend_cuda() -> Iterator[dict[str, Any]]:
    """Let training arguments name a CUDA device, and torch's functions for it answer.

    Yields:
        The stand-ins by their names in `torch.cuda`, and as ``"copies"`` those of `OnTheHost`.
    """
    properties = SimpleNamespace(name=_DEVICE_NAME, total_memory=141 * 2**30, major=9, minor=0)
    answers: dict[str, Any] = {
        "get_device_name": lambda *args, **kwargs: _DEVICE_NAME,
        "get_device_properties": lambda *args, **kwargs: properties,
        "max_memory_allocated": lambda *args, **kwargs: PEAK_BYTES,
        "mem_get_info": lambda *args, **kwargs: (100 * 2**30, 141 * 2**30),
        "memory_allocated": lambda *args, **kwargs: 2**20,
        "memory_reserved": lambda *args, **kwargs: 2**21,
        "reset_peak_memory_stats": lambda *args, **kwargs: None,
        "synchronize": lambda *args, **kwargs: None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
    }
    stand_ins = {
        name: mock.create_autospec(getattr(torch.cuda, name), side_effect=answer)
        for name, answer in answers.items()
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", HostEvent))
        real: Any = TrainingArguments.device
        device = property(lambda self: real.fget(self) and CUDA)  # it sets more up than it returns
        stack.enter_context(mock.patch.object(TrainingArguments, "device", device))
        host = stack.enter_context(OnTheHost())
        yield {**stand_ins, "copies": host.copies}


# ---- which lines are for CUDA, and which have run ------------------------------------------------

_OF_PINNED_MEMORY = ("pin_memory", "is_pinned")
Line = tuple[str, int]


def cuda_lines(source: str, *, name: str) -> dict[Line, str]:
    """Find the statements that are for CUDA: that name it, pin memory, or run only if it is named.

    Args:
        source: Of a module.
        name: Its path in the package.

    Returns:
        ``(name, line)`` of each statement, and its first line.

    >>> text = "if device.type == 'cuda':\\n    wait()\\nelse:\\n    rest()"
    >>> cuda_lines(text, name="x.py")
    {('x.py', 1): "if device.type == 'cuda':", ('x.py', 2): 'wait()'}
    """
    found: dict[Line, str] = {}

    def visit(statements: list[ast.stmt], *, inside: bool) -> None:
        for statement in statements:
            is_own = any(map(_names_cuda, _own_expressions(statement)))
            if is_own or inside:
                found[name, statement.lineno] = ast.unparse(statement).split("\n")[0]
            is_test = is_own and isinstance(statement, ast.If)
            for part in ("body", "orelse", "finalbody"):
                below = getattr(statement, part, [])
                visit(below, inside=inside or (is_test and part == "body"))
            for handler in getattr(statement, "handlers", []):
                visit(handler.body, inside=inside)

    visit(ast.parse(source).body, inside=False)
    return found


def _own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return
    for field, value in ast.iter_fields(statement):
        if field not in ("body", "orelse", "finalbody", "handlers"):
            yield from (x for x in (value if isinstance(value, list) else [value]) if x is not None)


def _names_cuda(node: Any) -> bool:
    return isinstance(node, ast.AST) and any(
        (isinstance(part, ast.Constant) and part.value == "cuda")
        or (isinstance(part, ast.Attribute) and part.attr in ("cuda", *_OF_PINNED_MEMORY))
        or (isinstance(part, ast.keyword) and part.arg == "non_blocking")
        for part in ast.walk(node)
    )


@contextlib.contextmanager
def lines_run() -> Iterator[set[Line]]:
    """Collect the lines of the package that run in this thread while the context lasts."""
    found: set[Line] = set()

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            path = Path(frame.f_code.co_filename)
            found.add((path.relative_to(PACKAGE).as_posix(), frame.f_lineno))
        return on_line

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(f"{PACKAGE}/") else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield found
    finally:
        sys.settrace(before)
