"""Run a model's layers once for the same tokens, while shortcuts are tried on it.

Most trials change what comes after the layers: which positions reach the LM head, which labels
count, how the loss is computed. The layers are given the same tokens each time, and return the same
numbers bit for bit. `RememberedLayers` keeps what they returned and returns it again, so such a
trial costs the head and the loss alone. So does masking labels in place, which asks for gradients
as well: the graph of one forward is kept for that. It reaches the few last parameters that are
asked for, and no deeper.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

__all__ = ["RememberedLayers", "find_layers"]

_AFTER_LAYERS = {"labels", "shift_labels", "num_items_in_batch"}
"""Arguments of the loss, which Transformers' models hand on to layers that do not read them."""

_MOST_KEPT = 3
"""Forwards kept: the rows together is the first that succeeds, in one of a few attempts."""


def find_layers(model: nn.Module) -> nn.Module | None:
    """Find the part of a model below its head; None if it is not one of Transformers' own classes.

    A class of one's own may do in there what a second forward has to repeat.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            layers = module.base_model
            is_known = type(layers).__module__.startswith("transformers.models.")
            is_plain = getattr(layers, "_compiled_call_impl", None) is None
            return layers if layers is not module and is_known and is_plain else None
    return None


class RememberedLayers:
    """Keeps what layers returned in the first forwards, and returns it where nothing has changed.

    Args:
        layers: From `find_layers`; None remembers nothing.
        has_drawn: Tells whether a random number was drawn in this forward. Such a forward is
            never remembered.
        keeps_graph: Keep the graph of the last forward, too, for `repeating`.
    """

    def __init__(
        self,
        layers: nn.Module | None,
        *,
        has_drawn: Callable[[], bool] = lambda: False,
        keeps_graph: bool = False,
    ) -> None:
        self._layers = layers
        self._has_drawn = has_drawn
        self._keeps_graph = keeps_graph
        self._kept: list[_Kept] = []
        self._last: _Kept | None = None
        self._returns = self._repeats = False

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what the layers return inside; every forward runs them."""
        if self._layers is None:
            yield
            return
        attributes = vars(self._layers)
        own, forward = attributes.get("forward"), self._layers.forward

        @functools.wraps(forward)
        def remembering(*args: Any, **kwargs: Any) -> Any:
            return self._call(forward, args, kwargs)

        attributes["forward"] = remembering
        try:
            yield
        finally:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own

    @contextlib.contextmanager
    def returning(self) -> Iterator[None]:
        """Return inside what was kept, where the layers are given the same, without gradients."""
        self._returns = True
        try:
            with self.keeping():
                yield
        finally:
            self._returns = False
            self._kept.clear()

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """Return inside what the last forward returned, if the layers are given the same again.

        With its graph: gradients of whatever is computed from it are those of a new forward.
        """
        if not self._keeps_graph:
            yield
            return
        self._repeats = True
        try:
            with self.keeping():
                yield
        finally:
            self._repeats, self._last = False, None

    def _call(self, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        assert self._layers is not None
        given = {k: v for k, v in kwargs.items() if k not in _AFTER_LAYERS}
        question = (*args, self._layers.training, given)
        if self._returns and not torch.is_grad_enabled():
            for kept in self._kept:
                if kept.answers(question):
                    return _copied(kept.output, detached=True)
        if self._repeats and torch.is_grad_enabled():
            if self._last is not None and self._last.answers(question):
                return _copied(self._last.output, detached=False)
            self._last = None  # before another forward needs its memory
        result = forward(*args, **kwargs)
        if not self._has_drawn():
            if len(self._kept) < _MOST_KEPT:
                self._kept.append(_Kept.of(question, result, detached=True))
            # Checkpointed layers, which only train, may unpack what they saved but once.
            if self._keeps_graph and torch.is_grad_enabled() and not self._layers.training:
                self._last = _Kept.of(question, result, detached=False)
        return result


@dataclass(frozen=True)
class _Kept:
    """What layers were given and returned.

    Attributes:
        question: Given.
        output: Returned.
        versions: Their tensors, and how often each had been written to.
    """

    question: Any
    output: Any
    versions: list[tuple[Tensor, int]]

    @classmethod
    def of(cls, question: Any, result: Any, *, detached: bool) -> _Kept:
        output = _copied(result, detached=detached)
        tensors: list[Tensor] = []
        _collect((question, output), tensors)
        return cls(_copied(question, detached=True), output, [(t, t._version) for t in tensors])

    def answers(self, question: Any) -> bool:
        """Return whether the same is asked again, and nothing was written over since."""
        return _same(self.question, question) and all(t._version == v for t, v in self.versions)


def _same(one: Any, other: Any) -> bool:
    """Return whether two arguments hold the same; objects of unknown classes only if they are."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            and torch.equal(one, other)
        )
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(_same(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, tuple | list):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(_same(a, b) for a, b in zip(one, other, strict=True))
        )
    if one is None or isinstance(one, bool | int | float | str | torch.dtype):
        return type(one) is type(other) and bool(one == other)
    return one is other


def _copied(value: Any, *, detached: bool) -> Any:
    """Return the same tensors in containers of their own, so that filling those changes no other.

    Args:
        value: What holds the tensors.
        detached: Without their graph, which would hold activations.
    """
    copied = functools.partial(_copied, detached=detached)
    if isinstance(value, Tensor):
        return value.detach() if detached else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: copied(part) for key, part in value.items()})
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(copied(part) for part in value)
    return value


def _collect(value: Any, tensors: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            _collect(part, tensors)
    elif isinstance(value, tuple | list):
        for part in value:
            _collect(part, tensors)
