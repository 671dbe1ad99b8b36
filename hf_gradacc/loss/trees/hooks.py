"""Let models compute rows that begin alike as trees: in the body, each common prefix once.

The rows of a micro-batch go into the model as they are. In front of its body (all layers, without
the head) they are laid out as trees, and behind it every row gets its hidden states back, those of
a common prefix several times. So head, loss, label smoothing, metrics and whoever else reads what
the body returns see what they always see, and a gradient that reaches a common prefix is the sum
over the rows that hold it. No model code is patched: two hooks do it, for as long as a micro-batch
runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradacc.loss.layouts import find_head
from hf_gradacc.loss.trees.attention import RowAttention, attending_by_rows
from hf_gradacc.loss.trees.held import repeat, repeat_behind
from hf_gradacc.loss.trees.kept import KeptBody
from hf_gradacc.loss.trees.layout import Trees
from hf_gradacc.loss.trees.masks import tree_masks
from hf_gradacc.loss.trees.targets import TreeTargets

__all__ = ["Watched", "computing_these", "computing_trees", "is_same", "watching_bodies"]


@dataclass
class Watched:
    """What was called while models were watched.

    Attributes:
        bodies: The first part without a head that was called in each model.
        outputs: What they returned, call by call.
    """

    bodies: list[nn.Module] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def watching_bodies(*models: Any) -> Iterator[Watched]:
    """Find the bodies of models (all layers, without a head) by watching which are called.

    What a model calls its body by is not told by its class: some pass over a wrapper of their own
    (OPT), some name none (Llama 4), and PEFT calls a model's forward without the model.

    Args:
        *models: Models, wrapped or bare; what is no model is passed over.

    Yields:
        What is called, filled while the context lasts.
    """
    watched = Watched()
    running: list[nn.Module] = []

    def enter(module: nn.Module, *_: Any) -> None:
        if not running and all(module is not body for body in watched.bodies):
            watched.bodies.append(module)
        running.append(module)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()
        if not running:
            watched.outputs.append(output)

    inside = {
        id(module): module
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not _has_head(module)
    }
    handles = []
    for module in inside.values():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _has_head(model: PreTrainedModel) -> bool:
    return model.base_model is not model or find_head(model) is not None


@contextlib.contextmanager
def computing_trees(
    bodies: Sequence[nn.Module],
    lay_out: Callable[[Tensor, Tensor | None], Trees | None],
    *,
    targets: TreeTargets | None = None,
) -> Iterator[list[Trees]]:
    """Let bodies compute trees in place of rows for as long as the context lasts.

    A body that is called with something other than rows of tokens computes it as it is.

    Args:
        bodies: From `watching_bodies`.
        lay_out: Called with the token ids and the mask that a body is given, on its device. Returns
            their trees, on that device; None to compute them as they are.
        targets: What the head will read of them, if that is known.

    Yields:
        The trees that were computed, one for each call of a body.
    """
    computed: list[Trees] = []
    handles = []
    try:
        with attending_by_rows() as attention:
            for body in bodies:
                hooks = _Hooks(body, lay_out, computed, attention, targets)
                handles += [
                    body.register_forward_pre_hook(hooks.before, with_kwargs=True),
                    body.register_forward_hook(hooks.after, always_call=True),
                ]
            yield computed
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def computing_these(
    bodies: Sequence[nn.Module],
    trees: Trees,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    targets: TreeTargets | None = None,
) -> Iterator[list[Trees]]:
    """Let bodies compute given trees wherever they are called with the rows that these are of.

    A trainer may call several models with its rows, or one of them twice: DPO asks a reference. It
    may also ask with other rows in between, which are computed as they are.

    Args:
        bodies: From `watching_bodies`.
        trees: Of the rows, on the CPU.
        ids: The rows' token ids ``[rows, seq]`` as the model is given them.
        mask: Their mask, likewise.
        targets: See `computing_trees`.

    Yields:
        The trees that were computed, one for each call of a body that they took the place of.
    """
    here = trees.to(ids.device)
    if trees.behind is not None:
        trees.behind.begin_micro_batch()
    laid_out = _versions(ids, mask)

    def lay_out(given: Tensor, of_given: Tensor | None) -> Trees | None:
        # A step or a loss may have written into the rows after they were laid out.
        if _versions(ids, mask) != laid_out:
            return None
        return here if is_same(given, ids) and is_same(of_given, mask) else None

    with computing_trees(bodies, lay_out, targets=targets) as computed:
        yield computed


def _versions(*tensors: Tensor | None) -> list[int]:
    """Return how often each was written into, as far as torch counts that."""
    return [0 if t is None or t.is_inference() else t._version for t in tensors]


def is_same(given: Tensor | None, known: Tensor | None) -> bool:
    """Compare what a body is given with what is known, by its values only if need be.

    A device would have to be waited for.
    """
    if given is None or known is None or given is known:
        return given is known
    return given.shape == known.shape and torch.equal(given, known.to(given))


class _Hooks:
    """What is done in front of a body, and behind it."""

    def __init__(
        self,
        body: nn.Module,
        lay_out: Callable[[Tensor, Tensor | None], Trees | None],
        computed: list[Trees],
        attention: RowAttention,
        targets: TreeTargets | None,
    ) -> None:
        self.config: Any = body.config
        self.lay_out = lay_out
        self.computed = computed
        self.attention = attention
        self.targets = targets
        self.running: Trees | None = None
        self.kept: KeptBody | None = None

    def before(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.running = None
        given = _named(args, kwargs)
        if given is None or getattr(self.config, "output_attentions", False):
            return None
        mask = given.get("attention_mask")
        trees = self.lay_out(given["input_ids"], mask if isinstance(mask, Tensor) else None)
        if trees is None:
            return None
        trees = self.behind_kept(trees, body, given)
        keys = None if self.kept is None else self.kept.keys
        mark = partial(self.attention.mark, kept=keys)
        dtype = next((p.dtype for p in body.parameters()), torch.float32)
        if torch.is_autocast_enabled(trees.ids.device.type):
            dtype = torch.get_autocast_dtype(trees.ids.device.type)
        given |= {
            "input_ids": trees.ids,
            "position_ids": trees.positions,
            "attention_mask": tree_masks(trees, self.config, dtype=dtype, mark=mark),
            "use_cache": False,
        }
        self.running = trees
        self.computed.append(trees)
        return (), given

    def behind_kept(self, trees: Trees, body: nn.Module, given: Mapping[str, Any]) -> Trees:
        """Return the trees that a body computes: whole ones if nothing is kept in front of them."""
        self.kept = None
        if trees.behind is None or trees.whole is None:
            return trees
        others = {key: value for key, value in given.items() if key not in _KNOWN}
        ids = trees.ids
        if any(map(_is_foreign, _hooks_on(body))):
            trees.behind.refused = "a hook on its layers as a whole would not see it"
        self.kept = trees.behind.of(body, others, attention=self.attention, ids=ids)
        return trees.whole().to(ids.device) if self.kept is None else trees

    def after(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        trees, self.running = self.running, None
        kept, self.kept = self.kept, None
        rows, in_trees, held = output, None, None
        if trees is not None and output is not None:
            of_kept = None if kept is None else kept.outputs
            in_trees, held = _states_of(output), _states_of(of_kept)
            rows = _as_rows(output, trees, of_kept)
        if self.targets is not None:
            self.targets.note(in_trees, _states_of(rows), behind=held)
        return rows


def _hooks_on(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks that a call of a module runs, and ``forward`` alone does not."""
    for name in ("_forward_pre", "_forward", "_backward_pre", "_backward"):
        yield from vars(module)[f"{name}_hooks"].values()


def _is_foreign(hook: Any) -> bool:
    return getattr(hook, "__module__", "") != __name__


_TAKEN = ("input_ids", "attention_mask", "position_ids", "use_cache")
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")
"""What models hand on with everything else, and their loss alone reads."""
_KNOWN = (*_TAKEN, *_OF_THE_LOSS)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a body's inputs by name if they are rows of tokens and nothing else, else None."""
    given = dict(kwargs)
    if len(args) == 1 and "input_ids" not in given:
        given["input_ids"] = args[0]
    elif args:
        return None
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return None
    if given.get("position_ids") is not None or given.get("output_attentions"):
        return None
    others = [value for key, value in given.items() if key not in _KNOWN]
    return None if any(_holds_something(value) for value in others) else given


def _holds_something(value: Any) -> bool:
    """Return whether an input may differ from token to token; flags and numbers do not."""
    return not (value is None or isinstance(value, bool | int | float | str))


def _states_of(output: Any) -> Any:
    """Return what stands first in a body's output: the hidden states of its last layer."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return (output or (None,))[0] if isinstance(output, tuple | list) else output


def _as_rows(output: Any, trees: Trees, kept: Any = None) -> Any:
    """Give every row what a body has computed for its tokens.

    Args:
        output: What the body returned.
        trees: Those that it computed.
        kept: What it has returned for a beginning in front of them, see `held_outputs`.
    """
    if isinstance(output, Tensor):
        num_trees, width = trees.ids.shape
        if output.shape[:2] == (num_trees, width):
            found = _taken(output.reshape(num_trees * width, *output.shape[2:]), trees, kept)
            return found.view(*trees.nodes.shape, *output.shape[2:])
        if output.ndim == 2 and output.shape[0] == num_trees * width:  # logits of a router
            return _taken(output, trees, kept)
        return output
    if isinstance(output, dict):  # Transformers' outputs, which are dictionaries of their fields
        for key, value in list(output.items()):
            output[key] = _as_rows(value, trees, None if kept is None else kept[key])
        return output
    if isinstance(output, tuple | list):
        parts = [None] * len(output) if kept is None else kept
        pairs = zip(output, parts, strict=True)
        return type(output)(_as_rows(value, trees, part) for value, part in pairs)
    return output


def _taken(states: Tensor, trees: Trees, kept: Any) -> Tensor:
    nodes = trees.nodes.reshape(-1).to(states.device)
    if trees.behind is None:
        return repeat(states, nodes)
    return repeat_behind(kept, states, nodes)
