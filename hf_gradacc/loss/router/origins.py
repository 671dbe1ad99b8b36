"""Which modules give the logits of a router loss, so that a forward may end with the last router.

The loss itself is called after the LM head, when all is computed. One whole forward shows where the
tensors come from that it is called with: outputs of modules, or inputs of the model. Where some of
them are neither, no forward is ended.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_gradacc.loss.coupling import ForwardEnded
from hf_gradacc.loss.router.calls import RouterCall, RouterFunction

__all__ = ["RouterOrigins"]


@dataclass(frozen=True)
class _Output:
    """What a module returned: in its how manyth call, and at which place of a tuple."""

    module: nn.Module = field(repr=False)
    call: int
    place: int


@dataclass(frozen=True)
class _Input:
    """What the model was given by name, in its how manyth call."""

    call: int
    name: str


@dataclass
class _Seen:
    """What a forward has shown so far."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    outputs: dict[int, tuple[weakref.ref[Tensor], _Output]] = field(default_factory=dict)

    def origin_of(self, value: Any) -> Any:
        """Return where a tensor comes from; None if that is unknown; other values as they are."""
        if isinstance(value, tuple):
            origins = tuple(self.origin_of(part) for part in value)
            return None if None in origins else origins
        if not isinstance(value, Tensor):
            return _Constant(value)
        seen = self.outputs.get(id(value))
        if seen is not None and seen[0]() is value:
            return seen[1]
        for call, inputs in enumerate(self.inputs):
            for name, given in inputs.items():
                if given is value:
                    return _Input(call, name)
        return None


@dataclass(frozen=True)
class _Constant:
    value: Any


class RouterOrigins:
    """Learns from one whole forward, and ends later ones.

    Args:
        model: The bare model.

    Attributes:
        asked: A whole forward was watched.
        known: It showed where everything comes from.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[tuple[RouterFunction, dict[str, Any]]] = []
        self._seen = _Seen()
        self.asked = False
        self.known = False

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Watch a whole forward. `learn` is to be called with each call of a router loss."""
        self._seen, self._calls = _Seen(), []

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            for place, value in enumerate(_places(output)):
                if isinstance(value, Tensor):
                    origin = _Output(module, self._seen.calls[module], place)
                    known = self._seen.outputs.get(id(value))
                    if known is None or known[0]() is not value:  # the innermost module's
                        self._seen.outputs[id(value)] = weakref.ref(value), origin
            self._seen.calls[module] += 1

        with self._hooked(list(self._model.modules()), watch):
            yield
        self._seen = _Seen()
        self.asked = True
        self.known = bool(self._calls) and not any(
            origin is None for _, origins in self._calls for origin in origins.values()
        )

    def learn(self, call: RouterCall) -> None:
        """Note where the arguments of a call come from."""
        origins = {name: self._seen.origin_of(value) for name, value in call.arguments.items()}
        self._calls.append((call.function, origins))

    @property
    def last_parameters(self) -> list[nn.Parameter]:
        """Those of the module that gives the last logits; none if that is not known."""
        modules = [origin.module for origin in self._outputs()]
        return [p for p in modules[-1].parameters() if p.requires_grad] if modules else []

    @contextlib.contextmanager
    def ending(self, take: Callable[[RouterCall], Any]) -> Iterator[None]:
        """End a forward once all is there that its router losses will be called with.

        Args:
            take: Called with each of the calls, before the forward ends.
        """
        self._seen = _Seen()
        wanted = set(self._outputs())
        found: dict[Any, Tensor] = {}

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            for place, value in enumerate(_places(output)):
                origin = _Output(module, self._seen.calls[module], place)
                if origin in wanted:
                    found[origin] = value
            self._seen.calls[module] += 1
            if len(found) == len(wanted):
                for function, origins in self._calls:
                    arguments = {n: self._value(origin, found) for n, origin in origins.items()}
                    take(RouterCall(function, arguments))
                raise ForwardEnded

        with self._hooked(list({origin.module for origin in wanted}), collect):
            yield

    def _outputs(self) -> list[_Output]:
        """What the calls need of the outputs of modules, in their order."""
        return [
            origin
            for _, origins in self._calls
            for value in origins.values()
            for origin in (value if isinstance(value, tuple) else (value,))
            if isinstance(origin, _Output)
        ]

    def _value(self, origin: Any, found: dict[Any, Tensor]) -> Any:
        if isinstance(origin, tuple):
            return tuple(self._value(part, found) for part in origin)
        if isinstance(origin, _Constant):
            return origin.value
        if isinstance(origin, _Input):
            return self._seen.inputs[origin.call].get(origin.name)  # packed rows have no mask
        return found[origin]

    @contextlib.contextmanager
    def _hooked(self, modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
        def note_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._seen.inputs.append(kwargs)

        handles: list[Any] = [module.register_forward_hook(hook) for module in modules]
        handles.append(self._model.register_forward_pre_hook(note_inputs, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen = _Seen()


def _places(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)
