"""Where a model calls its router losses, and how to answer in their place.

A model calls its router loss by a name in its own module, so the function can be replaced there for
the time of a forward, and no code of the model is touched.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.loss.router.terms import ROUTER_LOSSES, RouterTerm, reader_of

__all__ = ["RouterCall", "RouterFunction", "find_functions", "replaced", "replacement_of"]


@dataclass(frozen=True)
class RouterFunction:
    """A router loss that a model calls.

    Attributes:
        namespace: The globals of the module that calls it.
        name: Its name there.
        original: The function.
        read: Reads what it is called with.
    """

    namespace: dict[str, Any] = field(repr=False)
    name: str
    original: Callable[..., Any]
    read: Callable[..., RouterTerm | None]


@dataclass(frozen=True)
class RouterCall:
    """One call of a router loss.

    Attributes:
        function: The loss.
        arguments: What it was called with, by the names of its parameters.
    """

    function: RouterFunction
    arguments: Mapping[str, Any]

    def read(self) -> RouterTerm | None:
        """Return what it adds up from; None if it was called without logits."""
        return self.function.read(**self.arguments)


def find_functions(model: nn.Module) -> list[RouterFunction]:
    """Find the router losses that the methods of a model's modules call."""
    found: dict[tuple[int, str], RouterFunction] = {}
    for module_class in {type(module) for module in model.modules()}:
        for method in _methods(module_class):
            for name in ROUTER_LOSSES.intersection(method.__code__.co_names):
                namespace = method.__globals__
                read = reader_of(name, namespace.get(name))
                if read is not None:
                    function = RouterFunction(namespace, name, namespace[name], read)
                    found[id(namespace), name] = function
    return list(found.values())


def _methods(module_class: type) -> Iterator[Any]:
    """Yield the functions of a class and its bases, out of what decorates them."""
    for base in module_class.__mro__:
        if base is nn.Module:
            return
        for value in vars(base).values():
            method = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(method):
                yield method


@contextlib.contextmanager
def replaced(
    functions: Sequence[RouterFunction], replacements: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Put others in the place of router losses while a block runs."""
    for function, replacement in zip(functions, replacements, strict=True):
        function.namespace[function.name] = replacement
    try:
        yield
    finally:
        for function in functions:
            function.namespace[function.name] = function.original


def replacement_of(
    function: RouterFunction,
    answer: Callable[[RouterCall], Tensor | None],
    *,
    compiled: bool = False,
) -> Callable[..., Any]:
    """Return what to put in the place of a router loss.

    Args:
        function: The loss.
        answer: Returns what a call is to return; None leaves it to the original.
        compiled: The model is compiled; this is not. Make it once: each other one compiles anew.
    """
    signature = inspect.signature(function.original)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        value = answer(RouterCall(function, bound.arguments))
        return function.original(*args, **kwargs) if value is None else value

    if compiled:
        replacement = torch.compiler.disable(replacement)  # type: ignore[no-untyped-call]
    return replacement
