"""The router loss of a mixture of experts, balanced over the whole update.

Balance within a micro-batch of a few rows forces experts to share what these rows are about; over
the whole update they may specialize (Qiu et al., https://arxiv.org/abs/2501.11873). A first pass
counts which experts the tokens of the update choose; given that, what a micro-batch adds to the
loss is linear, and the gradient is that of all rows at once. See `hf_gradacc.loss.router.terms`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_gradacc.errors import LossError
from hf_gradacc.loss.coupling import Exchange, ForwardEnded
from hf_gradacc.loss.router.calls import (
    RouterCall,
    RouterFunction,
    find_functions,
    replaced,
    replacement_of,
)
from hf_gradacc.loss.router.origins import RouterOrigins
from hf_gradacc.loss.router.terms import RouterForm, RouterTerm
from hf_gradacc.updates.update import MicroBatch

__all__ = ["RouterLoss", "find_router_loss"]


def find_router_loss(model: nn.Module, *, compiled: bool = False) -> RouterLoss | None:
    """Find the router losses that a model calls; None if it calls none that is known.

    Args:
        model: The bare model.
        compiled: It is compiled, so a hook of one of its modules may never be called.
    """
    functions = find_functions(model)
    return RouterLoss(model, functions, compiled=compiled) if functions else None


class RouterLoss:
    """Couples the rows of an update by which experts their tokens choose.

    Args:
        model: The bare model.
        functions: The router losses that it calls.
        compiled: It is compiled.

    Attributes:
        note: In plain words, what is done and what it costs.
    """

    note = (
        "the router loss balances its experts over the whole update, in two passes: the first, "
        "without gradients, counts which of them the tokens choose, up to the last router. "
        "update_passes = 1 saves that and balances each micro-batch by itself."
    )

    def __init__(
        self, model: nn.Module, functions: Sequence[RouterFunction], *, compiled: bool = False
    ) -> None:
        self._functions = functions
        self._replacements = [
            replacement_of(function, lambda call: self._answer(call), compiled=compiled)
            for function in functions
        ]
        self._answer: Callable[[RouterCall], Tensor | None] = lambda call: None
        self._compiled = compiled
        self._origins = RouterOrigins(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._forms: tuple[RouterForm, ...] | None = None
        self._agreed = False
        self._sums: Tensor | None = None
        self._whole: Sequence[Tensor] = ()

    @property
    def watched(self) -> Sequence[nn.Parameter]:
        """The weights of the last router, as far as is known: its loss shows in them first."""
        return self._origins.last_parameters

    def begin(self) -> None:
        """Forget the last attempt at an update."""
        self._sums, self._whole = None, ()

    @contextlib.contextmanager
    def gathering(self, micro_batch: MicroBatch, *, may_end: bool) -> Iterator[None]:
        """Count which experts the tokens of a micro-batch choose."""
        terms: list[RouterTerm] = []

        def count(call: RouterCall) -> Tensor | None:
            term = call.read()
            if term is None:
                return None
            terms.append(term)
            if learns:
                self._origins.learn(call)
            return torch.zeros((), device=self._device)

        # Inside the body of a model there are trees, and a router loss counts rows.
        may_end = may_end and micro_batch.trees is None
        learns = may_end and not self._compiled and not self._origins.asked
        watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if learns:
            watching = self._origins.learning()
        elif may_end and self._origins.known:
            watching = self._origins.ending(count)
        try:
            with self._answering(count), watching:
                yield
        except ForwardEnded:
            self._add(terms)
            raise
        self._add(terms)

    @contextlib.contextmanager
    def _answering(self, answer: Callable[[RouterCall], Tensor | None]) -> Iterator[None]:
        self._answer = answer
        with replaced(self._functions, self._replacements):
            yield

    def _add(self, terms: Sequence[RouterTerm]) -> None:
        forms = tuple(term.form for term in terms)
        if self._forms is not None and forms != self._forms:
            raise LossError(
                f"the router loss is called {len(forms)} times for a micro-batch ({forms}) and "
                f"{len(self._forms)} times for another ({self._forms}), so that it cannot be "
                f"balanced over the update. Set update_passes = 1."
            )
        self._forms = forms
        if terms:
            sums = torch.cat([term.sums().to(self._device) for term in terms])
            self._sums = sums if self._sums is None else self._sums + sums

    def couple(self, exchange: Exchange) -> None:
        """Add up over all ranks."""
        if not self._agreed:  # once: a rank without a micro-batch has to know what others sum
            known = exchange.gather(self._forms)
            self._forms = next((forms for forms in known if forms is not None), None)
            self._agreed = len(known) > 1
        if not self._forms:
            raise RuntimeError("the model has not called its router loss")
        sizes = [form.size for form in self._forms]
        sums = self._sums
        if sums is None:
            dtype = torch.float32 if self._device.type == "mps" else torch.float64
            sums = torch.zeros(sum(sizes), dtype=dtype, device=self._device)
        self._whole = torch.split(exchange.add_up(sums), sizes)

    @contextlib.contextmanager
    def applying(self, index: int, *, scale: float) -> Iterator[None]:
        """Let router losses return what the micro-batch adds to that of the whole update."""
        num_calls = 0

        def part(call: RouterCall) -> Tensor | None:
            nonlocal num_calls
            term = call.read()
            if term is None:
                return None
            # A forward that is computed again in its backward calls them again, from the first.
            whole = self._whole[num_calls % len(self._whole)]
            num_calls += 1
            return term.part(whole) * scale

        with self._answering(part):
            yield

    def loss_of(self, own: Tensor) -> Tensor:
        """Return the loss as it is: its router losses are parts already."""
        return own

    def metrics(self) -> dict[str, Tensor | float]:
        """Return the router losses, and the largest and smallest load of an expert in any layer."""
        figures: dict[str, Tensor | float] = {}
        loads = []
        for form, whole in zip(self._forms or (), self._whole, strict=False):
            figures[form.kind] = figures.get(form.kind, 0.0) + form.value(whole)
            load = form.loads(whole)
            if load is not None:
                loads.append(load)
        if loads:
            figures["expert_load_max"] = torch.stack([load.max() for load in loads]).max()
            figures["expert_load_min"] = torch.stack([load.min() for load in loads]).min()
        return figures
