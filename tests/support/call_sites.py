"""Where the source of a class calls its own methods: read from the syntax tree, not by a search."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class CallSite:
    """One place that calls a method of ``self``, or hands the method to a function.

    Attributes:
        method: What is called.
        caller: The method of the class that it is called from.
        arguments: The call's arguments; None where the method is handed on instead of called.
    """

    method: str
    caller: str
    arguments: ast.Call | None


@functools.lru_cache(maxsize=1)
def call_sites(source: str, class_name: str) -> list[CallSite]:
    """Find what the methods of a class call of ``self``, but for a method that calls itself."""
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    return [
        site
        for method in body
        if isinstance(method, ast.FunctionDef)
        for site in _sites_in(method)
        if site.method != method.name
    ]


def callers_of(method: str, sites: list[CallSite]) -> set[str]:
    """Name the methods that call ``method``."""
    return {site.caller for site in sites if site.method == method}


def _sites_in(caller: ast.FunctionDef) -> Iterator[CallSite]:
    for node in ast.walk(caller):
        if not isinstance(node, ast.Call):
            continue
        if (name := _own_attribute(node.func)) is not None:
            yield CallSite(name, caller.name, node)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            if (name := _own_attribute(argument)) is not None:
                yield CallSite(name, caller.name, None)


def _own_attribute(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None
