"""Take ``training_step`` and ``compute_loss`` as somebody wrote them for the stock Trainer.

A step may run a backward of its own. Copies of the stock step divide their loss by
``args.gradient_accumulation_steps``, by ``self.current_gradient_accumulation_steps``, or by nothing
(accelerate did, before transformers 4.46). Adversarial ones run a backward here and another one
there, with ``loss.backward()`` or with an accelerator. So no loss is touched. The step sees the
divisors it would see in stock, and what it has added to ``.grad`` is weighed as a whole: before it,
the gradients so far are divided by its weight; after it, all are multiplied by it. Nothing is
copied.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_gradacc.errors import LossError
from hf_gradacc.loss.shortcuts.choose import Shortcuts
from hf_gradacc.trainer.as_requested import noting_reads

__all__ = [
    "OwnStep",
    "definers",
    "find_own_step",
    "has_own_loader_behind",
    "may_write_weights",
    "plain_for_steps_behind",
    "refuse_old_signature",
    "warn_of_several_backwards",
]

logger = logging.get_logger(__name__)

_OF_A_BACKWARD = {
    "backward",
    "compute_loss",
    "current_gradient_accumulation_steps",
    "gradient_accumulation_steps",
}
"""Names in the code of a step that does more than call the one behind it."""


def find_own_step(trainer_class: type) -> type | None:
    """Return the class whose ``training_step`` runs a backward of its own; None if there is none.

    A step that only calls ``super().training_step`` has none.
    """
    for cls in definers(trainer_class.__mro__, "training_step"):
        code = getattr(inspect.unwrap(vars(cls)["training_step"]), "__code__", None)
        names = set() if code is None else _names_in(code)
        if "training_step" not in names or names & _OF_A_BACKWARD:
            return cls
    return None


def plain_for_steps_behind(
    shortcuts: Shortcuts | None, trainer_class: type, *, mixin: type
) -> Shortcuts | None:
    """Take no shortcut that lays rows out anew if somebody's ``training_step`` is to see them.

    One behind the mixin receives what the stock step would be given: it may look at labels, or take
    a gradient twice.
    """
    behind = _users_behind(trainer_class, mixin, "training_step")
    if shortcuts is None or not behind:
        return shortcuts
    why = f"{behind[0].__name__}.training_step sees the rows as they are"
    names = ("target_only_logits", "chunked_loss", "drop_attention_mask", "packed")
    others = tuple((name, reason) for name, reason in shortcuts.refused if name not in names)
    return Shortcuts(
        refused=tuple((name, shortcuts.reason(name) or why) for name in names) + others,
        linears=shortcuts.linears,
        bodies=shortcuts.bodies,  # rows stay as they are outside of the model
        trees_by_rows=shortcuts.trees_by_rows,
        keeps_beginnings=shortcuts.keeps_beginnings,
    )


def has_own_loader_behind(trainer_class: type, *, mixin: type) -> bool:
    """Return whether somebody's class behind the mixin builds the training loader by itself.

    Loaders of libraries are replaced by ours: what they do is known.
    """
    return bool(_users_behind(trainer_class, mixin, "get_train_dataloader"))


def refuse_old_signature(trainer_class: type) -> None:
    """Refuse a ``compute_loss`` of before transformers 4.46, on which stock fails as well.

    Raises:
        LossError: Naming the class and what to write.
    """
    for cls in definers(trainer_class.__mro__, "compute_loss"):
        try:
            inspect.signature(vars(cls)["compute_loss"]).bind(0, 0, 0, num_items_in_batch=0)
        except TypeError:
            raise LossError(
                f"{cls.__name__}.compute_loss takes no num_items_in_batch, which transformers "
                f"passes to it since 4.46; the stock Trainer fails on it too.\n  Write "
                f"compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None)."
            ) from None
        return  # those behind it are called as this one calls them


def definers(classes: Iterable[type], name: str) -> Iterator[type]:
    """Yield the classes that define a method, but for the stock Trainer and ours."""
    for cls in classes:
        ours = cls.__module__.partition(".")[0] == "hf_gradacc"
        if name in vars(cls) and cls is not Trainer and not ours:
            yield cls


def _users_behind(trainer_class: type, mixin: type, name: str) -> list[type]:
    """Find the classes behind the mixin, of no library, that define a method."""
    mro = trainer_class.__mro__
    behind = definers(mro[mro.index(mixin) + 1 :], name)
    return [cls for cls in behind if cls.__module__.partition(".")[0] not in _LIBRARIES]


def may_write_weights(trainer: Any) -> bool:
    """Return whether code of the user's own runs while the micro-batches of an update do.

    A step or a loss may write to weights around its own forward, and a callback in between.
    """
    mro = type(trainer).__mro__
    names = ("training_step", "compute_loss")
    modules = [cls.__module__ for name in names for cls in definers(mro, name)]
    called = [vars(trainer)[name] for name in names if name in vars(trainer)]  # set on this one
    called += [
        callback.on_substep_end
        for callback in trainer.callback_handler.callbacks
        if hasattr(callback, "on_substep_end")
    ]
    modules += [getattr(function, "__module__", None) or "" for function in called]
    return any(module.partition(".")[0] not in (*_LIBRARIES, "hf_gradacc") for module in modules)


_LIBRARIES = ("sentence_transformers", "transformers", "trl")


def _names_in(code: CodeType) -> set[str]:
    """Collect the names of attributes and globals in a function and in those inside of it."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*(_names_in(function) for function in inner))


class OwnStep:
    """Weighs what a ``training_step`` with a backward of its own adds to the gradients.

    Args:
        owner: The class that defines it.
        args: The trainer's arguments.

    Attributes:
        divides: Whether it divided its loss by ``gradient_accumulation_steps``, or by what stands
            for it, before a backward. Found out in the first micro-batch of the run, before which
            there are no gradients to keep in proportion.
        divides_result: Whether it divided what it returned, be it after the backward.
    """

    def __init__(self, owner: type, args: Any) -> None:
        self._owner = owner
        self._args = args
        self._is_new = True
        self._has_gradients = False
        self._backwards: Counter[nn.Parameter] = Counter()
        self.divides = self.divides_result = False

    def begin_update(self) -> None:
        """Forget the gradients of the update before."""
        self._has_gradients = False

    def read_divisor(self) -> int:
        """Return what the step divides by in stock, and note that it does."""
        self._note()
        return int(vars(self._args)["gradient_accumulation_steps"])

    @contextlib.contextmanager
    def weighing(self, model: nn.Module, divisor: float) -> Iterator[None]:
        """Run the step; leave its gradients divided by `divisor` instead of what it divided by.

        Args:
            model: The model.
            divisor: Of its mean loss; infinite for a micro-batch that weighs nothing.
        """
        before = {p: p.grad for p in model.parameters() if p.grad is not None}
        if math.isinf(divisor):
            for parameter in before:
                parameter.grad = None
            yield
            for parameter in model.parameters():
                parameter.grad = before.get(parameter)
            return
        weight = self._factor(self.divides, divisor)
        if self._has_gradients:
            _multiply(before.values(), 1 / weight)
        if self._is_new:
            with self._finding_out(model):
                yield
            weight = self._factor(self.divides, divisor)
        else:
            yield
        _multiply((p.grad for p in model.parameters()), weight)
        self._has_gradients = True

    def weigh(self, result: Tensor, divisor: float) -> Tensor:
        """Weigh the loss that the step returned, for the log."""
        return result * self._factor(self.divides_result, divisor)

    def _factor(self, divides: bool, divisor: float) -> float:
        """Compute what makes a loss that the step divided, or not, one that `divisor` divides."""
        steps = vars(self._args)["gradient_accumulation_steps"] if divides else 1
        return float(steps / divisor)

    @contextlib.contextmanager
    def _finding_out(self, model: nn.Module) -> Iterator[None]:
        """Watch a step: what it divides by, and how many backwards it runs."""
        self._backwards.clear()
        with noting_reads(self._args, self._note), _counting_backwards(model, self._backwards):
            yield
        self._is_new = False
        if max(self._backwards.values(), default=0) > 1:
            warn_of_several_backwards(self._owner)
        if not self.divides:
            logger.warning_once(
                f"{self._owner.__name__}.training_step runs its own backward and divides its loss "
                f"before it neither by args.gradient_accumulation_steps nor by "
                f"self.current_gradient_accumulation_steps: it is taken to be the mean of its "
                f"micro-batch."
            )

    def _note(self) -> None:
        if self._is_new:
            self.divides_result = True
            self.divides = self.divides or not self._backwards


def warn_of_several_backwards(owner: type) -> None:
    """Say what is not exact if weights move between the backwards of a micro-batch."""
    logger.warning_once(
        f"{owner.__name__}.training_step runs several backwards in a micro-batch: each is weighted "
        f"like the first. If it moves weights by their gradient in between (as adversarial "
        f"training does), where to depends on how an update is cut."
    )


@contextlib.contextmanager
def _counting_backwards(model: nn.Module, counts: Counter[nn.Parameter]) -> Iterator[None]:
    """Count how often each parameter is given a gradient."""
    trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: counts.update([p])) for p in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply(gradients: Iterable[Tensor | None], factor: float) -> None:
    with torch.no_grad():
        present = [gradient for gradient in gradients if gradient is not None]
        dense = [gradient for gradient in present if gradient.layout is torch.strided]
        if dense:
            torch._foreach_mul_(dense, factor)
        for sparse in present:
            if sparse.layout is not torch.strided:
                sparse.mul_(factor)
