"""Put one question to a loss: its value and a small part of its gradient, the same way each time.

Every question starts from the same random state and the same buffers, so two answers differ only
by what was asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.loss.class_weights import WeightedCall, WeightedCalls

__all__ = ["Answer", "Ask", "Loss", "copied"]

_MOST_NUMBERS = 2**20
"""A parameter this large is not differentiated: a head's gradient would take gigabytes."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one forward told.

    Attributes:
        loss: The loss.
        gradient: Its gradient ``[numbers]`` by some parameters, float64 where the device has it;
            None if there is none.
        drew: The forward moved a random number generator.
        weighted: The only mean with class weights that it took.
    """

    loss: float
    gradient: Tensor | None = None
    drew: bool = False
    weighted: WeightedCall | None = None


Ask = Callable[[Mapping[str, Any], "int | None"], Answer]
"""Answers for collated inputs; the second argument is what to pass as the count."""


@dataclasses.dataclass
class Loss:
    """The loss of a model, to be asked.

    Attributes:
        model: The bare model.
        compute: Returns the loss of collated inputs as a tensor; the second argument is what to
            pass as the count.
        restart: Brings random states and buffers back to where they were.
        has_drawn: Tells whether a random number was drawn since.
        can_differentiate: Gradients can be computed outside of the wrapped model. Sharded weights
            are whole only inside of a forward.
        note_forward: Called before each forward.
    """

    model: nn.Module
    compute: Callable[[Mapping[str, Any], int | None], Tensor]
    restart: Callable[[], None] = lambda: None
    has_drawn: Callable[[], bool] = lambda: False
    can_differentiate: bool = True
    note_forward: Callable[[], None] = lambda: None
    _last: tuple[Any, ...] = dataclasses.field(default=(None,), repr=False)
    _weighted: WeightedCall | None = dataclasses.field(default=None, repr=False)

    def computed_by(self, compute: Callable[[Mapping[str, Any], int | None], Tensor]) -> Loss:
        """Return another loss of the same model, of which nothing was asked yet."""
        return dataclasses.replace(self, compute=compute, _last=(None,))

    def value(self, inputs: Mapping[str, Any], count: int | None) -> float:
        """Compute the loss, without gradients."""
        with torch.no_grad():
            return float(self._of_copy(inputs, count))

    def gradients(self, inputs: Mapping[str, Any], count: int | None) -> list[Tensor]:
        """Compute its gradient by every parameter that is not large; none if there is none.

        Large ones are left out to save memory: what multiplies by them shows in others.
        """
        chosen = _small_parameters(self.model) if self.can_differentiate else []
        if not chosen:
            return []
        with torch.enable_grad(), _only_these_require_grad(self.model, chosen):
            loss = self._of_copy(inputs, count)
            if not loss.requires_grad:
                return []
            return list(
                torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
            )

    def ask(self, inputs: Mapping[str, Any], count: int | None) -> Answer:
        """Compute the loss, and its gradient by the last few small parameters.

        Losses of an untrained head are all alike and show no weight; their gradients do. The last
        parameters are most often a head's or its norm's. Only they require a gradient meanwhile,
        so the forward keeps no activations of the layers before them. The last answer is kept, as
        a mode is chosen by the question that is put first.
        """
        question = (inputs, count, self.model.training)
        if self._last[0] is inputs and self._last[1:3] == question[1:]:
            answer: Answer = self._last[3]
            return answer
        answer = self.ask_anew(inputs, count)
        self._last = (*question, answer)
        return answer

    def ask_anew(
        self,
        inputs: Mapping[str, Any],
        count: int | None,
        *,
        watched: Sequence[nn.Parameter] = (),
    ) -> Answer:
        """Ask, whatever was asked last; differentiate by the parameters in `watched`, too."""
        chosen = [*_last_parameters(self.model), *watched] if self.can_differentiate else []
        if not chosen:
            value = self.value(inputs, count)
            return Answer(value, drew=self.has_drawn(), weighted=self._weighted)
        with torch.enable_grad():
            try:
                with _only_these_require_grad(self.model, chosen):
                    loss = self._of_copy(inputs, count)
                    return self._differentiate(loss, chosen)
            except RuntimeError:  # a loss may differentiate by others, as gradient penalties do
                loss = self._of_copy(inputs, count)
                return self._differentiate(loss, chosen)

    def ask_either_way(self, inputs: Mapping[str, Any], count: int) -> Answer:
        """Ask without a count, or with one if the loss cannot do without."""
        try:
            return self.ask(inputs, None)
        except (TypeError, AttributeError) as error:  # "unsupported operand ...: NoneType"
            try:
                return self.ask(inputs, count)
            except Exception:
                raise error from None

    def _differentiate(self, loss: Tensor, chosen: list[nn.Parameter]) -> Answer:
        drew, gradient = self.has_drawn(), None
        if loss.requires_grad:
            with contextlib.suppress(RuntimeError):  # cuDNN's RNNs, in evaluation mode
                parts = torch.autograd.grad(
                    loss,
                    chosen,
                    retain_graph=True,  # layers that are remembered have it in common
                    allow_unused=True,
                    materialize_grads=True,
                )
                first = parts[0].device  # a model may be spread over several
                gradient = torch.cat([_in_double(part.to(first)).reshape(-1) for part in parts])
        return Answer(float(loss.detach()), gradient, drew, self._weighted)

    def _of_copy(self, inputs: Mapping[str, Any], count: int | None) -> Tensor:
        # A copy, since FSMT writes padding over the -100 of the labels it is given.
        own = copied(inputs)
        self.restart()
        self.note_forward()
        with WeightedCalls() as calls:
            loss = self.compute(own, count)
        self._weighted = calls.only
        return loss


def copied(inputs: Any) -> Any:
    """Copy the tensors of collated inputs; anything but a mapping is returned as it is."""
    if not isinstance(inputs, Mapping):
        return inputs
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in inputs.items()}


def _last_parameters(model: nn.Module, count: int = 4) -> list[nn.Parameter]:
    return _small_parameters(model)[-count:]


def _small_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.numel() <= _MOST_NUMBERS]


@contextlib.contextmanager
def _only_these_require_grad(model: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    kept = {id(p) for p in chosen}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _in_double(value: Tensor) -> Tensor:
    return value if value.device.type == "mps" else value.double()
