"""Keep a beginning that rows of several micro-batches have in common; send its gradient back once.

The body of a model computes it once, as an ordinary row. Later tokens see nothing of it but the
keys and values of each attention, and the body's outputs, so these are kept, with their graph.
Micro-batches are given them cut off from it. Their gradients add up beside it, in float32 or wider,
and go back through it once, behind the last micro-batch: "gradient restoration" in Tree Training
(arXiv 2511.00413). By the chain rule that is the gradient of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.errors import LossError
from hf_gradacc.loss.trees.attention import RowAttention
from hf_gradacc.loss.trees.held import Held, hold
from hf_gradacc.loss.trees.written import Weights
from hf_gradacc.updates.update import start_copy

__all__ = ["KeptBeginning", "KeptBody", "held_outputs", "why_not_kept_by"]

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions that turn otherwise the longer the longest row of a micro-batch is."""

_WRITTEN = (
    "weights were written to while the micro-batches of an update ran (on_substep_end?), and what "
    "their rows begin with was computed before that.\n"
    "  Write to them once the update is over, or set layout = 'padded'."
)


@dataclass(frozen=True)
class KeptBody:
    """What later tokens see of a beginning in one body.

    Attributes:
        body: It.
        keys: Key and value of each attention, by the ``id`` of its module.
        outputs: What the body returned, a `Held` in the place of each tensor.
        state: What the body was set to, see `_state_of`.
    """

    body: nn.Module
    keys: Mapping[int, tuple[Held, Held]]
    outputs: Any
    state: tuple[Any, ...]


class KeptBeginning:
    """A beginning of rows, kept while the micro-batches run that hold the rest of them.

    Args:
        tokens: Its token ids ``[seq]``, on the CPU.
        weights: What weights were when the update began, if somebody's code may write to them.

    Attributes:
        refused: Why it cannot be kept, in plain words; empty as long as it can.
    """

    def __init__(self, tokens: Tensor, weights: Weights | None = None) -> None:
        self.tokens = tokens
        self._weights = weights
        self.refused = ""
        self._bodies: dict[int, KeptBody] = {}
        self._called: set[int] = set()

    def begin_micro_batch(self) -> None:
        """Begin the next micro-batch behind it."""
        self._called = set()

    def of(
        self, body: nn.Module, options: Mapping[str, Any], *, attention: RowAttention, ids: Tensor
    ) -> KeptBody | None:
        """Return what a body computes of the beginning, computing it when it is first asked for.

        Args:
            body: It is about to be called, with the rest of the rows.
            options: What it is called with besides tokens, mask and positions.
            attention: Catches keys and values.
            ids: Token ids of the rest, for their type and device.

        Returns:
            What is kept; None if it may not be: the rows have to be computed whole.
        """
        state = _state_of(body)
        known = self._bodies.get(id(body))
        if id(body) in self._called:
            self.refused = "its loss calls the model several times with the same rows"
        elif known is not None and known.state != state:
            self.refused = "its layers are set or written to between micro-batches"
        elif self._weights is not None and self._weights.differ(body):
            self.refused = "its weights are written to while the micro-batches of an update run"
        elif _moves_saved_tensors():
            self.refused = "activations are moved elsewhere until the end of each micro-batch"
        self._called.add(id(body))
        if self.refused:
            return None
        if known is None:
            tokens = start_copy(self.tokens.to(ids.dtype)[None], ids.device)
            with attention.catching() as caught:
                # Not by a call: hooks on the body see its rows, and those only.
                output = body.forward(input_ids=tokens, use_cache=False, **options)
            self.refused = _why_not_caught(caught, len(self.tokens))
            if not self.refused and self._weights is not None and self._weights.differ(body):
                # It counts calls in a buffer, say: that would be taken for somebody's writing.
                self.refused = "its forward writes to its own weights or buffers"
            if self.refused:
                return None
            keys = {
                name: (hold(_by_token(key)), hold(_by_token(value)))
                for name, [(key, value, _)] in caught.items()
            }
            known = KeptBody(body, keys, held_outputs(output, len(self.tokens)), state)
            self._bodies[id(body)] = known
        return known

    def close(self) -> None:
        """Send back what micro-batches have summed up, once, and free everything.

        Raises:
            LossError: If weights are not those that it was computed with.
        """
        held = [one for body in self._bodies.values() for one in _all_held(body)]
        bodies = [kept.body for kept in self._bodies.values()]
        self._bodies = {}
        reached = [
            (one.source, one.leaf.grad)
            for one in held
            if one.source is not None and one.leaf is not None and one.leaf.grad is not None
        ]
        if reached:
            weights = self._weights
            if weights is not None and any(weights.differ(b, besides_tables=True) for b in bodies):
                raise LossError(_WRITTEN)
            sources = tuple(source for source, _ in reached)
            totals = [total.to(source.dtype) for source, total in reached]
            try:
                torch.autograd.backward(sources, totals)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise LossError(_WRITTEN) from error


def _by_token(states: Tensor) -> Tensor:
    """Turn ``[1, heads, tokens, width]`` into ``[tokens, heads, width]``."""
    return states[0].transpose(0, 1)


def held_outputs(output: Any, num_tokens: int) -> Any:
    """Hold what a body returned for a beginning, each tensor with one entry for each token.

    Args:
        output: A tensor, or a mapping or sequence of such; ``[1, tokens, ...]`` or
            ``[tokens, any]``.
        num_tokens: Tokens of the beginning.
    """
    if isinstance(output, Tensor):
        if output.shape[:2] == (1, num_tokens):
            return hold(output[0])
        return hold(output) if output.ndim == 2 and output.shape[0] == num_tokens else None
    if isinstance(output, Mapping):
        return {key: held_outputs(value, num_tokens) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return [held_outputs(value, num_tokens) for value in output]
    return None


def _all_held(body: KeptBody) -> Iterator[Held]:
    for key, value in body.keys.values():
        yield key
        yield value
    waiting = [body.outputs]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Held):
            yield part
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _state_of(body: nn.Module) -> tuple[Any, ...]:
    """Return what decides what a body computes: adapters may be off, weights written to.

    Of weights only how often, and what is written by ``.data`` torch does not count, see `Weights`.
    """
    adapters = tuple(
        (module.disable_adapters, str(getattr(module, "active_adapters", "")))
        for module in body.modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # PEFT's layers
    )
    written = sum(p._version for p in body.parameters() if not p.is_inference())
    trained = sum(p.requires_grad for p in body.parameters())
    return torch.is_grad_enabled(), body.training, adapters, written, trained


def _moves_saved_tensors() -> bool:
    """Return whether hooks take what a graph saves, as offloading does: TRL's forget it at once."""
    autograd: Any = torch._C._autograd
    return autograd._top_saved_tensors_default_hooks(False) is not None


def _why_not_caught(caught: Mapping[int, Sequence[tuple[Tensor, Tensor, bool]]], num: int) -> str:
    """Return why keys and values that were caught cannot be kept, empty if they can."""
    if not caught:
        return "none of its layers calls sdpa by Transformers' table"
    for calls in caught.values():
        if len(calls) > 1:
            return "it computes a layer several times"
        ((key, value, has_graph),) = calls
        if has_graph != torch.is_grad_enabled():
            return (
                "its layers are computed without a graph at first (gradient checkpointing with "
                "use_reentrant = True)"
            )
        if any(x.ndim != 4 or x.shape[0] != 1 or x.shape[2] != num for x in (key, value)):
            return "its attention does not have one key for each token"
    return ""


def why_not_kept_by(config: Any) -> str:
    """Return why a body of this configuration keeps nothing, empty if it may."""
    if str(getattr(config, "_attn_implementation", "")) != "sdpa":
        return "only sdpa computes attention row by row"
    if any(kind in _BY_LENGTH for kind in _kinds_of_rope(config)):
        return "its rotary positions depend on how long the longest row is"
    return ""


def _kinds_of_rope(config: Any) -> Iterator[str]:
    waiting: list[Any] = [
        getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")
    ]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            waiting += [value for value in part.values() if isinstance(value, Mapping)]
            yield str(part.get("rope_type") or part.get("type") or "")
