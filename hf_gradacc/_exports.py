"""Packages that import what they export when it is first asked for (PEP 562).

torch and transformers take seconds to load, and ``hf-gradacc --help`` needs neither.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

__all__ = ["load_when_asked"]


def load_when_asked(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: The package's ``__name__``.
        modules: The names each module gives, by the module's name below the package.

    Returns:
        Both functions. A name that was asked for is kept in the package, so each is looked up once.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def import_exported(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return import_exported, list_names
