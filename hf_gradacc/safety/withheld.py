"""Training arguments as others may read them: no token, and names for what the environment held.

The stock Trainer pickles its arguments into `training_args.bin` beside every model, with the token
it uploads with, and the folder is what people share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from hf_gradacc.text import SECRET_KEY

__all__ = ["name_values", "pickled_without_secrets", "shown_without_secrets"]

_NAMES = "_gradacc_written_by_name"


def name_values(args: Any, written: Mapping[str, str]) -> None:
    """Note what stands in a recipe where the environment gave the value of an argument.

    Args:
        args: The training arguments.
        written: Field to what stands there.
    """
    vars(args)[_NAMES] = dict(written)


@contextlib.contextmanager
def pickled_without_secrets(args: Any) -> Iterator[None]:
    """While this lasts, whoever pickles the arguments gets them without secrets.

    The arguments themselves keep theirs: an upload may need the token meanwhile.
    """

    def clean(state: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in state.items() if name not in _OURS}
        return _without(kept, args)

    def reduce(protocol: Any) -> tuple[Any, ...]:
        reduced: Any = type(args).__reduce_ex__(args, protocol)  # type: ignore[call-arg]
        made, arguments, *rest = reduced
        if rest:
            return (made, arguments, clean(rest[0]), *rest[1:])
        # A class made at run time: its own way to pickle passes the values along as an argument.
        return made, tuple(clean(part) if isinstance(part, dict) else part for part in arguments)

    with _shadowed(args, "__reduce_ex__", reduce):
        yield


@contextlib.contextmanager
def shown_without_secrets(args: Any) -> Iterator[None]:
    """While this lasts, trackers that ask the arguments for a dictionary get one to be shown."""
    with contextlib.ExitStack() as stack:
        for name in ("to_dict", "to_sanitized_dict"):
            if hasattr(type(args), name):
                stack.enter_context(_shadowed(args, name, _shown(args, name)))
        yield


def _shown(args: Any, name: str) -> Any:
    return lambda: _without(getattr(type(args), name)(args), args)


_OURS = (_NAMES, "__reduce_ex__", "to_dict", "to_sanitized_dict")


@contextlib.contextmanager
def _shadowed(args: Any, name: str, function: Any) -> Iterator[None]:
    vars(args)[name] = function
    try:
        yield
    finally:
        vars(args).pop(name, None)


def _without(values: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Values without secrets, in sections too, and with names for what the environment held."""
    clean: dict[str, Any] = _clean(values)
    written = vars(args).get(_NAMES, {})
    return {**clean, **{name: text for name, text in written.items() if name in clean}}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: None if SECRET_KEY.search(str(name)) and isinstance(inner, str) else _clean(inner)
            for name, inner in value.items()
        }
    return [_clean(part) for part in value] if type(value) is list else value
