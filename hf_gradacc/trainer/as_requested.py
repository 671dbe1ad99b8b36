"""Show the stock loop other arguments than everybody else sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["AsRequested"]

# One item of the loader is one update, so the stock loop must not accumulate. Gradients and losses
# are averaged over ranks by the weight rule, so the stock loop must not multiply by its own factor.
# Its filter would replace a NaN by the mean of earlier losses.
_STOCK_LOOP_SEES = {
    "gradient_accumulation_steps": 1,
    "average_tokens_across_devices": False,
    "logging_nan_inf_filter": False,
}


class AsRequested:
    """Lets the stock loop see one batch per step, and callbacks what the user asked for.

    Attributes:
        arguments: The arguments that are replaced while the loop runs, as the user wrote them.
    """

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    @contextlib.contextmanager
    def hidden_from_loop(self, trainer: Any) -> Iterator[None]:
        """Replace the arguments while the stock loop runs; callbacks still see the user's."""
        self.arguments = {name: getattr(trainer.args, name) for name in _STOCK_LOOP_SEES}
        handler = trainer.callback_handler
        stock_call_event = handler.call_event

        def call_event(*args: Any, **kwargs: Any) -> Any:
            with self.shown(trainer):
                return stock_call_event(*args, **kwargs)

        handler.call_event = call_event
        try:
            with _set(trainer.args, _STOCK_LOOP_SEES):
                yield
        finally:
            del handler.call_event
            self.arguments = {}

    def shown(self, trainer: Any) -> contextlib.AbstractContextManager[None]:
        """Show the arguments as the user wrote them, for as long as the context lasts."""
        return _set(trainer.args, self.arguments)


@contextlib.contextmanager
def _set(target: Any, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
